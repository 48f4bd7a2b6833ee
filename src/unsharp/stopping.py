"""When a run of unlearning ends before its last epoch, and what is said of one in which the network breaks down."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import nn

from unsharp.data.samples import Samples
from unsharp.errors import NonFiniteError, UserError

StopAt = float | Literal["retrained"]
LEARNT = 20.0
"""Points above a guess from which on a network has something to lose."""
FEW = 10
"""Of fewer forget samples an accuracy says too little to be judged."""


def check_stop_at(stop_at: StopAt) -> None:
    """Raises: UserError unless it is an accuracy in [0, 100], or "retrained"."""
    if stop_at == "retrained":
        return
    if isinstance(stop_at, str) or not (math.isfinite(stop_at) and 0 <= stop_at <= 100):
        raise UserError(f"stop_at must be a forget accuracy in [0, 100] (%) or 'retrained', got {stop_at!r}")


def forget_accuracy(model: nn.Module, samples: Samples, forget: np.ndarray) -> float:
    """Accuracy (0–100) on all forget samples, in evaluation mode. Raises: NonFiniteError if an output is not finite."""
    from unsharp.evaluation.accuracy import accuracy
    from unsharp.evaluation.predictions import predict

    try:
        return accuracy(predict(model, samples, forget))
    except UserError as error:
        raise NonFiniteError(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class Target:
    """The forget accuracy at which a run stops: once that of an epoch's end is at most this.

    Args:
        accuracy: 0–100, on all forget samples.
        retrained: Whether it is that of the retrained network.
    """

    accuracy: float
    retrained: bool = False

    @classmethod
    def of(
        cls,
        stop_at: StopAt,
        samples: Samples,
        forget: np.ndarray,
        retrain: Callable[[], tuple[nn.Module, Any]] | None,
    ) -> Target:
        """What `stop_at` means for these samples; "retrained" retrains, or finds the network that was.

        Raises:
            UserError: if a network should be retrained, and nobody knows how.
        """
        if not isinstance(stop_at, str):
            return cls(accuracy=stop_at)
        if retrain is None:
            raise UserError(NOT_RETRAINABLE)
        network, _ = retrain()
        return cls(accuracy=forget_accuracy(network, samples, forget), retrained=True)

    def __str__(self) -> str:
        return f"{self.accuracy:.1f} %{', that of the retrained network' if self.retrained else ''}"

    def reached(self, row: Mapping[str, float]) -> bool:
        """Whether the run may end after this epoch."""
        return row["forget_accuracy"] <= self.accuracy

    def outcome(self, history: Sequence[Mapping[str, float]], epochs: int) -> dict[str, Any]:
        """Where a run ended, for its record: target, epoch, epochs, reached, forget_accuracy."""
        last = history[-1]
        return {
            "target": self.accuracy,
            "of": "retrained" if self.retrained else "given",
            "epoch": int(last["epoch"]),
            "epochs": epochs,
            "reached": self.reached(last),
            "forget_accuracy": last["forget_accuracy"],
        }


NOT_RETRAINABLE = (
    "stop_at 'retrained' needs to know how the model was trained: give --train-config FILE (in Python: make_model and "
    "train_config), a checkpoint that unsharp trained, or stop_at as a number"
)


def told(outcome: Mapping[str, Any]) -> str:
    """A sentence about where a run ended. Args: what `Target.outcome` gives."""
    target = f"{outcome['target']:.1f} %{', that of the retrained network' if outcome['of'] == 'retrained' else ''}"
    at = f"{outcome['forget_accuracy']:.1f} %"
    if outcome["reached"]:
        where = f"stopped after epoch {outcome['epoch']} of {outcome['epochs']}"
        return f"{where}: forget accuracy is {at}, and was to come down to {target}"
    return (
        f"ran all {outcome['epochs']} epochs: forget accuracy is {at}, and did not come down to {target}; take more "
        "epochs or a higher learning rate, or give the forget loss more weight (alpha, where the method has it)"
    )


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """Finds in a run's curves where the network broke down.

    The retain accuracy has broken down when more than half of what it had above a guess is lost. The forget accuracy
    has gone too far when it is at a guess or below while at least half of the epochs are still to come.

    Args:
        start: Accuracies (0–100) of the network before the run, as the curves have them: "retain_accuracy",
            "forget_accuracy".
        epochs: Epochs of the whole run.
        retain_guess: Accuracy (0–100) of the best constant answer on the retained samples.
        forget_guess: Accuracy (0–100) of a guess among all classes; None where forgetting may well go so far.
    """

    start: Mapping[str, float]
    epochs: int
    retain_guess: float
    forget_guess: float | None

    @classmethod
    def watched(
        cls,
        samples: Samples,
        forget: np.ndarray,
        retain: np.ndarray,
        start: Mapping[str, float],
        *,
        epochs: int,
        target: Target | None,
    ) -> Breakdown:
        """For these samples.

        Forgetting may go down to a guess where a target says how far, where few samples are forgotten, and where
        whole classes are: a retrained network does not know these.
        """
        classes = np.unique(samples.labels[forget])
        gone = not np.isin(classes, samples.labels[retain]).any()
        judged = target is None and len(forget) >= FEW and not gone
        most = np.bincount(samples.labels[retain]).max() / len(retain)
        return cls(
            start=start,
            epochs=epochs,
            retain_guess=100 * max(1 / samples.n_classes, float(most)),
            forget_guess=100 / samples.n_classes if judged else None,
        )

    def warnings(self, history: Sequence[Mapping[str, float]]) -> list[str]:
        """A line for the first epoch at which either happened, in the order in which they did."""
        found: dict[str, str] = {}
        for row in history:
            if "retain" not in found and self._lost(row):
                found["retain"] = self._about_retain(row)
            # where the whole network has broken down, the forget accuracy says nothing more
            if not found and self._too_far(row):
                found["forget"] = self._about_forget(row)
        return list(found.values())

    def _lost(self, row: Mapping[str, float]) -> bool:
        start = self.start.get("retain_accuracy")
        if start is None or "retain_accuracy" not in row or start < self.retain_guess + LEARNT:
            return False
        return row["retain_accuracy"] < (start + self.retain_guess) / 2

    def _too_far(self, row: Mapping[str, float]) -> bool:
        start, guess = self.start.get("forget_accuracy"), self.forget_guess
        if start is None or guess is None or "forget_accuracy" not in row or start < guess + LEARNT:
            return False
        return row["forget_accuracy"] <= guess and 2 * row["epoch"] <= self.epochs

    def _about_retain(self, row: Mapping[str, float]) -> str:
        return (
            f"epoch {int(row['epoch'])} of {self.epochs}: retain accuracy has fallen from "
            f"{self.start['retain_accuracy']:.1f} % to {row['retain_accuracy']:.1f} %, where a guess has "
            f"{self.retain_guess:.1f} %: the network breaks down; lower the learning rate, take fewer epochs, or give "
            "the retain loss more weight (alpha, where the method has it)"
        )

    def _about_forget(self, row: Mapping[str, float]) -> str:
        return (
            f"epoch {int(row['epoch'])} of {self.epochs}: forget accuracy has fallen from "
            f"{self.start['forget_accuracy']:.1f} % to {row['forget_accuracy']:.1f} %, no better than a guess "
            f"({self.forget_guess:.1f} %): a network retrained without these samples seldom does so badly; lower the "
            "learning rate, take fewer epochs, or let the run stop in time (stop_at)"
        )


class Watch:
    """Looks at a run after each epoch: whether it has come to its end, and whether the network breaks down.

    Args:
        model: The network before the run.
        samples: Its training data.
        forget: Positions to forget.
        retain: Positions that the run retains.
        epochs: Epochs of the whole run.
        batch_size: That of the run, in which passes are counted.
        stop_at: The forget accuracy at which the run ends; None runs all epochs.
        retrain: Gives the retrained network, where its accuracy is the one to stop at.
        on_epoch: Gives the accuracies of a network, as the history has them; None where nobody looks.
        say: Takes a line for the user; None where nobody listens.
        cautions: What the user is to know before the run.

    Raises:
        UserError: if a network should be retrained, and nobody knows how.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Samples,
        forget: np.ndarray,
        retain: np.ndarray,
        *,
        epochs: int,
        batch_size: int,
        stop_at: StopAt | None,
        retrain: Callable[[], tuple[nn.Module, Any]] | None,
        on_epoch: Callable[[nn.Module], Mapping[str, float]] | None,
        say: Callable[[str], None] | None,
        cautions: Sequence[str] = (),
    ) -> None:
        self._samples, self._forget, self._epochs, self._batch_size = samples, forget, epochs, batch_size
        self._say = say or (lambda line: None)
        self._target = None if stop_at is None else Target.of(stop_at, samples, forget, retrain)
        self._at_start = [*cautions, *self._early(model)]
        for line in self._at_start:
            self._say(f"warning: {line}")
        self._breakdown = Breakdown.watched(
            samples,
            forget,
            retain,
            {} if on_epoch is None or say is None else on_epoch(model),
            epochs=epochs,
            target=self._target,
        )

    def measured(self, network: nn.Module) -> dict[str, float]:
        """What has to be known of the network after an epoch."""
        if self._target is None:
            return {}
        return {"forget_accuracy": self._accuracy(network)}

    def ends(self, history: Sequence[Mapping[str, float]]) -> bool:
        """Whether the run may end after this epoch; says what is new."""
        for line in self._breakdown.warnings(history)[len(self._breakdown.warnings(history[:-1])) :]:
            self._say(f"warning: {line}")
        ended = self._target is not None and self._target.reached(history[-1])
        if self._target is not None and (ended or len(history) == self._epochs):
            self._say(told(self._target.outcome(history, self._epochs)))
        return ended

    def passes(self, epochs: int) -> int:
        """What looking took: a pass forward alone is a third of one."""
        if self._target is None:
            return 0
        return round(epochs * math.ceil(len(self._forget) / self._batch_size) / 3)

    def about(self, history: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """What the record says."""
        found: dict[str, Any] = {}
        if self._target is not None:
            found["stop"] = self._target.outcome(history, self._epochs)
        if warnings := self._at_start + self._breakdown.warnings(history):
            found["warnings"] = warnings
        return found

    def _early(self, model: nn.Module) -> list[str]:
        if self._target is None or (before := self._accuracy(model)) > self._target.accuracy:
            return []
        return [
            f"forget accuracy is {before:.1f} % before the first step, and was to come down to {self._target}: there "
            "is nothing to bring down, and the run ends as soon as an epoch ends so low"
        ]

    def _accuracy(self, network: nn.Module) -> float:
        return forget_accuracy(network, self._samples, self._forget)
