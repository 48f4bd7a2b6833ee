"""Stage 5c: a method, under a rule, on a trained network."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import torch
from torch import nn

from unsharp import config as configuration
from unsharp import runtime
from unsharp.artifacts import Workspace
from unsharp.corrections import Corrections
from unsharp.data.samples import Samples
from unsharp.data.share import share_of
from unsharp.data.streams import Stream
from unsharp.engine import Loop, LoopConfig, MakeOptimizer, OptimizerConfig
from unsharp.epochs import Epochs
from unsharp.errors import UserError, unknown
from unsharp.methods.base import METHODS, AppliedMethod, Choice, Method, PhasedMethod, Problem, check_fraction
from unsharp.parts import Parts, of_part
from unsharp.phases import FORGET, RETAIN
from unsharp.progress import SILENT, Progress
from unsharp.published import published_settings
from unsharp.sharpness.base import NO_RULE, RULES, Rule
from unsharp.stopping import StopAt, Watch, check_stop_at
from unsharp.training import Record, named_by, run_loop


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
        name = RULES.name_of(type(self.rule))
        admitted, why = self.method.admits(name)
        if not admitted:
            others = ", ".join(rule for rule in RULES if self.method.admits(rule)[0])
            raise UserError(f"{METHODS.name_of(type(self.method))} does not take rule {name}: {why}; it takes {others}")
        self.method.check(self.rule)
        check_fraction("retain_fraction", self.retain_fraction, open_low=True)
        if self.retain_fraction < 1 and (why := self.method.no_retain_fraction):
            raise UserError(f"{METHODS.name_of(type(self.method))} takes no retain_fraction: {why}; leave it out")
        for name in ("phase_steps", "cycle"):
            known = get_args(get_type_hints(UnlearnConfig)[name])
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        self._check_stop()

    def cautions(self) -> list[str]:
        """What the user is to know before a run: settings that do not do here what they say."""
        if not isinstance(self.method, PhasedMethod):
            return []
        apart = self.phase_steps != "together" or self.method.separate_states
        apart = apart or bool(self.phase_lr or self.phase_schedule)
        return self.method.cautions(scale_free=self.optimizer.scale_free, apart=apart)

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
    corrections: Corrections | None = None,
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
        corrections: What the forget samples should have been, for methods that correct; None removes them.

    Returns:
        The network that has forgotten, in evaluation mode, and the record of the run.

    Raises:
        UserError: for what the method or the loop refuses, or if `stop_at` asks for a network that cannot be retrained.
        NonFiniteError: if a step is not finite.
    """
    corrected = None if corrections is None else corrected_for(config.method, corrections, samples, forget)
    n_retained = len(retain) + unread
    retain = share_of(samples, retain, config.retain_fraction, config.seed)
    unread = n_retained - len(retain)

    def run_part(
        stage: str, network: nn.Module, part: np.ndarray, kept: np.ndarray, how: UnlearnConfig, place: Workspace | None
    ) -> tuple[nn.Module, Record]:
        return run(
            network,
            samples,
            part,
            kept,
            how,
            make_optimizer=make_optimizer,
            workspace=place,
            save_seconds=save_seconds,
            on_epoch=on_epoch,
            progress=progress,
            validation=validation,
            say=of_part(stage, say),
            unread=unread,
        )

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
        unlearn=Parts(config, workspace, run_part),
        corrected=corrected,
    )
    method = config.method
    if isinstance(method, AppliedMethod):
        network, record = method.apply(problem)
    elif isinstance(method, PhasedMethod):
        network, record = _run_phases(method, problem, config, make_optimizer, save_seconds, on_epoch, say)
    else:
        raise UserError(f"{type(method).__name__} must be a PhasedMethod or an AppliedMethod")
    about = named_by(config, samples) | record.about
    if config.retain_fraction < 1:
        about |= {"retain_fraction": config.retain_fraction, "n_retained": len(retain)}
    if corrections is not None:
        about |= {"corrections": corrections.digest}
    return network, dataclasses.replace(record, about=about)


