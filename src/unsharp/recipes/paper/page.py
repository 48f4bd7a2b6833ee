"""The pages of a reproduction: ours beside the published figures, what became of the claims, settings and cost."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from unsharp import artifacts, runtime, stats
from unsharp.recipes.paper.base import Claim, Figure, Published, Reproduction
from unsharp.recipes.paper.problems import TUNED_ON, problem
from unsharp.recipes.paper.run import Asked, Made, chosen_on, mean_over_cells
from unsharp.sweep.grid.run import CELLS

MARKDOWN, HTML, JSON = "reproduction.md", "reproduction.html", "reproduction.json"
NO_FIGURE = "–"


class Number(NamedTuple):
    """A number as it is shown, and as it is sorted by."""

    text: str
    raw: float

    def __str__(self) -> str:
        return self.text


Shown = str | Number


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table of the page.

    Args:
        title: Its title.
        text: What it says.
        heads: Heads of the columns.
        lines: Its lines; the first entry is the line's head.
        words: Whether it holds words rather than numbers.
        points: A list in place of a table.
    """

    title: str
    text: str = ""
    heads: tuple[str, ...] = ()
    lines: tuple[tuple[Shown, ...], ...] = ()
    words: bool = False
    points: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Decided:
    """What became of a claim.

    Args:
        claim: The claim.
        effect: Mean paired difference in the sense of the claim, with intervals; None where no seed has both sides.
        verdict: "holds", "does not hold: the opposite does", "undecided", "too few seeds" or "not run".
    """

    claim: Claim
    effect: stats.Effect | None
    verdict: str


def decide(what: Reproduction, rows: Sequence[Mapping[str, Any]]) -> list[Decided]:
    """Decide each claim by the difference, paired by seed, of the means over the cells that are meant.

    All claims of a reproduction are one family: a claim holds where the interval that covers together with all others
    of the family lies above 0.
    """
    figures = {figure.column: figure for figure in what.figures}
    pairs: dict[str, tuple[list[float], list[float]]] = {}
    for i, claim in enumerate(what.claims):
        merit = figures[claim.figure].merit
        better, worse = (mean_over_cells(rows, pick, claim.figure, merit) for pick in (claim.better, claim.worse))
        both = [seed for seed in better if seed in worse]
        if both:
            pairs[str(i)] = [better[s] for s in both], [worse[s] for s in both]
    effects = stats.paired_effects(pairs)
    return [
        Decided(claim=claim, effect=effects.get(str(i)), verdict=_verdict(effects.get(str(i))))
        for i, claim in enumerate(what.claims)
    ]


def _verdict(effect: stats.Effect | None) -> str:
    if effect is None:
        return "not run"
    low, high = effect.simultaneous.low, effect.simultaneous.high
    if low is None or high is None:
        return "too few seeds"
    return "holds" if low > 0 else "does not hold: the opposite does" if high < 0 else "undecided"


def write(made: Made) -> tuple[Path, ...]:
    """Write the page as HTML and Markdown, and its values as JSON. Returns the files."""
    from unsharp.report.page import markup, page

    out, sections = made.swept.out, list(_sections(made))
    title = f"{made.asked.what.title}: {made.asked.size}"
    pictures = [(n, markup(_picture(file, f"picture-{i}"))) for i, (n, file) in enumerate(made.pictures.items())]
    headline, lead = _headline(made), _lead(made)
    parts = {"headline": headline, "lead": lead, "sections": sections, "pictures": pictures}
    artifacts.write_text(out / HTML, page("reproduction.html", title=title, **parts, sortable=True))
    artifacts.write_text(out / MARKDOWN, _markdown(title, [f"**{headline}**", *lead], sections))
    artifacts.write_json(out / JSON, _values(made))
    return out / HTML, out / MARKDOWN, out / JSON, *made.swept.files


def _picture(file: Path, name: str) -> str:
    """An SVG of ours as it stands in a page."""
    from unsharp.report.html import inline

    text = file.read_text(encoding="utf-8")
    return inline(text[text.index("<svg") :], name)


def _headline(made: Made) -> str:
    """What became of the claims, in a sentence."""
    verdicts = [one.verdict for one in decide(made.asked.what, made.rows)]
    if not verdicts:
        return made.asked.what.title
    counted = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    return f"Of {len(verdicts)} claims: {counted}."


def _lead(made: Made) -> list[str]:
    what, size = made.asked.what, made.asked.size
    lead = [what.shows]
    if size == "smoke":
        lead.append(
            "At this size everything runs and nothing is shown: the networks are tiny. Its figures mean nothing."
        )
    elif size == "small":
        lead.append(
            f"Ten classes and a narrow network. Settings were chosen by {what.figures[0].title} on the "
            f"{_chosen_on(made)} set of seed {TUNED_ON}, with validation images in place of the test images, from "
            "networks of the first pretraining."
        )
    missing = sum(row["status"] != "done" for row in made.rows)
    if missing:
        lead.append(
            f"{missing} of {len(made.rows)} cells have no result; means leave a seed out that lacks one of theirs."
        )
    return lead


