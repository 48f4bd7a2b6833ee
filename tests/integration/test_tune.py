"""`unsharp tune` as a person uses it: search, choose, run the choice; bad input; kills; several processes."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from integration.helpers import QUICK, Process, call, done, read, sha256, steady, wait_for
from unsharp.data import DataConfig, load
from unsharp.evaluation import predict
from unsharp.evaluation.accuracy import accuracy
from unsharp.stages import read_split
from unsharp.subject import load_subject

WHAT = ("--random", 60, "--method", "neggrad")
SMALL = ("--search", "alpha=0.6,0.9", "lr=0.02,0.1", "epochs=1,2")
FILES = {"run.json", "choice.json", "unlearn.json", "trials.json", "trials.parquet", "split.json", "report.html"}


@pytest.fixture(scope="module")
def tuned(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A finished search, what it printed as JSON, and what it said."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    answer = done("tune", "--model", trained, *WHAT, *SMALL, *QUICK, "--out", out, "--json")
    return out, answer.json, answer.err


def naive_choice(rows: list[dict[str, Any]], target: float, floor: float) -> dict[str, Any]:
    """The choice by sorting the table."""
    kept = [r for r in rows if r["retain_accuracy"] >= floor - 1e-9]
    if not kept:
        return sorted(rows, key=lambda r: (-r["retain_accuracy"], abs(r["forget_accuracy"] - target), r["passes"]))[0]
    return sorted(kept, key=lambda r: (abs(r["forget_accuracy"] - target), r["passes"], -r["retain_accuracy"]))[0]


def test_a_search_writes_its_choice_and_everything_it_tried(tuned: tuple[Path, dict[str, Any], str]) -> None:
    out, answer, said = tuned
    assert {p.name for p in out.iterdir()} == FILES
    choice, rows = read(out / "choice.json"), read(out / "trials.json")
    assert {r["trial"] for r in rows} == {0, 1, 2, 3}  # an axis of two values is tried whole
    assert len(rows) == 8  # and each epoch is a network
    best = naive_choice(rows, choice["target"]["accuracy"], choice["goal"]["floor"])
    assert best["chosen"]
    assert [r["chosen"] for r in rows].count(True) == 1
    assert choice["settings"] == best["settings"] == answer["settings"]
    assert choice["distance"] == pytest.approx(abs(best["forget_accuracy"] - choice["target"]["accuracy"]))
    for row in rows:
        assert row["met_floor"] == (row["retain_accuracy"] >= choice["goal"]["floor"] - 1e-9)
    assert choice["goal"]["floor"] == pytest.approx(choice["original"]["retain_accuracy"] - 5)
    table = pq.read_table(out / "trials.parquet").to_pylist()
    assert [r["forget_accuracy"] for r in table] == [r["forget_accuracy"] for r in rows]
    assert [r["setting.alpha"] for r in table] == [r["settings"]["alpha"] for r in rows]
    assert said.index("4 trials at first") < said.index("trial 1 (")


def test_the_target_is_the_originals_accuracy_on_unseen_samples_of_these_classes(
    tuned: tuple[Path, dict[str, Any], str], trained: Path
) -> None:
    out, _, _ = tuned
    choice, ids = read(out / "choice.json"), read(out / "split.json")["ids"]
    subject = load_subject(trained, torch.device("cpu"))
    train, test = subject.splits.train, subject.splits.test
    assert test is not None
    found = predict(subject.model, test, np.arange(len(test)))
    right = found.logits.argmax(1) == found.labels
    labels = [train.labels[list(train.ids).index(i)] for i in ids]
    by_hand = np.mean([right[test.labels == c].mean() for c in labels])
    assert choice["target"]["accuracy"] == pytest.approx(100 * by_hand)
    assert choice["target"]["kind"] == "classes"


def test_passes_are_counted_and_kept_within_the_budget(tuned: tuple[Path, dict[str, Any], str], trained: Path) -> None:
    out, _, _ = tuned
    budget = read(out / "choice.json")["budget"]
    unit = -(-1433 // 64)
    each = 2 * 2 * -(-(1433 - 60) // 64)  # two epochs, a retain and a forget batch in each step
    assert budget["passes_per_training_epoch"] == unit
    assert budget["spent_passes"] == 4 * each <= budget["passes"] + 1e-9
    rows = read(out / "trials.json")
    assert all(r["passes"] == each * r["settings"]["epochs"] / 2 for r in rows)
    two = ("--budget", 2 * each / unit, "--out", "two")
    done("tune", "--model", trained, *WHAT, *SMALL, *QUICK, *two)
    assert len({r["trial"] for r in read(Path("two/trials.json"))}) == 2
    assert read(Path("two/choice.json"))["budget"]["spent_passes"] == 2 * each


def test_the_choice_runs_to_the_very_network_of_its_trial(
    tuned: tuple[Path, dict[str, Any], str], trained: Path, here: Path
) -> None:
    out, answer, _ = tuned
    done("unlearn", "--model", trained, "--split", out, "--config", out / "unlearn.json", "--threads", 1, "--out", "u")
    subject = load_subject(here / "u", torch.device("cpu"))
    outputs = subject.outputs_of(subject.model, read_split(out, subject.splits.train))
    assert outputs.test is not None
    found = accuracy(outputs.retain), accuracy(outputs.forget), accuracy(outputs.test)
    point = answer["point"]
    assert found == (point["retain_accuracy"], point["forget_accuracy"], point["unseen_accuracy"])
    assert read(here / "u" / "record.json")["passes"] == point["passes"]


def test_the_command_that_it_names_can_be_run(trained: Path, here: Path) -> None:
    answer = done("tune", "--model", trained, *WHAT, *SMALL, *QUICK, "--out", "t", "--json").json
    words = shlex.split(answer["command"])
    assert words[0] == "unsharp"
    done(*words[1:], "--attacks", "threshold_confidence", "--threads", 1)
    metrics = read(here / "t-forgotten" / "metrics.json")
    assert metrics["forget_accuracy"] == answer["point"]["forget_accuracy"]


def test_a_search_that_is_done_is_found_done(trained: Path) -> None:
    command = ("tune", "--model", trained, *WHAT, *SMALL, *QUICK, "--out", "t", "--json")
    first, second = done(*command), done(*command)
    assert second.json["reused"]
    assert "trial 1" not in second.err
    assert first.json["point"] == second.json["point"]


def test_beside_a_configuration_file_only_the_seed_is_taken(
    tuned: tuple[Path, dict[str, Any], str], trained: Path, here: Path
) -> None:
    out, _, _ = tuned
    what = ("unlearn", "--model", trained, "--split", out, "--config", out / "unlearn.json")
    for option in (("--lr", 0.5), ("--method", "finetune"), ("--rule", "sam"), ("--alpha", 0.5)):
        answer = call(*what, *option, "--out", "u")
        assert answer.code == 2
        assert option[0] in answer.err
        assert not (here / "u").exists()
    done(*what, "--seed", 7, "--threads", 1, "--out", "u")
    run = read(here / "u" / "run.json")["config"]["unlearn"]
    assert run == read(out / "unlearn.json") | {"seed": 7}


# --- other targets, floors, methods -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of the training digits, and of the test digits: chances of being right on a sample unseen."""
    splits = load(DataConfig(), "cpu")
    root = tmp_path_factory.mktemp("scores")
    random = np.random.default_rng(0)
    assert splits.test is not None
    np.savez(root / "train.npz", score=random.beta(4, 1, len(splits.train)))
    np.savez(root / "test.npz", score=random.beta(4, 1, len(splits.test)))
    return root


