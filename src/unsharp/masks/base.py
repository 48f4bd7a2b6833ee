"""What a selection is: it looks at a network and perhaps at samples, and says which weights a mask marks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
from torch import Tensor, nn

from unsharp.errors import UserError, unknown
from unsharp.masks.entries import Mask, check_fraction, select_entries
from unsharp.registry import Registry

if TYPE_CHECKING:
    from unsharp.data.samples import Batch, Samples

On = Literal["forget", "training"]
SELECTIONS: Registry[Selection] = Registry("selection", "unsharp.masks.selections")
"""Every registered selection, by name."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which weights a mask marks.

    Args:
        fraction: Share of the trainable entries that are 1, in (0, 1].
        select: Name of the selection.
        per_layer: Take the fraction of each tensor rather than of all together.
        n_probes: Random vectors of signs for the diagonal of a matrix, at least 1.
        score_on: Samples that a selection looks at: those of the "forget" set, or all of the "training" set; None takes
            the selection's own.
        score_samples: Most samples that a selection by curvature looks at, drawn with the seed; at least 1.
        seed: Seed of what is drawn, at least 0.

    Raises:
        UserError: for a value out of its range, or that the selection has no use for.
    """

    fraction: float = 0.3
    select: str = "largest"
    per_layer: bool = False
    n_probes: int = 30
    score_on: On | None = None
    score_samples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        if self.select not in SELECTIONS:
            raise unknown("select", self.select, SELECTIONS)
        if self.seed < 0:
            raise UserError(f"seed must be at least 0, got {self.seed}")
        for name in ("n_probes", "score_samples"):
            value = getattr(self, name)
            if isinstance(value, bool) or value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.score_on is not None and self.score_on not in get_args(On):
            raise unknown("score_on", self.score_on, get_args(On))
        if self.score_on is not None and not self.selection.reads:
            raise UserError(f"select {self.select!r} looks at no sample; leave score_on out")
        if self.per_layer and not self.selection.ranks:
            raise UserError(f"select {self.select!r} takes whole layers; leave per_layer out")

    @property
    def selection(self) -> Selection:
        """The selection itself."""
        return SELECTIONS[self.select]

    def positions(self, forget: np.ndarray, training: np.ndarray) -> np.ndarray:
        """The positions of the samples that the selection looks at; none where it looks at none."""
        on = self.score_on or self.selection.reads
        indices = {"forget": forget, "training": training}.get(on, np.zeros(0, np.int64))
        if not self.selection.capped or len(indices) <= self.score_samples:
            return np.asarray(indices)
        return np.sort(np.random.default_rng(self.seed).choice(indices, self.score_samples, replace=False))


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What a selection may look at.

    Args:
        model: Maps (B, ...) inputs to (B, K) logits; on the samples' device. It is left as it is.
        samples: Where the inputs come from.
        forget: Positions of the forget set.
        training: Positions of all that the network was trained on, the forget set with it.
        batch_size: Samples that go through together, at least 1.
        loss: Sum (0-d) of the losses of a batch's samples; None is the cross-entropy of the logits.
        mean_loss: Makes the mean loss from model, samples, indices and batch_size; None is that of the cross-entropy.
    """

    model: nn.Module
    samples: Samples
    forget: Sequence[int] | np.ndarray
    training: Sequence[int] | np.ndarray
    batch_size: int = 256
    loss: Callable[[nn.Module, Batch], Tensor] | None = None
    mean_loss: Callable[..., Any] | None = None


class Selection(ABC):
    """A way to choose weights."""

    reads: ClassVar[Literal["forget", "training", ""]] = ""
    """The samples that it looks at, unless `score_on` says others; empty where it looks at none."""
    capped: ClassVar[bool] = False
    """Whether it looks at `score_samples` of them at most."""
    ranks: ClassVar[bool] = True
    """Whether it ranks entries, so that the fraction, and `per_layer`, say how many are marked."""
    formula: ClassVar[str]
    source: ClassVar[str]

    @abstractmethod
    def mask(self, basis: Basis, choice: Choice) -> Mask:
        """The mask: bool tensors by name, for every trainable parameter."""

    def passes(self, n_batches: int, choice: Choice, model: nn.Module) -> int:
        """Forward–backward passes over batches that it takes on the model, looking at `n_batches` of them."""
        return 0


class ScoredSelection(Selection):
    """A selection that gives each entry a score and marks those at one end, exactly round(fraction · n) of them."""

    end: ClassVar[Literal["largest", "smallest"]] = "largest"

    @abstractmethod
    def scores(self, basis: Basis, indices: np.ndarray, choice: Choice) -> Mask:
        """The score of each trainable entry, in tensors by name; any sign.

        Args:
            basis: What there is to look at.
            indices: Positions of the samples to look at.
            choice: Its `n_probes` and `seed` are for this.

        Raises:
            NonFiniteError: if a score is NaN or infinite.
        """

    def mask(self, basis: Basis, choice: Choice) -> Mask:
        indices = choice.positions(np.asarray(basis.forget), np.asarray(basis.training))
        if self.reads and len(indices) == 0:
            raise UserError("indices is empty; a saliency needs at least one sample")
        values = self.scores(basis, indices, choice)
        return select_entries(
            values, fraction=choice.fraction, select=self.end, per_layer=choice.per_layer, signed=True
        )
