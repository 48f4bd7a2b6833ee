"""Figures of the theory: maps, Lemma 3.1, α, trajectories; as PNG and SVG, told apart by shape as well as colour."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unsharp.stats import mean_interval
from unsharp.theory import thresholds
from unsharp.theory.data import Setup
from unsharp.theory.sweep import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {
    "sgd": "SGD",
    "joint": "SAM joint",
    "ce": "SAM ce",
    "retain": "SAM retain",
    "sep": "SAM sep",
    "minmax": "SAM minmax",
    "sharp_minmax": "Sharp MinMax",
}
GROUPS = {("retain", "same"): "R, j = y", ("forget", "same"): "F, j = y", ("retain", "opposite"): "R, j = −y",
          ("forget", "opposite"): "F, j = −y"}  # fmt: skip
HATCHES = ("", "///", "...", "xx", "\\\\\\", "++", "oo")
WIDTH = 9.5


def write_figure(figure: Figure, directory: Path, name: str = "figure") -> None:
    """Write a figure as NAME.png and NAME.svg into a directory."""
    with _style():
        figure.savefig(directory / f"{name}.png", dpi=140)
        figure.savefig(directory / f"{name}.svg", metadata={"Date": None})


def maps(rows: Sequence[Row], setup: Setup) -> Figure:
    """Test error over dimension and strength, a map for each way, with the forget error below it under NegGrad.

    Args:
        rows: Rows of `phase_diagram` for one α.
        setup: What data and network are, for the thresholds.
    """
    import pandas as pd

    table: Any = pd.DataFrame(rows)
    ways = _ways(table)
    figures = ["test_error"] if table["forget_error"].isna().all() else ["test_error", "forget_error"]
    with _axes(len(figures), len(ways), 2.9 * len(figures) + 0.5, sharey=True) as (figure, axes):
        for (title, mine), column in zip(ways.items(), axes.T):
            for figure_name, ax in zip(figures, column):
                grid = mine.pivot_table(index="d", columns="phi", values=figure_name, aggfunc="mean")
                _heat(ax, grid, figure_name)
                what = "test error" if figure_name == "test_error" else "forget error"
                ax.set_title(f"{title}: {what}", loc="left")
                if figure_name == "test_error":
                    _thresholds(ax, grid, setup)
        for ax in axes[-1]:
            ax.set_xlabel(f"signal strength ‖φ‖ (σ_p = {setup.sigma_p:g})")
        for ax in axes[:, 0]:
            ax.set_ylabel("dimension d")
        for name, line in zip(figures, axes):
            label = "test error, mean over seeds" if name == "test_error" else "forget error, mean over seeds"
            figure.colorbar(line[0].images[0], ax=list(line), label=label, shrink=0.9, pad=0.01)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2)
        _caption(figure, _about(table) + _map_interval(table, figures))
        return figure


def deactivation(rows: Sequence[Row], when: str = "first") -> Figure:
    """Lemma 3.1: share of active noise neurons that ε turns off, by group, with intervals and the closed form.

    Args:
        rows: Rows of `sweep.lemma`; each start is a plot, of the largest radius and the middle dimension.
        when: "first" step or "mean" over all.
    """
    import pandas as pd

    table: Any = pd.DataFrame(rows)
    table = table[(table["when"] == when) & (table["phi"] == table["phi"].iloc[0])]
    d = sorted(table["d"].unique())[len(table["d"].unique()) // 2]
    c = table["c"].max()
    table = table[(table["d"] == d) & ((table["c"] == c) | table["c"].isna())]
    starts, ways = list(dict.fromkeys(table["start"])), list(dict.fromkeys(table["perturb"]))
    with _axes(1, len(starts), 3.4, sharey=True) as (figure, axes):
        for ax, name in zip(axes[0], starts):
            for i, way in enumerate(ways):
                for x, key in enumerate(GROUPS):
                    mine = table[(table["start"] == name) & (table["perturb"] == way)]
                    values = mine[(mine["set"] == key[0]) & (mine["side"] == key[1])]["deact"]
                    place = x + 0.8 * ((i + 0.5) / len(ways) - 0.5)
                    _bar(ax, place, 0.8 / len(ways), values, i, NAMES[way] if x == 0 else None)
            ax.axhline(
                table["erf"].iloc[0], color=_ink(), linestyle=(0, (4, 2)), linewidth=1, label="erf(τ/(σ₀√(2mB)))"
            )
            ax.set_xticks(range(len(GROUPS)), list(GROUPS.values()))
            ax.set_title(f"start: {name}", loc="left")
            ax.set_ylim(-0.03, 1.08)
            ax.set_xlabel("set and output sign of the filter")
        times = "at the first step" if when == "first" else "mean over all steps"
        axes[0, 0].set_ylabel(f"share of active noise neurons turned off,\n{times}")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4)
        radius = "" if np.isnan(c) else f"c = {c:g}, "
        cell = table.iloc[0]
        _caption(figure, f"d = {d}, ‖φ‖ = {cell['phi']:g}, {radius}{_about(table)}; 95 % t intervals")
        return figure


def alpha(stars: Sequence[Row]) -> Figure:
    """1 − α*, its ratio to that of SGD, and the forget error at it, over dimension or over sample size.

    Args:
        stars: Rows of `sweep.alpha_table`.
    """
    import pandas as pd

    table: Any = pd.DataFrame(stars)
    x = "n" if table["n"].nunique() > 1 else "d"
    ways = list(dict.fromkeys(table["perturb"]))
    with _axes(1, 3, 3.7, sharey=False) as (figure, axes):
        left, middle, right = axes[0]
        for i, way in enumerate(ways):
            mine = table[table["perturb"] == way]
            _line(left, mine, x, "one_less_alpha", i, NAMES[way])
            _line(right, mine, x, "forget_error", i, None)
            known = mine.dropna(subset=["closed_form"]).drop_duplicates(x).sort_values(x)
            if len(known) and way != "retain":
                left.plot(
                    known[x], known["closed_form"].astype(float), color=_colour(i), linestyle=(0, (1, 1.5)), zorder=1
                )
        _ratios(middle, table, x, ways)
        left.plot([], [], color=_ink(), linestyle=(0, (1, 1.5)), label="closed form")
        _log(left, table[x])
        left.set_ylabel("1 − α* (largest with test error ≤ 0.1)")
        middle.set_ylabel("(1 − α*) / (1 − α*) of SGD")
        right.set_ylabel("forget error at α*")
        right.set_xscale("log")
        right.set_ylim(-0.03, 1.05)
        for ax in axes[0]:
            _ticks(ax, table[x])
            ax.set_xlabel("dimension d" if x == "d" else "samples n")
        handles, labels = left.get_legend_handles_labels()
        more, names = middle.get_legend_handles_labels()
        figure.legend(handles + more, labels + names, loc="outside upper left", ncols=5)
        phi = "/".join(f"{v:g}" for v in sorted(table["phi"].unique()))
        at = f"d = {table['d'].iloc[0]}, " if x == "n" else ""
        _caption(figure, f"{at}‖φ‖ = {phi}, {_about(table)}; 95 % t intervals")
        return figure


def trajectories(rows: Sequence[Row]) -> Figure:
    """Errors, signal coefficient and noise coefficients over the passes, mean and interval over seeds.

    Args:
        rows: Rows of `phase_diagram` with records on the way, of one cell.
    """
    import pandas as pd

    table: Any = pd.DataFrame(rows)
    panels = {
        "test_error": "test error",
        "forget_error": "forget error",
        "retain_error": "retain error",
        "kappa_mean": "signal coefficient κ, mean over filters",
        "zeta_retain_same": "noise coefficient ζ on R, j = y",
        "zeta_forget_opposite": "noise coefficient ζ on F, j = −y",
    }
    ways = _ways(table)
    with _axes(2, 3, 5.6, sharey=False) as (figure, axes):
        for ax, (figure_name, label) in zip(axes.flat, panels.items()):
            for i, (title, mine) in enumerate(ways.items()):
                _line(ax, mine, "step", figure_name, i, title, band=True)
            ax.set_title(label, loc="left")
            ax.set_xlabel("passes")
            if figure_name.endswith("error"):
                ax.set_ylim(-0.03, 1.05)
        axes[0, 0].axhline(0.1, color=_ink(), linestyle=(0, (4, 2)), linewidth=1, label="test error 0.1")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=5)
        cell = table.iloc[0]
        _caption(figure, f"d = {cell['d']}, ‖φ‖ = {cell['phi']:g}, {_about(table)}; 95 % t intervals")
        return figure


# --- parts ------------------------------------------------------------------------------------------------------------


def _ways(table: Any) -> dict[str, Any]:
    """The rows of each way, by its title."""
    found = {}
    for (perturb, c, tau), mine in table.groupby([table["perturb"], table["c"].fillna(-1), _radius(table)], sort=False):
        title = NAMES[str(perturb)]
        if mine["step"].max() and mine["alpha"].isna().all():
            title = "GD" if perturb == "sgd" else "SAM"
        if perturb != "sgd":
            title += f" (τ = {tau:g})" if c == -1 else f" (c = {c:g})"
        found[title] = mine
    return found


def _radius(table: Any) -> Any:
    """The radius where it is the same for all d."""
    return table["tau"].where(table["c"].isna()).fillna(-1)


def _caption(figure: Figure, text: str) -> None:
    figure.supxlabel(text, x=0.995, ha="right", fontsize=8)


def _about(table: Any) -> str:
    n = f"n = {'/'.join(str(v) for v in sorted(table['n'].unique()))}"
    cell = table.iloc[0]
    parts = [n]
    if cell["n_forget"]:
        parts.append(f"n_F = {'/'.join(str(v) for v in sorted(table['n_forget'].unique()))}")
    if "alpha" in table and table["alpha"].notna().any():
        parts.append(f"α = {cell['alpha']:g}")
    if cell["n_forget"] and table["start"].nunique() == 1:
        parts.append(f"start: {cell['start']}")
    parts.append(f"{table['seed'].nunique()} seeds")
    return ", ".join(parts)


def _heat(ax: Axes, grid: Any, name: str) -> None:
    """A map with its numbers; rows are dimensions from the smallest up."""
    top = 0.5 if name == "test_error" and grid.to_numpy().max() <= 0.5 else 1.0
    values = grid.to_numpy()
    ax.imshow(values, origin="lower", aspect="auto", cmap="cividis", vmin=0.0, vmax=top)
    ax.set_xticks(range(len(grid.columns)), [f"{v:g}" for v in grid.columns])
    ax.set_yticks(range(len(grid.index)), [f"{v:g}" for v in grid.index])
    ax.grid(visible=False)
    if values.size <= 150:
        for (i, k), value in np.ndenumerate(values):
            colour = "black" if value > 0.55 * top else "white"
            ax.text(k, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=6, color=colour)


def _thresholds(ax: Axes, grid: Any, setup: Setup) -> None:
    """The closed forms on the axes of a map, whose cells stand one apart."""
    of = {"patches": setup.n_patches, "sigma_p": setup.sigma_p}
    dimensions, strengths = grid.index.to_numpy(float), grid.columns.to_numpy(float)
    rows = np.linspace(0, len(dimensions) - 1, 60)
    d = np.exp(np.interp(rows, np.arange(len(dimensions)), np.log(dimensions)))
    lines = {
        "SGD: 1.05 (d/n)^(1/4) (P − 1) σ_p": (
            [thresholds.sgd_signal_threshold(v, setup.n, **of) for v in d],
            (0, (4, 2)),
        ),
        "SAM: 1.4 (P − 1) σ_p": ([thresholds.sam_signal_threshold(**of)] * len(d), (0, (1, 1.2))),
    }
    for label, (strength, dash) in lines.items():
        inside = [strengths[0] <= s <= strengths[-1] for s in strength]
        places = np.interp(strength, strengths, np.arange(len(strengths)))
        ax.plot(places[inside], rows[inside], color="#d55e00", linewidth=2.2, linestyle=dash, label=label)


def _bar(ax: Axes, place: float, width: float, values: Any, i: int, label: str | None) -> None:
    kept = values.dropna().tolist()
    look: dict[str, Any] = {"color": _colour(i), "hatch": HATCHES[i % len(HATCHES)], "edgecolor": "white"}
    if not kept:
        ax.bar(place, 0, width, label=label, **look)
        ax.text(place, 0.01, "too\nfew", ha="center", va="bottom", fontsize=6)
        return
    found = mean_interval(kept)
    half = found.half_width or 0.0
    arms = [[min(half, found.mean)], [min(half, 1 - found.mean)]]
    ax.bar(place, found.mean, width, yerr=arms, label=label, error_kw={"elinewidth": 1.1, "ecolor": _ink()}, **look)


def _line(ax: Axes, table: Any, x: str, y: str, i: int, label: str | None, *, band: bool = False) -> None:
    """Means over seeds with their 95 % t intervals; seeds without a value are left out, here and there."""
    from unsharp.report.figures import DASHES, MARKERS

    places, means, halves = [], [], []
    for place, mine in table.groupby(x):
        kept = mine[y].dropna().tolist()
        if kept:
            found = mean_interval(kept)
            places.append(place)
            means.append(found.mean)
            halves.append(found.half_width or 0.0)
    middle, half = np.array(means), np.array(halves)
    look: dict[str, Any] = {"color": _colour(i), "linestyle": DASHES[i % len(DASHES)], "label": label}
    if band:
        every = max(1, len(places) // 8)
        ax.plot(places, middle, marker=MARKERS[i % len(MARKERS)], markersize=4, markevery=every, **look)
        ax.fill_between(places, middle - half, middle + half, color=_colour(i), alpha=0.18, linewidth=0)
    else:
        low = np.minimum(half, 0.9 * np.abs(middle))
        ax.errorbar(
            places, middle, yerr=[low, half], marker=MARKERS[i % len(MARKERS)], markersize=5, elinewidth=1.1, **look
        )


def _map_interval(table: Any, figures: Sequence[str]) -> str:
    """How wide the 95 % t intervals of a map's means are, where there are seeds enough to tell."""
    if table["seed"].nunique() < 2:
        return ""
    cells = table.groupby([c for c in ("perturb", "c", "tau", "d", "phi") if c in table], dropna=False)
    found = [mean_interval(mine[name]).half_width for _, mine in cells for name in figures]
    half = [h for h in found if h is not None]
    return f"; half-width of the 95 % t intervals: median {np.median(half):.2f}, largest {max(half):.2f}"


