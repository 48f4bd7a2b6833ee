"""Loss surfaces in headless Chromium: drawn, turned by mouse and keyboard; the maps where nothing can be drawn."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from test_landscape_figures import bowl
from test_report_around import HOSTILE, found

from unsharp.report.around import render_around

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),
    pytest.mark.slow,
]
SOFTWARE = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader")
"""Drawing in three dimensions without a graphics card."""
SCENES = "[...document.querySelectorAll('.scene')]"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks on one set, one of them with a hole, and names that are markup."""
    holed = bowl(4.0, 9)
    holed[0, :2] = np.nan
    file = tmp_path_factory.mktemp("page") / "around.html"
    file.write_text(render_around(found(bowl(1.0, 9), holed, reasons={"trace": HOSTILE}), title=HOSTILE))
    return file


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile"), *SOFTWARE) as shown:
        yield shown


def show(browser: Browser, page: Path, width: int) -> None:
    """Open the page, and scroll to the surfaces, which are then drawn."""
    browser.open(page, width)
    browser.run("document.querySelector('.turning').scrollIntoView()")
    browser.until("document.querySelector('.turning').dataset.drawn === 'yes'")


def eyes(browser: Browser) -> list[dict[str, float]]:
    """Where the camera of each scene stands: as the page keeps it, which is as the scene draws it."""
    apart = "Math.abs(s.layout.scene.camera.eye[a] - s._fullLayout.scene._scene.getCamera().eye[a])"
    browser.until(f"{SCENES}.every(s => ['x', 'y', 'z'].every(a => {apart} < 1e-3))")
    return json.loads(browser.run(f"JSON.stringify({SCENES}.map(s => s.layout.scene.camera.eye))"))


def serious(browser: Browser) -> list[dict[str, Any]]:
    """What was said or thrown, but for hints on how fast drawing is."""
    hints = [one for one in browser.complaints() if one.get("entry", {}).get("source") == "rendering"]
    assert all(one["entry"]["level"] != "error" for one in hints)
    return [one for one in browser.complaints() if one not in hints]


def colours_in(browser: Browser, scene: int) -> int:
    """How many colours a scene's picture has."""
    return browser.run(
        f"""(() => {{
          const gl = {SCENES}[{scene}]._fullLayout.scene._scene.glplot;
          gl.redraw();
          const from = gl.gl, w = from.drawingBufferWidth, h = from.drawingBufferHeight;
          const pixels = new Uint8Array(4 * w * h);
          from.readPixels(0, 0, w, h, from.RGBA, from.UNSIGNED_BYTE, pixels);
          const seen = new Set();
          for (let i = 0; i < pixels.length; i += 4)
            if (pixels[i + 3] > 0) seen.add((pixels[i] >> 4) * 256 + (pixels[i + 1] >> 4) * 16 + (pixels[i + 2] >> 4));
          return seen.size;
        }})()"""
    )


@pytest.mark.parametrize("width", [390, 1600])
def test_surfaces_are_drawn_and_the_page_is_quiet_and_fits(browser: Browser, page: Path, width: int) -> None:
    show(browser, page, width)
    assert [colours_in(browser, i) > 12 for i in range(2)] == [True, True]
    assert browser.run("document.title").startswith("</script><script>")
    assert browser.run("document.querySelectorAll('img[src=x]').length") == 0
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelector('.unable').hidden") is True
    boxes = browser.run(f"JSON.stringify({SCENES}.map(s => s.getBoundingClientRect()))")
    for box in json.loads(boxes):
        assert box["height"] >= 200
        assert box["width"] >= 200
        assert box["right"] <= width
    # the hole is one, and heights of both networks are on one scale
    heights = json.loads(browser.run(f"JSON.stringify({SCENES}.map(s => s.data[0].z))"))
    assert [sum(h is None for row in of for h in row) for of in heights] == [0, 2]
    assert (
        json.loads(browser.run(f"JSON.stringify({SCENES}.map(s => [s.data[0].cmin, s.data[0].cmax]))")) == [[0, 1]] * 2
    )
    assert browser.requests() == [page.as_uri()]
    assert serious(browser) == []
    if folder := os.environ.get("UNSHARP_SCREENSHOTS"):
        browser.shot(Path(folder) / f"around-{width}.png")


