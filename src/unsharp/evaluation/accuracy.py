"""Accuracy and cross-entropy on retain, forget and test, and the float64 log-probabilities behind them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np

from unsharp.evaluation.metrics import Metric, Need, register
from unsharp.evaluation.predictions import Evidence, Predictions

ROWS = 1 << 16
Split = Literal["retain", "forget", "test"]
Scores = Callable[[np.ndarray, np.ndarray], np.ndarray]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities, (n, K) float64 in (−∞, 0], finite for all finite logits (n, K)."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def cross_entropies(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """−log p of the true class in nats, (n,) float64."""
    return -log_softmax(logits)[np.arange(len(labels)), labels]


def correctness(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1 where the largest logit (the first of equal ones) is the true class, else 0; (n,) float64."""
    return (logits.argmax(axis=1) == labels).astype(np.float64)


def by_sample(scores: Scores, predictions: Predictions) -> np.ndarray:
    """Apply `scores(logits, labels)` in blocks of rows, so that float64 copies of large sets stay small."""
    starts = range(0, len(predictions), ROWS)
    rows = [slice(start, start + ROWS) for start in starts]
    return np.concatenate([scores(predictions.logits[r], predictions.labels[r]) for r in rows])


def accuracy(predictions: Predictions) -> float:
    """Share of samples whose largest logit is the true class, 0–100."""
    return 100.0 * float(by_sample(correctness, predictions).mean())


def mean_cross_entropy(predictions: Predictions) -> float:
    """Mean of −log p of the true class, in nats, accumulated in float64."""
    return float(by_sample(cross_entropies, predictions).mean())


def _on(split: Split, compute: Callable[[Predictions], float], evidence: Evidence) -> float:
    return compute(getattr(evidence.model, split))


def _register(split: Split) -> None:
    needs: tuple[Need, ...] = ("test",) if split == "test" else ()
    register(
        Metric(
            name=f"{split}_accuracy",
            title=f"{split.capitalize()} accuracy",
            formula=f"100 · mean over {split} of [argmax z = y]",
            direction="to_reference",
            ideal="that of the retrained model",
            unit="%",
            source="Jia et al. 2023 (arXiv 2304.04934): remaining, unlearning (100 − forget) and testing accuracy",
            compute=partial(_on, split, accuracy),
            needs=needs,
        )
    )
    register(
        Metric(
            name=f"{split}_loss",
            title=f"{split.capitalize()} loss",
            formula=f"mean over {split} of −log softmax(z)_y",
            direction="to_reference",
            ideal="that of the retrained model",
            unit="nats",
            source="cross-entropy, natural logarithm",
            compute=partial(_on, split, mean_cross_entropy),
            needs=needs,
        )
    )


for _split in ("retain", "forget", "test"):
    _register(_split)
