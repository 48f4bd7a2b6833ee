"""The paper's tables as recipes: what they ask for, how claims are decided, and what pages say."""

from __future__ import annotations

import dataclasses
import itertools
import types
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from unsharp.errors import UserError
from unsharp.recipes.paper import REPRODUCTIONS, SIZES, Asked, Claim, Compared, Figure, Reproduction, Where
from unsharp.recipes.paper.page import Section, _markdown, decide
from unsharp.recipes.paper.problems import TUNED_ON
from unsharp.recipes.paper.run import _choice_grid, _grid, _settings, mean_over_cells
from unsharp.report.page import page
from unsharp.sweep.grid.config import _check_outcome


def asked(name: str, size: str, out: Path, **cut: object) -> Asked:
    where = Where(out=out, data_dir=str(out), scores="scores.npz:memorization")
    return Asked(name=name, size=size, where=where, **cut)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(REPRODUCTIONS))
@pytest.mark.parametrize("size", SIZES)
def test_every_reproduction_is_a_grid_at_every_size(name: str, size: str, tmp_path: Path) -> None:
    one = asked(name, size, tmp_path)
    posed, what = one.problem(), one.what
    blocks = [c.block(c.paper) for c in what.compared]
    grid = _grid(one, posed, blocks)
    assert set(grid.variants()) == {c.name for c in what.compared}
    assert set(grid.pretrainings()) == set(what.pretraining)
    axes = {"variant": grid.variants(), "pretraining": grid.pretrainings(), "forget": grid.forget_sets()}
    picks = [pick for claim in what.claims for pick in (claim.better, claim.worse)] + [p.of for p in what.published]
    for pick in picks:
        for axis, value in pick.items():
            assert value in axes[axis], (axis, value)
    columns = {figure.column for figure in what.figures}
    assert {claim.figure for claim in what.claims} | {one.figure for one in what.published} <= columns
    for figure in what.figures:
        if not figure.column.startswith(("test.", "forget.")):  # measured beyond the grid
            _check_outcome(figure.column, grid.attacks, grid.features)
    if posed.chosen:
        choice = _choice_grid(one, posed)
        points = sum(int(np.prod([len(v) for v in c.choose.values()])) for c in what.compared)
        assert len(choice.variants()) == points
        assert choice.seeds == (TUNED_ON,)
        assert TUNED_ON not in grid.seeds
        assert choice.judged_on == "validation"
        assert grid.judged_on == "test"
        assert len(choice.pretrainings()) == len(choice.forget_sets()) == 1


def rows_of(rng: np.random.Generator, seeds: int) -> list[dict[str, object]]:
    axes = itertools.product(("a", "b", "c"), ("SGD", "SAM"), ("high", "low"), range(seeds))
    return [
        {"variant": v, "pretraining": p, "forget": f, "seed": s, "tow": rng.normal(50, 9), "gap": rng.normal(0, 3)}
        for v, p, f, s in axes
    ]


@pytest.mark.parametrize("draw", range(5))
def test_claims_are_decided_by_paired_t_intervals_of_the_whole_family(draw: int) -> None:
    rng = np.random.default_rng(draw)
    rows = rows_of(rng, seeds=4)
    what = Reproduction(
        title="t",
        shows="s",
        figures=(
            Figure(title="ToW", column="tow", better="higher"),
            Figure(title="gap", column="gap", better="nearer zero"),
        ),
        compared=(),
        claims=(
            Claim(claim="C1", says="", better={"variant": "a"}, worse={"variant": "b"}),
            Claim(
                claim="C2",
                says="",
                better={"variant": "c", "pretraining": "SAM"},
                worse={"variant": "c", "pretraining": "SGD"},
                figure="gap",
            ),
        ),
    )
    if draw % 2:  # a clear difference, in the sense of the second claim
        for row in rows:
            if row["variant"] == "c":
                row["gap"] = (0.1 if row["pretraining"] == "SAM" else -9.0) + rng.normal(0, 0.01)

    size = abs  # gaps of two signs do not cancel

    def mean(seed: int, column: str, turn: object = float, **pick: str) -> float:
        values = [turn(r[column]) for r in rows if r["seed"] == seed and all(r[k] == v for k, v in pick.items())]
        return sum(values) / len(values)  # type: ignore[arg-type]

    first = np.array([mean(s, "tow", variant="a") - mean(s, "tow", variant="b") for s in range(4)])
    second = np.array(
        [
            mean(s, "gap", size, variant="c", pretraining="SGD") - mean(s, "gap", size, variant="c", pretraining="SAM")
            for s in range(4)
        ]
    )
    for found, d in zip(decide(what, rows), (first, second)):
        low, high = scipy_stats.t.interval(1 - 0.05 / 2, 3, loc=d.mean(), scale=d.std(ddof=1) / 2)
        assert found.effect is not None
        assert found.effect.difference.mean == pytest.approx(d.mean())
        assert (found.effect.simultaneous.low, found.effect.simultaneous.high) == pytest.approx((low, high))
        expected = "holds" if low > 0 else "does not hold: the opposite does" if high < 0 else "undecided"
        assert found.verdict == expected
    if draw % 2:
        assert decide(what, rows)[1].verdict == "holds"
        turned = dataclasses.replace(what.claims[1], better=what.claims[1].worse, worse=what.claims[1].better)
        assert decide(dataclasses.replace(what, claims=(turned,)), rows)[0].verdict.startswith("does not hold")
    one_seed = [row for row in rows if row["seed"] == 0]
    assert {found.verdict for found in decide(what, one_seed)} == {"too few seeds"}
    assert {found.verdict for found in decide(what, [])} == {"not run"}


