"""Networks from elsewhere: `timm:NAME`, `hf:NAME` and `package.module:function`."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

from torch import nn

from unsharp.errors import UserError, unknown
from unsharp.models.penultimate import logits_of


def maker(prefix: str, name: str) -> Callable[..., nn.Module]:
    """The function that builds the network called `prefix:name`."""
    if prefix == "timm":
        return functools.partial(_timm, name)
    if prefix == "hf":
        return functools.partial(_transformers, name)
    return _user_function(prefix, name)


def _package(name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"arch: this model needs the package {name} ({error}); install it with pip install 'unsharp[{extra}]'"
        ) from None


def _channels(arch: str, input_shape: tuple[int, ...]) -> int:
    if len(input_shape) != 3:
        raise UserError(f"input_shape: {arch} takes images (channels, height, width), got {input_shape}")
    return input_shape[0]


def _timm(
    name: str, /, n_classes: int, input_shape: tuple[int, ...], *, pretrained: bool = False, **options: Any
) -> nn.Module:
    """A model of timm; `options` go to `timm.create_model`."""
    timm = _package("timm", "vision")
    create = functools.partial(
        timm.create_model,
        name,
        pretrained=pretrained,
        num_classes=n_classes,
        in_chans=_channels(f"timm:{name}", input_shape),
        **options,
    )
    try:
        if "img_size" in options:
            return create()
        try:
            return create(img_size=input_shape[1:])
        except TypeError as error:
            # Convolutional models take any size, and refuse to be told one.
            if "img_size" not in str(error):
                raise
            return create()
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"arch: timm:{name} cannot be built ({_first_line(error)}); see timm.list_models()") from error


def _transformers(
    name: str, /, n_classes: int, input_shape: tuple[int, ...], *, pretrained: bool = False, **options: Any
) -> nn.Module:
    """An image classifier of transformers; `options` override entries of its configuration."""
    transformers = _package("transformers", "language")
    arch, auto = f"hf:{name}", transformers.AutoModelForImageClassification
    channels = _channels(arch, input_shape)
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        for option, value in options.items():
            if not hasattr(config, option):
                raise unknown(f"option of {arch}", option, ["pretrained", *config.to_dict()])
            setattr(config, option, value)
        config.num_labels = n_classes
        side = input_shape[1] if input_shape[1] == input_shape[2] else list(input_shape[1:])
        for entry, value in {"num_channels": channels, "image_size": side}.items():
            if hasattr(config, entry):
                setattr(config, entry, value)
        model = _with_weights(auto, name, config) if pretrained else auto.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"arch: {arch} cannot be built ({_first_line(error)}); give a directory with config.json, that file, "
            "or the hub name of an image classifier"
        ) from error
    # A hook and not a wrapping module: parameter names stay those of the library's own checkpoints.
    model.register_forward_hook(_unwrap)
    return model.float().train()


def _unwrap(module: nn.Module, args: object, output: Any) -> Any:
    return logits_of(output)


def _with_weights(auto: Any, name: str, config: Any) -> nn.Module:
    """The model with the weights that stand beside its configuration; only a head for other classes starts anew."""
    # Safetensors only: a pickle from elsewhere could run code.
    model, info = auto.from_pretrained(
        name, config=config, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
    )
    for key, stored, wanted in info["mismatched_keys"]:
        if tuple(stored[1:]) != tuple(wanted[1:]) or wanted[0] != config.num_labels:
            raise UserError(
                f"input_shape: the weights of hf:{name} have {key} as {tuple(stored)}, this input and these options "
                f"need {tuple(wanted)}; bring the images to the size and channels of the weights, or drop pretrained"
            )
    return model


def _user_function(module_name: str, function: str) -> Callable[..., nn.Module]:
    arch = f"{module_name}:{function}"
    # The installed command does not search the working directory, where a user's own module usually is.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"arch: {arch} cannot be imported ({type(error).__name__}: {_first_line(error)}); "
            "give package.module:function, with the package on PYTHONPATH or in the working directory"
        ) from error
    found = getattr(module, function, None)
    if found is None:
        raise unknown(f"function of {module_name}", function, [n for n in vars(module) if not n.startswith("_")])
    if not callable(found):
        raise UserError(
            f"arch: {arch} must be a function that returns a torch.nn.Module, it is a {type(found).__name__}"
        )
    return cast(Callable[..., nn.Module], found)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
