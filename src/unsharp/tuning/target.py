"""What forget accuracy to aim at where there is no retrained network: the accuracy on samples that were never seen.

A retrained network has not seen the forget set. Its accuracy there is estimated, from the original network and without
any training, in one of three ways, or given as a number:

- "classes": the original's accuracy on unseen samples (validation or test), weighted to the forget set's classes.
- "matched": the same, weighted to the forget set's classes and difficulties; needs scores of the unseen samples.
- "scores": the mean chance, by difficulty scores of the training samples, that a network which has not seen a sample of
  the forget set is right on it; shifted so that over all training samples it is the accuracy on unseen samples.

Unseen samples are not matched by the original's confidence: it has seen the forget set, and is sure of it for that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from unsharp.difficulty.kinds import ScoreKind, kind_named
from unsharp.errors import UserError, listed, unknown

TargetKind = Literal["auto", "classes", "matched", "scores"]
TARGETS = get_args(TargetKind)
NEIGHBOURS, SHARE = 10, 0.1
"""A forgotten sample is stood for by at most so many unseen ones of its class, and at most this share of them."""
EDGE = 1e-3
"""Chances are kept so far from 0 and 1, where no shift would move them."""
UNSEEN_CHANCES = ("cscore", "held_out")
"""Kinds of scores that are chances of networks which have not seen the sample."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The forget accuracy that is aimed at.

    Args:
        accuracy: 0–100.
        kind: How it was found: "classes", "matched", "scores", or "given".
        error: Its standard error in points from the number of unseen samples alone; None where it was given. What the
            estimate is worth beside that, no figure here tells.
        n_unseen: Number of unseen samples that it rests on.
        n_effective: 1 / Σ w² of their weights: equally many samples of equal weight would be as sure.
        notes: What a reader must know of it, in sentences.
    """

    accuracy: float
    kind: str
    error: float | None = None
    n_unseen: int | None = None
    n_effective: float | None = None
    notes: tuple[str, ...] = ()


def check_target(kind: str) -> None:
    """Raise UserError unless `kind` is known."""
    if kind not in TARGETS:
        raise unknown("target", kind, TARGETS)


def class_weights(unseen: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Weights of unseen samples under which their classes stand as in another set.

    Args:
        unseen: (m,) int64 labels of the unseen samples.
        wanted: (k,) int64 labels of the other set, each of a class that has an unseen sample.

    Returns:
        (m,) float64 with sum 1: the class's share in `wanted` over the number of its unseen samples.
    """
    n_classes = 1 + int(max(unseen.max(), wanted.max()))
    share = np.bincount(wanted, minlength=n_classes) / len(wanted)
    return share[unseen] / np.bincount(unseen, minlength=n_classes)[unseen]


def matched_weights(
    unseen: np.ndarray,
    unseen_scores: np.ndarray,
    wanted: np.ndarray,
    scores: np.ndarray,
    n: int = NEIGHBOURS,
    share: float = SHARE,
) -> np.ndarray:
    """Weights of unseen samples under which their classes and scores stand as in another set.

    Each sample of the other set gives equal weight to the unseen samples of its class whose scores are nearest to its
    own: to `n` of them, or a share of those that there are where that is less, but at least to one. Of equally near
    ones the first are taken. The share keeps the hardest of few from being stood for by the middling.

    Args:
        unseen: (m,) int64 labels of the unseen samples.
        unseen_scores: (m,) float64.
        wanted: (k,) int64 labels of the other set, each of a class that has an unseen sample.
        scores: (k,) float64, on the same scale.
        n: At least 1.
        share: In (0, 1].

    Returns:
        (m,) float64 with sum 1.
    """
    weights = np.zeros(len(unseen))
    for c in np.unique(wanted):
        rows = np.flatnonzero(unseen == c)
        away = np.abs(unseen_scores[rows][None, :] - scores[wanted == c][:, None])
        nearest = np.argsort(away, axis=1, kind="stable")[:, : min(n, math.ceil(share * len(rows)))]
        np.add.at(weights, rows[nearest], 1 / nearest.shape[1])
    return weights / len(wanted)


