"""Processes that are killed at random moments: the next one goes on, and nobody ever sees a broken file."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from integration.helpers import QUICK, Process, call, done, read, sha256, steady, wait_for

ATTACKS = ("--attacks", "threshold_confidence")
SAVE = ("--save-seconds", 0.05)
COMMANDS = {
    "train": ("train", "--epochs", 15, *QUICK, *SAVE),
    "unlearn": ("unlearn", "--model", "MODEL", "--random", 40, "--method", "sharp_minmax", "--epochs", 6,
                *QUICK, *SAVE),
    "forget": ("forget", "--model", "MODEL", "--random", 40, "--method", "neggrad", "--rule", "sam", "--epochs", 5,
               *QUICK, *SAVE, *ATTACKS),
}  # fmt: skip
RESULTS = {"train": {"metrics.json", "record.json"}, "unlearn": {"record.json", "before.json", "split.json"},
           "forget": {"metrics.json", "record.json", "about.json"}}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, float]]:
    """The run of a command that nobody killed, and how many seconds it took."""
    root = tmp_path_factory.mktemp("undisturbed")

    @cache
    def run(command: str) -> tuple[Path, float]:
        started = time.monotonic()
        done(*arguments(command, trained, root / "store"), "--out", root / command)
        return root / command, time.monotonic() - started

    return run


def arguments(command: str, trained: Path, store: Path) -> tuple[object, ...]:
    return (*(trained if a == "MODEL" else a for a in COMMANDS[command]), "--store", store)


@pytest.mark.parametrize(
    ("command", "seed"),
    [("train", 0), ("unlearn", 0), ("forget", 0), *(pytest.param(c, s, marks=pytest.mark.slow)
     for c in COMMANDS for s in (1, 2, 3))],
)  # fmt: skip
def test_killed_again_and_again(
    command: str, seed: int, trained: Path, undisturbed: Any, here: Path, tmp_path: Path
) -> None:
    expected, seconds = undisturbed(command)
    command_line = (*arguments(command, trained, tmp_path / "store"), "--out", "out")
    rng = np.random.default_rng(seed)
    kills, resumed = 0, False
    for attempt in range(4):
        process = Process(here, *command_line)
        # The first kill falls where there is a state to go on from, however long the other work takes; others anywhere.
        begun = "resume.pt" if attempt == 0 else "*"
        wait_for(lambda: not process.running or any(here.rglob(begun)))  # noqa: B023
        end = time.monotonic() + (0.0 if attempt == 0 else float(rng.uniform(0, 0.6)) * seconds)
        while process.running and time.monotonic() < end:
            assert_whole_or_absent(here / "out")
            time.sleep(0.002)
        process.signal(signal.SIGKILL)
        answer = process.end()
        assert_whole_or_absent(here / "out")
        if answer.code == 0:
            break
        assert answer.code == -signal.SIGKILL, answer.err
        kills += 1
        resumed |= any(here.rglob("resume.pt"))
    done(*command_line)
    assert kills
    assert resumed
    assert_equal_results(here / "out", expected, RESULTS[command])
    assert {p.name for p in here.iterdir()} == {"out"}


def test_killed_while_the_results_are_written(trained: Path, undisturbed: Any, here: Path, tmp_path: Path) -> None:
    """The last steps take milliseconds, so they are met by watching for their files."""
    command_line = (*arguments("forget", trained, tmp_path / "store"), "--out", "out")
    for moment in ("unlearn", "metrics.json", "report.html", "model.safetensors", "record.json", "run.json"):
        process = Process(here, *command_line)
        wait_for(lambda: not process.running or (here / ".out.partial" / moment).exists())  # noqa: B023
        process.signal(signal.SIGKILL)
        process.end()
        assert_whole_or_absent(here / "out")
    done(*command_line)
    assert_equal_results(here / "out", undisturbed("forget")[0], RESULTS["forget"])


def test_killed_while_a_run_is_replaced(trained: Path, here: Path, tmp_path: Path) -> None:
    """With --force the old run stays until the new one is whole."""
    command = arguments("unlearn", trained, tmp_path / "store")
    done(*command, "--out", "out")
    before = sha256(here / "out" / "model.safetensors")
    process = Process(here, *command, "--alpha", 0.9, "--force", "--out", "out")
    wait_for(lambda: any(here.glob(".out.partial/resume.pt")))
    process.signal(signal.SIGKILL)
    assert process.end().code == -signal.SIGKILL
    assert_whole_or_absent(here / "out")
    assert sha256(here / "out" / "model.safetensors") == before
    done(*command, "--alpha", 0.9, "--force", "--out", "out")
    assert sha256(here / "out" / "model.safetensors") != before
    assert {p.name for p in here.iterdir()} == {"out"}


def test_two_processes_on_one_directory(here: Path) -> None:
    command = ("train", "--epochs", 200, *QUICK, *SAVE, "--out", "out")
    first = Process(here, *command)
    try:
        wait_for(lambda: any(here.glob(".out.partial/resume.pt")))
        second = call(*command)
        assert second.code == 2
        assert len(second.err.splitlines()) == 1
        assert "another process is at work on out" in second.err
        assert first.running
    finally:
        first.signal(signal.SIGKILL)
        first.end()
    shorter = ("train", "--epochs", 1, *QUICK, "--out", "out")
    done(*shorter)  # the lock went with the process


def test_a_reference_that_two_deletions_share(trained: Path, here: Path, tmp_path: Path) -> None:
    """Two requests at once for the same samples, which need the same retrained network."""
    what = ("forget", "--model", trained, "--random", 40, "--store", tmp_path / "store", *ATTACKS, *QUICK)
    both = [Process(here, *what, "--method", m, "--epochs", 2, "--out", m) for m in ("finetune", "neggrad")]
    answers = [process.end() for process in both]
    assert [a.code for a in answers] == [0, 0], [a.err for a in answers]
    references = [read(here / m / "metrics.json")["reference"] for m in ("finetune", "neggrad")]
    assert references[0] == references[1]


def assert_whole_or_absent(directory: Path) -> None:
    """Whatever stands under the name of the result can be read from end to end."""
    try:
        names = {p.name for p in directory.iterdir()}
    except FileNotFoundError:
        return
    assert "run.json" in names
    assert not [name for name in names if name.startswith(".") or name in ("resume.pt", "settings.json")]
    for name in names:
        if name.endswith(".json"):
            json.loads((directory / name).read_text())
        elif name.endswith(".safetensors"):
            with safe_open(directory / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    file.get_tensor(key)


def assert_equal_results(found: Path, expected: Path, names: set[str]) -> None:
    assert {p.name for p in found.iterdir()} == {p.name for p in expected.iterdir()}
    assert sha256(found / "model.safetensors") == sha256(expected / "model.safetensors")
    for name in names:
        assert steady(read(found / name)) == steady(read(expected / name)), name
    runs = [read(directory / "run.json") for directory in (found, expected)]
    assert runs[0]["config"] == runs[1]["config"]
    assert runs[0]["hash"] == runs[1]["hash"]


def test_the_comparison_can_fail(trained: Path, here: Path) -> None:
    for seed in (0, 1):
        done("train", "--epochs", 1, *QUICK, "--seed", seed, "--out", seed)
    with pytest.raises(AssertionError):
        assert_equal_results(here / "0", here / "1", {"metrics.json"})
