"""The outcome in plain words: what was forgotten, how near it comes to retraining, what attacks see, what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from unsharp.evaluation.metrics import LACKS
from unsharp.report.groups import Task
from unsharp.report.tables import MEMBERSHIP, SPLITS, STRENGTH, Column, Row, Table, number
from unsharp.stats import Interval, paired_difference

NEAR = ((1.0, "very close to"), (3.0, "close to"), (10.0, "some way from"), (float("inf"), "far from"))
SCALE = "“Very close” means within 1 point in every accuracy, “close” within 3, “some way” within 10, “far” beyond."
WEAK = 55.0  # balanced accuracy (%) below which an attack is little better than a guess


@dataclass(frozen=True)
class Verdict:
    """The outcome of one task.

    Args:
        headline: One sentence.
        points: (what it is about, sentences).
        tiles: (figure, what it is) to be shown large.
    """

    headline: str
    points: list[tuple[str, str]]
    tiles: list[tuple[str, str]]


def verdicts(table: Table) -> list[Verdict]:
    """One verdict for each task."""
    tasks = list(dict.fromkeys(row.group.task for row in table.rows))
    return [_verdict(table, task, [r for r in table.of_kind("unlearned") if r.group.task == task]) for task in tasks]


def _verdict(table: Table, task: Task, rows: Sequence[Row]) -> Verdict:
    best = max(rows, key=_closeness)
    name, largest = best.group.label, _largest(table, best)
    prefix = f"Task {task.name}: " if task.name else ""
    headline = f"{prefix}{_samples(task.n)} unlearned with {name}"
    if largest is None:
        headline += "; how close this is to retraining is not known"
    else:
        headline += f": {_near(largest[1])} retraining in accuracy"
        headline += ", yet no closer than before unlearning" if _in_vain(best) else ""
    points = [
        ("What was forgotten", _forgotten(task, rows)),
        ("How close to retraining", _close(table, best, largest)),
        ("What attacks see", _attacked(table, best)),
        ("At what cost", _cost(table, best)),
    ]
    if len(rows) > 1:
        points.insert(1, ("Which method", _compared(best, rows)))
    if text := _corrected(rows):
        points.insert(1, ("What was corrected", text))
    if course := " ".join(text for row in rows for text in (*_ended(row), *_warned(row))):
        points.append(("How the runs went", course))
    return Verdict(_tight(headline + "."), [(about, _tight(text)) for about, text in points], _tiles(best, largest))


def _tight(text: str) -> str:
    """Keep a figure, its interval and its unit on one line."""
    return text.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%").replace(" · ", " ·\u00a0")


def _samples(n: int) -> str:
    return f"{n:,} sample{'' if n == 1 else 's'}"


def _near(gap: Interval) -> str:
    return next(word for limit, word in NEAR if abs(gap.mean) <= limit)


def _closeness(row: Row) -> float:
    """For choosing among methods: ToW, or where there is none the largest accuracy gap, turned round."""
    tow = row.cells["tow"].value
    if tow is not None:
        return tow.mean
    gaps = [abs(g.mean) for g in (row.cells[f"{s}_accuracy"].gap for s in SPLITS) if g is not None]
    return -max(gaps, default=1e9)


def _largest(table: Table, row: Row) -> tuple[str, Interval] | None:
    """The accuracy that is farthest from the retrained model's, and how far."""
    gaps = {s: row.cells[f"{s}_accuracy"].gap for s in SPLITS}
    known = [(s, g) for s, g in gaps.items() if g is not None]
    return max(known, key=lambda item: abs(item[1].mean), default=None)


def _forgotten(task: Task, rows: Sequence[Row]) -> str:
    n = max(row.n for row in rows)
    each = "" if n == 1 else f" Each method was run on {n} networks or forget sets, told apart by their seeds."
    return f"{task.rule[:1].upper()}{task.rule[1:]}; the network is {task.subject}.{each}"


def _corrected(rows: Sequence[Row]) -> str:
    """A caution where samples were put right rather than removed."""
    labels = [row.group.label for row in rows if any(run.get("corrections") for run in row.group.runs)]
    if not labels:
        return ""
    return (
        f"{'; '.join(labels)}: the samples were not removed, their labels or inputs were put right. The retrained "
        "network has learnt without the samples, not from the corrected ones. The forget accuracy is that on the "
        "samples as they were, under the labels that may be wrong: a good correction lowers it."
    )


