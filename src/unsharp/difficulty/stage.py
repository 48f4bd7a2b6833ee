"""Memorization as a stage: a pool grows until its forget sets are settled, and the scores are written."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from unsharp import artifacts, config, runtime
from unsharp.artifacts import RUN_FILE, Run, Workspace, open_run
from unsharp.data import Samples, Splits
from unsharp.difficulty.forget import Level, amount
from unsharp.difficulty.memorization import Estimate, agreement, influence_pairs, memorization
from unsharp.difficulty.proxies import PROXIES, Proxy
from unsharp.difficulty.proxies import estimate as estimate_by
from unsharp.difficulty.result import SCORES_FILE
from unsharp.errors import UserError, unknown
from unsharp.pool.grow import Work, grow, plan_of, pool_of, probe
from unsharp.pool.plan import Plan, PoolConfig
from unsharp.pool.store import Pool, PoolOutputs
from unsharp.stages import REPORT_FILE, Setting
from unsharp.subject import Origin, Subject

STAGE = "memorize"
TABLE_FILE, SUMMARY_FILE = "scores.parquet", "memorization.json"
INFLUENCE_FILE = "influence.npz"
FEWEST = 8
"""Networks before the first look at the agreement; below, most samples have no network without them."""
GROWTH = 1.5
"""By what factor the pool grows between two looks."""
MEMORIZED = 0.25
"""From which score on Feldman & Zhang count a sample as memorized."""


@dataclass(frozen=True, kw_only=True)
class MemorizeConfig:
    """How far the estimate is taken.

    Args:
        models: Networks at most, at least 2.
        settle: Stop earlier where the forget sets of two halves of the networks overlap so far, in (0, 1]; 0 never
            stops earlier.
        watch: The levels that must settle.
        n: Size of the forget sets that must settle: a number of samples, or their fraction in (0, 1).
        minutes: Stop earlier where the next networks would end after so many minutes; None has no limit.
        influence: Least influence on a test sample that is written down, in (0, 1]; None computes none.

    Raises:
        UserError: if a value is out of range.
    """

    models: int = 200
    settle: float = 0.9
    watch: tuple[Level, ...] = ("high",)
    n: int | float = 0.05
    minutes: float | None = None
    influence: float | None = None

    def __post_init__(self) -> None:
        if self.models < 2:
            raise UserError(f"models must be at least 2, got {self.models}")
        if not 0 <= self.settle <= 1:
            raise UserError(f"settle must lie in [0, 1], got {self.settle}")
        if not self.watch:
            raise UserError(f"watch needs at least one of {', '.join(get_args(Level))}")
        for level in self.watch:
            if level not in get_args(Level):
                raise unknown("level", level, get_args(Level))
        if self.minutes is not None and not (math.isfinite(self.minutes) and self.minutes > 0):
            raise UserError(f"minutes must be a finite number above 0, got {self.minutes}")
        if self.influence is not None and not 0 < self.influence <= 1:
            raise UserError(f"influence must lie in (0, 1], got {self.influence}")


@dataclass(frozen=True, eq=False)
class Memorization:
    """An estimate, and how it came about.

    Args:
        estimate: The scores.
        outputs: What the networks say, from which they were made.
        rounds: A row for each look: networks, agreement between halves, minutes.
        settled: Whether the watched sets were settled at the end.
    """

    estimate: Estimate
    outputs: PoolOutputs
    rounds: list[dict[str, float]]
    settled: bool


def estimate(
    plan: Plan,
    how: MemorizeConfig,
    store: str | Path,
    work: Work,
    *,
    origin: Origin | None = None,
    test: Samples | None = None,
    at: Setting,
) -> Memorization:
    """Train networks until the watched forget sets are settled or the budget is spent, and score every sample.

    Networks that the pool has already count; later calls add to the same pool. They are looked at in the order in which
    they would have been trained, so a run that was killed comes to the same stacks, and to the same looks, as one that
    was not.

    Args:
        plan: What the networks have in common.
        how: How many, and when it is enough.
        store: Directory of pools.
        work: How they are trained.
        origin: Where networks and data come from, for work in other processes.
        test: Samples to measure influence on.
        at: Progress, and where lines go.

    Raises:
        UserError: for bad input, before any work.
        SweepError: if a shard of networks failed.
    """
    sizes, work = _sizes(plan, how), work.settled(plan)
    pool = pool_of(plan, store)
    for line in cost(plan, how, pool, work, test):
        at.say(line)
    started, fresh, rounds = time.monotonic(), 0, []
    stack, abreast = work.stack or 1, work.workers or 1
    there = _leading(pool, how.models)
    wanted = min(how.models, _whole_stacks(max(FEWEST, stack * abreast), stack))
    while True:
        fresh += len(pool.missing(range(wanted)))
        grow(plan, range(wanted), store, work, origin=origin, test=test, progress=at.progress)
        minutes = (time.monotonic() - started) / 60
        outputs = pool.outputs([j for j in pool.members() if j < wanted])
        agreed = agreement(outputs.inside, outputs.train.correct, sizes)
        settled = how.settle > 0 and all(agreed[level] >= how.settle for level in sizes)
        rounds.append({"models": len(outputs), "minutes": minutes, **agreed})
        at.say(_told(len(outputs), agreed, settled))
        following = _whole_stacks(max(wanted + stack * abreast, math.ceil(wanted * GROWTH)), stack)
        following = min(following, there if settled and wanted < there else how.models)
        if how.minutes is not None and fresh:
            following = min(following, wanted + int((how.minutes - minutes) / (minutes / fresh)) // stack * stack)
        if (settled and wanted >= there) or following <= wanted:
            return Memorization(memorization(outputs.inside, outputs.train.correct), outputs, rounds, settled)
        wanted = following


def memorize(
    origin: Origin,
    splits: Splits,
    pool: PoolConfig,
    how: MemorizeConfig,
    work: Work,
    out: str | Path | None,
    at: Setting,
) -> Run:
    """Estimate memorization, and write scores, their table, a summary and a page.

    A directory that holds an estimate from the same pool is replaced by the new one, which has all of its networks.

    Args:
        origin: Network, data and training.
        splits: The data.
        pool: How subsets are drawn.
        how: How many networks, and when it is enough.
        work: How they are trained.
        out: Where to write.
        at: Device, store, progress.

    Raises:
        UserError: for bad input, before any work.
        SweepError: if a shard of networks failed; those that were finished are kept.
    """
    plan = plan_of(origin, splits.train, pool)
    _sizes(plan, how)
    if how.influence is not None and splits.test is None:
        raise UserError("influence is measured on test samples, and these data have none; leave --influence out")
    settings = {"origin": origin, "pool": pool, "memorize": how, "key": plan.key}

    def do(workspace: Workspace) -> None:
        found = estimate(plan, how, at.store, work, origin=origin, test=splits.test, at=at)
        write(workspace, found, plan, how)

    grown = out is not None and _asks_otherwise(Path(out), plan.key, how)
    return dataclasses.replace(at, force=at.force or grown).perform(out, STAGE, settings, do)


def estimated(origin: Origin, samples: Samples, store: str | Path) -> Path:
    """The pool of a store from which this network's samples have memorization scores; `--scores` takes it too.

    Args:
        origin: Network, data and training.
        samples: The training samples.
        store: Directory of pools.

    Raises:
        UserError: if the store has fewer than 8 networks of that kind, or nobody knows how the network was trained.
    """
    pool = pool_of(plan_of(origin, samples, PoolConfig()), store)
    if len(pool.members()) < FEWEST:
        raise UserError(
            f"--level alone takes memorization from the networks in {store}, which has {len(pool.members())} like this "
            f"one, trained on random subsets; run unsharp memorize --model first, or name scores with --scores"
        )
    return pool.path


def score(
    proxy: Proxy, origin: Origin, splits: Splits, model: Subject | None, out: str | Path | None, at: Setting
) -> Run:
    """Score every training sample by a cheaper relative of memorization, and write scores and table.

    Args:
        proxy: Which, with its parameters.
        origin: Network, data and training.
        splits: The data.
        model: A trained network, which a proxy looks at that can; None has it train its own.
        out: Where to write.
        at: Device and progress.

    Raises:
        UserError: for bad input, before any work.
        NonFiniteError: if a network breaks down.
    """
    name = PROXIES.name_of(type(proxy))
    if proxy.needs == "model" and model is None:
        raise UserError(f"{name} looks at a trained network; name its checkpoint with --model")
    looks = model is not None and proxy.needs != "recipe"
    if not looks and origin.recipe is None:
        raise UserError(f"{name} trains networks, and nobody knows how this one was trained; leave --model out")
    cost = proxy.cost(None if looks or origin.train is None else origin.train)
    settings = {"origin": origin, "proxy": {"name": name, **config.to_dict(proxy)}}
    settings |= {"checkpoint": model.digest} if looks and model is not None else {}

    def do(workspace: Workspace) -> None:
        at.say(f"{name}: {cost.networks} networks to train, {cost.passes:.3g} passes over the data")
        found = estimate_by(
            proxy,
            splits.train,
            recipe=None if looks else origin.recipe,
            model=model.model if looks and model is not None else None,
            held_out=splits.test,
            workspace=workspace,
            save_seconds=at.save_seconds,
            progress=at.progress,
        )
        found.save(workspace.file(SCORES_FILE))
        found.save(workspace.file(TABLE_FILE))
        workspace.write_json(SUMMARY_FILE, {"kind": name, "samples": len(found), **found.provenance})

    return at.perform(out, STAGE, settings, do)


def write(workspace: Workspace, found: Memorization, plan: Plan, how: MemorizeConfig) -> None:
    """Write the files of an estimate into a run."""
    from unsharp.report.memorization import write_memorization

    samples, scores = plan.samples, found.estimate
    summary = summarise(found, plan, how)
    write_arrays(workspace.file(SCORES_FILE), _arrays(scores, samples))
    _write_table(workspace.file(TABLE_FILE), scores, samples)
    if how.influence is not None:
        assert found.outputs.test is not None  # or it would have been refused
        pairs = influence_pairs(found.outputs.inside, found.outputs.test.correct, how.influence)
        train, test, value = (np.concatenate(parts) for parts in zip(*pairs))
        write_arrays(workspace.file(INFLUENCE_FILE), {"train": train, "test": test, "influence": value})
    workspace.write_json(SUMMARY_FILE, summary)
    write_memorization(workspace.file(REPORT_FILE), summary, scores)


def summarise(found: Memorization, plan: Plan, how: MemorizeConfig) -> dict[str, Any]:
    """The figures of an estimate as plain values."""
    scores = found.estimate
    known = scores.memorization[np.isfinite(scores.memorization)]
    at = (5, 25, 50, 75, 95)
    return {
        "models": len(found.outputs),
        "settled": found.settled,
        "rounds": [{k: v if k == "models" else _plain(v) for k, v in row.items()} for row in found.rounds],
        "watched": _sizes(plan, how),
        "samples": len(scores),
        "unknown": int(len(scores) - len(known)),
        "memorized": int((known >= MEMORIZED).sum()),
        "memorized_for_sure": int((scores.memorization - 2 * scores.standard_error >= MEMORIZED).sum()),
        "mean": _plain(known.mean()) if len(known) else None,
        "mean_standard_error": _plain(np.nanmean(scores.standard_error)) if len(known) else None,
        "percentiles": {str(q): _plain(v) for q, v in zip(at, np.percentile(known, at))} if len(known) else {},
        "inside_accuracy": _plain(100 * np.nanmean(scores.inside)),
        "outside_accuracy": _plain(100 * np.nanmean(scores.outside)),
        "pool": {"key": plan.key, "subset": plan.subsets.size, **config.to_dict(plan.config)},
        "versions": runtime.versions(),
    }


def cost(plan: Plan, how: MemorizeConfig, pool: Pool, work: Work, test: Samples | None) -> list[str]:
    """What the estimate will cost, in lines; times a few steps of training to know."""
    n, todo = len(plan.samples), len(pool.missing(range(how.models)))
    have = len(pool.members())
    passes = -(-plan.subsets.size // plan.train.batch_size) * plan.train.epochs
    line = (
        f"at most {how.models:,} networks, each {plan.train.epochs} epochs on {plan.subsets.size:,} of {n:,} samples "
        f"({passes:,} passes)"
    )
    lines = [line + (f"; {have:,} are there already" if have else "")]
    if todo:
        each = probe(plan, work)
        abreast = min(work.workers or 1, -(-todo // (work.stack or 1)))
        minutes = todo * each / abreast / 60
        network = plan.recipe.make_model()
        weights = sum(t.numel() * t.element_size() for t in network.state_dict().values()) * work.keep_weights
        megabytes = todo * (weights + 6 * (n + (0 if test is None else len(test))) + n / 8) / 1e6
        lines.append(
            f"here about {each:.1f} s each: {minutes:.0f} minutes for all {todo:,}, and {megabytes:,.0f} MB of disk "
            f"({'with' if work.keep_weights else 'without'} weights) in {pool.path}"
        )
    if how.settle > 0:
        sets = ", ".join(f"{level} {size:,}" for level, size in _sizes(plan, how).items())
        lines.append(f"stops earlier where two halves of them agree on {how.settle:.0%} of the forget set ({sets})")
    return lines


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an `.npz` file, whole; without pickle."""

    def save(temporary: Path) -> None:
        if any(np.asarray(array).dtype.hasobject for array in arrays.values()):
            raise UserError("ids must be integers or text to be written down")
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    _whole(path, save)