def test_scores_make_the_target_that_of_a_network_that_saw_none_of_it(trained: Path, scores: Path) -> None:
    hard = ("--scores", scores / "train.npz", "--score-kind", "cscore", "--level", "high", "--n", 40)
    done("split", "--model", trained, *hard, "--out", "split", "--threads", 1)
    base = (
        "tune",
        "--model",
        trained,
        "--split",
        "split",
        "--method",
        "finetune",
        "--search",
        "lr=0.01,0.1",
        "--epochs",
        1,
        *QUICK,
    )
    targets = {}
    for name, more in {
        "scores": (),
        "classes": ("--target", "classes"),
        "matched": ("--unseen-scores", scores / "test.npz"),
        "given": ("--target-accuracy", 12.5),
    }.items():
        targets[name] = done(*base, *more, "--out", name, "--json").json["target"]
        assert targets[name]["kind"] == name
    assert targets["scores"]["accuracy"] < targets["classes"]["accuracy"] - 20
    assert targets["given"]["accuracy"] == 12.5


def test_scores_may_be_named_for_a_forget_set_given_by_ids(trained: Path, scores: Path, here: Path) -> None:
    (here / "ids.txt").write_text("\n".join(map(str, range(40))))
    what = ("--ids", "ids.txt", "--train-scores", scores / "train.npz", "--score-kind", "cscore")
    answer = done("tune", "--model", trained, *what, "--method", "finetune", "--epochs", 1, "--search", "lr=0.01,0.1",
                  *QUICK, "--out", "t", "--json")  # fmt: skip
    assert answer.json["target"]["kind"] == "scores"


