"""Figures of what lies around a network: loss surfaces beside each other, eigenvalues, the way to another network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from unsharp.errors import UserError
from unsharp.evaluation.curvature import Density, Eigenvalues
from unsharp.evaluation.landscape import Surfaces
from unsharp.report.figures import COLOURS, DASHES, GRID, INK, MARKERS, MUTED, as_svg, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOUR_MAP = "cividis"
"""Even in lightness, and the same to readers who cannot tell red from green."""
LEVELS = 12
LOGARITHMIC = 20.0
"""A scale whose ends differ by more than this factor is logarithmic."""
DECADES = 6.0
"""A logarithmic scale reaches down no further than this below its upper end."""
SMALLEST = 1e-7
"""Densities below this share of the largest are drawn as this."""
KINDS = {"sam": "Worst case, as SAM's", "asam": "Worst case, as ASAM's", "average": "Average case"}
"""Kinds of sharpness, and their titles."""


class Course(Protocol):
    """Loss and accuracy on the way between two networks: a `Way`, or what was kept of it."""

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the sets."""
        ...

    @property
    def places(self) -> np.ndarray:
        """(T,) from 0, the first network, to 1, the second."""
        ...

    @property
    def loss(self) -> np.ndarray:
        """(sets, T) mean losses."""
        ...

    @property
    def accuracy(self) -> np.ndarray:
        """(sets, T), 0–100."""
        ...


def contours(surfaces: Surfaces, on: str) -> str:
    """The surfaces of all networks on one set, side by side, with one scale of levels and colours, as SVG.

    The cross marks the network itself. White is where the loss is not finite.

    Args:
        surfaces: What `Landscape.measure` gives.
        on: Name of the set.

    Raises:
        UserError: if there is no such set, or no loss on it is finite.
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.ticker import FuncFormatter

    grids = {name: surfaces.surface(name, on) for name in surfaces.networks}
    levels = levels_of(surfaces, on)
    colours = ListedColormap(level_colours(levels))
    norm = BoundaryNorm(levels, colours.N)
    n, reach = len(grids), float(surfaces.axis[-1])
    middle = len(surfaces.axis) // 2
    height = min(3.6, 6.4 / n + 0.85)
    with canvas(height, n, sharey=True) as (figure, axes):
        drawn: Any = None
        for ax, (name, grid) in zip(axes, grids.items()):
            # levels end where the scale does; what lies outside takes the colour of its end
            shown = np.clip(np.ma.masked_invalid(grid), levels[0], levels[-1])
            x, y = surfaces.axis, surfaces.axis
            drawn = ax.contourf(x, y, shown.T, levels=levels, cmap=colours, norm=norm)
            ax.contour(x, y, shown.T, levels=levels[1:-1], colors="white", linewidths=0.4, alpha=0.7)
            ax.plot(0.0, 0.0, marker="+", color="white", markersize=9, markeredgewidth=1.8, zorder=4)
            ax.plot(0.0, 0.0, marker="+", color=INK, markersize=8, markeredgewidth=0.9, zorder=5)
            ax.set_title(f"{name}\n{short(grid[middle, middle])} in the middle", loc="left")
            ax.set_xlabel("first direction")
            _square(ax, reach)
        axes[0].set_ylabel("second direction")
        bar = figure.colorbar(drawn, ax=axes, ticks=levels[::2], fraction=0.05, pad=0.02, aspect=28)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        bar.set_label(f"mean loss on the {on} samples")
        return as_svg(figure)


def levels_of(surfaces: Surfaces, on: str) -> np.ndarray:
    """The levels on which all networks are shown on a set, as of `scale_of`."""
    return scale_of([surfaces.surface(name, on) for name in surfaces.networks])


def level_colours(levels: np.ndarray) -> list[str]:
    """A colour for each step between two levels, from the lowest, as "#rrggbb"."""
    import matplotlib
    from matplotlib.colors import to_hex

    return [to_hex(c) for c in matplotlib.colormaps[COLOUR_MAP](np.linspace(0.0, 1.0, len(levels) - 1))]


def place_on(levels: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Where losses lie between the first level, 0, and the last, 1, in as many even steps as there are between levels.

    Args:
        levels: As `scale_of` gives them.
        loss: Losses of any shape.

    Returns:
        Of the same shape; NaN where the loss is not finite, and the nearer end where it is outside of the levels.
    """
    loss = np.where(np.isfinite(loss), loss, np.nan)
    logarithmic = levels[0] > 0 and levels[-1] > LOGARITHMIC * levels[0]
    if logarithmic:
        with np.errstate(divide="ignore", invalid="ignore"):
            loss, levels = np.log(np.maximum(loss, levels[0])), np.log(levels)
    return np.clip((loss - levels[0]) / (levels[-1] - levels[0]), 0.0, 1.0)


