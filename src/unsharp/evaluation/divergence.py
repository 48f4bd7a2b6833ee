"""How far the predictions of the network are from those of the retrained model, sample by sample.

Accuracies are averages: two networks can agree in them and disagree on every single sample. The figures here compare
the two networks on the same samples. They need the retrained model, and are 0 only where both say exactly the same,
which even two networks retrained with different seeds do not: the value to aim at is theirs.

As the retrained model stands at 0, the gap of these figures to the retrained model is the value itself.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from unsharp.errors import UserError
from unsharp.evaluation.accuracy import Split, log_softmax
from unsharp.evaluation.metrics import Metric, Need, register
from unsharp.evaluation.predictions import Evidence, Predictions

GROUP = "divergence"
NUMBERS = 1 << 18
"""Logits of a block: its float64 copies stay in the processor's cache."""
NEARLY_ONE = 1.0 - 2.0**-53


class Divergence(NamedTuple):
    """How far one network's predictions are from another's, means over samples.

    Args:
        kl: KL(reference ‖ model) in nats, ≥ 0, without upper end.
        js: Jensen–Shannon divergence in nats, in [0, log 2].
        churn: Share of samples to which the two give different classes, 0–100.
        l2: Euclidean distance of the two vectors of probabilities, in [0, √2].
    """

    kl: float
    js: float
    churn: float
    l2: float


def divergences(logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The four divergences of each sample; 0 to the bit where the logits are equal.

    Args:
        logits: (n, K) float, finite, of the network.
        reference: (n, K) float, finite, of the retrained model on the same samples.

    Returns:
        (n, 4) float64: kl, js (nats), churn (0 or 100), l2.

    Raises:
        UserError: if the shapes differ.
    """
    if logits.ndim != 2 or logits.shape != reference.shape:
        raise UserError(
            f"logits and reference must both be (samples, classes) of the same samples, got shapes {logits.shape} and "
            f"{reference.shape}"
        )
    rows = max(1, NUMBERS // logits.shape[1])
    starts = range(0, len(logits), rows)
    return np.concatenate([_block(logits[i : i + rows], reference[i : i + rows]) for i in starts])


def _block(logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
    log_p, log_q = log_softmax(logits), log_softmax(reference)
    p, q = np.exp(log_p), np.exp(log_q)
    # From logarithms: a probability that is rounded to 0 would make the divergence infinite.
    kl = (q * (log_q - log_p)).sum(axis=1)
    apart, both = p - q, p + q
    # log(2p/(p + q)) = log(1 + s), log(2q/(p + q)) = log(1 − s): no digits are lost where p and q are nearly equal.
    s = np.divide(apart, both, out=np.zeros_like(both), where=both > 0)
    np.clip(s, -NEARLY_ONE, NEARLY_ONE, out=s)
    js = 0.5 * (p * np.log1p(s) + q * np.log1p(-s)).sum(axis=1)
    churn = 100.0 * (logits.argmax(axis=1) != reference.argmax(axis=1))
    l2 = np.sqrt(np.square(apart).sum(axis=1))
    # Rounding alone can take the first two below 0.
    return np.stack([np.maximum(kl, 0.0), np.maximum(js, 0.0), churn, l2], axis=1)


def divergence(model: Predictions, reference: Predictions) -> Divergence:
    """The mean divergences of one network from another.

    Between two networks that were retrained with different seeds it is the value that a perfect unlearning would have.

    Args:
        model: Of the network.
        reference: Of the other, on the same samples in the same order.

    Raises:
        UserError: if the samples or the numbers of classes differ.

    Source: KL: Kullback & Leibler 1951; L2 ("activation distance") and Jensen–Shannon against the retrained model, from
    notes on the paper: Chundawat et al. 2023 (arXiv 2205.08096); churn: Milani Fard et al. 2016, "Launch and iterate".
    """
    if not np.array_equal(model.labels, reference.labels):
        raise UserError("model and reference must be evaluated on the same samples, in the same order; labels differ")
    return Divergence(*divergences(model.logits, reference.logits).mean(axis=0).tolist())


def _on(split: Split, evidence: Evidence) -> dict[str, float]:
    if evidence.reference is None:
        raise UserError("divergence needs the outputs of a retrained model")
    return divergence(getattr(evidence.model, split), getattr(evidence.reference, split))._asdict()


def _register(split: Split) -> None:
    needs: tuple[Need, ...] = ("reference", "test") if split == "test" else ("reference",)
    register(
        Metric(
            name=f"{split}_divergence",
            title=f"Divergence on {split}",
            formula=f"means over {split}, q of the retrained model: `kl` = Σ q log(q/p), `js` = ½ KL(p ‖ m) + "
            "½ KL(q ‖ m) with m = (p + q)/2, `churn` = 100 · [argmax p ≠ argmax q], `l2` = ‖p − q‖₂",
            direction="lower",
            ideal="that between two networks retrained with different seeds, which is not 0",
            unit="nats, nats, %, in [0, √2]",
            source="Kullback & Leibler 1951; Chundawat et al. 2023 (arXiv 2205.08096), L2 and Jensen–Shannon against "
            "the retrained model; Milani Fard et al. 2016, churn",
            compute=partial(_on, split),
            needs=needs,
            group=GROUP,
        )
    )


for _split in ("retain", "forget", "test"):
    _register(_split)
