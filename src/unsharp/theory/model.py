"""The two-layer network of the theory in coordinates of signal and noise: outputs, margins, gradients.

f(x) = Σ_j (j·out) Σ_r Σ_p ReLU(⟨w_jr, x^(p)⟩), out = 1/m or 1, j = ±1, no bias, second layer fixed. A filter is
w = w⁰ + Σ_k A_k z_k, with z_0 = φ/‖φ‖ and the noise vectors after it, so the gradient is a vector of coefficients and
no autograd is needed. All strengths of the signal share one Gram matrix, since z_0 has length 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from unsharp.errors import UserError, listed
from unsharp.theory.data import Problem


@dataclass
class State:
    """The networks of all problems and variants.

    Args:
        problem: B problems.
        phi: Strength ‖φ‖ > 0 of the signal in each of V variants, (V,).
        coefficients: A, (B, V, 2m, 1+N).
        reference: A at the time from which signal and noise coefficients count, of the same shape.
    """

    problem: Problem
    phi: Tensor
    coefficients: Tensor
    reference: Tensor

    def reset_reference(self) -> None:
        """Let signal and noise coefficients count from here, as at the start of unlearning."""
        self.reference = self.coefficients.clone()

    def copy(self) -> State:
        """The same networks, to go on from in another way."""
        return State(self.problem, self.phi, self.coefficients.clone(), self.reference.clone())

    def scores(self, coefficients: Tensor | None = None) -> Tensor:
        """⟨w, z⟩ of each filter with signal direction and noise, (B, V, 2m, 1+N)."""
        a = self.coefficients if coefficients is None else coefficients
        return self.problem.scores.unsqueeze(1) + with_gram(self.problem, a)

    def weights(self) -> Tensor:
        """The filters in coordinates of the span, (B, V, 2m, K)."""
        a = self.coefficients
        return self.problem.weights.unsqueeze(1) + (a.flatten(1, 2) @ self.problem.vectors).unflatten(1, a.shape[1:3])

    def point(self, scores: Tensor | None = None) -> Point:
        """The networks' outputs and gradients, here or where the scores are those given."""
        return Point(self.problem, self.phi, self.scores() if scores is None else scores)


def start(problem: Problem, phi: Sequence[float]) -> State:
    """The networks at their first weights, one variant for each strength ‖φ‖ > 0 of the signal.

    Raises:
        UserError: unless there is a strength, and all are above 0.
    """
    if not phi or not all(p > 0 for p in phi):
        raise UserError(f"phi must name strengths above 0, got {listed(phi) or 'none'}")
    shape = (len(problem), len(phi), *problem.scores.shape[1:])
    zeros = problem.scores.new_zeros(shape)
    return State(problem, problem.scores.new_tensor(list(phi)), zeros, zeros.clone())


def with_gram(problem: Problem, coefficients: Tensor) -> Tensor:
    """Inner products of Σ_k A_k z_k with every z, for coefficients (B, V, 2m, 1+N)."""
    return (coefficients.flatten(1, 2) @ problem.gram).unflatten(1, coefficients.shape[1:3])


