"""Parts of a run of unlearning that are runs of their own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import nn

from unsharp import checkpoints, runtime
from unsharp import config as configuration
from unsharp.artifacts import RESUME_FILE, Workspace
from unsharp.methods.base import Method
from unsharp.training import Record

if TYPE_CHECKING:
    from unsharp.unlearning import UnlearnConfig

RECORD_FILE = "record.json"


class Run(Protocol):
    """`unsharp.unlearning.run`, with everything but these arguments as in the whole run."""

    def __call__(
        self,
        stage: str,
        model: nn.Module,
        forget: np.ndarray,
        retain: np.ndarray,
        config: UnlearnConfig,
        workspace: Workspace | None,
        /,
    ) -> tuple[nn.Module, Record]: ...


@dataclass(frozen=True, eq=False)
class Parts:
    """Runs other methods on parts of the task, each in a hidden directory of its own, which goes with the whole run.

    Args:
        config: That of the whole run.
        workspace: That of the whole run; None keeps nothing.
        run: Runs a part.
    """

    config: UnlearnConfig
    workspace: Workspace | None
    run: Run

    def __call__(
        self,
        model: nn.Module,
        method: Method,
        forget: np.ndarray,
        retain: np.ndarray,
        *,
        stage: str,
        settings: Mapping[str, Any],
    ) -> tuple[nn.Module, Record]:
        """As `methods.base.RunPart` says."""
        loop = {name: value for name, value in settings.items() if name != "lr"}
        if "lr" in settings:
            loop["optimizer"] = dataclasses.replace(self.config.optimizer, lr=settings["lr"])
        how = dataclasses.replace(self.config, method=method, retain_fraction=1.0, **loop)
        place = None if self.workspace is None else Workspace(self.workspace.file(f".{stage}"))
        # done or found done, its weights are put into a copy of this very network: the same bits, in the same order
        network = copy.deepcopy(model)
        if place is not None:
            place.path.mkdir(exist_ok=True)
            if place.file(checkpoints.MODEL_FILE).exists():
                weights, _ = checkpoints.load_weights(place.path)
                checkpoints.load_into(network, weights, str(place.path))
                record = configuration.from_dict(Record, configuration.read_json(place.file(RECORD_FILE)))
                return network.eval(), record
        found, record = self.run(stage, model, forget, retain, how, place)
        if place is not None and runtime.world()[0] == 0:
            place.write_json(RECORD_FILE, record)
            checkpoints.save_model(place.file(checkpoints.MODEL_FILE), found, {})
            place.file(RESUME_FILE).unlink(missing_ok=True)
        network.load_state_dict(found.state_dict())
        return network.eval(), record


def of_part(stage: str, say: Callable[[str], None] | None) -> Callable[[str], None] | None:
    """What tells the user of a part by its name; None where nobody listens."""
    if say is None:
        return None

    def tell(line: str) -> None:
        kind, _, text = line.partition(": ")
        say(f"warning: {stage}: {text}" if kind == "warning" else f"{stage}: {line}")

    return tell
