"""Relearning: how fast a network that forgot gets the forget set back, beside a network that never had it.

A network can answer like a retrained one and still hold what it was to forget: a little fine-tuning then brings it back
faster than a retrained network learns it. The attack fine-tunes a copy on some samples and looks, after each epoch, at
the forget samples that it was *not* fine-tuned on.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from unsharp.data.samples import Samples
from unsharp.engine import OptimizerConfig
from unsharp.errors import UserError, unknown
from unsharp.evaluation.accuracy import accuracy
from unsharp.evaluation.predictions import predict
from unsharp.progress import SILENT, Progress
from unsharp.training import TrainConfig, train

On = Literal["forget", "retain", "other"]
MOST_WATCHED = 2000
Row = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class RelearnConfig:
    """The attack.

    Args:
        on: What the copy is fine-tuned on: "forget" (a part of the forget set; the rest is judged), "retain"
            (retained samples alone, which never show it the forget set), or "other" (unrelated samples).
        n: How many of them, drawn with the seed; all of those there are, if fewer.
        epochs: Epochs over these, each a point of the curve.
        batch_size: Samples in a step.
        lr: Learning rate of SGD with momentum 0.9, without decay.
        seed: Seed of the choice and of the order.

    Raises:
        UserError: for an unknown `on`, or a number below 1.
    """

    on: On = "forget"
    n: int = 60
    epochs: int = 10
    batch_size: int = 32
    lr: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.on not in get_args(On):
            raise unknown("on", self.on, get_args(On))
        for name in ("n", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.train_config()

    def train_config(self) -> TrainConfig:
        """The fine-tuning as a training."""
        optimizer = OptimizerConfig(lr=self.lr, weight_decay=0.0)
        return TrainConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=optimizer,
            schedule="constant",
            seed=self.seed,
        )


@dataclass(frozen=True, eq=False)
class Attack:
    """Who is fine-tuned on, and who is judged; the same for every network that is compared.

    Args:
        config: The attack.
        samples: The training samples.
        forget: (k,) int64, positions of the forget set in them.
        test: Samples that no network has seen, if there are any.
        other: Unrelated samples, for `on="other"`: of the same input shape, with labels below the number of classes.
        watched: Retained and test samples, at most, on which accuracy is watched; evenly spread.

    Raises:
        UserError: if `watched` is below 1, no forget sample would be left to judge, or the samples for `on="other"`
            are missing or do not fit.
    """

    config: RelearnConfig
    samples: Samples
    forget: np.ndarray
    test: Samples | None = None
    other: Samples | None = None
    watched: int = MOST_WATCHED

    def __post_init__(self) -> None:
        if self.watched < 1:
            raise UserError(f"watched must be at least 1, got {self.watched}")
        forget = np.sort(np.asarray(self.forget, np.int64))
        object.__setattr__(self, "forget", forget)
        if self.config.on == "forget" and self.config.n >= len(forget):
            raise UserError(
                f"n is {self.config.n}, the forget set has {len(forget)} samples; fine-tune on fewer, so that some are "
                "left to judge"
            )
        if self.config.on == "other":
            if self.other is None:
                raise UserError('on="other" needs the unrelated samples: other=')
            if self.other.input_shape != self.samples.input_shape or self.other.n_classes > self.samples.n_classes:
                raise UserError(
                    f"the unrelated samples have shape {self.other.input_shape} and {self.other.n_classes} classes; "
                    f"the network takes {self.samples.input_shape} and knows {self.samples.n_classes}"
                )

    @property
    def source(self) -> Samples:
        """The samples among which the copy is fine-tuned."""
        return self.other if self.config.on == "other" and self.other is not None else self.samples

    @property
    def tuned_on(self) -> np.ndarray:
        """(n,) int64, positions in `source`, ascending."""
        pool = {"forget": self.forget, "retain": self._retained, "other": np.arange(len(self.source))}[self.config.on]
        rng = np.random.default_rng(self.config.seed)
        return np.sort(rng.choice(pool, min(self.config.n, len(pool)), replace=False))

    @property
    def judged(self) -> np.ndarray:
        """Positions of the forget samples that the copy is not fine-tuned on."""
        return np.setdiff1d(self.forget, self.tuned_on) if self.config.on == "forget" else self.forget

    @property
    def passes(self) -> int:
        """Forward–backward passes of the attack on one network."""
        return self.config.epochs * math.ceil(len(self.tuned_on) / self.config.batch_size)

    @property
    def trained(self) -> int:
        """Samples that go through these passes."""
        return self.config.epochs * len(self.tuned_on)

    @property
    def looked(self) -> int:
        """Samples that are looked at besides, before the attack and after each epoch."""
        tests = 0 if self.test is None else len(self._spread(np.arange(len(self.test))))
        each = len(self.judged) + len(self.tuned_on) + len(self._spread(self._retained)) + tests
        return (self.config.epochs + 1) * each

    @property
    def _retained(self) -> np.ndarray:
        return np.setdiff1d(np.arange(len(self.samples)), self.forget)

    def run(self, model: nn.Module, *, original: nn.Module | None = None, progress: Progress = SILENT) -> list[Row]:
        """Attack one network; it is left as it is.

        Args:
            model: On the device where the work shall happen.
            original: The network before it forgot, to say how far the copy comes back to its weights.
            progress: Told of each batch.

        Returns:
            A row for each epoch, the first of them (epoch 0) before the attack: passes, forget_accuracy (of those not
            fine-tuned on), tuned_accuracy (of those that are), retain_accuracy, test_accuracy (0–100; test only where
            there are test samples), distance (of the weights from the start), and to_original (from the original, in
            units of the distance at the start).

        Raises:
            NonFiniteError: if a step is not finite.
        """
        network = copy.deepcopy(model)
        start = [p.detach().clone() for p in network.parameters()]
        goal = None if original is None else [p.detach() for p in original.parameters()]
        apart = None if goal is None else l2_apart(start, goal)

        def looked() -> Row:
            now = [p.detach() for p in network.parameters()]
            found = self._accuracies(network) | {"distance": l2_apart(now, start)}
            if goal is not None and apart:
                found["to_original"] = l2_apart(now, goal) / apart
            return found

        rows = [{"epoch": 0.0, "passes": 0.0, **looked()}]
        train(
            network,
            self.source,
            self.tuned_on,
            self.config.train_config(),
            on_epoch=lambda: rows.append(looked()) or {},
            progress=progress,
            label="relearning",
        )
        steps = math.ceil(len(self.tuned_on) / self.config.batch_size)
        return [row | {"epoch": float(i), "passes": float(i * steps)} for i, row in enumerate(rows)]

    def _accuracies(self, model: nn.Module) -> Row:
        retained = self._spread(self._retained)
        found = {
            "forget_accuracy": accuracy(predict(model, self.samples, self.judged)),
            "tuned_accuracy": accuracy(predict(model, self.source, self.tuned_on)),
            "retain_accuracy": accuracy(predict(model, self.samples, retained)),
        }
        if self.test is not None:
            found["test_accuracy"] = accuracy(predict(model, self.test, self._spread(np.arange(len(self.test)))))
        return found

    def _spread(self, positions: np.ndarray) -> np.ndarray:
        return positions[:: max(1, math.ceil(len(positions) / self.watched))]


def relearn(
    models: Mapping[str, nn.Module],
    attack: Attack,
    *,
    original: nn.Module | None = None,
    seeds: Sequence[int] = (0,),
    progress: Progress = SILENT,
) -> list[dict[str, float | str]]:
    """Attack several networks alike, with each seed.

    Args:
        models: By name; a retrained one among them, to compare with.
        attack: The attack; its seed is replaced by each of `seeds`.
        original: As for `Attack.run`.
        seeds: Seeds of the attack.
        progress: Told of each batch.

    Returns:
        The rows of `Attack.run`, with "model" and "seed".
    """
    rows: list[dict[str, float | str]] = []
    for seed in seeds:
        this = dataclasses.replace(attack, config=dataclasses.replace(attack.config, seed=seed))
        for name, model in models.items():
            found = this.run(model, original=original, progress=progress)
            rows += [{"model": name, "seed": float(seed), **row} for row in found]
    return rows


def recovery(
    curve: Sequence[Mapping[str, float]], reference: Sequence[Mapping[str, float]], figure: str = "forget_accuracy"
) -> dict[str, float]:
    """How much more a network gets back than one that never had it.

    Args:
        curve: Rows of the network that forgot.
        reference: Rows of the retrained network under the same attack.
        figure: By which column it is judged.

    Returns:
        In units of that column: "gain" (from start to end of the network), "reference_gain" (of the retrained
        one), "excess" (their difference: 0 is the ideal, above it the forget set is brought back), and "excess_area"
        (the mean over the points of the curve of the difference of the gains).

    Raises:
        UserError: if the curves are not of equal length.
    """
    if len(curve) != len(reference) or not curve:
        raise UserError(f"the curves have {len(curve)} and {len(reference)} points; run both under the same attack")
    ours, theirs = (np.array([row[figure] for row in rows]) for rows in (curve, reference))
    gain, expected = ours - ours[0], theirs - theirs[0]
    return {
        "gain": float(gain[-1]),
        "reference_gain": float(expected[-1]),
        "excess": float(gain[-1] - expected[-1]),
        "excess_area": float((gain - expected).mean()),
    }


def l2_apart(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """‖a − b‖₂ over tensors of equal shapes."""
    squares = [(a - b).double().square().sum() for a, b in zip(first, second, strict=True)]
    return float(torch.stack(squares).sum().sqrt())


__all__ = ["Attack", "RelearnConfig", "l2_apart", "recovery", "relearn"]
