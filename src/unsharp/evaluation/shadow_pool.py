"""Attacks on pools: each network of a pool forgets, and is attacked, and the retrained networks beside it.

    1. a pool of networks that had the forget set, all of it (`fraction=1`, other seeds) or in random parts
    2. the same networks after `unlearn_pool`: again a pool, with what they say of every sample
    3. a pool of oracles, `Plan(without=forget)`, with another seed than that of 1

`u_lira_on_pools` asks 2 against 3 about the same samples, `against_unseen` asks one network about forget and test
samples. Both give the attack on the retrained networks beside it: where that is not at chance, the attack has found
something else than remains of the forget set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from unsharp import artifacts, checkpoints, config, data, runtime, unlearning
from unsharp.artifacts import Workspace
from unsharp.data import Samples, Splits
from unsharp.data.streams import evaluation_batches
from unsharp.difficulty.forget import ForgetSet, from_ids
from unsharp.errors import NonFiniteError, UserError, unknown
from unsharp.evaluation.roc import FPRS, Power, Scored, Unit, power
from unsharp.evaluation.shadow import (
    Form,
    Tail,
    Variance,
    lira,
    lira_leave_one_out,
    rmia,
    rmia_leave_one_out,
    u_lira_leave_one_out,
)
from unsharp.models.modes import evaluating
from unsharp.pool.grow import ATTEMPTS, Work, plan_of, pool_of
from unsharp.pool.plan import Plan, PoolConfig
from unsharp.pool.store import Pool, PoolOutputs, answers, read_weights, weights_file, write_shard
from unsharp.progress import SILENT, Progress
from unsharp.subject import Origin
from unsharp.sweep import Cell, Result, SweepError, report, run_cells
from unsharp.training import Record, initial_model, train
from unsharp.unlearning import UnlearnConfig

HERE = "unsharp.evaluation.shadow_pool"
STAGE = "unlearn_member"
BATCH = 1000
UNLEARNING, RETRAINING = range(2)
Unseen = Literal["lira", "rmia"]
_READ: dict[tuple[str, str], Splits] = {}

# --- forgetting in a pool ---------------------------------------------------------------------------------------------


def unlearned_pool_of(plan: Plan, forget: ForgetSet, how: UnlearnConfig, store: str | Path) -> Pool:
    """Where the members of a plan are, or will be, after they forgot in this way."""
    named = {"pool": plan.key, "forget": forget.hash, "unlearn": config.to_dict(how)}
    return Pool(Path(store) / f"unlearned-{config.digest(named)[:16]}")


def unlearn_pool(
    plan: Plan,
    forget: ForgetSet,
    how: UnlearnConfig,
    store: str | Path,
    work: Work,
    *,
    members: Sequence[int] | None = None,
    origin: Origin | None = None,
    test: Samples | None = None,
    validation: Samples | None = None,
    progress: Progress = SILENT,
    say: Callable[[str], None] = lambda line: None,
) -> Pool:
    """Make each network of a pool forget those of the forget samples that it had; called again, it goes on.

    Each member has a seed of its own, drawn from that of `how`. One whose unlearning comes upon a step or an output
    that is not finite counts as failed, and is left out of what the pool says.

    Args:
        plan: Of the trained pool, which must have its weights.
        forget: What is forgotten; a member forgets the part that it was trained on.
        how: How.
        store: Directory of pools, where the trained one is.
        work: Processes, threads, device and backend; `keep_weights` keeps the unlearned networks as well. The trained
            pool must be there, at the same path, for whoever does the work.
        members: Which; all that are there by default. Those that had none of the samples are left out.
        origin: Where networks and data come from, so that other processes can make them; None works in this one.
        test: Samples that the networks are asked about besides those of the plan; with `origin` it is that of its data.
        validation: Samples for methods that choose by them; with `origin` likewise.
        progress: Told of each member.
        say: Takes a line for the user: what the work will take, whom it leaves out.

    Returns:
        The pool of unlearned networks. `Pool.outputs()` gives their margins; `inside` says what each had been trained
        on, the forget samples among it.

    Raises:
        UserError: before any work, if a network or its weights are missing, or none of them had a forget sample.
        SweepError: if a member could not be done; what was finished is kept.
    """
    trained, done = pool_of(plan, store), unlearned_pool_of(plan, forget, how, store)
    wanted = _wanted(plan, forget, trained, members, say)
    work = dataclasses.replace(work, workers=_workers(work))
    todo = done.missing(wanted)
    if origin is None:
        _unlearn_here(plan, forget, how, trained, done, todo, work, test, validation, progress)
        return done
    arguments = {
        "origin": origin,
        "pool": plan.config,
        "without": None if plan.without is None else plan.without.ids.tolist(),
        "trained": str(trained.path.absolute()),
        "forget": forget.ids.tolist(),
        "unlearn": how,
        "work": {"keep_weights": work.keep_weights, "device": work.device},
    }
    cells = [Cell(f"{HERE}:unlearn_member", {**arguments, "member": j}) for j in todo]
    # One alone first: it says what the others will take, and a mistake that all of them share ends the work here.
    first = _run(cells[:1], done, work, progress)
    if len(cells) > 1:
        minutes = first[0].seconds * (len(cells) - 1) / (60 * (work.workers or 1))
        say(f"a network forgets in {first[0].seconds:.1f} s: {len(cells) - 1} more take about {minutes:.1f} minutes")
    _run(cells[1:], done, work, progress)
    return done


def unlearn_member(
    origin: dict[str, Any],
    pool: dict[str, Any],
    without: list[Any] | None,
    trained: str,
    forget: list[Any],
    unlearn: dict[str, Any],
    work: dict[str, Any],
    member: int,
    workspace: Workspace,
) -> dict[str, Any]:
    """Cell: one member of a trained pool forgets, from what can be written down."""
    made = config.from_dict(Origin, origin)
    device = runtime.pick_device(work["device"])
    splits = _splits(made, device)
    plan = plan_of(made, splits.train, config.from_dict(PoolConfig, pool), without)
    failed = _forget(
        plan,
        from_ids(forget, splits.train),
        config.from_dict(UnlearnConfig, unlearn),
        Pool(trained),
        member,
        workspace,
        device=device,
        keep_weights=work["keep_weights"],
        test=splits.test,
        validation=splits.validation,
        metadata={"origin": made},
    )
    return {"member": member, "failed": failed}


def _wanted(
    plan: Plan, forget: ForgetSet, trained: Pool, members: Sequence[int] | None, say: Callable[[str], None]
) -> list[int]:
    """The members that will forget. Raises: UserError if there is none, or one cannot be read."""
    forget.retain_indices(len(plan.samples))
    if forget.fingerprint != plan.samples.fingerprint:
        raise UserError("the forget set was chosen from other data than those of the pool; choose it from these")
    there = trained.members()
    wanted = sorted(there if members is None else set(members))
    absent = [j for j in wanted if j not in there]
    if absent or not wanted:
        raise UserError(f"pool {trained.path} lacks {absent or 'any network'}; train them first")
    had: np.ndarray = np.any(plan.inside(wanted)[:, forget.indices], axis=1)
    if not bool(had.any()):
        raise UserError(
            f"none of the {len(wanted)} networks was trained on a sample of the forget set, so there is nothing to "
            "forget; take a pool that is not without it"
        )
    if not bool(had.all()):
        say(f"{int((~had).sum())} of {len(wanted)} networks had none of the forget samples, and are left out")
    chosen = [j for j, some in zip(wanted, had.tolist()) if some]
    for j in chosen:
        trained.weights(j)
    return chosen


def _workers(work: Work) -> int:
    """Processes at a time: as many as the processors carry, or one that has the accelerator."""
    host = runtime.is_host(runtime.pick_device(work.device))
    return work.workers or (max(1, runtime.processors() // work.threads) if host else 1)


def _run(cells: Sequence[Cell], done: Pool, work: Work, progress: Progress) -> list[Result]:
    """Run the cells, those whose process dies a few times. Raises: SweepError if one cannot be done."""
    results: list[Result] = []
    for _ in range(ATTEMPTS):
        results = run_cells(
            cells, done.path, workers=work.workers, threads=work.threads, progress=progress, backend=work.backend
        )
        failures = [result.error for result in results if result.error is not None]
        if any(error.kind != "died" for error in failures) or not failures:
            break
    failed = [result for result in results if result.error is not None]
    if failed:
        more = f"; {len(failed) - 1} more networks failed" if len(failed) > 1 else ""
        raise SweepError(report(failed[:1]) + more)
    return results


def _unlearn_here(
    plan: Plan,
    forget: ForgetSet,
    how: UnlearnConfig,
    trained: Pool,
    done: Pool,
    todo: Sequence[int],
    work: Work,
    test: Samples | None,
    validation: Samples | None,
    progress: Progress,
) -> None:
    device = runtime.pick_device(work.device)
    for j in todo:

        def do(workspace: Workspace, j: int = j) -> None:
            _forget(
                plan,
                forget,
                how,
                trained,
                j,
                workspace,
                device=device,
                keep_weights=work.keep_weights,
                test=test,
                validation=validation,
                save_seconds=work.save_seconds,
                progress=progress,
            )

        path = done.path / f"member-{j:06d}"
        about = runtime.describe(device) | {"data": plan.samples.fingerprint}
        artifacts.perform(path, STAGE, {"member": j}, do, provenance=about, wait=True)


def _forget(
    plan: Plan,
    forget: ForgetSet,
    how: UnlearnConfig,
    trained: Pool,
    member: int,
    workspace: Workspace,
    *,
    device: torch.device,
    keep_weights: bool,
    test: Samples | None,
    validation: Samples | None,
    save_seconds: float = 60.0,
    metadata: dict[str, Any] | None = None,
    progress: Progress = SILENT,
) -> bool:
    """One member forgets, and what it then says is written as a shard. Whether it failed."""
    had = plan.member(member).indices
    mine, kept = np.intersect1d(had, forget.indices), np.setdiff1d(had, forget.indices)
    network = initial_model(plan.recipe.make_model, 0, device)
    checkpoints.load_into(network, read_weights(trained, member), str(trained.weights(member)))
    asked = {name: samples for name, samples in (("train", plan.samples), ("test", test)) if samples is not None}

    def retrain() -> tuple[nn.Module, Record]:
        # Not the seed of the member: an oracle of this number may have it, and the two would be one network.
        seed = _seed(how.seed, member, RETRAINING)
        fresh = initial_model(plan.recipe.make_model, seed, device)
        return fresh, train(fresh, plan.samples, kept, dataclasses.replace(plan.train, seed=seed))

    try:
        network, record = unlearning.run(
            network.eval(),
            plan.samples,
            mine,
            kept,
            dataclasses.replace(how, seed=_seed(how.seed, member, UNLEARNING)),
            retrain=retrain,
            workspace=workspace,
            save_seconds=save_seconds,
            progress=progress,
            validation=validation,
        )
        workspace.write_json("record.json", record)
        spoken = {name: _answers(network, samples) for name, samples in asked.items()}
        failed = not all(np.isfinite(margin).all() for margin, _, _ in spoken.values())
    except NonFiniteError:
        failed = True
        spoken = {name: _nothing(samples) for name, samples in asked.items()}
    write_shard(workspace, [member], [member] if failed else [], plan.inside([member]), spoken)
    if keep_weights and not failed:
        about = {**(metadata or {}), "pool": {"key": plan.key, "member": member}, "forget": forget.hash}
        checkpoints.save_model(weights_file(workspace.path, member), network, about)
    return failed


def _answers(network: nn.Module, samples: Samples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Margin (1, n), predicted class (1, n) and labels of all samples."""
    found = []
    with evaluating(network), torch.no_grad():
        for batch in evaluation_batches(samples, np.arange(len(samples)), BATCH):
            found.append(answers(network(batch.inputs).float(), samples.labels[batch.indices.numpy()]))
    margin, predicted = (np.concatenate(part)[None] for part in zip(*found))
    return margin, predicted, samples.labels


