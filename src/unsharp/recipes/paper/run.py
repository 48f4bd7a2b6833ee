"""Makes a table or figure of the paper anew: settings chosen where the size asks for it, the grid, what goes beyond."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unsharp import artifacts, stats
from unsharp.errors import UserError, unknown
from unsharp.recipes.paper.base import REPRODUCTIONS, Pick, Reproduction
from unsharp.recipes.paper.problems import SIZES, TUNED_FOR, TUNED_ON, Problem, Size, Where, problem
from unsharp.sweep import Backend, Cell, Result, local_backend, report, run_cells
from unsharp.sweep.grid import Grid, Swept, run_grid
from unsharp.sweep.grid.cells import NETWORKS, UNLEARNED, trained_path
from unsharp.sweep.grid.config import grid_of
from unsharp.sweep.grid.live import Watch
from unsharp.sweep.grid.plan import Job, Plan
from unsharp.sweep.grid.run import CELLS, look_ahead

CHOICE = "choice"
Block = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A reproduction at a size, cut as the user wishes.

    Args:
        name: Its name.
        size: The size.
        where: Data, scores, directory.
        seeds: So many seeds, from 0; None for those of the size.
        forget: Names of forget sets; None for all.
        only: Names of variants; None for all.
        pretraining: Names of pretrainings; None for all.

    Raises:
        UserError: for a name that there is not, or data or scores that are missing.
    """

    name: str
    size: Size
    where: Where
    seeds: int | None = None
    forget: tuple[str, ...] | None = None
    only: tuple[str, ...] | None = None
    pretraining: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise unknown("size", self.size, SIZES)
        if self.seeds is not None and self.seeds < 1:
            raise UserError(f"seeds must be at least 1, got {self.seeds}")

    @property
    def what(self) -> Reproduction:
        """The reproduction, with the variants and pretrainings that are asked for."""
        whole = REPRODUCTIONS[self.name]
        names = _some("variant", [c.name for c in whole.compared], self.only)
        trained = _some("pretraining", list(whole.pretraining), self.pretraining)
        return dataclasses.replace(
            whole,
            compared=tuple(c for c in whole.compared if c.name in names),
            pretraining={name: whole.pretraining[name] for name in trained},
            baseline=whole.baseline if whole.baseline in names else None,
        )

    def problem(self) -> Problem:
        """Data, network, forget sets and seeds of it."""
        found = self.what.adapt(problem(self.what.task, self.size, self.where))
        names = _some("forget set", [block["name"] for block in found.forget], self.forget)
        return dataclasses.replace(
            found,
            forget=tuple(block for block in found.forget if block["name"] in names),
            seeds=found.seeds if self.seeds is None else tuple(range(self.seeds)),
        )


@dataclass(frozen=True, kw_only=True)
class Made:
    """What came of a reproduction.

    Args:
        asked: What was asked for.
        swept: The grid.
        rows: Its rows, with the columns of what goes beyond.
        chosen: A row for each setting that was tried; empty where none was chosen.
        pictures: Files to be shown, by what they show.
        failures: All failures in words.
        n_failed: Cells that have no result, those beyond the grid too.
        files: The pages.
    """

    asked: Asked
    swept: Swept
    rows: list[dict[str, Any]]
    chosen: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, Path] = field(default_factory=dict)
    failures: str = ""
    n_failed: int = 0
    files: tuple[Path, ...] = ()


def reproduce(
    asked: Asked,
    *,
    workers: int | None = None,
    threads: int = 1,
    accelerators: float | None = None,
    backend: Backend | None = None,
    retry_failed: bool = False,
    watch: Callable[[], Watch] = Watch,
    say: Callable[[str], None] = lambda line: None,
) -> Made:
    """Run what is not done yet, and write the pages; called again after a kill, it goes on.

    Args:
        asked: What is made.
        workers: As for `run_grid`.
        threads: Likewise.
        accelerators: Likewise.
        backend: Likewise.
        retry_failed: Likewise.
        watch: Makes what shows a grid while it runs.
        say: Takes lines for the user.

    Raises:
        UserError: for bad input, before any work.
        SweepError: if a process cannot start.
    """
    from unsharp.recipes.paper.page import write

    posed = asked.problem()
    pool = {"workers": workers, "threads": threads, "accelerators": accelerators, "backend": backend}
    pool |= {"retry_failed": retry_failed, "say": say}
    _prepare(posed, asked.where)
    blocks, chosen = _settings(asked, posed, lambda grid, out: run_grid(grid, out, **pool, watch=watch()))
    grid = _grid(asked, posed, blocks)
    swept = run_grid(grid, asked.where.out, **pool, watch=watch())
    made = Made(asked=asked, swept=swept, rows=swept.rows, chosen=chosen)
    made = dataclasses.replace(made, failures=swept.failures, n_failed=swept.n_failed)
    if asked.what.beyond is not None:
        say("what lies beyond the grid: one cell for each network")
        where = backend or local_backend(accelerators=accelerators)
        alone = {"workers": workers, "threads": threads, "backend": where, "retry_failed": retry_failed}
        made = _gone_beyond(made, posed, grid, alone)
    return dataclasses.replace(made, files=write(made))


