"""The one loop under training and unlearning: each phase's gradient under its rule, then one optimiser step."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from unsharp import runtime
from unsharp.data.samples import Batch
from unsharp.data.streams import Stream
from unsharp.errors import NonFiniteError, UserError, unknown
from unsharp.phases import RETAIN, Moment, Objective, Phase, region_tensors, union
from unsharp.progress import SILENT, Progress
from unsharp.sharpness.base import Site
from unsharp.sharpness.normalisation import normalisation_weights
from unsharp.sharpness.point import Gradients, Point, keep_region, scale_gradients
from unsharp.sharpness.replay import Replay, WholeModel
from unsharp.sharpness.step import SCALE_FREE, MaskedOptimizer, MemoryGuard, Stepper, check_base

MakeOptimizer = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
TakeTerms = Callable[[Mapping[str, Tensor]], None]
MAX_OVERFLOWS = 25
Schedule = Literal["constant", "cosine", "linear", "step"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The base optimiser.

    Args:
        name: Class of `torch.optim`, in any case ("sgd", "adamw").
        lr: Learning rate > 0; unlearning takes 0.01 where nothing is said.
        momentum: Momentum; None takes 0.9 for SGD, and nothing for the others.
        weight_decay: Weight decay ≥ 0; 0 for a class that has none.
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
        if self.weight_decay == 0 and "weight_decay" not in accepted:
            del values["weight_decay"]
        for name in values:
            if name not in accepted:
                raise UserError(f"optimizer {self.name} does not take {name!r}; it takes {', '.join(sorted(accepted))}")
        return values

    @property
    def scale_free(self) -> bool:
        """Whether its step does not depend on the size of the gradients, since it divides by that."""
        return self.optimizer_class().__name__ in SCALE_FREE

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
        last_batch: Balanced batches differ by at most one sample; with "short" all are full but the last one.
        optimizer: The base optimiser.
        schedule: Learning rate over the steps: constant, cosine or linear to 0, or steps at `milestones`.
        phase_lr: Learning rate of single phases, by their names ("retain", "forget"); such phases have an optimiser
            state each.
        phase_schedule: Schedule of single phases, by their names; likewise.
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
    last_batch: Literal["balanced", "short"] = "balanced"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: Schedule = "constant"
    phase_lr: dict[str, float] = field(default_factory=dict)
    phase_schedule: dict[str, Schedule] = field(default_factory=dict)
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
        for name, value in {"schedule": self.schedule, **self.phase_schedule}.items():
            if value not in get_args(Schedule):
                raise unknown("schedule" if name == "schedule" else f"schedule of {name}", value, get_args(Schedule))
        if self.last_batch not in ("balanced", "short"):
            raise unknown("last_batch", self.last_batch, ("balanced", "short"))
        if self.precision not in runtime.PRECISIONS:
            raise unknown("precision", self.precision, tuple(runtime.PRECISIONS))
        for name, lr in self.phase_lr.items():
            if not (math.isfinite(lr) and lr > 0):
                raise UserError(f"the learning rate of phase {name} must be a finite number above 0, got {lr}")
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

    def lr_factor(self, step: int, total: int, phase: str = "") -> float:
        """What the learning rate of step `step` (from 0) of `total` is multiplied by, for a phase of that name."""
        schedule, done = self.phase_schedule.get(phase, self.schedule), step / total
        if done < self.warmup:
            return (step + 1) / (self.warmup * total + 1)
        rest = (1 - done) / (1 - self.warmup)
        if schedule == "cosine":
            return 0.5 * (1 - math.cos(math.pi * rest))
        if schedule == "linear":
            return rest
        if schedule == "step":
            return 0.1 ** sum(done >= m for m in self.milestones)
        return 1.0


class Loop:
    """A run of phases over streams, epoch by epoch, that can stop after any batch and go on to the same bits.

    In an epoch the turns follow one another. In a turn the leading stream (retain where there is one) runs once and the
    others cycle beside it; the gradients of its phases, each kept to its region, are added, and one optimiser takes one
    step; or each phase has an optimiser of its own, and they step one after another with gradients at the same weights.

    Args:
        model: Trained in place; its trainable parameters are those that require a gradient.
        phases: What is minimised, how, where.
        streams: By name; every name that a phase reads.
        config: Epochs, optimiser, precision and the like.
        make_optimizer: Builds the optimiser from the named trainable parameters, in place of `config.optimizer`.
        separate_states: Give each phase an optimiser of its own. Where phases of a turn share weights, one of them
            alone decays what it moves, and the others nothing: one without a factor (`scale`), among these the one
            that acts in most epochs, among these the first.
        alternate: The phases of a turn step one after another on each step's batches, each with an optimiser of its
            own at the weights to which the one before it has moved, and each with its decay.
        leading: The stream that an epoch runs through once, in the turns that read it.
        widen: Perturb weights in half precision in float32, and compute such passes in it: the grid of half precision
            is so coarse that most of a small perturbation would be lost. The inputs must suit both, as tokens do.

    Raises:
        UserError: if no phase has anything to do, nothing is trainable, a region does not fit the model, or phases in
            turn share a state but not their region.
    """

    def __init__(
        self,
        model: nn.Module,
        phases: Sequence[Phase],
        streams: Mapping[str, Stream],
        config: LoopConfig,
        *,
        make_optimizer: MakeOptimizer | None = None,
        separate_states: bool = False,
        alternate: bool = False,
        leading: str = RETAIN,
        widen: bool = False,
    ) -> None:
        self.model = model
        self._leading = leading
        self.config = config
        self.phases = [phase for phase in phases if phase.objective.streams]
        if not self.phases:
            raise UserError("every loss has weight 0: there is nothing to do; give one of them a weight")
        used = {s for phase in self.phases for s in phase.streams}
        self.streams = {name: streams[name] for name in sorted(used)}
        self.device = runtime.device_of(model)
        if config.channels_last:
            _to_channels_last(model)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise UserError("the model has no trainable parameter; set requires_grad on those that may change")
        self._names, self._params = [n for n, _ in named], [p for _, p in named]
        self._frozen = [p for p in model.parameters() if not p.requires_grad] if widen else None
        self._regions = [region_tensors(dict(named), phase.region) for phase in self.phases]
        self._norms = normalisation_weights(model, self._params)
        for phase, region in zip(self.phases, self._regions):
            phase.rule.check(self._site(phase, region))
        self._memories: list[dict[str, Any]] = [{} for _ in self.phases]
        self._guard = MemoryGuard()
        self._check_phase_settings()
        self._alternate = alternate
        separate = separate_states or alternate or bool(config.phase_lr or config.phase_schedule)
        self._state_of = list(range(len(self.phases))) if separate else [0] * len(self.phases)
        make = make_optimizer or config.optimizer.build
        check_every = config.check_every or (1 if runtime.is_host(self.device) else 50)
        self._stepper = Stepper(self._masked_optimizers(make, named), check_every=check_every)
        self._scaler = runtime.grad_scaler(self.device, config.precision)
        if self._scaler is not None and len(self.optimizers) > 1:
            raise UserError("precision fp16 scales one gradient alone; with a state per phase take bf16 or float32")
        self._overflows = 0
        self._passes = 0.0
        self.other_forwards = 0.0
        """Batches that went forward with no pass backward so far, as teachers send them."""
        self._buffers = WholeModel(model)
        self.epoch, self.batch = 0, 0
        self.seconds = 0.0
        self.stopped = False
        self.history: list[dict[str, float]] = []
        self._sums: dict[str, Tensor] = {}
        """Of each loss term: (2,), the sum of its values in this epoch, and of how many."""

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """One, or one per phase."""
        return [masked.optimizer for masked in self._stepper.optimizers]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The first optimiser."""
        return self.optimizers[0]

    @property
    def n_batches(self) -> int:
        """Steps in this epoch, or in the last one once the run is over."""
        return self.steps_in(min(self.epoch, self.config.epochs - 1))

    @property
    def passes(self) -> int:
        """Forward–backward passes so far: one for each batch of a stream and each evaluation of a rule."""
        return round(self._passes)

    def steps_in(self, epoch: int) -> int:
        """Steps in an epoch."""
        return sum(n * self._steps_per_batch(members) for members, _, n in self._turns(epoch))

    def run(
        self,
        *,
        on_epoch: Callable[[], Mapping[str, float]] | None = None,
        stop: Callable[[Mapping[str, float]], bool] | None = None,
        save: Callable[[Loop], None] | None = None,
        save_seconds: float = 60.0,
        progress: Progress = SILENT,
        label: str = "training",
    ) -> list[dict[str, float]]:
        """Run to the end, from wherever the loop stands.

        Args:
            on_epoch: Called after each epoch; what it returns joins the epoch's row of the history.
            stop: Told of each row; the run ends where it says so.
            save: Called with the loop after each epoch, and within one every `save_seconds`.
            save_seconds: Seconds between two saves within an epoch.
            progress: Told of each batch.
            label: Shown with the progress.

        Returns:
            A row per epoch: epoch, lr, seconds and passes so far, the mean of each loss term, what `on_epoch` gave.

        Raises:
            NonFiniteError: at a step that is not finite; the model is as it was before that step, and saved.
        """
        total, saved = sum(map(self.steps_in, range(self.config.epochs))), time.monotonic()
        first = self._done() - self._stepper.steps
        progress.start(label, total, done=self._done())
        try:
            while self.epoch < self.config.epochs and not self.stopped:
                self.model.train()
                started = time.monotonic()
                for turn, taken, batches in self._batches():
                    self._set_lr(self._done(), total)
                    before = [dict(memory) for memory in self._memories]
                    with _naming_single_samples():
                        self._step(turn, taken, batches)
                    self.batch += 1
                    for i in turn:
                        self.phases[i].rule.after_step(self._params, self._memories[i], self._done() / total)
                    self._keep_memories(before)
                    progress.advance()
                    if save is not None and time.monotonic() - saved >= save_seconds:
                        self._stepper.check()
                        self.seconds += time.monotonic() - started
                        save(self)
                        started = saved = time.monotonic()
                self._stepper.check()
                self._end_epoch(time.monotonic() - started, on_epoch)
                progress.log({f"{label}/{name}": value for name, value in self.history[-1].items()}, self.epoch)
                self.stopped = stop is not None and stop(self.history[-1])
                if save is not None:
                    save(self)
                    saved = time.monotonic()
        except NonFiniteError:
            # the step may have been found broken some steps later: stand where the weights do
            self._guard.settle(self._stepper.steps)
            self._go_back_to(first + self._stepper.steps)
            if save is not None:
                save(self)
            raise
        finally:
            progress.finish()
        self._take_final_weights()
        return self.history

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self._scaler.state_dict() if self._scaler is not None else None,
            "random": runtime.rng_state(self.device),
            "at": {
                "epoch": self.epoch,
                "batch": self.batch,
                "seconds": self.seconds,
                "overflows": self._overflows,
                "passes": self._passes,
                "other_forwards": self.other_forwards,
                "stopped": self.stopped,
            },
            "history": self.history,
            "sums": self._sums,
            "memories": self._memories,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken; the next step is the same, to the bit."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])
        runtime.set_rng_state(state["random"], self.device)
        at = state["at"]
        self.epoch, self.batch, self.stopped = at["epoch"], at["batch"], at["stopped"]
        self.seconds, self._overflows, self._passes = at["seconds"], at["overflows"], at["passes"]
        self.other_forwards = at["other_forwards"]
        self.history = list(state["history"])
        self._sums = {k: v.to(self.device) for k, v in state["sums"].items()}
        self._memories = [dict(memory) for memory in state["memories"]]

    # --- phases, turns, states ---------------------------------------------------------------------------------------

    def _turns(self, epoch: int) -> list[tuple[list[int], Stream, int]]:
        """The turns of an epoch: the phases at work in it, the leading stream, the number of its batches."""
        turns: dict[int, list[int]] = {}
        for i, phase in enumerate(self.phases):
            if phase.acts_in(epoch):
                turns.setdefault(phase.turn, []).append(i)
        found = []
        for _, members in sorted(turns.items()):
            used = {s for i in members for s in self.phases[i].objective.streams}
            leading = self.streams[self._leading if self._leading in used else min(used)]
            found.append((members, leading, leading.n_batches))
        return found

    def _steps_per_batch(self, members: Sequence[int]) -> int:
        return len(members) if self._alternate else 1

    def _site(self, phase: Phase, region: list[Tensor | None] | None) -> Site:
        smallest = min(self.streams[name].smallest_batch for name in phase.streams)
        return Site(name=phase.name, norms=self._norms, region=region, smallest_batch=smallest)

    def _check_phase_settings(self) -> None:
        names = [phase.name for phase in self.phases]
        for setting in ("phase_lr", "phase_schedule"):
            for name in getattr(self.config, setting):
                if name not in names:
                    raise unknown(f"phase in {setting}", name, names)

    def _masked_optimizers(self, make: MakeOptimizer, named: list[tuple[str, nn.Parameter]]) -> list[MaskedOptimizer]:
        """One optimiser for the union of the regions, or one for each phase's own."""
        acting = [None if phase.leak else region for phase, region in zip(self.phases, self._regions)]
        n_states, found = max(self._state_of) + 1, []
        decaying = self._decaying(acting) if n_states > 1 else []
        if n_states == 1 and len({phase.turn for phase in self.phases}) > 1 and not _all_equal(acting):
            raise UserError(
                "phases in turn with different regions need an optimiser state each, or momentum would carry the "
                "gradient of one region into the other's turn: set separate_states"
            )
        for k in range(n_states):
            mine = [i for i, state in enumerate(self._state_of) if state == k]
            optimizer = make(named)
            for group in optimizer.param_groups:
                if n_states > 1:
                    group["lr"] = self.config.phase_lr.get(self.phases[k].name, group["lr"])
                    if k not in decaying:
                        group["weight_decay"] = 0.0
                group.setdefault("initial_lr", group["lr"])
            found.append(MaskedOptimizer(optimizer, self._params, union([acting[i] for i in mine])))
        return found

    def _decaying(self, acting: Sequence[list[Tensor | None] | None]) -> list[int]:
        """The phases whose own optimiser decays: of those that move a common weight in one step, one alone.

        It is the one that rests least, so that decay does not end where others go on; of equal ones the first.
        """
        lasting = [self.config.epochs if phase.until is None else phase.until for phase in self.phases]
        order = sorted(range(len(acting)), key=lambda i: (self.phases[i].scale is not None, -lasting[i]))
        found: list[int] = []
        for i in order:
            if not any(self._share_weights(acting, i, k) for k in found):
                found.append(i)
        return found

    def _share_weights(self, acting: Sequence[list[Tensor | None] | None], i: int, k: int) -> bool:
        """Whether two phases of one turn move a common weight in one step."""
        if self.phases[i].turn != self.phases[k].turn or self._alternate:
            return False
        a, b = acting[i], acting[k]
        if a is None or b is None:
            return True
        return any(x is None or y is None or bool((x & y).any()) for x, y in zip(a, b))

    def _set_lr(self, step: int, total: int) -> None:
        for k, optimizer in enumerate(self.optimizers):
            name = self.phases[k].name if len(self.optimizers) > 1 else ""
            factor = self.config.lr_factor(step, total, name)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    # --- where the run stands ----------------------------------------------------------------------------------------

    def _done(self) -> int:
        """Steps taken so far."""
        return sum(map(self.steps_in, range(self.epoch))) + self.batch

    def _go_back_to(self, step: int) -> None:
        """Stand at a step that the run has passed."""
        self.epoch = 0
        while self.epoch < self.config.epochs and step >= self.steps_in(self.epoch):
            step -= self.steps_in(self.epoch)
            self.epoch += 1
        self.batch = step

    def _batches(self) -> Iterator[tuple[list[int], int, dict[str, Batch]]]:
        """The rest of this epoch, step by step: phases at work, steps they took before, a batch of each stream."""
        first = 0
        for members, leading, n in self._turns(self.epoch):
            each = self._steps_per_batch(members)
            (start, part), first = divmod(max(0, self.batch - first), each), first + n * each
            if start >= n:
                continue
            used = {s for i in members for s in self.phases[i].streams}
            before = sum(m for e in range(self.epoch) for others, _, m in self._turns(e) if members[0] in others)
            iterators = {s: self.streams[s].epoch(self.epoch, start, leading.n_batches) for s in sorted(used)}
            for step in range(start, n):
                batches = {name: next(iterator) for name, iterator in iterators.items()}
                for k in range(part if step == start else 0, each):
                    yield members[k : k + 1] if self._alternate else members, before + step, batches

    # --- one step ----------------------------------------------------------------------------------------------------

    def _step(self, turn: Sequence[int], taken: int, batches: Mapping[str, Batch]) -> None:
        replay = Replay(self.device, self._buffers)
        before = [dict(memory) for memory in self._memories]
        gradients: list[Gradients | None] = [None] * len(self.optimizers)
        active: list[Tensor | None] = [None] * len(self.optimizers)
        losses: list[Tensor] = []
        seen: dict[str, Tensor] = {}
        for i in turn:
            phase, region, state = self.phases[i], self._regions[i], self._state_of[i]
            point = self._point(i, taken, batches, replay, seen)
            part = phase.rule.gradient(point)
            if phase.scale is not None and point.last_loss is not None:
                factor = phase.scale.factor(point.last_loss, self._memories[i])
                scale_gradients(part, factor)
                active[state] = factor > 0 if len(self.optimizers) > 1 else None
            if not phase.leak:
                keep_region(part, region)
            so_far = gradients[state]
            gradients[state] = part if so_far is None else _added(so_far, part)
            losses.append(point.first_loss())
            self.other_forwards += phase.objective.other_forwards
        try:
            self._take(gradients, torch.stack(losses).sum(), replay, active)
        except NonFiniteError:
            self._put_back_memories(before)
            raise
        if self._stepper.skipped:
            self._put_back_memories(before)
        for key, value in seen.items():
            counted = self._stepper.counted(torch.stack([value, torch.ones_like(value)]))
            self._sums[key] = self._sums.get(key, 0) + counted

    def _put_back_memories(self, before: Sequence[Mapping[str, Any]]) -> None:
        for memory, kept in zip(self._memories, before):
            memory.clear()
            memory.update(kept)

    def _keep_memories(self, before: Sequence[Mapping[str, Any]]) -> None:
        """Put the memories back unless the step counts, where only the device knows that yet."""
        stepper = self._stepper
        for old, memory in zip(before, self._memories):
            self._guard.keep(old, memory, stepper.healthy, stepper.steps - 1)
        if stepper.steps % stepper.check_every == 0:
            self._guard.settle(None)

    def _point(
        self, i: int, taken: int, batches: Mapping[str, Batch], replay: Replay, seen: dict[str, Tensor]
    ) -> Point:
        """Where phase i stands on these batches; what its loss terms are goes into `seen`."""
        phase = self.phases[i]

        def on(batches: Mapping[str, Batch], share: float) -> dict[str, Any]:
            other, objective = phase.perturb_objective, phase.objective
            note = _first_call(lambda values: _note(objective, phase.name, values, seen, share))
            return {
                "evaluate": self._evaluation(objective, batches, note, share),
                "evaluate_perturb": None if other is None else self._evaluation(other, batches, _ignored, share),
                "settle": self._forward(objective, batches, share) if phase.perturbs_apart else None,
                "value": self._value(objective, batches, note, share),
            }

        def parts(n: int) -> list[Point]:
            return [Point(self._params, replay=replay, **shared, **on(b, 1 / n)) for b in _pieces(batches, n)]

        shared: dict[str, Any] = {
            "region": self._regions[i],
            "names": self._names,
            "norms": self._norms,
            "frozen": self._frozen,
            "leak": phase.leak,
        }
        return Point(
            self._params,
            replay=replay,
            parts=parts,
            memory=self._memories[i],
            step=taken,
            **shared,
            **on(batches, 1.0),
        )

    def _take(
        self, gradients: list[Gradients | None], loss: Tensor, replay: Replay, active: list[Tensor | None]
    ) -> None:
        clip = self.config.clip_norm
        if self._scaler is None:
            self._stepper.step(gradients, loss, replay, active=active, clip_norm=clip)
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
        self, objective: Objective, batches: Mapping[str, Batch], note: TakeTerms, share: float
    ) -> Callable[[], Tensor]:
        """A closure that leaves the objective's gradient in the parameters and returns its value.

        `note` is told what the terms are; `share` is the share of the step's batch that it sees.
        """

        def evaluate() -> Tensor:
            values: dict[str, Tensor] = {}
            with runtime.autocast(self.device, self.config.precision):
                for term_name, term in objective.terms(self.model, batches, self._moment):
                    (term if self._scaler is None else self._scaler.scale(term)).backward()
                    values[term_name] = values.get(term_name, 0) + term.detach()
            runtime.mean_over_ranks([*(p.grad for p in self._params), *values.values()])
            self._passes += share * len(objective.streams)
            note(values)
            return torch.stack(list(values.values())).sum()

        return evaluate

    def _forward(self, objective: Objective, batches: Mapping[str, Batch], share: float) -> Callable[[], None]:
        """A closure that sends the objective's batches forward, for what that does to buffers and random state."""

        def forward() -> None:
            with torch.no_grad(), runtime.autocast(self.device, self.config.precision):
                for name in objective.streams:
                    self.model(batches[name].inputs)
            self.other_forwards += share * len(objective.streams)

        return forward

    def _value(
        self, objective: Objective, batches: Mapping[str, Batch], note: TakeTerms, share: float
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """A closure that returns the objective with its graph, as it is to be differentiated, and its value.

        Differentiating twice counts as two passes.
        """

        def value() -> tuple[Tensor, Tensor]:
            with runtime.autocast(self.device, self.config.precision):
                terms: dict[str, Tensor] = {}
                for term_name, term in objective.terms(self.model, batches, self._moment):
                    terms[term_name] = terms.get(term_name, 0) + term
            total = torch.stack(list(terms.values())).sum()
            values = {term_name: term.detach().clone() for term_name, term in terms.items()}
            runtime.mean_over_ranks(list(values.values()))
            self._passes += 2 * share * len(objective.streams)
            note(values)
            return (
                total if self._scaler is None else self._scaler.scale(total),
                torch.stack(list(values.values())).sum(),
            )

        return value

    @property
    def _moment(self) -> Moment:
        return Moment(epoch=self.epoch, epochs=self.config.epochs, seed=self.config.seed)

    # --- ends --------------------------------------------------------------------------------------------------------

    def _end_epoch(self, seconds: float, on_epoch: Callable[[], Mapping[str, float]] | None) -> None:
        self.seconds += seconds
        row = {"epoch": self.epoch + 1, "lr": self.optimizer.param_groups[0]["lr"], "seconds": self.seconds}
        row["passes"] = self.passes + round(self.other_forwards / 3)
        row |= {name: float(total) / float(n) for name, (total, n) in self._sums.items()}
        self.epoch, self.batch, self._sums = self.epoch + 1, 0, {}
        self.history.append(row | dict(on_epoch() if on_epoch is not None else {}))

    @torch.no_grad()
    def _take_final_weights(self) -> None:
        """Put in the weights with which a rule wants to end, and take the statistics of BatchNorm at them."""
        changed = False
        for phase, region, memory in zip(self.phases, self._regions, self._memories):
            final = phase.rule.final_weights(memory)
            if final is None:
                continue
            changed = True
            masks = [None] * len(self._params) if region is None or phase.leak else region
            for p, w, m in zip(self._params, final, masks):
                p.copy_(w if m is None else torch.where(m, w, p))
        if changed:
            leading = [stream for e in range(self.config.epochs) for _, stream, _ in self._turns(e)][-1]
            inputs = (batch.inputs for batch in leading.epoch(self.config.epochs))
            torch.optim.swa_utils.update_bn(inputs, self.model)


def _first_call(take: TakeTerms) -> TakeTerms:
    """The same at its first call, and nothing at later ones."""
    calls = itertools.count()
    return lambda values: None if next(calls) else take(values)


def _ignored(values: Mapping[str, Tensor]) -> None:
    pass


def _note(objective: Objective, name: str, values: Mapping[str, Tensor], seen: dict[str, Tensor], share: float) -> None:
    """Add the values of the terms, or this share's part of them, under the names that the curves have."""
    for term_name, value in values.items():
        key = f"{name}/{term_name}" if len(objective.streams) > 1 or name != term_name else name
        seen[key] = seen.get(key, 0) + (value if share == 1 else share * value)


def _pieces(batches: Mapping[str, Batch], n: int) -> list[dict[str, Batch]]:
    """The batches in n nearly equal parts."""
    smallest = min(len(batch.labels) for batch in batches.values())
    if not 1 <= n <= smallest:
        raise UserError(
            f"a batch of {smallest} samples cannot be cut into {n} parts; take fewer parts, or more samples"
        )
    cut = {name: batch.split(n) for name, batch in batches.items()}
    return [{name: parts[k] for name, parts in cut.items()} for k in range(n)]


def _all_equal(regions: Sequence[list[Tensor | None] | None]) -> bool:
    first = regions[0]
    for other in regions[1:]:
        if first is None or other is None:
            if first is not other:
                return False
        elif not all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(first, other)):
            return False
    return True


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