def has_finite(surfaces: Surfaces, on: str) -> bool:
    """Whether any loss on a set is finite, so that `contours` can show it."""
    return any(np.isfinite(surfaces.surface(name, on)).any() for name in surfaces.networks)


def scale_of(grids: Sequence[np.ndarray], n_levels: int = LEVELS) -> np.ndarray:
    """Levels for all of some surfaces: even steps, or even ratios where the losses differ by more than a factor of 20.

    Args:
        grids: Losses of any shapes.
        n_levels: Number of steps, at least 1.

    Returns:
        (n_levels + 1,) increasing; the first is not above the least finite loss, but that a logarithmic scale reaches
        down by six decades and no further, and the last is not below the largest.

    Raises:
        UserError: if no loss is finite.
    """
    finite = np.concatenate([np.asarray(grid, float)[np.isfinite(grid)] for grid in grids])
    if not len(finite):
        raise UserError("no loss of these surfaces is finite; measure them with a smaller reach")
    low, high = float(finite.min()), float(finite.max())
    if low >= 0 and high > LOGARITHMIC * low and high > 0:
        low = max(low, high * 10**-DECADES)
        levels = np.geomspace(low, high, n_levels + 1)
    else:
        low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
        levels = np.linspace(low, high, n_levels + 1)
    levels[0], levels[-1] = low, high
    return levels


def spectra(found: Mapping[str, tuple[Density, Sequence[Eigenvalues]]], on: str) -> str:
    """The spectral densities of several networks on one logarithmic scale, and single eigenvalues as ticks, as SVG.

    Args:
        found: By network its density, and the eigenvalues that were computed one by one.
        on: Name of the set, for the title.

    Raises:
        UserError: if there is none.
    """
    from matplotlib.ticker import FuncFormatter, NullLocator

    if not found:
        raise UserError("there is no spectral density to show; measure with density_draws of at least 1")
    ticks = {name: [value for end in ends for value in end.values] for name, (_, ends) in found.items()}
    every = [*(v for d, _ in found.values() for v in d.nodes.ravel()), *(v for t in ticks.values() for v in t)]
    low, high = min(every), max(every)
    width = ((high - low) or 1.0) / 100
    places = np.linspace(low - 4 * width, high + 4 * width, 600)
    heights = {name: density.at(places, width) for name, (density, _) in found.items()}
    top = max(float(h.max()) for h in heights.values())
    floor = top * SMALLEST
    with canvas(2.9, 1, sharey=False) as (figure, (ax,)):
        for i, (name, height) in enumerate(heights.items()):
            colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
            ax.plot(places, np.maximum(height, floor), color=colour, linestyle=dash, linewidth=1.3, label=name)
            # each network's ticks stand on a row of their own below the curves
            ends = floor * 4.0 ** -np.array([i + 0.15, i + 0.85])
            for value in ticks[name]:
                ax.plot([value, value], ends, color=colour, linewidth=1.6, solid_capstyle="butt")
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_ylim(floor * 4.0 ** -len(found), top * 3)
        ax.axvline(0.0, color=MUTED, linewidth=0.7)
        ax.set_xlabel("eigenvalue" + ("; ticks: computed one by one" if any(ticks.values()) else ""))
        ax.set_title(f"Density of the Hessian's eigenvalues on the {on} samples, logarithmic", loc="left")
        figure.legend(loc="outside upper left", ncols=len(found))
        return as_svg(figure)


