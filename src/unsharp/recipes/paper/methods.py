"""The paper's main table: pretraining under SGD, SAM and ASAM, all methods, forget sets of three difficulties."""

from __future__ import annotations

from unsharp.recipes.paper.base import Claim, Reproduction, register
from unsharp.recipes.paper.variants import GAPS, KNOWN, RULES, SETTINGS_UNKNOWN, SIGNED, TOW, method

register(
    "methods",
    Reproduction(
        title="All methods, from networks pretrained under SGD, SAM and ASAM",
        shows="The main table: every method is said to do better from networks that SAM or ASAM has trained (C1).",
        figures=(TOW, SIGNED, *GAPS),
        compared=tuple(method(name) for name in KNOWN),
        pretraining=RULES,
        claims=tuple(
            Claim(
                claim="C1",
                says=f"{name} does better from networks pretrained under {rule} than under SGD",
                better={"variant": name, "pretraining": rule},
                worse={"variant": name, "pretraining": "SGD"},
            )
            for name in KNOWN
            for rule in RULES
            if rule != "SGD"
        ),
        unknown=SETTINGS_UNKNOWN,
    ),
)
