"""Each rule's gradient, from its paper's formula.

A new rule: write its gradient as a function of (here, settings, sign) and put it into `GRADIENTS` under its name; if it
looks at the weights after a step or ends with others, into `AFTER` and `FINAL` too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from unsharp.data.samples import Batch

if TYPE_CHECKING:
    from contract.book.training import Line, Now

Named = dict[str, Tensor]
Scaling = Callable[[str, Tensor], Tensor]
"""T by name and weights."""


class Displaced:
    """A network at other weights: w + offset, a function of w."""

    def __init__(self, model: nn.Module, offset: Named) -> None:
        self._model = model
        self._weights = {n: p + offset[n] if n in offset else p for n, p in model.named_parameters()}

    def __call__(self, inputs: Tensor) -> Tensor:
        return torch.func.functional_call(self._model, self._weights, (inputs,))

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._weights.items()

    def parameters(self) -> Iterator[Tensor]:
        yield from self._weights.values()


class Here:
    """Where a phase stands in a step, and its gradients there and beside, always on the same dropout.

    The first evaluation moves torch's random state on; the others leave it as they find it.
    """

    def __init__(
        self,
        model: nn.Module,
        line: Line,
        batches: Mapping[str, Batch],
        now: Now,
        memory: dict[str, Any],
        step: int,
    ) -> None:
        self.model, self.line, self.batches, self.now = model, line, batches, now
        self.memory, self.step = memory, step
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.last_loss = math.nan
        self.last_losses: list[float] = []
        self._start: Tensor | None = None

    @property
    def region(self) -> Named | None:
        return self.line.region

    def loss(self, offset: Named | None = None, *, of_perturbation: bool = False) -> Tensor:
        """L(w + offset) with its graph."""
        loss = self.line.perturb if of_perturbation else self.line.loss
        assert loss is not None
        found = torch.get_rng_state()
        if self._start is not None:
            torch.set_rng_state(self._start)
        value = loss(self.model if offset is None else Displaced(self.model, offset), self.batches, self.now)
        if self._start is None:
            self._start = found
        else:
            torch.set_rng_state(found)
        self.last_loss = float(value.detach())
        return value

    def gradient(self, offset: Named | None = None, *, of_perturbation: bool = False) -> Named:
        """∇L(w + offset) by name; a tensor that L does not reach is left out."""
        return self.differentiated(self.loss(offset, of_perturbation=of_perturbation))

    def differentiated(self, value: Tensor, *, again: bool = False) -> Named:
        grads = torch.autograd.grad(value, list(self.params.values()), allow_unused=True, create_graph=again)
        return {n: g for n, g in zip(self.params, grads) if g is not None}

    def pieces(self, n: int) -> list[Here]:
        """The same on each of n pieces of the batches, that is, of consecutive samples."""
        found = []
        for k in range(n):
            batches = {
                s: Batch(*(torch.tensor_split(t, n)[k] for t in (b.inputs, b.labels, b.indices)))
                for s, b in self.batches.items()
            }
            found.append(Here(self.model, self.line, batches, self.now, {}, self.step))
        return found


def gradient(here: Here, name: str, settings: Any) -> Named:
    sign = -1 if (getattr(settings, "sign", "min") == "max") != here.line.turned else 1
    return GRADIENTS[name](here, settings, sign)


def after_step(name: str, settings: Any, params: Mapping[str, Tensor], memory: dict[str, Any], done: float) -> None:
    if name in AFTER:
        AFTER[name](settings, params, memory, done)


def final_weights(name: str, settings: Any, memory: Mapping[str, Any]) -> Named:
    return FINAL[name](settings, memory) if name in FINAL else {}


# --- the plain gradient, SAM and ASAM --------------------------------------------------------------------------------


def plain(here: Here, settings: Any, sign: int) -> Named:
    return here.gradient()


def sam(here: Here, settings: Any, sign: int) -> Named:
    return perturbed(here, settings, sign, unscaled)


def asam(here: Here, settings: Any, sign: int) -> Named:
    def scale(n: str, w: Tensor) -> Tensor:
        return w.abs() + settings.eta if settings.adapt == "all" or n.endswith("weight") else torch.ones_like(w)

    return perturbed(here, settings, sign, scale)


def perturbed(here: Here, s: Any, sign: int, scale: Scaling) -> Named:
    """g₀ + s·λ·(∇L(w+ε) − g₀), or its other form for the maximum, every so many steps."""
    if here.step % s.every != 0:
        return here.gradient()
    g0, g1 = both(here, s, sign, scale)
    if sign < 0 and s.max_form == "ascent":
        sign = 1
    return corrected(here, s, sign, g0, g1)


def both(here: Here, s: Any, sign: int, scale: Scaling) -> tuple[Named, Named]:
    """∇L(w) and ∇L(w+ε)."""
    if here.line.perturb is None:
        direction = g0 = here.gradient()
    else:
        if here.line.others:
            here.loss()  # the batches of the loss set the dropout
        direction = here.gradient(of_perturbation=True)
        g0 = here.gradient()
    epsilon = ball(here, direction, s.rho if here.line.rho is None else here.line.rho, s.perturb, scale)
    if sign < 0 and s.max_form == "ascent":
        epsilon = times(-1, epsilon)
    return g0, here.gradient(epsilon)


def corrected(here: Here, s: Any, sign: int, g0: Named, flat: Named) -> Named:
    """g₀ + s·λ·(ĝ − g₀); with a leak it is ĝ alone that is kept to the region."""
    if here.line.leak:
        flat = inside(here, flat)
    return {n: g0[n] + sign * s.lam * (flat[n] - g0[n]) for n in g0}


def ball(here: Here, towards: Named, rho: float, perturb: str, scale: Scaling) -> Named:
    """ε = ρ·T²·g/‖T·g‖ over what is perturbed."""
    t = {n: scale(n, here.params[n].detach()) for n in towards}
    scaled = part(here, {n: t[n] * g for n, g in towards.items()}, perturb)
    length = norm(scaled)
    return {n: rho * t[n] * v / length if length > 0 else torch.zeros_like(v) for n, v in scaled.items()}


def part(here: Here, named: Named, perturb: str) -> Named:
    """What is perturbed: all weights, those of the region, or of these the ones of normalisation layers."""
    if perturb == "all":
        return named
    named = inside(here, named)
    if perturb == "norm":
        layers = {n for n, module in here.model.named_modules() if isinstance(module, nn.BatchNorm2d)}
        named = {n: v if n.rpartition(".")[0] in layers else torch.zeros_like(v) for n, v in named.items()}
    return named


def inside(here: Here, named: Named) -> Named:
    return named if here.region is None else {n: torch.where(here.region[n], v, 0.0) for n, v in named.items()}


def unscaled(n: str, w: Tensor) -> Tensor:
    return torch.ones_like(w)


def by_size(n: str, w: Tensor) -> Tensor:
    return w.abs()


def norm(named: Named) -> Tensor:
    return torch.cat([v.flatten() for v in named.values()]).norm()


def times(factor: float | Tensor, named: Named) -> Named:
    return {n: factor * v for n, v in named.items()}


def dot(a: Named, b: Named) -> Tensor:
    return sum((a[n] * b[n]).sum() for n in a)  # type: ignore[return-value]


def unit(named: Named) -> Named:
    length = norm(named)
    return {n: v / length if length > 0 else torch.zeros_like(v) for n, v in named.items()}


def mean(many: list[Named]) -> Named:
    return {n: torch.stack([each[n] for each in many]).mean(0) for n in many[0]}


# --- SAM in fewer passes ---------------------------------------------------------------------------------------------


def looksam(here: Here, s: Any, sign: int) -> Named:
    """Between full steps the gradient is joined by what the last one found across it, at a length of its own."""
    towards = 1 if s.max_form == "ascent" else sign  # that form's second point already lies on the other side
    if here.step % s.every == 0:
        g0, g1 = both(here, s, sign, by_size if s.adaptive else unscaled)
        before, now = inside(here, g0), inside(here, g1)
        along = dot(now, before) / dot(before, before)
        here.memory["v"] = {n: now[n] - along * before[n] for n in before}
        return corrected(here, s, towards, g0, g1)
    g, v = here.gradient(), here.memory["v"]
    length = s.reuse * norm(inside(here, g)) / norm(v)
    return {n: g[n] + towards * s.lam * length * v[n] for n in g}


def s2sam(here: Here, s: Any, sign: int) -> Named:
    """The gradient where the last step's one points, up or down; the first step's is taken at w."""
    last = here.memory.get("g")
    offset = None
    if last is not None:
        offset = times(sign, ball(here, last, s.rho, s.perturb, by_size if s.adaptive else unscaled))
    here.memory["g"] = g = here.gradient(offset)
    return g


# --- relatives of SAM ------------------------------------------------------------------------------------------------


def gsam(here: Here, s: Any, sign: int) -> Named:
    """The perturbed gradient less what of the plain one lies across it."""
    if here.step % s.every != 0:
        return here.gradient()
    g0, worst = both(here, s, sign, by_size if s.adaptive else unscaled)
    g, worst = inside(here, g0), inside(here, worst)
    along = dot(g, worst) / dot(worst, worst)
    flat = {n: worst[n] - s.gap_weight * (g[n] - along * worst[n]) for n in g}
    return corrected(here, s, 1 if s.max_form == "ascent" else sign, g0, flat)


def msam(here: Here, s: Any, sign: int) -> Named:
    """Each micro-batch with a perturbation of its own; the mean of all."""
    if here.step % s.every != 0:
        return here.gradient()
    pairs = []
    for piece in here.pieces(s.micro_batches):
        pairs.append(both(piece, s, sign, by_size if s.adaptive else unscaled))
        here.last_losses.append(piece.last_loss)
    here.last_loss = sum(here.last_losses) / len(pairs)
    g0, flat = (mean([pair[k] for pair in pairs]) for k in (0, 1))
    return corrected(here, s, 1 if s.max_form == "ascent" else sign, g0, flat)


# --- smoothing and penalties -----------------------------------------------------------------------------------------


def randomized_smoothing(here: Here, s: Any, sign: int) -> Named:
    """The mean gradient under Gaussian noise, drawn by a generator of the seed and the step."""
    if here.step % s.every != 0:
        return here.gradient()
    g0 = here.gradient()
    seed = np.random.SeedSequence(torch.initial_seed(), spawn_key=(here.step,)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(seed) // 2)
    found = []
    for _ in range(s.n_samples):
        noise = {n: s.sigma * torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in here.params.items()}
        noise = part(here, noise, s.perturb)
        found.append(here.gradient(noise))
        if s.antithetic:
            found.append(here.gradient(times(-1, noise)))
    return corrected(here, s, sign, g0, mean(found))


def gradient_penalty(here: Here, s: Any, sign: int) -> Named:
    """The gradient of L + penalty·‖∇L‖."""
    if here.step % s.every != 0:
        return here.gradient()
    value = here.loss()
    g0 = here.differentiated(value, again=True)
    flat = here.differentiated(value + s.penalty * norm(part(here, g0, s.perturb)))
    return corrected(here, s, sign, {n: g.detach() for n, g in g0.items()}, flat)


def curvature(here: Here, s: Any, sign: int) -> Named:
    """The gradient of L + penalty·‖∇L(w+μv) − ∇L(w)‖, v the direction of the gradient, held fixed."""
    if here.step % s.every != 0:
        return here.gradient()
    value = here.loss()
    g0 = here.differentiated(value, again=True)
    way = times(s.distance, unit(part(here, {n: g.detach() for n, g in g0.items()}, s.perturb)))
    there = here.differentiated(here.loss(way), again=True)
    change = part(here, {n: there[n] - g0[n] for n in g0}, s.perturb)
    flat = here.differentiated(value + s.penalty * norm(change))
    return corrected(here, s, sign, {n: g.detach() for n, g in g0.items()}, flat)


GRADIENTS: dict[str, Callable[[Here, Any, int], Named]] = {
    "none": plain,
    "sam": sam,
    "asam": asam,
    "looksam": looksam,
    "s2sam": s2sam,
    "gsam": gsam,
    "msam": msam,
    "randomized_smoothing": randomized_smoothing,
    "gradient_penalty": gradient_penalty,
    "curvature": curvature,
    "weight_averaging": plain,
}
"""By name of the rule: its gradient at a point; the sign is −1 where it raises sharpness."""


def late_weights(s: Any, params: Mapping[str, Tensor], memory: dict[str, Any], done: float) -> None:
    if done > s.start:
        memory.setdefault("late", []).append({n: p.detach().clone() for n, p in params.items()})


def mean_of_late_weights(s: Any, memory: Mapping[str, Any]) -> Named:
    late = memory.get("late", [])[:: s.interval]
    return mean(late) if late else {}


AFTER: dict[str, Callable[[Any, Mapping[str, Tensor], dict[str, Any], float], None]] = {
    "weight_averaging": late_weights
}
"""What a rule keeps of the weights after each step, given what share of the run is done."""

FINAL: dict[str, Callable[[Any, Mapping[str, Any]], Named]] = {"weight_averaging": mean_of_late_weights}
"""The weights with which it ends."""
