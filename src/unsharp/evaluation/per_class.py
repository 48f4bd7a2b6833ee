"""Who else was hurt? Accuracy class by class, the network's beside the retrained model's on the same samples.

A mean over all samples hides a class that was lost: of 100 classes one can fall by 50 points while the mean falls by
half a point. But the worst of 100 is low by chance too, however equal two networks are, so it stands beside the value
that chance gives, and the test of each class is corrected for the number of classes.

Both networks see the same samples, so the samples on which they differ are compared (McNemar), which tells far more
than two accuracies with an interval each. The tests cover the choice of the samples. They do not cover that another
seed of retraining gives another network: two retrained networks may differ in a class by more than samples explain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from unsharp import stats
from unsharp.errors import UserError
from unsharp.evaluation.accuracy import by_sample, correctness
from unsharp.evaluation.metrics import Metric, register
from unsharp.evaluation.predictions import Evidence, Predictions

GROUP = "per_class"
LEVEL = 0.05
DRAWS = 1000
Seen = Literal["retain", "test"]


@dataclass(frozen=True, eq=False)
class PerClass:
    """The classes of one set of samples, an entry for each class that has samples in it, by ascending number.

    Attributes:
        split: "retain" or "test".
        classes: (c,) int64, numbers of the classes.
        n: (c,) int64, samples of the class in this set.
        n_forget: (c,) int64, samples of the class in the forget set.
        model: (c,) float64, accuracy of the network, 0–100.
        reference: (c,) float64, accuracy of the retrained model, 0–100.
        lost: (c,) int64, samples that the retrained model has right and the network wrong.
        won: (c,) int64, samples the other way round.
        p: (c,) float64, two-sided exact McNemar test of each class.
        p_adjusted: (c,) float64, the same for all classes together (Holm).
        worst_if_alike: Mean of the lowest gap of all, were it a matter of chance which network has right the samples
            on which they differ; in points, ≤ 0.
        worst_p: Probability that the lowest gap is then as low as here.
    """

    split: Seen
    classes: np.ndarray
    n: np.ndarray
    n_forget: np.ndarray
    model: np.ndarray
    reference: np.ndarray
    lost: np.ndarray
    won: np.ndarray
    p: np.ndarray
    p_adjusted: np.ndarray
    worst_if_alike: float
    worst_p: float

    @property
    def gap(self) -> np.ndarray:
        """(c,) float64, accuracy less the retrained model's, in points; below 0 the class was hurt."""
        return 100.0 * (self.won - self.lost) / self.n

    @property
    def worst(self) -> int:
        """Position of the class with the lowest gap, the first of equal ones."""
        return int(self.gap.argmin())

    def lower(self, level: float = LEVEL) -> np.ndarray:
        """Numbers of the classes in which the network is worse, with at most `level` for a single false one."""
        return self.classes[(self.p_adjusted <= level) & (self.lost > self.won)]

    def higher(self, level: float = LEVEL) -> np.ndarray:
        """Numbers of the classes in which the network is better, likewise."""
        return self.classes[(self.p_adjusted <= level) & (self.lost < self.won)]

    def mean_gap(self, forgotten: bool) -> float | None:
        """The plain mean of the gaps over the classes with samples in the forget set, or over those without.

        Args:
            forgotten: Which of the two.

        Returns:
            In points; None where there is no such class.
        """
        chosen = (self.n_forget > 0) == forgotten
        return float(self.gap[chosen].mean()) if chosen.any() else None

    def rows(self, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """A row for each class, the most hurt first, as plain values.

        Args:
            names: Names of all classes, by number; the numbers by default.
        """
        order = np.lexsort((self.classes, self.gap))
        columns = ("n", "n_forget", "model", "reference", "gap", "lost", "won", "p", "p_adjusted")
        return [
            {"class": self._name(i, names)} | {column: getattr(self, column)[i].item() for column in columns}
            for i in order.tolist()
        ]

    def sentence(self, names: Sequence[str] | None = None, level: float = LEVEL) -> str:
        """What can be said of the worst class and of all, with the number of classes taken into account.

        Args:
            names: As for `rows`.
            level: Probability of one false class among those named.
        """
        i, c = self.worst, len(self.classes)
        text = (
            f"On {self.split} samples class {self._name(i, names)} has the lowest gap of {c} classes: "
            f"{self.model[i]:.1f} % against {self.reference[i]:.1f} % of the retrained network ({self.gap[i]:+.1f} "
            f"points, {self.n[i]} samples). Were it chance which of the two is right where they differ, the lowest "
            f"would be about {self.worst_if_alike:+.1f} points, and as low as this with probability "
            f"{self.worst_p:.2g}. "
            f"{len(self.lower(level))} classes are lower and {len(self.higher(level))} higher than in the retrained "
            f"network (exact McNemar tests, Holm's correction for {c} classes, level {level:g})."
        )
        means = [(self.mean_gap(forgotten), forgotten) for forgotten in (True, False)]
        said = [
            f"{gap:+.1f} over classes {'with' if f else 'without'} forgotten samples"
            for gap, f in means
            if gap is not None
        ]
        return f"{text} Mean gap: {', '.join(said)}.".replace(" -", " −").replace("(-", "(−")

    def _name(self, i: int, names: Sequence[str] | None) -> str | int:
        number = int(self.classes[i])
        return number if names is None else names[number]


def per_class(evidence: Evidence, split: Seen = "test") -> PerClass:
    """Each class of the retained or the test samples, the network beside the retrained model.

    Args:
        evidence: Outputs of the network and of the retrained model; its seed seeds the value under chance.
        split: "retain" or "test".

    Raises:
        UserError: if there is no retrained model, or there are no such samples.
    """
    if split not in ("retain", "test"):
        raise UserError(f"split must be 'retain' or 'test', got {split!r}")
    ours, theirs = getattr(evidence.model, split), getattr(evidence.reference, split, None)
    if ours is None or theirs is None:
        raise UserError(f"per_class needs the outputs of a retrained model, and {split} samples")
    n_classes, labels = ours.logits.shape[1], ours.labels

    def counted(rows: np.ndarray) -> np.ndarray:
        return np.bincount(labels[rows], minlength=n_classes)

    right, right_there = _right(ours), _right(theirs)
    n = counted(np.ones(len(labels), bool))
    there = np.flatnonzero(n)
    n, model, reference = n[there], counted(right)[there], counted(right_there)[there]
    lost, won = counted(~right & right_there)[there], counted(right & ~right_there)[there]
    p = mcnemar(lost, won)
    lowest = lowest_by_chance(lost + won, n, evidence.seed)
    worst = (100.0 * (won - lost) / n).min()
    return PerClass(
        split=split,
        classes=there,
        n=n,
        n_forget=np.bincount(evidence.model.forget.labels, minlength=n_classes)[there],
        model=100.0 * model / n,
        reference=100.0 * reference / n,
        lost=lost,
        won=won,
        p=p,
        p_adjusted=stats.holm(p),
        worst_if_alike=float(lowest.mean()),
        worst_p=float((1 + (lowest <= worst + 1e-9).sum()) / (1 + len(lowest))),
    )


def _right(predictions: Predictions) -> np.ndarray:
    return by_sample(correctness, predictions) > 0


def mcnemar(lost: np.ndarray, won: np.ndarray) -> np.ndarray:
    """The two-sided exact test that of the samples on which two networks differ each is as often right.

    Args:
        lost: (c,) int ≥ 0, samples that only the one has right.
        won: (c,) int ≥ 0, samples that only the other has right.

    Returns:
        (c,) float64: min(1, 2 Pr[B ≤ min(lost, won)]) with B binomial of lost + won trials at ½; 1 without a trial.

    Source: McNemar 1947, in its exact form.
    """
    from scipy.special import bdtr

    return np.minimum(1.0, 2.0 * bdtr(np.minimum(lost, won), lost + won, 0.5))


def lowest_by_chance(differing: np.ndarray, n: np.ndarray, seed: int, draws: int = DRAWS) -> np.ndarray:
    """The lowest gap of all classes, again and again, if on each differing sample either network is right by chance.

    Args:
        differing: (c,) int ≥ 0, samples that exactly one of the two has right.
        n: (c,) int ≥ 1, samples of the class.
        seed: Seed of the draws.
        draws: How many.

    Returns:
        (draws,) float64, in points, ≤ 100.
    """
    some = differing > 0
    lowest = np.zeros(draws) if not some.all() else np.full(draws, np.inf)
    if not some.any():
        return lowest
    won = np.random.default_rng(seed).binomial(differing[some], 0.5, (draws, int(some.sum())))
    return np.minimum(lowest, (100.0 * (2 * won - differing[some]) / n[some]).min(axis=1))


# --- the registered metrics -------------------------------------------------------------------------------------------


def _on(split: Seen, evidence: Evidence) -> dict[str, float | None]:
    found = per_class(evidence, split)
    return {
        "worst_gap": float(found.gap[found.worst]),
        "worst_gap_if_alike": found.worst_if_alike,
        "classes_lower": float(len(found.lower())),
        "classes_higher": float(len(found.higher())),
        "forget_classes_gap": found.mean_gap(True),
        "other_classes_gap": found.mean_gap(False),
    }


def _register(split: Seen) -> None:
    register(
        Metric(
            name=f"{split}_classes",
            title=f"Classes of {split}",
            formula=f"g_k = accuracy on {split} samples of class k less the retrained model's: `worst_gap` = min g_k, "
            "`worst_gap_if_alike` = its mean were it chance which network is right where they differ, `classes_lower` "
            f"and `classes_higher` = classes with g_k below and above 0 (exact McNemar, Holm, level {LEVEL:g}), "
            "`forget_classes_gap` and `other_classes_gap` = mean g_k over classes with and without forget samples",
            direction="to_reference",
            ideal="0; `worst_gap` that of `worst_gap_if_alike`",
            unit="points; numbers of classes",
            source="McNemar 1947; Holm 1979; the value under chance is this library's",
            compute=partial(_on, split),
            needs=("reference", "test") if split == "test" else ("reference",),
            group=GROUP,
        )
    )


for _split in ("retain", "test"):
    _register(_split)
