"""The signal–noise model of the paper, as something one can run: exact, batched, and independent of the dimension."""

from __future__ import annotations

from unsharp.theory.data import Problem, Setup, make_problem
from unsharp.theory.metrics import FirstTime, alpha_star, threshold
from unsharp.theory.model import State, error_on_test, start
from unsharp.theory.sweep import Grid, Sweep, phase_diagram
from unsharp.theory.track import activation_stats, kappa, summary, zeta
from unsharp.theory.unlearn import PERTURBATIONS, Plan, neggrad_weights, run

__all__ = [
    "PERTURBATIONS",
    "FirstTime",
    "Grid",
    "Plan",
    "Problem",
    "Setup",
    "State",
    "Sweep",
    "activation_stats",
    "alpha_star",
    "error_on_test",
    "kappa",
    "make_problem",
    "neggrad_weights",
    "phase_diagram",
    "run",
    "start",
    "summary",
    "threshold",
    "zeta",
]