def _nothing(samples: Samples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = len(samples)
    return np.full((1, n), np.nan, np.float32), np.zeros((1, n), np.int16), samples.labels


def _seed(seed: int, member: int, purpose: int) -> int:
    sequence = np.random.SeedSequence(seed, spawn_key=(member, purpose))
    return int(sequence.generate_state(1, np.uint32)[0])


def _splits(origin: Origin, device: torch.device) -> Splits:
    """The data of an origin; a process that does several members reads them once."""
    key = (config.digest(origin.data), str(device))
    if key not in _READ:
        _READ.clear()
        _READ[key] = data.load(origin.data, device)
    if _READ[key].train.fingerprint != origin.fingerprint:
        raise UserError("the data are not those of the pool any more; give the same --data and --data-dir")
    return _READ[key]


# --- attacks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Compared:
    """An attack on networks that forgot, and the same on networks that never had the samples.

    Attributes:
        unlearned: Its scores where the members are forget samples in networks that forgot them.
        retrained: Its scores where retrained networks stand in their place; None where there are too few of them. The
            ideal is chance here, and the same for both.
        threshold: The attack's own threshold; None where it has none.
    """

    unlearned: Scored
    retrained: Scored | None
    threshold: float | None

    def power(
        self, *, fprs: Sequence[float] = FPRS, over: Unit | None = "both", level: float = 0.95, seed: int = 0
    ) -> dict[str, Power | None]:
        """The figures of both, "unlearned" and "retrained". Args: as `roc.power`."""

        def figures(scored: Scored) -> Power:
            return power(scored, threshold=self.threshold, fprs=fprs, over=over, level=level, seed=seed)

        return {
            "unlearned": figures(self.unlearned),
            "retrained": None if self.retrained is None else figures(self.retrained),
        }


def u_lira_on_pools(
    unlearned: PoolOutputs,
    oracles: PoolOutputs | None,
    forget: ForgetSet,
    *,
    form: Form = "online",
    variance: Variance = "auto",
    tail: Tail = "both",
) -> Compared:
    """U-LiRA on every network of the pools, each with the others as shadows: the same samples in different networks.

    Args:
        unlearned: Of the pool that forgot.
        oracles: Of the networks that were trained without the forget set. None takes the unlearned networks that never
            had the sample, but went through the forgetting of others: then the attack asks which of the samples a
            network forgot, not whether it is a retrained one, and there are none to stand beside it.
        forget: What was forgotten.
        form: As for `shadow.u_lira`.
        variance: As for `shadow.lira`.
        tail: As for `shadow.u_lira`.

    Returns:
        The scores. In `retrained` every other oracle is taken for one that forgot.

    Raises:
        UserError: if the pools are of other samples, an oracle had a forget sample, or there are too few networks.
    """
    columns = forgotten_columns(unlearned, forget)
    margins, had = unlearned.train.margin[:, columns], unlearned.inside[:, columns]
    own = 0.0 if form == "online" else None
    if oracles is None:
        scores = lira_leave_one_out(margins, had, form=form, variance=variance)
        return Compared(Scored.of(scores, had), None, own)
    retrained = margins_of_oracles(oracles, unlearned, columns)
    of_unlearned, of_retrained = u_lira_leave_one_out(
        margins, retrained, had=had, form=form, variance=variance, tail=tail
    )
    beside = Scored.between(of_retrained[::2], of_retrained[1::2], same_samples=True)
    return Compared(Scored.between(of_unlearned, of_retrained, same_samples=True), beside, own)


def against_unseen(
    unlearned: PoolOutputs,
    oracles: PoolOutputs,
    forget: ForgetSet,
    *,
    attack: Unseen = "lira",
    variance: Variance = "auto",
    gamma: float = 2.0,
    linear: float = 0.3,
    seed: int = 0,
) -> Compared:
    """An offline attack that asks one network at a time: forget samples against test samples.

    The shadows are the oracles, which had neither. A forget set that is harder than the test set (one chosen by
    difficulty, or of one class) is told from it in retrained networks as well, in part; `retrained` says how far.

    Args:
        unlearned: Of the pool that forgot.
        oracles: Of the networks that were trained without the forget set.
        forget: What was forgotten.
        attack: "lira", or "rmia", which takes half of the test samples for its population.
        variance: As for `shadow.lira`.
        gamma: As for `shadow.rmia`.
        linear: As for `shadow.rmia`.
        seed: Seed of the division of the test samples.

    Raises:
        UserError: if there are no test samples, or as `u_lira_on_pools`.
    """
    if attack not in get_args(Unseen):
        raise unknown("attack", attack, get_args(Unseen))
    if unlearned.test is None or oracles.test is None:
        raise UserError("this attack asks about test samples, and the pools were not asked about any; give test=")
    columns = forgotten_columns(unlearned, forget)
    never, had = margins_of_oracles(oracles, unlearned, columns), unlearned.inside[:, columns]
    order = np.random.default_rng(seed).permutation(unlearned.test.margin.shape[1])
    half = len(order) // 2 if attack == "rmia" else 0
    population, unseen = order[:half], order[half:]
    shadows = np.concatenate([never, oracles.test.margin[:, unseen]], 1)
    target = np.concatenate([unlearned.train.margin[:, columns], unlearned.test.margin[:, unseen]], 1)
    nobody = np.zeros(shadows.shape, bool)
    if attack == "lira":
        of_unlearned = lira(shadows, nobody, target, form="offline", variance=variance)
        of_retrained = lira_leave_one_out(shadows, nobody, form="offline", variance=variance)
    else:
        z, z_target = oracles.test.margin[:, population], unlearned.test.margin[:, population]
        of_unlearned = rmia(shadows, nobody, target, z, z_target, gamma=gamma, linear=linear)
        of_retrained = rmia_leave_one_out(shadows, nobody, z, gamma=gamma, linear=linear)
    n = len(columns)
    members = np.where(had, of_unlearned[:, :n], np.nan)
    return Compared(
        Scored.between(members, of_unlearned[:, n:], same_samples=False),
        Scored.between(of_retrained[:, :n], of_retrained[:, n:], same_samples=False),
        None,
    )


def forgotten_columns(outputs: PoolOutputs, forget: ForgetSet) -> np.ndarray:
    """The columns of the forget samples. Raises: UserError if none of the networks had one."""
    forget.retain_indices(outputs.inside.shape[1])
    if not outputs.inside[:, forget.indices].any():
        raise UserError("none of the unlearned networks had a sample of the forget set; take the pool that forgot it")
    return forget.indices


def margins_of_oracles(oracles: PoolOutputs, unlearned: PoolOutputs, columns: np.ndarray) -> np.ndarray:
    """Margins (m, k) of the oracles on the forget samples. Raises: UserError if one had a sample or saw others."""
    if not np.array_equal(oracles.train.labels, unlearned.train.labels):
        raise UserError(
            "the oracles were asked about other samples than the unlearned networks; train them on the same"
        )
    had = oracles.inside[:, columns]
    if had.any():
        raise UserError(
            f"{int(had.any(1).sum())} of {len(had)} oracles were trained on a sample of the forget set; make their "
            "pool with Plan(without=forget)"
        )
    return oracles.train.margin[:, columns]
