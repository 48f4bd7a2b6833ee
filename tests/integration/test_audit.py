"""A deletion request and what follows it: audit, verify, purge, and a second request on the same network."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from integration.helpers import QUICK, call, done, read, sha256, tree
from unsharp import config, data
from unsharp.data import DataConfig
from unsharp.difficulty import from_ids
from unsharp.difficulty.files import read_ids
from unsharp.errors import UserError
from unsharp.reference import reference_key
from unsharp.report.pdf import check_pdf
from unsharp.stages import read_split
from unsharp.subject import load_subject

pytestmark = pytest.mark.xdist_group("audit")  # one process makes what all of them read

HOW = ("--method", "neggrad", "--epochs", 1, "--lr", 0.02, *QUICK, "--attacks", "threshold_confidence")
FIRST, SECOND = range(100, 220), range(300, 360)


def write_ids(path: Path, ids: Any) -> Path:
    path.write_text("id\n" + "\n".join(map(str, ids)) + "\n")
    return path


@pytest.fixture(scope="module")
def asked(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two requests, the second on the network of the first; names in it would tell who asked."""
    root = tmp_path_factory.mktemp("asked")
    runs = root / "runs"
    shutil.copytree(trained, runs / "original")
    first, second = write_ids(root / "smith.csv", FIRST), write_ids(root / "jones.csv", SECOND)
    places = ("--store", root / "store", "--key", root / "key")
    done("forget", "--model", runs / "original", "--ids", first, *places, "--out", runs / "a", *HOW)
    done("forget", "--model", runs / "a", "--ids", second, *places, "--out", runs / "b", *HOW)
    return root


def test_the_audit_says_what_was_asked_and_done(asked: Path) -> None:
    answer = asked / "runs" / "a"
    audit = read(answer / "audit.json")
    assert audit["asked"]["n"] == len(audit["asked"]["codes"]["ids"]) == 120
    assert audit["done"]["checkpoint_before"] == sha256(asked / "runs" / "original" / "model.safetensors")
    assert audit["done"]["checkpoint_after"] == sha256(answer / "model.safetensors")
    assert {one["file"]: one["sha256"] for one in audit["outputs"]} == {
        name: sha256(answer / name)
        for name in ("model.safetensors", "record.json", "metrics.json", "about.json", "report.html")
    }
    inputs = {one["what"]: one["sha256"] for one in audit["inputs"]}
    assert inputs["IDS"] == sha256(asked / "smith.csv")
    metrics = read(answer / "metrics.json")
    for test in audit["tests"]:
        if test["figure"] != "membership":
            assert test["gap"] == pytest.approx(metrics["gap"][test["figure"]])
    assert read(answer / "run.json")["config"]["audit"]["bounds"]["forget_accuracy"]["gap_at_most"] == 5.0
    assert audit["bounds"]["set"] == "before the run"
    retrained = [p / "model.safetensors" for p in (asked / "store").iterdir()]
    assert audit["done"]["retrained"] in map(sha256, retrained)
    assert {one["stage"] for one in audit["derived"]} == {"train"}
    assert audit["rerun"]["command"].startswith("unsharp forget --model CHECKPOINT --out ANSWER ")


def test_nothing_names_a_sample_or_a_file(asked: Path) -> None:
    for answer in ("a", "b"):
        for name in ("audit.json", "audit.html", "report.html", "run.json", "about.json"):
            text = (asked / "runs" / answer / name).read_text()
            assert not re.search(r"smith|jones|\.csv|/tmp|original[/\"]", text), name
            assert str(asked) not in text
        told = json.dumps(read(asked / "runs" / answer / "audit.json"))
        assert '"ids": [1' not in told
        assert '"ids": [3' not in told
    page = (asked / "runs" / "a" / "audit.html").read_text()
    assert "<script" not in page
    assert "Evidence, not proof" in page


