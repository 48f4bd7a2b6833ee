"""Stage 2: pretrain and retrain, one function on different indices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from unsharp import runtime
from unsharp.artifacts import Workspace
from unsharp.config import digest
from unsharp.data.samples import Samples
from unsharp.data.streams import Stream
from unsharp.engine import Loop, LoopConfig, MakeOptimizer, OptimizerConfig, Schedule
from unsharp.phases import RETAIN, CrossEntropy, Phase
from unsharp.progress import SILENT, Progress
from unsharp.sharpness.base import NO_RULE, Rule


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """How a network is trained, whether on everything or without the forget set.

    Args:
        rule: Sharpness rule of the training steps.
        label_smoothing: Mass in [0, 1) that the target spreads over all classes.
    """

    epochs: int = 30
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: Schedule = "cosine"
    rule: Rule = NO_RULE
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        CrossEntropy({RETAIN: 1.0}, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run of the loop cost and how it went.

    Args:
        history: A row per epoch.
        seconds: Wall time of the work.
        passes: Forward–backward passes, one for each batch of a stream and each evaluation of a rule.
        peak_memory_bytes: As `runtime.PeakMemory` defines it.
        about: What the result is named by: seed, configuration hash, data fingerprint, versions.
    """

    history: list[dict[str, float]]
    seconds: float
    passes: int
    peak_memory_bytes: int | None
    about: dict[str, Any] = field(default_factory=dict)


def initial_model(make_model: Callable[[], nn.Module], seed: int, device: torch.device) -> nn.Module:
    """The network as it starts: weights a function of the seed alone, made on the host, so the same on any device."""
    runtime.seed_all(seed)
    return make_model().to(device)


def train(
    model: nn.Module,
    samples: Samples,
    indices: np.ndarray,
    config: TrainConfig,
    *,
    make_optimizer: MakeOptimizer | None = None,
    workspace: Workspace | None = None,
    save_seconds: float = 60.0,
    on_epoch: Callable[[], Mapping[str, float]] | None = None,
    stop: Callable[[Mapping[str, float]], bool] | None = None,
    progress: Progress = SILENT,
    label: str = "training",
) -> Record:
    """Train `model` in place on the samples at `indices`.

    Args:
        model: On the device where it shall be trained.
        samples: The whole training set.
        indices: (k,) int64 positions to train on: all of them to pretrain, those to retain to retrain.
        config: How.
        make_optimizer: Builds the optimiser, in place of `config.optimizer`.
        workspace: Where the state is kept from which a killed run goes on; None keeps none.
        save_seconds: Seconds between two savings within an epoch.
        on_epoch: Called after each epoch; what it returns joins the history.
        stop: Told of each epoch's row of the history; training ends where it says so.
        progress: Told of each batch.
        label: Shown with the progress.

    Returns:
        The record of the run.

    Raises:
        NonFiniteError: if a step is not finite; the model is then as before that step.
    """
    phases = [Phase(objective=CrossEntropy({RETAIN: 1.0}, config.label_smoothing), rule=config.rule, name="loss")]
    rank, world = runtime.world()
    stream = Stream(samples, indices, config.batch_size, config.seed, rank, world, config.last_batch)
    loop = Loop(model, phases, {RETAIN: stream}, config, make_optimizer=make_optimizer)
    record = run_loop(
        loop,
        workspace=workspace,
        save_seconds=save_seconds,
        on_epoch=on_epoch,
        stop=stop,
        progress=progress,
        label=label,
    )
    return dataclasses.replace(record, about=named_by(config, samples))


def named_by(config: LoopConfig, samples: Samples) -> dict[str, Any]:
    """What a result is named by, as plain values."""
    return {
        "seed": config.seed,
        "config": digest(config),
        "data": samples.fingerprint,
        "versions": runtime.versions(),
        "threads": torch.get_num_threads(),
    }


def run_loop(
    loop: Loop,
    *,
    workspace: Workspace | None,
    save_seconds: float,
    on_epoch: Callable[[], Mapping[str, float]] | None,
    progress: Progress,
    label: str,
    stop: Callable[[Mapping[str, float]], bool] | None = None,
) -> Record:
    """Run a loop to its end, from the state in the workspace where there is one, and measure what it takes."""
    runtime.seed_all(loop.config.seed)
    state: dict[str, Any] | None = workspace.load_state(loop.device) if workspace is not None else None
    if state is not None:
        loop.load_state_dict(state)
    save = None if workspace is None or runtime.world()[0] else lambda at: workspace.save_state(at.state_dict())
    with runtime.PeakMemory(loop.device) as memory:
        loop.run(on_epoch=on_epoch, stop=stop, save=save, save_seconds=save_seconds, progress=progress, label=label)
    return Record(history=loop.history, seconds=loop.seconds, passes=loop.passes, peak_memory_bytes=memory.bytes)
