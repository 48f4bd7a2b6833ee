"""How far two networks are apart: in their weights, in their features, in what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from unsharp.errors import UserError
from unsharp.evaluation.divergence import divergences
from unsharp.evaluation.landscape import same_architecture
from unsharp.evaluation.predictions import Predictions

LEAST = 4
"""Samples that an unbiased estimate of the similarity of features needs."""


@dataclass(frozen=True)
class Distance:
    """How far two networks are apart, over their trainable weights; BatchNorm's statistics do not count.

    Args:
        l2: ‖w₁ − w₀‖₂.
        relative: l2 / ‖w₀‖₂; None where w₀ is 0.
        cosine: Cosine of the angle between the weights; None where one is 0.
        moved: Share of the weights that differ at all.
        largest: Largest difference of a weight.
        tensors: ‖w₁ − w₀‖₂ / ‖w₀‖₂ for each tensor by name; None where the first is 0.
    """

    l2: float
    relative: float | None
    cosine: float | None
    moved: float
    largest: float
    tensors: dict[str, float | None]


@torch.no_grad()
def weight_distance(first: nn.Module, second: nn.Module) -> Distance:
    """How far the weights of two networks of one architecture are apart.

    Raises:
        UserError: if the architectures differ, or there is no trainable parameter.
    """
    same_architecture({"first": first, "second": second})
    theirs = dict(second.named_parameters())
    rows: dict[str, tuple[float, ...]] = {}
    count = 0
    for name, p in first.named_parameters():
        if p.requires_grad:
            a, b = p.double(), theirs[name].to(p.device).double()
            d = b - a
            squares = [d.square().sum(), a.square().sum(), b.square().sum(), (a * b).sum()]
            rows[name] = tuple(torch.stack([*squares, (d != 0).sum().double(), d.abs().max()]).tolist())
            count += p.numel()
    if not rows:
        raise UserError("the model has no trainable parameter; set requires_grad on those that may differ")
    apart, ours, others, inner, moved = (sum(row[i] for row in rows.values()) for i in range(5))
    return Distance(
        l2=math.sqrt(apart),
        relative=math.sqrt(apart / ours) if ours else None,
        cosine=inner / math.sqrt(ours * others) if ours and others else None,
        moved=moved / count,
        largest=max(row[5] for row in rows.values()),
        tensors={name: math.sqrt(row[0] / row[1]) if row[1] else None for name, row in rows.items()},
    )


@dataclass(frozen=True)
class Similarity:
    """How alike the features of two networks are on the same samples, by linear centred kernel alignment.

    Args:
        cka: In [0, 1], 1 where the one are the other's but for a rotation, a common factor and a shift; None where the
            features of a network are all the same. With n samples of D features it is well above 0 for unrelated
            features too, and near 1 where D is far above n.
        debiased: With unbiased estimates in its place: about 0 for unrelated features, whatever n and D, and sometimes
            below; None for fewer than 4 samples, or where an estimate of a network with itself is not above 0.
        n: Number of samples.
    """

    cka: float | None
    debiased: float | None
    n: int


def linear_cka(first: np.ndarray, second: np.ndarray) -> Similarity:
    """Linear CKA of two networks' features: ‖XᵀY‖² / (‖XᵀX‖·‖YᵀY‖), columns centred, Frobenius norms.

    Debiased, the three squared norms are the unbiased estimates of HSIC, which leave the diagonal of the kernels out.
    The matrices are made of features or of samples, whichever are fewer.

    Args:
        first: (n, D₁) finite features X, n ≥ 2.
        second: (n, D₂) finite features Y of the same samples in the same order.

    Raises:
        UserError: if the arrays are not as above.

    Source: Kornblith et al., ICML 2019 (arXiv 1905.00414); unbiased estimate: Song et al., JMLR 2012, eq. 5, put into
    CKA by Nguyen, Raghu & Kornblith, ICLR 2021 (arXiv 2010.15327).
    """
    x, y = _centred("first", first), _centred("second", second)
    if len(x) != len(y):
        raise UserError(f"first and second must be of the same samples, got {len(x)} and {len(y)} rows")
    plain: dict[str, float] = {}
    unbiased: dict[str, float] = {}
    for name, (a, b) in {"xy": (x, y), "xx": (x, x), "yy": (y, y)}.items():
        plain[name] = _squared_norm(a, b)
        if len(x) >= LEAST:
            unbiased[name] = _hsic(a, b, plain[name])
    return Similarity(_ratio(plain), _ratio(unbiased) if len(x) >= LEAST else None, len(x))


@dataclass(frozen=True)
class Apart:
    """How far what two networks say of the same samples is apart.

    Args:
        features: How alike their penultimate features are; None where they were not collected.
        probabilities: Mean Euclidean distance of their probabilities ("activation distance"), in [0, √2].
        churn: Share of samples to which they give different classes, 0–100.
        n: Number of samples.
    """

    features: Similarity | None
    probabilities: float
    churn: float
    n: int


def apart(first: Predictions, second: Predictions) -> Apart:
    """How far two networks' predictions of the same samples are apart.

    Raises:
        UserError: if they are of other samples.

    Source of the distance of probabilities: Golatkar, Achille & Soatto, CVPR 2021 (arXiv 2012.13431).
    """
    if not np.array_equal(first.labels, second.labels):
        raise UserError("first and second must be of the same samples in the same order, but their labels differ")
    means = divergences(first.logits, second.logits).mean(axis=0)
    alike = None
    if first.features is not None and second.features is not None and len(first) > 1:
        alike = linear_cka(first.features, second.features)
    return Apart(alike, probabilities=float(means[3]), churn=float(means[2]), n=len(first))


def _centred(name: str, features: np.ndarray) -> np.ndarray:
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2 or not x.shape[1] or not np.isfinite(x).all():
        raise UserError(f"{name} must be finite features of shape (n ≥ 2, D ≥ 1), got shape {x.shape}")
    x = x - x.mean(axis=0)
    scale = np.abs(x).max()
    # what rounding leaves of equal features is no difference between them
    tiny = 8 * np.finfo(np.float64).eps * np.abs(features).max()
    return np.zeros_like(x) if scale <= tiny else x / scale


def _squared_norm(x: np.ndarray, y: np.ndarray) -> float:
    """‖XᵀY‖², which is tr(K·L) with the kernels K = XXᵀ and L = YYᵀ."""
    if len(x) < max(x.shape[1], y.shape[1]):
        return float(((x @ x.T) * (y @ y.T)).sum())
    return float(np.square(x.T @ y).sum())


def _hsic(x: np.ndarray, y: np.ndarray, product: float) -> float:
    """The unbiased estimate of HSIC from centred features, times n(n − 3).

    With K̃ and L̃, the kernels with 0 on their diagonals: tr(K̃L̃) + 1ᵀK̃1·1ᵀL̃1/((n−1)(n−2)) − 2·1ᵀK̃L̃1/(n−2). As the
    columns are centred, K·1 is 0 and K̃·1 is minus the diagonal of K.
    """
    n = len(x)
    k, m = np.square(x).sum(axis=1), np.square(y).sum(axis=1)
    inner = float(k @ m)
    return product - inner + float(k.sum() * m.sum()) / ((n - 1) * (n - 2)) - 2 * inner / (n - 2)


def _ratio(norms: dict[str, float]) -> float | None:
    below = norms["xx"] * norms["yy"] if norms["xx"] > 0 and norms["yy"] > 0 else 0.0
    return norms["xy"] / math.sqrt(below) if below > 0 else None
