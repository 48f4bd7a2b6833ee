"""Training the members that a pool lacks: in stacks, here, in local processes, or on a cluster."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unsharp import artifacts, checkpoints, config, data, runtime
from unsharp.artifacts import Workspace
from unsharp.data import Samples, Splits
from unsharp.difficulty.forget import ForgetSet, from_ids
from unsharp.errors import UserError
from unsharp.pool.plan import Plan, PoolConfig
from unsharp.pool.stack import Stack, members_at_once
from unsharp.pool.store import Pool, answers, weights_file, write_shard
from unsharp.progress import SILENT, Progress
from unsharp.subject import Origin
from unsharp.sweep import Backend, Cell, Result, SweepError, report, run_cells, run_local

HERE = "unsharp.pool.grow"
STAGE = "pool"
STACKED = 16
"""Networks in a stack at most, where nothing is said."""
ATTEMPTS = 3
"""How often a shard is tried whose process dies."""
_READ: dict[tuple[str, str], Splits] = {}
PROBE_STEPS = 4
"""Steps that are timed before a long run."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """How members are trained; nothing that they are named by.

    Args:
        stack: Networks trained together on a device; None takes what suits it.
        keep_weights: Keep a checkpoint of each, and not only what it says of every sample.
        workers: Processes at a time; None for as many as the processors carry, or one on an accelerator. Where the
            networks cannot be made anew in another process, all are trained in this one.
        threads: Torch threads of each process.
        device: Where to train, as `runtime.pick_device` takes it; None for the accelerator, if there is one.
        save_seconds: Seconds between two savings of the state from which a killed run goes on.
        backend: Where processes run.

    Raises:
        UserError: if a number is below 1.
    """

    stack: int | None = None
    keep_weights: bool = True
    workers: int | None = None
    threads: int = 1
    device: str | None = None
    save_seconds: float = 60.0
    backend: Backend = run_local

    def __post_init__(self) -> None:
        for name in ("stack", "workers", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")

    def settled(self, plan: Plan) -> Work:
        """The same with what suits networks and device in place of None.

        On a processor as many networks are trained together as is quicker than one by one, in parallel processes; on an
        accelerator one process has it, and memory sets the bound.
        """
        device = runtime.pick_device(self.device)
        host, stack = runtime.is_host(device), self.stack
        if stack is None:
            most = members_at_once(plan.recipe.make_model, plan.samples, plan.member(0), plan.train, device)
            stack = STACKED if most is None else min(most, STACKED)
        workers = self.workers or (max(1, runtime.processors() // self.threads) if host else 1)
        return dataclasses.replace(self, stack=stack, workers=workers)


def pool_of(plan: Plan, store: str | Path) -> Pool:
    """Where the members of a plan are, or will be, in a store."""
    return Pool(Path(store) / f"pool-{plan.key[:16]}")


def grow(
    plan: Plan,
    wanted: Sequence[int],
    store: str | Path,
    work: Work,
    *,
    origin: Origin | None = None,
    test: Samples | None = None,
    progress: Progress = SILENT,
) -> Pool:
    """Train those of the wanted members that the pool lacks; called again after a kill, it goes on.

    Args:
        plan: What the members have in common.
        wanted: Their numbers.
        store: Directory of pools.
        work: How to go about it.
        origin: Where networks and data come from, so that other processes can make them; None trains in this one.
        test: Samples that the members are asked about besides those of the plan.
        progress: Told of each shard, or of each step where all is done in this process.

    Returns:
        The pool.

    Raises:
        SweepError: if a shard failed; what was finished is kept.
    """
    pool, work = pool_of(plan, store), work.settled(plan)
    parts = shares(pool.missing(wanted), work.stack or 1)
    if not parts:
        return pool
    if origin is None:
        for part in parts:
            train_here(plan, part, pool, work, test=test, progress=progress)
        return pool
    cells = [_cell(plan, part, work, origin) for part in parts]
    failures: list[Result] = []
    for _ in range(ATTEMPTS):
        results = run_cells(
            cells, pool.path, workers=work.workers, threads=work.threads, progress=progress, backend=work.backend
        )
        failures = [result for result in results if result.error is not None]
        if not failures or any(result.error.kind != "died" for result in failures if result.error is not None):
            break
        cells = [result.cell for result in failures]
    if failures:
        more = f"; {len(failures) - 1} more shards failed" if len(failures) > 1 else ""
        raise SweepError(report(failures[:1]) + more)
    return pool


def shares(members: Sequence[int], size: int) -> list[list[int]]:
    """The members in stacks: together go those of 0 to size − 1, of size to 2·size − 1, and so on.

    So a stack is the same whatever else is missing, and one that was killed is found again by its name.
    """
    return [list(block) for _, block in itertools.groupby(sorted(members), lambda member: member // size)]


def train_here(
    plan: Plan,
    members: Sequence[int],
    pool: Pool,
    work: Work,
    *,
    test: Samples | None = None,
    progress: Progress = SILENT,
) -> None:
    """Train one stack of members in this process, and keep it as a shard of the pool."""
    device = runtime.pick_device(work.device)

    def do(workspace: Workspace) -> None:
        train_shard(plan, members, workspace, work, device=device, test=test, progress=progress)

    name = f"members-{members[0]:06d}-{len(members)}-{config.digest(list(members))[:8]}"
    about = runtime.describe(device) | {"data": plan.samples.fingerprint}
    artifacts.perform(pool.path / name, STAGE, {"members": list(members)}, do, provenance=about, wait=True)


def train_members(
    origin: dict[str, Any],
    pool: dict[str, Any],
    without: list[Any] | None,
    members: list[int],
    work: dict[str, Any],
    workspace: Workspace,
) -> dict[str, Any]:
    """Cell: a shard of members, from what can be written down."""
    made = config.from_dict(Origin, origin)
    device = runtime.pick_device(work["device"])
    splits = _splits(made, device)
    plan = plan_of(made, splits.train, config.from_dict(PoolConfig, pool), without)
    how = Work(**work)
    failed = train_shard(plan, members, workspace, how, device=device, test=splits.test, metadata={"origin": made})
    return {"members": members, "failed": failed}


def plan_of(origin: Origin, samples: Samples, pool: PoolConfig, without: ForgetSet | list[Any] | None = None) -> Plan:
    """The plan of a pool of networks like this one. Raises: UserError if nobody knows how it was trained."""
    if origin.recipe is None:
        raise UserError("nobody knows how this network was trained; say it with --train-config")
    if isinstance(without, list):
        without = from_ids(without, samples)
    return Plan(recipe=origin.recipe, samples=samples, config=pool, without=without)


def train_shard(
    plan: Plan,
    members: Sequence[int],
    workspace: Workspace,
    work: Work,
    *,
    device: torch.device,
    test: Samples | None,
    progress: Progress = SILENT,
    metadata: dict[str, Any] | None = None,
) -> list[int]:
    """Train members together, ask them about all samples, and write both down.

    Returns:
        Those whose training came upon a step that is not finite.
    """
    stack = Stack(plan.recipe.make_model, plan.samples, [plan.member(j) for j in members], plan.train, device)
    record = stack.train(workspace=workspace, save_seconds=work.save_seconds, progress=progress, label=_label(members))
    failed = [members[i] for i in stack.failed]
    spoken = {}
    for name, samples in {"train": plan.samples, "test": test}.items():
        if samples is not None:
            logits = stack.logits(samples, np.arange(len(samples)))
            spoken[name] = (*answers(logits, samples.labels), samples.labels)
    write_shard(workspace, members, failed, plan.inside(members), spoken)
    if work.keep_weights:
        network = plan.recipe.make_model()
        for i, member in enumerate(members):
            if member not in failed:
                network.load_state_dict(stack.state(i))
                about = {**(metadata or {}), "pool": {"key": plan.key, "member": member}}
                checkpoints.save_model(weights_file(workspace.path, member), network, about)
    workspace.write_json("record.json", record)
    return failed


def probe(plan: Plan, work: Work) -> float:
    """Seconds that one network takes here, from a few steps of a stack; a guess, made before the work.

    A first epoch of these steps runs before the clock does, since first steps allocate and choose algorithms.
    """
    device, work = runtime.pick_device(work.device), work.settled(plan)
    size = min(plan.subsets.size, PROBE_STEPS * plan.train.batch_size)
    steps = -(-plan.subsets.size // plan.train.batch_size)
    before = torch.get_num_threads()
    runtime.set_threads(work.threads)
    try:
        members = [plan.member(j) for j in range(work.stack or 1)]
        few = [type(m)(m.indices[:size], m.seed) for m in members]
        short = config.from_dict(type(plan.train), config.to_dict(plan.train) | {"epochs": 2})
        stack = Stack(plan.recipe.make_model, plan.samples, few, short, device)
        record = stack.train()
        per_step = (record.history[-1]["seconds"] - record.history[0]["seconds"]) / -(-size // short.batch_size)
        started = time.monotonic()
        some = np.arange(min(len(plan.samples), 1000))
        stack.logits(plan.samples, some)
        asking = (time.monotonic() - started) * len(plan.samples) / len(some)
    finally:
        runtime.set_threads(before)
    return (per_step * steps * plan.train.epochs + asking) / len(members)


def _cell(plan: Plan, members: Sequence[int], work: Work, origin: Origin) -> Cell:
    arguments = {
        "origin": origin,
        "pool": plan.config,
        "without": None if plan.without is None else plan.without.ids.tolist(),
        "members": list(members),
        "work": {"keep_weights": work.keep_weights, "device": work.device},
    }
    if work.save_seconds != Work.save_seconds:
        arguments["work"]["save_seconds"] = work.save_seconds
    return Cell(f"{HERE}:train_members", arguments)


def _splits(origin: Origin, device: torch.device) -> Splits:
    """The data of an origin; a process that trains several shards reads them once."""
    key = (config.digest(origin.data), str(device))
    if key not in _READ:
        _READ.clear()
        _READ[key] = data.load(origin.data, device)
    if _READ[key].train.fingerprint != origin.fingerprint:
        raise UserError("the data are not those of the pool any more; give the same --data and --data-dir")
    return _READ[key]


def _label(members: Sequence[int]) -> str:
    last = "" if len(members) == 1 else f" to {members[-1]}"
    return f"network {members[0]}{last}"