def test_a_class_that_is_forgotten_whole_is_aimed_at_0(trained: Path) -> None:
    what = ("--forget-classes", 3, "--method", "neggrad")
    answer = done("tune", "--model", trained, *what, *SMALL, *QUICK, "--out", "t", "--json")
    assert answer.json["target"]["accuracy"] == 0.0


def test_where_no_trial_keeps_the_floor_it_says_so_and_takes_the_least_loss(trained: Path, here: Path) -> None:
    answer = done("tune", "--model", trained, *WHAT, *SMALL, *QUICK, "--retain-floor", 100, "--out", "t", "--json")
    if answer.json["met_floor"]:
        pytest.skip("a trial kept 100 %")
    rows = read(here / "t" / "trials.json")
    assert answer.json["point"]["retain_accuracy"] == max(r["retain_accuracy"] for r in rows)
    assert "warning: no trial kept 100.0 %" in answer.err
    assert "less than the 100.0 % that were to be kept" in (here / "t" / "report.html").read_text()


def test_a_setting_that_is_void_is_told_before_the_search(trained: Path, here: Path) -> None:
    asked = ("--method", "sharp_minmax", "--optimizer", "adamw", "--lr", 1e-4, "--epochs", 1, "--fraction", 0.3)
    answer = done("tune", "--model", trained, *WHAT, *asked, "--search", "alpha=0.9,0.99", *QUICK, "--out", "t")
    assert answer.err.count("warning: alpha = 0.9 has next to no effect") == 1
    points = [(row["forget_accuracy"], row["retain_accuracy"]) for row in read(here / "t" / "trials.json")]
    assert len(points) == 2
    assert points[0] == points[1]


def test_a_trial_that_breaks_is_told_and_not_chosen(trained: Path, here: Path) -> None:
    answer = done("tune", "--model", trained, *WHAT, "--search", "lr=0.01,1e30", "--alpha", 0.9, "--epochs", 1, *QUICK,
                  "--out", "t", "--json")  # fmt: skip
    assert answer.json["settings"] == {"lr": 0.01}
    (failed,) = read(here / "t" / "choice.json")["failed"]
    assert "broke off" in answer.err
    assert failed["why"] in (here / "t" / "report.html").read_text().replace("&#39;", "'")
    everything = call("tune", "--model", trained, *WHAT, "--search", "lr=1e29,1e30", "--alpha", 0.9, "--epochs", 1,
                      *QUICK, "--out", "u")  # fmt: skip
    assert everything.code == 2
    assert "lower learning rates" in everything.err


def test_under_a_schedule_that_knows_the_end_each_length_is_a_trial(trained: Path, here: Path) -> None:
    done("tune", "--model", trained, *WHAT, "--search", "epochs=1,2", "lr=0.02,0.1", "--alpha", 0.9, "--schedule",
         "cosine", *QUICK, "--out", "t")  # fmt: skip
    rows = read(here / "t" / "trials.json")
    assert len(rows) == 4
    assert len({r["trial"] for r in rows}) == 4
    choice = read(here / "t" / "choice.json")
    done("unlearn", "--model", trained, "--split", "t", "--config", "t/unlearn.json", "--threads", 1, "--out", "u")
    assert read(here / "u" / "record.json")["passes"] == choice["point"]["passes"]