def weighted(correct: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Weighted share of correct answers and its standard error, both times 100.

    Args:
        correct: (m,) of 0 and 1.
        weights: (m,) float64 ≥ 0 with sum 1.

    Returns:
        100·Σ w·c and 100·√(Σ w²·(c − mean)²), the error of a weighted mean whose weights are fixed.
    """
    mean = float(weights @ correct)
    return 100 * mean, 100 * float(np.sqrt(weights**2 @ (correct - mean) ** 2))


def chances(difficulty: np.ndarray, kind: ScoreKind) -> np.ndarray:
    """The chance that a network which has not seen a sample is right on it, by the definition of its score.

    A C-score is that chance (Jiang et al. 2021), and so is a held-out score. A memorization score is the chance with
    the sample in the training set minus that without it (Feldman & Zhang 2020); the first is taken as 1.

    Args:
        difficulty: (n,) float64 as `load_scores` returns them: C-scores negated, memorization scores as they are.
        kind: What they are.

    Raises:
        UserError: if they are of another kind, or no such scores, since they leave [0, 1] (memorization scores:
            [−1, 1]).
    """
    if kind not in UNSEEN_CHANCES and kind != "memorization":
        raise UserError(
            f"target 'scores' needs memorization scores or C-scores, but these are {kind_named(kind).title}s; take "
            "target 'classes', or give --target-accuracy"
        )
    scores = -difficulty if kind in UNSEEN_CHANCES else difficulty
    low = 0.0 if kind in UNSEEN_CHANCES else -1.0
    if scores.min() < low - 1e-6 or scores.max() > 1 + 1e-6:
        raise UserError(
            f"target 'scores' needs scores in [{low:g}, 1], chances or differences of chances, but these reach from "
            f"{scores.min():.3g} to {scores.max():.3g}; take target 'classes', or give --target-accuracy"
        )
    return np.clip(scores if kind in UNSEEN_CHANCES else 1 - scores, 0, 1)


def shifted(chance: np.ndarray, mean: float) -> np.ndarray:
    """Chances moved by one number on the logit scale, so that their mean is as given.

    Args:
        chance: (n,) float64 in [0, 1].
        mean: In [0, 1].
    """
    from scipy.optimize import brentq
    from scipy.special import expit, logit

    at = logit(np.clip(chance, EDGE, 1 - EDGE))
    goal = float(np.clip(mean, EDGE, 1 - EDGE))
    shift = brentq(lambda b: float(expit(at + b).mean()) - goal, -30.0, 30.0)
    return expit(at + shift)


@dataclass(frozen=True, kw_only=True, eq=False)
class Unseen:
    """Samples that the original was not trained on, as far as a target needs them.

    Args:
        labels: (m,) int64.
        name: What they are called in sentences: "test" or "validation".
        scores: (m,) float64 difficulties; None where nobody gave them.
    """

    labels: np.ndarray
    name: str
    scores: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """The training samples, as far as a target needs them.

    Args:
        labels: (n,) int64.
        forget: (k,) int64 positions of the forget set.
        scores: (n,) float64 difficulties; None where nobody gave them.
        score_kind: What the scores are.
    """

    labels: np.ndarray
    forget: np.ndarray
    scores: np.ndarray | None = None
    score_kind: ScoreKind = "memorization"


class TargetPlan:
    """How a target is found, settled from labels and scores alone, before any network is asked.

    Args:
        kind: "auto" takes "matched" where unseen samples have scores, else "scores" where the training samples have
            scores that are chances, else "classes".
        seen: The training samples.
        unseen: Unseen samples; None where there are none.

    Raises:
        UserError: if there are no unseen samples, the classes of the forget set have none, or scores are missing.
    """

    def __init__(self, kind: TargetKind, seen: Seen, unseen: Unseen | None) -> None:
        check_target(kind)
        if unseen is None:
            raise UserError(
                "there are no unseen samples, neither held out (--validation) nor a test set, from which to tell what "
                "forget accuracy to aim at; give --target-accuracy"
            )
        self.seen, self.unseen, self.notes = seen, unseen, []
        labels = seen.labels[seen.forget]
        retained = np.bincount(np.delete(seen.labels, seen.forget), minlength=1 + int(seen.labels.max()))
        self.gone = retained[labels] == 0
        """Of each forgotten sample, whether nothing of its class is retained: no network would know that class."""
        self.covered = np.isin(labels, unseen.labels) & ~self.gone
        self._note_classes(labels, retained)
        if not (self.covered | self.gone).any():
            raise UserError(f"no class of the forget set has a {unseen.name} sample; give --target-accuracy")
        self.kind = self._settled(kind)

    def _note_classes(self, labels: np.ndarray, retained: np.ndarray) -> None:
        if self.gone.any():
            self.notes.append(
                f"of {int(self.gone.sum())} forgotten samples the whole class is forgotten; on these 0 % is aimed at"
            )
        lacking = np.unique(labels[~(self.covered | self.gone)])
        if len(lacking):
            self.notes.append(
                f"classes {listed(lacking.tolist())} have no {self.unseen.name} sample and are left out of the target"
            )
        counts = np.bincount(labels, minlength=len(retained))
        most = np.flatnonzero((retained > 0) & (counts > retained))
        if len(most):
            self.notes.append(
                f"most samples of classes {listed(most.tolist())} are forgotten; without them a network knows these "
                "classes less well than the original does, so the target is too high"
            )

    def _settled(self, kind: TargetKind) -> str:
        if kind == "matched" and (self.unseen.scores is None or self.seen.scores is None):
            raise UserError(
                "target 'matched' needs scores of the training samples (--train-scores) and of the unseen ones "
                "(--unseen-scores)"
            )
        if kind == "scores":
            if self.seen.scores is None:
                raise UserError("target 'scores' needs scores of the training samples; give --train-scores")
            chances(self.seen.scores, self.seen.score_kind)
        if kind != "auto":
            return kind
        if self.seen.scores is None:
            return "classes"
        if self.unseen.scores is not None:
            return "matched"
        try:
            chances(self.seen.scores, self.seen.score_kind)
        except UserError as error:
            self.notes.append(f"the forget set's difficulty is left out: {error}")
            return "classes"
        return "scores"

    def target(self, correct: np.ndarray) -> Target:
        """The target.

        Args:
            correct: (m,) of 0 and 1, whether the original is right on each unseen sample.
        """
        known = 1 - float(self.gone.mean()) / float((self.covered | self.gone).mean())
        notes = list(self.notes)
        if self.kind == "scores":
            accuracy, error, weights = self._by_scores(correct, notes)
        elif not self.covered.any():
            accuracy, error, weights = 0.0, 0.0, np.full(len(correct), 1 / len(correct))
        else:
            weights = self._weights(notes)
            accuracy, error = weighted(correct, weights)
        return Target(
            accuracy=known * accuracy,
            kind=self.kind,
            error=known * error,
            n_unseen=int((weights > 0).sum()),
            n_effective=float(1 / (weights**2).sum()),
            notes=tuple(notes),
        )

    def _weights(self, notes: list[str]) -> np.ndarray:
        chosen = self.seen.forget[self.covered]
        wanted = self.seen.labels[chosen]
        if self.kind == "classes":
            notes.append(
                "unseen samples stand for the forget set by their classes alone; where it was chosen by difficulty, a "
                "retrained network's accuracy there is another: lower on hard samples, higher on easy ones"
            )
            return class_weights(self.unseen.labels, wanted)
        assert self.seen.scores is not None  # by _settled()
        assert self.unseen.scores is not None
        ours = self.seen.scores[chosen]
        weights = matched_weights(self.unseen.labels, self.unseen.scores, wanted, ours)
        notes.append(
            f"each forgotten sample is stood for by the {self.unseen.name} samples of its class with the nearest "
            f"scores, {NEIGHBOURS} or a tenth of the class; mean difficulty {ours.mean():.3f} in the forget set, "
            f"{weights @ self.unseen.scores:.3f} in those"
        )
        return weights

    def _by_scores(self, correct: np.ndarray, notes: list[str]) -> tuple[float, float, np.ndarray]:
        assert self.seen.scores is not None  # by _settled()
        chance = chances(self.seen.scores, self.seen.score_kind)
        counted = np.isin(self.seen.labels, self.unseen.labels)
        weights = class_weights(self.unseen.labels, self.seen.labels[counted])
        unseen, error = weighted(correct, weights)
        chosen = np.isin(np.flatnonzero(counted), self.seen.forget[~self.gone])

        def on_forget(accuracy: float) -> float:
            return 100 * float(shifted(chance[counted], accuracy / 100)[chosen].mean()) if chosen.any() else 0.0

        notes.append(
            "the scores tell how often a network that has not seen a sample is right on it; they come from other "
            f"networks, so they are shifted to this one's {unseen:.1f} % on unseen samples (their mean over "
            f"all training samples is {100 * chance.mean():.1f} %, over the forget set "
            f"{100 * chance[self.seen.forget].mean():.1f} %); extremes by another network's scores are less extreme "
            "for this one"
        )
        return on_forget(unseen), abs(on_forget(unseen + error) - on_forget(unseen - error)) / 2, weights
