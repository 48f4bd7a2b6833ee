"""One offline page about a search: the choice, every trial on a plot and in a table, and what the target is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unsharp import artifacts
from unsharp.report import figures, provenance
from unsharp.report.groups import RULES, SYMBOLS, method_title, shown
from unsharp.report.html import inline
from unsharp.report.page import markup, page

PAGE = "tuning.html"
KINDS = {
    "given": "given by the user",
    "classes": "the original's accuracy on unseen samples of the same classes",
    "matched": "the original's accuracy on unseen samples of the same classes and difficulties",
    "scores": "what the difficulty scores say of a network that has not seen the forget set",
}
LIMITS = (
    "The target is an estimate of what a retrained network would have; nobody retrained one here. Unseen samples stand "
    "for the forget set only as far as the forget set was drawn like them. On samples that are hard and that the "
    "original knows by heart, a retrained network is right far less often than on unseen samples of the same classes; "
    "on easy ones far more often.",
    "Accuracy is one figure. Two networks with equal accuracies can differ in what membership inference sees; evaluate "
    "the choice (unsharp forget), and against a retrained network if one can be had.",
    "Every trial had one seed. The same settings give somewhat other figures with another seed.",
    "The unseen accuracy of the trials took no part in the choice, and only the original's entered the target.",
)


def write_tuning(path: str | Path, choice: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the page. Raises: UserError if it cannot be written.

    Args:
        path: The file.
        choice: What `tune` writes as choice.json; plain values.
        rows: What it writes as trials.json.
    """
    artifacts.write_text(path, render_tuning(choice, rows))


