"""From a configuration to a network: registered names here, the names of other libraries through `foreign`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

from torch import nn

from unsharp.errors import UserError, unknown
from unsharp.models import foreign
from unsharp.models.base import MODELS, ModelConfig

_ELSEWHERE = ("timm:NAME", "hf:NAME", "package.module:function")


def build(config: ModelConfig, *, n_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """The network that `config` describes, initialised from torch's current random state, in training mode.

    The network does not normalise its input. Weights that another library or a hub holds are used only with
    `options={"pretrained": True}`, so that a retrained reference never starts from weights that have seen the data.

    Args:
        config: Architecture, width, stem and options.
        n_classes: Number of logits, at least 1.
        input_shape: Shape of one input, (C, H, W) for images.

    Returns:
        A module that maps (B, *input_shape) to logits (B, n_classes).

    Raises:
        UserError: for an unknown architecture, an option that it does not take, an input it cannot take, or a package
            that is not installed.
    """
    if n_classes < 1:
        raise UserError(f"n_classes must be at least 1, got {n_classes}")
    maker = _maker(config.arch)
    given: dict[str, Any] = dict(config.options)
    given |= {} if config.width is None else {"width": config.width}
    given |= {} if config.stem == "auto" else {"stem": config.stem}
    offered = {"n_classes": n_classes, "input_shape": tuple(input_shape)}
    names, open_ended = _parameters(maker)
    for name in given:
        if name in offered or not (open_ended or name in names):
            known = [known for known in names if known not in offered]
            raise unknown(f"option of {config.arch}", name, known or ["(none)"])
    if config.arch in MODELS:
        _check_values(config.arch, maker, given)
    offered = {name: value for name, value in offered.items() if open_ended or name in names}
    model = maker(**offered, **given)
    if not isinstance(model, nn.Module):
        raise UserError(f"arch: {config.arch} must return a torch.nn.Module, it returned {type(model).__name__}")
    return model


def _maker(arch: str) -> Callable[..., nn.Module]:
    if arch in MODELS:
        return MODELS[arch]
    prefix, colon, name = arch.partition(":")
    if not (colon and prefix and name):
        raise unknown("model", arch, [*MODELS, *_ELSEWHERE])
    return foreign.maker(prefix, name)


def _parameters(maker: Callable[..., nn.Module]) -> tuple[list[str], bool]:
    """The names that `maker` takes as keywords, and whether it takes any other besides."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(maker).parameters.values()
    return [p.name for p in parameters if p.kind in named], any(p.kind == p.VAR_KEYWORD for p in parameters)


def _check_values(arch: str, maker: Callable[..., nn.Module], given: Mapping[str, Any]) -> None:
    """Refuse a value of another type than the signature states; whole numbers are counts, fractions probabilities."""
    hints = get_type_hints(maker)
    for name, value in given.items():
        accepted = get_args(hints[name]) or (hints[name],)
        accepted += (int,) if float in accepted else ()
        shown = " or ".join(repr(a) if isinstance(a, str) else a.__name__ for a in accepted if a is not type(None))
        # Compared by exact type, because True is an int; a Literal lists its values instead of types.
        if value not in accepted and type(value) not in accepted:
            raise UserError(f"{name}: {arch} takes {shown}, got {value!r}")
        if float in accepted and not 0 <= value < 1:
            raise UserError(f"{name}: {arch} takes a probability in [0, 1), got {value!r}")
        if type(value) is int and float not in accepted and value < 1:
            raise UserError(f"{name}: {arch} takes a whole number of at least 1, got {value}")