def test_the_command_of_the_audit_does_it_again(asked: Path, here: Path) -> None:
    """The words in capitals replaced, it gives the same network to the bit."""
    words = read(asked / "runs" / "b" / "audit.json")["rerun"]["command"].split()
    places = {
        "CHECKPOINT": asked / "runs" / "a",
        "ANSWER": here / "again",
        "IDS": asked / "jones.csv",
        "FORGOTTEN": asked / "smith.csv",
    }
    done(*(places.get(word, word) for word in words[1:]), "--store", asked / "store")
    weights = load_file(asked / "runs" / "b" / "model.safetensors"), load_file(here / "again" / "model.safetensors")
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_second_request_builds_on_the_first(asked: Path) -> None:
    """Both sets are gone from the retained samples, and the reference is that of one request for both."""
    a, b = read(asked / "runs" / "a" / "audit.json"), read(asked / "runs" / "b" / "audit.json")
    samples = data.load(DataConfig(), torch.device("cpu")).train
    both = from_ids([*FIRST, *SECOND], samples)
    assert b["n"]["retain"] == len(samples) - len(FIRST) - len(SECOND)
    assert (b["asked"]["n"], b["asked"]["n_absent"]) == (60, 180)
    assert b["asked"]["hash_absent"] == both.hash
    assert [event["asked"]["hash"] for event in b["history"]] == [a["asked"]["hash"]]
    assert b["history"][0]["run"] == sha256(asked / "runs" / "a" / "run.json")
    assert b["done"]["checkpoint_before"] == a["done"]["checkpoint_after"]
    origin = load_subject(asked / "runs" / "original", torch.device("cpu")).origin
    assert origin.recipe is not None
    device = torch.device("cpu")
    key = reference_key(origin.recipe, origin.recipe.start(device), samples, both, device)
    kept = asked / "store" / f"retrain-{config.digest(key)[:16]}" / "model.safetensors"
    assert b["done"]["retrained"] == sha256(kept)
    wrong = from_ids(SECOND, samples)
    key = reference_key(origin.recipe, origin.recipe.start(device), samples, wrong, device)
    assert not (asked / "store" / f"retrain-{config.digest(key)[:16]}").exists()


def test_a_network_that_forgot_is_not_unlearned_without_what_it_forgot(asked: Path, here: Path) -> None:
    how = ("--model", asked / "runs" / "a", "--ids", asked / "jones.csv", "--out", "out", *HOW)
    for more, message in (
        ((), "--forgotten FILE"),
        (("--forgotten", asked / "jones.csv"), "hash differs"),
        (("--key", here / "new"), "another key"),
    ):
        answer = call("forget", *how, *more)
        assert answer.code == 2
        assert message in answer.err
    twice = call("forget", *how[:2], "--ids", asked / "smith.csv", *how[4:], "--key", asked / "key")
    assert "forgotten by this network already" in twice.err
    assert not (here / "out").exists()


def test_choices_are_among_what_is_left(trained: Path, here: Path) -> None:
    """A split beside the checkpoint says what was forgotten; however a set is chosen, nothing of it comes back."""
    done("unlearn", "--model", trained, "--forget-classes", 3, "--out", "u", *HOW[:-2])
    samples = data.load(DataConfig(), torch.device("cpu")).train
    threes = set(np.flatnonzero(samples.labels == 3).tolist())
    np.savez("scores.npz", score=np.where(samples.labels == 3, 1.0, 0.1), id=samples.ids)
    for out, choice in (
        ("r", ("--random", 0.5)),
        ("c", ("--forget-classes", 5)),
        ("s", ("--scores", "scores.npz:score", "--level", "high", "--n", 50)),
    ):
        done("unlearn", "--model", "u", *choice, "--out", out, *HOW[:-2])
        split = read_split(here / out, samples)
        assert not threes & set(split.indices.tolist())
        assert not threes & set(split.retain_indices(len(samples)).tolist())
        assert len(split.absent) == len(split) + len(threes)
    assert len(read_split(here / "r", samples)) == round(0.5 * (len(samples) - len(threes)))
    assert "no sample" in call("unlearn", "--model", "u", "--forget-classes", 3, "--out", "x", *HOW[:-2]).err


