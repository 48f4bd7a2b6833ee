"""What theory predicts in closed form: radius, deactivation, signal strengths and weights of the retain loss.

The orders are those of the theorems as summarised; the constants were measured with this model, and the two forms for α
are heuristics of this project, fitted and then tested on other settings (docs/theory.md).
"""

from __future__ import annotations

import math

from unsharp.errors import UserError

SIGNAL_SGD = 1.05
"""Constant of the signal threshold of gradient descent, in the form with P − 1."""
SIGNAL_SAM = 1.4
"""Constant of the signal threshold of SAM."""
ALPHA_SGD, ALPHA_CE = 0.74, 1.25
"""Constants of the α thresholds of NegGrad from first weights."""
ALPHA_RETAIN = (1.0, 1.9)
"""What the threshold under SAM on the retain loss is of that under `ce`, measured."""


def sam_radius(m: int, batch: int, patches: int, sigma_p: float, d: float, c: float = 1.0) -> float:
    """Radius τ = c·m√B/(P σ_p √d) of the theorem on SAM (Chen et al. 2023, from notes on the paper)."""
    return c * m * math.sqrt(batch) / (patches * sigma_p * math.sqrt(d))


def first_std(d: float) -> float:
    """Standard deviation σ_0 = 1/√(3d) of torch's first convolution weights."""
    return 1.0 / math.sqrt(3.0 * d)


def deactivation_prob(tau: float, sigma_0: float, m: int, batch: int) -> float:
    """Share erf(τ/(σ_0√(2mB))) of active noise neurons that the ascent turns off at the first weights.

    ε shifts ⟨w, ξ⟩ of the active ones by about −τσ_p√d/√(mB), and ⟨w⁰, ξ⟩ is normal with deviation σ_0σ_p√d; for
    samples of equal weight (α = n_R/n under NegGrad), and noise that outweighs the signal in the gradient.
    """
    return math.erf(tau / (sigma_0 * math.sqrt(2.0 * m * batch)))


def sgd_signal_threshold(d: float, n: float, patches: int = 2, sigma_p: float = 1.0) -> float:
    """Strength 1.05·(d/n)^{1/4}(P − 1)σ_p above which gradient descent generalises: the theorem's order, measured."""
    return SIGNAL_SGD * (d / n) ** 0.25 * (patches - 1) * sigma_p


def sgd_signal_threshold_paper(d: float, n: float, patches: int = 2, sigma_p: float = 1.0, c1: float = 0.53) -> float:
    """The same in the paper's form C₁·d^{1/4}n^{−1/4}Pσ_p; C₁ = 0.53 is the measured constant at P = 2."""
    return c1 * d**0.25 * n**-0.25 * patches * sigma_p


def sam_signal_threshold(patches: int = 2, sigma_p: float = 1.0) -> float:
    """Strength 1.4·(P − 1)σ_p above which SAM generalises, whatever d and n: the Ω(1) of the theorem, measured."""
    return SIGNAL_SAM * (patches - 1) * sigma_p


def alpha_sgd(*, m: int, n: int, eta: float, steps: int, d: float, patches: int = 2, sigma_p: float = 1.0) -> float:
    """Largest 1 − α = 0.74·m n ln T/(ηT(P − 1)²σ_p²d) at which NegGrad from first weights still generalises."""
    return ALPHA_SGD * m * n * math.log(steps) / (eta * steps * ((patches - 1) * sigma_p) ** 2 * d)


def alpha_ce(
    *, m: int, n_forget: int, eta: float, steps: int, d: float, patches: int = 2, sigma_p: float = 1.0
) -> float:
    """The same under SAM whose ε ascends the un-negated loss: x = 1.25·m√n_F·ln(1/x)/(ηT(P − 1)²σ_p²√d)."""
    from scipy.special import lambertw

    if n_forget < 1:
        raise UserError(f"n_forget must be at least 1, got {n_forget}")
    k = ALPHA_CE * m * math.sqrt(n_forget) / (eta * steps * ((patches - 1) * sigma_p) ** 2 * math.sqrt(d))
    return k * float(lambertw(1.0 / k).real)


def snr(phi: float, d: float, patches: int = 2, sigma_p: float = 1.0) -> float:
    """Signal to noise, ‖φ‖/((P − 1)σ_p√d)."""
    return phi / ((patches - 1) * sigma_p * math.sqrt(d))


def benign_index(phi: float, d: float, n: float, patches: int = 2, sigma_p: float = 1.0) -> float:
    """n‖φ‖⁴/(d(P − 1)⁴σ_p⁴): gradient descent overfits benignly above about 1.2 = 1.05⁴."""
    return n * phi**4 / (d * ((patches - 1) * sigma_p) ** 4)
