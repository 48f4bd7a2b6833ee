"""How small α may be for a real network: two short probes, read on a clock that α itself sets.

In the closed forms of the theory what NegGrad does to a network depends on (1 − α)·η·T, the ascent that has
accumulated, before it depends on anything else: 1 − α* ~ 1/(ηT) under SGD, and up to a logarithm under SAM. Read the
other way round, a few steps at a small α pass through the states in which long runs at larger α end. A probe takes such
steps from the trained network and looks at it on the way; the α of the run that ends in a state with accumulated ascent
u is 1 − u/(effective steps of the run).

Nothing is exact in this: the longer run repairs the retained samples for longer, so a probe exaggerates the damage, the
more the smaller its α. The probe with the largest α speaks, the others say how far the clock is off.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from unsharp import runtime
from unsharp.data.samples import Batch, Samples
from unsharp.data.streams import Stream
from unsharp.difficulty import ForgetSet
from unsharp.engine import Loop
from unsharp.errors import NonFiniteError, UserError
from unsharp.evaluation.accuracy import accuracy, mean_cross_entropy
from unsharp.evaluation.predictions import predict
from unsharp.gradients import mean_gradient
from unsharp.methods.base import METHODS, PhasedMethod, Problem, check_fraction
from unsharp.methods.neggrad import NegGrad
from unsharp.methods.sharp_minmax import SharpMinMax
from unsharp.phases import FORGET, RETAIN
from unsharp.progress import SILENT, Progress
from unsharp.subject import pick
from unsharp.tuning.target import Target
from unsharp.unlearning import UnlearnConfig

ADVISED = ("neggrad", "sharp_minmax")
PROBES = (0.5, 0.8)
"""The α of the probes; the last one speaks, and no smaller α than its is suggested."""
LOOKS = 14
"""Times that a probe is looked at, at steps that grow geometrically."""
MOST = 500
"""So many samples of each set are looked at, evenly spread, where there are more."""
TOLERANCE = 5.0
"""Points of accuracy on retained and on unseen samples that may be lost, where the user says nothing."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """The network after some steps of a probe.

    Args:
        step: Steps taken.
        ascent: (1 − α) times the effective steps.
        values: Accuracies (0–100) and losses (nats), such as retain_accuracy, forget_accuracy, unseen_loss.
    """

    step: int
    ascent: float
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A short run at one α, and what it says of the α of the whole run.

    Args:
        alpha: Of the probe.
        looks: From the trained network on.
        least: Smallest α of a whole run that is predicted to stay within the tolerance; None where the probe never left
            it.
        target: Largest α that is predicted to bring the forget accuracy down to the target; None where none does.
        passes: Forward–backward passes, those of the looks among them.
        failed: Why the probe broke off; None where it did not.
    """

    alpha: float
    looks: tuple[Look, ...]
    least: float | None
    target: float | None
    passes: int
    failed: str | None = None


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A suggested α with what led to it.

    Args:
        alpha: The suggestion.
        low: Smallest α that the probes and the target's error allow; no confidence interval.
        high: Largest one.
        least: Smallest α predicted to stay within the tolerance; None where no probe left it.
        reached: Whether the target is predicted to be reached within the tolerance.
        balance: ⟨g_R, g_F⟩/(⟨g_R, g_F⟩ + ‖g_R‖²), the α at which the retain loss stands still at the trained network to
            first order; 0 where ascent does not raise it, NaN where both gradients vanish.
        target: The forget accuracy that is aimed at.
        floors: Accuracies that must be kept.
        probes: The probes, by ascending α.
        run_steps: Steps of the whole run.
        total: Its effective steps; (1 − α) times these is the ascent at its end.
        passes: What all probes took.
        run_passes: What the whole run will take.
        reasons: The reasoning, in sentences.
    """

    alpha: float
    low: float
    high: float
    least: float | None
    reached: bool
    balance: float
    target: Target
    floors: Mapping[str, float]
    probes: tuple[Probe, ...]
    run_steps: int
    total: float
    passes: int
    run_passes: int
    reasons: tuple[str, ...]


def advise(
    model: nn.Module,
    samples: Samples,
    forget: ForgetSet,
    how: UnlearnConfig,
    target: Target,
    *,
    unseen: Samples | None = None,
    tolerance: float = TOLERANCE,
    probes: Sequence[float] = PROBES,
    progress: Progress = SILENT,
) -> Advice:
    """Suggest α for a run of NegGrad or Sharp MinMax.

    Args:
        model: The trained network, on the device of the samples; it is left as it is.
        samples: Its training data.
        forget: What is to be forgotten.
        how: The run that is meant; its own α is not read.
        target: The forget accuracy that is aimed at (`unsharp.tuning.target`).
        unseen: Samples that the network was not trained on; without them the tolerance is kept on retained ones alone.
        tolerance: Points of accuracy on retained and on unseen samples that may be lost, in (0, 100].
        probes: The α of the probes, in [0, 1).
        progress: Told of each step.

    Raises:
        UserError: for a method without α, an optimiser without a clock, or a value out of range.
    """
    check(how, tolerance, probes)
    bench = _Bench(model, samples, forget, how, unseen)
    start = bench.look(model)
    floors = {name: start[name] - tolerance for name in ("retain_accuracy", "unseen_accuracy") if name in start}
    total = effective_steps(how, bench.run_steps)
    plans = [(alpha, steps_of_probe(how, bench.run_steps, alpha, max(probes))) for alpha in sorted(set(probes))]
    progress.start("probing", sum(steps for _, steps in plans))
    try:
        found = tuple(bench.probe(alpha, n, start, floors, target.accuracy, total, progress) for alpha, n in plans)
    finally:
        progress.finish()
    balance = balanced_alpha(*bench.gradients())
    return _advice(found, balance, target, floors, bench.run_steps, bench.run_passes, total)


def check(how: UnlearnConfig, tolerance: float = TOLERANCE, probes: Sequence[float] = PROBES) -> None:
    """Raise UserError where no α can be suggested for such a run."""
    if not isinstance(how.method, (NegGrad, SharpMinMax)):
        name = METHODS.name_of(type(how.method))
        raise UserError(f"an alpha is suggested for {' and '.join(ADVISED)}, got method {name!r}")
    if how.optimizer.name.lower() != "sgd":
        raise UserError(
            f"the clock of the probes needs steps in proportion to the gradient, and {how.optimizer.name} rescales "
            "it; take optimizer sgd, or search alpha with `unsharp tune --search alpha=...`"
        )
    if how.stop_at is not None:
        raise UserError(
            "stop_at ends the run at a forget accuracy, and alpha is suggested for a whole run; leave it out"
        )
    if not (math.isfinite(tolerance) and 0 < tolerance <= 100):
        raise UserError(f"tolerance must be points of accuracy in (0, 100], got {tolerance}")
    if not probes:
        raise UserError("probes must name at least one alpha")
    for alpha in probes:
        check_fraction("probes", alpha)
        if alpha == 1:
            raise UserError("probes must lie below 1: at alpha 1 there is no ascent to measure")


# --- the clock --------------------------------------------------------------------------------------------------------


def effective_steps(how: UnlearnConfig, steps: int, *, constant: bool = False) -> float:
    """How far the weights go in some steps under a constant gradient g, in units of η·g.

    With momentum μ and factors f_k of the schedule it is Σ_k f_k·(1 − μ^{n−k+1})/(1 − μ): a probe is shorter than the
    run, so that more of it is spent before momentum has built up.

    Args:
        how: The run.
        steps: n, of the run, from its beginning.
        constant: Leave the schedule out.
    """
    arguments = how.optimizer.arguments()
    mu = float(arguments.get("momentum", 0.0))
    k = np.arange(steps)
    factors = np.ones(steps) if constant else np.array([how.lr_factor(i, steps) for i in range(steps)])
    built = np.ones(steps) if mu == 0 else (1 - mu ** (steps - k)) / (1 - mu)
    return float(factors @ built)


def steps_of_probe(how: UnlearnConfig, run_steps: int, alpha: float, smallest: float) -> int:
    """The fewest steps at `alpha` that accumulate as much ascent as the whole run does at α = `smallest`."""
    wanted = (1 - smallest) * effective_steps(how, run_steps)
    low, high = 0, 1
    while (1 - alpha) * effective_steps(how, high, constant=True) < wanted * (1 - 1e-12):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = (1 - alpha) * effective_steps(how, middle, constant=True) >= wanted * (1 - 1e-12)
        low, high = (low, middle) if enough else (middle, high)
    return high


def first_crossing(ascent: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """The first ascent at which the values come down to a level, on straight lines between looks; None if never."""
    if values[0] <= level:
        return float(ascent[0])
    for i in range(1, len(values)):
        if values[i] <= level:
            share = (values[i - 1] - level) / (values[i - 1] - values[i])
            return float(ascent[i - 1] + share * (ascent[i] - ascent[i - 1]))
    return None


def balanced_alpha(retain_square: float, product: float) -> float:
    """The α at which the retain loss stands still to first order, α‖g_R‖² = (1 − α)⟨g_R, g_F⟩.

    Args:
        retain_square: ‖g_R‖².
        product: ⟨g_R, g_F⟩.
    """
    if retain_square == 0 and product <= 0:
        return math.nan
    return max(0.0, product) / (max(0.0, product) + retain_square)


# --- probes -----------------------------------------------------------------------------------------------------------


class _Bench:
    """A network and a run, of which probes are taken."""

    def __init__(
        self, model: nn.Module, samples: Samples, forget: ForgetSet, how: UnlearnConfig, unseen: Samples | None
    ) -> None:
        from unsharp.data.share import share_of

        self.model, self.samples, self.how = model, samples, how
        self.forget = forget.indices
        self.all_retained = forget.retain_indices(len(samples))
        self.retain = share_of(samples, self.all_retained, how.retain_fraction, how.seed)
        self.parts: dict[str, tuple[Samples, np.ndarray]] = {
            "retain": (samples, pick(self.all_retained, MOST)),
            "forget": (samples, pick(self.forget, MOST)),
        }
        if unseen is not None:
            self.parts["unseen"] = (unseen, pick(np.arange(len(unseen)), MOST))
        self.streams = {
            name: Stream(samples, indices, how.batch_size, how.seed, 0, 1, how.last_batch, how.cycle)
            for name, indices in ((RETAIN, self.retain), (FORGET, self.forget))
        }
        self.batches = self.streams[RETAIN].n_batches
        self.run_steps = how.epochs * self.batches
        self.run_passes = round(self.run_steps * sum(phase.passes for phase in self._phases(0.5)))

    def look(self, network: nn.Module) -> dict[str, float]:
        """Accuracies and losses. Raises: NonFiniteError if the network gives no finite answer."""
        found: dict[str, float] = {}
        try:
            for name, (samples, indices) in self.parts.items():
                said = predict(network, samples, indices)
                found |= {f"{name}_accuracy": accuracy(said), f"{name}_loss": mean_cross_entropy(said)}
        except UserError as error:
            raise NonFiniteError(str(error)) from None
        return found

    def gradients(self) -> tuple[float, float]:
        """‖g_R‖² and ⟨g_R, g_F⟩ of the mean losses on the samples that are looked at."""
        g_retain, g_forget = (mean_gradient(self.model, *self.parts[name]).double() for name in ("retain", "forget"))
        return float(g_retain @ g_retain), float(g_retain @ g_forget)

    def probe(
        self,
        alpha: float,
        steps: int,
        start: Mapping[str, float],
        floors: Mapping[str, float],
        target: float,
        total: float,
        progress: Progress,
    ) -> Probe:
        """Take steps at `alpha` until a floor was missed at two looks in a row, or all are taken."""
        looks = [Look(step=0, ascent=0.0, values=start)]
        wanted = set(look_steps(steps))
        network = copy.deepcopy(self.model)
        loop = self._loop(network, alpha, steps)

        def after_step() -> dict[str, float]:
            progress.advance()
            if loop.epoch in wanted:
                ascent = (1 - alpha) * effective_steps(self.how, loop.epoch, constant=True)
                looks.append(Look(step=loop.epoch, ascent=ascent, values=self.look(network)))
            return {}

        def missed(look: Look) -> bool:
            return any(look.values[name] < floor for name, floor in floors.items())

        failed = None
        runtime.seed_all(self.how.seed)
        try:
            loop.run(on_epoch=after_step, stop=lambda row: len(looks) > 2 and missed(looks[-1]) and missed(looks[-2]))
        except NonFiniteError as error:
            failed = str(error)
        asked = sum(len(indices) for _, indices in self.parts.values())
        passes = loop.passes + round(len(looks) * asked / self.how.batch_size / 3)
        return Probe(
            alpha=alpha,
            looks=tuple(looks),
            least=_least(looks, floors, total),
            target=_alpha_at(first_crossing(*_curve(looks, "forget_accuracy"), target), total),
            passes=passes,
            failed=failed,
        )

    def _phases(self, alpha: float) -> list[Any]:
        method = dataclasses.replace(self.how.method, alpha=alpha)  # pyright: ignore[reportCallIssue]
        assert isinstance(method, PhasedMethod)
        problem = Problem(
            model=self.model,
            samples=self.samples,
            forget=self.forget,
            retain=self.retain,
            rule=self.how.rule,
            seed=self.how.seed,
            n_retained=len(self.all_retained),
            batch_size=self.how.batch_size,
        )
        return method.phases(problem)

    def _loop(self, network: nn.Module, alpha: float, steps: int) -> Loop:
        streams: dict[str, Any] = {name: _Steps(stream, self.batches) for name, stream in self.streams.items()}
        config = dataclasses.replace(
            self.how, epochs=steps, schedule="constant", phase_schedule={}, warmup=0.0, stop_at=None
        )
        separate = config.phase_steps == "separate" or getattr(config.method, "separate_states", False)
        return Loop(
            network,
            self._phases(alpha),
            streams,
            config,
            separate_states=separate,
            alternate=config.phase_steps == "alternate",
        )


@dataclass(frozen=True, eq=False)
class _Steps:
    """A stream of which each step of the run is an epoch of its own, with the batches that the run would see."""

    stream: Stream
    batches: int

    n_batches = 1

    @property
    def smallest_batch(self) -> int:
        return self.stream.smallest_batch

    def epoch(self, epoch: int, start: int = 0, n_batches: int | None = None) -> Iterator[Batch]:
        """The batch of step `epoch` of the run."""
        whole, step = divmod(epoch, self.batches)
        return self.stream.epoch(whole, step, step + 1)


def look_steps(steps: int, looks: int = LOOKS) -> list[int]:
    """At most so many steps at which a probe is looked at, the last one among them: nearly geometric, each once."""
    return sorted({int(s) for s in np.rint(np.geomspace(1, steps, min(looks, steps)))})


# --- what the probes say ----------------------------------------------------------------------------------------------


def _curve(looks: Sequence[Look], name: str) -> tuple[list[float], list[float]]:
    return [look.ascent for look in looks], [look.values[name] for look in looks]


def _alpha_at(ascent: float | None, total: float) -> float | None:
    return None if ascent is None else min(1.0, max(0.0, 1 - ascent / total))


def _least(looks: Sequence[Look], floors: Mapping[str, float], total: float) -> float | None:
    found = [first_crossing(*_curve(looks, name), floor) for name, floor in floors.items()]
    crossed = [ascent for ascent in found if ascent is not None]
    return _alpha_at(min(crossed), total) if crossed else None


def _wanted(probe: Probe, level: float, total: float) -> float | None:
    return _alpha_at(first_crossing(*_curve(probe.looks, "forget_accuracy"), level), total)


def _chosen(least: float | None, target: float | None, floor: float) -> float:
    """The largest α that reaches the target, but none that leaves the tolerance, and none below what was probed."""
    return max(floor, least if least is not None else 0.0, target if target is not None else 0.0)


def _advice(
    probes: tuple[Probe, ...],
    balance: float,
    target: Target,
    floors: Mapping[str, float],
    run_steps: int,
    run_passes: int,
    total: float,
) -> Advice:
    speaks = probes[-1]
    smallest = speaks.alpha
    alpha = _chosen(speaks.least, speaks.target, smallest)
    error = target.error or 0.0
    levels = (target.accuracy - error, target.accuracy, target.accuracy + error)
    every = [_chosen(p.least, _wanted(p, level, total), smallest) for p in probes for level in levels]
    reached = speaks.target is not None and (speaks.least is None or speaks.target >= speaks.least)
    passes = sum(probe.passes for probe in probes)
    return Advice(
        alpha=alpha,
        low=min(every),
        high=max(every),
        least=speaks.least,
        reached=reached,
        balance=balance,
        target=target,
        floors=floors,
        probes=probes,
        run_steps=run_steps,
        total=total,
        passes=passes,
        run_passes=run_passes,
        reasons=tuple(_reasons(probes, alpha, reached, balance, target, floors, passes / run_passes)),
    )


def _reasons(
    probes: Sequence[Probe],
    alpha: float,
    reached: bool,
    balance: float,
    target: Target,
    floors: Mapping[str, float],
    cost: float,
) -> Iterator[str]:
    speaks, start = probes[-1], probes[-1].looks[0].values
    kept = " and ".join(f"{floor:.1f} % on {name.partition('_')[0]} samples" for name, floor in floors.items())
    yield (
        f"aimed at: {target.accuracy:.1f} % on the forget set ({target.kind}; the network has "
        f"{start['forget_accuracy']:.1f} %), with at least {kept}"
    )
    for probe in probes:
        least = (
            "never left the tolerance" if probe.least is None else f"leaves the tolerance below α = {probe.least:.4f}"
        )
        aim = "never reached the target" if probe.target is None else f"reaches the target at α = {probe.target:.4f}"
        broke = "" if probe.failed is None else "; it broke off, since a step was not finite"
        yield f"probe at α = {probe.alpha:g}, {probe.looks[-1].step} steps: a whole run {aim} and {least}{broke}"
    if reached:
        yield f"suggested: α = {alpha:.4f}, the largest that is predicted to reach the target"
    elif speaks.least is not None:
        yield (
            f"suggested: α = {alpha:.4f}, the smallest that is predicted to stay within the tolerance; the target is "
            "not reached there: forgetting so much costs more accuracy than is allowed"
        )
    else:
        yield (
            f"suggested: α = {alpha:.4f}, the smallest that was probed; not even there the target is reached: raise "
            "the learning rate or the epochs"
        )
    if not math.isnan(balance):
        yield f"at the trained network itself the retain loss stands still, to first order, at α = {balance:.4f}"
    yield f"the probes took as much as {cost:.2f} of a whole run; another seed, or another target, gives another α"


def plain(advice: Advice) -> dict[str, Any]:
    """The advice as plain values; a figure that is not finite is None."""
    return {
        "alpha": advice.alpha,
        "low": advice.low,
        "high": advice.high,
        "least": advice.least,
        "reached": advice.reached,
        "balance": None if math.isnan(advice.balance) else advice.balance,
        "target": dataclasses.asdict(advice.target),
        "floors": dict(advice.floors),
        "probes": [
            {
                "alpha": probe.alpha,
                "least": probe.least,
                "target": probe.target,
                "passes": probe.passes,
                "failed": probe.failed,
                "looks": [{"step": look.step, "ascent": look.ascent, **look.values} for look in probe.looks],
            }
            for probe in advice.probes
        ],
        "run_steps": advice.run_steps,
        "total": advice.total,
        "passes": advice.passes,
        "run_passes": advice.run_passes,
        "reasons": list(advice.reasons),
    }
