"""How small α may be for a real network: two short probes, read on a clock that α itself sets.

In the closed forms of the theory what NegGrad does to a network depends on (1 − α)·η·T, the ascent that has
accumulated, before it depends on anything else: 1 − α* ~ 1/(ηT) under SGD, and up to a logarithm under SAM. Read the
other way round, a few steps at a small α pass through the states in which long runs at larger α end. A probe takes such
steps from the trained network and looks at it on the way; the α of the run that ends in a state with accumulated ascent
u is 1 − u/(effective steps of the run).

Nothing is exact in this: the longer run repairs the retained samples for longer, so a probe exaggerates what they lose,
and what is suggested errs towards a large α. The probe with the largest α speaks; the range that is given begins where
the target alone would be reached, and spans what the other probes and the target's own error say.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unsharp import runtime
from unsharp.data.samples import Batch, Samples
from unsharp.data.share import share_of
from unsharp.data.streams import Stream
from unsharp.difficulty import ForgetSet
from unsharp.engine import Loop
from unsharp.errors import NonFiniteError, UserError
from unsharp.evaluation.accuracy import accuracy, mean_cross_entropy
from unsharp.evaluation.predictions import predict
from unsharp.gradients import mean_gradient
from unsharp.masks import Mask
from unsharp.methods.base import METHODS, PhasedMethod, Problem, check_fraction
from unsharp.methods.neggrad import NegGrad
from unsharp.methods.sharp_minmax import SharpMinMax
from unsharp.phases import FORGET, RETAIN, Phase, Region
from unsharp.progress import SILENT, Progress
from unsharp.sharpness.base import RULES, Rule
from unsharp.subject import pick
from unsharp.tuning.search import expected_passes
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
FORGOTTEN = (
    "the method's default or what the tolerance asks for: the forget accuracy is above the target by no more than the "
    "target's own error and the tolerance, so there is nothing to bring down that these samples could show"
)
UNSTEADY = (
    "warning: under Sharp MinMax the clock did not hold where it was measured, and two suggestions of five were far "
    "worse than the default; search with `unsharp tune`, or run the largest of the range first"
)
KEPT = ("retain", "unseen")
"""The sets on which the tolerance is kept."""


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
        passes: Forward–backward passes, those of the looks among them; a pass forward alone is a third of one.
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
        alpha: The suggestion: the largest α that is predicted to reach the target, but none that leaves the tolerance;
            where there is nothing to bring down, the method's default.
        low: Smallest α at which any probe reaches the target or its error, the tolerance left aside; no confidence
            interval.
        high: Largest α that any probe suggests, for the target or its error.
        least: Smallest α predicted to stay within the tolerance; None where no probe left it.
        reached: Whether the target is predicted to be reached within the tolerance, or is reached already.
        balance: ⟨g_R, g_F⟩/(⟨g_R, g_F⟩ + ‖g_R‖²), the α at which the retain loss stands still at the trained network to
            first order; 0 where ascent does not raise it, NaN where both gradients vanish.
        target: The forget accuracy that is aimed at.
        limits: By figure, the accuracy that must be kept (retain_accuracy) or the loss that must not be passed.
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
    limits: Mapping[str, float]
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
    loss_tolerance: float | None = None,
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
        loss_tolerance: Nats by which their mean losses may rise, above 0; None sets no bound on losses.
        probes: The α of the probes, in [0, 1).
        progress: Told of each step.

    Raises:
        UserError: for a method without α, a run without a clock, or a value out of range.
    """
    check(how, tolerance, loss_tolerance, probes)
    bench = _Bench(model, samples, forget, how, unseen)
    bench.check()
    start = bench.look(model)
    limits = _limits(start, tolerance, loss_tolerance)
    plans = [(alpha, steps_of_probe(how, bench.run_steps, alpha, max(probes))) for alpha in sorted(set(probes))]
    progress.start("probing", sum(steps for _, steps in plans))
    try:
        found = tuple(bench.probe(alpha, n, start, limits, target.accuracy, progress) for alpha, n in plans)
    finally:
        progress.finish()
    return _advice(found, bench, target, limits, tolerance)


