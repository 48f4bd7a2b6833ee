"""Training images corrupted by noise, blur and snow, as in the paper's check on noised data."""

from __future__ import annotations

import dataclasses

from unsharp.recipes.paper.base import Reproduction, register
from unsharp.recipes.paper.problems import Problem
from unsharp.recipes.paper.variants import GAPS, RULES, TOW, method, sharp_minmax, sharper

NAMES = ("NegGrad", "SalUn")


def _corrupted(kind: str) -> Reproduction:
    def adapt(problem: Problem) -> Problem:
        return dataclasses.replace(problem, data=dataclasses.replace(problem.data, corrupt=f"{kind}:3"))

    said = kind.replace("_", " ")
    return Reproduction(
        title=f"Networks trained on images with {said}, severity 3",
        shows="The gain by SAM is said to carry over to corrupted training images (C10).",
        figures=(TOW, *GAPS),
        compared=(*(method(name, rule) for name in NAMES for rule in RULES), sharp_minmax()),
        claims=sharper(NAMES, "C10", f"with {said}, {{method}} does better under {{rule}} than under SGD"),
        adapt=adapt,
        unknown=("The published strengths of blur and snow for images of 32 pixels: the library's stand here.",),
    )


for _kind in ("gaussian_noise", "glass_blur", "snow"):
    register(f"corrupted-{_kind.replace('_', '-')}", _corrupted(_kind))
