"""The probability of the true class, averaged over training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unsharp.difficulty.proxies.base import PROXIES
from unsharp.difficulty.proxies.dynamics import DynamicsProxy


@PROXIES.register("mean_confidence")
@dataclass(frozen=True, kw_only=True)
class MeanConfidence(DynamicsProxy):
    """The probability of the true class, averaged over the epochs of training."""

    title: ClassVar[str] = "mean confidence"
    source: ClassVar[str] = (
        "Jiang et al., ICML 2021 (arXiv 2002.03206), among the statistics of training; proxy `confidence` of the "
        "published code of RUM"
    )
    formula: ClassVar[str] = "(1/T) Σ_t p_t(y | x) over the T epochs, after each"
    higher_is_harder: ClassVar[bool] = False
    unit_scale: ClassVar[bool] = True