def outlook(asked: Asked, **pool: Any) -> dict[str, Any]:
    """What `reproduce` would do and what it would cost; nothing is written but the scores of the digits.

    Returns:
        "choice", where settings are chosen, and "grid", each as `look_ahead` has it. As long as nothing is chosen, the
        first point of each variant stands for it.
    """
    posed = asked.problem()
    _prepare(posed, asked.where)
    told: dict[str, Any] = {}
    if posed.chosen:
        told["choice"] = look_ahead(_choice_grid(asked, posed), asked.where.out / CHOICE, **pool)
    first = [c.block(_points(c)[0] if posed.chosen else c.paper) for c in asked.what.compared]
    told["grid"] = look_ahead(_grid(asked, posed, first), asked.where.out, **pool)
    return told


# --- settings ---------------------------------------------------------------------------------------------------------


def _settings(
    asked: Asked, posed: Problem, run: Callable[[Grid, Path], Swept]
) -> tuple[list[Block], list[dict[str, Any]]]:
    """The blocks of the grid, and what was tried for them."""
    compared = asked.what.compared
    if not posed.chosen:
        return [c.block(c.paper) for c in compared], []
    grid = _choice_grid(asked, posed)
    found = run(grid, asked.where.out / CHOICE)
    column = asked.what.figures[0].column
    mean = {row["variant"]: row["mean"] for row in found.summary}
    blocks, tried = [], []
    for label, variant in grid.variants().items():
        settings = {key: value for key, value in variant.settings.items() if key not in posed.loop}
        tried.append({"name": variant.name, "label": label, "settings": settings, column: mean.get(label)})
    for one in compared:
        own = [row for row in tried if row["name"] == one.name and row[column] is not None]
        if not own:
            raise UserError(f"{one.name}: no setting of the choice came to an end\n{found.failures}")
        best = max(own, key=lambda row: row[column])
        best["chosen"] = True
        blocks.append(one.block(best["settings"]))
    return blocks, tried


def _points(one: Any) -> list[dict[str, Any]]:
    """Every combination of the values to choose from."""
    import itertools

    return [dict(zip(one.choose, values)) for values in itertools.product(*one.choose.values())]


def chosen_on(whole: Problem) -> list[dict[str, Any]]:
    """The forget sets on which settings are chosen: the middle one, where there is one."""
    return [block for block in whole.forget if block["name"] == TUNED_FOR] or list(whole.forget)


def _choice_grid(asked: Asked, posed: Problem) -> Grid:
    """All settings to choose from on a seed of their own, with validation samples in place of the test set.

    From the first pretraining, that of the others being the same choice, on the middle forget set where there is one.
    """
    whole = asked.what.adapt(problem(asked.what.task, asked.size, asked.where))
    first = next(iter(REPRODUCTIONS[asked.name].pretraining))
    alone = dataclasses.replace(posed, forget=tuple(chosen_on(whole)), seeds=(TUNED_ON,))
    blocks = [one.block({key: list(values) for key, values in one.choose.items()}) for one in asked.what.compared]
    return _grid(asked, alone, blocks, pretraining=[first], judged_on="validation", attacks=(), features=False)


