"""Stage 5c: a method, under a rule, on a trained network."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from unsharp import checkpoints, runtime
from unsharp import config as configuration
from unsharp.artifacts import RESUME_FILE, Workspace, atomic
from unsharp.data.samples import Samples
from unsharp.data.share import share_of
from unsharp.data.streams import Stream
from unsharp.engine import Loop, LoopConfig, MakeOptimizer, OptimizerConfig
from unsharp.errors import UserError, unknown
from unsharp.methods.base import METHODS, AppliedMethod, Method, PhasedMethod, Problem, check_fraction
from unsharp.phases import FORGET, RETAIN
from unsharp.progress import SILENT, Progress
from unsharp.published import published_settings
from unsharp.sharpness.base import NO_RULE, RULES, Rule
from unsharp.stopping import Breakdown, StopAt, Target, check_stop_at, forget_accuracy, told
from unsharp.training import Record, named_by, run_loop

PART_RECORD_FILE = "record.json"


@dataclass(frozen=True, kw_only=True)
class UnlearnConfig(LoopConfig):
    """How a network is made to forget.

    Args:
        method: The method, with its parameters.
        rule: The sharpness rule under which its gradients are taken.
        retain_fraction: Share in (0, 1] of the retained samples that the run reads: of each class alike, at least one,
            drawn with the seed and the same over the whole run. For data too large to pass over.
        phase_steps: How the phases of a turn step: "together", with one optimiser state or those that the method asks
            for; "separate", with a state per phase; "alternate", likewise, one phase after another on each batch, at
            the weights to which the one before it has moved, as the published code of Sharp MinMax does.
        cycle: Forget batches beside a longer retain stream are drawn "anew" in each of its cycles, or "repeat" within
            an epoch, as the published code has it.
        stop_at: Forget accuracy in % at which the run ends: after the first epoch where that of all forget samples is
            at most this; "retrained" is that of the retrained network. None runs all epochs.
    """

    method: Method
    rule: Rule = NO_RULE
    retain_fraction: float = 1.0
    phase_steps: Literal["together", "separate", "alternate"] = "together"
    cycle: Literal["anew", "repeat"] = "anew"
    stop_at: StopAt | None = None
    epochs: int = 10
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=0.01))

    def __post_init__(self) -> None:
        super().__post_init__()
        admitted, why = self.method.admits(RULES.name_of(type(self.rule)))
        if not admitted:
            raise UserError(f"{METHODS.name_of(type(self.method))} does not take rule {self.rule!r}: {why}")
        self.method.check(self.rule)
        check_fraction("retain_fraction", self.retain_fraction, open_low=True)
        if self.retain_fraction < 1 and (why := self.method.no_retain_fraction):
            raise UserError(f"{METHODS.name_of(type(self.method))} takes no retain_fraction: {why}; leave it out")
        for name in ("phase_steps", "cycle"):
            known = get_args(get_type_hints(UnlearnConfig)[name])
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        self._check_stop()

    def _check_stop(self) -> None:
        if self.stop_at is None:
            return
        check_stop_at(self.stop_at)
        name = METHODS.name_of(type(self.method))
        if not isinstance(self.method, PhasedMethod):
            raise UserError(f"stop_at ends a run between two of its epochs, and {name} has none; leave it out")
        if self.method.chooses_epoch:
            raise UserError(f"stop_at and {name} as it is configured both choose the last epoch; leave one out")


def configure(
    method: str | Method, *, rule: str | Rule | None = None, published: bool = False, **settings: Any
) -> UnlearnConfig:
    """Build the configuration from loose settings, each given to whom it belongs.

    Args:
        method: Name of a method, or the method itself.
        rule: Name of a rule, or the rule itself; None takes the method's default.
        published: Where a setting is not given, take the one under which a step is that of the published code of
            Sharp MinMax; see `unsharp.published`.
        **settings: Parameters of the method (`alpha`), of the rule (`rho`), of the optimiser (`lr`, `momentum`,
            `weight_decay`, `optimizer` by name) or of the loop (`epochs`, `batch_size`, ...). None means not given.

    Raises:
        UserError: for an unknown name, a setting that nobody takes, or a value out of range.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    method_class = METHODS[method] if isinstance(method, str) else type(method)
    chosen_rule = rule if rule is not None else method_class.default_rule
    rule_class = RULES[chosen_rule] if isinstance(chosen_rule, str) else type(chosen_rule)
    if published:
        if not isinstance(method, str) or not isinstance(chosen_rule, str):
            raise UserError("published settles parameters of method and rule; give both by their names")
        settings = published_settings(method, chosen_rule) | settings
    optimizer = settings.pop("optimizer", None)
    if isinstance(optimizer, str):
        settings["optimizer_name"] = optimizer
        optimizer = None
    for name, value in method_class.suggested.items():
        if optimizer is None or name not in _fields(OptimizerConfig):  # one that is given whole says its rate itself
            settings.setdefault(name, value)
    takers = {
        "method": {} if isinstance(method, Method) else _fields(method_class),
        "rule": {} if isinstance(chosen_rule, Rule) else _fields(rule_class),
        "loop": _fields(UnlearnConfig, without=("method", "rule", "optimizer")),
        "optimizer": {"optimizer_name" if n == "name" else n: n for n in _fields(OptimizerConfig)},
    }
    parts: dict[str, dict[str, Any]] = {who: {} for who in takers}
    for name, value in settings.items():
        owners = [who for who, taken in takers.items() if name in taken]
        if not owners:
            known = {"optimizer" if n == "optimizer_name" else n for taken in takers.values() for n in taken}
            raise unknown(
                f"setting for {METHODS.name_of(method_class)} under rule {RULES.name_of(rule_class)}", name, known
            )
        parts[owners[0]][takers[owners[0]][name]] = value
    defaults = OptimizerConfig(lr=0.01) if optimizer is None else optimizer
    return configuration.from_dict(
        UnlearnConfig,
        parts["loop"]
        | {
            "method": method if isinstance(method, Method) else {"name": method, **parts["method"]},
            "rule": chosen_rule if isinstance(chosen_rule, Rule) else {"name": chosen_rule, **parts["rule"]},
            "optimizer": configuration.to_dict(defaults) | parts["optimizer"],
        },
        "unlearn",
    )


