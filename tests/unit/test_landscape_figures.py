"""The figures of surfaces, eigenvalues and ways: one scale, what is not finite, and the same bytes each time."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from weight_problems import images, mlp

from unsharp.errors import UserError
from unsharp.evaluation.connectivity import Connectivity
from unsharp.evaluation.curvature import Density, Eigenvalues
from unsharp.evaluation.landscape import Landscape, Surfaces
from unsharp.report import landscape as module
from unsharp.report.landscape import contours, rises, scale_of, spectra, ways


def surfaces(*grids: np.ndarray) -> Surfaces:
    names = ("original", "unlearned", "retrained")[: len(grids)]
    loss = np.stack(grids)[:, None]
    return Surfaces(names, ("forget",), np.linspace(-1, 1, loss.shape[-1]), loss, loss, loss, {"forget": 5}, {})


def bowl(depth: float, n: int = 7) -> np.ndarray:
    x, y = np.meshgrid(*2 * [np.linspace(-1, 1, n)], indexing="ij")
    return depth + x**2 + 3 * y**2


def fills(svg: str) -> list[set[str]]:
    """For each plot the colours of its filled contours; a level that nothing reaches has a path without points."""
    groups = re.split(r'<g id="QuadContourSet_\d+">', svg.partition('<g id="QuadMesh_1">')[0])[1::2]
    return [set(re.findall(r'<path d="M[^"]*"[^>]*style="fill: (#[0-9a-f]{6})', group)) for group in groups]


def test_levels_cover_all_surfaces():
    levels = scale_of([bowl(1.0), bowl(5.0)])
    assert (levels[0], levels[-1]) == (1.0, 9.0)
    np.testing.assert_allclose(np.diff(levels), 8 / 12)
    wide = scale_of([np.array([0.01, 2.0]), np.array([50.0, np.nan, np.inf])])
    assert (wide[0], wide[-1]) == (0.01, 50.0)
    np.testing.assert_allclose(np.diff(np.log(wide)), np.log(5000) / 12)
    assert scale_of([np.array([0.0, 100.0])])[0] == pytest.approx(1e-4)
    level = scale_of([np.full(4, 2.0)])
    assert level[0] < 2.0 < level[-1]
    negative = scale_of([np.array([-3.0, 400.0])])
    np.testing.assert_allclose(np.diff(negative), 403 / 12)
    with pytest.raises(UserError, match="no loss of these surfaces is finite"):
        scale_of([np.array([np.nan, np.inf])])


def test_surfaces_share_one_scale():
    """The same surface has the same colours beside a deeper one, and other colours alone."""
    both = contours(surfaces(bowl(1.0), bowl(5.1)), "forget")
    root = ET.fromstring(both)
    assert root.tag.endswith("svg")
    assert re.findall(r">(original|unlearned|1 in the middle|5.1 in the middle)<", both) == [
        "original", "1 in the middle", "unlearned", "5.1 in the middle",
    ]  # fmt: skip
    assert "mean loss on the forget samples" in both
    assert "font-family: 'DejaVu Sans'" in both or "DejaVu Sans" in both
    shallow, deep = fills(both)
    assert len(shallow) >= 6
    assert len(deep) >= 6
    assert shallow.isdisjoint(deep)  # one ends below where the other begins
    assert len(fills(contours(surfaces(bowl(1.0)), "forget"))[0]) == 12
    first, second = fills(contours(surfaces(bowl(1.0), bowl(1.0)), "forget"))
    assert first == second


def test_what_is_not_finite_is_left_white():
    broken = bowl(1.0)
    broken[0, :3] = np.inf
    broken[3, 3] = np.nan
    svg = contours(surfaces(broken, bowl(2.0)), "forget")
    assert "not finite in the middle" in svg
    ET.fromstring(svg)


def test_the_axes_are_not_swapped():
    """A loss that rises along the first direction only has the levels one beside the other, not one above the other."""
    x, _ = np.meshgrid(*2 * [np.linspace(-1, 1, 5)], indexing="ij")
    svg = contours(surfaces(x), "forget")
    paths = re.findall(r'<path d="([^"]+)" clip-path="[^"]+" style="fill: none; stroke: #ffffff', svg)
    assert paths
    numbers = [np.array(re.findall(r"(-?[\d.]+) (-?[\d.]+)", path), float) for path in paths if path.count("L") > 1]
    wide = [np.ptp(xy[:, 0]) for xy in numbers if len(xy) > 2]
    tall = [np.ptp(xy[:, 1]) for xy in numbers if len(xy) > 2]
    assert max(wide) < 1e-3 < max(tall)


def test_figures_of_measurements_are_the_same_bytes_each_time():
    data = {"retain": (images(), np.arange(15)), "forget": (images(), np.arange(15, 23))}
    config = Landscape(points=5, n_samples=None)
    for _ in range(2):
        found = config.measure({"a": mlp(0), "b": mlp(1)}, data)
        way = Connectivity(points=5, n_samples=None).measure(mlp(0), mlp(1), data)
        density = Density(np.array([[0.0, 1.0, 5.0]]), np.array([[0.9, 0.05, 0.05]]), 100, 3)
        made = [
            contours(found, "retain"),
            ways({"a to b": way, "again": way}),
            spectra(
                {"a": (density, [Eigenvalues((5.0,), (0.0,), True), Eigenvalues((-0.5,), (0.0,), True)])}, "forget"
            ),
        ]
        before = locals().get("first")
        first = made
        assert before is None or before == made
    for svg in made:
        ET.fromstring(svg)
    assert "a to b, retain" in made[1]
    assert "again, forget" in made[1]
    assert "ticks: computed one by one" in made[2]
    assert "ticks" not in spectra({"a": (density, [])}, "forget")


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch):
    """Makes the functions give the figure itself in place of its SVG."""
    monkeypatch.setattr(module, "as_svg", lambda figure: figure)


@pytest.mark.usefixtures("figure")
def test_spectra_share_one_scale():
    """The same density is the same curve under both names; one that is spread wider ends wider."""
    near = Density(np.array([[0.0, 1.0, 5.0]]), np.array([[0.9, 0.05, 0.05]]), 100, 3)
    wide = replace(near, nodes=3 * near.nodes)
    ends = [Eigenvalues((15.0, 3.0), (0.0, 0.0), True)]
    drawn = spectra({"a": (near, []), "b": (near, []), "c": (wide, ends)}, "forget").axes[0]
    curves = {line.get_label(): np.array(line.get_data()) for line in drawn.lines}
    np.testing.assert_array_equal(curves["a"], curves["b"])
    x, floor = curves["a"][0], curves["a"][1].min()
    # a node shows as far as the logarithm of its normal curve is above the floor
    last = {name: x[curves[name][1] > floor][-1] for name in "ac"}
    assert 5.0 < last["a"] < 6.0
    assert 15.0 < last["c"] < 16.0
    ticks = [
        line.get_xdata()[0] for line in drawn.lines if line.get_color() == "#008f6b" and len(line.get_xdata()) == 2
    ]
    assert ticks == [15.0, 3.0]


@pytest.mark.usefixtures("figure")
def test_rises_stand_at_their_networks_and_sets():
    row = {"rise": 2.0, "standard_error": None}
    found = {
        "unlearned": {"retain": {"sam": row, "average": row | {"rise": -1.0, "standard_error": 0.5}}, "forget": {}},
        "retrained": {"retain": {"sam": row | {"rise": 4.0}, "average": None}, "forget": {"sam": row | {"rise": 3.0}}},
    }
    sam, average = rises(found).axes
    assert [ax.get_title(loc="left") for ax in (sam, average)] == ["Worst case, as SAM's", "Average case"]
    assert [text.get_text() for text in sam.get_yticklabels()] == ["retain", "forget"]
    at = {bar.lines[0].get_color(): [] for bar in sam.containers}
    for bar in sam.containers:
        (x,), (y,) = bar.lines[0].get_data()
        at[bar.lines[0].get_color()].append((float(x), round(float(y))))
    assert at == {"#0072b2": [(2.0, 0)], "#d55e00": [(4.0, 0), (3.0, 1)]}
    assert len(average.containers) == 1
    (bar,) = average.containers[0].lines[2][0].get_segments()
    assert bar[:, 0].tolist() == [-1.5, -0.5]
    for ax in (sam, average):
        low, high = ax.get_xlim()
        assert low <= 0.0 <= high


def test_nothing_to_show_is_refused():
    with pytest.raises(UserError, match="no way to show"):
        ways({})
    with pytest.raises(UserError, match="no spectral density"):
        spectra({}, "forget")
    with pytest.raises(UserError, match="no sharpness"):
        rises({"a": {"forget": {"sam": None}}})
    with pytest.raises(UserError, match="unknown set 'test'"):
        contours(surfaces(bowl(1.0)), "test")
    nothing = surfaces(np.full((3, 3), np.nan))
    with pytest.raises(UserError, match="finite"):
        contours(replace(nothing, axis=np.linspace(-1, 1, 3)), "forget")
