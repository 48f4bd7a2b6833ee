"""Forgetting events: how often a sample that was right turns wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unsharp.difficulty.proxies.base import PROXIES
from unsharp.difficulty.proxies.dynamics import DynamicsProxy


@PROXIES.register("forgetting_events")
@dataclass(frozen=True, kw_only=True)
class ForgettingEvents(DynamicsProxy):
    """How often a sample that was right after one epoch is wrong after the next."""

    title: ClassVar[str] = "forgetting count"
    source: ClassVar[str] = "Toneva et al., ICLR 2019 (arXiv 1812.05159)"
    formula: ClassVar[str] = "Σ_t [right after epoch t, wrong after epoch t+1];  number of epochs, if never right"
