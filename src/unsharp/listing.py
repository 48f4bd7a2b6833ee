"""What there is to choose from, and what this machine offers; read from the registries."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import torch

from unsharp import runtime
from unsharp.data import SOURCES
from unsharp.difficulty.proxies import PROXIES
from unsharp.errors import unknown
from unsharp.evaluation import METRICS
from unsharp.language.objectives import OBJECTIVES
from unsharp.masks import SELECTIONS
from unsharp.methods import METHODS
from unsharp.models import MODELS
from unsharp.registry import summary
from unsharp.sharpness import RULES, SAM

EXTRAS = {
    "vision": ("torchvision", "timm"),
    "language": ("transformers", "peft", "accelerate"),
    "pdf": ("weasyprint",),
}


def listing(what: str) -> list[dict[str, str]]:
    """Rows about the registered objects of one kind. Raises: UserError for an unknown kind."""
    kinds = {
        "methods": lambda: [_parametrised(n, c) | {"default rule": c.default_rule} for n, c in METHODS.items()],
        "rules": lambda: [_parametrised(n, c) | {"passes": f"{c().passes:g}"} for n, c in RULES.items()],
        "proxies": lambda: [
            _parametrised(n, c) | {"hard is": "high" if c.higher_is_harder else "low", "looks at": c.needs}
            for n, c in PROXIES.items()
        ],
        "objectives": lambda: [_parametrised(n, c) for n, c in OBJECTIVES.items()],
        "selections": lambda: [
            {"name": n, "what": summary(s), "formula": s.formula, "looks at": s.reads or "—", "source": s.source}
            for n, s in SELECTIONS.items()
        ],
        "metrics": lambda: [
            {
                "name": n,
                "title": m.title,
                "formula": m.formula,
                "better": m.direction,
                "ideal": m.ideal,
                "source": m.source,
            }
            for n, m in METRICS.items()
        ],
        "data": lambda: [{"name": n, "what": summary(f)} for n, f in SOURCES.items()],
        "models": lambda: [
            *({"name": n, "what": summary(f)} for n, f in MODELS.items()),
            {"name": "timm:NAME", "what": "Any network of timm"},
            {"name": "hf:NAME", "what": "Any image classifier of transformers"},
            {"name": "package.module:function", "what": "Your own function that returns a torch.nn.Module"},
        ],
    }
    if what not in kinds:
        raise unknown("list", what, kinds)
    return kinds[what]()


def doctor(store: Path) -> dict[str, Any]:
    """Versions, device, extras, the store of references, and whether one step of the rule works on the device."""
    device = runtime.pick_device(None)
    weights = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = SAM([weights], lr=0.1, rho=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weights**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    extras = {
        name: all(importlib.util.find_spec(package) is not None for package in packages)
        for name, packages in EXTRAS.items()
    }
    return {
        **runtime.versions(),
        **runtime.describe(device),
        "step works": bool(torch.isfinite(weights).all()),
        "extras": ", ".join(f"{name}: {'yes' if there else 'no'}" for name, there in extras.items()),
        "store": str(store),
    }


def _parametrised(name: str, cls: Any) -> dict[str, str]:
    parameters = ", ".join(f"{f.name}={_default(f)}" for f in dataclasses.fields(cls))
    return {"name": name, "what": summary(cls), "formula": cls.formula, "parameters": parameters, "source": cls.source}


def _default(field: Any) -> str:
    return "required" if field.default is dataclasses.MISSING else str(field.default)
