"""`unsharp suggest-alpha` as a person uses it: advise, read the files, run what it names; bad input."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from integration.helpers import QUICK, call, done, read, sha256
from unsharp.theory.adviser import PROBES

WHAT = ("--random", 60, "--epochs", 2, "--lr", 0.1, "--rule", "sam", "--target-accuracy", 80)
FILES = {"run.json", "alpha.json", "unlearn.json", "split.json"}


@pytest.fixture(scope="module")
def advised(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished advice, and what it printed as JSON."""
    out = tmp_path_factory.mktemp("advised") / "run"
    return out, done("suggest-alpha", "--model", trained, *WHAT, *QUICK, "--out", out, "--json").json


def test_the_advice_is_written_and_printed(advised: tuple[Path, dict[str, Any]]) -> None:
    out, answer = advised
    assert {p.name for p in out.iterdir()} == FILES
    found = read(out / "alpha.json")
    assert {name: answer[name] for name in found} == found
    assert answer["stage"] == "suggest-alpha"
    assert PROBES[-1] <= found["low"] <= found["alpha"] <= found["high"] <= 1
    assert [p["alpha"] for p in found["probes"]] == list(PROBES)
    assert found["unseen"] == "test"
    assert found["target"]["accuracy"] == 80
    start = found["probes"][0]["looks"][0]
    assert found["limits"] == {f"{name}_accuracy": start[f"{name}_accuracy"] - 5 for name in ("retain", "unseen")}
    run = read(out / "unlearn.json")
    assert run["method"] == {"name": "neggrad", "alpha": found["alpha"], "sharpness_on": "joint"}
    assert (run["rule"]["name"], run["epochs"], run["optimizer"]["lr"]) == ("sam", 2, 0.1)


def test_the_command_that_it_names_unlearns_with_that_alpha(
    advised: tuple[Path, dict[str, Any]], trained: Path, here: Path
) -> None:
    out, answer = advised
    before = sha256(trained / "model.safetensors")
    words = shlex.split(answer["command"])
    assert words[:2] == ["unsharp", "unlearn"]
    done(*words[1:], "--threads", 1, "--out", "u")
    config = read(here / "u" / "run.json")["config"]["unlearn"]
    assert config == read(out / "unlearn.json")
    assert read(here / "u" / "split.json")["ids"] == read(out / "split.json")["ids"]
    assert read(here / "u" / "record.json")["passes"] == answer["run_passes"]
    assert sha256(trained / "model.safetensors") == before


def test_it_is_read_by_people_and_found_done(advised: tuple[Path, dict[str, Any]], trained: Path) -> None:
    out, first = advised
    again = done("suggest-alpha", "--model", trained, *WHAT, *QUICK, "--out", out)
    lines = again.out.splitlines()
    assert lines[0].startswith("aimed at: 80.0 % on the forget set (given")
    assert f"suggested: α = {first['alpha']:.4f}" in again.out
    assert f"range: {first['low']:.4f}" in again.out
    assert lines[-1].startswith("next: unsharp unlearn")
    assert "found done" in again.out + again.err


def test_a_bound_on_losses_is_another_advice(trained: Path) -> None:
    what = ("suggest-alpha", "--model", trained, *WHAT, *QUICK, "--loss-tolerance", 0.02, "--json")
    found = done(*what).json
    assert set(found["limits"]) == {f"{name}_{what}" for name in ("retain", "unseen") for what in ("accuracy", "loss")}
    start = found["probes"][0]["looks"][0]
    assert found["limits"]["retain_loss"] == pytest.approx(start["retain_loss"] + 0.02)


def test_sharp_minmax_is_advised_with_a_target_from_unseen_samples(trained: Path) -> None:
    what = ("suggest-alpha", "--model", trained, "--random", 60, "--method", "sharp_minmax", "--epochs", 1)
    answer = done(*what, *QUICK, "--lr", 0.01, "--json")
    assert answer.json["target"]["kind"] == "classes"
    assert "target: unseen samples stand for the forget set" in answer.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--optimizer", "adamw"), "adamw rescales"),
        (("--method", "retrain"), "'retrain'"),
        (("--method", "finetune"), "'finetune'"),
        (("--clip-norm", 1), "clip_norm"),
        (("--rule", "weight_averaging"), "weight_averaging"),
        (("--alpha", 0.9), "--alpha is what is to be suggested"),
        (("--tolerance", 0), "tolerance must be points"),
        (("--loss-tolerance", -1), "loss_tolerance must be"),
        (("--target-accuracy", 101), "target_accuracy"),
        (("--stop-at", 50), "stop_at"),
        (("--target", "no"), "target"),
    ],
)
def test_bad_input_is_refused_in_a_line_before_work(trained: Path, here: Path, options, told) -> None:
    answer = call("suggest-alpha", "--model", trained, "--random", 60, *options, *QUICK, "--out", "a")
    assert answer.code == 2
    assert told in answer.err
    assert "Traceback" not in answer.err
    assert not (here / "a").exists()