def test_gaps_of_two_signs_do_not_cancel() -> None:
    gaps = {"a": (10.0, -10.0, 0.0), "b": (1.0, 1.0, 1.0)}
    rows = [
        {"variant": v, "pretraining": "SGD", "forget": f, "seed": s, "gap": gap + s / 100}
        for v, of in gaps.items()
        for f, gap in zip(("high", "mid", "low"), of)
        for s in range(3)
    ]
    claim = Claim(claim="C6", says="", better={"variant": "a"}, worse={"variant": "b"}, figure="gap")
    figure = Figure(title="gap", column="gap", better="nearer zero")
    what = Reproduction(title="", shows="", figures=(figure,), compared=(), claims=(claim,))
    (found,) = decide(what, rows)
    assert found.verdict.startswith("does not hold")
    assert found.effect is not None
    assert found.effect.difference.mean == pytest.approx(1.01 - 20.01 / 3, abs=0.02)


def test_more_merit_is_better_whatever_a_figure_asks_for() -> None:
    better = {"higher": (2.0, 1.0), "lower": (1.0, 2.0), "nearer zero": (-1.0, 2.0)}
    for asks, (good, bad) in better.items():
        figure = Figure(title="", column="", better=asks)  # type: ignore[arg-type]
        assert figure.merit(good) > figure.merit(bad)


def test_one_claim_among_many_needs_more_than_one_alone() -> None:
    # Differences 2, 3, 4: the interval is [0.5, 5.5] alone, and [-5.1, 11.1] together with nine others.
    spread = (1.0, 2.0, 3.0)
    rows = [
        {"variant": v, "pretraining": "SGD", "forget": "high", "seed": s, "tow": 1.0 + d if v == "a" else 0.0}
        for v in ("a", "b")
        for s, d in enumerate(spread)
    ]
    claim = Claim(claim="C1", says="", better={"variant": "a"}, worse={"variant": "b"})
    figures = (Figure(title="", column="tow", better="higher"),)

    def verdict(n: int) -> str:
        return decide(Reproduction(title="", shows="", figures=figures, compared=(), claims=(claim,) * n), rows)[
            0
        ].verdict

    assert (verdict(1), verdict(10)) == ("holds", "undecided")


def test_a_seed_that_lacks_a_cell_takes_part_in_no_mean() -> None:
    rows = rows_of(np.random.default_rng(0), seeds=3)
    lost = next(r for r in rows if r["variant"] == "a" and r["seed"] == 1)
    lost["tow"] = None
    assert set(mean_over_cells(rows, {"variant": "a"}, "tow")) == {0, 2}
    assert set(mean_over_cells(rows, {"variant": "b"}, "tow")) == {0, 1, 2}


def test_the_point_with_the_best_first_figure_is_taken(tmp_path: Path) -> None:
    one = asked("sharp-minmax", "small", tmp_path)
    posed = one.problem()
    rng = np.random.default_rng(3)
    mean: dict[str, float | None] = {}

    def run(grid: object, out: Path) -> object:
        assert out == tmp_path / "choice"
        mean.update({label: float(rng.normal()) for label in grid.variants()})  # type: ignore[attr-defined]
        mean[next(iter(mean))] = None  # one that came to no end
        summary = [{"variant": label, "mean": value} for label, value in mean.items()]
        return types.SimpleNamespace(summary=summary, failures="")

    blocks, tried = _settings(one, posed, run)  # type: ignore[arg-type]
    assert len(tried) == len(mean)
    assert sum(row.get("chosen", False) for row in tried) == len(blocks)
    variants = _choice_grid(one, posed).variants()
    for block in blocks:
        own = {
            label: mean[label] for label, v in variants.items() if v.name == block["name"] and mean[label] is not None
        }
        best = variants[max(own, key=lambda label: own[label])].settings  # type: ignore[arg-type,return-value]
        assert (block["alpha"], block["lr"]) == (best["alpha"], best["lr"])
    grid = _grid(one, posed, blocks)
    assert grid.seeds == (0, 1, 2)
    assert list(grid.variants()) == [block["name"] for block in blocks]


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({"only": ("NegGrad", "nothing")}, "variant 'nothing'"),
        ({"forget": ("middle",)}, "forget set 'middle'"),
        ({"pretraining": ("Adam",)}, "pretraining 'Adam'"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"only": ()}, "at least one variant"),
    ],
)
def test_what_there_is_not_is_refused(cut: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        asked("sharp-minmax", "smoke", tmp_path, **cut).problem()


@pytest.mark.parametrize(("size", "given", "message"), [("small", {}, "--data-dir"), ("paper", {}, "--scores")])
def test_data_and_scores_are_asked_for(size: str, given: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        Asked(name="methods", size=size, where=Where(out=tmp_path, **given)).problem()  # type: ignore[arg-type]


def test_pages_show_text_as_text() -> None:
    hostile = "<script>alert(1)</script> | x"
    numbers = Section(title=hostile, text=hostile, heads=("", hostile), lines=((hostile, hostile),))
    points = Section(title="points", points=(hostile,))
    parts = {"headline": hostile, "lead": [hostile], "sections": [numbers, points], "pictures": []}
    html = page("reproduction.html", title=hostile, **parts, sortable=True)  # type: ignore[arg-type]
    assert "<script>alert" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 10
    assert _markdown("t", [], [numbers]).count("\\| x") == 3


def test_a_variant_says_its_settings_at_each_size() -> None:
    one = Compared(name="n", method="neggrad", rule="sam", fixed={"rho": 0.1}, paper={"alpha": 0.99})
    assert one.block(one.paper) == {"name": "n", "method": "neggrad", "rule": "sam", "rho": 0.1, "alpha": 0.99}
