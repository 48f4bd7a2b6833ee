"""SAM and ASAM as rules of unlearning: every method under each, from networks pretrained by SGD."""

from __future__ import annotations

from unsharp.recipes.paper.base import Reproduction, register
from unsharp.recipes.paper.variants import GAPS, KNOWN, RULES, SETTINGS_UNKNOWN, TOW, method, sharper

register(
    "rules",
    Reproduction(
        title="All methods, unlearning under SGD, SAM and ASAM",
        shows="SAM and ASAM are said to improve every method as the rule under which it unlearns (C1).",
        figures=(TOW, *GAPS),
        compared=tuple(method(name, rule) for name in KNOWN for rule in RULES),
        claims=sharper(KNOWN, "C1", "{method} does better under {rule} than under SGD"),
        unknown=SETTINGS_UNKNOWN,
    ),
)