def test_a_share_of_the_retained_samples_makes_trials_cheaper(trained: Path, here: Path) -> None:
    share = ("--retain-fraction", 0.1)
    answer = done("tune", "--model", trained, *WHAT, *SMALL, *share, *QUICK, "--out", "t", "--json").json
    assert answer["unlearn"]["retain_fraction"] == 0.1
    whole = 2 * 2 * -(-(1433 - 60) // 64)
    assert answer["budget"]["spent_passes"] < 4 * whole / 5
    split = ("--split", "t", "--config", "t/unlearn.json", "--threads", 1)
    done("unlearn", "--model", trained, *split, "--out", "u")
    record = read(here / "u" / "record.json")
    assert record["passes"] == answer["point"]["passes"]
    assert record["about"]["retain_fraction"] == 0.1
    assert 0.09 * 1373 < record["about"]["n_retained"] < 0.11 * 1373
    done("forget", "--model", trained, *WHAT, *share, "--epochs", 1, *QUICK, "--attacks", "threshold_confidence",
         "--out", "f")  # fmt: skip
    assert read(here / "f" / "record.json")["about"]["n_retained"] == record["about"]["n_retained"]


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "unknown method": ("--method negrad", ["did you mean 'neggrad'"]),
    "unknown rule": ("--method neggrad --rule samm", ["samm"]),
    "nothing to search": ("--method retrain", ["nothing to search"]),
    "budget too small": ("--method neggrad --budget 0.1", ["the smallest that works is", "--budget"]),
    "budget negative": ("--method neggrad --budget -1", ["budget"]),
    "search form": ("--method neggrad --search lr", ["NAME=VALUE"]),
    "search unknown": ("--method neggrad --search alhpa=0.1,0.2", ["alhpa", "alpha"]),
    "search value": ("--method neggrad --search alpha=0.9,1.5", ["alpha must be in"]),
    "search given": ("--method neggrad --lr 0.1 --search lr=0.1,0.2", ["leave one out"]),
    "search text": ("--method neggrad --search lr=low,high", ["lr"]),
    "target": ("--method neggrad --target best", ["unknown target"]),
    "target without scores": ("--method neggrad --target scores", ["--train-scores"]),
    "target accuracy": ("--method neggrad --target-accuracy 150", ["target_accuracy"]),
    "floor": ("--method neggrad --retain-floor 150", ["retain_floor"]),
    "unseen scores alone": ("--method neggrad --unseen-scores $scores/test.npz", ["--train-scores"]),
    "scores missing": ("--method neggrad --train-scores nowhere.npz", ["nowhere.npz"]),
    "share": ("--method neggrad --retain-fraction 0", ["retain_fraction"]),
    "share ignored": ("--method gradient_ascent --retain-fraction 0.5", ["retain_fraction", "no retained sample"]),
    "stop": ("--method neggrad --stop-at 50", ["stop_at", "leave it out"]),
    "stop retrained": ("--method neggrad --stop-at retrained", ["stop_at", "leave it out"]),
    "stop searched": ("--method neggrad --search stop_at=retrained,50", ["stop_at", "leave it out"]),
    "processes": ("--method neggrad --processes 0", ["--processes"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case: str, trained: Path, scores: Path, here: Path) -> None:
    text, wanted = BAD[case]
    words = text.replace("$scores", str(scores)).split()
    answer = call("tune", "--model", trained, "--random", 60, *words, *QUICK, "--out", "out")
    assert answer.code == 2, answer.err
    assert answer.out == ""
    assert len(answer.err.splitlines()) == 1, answer.err
    for part in wanted:
        assert part in answer.err
    assert list(here.iterdir()) == []


def test_without_unseen_samples_a_target_must_be_given(trained: Path, here: Path, tmp_path: Path) -> None:
    splits = load(DataConfig(), "cpu")
    np.savez(tmp_path / "own.npz", train_x=splits.train.images.numpy(), train_y=splits.train.labels)  # type: ignore[attr-defined]
    foreign = ("--model", tmp_path / "plain.safetensors", "--arch", "small_cnn", "--data", "npz", "--data-dir",
               tmp_path / "own.npz", "--augment", "none")  # fmt: skip
    save_file(load_file(trained / "model.safetensors"), tmp_path / "plain.safetensors")
    refused = call("tune", *foreign, *WHAT, *SMALL, *QUICK, "--out", "t")
    assert refused.code == 2
    assert "--target-accuracy" in refused.err
    assert list(here.iterdir()) == []
    answer = done("tune", *foreign, *WHAT, *SMALL, *QUICK, "--target-accuracy", 90, "--out", "t", "--json").json
    assert answer["target"]["kind"] == "given"
    assert answer["point"]["unseen_accuracy"] is None
    words = shlex.split(answer["command"])
    assert words[words.index("--arch") + 1] == "small_cnn"
    done(*words[1:], "--attacks", "threshold_confidence", "--threads", 1)


# --- kills and processes ----------------------------------------------------------------------------------------------

LONG = ("--search", "alpha=0.6,0.9", "lr=0.02,0.1", "epochs=2,4", "--save-seconds", 0.05)


@pytest.fixture(scope="module")
def undisturbed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that nobody killed."""
    out = tmp_path_factory.mktemp("undisturbed") / "t"
    done("tune", "--model", trained, *WHAT, *LONG, *QUICK, "--out", out)
    return out


def assert_equal_searches(found: Path, expected: Path) -> None:
    assert {p.name for p in found.iterdir()} == FILES
    assert sha256(found / "unlearn.json") == sha256(expected / "unlearn.json")
    assert steady(read(found / "trials.json")) == steady(read(expected / "trials.json"))
    ours, theirs = (steady(read(d / "choice.json")) for d in (found, expected))
    assert {**ours, "command": ""} == {**theirs, "command": ""}


def test_killed_again_and_again(trained: Path, undisturbed: Path, here: Path) -> None:
    command = ("tune", "--model", trained, *WHAT, *LONG, *QUICK, "--out", "out")
    store = here / ".out.partial" / ".trials"

    def finished() -> int:
        return sum(not p.parent.name.startswith(".") for p in store.glob("*/run.json"))

    kills = 0
    for n in (0, 1, 3):
        process = Process(here, *command)
        wait_for(lambda: not process.running or (finished() >= n and any(store.glob(".*/resume.pt"))))  # noqa: B023
        process.signal(signal.SIGKILL)
        if process.end().code == 0:
            break
        kills += 1
        assert not (here / "out").exists()
    left = 4 - finished()
    assert kills >= 2
    last = done(*command)
    assert_equal_searches(here / "out", undisturbed)
    assert {p.name for p in here.iterdir()} == {"out"}
    assert last.err.count("neggrad: ") == left  # finished trials were found, not run again


def test_several_processes_give_the_same_search(trained: Path, undisturbed: Path, here: Path) -> None:
    done("tune", "--model", trained, *WHAT, *LONG, *QUICK, "--processes", 2, "--out", "out")
    assert_equal_searches(here / "out", undisturbed)


def test_the_comparison_of_searches_can_fail(trained: Path, undisturbed: Path, here: Path) -> None:
    done("tune", "--model", trained, *WHAT, *LONG, *QUICK, "--seed", 1, "--out", "out")
    with pytest.raises(AssertionError):
        assert_equal_searches(here / "out", undisturbed)


def test_the_page_names_no_sample_and_no_file(trained: Path, here: Path) -> None:
    (here / "request-from-jane.txt").write_text("\n".join(map(str, range(1000, 1040))))
    what = ("--ids", "request-from-jane.txt", "--method", "neggrad")
    done("tune", "--model", trained, *what, *SMALL, *QUICK, "--out", "t")
    page = (here / "t" / "report.html").read_text()
    assert "jane" not in page
    assert str(trained) not in page
    assert "<script" not in page
    assert json.dumps(read(here / "t" / "split.json")["ids"])[1:-1] not in page
