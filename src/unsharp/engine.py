"""The one loop under training and unlearning: each phase's gradient under its rule, then one optimiser step."""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unsharp import runtime
from unsharp.data.samples import Batch
from unsharp.data.streams import Stream
from unsharp.errors import NonFiniteError, UserError, unknown
from unsharp.phases import RETAIN, Objective, Phase, region_tensors, union
from unsharp.progress import SILENT, Progress
from unsharp.sharpness.point import Gradients, Point, keep_region
from unsharp.sharpness.replay import Replay, WholeModel
from unsharp.sharpness.step import Stepper, check_base

MakeOptimizer = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
MAX_OVERFLOWS = 25


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The base optimiser.

    Args:
        name: Class of `torch.optim`, in any case ("sgd", "adamw").
        lr: Learning rate > 0; unlearning takes 0.01 where nothing is said.
        momentum: Momentum; None takes 0.9 for SGD, and nothing for the others.
        weight_decay: Weight decay ≥ 0.
        options: Further arguments of the class.
    """

    name: str = "sgd"
    lr: float = 0.1
    momentum: float | None = None
    weight_decay: float = 5e-4
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"lr must be a finite number above 0, got {self.lr}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UserError(f"weight_decay must be a finite number of at least 0, got {self.weight_decay}")
        self.arguments()

    def optimizer_class(self) -> type[torch.optim.Optimizer]:
        """The class called `name`. Raises: UserError if there is none or it cannot be a base."""
        known = {
            n.lower(): c
            for n, c in vars(torch.optim).items()
            if isinstance(c, type) and issubclass(c, torch.optim.Optimizer) and c is not torch.optim.Optimizer
        }
        if self.name.lower() not in known:
            raise unknown("optimizer", self.name, known)
        check_base(known[self.name.lower()])
        return known[self.name.lower()]

    def arguments(self) -> dict[str, Any]:
        """The arguments for the class. Raises: UserError for one that it does not take."""
        cls = self.optimizer_class()
        values: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay} | self.options
        if self.momentum is not None or cls is torch.optim.SGD:
            values["momentum"] = 0.9 if self.momentum is None else self.momentum
        accepted = set(inspect.signature(cls).parameters)
        for name in values:
            if name not in accepted:
                raise UserError(f"optimizer {self.name} does not take {name!r}; it takes {', '.join(sorted(accepted))}")
        return values

    def build(self, named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """The optimiser for these parameters, in its one-kernel form where the device has one.

        Raises:
            UserError: for a value that the class refuses.
        """
        cls, params = self.optimizer_class(), [p for _, p in named]
        fused = {} if "foreach" in self.options else runtime.fused_optimizer(cls, params[0].device)
        arguments: dict[str, Any] = fused | self.arguments()
        try:
            return cls(params, **arguments)
        except (ValueError, TypeError) as error:
            raise UserError(f"optimizer {self.name} cannot be made: {error}") from None


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What training and unlearning share.

    Args:
        epochs: Passes over the leading stream (retain where there is one), at least 1.
        batch_size: Largest batch of each stream.
        optimizer: The base optimiser.
        schedule: Learning rate over the steps: constant, cosine to 0, or steps at `milestones`.
        milestones: For "step": fractions of the run in (0, 1) at which the rate is multiplied by 0.1.
        warmup: Fraction of the run in [0, 1) over which the rate rises linearly from 0.
        clip_norm: Upper bound on the norm of the final gradient, or None.
        precision: float32, bf16 or fp16 autocast (fp16 with a gradient scaler).
        channels_last: Keep 4-D weights in channels-last order, which convolutions like.
        check_every: Steps between readings of the device's finiteness flag; None is 1 on a CPU and 50 elsewhere.
        seed: Seed of data order, augmentation and dropout.
    """

    epochs: int = 10
    batch_size: int = 256
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: Literal["constant", "cosine", "step"] = "constant"
    milestones: tuple[float, ...] = (0.5, 0.75)
    warmup: float = 0.0
    clip_norm: float | None = None
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    channels_last: bool = True
    check_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, known in (("schedule", ("constant", "cosine", "step")), ("precision", tuple(runtime.PRECISIONS))):
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), known)
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup must be a fraction in [0, 1), got {self.warmup}")
        if not all(0 < m < 1 for m in self.milestones):
            raise UserError(f"milestones must be fractions in (0, 1), got {self.milestones}")
        if self.clip_norm is not None and not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
            raise UserError(f"clip_norm must be a finite number above 0, got {self.clip_norm}")
        if self.check_every is not None and self.check_every < 1:
            raise UserError(f"check_every must be at least 1, got {self.check_every}")
        if self.seed < 0:
            raise UserError(f"seed must be at least 0, got {self.seed}")

    def lr_factor(self, step: int, total: int) -> float:
        """What the learning rate of step `step` (from 0) of `total` is multiplied by."""
        done = step / total
        if done < self.warmup:
            return (step + 1) / (self.warmup * total + 1)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))
        if self.schedule == "step":
            return 0.1 ** sum(done >= m for m in self.milestones)
        return 1.0


