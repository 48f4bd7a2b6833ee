"""Runs from the command line that stop by themselves, that break down, and that step as the published code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from integration.helpers import QUICK, call, done, read

NEGGRAD = ("--method", "neggrad", *QUICK)
ATTACKS = ("--attacks", "threshold_confidence")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def test_a_run_stops_at_the_retrained_networks_forget_accuracy(trained: Path, here: Path, store: Path) -> None:
    asked = ("--model", trained, "--random", 40, "--split-seed", 3)
    how = (*NEGGRAD, "--alpha", 0.8, "--lr", 0.02, "--epochs", 20, "--stop-at", "retrained", "--store", store)
    answer = done("unlearn", *asked, *how, "--out", "u", "--json")
    stop = answer.json["stop"]
    assert stop["reached"]
    assert 1 <= stop["epoch"] < 20
    assert stop["forget_accuracy"] <= stop["target"] < 100
    assert f"stopped after epoch {stop['epoch']} of 20: forget accuracy is" in answer.err.replace("\n", " ")
    record = read(here / "u" / "record.json")
    assert len(record["history"]) == stop["epoch"]
    assert record["about"]["stop"] == stop
    (kept,) = store.iterdir()
    before = (kept / "run.json").stat().st_mtime_ns
    done("evaluate", "u", "--store", store, "--out", "e", *ATTACKS, "--threads", 1)
    assert [(run, (run / "run.json").stat().st_mtime_ns) for run in store.iterdir()] == [(kept, before)]
    metrics = read(here / "e" / "metrics.json")
    assert metrics["reference"]["forget_accuracy"] == pytest.approx(stop["target"])
    assert metrics["forget_accuracy"] == pytest.approx(stop["forget_accuracy"])
    assert read(here / "e" / "about.json")["stop"] == stop
    done("report", "e", "--out", "r.html")
    page = (here / "r.html").read_text().replace("\u00a0", " ")
    assert f"after epoch {stop['epoch']}, at {stop['forget_accuracy']:.1f} %" in page
    again = done("unlearn", *asked, *how, "--out", "u", "--json")
    assert (again.json["reused"], again.json["stop"]) == (True, stop)


def test_a_network_that_breaks_down_is_told_of_while_it_does(trained: Path, here: Path) -> None:
    bad = (*NEGGRAD, "--alpha", 0.3, "--lr", 0.05, "--epochs", 4, "--out", "u", "--json")
    answer = done("unlearn", "--model", trained, "--random", 40, *bad)
    (line,) = [line for line in answer.err.splitlines() if line.startswith("warning: epoch")]
    found = re.match(r"warning: epoch (\d) of 4: retain accuracy has fallen from [\d.]+ % to ([\d.]+) %", line)
    assert found is not None
    row = read(here / "u" / "record.json")["history"][int(found[1]) - 1]
    assert row["retain_accuracy"] == pytest.approx(float(found[2]), abs=0.051)
    assert answer.json["warnings"] == [line.removeprefix("warning: ")]
    good = done("unlearn", "--model", trained, "--random", 40, *NEGGRAD, "--epochs", 1, "--out", "v", "--json")
    assert good.json["warnings"] == []
    assert good.json["stop"] is None
    assert "warning: epoch" not in good.err


def test_what_cannot_be_is_refused_before_anything_is_written(trained: Path, here: Path) -> None:
    asked = ("unlearn", "--model", trained, "--random", 40, "--out", "u")
    for words, message in (
        (("--method", "neggrad", "--phase-lr", "forget=0.1"), "unknown phase in phase_lr 'forget'"),
        (("--phase-schedule", "retain=sine"), "phase_schedule.retain must be one of constant"),
        (("--stop-at", "low"), "--stop-at"),
        (("--stop-at", "-3"), "stop_at must be a forget accuracy in [0, 100]"),
        (("--published", "--method", "saul"), "published: the steps of the published code are offered for"),
    ):
        answer = call(*asked, *words)
        assert answer.code == 2, (words, answer)
        assert message in answer.err
        assert not list(here.iterdir())


def test_a_foreign_checkpoint_needs_to_know_how_to_retrain(trained: Path, here: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(trained / "model.safetensors"), here / "foreign.safetensors")
    origin = read(trained / "run.json")["config"]["origin"]["model"]
    network = ("--arch", origin["arch"], "--data", "digits")
    network += ("--width", origin["width"]) if origin.get("width") is not None else ()
    for command in ("unlearn", "forget"):
        answer = call(
            command, "--model", "foreign.safetensors", *network, "--random", 9, "--stop-at", "retrained", "--out", "u"
        )
        assert answer.code == 2
        assert "stop_at 'retrained' needs to know how the model was trained: give --train-config" in answer.err
        assert [path.name for path in here.iterdir()] == ["foreign.safetensors"]


def test_published_steps_and_rates_of_phases_from_the_command_line(trained: Path, here: Path) -> None:
    asked = ("unlearn", "--model", trained, "--random", 40, "--epochs", 1, "--lr", 1e-4, *QUICK)
    done(*asked, "--published", "--rule", "sam", "--out", "u")
    unlearn = read(here / "u" / "run.json")["config"]["unlearn"]
    assert unlearn["optimizer"]["name"] == "adamw"
    assert (unlearn["last_batch"], unlearn["cycle"], unlearn["phase_steps"]) == ("short", "repeat", "alternate")
    assert (unlearn["method"]["select"], unlearn["method"]["leak"], unlearn["rule"]["perturb"]) == (
        "smallest",
        True,
        "all",
    )
    done(*asked, "--phase-lr", "forget=1e-5", "--phase-schedule", "forget=cosine", "retain=constant", "--out", "v")
    unlearn = read(here / "v" / "run.json")["config"]["unlearn"]
    assert unlearn["phase_lr"] == {"forget": 1e-5}
    assert unlearn["phase_schedule"] == {"forget": "cosine", "retain": "constant"}
