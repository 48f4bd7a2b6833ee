"""Grids of dimensions, strengths, weights and seeds, run side by side; the results as tidy rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unsharp.errors import UserError, unknown
from unsharp.progress import SILENT, Progress
from unsharp.stats import mean_interval
from unsharp.theory import thresholds
from unsharp.theory.data import Problem, Setup, check_grid, make_problem
from unsharp.theory.metrics import alpha_star, at_alpha_star
from unsharp.theory.model import State, error_on_test, start
from unsharp.theory.track import SETS, SIDES, activation_stats, summary
from unsharp.theory.unlearn import PERTURBATIONS, Plan, check_alpha, forget_filters, neggrad_weights, run

STARTS = {"init": None, "sgd_pretrained": "sgd", "sam_pretrained": "joint"}
"""Where unlearning starts, and how the network was trained before."""
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The cells.

    Args:
        d: Dimensions.
        phi: Strengths ‖φ‖ > 0 of the signal.
        alpha: Weights α in [0, 1] of the retain loss; without meaning in pretraining.
        seeds: Number of seeds, at least 1.
        seed_base: The first seed, at least 0.
    """

    d: tuple[int, ...]
    phi: tuple[float, ...]
    alpha: tuple[float, ...] = (0.95,)
    seeds: int = 8
    seed_base: int = 0

    def __post_init__(self) -> None:
        for name in ("d", "phi", "alpha"):
            if not getattr(self, name):
                raise UserError(f"{name} must name at least one value")
        if self.seeds < 1:
            raise UserError(f"seeds must be at least 1, got {self.seeds}")
        if not all(p > 0 and math.isfinite(p) for p in self.phi):
            raise UserError(f"phi must be above 0, got {min(self.phi)}")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A grid and what is done in each cell.

    Args:
        setup: What data and network are.
        grid: The cells.
        plans: Ways to train or to unlearn, each run on the same data.
        phase: "pretrain" trains on all samples, "neggrad" unlearns.
        start: Where unlearning starts: "init", "sgd_pretrained" or "sam_pretrained". The training before takes step
            size, batches and a fixed τ from the first plan; else SAM has the theorem's radius there.
        pretrain_steps: Steps of the training before, at least 1.
        every: Passes between two records; None records the end alone.
    """

    setup: Setup
    grid: Grid
    plans: tuple[Plan, ...]
    phase: Literal["pretrain", "neggrad"] = "neggrad"
    start: str = "init"
    pretrain_steps: int = 200
    every: int | None = None

    def __post_init__(self) -> None:
        check_start(self.start)
        check_grid(self.setup, self.grid.d, range(self.grid.seed_base, self.grid.seed_base + self.grid.seeds))
        if not self.plans:
            raise UserError("plans must name at least one way to train or unlearn")
        if self.pretrain_steps < 1:
            raise UserError(f"pretrain_steps must be at least 1, got {self.pretrain_steps}")
        if self.every is not None and self.every < 1:
            raise UserError(f"every must be at least 1, got {self.every}")
        if self.phase == "neggrad":
            check_alpha(self.setup, self.grid.alpha)
        elif named := [p.perturb for p in self.plans if p.perturb not in ("sgd", "joint")]:
            raise UserError(f"pretraining knows sgd and joint, got {named[0]!r}")
        elif self.start != "init":
            raise UserError(f"pretraining starts at init, got {self.start!r}")

    @property
    def variants(self) -> list[tuple[float, float | None]]:
        """(‖φ‖, α) of the cells that share data; α is None in pretraining."""
        alphas = self.grid.alpha if self.phase == "neggrad" else (None,)
        return list(itertools.product(self.grid.phi, alphas))

    @property
    def passes(self) -> int:
        """Passes of all plans together, for a bar."""
        before = 0 if STARTS[self.start] is None else self.pretrain_steps
        return before + sum(plan.steps for plan in self.plans)


def check_start(name: str) -> None:
    """Refuse an unknown start. Raises: UserError."""
    if name not in STARTS:
        raise unknown("start", name, STARTS)


def problem_of(sweep: Sweep, device: torch.device | str = "cpu") -> Problem:
    """The data of a sweep."""
    seeds = range(sweep.grid.seed_base, sweep.grid.seed_base + sweep.grid.seeds)
    return make_problem(sweep.setup, sweep.grid.d, seeds, device)


def started(sweep: Sweep, problem: Problem, phi: Sequence[float], watch: Any = None, name: str | None = None) -> State:
    """The networks at the start of a sweep, their coefficients counting from there.

    Args:
        sweep: What is done.
        problem: Its data.
        phi: Strength of the signal in each variant.
        watch: Called after each pass of the training before.
        name: Another start than that of the sweep.
    """
    state = start(problem, phi)
    before = STARTS[name or sweep.start]
    if before is not None:
        first = sweep.plans[0]
        how = Plan(
            perturb=before, steps=sweep.pretrain_steps, eta=first.eta, tau=first.tau, batch_size=first.batch_size
        )
        run(state, how, watch=watch)
        state.reset_reference()
    return state


def phase_diagram(sweep: Sweep, device: torch.device | str = "cpu", progress: Progress = SILENT) -> list[Row]:
    """Run every cell under every plan.

    Args:
        sweep: Grid and plans.
        device: Where to compute.
        progress: Told of each pass.

    Returns:
        A row for each cell, plan and record: d, phi, alpha, n, n_forget, seed, optimiser, perturb, start, c, tau, step
        (passes taken) and the figures of `track.summary` with `test_error`. Figures that do not exist (of forget
        samples where there are none) are NaN.
    """
    problem = problem_of(sweep, device)
    phi, alpha = zip(*sweep.variants)
    progress.start("networks", sweep.passes)
    state = started(sweep, problem, phi, _ticking(progress))
    rows: list[Row] = []
    for plan in sweep.plans:
        mine = state.copy()

        def record(taken: int, now: State, plan: Plan = plan) -> None:
            if taken:
                progress.advance()
            last = taken == plan.steps
            if last or (sweep.every is not None and taken % sweep.every == 0):
                rows.extend(_rows(sweep, plan, taken, now))

        run(mine, plan, None if sweep.phase == "pretrain" else alpha, record)
    progress.finish()
    return rows


def _ticking(progress: Progress) -> Any:
    def watch(taken: int, state: State) -> None:
        if taken:
            progress.advance()

    return watch


def _rows(sweep: Sweep, plan: Plan, taken: int, state: State) -> list[Row]:
    found = {**summary(state), "test_error": error_on_test(state)}
    figures = {name: array(values) for name, values in found.items()}
    about = {"start": sweep.start, "step": taken}
    return [
        row | about | {name: float(values[b, v]) for name, values in figures.items()}
        for row, b, v in _cells(sweep, plan, state.problem)
    ]


def _cells(sweep: Sweep, plan: Plan, problem: Problem) -> list[tuple[Row, int, int]]:
    """What names each cell, with its place among problems and variants."""
    seen = sweep.setup.n if plan.batch_size is None else _seen(sweep, plan.batch_size)
    radius = array(plan.radius(problem, seen))[:, 0]
    sam = any(part.ascends is not None for part in PERTURBATIONS[plan.perturb])
    cells = []
    for (b, (d, seed)), (v, (phi, alpha)) in itertools.product(
        enumerate(zip(problem.d, problem.seed)), enumerate(sweep.variants)
    ):
        row: Row = {"d": d, "phi": phi, "alpha": alpha, "n": sweep.setup.n, "n_forget": sweep.setup.n_forget}
        row |= {"seed": seed, "optimiser": "sam" if sam else "sgd", "perturb": plan.perturb}
        row |= {"c": plan.c if sam and plan.tau is None else None, "tau": float(radius[b]) if sam else None}
        cells.append((row, b, v))
    return cells


def _seen(sweep: Sweep, size: int) -> int:
    """Samples of a whole batch, of retain and forget together in NegGrad."""
    setup = sweep.setup
    if sweep.phase == "pretrain":
        return min(size, setup.n)
    return min(size, setup.n_retain) + min(size, setup.n_forget)


# --- Lemma 3.1 --------------------------------------------------------------------------------------------------------


def lemma(
    sweep: Sweep, starts: Sequence[str], device: torch.device | str = "cpu", progress: Progress = SILENT
) -> list[Row]:
    """What ε does to noise neurons, at the first step of unlearning and on average over all of them.

    Args:
        sweep: Grid and plans; one α and one strength.
        starts: Where unlearning starts.
        device: Where to compute.
        progress: Told of each pass.

    Returns:
        A row for each cell, plan, start, time ("first", "mean"), set (retain, forget) and side (same: j = y,
        opposite): `deact`, `react`, `shift`, `active`, and `erf`, the closed form for `deact` at first weights.

    Raises:
        UserError: for an unknown start, or a plan without ε.
    """
    for name in starts:
        check_start(name)
    for plan in sweep.plans:
        if all(part.ascends is None for part in PERTURBATIONS[plan.perturb]):
            raise UserError(
                f"{plan.perturb} has no ε to look at; take {', '.join(p for p in PERTURBATIONS if p != 'sgd')}"
            )
    problem, rows = problem_of(sweep, device), []
    phi, alpha = zip(*sweep.variants)
    trained = sum(sweep.pretrain_steps for name in starts if STARTS[name] is not None)
    progress.start("networks", trained + len(starts) * sum(plan.steps for plan in sweep.plans))
    for name in starts:
        state = started(sweep, problem, phi, _ticking(progress), name)
        for plan in sweep.plans:
            first, mean = _followed(state.copy(), plan, alpha, progress)
            for when, stats in (("first", first), ("mean", mean)):
                rows += _lemma_rows(sweep, plan, problem, {"start": name, "when": when}, stats)
    progress.finish()
    return rows


def _followed(
    state: State, plan: Plan, alpha: Sequence[float], progress: Progress
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The statistics before the first step, and their means over all steps, leaving NaN out."""
    weights = neggrad_weights(state.problem, alpha)
    regions = any(part.region for part in PERTURBATIONS[plan.perturb])
    mask = forget_filters(state, plan.fraction) if regions else None
    first = activation_stats(state, plan, weights, mask)
    total = {name: torch.zeros_like(values) for name, values in first.items()}
    count = {name: torch.zeros_like(values) for name, values in first.items()}

    def watch(taken: int, now: State) -> None:
        if taken:
            progress.advance()
        if taken < plan.steps:
            for name, values in activation_stats(now, plan, weights, mask).items():
                total[name] += values.nan_to_num(0.0)
                count[name] += values.isfinite()

    run(state, plan, alpha, watch)
    return first, {name: total[name] / count[name] for name in first}


