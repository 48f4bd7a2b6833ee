"""Runs that were made on another machine: bytes on the way, a directory at the end, whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unsharp.artifacts import adopt, open_run, perform, wait_until_free
from unsharp.errors import UserError
from unsharp.sweep.parcel import MAGIC, pack, unpack

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8).filter(
    lambda name: name not in (".", "..")
)


def parcel(names: object, contents: bytes = b"", head: bytes | None = None) -> bytes:
    """A parcel written by hand, as the format says it."""
    head = json.dumps(names).encode() if head is None else head
    body = MAGIC + len(head).to_bytes(8, "big") + head + contents
    return body + hashlib.sha256(body).digest()


def files(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): None if path.is_dir() else path.read_bytes() for path in directory.rglob("*")
    }


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.tuples(NAMES, NAMES), st.binary(max_size=40), max_size=6), st.sets(NAMES, max_size=3))
def test_what_is_packed_comes_out_the_same(tmp_path_factory, contents, empty):
    start, end, again = (tmp_path_factory.mktemp("place") for _ in range(3))
    for (folder, name), content in contents.items():
        (start / f"d{folder}").mkdir(exist_ok=True)
        (start / f"d{folder}" / name).write_bytes(content)
    for name in empty:
        (start / f"e{name}").mkdir(exist_ok=True)
    packed = pack(start)
    unpack(packed, end)
    assert files(end) == files(start)
    for name in reversed(list(files(start))):  # made in another order, at another time
        made = start / name
        (again / name).parent.mkdir(parents=True, exist_ok=True)
        (again / name).mkdir(exist_ok=True) if made.is_dir() else (again / name).write_bytes(made.read_bytes())
    assert pack(again) == packed


def test_the_format_is_the_one_that_is_described(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"12")
    (tmp_path / "c").write_bytes(b"3")
    assert pack(tmp_path) == parcel([["a", None], ["a/b", 2], ["c", 1]], b"123")


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/tmp/x", "..", ".", "", "a//b", "a/./b", "./a", "a/", "\0", 3, None, ["a"]]
)
def test_a_name_that_leads_elsewhere_is_refused_before_anything_is_written(tmp_path, name):
    place = tmp_path / "in" / "here"
    place.mkdir(parents=True)
    with pytest.raises(UserError, match="leads out of its directory"):
        unpack(parcel([["good", 1], [name, 1]], b"gx"), place)
    assert files(tmp_path) == {"in": None, "in/here": None}


def test_bytes_that_were_changed_or_cut_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_bytes(b"content")
    good = pack(tmp_path / "in")
    (tmp_path / "out").mkdir()
    flipped = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(len(good))]
    for bad in [b"", b"x", good[:-1], good + b"x", *flipped]:
        with pytest.raises(UserError, match="came back damaged"):
            unpack(bad, tmp_path / "out")
    assert files(tmp_path / "out") == {}


@pytest.mark.parametrize("head", [b"", b"{", b"3", b'[["a"]]', b'[["a", "b"]]', b'[["a", -1]]', b'[["a", 5]]', b"[]"])
def test_a_list_that_does_not_fit_its_contents_is_refused(tmp_path, head):
    with pytest.raises(UserError, match="came back damaged"):
        unpack(parcel(None, b"12", head), tmp_path)
    assert files(tmp_path) == {}


def test_links_are_not_sent_and_existing_files_stay(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        unpack(parcel([["file", 1]], b"n"), tmp_path)
    assert (tmp_path / "file").read_bytes() == b"old"
    (tmp_path / "link").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="link is neither a file nor a directory"):
        pack(tmp_path)


def run(path: Path) -> Path:
    perform(path, "cell", {"x": 1}, lambda workspace: workspace.write_json("result.json", 1))
    return path


def test_a_run_from_elsewhere_takes_its_name_or_finds_it_taken(tmp_path):
    packed = pack(run(tmp_path / "there" / "name"))
    here = tmp_path / "here" / "name"
    adopt(here, lambda directory: unpack(packed, directory))
    assert files(here) == files(tmp_path / "there" / "name")
    assert open_run(here, "cell").config == {"x": 1}
    before = here.stat().st_ino
    adopt(here, lambda directory: pytest.fail("nothing is to be written"))
    assert here.stat().st_ino == before
    assert os.listdir(here.parent) == ["name"]


def test_what_is_no_run_or_is_cut_in_the_middle_takes_no_name(tmp_path):
    def stop(directory):
        (directory / "run.json").write_text("{")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adopt(tmp_path / "name", stop)
    with pytest.raises(UserError, match="not a finished run"):
        adopt(tmp_path / "name", lambda directory: None)
    assert not (tmp_path / "name").exists()
    packed = pack(run(tmp_path / "other"))
    adopt(tmp_path / "name", lambda directory: unpack(packed, directory))  # what was left is in nobody's way
    assert files(tmp_path / "name") == files(tmp_path / "other")


def test_a_directory_that_is_in_use_is_waited_for_and_not_taken(tmp_path):
    lock = tmp_path / ".name.partial" / ".lock"
    assert wait_until_free(tmp_path / "name", 0)
    lock.parent.mkdir()
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not wait_until_free(tmp_path / "name", 0.15)
        with pytest.raises(UserError, match="another process is at work on name"):
            adopt(tmp_path / "name", lambda directory: pytest.fail("it is in use"))
    assert wait_until_free(tmp_path / "name", 0)
