"""What lies around an unlearned network as one offline page, with loss surfaces that the reader can turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unsharp.report.groups import flatten
from unsharp.report.html import inline
from unsharp.report.page import markup, page
from unsharp.report.provenance import public
from unsharp.report.turning import scenes
from unsharp.surroundings.findings import RETRAINED, UNLEARNED, Findings
from unsharp.surroundings.stage import drawn

FIGURES = {
    "sam_rise": ("Worst rise, SAM", "largest rise of the mean loss found within ρ of the weights"),
    "asam_rise": ("Worst rise, ASAM", "likewise, each step in proportion to its weight"),
    "average_rise": ("Average rise", "mean rise under random steps"),
    "largest_eigenvalue": ("Largest eigenvalue", "of the Hessian"),
    "trace": ("Trace", "of the Hessian"),
}
"""Figures of a set that are told in a line, and what they are; those of the surface stand beside it."""
OF_SURFACE = {
    "centre": ("Loss in the middle", "that of the network itself"),
    "standard_deviation": ("Deviation", "of the losses over the plane"),
    "mean_gradient": ("Mean slope", "of the surface, per unit of the axes"),
    "basin_ratio": ("Basin", "share of the plane within half a deviation of the middle"),
    "not_finite": ("Not finite", "places of the plane whose loss is NaN or infinite"),
}
ABOUT = {
    "sharpness": (
        "Sharpness",
        "How far the mean loss rises at worst and on average near the weights; each kind on its own scale. Whiskers "
        "are standard errors.",
    ),
    "spectrum": ("Spectrum, {on} samples", "Where the eigenvalues of the Hessian lie, on one scale for all networks."),
    "ways": ("Ways between networks", "Loss and accuracy on the straight way from the weights of one to the other's."),
}
CONTROLS = (
    ('data-side="-1"', "← Left"),
    ('data-side="1"', "Right →"),
    ('data-up="1"', "↑ Up"),
    ('data-up="-1"', "↓ Down"),
    ('data-factor="0.85"', "Nearer"),
    ('data-factor="1.18"', "Farther"),
    ("data-start", "As at first"),
)
LIMITS = (
    "Two random directions are two of as many as the network has weights. What is steep in a thousand of the others "
    "cannot be seen on a surface.",
    "Flat or sharp is said of the loss on samples of each set, drawn at random where the set is larger than what was "
    "asked for.",
    "That the surroundings of two networks look alike does not show that they know the same.",
    "A worst rise is the largest that was found; a larger one may exist.",
)


def render_around(found: Findings, *, title: str = "Around an unlearned network", turning: bool = True) -> str:
    """The page as text; the same bytes for the same findings.

    Args:
        found: What `surroundings.stage.read` gives.
        title: Heading.
        turning: Whether surfaces are there to turn besides the maps, for which plotly's script, 5 MB, is inlined.

    Raises:
        UserError: if plotly is needed and missing.
    """
    values, svgs = found.values, drawn(found)
    surfaces = [_surface(found, on, svgs, turning) for on in values["sets"] if f"surface-{on}" in svgs]
    return page(
        "landscape.html",
        turning=turning and bool(surfaces),
        title=title,
        headline=_headline(values["networks"]),
        points=_points(values),
        tables=_tables(found),
        surfaces=surfaces,
        scaled=_scaled(values["settings"]),
        controls=[(markup(data), text) for data, text in CONTROLS],
        pictures=_pictures(svgs),
        settings=public(flatten(values["settings"])),
        limits=LIMITS,
    )


def _scaled(settings: Mapping[str, Any]) -> str:
    """To what the directions of the surfaces are scaled."""
    if settings.get("normalise") == "none":
        return "not scaled to them"
    return "scaled to those of the first network" if settings.get("scaled_by") == "first" else "scaled to them"


def _headline(networks: Sequence[str]) -> str:
    others = [name for name in networks if name != UNLEARNED]
    beside = f", beside the {' and the '.join(others)} one" if others else ""
    return f"How the loss lies around the unlearned network{beside}."


def _points(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    sets = [f"{on}: {n['n']:,} of {n['whole']:,}" for on, n in values["sets"].items()]
    points = [("Samples", f"{'; '.join(sets)}.")]
    if RETRAINED not in values["networks"]:
        points.append(("Compared", "There is no retrained network to compare with, so no figure has an aim."))
    points += [("Left out", f"{name}: {reason}.") for name, reason in values["reasons"].items()]
    return points


def _tables(found: Findings) -> list[dict[str, Any]]:
    values, tables = found.values, []
    for on in values["sets"]:
        rows = {name: row for name, row in found.headlines(on).items() if name in FIGURES}
        if rows:
            tables.append(_table(f"On the {on} samples", rows, FIGURES, values["networks"]))
    if ways := values.get("connectivity"):
        rows = [_row(name, "", [ways[name][on]["loss_barrier"]["height"] for on in values["sets"]]) for name in ways]
        heads = [f"{on.capitalize()}" for on in values["sets"]]
        tables.append({"caption": "Barriers in the loss", "corner": "Way", "heads": heads, "rows": rows})
    if pairs := values.get("distance"):
        rows = [_row(name, "", _apart(of, values["sets"])) for name, of in pairs.items()]
        heads = ["Weights, share of the first’s length", *(f"Features alike (CKA), {on}" for on in values["sets"])]
        tables.append({"caption": "Distances", "corner": "Pair", "heads": heads, "rows": rows})
    return tables


def _apart(of: Mapping[str, Any], sets: Sequence[str]) -> list[float | None]:
    features = [None if of[on] is None or of[on]["features"] is None else of[on]["features"]["debiased"] for on in sets]
    return [of["weights"]["relative"], *features]


def _table(
    caption: str, found: Mapping[str, Mapping[str, Any]], about: Mapping[str, tuple[str, str]], networks: Sequence[str]
) -> dict[str, Any]:
    """Figures by name and network as a table, with gaps where there is a retrained network."""
    with_gap = RETRAINED in networks
    rows = []
    for name, of in found.items():
        given = [of.get(network) for network in networks]
        ends = of.get(UNLEARNED), of.get(RETRAINED)
        gap = [None if ends[0] is None or ends[1] is None else ends[0] - ends[1]] if with_gap else []
        rows.append(_row(*about[name], given, gap))
    heads = [*(name.capitalize() for name in networks), *["Gap"] * with_gap]
    return {"caption": caption, "corner": "Figure", "heads": heads, "rows": rows}


def _row(head: str, about: str, values: Sequence[Any], gaps: Sequence[Any] = ()) -> dict[str, Any]:
    return {"head": head, "about": about, "cells": [*map(_number, values), *(_number(v, signed=True) for v in gaps)]}


def _number(value: float | None, *, signed: bool = False) -> str:
    return "—" if value is None else f"{value:{'+' if signed else ''}.3g}".replace("-", "−")


def _surface(found: Findings, on: str, svgs: Mapping[str, str], turning: bool) -> dict[str, Any]:
    """The maps of a set, its bodies to turn, and the figures of both."""
    assert found.surfaces is not None
    networks = list(found.surfaces.networks)
    flat = {network: found.values["surface"][network][on] for network in networks}
    rows = {name: {network: row[name] for network, row in flat.items()} for name in OF_SURFACE}
    if not any(rows["not_finite"].values()):
        del rows["not_finite"]
    return {
        "on": on,
        "svg": markup(inline(svgs[f"surface-{on}"], f"surface-{on}")),
        "networks": networks,
        "scenes": scenes(found.surfaces, on) if turning else None,
        "table": _table(f"Figures of the surfaces on the {on} samples", rows, OF_SURFACE, networks),
    }


def _pictures(svgs: Mapping[str, str]) -> list[dict[str, Any]]:
    shown = []
    for name, svg in svgs.items():
        kind, _, on = name.partition("-")
        if kind in ABOUT:
            title, about = ABOUT[kind]
            shown.append({"name": name, "title": title.format(on=on), "about": about, "svg": markup(inline(svg, name))})
    return shown
