"""One offline page that a person can read from the top: verdict, tables, figures, what it all means and leaves open."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unsharp import artifacts
from unsharp.errors import UserError
from unsharp.evaluation.metrics import METRICS, Direction
from unsharp.methods.base import METHODS
from unsharp.registry import summary
from unsharp.report import figures, provenance
from unsharp.report.groups import Group, method_title
from unsharp.report.page import page
from unsharp.report.pictures import galleries
from unsharp.report.tables import Cell, Column, Grid, Table, footnote, grids, number, strength, summarise
from unsharp.report.verdict import SCALE, verdicts
from unsharp.sharpness.base import RULES

VARIABLES = {figures.INK: "ink", figures.MUTED: "muted", figures.GRID: "line"} | {
    colour: f"c{i}" for i, colour in enumerate(figures.COLOURS)
}
ABOUT_FIGURES = {
    "accuracies": (
        "Accuracies",
        "Each network's accuracy on the retained, the forgotten and the test samples; the dark line is the retrained "
        "network's. A network that forgot as retraining does lies on all three lines.",
    ),
    "gaps": (
        "Gaps to the retrained network",
        "Value minus the retrained network's. Zero is the aim, on either side it is missed.",
    ),
    "membership": (
        "Membership inference",
        "Share of the forget set that an attack takes for samples never trained on. The aim is the retrained network's "
        "share, the dark bar. Under each name stands how well the attack tells members from others at all.",
    ),
    "curves": (
        "While unlearning",
        "Accuracy after each epoch, mean over seeds, on at most 512 samples of each kind, on all forgotten ones where "
        "a run stops by their accuracy (epoch 0: the original, on all). The dashed line is the retrained network.",
    ),
    "cost": ("Cost", "What the forgetting took, against how close it came. Up and to the left is better."),
}
DIRECTIONS: dict[Direction, str] = {
    "higher": "higher is better",
    "lower": "lower is better",
    "to_reference": "nearer to the retrained network is better",
}
COSTS = (
    ("Time", "wall time of the work, saving and watching left out", "lower is better", "s"),
    ("Passes", "forward–backward passes: one for each batch and each evaluation of a rule", "lower is better", ""),
    (
        "Peak memory",
        "highest memory during the work: the accelerator's, or the process's growth",
        "lower is better",
        "",
    ),
)
LIMITS = (
    "This is an audit report, not a certificate. It says what was measured on the networks named here; it does not "
    "prove that nothing of the forget set is left in them.",
    "A membership attack bounds only what it tests. Those here look at the outputs of one network, without its "
    "weights, without the network from before, and without networks trained for comparison. Someone who has these may "
    "see more. A figure like the retrained network's shows that these attacks tell no difference, and no more.",
    "Agreement with the retrained network in accuracy, ToW or attacks is agreement in averages. Two networks can agree "
    "in them and differ on single samples and in their weights.",
    "The retrained network is one of many that retraining could have given. Part of any gap is chance; the interval "
    "over seeds shows how much, as far as the seeds differ in it.",
    "Copies are outside this report: the original checkpoint, backups, the data themselves, caches, logs, and networks "
    "that were derived from the original. So are samples that resemble the forgotten ones and were retained.",
    "Whoever holds the data can tell by trial which small forget set has the hash given here.",
    "Times hold for the machine and load at the time; the retrained network's may come from an earlier run.",
)


def write_report(
    path: str | Path,
    runs: Sequence[dict[str, Any]],
    *,
    title: str = "Unlearning report",
    show_samples: bool = False,
    pictures: int = 0,
) -> None:
    """Write the report of some unlearned networks as one HTML file that needs no network; its script only sorts tables.

    Args:
        path: The file.
        runs: Each `stages.about()` with the `evaluate_network()` values under "metrics"; seeds of one setting are
            averaged.
        title: Heading.
        show_samples: Whether the ids of the forgotten samples are listed; otherwise nothing in the page names them.
        pictures: How many forgotten samples of each run are shown, each with what the networks say of it; the runs must
            have "pictures", as `evaluation.pictures` makes them.

    Raises:
        UserError: if there are no runs, a figure is not finite, pictures are missing, or the file cannot be written.
    """
    if not runs:
        raise UserError("runs is empty; a report needs at least one unlearned network")
    page = render(summarise(runs), title=title, show_samples=show_samples, pictures=pictures)
    artifacts.write_text(path, page)


def render(table: Table, *, title: str = "Unlearning report", show_samples: bool = False, pictures: int = 0) -> str:
    """The page as text; the same bytes for the same table. Args: as `write_report`."""
    groups = [row.group for row in table.of_kind("unlearned")]
    notes: list[str] = []
    return page(
        "evaluation.html",
        sortable=True,
        title=title,
        groups=groups,
        tasks=list({g.task: g for g in groups}.values()),
        verdicts=verdicts(table),
        scale=SCALE if table.of_kind("retrained") else "",
        grids=[_grid(table, grid, notes) for grid in grids(table)],
        caption=table.caption,
        strength=strength(table),
        notes=notes,
        figures=_figures(table),
        metrics=_metrics(table),
        costs=COSTS,
        methods=_methods(groups),
        settings=provenance.unlearning(groups),
        origin=provenance.origin,
        runs=provenance.runs(groups),
        versions=provenance.versions(groups),
        limits=LIMITS,
        galleries=galleries(groups, pictures, show_samples=show_samples) if pictures else [],
        samples=provenance.samples(groups) if show_samples else None,
    )


def inline(svg: str, name: str) -> str:
    """An SVG for use within a page: ids of its own, colours from the page's variables, no links.

    Args:
        svg: As `figures` makes it.
        name: Prefix of the ids, unique in the page.
    """
    svg = re.sub(r"\sxmlns(:\w+)?=\"[^\"]*\"", "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    svg = re.sub(r"^<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true" focusable="false">', svg)
    return re.sub(r"#[0-9a-f]{6}\b", lambda m: _variable(m.group()), svg)


def _variable(colour: str) -> str:
    return f"var(--{VARIABLES[colour]})" if colour in VARIABLES else colour


def _figures(table: Table) -> list[dict[str, Any]]:
    from markupsafe import Markup

    drawn = {name: draw(table) for name, draw in figures.FIGURES.items()}
    return [
        {"name": n, "title": ABOUT_FIGURES[n][0], "about": ABOUT_FIGURES[n][1], "svg": Markup(inline(svg, n))}
        for n, svg in drawn.items()
        if svg is not None
    ]


def _grid(table: Table, grid: Grid, notes: list[str]) -> dict[str, Any]:
    """A grid with its cells as text; what is missing points to a footnote."""
    lines = []
    for i, (head, remark, cells) in enumerate(grid.lines):
        n = None if grid.down else table.rows[i].n
        kind = "" if grid.down else table.rows[i].group.kind
        shown = [_shown(column, cell, notes) for column, cell in cells]
        lines.append({"head": head, "remark": remark, "kind": kind, "n": n, "cells": shown})
    with_gap = any(cell.gap is not None for _, _, cells in grid.lines for _, cell in cells)
    return {"title": grid.title, "corner": grid.corner, "heads": grid.heads, "lines": lines, "with_gap": with_gap}


def _shown(column: Column, cell: Cell, notes: list[str]) -> dict[str, Any]:
    if cell.value is None:
        return {"note": footnote(cell.reason, notes)}
    gap = None if cell.gap is None else number(cell.gap, column.unit, signed=True)
    mean, _, half = number(cell.value, column.unit).partition(" ± ")
    return {"note": None, "mean": mean, "half": half, "gap": gap, "raw": repr(cell.value.mean)}


def _metrics(table: Table) -> list[Mapping[str, Any]]:
    """What each metric of the table is, from the registry."""
    keys = [c.key.split(".")[1] if "." in c.key else c.key for c in table.columns]
    known = [METRICS[key] for key in dict.fromkeys(keys) if key in METRICS]
    return [
        {"title": m.title, "formula": m.formula, "direction": DIRECTIONS[m.direction], "ideal": m.ideal,
         "unit": m.unit, "source": m.source}
        for m in known
    ]  # fmt: skip


def _methods(groups: Sequence[Group]) -> list[dict[str, str]]:
    """What each method and rule does, from the registries."""
    found: dict[str, dict[str, str]] = {}
    for group in groups:
        for kind, registry in (("method", METHODS), ("rule", RULES)):
            name = group.runs[0][kind]["name"]
            if name in registry and name != "none":
                thing = registry[name]
                title = method_title({**group.runs[0], "rule": {"name": "none"}}) if kind == "method" else name.upper()
                found[name] = {"title": title, "summary": summary(thing)}
                found[name] |= {"formula": thing.formula, "source": thing.source}
    return list(found.values())