def _chosen_on(made: Made) -> str:
    asked = made.asked
    return " and ".join(block["name"] for block in chosen_on(problem(asked.what.task, asked.size, asked.where)))


def _sections(made: Made) -> Iterator[Section]:
    what, rows = made.asked.what, made.rows
    decided = decide(what, rows)
    if decided:
        yield Section(
            title="What became of the claims",
            text="Differences are paired by seed, in the sense of the claim (above 0 speaks for it), over the mean of "
            "all forget sets and pretrainings that it does not name. In brackets: the interval with which all "
            "differences of this table cover together at 95 %. A claim holds where that lies above 0.",
            heads=("What it says", "Claim", "Difference", "Interval", "n", "Verdict"),
            lines=tuple(_claim_line(one, _by_column(what, one.claim.figure)) for one in decided),
        )
    if what.published:
        yield Section(
            title="Ours beside the published figures",
            text=f"Published for {'; '.join(dict.fromkeys(one.about for one in what.published))}. At another size than "
            "paper the two are of different problems, and only the order of the lines can be compared.",
            heads=("Variant", "Here", "Published"),
            lines=tuple(_published_line(what, rows, one) for one in what.published),
        )
    for figure in what.figures:
        yield _table(made, figure)
    yield Section(
        title="Settings",
        text="What each variant ran with, beside the common settings.",
        heads=("Variant", "Settings"),
        lines=tuple(_settings_line(block) for block in made.swept.grid.unlearn),
        words=True,
    )
    if made.chosen:
        yield Section(
            title="The choice of settings",
            words=True,
            heads=("Variant", "Settings", what.figures[0].title, ""),
            lines=tuple(_choice_line(row, what.figures[0]) for row in made.chosen),
        )
    if what.unknown:
        yield Section(title="What is not known of the paper's setting", points=what.unknown)
    yield Section(title="How it was made", heads=("", ""), lines=tuple(_circumstances(made)), words=True)


def _published_line(what: Reproduction, rows: Sequence[Mapping[str, Any]], one: Published) -> tuple[Shown, ...]:
    here = _mean(rows, one.of, _by_column(what, one.figure))
    return ", ".join(one.of.values()), here, Number(f"{one.value:.2f}", one.value)


def _choice_line(row: Mapping[str, Any], figure: Figure) -> tuple[Shown, ...]:
    chosen = "chosen" if row.get("chosen") else ""
    return row["name"], _told(row["settings"]), _number(row[figure.column], figure), chosen


def _by_column(what: Reproduction, column: str) -> Figure:
    return next(figure for figure in what.figures if figure.column == column)


def _claim_line(one: Decided, figure: Figure) -> tuple[Shown, ...]:
    if one.effect is None:
        return one.claim.says, one.claim.claim, NO_FIGURE, NO_FIGURE, "0", one.verdict
    alone, together = one.effect.difference, one.effect.simultaneous
    digits = figure.digits
    interval = NO_FIGURE if together.low is None else f"[{together.low:+.{digits}f}, {together.high:+.{digits}f}]"
    return (
        one.claim.says,
        one.claim.claim,
        Number(f"{alone.mean:+.{digits}f}", alone.mean),
        interval,
        str(alone.n),
        one.verdict,
    )


def _table(made: Made, figure: Figure) -> Section:
    """Variants down, forget sets and pretrainings across, and the mean over the forget sets."""
    grid = made.swept.grid
    trained, sets = list(grid.pretrainings()), list(grid.forget_sets())
    places = [(p, f) for p in trained for f in (*sets, None)] if len(sets) > 1 else [(p, sets[0]) for p in trained]
    whole = "mean size" if figure.better == "nearer zero" else "mean"
    heads = [f"{f or whole}{f', {p}' if len(trained) > 1 else ''}" for p, f in places]
    lines = []
    for name in dict.fromkeys(row["variant"] for row in made.rows):
        picks: list[dict[Any, str]] = [
            {"variant": name, "pretraining": p} | ({} if f is None else {"forget": f}) for p, f in places
        ]
        lines.append((name, *(_mean(made.rows, pick, figure) for pick in picks)))
    seeds = len(grid.seeds)
    covers = f"Mean over {seeds} seeds with its 95 % t interval" if seeds > 1 else "One seed, so no interval"
    return Section(
        title=figure.title, text=f"{covers}; {figure.better} is better.", heads=("Variant", *heads), lines=tuple(lines)
    )