def _compared(best: Row, rows: Sequence[Row]) -> str:
    """Which of several comes closest, and which of the others the runs cannot tell from it."""
    if best.cells["tow"].value is None:
        return f"{len(rows)} methods or settings were compared; what follows is about {best.group.label}."
    text = f"Of {len(rows)} methods or settings, {best.group.label} has the highest ToW; what follows is about it."
    if best.n == 1:
        return f"{text} One seed cannot tell methods apart; run more of them."
    differences = {row.group.label: _paired(best, row) for row in rows if row is not best}
    level = [label for label, d in differences.items() if d is None or d.low is None or d.low <= 0]
    if level:
        text += f" These runs do not tell it apart in ToW, on a 95 % level, from: {'; '.join(level)}."
    return text


def _paired(a: Row, b: Row) -> Interval | None:
    """The difference in ToW over the forget sets and seeds that both have."""

    def by_run(row: Row) -> dict[tuple[str, int], float]:
        runs = zip(row.group.runs, row.group.seeds, row.group.values)
        return {(run["forget"]["hash"], seed): v["tow"] for run, seed, v in runs if v.get("tow") is not None}

    first, second = by_run(a), by_run(b)
    common = [key for key in first if key in second]
    return paired_difference([first[k] for k in common], [second[k] for k in common]) if common else None


def _gain(row: Row) -> Interval | None:
    """By how much unlearning raised ToW above the original's, run by run; None where it is not known of every run."""
    pairs = [(values.get("tow"), (values.get("original") or {}).get("tow")) for values in row.group.values]
    known = [(after, before) for after, before in pairs if after is not None and before is not None]
    if len(known) < len(pairs):
        return None
    return paired_difference([after for after, _ in known], [before for _, before in known])


def _in_vain(row: Row) -> bool:
    """Whether the runs show no gain of ToW over the original's."""
    gain = _gain(row)
    return gain is not None and (gain.mean <= 0 if gain.low is None else gain.low <= 0)


def _close(table: Table, row: Row, largest: tuple[str, Interval] | None) -> str:
    if largest is None:
        why = next((r for run in row.group.runs if (r := run["metrics"].get("reasons", {}).get("gap"))), None)
        return f"Not known: {why or LACKS['reference']}. The values below stand alone."
    split, gap = largest
    tow = row.cells["tow"]
    text = f"ToW is {number(tow.value, '%')} of 100." if tow.value else f"ToW is missing: {tow.reason}."
    side = "above" if gap.mean > 0 else "below"
    far = f"{number(gap, '%', signed=True)} points, {side} that of the retrained network"
    text += (
        f" The largest gap is in {split} accuracy: {far}." if round(gap.mean, 1) else " No accuracy differs from it."
    )
    if (gain := _gain(row)) is not None:
        text += f" Against the network before unlearning, ToW changed by {number(gain, '%', signed=True)} points"
        shown = "this run shows" if gain.n == 1 else "these runs show"
        text += f"; {shown} no gain." if _in_vain(row) else "."
    forget, reference = row.cells["forget_accuracy"], table.beside(row, "retrained")
    kept = None if reference is None else reference.cells["forget_accuracy"].value
    if forget.value is not None and forget.gap is not None and kept is not None:
        text += (
            f" The network still classifies {number(forget.value, '%')} % of the forget set correctly; one that "
            f"never saw it classifies {number(kept, '%')} %. {_reading(forget.gap)}"
        )
    return text


def _reading(gap: Interval) -> str:
    if gap.low is not None and gap.high is not None and gap.low <= 0 <= gap.high:
        return "The interval of this difference includes zero."
    if abs(gap.mean) <= 1.0:
        return "That is as retraining has it, within a point."
    if gap.mean > 0:
        return "A higher value is a sign that something of the forget set is left."
    return "A lower value is more than retraining would forget, and can itself give the forget set away."