class Point:
    """Outputs and gradients of the networks with given scores.

    Args:
        problem: B problems.
        phi: Strength of the signal, (V,).
        scores: ⟨w, z⟩, (B, V, 2m, 1+N).
    """

    def __init__(self, problem: Problem, phi: Tensor, scores: Tensor) -> None:
        self.problem, self.phi, self.scores = problem, phi, scores

    @property
    def noise(self) -> Tensor:
        """Scores with the noise vectors, (B, V, 2m, N)."""
        return self.scores[..., 1:]

    @cached_property
    def outputs(self) -> Tensor:
        """f of each sample, (B, V, n)."""
        setup = self.problem.setup
        noise = by_sign(self.noise.relu(), setup.n_filters).unflatten(-1, (setup.n, setup.n_noises)).sum(-1)
        up, down = signal_outputs(self.scores[..., 0], setup.n_filters)
        clean = self.problem.clean.unsqueeze(1)
        signal = torch.where(clean > 0, up.unsqueeze(-1), down.unsqueeze(-1))
        return setup.out * (self.phi[:, None] * signal + setup.multiplicity * noise)

    @cached_property
    def margins(self) -> Tensor:
        """y·f of each sample, (B, V, n)."""
        return self.problem.labels.unsqueeze(1) * self.outputs

    @cached_property
    def losses(self) -> Tensor:
        """ℓ(y·f) = log(1 + e^{−y·f}) of each sample, (B, V, n)."""
        return -functional.logsigmoid(self.margins)  # softplus drops the exponential from 20 on

    @cached_property
    def _slopes(self) -> Tensor:
        """∂ℓ/∂f of each sample, (B, V, n)."""
        return -torch.sigmoid(-self.margins) * self.problem.labels.unsqueeze(1)

    @cached_property
    def _active(self) -> Tensor:
        return (self.noise > 0).to(self.scores.dtype)

    def gradient(self, omega: Tensor) -> Tensor:
        """Coefficients of ∇ Σ_i ω_i ℓ(y_i f_i), (B, V, 2m, 1+N), for sample weights ω that broadcast to (B, V, n)."""
        setup, m = self.problem.setup, self.problem.setup.n_filters
        q = setup.out * omega * self._slopes
        each = setup.multiplicity * q
        if setup.n_noises > 1:
            each = each.repeat_interleave(setup.n_noises, dim=-1)
        found = torch.empty_like(self.scores)
        torch.mul(self._active[..., :m, :], each.unsqueeze(-2), out=found[..., :m, 1:])
        torch.mul(self._active[..., m:, :], -each.unsqueeze(-2), out=found[..., m:, 1:])
        clean, toward = self.problem.clean.unsqueeze(1), self.scores[..., 0]
        up = (q * (clean > 0)).sum(-1, keepdim=True)
        down = (q * (clean < 0)).sum(-1, keepdim=True)
        signal = self.phi[:, None] * ((toward > 0) * up - (toward < 0) * down)
        found[..., :m, 0] = signal[..., :m]
        found[..., m:, 0] = -signal[..., m:]
        return found


def by_sign(values: Tensor, m: int) -> Tensor:
    """Sum over filters of output sign +1 less that over the others; filters stand last but one."""
    return values[..., :m, :].sum(-2) - values[..., m:, :].sum(-2)


def signal_outputs(toward: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Σ_j j Σ_r ReLU(±⟨w, z_0⟩) for the signal as it is and for its opposite, from (..., 2m) to (...) each."""
    up, down = toward.relu(), (-toward).relu()
    return up[..., :m].sum(-1) - up[..., m:].sum(-1), down[..., :m].sum(-1) - down[..., m:].sum(-1)


def error_on_test(state: State, room: int = 20_000_000) -> Tensor:
    """Share of fresh samples on the wrong side, with clean labels and both signals for each noise, (B, V).

    Args:
        state: The networks.
        room: Numbers that may be held at a time.
    """
    problem, setup = state.problem, state.problem.setup
    weights, found = state.weights(), []
    n_variants, n_all = weights.shape[1], problem.test_noise.shape[-1]
    at_once = max(1, room // (n_variants * weights.shape[2] * n_all))
    for i in range(0, len(problem), at_once):
        part = weights[i : i + at_once]
        noise = (part.flatten(1, 2) @ problem.test_noise[i : i + at_once]).unflatten(1, part.shape[1:3]).relu_()
        each = by_sign(noise, setup.n_filters).unflatten(-1, (setup.n_test, setup.n_noises)).sum(-1)
        up, down = signal_outputs(part[..., 0], setup.n_filters)
        strength = state.phi[:, None]
        right = (strength * up.unsqueeze(-1) + setup.multiplicity * each > 0).to(part.dtype).mean(-1)
        left = (strength * down.unsqueeze(-1) + setup.multiplicity * each < 0).to(part.dtype).mean(-1)
        found.append(1.0 - (right + left) / 2)
    return torch.cat(found)
