"""Membership inference: does the network treat the forget samples like samples that it has never seen?

Every attack learns to tell retain samples (members) from test samples (non-members) by a feature of the output, and is
then asked about the forget samples. `mia` is the share of them that it calls non-member; read it against the retrained
model's, and only where `attack_accuracy` is above 50: an attack that cannot tell members from others says nothing.

Two attacks on the same features:

- `svc_*`, as in the paper: a support vector classifier (RBF kernel, C = 3, gamma = "auto") on equally many retain and
  test samples, at most 10,000 each, drawn with the seed. Its cost grows with the square of their number: seconds per
  one-dimensional feature at 10,000 + 10,000, about a minute for the probability vector of 100 classes.
- `threshold_*`: the exact best cut of a one-dimensional feature on all retain and test samples, in O(n log n).

`attack_accuracy` is, for both, the balanced accuracy on the very samples the attack was fitted to, as the paper's code
has it, and therefore on the optimistic side.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from unsharp.errors import UserError
from unsharp.evaluation.accuracy import Scores, by_sample, correctness, cross_entropies, log_softmax
from unsharp.evaluation.metrics import ATTACKS, Metric, register
from unsharp.evaluation.predictions import Evidence, Predictions

SVC_LIMIT = 10_000

# --- features of the output -------------------------------------------------------------------------------------------


def confidence(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """p of the true class, (n,) float64 in [0, 1]."""
    return np.exp(-cross_entropies(logits, labels))


def entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """−Σ p log p in nats, (n,) float64; the labels are not used."""
    log_p = log_softmax(logits)
    return -(np.exp(log_p) * log_p).sum(axis=1)


def modified_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """−(1 − p_y) log p_y − Σ_{i≠y} p_i log(1 − p_i), (n,) float64 ≥ 0, finite for all finite logits.

    Source: Song & Mittal 2021, "Systematic evaluation of privacy risks of machine learning models", Mentr.
    """
    log_p = log_softmax(logits)
    log_rest = _log_complement(log_p)
    rows = np.arange(len(labels))
    terms = np.exp(log_p) * log_rest
    terms[rows, labels] = np.exp(log_rest[rows, labels]) * log_p[rows, labels]
    return -terms.sum(axis=1)


def _log_complement(log_p: np.ndarray) -> np.ndarray:
    """log(1 − p), (n, K): at the largest p from the sum of the others, since 1 − p cancels there."""
    rows, top = np.arange(len(log_p)), log_p.argmax(axis=1)
    others = log_p.copy()
    others[rows, top] = -np.inf
    largest = others.max(axis=1, keepdims=True)
    log_others = largest[:, 0] + np.log(np.exp(others - largest).sum(axis=1))
    p = np.exp(log_p)
    p[rows, top] = 0.0  # log1p(−1) would warn, and the entry is replaced
    complement = np.log1p(-p)
    complement[rows, top] = log_others
    return complement


def probability(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The probability vector, (n, K) float64; the labels are not used."""
    return np.exp(log_softmax(logits))


# --- attacks on a feature ---------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What an attack says: share of forget samples called non-member, and its own balanced accuracy; both 0–100."""

    mia: float
    attack_accuracy: float


class Cut(NamedTuple):
    """A rule on one score: members lie above `value` if `above`, else at or below it; `accuracy` is balanced, 0–100."""

    value: float
    above: bool
    accuracy: float

    def members(self, scores: np.ndarray) -> np.ndarray:
        """Which scores (n,) the rule calls member, (n,) bool."""
        return (scores > self.value) == self.above


def best_cut(members: np.ndarray, others: np.ndarray) -> Cut:
    """The cut of a score, in either direction, with the highest balanced accuracy over all there are.

    The accuracy is ½ + ½ max |F_members − F_others| of the empirical distribution functions (Kolmogorov–Smirnov). Equal
    scores are never separated; the cut lies midway between two neighbouring scores. Among equally good cuts the one
    that calls most of the given samples member is taken (all of them, where no cut is better than chance), then the
    lowest: in doubt the attack does not speak for successful forgetting.

    Args:
        members: (n,) finite scores, n ≥ 1.
        others: (m,) finite scores of non-members, m ≥ 1.
    """
    members, others = _scores("members", members), _scores("others", others)
    values, place = np.unique(np.concatenate([members, others]), return_inverse=True)
    n_members, n_others = len(members), len(others)
    members_below = np.bincount(place[:n_members], minlength=len(values)).cumsum()
    others_below = np.bincount(place[n_members:], minlength=len(values)).cumsum()
    # Integers, so that equally good cuts are found equal.
    advantage = members_below * n_others - others_below * n_members
    best = np.flatnonzero(np.abs(advantage) == np.abs(advantage).max())
    below = members_below[best] + others_below[best]
    called = np.where(advantage[best] >= 0, below, n_members + n_others - below)
    k = int(best[called.argmax()])
    share = abs(int(advantage[k])) / (n_members * n_others)
    return Cut(_midway(values, k), bool(advantage[k] < 0), 50.0 + 50.0 * share)


