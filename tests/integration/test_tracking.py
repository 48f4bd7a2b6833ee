"""Following a run in a tracker: the figures of the run and nothing else, and nothing without being asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import unsharp
from integration.helpers import QUICK, call, done, read, tree
from unsharp import runtime
from unsharp.progress import SILENT, Progress
from unsharp.tracking import flat, tracked

HOW = ("--random", 40, "--method", "neggrad", "--epochs", 2, "--lr", 0.02, *QUICK)
ATTACKS = ("--attacks", "threshold_confidence", "--no-features")


def told(directory: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard's own reader finds: by name, the value at each step."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found: dict[str, dict[int, float]] = {}
    for file in directory.rglob("events.*"):
        events = reader.EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, {}).update({event.step: event.value for event in events.Scalars(name)})
    return found


def test_the_tracker_holds_the_history_and_the_evaluation(trained: Path, here: Path) -> None:
    pytest.importorskip("accelerate")
    done("unlearn", "--model", trained, *HOW, "--out", "u", "--track", "tensorboard")
    found = told(here / "runs" / "tensorboard")
    history = read(here / "u" / "record.json")["history"]
    assert {name for name in found if name.startswith("neggrad/")} == {f"neggrad/{name}" for name in history[0]}
    for row in history:
        for name, value in row.items():
            assert found[f"neggrad/{name}"][row["epoch"]] == pytest.approx(value, rel=1e-6)

    done("evaluate", "u", "--out", "e", *ATTACKS, "--track", "tensorboard", "--threads", 1)
    found, metrics = told(here / "runs" / "tensorboard"), read(here / "e" / "metrics.json")
    assert list(found["evaluation/tow"].values()) == [pytest.approx(metrics["tow"], rel=1e-6)]
    assert "evaluation/gap/mia/threshold_confidence/mia" in found


def test_what_is_told_are_numbers() -> None:
    assert flat({"a": {"b": 1, "c": "text", "d": None, "e": True}, "f": [1]}) == {"a/b": 1.0}


class Heard(Progress):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.said: list[tuple[dict[str, float], int | None]] = []

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        self.said.append((dict(values), step))


def test_in_python_a_progress_of_ones_own_is_told() -> None:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(40, 4, generator=generator), torch.arange(40) % 2)
    heard = Heard()
    how = {"method": "neggrad", "epochs": 2, "batch_size": 16}
    _, record = unsharp.unlearn(nn.Linear(4, 2), data, [1, 2, 3], progress=heard, **how)
    assert [step for _, step in heard.said] == [1, 2]
    for (values, _), row in zip(heard.said, record.history, strict=True):
        assert values == {f"neggrad/{name}": value for name, value in row.items()}


def test_nothing_is_tracked_without_being_asked(trained: Path, here: Path) -> None:
    done("unlearn", "--model", trained, *HOW, "--out", "u")
    assert not (here / "runs").exists()
    with tracked(SILENT, None) as progress:
        assert progress is SILENT


def test_a_tracker_that_is_unknown_or_missing_is_refused_before_the_work(
    trained: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(here)
    answer = call("unlearn", "--model", trained, *HOW, "--out", "u", "--track", "tensorbord")
    assert answer.code == 2
    assert "tensorboard" in answer.err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    answer = call("unlearn", "--model", trained, *HOW, "--out", "u", "--track", "wandb")
    assert answer.code == 2
    assert "pip install" in answer.err
    assert tree(here) == before


def test_only_one_of_several_processes_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "world", lambda: (1, 2))
    with tracked(SILENT, "tensorboard") as progress:
        assert progress is SILENT
