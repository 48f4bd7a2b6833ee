"""A language model, an objective, a rule, a mask: the engine's loop on texts."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unsharp import masks, runtime
from unsharp.artifacts import Workspace
from unsharp.data.samples import Batch
from unsharp.data.streams import Stream
from unsharp.engine import Loop, MakeOptimizer
from unsharp.errors import UserError
from unsharp.language.config import LanguageConfig
from unsharp.language.likelihood import answer_losses
from unsharp.language.mean_loss import TextLoss
from unsharp.language.models import with_adapters
from unsharp.language.objectives.base import Activations, SampleLosses, Task
from unsharp.language.objectives.rmu import activations
from unsharp.language.samples import TextBatch, TextSamples
from unsharp.phases import FORGET, RETAIN, Phase, Region
from unsharp.progress import SILENT, Progress
from unsharp.sharpness.base import NO_RULE
from unsharp.training import Record, named_by, run_loop


def unlearn(
    model: nn.Module,
    samples: TextSamples,
    config: LanguageConfig,
    *,
    preferred: TextSamples | None = None,
    mask: Region | None = None,
    make_optimizer: MakeOptimizer | None = None,
    workspace: Workspace | None = None,
    save_seconds: float = 60.0,
    on_epoch: Callable[[nn.Module], Mapping[str, float]] | None = None,
    progress: Progress = SILENT,
    in_place: bool = False,
) -> tuple[nn.Module, Record]:
    """Make a language model forget the texts of `samples` that are marked so.

    Args:
        model: A causal model of transformers, on the device of the samples.
        samples: The texts to forget, and those to retain unless the objective's gamma is 0.
        config: Objective, rule, mask, adapters and loop.
        preferred: For objectives that give another answer: at each forgotten position the prompt with that answer.
        mask: Bool tensors by the names of the trainable weights, in place of `config.mask_fraction`.
        make_optimizer: Builds the optimiser from the named trainable parameters, in place of `config.optimizer`.
        workspace: Where the state is kept from which a killed run goes on.
        save_seconds: Seconds between two savings within an epoch.
        on_epoch: Called with the model after each epoch; what it returns joins the history.
        progress: Told of each batch.
        in_place: Train `model` itself rather than a copy.

    Returns:
        The model that has forgotten, in evaluation mode, and the record of the run.

    Raises:
        UserError: for what does not fit together, before the first step.
        NonFiniteError: if a step is not finite.
    """
    _check(samples, config, mask)
    started = time.monotonic()
    trained = model if in_place else copy.deepcopy(model)
    original = _Original(model)
    task = Task(
        model=trained,
        samples=samples,
        preferred=preferred,
        original=original.activations,
        batch_size=config.micro_batch or config.batch_size,
    )
    losses = _losses(config, task)
    if config.lora is not None:
        trained = with_adapters(trained, config.lora, config.seed)
    region = _region(trained, samples, config, mask, workspace)
    rank, world = runtime.world()
    streams = {
        name: Stream(samples, indices, config.batch_size, config.seed, rank, world, config.last_batch)
        for name, indices in ((RETAIN, samples.retain), (FORGET, samples.forget))
        if len(indices)
    }
    phases = _phases(config, losses, region)
    loop = Loop(trained, phases, streams, config, make_optimizer=make_optimizer, leading=config.leading, widen=True)
    preparation = time.monotonic() - started
    mask_passes = 0
    if config.mask_fraction is not None:
        everything = np.arange(len(samples))
        mask_passes = masks.passes(config.mask_choice(), trained, samples.forget, everything, task.batch_size)
    record = run_loop(
        loop,
        workspace=workspace,
        save_seconds=save_seconds,
        on_epoch=None if on_epoch is None else lambda: on_epoch(trained),
        progress=progress,
        label="language",
    )
    return trained.eval(), dataclasses.replace(
        record,
        seconds=record.seconds + preparation,
        passes=record.passes + round((loop.other_forwards + task.forwards) / 3) + mask_passes,
        about=named_by(config, samples) | {"trained_parameters": sum(p.numel() for p in loop._params)},
    )


def _check(samples: TextSamples, config: LanguageConfig, mask: Region | None) -> None:
    if len(samples.forget) == 0:
        raise UserError("no text is to be forgotten; mark at least one")
    if len(samples.retain) == 0 and config.objective.gamma > 0:
        raise UserError("the objective's gamma is above 0 but no text is to be retained; give some, or gamma 0")
    if mask is not None and config.mask_fraction is not None:
        raise UserError("a mask is given, and mask_fraction asks for another; leave one of them out")


def _losses(config: LanguageConfig, task: Task) -> dict[str, tuple[float, Any]]:
    """Per stream its weight and loss, in the order in which they go forward; references are computed here."""
    objective = config.objective
    forget = {FORGET: (1.0, objective.forget_loss(task))}
    return forget if objective.gamma == 0 else {RETAIN: (objective.gamma, objective.retain_loss(task))} | forget


def _phases(config: LanguageConfig, losses: Mapping[str, tuple[float, Any]], region: Region | None) -> list[Phase]:
    forwards: dict[str, int] = dict(zip((FORGET, RETAIN), config.objective.forwards))
    if config.sharpness == "sum" or len(losses) == 1:
        used = sum(forwards[name] for name in losses)
        objective = SampleLosses(losses=losses, micro_batch=config.micro_batch, forwards=used)
        return [Phase(objective=objective, rule=config.rule, region=region, name="loss")]
    return [
        Phase(
            objective=SampleLosses(losses={name: loss}, micro_batch=config.micro_batch, forwards=forwards[name]),
            rule=config.rule if name == FORGET or config.sharpness == "each" else NO_RULE,
            region=region,
            name=name,
        )
        for name, loss in losses.items()
    ]


def _region(
    model: nn.Module, samples: TextSamples, config: LanguageConfig, mask: Region | None, workspace: Workspace | None
) -> Region | None:
    """The weights that may move: those of the mask given, or of the one that the configuration asks for."""
    if config.mask_fraction is None:
        return mask
    path = None if workspace is None else workspace.file(masks.FILE)
    if path is not None and path.exists():
        return masks.load(path, model)
    made = _mask(model, samples, config)
    if path is not None:
        masks.save(made, path)
    return made


def _mask(model: nn.Module, samples: TextSamples, config: LanguageConfig) -> masks.Mask:
    basis = masks.Basis(
        model=model,
        samples=samples,
        forget=samples.forget,
        training=np.arange(len(samples)),
        batch_size=config.micro_batch or config.batch_size,
        loss=_summed_losses,
        mean_loss=TextLoss,
    )
    return masks.make_mask(basis, config.mask_choice())


def _summed_losses(model: nn.Module, batch: Batch) -> Tensor:
    assert isinstance(batch, TextBatch)
    return answer_losses(model, batch, "mean").sum()


class _Original:
    """The model before the first step, copied only if an objective looks at it again."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def activations(self) -> Activations:
        kept = copy.deepcopy(self._model).eval().requires_grad_(False)

        def give(batch: TextBatch, layer: int) -> Tensor:
            with torch.no_grad():
                return activations(kept, batch, layer)

        return give