def _lemma_rows(sweep: Sweep, plan: Plan, problem: Problem, about: Row, stats: Mapping[str, Tensor]) -> list[Row]:
    setup, rows = sweep.setup, []
    figures = {name: array(values) for name, values in stats.items()}
    for row, b, v in _cells(sweep, plan, problem):
        erf = thresholds.deactivation_prob(row["tau"], setup.first_std(row["d"]), setup.n_filters, setup.n)
        for name, side in itertools.product(SETS, SIDES):
            shares = {
                what: float(figures[f"{what}_{name}_{side}"][b, v]) for what in ("deact", "react", "shift", "active")
            }
            rows.append(row | about | {"set": name, "side": side} | shares | {"erf": erf})
    return rows


# --- α ----------------------------------------------------------------------------------------------------------------


def alpha_table(rows: Sequence[Row], setup: Setup, plans: Sequence[Plan], level: float = 0.1) -> list[Row]:
    """1 − α* of each seed, with the forget error there and the closed form where there is one.

    Args:
        rows: Rows of `phase_diagram` for one strength and one start, over a grid of α.
        setup: What data and network are; n and n_forget are read from the rows.
        plans: How was unlearned, for step size and passes.
        level: Test error that is borne.

    Returns:
        A row for each d, n, method and seed: `one_less_alpha` (NaN outside the grid), `forget_error` there, and
        `closed_form` (`thresholds.alpha_sgd`, `alpha_ce`; from first weights, for the level 0.1), None elsewhere.
    """
    import pandas as pd

    found: list[Row] = []
    table: Any = pd.DataFrame(rows)
    table["one_less_alpha"] = 1 - table["alpha"]
    how = {plan.perturb: plan for plan in plans}
    for (d, n, n_forget, perturb, seed), group in table.groupby(["d", "n", "n_forget", "perturb", "seed"], sort=False):
        ordered = group.sort_values("one_less_alpha")
        grid, errors = ordered["one_less_alpha"].to_numpy(), ordered["test_error"].to_numpy()
        star = float(alpha_star(grid, errors, level))
        there = float(at_alpha_star(grid, errors, ordered["forget_error"].to_numpy(), level))
        row: Row = {"d": int(d), "phi": ordered["phi"].iloc[0], "n": int(n), "n_forget": int(n_forget)}
        row |= {"perturb": perturb, "seed": int(seed)}
        row |= {"start": ordered["start"].iloc[0], "one_less_alpha": star, "forget_error": there}
        plan = how[str(perturb)]
        known = row["start"] == "init" and level == 0.1 and plan.c == 1 and plan.tau is None
        found.append(row | {"closed_form": _closed_form(row, setup, plan) if known else None})
    return found


