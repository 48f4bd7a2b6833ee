"""What a grid found: a row for each cell, means over seeds, effects beside a baseline, and the files that hold them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unsharp import artifacts, stats
from unsharp.config import to_dict
from unsharp.errors import UserError, unknown
from unsharp.report.groups import flatten
from unsharp.stages import ABOUT_FILE, METRICS_FILE
from unsharp.sweep.cells import Result
from unsharp.sweep.grid.config import DIFFERS
from unsharp.sweep.grid.plan import Job, Plan

RESULTS, TIMES = "results", "times"
LEFT_OUT = ("reasons", "seed", "n")
Row = dict[str, Any]


def rows_of(plan: Plan, results: Mapping[str, Result], blocked: Mapping[str, str]) -> tuple[list[Row], list[Row]]:
    """A row for each cell of the grid, in its order, and beside it a row of what its work took.

    Args:
        plan: The grid.
        results: What became of the cells, by key.
        blocked: Why a cell could not be tried, by key.
    """
    settings = dict.fromkeys(name for variant in plan.variants.values() for name in variant.settings)
    rows, times = [], []
    for job in plan.jobs:
        result = results.get(job.cell.key)
        row, took = _heads(plan, job, settings), {"cell": job.cell.key}
        row |= _end(result, blocked.get(job.cell.key))
        if result is not None and result.path is not None:
            for name, value in figures(artifacts.open_run(result.path).json(METRICS_FILE)).items():
                (took if name.rpartition(".")[2] in DIFFERS else row)[name] = value
            took |= _circumstances(result)
        rows.append(row)
        times.append(took)
    return _squared(rows), _squared(times)


def figures(metrics: Mapping[str, Any]) -> Row:
    """All single figures among metrics, levels joined by dots, those without levels first."""
    kept = {name: value for name, value in metrics.items() if name not in LEFT_OUT}
    kept |= {name: _without(kept[name]) for name in ("gap", "reference", "original") if kept.get(name)}
    flat = flatten({name: value for name, value in kept.items() if value is not None or name != "gap"})
    single = {name: value for name, value in flat.items() if value is None or isinstance(value, int | float | str)}
    return dict(sorted(single.items(), key=lambda item: "." in item[0]))


def summary_of(rows: Sequence[Row], outcome: str) -> list[Row]:
    """Mean and 95 % t interval over seeds of the outcome, for each variant, forget set and pretraining."""
    found = []
    for (variant, forget, pretraining), members in _by_place(rows).items():
        values = [row[outcome] for row in members if row.get(outcome) is not None]
        interval = stats.mean_interval(values) if values else None
        found.append(
            {"variant": variant, "forget": forget, "pretraining": pretraining, "outcome": outcome}
            | {"n": len(values), "missing": len(members) - len(values)}
            | {name: None if interval is None else getattr(interval, name) for name in ("mean", "low", "high")}
        )
    return found


def effects_of(rows: Sequence[Row], outcome: str, baseline: str) -> list[Row]:
    """The paired effect of each variant beside the baseline, the whole grid being one family; see `paired_effects`."""
    places = {
        place: {row["seed"]: row[outcome] for row in members if row.get(outcome) is not None}
        for place, members in _by_place(rows).items()
    }
    names, pairs = {}, {}
    for (variant, forget, pretraining), own in places.items():
        base = places[baseline, forget, pretraining]
        both = [seed for seed in own if seed in base]
        if variant != baseline and both:
            name = json.dumps([variant, forget, pretraining])
            names[name] = {"variant": variant, "forget": forget, "pretraining": pretraining}
            pairs[name] = [own[seed] for seed in both], [base[seed] for seed in both]
    found = []
    for name, effect in stats.paired_effects(pairs).items():
        alone, together = effect.difference, effect.simultaneous
        row = names[name] | {"baseline": baseline, "outcome": outcome, "n": alone.n, "difference": alone.mean}
        row |= {"low": alone.low, "high": alone.high, "all_low": together.low, "all_high": together.high}
        found.append(row | {"p": effect.p, "p_adjusted": effect.p_adjusted, "family": effect.family})
    return found


def check_outcome(rows: Sequence[Row], outcome: str) -> None:
    """Raise UserError where cells are done and none has a figure of that name."""
    done = [row for row in rows if row["status"] == "done"]
    if done and not any(isinstance(row.get(outcome), int | float) for row in done):
        known = [name for name, value in done[0].items() if isinstance(value, float)]
        raise UserError(f"the cells are done, but {unknown('outcome', outcome, known)}")


def facts_of(plan: Plan, results: Mapping[str, Result]) -> Iterator[dict[str, Any]]:
    """What a report takes of each finished cell."""
    for job in plan.jobs:
        result = results.get(job.cell.key)
        if result is not None and result.path is not None:
            run = artifacts.open_run(result.path)
            task = job.forget if len(plan.pretrainings) == 1 else f"{job.forget}, {job.pretraining}"
            yield run.json(ABOUT_FILE) | {"metrics": run.json(METRICS_FILE), "task": task}


def write_tables(out: Path, rows: Sequence[Row], times: Sequence[Row], whole: Mapping[str, Any]) -> list[Path]:
    """Write `results.json`, rows and times as CSV, and rows as parquet. Returns the files."""
    artifacts.write_json(out / f"{RESULTS}.json", {**whole, "rows": list(rows)})
    files = [out / f"{RESULTS}.json"]
    for name, table in ((RESULTS, rows), (TIMES, times)):
        artifacts.write_text(out / f"{name}.csv", as_csv(table))
        files.append(out / f"{name}.csv")
    _write_parquet(out / f"{RESULTS}.parquet", rows)
    return [*files, out / f"{RESULTS}.parquet"]


def as_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV; a float as the shortest text that gives the same bits, None as nothing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow(["" if v is None else repr(v) if isinstance(v, float) else v for v in row.values()])
    return text.getvalue()


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: _of_one_type([row[name] for row in rows]) for name in rows[0]}
    with artifacts.writing(path), artifacts.atomic(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def _of_one_type(values: Sequence[Any]) -> list[Any]:
    """Values that a column can hold: text where they are of several types, float where they are numbers."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and len(kinds) == 2:
        return [None if value is None else float(value) for value in values]
    return list(values) if len(kinds) < 2 else [None if value is None else str(value) for value in values]


