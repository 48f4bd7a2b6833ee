"""`unsharp reproduce` as a user calls it, at its smallest."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch

import unsharp
from integration.helpers import call, done, read
from unsharp import data
from unsharp.data import DataConfig
from unsharp.recipes.paper import problems, run
from unsharp.subject import load_subject

SMALLEST = ("--seeds", 1, "--forget", "high", "--pretraining", "SGD", "--processes", 1, "--quiet", "--json")


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_figure_of_the_paper_is_made_and_found_again(tmp_path: Path) -> None:
    what = ("reproduce", "landscape", "--only", "NegGrad", *SMALLEST, "--out", tmp_path / "out")
    first = done(*what).json
    assert first["cells"] == 1
    assert first["failed"] == 0
    values = read(tmp_path / "out" / "reproduction.json")
    (row,) = values["rows"]
    surfaces = [
        row[f"{on}.{network}.standard_deviation"] for on in ("forget", "test") for network in ("original", "unlearned")
    ]
    assert all(value > 0 for value in surfaces)
    html = (tmp_path / "out" / "reproduction.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 1
    assert "unsharp reproduce landscape --size smoke --seeds 1 --forget high --only NegGrad" in html
    assert "not run" in html  # the claims, of whose variants one alone was asked for
    before = (tmp_path / "out" / "results.csv").read_bytes()
    assert done(*what).json == first
    assert (tmp_path / "out" / "results.csv").read_bytes() == before


@pytest.mark.slow  # the choice itself is tested apart; this is the way through the command
def test_settings_are_chosen_on_a_seed_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(task: problems.Task, where: problems.Where) -> problems.Problem:
        whole = problems._smoke(task, where)
        held_out = dataclasses.replace(whole.data, validation=10)
        return dataclasses.replace(whole, size="small", data=held_out, chosen=True)

    monkeypatch.setattr(problems, "_small", small)
    monkeypatch.setattr(run, "_prepare", lambda posed, where: write_scores(where.out))
    what = ("reproduce", "alpha", "--only", "SGD, α 0.9", "--size", "small", "--data-dir", tmp_path)
    out = tmp_path / "out"
    ahead = done(*what, *SMALLEST, "--out", out, "--dry-run").json
    assert ahead["choice"]["todo"] == {"train": 1, "retrain": 1, "unlearn": 2}
    assert ahead["grid"]["todo"] == {"train": 1, "retrain": 1, "unlearn": 1}
    done(*what, *SMALLEST, "--out", out)
    tried, (shown,) = table(out / "choice" / "results.csv"), table(out / "results.csv")
    best = max(tried, key=lambda row: float(row["tow"]))
    assert {row["seed"] for row in tried} == {"100"}
    assert shown["seed"] == "0"
    assert shown["setting.lr"] == best["setting.lr"]
    (chosen,) = [row for row in read(out / "reproduction.json")["chosen"] if row.get("chosen")]
    assert chosen["settings"]["lr"] == float(best["setting.lr"])


def write_scores(out: Path) -> None:
    from unsharp.recipes.quickstart import write_scores as write

    out.mkdir(parents=True, exist_ok=True)
    write(out)


def test_a_grid_is_judged_on_what_was_held_out(tmp_path: Path) -> None:
    source = DataConfig(name="digits", classes=4, per_class=50, validation=10)
    grid = {
        "data": source,
        "model": {"width": 4},
        "train": {"epochs": 2, "batch_size": 32},
        "settings": {"epochs": 1, "batch_size": 32},
        "forget": [{"random": 10}],
        "unlearn": [{"method": "neggrad", "rule": "none"}],
        "attacks": [],
        "keep_networks": True,
        "judged_on": "validation",
    }
    (row,) = unsharp.run_grid(grid, tmp_path, workers=1).rows
    splits = data.load(source)
    network = load_subject(tmp_path / "cells" / row["cell"] / "unlearned", torch.device("cpu")).model.eval()

    def accuracy(samples: data.Samples) -> float:
        right = 0
        for batch in data.evaluation_batches(samples, range(len(samples)), 64):
            right += int((network(batch.inputs).argmax(1) == batch.labels).sum())
        return 100 * right / len(samples)

    assert splits.validation is not None
    assert splits.test is not None
    assert row["test_accuracy"] == pytest.approx(accuracy(splits.validation))
    assert row["test_accuracy"] != pytest.approx(accuracy(splits.test))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("table2",), "not by number; the main table is methods"),
        (("method",), "did you mean 'methods'"),
        (("methods", "--size", "small"), "--data-dir"),
        (("methods", "--size", "paper"), "--scores"),
        (("methods", "--only", "NegGrad", "SCRUBS"), "did you mean 'SCRUB'"),
        (("methods", "--dry-run", "--retry-failed"), "leave --retry-failed out"),
    ],
)
def test_mistakes_end_with_2_before_any_work(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    answer = call("reproduce", *arguments, "--out", tmp_path / "out")
    assert answer.code == 2
    assert message in answer.err
    assert not (tmp_path / "out" / "cells").exists()


def test_without_a_name_it_says_which_there_are() -> None:
    found = done("reproduce", "--json").json["reproductions"]
    assert {"methods", "sharp-minmax", "imagenet"} <= {one["name"] for one in found}
