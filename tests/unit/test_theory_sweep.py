"""Sweeps: tidy rows that equal runs done by hand, tables of α, means, figures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from unsharp.errors import UserError
from unsharp.progress import Progress
from unsharp.theory import figures, thresholds
from unsharp.theory.data import Setup, make_problem
from unsharp.theory.metrics import alpha_star
from unsharp.theory.model import error_on_test, start
from unsharp.theory.sweep import Grid, Sweep, alpha_table, lemma, means, phase_diagram, plain
from unsharp.theory.track import activation_stats, summary
from unsharp.theory.unlearn import Plan, neggrad_weights, run

SETUP = Setup(n=10, n_forget=3, n_filters=3, n_test=50)
GRID = Grid(d=(100, 300), phi=(2.0, 5.0), alpha=(0.7, 0.9), seeds=2, seed_base=4)
PLANS = (Plan(steps=6), Plan(perturb="ce", steps=6, c=0.5))


class Counting(Progress):
    def __init__(self) -> None:
        self.total = self.done = 0

    def start(self, label: str, total: int, done: int = 0) -> None:
        self.total = total

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n


@pytest.mark.parametrize("begin", ["init", "sgd_pretrained", "sam_pretrained"])
def test_rows_are_those_of_single_runs(begin: str) -> None:
    sweep = Sweep(setup=SETUP, grid=GRID, plans=PLANS, start=begin, pretrain_steps=5, every=3)
    counted = Counting()
    rows = phase_diagram(sweep, progress=counted)
    assert len(rows) == 2 * 2 * 2 * 2 * 2 * 3  # d, ‖φ‖, α, seeds, plans, records
    assert counted.done == counted.total == 12 + (0 if begin == "init" else 5)
    for d, phi, alpha, seed, plan in itertools.product((100, 300), (2.0, 5.0), (0.7, 0.9), (4, 5), PLANS):
        state = start(make_problem(SETUP, [d], [seed]), [phi])
        if begin != "init":
            run(state, Plan(perturb="joint" if begin == "sam_pretrained" else "sgd", steps=5))
            state.reset_reference()
        found: list[dict[str, float]] = []

        def watch(taken: int, now: Any, found: list[dict[str, float]] = found) -> None:
            if taken % 3 == 0:
                figures = {**summary(now), "test_error": error_on_test(now)}
                found.append({"step": taken, **{k: float(v[0, 0]) for k, v in figures.items()}})

        run(state, plan, [alpha], watch)
        mine = [r for r in rows if (r["d"], r["phi"], r["alpha"], r["seed"], r["perturb"]) ==
                (d, phi, alpha, seed, plan.perturb)]  # fmt: skip
        assert [r["step"] for r in mine] == [0, 3, 6]
        for row, expected in zip(mine, found):
            for name, value in expected.items():
                assert row[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
            assert row["start"] == begin
            assert row["optimiser"] == ("sgd" if plan.perturb == "sgd" else "sam")
            radius = None if plan.perturb == "sgd" else 0.5 * 3 * 10**0.5 / (2 * d**0.5)
            assert row["tau"] == (None if radius is None else pytest.approx(radius))
            assert row["c"] == (None if radius is None else 0.5)


def test_pretraining_has_no_alpha_and_no_forget_figures() -> None:
    setup = Setup(n=10, n_filters=3, n_test=20)
    plans = (Plan(steps=3), Plan(perturb="joint", steps=3, tau=0.03, batch_size=4))
    rows = phase_diagram(Sweep(setup=setup, grid=GRID, plans=plans, phase="pretrain"))
    assert len(rows) == 2 * 2 * 2 * 2
    assert {r["alpha"] for r in rows} == {None}
    assert all(math.isnan(r["forget_error"]) for r in rows)
    assert {(r["c"], round(r["tau"], 6)) for r in rows if r["perturb"] == "joint"} == {(None, 0.03)}
    assert all(r["forget_error"] is None and r["test_error"] is not None for r in plain(rows))


def test_the_lemma_at_the_first_step_and_on_average() -> None:
    grid = Grid(d=(200,), phi=(3.0,), alpha=(0.8,), seeds=2)
    setup = Setup(n=20, n_forget=5, n_filters=6, n_test=1)
    plan = Plan(perturb="joint", steps=4, c=0.3)
    counted = Counting()
    sweep = Sweep(setup=setup, grid=grid, plans=(plan,), pretrain_steps=6)
    rows = lemma(sweep, ["init", "sam_pretrained"], progress=counted)
    assert counted.done == counted.total == 4 + 6 + 4
    assert len(rows) == 2 * 2 * 2 * 4  # starts, seeds, times, groups
    for name in ("init", "sam_pretrained"):
        state = start(make_problem(setup, [200], range(2)), [3.0])
        if name != "init":
            run(state, Plan(perturb="joint", steps=6))
        seen = []
        weights = neggrad_weights(state.problem, [0.8])

        def watch(taken: int, now: Any, seen: list[Any] = seen, weights: Any = weights) -> None:
            if taken < 4:
                seen.append(activation_stats(now, plan, weights))

        run(state, plan, [0.8], watch)
        for row in (r for r in rows if r["start"] == name):
            values = [float(s[f"deact_{row['set']}_{row['side']}"][row["seed"], 0]) for s in seen]
            kept = [v for v in values if not math.isnan(v)]
            expected = values[0] if row["when"] == "first" else np.mean(kept) if kept else math.nan
            assert row["deact"] == pytest.approx(expected, nan_ok=True, abs=1e-6)
            tau = thresholds.sam_radius(6, 20, 2, 1.0, 200, 0.3)
            assert row["erf"] == pytest.approx(thresholds.deactivation_prob(tau, 1 / 600**0.5, 6, 20))


def test_the_table_of_alpha_carries_the_forget_error_there() -> None:
    grid = Grid(d=(400, 1600), phi=(6.0,), alpha=tuple(1 - x for x in np.geomspace(0.005, 0.8, 12)), seeds=2)
    plans = (Plan(steps=60), Plan(perturb="ce", steps=60), Plan(perturb="joint", steps=60))
    setup = Setup(n=20, n_forget=5, n_test=200)
    rows = phase_diagram(Sweep(setup=setup, grid=grid, plans=plans))
    table = alpha_table(rows, setup, plans)
    assert len(table) == 2 * 2 * 3
    assert sum(math.isfinite(r["one_less_alpha"]) for r in table) >= 6
    for row in table:
        mine = [r for r in rows if all(r[k] == row[k] for k in ("d", "seed", "perturb"))]
        mine.sort(key=lambda r: -r["alpha"])
        grid_, errors = [1 - r["alpha"] for r in mine], [r["test_error"] for r in mine]
        star = float(alpha_star(grid_, np.array(errors)))
        assert row["one_less_alpha"] == pytest.approx(star, nan_ok=True)
        if not math.isnan(star):
            expected = np.interp(math.log(star), np.log(grid_), [r["forget_error"] for r in mine])
            assert row["forget_error"] == pytest.approx(expected)
        how: dict[str, Any] = {"m": 10, "eta": 0.1, "steps": 60, "d": row["d"]}
        expected = {"sgd": thresholds.alpha_sgd(n=20, **how), "ce": thresholds.alpha_ce(n_forget=5, **how)}
        assert row["closed_form"] == expected.get(row["perturb"])
    pretrained = [{**r, "start": "sgd_pretrained"} for r in rows]
    assert {r["closed_form"] for r in alpha_table(pretrained, setup, plans)} == {None}


def test_means_carry_t_intervals_and_count_what_they_leave_out() -> None:
    values = [0.1, 0.4, 0.25, math.nan]
    rows = [{"d": 1, "seed": i, "x": v} for i, v in enumerate(values)] + [{"d": 2, "seed": 0, "x": math.nan}]
    first, second = means(rows, ["x"], ["d"])
    half = stats.t.ppf(0.975, 2) * np.std(values[:3], ddof=1) / 3**0.5
    assert first["x"] == {"mean": pytest.approx(0.25), "half_width": pytest.approx(half), "n": 3}
    assert second["x"] == {"mean": None, "half_width": None, "n": 0}


# --- figures ----------------------------------------------------------------------------------------------------------


def drawn(figure: Any) -> str:
    """All text of a figure."""
    import matplotlib.text

    return " | ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text))


def test_a_map_shows_its_numbers_its_thresholds_and_its_forget_error() -> None:
    rows = phase_diagram(Sweep(setup=SETUP, grid=GRID, plans=PLANS))
    rows = [r for r in rows if r["alpha"] == 0.9]
    figure = figures.maps(rows, SETUP)
    images = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    assert len(images) == 4
    for image, (name, perturb) in zip(images, itertools.product(("test_error", "forget_error"), ("sgd", "ce"))):
        for (i, d), (k, phi) in itertools.product(enumerate((100, 300)), enumerate((2.0, 5.0))):
            mine = [r[name] for r in rows if (r["d"], r["phi"], r["perturb"]) == (d, phi, perturb)]
            assert float(image[i, k]) == pytest.approx(np.mean(mine))  # type: ignore[index]
    text = drawn(figure)
    for part in (
        "signal strength ‖φ‖",
        "dimension d",
        "1.05 (d/n)^(1/4)",
        "1.4 (P − 1)",
        "α = 0.9",
        "start: init",
        "2 seeds",
    ):
        assert part in text
    cells = itertools.product(("test_error", "forget_error"), ("sgd", "ce"), (100, 300), (2.0, 5.0))
    pairs = [[r[f] for r in rows if [r["perturb"], r["d"], r["phi"]] == key] for f, *key in cells]
    half = [stats.t.ppf(0.975, 1) * np.std(pair, ddof=1) / 2**0.5 for pair in pairs]
    assert f"intervals: median {np.median(half):.2f}, largest {max(half):.2f}" in text
    alone = [r for r in rows if r["seed"] == rows[0]["seed"]]
    assert "interval" not in drawn(figures.maps(alone, SETUP))


def test_the_lines_of_a_map_stand_where_the_closed_forms_are() -> None:
    grid = Grid(d=(400, 1600, 6400), phi=(1.0, 2.0, 4.0, 8.0), seeds=1)
    setup = Setup(n=10, n_filters=3, n_test=20)
    rows = phase_diagram(Sweep(setup=setup, grid=grid, plans=(Plan(steps=1),), phase="pretrain"))
    ax = figures.maps(rows, setup).axes[0]
    lines = {str(line.get_label()).split(":")[0]: np.asarray(line.get_xydata()) for line in ax.lines}
    for row, d in enumerate((400, 1600, 6400)):
        at = lines["SGD"][np.abs(lines["SGD"][:, 1] - row).argmin()]
        expected = np.interp(thresholds.sgd_signal_threshold(d, 10), (1, 2, 4, 8), range(4))
        assert at[0] == pytest.approx(expected, abs=0.03)
    assert set(lines["SAM"][:, 0].round(9)) == {round(float(np.interp(1.4, (1, 2), (0, 1))), 9)}


def test_every_figure_is_drawn_and_says_what_it_shows(tmp_path: Any) -> None:
    grid = Grid(d=(400, 1600), phi=(6.0,), alpha=tuple(1 - x for x in np.geomspace(0.005, 0.8, 8)), seeds=3)
    plans = (Plan(steps=40), Plan(perturb="ce", steps=40))
    setup = Setup(n=20, n_forget=5, n_test=100)
    rows = phase_diagram(Sweep(setup=setup, grid=grid, plans=plans))
    alpha = figures.alpha(alpha_table(rows, setup, plans))
    for part in ("1 − α*", "forget error at α*", "order √(d/n)", "closed form", "start: init"):
        assert part in drawn(alpha)
    one = Grid(d=(400,), phi=(6.0,), alpha=(0.8,), seeds=3)
    way = phase_diagram(Sweep(setup=setup, grid=one, plans=plans, every=10))
    trajectories = figures.trajectories(way)
    for part in ("test error", "forget error", "κ", "ζ", "passes", "test error 0.1", "95 %"):
        assert part in drawn(trajectories)
    found = lemma(Sweep(setup=setup, grid=one, plans=plans[1:], pretrain_steps=5), ["init", "sgd_pretrained"])
    turned_off = figures.deactivation(found)
    for part in ("R, j = y", "F, j = −y", "erf", "start: sgd_pretrained", "95 %"):
        assert part in drawn(turned_off)
    heights = [bar.get_height() for bar in turned_off.axes[0].patches]
    mine = [r["deact"] for r in found if r["start"] == "init" and r["when"] == "first"]
    groups = [np.nanmean(mine[i::4]) for i in (0, 2, 1, 3)]
    assert heights == pytest.approx(groups)
    figures.write_figure(turned_off, tmp_path)
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert "<svg" in (tmp_path / "figure.svg").read_text()


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, Callable[[], object]] = {
    "d must name": lambda: Grid(d=(), phi=(1.0,)),
    "seeds must be at least 1": lambda: Grid(d=(9,), phi=(1.0,), seeds=0),
    "phi must be above 0": lambda: Grid(d=(9,), phi=(0.0,)),
    "d must exceed": lambda: Sweep(setup=SETUP, grid=Grid(d=(9,), phi=(1.0,)), plans=PLANS),
    "unknown start 'trained'": lambda: Sweep(setup=SETUP, grid=GRID, plans=PLANS, start="trained"),
    "plans must name": lambda: Sweep(setup=SETUP, grid=GRID, plans=()),
    "every must be": lambda: Sweep(setup=SETUP, grid=GRID, plans=PLANS, every=0),
    "pretrain_steps must be": lambda: Sweep(setup=SETUP, grid=GRID, plans=PLANS, pretrain_steps=0),
    "pretraining knows sgd and joint, got 'ce'": lambda: Sweep(setup=SETUP, grid=GRID, plans=PLANS, phase="pretrain"),
    "pretraining starts at init": lambda: Sweep(
        setup=SETUP, grid=GRID, plans=PLANS[:1], phase="pretrain", start="sgd_pretrained"
    ),
    "needs forget samples": lambda: Sweep(setup=Setup(n_filters=3), grid=GRID, plans=PLANS),
    "sgd has no ε": lambda: lemma(Sweep(setup=SETUP, grid=GRID, plans=PLANS), ["init"]),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_refused_before_any_work(message: str) -> None:
    with pytest.raises(UserError, match=message):
        MISTAKES[message]()
