"""Checkpoints: safetensors with a header that says how the network was made, and foreign files, read safely."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unsharp import config
from unsharp.artifacts import atomic, writing
from unsharp.errors import UserError, listed

MODEL_FILE = "model.safetensors"
METADATA_KEY = "unsharp"
PREFIXES = ("module.", "_orig_mod.")
NESTED = ("state_dict", "model", "model_state_dict", "net", "weights")


def save_model(path: str | Path, model: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Write the model's state as safetensors; tensors that share memory are stored once.

    Args:
        path: The file.
        model: Any module.
        metadata: Plain values, stored in the file's header.
    """
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device) if tensor.numel() else (name,)
        if key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            stored[name] = tensor.detach().cpu().contiguous()
    header = {METADATA_KEY: json.dumps({**config.to_dict(metadata), "aliases": aliases})}
    with writing(path), atomic(path) as temporary:
        save_file(stored, temporary, metadata=header)


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint by name, and its metadata (empty for foreign ones).

    Understands safetensors, and `.pt`/`.pth`/`.bin` files of plain tensors; a state dict nested under `state_dict` or
    `model`, and the prefixes `module.` and `_orig_mod.`, are unwrapped.

    Raises:
        UserError: if the file is missing, damaged, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if path.is_dir() and (path / MODEL_FILE).is_file():
        path = path / MODEL_FILE
    if path.is_dir():
        raise UserError(f"{path} holds no checkpoint ({MODEL_FILE}); give a file, or a run that trained or unlearned")
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    metadata: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        weights, metadata = _read_safetensors(path)
    else:
        weights = _unwrap(_read_torch(path), path)
    for alias, name in metadata.pop("aliases", {}).items():
        weights[alias] = weights[name]
    return (weights if metadata else _without_prefixes(weights)), metadata


def load_into(model: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict into the model. Raises: UserError naming the keys and shapes that differ."""
    own = model.state_dict()
    problems = []
    if missing := sorted(set(own) - set(weights)):
        problems.append(f"{len(missing)} keys are missing ({listed(missing, 3)})")
    if extra := sorted(set(weights) - set(own)):
        problems.append(f"{len(extra)} keys are unknown ({listed(extra, 3)})")
    if wrong := [k for k in own if k in weights and weights[k].shape != own[k].shape]:
        shapes = [f"{k}: file {tuple(weights[k].shape)}, network {tuple(own[k].shape)}" for k in wrong]
        problems.append(f"{len(wrong)} shapes differ ({listed(shapes, 2)})")
    if problems:
        raise UserError(f"{what} does not fit the network: {'; '.join(problems)}; name the right --arch")
    model.load_state_dict(dict(weights))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(METADATA_KEY)
            metadata = json.loads(header) if header else {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} is damaged or not safetensors ({error}); fetch or write it again") from None


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # what torch says of it advises to open the file all the same
        raise UserError(
            f"checkpoint {path} is damaged or holds more than tensors (a whole module, say); such a file can run code "
            "and is not opened: save model.state_dict(), best as safetensors"
        ) from None


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(3):
        inner = next(
            (content[k] for k in NESTED if isinstance(content, Mapping) and isinstance(content.get(k), Mapping)), None
        )
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"checkpoint {path} holds no state dict (a mapping from names to tensors)")
    return dict(content)


def _without_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    changed = True
    while changed:
        changed = False
        for prefix in PREFIXES:
            if weights and all(k.startswith(prefix) for k in weights):
                weights = {k.removeprefix(prefix): v for k, v in weights.items()}
                changed = True
    return weights
