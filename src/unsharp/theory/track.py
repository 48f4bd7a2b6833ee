"""What is tracked, exactly: signal and noise coefficients, and which neurons the ascent turns off (Lemma 3.1)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from unsharp.errors import UserError
from unsharp.theory.model import State
from unsharp.theory.unlearn import PERTURBATIONS, Plan, Weights, ascend

SETS = ("retain", "forget")
SIDES = ("same", "opposite")
FEWEST = 10
"""Active neurons below which a share of them is not stated."""


def kappa(state: State) -> Tensor:
    """Signal coefficients κ_jr = j‖φ‖²A_φ since the reference, (B, V, 2m)."""
    since = state.coefficients[..., 0] - state.reference[..., 0]
    return state.problem.filter_signs * state.phi[:, None] * since  # A_φ = A_0/‖φ‖, the direction having length 1


def zeta(state: State, convention: Literal["plain", "chen"] = "plain") -> Tensor:
    """Noise coefficients ζ_jri = ‖ξ_i‖²A_i since the reference, (B, V, 2m, N).

    Args:
        state: The networks.
        convention: "plain", as w − w⁰ = jκφ/‖φ‖² + Σ ζξ/‖ξ‖²; "chen" has 1/(P−1) before the sum (Chen et al. 2023,
            from notes on the paper).

    Raises:
        UserError: for another convention.
    """
    if convention not in ("plain", "chen"):
        raise UserError(f"convention must be plain or chen, got {convention!r}")
    since = state.coefficients[..., 1:] - state.reference[..., 1:]
    lengths = state.problem.gram.diagonal(dim1=-2, dim2=-1)[:, 1:]
    factor = 1 if convention == "plain" else state.problem.setup.n_patches - 1
    return factor * lengths[:, None, None, :] * since


def groups(state: State) -> dict[tuple[str, str], Tensor]:
    """1 where a filter and a noise vector belong to a group, (B, 1, 2m, N): retain or forget, j = y or j = −y."""
    problem = state.problem
    agree = problem.filter_signs[:, None] * problem.labels[:, None, None, :] > 0
    side = {"same": agree, "opposite": ~agree}
    member = {"retain": ~problem.forget, "forget": problem.forget}
    n_noises = problem.setup.n_noises
    return {(s, t): (side[t] & member[s]).repeat_interleave(n_noises, -1).to(problem.gram) for s in SETS for t in SIDES}


def summary(state: State) -> dict[str, Tensor]:
    """What is recorded of the networks but for the test error, (B, V) each; NaN where a set is empty.

    `kappa_mean`, `kappa_max`; `zeta_{retain,forget}_{same,opposite}`, the mean over filters and samples with j = y and
    j = −y; `{retain,forget}_{error,loss,margin}`; `train_error` and `train_loss` over all samples.
    """
    found = {"kappa_mean": kappa(state).mean(-1), "kappa_max": kappa(state).amax(-1)}
    noise = zeta(state)
    for (name, side), member in groups(state).items():
        found[f"zeta_{name}_{side}"] = (noise * member).sum((-1, -2)) / member.sum((-1, -2))
    point, forget = state.point(), state.problem.forget
    wrong = (point.margins <= 0).to(point.margins)
    for name, chosen in (("retain", ~forget), ("forget", forget), ("train", torch.ones_like(forget))):
        found[f"{name}_error"] = wrong[..., chosen].mean(-1)
        found[f"{name}_loss"] = point.losses[..., chosen].mean(-1)
        if name != "train":
            found[f"{name}_margin"] = point.margins[..., chosen].mean(-1)
    return found


def activation_stats(state: State, plan: Plan, weights: Weights, mask: Tensor | None = None) -> dict[str, Tensor]:
    """What ε does to the noise neurons: Lemma 3.1 as a quantity, (B, V) each.

    For retain and forget, and j = y ("same") and j = −y ("opposite"), over all filters, samples and noise vectors of
    the group: `deact` is the share of ⟨w, ξ⟩ > 0 with ⟨w + ε, ξ⟩ ≤ 0, NaN below 10 active ones; `react` the share
    of ⟨w, ξ⟩ ≤ 0 with ⟨w + ε, ξ⟩ > 0, likewise; `shift` the mean of ⟨ε, ξ⟩; `active` the share of ⟨w, ξ⟩ > 0. ε is
    that with which the group's own gradient is taken.

    Args:
        state: The networks.
        plan: How they would step.
        weights: Sample weights of the step.
        mask: Forget filters of "sharp_minmax".
    """
    taken = ascend(state, plan, weights, mask)
    before = taken.point.noise
    of_set = {}
    for part, offset in zip(PERTURBATIONS[plan.perturb], taken.offsets):
        for name, sign in zip(SETS, part.terms):
            if sign:
                of_set[name] = torch.zeros_like(before) if offset is None else offset[..., 1:]
    on = before > 0
    found: dict[str, Tensor] = {}
    for (name, side), member in groups(state).items():
        after = before + of_set[name] > 0
        n_on, n_off = (on * member).sum((-1, -2)), (~on * member).sum((-1, -2))
        shares = {"deact": (on & ~after, n_on), "react": (~on & after, n_off)}
        for what, (changed, of) in shares.items():
            share = (changed * member).sum((-1, -2)) / of
            found[f"{what}_{name}_{side}"] = torch.where(of >= FEWEST, share, torch.nan)
        n_all = member.sum((-1, -2))
        found[f"shift_{name}_{side}"] = (of_set[name] * member).sum((-1, -2)) / n_all
        found[f"active_{name}_{side}"] = n_on / n_all
    return found
