"""Seals of runs: any byte, any file missing or added is seen, and the digest is that of coreutils."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from unsharp import artifacts, seal
from unsharp.artifacts import Workspace, perform
from unsharp.errors import UserError
from unsharp.seal import broken, digest_of, verify


def fill(workspace: Workspace) -> None:
    workspace.write_json("metrics.json", {"a": 0.1, "b": [1e-99, -2.5e300, None], "ü": "é\n"})
    workspace.file("model.bin").write_bytes(np.random.default_rng(0).bytes(300))
    workspace.file("empty").write_bytes(b"")
    (workspace.file("outputs") / "deep").mkdir(parents=True)
    (workspace.file("outputs") / "deep" / "logits.npy").write_bytes(b"\x00" * 64)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return perform(tmp_path / "runs" / "one", "test", {"rate": 1e-7, "text": 'a "quoted" word', "n": 3}, fill).path


def test_a_run_is_as_written(run: Path) -> None:
    found = verify(run)
    assert found.problems == found.loose == ()
    assert (found.runs, found.files) == (1, 5)


def test_any_changed_byte_of_any_file_is_seen(run: Path) -> None:
    """Every byte of run.json, where the sums stand, and random bytes of every other file, each to a random value."""
    draw = np.random.default_rng(1)
    for name in seal.entries_below(run):
        content = (run / name).read_bytes()
        every = range(len(content))
        for at in every if name == seal.RUN_FILE else draw.integers(0, max(len(content), 1), 40)[: len(content)]:
            changed = bytearray(content)
            changed[at] ^= int(draw.integers(1, 256))
            (run / name).write_bytes(changed)
            assert verify_or_refusal(run), f"byte {at} of {name}"
        (run / name).write_bytes(content + b"\n")
        assert verify_or_refusal(run), f"a byte more in {name}"
        (run / name).write_bytes(content)
        if content:
            (run / name).write_bytes(content[:-1])
            assert verify_or_refusal(run), f"a byte less in {name}"
            (run / name).write_bytes(content)
    assert verify(run).problems == ()


def verify_or_refusal(run: Path) -> bool:
    """Whether a change is seen; a seal that is gone is refused in words."""
    try:
        return verify(run).problems != ()
    except UserError as error:
        return "no seal" in str(error)


def test_missing_added_and_replaced_files_are_seen(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in seal.entries_below(run):
        if name == seal.RUN_FILE:
            continue
        shutil.copytree(run, copy)
        (copy / name).unlink()
        assert broken(copy) == [f"{name} is missing"]
        (copy / name).symlink_to(run / name)  # the same content, elsewhere
        assert broken(copy) == [f"{name} has changed: it is no file any more"]
        shutil.rmtree(copy)
    for name in ("more", ".hidden", "outputs/deep/more"):
        (run / name).write_text("x")
        assert broken(run) == [f"{name} was added"]
        (run / name).unlink()
    (run / "link").symlink_to("metrics.json")
    assert broken(run) == ["link was added"]


def test_a_run_without_a_seal_is_refused(run: Path) -> None:
    artifacts.write_json(run / seal.RUN_FILE, {"stage": "test", "config": {}, "provenance": {}})
    with pytest.raises(UserError, match="no seal"):
        verify(run)
    with pytest.raises(UserError, match="no directory"):
        verify(run / "absent")
    with pytest.raises(UserError, match="holds no run"):
        verify(run / "outputs")


def test_all_runs_below_are_compared_and_the_rest_is_named(run: Path) -> None:
    perform(run.parent / "deep" / "two", "test", {}, lambda w: w.write_json("x.json", 1))
    (run.parent / "notes.txt").write_text("mine")
    found = verify(run.parent)
    assert (found.runs, found.problems, found.loose) == (2, (), ("notes.txt",))
    (run.parent / "deep" / "two" / "x.json").write_text("2\n")
    assert verify(run.parent).problems == ("deep/two/x.json has changed",)


def test_a_rewritten_seal_passes_but_has_another_digest(run: Path) -> None:
    """What the sums cannot see, the digest that was kept elsewhere does."""
    kept = verify(run).digest

    def forge(folder: Path) -> None:
        artifacts.write_json(folder / "metrics.json", {"a": 100.0})

    artifacts.amend(run, forge)
    found = verify(run)
    assert found.problems == ()
    assert found.digest != kept
    assert any("digest that was kept" in line for line in seal.told(found, kept))


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no coreutils here")
def test_the_digest_is_that_of_coreutils(run: Path) -> None:
    for name in ("a b", "ä", "back\\slash", "new\nline", "ret\rurn", ".hidden", "A", "outputs.txt"):
        (run / name).write_bytes(os.urandom(20))
    command = "find . -type f -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"
    theirs = subprocess.run(
        ["bash", "-c", command], cwd=run, capture_output=True, text=True, check=True
    ).stdout.split()[0]
    assert digest_of(seal.contents(run)) == theirs


def test_amending_leaves_the_rest_as_it_was_and_survives_a_failure(run: Path) -> None:
    before = {name: (run / name).read_bytes() for name in seal.entries_below(run)}

    def fails(folder: Path) -> None:
        artifacts.write_json(folder / "metrics.json", {"half": 1})
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        artifacts.amend(run, fails)
    assert {name: (run / name).read_bytes() for name in seal.entries_below(run)} == before
    artifacts.amend(run, lambda folder: artifacts.write_json(folder / "metrics.json", {"whole": 1}))
    after = {name: (run / name).read_bytes() for name in seal.entries_below(run)}
    assert {name for name in before if before[name] != after[name]} == {"metrics.json", seal.RUN_FILE}
    assert broken(run) == []
    assert [p.name for p in run.parent.iterdir()] == ["one"]
