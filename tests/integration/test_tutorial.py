"""The tutorial, as its reader does it: files are saved under their names, commands are given in order."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from integration.helpers import done, read

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
LOOP = re.compile(r"^for (\w+) in (.+); do\n(.*?)^done\n", re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """The commands of a shell block, in order; a loop is unrolled."""

    def unrolled(loop: re.Match[str]) -> str:
        return "".join(loop[3].replace(f"${loop[1]}", value) for value in loop[2].split())

    return [shlex.split(line) for line in LOOP.sub(unrolled, block).replace("\\\n", " ").splitlines()]


def test_loops_are_unrolled():
    block = "a $b\nfor seed in 0 1; do\n    c \\\n        -$seed\n    d\ndone\ne\n"
    assert commands(block) == [["a", "$b"], ["c", "-0"], ["d"], ["c", "-1"], ["d"], ["e"]]


def test_every_file_is_named_in_the_text_before_it():
    text = PAGE.read_text(encoding="utf-8")
    for fence in FENCE.finditer(text):
        assert not fence[2] or f"`{fence[2]}`" in text[: fence.start()]


@pytest.fixture
def own_modules(here: Path, monkeypatch: pytest.MonkeyPatch):
    """Modules of the working directory can be imported, and are forgotten afterwards."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(str(here))
    yield
    for name in set(sys.modules) - known:
        if str(here) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.usefixtures("own_modules")
def test_the_tutorial(here: Path, capsys: pytest.CaptureFixture[str]):
    for language, name, body in FENCE.findall(PAGE.read_text(encoding="utf-8")):
        if name:
            (here / name).write_text(body, encoding="utf-8")
            continue
        assert language == "bash"
        for program, *arguments in commands(body):
            if program == "python":
                runpy.run_path(arguments[0], run_name="__main__")
            else:
                assert program == "unsharp"
                done(*arguments, "--threads", 1)
    first, second = (read(here / run / "metrics.json") for run in ("answer", "better"))
    assert first["original"]["forget_accuracy"] > 70  # what the page tells
    assert second["reference"]["forget_accuracy"] < 10
    assert second["tow"] > 90 > first["tow"]
    assert "forget accuracy" in capsys.readouterr().out
    assert (here / "report.html").is_file()
    assert (here / "forgotten.pt").is_file()
