"""The pages as people see them, in headless Chromium: nothing is fetched or fails, tables sort, narrow and wide."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from test_index import keep
from test_report import run

from unsharp.audit import bounds as bounding
from unsharp.index import read_index
from unsharp.report import write_report
from unsharp.report.audit import render_audit
from unsharp.report.overview import render

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),
    pytest.mark.slow,
]
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
WIDTHS = (390, 1600)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as shown:
        yield shown


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of five settings over three seeds, one of them with a name that is markup."""
    runs = [run(seed, accuracy=80.0 + 3 * i + seed, alpha=0.5 + i / 10) for i in range(4) for seed in range(3)]
    runs += [run(seed, method=HOSTILE, accuracy=70.0) for seed in range(3)]
    file = tmp_path_factory.mktemp("page") / "report.html"
    write_report(file, runs, title=f"Report {HOSTILE}")
    return file


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_quiet_and_fits(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    assert browser.run("document.title").startswith("Report <img")
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.run("document.querySelectorAll('figure svg').length") >= 3
    assert browser.run("document.documentElement.scrollWidth") <= width
    # Figures are drawn: each has area, and marks in it.
    sizes = browser.run("[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().height)")
    assert min(sizes) > 100
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []
    if folder := os.environ.get("UNSHARP_SCREENSHOTS"):
        browser.shot(Path(folder) / f"report-{width}.png")


@pytest.mark.parametrize("width", WIDTHS)
def test_audit_and_overview_are_quiet_and_fit(browser: Browser, tmp_path: Path, width: int) -> None:
    audit = {
        "written": "2026-01-01T00:00:00+00:00",
        "verdict": "pass",
        "reason": HOSTILE,
        "asked": {"n": 3, "n_samples": 100, "n_absent": 5, "hash": "e" * 64, "codes": None, "ids": [HOSTILE, "b"]},
        "done": {
            "method": HOSTILE,
            "rule": "sam",
            "unlearn": {"epochs": 2, "method": {"name": HOSTILE}},
            "origin": {"fingerprint": "f" * 64, "model": {"arch": HOSTILE}},
            "retrained": "a" * 64,
            "why_not_retrained": None,
        },
        "bounds": {"set": "before the run", "from": "defaults"},
        "tests": bounding.test(bounding.DEFAULT, run()["metrics"]),
        "threat_model": [{"about": "Who", "text": "someone"}],
        "limits": ["Evidence, not proof."],
        "rerun": {"who": "Whoever.", "command": f"unsharp forget --model CHECKPOINT --ids IDS --arch {HOSTILE}"},
        "inputs": [{"what": "IDS", "sha256": "1" * 64}],
        "outputs": [{"file": "model.safetensors", "sha256": "2" * 64}],
        "derived": [{"stage": HOSTILE, "what": "a network", "sha256": "3" * 64, "bytes": 12345, "kept": False}],
        "not_seen": ["the data"],
        "history": [{"event": "request", "written": "2025", "asked": {"n": 2, "hash": "d" * 64}, "verdict": "fail"}],
        "versions": {"python": "3.11"},
    }
    keep(tmp_path / "runs" / "evil", run(0, method=HOSTILE))
    pages = {"audit": render_audit(audit), "overview": render(read_index(tmp_path / "runs"), title=HOSTILE)}
    for name, text in pages.items():
        file = tmp_path / f"{name}.html"
        file.write_text(text)
        browser.open(file, width)
        assert browser.run("document.title") != "owned"
        assert browser.run("document.querySelectorAll('img').length") == 0
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.requests() == [file.as_uri()]
        assert browser.complaints() == []
        assert {"banner", "main", "contentinfo", "region"} <= set(browser.roles())
        if folder := os.environ.get("UNSHARP_SCREENSHOTS"):
            browser.shot(Path(folder) / f"{name}-{width}.png")


def column(browser: Browser, i: int) -> list[str]:
    """The cells of a column of the first table, from the top."""
    return browser.run(
        f"[...document.querySelector('table').tBodies[0].rows].map(r => r.cells[{i}].textContent.trim())"
    )


def test_tables_sort_by_mouse_and_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page, 1600)
    heads = browser.run("[...document.querySelectorAll('table')[0].tHead.rows[0].cells].map(c => c.textContent)")
    at = heads.index("Forget")
    before = column(browser, at)
    button = f"document.querySelectorAll('table')[0].tHead.rows[0].cells[{at}].querySelector('button')"
    state = f"document.querySelectorAll('table')[0].tHead.rows[0].cells[{at}].getAttribute('aria-sort')"
    values = f"[...document.querySelector('table').tBodies[0].rows].map(r => Number(r.cells[{at}].dataset.v))"
    assert browser.run(state) is None
    browser.run(f"{button}.click()")
    assert browser.run(state) == "ascending"
    found = browser.run(values)
    assert found == sorted(found)
    assert len(set(found)) > 4
    browser.run(f"{button}.focus()")
    browser.press("Enter")
    assert browser.run(state) == "descending"
    found = browser.run(values)
    assert found == sorted(found, reverse=True)
    assert sorted(column(browser, at)) == sorted(before)
    # Whole rows move, and another column takes the mark over.
    assert browser.run("document.querySelectorAll('table')[0].querySelectorAll('[aria-sort]').length") == 1
    browser.press("Tab")
    browser.press(" ")
    assert browser.run(state) is None
    browser.run("document.querySelectorAll('table')[0].tHead.rows[0].cells[0].querySelector('button').click()")
    labels = column(browser, 0)
    assert labels == sorted(labels, key=str.lower)
    assert browser.complaints() == []


def test_a_screen_reader_finds_its_way(browser: Browser, page: Path) -> None:
    browser.open(page, 390)
    roles = browser.roles()
    for role in ("banner", "main", "navigation", "contentinfo", "region", "heading", "columnheader", "rowheader"):
        assert role in roles, role
    assert "button" in roles


def test_only_its_own_script_may_run(browser: Browser, page: Path, tmp_path: Path) -> None:
    """The rule of the page holds also where someone has put another script into it."""
    file = tmp_path / "other.html"
    file.write_text(page.read_text().replace("</body>", "<script>document.title='owned'</script></body>"))
    browser.open(file, 1600)
    assert browser.run("document.title").startswith("Report <img")
    assert browser.run("document.querySelectorAll('th button').length") > 0
