"""The variants that the paper's tables share: methods with their settings, rules, pretrainings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from unsharp.recipes.paper.base import Claim, Compared, Figure, Published

TOW = Figure(title="ToW", column="tow", better="higher")
SIGNED = Figure(title="ToW, signed (published code)", column="tow_signed", better="higher")
GAPS = tuple(
    Figure(title=f"gap in {split} accuracy", column=f"gap.{split}_accuracy", better="nearer zero")
    for split in ("retain", "forget", "test")
)
RULES: Mapping[str, Mapping[str, Any]] = {
    "SGD": {"name": "none"},
    "SAM 0.1": {"name": "sam", "rho": 0.1},
    "ASAM 1.0": {"name": "asam", "rho": 1.0},
}
"""The rules of the paper's tables; the published code has ASAM with a radius of 0.1 besides."""
RATE = {"lr": 0.01}
NEGATIVE = {"alpha": [0.98, 0.95, 0.9], "lr": [0.03, 0.1]}
RATES = {"lr": [0.01, 0.03, 0.1]}
KNOWN: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "Fine-tuning": ("finetune", RATE, RATES),
    "Gradient ascent": ("gradient_ascent", {"lr": 1e-4}, {"lr": [1e-3, 3e-3, 1e-2]}),
    "NegGrad": ("neggrad", {"alpha": 0.99} | RATE, NEGATIVE),
    "Random label": ("random_label", RATE, RATES),
    "SalUn": ("salun", RATE, RATES),
    "L1-sparse": ("l1_sparse", RATE, RATES),
    "SCRUB": ("scrub", RATE, {"lr": [0.003, 0.01, 0.03]}),
}
"""The paper's methods by name: the library's, its settings as published, those from which the size small chooses."""
SETTINGS_UNKNOWN = (
    "Which method has which learning rate, and the strengths of L1-sparse and SCRUB: 0.01, the default of the "
    "published code, and the library's strengths stand here, and 0.0001 for gradient ascent.",
    "Random label and SalUn draw among the other classes here; the published code draws among all.",
    "Whether tables were made with AdamW, as in the last version of the published code, or with SGD, as in earlier "
    "ones: SGD stands here, and `adamw` has the other.",
)
PUBLISHED_UNKNOWN = (
    "Which ToW the paper prints: the published code multiplies signed gaps, RUM's definition absolute ones; both stand "
    "here, and the published averages beside the absolute one.",
    "Whether the published 87.90 of Sharp MinMax, which is read off a figure, comes from the published code, whose "
    "mask takes the smallest gradients and leaks: here it takes the largest and does not.",
)
AVERAGE = "CIFAR-100, ResNet-50, average over high, mid and low"


def method(name: str, rule: str = "SGD", *, also: Mapping[str, Any] | None = None) -> Compared:
    """A method of the paper under a rule of its tables, called "NegGrad" or "NegGrad, SAM 0.1"."""
    own, paper, choose = KNOWN[name]
    how = RULES[rule]
    return Compared(
        name=name if rule == "SGD" else f"{name}, {rule}",
        method=own,
        rule=how["name"],
        fixed={key: value for key, value in how.items() if key != "name"} | dict(also or {}),
        paper=paper,
        choose=choose,
    )


def sharp_minmax(rule: str = "ASAM 1.0", *, fraction: float = 0.3, also: Mapping[str, Any] | None = None) -> Compared:
    """Sharp MinMax under a rule, with the share of the weights that forgets."""
    how = RULES[rule]
    return Compared(
        name=f"Sharp MinMax, {rule}",
        method="sharp_minmax",
        rule=how["name"],
        fixed={"fraction": fraction} | {k: v for k, v in how.items() if k != "name"} | dict(also or {}),
        paper={"alpha": 0.99} | RATE,
        choose=NEGATIVE,
    )


def sharper(names: Iterable[str], claim: str, says: str, figure: str = "tow") -> tuple[Claim, ...]:
    """That each method is better under SAM and under ASAM than under SGD."""
    return tuple(
        Claim(
            claim=claim,
            says=says.format(rule=rule, method=name),
            better={"variant": f"{name}, {rule}"},
            worse={"variant": name},
            figure=figure,
        )
        for name in names
        for rule in RULES
        if rule != "SGD"
    )


def best(full: Compared, others: Iterable[Compared]) -> tuple[Claim, ...]:
    """That Sharp MinMax is better than each of the others (C2)."""
    return tuple(
        Claim(
            claim="C2",
            says=f"Sharp MinMax does better than {other.name}",
            better={"variant": full.name},
            worse={"variant": other.name},
        )
        for other in others
    )


def published_averages(names: Mapping[str, float], about: str) -> tuple[Published, ...]:
    """The paper's average ToW of some variants."""
    return tuple(Published(of={"variant": name}, value=value, about=about) for name, value in names.items())