def _grid(asked: Asked, posed: Problem, blocks: Sequence[Block], **other: Any) -> Grid:
    what = asked.what
    trained = other.pop("pretraining", list(what.pretraining))
    rules = REPRODUCTIONS[asked.name].pretraining
    choice = other.get("judged_on") == "validation"
    values: dict[str, Any] = {
        "seeds": posed.seeds,
        "data": posed.data,
        "model": posed.model,
        "train": dict(posed.train),
        "pretraining": tuple({"name": name, "rule": dict(rules[name])} for name in trained),
        "settings": dict(posed.loop),
        "forget": posed.forget,
        "unlearn": tuple({key: value for key, value in block.items() if value is not None} for block in blocks),
        "attacks": what.attacks,
        "features": what.features,
        "keep_networks": what.beyond is not None and not choice,
        "baseline": None if choice else what.baseline,
        "outcome": what.figures[0].column,
    }
    return grid_of(Grid(**values | other))


def _prepare(posed: Problem, where: Where) -> None:
    """Write the scores by which the digits are graded."""
    if posed.size == "smoke":
        from unsharp.recipes.quickstart import write_scores

        with artifacts.writing(where.out / "scores.npz"):
            where.out.mkdir(parents=True, exist_ok=True)
        if not (where.out / "scores.npz").is_file():
            write_scores(where.out)


def _some(kind: str, known: Sequence[str], asked: Sequence[str] | None) -> Sequence[str]:
    if asked is None:
        return known
    if not asked:
        raise UserError(f"give at least one {kind}: {', '.join(known)}")
    for name in asked:
        if name not in known:
            raise unknown(kind, name, known)
    return [name for name in known if name in asked]


# --- beyond the grid --------------------------------------------------------------------------------------------------


def _gone_beyond(made: Made, posed: Problem, grid: Grid, pool: Mapping[str, Any]) -> Made:
    """The same with what is measured of each network besides."""
    beyond, store = made.asked.what.beyond, made.swept.out / CELLS
    assert beyond is not None
    cells = {
        job.cell.key: Cell(
            beyond.function,
            {
                "run": str(store / job.cell.key / UNLEARNED),
                "original": str(_original(job, store)),
                "store": str(store / NETWORKS),
                "size": posed.size,
                "seed": job.seed,
            },
        )
        for job in Plan(grid).jobs
        if (store / job.cell.key / UNLEARNED).is_dir()
    }
    results = dict(zip(cells, run_cells(list(cells.values()), store, **pool)))
    failures = "\n".join(filter(None, [made.failures, report(list(results.values()))]))
    rows = [dict(row) | _columns(results.get(row["cell"])) for row in made.rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name) for name in names} for row in rows]
    pictures = dict(_pictures(made, results, beyond.picture))
    failed = made.n_failed + sum(result.error is not None for result in results.values())
    return dataclasses.replace(made, rows=rows, pictures=pictures, failures=failures, n_failed=failed)


def _original(job: Job, store: Path) -> Path:
    """Where the network stands from which a cell started."""
    trained = job.needs[0]
    kind = artifacts.open_run(store / trained.key).provenance["device"]
    names = ("data", "model", "train", "fingerprint")
    data, model, train, fingerprint = (trained.arguments[name] for name in names)
    return trained_path(data, model, train, fingerprint, kind, store / NETWORKS)


def _columns(result: Result | None) -> dict[str, Any]:
    return {} if result is None or result.error is not None else dict(result.value or {})


def _pictures(made: Made, results: Mapping[str, Result], name: str | None) -> Iterator[tuple[str, Path]]:
    """The picture of each variant for the first seed."""
    first = made.swept.grid.seeds[0]
    for row in made.rows:
        result = results.get(row["cell"])
        if name is not None and result is not None and result.path is not None and row["seed"] == first:
            with contextlib.suppress(FileNotFoundError):
                file = result.path / name
                file.stat()
                yield f"{row['variant']}; forget {row['forget']}; pretraining {row['pretraining']}; seed {first}", file


def mean_over_cells(
    rows: Sequence[Mapping[str, Any]], pick: Pick, column: str, turn: Callable[[float], float] = float
) -> dict[int, float]:
    """For each seed, the mean of a column over all cells that are meant; a seed that lacks one of them is left out.

    Args:
        rows: Rows of a grid.
        pick: Values of some axes.
        column: The column.
        turn: What is done to each cell's value before the mean: gaps of two signs must not cancel where their size is
            meant.
    """
    meant = [row for row in rows if all(row[axis] == value for axis, value in pick.items())]
    found: dict[int, list[Any]] = {}
    for row in meant:
        found.setdefault(row["seed"], []).append(row.get(column))
    return {
        seed: stats.mean_interval([turn(value) for value in values]).mean
        for seed, values in found.items()
        if all(isinstance(value, int | float) for value in values)
    }