def _mean(rows: Sequence[Mapping[str, Any]], pick: Mapping[Any, str], figure: Figure) -> Shown:
    """The mean over seeds; over several forget sets that of the sizes, where gaps of two signs would cancel."""
    turn = abs if figure.better == "nearer zero" and "forget" not in pick else float
    values = list(mean_over_cells(rows, pick, figure.column, turn).values())
    if not values:
        return NO_FIGURE
    found = stats.mean_interval(values)
    half = "" if found.half_width is None else f" ± {found.half_width:.{figure.digits}f}"
    return Number(f"{found.mean:.{figure.digits}f}{half}", found.mean)


def _number(value: float | None, figure: Figure) -> Shown:
    return NO_FIGURE if value is None else Number(f"{value:.{figure.digits}f}", value)


def _settings_line(block: Mapping[str, Any]) -> tuple[str, str]:
    own = {key: value for key, value in block.items() if key not in ("name", "method", "rule")}
    return block["name"], f"{block['method']} under {block.get('rule', 'its own rule')}: {_told(own)}"


def _told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "as by default"


def _devices(made: Made) -> Iterator[str]:
    """On what the cells were done."""
    for row in made.rows:
        if row["status"] == "done":
            told = artifacts.open_run(made.swept.out / CELLS / row["cell"]).provenance
            yield f"{told['device_name']} ({told['device']}, {told['threads']} thread{'s' * (told['threads'] != 1)})"


def _command(asked: Asked) -> str:
    """The command that makes this page again, without the paths of this machine."""
    words = ["unsharp", "reproduce", asked.name, "--size", asked.size]
    words += ["--data-dir", "DIR"] if asked.where.data_dir else []
    words += ["--scores", "FILE"] if asked.where.scores else []
    words += [] if asked.seeds is None else ["--seeds", str(asked.seeds)]
    for option, names in (("forget", asked.forget), ("only", asked.only), ("pretraining", asked.pretraining)):
        words += [] if names is None else [f"--{option}", *names]
    return shlex.join(words)


def _circumstances(made: Made) -> Iterator[tuple[str, str]]:
    asked, grid = made.asked, made.swept.grid
    data, model = grid.data, grid.model
    yield "command", _command(asked)
    cut = f", the first {data.classes} classes" if data.classes else ""
    cut += f", {data.per_class} images of each" if data.per_class else ""
    yield "data", f"{data.name}{cut}{f', corrupted by {data.corrupt}' if data.corrupt else ''}"
    yield "network", f"{model.arch}, width {model.width or 'as published'}"
    yield "training", _told(grid.train)
    yield "unlearning", _told(grid.settings)
    for name, block in zip(grid.forget_sets(), grid.forget):
        n = [row["n_forget"] for row in made.rows if row["forget"] == name]
        how = "at random" if "random" in block else f"level {block['level']}"
        yield f"forget set {name}", f"{n[0]} samples, {how}" if n else how
    yield "seeds", ", ".join(map(str, grid.seeds))
    yield "cells", f"{len(made.rows)}, of which {sum(row['status'] == 'done' for row in made.rows)} done"
    yield "where", ", ".join(dict.fromkeys(map(str, _devices(made)))) or "nowhere yet"
    versions = runtime.versions()
    yield "versions", ", ".join(f"{name} {versions[name]}" for name in ("unsharp", "torch") if name in versions)
    yield "date", datetime.date.today().isoformat()


def _values(made: Made) -> dict[str, Any]:
    """What the page says, for programs."""
    what = made.asked.what
    return {
        "name": made.asked.name,
        "size": made.asked.size,
        "claims": [
            {
                "claim": one.claim.claim,
                "says": one.claim.says,
                "figure": one.claim.figure,
                "better": dict(one.claim.better),
                "worse": dict(one.claim.worse),
                "verdict": one.verdict,
            }
            | _effect(one.effect)
            for one in decide(what, made.rows)
        ],
        "published": [
            {"of": dict(one.of), "figure": one.figure, "value": one.value, "about": one.about} for one in what.published
        ],
        "chosen": made.chosen,
        "unknown": list(what.unknown),
        "rows": made.rows,
    }


def _effect(effect: stats.Effect | None) -> dict[str, Any]:
    if effect is None:
        return {"n": 0, "difference": None, "low": None, "high": None, "p_adjusted": None}
    together = effect.simultaneous
    row = {"n": effect.difference.n, "difference": effect.difference.mean, "low": together.low, "high": together.high}
    return row | {"p_adjusted": effect.p_adjusted}


def _markdown(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    parts = [f"# {title}", *lead]
    for section in sections:
        parts.append(f"## {section.title}")
        if section.text:
            parts.append(section.text)
        if section.points:
            parts.append("\n".join(f"- {point}" for point in section.points))
            continue
        lines = [section.heads, tuple("---" if i == 0 else "---:" for i in range(len(section.heads))), *section.lines]
        parts.append("\n".join(_row(line) for line in lines))
    return "\n\n".join(parts) + "\n"


def _row(line: Sequence[Shown]) -> str:
    cells = (str(cell).replace("|", "\\|") for cell in line)
    return f"| {' | '.join(cells)} |"
