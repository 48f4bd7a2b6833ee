"""Steps in coefficient space: gradient descent, SAM with its sign, its regions and its scaling by filter norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unsharp.theory.model import Point, State, with_gram


@dataclass(frozen=True)
class Ascent:
    """How far ε goes, and in what metric.

    Args:
        tau: Radius τ ≥ 0, broadcasting to (B, V).
        lam: Weight λ ≥ 0 of the correction; 1 takes the gradient at the perturbed weights itself.
        adaptive: Scale each filter's part by its norm, T = ‖w_jr‖: ε = τ·T²g/‖Tg‖. (Scaling by single weights
            leaves the span of data and first weights; `reference` has it.)
    """

    tau: Tensor
    lam: float = 1.0
    adaptive: bool = False


def shift(state: State, gradient: Tensor, ascent: Ascent) -> Tensor:
    """What ε = τ·T²g/‖T·g‖ adds to the scores, with one norm over all filters; 0 where the gradient is 0.

    Args:
        state: The networks, whose filter norms count under `adaptive`.
        gradient: Coefficients of g, (B, V, 2m, 1+N).
        ascent: Radius and metric.

    Returns:
        ⟨ε, z⟩ for every filter and vector, (B, V, 2m, 1+N).
    """
    moved = with_gram(state.problem, gradient)
    squares = (gradient * moved).sum(-1)
    if ascent.adaptive:
        scale = state.weights().square().sum(-1)
        moved, squares = moved * scale.unsqueeze(-1), squares * scale
    norm = squares.sum(-1).clamp(min=0).sqrt()
    factor = torch.where(norm > 0, ascent.tau / norm, torch.zeros_like(norm))
    return moved * factor[..., None, None]


def corrected(point: Point, omega: Tensor, offset: Tensor | None, state: State, lam: float, sign: int) -> Tensor:
    """g0 + s·λ(g1 − g0), g1 at the perturbed scores; g0 itself without an offset, and g1 itself for s·λ = 1.

    Args:
        point: Where g0 is taken.
        omega: Sample weights of the loss.
        offset: What ε adds to the scores, or None.
        state: The networks.
        lam: λ.
        sign: s, +1 to lower sharpness, −1 to raise it.
    """
    if offset is None:
        return point.gradient(omega)
    ahead = state.point(point.scores + offset).gradient(omega)
    if sign * lam == 1:
        return ahead
    here = point.gradient(omega)
    return here + sign * lam * (ahead - here)


def gd_step(state: State, omega: Tensor, eta: Tensor | float) -> None:
    """A ← A − ηc: one step of gradient descent on Σ ω_i ℓ_i.

    Args:
        state: The networks; they move.
        omega: Sample weights, broadcasting to (B, V, n).
        eta: Step size, broadcasting to (B, V).
    """
    move(state, state.point().gradient(omega), eta)


def sam_step(state: State, omega: Tensor, eta: Tensor | float, ascent: Ascent, sign: int = 1) -> None:
    """One step of SAM on Σ ω_i ℓ_i, in the form g0 + s·λ(g1 − g0).

    Args:
        state: The networks; they move.
        omega: Sample weights, broadcasting to (B, V, n).
        eta: Step size, broadcasting to (B, V).
        ascent: Radius and metric of ε.
        sign: s, +1 to lower sharpness, −1 to raise it.
    """
    point = state.point()
    offset = shift(state, point.gradient(omega), ascent)
    move(state, corrected(point, omega, offset, state, ascent.lam, sign), eta)


def move(state: State, gradient: Tensor, eta: Tensor | float) -> None:
    """A ← A − η·gradient."""
    if isinstance(eta, Tensor) and eta.ndim:
        eta = eta[..., None, None]
    state.coefficients = state.coefficients - eta * gradient
