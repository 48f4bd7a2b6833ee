"""Sharpness-aware machine unlearning on PyTorch, with the evidence of how well it worked.

>>> forgotten, record = unsharp.unlearn(model, train_set, forget_ids, method="sharp_minmax")
>>> metrics = unsharp.evaluate(forgotten, train_set, forget_ids, test_set=test_set, record=record)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unsharp.api import Unlearned, evaluate, memorize, relearn, unlearn
    from unsharp.corrections import Corrections
    from unsharp.data import DataConfig, ImageSamples, Samples, from_torch_dataset
    from unsharp.difficulty import ForgetConfig, ForgetSet
    from unsharp.engine import LoopConfig, OptimizerConfig
    from unsharp.errors import NonFiniteError, UserError
    from unsharp.evaluation import METRICS, Metric
    from unsharp.masks import saliency_mask
    from unsharp.methods import METHODS, Method
    from unsharp.models import MODELS, ModelConfig, features
    from unsharp.phases import CrossEntropy, Objective, Phase
    from unsharp.sharpness import RULES, SAM, Rule
    from unsharp.sweep.grid import run_grid
    from unsharp.training import TrainConfig, train

_HOME = {
    "api": ("Unlearned", "evaluate", "memorize", "relearn", "unlearn"),
    "corrections": ("Corrections",),
    "data": ("DataConfig", "ImageSamples", "Samples", "from_torch_dataset"),
    "difficulty": ("ForgetConfig", "ForgetSet"),
    "engine": ("LoopConfig", "OptimizerConfig"),
    "errors": ("NonFiniteError", "UserError"),
    "evaluation": ("METRICS", "Metric"),
    "masks": ("saliency_mask",),
    "methods": ("METHODS", "Method"),
    "models": ("MODELS", "ModelConfig", "features"),
    "phases": ("CrossEntropy", "Objective", "Phase"),
    "sharpness": ("RULES", "SAM", "Rule"),
    "sweep.grid": ("run_grid",),
    "training": ("TrainConfig", "train"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022
    "Unlearned", "evaluate", "memorize", "relearn", "unlearn",
    "DataConfig", "ImageSamples", "Samples", "from_torch_dataset",
    "ForgetConfig", "ForgetSet", "Corrections",
    "LoopConfig", "OptimizerConfig",
    "NonFiniteError", "UserError",
    "METRICS", "Metric",
    "saliency_mask",
    "METHODS", "Method",
    "MODELS", "ModelConfig", "features",
    "CrossEntropy", "Objective", "Phase",
    "RULES", "SAM", "Rule",
    "run_grid",
    "TrainConfig", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Public names are loaded when they are first asked for, so that the import itself costs next to nothing."""
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("unsharp")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'unsharp' has no attribute {name!r}")
    return getattr(importlib.import_module(f"unsharp.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
