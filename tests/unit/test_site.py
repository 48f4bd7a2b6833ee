"""The documentation as a site: navigation, links that move, and nothing fetched from elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

import pytest

import unsharp

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def _hooks():
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = _hooks()
PAGES = {f"docs/{uri}": uri for path in DOCS.rglob("*.md") if (uri := path.relative_to(DOCS).as_posix())}
SOURCES = PAGES | HOOKS.outside()
SITE = {*SOURCES.values(), *HOOKS.reports().values(), "reference.md"}


def _uris(nav: list) -> list[str]:
    values = (value for entry in nav for value in entry.values())
    return [uri for value in values for uri in ([value] if isinstance(value, str) else _uris(value))]


def test_the_navigation_has_the_headings_of_the_index():
    headings = re.findall(r"^## (.+)$", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for entry in HOOKS.navigation() for name in entry] == ["Home", *headings]
    assert len(headings) >= 5


def test_every_page_stands_in_the_navigation_once():
    uris = _uris(HOOKS.navigation())
    assert sorted(uris) == sorted(set(uris))
    assert {*PAGES.values(), "quickstart.md", "reference.md", "contributing.md", "changelog.md"} <= set(uris) <= SITE


def test_pages_of_a_folder_stand_below_its_overview():
    below = {
        name: group
        for section in HOOKS.navigation()[1:]
        for e in next(iter(section.values()))
        for name, group in e.items()
    }
    assert below["Methods"][0] == {"Overview": "methods/index.md"}
    assert {"sharp_minmax": "methods/sharp_minmax.md"} in below["Methods"]
    assert below["Data"] == "data.md"


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_links_of_a_page_lead_to_pages_of_the_site(source: str):
    uri = SOURCES[source]
    text = HOOKS.CODE.sub("", HOOKS.rewritten(HOOKS.text_of(source), source, uri))
    for target in re.findall(r"\]\(([^)\s#]+)", text):
        if "://" not in target:
            there = posixpath.normpath(posixpath.join(posixpath.dirname(uri), target))
            assert there in SITE or (DOCS / there).is_file(), target


def test_a_page_is_rewritten_but_its_code_is_not():
    text = (
        "<!-- generated: data -->\nSee [the example](../examples/custom_method.py), [there](../docs/data.md#ids), "
        "[here](#masks), `unsharp.SAM`, [`unsharp.SAM`](x.md), `unsharp.SAMPLE` and [that](https://a.b/c_(d)).\n"
        "\n```python\n<!-- kept --> [kept](../README.md) `unsharp.SAM`\n```\n[home](../README.md#try-it)\n"
    )
    assert (
        HOOKS.rewritten(text, "docs/metrics/tow.md", "metrics/tow.md")
        .splitlines()[0]
        .startswith("See [the example](..")
    )
    assert HOOKS.rewritten(text, "docs/masks.md", "masks.md") == (
        "See [the example](examples/custom_method.md), [there](data.md#ids), "
        "[here](#masks), [`unsharp.SAM`][unsharp.SAM], [`unsharp.SAM`](x.md), `unsharp.SAMPLE` and [that](https://a.b/c_(d)).\n"
        "\n```python\n<!-- kept --> [kept](../README.md) `unsharp.SAM`\n```\n[home](quickstart.md#try-it)\n"
    )


@pytest.mark.parametrize(
    "fetched",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<script src="//cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="https://cdn.example/x.css">',
        '<link rel="preconnect" href="https://cdn.example">',
        '<img src="http://cdn.example/x.png"/>',
        '<img srcset="x.png 1x, https://cdn.example/x.png 2x">',
        '<iframe src="https://cdn.example"></iframe>',
        "<style>@import 'https://cdn.example/x.css';</style>",
        "<style>a { background: url( //cdn.example/x.png ) }</style>",
        '<p style="background: url(https://cdn.example/x.png)">a</p>',
    ],
)
def test_what_a_page_fetches_from_elsewhere_is_found(fetched: str, tmp_path: Path):
    (tmp_path / "page.html").write_text(f"<html><head></head><body>{fetched}</body></html>")
    assert len(HOOKS.fetches(tmp_path)) == 1


def test_a_style_sheet_that_fetches_from_elsewhere_is_found(tmp_path: Path):
    (tmp_path / "a.css").write_text("@import url(https://fonts.example/css?a=b); b { src: url('x.woff') }")
    assert HOOKS.fetches(tmp_path) == ["a.css: https://fonts.example/css?a=b"]


def test_what_is_no_fetch_from_elsewhere_is_left_alone(tmp_path: Path):
    (tmp_path / "page.html").write_text(
        '<link rel="canonical" href="https://a.b/c"><link rel="stylesheet" href="../x.css"><script src="x.js"></script>'
        '<a href="https://a.b/c">https://a.b/c</a><img src="data:image/png;base64,//8="><style>a { b: url(c) }</style>'
        '<svg xmlns="http://www.w3.org/2000/svg"></svg><script>fetch("https://a.b")</script><meta content="https://a.b">'
    )
    assert HOOKS.fetches(tmp_path) == []


@pytest.mark.slow
def test_the_site_is_whole(tmp_path: Path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    site = tmp_path / "site"
    page = (site / "reference.html").read_text(encoding="utf-8")
    assert [name for name in unsharp.__all__ if f'id="unsharp.{name}"' not in page] == []
    for section in ("Parameters:", "Returns:", "Raises:", "Attributes:"):
        assert re.search(rf"{section}</span></p>\s*<table>", page), section
    index = (site / "search/search_index.js").read_text(encoding="utf-8").removeprefix("var __index = ")
    found = {entry["location"].split("#")[0] for entry in json.loads(index)["docs"]}
    assert {uri.replace(".md", ".html") for uri in _uris(HOOKS.navigation())} <= found
    assert all((site / uri.replace(".md", ".html")).is_file() for uri in SITE)
