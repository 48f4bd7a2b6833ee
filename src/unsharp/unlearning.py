"""Stage 5c: a method, under a rule, on a trained network."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from unsharp import config as configuration
from unsharp import runtime
from unsharp.artifacts import Workspace
from unsharp.data.samples import Samples
from unsharp.data.streams import Stream
from unsharp.engine import Loop, LoopConfig, MakeOptimizer, OptimizerConfig
from unsharp.errors import UserError, unknown
from unsharp.methods.base import METHODS, AppliedMethod, Method, PhasedMethod, Problem
from unsharp.phases import FORGET, RETAIN
from unsharp.progress import SILENT, Progress
from unsharp.sharpness.base import NO_RULE, RULES, Rule
from unsharp.training import Record, named_by, run_loop


@dataclass(frozen=True, kw_only=True)
class UnlearnConfig(LoopConfig):
    """How a network is made to forget.

    Args:
        method: The method, with its parameters.
        rule: The sharpness rule under which its gradients are taken.
    """

    method: Method
    rule: Rule = NO_RULE
    epochs: int = 10
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=0.01))

    def __post_init__(self) -> None:
        super().__post_init__()
        admitted, why = self.method.admits(RULES.name_of(type(self.rule)))
        if not admitted:
            raise UserError(f"{METHODS.name_of(type(self.method))} does not take rule {self.rule!r}: {why}")


def configure(method: str | Method, *, rule: str | Rule | None = None, **settings: Any) -> UnlearnConfig:
    """Build the configuration from loose settings, each given to whom it belongs.

    Args:
        method: Name of a method, or the method itself.
        rule: Name of a rule, or the rule itself; None takes the method's default.
        **settings: Parameters of the method (`alpha`), of the rule (`rho`), of the optimiser (`lr`, `momentum`,
            `weight_decay`, `optimizer` by name) or of the loop (`epochs`, `batch_size`, ...). None means not given.

    Raises:
        UserError: for an unknown name, a setting that nobody takes, or a value out of range.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    method_class = METHODS[method] if isinstance(method, str) else type(method)
    chosen_rule = rule if rule is not None else method_class.default_rule
    rule_class = RULES[chosen_rule] if isinstance(chosen_rule, str) else type(chosen_rule)
    optimizer = settings.pop("optimizer", None)
    if isinstance(optimizer, str):
        settings["optimizer_name"] = optimizer
        optimizer = None
    for name, value in method_class.suggested.items():
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
) -> tuple[nn.Module, Record]:
    """Make a copy of `model` forget the samples at `forget`; `model` itself is left as it is.

    Args:
        model: The trained network, on the device of the samples.
        samples: Its training data.
        forget: (k,) int64 sorted positions to forget.
        retain: The other positions, sorted.
        config: Method, rule and loop.
        retrain: Trains a fresh network on the retained samples, for methods that need it.
        make_optimizer: Builds the optimiser from the named trainable parameters, in place of `config.optimizer`.
        workspace: Where the state is kept from which a killed run goes on.
        save_seconds: Seconds between two savings within an epoch.
        on_epoch: Called with the network after each epoch; what it returns joins the history.
        progress: Told of each batch.

    Returns:
        The network that has forgotten, in evaluation mode, and the record of the run.
    """
    problem = Problem(
        model=model,
        samples=samples,
        forget=forget,
        retain=retain,
        rule=config.rule,
        seed=config.seed,
        retrain=retrain,
        workspace=workspace,
    )
    method = config.method
    if isinstance(method, AppliedMethod):
        return method.apply(problem)
    if not isinstance(method, PhasedMethod):
        raise UserError(f"{type(method).__name__} must be a PhasedMethod or an AppliedMethod")
    started = time.monotonic()
    phases = method.phases(problem)
    preparation = time.monotonic() - started
    copied = copy.deepcopy(model)
    rank, world = runtime.world()
    streams = {
        name: Stream(samples, indices, config.batch_size, config.seed, rank, world, config.last_batch)
        for name, indices in ((RETAIN, retain), (FORGET, forget))
    }
    loop = Loop(copied, phases, streams, config, make_optimizer=make_optimizer, separate_states=method.separate_states)
    record = run_loop(
        loop,
        workspace=workspace,
        save_seconds=save_seconds,
        on_epoch=None if on_epoch is None else lambda: on_epoch(copied),
        progress=progress,
        label=METHODS.name_of(type(method)),
    )
    extra = method.preparation_passes(problem, config.batch_size)
    return copied.eval(), dataclasses.replace(
        record,
        seconds=record.seconds + preparation,
        passes=record.passes + extra,
        about=named_by(config, samples),
    )


def _fields(cls: Any, without: tuple[str, ...] = ()) -> dict[str, str]:
    return {f.name: f.name for f in dataclasses.fields(cls) if f.name not in without}
