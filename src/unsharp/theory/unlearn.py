"""NegGrad on the two-layer network, under every choice of the loss whose gradient gives ε.

L = α·mean_R ℓ − (1−α)·mean_F ℓ. A choice is a list of parts; each names the terms of L that it steps with, the terms
(with their signs) whose normalised gradient is ε, the sign of the correction, and the filters that it moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unsharp.errors import UserError, listed, unknown
from unsharp.theory.data import Problem, Setup, batch_orders
from unsharp.theory.model import Point, State
from unsharp.theory.optim import Ascent, corrected, move, shift
from unsharp.theory.thresholds import sam_radius

Terms = tuple[int, int]
"""Signs with which the terms of retain and forget enter, as they stand in L; 0 leaves one out."""


@dataclass(frozen=True)
class Part:
    """A part of a step.

    Args:
        terms: Terms of L whose gradient is taken.
        ascends: Terms whose gradient gives ε; None takes the gradient where the weights are.
        sign: s of g0 + s·λ(g1 − g0).
        region: "retain" or "forget" filters alone are perturbed and moved; None is all.
    """

    terms: Terms
    ascends: Terms | None = None
    sign: int = 1
    region: Literal["retain", "forget"] | None = None


BOTH, RETAIN, FORGET = (1, 1), (1, 0), (0, 1)
PERTURBATIONS: dict[str, tuple[Part, ...]] = {
    "sgd": (Part(BOTH),),
    "joint": (Part(BOTH, BOTH),),
    "ce": (Part(BOTH, (1, -1)),),
    "retain": (Part(RETAIN, RETAIN), Part(FORGET)),
    "sep": (Part(RETAIN, RETAIN), Part(FORGET, FORGET)),
    "minmax": (Part(RETAIN, RETAIN), Part(FORGET, FORGET, -1)),
    "sharp_minmax": (Part(RETAIN, RETAIN, 1, "retain"), Part(FORGET, FORGET, -1, "forget")),
}
"""The parts of each choice: plain NegGrad; ε from L itself; from the un-negated loss; SAM on retain alone; on both
with an ε each; the same with the sign turned on forget; and that with filters split by what the forget set moves."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the networks are trained or unlearned.

    Args:
        perturb: Which loss gives ε, one of `PERTURBATIONS`; "joint" in pretraining is SAM.
        steps: Passes T ≥ 0 over the retained samples; one step each without batches.
        eta: Step size η > 0.
        c: Radius in units of the theorem's, c ≥ 0: τ = c·m√B/(Pσ_p√d), B the samples that a step sees.
        tau: Radius τ ≥ 0 itself, in place of `c`.
        batch_size: Samples of a batch; None takes all. Forget batches go round beside the retain batches.
        lam: Weight λ ≥ 0 of the correction.
        adaptive: Scale each filter's part of ε by its norm.
        fraction: Share in (0, 1) of the filters that "sharp_minmax" gives to the forget set.
    """

    perturb: str = "sgd"
    steps: int = 200
    eta: float = 0.1
    c: float = 1.0
    tau: float | None = None
    batch_size: int | None = None
    lam: float = 1.0
    adaptive: bool = False
    fraction: float = 0.3

    def __post_init__(self) -> None:
        if self.perturb not in PERTURBATIONS:
            raise unknown("perturb", self.perturb, PERTURBATIONS)
        if self.steps < 0:
            raise UserError(f"steps must be at least 0, got {self.steps}")
        if not (self.eta > 0 and math.isfinite(self.eta)):
            raise UserError(f"eta must be a number above 0, got {self.eta}")
        for name in ("c", "tau", "lam"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise UserError(f"{name} must be a number of at least 0, got {value}")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 < self.fraction < 1:
            raise UserError(f"fraction must lie in (0, 1), got {self.fraction}")

    def radius(self, problem: Problem, n_seen: int) -> Tensor:
        """τ for a step that sees `n_seen` samples, (B, 1)."""
        setup = problem.setup
        if self.tau is not None:
            return torch.full_like(problem.dimensions, self.tau).unsqueeze(-1)
        at_one = sam_radius(setup.n_filters, n_seen, setup.n_patches, setup.sigma_p, 1.0, self.c)
        return (at_one / problem.dimensions.sqrt()).unsqueeze(-1)


@dataclass(frozen=True)
class Weights:
    """Sample weights of the two terms of L, each broadcasting to (B, V, n), and how many samples they touch."""

    retain: Tensor
    forget: Tensor
    n_seen: int

    def of(self, terms: Terms) -> Tensor:
        """ω of some terms."""
        return terms[0] * self.retain + terms[1] * self.forget


def pretrain_weights(problem: Problem) -> Weights:
    """Those of the mean loss over all samples, as the retain term."""
    n = problem.setup.n
    ones = problem.gram.new_full((n,), 1.0 / n)
    return Weights(ones, torch.zeros_like(ones), n)


def neggrad_weights(problem: Problem, alpha: Sequence[float]) -> Weights:
    """Those of L over all samples: α/n_R on retain, −(1−α)/n_F on forget, for one α or one for each variant."""
    setup, forget = problem.setup, problem.forget.to(problem.gram)
    check_alpha(setup, alpha)
    weight = problem.gram.new_tensor(list(alpha)).unsqueeze(-1)
    return Weights(weight * (1 - forget) / setup.n_retain, (weight - 1) * forget / max(1, setup.n_forget), setup.n)


def check_alpha(setup: Setup, alpha: Sequence[float]) -> None:
    """Refuse weights outside [0, 1], and NegGrad without forget samples. Raises: UserError."""
    if setup.n_forget == 0:
        raise UserError("NegGrad needs forget samples; give n_forget of at least 1")
    if not alpha or not all(0 <= a <= 1 for a in alpha):
        raise UserError(f"alpha must lie in [0, 1], got {listed(alpha) or 'none'}")


def batches(problem: Problem, plan: Plan, alpha: Sequence[float] | None) -> Iterator[Iterator[Weights]]:
    """For each pass the weights of its steps; one α or one for each variant for NegGrad, None for training on all.

    With batches, each pass cuts a random order of the retained samples; the forget batches of the pass, cut from a
    random order of theirs, go round beside them. Each term is the mean over its batch.
    """
    whole = pretrain_weights(problem) if alpha is None else neggrad_weights(problem, alpha)
    if plan.batch_size is None:
        for _ in range(plan.steps):
            yield iter((whole,))
        return
    retain, forget = batch_orders(problem, plan.steps, split=alpha is not None)
    weight = problem.gram.new_tensor([1.0] if alpha is None else list(alpha)).unsqueeze(-1)
    for epoch in range(plan.steps):
        yield _epoch(problem, plan.batch_size, retain[:, epoch], forget[:, epoch], weight)


def _epoch(problem: Problem, size: int, retain: Tensor, forget: Tensor, weight: Tensor) -> Iterator[Weights]:
    forgets = forget.split(size, dim=-1)
    for i, chosen in enumerate(retain.split(size, dim=-1)):
        other = forgets[i % len(forgets)]
        n_seen = chosen.shape[-1] + other.shape[-1]
        yield Weights(weight * _mean_over(problem, chosen), (weight - 1) * _mean_over(problem, other), n_seen)


def _mean_over(problem: Problem, chosen: Tensor) -> Tensor:
    """1 over their number for the chosen samples, (B, size), and 0 for the others: (B, 1, n)."""
    zeros = problem.gram.new_zeros(len(problem), problem.setup.n)
    return zeros.scatter(1, chosen, 1.0 / max(1, chosen.shape[-1])).unsqueeze(1)


def forget_filters(state: State, fraction: float) -> Tensor:
    """1 for the filters whose forget gradient is largest in norm, else 0, (B, V, 2m).

    The whole forget set is passed once, as for the mask of Sharp MinMax; a filter counts by the norm of its part.

    Args:
        state: The networks.
        fraction: Share of the filters, at least one and not all.
    """
    setup, forget = state.problem.setup, state.problem.forget.to(state.problem.gram)
    gradient = state.point().gradient(forget / max(1, setup.n_forget))
    norms = (gradient @ state.problem.gram.unsqueeze(1) * gradient).sum(-1)
    n_chosen = min(max(1, round(fraction * norms.shape[-1])), norms.shape[-1] - 1)
    chosen = norms.argsort(dim=-1, descending=True, stable=True)[..., :n_chosen]
    return torch.zeros_like(norms).scatter(-1, chosen, 1.0)


@dataclass(frozen=True)
class Offsets:
    """The point of a step and what the ε of each part adds to the scores there (None where a part has none)."""

    point: Point
    offsets: tuple[Tensor | None, ...]


def ascend(state: State, plan: Plan, weights: Weights, mask: Tensor | None = None) -> Offsets:
    """The ε of each part of a step.

    Args:
        state: The networks.
        plan: How they step.
        weights: Sample weights of the step.
        mask: Forget filters of "sharp_minmax", (B, V, 2m).
    """
    point = state.point()
    ascent = Ascent(plan.radius(state.problem, weights.n_seen), plan.lam, plan.adaptive)
    found: dict[tuple[Terms, str | None], Tensor] = {}
    for part in PERTURBATIONS[plan.perturb]:
        key = (part.ascends, part.region)
        if part.ascends is not None and key not in found:
            gradient = _within(part.region, mask, point.gradient(weights.of(part.ascends)))
            found[part.ascends, part.region] = shift(state, gradient, ascent)
    parts = PERTURBATIONS[plan.perturb]
    return Offsets(point, tuple(None if p.ascends is None else found[p.ascends, p.region] for p in parts))


def neggrad_step(state: State, plan: Plan, weights: Weights, mask: Tensor | None = None) -> None:
    """One step of the plan: the gradients of all parts, each kept to its filters, added.

    Args:
        state: The networks; they move.
        plan: How they step.
        weights: Sample weights of the step.
        mask: Forget filters of "sharp_minmax", (B, V, 2m).
    """
    taken = ascend(state, plan, weights, mask)
    total: Tensor | None = None
    for part, offset in zip(PERTURBATIONS[plan.perturb], taken.offsets):
        gradient = corrected(taken.point, weights.of(part.terms), offset, state, plan.lam, part.sign)
        gradient = _within(part.region, mask, gradient)
        total = gradient if total is None else total + gradient
    assert total is not None
    move(state, total, plan.eta)


def run(
    state: State,
    plan: Plan,
    alpha: Sequence[float] | None = None,
    watch: Callable[[int, State], None] | None = None,
) -> None:
    """Train on all samples, or unlearn by NegGrad.

    Args:
        state: The networks; they move.
        plan: How they step.
        alpha: Weight α of the retain loss for NegGrad, one or one for each variant; None trains on all samples.
        watch: Called with the passes taken and the networks, before the first pass and after each.
    """
    mask = None
    if any(part.region for part in PERTURBATIONS[plan.perturb]):
        if alpha is None:
            raise UserError(f"{plan.perturb} is a way to unlearn; pretrain with sgd or joint")
        mask = forget_filters(state, plan.fraction)
    if watch is not None:
        watch(0, state)
    for taken, steps in enumerate(batches(state.problem, plan, alpha), start=1):
        for weights in steps:
            neggrad_step(state, plan, weights, mask)
        if watch is not None:
            watch(taken, state)


def _within(region: str | None, mask: Tensor | None, gradient: Tensor) -> Tensor:
    if region is None:
        return gradient
    assert mask is not None
    kept = mask if region == "forget" else 1 - mask
    return gradient * kept.unsqueeze(-1)
