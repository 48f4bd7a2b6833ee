"""The recipe on parameter selection at a small size, and its page against figures worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unsharp import masks
from unsharp.errors import UserError
from unsharp.recipes import parameter_selection as recipe


def test_a_small_run_gives_facts_and_a_page_and_is_not_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = {name: grid[:1] for name, grid in recipe.GRIDS.items()}
    grids["second_order"] = [{"damping": 0.1, "hessian_samples": 20, "cg_steps": 2}]
    monkeypatch.setattr(recipe, "GRIDS", grids)
    monkeypatch.setattr(recipe, "PROBES", (2, 8))
    monkeypatch.setattr(recipe, "N_PROBES", 1)
    monkeypatch.setattr(recipe, "N_TRAIN", 60)
    options = recipe.Options(out=str(tmp_path), seeds=(3,), fractions=(0.05,), epochs=40)
    recipe.main(options)
    (fact,) = json.loads((tmp_path / "facts.json").read_text())
    rows = {(row["method"], row["select"]): row for row in fact["rows"]}
    assert set(rows) == {(m, s) for m in recipe.GRIDS for s in (*masks.SELECTIONS, "all")}
    for (_, select), row in rows.items():
        expected = 1 if select == "all" else 650 / 17226 if select == "last_layer" else round(0.05 * 17226) / 17226
        assert row["marked"] == pytest.approx(expected)
        assert row["leaked"] == 0
        assert 0 <= row["gradient_share"] <= 1 + 1e-9
    assert fact["closed_form_error"] < 1e-12
    assert all(error > 0 for error in fact["diagonal_errors"].values())
    page = (tmp_path / "page.md").read_text()
    assert "### second_order" in page
    monkeypatch.setattr(recipe, "facts_of", None)  # a seed that is done is not run again
    recipe.main(options)
    assert (tmp_path / "page.md").read_text() == page


def run(tmp_path: Path, **options: Any) -> dict[int, dict[str, Any]]:
    recipe.main(recipe.Options(out=str(tmp_path), **options))
    return {fact["seed"]: fact for fact in json.loads((tmp_path / "facts.json").read_text())}


def test_facts_of_other_seeds_are_kept_and_those_of_other_options_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(seed: int, options: recipe.Options) -> dict[str, Any]:
        ran.append(seed)
        return facts([70.0 + seed], [60])[0] | {"seed": seed, "options": recipe.asked(options)}

    ran: list[int] = []
    monkeypatch.setattr(recipe, "facts_of", made)
    run(tmp_path, seeds=(1, 2))
    run(tmp_path, seeds=(2, 3))
    assert "seeds 2, 3;" in (tmp_path / "page.md").read_text()
    assert list(run(tmp_path, seeds=(3, 1))) == [1, 2, 3]
    assert "seeds 3, 1;" in (tmp_path / "page.md").read_text()
    assert ran == [1, 2, 3]
    before = (tmp_path / "facts.json").read_text()
    for other in ({"epochs": 7}, {"inputs": "standard"}, {"fractions": (0.05,)}):
        with pytest.raises(UserError, match=r"seed 1 .*other options.*another --out"):
            run(tmp_path, seeds=(1, 4), **other)
    assert (tmp_path / "facts.json").read_text() == before
    run(tmp_path / "new", seeds=(1,), epochs=7, fractions=(0.05, 0.5))
    page = (tmp_path / "new" / "page.md").read_text()
    assert page.startswith("`python -m unsharp.recipes.parameter_selection --out DIR --fractions 0.05 0.5 --epochs 7`;")


def test_what_cannot_be_judged_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "facts_of", None)
    with pytest.raises(UserError, match=r"fractions must have 0\.05"):
        run(tmp_path, fractions=(0.2, 0.5))
    with pytest.raises(UserError, match="at least one seed"):
        run(tmp_path, seeds=())


def test_a_method_that_breaks_at_every_rate_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*args: Any, **options: Any) -> None:
        raise FloatingPointError

    monkeypatch.setattr(recipe, "N_TRAIN", 60)
    problem = recipe.problem_of(3, recipe.Options(out=str(tmp_path), epochs=1))
    monkeypatch.setattr(recipe.unlearning, "run", breaks)
    with pytest.raises(UserError, match=r"first_order on 0\.05 of the weights by ggn broke .* every rate"):
        recipe._best(problem, "first_order", "ggn", 0.05, 3)


def facts(hessian: list[float], random: list[float], share: float = 0.3, leaked: int = 0) -> list[dict[str, Any]]:
    def row(method: str, select: str, fraction: float, test: float, kept: float) -> dict[str, Any]:
        figures = {"test": test, "restored": (test - 50) / 40, "gradient_share": kept, "leaked": leaked}
        return {"method": method, "select": select, "fraction": fraction, "marked": fraction} | figures

    return [
        {
            "seed": seed,
            "options": recipe.asked(recipe.Options(out="")),
            "learnt": 100.0,
            "wrong": 50.0,
            "right": 90.0,
            "closed_form_error": 1e-15,
            "diagonal_errors": {"10": 1.0, "40": 0.5, "160": 0.25},
            "rows": [
                row(method, *figures)
                for method in recipe.GRIDS
                for figures in (("all", 1.0, 80.0, 1.0), ("hessian", 0.05, h, share), ("random", 0.05, r, 0.05))
            ],
        }
        for seed, (h, r) in enumerate(zip(hessian, random))
    ]


def checks(found: list[dict[str, Any]]) -> list[str]:
    return [line.split(" | ")[-1].strip(" |") for line in recipe.acceptance(found).splitlines()[2:]]


def test_the_acceptance_is_that_of_the_figures() -> None:
    assert checks(facts([76, 78, 77], [60, 61, 62])) == ["yes"] * 5
    text = recipe.acceptance(facts([76, 78, 77], [60, 61, 62]))
    assert "power -0.50" in text
    assert "6.0, 6.0, 6.0" in text
    assert "0.90 (0.68" in text  # (77 - 50)/40 over (80 - 50)/40
    assert checks(facts([70, 75, 73], [60, 61, 62]))[3] == "no"  # 0.76
    assert checks(facts([76, 78, 77], [60, 61, 62], share=0.24))[2] == "no"
    assert checks(facts([76, 78, 77], [60, 61, 62], leaked=1))[1] == "no"
    slow = facts([76, 78], [60, 61])
    for fact in slow:
        fact["diagonal_errors"] = {"10": 1.0, "1000": 0.5}
        fact["closed_form_error"] = 2e-6
    assert checks(slow)[0] == "no"
    assert checks(slow)[4] == "no"


def test_nothing_is_divided_by_no_gain() -> None:
    found = facts([76, 78], [60, 61])
    for fact in found:
        fact["rows"][0]["restored"] = -0.1
    assert checks(found)[3] == "no"
    assert "all weights -0.10" in recipe.acceptance(found)


def test_better_than_chance_is_said_by_the_interval_of_the_paired_difference() -> None:
    for ours, word in (
        ([76, 78, 77], "yes"),
        ([50, 52, 51], "worse"),
        ([76, 50, 62], "undecided"),
        ([76], "undecided"),
    ):
        table = recipe.table(facts(ours, [60, 61, 62][: len(ours)]), "first_order")
        line = next(line for line in table.splitlines() if line.startswith("| hessian"))
        assert f"| {word} |" in line
    line = next(line for line in table.splitlines() if line.startswith("| all"))
    assert line == "| all | 100 % | 80.0 | — | — | 0.75 | 1 |"
