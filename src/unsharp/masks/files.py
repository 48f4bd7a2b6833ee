"""Masks on disk, as safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unsharp import artifacts
from unsharp.errors import UserError, listed
from unsharp.masks.entries import Mask, check, trainable

FILE = "mask.safetensors"


def save(mask: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a mask as safetensors, whole or not at all.

    Args:
        mask: Bool tensors by parameter name.
        path: The file.
        metadata: JSON values, kept in the file's header as JSON text.

    Raises:
        UserError: if the file cannot be written.
    """
    tensors = {name: m.detach().to("cpu", torch.bool, copy=True).contiguous() for name, m in mask.items()}
    header = {key: json.dumps(value) for key, value in (metadata or {}).items()}
    with artifacts.writing(path), artifacts.atomic(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def load(path: str | Path, model: nn.Module | None = None) -> Mask:
    """Read a mask from a safetensors file of bool or 0/1 uint8 tensors.

    Args:
        path: The file.
        model: If given, the mask must fit its trainable parameters, stands in their order and lies on their devices.

    Raises:
        UserError: if the file is missing, broken or no mask, or does not fit the model (what differs is named).
    """
    with _opened(path) as file:
        mask = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    other = [f"{name} {m.dtype}" for name, m in mask.items() if m.dtype not in (torch.bool, torch.uint8)]
    other += [f"{name} up to {int(m.max())}" for name, m in mask.items() if m.dtype == torch.uint8 and (m > 1).any()]
    if other or not mask:
        raise UserError(f"mask {str(path)!r} must hold bool or 0/1 uint8 tensors, it has {listed(other) or 'none'}")
    mask = {name: m.bool() for name, m in mask.items()}
    if model is None:
        return mask
    check(mask, model)
    return {name: mask[name].to(p.device) for name, p in trainable(model).items()}


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    if not Path(path).is_file():
        raise UserError(f"mask {str(path)!r} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"mask {str(path)!r} is no whole safetensors file ({error}); make it again") from None