def test_verify_tells_what_changed(asked: Path, here: Path) -> None:
    shutil.copytree(asked / "runs" / "a", "a")
    whole = done("verify", "a")
    assert "as written: 8 files of 1 run" in whole.out
    digest = done("verify", "a", "--json").json["digest"]
    assert done("verify", "a", "--digest", digest).code == 0
    content = bytearray((here / "a" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (here / "a" / "model.safetensors").write_bytes(content)
    changed = call("verify", "a")
    assert changed.code == 1
    assert "changed: a/model.safetensors has changed" in changed.out
    assert "writes its run.json anew" in changed.out
    assert call("verify", "a", "--json").json["as_written"] is False


def test_verify_recognises_ids(asked: Path, here: Path) -> None:
    answer = asked / "runs" / "b"
    assert "are those of the request" in done("verify", answer, "--ids", asked / "jones.csv").out
    assert call("verify", answer, "--ids", asked / "smith.csv").code == 2
    write_ids(here / "some.csv", [300, 301, 5])
    key = ("--key", asked / "key")
    assert "2 of these 3 ids" in done("verify", answer, "--ids", "some.csv", *key).out
    assert "they are all of it" in done("verify", answer, "--ids", asked / "jones.csv", *key).out


def test_purge_shows_deletes_and_records(asked: Path, here: Path) -> None:
    shutil.copytree(asked / "runs", "runs")
    shutil.copytree(asked / "store", "store")
    done("split", "--model", "runs/original", "--ids", asked / "smith.csv", "--out", "runs/split")
    (here / "runs" / "notes.txt").write_text("mine")
    command = ("purge", "runs/a", "--ids", asked / "smith.csv", "--store", "store")
    before = tree(here)
    shown = done(*command, "--dry-run")
    assert re.findall(r"delete (\S+)", shown.out) == ["runs/original", "runs/split"]
    assert re.findall(r"keep +(\S+)", shown.out) == ["runs/a", "runs/b"]
    refused = call(*command)
    assert (refused.code, "--yes" in refused.err) == (2, True)
    assert call(*command[:2], "--ids", asked / "jones.csv", "--store", "store", "--yes").code == 2
    assert tree(here) == before
    done(*command, "--yes")
    assert {p.name for p in (here / "runs").iterdir()} == {"a", "b", "notes.txt"}
    audit = read(here / "runs" / "a" / "audit.json")
    assert [(e["event"], e["state"], len(e["deleted"]), e["left"]) for e in audit["history"]] == [
        ("purge", "done", 2, 0)
    ]
    assert audit["history"][0]["run"] == sha256(asked / "runs" / "a" / "run.json")
    assert "2 derived artefacts deleted" in (here / "runs" / "a" / "audit.html").read_text()
    assert done("verify", "runs").code == 0
    assert "nothing is left to delete" in done(*command, "--yes").out


def test_purge_trusts_no_answer_that_has_changed(asked: Path, here: Path) -> None:
    shutil.copytree(asked / "runs", "runs")
    (here / "runs" / "a" / "metrics.json").write_text("{}")
    answer = call("purge", "runs/a", "--ids", asked / "smith.csv", "--store", asked / "store", "--yes")
    assert answer.code == 2
    assert "not as it was written" in answer.err
    assert (here / "runs" / "original").is_dir()


def test_samples_are_named_where_that_is_asked_for(trained: Path, here: Path) -> None:
    ids = write_ids(here / "ids.csv", FIRST)
    done("forget", "--model", trained, "--ids", ids, "--show-samples", "--out", "a", *HOW)
    audit = read(here / "a" / "audit.json")
    assert audit["asked"]["ids"] == [int(str(i)) for i in read_ids(str(ids))[:]] == list(FIRST)
    assert "Forgotten samples" in (here / "a" / "audit.html").read_text()
    # Then the next request finds them there.
    done("forget", "--model", "a", "--random", 30, "--out", "b", *HOW)
    assert read(here / "b" / "audit.json")["asked"]["n_absent"] == 150


def test_bounds_are_part_of_what_was_asked(trained: Path, here: Path) -> None:
    ids = write_ids(here / "ids.csv", FIRST)
    (here / "bounds.json").write_text('{"tow": {"at_least": 1}, "retain_accuracy": {"at_least": 101}}')
    how = ("forget", "--model", trained, "--ids", ids, "--bounds", "bounds.json", "--out", "a", *HOW)
    done(*how)
    audit = read(here / "a" / "audit.json")
    assert {t["figure"]: t["verdict"] for t in audit["tests"]} == {"tow": "pass", "retain_accuracy": "fail"}
    assert (audit["verdict"], audit["bounds"]["from"]) == ("fail", "file")
    (here / "bounds.json").write_text('{"tow": {"at_least": 1}}')
    assert "holds another run" in call(*how).err  # bounds cannot be moved once the result is known
    (here / "bounds.json").write_text('{"towe": {"at_least": 1}}')
    assert "unknown figure" in call(*how).err


def test_the_audit_is_printed_by_itself_and_shows_no_picture(asked: Path, here: Path) -> None:
    try:
        check_pdf()
    except UserError as error:
        pytest.skip(str(error))
    for name in ("report.html", "audit.html"):
        assert "<img" not in (asked / "runs" / "a" / name).read_text()
    done("report", asked / "runs" / "a", "--audit-pdf", here / "audit.pdf")
    assert (here / "audit.pdf").read_bytes().startswith(b"%PDF")
    answer = call("report", asked / "runs" / "a", asked / "runs" / "b", "--audit-pdf", here / "both.pdf")
    assert answer.code == 2
    assert "one run with an audit" in answer.err