def _heads(plan: Plan, job: Job, settings: Mapping[str, Any]) -> Row:
    variant, training = plan.variants[job.variant], plan.pretrainings[job.pretraining]
    row: Row = {"variant": job.variant, "method": variant.method, "rule": variant.rule, "forget": job.forget}
    row |= {"n_forget": len(plan.forget[job.forget]), "pretraining": job.pretraining}
    row |= {"train_rule": to_dict(training)["rule"]["name"], "seed": job.seed}
    row |= {f"setting.{name}": _plain(variant.settings.get(name)) for name in settings}
    return row | {"cell": job.cell.key}


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list | tuple) else value


def _end(result: Result | None, blocked: str | None) -> Row:
    if blocked is not None or result is None:
        return {"status": "blocked", "error": blocked}
    return (
        {"status": "done", "error": None}
        if result.error is None
        else {
            "status": result.error.kind,
            "error": result.error.message,
        }
    )


def _circumstances(result: Result) -> Row:
    assert result.path is not None
    provenance = artifacts.open_run(result.path).provenance
    told = {"cell_seconds": result.seconds}
    told |= {name: provenance.get(name) for name in ("finished", "device_name", "threads")}
    return told | {f"version.{name}": version for name, version in provenance.get("versions", {}).items()}


def _without(values: Any) -> Any:
    return {name: value for name, value in values.items() if name not in LEFT_OUT}


def _squared(rows: Sequence[Row]) -> list[Row]:
    """The rows with the same columns, in the order in which they first come."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _by_place(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["variant"], row["forget"], row["pretraining"]), []).append(row)
    return found