def rises(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """How far the loss rises at worst and on average, for each network and set, as SVG; each kind has its own scale.

    Args:
        found: By network, set and kind (a key of `KINDS`) an object with "rise" and "standard_error", or None.

    Raises:
        UserError: if there is no rise.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    networks = list(found)
    sets = list(dict.fromkeys(on for of in found.values() for on in of))
    kinds = [k for k in KINDS if any((of[on] or {}).get(k) for of in found.values() for on in of)]
    if not kinds:
        raise UserError("there is no sharpness to show; all losses near the weights were NaN or infinite")
    with canvas(1.3 + 0.3 * len(sets), len(kinds), sharey=True) as (figure, axes):
        for ax, kind in zip(axes, kinds):
            for i, network in enumerate(networks):
                for y, on in enumerate(sets):
                    row = found[network].get(on, {}).get(kind)
                    if row is not None:
                        ax.errorbar(
                            row["rise"], y + 0.5 * ((i + 0.5) / len(networks) - 0.5), xerr=row["standard_error"],
                            color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=5.5,
                            elinewidth=1.0, linestyle="none", label=network if y == 0 else None,
                        )  # fmt: skip
            ax.set_title(KINDS[kind], loc="left")
            ax.set_xlabel("rise of the mean loss")
            low, high = ax.get_xlim()
            ax.set_xlim(min(low, 0.0), max(high, 0.0))
            ax.xaxis.set_major_locator(MaxNLocator(4))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            ax.axvline(0.0, color=MUTED, linewidth=0.7)
        axes[0].set_yticks(range(len(sets)), sets)
        axes[0].set_ylim(len(sets) - 0.5, -0.5)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(networks))
        return as_svg(figure)


def ways(found: Mapping[str, Course]) -> str:
    """Loss and accuracy on the straight ways between pairs of networks, a plot for each, as SVG.

    Args:
        found: Ways by name ("original to unlearned"), all on the same sets.

    Raises:
        UserError: if there is none.
    """
    if not found:
        raise UserError("there is no way to show; give at least one")
    sets = list(dict.fromkeys(name for way in found.values() for name in way.sets))
    with canvas(2.9, 2, sharey=False) as (figure, axes):
        handles: list[Any] = []
        for ax, what in zip(axes, ("loss", "accuracy")):
            for i, (name, way) in enumerate(found.items()):
                for j, on in enumerate(sets):
                    if on not in way.sets:
                        continue
                    curve = getattr(way, what)[way.sets.index(on)]
                    (line,) = ax.plot(
                        way.places, curve, color=COLOURS[i % len(COLOURS)], linestyle=DASHES[j % len(DASHES)],
                        marker=MARKERS[j % len(MARKERS)], markersize=3.5, markevery=max(1, len(curve) // 6),
                        label=f"{name}, {on}",
                    )  # fmt: skip
                    handles += [line] if what == "loss" else []
            ax.set_xlabel("place on the way")
            ax.set_title("Mean loss" if what == "loss" else "Accuracy (%)", loc="left")
            ax.grid(axis="x", color=GRID)
        figure.legend(handles=handles, loc="outside upper left", ncols=min(3, len(handles)), columnspacing=1.6)
        return as_svg(figure)


def _square(ax: Axes, reach: float) -> None:
    ax.grid(visible=False)
    ax.set_xlim(-reach, reach)
    ax.set_ylim(-reach, reach)
    ax.set_xticks([-reach, 0.0, reach])
    ax.set_yticks([-reach, 0.0, reach])
    ax.set_aspect("equal")
    for spine in ax.spines.values():
        spine.set_visible(False)


def short(value: float) -> str:
    """A loss in three digits."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"