def test_dragging_turns_all_networks_of_a_set(browser: Browser, page: Path) -> None:
    show(browser, page, 1600)
    before = eyes(browser)
    assert before[0] == pytest.approx(before[1])
    box = json.loads(browser.run(f"JSON.stringify({SCENES}[0].getBoundingClientRect())"))
    browser.drag((box["x"] + box["width"] / 2, box["y"] + box["height"] / 2), (90, 25))
    moved = f"Math.abs({SCENES}[1].layout.scene.camera.eye.x - {before[1]['x']}) > 0.05"
    browser.until(moved)
    browser.until(f"Math.abs({SCENES}[0].layout.scene.camera.eye.x - {SCENES}[1].layout.scene.camera.eye.x) < 1e-6")
    after = eyes(browser)
    assert after[0] == pytest.approx(after[1], abs=1e-6)
    # turned, not moved away
    lengths = [np.linalg.norm(list(eye.values())) for eye in (before[0], after[0])]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.05)
    assert serious(browser) == []


def test_buttons_turn_by_the_keyboard_and_bring_it_back(browser: Browser, page: Path) -> None:
    show(browser, page, 1600)
    before = eyes(browser)[0]

    def angle(eye: dict[str, float]) -> float:
        return float(np.degrees(np.arctan2(eye["y"], eye["x"])))

    def height(eye: dict[str, float]) -> float:
        return float(np.degrees(np.arctan2(eye["z"], np.hypot(eye["x"], eye["y"]))))

    def press(name: str) -> dict[str, float]:
        """Press a button by the keyboard; what the cameras then are, when all are the same."""
        old = eyes(browser)[0]
        browser.run(
            f"[...document.querySelectorAll('.controls button')].find(b => b.textContent.includes('{name}')).focus()"
        )
        browser.press("Enter")
        browser.until(f"{SCENES}.every(s => s.layout.scene.camera.eye.x !== {old['x']})")
        both = eyes(browser)
        assert both[0] == pytest.approx(both[1])
        return both[0]

    right = press("Right")
    assert angle(right) - angle(before) == pytest.approx(15, abs=0.1)
    assert height(right) == pytest.approx(height(before), abs=0.1)
    up = press("Up")
    assert height(up) - height(right) == pytest.approx(15, abs=0.1)
    near = press("Nearer")
    assert np.linalg.norm(list(near.values())) == pytest.approx(0.85 * np.linalg.norm(list(up.values())), rel=1e-3)
    assert press("As at first") == pytest.approx(before)
    assert serious(browser) == []


def test_what_is_out_of_view_is_given_back_and_comes_as_it_was(browser: Browser, page: Path) -> None:
    show(browser, page, 1600)
    browser.run("document.querySelector('.controls button').click()")
    browser.until(f"{SCENES}.every(s => s.layout.scene.camera.eye.x !== 1.5)")
    turned = eyes(browser)
    browser.run("document.querySelector('.turning').style.marginTop = '4000px'; window.scrollTo(0, 0)")
    browser.until("document.querySelector('.turning').dataset.drawn === undefined")
    assert browser.run("document.querySelectorAll('.scene canvas').length") == 0
    browser.run("document.querySelector('.turning').scrollIntoView()")
    browser.until("document.querySelector('.turning').dataset.drawn === 'yes'")
    back = eyes(browser)
    assert len(back) == len(turned) == 2
    for now, then in zip(back, turned):
        assert now == pytest.approx(then)
    assert serious(browser) == []


def test_a_screen_reader_is_told_of_surfaces_and_buttons(browser: Browser, page: Path) -> None:
    show(browser, page, 390)
    roles = browser.roles()
    assert {"banner", "main", "navigation", "contentinfo", "region", "heading", "group"} <= set(roles)
    assert roles.count("button") == 7
    named = browser.run(f"JSON.stringify({SCENES}.map(s => [s.getAttribute('role'), s.getAttribute('aria-label')]))")
    assert [(role, "table below" in label) for role, label in json.loads(named)] == [("img", True)] * 2


def test_where_nothing_can_be_drawn_the_maps_stand(page: Path, tmp_path: Path) -> None:
    with Browser(tmp_path / "profile", "--disable-3d-apis") as browser:
        browser.open(page, 390)
        assert browser.run("document.querySelector('.unable').hidden") is False
        assert "no WebGL" in browser.run("document.querySelector('.turning').innerText")
        assert browser.run("document.querySelectorAll('.scene, .controls').length") == 0
        assert browser.run("document.querySelector('#surfaces figure svg').getBoundingClientRect().height") > 100
        assert serious(browser) == []
        # and without any script
        browser.call("Emulation.setScriptExecutionDisabled", value=True)
        browser.open(page, 390)
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
        assert browser.run("document.querySelector('.turning').offsetHeight") == 0
        assert browser.run("document.querySelector('#surfaces figure svg').getBoundingClientRect().height") > 100
