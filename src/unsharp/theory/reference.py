"""The same model with its vectors: samples of P patches in R^d, weights in R^d, gradients by autograd. Slow, and plain.

One problem at a time. It shares no formula with the reduced model: the tests and the acceptance checks hold one against
the other on the same vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from unsharp.errors import UserError
from unsharp.theory.data import _TEST, Problem, Setup, assemble, draw_labels, stream

_VECTORS = 4
Scaling = Literal["none", "filter", "element"]


@dataclass(frozen=True)
class FullProblem:
    """Samples and first weights as vectors.

    Args:
        setup: What data and network are.
        d: Dimension.
        seed: Seed.
        signal: φ, (d,).
        noise: ξ, (n, Q, d).
        patches: The samples, (n, P, d), the signal in a random patch.
        clean: Signs ŷ, (n,).
        labels: Labels y, (n,).
        first: First weights, (2m, d), those of output sign +1 first.
        test_noise: Fresh noise, (n_test, Q, d).
    """

    setup: Setup
    d: int
    seed: int
    signal: Tensor
    noise: Tensor
    patches: Tensor
    clean: Tensor
    labels: Tensor
    first: Tensor
    test_noise: Tensor


def make_full_problem(setup: Setup, d: int, phi: float, seed: int) -> FullProblem:
    """Draw samples and first weights as vectors.

    Args:
        setup: What data and network are.
        d: Dimension d ≥ 1.
        phi: Strength ‖φ‖ > 0 of the signal.
        seed: Seed of at least 0.

    Raises:
        UserError: if the strength is not above 0.
    """
    if not phi > 0:
        raise UserError(f"phi must be above 0, got {phi}")
    draw = stream(setup, d, seed, _VECTORS)
    clean, labels = draw_labels(setup, draw)
    signal = np.zeros(d)
    signal[0] = phi
    noise = setup.sigma_p * draw.standard_normal((setup.n, setup.n_noises, d))
    first = setup.first_std(d) * draw.standard_normal((2 * setup.n_filters, d))
    patches = np.empty((setup.n, setup.n_patches, d))
    for i in range(setup.n):
        of_noise = [noise[i, 0]] * (setup.n_patches - 1) if setup.noise == "shared" else list(noise[i])
        place = draw.integers(setup.n_patches)
        patches[i] = [*of_noise[:place], clean[i] * signal, *of_noise[place:]]
    fresh = stream(setup, d, seed, _VECTORS + _TEST)
    test_noise = setup.sigma_p * fresh.standard_normal((setup.n_test, setup.n_noises, d))

    def tensor(values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=setup.dtype)

    return FullProblem(
        setup, d, seed, tensor(signal), tensor(noise), tensor(patches), tensor(clean), tensor(labels), tensor(first),
        tensor(test_noise),
    )  # fmt: skip


def reduce(full: FullProblem) -> Problem:
    """The same problem in coordinates of the span: an orthonormal basis of signal, noise and first weights."""
    setup = full.setup
    vectors = torch.cat([(full.signal / full.signal.norm())[None], full.noise.flatten(0, 1)]).double()
    rows = torch.cat([vectors, full.first.double()])
    basis, triangle = torch.linalg.qr(rows.T)
    across = triangle.T.numpy()
    fresh = (full.test_noise.flatten(0, 1).double() @ basis).T.numpy()
    return assemble(
        setup,
        (full.d,),
        (full.seed,),
        clean=full.clean[None].double().numpy(),
        labels=full.labels[None].double().numpy(),
        vectors=across[None, : len(vectors)],
        weights=across[None, len(vectors) :],
        test_noise=fresh[None],
    )


def outputs(setup: Setup, weights: Tensor, patches: Tensor) -> Tensor:
    """f = Σ_j (j·out) Σ_r Σ_p ReLU(⟨w_jr, x^(p)⟩) of samples (n, P, d), (n,)."""
    hidden = functional.relu(torch.einsum("npd,fd->nfp", patches, weights)).sum(-1)
    second = torch.ones(2 * setup.n_filters, dtype=weights.dtype)
    second[setup.n_filters :] = -1
    return setup.out * hidden @ second


def loss(full: FullProblem, weights: Tensor, omega: Tensor) -> Tensor:
    """Σ_i ω_i log(1 + e^{−y_i f_i})."""
    return (omega * -functional.logsigmoid(full.labels * outputs(full.setup, weights, full.patches))).sum()


def gradient(full: FullProblem, weights: Tensor, omega: Tensor) -> Tensor:
    """∇ of `loss` in the weights, (2m, d), by autograd."""
    at = weights.detach().requires_grad_()
    return torch.autograd.grad(loss(full, at, omega), at)[0]


def perturbed(full: FullProblem, weights: Tensor, omega: Tensor, tau: float, scaling: Scaling = "none") -> Tensor:
    """w + τ·T²g/‖Tg‖ with g = ∇ Σ ω_i ℓ_i; T is 1, the norm of the filter, or |w| element by element.

    Args:
        full: The problem.
        weights: w, (2m, d).
        omega: Sample weights, (n,).
        tau: Radius τ ≥ 0.
        scaling: "none" (SAM), "filter" or "element" (both ASAM; Kwon et al. 2021).

    Raises:
        UserError: for another scaling.
    """
    g = gradient(full, weights, omega)
    scales = {"none": 1.0, "filter": weights.norm(dim=1, keepdim=True), "element": weights.abs()}
    if scaling not in scales:
        raise UserError(f"scaling must be one of {', '.join(scales)}; got {scaling!r}")
    scaled = scales[scaling] * g
    norm = scaled.norm()
    return weights if norm == 0 else weights + tau * scales[scaling] * scaled / norm


def term_weights(full: FullProblem, alpha: float) -> tuple[Tensor, Tensor]:
    """ω of the two terms of NegGrad over all samples: α/n_R on retain, −(1−α)/n_F on forget."""
    setup = full.setup
    forget = (torch.arange(setup.n) < setup.n_forget).to(full.labels)
    return alpha * (1 - forget) / setup.n_retain, -(1 - alpha) * forget / max(1, setup.n_forget)


def neggrad_gradient(
    full: FullProblem, weights: Tensor, alpha: float, tau: float, perturb: str, scaling: Scaling = "none"
) -> Tensor:
    """The direction of one step of NegGrad, each choice of ε written out by itself.

    Args:
        full: The problem.
        weights: w, (2m, d).
        alpha: Weight α of the retain loss.
        tau: Radius τ.
        perturb: sgd, joint, ce, retain, sep or minmax.
        scaling: Metric of ε.

    Raises:
        UserError: for another choice.
    """
    retain, forget = term_weights(full, alpha)

    def g(at: Tensor, omega: Tensor) -> Tensor:
        return gradient(full, at, omega)

    def up(omega: Tensor) -> Tensor:
        return perturbed(full, weights, omega, tau, scaling)

    if perturb == "sgd":
        return g(weights, retain + forget)
    if perturb == "joint":
        return g(up(retain + forget), retain + forget)
    if perturb == "ce":
        return g(up(retain - forget), retain + forget)
    if perturb == "retain":
        return g(up(retain), retain) + g(weights, forget)
    if perturb == "sep":
        return g(up(retain), retain) + g(up(forget), forget)
    if perturb == "minmax":
        return g(up(retain), retain) + 2 * g(weights, forget) - g(up(forget), forget)
    raise UserError(f"the reference knows sgd, joint, ce, retain, sep and minmax; got {perturb!r}")


def neggrad(
    full: FullProblem,
    *,
    alpha: float,
    tau: float,
    perturb: str,
    eta: float,
    steps: int,
    scaling: Scaling = "none",
    weights: Tensor | None = None,
) -> Iterator[Tensor]:
    """The weights after each step of NegGrad, starting at the first weights or at those given."""
    w = full.first if weights is None else weights
    for _ in range(steps):
        w = w - eta * neggrad_gradient(full, w, alpha, tau, perturb, scaling)
        yield w


def train(full: FullProblem, *, tau: float, eta: float, steps: int, scaling: Scaling = "none") -> Tensor:
    """The weights after full-batch training on the mean loss of all samples; τ = 0 is gradient descent."""
    omega = torch.full_like(full.labels, 1.0 / full.setup.n)
    w = full.first
    for _ in range(steps):
        w = w - eta * gradient(full, perturbed(full, w, omega, tau, scaling) if tau else w, omega)
    return w


def solve_coefficients(
    full: FullProblem, weights: Tensor, reference: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """Signal and noise coefficients by least squares of w − w⁰ on jφ/‖φ‖² and ξ/‖ξ‖².

    Args:
        full: The problem.
        weights: w, (2m, d).
        reference: w⁰; the first weights, if left out.

    Returns:
        κ (2m,), ζ (2m, N), and the norm of what remains over that of w − w⁰.
    """
    since = (weights - (full.first if reference is None else reference)).double()
    noise = full.noise.flatten(0, 1).double()
    signal = full.signal.double()
    columns = torch.cat([(signal / signal.square().sum())[None], noise / noise.square().sum(1, keepdim=True)]).T
    solved = torch.linalg.lstsq(columns, since.T).solution
    rest = float((since.T - columns @ solved).norm() / since.norm())
    signs = torch.ones(2 * full.setup.n_filters, dtype=torch.float64)
    signs[full.setup.n_filters :] = -1
    return signs * solved[0], solved[1:].T, rest


def error_on_test(full: FullProblem, weights: Tensor) -> float:
    """Share of fresh samples on the wrong side, both signals for each noise; 0 counts as wrong."""
    setup, wrong = full.setup, []
    for sign in (1.0, -1.0):
        signal = (sign * full.signal).expand(setup.n_test, 1, -1)
        noise = full.test_noise.expand(-1, setup.n_patches - 1, -1)
        wrong.append((sign * outputs(setup, weights, torch.cat([signal, noise], dim=1)) <= 0).double().mean())
    return float(sum(wrong)) / 2
