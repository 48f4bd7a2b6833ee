"""Grids from the command line: what comes out, found again, failing, killed, on Ray; and the example."""

from __future__ import annotations

import csv
import fcntl
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unsharp
from integration.helpers import MAY_DIFFER, SOURCE, Process, alive, call, descendants, done, read, wait_for
from unsharp.sweep import Result, run_cell
from unsharp.sweep.grid.table import figures

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "grid.toml"
TINY = """
seeds = [0, 1]
baseline = "finetune none"
attacks = ["threshold_confidence"]
[data]
name = "digits"
classes = 3
per_class = 40
[model]
width = 4
[train]
epochs = 6
batch_size = 16
[settings]
epochs = 2
batch_size = 16
[[forget]]
random = 12
[[unlearn]]
method = "finetune"
[[unlearn]]
method = "neggrad"
rule = ["none", "sam"]
alpha = 0.95
lr = 0.02
"""
KILLS = 20
PATIENCE = 300.0
"""Seconds until the processes of a sweep have started, on a machine with other work to do."""
STEADY = ("results.csv", "results.json", "results.parquet")
"""What is the same to the bit however often a sweep was disturbed."""


def write(name: str, text: str) -> Path:
    Path(name).write_text(text)
    return Path(name)


def rows(out: Path, name: str = "results") -> list[dict[str, str]]:
    with open(out / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def cells(out: Path) -> dict[str, int]:
    """The finished cells, and when each was written."""
    directory = out / "cells"
    found = directory.iterdir() if directory.is_dir() else ()
    return {p.name: (p / "run.json").stat().st_mtime_ns for p in found if len(p.name) == 64}


def assert_same_tables(found: Path, expected: Path) -> None:
    for name in STEADY:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a sweep that nobody disturbed, beside its grid."""
    root = tmp_path_factory.mktemp("grid")
    (root / "grid.toml").write_text(TINY)
    done("sweep", root / "grid.toml", "--out", root / "out", "--processes", 2, "--quiet")
    return root / "out"


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells run here, where everything is imported already."""

    def backend(todo: Any, store: Path, workers: int | None = None, threads: int = 1) -> Iterator[Result]:
        for cell in todo:
            yield run_cell(cell, store)

    monkeypatch.setattr("unsharp.sweep.grid.run.local_backend", lambda **given: backend)


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_what_comes_out(undisturbed: Path) -> None:
    names = {"cells", "report.html", "results.csv", "results.json", "results.parquet", "times.csv"}
    assert {p.name for p in undisturbed.iterdir() if not p.name.startswith(".")} == names
    found, times, whole = rows(undisturbed), rows(undisturbed, "times"), read(undisturbed / "results.json")
    assert [(row["variant"], row["seed"]) for row in found] == [
        (variant, seed) for seed in "01" for variant in ("finetune none", "neggrad none", "neggrad sam")
    ]
    assert {row["status"] for row in found} == {"done"}
    assert all(float(time["seconds"]) > 0 for time in times)
    assert {row["cell"] for row in found} < set(cells(undisturbed))
    assert len(whole["rows"]) == 6
    assert len(whole["effects"]) == 2
    assert whole["grid"]["data"]["per_class"] == 40
    networks = sorted(p.name.split("-")[0] for p in (undisturbed / "cells" / "networks").iterdir())
    assert networks == ["retrain", "retrain", "train", "train"]  # one of each for each seed
    page = (undisturbed / "report.html").read_text()
    for title in ("Fine-tuning", "NegGrad", "NegGrad · SAM ρ=0.1", "Retrained", "Original"):
        assert title in page


def test_a_cell_is_what_the_single_commands_make(undisturbed: Path, tmp_path: Path) -> None:
    quick, data = ("--threads", 1, "--batch-size", 16), ("--data", "digits", "--classes", 3, "--per-class", 40)
    done("train", *data, "--arch", "small_cnn", "--width", 4, "--epochs", 6, "--seed", 1, *quick, "--out", "t")
    how = ("--method", "neggrad", "--rule", "sam", "--alpha", 0.95, "--lr", 0.02, "--epochs", 2, "--seed", 1)
    done("unlearn", "--model", "t", "--random", 12, *how, *quick, "--out", "u")
    more = ("--attacks", "threshold_confidence", "--seed", 1, "--threads", 1, "--no-features")
    done("evaluate", "u", "--original", "t", *more, "--store", tmp_path / "store", "--out", "e")
    (row,) = [r for r in rows(undisturbed) if (r["variant"], r["seed"]) == ("neggrad sam", "1")]
    expected = figures(read(Path("e/metrics.json")))
    steady = {name: value for name, value in expected.items() if name.rpartition(".")[2] not in MAY_DIFFER}
    assert len(steady) > 50
    for name, value in steady.items():
        assert row[name] == ("" if value is None else repr(value)), name


@pytest.mark.usefixtures("in_this_process")
def test_what_is_done_is_found_and_a_larger_grid_shares_it(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    before = cells(out)
    answer = done("sweep", write("grid.toml", TINY), "--out", out, "--quiet")
    assert cells(out) == before
    assert_same_tables(out, undisturbed)
    assert answer.err == ""
    larger = TINY.replace("seeds = [0, 1]", "seeds = [1, 2]").replace('["none", "sam"]', '["none", "sam", "asam"]')
    look = done("sweep", write("larger.toml", larger), "--out", out, "--dry-run", "--json").json
    assert look["todo"] == {"train": 1, "retrain": 1, "unlearn": 5}
    assert look["done"] == 1 + 1 + 3
    assert look["seconds"] > 0
    assert cells(out) == before
    found = unsharp.run_grid("larger.toml", out)
    assert len(found.rows) == 8
    after = cells(out)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 7
    assert unsharp.run_grid("larger.toml", out).rows == found.rows


def test_a_dry_run_says_what_it_would_do(tmp_path: Path) -> None:
    answer = done("sweep", write("grid.toml", TINY), "--dry-run", "--processes", 2)
    assert "6 cells: 3 variants × 1 forget set × 1 pretraining × 2 seeds" in answer.out
    assert "to do: 2 trainings, 2 retrainings, 6 cells; " in answer.out
    assert "2 at a time" in answer.out
    assert "neggrad sam" in answer.out
    assert not Path("runs").exists()


def test_lines_of_a_log_and_one_object(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    answer = done("sweep", write("grid.toml", TINY), "--out", out, "--json")
    assert (answer.json["cells"], answer.json["failed"], answer.json["failures"]) == (6, 0, "")
    assert len(answer.json["summary"]) == 3
    assert "to do: 0 trainings, 0 retrainings, 0 cells (10 found done)" in answer.err
    assert "6 of 6 cells" in answer.err
    shown = done("sweep", "grid.toml", "--out", out, "--quiet")
    assert "tow: mean over 2 seeds" in shown.out
    assert shown.err == ""


# --- mistakes and failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (TINY.replace("alpha = 0.95", "alfa = 0.95"), (), "grid.toml: unlearn[1]: unknown setting for neggrad"),
        (TINY.replace("seeds", "sedes"), (), "grid.toml: unknown field of grid 'sedes'; did you mean 'seeds'?"),
        (TINY, ("--backend", "rey"), "unknown backend 'rey'; did you mean 'ray'?"),
        (TINY, ("--address", "auto"), "--address is of the backend 'ray'"),
        (TINY, ("--processes", 0), "workers must be at least 1, got 0"),
        (TINY, ("--dry-run", "--retry-failed"), "--dry-run tries nothing"),
        (TINY, ("--accelerators", 99), "each cell is to get 99"),
    ],
)
def test_a_mistake_ends_it_before_any_work(text: str, options: tuple[object, ...], message: str) -> None:
    answer = call("sweep", write("grid.toml", text), "--out", "out", *options)
    assert answer.code == 2
    assert message in answer.err
    assert len(answer.err.splitlines()) == 1
    assert not Path("out").exists()


@pytest.mark.usefixtures("in_this_process")
def test_what_fails_is_told_at_the_end_and_tried_again_on_request(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    write("grid.toml", TINY + '[[unlearn]]\nname = "wild"\nmethod = "neggrad"\nlr = [1e30, 0.01]\n')
    failing = call("sweep", "grid.toml", "--out", out, "--json")
    assert failing.code == 1
    assert failing.json["failed"] == 2
    lines = failing.err.splitlines()
    assert "2 of 14 cells failed" in lines
    assert "failed: wild lr=1e+30, forget forget 1, pretraining none, seed 0: NonFiniteError" in failing.err
    assert lines[-1].endswith("the others with --retry-failed")
    found = {(row["variant"], row["seed"]): row for row in rows(out)}
    assert len(found) == 10
    for seed in "01":
        assert found["wild lr=0.01", seed]["status"] == "done"
        assert found["wild lr=1e+30", seed]["status"] == "failed"
        assert found["wild lr=1e+30", seed]["error"].startswith("NonFiniteError: ")
        assert found["wild lr=1e+30", seed]["tow"] == ""
    records = {path: path.stat().st_mtime_ns for path in (out / "cells").glob(".*.failed.json")}
    assert len(records) == 2
    assert done("sweep", "grid.toml", "--out", out, "--dry-run", "--json").json["failed"] == 2
    table = [{**row, "error": ""} for row in rows(out)]
    again = call("sweep", "grid.toml", "--out", out, "--json")
    assert (again.code, again.json["failed"]) == (1, 2)
    assert {path: path.stat().st_mtime_ns for path in records} == records
    retried = call("sweep", "grid.toml", "--out", out, "--retry-failed", "--quiet")
    assert retried.code == 1
    assert all(path.stat().st_mtime_ns > before for path, before in records.items())
    assert [{**row, "error": ""} for row in rows(out)] == table  # it goes on from its last good step, to another one


@pytest.mark.usefixtures("in_this_process")
def test_without_their_networks_cells_are_not_tried(tmp_path: Path) -> None:
    write("grid.toml", TINY.replace("[train]", "[train]\noptimizer = {lr = 1e30}"))
    answer = call("sweep", "grid.toml", "--out", "out", "--processes", 2)
    assert answer.code == 1
    assert "failed: training, pretraining none, seed 0: NonFiniteError" in answer.err
    assert "6 cells not tried, since a training that they need failed" in answer.err
    assert {row["status"] for row in rows(Path("out"))} == {"blocked"}
    assert rows(Path("out"))[0]["error"].startswith("not tried: training, pretraining none, seed 0 failed")
    assert cells(Path("out")) == {}


def test_one_sweep_at_a_time(undisturbed: Path, tmp_path: Path) -> None:
    write("grid.toml", TINY)
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = call("sweep", "grid.toml", "--out", tmp_path / "out")
    assert answer.code == 2
    assert "another sweep is at work in" in answer.err


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_networks_are_kept_on_request_and_features_measured(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    text = TINY.replace('rule = ["none", "sam"]', 'rule = "sam"').replace('[[unlearn]]\nmethod = "finetune"\n', "", 1)
    text = text.replace('"finetune none"', '"neggrad sam"').replace("seeds = [0, 1]", "seeds = [1]")
    write("grid.toml", "keep_networks = true\nfeatures = true\n" + text)
    found = unsharp.run_grid("grid.toml", out)
    (row,) = found.rows
    assert [name for name in row if name.startswith("entanglement.wasserstein_1.") and row[name] is not None]
    kept = out / "cells" / row["cell"] / "unlearned"
    assert {"model.safetensors", "run.json", "split.json"} <= {p.name for p in kept.iterdir()}
    (plain,) = [r for r in rows(undisturbed) if (r["variant"], r["seed"]) == ("neggrad sam", "1")]
    assert repr(row["tow"]) == plain["tow"]
    done("evaluate", kept, "--attacks", "threshold_confidence", "--no-features", "--out", "e", "--threads", 1)
    assert read(Path("e/metrics.json"))["forget_accuracy"] == row["forget_accuracy"]


@pytest.mark.usefixtures("in_this_process")
def test_the_example(tmp_path: Path) -> None:
    """In a smaller form: one seed, fewer samples, less training."""
    write("grid.toml", smaller("seeds = [0]"))
    found = unsharp.run_grid("grid.toml", "out")
    assert found.failures == ""
    assert len(found.rows) == 8


def smaller(seeds: str) -> str:
    text = EXAMPLE.read_text()
    for old, new in (
        ("seeds = [0, 1, 2]", seeds),
        ('name = "digits"', 'name = "digits"\nper_class = 30'),
        ("width = 16", "width = 8"),
        ("epochs = 10", "epochs = 6"),
        ("batch_size = 64", "batch_size = 16"),
        ("epochs = 5", "epochs = 2"),
        ("random = 72", "random = 20"),
    ):
        assert old in text
        text = text.replace(old, new)
    return text


# --- disturbed --------------------------------------------------------------------------------------------------------


def test_killed_and_interrupted_it_goes_on_to_the_same_tables(undisturbed: Path, here: Path) -> None:
    write("grid.toml", TINY)
    command, out = ("sweep", "grid.toml", "--out", "out", "--processes", 1), here / "out"
    process = Process(here, *command)
    wait_for(lambda: not process.running or len(cells(out)) >= 2, PATIENCE)
    process.signal(signal.SIGKILL)
    assert process.end().code == -signal.SIGKILL
    killed = cells(out)
    assert 2 <= len(killed) < 10
    process = Process(here, *command)
    wait_for(lambda: not process.running or len(cells(out)) > max(4, len(killed)), PATIENCE)
    process.signal(signal.SIGINT)
    answer = process.end()
    assert answer.code == 130, answer.err
    assert "the same command goes on from there" in answer.err
    assert not (out / "results.csv").exists()
    interrupted = cells(out)
    assert killed.items() <= interrupted.items()
    done(*command, "--quiet")
    assert interrupted.items() <= cells(out).items()
    assert_same_tables(out, undisturbed)


def test_the_comparison_can_fail(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "out")
    text = (tmp_path / "out" / "results.csv").read_text()
    (tmp_path / "out" / "results.csv").write_text(text.replace("9", "8", 1))
    with pytest.raises(AssertionError):
        assert_same_tables(tmp_path / "out", undisturbed)


@pytest.fixture
def ray() -> Iterator[Any]:
    found = pytest.importorskip("ray", reason="needs Ray: pip install 'unsharp[scale]'")
    yield found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it forgets processes that still end
        found.shutdown()
        gc.collect()


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_on_ray_it_gives_the_same_tables(ray: Any, undisturbed: Path) -> None:
    write("grid.toml", TINY)
    done("sweep", "grid.toml", "--out", "out", "--processes", 2, "--backend", "ray", "--quiet")
    assert_same_tables(Path("out"), undisturbed)


class Sweep:
    """The 24 cells of the example, in a process of their own that is disturbed at random moments."""

    def __init__(self, backend: str, out: Path, place: str) -> None:
        variables = {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", "TMPDIR": place}
        command = [
            sys.executable,
            "-m",
            "unsharp",
            "sweep",
            "grid.toml",
            "--out",
            str(out),
            "--processes",
            "2",
            "--json",
        ]
        self.process = subprocess.Popen(
            [*command, "--backend", backend], env=os.environ | variables, stdout=-1, stderr=-1, text=True
        )
        self.marks = "ray::Worker" if backend == "ray" else "spawn_main"

    def workers(self) -> list[int]:
        return [pid for pid, line in descendants(self.process.pid).items() if self.marks in line]

    def kill(self, worker: bool) -> bool:
        """Kill a process that does cells, or all; False if there is none."""
        victims = self.workers() if worker else [self.process.pid]
        if self.process.poll() is not None or not victims:
            return False
        team = self.workers()
        os.kill(victims[-1], signal.SIGKILL)
        if not worker:
            self.process.communicate()
            wait_for(lambda: not any(alive(pid) for pid in team), PATIENCE)  # nobody is left at work
        return True


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["local", pytest.param("ray", marks=pytest.mark.xdist_group("ray"))])
def test_24_cells_killed_at_20_random_moments(backend: str, tmp_path: Path) -> None:
    if backend == "ray":
        pytest.importorskip("ray", reason="needs Ray: pip install 'unsharp[scale]'")
    write("grid.toml", smaller("seeds = [0, 1, 2]"))
    draw, kills = np.random.default_rng(0), {"sweep": 0, "worker": 0}
    in_the_middle = 0
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="g-", ignore_cleanup_errors=True) as place:
        start = time.monotonic()
        first = Sweep("local", tmp_path / "undisturbed", place)
        _, error = first.process.communicate(timeout=1800)
        assert first.process.returncode == 0, error
        seconds = time.monotonic() - start
        assert len(rows(tmp_path / "undisturbed")) == 24
        run = 0
        sweep = Sweep(backend, tmp_path / "0", place)
        while sum(kills.values()) < KILLS:
            time.sleep(float(draw.uniform(0, 0.25)) * seconds)
            out = tmp_path / str(run)
            worker = bool(draw.random() < 0.5) and bool(sweep.workers())
            n_done = len(cells(out))
            if sweep.kill(worker):
                kills["worker" if worker else "sweep"] += 1
                in_the_middle += 0 < n_done < 33
                if worker:
                    continue
            elif sweep.process.poll() == 0:  # it has come through: begin with another one
                sweep.process.communicate()
                assert_same_tables(out, tmp_path / "undisturbed")
                run += 1
            else:  # a killed process of its own was its last news
                out_text, error = sweep.process.communicate()
                assert out_text, error
                answer = json.loads(out_text)
                assert answer["failures"].count("died: ") == answer["failed"] > 0
            sweep = Sweep(backend, tmp_path / str(run), place)
        out_text, error = sweep.process.communicate(timeout=1800)
        if sweep.process.returncode != 0:  # a process that was killed last: its cell is tried again without being asked
            sweep = Sweep(backend, tmp_path / str(run), place)
            out_text, error = sweep.process.communicate(timeout=1800)
        assert sweep.process.returncode == 0, error
    assert json.loads(out_text)["cells"] == 24
    assert_same_tables(tmp_path / str(run), tmp_path / "undisturbed")
    assert min(kills.values()) >= KILLS // 6, kills
    assert in_the_middle >= KILLS // 4
    print(f"{backend}: {seconds:.0f} s undisturbed, kills {kills}, {in_the_middle} of them in the middle")