def check(
    how: UnlearnConfig,
    tolerance: float = TOLERANCE,
    loss_tolerance: float | None = None,
    probes: Sequence[float] = PROBES,
) -> None:
    """Raise UserError where no α can be suggested for such a run."""
    if not isinstance(how.method, (NegGrad, SharpMinMax)):
        name = METHODS.name_of(type(how.method))
        raise UserError(f"an alpha is suggested for {' and '.join(ADVISED)}, got method {name!r}")
    if how.optimizer.name.lower() != "sgd":
        raise UserError(
            f"the clock of the probes needs steps in proportion to the gradient, and {how.optimizer.name} rescales "
            "it; take optimizer sgd, or search alpha with `unsharp tune --search alpha=...`"
        )
    if how.clip_norm is not None:
        raise UserError(
            f"the clock of the probes needs steps in proportion to the gradient, and clip_norm {how.clip_norm:g} cuts "
            "it; leave clip_norm out, or search alpha with `unsharp tune --search alpha=...`"
        )
    if type(how.rule).final_weights is not Rule.final_weights:
        raise UserError(
            f"rule {RULES.name_of(type(how.rule))} ends a run with other weights than those of its last step, which no "
            "shorter run passes through; take another rule, or search alpha with `unsharp tune --search alpha=...`"
        )
    if how.stop_at is not None:
        raise UserError(
            "stop_at ends the run at a forget accuracy, and alpha is suggested for a whole run; leave it out"
        )
    if not (math.isfinite(tolerance) and 0 < tolerance <= 100):
        raise UserError(f"tolerance must be points of accuracy in (0, 100], got {tolerance}")
    if loss_tolerance is not None and not (math.isfinite(loss_tolerance) and loss_tolerance > 0):
        raise UserError(f"loss_tolerance must be a finite number of nats above 0, got {loss_tolerance}")
    if not probes:
        raise UserError("probes must name at least one alpha")
    for alpha in probes:
        check_fraction("probes", alpha)
        if alpha == 1:
            raise UserError("probes must lie below 1: at alpha 1 there is no ascent to measure")


# --- the clock --------------------------------------------------------------------------------------------------------


def effective_steps(how: UnlearnConfig, steps: int, *, constant: bool = False) -> float:
    """How far SGD goes in some steps under a constant forget gradient g, in units of η·g.

    Momentum has to build up, and a probe, which is shorter than the run, spends more of itself on that.

    Args:
        how: The run.
        steps: n, from the beginning of the run.
        constant: Leave the schedule out.
    """
    arguments = how.optimizer.arguments()
    momentum, dampening = float(arguments.get("momentum", 0.0)), float(arguments.get("dampening", 0.0))
    gone = velocity = 0.0
    for k in range(steps):
        velocity = 1.0 if k == 0 or momentum == 0 else momentum * velocity + 1 - dampening
        direction = 1 + momentum * velocity if arguments.get("nesterov") else velocity
        gone += direction if constant else direction * how.lr_factor(k, steps, FORGET)
    return gone


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
    """The first ascent at which the values come down to a level, on straight lines between looks; None if never.

    Args:
        ascent: (n,) ascending, n ≥ 1.
        values: (n,).
        level: Where they are to come down to.
    """
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


@dataclass(frozen=True, kw_only=True)
class _Probed(Problem):
    """A problem whose mask is found once for all probes: it does not depend on α."""

    found: list[Mask] = field(default_factory=list)

    def kept_mask(self, make: Callable[[], Mask]) -> Mask:
        if not self.found:
            self.found.append(make())
        return self.found[0]