def _attacked(table: Table, row: Row) -> str:
    attacks = [(c, s) for c, s in zip(table.section(MEMBERSHIP), table.section(STRENGTH)) if row.cells[c.key].value]
    if not attacks:
        reasons = [row.cells[c.key].reason for c in table.section(MEMBERSHIP)]
        return f"No membership attack was run: {reasons[0] if reasons and reasons[0] else 'none was asked for'}."
    column, strength = max(attacks, key=lambda pair: _mean(row, pair[1]))
    value, power = row.cells[column.key].value, _mean(row, strength)
    assert value is not None
    reference = table.beside(row, "retrained")
    other = None if reference is None else reference.cells[column.key].value
    name = column.title[:1].lower() + column.title[1:] if column.title[1:2].islower() else column.title
    against = "" if other is None else f", and {number(other, '%')} % for the retrained network"
    text = f"The strongest attack ({name}) calls {number(value, '%')} % of the forget set non-members{against}."
    if power < WEAK:
        return (
            f"{text} Yet it tells retained from test samples with an accuracy of only {power:.1f} %, where guessing "
            "has 50 %: on this network the attacks say little in either direction."
        )
    return f"{text} It tells retained from test samples with an accuracy of {power:.1f} % (guessing: 50 %)."


def _mean(row: Row, column: Column) -> float:
    value = row.cells[column.key].value
    return 0.0 if value is None else value.mean


def _cost(table: Table, row: Row) -> str:
    seconds, share = row.cells["seconds"].value, row.cells["seconds_share"].value
    if seconds is None:
        return f"Not known: {row.cells['seconds'].reason}."
    text = f"Unlearning took {duration(seconds.mean)}"
    if share is not None:
        text += f", {number(share, '%')} % of the time that retraining took"
    passes, of_retraining = row.cells["passes"].value, row.cells["passes_share"].value
    if passes is not None:
        text += f", and {number(passes, '')} forward–backward passes"
        text += "" if of_retraining is None else f" ({number(of_retraining, '%')} % of those of retraining)"
    if share is not None and share.mean >= 100.0:
        text += ". Retraining would have been no slower"
    return text + "."


def _ended(row: Row) -> list[str]:
    """Where the runs ended that were to stop by themselves."""
    stops = [stop for run in row.group.runs if (stop := run.get("stop"))]
    if not stops:
        return []
    targets = dict.fromkeys(f"{s['target']:.1f} %" for s in stops)
    whose = ", that of the retrained network," if all(s["of"] == "retrained" for s in stops) else ""
    text = (
        f"{row.group.label} was to stop once the forget accuracy had come down to {_either(targets)}{whose} within "
        f"{_either(dict.fromkeys(str(s['epochs']) for s in stops))} epochs: "
    )
    ends = [
        f"after epoch {s['epoch']}, at {s['forget_accuracy']:.1f} %" if s["reached"] else "it did not" for s in stops
    ]
    note = " Runs that stop by themselves differ in the number of their steps." if len(set(ends)) > 1 else ""
    return [f"{text}{'; '.join(ends)}.{note}"]


def _warned(row: Row) -> list[str]:
    """What was said while the runs of a row were on their way."""
    lines = [(seed, line) for run, seed in zip(row.group.runs, row.group.seeds) for line in run.get("warnings", ())]
    return [f"{row.group.label}, seed {seed}: {line}." for seed, line in lines]


def _either(values: Iterable[str]) -> str:
    return " or ".join(values)


def duration(seconds: float) -> str:
    """A time in words: "12 seconds", "3.5 minutes", "2 hours"."""
    for size, unit in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"


def _tiles(row: Row, largest: tuple[str, Interval] | None) -> list[tuple[str, str]]:
    tiles = []
    if (tow := row.cells["tow"].value) is not None:
        tiles.append((number(tow, "%"), "ToW, where 100 is as retrained"))
    if largest is not None:
        tiles.append((number(largest[1], "%", signed=True), f"points: largest accuracy gap ({largest[0]})"))
    if (forget := row.cells["forget_accuracy"].value) is not None:
        tiles.append((f"{number(forget, '%')} %", "of the forget set still classified correctly"))
    if (share := row.cells["seconds_share"].value) is not None:
        tiles.append((f"{number(share, '%')} %", "of retraining's time"))
    return tiles
