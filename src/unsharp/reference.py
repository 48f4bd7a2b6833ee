"""The retrained reference: trained as the original was, without the forget set, once for each such network."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unsharp import artifacts, checkpoints, config, runtime
from unsharp.artifacts import Run, Workspace
from unsharp.checkpoints import MODEL_FILE
from unsharp.data.samples import Samples, content_of
from unsharp.difficulty import ForgetSet
from unsharp.engine import MakeOptimizer
from unsharp.progress import SILENT, Progress
from unsharp.training import Record, TrainConfig, initial_model, train

RECORD_FILE = "record.json"


@dataclass(frozen=True)
class Recipe:
    """How a network was made, so that it can be made again.

    Args:
        make_model: Builds the untrained network from torch's random state.
        train: How it was trained.
        architecture: What distinguishes it from other networks, as plain values; None looks at the network.
        make_optimizer: Builds the optimiser, in place of that of `train`.
    """

    make_model: Callable[[], nn.Module]
    train: TrainConfig
    architecture: Any = None
    make_optimizer: MakeOptimizer | None = None

    def start(self, device: torch.device) -> nn.Module:
        """The network before training, a function of the seed."""
        return initial_model(self.make_model, self.train.seed, device)


@dataclass(frozen=True)
class Reference:
    """A retrained network.

    Args:
        model: In evaluation mode.
        record: What its training took, whenever that was.
        run: Where it is kept; None where it cannot be kept.
    """

    model: nn.Module
    record: Record
    run: Run | None = None


def retrain(
    recipe: Recipe,
    samples: Samples,
    forget: ForgetSet,
    *,
    device: torch.device,
    store: str | Path | None = None,
    force: bool = False,
    save_seconds: float = 60.0,
    progress: Progress = SILENT,
) -> Reference:
    """Train the recipe's network on everything but the forget set, or find it in the store.

    Args:
        recipe: How the original was made.
        samples: Its training data; without a fingerprint the result is not kept, since it could not be found again.
        forget: What is left out.
        device: Where to train.
        store: Directory of kept references; None keeps none.
        force: Train again even if it is there.
        save_seconds: Seconds between two savings of the state from which a killed run goes on.
        progress: Told of each batch.

    Returns:
        The reference.
    """
    model = recipe.start(device)
    kept = forget.retain_indices(len(samples))

    def work(workspace: Workspace | None) -> Record:
        return train(
            model,
            samples,
            kept,
            recipe.train,
            make_optimizer=recipe.make_optimizer,
            workspace=workspace,
            save_seconds=save_seconds,
            progress=progress,
            label="retraining",
        )

    if store is None or samples.fingerprint is None or recipe.make_optimizer is not None:
        record = work(None)
        return Reference(model.eval(), record)
    settings = reference_key(recipe, model, samples, forget, device)

    def keep(workspace: Workspace) -> None:
        record = work(workspace)
        checkpoints.save_model(
            workspace.file(MODEL_FILE), model, {"recipe": recipe.architecture, "train": recipe.train}
        )
        workspace.write_json(RECORD_FILE, record)

    path = Path(store) / f"retrain-{config.digest(settings)[:16]}"
    lacks = [forget.hash, *([] if forget.before is None else [forget.before.absent.hash])]
    run = artifacts.perform(path, "retrain", settings, keep, provenance={"lacks": lacks}, force=force, wait=True)
    weights, _ = checkpoints.load_weights(run.file(MODEL_FILE))
    # Training may have changed the order of the weights in memory, and with it the last bits of what is computed: one
    # that was just made is to answer as one that is found.
    model._apply(lambda t: t.clone(memory_format=torch.contiguous_format))
    checkpoints.load_into(model, weights, str(run.path))
    return Reference(model.eval(), config.from_dict(Record, run.json(RECORD_FILE)), run)


def reference_key(
    recipe: Recipe, model: nn.Module, samples: Samples, forget: ForgetSet, device: torch.device
) -> dict[str, Any]:
    """All that a retrained network depends on; two with equal keys are the same network."""
    return {
        "architecture": recipe.architecture if recipe.architecture is not None else described(model),
        "initialisation": state_digest(model),
        "train": config.to_dict(recipe.train),
        "data": samples.fingerprint,
        "inputs": dict(samples.treatment),
        "forget": forget.absent.hash,
        "seed": recipe.train.seed,
        "versions": runtime.versions(),
        "device": device.type,
        "precision": recipe.train.precision,
    }


def described(model: nn.Module) -> dict[str, Any]:
    """What can be said of a network that no configuration describes: its classes, their structure and their source."""
    kinds = sorted({type(m) for m in model.modules() if not type(m).__module__.startswith("torch.")}, key=str)
    sources = {}
    for kind in kinds:
        with contextlib.suppress(OSError, TypeError):  # made in a console, or compiled
            sources[f"{kind.__module__}.{kind.__qualname__}"] = inspect.getsource(kind)
    return {"class": type(model).__qualname__, "structure": repr(model), "sources": sources}


def state_digest(model: nn.Module) -> str:
    """sha256 over names, shapes and bytes of the network's state."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(content_of(tensor))
    return digest.hexdigest()
