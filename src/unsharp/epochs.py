"""The weights with which each epoch of a run ended, for methods that choose among them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from unsharp import runtime
from unsharp.artifacts import Workspace, atomic


class Epochs:
    """The weights and buffers after each epoch: with the run, so that a kill loses none, or in the host's memory.

    What is kept with the run goes when the run is whole.

    Args:
        network: The network that the run trains in place.
        workspace: Where the run keeps its state; None keeps the weights in the host's memory.
    """

    def __init__(self, network: nn.Module, workspace: Workspace | None) -> None:
        self._network = network
        self._workspace = workspace
        self._states: dict[int, dict[str, Tensor]] = {}

    def keep(self, epoch: int) -> None:
        """Keep the network as it is now."""
        state = self._network.state_dict()
        if self._workspace is None:
            self._states[epoch] = {k: v.to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in state.items()}
        elif runtime.world()[0] == 0:
            with atomic(self._file(self._workspace, epoch)) as temporary, open(temporary, "wb") as file:
                torch.save(state, file)

    def network(self, epoch: int) -> nn.Module:
        """The network as it was then, in evaluation mode."""
        if self._workspace is None:
            state = self._states[epoch]
        else:
            state = torch.load(self._file(self._workspace, epoch), map_location="cpu", weights_only=True)
        self._network.load_state_dict(state)
        return self._network.eval()

    @staticmethod
    def _file(workspace: Workspace, epoch: int) -> Path:
        return workspace.file(f".epoch-{epoch}.pt")
