"""The documentation says what the code is: tables, pages, names, links, options, and code that runs."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import unsharp
from unsharp.cli import COMMANDS
from unsharp.evaluation import METRICS
from unsharp.methods import METHODS
from unsharp.sharpness import RULES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
ELSEWHERE = {
    "--asked-only",
    "--check",
    "--data-dir",
    "--help",
    "--logdir",
    "--tasks",
    "--tyro-print-completion",
    "--version",
}
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)

RUNNER = """
import sys, traceback
import torch
torch.set_num_threads(1)
for path in sys.argv[1:]:
    try:
        exec(compile(open(path, encoding="utf-8").read(), path, "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        sys.exit(path)
"""


def _generate():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = _generate()


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _commands(page: Path) -> list[list[str]]:
    """The calls of `unsharp` in the shell blocks of a page."""
    text = "\n".join(SHELL.findall(page.read_text(encoding="utf-8"))).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words[1:] for words in lines if words and words[0] == "unsharp"]


def _anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_generated_blocks_are_up_to_date():
    assert [_name(page) for page in GENERATE.stale()] == [], "run python docs/generate.py"


def test_a_stale_block_is_noticed():
    text = "<!-- generated: rules -->\nold\n<!-- end -->"
    assert GENERATE.generated(text) != text
    assert "`sam`" in GENERATE.generated(text)


@pytest.mark.parametrize(
    "page", [*(f"methods/{n}.md" for n in METHODS), *(f"rules/{n}.md" for n in RULES)], ids=lambda page: page
)
def test_every_method_and_rule_has_a_page_that_the_index_links(page: str):
    assert (DOCS / page).is_file()
    assert f"({page})" in (DOCS / "index.md").read_text(encoding="utf-8")


def test_every_metric_is_explained_on_a_page():
    for name in METRICS:
        assert f"`{name}`" in (DOCS / "metrics" / GENERATE.metric_page(name)).read_text(encoding="utf-8")


def test_every_public_name_is_mentioned():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in unsharp.__all__ if f"unsharp.{name}" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in _anchors(found.read_text(encoding="utf-8")), f"{target} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_page_is_reached_from_the_index(page: Path):
    if page.parent == ROOT or page.name == "index.md":
        return
    assert f"({page.relative_to(DOCS).as_posix()})" in (DOCS / "index.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_options_in_commands_are_those_of_the_command(page: Path):
    for words in _commands(page):
        if words[0].startswith("--"):
            assert words[0] in ELSEWHERE
            continue
        given = {word for word in words if re.match(r"--[a-z]", word)}
        assert given <= GENERATE.options_of(words[0]), f"unsharp {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_options_in_the_text_exist(page: Path):
    known = set.union(ELSEWHERE, *(GENERATE.options_of(name) for name in COMMANDS))
    found = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text(encoding="utf-8")))
    off = {f"--no-{option[2:]}" for option in known}
    assert found <= known | off


def test_every_command_has_an_example():
    shown = {words[0] for words in _commands(DOCS / "command-line.md")}
    assert shown == set(COMMANDS)


def test_every_key_of_the_metrics_is_in_their_table():
    text = (DOCS / "command-line.md").read_text(encoding="utf-8").partition("## metrics.json")[2]
    keys = {name for name, metric in METRICS.items() if metric.group is None} | {
        metric.group for metric in METRICS.values() if metric.group is not None
    }
    assert [key for key in keys if f"`{key}`" not in text] == []


def test_the_python_of_the_documentation_runs(tmp_path: Path):
    """Each page's blocks in order, in one namespace; all pages in one process, since importing torch takes long."""
    scripts = []
    for page in PAGES:
        blocks = PYTHON.findall(page.read_text(encoding="utf-8"))
        if blocks:
            script = tmp_path / _name(page).replace("/", "_").replace(".md", ".py")
            script.write_text("\n".join(blocks), encoding="utf-8")
            scripts.append(str(script))
    assert len(scripts) >= 8
    ran = subprocess.run(
        [sys.executable, "-c", RUNNER, *scripts], cwd=tmp_path, env=_environment(), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


def _environment() -> dict[str, str]:
    """This process's environment, with the paths from which it imports and one thread."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