def _ratios(ax: Axes, table: Any, x: str, ways: Sequence[str]) -> None:
    """(1 − α*) of each way over that of SGD on the same seed, and the order √(d/n) through the first point."""
    keys = ["d", "n", "seed"]
    base = table[table["perturb"] == "sgd"][[*keys, "one_less_alpha"]]
    anchor = None
    for i, way in enumerate(ways):
        if way == "sgd":
            continue
        both = table[table["perturb"] == way].merge(base, on=keys, suffixes=("", "_sgd"))
        both["ratio"] = both["one_less_alpha"] / both["one_less_alpha_sgd"]
        if both["ratio"].notna().any():
            _line(ax, both, x, "ratio", i, None)
            first = both.dropna(subset=["ratio"]).groupby(x)["ratio"].mean()
            anchor = anchor or (first.index[0], first.iloc[0])
    if anchor is None:
        ax.text(0.5, 0.5, "no ratio: SGD is missing", ha="center", transform=ax.transAxes)
        return
    places = np.array(sorted(table[x].unique()), dtype=float)
    order = anchor[1] * (places / anchor[0]) ** (0.5 if x == "d" else -0.5)
    ax.plot(places, order, color=_ink(), linestyle=(0, (4, 2)), linewidth=1, label="order √(d/n)")
    _log(ax, table[x])


def _log(ax: Axes, x: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: ""))
    _ticks(ax, x)


def _ticks(ax: Axes, x: Any) -> None:
    """The values that were run, as ticks."""
    from matplotlib.ticker import NullLocator

    ax.set_xscale("log")
    places = sorted(set(x))
    ax.set_xticks(places, [f"{v:g}" for v in places])
    ax.xaxis.set_minor_locator(NullLocator())


def _colour(i: int) -> str:
    from unsharp.report.figures import COLOURS

    return COLOURS[i % len(COLOURS)]


def _ink() -> str:
    from unsharp.report.figures import INK

    return INK


def _style() -> contextlib.AbstractContextManager[Any]:
    import matplotlib

    from unsharp.report.figures import STYLE

    return matplotlib.rc_context({**STYLE, "font.size": 8.0})


@contextlib.contextmanager
def _axes(n_rows: int, n_columns: int, height: float, *, sharey: bool) -> Iterator[tuple[Figure, Any]]:
    from matplotlib.figure import Figure

    with _style():
        width = max(WIDTH * 0.5, min(WIDTH, 3.4 * n_columns) if n_columns <= 3 else 3.0 * n_columns)
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(n_rows, n_columns, sharey=sharey, squeeze=False)
