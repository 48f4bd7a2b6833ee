"""The measurements behind the acceptance checks, each run once for a set of seeds and shared by the checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unsharp.theory import reference
from unsharp.theory.data import Problem, Setup, make_problem
from unsharp.theory.metrics import FirstTime, alpha_star, at_alpha_star, threshold
from unsharp.theory.model import State, error_on_test, start
from unsharp.theory.sweep import array
from unsharp.theory.track import activation_stats, kappa, summary, zeta
from unsharp.theory.unlearn import Plan, neggrad_weights, run

PHI = tuple(np.arange(0.5, 10.01, 0.25).tolist())
"""Strengths over which thresholds are looked for, in units of (P − 1)σ_p."""
FURTHER = tuple(np.arange(0.5, 16.01, 0.25).tolist())
"""The same where thresholds lie higher."""
ONE_LESS_ALPHA = {
    "sgd": tuple(np.geomspace(2e-4, 0.16, 24).tolist()),
    "ce": tuple(np.geomspace(0.015, 0.24, 16).tolist()),
    "retain": tuple(np.geomspace(0.02, 0.4, 16).tolist()),
}
"""1 − α over which the largest bearable one is looked for, for each method."""
UNLEARN = Setup(n=40, n_forget=8)
D3, D5 = (1000, 4000, 16000), (1000, 2000, 4000, 8000, 16000)
MAP_D, MAP_PHI = (1000, 2000, 4000, 8000, 12000, 16000, 20000), (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0)
SIZES = (20, 40, 80, 160)
METHODS = ("sgd", "ce", "retain")
MATCHED_STEPS = {"sgd": 1000, "joint": 2000}
"""Steps of unlearning in which the forget error may reach 0.5, by how the network was trained before."""
COARSE = 25
SHARED = ("signal_thresholds", "lemma", "from_first_weights", "tolerance_in_d", "tolerance_in_n", "matched")
"""Measurements that several checks read."""


@dataclass(frozen=True)
class Tolerance:
    """The largest bearable 1 − α by method: it and the forget error there, (k, seeds) each, k dimensions or sizes."""

    star: dict[str, np.ndarray] = field(default_factory=dict)
    forget: dict[str, np.ndarray] = field(default_factory=dict)


class Bench:
    """Measurements with the seeds from a number on.

    Args:
        seed_base: The first seed.
        n_seeds: Seeds of most measurements.
        device: Where the reduced model computes.
    """

    def __init__(self, seed_base: int = 0, n_seeds: int = 8, device: torch.device | str = "cpu") -> None:
        self.base, self.n_seeds, self.device = seed_base, n_seeds, device
        for name in SHARED:
            setattr(self, name, cache(getattr(self, name)))

    def seeds(self, n: int | None = None) -> range:
        """The first seeds of this bench."""
        return range(self.base, self.base + (self.n_seeds if n is None else n))

    def problem(self, setup: Setup, d: Sequence[int], n_seeds: int | None = None) -> Problem:
        """Problems of these dimensions and of this bench's seeds."""
        return make_problem(setup, d, self.seeds(n_seeds), self.device)

    # --- exactness ----------------------------------------------------------------------------------------------------

    def against_autograd(self, phi: float) -> float:
        """Largest difference of any weight after 30 steps: coefficients against autograd on the same vectors."""
        setup = Setup(n=8, n_forget=2, n_filters=4, n_test=1, precision="float64")
        full = reference.make_full_problem(setup, 2000, phi, self.base)
        state = start(reference.reduce(full), [phi])
        how: dict[str, Any] = {"perturb": "joint", "tau": 0.3, "eta": 0.2, "steps": 30}
        run(state, Plan(**how), [0.7])
        *_, weights = reference.neggrad(full, alpha=0.7, **how)
        vectors = torch.cat([(full.signal / phi)[None], full.noise.flatten(0, 1)])
        return float((full.first + state.coefficients[0, 0] @ vectors - weights).abs().max())

    def against_least_squares(self, precision: str) -> dict[str, float]:
        """What least squares leaves unexplained of a run with vectors, and how far its κ, ζ are from those tracked."""
        setup = Setup(n=20, n_forget=4, n_test=1, precision=precision)  # type: ignore[arg-type]
        full = reference.make_full_problem(setup, 2000, 4.0, self.base)
        plan = Plan(perturb="joint", steps=50)
        state = start(reference.reduce(full), [4.0])
        tau = float(plan.radius(state.problem, setup.n))
        run(state, plan, [0.9])
        *_, weights = reference.neggrad(full, alpha=0.9, tau=tau, perturb="joint", eta=plan.eta, steps=plan.steps)
        solved_kappa, solved_zeta, rest = reference.solve_coefficients(full, weights)

        def apart(solved: Tensor, tracked: Tensor) -> float:
            return float((solved - tracked).abs().max() / solved.abs().max())

        return {
            "residual": rest,
            "kappa": apart(solved_kappa, kappa(state)[0, 0].double()),
            "zeta": apart(solved_zeta, zeta(state)[0, 0].double()),
        }

    def against_vectors(self, d: int, phi: float) -> dict[str, np.ndarray]:
        """Test errors after 100 steps of GD and SAM, reduced and with vectors, on problems drawn apart, (seeds,)."""
        plans = {"gd": Plan(steps=100), "sam": Plan(perturb="joint", steps=100)}
        problem, found = self.problem(Setup(), [d]), {}
        for rule, plan in plans.items():
            state = start(problem, [phi])
            run(state, plan)
            found[f"{rule}_reduced"] = _errors(state)[0, :, 0]
        tau = {"gd": 0.0, "sam": float(plans["sam"].radius(problem, problem.setup.n)[0])}
        full: dict[str, list[float]] = {rule: [] for rule in plans}
        for seed in self.seeds():
            other = reference.make_full_problem(problem.setup, d, phi, seed)
            for rule, plan in plans.items():
                weights = reference.train(other, tau=tau[rule], eta=plan.eta, steps=plan.steps)
                full[rule].append(reference.error_on_test(other, weights))
        return found | {f"{rule}_vectors": np.array(errors) for rule, errors in full.items()}

    # --- Lemma 3.1 ----------------------------------------------------------------------------------------------------

    def lemma(self, perturb: str, pretrained: str | None = None) -> dict[tuple[int, float], dict[str, np.ndarray]]:
        """Shares of neurons that ε turns off, by (d, c): group → (seeds,), at first weights or after pretraining."""
        found = {}
        problem = self.problem(UNLEARN, D3, None if pretrained is None else 10)
        state = start(problem, [4.0])
        if pretrained is not None:
            run(state, Plan(perturb=pretrained, steps=200))
        for c in (0.25, 0.5, 1.0) if pretrained is None else (1.0,):
            stats = activation_stats(state, Plan(perturb=perturb, c=c), neggrad_weights(problem, [0.8]))
            for d in D3:
                rows = [k for k, x in enumerate(problem.d) if x == d]
                found[d, c] = {k: array(v[rows, 0]) for k, v in stats.items() if k.startswith("deact")}
        return found

    # --- pretraining --------------------------------------------------------------------------------------------------

    def signal_thresholds(
        self,
        d: tuple[int, ...],
        plan: Plan,
        setup: Setup,
        alpha: float | None = None,
        phi: tuple[float, ...] = PHI,
    ) -> np.ndarray:
        """‖φ‖ at test error 0.1, (dimensions, seeds); with α after NegGrad from first weights."""
        scale = (setup.n_patches - 1) * setup.sigma_p
        strengths = [p * scale for p in phi]
        state = start(self.problem(setup, d), strengths)
        run(state, plan, None if alpha is None else [alpha])
        return threshold(strengths, _errors(state, len(d)))

    def kappa_ratio(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Strengths 1 to 10, and mean κ of SAM over that of GD in pretraining at d = 8000, n = 40, (seeds, 10)."""
        strengths, means = np.arange(1.0, 11.0), []
        for perturb in ("joint", "sgd"):
            state = start(self.problem(Setup(n=40, n_test=1), [8000]), strengths.tolist())
            run(state, Plan(perturb=perturb, steps=steps))
            means.append(array(kappa(state).mean(-1)))
        return strengths, means[0] / means[1]

    # --- NegGrad ------------------------------------------------------------------------------------------------------

    def from_first_weights(self) -> dict[str, dict[str, np.ndarray]]:
        """NegGrad from first weights at d = 8000, ‖φ‖ = 7, α = 0.95, T = 200: method → figure → (seeds,)."""
        found = {}
        for perturb in (*METHODS, "joint"):
            state = start(self.problem(UNLEARN, [8000]), [7.0])
            run(state, Plan(perturb=perturb), [0.95])
            figures = {**summary(state), "test_error": error_on_test(state)}
            found[perturb] = {k: array(v[:, 0]) for k, v in figures.items()}
        return found

    def tolerance_in_d(self, phi: float) -> Tolerance:
        """1 − α* for each d of `D5` at n = 40."""
        return self._tolerance(UNLEARN, D5, phi)

    def tolerance_in_n(self, phi: float) -> Tolerance:
        """1 − α* at d = 8000 for n = 20, 40, 80, 160, a fifth of them to be forgotten."""
        parts = [self._tolerance(Setup(n=n, n_forget=n // 5), [8000], phi) for n in SIZES]
        return Tolerance(
            {m: np.concatenate([p.star[m] for p in parts]) for m in METHODS},
            {m: np.concatenate([p.forget[m] for p in parts]) for m in METHODS},
        )

    def _tolerance(self, setup: Setup, d: Sequence[int], phi: float) -> Tolerance:
        found, problem = Tolerance(), self.problem(setup, d)
        for perturb in METHODS:
            grid = ONE_LESS_ALPHA[perturb]
            state = start(problem, [phi] * len(grid))
            run(state, Plan(perturb=perturb), [1 - x for x in grid])
            errors = _errors(state, len(d))
            forget = array(summary(state)["forget_error"]).reshape(errors.shape)
            found.star[perturb] = alpha_star(grid, errors)
            found.forget[perturb] = at_alpha_star(grid, errors, forget)
        return found

    def from_pretrained(self) -> dict[str, dict[str, np.ndarray]]:
        """400 steps from a GD-pretrained network at d = 8000, ‖φ‖ = 7, α = 0.8: method → error → (seeds,)."""
        before = start(self.problem(UNLEARN, [8000]), [7.0])
        run(before, Plan(steps=200))
        found = {}
        for perturb in ("sgd", "joint"):
            state = before.copy()
            state.reset_reference()
            run(state, Plan(perturb=perturb, steps=400), [0.8])
            forget = summary(state)["forget_error"][:, 0]
            found[perturb] = {"test": array(error_on_test(state)[:, 0]), "forget": array(forget)}
        return found

    def matched(self, d: int, phi: float, pretrain: str, perturb: str, c: float = 1.0) -> dict[str, np.ndarray]:
        """What is seen when the forget error first reaches 0.5 at α = 0.8; 20 seeds, NaN where it does not.

        `test` and `steps` when looked at after every step; `coarse`, the test error when looked at after every 25.
        """
        state, seen, coarse = self._pretrained(d, phi, pretrain), FirstTime(0.5), FirstTime(0.5, COARSE)

        def watch(taken: int, now: State) -> None:
            seen(taken, now)
            coarse(taken, now)

        run(state, Plan(perturb=perturb, steps=MATCHED_STEPS[pretrain], c=c), [0.8], watch)
        assert seen.steps is not None
        steps = array(seen.steps[:, 0])
        return {
            "test": array(seen.test_error(state)[:, 0]),
            "coarse": array(coarse.test_error(state)[:, 0]),
            "steps": np.where(steps < 0, np.nan, steps),
        }

    def _pretrained(self, d: int, phi: float, pretrain: str) -> State:
        state = start(self.problem(UNLEARN, [d], 20), [phi])
        run(state, Plan(perturb=pretrain, steps=200))
        state.reset_reference()
        return state

    def maps(self) -> dict[str, np.ndarray]:
        """Test errors of GD and SAM (τ = 0.03, and the theorem's) over 77 cells and 5 seeds: (d, seeds, ‖φ‖)."""
        plans = {"gd": Plan(), "sam_fixed": Plan(perturb="joint", tau=0.03), "sam": Plan(perturb="joint")}
        found = {}
        for name, plan in plans.items():
            state = start(self.problem(Setup(), MAP_D, 5), MAP_PHI)
            run(state, plan)
            found[name] = _errors(state, len(MAP_D))
        return found


def _errors(state: State, n_dimensions: int = 1) -> np.ndarray:
    """Test errors, (dimensions, seeds, variants)."""
    found = array(error_on_test(state))
    return found.reshape(n_dimensions, -1, found.shape[-1])
