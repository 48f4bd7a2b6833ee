"""What kinds of difficulty scores there are, and which way each of them points."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from unsharp.errors import unknown

ScoreKind = str
"""Name of a kind: "memorization", "cscore", or a registered proxy."""


@dataclass(frozen=True)
class Kind:
    """What is to be known of a score before samples are ranked by it.

    Args:
        title: What a sentence calls it.
        higher_is_harder: Whether a higher score is a harder sample.
        unit_scale: Whether it is a probability or a difference of two, so that 0.5 is a middle.
    """

    title: str
    higher_is_harder: bool
    unit_scale: bool


BUILT_IN = {
    "memorization": Kind("memorization score", higher_is_harder=True, unit_scale=True),
    "cscore": Kind("C-score", higher_is_harder=False, unit_scale=True),
}


def kind_named(name: ScoreKind) -> Kind:
    """The kind of that name. Raises: UserError if there is none."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    from unsharp.difficulty.proxies.base import PROXIES

    if name not in PROXIES:
        raise unknown("score kind", name, kind_names())
    proxy = PROXIES[name]
    return Kind(proxy.title, proxy.higher_is_harder, proxy.unit_scale)


def kind_names() -> list[ScoreKind]:
    """The names of all kinds, those that are estimated by many networks first."""
    from unsharp.difficulty.proxies.base import PROXIES

    return [*BUILT_IN, *PROXIES]


def those_of(names: Iterable[str]) -> list[ScoreKind]:
    """The kinds among some names, in their order."""
    known = set(kind_names())
    return [name for name in names if name in known]
