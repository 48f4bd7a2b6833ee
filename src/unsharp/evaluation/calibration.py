"""Does the network know how often it is right? Calibration error of the confidence, and the Brier score.

A network that was pushed to forget is often wrong with confidence, or right without; accuracy sees neither. All figures
are compared with the retrained model's: a network that is trained to a loss near 0 is overconfident as well.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from unsharp.errors import UserError
from unsharp.evaluation.accuracy import Split, by_sample, log_softmax
from unsharp.evaluation.metrics import Metric, Need, register
from unsharp.evaluation.predictions import Evidence, Predictions

GROUP = "calibration"
BINS = 15
"""Of both kinds, as Guo et al. 2017 have it."""


class Calibration(NamedTuple):
    """How well confidence and correctness agree.

    Args:
        ece: Expected calibration error in bins of equal width, 0–100.
        ece_equal_mass: The same in bins of equally many samples, 0–100.
        rms_debiased: Root of the mean squared calibration error without the bias of few samples, 0–100; 0 where the
            estimate of the square is below 0, None for a single sample.
        overconfidence: Mean confidence less accuracy, −100–100; below 0 the network is less sure than it could be.
        brier: Brier score over all classes, in [0, 2].
    """

    ece: float
    ece_equal_mass: float
    rms_debiased: float | None
    overconfidence: float
    brier: float


class Bins(NamedTuple):
    """What is in each bin that is not empty; float64 (b,).

    Args:
        n: Samples.
        confidence: Their mean confidence, in [0, 1].
        accuracy: Share that is right, in [0, 1].
    """

    n: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


# --- bins -------------------------------------------------------------------------------------------------------------


def equal_width(confidence: np.ndarray, correct: np.ndarray, n_bins: int = BINS) -> Bins:
    """The samples in bins (0, 1/B], (1/B, 2/B], ..., of which empty ones are left out.

    Args:
        confidence: (n,) float in (0, 1].
        correct: (n,) 0 or 1, or bool.
        n_bins: B ≥ 1.

    Raises:
        UserError: if an argument is out of range.
    """
    confidence, correct = _checked(confidence, correct, n_bins)
    place = np.searchsorted(np.arange(n_bins + 1) / n_bins, confidence, side="left") - 1
    return _filled(place, confidence, correct)


def equal_mass(confidence: np.ndarray, correct: np.ndarray, n_bins: int = BINS) -> Bins:
    """The samples, by ascending confidence, in bins of n/B, rounded up or down.

    Samples of equal confidence stay together, in the bin of their middle one, so the order of the samples does not
    matter. No bin holds a single sample, unless there is only one: it joins the bin below it, or the lowest the next.

    Args:
        confidence: (n,) float in (0, 1].
        correct: (n,) 0 or 1, or bool.
        n_bins: B ≥ 1; fewer where there are not two samples for each.

    Raises:
        UserError: if an argument is out of range.
    """
    confidence, correct = _checked(confidence, correct, n_bins)
    n = len(confidence)
    _, place, count = np.unique(confidence, return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - count / 2
    wanted = np.floor(middle * max(1, min(n_bins, n // 2)) / n).astype(np.int64)
    return _filled(_without_single_ones(wanted, count)[place], confidence, correct)


def _without_single_ones(bins: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Ascending bins (k,) of distinct confidences with `count` samples each, merged until all hold two or more."""
    sizes = np.bincount(bins, weights=count)
    joins, last, size = np.zeros(len(sizes), np.int64), -1, 2.0
    for i in np.flatnonzero(sizes):
        if size >= 2 and (sizes[i] >= 2 or last < 0):
            last, size = last + 1, 0.0
        joins[i], size = last, size + sizes[i]
    return joins[bins]


def _checked(confidence: np.ndarray, correct: np.ndarray, n_bins: int) -> tuple[np.ndarray, np.ndarray]:
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise UserError(
            "confidence and correct must be one-dimensional, equally long and not empty, got shapes "
            f"{confidence.shape} and {correct.shape}"
        )
    if not ((confidence > 0) & (confidence <= 1)).all():
        raise UserError(f"confidence must lie in (0, 1], got {confidence.min()} to {confidence.max()}")
    if n_bins < 1:
        raise UserError(f"n_bins must be at least 1, got {n_bins}; 15 is usual")
    return confidence, correct


