"""The sweeps as runs: each writes its rows, a summary and a figure into a directory of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unsharp.artifacts import Run, Workspace, atomic
from unsharp.errors import UserError
from unsharp.theory import sweep as sweeps
from unsharp.theory.check import run_checks
from unsharp.theory.sweep import Row, Sweep, lemma, means, phase_diagram, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from unsharp.stages import Setting

ROWS, SUMMARY, STARS, CHECKS_FILE = "rows", "summary.json", "alpha", "checks.json"
CELL = ("d", "phi", "alpha", "n", "n_forget", "start", "perturb", "c", "tau", "step")


def run_map(sweep: Sweep, out: str | Path | None, at: Setting) -> Run:
    """Test errors over dimension and strength: `rows`, `summary.json`, `figure`."""
    from unsharp.theory import figures

    def work(workspace: Workspace) -> None:
        rows = phase_diagram(sweep, at.device, at.progress)
        _write(workspace, rows, figures.maps(rows, sweep.setup), _errors(rows))

    return at.perform(out, f"theory-{sweep.phase}-map", {"sweep": sweep}, work)


def run_trajectories(sweep: Sweep, out: str | Path | None, at: Setting) -> Run:
    """Errors and coefficients over the passes in one cell: `rows`, `summary.json` of the last pass, `figure`."""
    from unsharp.theory import figures

    def work(workspace: Workspace) -> None:
        rows = phase_diagram(sweep, at.device, at.progress)
        last = max(row["step"] for row in rows)
        summary = _errors([row for row in rows if row["step"] == last], "kappa_mean", "zeta_retain_same",
                          "zeta_forget_opposite")  # fmt: skip
        _write(workspace, rows, figures.trajectories(rows), summary)

    return at.perform(out, "theory-trajectories", {"sweep": sweep}, work)


def run_lemma(sweep: Sweep, starts: Sequence[str], out: str | Path | None, at: Setting) -> Run:
    """Lemma 3.1 as a quantity: `rows`, `summary.json`, `figure` (first step) and `figure-mean` (all steps)."""
    from unsharp.theory import figures

    def work(workspace: Workspace) -> None:
        rows = lemma(sweep, starts, at.device, at.progress)
        keys = ("d", "phi", "alpha", "start", "perturb", "c", "tau", "when", "set", "side", "erf")
        summary = means(rows, ("deact", "react", "shift", "active"), keys)
        _write(workspace, rows, figures.deactivation(rows), summary)
        figures.write_figure(figures.deactivation(rows, "mean"), workspace.path, "figure-mean")

    return at.perform(out, "theory-lemma31", {"sweep": sweep, "starts": list(starts)}, work)


def run_alpha(sweep: Sweep, sizes: Sequence[tuple[int, int]], out: str | Path | None, at: Setting) -> Run:
    """How small α may be: `rows`, `alpha` (1 − α* of each seed with the forget error there), summary, figure.

    Args:
        sweep: Grid and plans; its setup is run with each size.
        sizes: Samples and forget samples, (n, n_F).
        out: Run directory.
        at: Where and how.
    """
    from unsharp.theory import figures

    if len(sizes) > 1 and len(sweep.grid.d) > 1:
        raise UserError(f"d and n cannot both have several values, got {len(sweep.grid.d)} and {len(sizes)}")
    if len(sweep.grid.alpha) < 2:
        raise UserError("alpha must name at least two values, to look for a threshold between them")
    setups = [dataclasses.replace(sweep.setup, n=n, n_forget=n_forget) for n, n_forget in sizes]
    parts = [dataclasses.replace(sweep, setup=setup) for setup in setups]

    def work(workspace: Workspace) -> None:
        rows = [row for part in parts for row in phase_diagram(part, at.device, at.progress)]
        stars = sweeps.alpha_table(rows, sweep.setup, sweep.plans)
        keys = ("d", "phi", "n", "n_forget", "start", "perturb", "closed_form")
        _write_table(workspace, STARS, stars)
        _write(workspace, rows, figures.alpha(stars), means(stars, ("one_less_alpha", "forget_error"), keys))

    return at.perform(out, "theory-alpha-sweep", {"sweep": sweep, "sizes": [list(s) for s in sizes]}, work)


def run_check(
    ids: Sequence[str] | None, seed_base: int, at: Setting, each: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """Do the acceptance checks.

    Args:
        ids: Which; all if left out.
        seed_base: The first seed.
        at: Where and how.
        each: Takes each result when it is there.

    Returns:
        The results.
    """
    found = []
    for row in run_checks(ids, seed_base, at.device):
        each(row)
        found.append(row)
    return found


def _errors(rows: Sequence[Row], *more: str) -> list[Row]:
    return means(rows, ("test_error", "forget_error", "retain_error", *more), CELL)


def _write(workspace: Workspace, rows: Sequence[Row], figure: Figure, summary: Sequence[Row]) -> None:
    from unsharp.theory.figures import write_figure

    _write_table(workspace, ROWS, rows)
    workspace.write_json(SUMMARY, plain(summary))
    write_figure(figure, workspace.path)


def _write_table(workspace: Workspace, name: str, rows: Sequence[Row]) -> None:
    """Rows as NAME.csv and NAME.json."""
    import pandas as pd

    workspace.write_json(f"{name}.json", plain(rows))
    with atomic(workspace.file(f"{name}.csv")) as path:
        pd.DataFrame(rows).to_csv(path, index=False)
