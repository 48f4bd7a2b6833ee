"""Causal models and tokenizers of transformers: loaded from a name or a directory, given adapters, saved."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from unsharp import runtime
from unsharp.data.samples import content_of
from unsharp.errors import UserError, unknown
from unsharp.language.config import LoRA

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ADAPTER_FILE = "adapter_config.json"


class Loaded(NamedTuple):
    """A model and its tokenizer."""

    model: nn.Module
    tokenizer: Any


def load(
    name: str | Path,
    device: torch.device,
    *,
    tokenizer: str | Path | None = None,
    weights: str = "float32",
    local_files_only: bool = False,
) -> Loaded:
    """A causal model and its tokenizer, by a name on the hub or from a directory, with or without adapters.

    Nothing but tensors is read: no code of the model's repository runs, and files of pickled objects are refused.

    Args:
        name: Directory, or name on the hub.
        device: Where the model goes.
        tokenizer: Directory or name of the tokenizer; None takes that beside the model.
        weights: Precision of the weights: float32, bf16 or fp16.
        local_files_only: Look on the hub for nothing; take what its cache on this machine has.

    Raises:
        UserError: if transformers is missing, or there is no such model or tokenizer.
    """
    if weights not in DTYPES:
        raise unknown("weights", weights, DTYPES)
    transformers = package("transformers")
    base, adapters = _base_of(name), Path(name, ADAPTER_FILE).is_file()
    how = {"local_files_only": local_files_only, "trust_remote_code": False}
    with _explained("model", base, local_files_only), _quiet(transformers), warnings.catch_warnings():
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[weights], weights_only=True, **how)
        if adapters:
            peft = package("peft")
            warnings.simplefilter("ignore")  # of what peft calls by its old name
            model = peft.PeftModel.from_pretrained(model, str(name), is_trainable=True)
    where = name if tokenizer is None else tokenizer
    with _explained("tokenizer", where, local_files_only), _quiet(transformers):
        words = transformers.AutoTokenizer.from_pretrained(str(where), **how)
    return Loaded(model.to(device).eval(), words)


def save(directory: str | Path, model: nn.Module, tokenizer: Any) -> None:
    """Write model (or its adapters alone) and tokenizer as safetensors, into a directory that `load` reads."""
    with _quiet(package("transformers")):
        for part in (model, tokenizer):
            part.save_pretrained(str(directory))  # pyright: ignore[reportCallIssue]


def with_adapters(model: nn.Module, lora: LoRA, seed: int) -> nn.Module:
    """The model with fresh adapters, which alone are trainable; they are drawn with the seed.

    Raises:
        UserError: if peft is missing, or the model has no layer for them.
    """
    peft = package("peft")
    targets = "all-linear" if lora.targets is None else list(lora.targets)
    how = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    runtime.seed_all(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers that store their weight transposed, which it then takes as such
            return peft.get_peft_model(model, how)
    except ValueError as error:
        raise UserError(f"LoRA does not fit the model: {first_line(error)}; name layers that it has") from None


def context_of(model: nn.Module) -> int | None:
    """Tokens that the model takes at most; None where it does not say."""
    config: Any = model.config
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    return next((n for n in found if isinstance(n, int) and n > 0), None)


def n_tokens_of(model: nn.Module) -> int:
    """Tokens that the model knows."""
    return int(model.get_input_embeddings().weight.shape[0])  # pyright: ignore


def digest(model: nn.Module) -> str:
    """Sha256 over the names and the contents of the model's tensors."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(content_of(tensor))
    return found.hexdigest()


def package(name: str) -> ModuleType:
    """A package of the extra [language]. Raises: UserError if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"language models need the package {name} ({error}); install it with pip install 'unsharp[language]'"
        ) from None


def _base_of(name: str | Path) -> str:
    """The model itself, where `name` holds adapters of one."""
    if not Path(name, ADAPTER_FILE).is_file():
        return str(name)
    from unsharp.config import read_json

    return str(read_json(Path(name, ADAPTER_FILE)).get("base_model_name_or_path"))


@contextlib.contextmanager
def _explained(what: str, name: str | Path, local_files_only: bool) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, pickle.UnpicklingError) as error:
        if isinstance(error, UserError):
            raise
        if Path(name).is_dir():
            advice = "give a directory that save_pretrained wrote, with safetensors (pickled objects are not opened)"
        elif local_files_only:
            advice = "no such directory, and the hub's cache here does not have it; allow the hub, or fetch it"
        else:
            advice = "give an existing directory, or the name of one that the hub has and this machine can reach"
        raise UserError(f"{what} {str(name)!r} cannot be loaded ({first_line(error)}); {advice}") from None


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No bars and no advice while something is loaded."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