def _arrays(scores: Estimate, samples: Samples) -> dict[str, Any]:
    return {
        "id": samples.ids,
        "index": samples.source_positions,
        "memorization": scores.memorization,
        "standard_error": scores.standard_error,
        "inside": scores.inside,
        "outside": scores.outside,
        "n_inside": scores.n_inside,
        "n_outside": scores.n_outside,
        "labels": samples.labels,
        "kind": np.array("memorization"),
    }


def _write_table(path: Path, scores: Estimate, samples: Samples) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = np.array(samples.class_names, dtype=object)[samples.labels]
    columns = {"id": samples.ids, "class": names} | {
        field: getattr(scores, field)
        for field in ("memorization", "standard_error", "inside", "outside", "n_inside", "n_outside")
    }
    _whole(path, lambda temporary: pq.write_table(pa.table(columns), temporary))


def _leading(pool: Pool, models: int) -> int:
    """How many of the first networks are there, or known to have failed, without a gap."""
    return min(pool.missing(range(models)), default=models)


def _whole_stacks(models: int, stack: int) -> int:
    """So many networks, or more, that all stacks are full."""
    return -(-models // stack) * stack


def _whole(path: Path, save: Callable[[Path], None]) -> None:
    with artifacts.writing(path), artifacts.atomic(path) as temporary:
        save(temporary)


def _sizes(plan: Plan, how: MemorizeConfig) -> dict[Level, int]:
    return {level: amount("n", how.n, len(plan.samples)) for level in how.watch}


def _asks_otherwise(path: Path, key: str, how: MemorizeConfig) -> bool:
    """Whether a run holds an estimate from this very pool, but for another number of networks or the like."""
    if not (path / RUN_FILE).is_file():
        return False
    run = open_run(path)
    return run.stage == STAGE and run.config.get("key") == key and run.config.get("memorize") != config.to_dict(how)


def _told(m: int, agreed: Mapping[str, float], settled: bool) -> str:
    if math.isnan(agreed["spearman"]):
        return f"{m} networks: too few for their halves to be compared"
    sets = ", ".join(f"{100 * v:.0f} % of the {name} set" for name, v in agreed.items() if name != "spearman")
    return f"{m} networks: halves agree on {sets} (rank correlation {agreed['spearman']:.2f})" + (
        "; settled" if settled else ""
    )


def _plain(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
