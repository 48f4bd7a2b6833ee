"""Boundary Shrink: train the forget samples towards the class beyond their nearest decision boundary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from unsharp import artifacts, runtime
from unsharp.data.samples import Samples
from unsharp.data.streams import evaluation_batches
from unsharp.errors import NonFiniteError, UserError
from unsharp.methods.base import METHODS, PhasedMethod, Problem, check_fraction
from unsharp.methods.relabel import Relabelled, check_classes
from unsharp.models.modes import evaluating
from unsharp.phases import Phase

LABELS_FILE = ".boundary_labels.pt"
BATCH = 256


@METHODS.register("boundary_shrink")
@dataclass(frozen=True, kw_only=True)
class BoundaryShrink(PhasedMethod):
    """Train the forget samples under the label of the nearest incorrect class, which one step of attack finds.

    Args:
        bound: How far the attack moves every input value, above 0; for images on the scale [0, 1] of the pixels, for
            other inputs on their own.
        other_classes: New labels are of other classes than the sample's own; False lets that one in, as the published
            code does.
        alpha: Weight α in [0, 1] of the retain loss beside that of forget; the paper reads the forget set alone.
    """

    source: ClassVar[str] = (
        "Chen et al., CVPR 2023 (Boundary Unlearning, arXiv 2303.11570); bound of its published code"
    )
    formula: ClassVar[str] = (
        "y' = class ≠ y with the largest original logit at x + bound·sign(∇ₓCE(x, y));  "
        "L = α·mean over retain of CE + (1−α)·mean over forget of CE(y')"
    )
    suggested: ClassVar[Mapping[str, Any]] = {"lr": 1e-3}
    tunable: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}

    bound: float = 0.1
    other_classes: bool = True
    alpha: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bound) and self.bound > 0):
            raise UserError(f"bound must be a finite number above 0, got {self.bound}")
        check_fraction("alpha", self.alpha)

    @property
    def no_retain_fraction(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "" if self.alpha > 0 else "with alpha = 0 it reads no retained sample"

    def phases(self, problem: Problem) -> list[Phase]:
        check_classes(problem.samples)
        labels = torch.full((len(problem.samples),), -1)
        labels[torch.from_numpy(problem.forget)] = self._labels(problem)
        objective = Relabelled(self.alpha, lambda at: labels)
        return [Phase(objective=objective, rule=problem.rule, name="boundary_shrink")]

    def preparation_passes(self, problem: Problem, batch_size: int) -> int:
        n_batches = -(-len(problem.forget) // batch_size)
        return n_batches + -(-n_batches // 3)  # the attack's pass, and one forward to see where it led

    def _labels(self, problem: Problem) -> Tensor:
        """The labels of the forget set, found once and kept with the run."""
        path = None if problem.workspace is None else problem.workspace.file(LABELS_FILE)
        if path is not None and path.exists():
            return torch.load(path, weights_only=True)
        labels = nearest_classes(
            problem.model, problem.samples, problem.forget, bound=self.bound, other_classes=self.other_classes
        )
        if path is not None:
            with artifacts.atomic(path) as temporary, open(temporary, "wb") as file:
                torch.save(labels, file)
        return labels


def nearest_classes(
    model: nn.Module, samples: Samples, positions: np.ndarray, *, bound: float, other_classes: bool = True
) -> Tensor:
    """The classes that a network sees in samples after one step of attack (FGSM) away from their own.

    Evaluation mode, no augmentation, no autocast; the model is left as it was. An image stays within black and white.

    Args:
        model: Maps (B, ...) inputs to (B, K) logits; on the samples' device.
        samples: Where inputs and labels come from.
        positions: (k,) int64 positions in the samples.
        bound: Size > 0 of the step for every input value: of pixels on the scale [0, 1] where it is known how they
            were normalised, else of the network's inputs.
        other_classes: Leave out the sample's own class, also where the attack failed.

    Returns:
        (k,) int64 on the host.

    Raises:
        UserError: if the inputs are no real numbers.
        NonFiniteError: if a logit is NaN or infinite.

    Source: Chen et al. 2023, eq. 2–3; Goodfellow et al., ICLR 2015 (FGSM).
    """
    device, found = runtime.device_of(model), []
    with evaluating(model), torch.enable_grad(), runtime.full_float32(), torch.autocast(device.type, enabled=False):
        for batch in evaluation_batches(samples, positions, BATCH):
            if not batch.inputs.is_floating_point():
                raise UserError(
                    f"boundary_shrink moves the inputs a little, which {batch.inputs.dtype} cannot; take random_label"
                )
            inputs = batch.inputs.detach().clone().requires_grad_()
            loss = nn.functional.cross_entropy(model(inputs), batch.labels, reduction="sum")
            (slope,) = torch.autograd.grad(loss, inputs)
            with torch.no_grad():
                logits = model(_moved(batch.inputs, slope.sign(), bound, samples.treatment)).clone()
                if not bool(torch.isfinite(logits).all()):
                    raise NonFiniteError("the original network gives logits that are NaN or infinite; it is broken")
                if other_classes:
                    logits.scatter_(1, batch.labels[:, None], -torch.inf)
                found.append(logits.argmax(1).cpu())
    return torch.cat(found)


def _moved(inputs: Tensor, direction: Tensor, bound: float, treatment: Mapping[str, Any]) -> Tensor:
    """inputs + bound · direction, the bound and the limits on the scale of the pixels where that is known."""
    if "std" not in treatment:
        return inputs + bound * direction
    mean, std = (inputs.new_tensor(treatment[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    moved = inputs + bound / std * direction
    return torch.minimum(torch.maximum(moved, (0 - mean) / std), (1 - mean) / std)
