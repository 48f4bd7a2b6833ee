"""The index of a directory: what it says is what the runs say, whatever came, changed or went since it was written."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import run

from unsharp import index as indexing
from unsharp.artifacts import perform
from unsharp.commands.index import list_runs, quick, report_all
from unsharp.errors import UserError
from unsharp.index import INDEX_FILE, read_index
from unsharp.report.groups import group
from unsharp.report.overview import mean_intervals, records, render
from unsharp.stats import mean_interval


def keep(path: Path, facts: dict[str, Any]) -> None:
    def work(workspace: Any) -> None:
        workspace.write_json("about.json", {k: v for k, v in facts.items() if k != "metrics"})
        workspace.write_json("metrics.json", facts["metrics"])

    perform(path, "evaluate", {"unlearn": facts["unlearn"]}, work)


def test_corrected_samples_are_in_no_group_with_removed_ones(tmp_path: Path) -> None:
    for seed in range(2):
        keep(tmp_path / f"removed-{seed}", run(seed))
        keep(tmp_path / f"corrected-{seed}", run(seed, corrections={"digest": f"{seed:064x}", "n": 3}))
    index = read_index(tmp_path)
    of = {name: found["group"] for name, found in index.runs.items()}
    assert of["removed-0"] == of["removed-1"] != of["corrected-0"] == of["corrected-1"]
    assert {group["title"] for group in index.groups.values()} == {"NegGrad", "NegGrad, corrected"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two settings of three seeds, a cell that holds an evaluation, and runs that hold none."""
    for alpha in (0.5, 0.6):
        for seed in range(3):
            keep(tmp_path / "runs" / f"{alpha}" / f"seed-{seed}", run(seed, alpha=alpha, accuracy=80 + seed**2))
    cell = run(7, method="scrub")
    perform(tmp_path / "runs" / "cell", "cell", {"function": "x:y"}, lambda w: w.write_json("result.json", cell))
    perform(tmp_path / "runs" / "original", "train", {}, lambda w: w.write_json("metrics.json", {"a": 1}))
    return tmp_path / "runs"


def test_the_index_says_what_the_runs_say(root: Path) -> None:
    found = read_index(root)
    assert found.read == len(found.runs) == 8
    again = read_index(root)
    assert again.read == 0
    assert (again.runs, again.groups) == (found.runs, found.groups)
    facts = [run(seed, alpha=alpha, accuracy=80 + seed**2) for alpha in (0.5, 0.6) for seed in range(3)]
    by_hand = {g.label: g for g in group([*facts, run(7, method="scrub")]) if g.kind == "unlearned"}
    rows = {row["label"]: row for row in records(again)}
    assert rows.keys() == by_hand.keys()
    for label, row in rows.items():
        values = [v["forget_accuracy"] for v in by_hand[label].values]
        expected = mean_interval(values)
        assert (row["n"], row["forget_accuracy_mean"]) == (len(values), pytest.approx(expected.mean))
        assert row["forget_accuracy_low"] == (None if expected.low is None else pytest.approx(expected.low))
        gaps = mean_interval([g["forget_accuracy"] for g in by_hand[label].gaps if g is not None])
        assert row["forget_accuracy_gap_mean"] == pytest.approx(gaps.mean)


def test_intervals_of_many_groups_are_those_of_each() -> None:
    draw = np.random.default_rng(0)
    groups: list[list[float | None]] = [draw.normal(size=draw.integers(1, 6)).tolist() for _ in range(50)]
    groups += [[1.0, None], []]
    for values, found in zip(groups, mean_intervals(groups), strict=True):
        if not values or None in values:
            assert found == (None,) * 4
            continue
        one = mean_interval([v for v in values if v is not None])
        expected = (one.mean, one.low, one.high, one.half_width)
        assert found == tuple(None if x is None else pytest.approx(x, abs=1e-12) for x in expected)


def test_what_came_changed_and_went_is_noticed(root: Path) -> None:
    read_index(root)
    shutil.rmtree(root / "0.5" / "seed-0")
    shutil.rmtree(root / "0.5" / "seed-1")
    keep(root / "0.5" / "seed-1", run(1, alpha=0.5, accuracy=10.0))
    keep(root / "0.7" / "deep" / "new", run(0, alpha=0.7))
    (root / ".hidden.partial").mkdir()
    found = read_index(root)
    assert found.read == 2
    assert set(found.runs) == {
        "0.5/seed-1", "0.5/seed-2", "0.6/seed-0", "0.6/seed-1", "0.6/seed-2", "0.7/deep/new", "cell", "original"
    }  # fmt: skip
    assert found.runs["0.5/seed-1"]["figures"]["forget_accuracy"] == 10.0
    shutil.rmtree(root / "0.7")
    assert len(read_index(root).groups) == 3


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": 0, "runs": 3}', None])
def test_a_damaged_or_lost_index_is_made_anew(root: Path, damage: str | None) -> None:
    before = read_index(root)
    (root / INDEX_FILE).unlink() if damage is None else (root / INDEX_FILE).write_text(damage)
    after = read_index(root)
    assert (after.read, after.runs) == (8, before.runs)
    assert json.loads((root / INDEX_FILE).read_text())["runs"] == before.runs


def test_a_directory_that_cannot_be_written_is_read_all_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: Path, text: str) -> None:
        raise UserError("no permission")

    monkeypatch.setattr(indexing, "write_text", refuses)
    assert len(read_index(root).runs) == 8
    assert not (root / INDEX_FILE).exists()
    with pytest.raises(UserError, match="no directory"):
        read_index(root / "absent")


def test_names_are_text_and_the_page_is_whole(root: Path, tmp_path: Path) -> None:
    keep(root / "evil", run(0, method="<script>alert(1)</script>"))
    page = render(read_index(root), title="<b>x</b>")
    assert page.count("<script") == 1
    assert "&lt;script&gt;alert(1)" in page
    assert "://" not in page
    assert "/home/maria" not in page
    answer = report_all(root, tmp_path / "all.html", tables=[str(tmp_path / "all.csv")], show=False)
    assert (answer["runs"], answer["groups"]) == (8, 4)
    rows = list(csv.DictReader((tmp_path / "all.csv").read_text().splitlines()))
    assert len(rows) == 4
    with pytest.raises(UserError, match="must end in"):
        report_all(root, tmp_path / "all.html", tables=["all.xls"])
    with pytest.raises(UserError, match="holds no evaluated run"):
        report_all(root / "original", tmp_path / "none.html")


def test_other_commands_are_left_to_the_whole_program(root: Path) -> None:
    for words in (["list", "methods"], ["report", str(root / "cell")], ["report", "a", "b"], ["train"], []):
        assert quick(words) is None
    assert quick(["report", str(root), "--show-samples"]) is None
    assert quick(["list", "runs", str(root / "absent")]) == 2
    assert {row["path"] for row in list_runs(root, show=False)["runs"]} == set(read_index(root).runs)


def test_neither_answer_imports_torch(root: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom unsharp.commands.index import quick\n"
        f"assert quick(['list', 'runs', {str(root)!r}, '--json']) == 0\n"
        f"assert quick(['report', {str(root)!r}, '--out', {str(tmp_path / 'x.html')!r}]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert len(re.findall(r'"path"', ran.stdout)) == 8
