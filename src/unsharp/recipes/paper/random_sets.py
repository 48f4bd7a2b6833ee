"""Forget sets drawn at random, on CIFAR-10 and Tiny ImageNet."""

from __future__ import annotations

from unsharp.recipes.paper.base import Reproduction, register
from unsharp.recipes.paper.problems import Task
from unsharp.recipes.paper.variants import GAPS, RULES, SETTINGS_UNKNOWN, TOW, best, method, sharp_minmax, sharper

NAMES = ("Fine-tuning", "NegGrad", "SalUn", "L1-sparse", "SCRUB")
SETS: dict[str, tuple[Task, str]] = {
    "random-cifar10": ("cifar10 random", "CIFAR-10"),
    "random-tiny-imagenet": ("tiny_imagenet random", "Tiny ImageNet"),
}


def _random(task: Task, title: str) -> Reproduction:
    full = sharp_minmax()
    return Reproduction(
        title=f"Random forget sets on {title}",
        shows="The gain by SAM and by Sharp MinMax is said to hold for random forget sets (C1, C2).",
        figures=(TOW, *GAPS),
        compared=(*(method(name, rule) for name in NAMES for rule in RULES), full),
        task=task,
        claims=(
            *sharper(NAMES, "C1", "{method} does better under {rule} than under SGD"),
            *best(full, [method("NegGrad", "ASAM 1.0")]),
        ),
        unknown=(*SETTINGS_UNKNOWN, "The size of the paper's random forget sets: 3,000 stands here."),
    )


for _name, (_task, _title) in SETS.items():
    register(_name, _random(_task, _title))