def _closed_form(row: Row, setup: Setup, plan: Plan) -> float | None:
    how: dict[str, Any] = {"m": setup.n_filters, "eta": plan.eta, "steps": plan.steps, "d": row["d"]}
    how |= {"patches": setup.n_patches, "sigma_p": setup.sigma_p}
    if row["perturb"] == "sgd":
        return thresholds.alpha_sgd(n=row["n"], **how)
    return thresholds.alpha_ce(n_forget=row["n_forget"], **how) if row["perturb"] in ("ce", "retain") else None


def means(rows: Sequence[Row], figures: Sequence[str], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Mean over seeds of some figures for each cell, with the half-width of the 95 % t interval and the count.

    Args:
        rows: Tidy rows with a seed.
        figures: Columns to average; NaN is left out, and counted.
        keys: Columns that name a cell.

    Returns:
        For each cell its keys, and for each figure `mean`, `half_width` (None for one seed) and `n`.
    """
    cells: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault(tuple(row[k] for k in keys), []).append(row)
    found = []
    for cell, mine in cells.items():
        entry: dict[str, Any] = dict(zip(keys, cell))
        for name in figures:
            kept = [row[name] for row in mine if row[name] is not None and math.isfinite(row[name])]
            interval = mean_interval(kept) if kept else None
            entry[name] = {
                "mean": None if interval is None else interval.mean,
                "half_width": None if interval is None else interval.half_width,
                "n": len(kept),
            }
        found.append(entry)
    return found


def array(values: Tensor) -> np.ndarray:
    """The numbers as float64 on the host."""
    return values.detach().cpu().double().numpy()


def plain(rows: Sequence[Row]) -> list[Row]:
    """Rows as JSON has them: None for what is not a number."""
    return [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]