def _scores(name: str, scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
        raise UserError(
            f"{name} must be a one-dimensional array of at least one finite score, got shape {scores.shape}"
        )
    return scores


def _midway(values: np.ndarray, k: int) -> float:
    if k + 1 == len(values):
        return float("inf")
    low, high = float(values[k]), float(values[k + 1])
    middle = low + (high - low) / 2
    return middle if middle < high else low  # between neighbouring floats the middle rounds to one of them


def threshold_attack(members: np.ndarray, others: np.ndarray, forget: np.ndarray) -> Verdict:
    """Judge the forget scores by the best cut between members and others.

    Args:
        members: (n,) scores of retain samples.
        others: (m,) scores of test samples.
        forget: (f,) scores of forget samples.
    """
    cut = best_cut(members, others)
    return Verdict(100.0 * float((~cut.members(_scores("forget", forget))).mean()), cut.accuracy)


def svc_attack(members: np.ndarray, others: np.ndarray, forget: np.ndarray) -> Verdict:
    """Judge the forget samples by a support vector classifier trained on members (1) against others (0).

    Args:
        members: (n,) or (n, d) features of retain samples.
        others: (m,) or (m, d) features of test samples; n = m in the paper's use.
        forget: (f,) or (f, d) features of forget samples.

    Source: the evaluation code shared by SalUn, RUM and Tang & Khanna 2026.
    """
    from sklearn.svm import SVC

    members, others, forget = (x.reshape(len(x), -1) for x in (members, others, forget))
    x = np.concatenate([members, others])
    y = np.repeat([1, 0], [len(members), len(others)])
    classifier = SVC(C=3, gamma="auto", kernel="rbf").fit(x, y)
    # Prediction costs as much as training; equal rows get equal answers, so each distinct row is asked once.
    rows, place = np.unique(np.concatenate([x, forget]), axis=0, return_inverse=True)
    called = classifier.predict(rows)[place.reshape(-1)]
    of_members, of_others, of_forget = np.split(called, [len(members), len(x)])
    accuracy = 50.0 * float(of_members.mean() + (1 - of_others).mean())
    return Verdict(100.0 * float((1 - of_forget).mean()), accuracy)


def balanced(
    retain: Predictions, test: Predictions, seed: int, limit: int = SVC_LIMIT
) -> tuple[Predictions, Predictions]:
    """Equally many retain and test samples, at most `limit` each, drawn without replacement with `seed`, in order."""
    n = min(len(retain), len(test), limit)
    draw = np.random.default_rng(seed)

    def some(predictions: Predictions) -> Predictions:
        rows = np.sort(draw.choice(len(predictions), n, replace=False))
        return Predictions(predictions.logits[rows], predictions.labels[rows])

    return some(retain), some(test)


# --- the registered attacks -------------------------------------------------------------------------------------------


def _sets(evidence: Evidence) -> tuple[Predictions, Predictions, Predictions]:
    if evidence.model.test is None:
        raise UserError("membership attacks need a test set: its samples are the known non-members")
    return evidence.model.retain, evidence.model.test, evidence.model.forget


def _svc(feature: Scores, evidence: Evidence) -> dict[str, float]:
    retain, test, forget = _sets(evidence)
    members, others = balanced(retain, test, evidence.seed)
    return svc_attack(*(by_sample(feature, p) for p in (members, others, forget)))._asdict()


def _threshold(feature: Scores, evidence: Evidence) -> dict[str, float]:
    return threshold_attack(*(by_sample(feature, p) for p in _sets(evidence)))._asdict()


FEATURES: dict[str, tuple[Scores, str]] = {
    "correctness": (correctness, "[argmax z = y]"),
    "confidence": (confidence, "p_y"),
    "entropy": (entropy, "−Σ p_i log p_i"),
    "modified_entropy": (modified_entropy, "−(1 − p_y) log p_y − Σ_{i≠y} p_i log(1 − p_i)"),
    "probability": (probability, "p (all classes)"),
}


def _register(feature: str) -> None:
    scores, formula = FEATURES[feature]
    words = feature.replace("_", " ")
    shared = "100 · share of forget samples called non-member by"
    register(
        Metric(
            name=f"svc_{feature}",
            title=f"MIA, SVC on {words}",
            formula=f"{shared} SVC(RBF, C = 3, gamma = 1/d) trained on retain against test; feature {formula}",
            direction="to_reference",
            ideal="that of the retrained model",
            unit="%",
            source="Jia et al. 2023 (arXiv 2304.04934); Fan et al. 2024 (SalUn); Tang & Khanna 2026 (arXiv 2506.13715)",
            compute=partial(_svc, scores),
            needs=("test",),
            group=ATTACKS,
        )
    )
    if feature == "probability":
        return
    register(
        Metric(
            name=f"threshold_{feature}",
            title=f"MIA, best threshold on {words}",
            formula=f"{shared} the cut with the highest balanced accuracy between retain and test; feature {formula}",
            direction="to_reference",
            ideal="that of the retrained model",
            unit="%",
            source="Yeom et al. 2018 (arXiv 1709.01604); Song & Mittal 2021 (arXiv 2003.10595)",
            compute=partial(_threshold, scores),
            needs=("test",),
            group=ATTACKS,
        )
    )


for _feature in FEATURES:
    _register(_feature)