def render_tuning(choice: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The page as text; the same bytes for the same values. Args: as `write_tuning`."""
    best = [_best_of(trial) for trial in _by_trial(rows)]
    varied = [name for name, values in choice["searched"].items() if len(values) > 1]
    return page(
        PAGE,
        title=f"Search of settings: {method_title(choice['unlearn'])}",
        headline=_headline(choice),
        tiles=_tiles(choice),
        points=_about(choice),
        warnings=choice["warnings"],
        figure=markup(inline(scatter(choice, rows), "trials")),
        heads=[*(SYMBOLS.get(n, n.replace("_", " ")) for n in varied), "Retain", "Forget", "Unseen", "Distance",
               "Floor kept", "Passes", "Time (s)"],
        lines=[_line(row, varied) for row in best],
        failed=[(f"Trial {f['trial'] + 1}", f["why"]) for f in choice["failed"]],
        settings=provenance.public(choice["unlearn"]),
        origin=provenance.public({k: v for k, v in choice["origin"].items() if v is not None}),
        forget=choice["forget"],
        versions=choice["versions"],
        limits=LIMITS,
    )  # fmt: skip


def scatter(choice: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Retain against forget accuracy of everything that was tried, with the target and the floor, as SVG."""
    from matplotlib.lines import Line2D

    goal, target, original = choice["goal"], choice["target"], choice["original"]
    colour_by, marker_by = _two_axes(choice["searched"])
    handles: dict[str, Any] = {}
    with figures.canvas(5.0, 1, sharey=False) as (figure, (ax,)):
        error = target["error"] or 0.0
        ax.axvspan(goal["target"] - error, goal["target"] + error, color=figures.GRID, linewidth=0, zorder=0)
        ax.axvline(goal["target"], color=figures.INK, linewidth=1.2, zorder=1)
        ax.axhline(goal["floor"], color=figures.INK, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
        start = {"forget_accuracy": original["forget_accuracy"], "retain_accuracy": original["retain_accuracy"]}
        for trial in _by_trial(rows):
            settings = trial[0]["settings"]
            colour = figures.COLOURS[_place(choice, colour_by, settings) % len(figures.COLOURS)]
            marker = figures.MARKERS[_place(choice, marker_by, settings) % len(figures.MARKERS)]
            path = [start, *trial] if len(trial) > 1 else trial
            ax.plot([r["forget_accuracy"] for r in path], [r["retain_accuracy"] for r in path], color=colour,
                    linewidth=0.8, zorder=2)  # fmt: skip
            ax.plot([r["forget_accuracy"] for r in trial], [r["retain_accuracy"] for r in trial], color=colour,
                    marker=marker, markersize=5, linestyle="none", zorder=3)  # fmt: skip
            for name, shape in ((colour_by, "s"), (marker_by, marker)):
                if name is not None:
                    label = f"{SYMBOLS.get(name, name.replace('_', ' '))} = {shown(name, settings[name])}"
                    shade = colour if name == colour_by else figures.MUTED
                    handles[label] = Line2D([], [], color=shade, linestyle="none", label=label, marker=shape)
        chosen = next(row for row in rows if row["chosen"])
        ax.plot(chosen["forget_accuracy"], chosen["retain_accuracy"], marker="o", markersize=13, markeredgewidth=1.6,
                markerfacecolor="none", color=figures.INK, linestyle="none", zorder=5)  # fmt: skip
        ax.plot(*start.values(), marker="h", markersize=8, color=figures.MUTED, linestyle="none", zorder=5)
        ax.set_xlabel("forget accuracy (%)")
        ax.set_title("Retain accuracy (%)", loc="left")
        ax.set_xlim(figures.room(ax.get_xlim(), percent=True))
        ax.set_ylim(figures.room(ax.get_ylim(), percent=True))
        fixed = [
            Line2D([], [], color=figures.MUTED, marker="h", linestyle="none", label="original"),
            Line2D([], [], color=figures.INK, marker="o", markersize=9, markerfacecolor="none", linestyle="none",
                   label="chosen"),
            Line2D([], [], color=figures.INK, linewidth=1.2, label="target"),
            Line2D([], [], color=figures.INK, linewidth=1.2, linestyle=(0, (4, 2)), label="floor"),
        ]  # fmt: skip
        order = [handles[label] for label in sorted(handles, key=_by_number)]
        figure.legend(handles=fixed + order, loc="outside upper left", ncols=4, handletextpad=0.5, columnspacing=1.6)
        return figures.as_svg(figure)


# --- parts ------------------------------------------------------------------------------------------------------------


def _by_trial(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    trials: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        trials.setdefault(row["trial"], []).append(row)
    return list(trials.values())


def _best_of(trial: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row that a table shows: the chosen one, else the nearest that keeps the floor, else the least loss."""
    return min(
        trial,
        key=lambda r: (
            not r["chosen"],
            not r["met_floor"],
            r["distance"] if r["met_floor"] else -r["retain_accuracy"],
            r["passes"],
        ),
    )


def _two_axes(searched: Mapping[str, Sequence[Any]]) -> tuple[str | None, str | None]:
    """What colour and shape of a mark tell: the first two settings, epochs aside, with several values."""
    varied = [name for name, values in searched.items() if len(values) > 1 and name != "epochs"]
    return (*varied[:2], None, None)[:2]  # pyright: ignore[reportReturnType]


def _place(choice: Mapping[str, Any], name: str | None, settings: Mapping[str, Any]) -> int:
    return 0 if name is None else list(choice["searched"][name]).index(settings[name])


def _by_number(label: str) -> tuple[str, float, str]:
    name, _, value = label.partition(" = ")
    try:
        return name, float(value), value
    except ValueError:
        return name, 0.0, value


def _line(row: Mapping[str, Any], varied: Sequence[str]) -> dict[str, Any]:
    unseen = row["unseen_accuracy"]
    cells = [shown(name, row["settings"][name]) for name in varied]
    cells += [f"{row['retain_accuracy']:.1f}", f"{row['forget_accuracy']:.1f}"]
    cells += ["–" if unseen is None else f"{unseen:.1f}", f"{row['distance']:.1f}"]
    cells += ["yes" if row["met_floor"] else "no", f"{row['passes']:,}", f"{row['seconds']:.1f}"]
    return {"head": f"Trial {row['trial'] + 1}", "chosen": row["chosen"], "cells": cells}


def _headline(choice: Mapping[str, Any]) -> str:
    point, goal = choice["point"], choice["goal"]
    settings = ", ".join(f"{SYMBOLS.get(n, n.replace('_', ' '))} {shown(n, v)}" for n, v in choice["settings"].items())
    text = (
        f"With {settings} the forget accuracy is {point['forget_accuracy']:.1f} %, where {goal['target']:.1f} % was "
        f"aimed at, and {point['retain_accuracy']:.1f} % of the retained samples stay right"
    )
    return text + ("." if choice["met_floor"] else f": less than the {goal['floor']:.1f} % that were to be kept.")


def _tiles(choice: Mapping[str, Any]) -> list[tuple[str, str]]:
    point, goal, budget = choice["point"], choice["goal"], choice["budget"]
    return [
        (f"{choice['distance']:.1f}", f"points from the target of {goal['target']:.1f} % on the forget set"),
        (f"{point['retain_accuracy']:.1f} %", f"of retained samples right; the floor is {goal['floor']:.1f} %"),
        (f"{point['passes']:,}", "forward–backward passes for a run with these settings"),
        (f"{budget['spent_training_epochs']:.4g}", "epochs of training for the whole search"),
    ]


def _about(choice: Mapping[str, Any]) -> list[tuple[str, str]]:
    target, original, unlearn = choice["target"], choice["original"], choice["unlearn"]
    error = "" if target["error"] is None else f" ± {target['error']:.1f} (standard error, from chance alone)"
    on = "" if target["n_unseen"] is None else f", from {target['n_unseen']:,} unseen samples"
    rule = unlearn["rule"]["name"]
    under = "" if rule == "none" else f" under {RULES.get(rule, rule)}"
    searched = "; ".join(f"{n}: {', '.join(shown(n, v) for v in values)}" for n, values in choice["searched"].items())
    found = [
        ("Forget set", f"{choice['forget']['n']:,} samples: {choice['forget']['rule']}"),
        ("Target", f"{target['accuracy']:.1f} %{error}: {KINDS[target['kind']]}{on}."),
        *(("", f"{note[:1].upper()}{note[1:]}.") for note in target["notes"]),
        ("Original", f"{original['forget_accuracy']:.1f} % on forget, {original['retain_accuracy']:.1f} % on retain."),
        ("Searched", f"{searched}. {choice['n_trials']} trials{under}."),
    ]
    return [(head, text) for head, text in found if text]