def _filled(place: np.ndarray, confidence: np.ndarray, correct: np.ndarray) -> Bins:
    n = np.bincount(place)
    some = n > 0
    means = [np.bincount(place, weights=values)[some] / n[some] for values in (confidence, correct)]
    return Bins(n[some].astype(np.float64), *means)


# --- figures ----------------------------------------------------------------------------------------------------------


def expected_calibration_error(bins: Bins) -> float:
    """Σ (n_b/n) |accuracy_b − confidence_b|, 0–100. Source: Naeini et al. 2015; Guo et al. 2017 (arXiv 1706.04599)."""
    return 100.0 * float((bins.n * np.abs(bins.accuracy - bins.confidence)).sum() / bins.n.sum())


def squared_calibration_error(bins: Bins) -> float | None:
    """Σ (n_b/n) [(accuracy_b − confidence_b)² − accuracy_b (1 − accuracy_b)/(n_b − 1)], on the scale 0–1.

    The second term is an unbiased estimate of what chance adds to the first; so the value may be below 0.

    Args:
        bins: Chosen without regard to correctness.

    Returns:
        None where a bin has a single sample.

    Source: Kumar et al. 2019 (arXiv 1909.10155), the debiased estimator.
    """
    if (bins.n < 2).any():
        return None
    chance = bins.accuracy * (1 - bins.accuracy) / (bins.n - 1)
    return float((bins.n * ((bins.accuracy - bins.confidence) ** 2 - chance)).sum() / bins.n.sum())


def brier_scores(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Σ_k (p_k − [k = y])² of each sample, (n,) float64 in [0, 2]. Source: Brier 1950."""
    return _scores(logits, labels)[:, 2]


def _scores(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n, 3) float64: largest probability, 1 where it is the true class, Brier score."""
    p = np.exp(log_softmax(logits))
    rows, top = np.arange(len(labels)), logits.argmax(axis=1)
    confidence = p[rows, top]
    p[rows, labels] -= 1.0
    return np.stack([confidence, top == labels, np.square(p).sum(axis=1)], axis=1)


def calibration(predictions: Predictions) -> Calibration:
    """All figures of one set of samples, in one pass.

    Args:
        predictions: Of the network on these samples.
    """
    confidence, correct, brier = by_sample(_scores, predictions).T
    mass = equal_mass(confidence, correct)
    squared = squared_calibration_error(mass)
    return Calibration(
        ece=expected_calibration_error(equal_width(confidence, correct)),
        ece_equal_mass=expected_calibration_error(mass),
        rms_debiased=None if squared is None else 100.0 * float(np.sqrt(max(squared, 0.0))),
        overconfidence=100.0 * float(confidence.mean() - correct.mean()),
        brier=float(brier.mean()),
    )


def _on(split: Split, evidence: Evidence) -> dict[str, float | None]:
    return calibration(getattr(evidence.model, split))._asdict()


def _register(split: Split) -> None:
    needs: tuple[Need, ...] = ("test",) if split == "test" else ()
    register(
        Metric(
            name=f"{split}_calibration",
            title=f"Calibration on {split}",
            formula=f"on {split}, c = max p: `ece` = 100 · Σ (n_b/n) |acc_b − mean c_b| in {BINS} bins of equal width, "
            "`ece_equal_mass` in bins of equally many samples, `rms_debiased` = 100 · √max(0, Σ (n_b/n) [(acc_b − "
            "mean c_b)² − acc_b (1 − acc_b)/(n_b − 1)]) in the same, `overconfidence` = 100 · (mean c − acc), `brier` "
            "= mean Σ_k (p_k − [k = y])²",
            direction="to_reference",
            ideal="that of the retrained model",
            unit="%; brier in [0, 2]",
            source="Guo et al. 2017 (arXiv 1706.04599); Kumar et al. 2019 (arXiv 1909.10155), debiased; Brier 1950",
            compute=partial(_on, split),
            needs=needs,
            group=GROUP,
        )
    )


for _split in ("retain", "forget", "test"):
    _register(_split)