def corrected_for(method: Method, corrections: Corrections, samples: Samples, forget: np.ndarray) -> Samples:
    """The forget samples as they should have been.

    Raises:
        UserError: if the method does not correct, or the corrections do not fit the forget set.
    """
    if not method.corrects:
        able = ", ".join(name for name, cls in METHODS.items() if cls.corrects)
        raise UserError(f"{METHODS.name_of(type(method))} takes no corrections; take {able}, or leave them out")
    return corrections.applied(samples, forget)


def _run_phases(
    method: PhasedMethod,
    problem: Problem,
    config: UnlearnConfig,
    make_optimizer: MakeOptimizer | None,
    save_seconds: float,
    on_epoch: Callable[[nn.Module], Mapping[str, float]] | None,
    say: Callable[[str], None] | None,
) -> tuple[nn.Module, Record]:
    """Run the phases of a method on a copy of the network. Args: as for `run`."""
    watch = Watch(
        problem.model,
        problem.samples,
        problem.forget,
        problem.retain,
        epochs=config.epochs,
        batch_size=config.batch_size,
        stop_at=config.stop_at,
        retrain=problem.retrain,
        on_epoch=on_epoch,
        say=say,
        cautions=config.cautions() if make_optimizer is None else (),
    )
    started = time.monotonic()
    phases = method.phases(problem)
    preparation = time.monotonic() - started
    copied = copy.deepcopy(problem.model)
    loop = Loop(
        copied,
        phases,
        _streams(problem, config),
        config,
        make_optimizer=make_optimizer,
        separate_states=method.separate_states or config.phase_steps == "separate",
        alternate=config.phase_steps == "alternate",
    )
    epochs = Epochs(copied, problem.workspace) if method.chooses_epoch else None

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
        workspace=problem.workspace,
        save_seconds=save_seconds,
        on_epoch=after_epoch,
        progress=problem.progress,
        label=METHODS.name_of(type(method)),
        stop=lambda row: watch.ends(loop.history),
    )
    # a teacher's pass forward, without one backward, is a third of a pass
    extra = method.preparation_passes(problem, config.batch_size) + round(loop.other_forwards / 3)
    extra += watch.passes(loop.epoch)
    about = watch.about(loop.history)
    ended = time.monotonic()
    if epochs is not None:
        chosen = _chosen(method, problem, epochs, loop.epoch)
        extra += chosen.passes
        about["chosen"] = {"epoch": chosen.epoch + 1, **chosen.about}
    seconds = record.seconds + preparation + time.monotonic() - ended
    return copied.eval(), dataclasses.replace(record, seconds=seconds, passes=record.passes + extra, about=about)


def _streams(problem: Problem, config: UnlearnConfig) -> dict[str, Stream]:
    """What the phases read, this process's share of each batch."""
    rank, world = runtime.world()
    seed, last = config.seed, config.last_batch
    return {
        name: Stream(problem.samples, indices, config.batch_size, seed, rank, world, last, config.cycle)
        for name, indices in ((RETAIN, problem.retain), (FORGET, problem.forget))
    }


def _chosen(method: PhasedMethod, problem: Problem, epochs: Epochs, n_epochs: int) -> Choice:
    """Let the method choose among the epochs of a run that has just ended, and put the chosen weights in."""
    epochs.keep(n_epochs - 1)  # a rule may have ended the run with other weights than those of its last step
    if runtime.world()[1] > 1:
        torch.distributed.barrier()  # the first process writes what all read
    chosen = method.choose_epoch(problem, epochs.network, n_epochs, problem.batch_size)
    epochs.network(chosen.epoch)
    return chosen


def _fields(cls: Any, without: tuple[str, ...] = ()) -> dict[str, str]:
    return {f.name: f.name for f in dataclasses.fields(cls) if f.name not in without}
