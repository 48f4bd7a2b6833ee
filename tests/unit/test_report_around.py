"""The page of what lies around a network: surfaces to turn, on the scale of the maps, and its own scripts alone."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from test_landscape_figures import bowl, fills, surfaces

from unsharp.artifacts import open_run, perform
from unsharp.errors import UserError
from unsharp.evaluation.landscape import Surfaces
from unsharp.report import page as pages
from unsharp.report.around import OF_SURFACE, render_around
from unsharp.report.landscape import contours, level_colours, levels_of, place_on, scale_of
from unsharp.report.turning import scenes
from unsharp.surroundings.findings import HEADLINES, Findings, plain
from unsharp.surroundings.stage import SURFACES_FILE, VALUES_FILE, read

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"


def found(*grids: np.ndarray, reasons: dict[str, str] | None = None, **more: Any) -> Findings:
    """Surfaces on the forget samples as a run tells them."""
    of = surfaces(*(grids or (bowl(1.0), bowl(2.0), bowl(1.5))))
    values = {
        "networks": list(of.networks),
        "sets": {"forget": {"n": 5, "whole": 9}},
        "settings": {"points": 7, "parts": ["surface"], "name": "</td>" + HOSTILE},
        "surface": plain(of.summary()),
        "reasons": reasons or {},
        **more,
    }
    return Findings(values, of)


def test_heights_are_even_on_the_scale_of_levels() -> None:
    """Linear: (loss − low)/(high − low); logarithmic: the same of the logarithms."""
    rng = np.random.default_rng(0)
    near, wide = rng.uniform(2.0, 9.0, (4, 5)), 10.0 ** rng.uniform(-3, 2, (4, 5))
    levels = scale_of([near])
    np.testing.assert_allclose(place_on(levels, near), (near - near.min()) / np.ptp(near), atol=1e-12)
    levels, logs = scale_of([wide]), np.log10(wide)
    np.testing.assert_allclose(place_on(levels, wide), (logs - logs.min()) / np.ptp(logs), atol=1e-12)
    for grid in (near, wide):
        levels = scale_of([grid])
        np.testing.assert_allclose(place_on(levels, levels), np.arange(13) / 12, atol=1e-12)
    odd = place_on(scale_of([near]), np.array([np.nan, np.inf, -np.inf, -5.0, 1e9]))
    np.testing.assert_array_equal(odd, [np.nan, np.nan, np.nan, 0.0, 1.0])
    zero = np.array([0.0, 1.0, 400.0])
    np.testing.assert_allclose(place_on(scale_of([zero]), zero), [0.0, 1 - np.log10(400) / 6, 1.0], atol=1e-12)


def test_a_body_is_the_surface_with_its_second_direction_along_the_rows() -> None:
    first, second = bowl(1.0), bowl(5.0)
    first[1, 4] = np.nan
    made = scenes(surfaces(first, second), "forget")
    low, high = 1.0, 9.0
    for grid, body in zip((first, second), made["networks"]):
        for i in range(7):
            for j in range(7):
                height, text = body["heights"][j][i], body["losses"][j][i]
                if np.isnan(grid[i, j]):
                    assert (height, text) == (None, "not finite")
                else:
                    assert height == pytest.approx((grid[i, j] - low) / (high - low), abs=1e-4)
                    assert float(text) == pytest.approx(grid[i, j], rel=6e-3)
    assert made["axis"] == np.linspace(-1, 1, 7).tolist()
    assert [height for height, _ in made["ticks"]] == [0, 0.25, 0.5, 0.75, 1]
    assert [text for _, text in made["ticks"]] == ["1", "3", "5", "7", "9"]
    json.dumps(made, allow_nan=False)


def test_bodies_have_the_colours_of_the_maps() -> None:
    of = surfaces(bowl(1.0, 9))
    (drawn,) = fills(contours(of, "forget"))
    bands = scenes(of, "forget")["bands"]
    assert len(bands) == len(set(bands)) == 12
    assert set(bands) == drawn
    assert bands == level_colours(levels_of(of, "forget"))
    light = [np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) @ [0.2126, 0.7152, 0.0722] for c in bands]
    assert light == sorted(light)
    assert to_hex(bands[0]) == bands[0]


def scripts(page: str) -> list[str]:
    return re.findall(r"<script>(.*?)</script>", page, re.DOTALL)


def test_directions_are_said_to_be_scaled_only_where_they_are() -> None:
    def said(**settings: str) -> str:
        of = found()
        values = {**of.values, "settings": {**of.values["settings"], **settings}}
        return render_around(replace(of, values=values), turning=False)

    assert "of its weights, scaled to them." in said(normalise="filter")
    assert "of its weights, scaled to those of the first network." in said(normalise="filter", scaled_by="first")
    assert "of its weights, not scaled to them." in said(normalise="none")


def test_the_page_allows_its_own_scripts_and_names_are_text() -> None:
    page = render_around(found(reasons={"trace": HOSTILE}), title=HOSTILE)
    allowed = re.findall(r"'(sha256-[^']+)'", html.unescape(page[: page.index("<title>")]))
    sums = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts(page)]
    assert allowed == [f"sha256-{one}" for one in sums]
    assert len(sums) == 2
    assert "unsafe-eval" not in page[: page.index("<title>")]
    assert HOSTILE not in page
    assert html.escape(HOSTILE, quote=True).replace("&#x27;", "&#39;") in page
    # data for the script is one block that ends where it should
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data) == scenes(surfaces(bowl(1.0), bowl(2.0), bowl(1.5)), "forget")
    assert page.count("<script") == page.count("</script>") == 3
    assert page.count('class="scene"') == 3


def test_the_script_is_only_in_pages_that_turn_something() -> None:
    still = render_around(found(), turning=False)
    assert "<script" not in still
    assert "plotly" not in still
    assert len(still) < 200_000
    bare = Findings({**found().values, "surface": {}}, None)
    assert "<script" not in render_around(bare)
    broken = found(np.full((7, 7), np.nan), np.full((7, 7), np.inf))
    assert "<script" not in render_around(broken)
    assert render_around(found()) == render_around(found())


def test_tables_tell_the_figures_and_gaps() -> None:
    values = {kind: {"rise": 0.25, "standard_error": None} for kind in ("sam", "asam", "average")}
    sharpness = {n: {"forget": values} for n in ("original", "retrained")}
    sharpness["unlearned"] = {"forget": {**values, "sam": {"rise": 1.5, "standard_error": None}}}
    page = render_around(found(sharpness=sharpness), turning=False)
    cells = {
        head: re.findall(r"<td[^>]*>([^<]*)</td>", row)
        for head, row in re.findall(r'<th scope="row">([^<]*)<small>.*?</th>(.*?)</tr>', page)
    }
    assert cells["Worst rise, SAM"] == ["0.25", "1.5", "0.25", "+1.25"]
    assert cells["Worst rise, ASAM"] == ["0.25", "0.25", "0.25", "+0"]
    assert cells["Loss in the middle"] == ["1", "2", "1.5", "+0.5"]
    deviation = float(bowl(0.0).std())
    assert float(cells["Deviation"][0]) == pytest.approx(deviation, rel=5e-3)
    assert "Not finite" not in cells
    assert set(HEADLINES["surface"]) <= set(OF_SURFACE)


def test_a_run_is_read_as_it_was_found(tmp_path: Path) -> None:
    grids = bowl(1.0), bowl(2.0)
    of = found(*grids)
    curve = {"loss_barrier": {"height": 0.5, "at": 0.5, "above_ends": 0.5}, "loss": [1.0, None, 1.0]}
    curve |= {"accuracy": [90.0, 80.0, 90.0], "accuracy_barrier": {"height": 10.0, "at": 0.5, "above_ends": 10.0}}
    way = {"places": [0.0, 0.5, 1.0], "about": {"form": "single", "reason": None}, "forget": curve}
    of.values["connectivity"] = {"original to unlearned": way}

    def work(workspace: Any) -> None:
        assert of.surfaces is not None
        of.surfaces.save(workspace.file(SURFACES_FILE))
        workspace.write_json(VALUES_FILE, of.values)

    perform(tmp_path / "run", "landscape", {}, work)
    again = read(open_run(tmp_path / "run"))
    assert isinstance(again.surfaces, Surfaces)
    np.testing.assert_array_equal(again.surfaces.loss, of.surfaces.loss if of.surfaces else None)
    kept = again.ways["original to unlearned"]
    np.testing.assert_array_equal(kept.loss, [[1.0, np.nan, 1.0]])
    np.testing.assert_array_equal(kept.accuracy, [[90.0, 80.0, 90.0]])
    assert "Ways between networks" in render_around(again, turning=False)
    perform(tmp_path / "other", "train", {}, lambda workspace: workspace.write_json("metrics.json", {}))
    with pytest.raises(UserError, match="'train' run"):
        read(open_run(tmp_path / "other"))


def test_without_plotly_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install plotly"):
        render_around(found())
    assert "scene" in render_around(replace(found()), turning=False)  # the style knows it, and the maps stand