def run(
    model: nn.Module,
    samples: Samples,
    forget: np.ndarray,
    retain: np.ndarray,
    config: UnlearnConfig,
    *,
    retrain: Callable[[], tuple[nn.Module, Record]] | None = None,
    make_optimizer: MakeOptimizer | None = None,
    workspace: Workspace | None = None,
    save_seconds: float = 60.0,
    on_epoch: Callable[[nn.Module], Mapping[str, float]] | None = None,
    progress: Progress = SILENT,
    validation: Samples | None = None,
    say: Callable[[str], None] | None = None,
    unread: int = 0,
) -> tuple[nn.Module, Record]:
    """Make a copy of `model` forget the samples at `forget`; `model` itself is left as it is.

    Args:
        model: The trained network, on the device of the samples.
        samples: Its training data.
        forget: (k,) int64 sorted positions to forget.
        retain: The other positions, sorted; `config.retain_fraction` says how many of them the run reads.
        config: Method, rule and loop.
        retrain: Trains a fresh network on the retained samples, for methods that need it.
        make_optimizer: Builds the optimiser from the named trainable parameters, in place of `config.optimizer`.
        workspace: Where the state is kept from which a killed run goes on.
        save_seconds: Seconds between two savings within an epoch.
        on_epoch: Called with the network after each epoch; what it returns joins the history.
        progress: Told of each batch.
        validation: Samples that the network was not trained on, for methods that choose by them.
        say: Takes a line for the user: where the run stopped, and, where `on_epoch` gives accuracies on retain and
            forget, that the network breaks down. The record has them in any case, under "stop" and "warnings".
        unread: Retained samples beside those at `retain`, where these are a share already; for methods that weigh by
            how many there are.

    Returns:
        The network that has forgotten, in evaluation mode, and the record of the run.

    Raises:
        UserError: for what the method or the loop refuses, or if `stop_at` asks for a network that cannot be retrained.
        NonFiniteError: if a step is not finite.
    """
    n_retained = len(retain) + unread
    retain = share_of(samples, retain, config.retain_fraction, config.seed)
    whole = config.retain_fraction == 1
    about: dict[str, Any] = {} if whole else {"retain_fraction": config.retain_fraction, "n_retained": len(retain)}
    problem = Problem(
        model=model,
        samples=samples,
        forget=forget,
        retain=retain,
        rule=config.rule,
        seed=config.seed,
        retrain=retrain,
        workspace=workspace,
        validation=validation,
        n_retained=n_retained,
        batch_size=config.batch_size,
        progress=progress,
        unlearn=_Parts(
            config,
            samples,
            n_retained - len(retain),
            make_optimizer,
            workspace,
            save_seconds,
            on_epoch,
            progress,
            validation,
        ),
    )
    method = config.method
    if isinstance(method, AppliedMethod):
        network, record = method.apply(problem)
        return network, dataclasses.replace(record, about=named_by(config, samples) | record.about | about)
    if not isinstance(method, PhasedMethod):
        raise UserError(f"{type(method).__name__} must be a PhasedMethod or an AppliedMethod")
    watch = _Watch(config, model, samples, forget, retain, retrain, on_epoch, say)
    started = time.monotonic()
    phases = method.phases(problem)
    preparation = time.monotonic() - started
    copied = copy.deepcopy(model)
    rank, world = runtime.world()
    streams = {
        name: Stream(samples, indices, config.batch_size, config.seed, rank, world, config.last_batch, config.cycle)
        for name, indices in ((RETAIN, retain), (FORGET, forget))
    }
    loop = Loop(
        copied,
        phases,
        streams,
        config,
        make_optimizer=make_optimizer,
        separate_states=method.separate_states or config.phase_steps == "separate",
        alternate=config.phase_steps == "alternate",
    )
    epochs = _Epochs(copied, workspace) if method.chooses_epoch else None

    def after_epoch() -> Mapping[str, float]:
        if epochs is not None:
            epochs.keep(loop.epoch - 1)
        row = {} if on_epoch is None else dict(on_epoch(copied))
        started = time.monotonic()
        row |= watch.measured(copied)
        loop.seconds += time.monotonic() - started  # to know when to stop is part of the work
        return row

    record = run_loop(
        loop,
        workspace=workspace,
        save_seconds=save_seconds,
        on_epoch=after_epoch,
        progress=progress,
        label=METHODS.name_of(type(method)),
        stop=lambda row: watch.ends(loop.history),
    )
    # a teacher's pass forward, without one backward, is a third of a pass
    extra = method.preparation_passes(problem, config.batch_size) + round(loop.other_forwards / 3)
    extra += watch.passes(loop.epoch)
    about |= watch.about(loop.history)
    ended = time.monotonic()
    if epochs is not None:
        epochs.keep(loop.epoch - 1)  # a rule may have ended the run with other weights than those of its last step
        if world > 1:
            torch.distributed.barrier()  # the first process writes what all read
        chosen = method.choose_epoch(problem, epochs.network, loop.epoch, config.batch_size)
        epochs.network(chosen.epoch)
        extra += chosen.passes
        about["chosen"] = {"epoch": chosen.epoch + 1, **chosen.about}
    return copied.eval(), dataclasses.replace(
        record,
        seconds=record.seconds + preparation + time.monotonic() - ended,
        passes=record.passes + extra,
        about=named_by(config, samples) | about,
    )