class _Bench:
    """A network and a run, of which probes are taken."""

    def __init__(
        self, model: nn.Module, samples: Samples, forget: ForgetSet, how: UnlearnConfig, unseen: Samples | None
    ) -> None:
        self.model, self.how = model, how
        retained = forget.retain_indices(len(samples))
        retain = share_of(samples, retained, how.retain_fraction, how.seed)
        self.parts: dict[str, tuple[Samples, np.ndarray]] = {
            RETAIN: (samples, pick(retained, MOST)),
            FORGET: (samples, pick(forget.indices, MOST)),
        }
        if unseen is not None:
            self.parts["unseen"] = (unseen, pick(np.arange(len(unseen)), MOST))
        self.streams = {
            name: Stream(samples, indices, how.batch_size, how.seed, 0, 1, how.last_batch, how.cycle)
            for name, indices in ((RETAIN, retain), (FORGET, forget.indices))
        }
        self.problem = _Probed(
            model=model,
            samples=samples,
            forget=forget.indices,
            retain=retain,
            rule=how.rule,
            seed=how.seed,
            n_retained=len(retained),
            batch_size=how.batch_size,
        )
        self.batches = self.streams[RETAIN].n_batches
        self.run_steps = how.epochs * self.batches
        self.total = effective_steps(how, self.run_steps)

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

    def phases(self, alpha: float) -> list[Phase]:
        """What a step at `alpha` is made of."""
        method = dataclasses.replace(self.how.method, alpha=alpha)  # pyright: ignore[reportCallIssue]
        assert isinstance(method, PhasedMethod)
        return method.phases(self.problem)

    @property
    def preparation(self) -> int:
        """Passes that are taken before the first step."""
        assert isinstance(self.how.method, PhasedMethod)
        return self.how.method.preparation_passes(self.problem, self.how.batch_size)

    def run_passes(self) -> int:
        """What the whole run will take."""
        n_batches = {name: stream.n_batches for name, stream in self.streams.items()}
        return round(self.preparation + expected_passes(self.phases(0.5), n_batches, self.how.epochs))

    def balance(self) -> float:
        """The α at which the retain loss stands still, over the weights and at the rates of each part."""
        gradients = {name: mean_gradient(self.model, *self.parts[name]).double() for name in (RETAIN, FORGET)}
        rates = {name: self.how.phase_lr.get(name, self.how.optimizer.lr) for name in gradients}
        regions = {phase.name: phase.region for phase in self.phases(0.5)}
        moved = {name: rates[name] * self._inside(g, regions.get(name)) for name, g in gradients.items()}
        square, product = (float(gradients[RETAIN] @ moved[name]) for name in (RETAIN, FORGET))
        return balanced_alpha(square, product)

    def _inside(self, gradient: Tensor, region: Region | None) -> Tensor:
        """The gradient (D,) where the region lets it act, 0 elsewhere."""
        if region is None:
            return gradient
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        return gradient * torch.cat([region[name].flatten() for name in names]).to(gradient.device)

    def probe(
        self,
        alpha: float,
        steps: int,
        start: Mapping[str, float],
        limits: Mapping[str, float],
        target: float,
        progress: Progress,
    ) -> Probe:
        """Take steps at `alpha` until a limit was passed at two looks in a row, or all are taken."""
        looks = [Look(step=0, ascent=0.0, values=start)]
        wanted = set(look_steps(steps))
        network = copy.deepcopy(self.model)
        config = dataclasses.replace(self.how, epochs=steps, schedule="constant", phase_schedule={}, warmup=0.0)
        streams = {name: _Steps(stream, self.batches) for name, stream in self.streams.items()}
        loop = self._loop(network, alpha, streams, config)

        def after_step() -> dict[str, float]:
            progress.advance()
            if loop.epoch in wanted:
                ascent = (1 - alpha) * effective_steps(self.how, loop.epoch, constant=True)
                looks.append(Look(step=loop.epoch, ascent=ascent, values=self.look(network)))
            return {}

        def left(look: Look) -> bool:
            return any(_falling(name, look.values[name]) < _falling(name, level) for name, level in limits.items())

        failed = None
        runtime.seed_all(self.how.seed)
        try:
            loop.run(on_epoch=after_step, stop=lambda row: len(looks) > 2 and left(looks[-1]) and left(looks[-2]))
        except NonFiniteError as error:
            failed = str(error)
        asked = sum(len(indices) for _, indices in self.parts.values())
        return Probe(
            alpha=alpha,
            looks=tuple(looks),
            least=least_alpha(looks, limits, self.total),
            target=reaching_alpha(looks, target, self.total),
            passes=loop.passes + round(len(looks) * asked / self.how.batch_size / 3),
            failed=failed,
        )

    def check(self) -> None:
        """Raise UserError for what the run itself would refuse."""
        self._loop(copy.deepcopy(self.model), 0.5, self.streams, self.how)

    def _loop(self, network: nn.Module, alpha: float, streams: Mapping[str, Any], config: UnlearnConfig) -> Loop:
        separate = self.how.phase_steps == "separate" or bool(self.how.phase_schedule)
        return Loop(
            network,
            self.phases(alpha),
            streams,
            config,
            separate_states=separate or getattr(self.how.method, "separate_states", False),
            alternate=self.how.phase_steps == "alternate",
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


def _limits(start: Mapping[str, float], tolerance: float, loss_tolerance: float | None) -> dict[str, float]:
    """How low accuracies may fall and, where that is bounded, how high losses may rise."""
    kept = [name for name in KEPT if f"{name}_accuracy" in start]
    limits = {f"{name}_accuracy": start[f"{name}_accuracy"] - tolerance for name in kept}
    if loss_tolerance is not None:
        limits |= {f"{name}_loss": start[f"{name}_loss"] + loss_tolerance for name in kept}
    return limits


def _falling(name: str, value: float) -> float:
    """A figure with the sign under which it falls as a network gets worse."""
    return -value if name.endswith("_loss") else value


def _reached(looks: Sequence[Look], name: str, level: float, total: float) -> float | None:
    """The α of the run that ends where a figure first gets to a level, a loss from below; None if it never did."""
    values = [_falling(name, look.values[name]) for look in looks]
    ascent = first_crossing([look.ascent for look in looks], values, _falling(name, level))
    return None if ascent is None else min(1.0, max(0.0, 1 - ascent / total))


def least_alpha(looks: Sequence[Look], limits: Mapping[str, float], total: float) -> float | None:
    """The smallest α of a whole run that is predicted to keep all limits; None where the probe kept them throughout.

    Args:
        looks: Of a probe.
        limits: By figure.
        total: Effective steps of the whole run.
    """
    found = [_reached(looks, name, level, total) for name, level in limits.items()]
    return max((alpha for alpha in found if alpha is not None), default=None)


def reaching_alpha(looks: Sequence[Look], level: float, total: float) -> float | None:
    """The largest α of a whole run that is predicted to bring the forget accuracy down to a level; None if none does.

    Args:
        looks: Of a probe.
        level: 0–100.
        total: Effective steps of the whole run.
    """
    return _reached(looks, "forget_accuracy", level, total)


def chosen_alpha(least: float | None, target: float | None, smallest: float) -> float:
    """The largest α that reaches the target, but none that leaves the tolerance, and none below what was probed."""
    return max(smallest, least if least is not None else 0.0, target if target is not None else 0.0)


def is_forgotten(accuracy: float, target: Target, tolerance: float) -> bool:
    """Whether a forget accuracy is so near the target that there is nothing to bring down.

    It lies no higher above it than two of its standard errors, nor than the points that may be lost elsewhere.

    Args:
        accuracy: Of the trained network on the forget set, 0–100.
        target: What is aimed at.
        tolerance: Points of accuracy that may be lost.
    """
    return accuracy <= target.accuracy + min(2 * (target.error or 0.0), tolerance)


def _advice(
    probes: tuple[Probe, ...], bench: _Bench, target: Target, limits: Mapping[str, float], tolerance: float
) -> Advice:
    speaks, error = probes[-1], target.error or 0.0
    smallest = speaks.alpha
    forgotten = is_forgotten(speaks.looks[0].values["forget_accuracy"], target, tolerance)
    usual = type(bench.how.method)().alpha if forgotten else None  # pyright: ignore[reportAttributeAccessIssue]
    alpha = chosen_alpha(speaks.least, speaks.target if usual is None else usual, smallest)
    levels = (target.accuracy - error, target.accuracy, target.accuracy + error)
    reaching = [(p, reaching_alpha(p.looks, level, bench.total)) for p in probes for level in levels]
    reached = speaks.target is not None and (speaks.least is None or speaks.target >= speaks.least)
    because = FORGOTTEN if forgotten else _because(speaks, reached)
    low = min(alpha, *(chosen_alpha(None, reach, smallest) for _, reach in reaching))
    high = max(alpha, *(chosen_alpha(p.least, reach, smallest) for p, reach in reaching))
    balance, run_passes = bench.balance(), bench.run_passes()
    asked = sum(len(bench.parts[name][1]) for name in (RETAIN, FORGET))
    passes = bench.preparation + sum(probe.passes for probe in probes) + round(asked / bench.how.batch_size)
    return Advice(
        alpha=alpha,
        low=low,
        high=high,
        least=speaks.least,
        reached=reached or forgotten,
        balance=balance,
        target=target,
        limits=limits,
        probes=probes,
        run_steps=bench.run_steps,
        total=bench.total,
        passes=passes,
        run_passes=run_passes,
        reasons=(
            *_reasons(probes, target, limits),
            f"suggested: α = {alpha:.4f}, {because}",
            *_doubts(low, high, balance, passes / run_passes),
            *([UNSTEADY] if isinstance(bench.how.method, SharpMinMax) else []),
        ),
    )


def _reasons(probes: Sequence[Probe], target: Target, limits: Mapping[str, float]) -> Iterator[str]:
    start = probes[-1].looks[0].values
    yield (
        f"aimed at: {target.accuracy:.1f} % on the forget set ({target.kind}; the network has "
        f"{start['forget_accuracy']:.1f} %), with {' and '.join(map(_shown_limit, limits, limits.values()))}"
    )
    for probe in probes:
        least = (
            "never left the tolerance" if probe.least is None else f"leaves the tolerance below α = {probe.least:.4f}"
        )
        aim = "never reached the target" if probe.target is None else f"reaches the target at α = {probe.target:.4f}"
        broke = "" if probe.failed is None else "; it broke off, since a step was not finite"
        yield f"probe at α = {probe.alpha:g}, {probe.looks[-1].step} steps: a whole run {aim} and {least}{broke}"


def _doubts(low: float, high: float, balance: float, cost: float) -> Iterator[str]:
    yield (
        f"range: {low:.4f} (the target alone, by the probe and target error that ask for least) to {high:.4f}; no "
        "confidence interval"
    )
    if not math.isnan(balance):
        yield f"at the trained network itself the retain loss stands still, to first order, at α = {balance:.4f}"
    yield f"the probes took as much as {cost:.2f} of a whole run; another seed, or another target, gives another α"


def _because(speaks: Probe, reached: bool) -> str:
    if reached:
        return "the largest that is predicted to reach the target"
    if speaks.least is not None and speaks.least > speaks.alpha:
        return (
            "the smallest that is predicted to stay within the tolerance; the target is not reached there. A probe "
            "exaggerates what is lost, so that a smaller α may still do"
        )
    return "the smallest that was probed; not even there the target is reached: raise the learning rate or the epochs"


def _shown_limit(name: str, level: float) -> str:
    samples, _, figure = name.partition("_")
    if figure == "accuracy":
        return f"at least {level:.1f} % on {samples} samples"
    return f"a loss of at most {level:.3f} on {samples} samples"


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
        "limits": dict(advice.limits),
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