class Loop:
    """A run of phases over streams, epoch by epoch, that can stop after any batch and go on to the same bits.

    In an epoch the leading stream (retain where there is one) runs once and the others cycle beside it. All phases'
    gradients, each kept to its region, are added, and one optimiser takes one step.

    Args:
        model: Trained in place; its trainable parameters are those that require a gradient.
        phases: What is minimised, how, where.
        streams: By name; every name that a phase reads.
        config: Epochs, optimiser, precision and the like.
        make_optimizer: Builds the optimiser from the named trainable parameters, in place of `config.optimizer`.

    Raises:
        UserError: if no phase has anything to do, nothing is trainable, or a region does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        phases: Sequence[Phase],
        streams: Mapping[str, Stream],
        config: LoopConfig,
        *,
        make_optimizer: MakeOptimizer | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.phases = [phase for phase in phases if phase.objective.streams]
        if not self.phases:
            raise UserError("every loss has weight 0: there is nothing to do; give one of them a weight")
        used = {s for phase in self.phases for s in phase.objective.streams}
        self.streams = {name: streams[name] for name in sorted(used)}
        self.leading = self.streams[RETAIN if RETAIN in used else min(used)]
        self.device = runtime.device_of(model)
        if config.channels_last:
            _to_channels_last(model)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise UserError("the model has no trainable parameter; set requires_grad on those that may change")
        self._names, self._params = [n for n, _ in named], [p for _, p in named]
        self._regions = [region_tensors(dict(named), phase.region) for phase in self.phases]
        self.optimizer = (make_optimizer or config.optimizer.build)(named)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        check_every = config.check_every or (1 if runtime.is_host(self.device) else 50)
        self._stepper = Stepper(self.optimizer, self._params, union(self._regions), check_every=check_every)
        self._scaler = runtime.grad_scaler(self.device, config.precision)
        self._overflows = 0
        self._buffers = WholeModel(model)
        self.epoch, self.batch = 0, 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self._sums: dict[str, Tensor] = {}

    @property
    def n_batches(self) -> int:
        """Steps in an epoch."""
        return self.leading.n_batches

    @property
    def passes(self) -> int:
        """Forward–backward passes so far: one for each batch of a stream and each evaluation of a rule."""
        steps = self.epoch * self.n_batches + self.batch
        return steps * sum(phase.passes for phase in self.phases)

    def run(
        self,
        *,
        on_epoch: Callable[[], Mapping[str, float]] | None = None,
        save: Callable[[Loop], None] | None = None,
        save_seconds: float = 60.0,
        progress: Progress = SILENT,
        label: str = "training",
    ) -> list[dict[str, float]]:
        """Run to the end, from wherever the loop stands.

        Args:
            on_epoch: Called after each epoch; what it returns joins the epoch's row of the history.
            save: Called with the loop after each epoch, and within one every `save_seconds`.
            save_seconds: Seconds between two saves within an epoch.
            progress: Told of each batch.
            label: Shown with the progress.

        Returns:
            A row per epoch: epoch, lr, seconds, the mean of each loss term, and what `on_epoch` gave.

        Raises:
            NonFiniteError: at a step that is not finite; the model is as it was before that step, and saved.
        """
        total, saved = self.config.epochs * self.n_batches, time.monotonic()
        first = self.epoch * self.n_batches + self.batch - self._stepper.steps
        progress.start(label, total, done=self.epoch * self.n_batches + self.batch)
        try:
            while self.epoch < self.config.epochs:
                self.model.train()
                started = time.monotonic()
                for batches in self._batches():
                    self._set_lr(total)
                    with _naming_single_samples():
                        self._step(batches)
                    self.batch += 1
                    progress.advance()
                    if save is not None and time.monotonic() - saved >= save_seconds:
                        self._stepper.check()
                        self.seconds += time.monotonic() - started
                        save(self)
                        started = saved = time.monotonic()
                self._stepper.check()
                self._end_epoch(time.monotonic() - started, on_epoch)
                if save is not None:
                    save(self)
                    saved = time.monotonic()
        except NonFiniteError:
            # the step may have been found broken some steps later: stand where the weights do
            self.epoch, self.batch = divmod(first + self._stepper.steps, self.n_batches)
            if save is not None:
                save(self)
            raise
        finally:
            progress.finish()
        return self.history

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict() if self._scaler is not None else None,
            "random": runtime.rng_state(self.device),
            "at": {"epoch": self.epoch, "batch": self.batch, "seconds": self.seconds, "overflows": self._overflows},
            "history": self.history,
            "sums": self._sums,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken; the next step is the same, to the bit."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])
        runtime.set_rng_state(state["random"], self.device)
        self.epoch, self.batch = state["at"]["epoch"], state["at"]["batch"]
        self.seconds, self._overflows = state["at"]["seconds"], state["at"]["overflows"]
        self.history = list(state["history"])
        self._sums = {k: v.to(self.device) for k, v in state["sums"].items()}

    def _batches(self) -> Iterator[dict[str, Batch]]:
        """The rest of this epoch: one batch of each stream a step."""
        iterators = {name: s.epoch(self.epoch, self.batch, self.n_batches) for name, s in self.streams.items()}
        for _ in range(self.batch, self.n_batches):
            yield {name: next(iterator) for name, iterator in iterators.items()}

    def _step(self, batches: Mapping[str, Batch]) -> None:
        replay = Replay(self.device, self._buffers)
        gradients: Gradients | None = None
        losses: list[Tensor] = []
        seen: dict[str, Tensor] = {}
        for phase, region in zip(self.phases, self._regions):
            point = Point(
                self._params,
                self._evaluation(phase.objective, batches, phase.name, seen),
                replay,
                region=region,
                names=self._names,
                evaluate_perturb=self._evaluation(phase.perturb_objective, batches, "", {})
                if phase.perturb_objective is not None
                else None,
            )
            part = phase.rule.gradient(point)
            keep_region(part, region)
            gradients = part if gradients is None else _added(gradients, part)
            losses.append(point.first_loss())
        self._take(gradients or [], torch.stack(losses).sum(), replay)
        for key, value in seen.items():
            self._sums[key] = self._sums.get(key, 0) + self._stepper.counted(value)

    def _take(self, gradients: Gradients, loss: Tensor, replay: Replay) -> None:
        clip = self.config.clip_norm
        if self._scaler is None:
            self._stepper.step(gradients, loss, replay, clip_norm=clip)
            return
        self._stepper.step(gradients, loss, replay, scaler=self._scaler, clip_norm=clip)
        self._scaler.update()
        self._overflows = self._overflows + 1 if self._stepper.skipped else 0
        if self._overflows >= MAX_OVERFLOWS:
            raise NonFiniteError(
                f"{MAX_OVERFLOWS} steps in a row overflowed in fp16; no weight has moved in them. "
                "Use precision bf16 or float32, or lower the learning rate"
            )

    def _evaluation(
        self, objective: Objective, batches: Mapping[str, Batch], name: str, seen: dict[str, Tensor]
    ) -> Callable[[], Tensor]:
        """A closure that leaves the objective's gradient in the parameters and returns its value.

        What the terms are at its first call goes into `seen`, under `name`; without a name it is not of interest.
        """
        first = bool(name)

        def evaluate() -> Tensor:
            nonlocal first
            values: dict[str, Tensor] = {}
            with runtime.autocast(self.device, self.config.precision):
                for term_name, term in objective.terms(self.model, batches):
                    (term if self._scaler is None else self._scaler.scale(term)).backward()
                    values[term_name] = term.detach()
            runtime.mean_over_ranks([*(p.grad for p in self._params), *values.values()])
            if first:
                first = False
                for term_name, value in values.items():
                    key = f"{name}/{term_name}" if len(objective.streams) > 1 or name != term_name else name
                    seen[key] = seen.get(key, 0) + value
            return torch.stack(list(values.values())).sum()

        return evaluate

    def _set_lr(self, total: int) -> None:
        factor = self.config.lr_factor(self.epoch * self.n_batches + self.batch, total)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def _end_epoch(self, seconds: float, on_epoch: Callable[[], Mapping[str, float]] | None) -> None:
        self.seconds += seconds
        row = {"epoch": self.epoch + 1, "lr": self.optimizer.param_groups[0]["lr"], "seconds": self.seconds}
        row |= {name: float(total) / self.n_batches for name, total in self._sums.items()}
        self.epoch, self.batch, self._sums = self.epoch + 1, 0, {}
        self.history.append(row | dict(on_epoch() if on_epoch is not None else {}))


@contextlib.contextmanager
def _naming_single_samples() -> Iterator[None]:
    """Say what to do where a batch of one sample meets BatchNorm on 1×1 maps, which has no variance to divide by."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "a batch of one sample cannot pass this network's BatchNorm in training: forget or retain more samples, "
            "take larger batches, or larger images"
        ) from None


def _to_channels_last(model: nn.Module) -> None:
    """Lay the 4-D weights out in channels-last order; `Module.to` would refuse a model that has 5-D ones as well."""
    model._apply(lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t)


def _added(a: Gradients, b: Gradients) -> Gradients:
    """a + b, in a's memory; a tensor that one of them lacks comes from the other."""
    return [y if x is None else x if y is None else x.add_(y) for x, y in zip(a, b)]