class _Watch:
    """Looks at the run after each epoch: whether it has come to its end, and whether the network breaks down."""

    def __init__(
        self,
        config: UnlearnConfig,
        model: nn.Module,
        samples: Samples,
        forget: np.ndarray,
        retain: np.ndarray,
        retrain: Callable[[], tuple[nn.Module, Record]] | None,
        on_epoch: Callable[[nn.Module], Mapping[str, float]] | None,
        say: Callable[[str], None] | None,
    ) -> None:
        self._config, self._samples, self._forget = config, samples, forget
        self._say = say or (lambda line: None)
        self._target = None if config.stop_at is None else Target.of(config.stop_at, samples, forget, retrain)
        self._at_start = self._early(model)
        for line in self._at_start:
            self._say(f"warning: {line}")
        self._breakdown = Breakdown.watched(
            samples,
            forget,
            retain,
            {} if on_epoch is None or say is None else on_epoch(model),
            epochs=config.epochs,
            target=self._target,
        )

    def measured(self, network: nn.Module) -> dict[str, float]:
        """What has to be known of the network after an epoch."""
        if self._target is None:
            return {}
        return {"forget_accuracy": self._accuracy(network)}

    def ends(self, history: Sequence[Mapping[str, float]]) -> bool:
        """Whether the run may end after this epoch; says what is new."""
        for line in self._breakdown.warnings(history)[len(self._breakdown.warnings(history[:-1])) :]:
            self._say(f"warning: {line}")
        ended = self._target is not None and self._target.reached(history[-1])
        if self._target is not None and (ended or len(history) == self._config.epochs):
            self._say(told(self._target.outcome(history, self._config.epochs)))
        return ended

    def passes(self, epochs: int) -> int:
        """What looking took: a pass forward alone is a third of one."""
        if self._target is None:
            return 0
        return round(epochs * math.ceil(len(self._forget) / self._config.batch_size) / 3)

    def about(self, history: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """What the record says."""
        found: dict[str, Any] = {}
        if self._target is not None:
            found["stop"] = self._target.outcome(history, self._config.epochs)
        if warnings := self._at_start + self._breakdown.warnings(history):
            found["warnings"] = warnings
        return found

    def _early(self, model: nn.Module) -> list[str]:
        if self._target is None or (before := self._accuracy(model)) > self._target.accuracy:
            return []
        return [
            f"forget accuracy is {before:.1f} % before the first step, and was to come down to {self._target}: there "
            "is nothing to bring down, and the run ends as soon as an epoch ends so low"
        ]

    def _accuracy(self, network: nn.Module) -> float:
        return forget_accuracy(network, self._samples, self._forget)


@dataclass(frozen=True, eq=False)
class _Parts:
    """Runs other methods on parts of the task, each in a hidden directory of its own, which goes with the whole run."""

    config: UnlearnConfig
    samples: Samples
    unread: int
    make_optimizer: MakeOptimizer | None
    workspace: Workspace | None
    save_seconds: float
    on_epoch: Callable[[nn.Module], Mapping[str, float]] | None
    progress: Progress
    validation: Samples | None

    def __call__(
        self,
        model: nn.Module,
        method: Method,
        forget: np.ndarray,
        retain: np.ndarray,
        *,
        stage: str,
        settings: Mapping[str, Any],
    ) -> tuple[nn.Module, Record]:
        loop = {name: value for name, value in settings.items() if name != "lr"}
        if "lr" in settings:
            loop["optimizer"] = dataclasses.replace(self.config.optimizer, lr=settings["lr"])
        how = dataclasses.replace(self.config, method=method, retain_fraction=1.0, **loop)
        place = None if self.workspace is None else Workspace(self.workspace.file(f".{stage}"))
        # done or found done, its weights are put into a copy of this very network: the same bits, in the same order
        network = copy.deepcopy(model)
        if place is not None:
            place.path.mkdir(exist_ok=True)
            if place.file(checkpoints.MODEL_FILE).exists():
                weights, _ = checkpoints.load_weights(place.path)
                checkpoints.load_into(network, weights, str(place.path))
                record = configuration.from_dict(Record, configuration.read_json(place.file(PART_RECORD_FILE)))
                return network.eval(), record
        found, record = run(
            model,
            self.samples,
            forget,
            retain,
            how,
            make_optimizer=self.make_optimizer,
            workspace=place,
            save_seconds=self.save_seconds,
            on_epoch=self.on_epoch,
            progress=self.progress,
            validation=self.validation,
            unread=self.unread,
        )
        if place is not None and runtime.world()[0] == 0:
            place.write_json(PART_RECORD_FILE, record)
            checkpoints.save_model(place.file(checkpoints.MODEL_FILE), found, {})
            place.file(RESUME_FILE).unlink(missing_ok=True)
        network.load_state_dict(found.state_dict())
        return network.eval(), record


class _Epochs:
    """The weights and buffers after each epoch: with the run, so that a kill loses none, or in the host's memory.

    What is kept with the run goes when the run is whole.
    """

    def __init__(self, network: nn.Module, workspace: Workspace | None) -> None:
        self._network = network
        self._workspace = workspace
        self._states: dict[int, dict[str, Tensor]] = {}

    def keep(self, epoch: int) -> None:
        """Keep the network as it is now."""
        state = self._network.state_dict()
        if self._workspace is None:
            self._states[epoch] = {k: v.to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in state.items()}
        elif runtime.world()[0] == 0:
            with atomic(self._file(self._workspace, epoch)) as temporary, open(temporary, "wb") as file:
                torch.save(state, file)

    def network(self, epoch: int) -> nn.Module:
        """The network as it was then, in evaluation mode."""
        if self._workspace is None:
            state = self._states[epoch]
        else:
            state = torch.load(self._file(self._workspace, epoch), map_location="cpu", weights_only=True)
        self._network.load_state_dict(state)
        return self._network.eval()

    @staticmethod
    def _file(workspace: Workspace, epoch: int) -> Path:
        return workspace.file(f".epoch-{epoch}.pt")


def _fields(cls: Any, without: tuple[str, ...] = ()) -> dict[str, str]:
    return {f.name: f.name for f in dataclasses.fields(cls) if f.name not in without}
