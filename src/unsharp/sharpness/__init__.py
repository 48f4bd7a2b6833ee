"""Stage 5a: rules that turn a loss closure into a gradient, and the step that keeps masked weights where they are."""

from unsharp.sharpness.base import NO_RULE, RULES, Gradients, NoRule, Rule
from unsharp.sharpness.optimizer import SAM
from unsharp.sharpness.perturbation import AdaptiveSharpness, Sharpness
from unsharp.sharpness.point import Point
from unsharp.sharpness.step import MaskedOptimizer, Stepper

__all__ = [
    "NO_RULE",
    "RULES",
    "SAM",
    "AdaptiveSharpness",
    "Gradients",
    "MaskedOptimizer",
    "NoRule",
    "Point",
    "Rule",
    "Sharpness",
    "Stepper",
]
