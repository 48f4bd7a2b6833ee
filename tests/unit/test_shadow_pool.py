"""A tiny pool forgets and is attacked, from training to curve: chance where it retrains, power where nothing moved."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from unsharp import unlearning
from unsharp.checkpoints import load_into
from unsharp.data import DataConfig, ImageSamples, load
from unsharp.difficulty.forget import from_indices
from unsharp.engine import OptimizerConfig
from unsharp.errors import UserError
from unsharp.evaluation.klom import klom_on_pools
from unsharp.evaluation.roc import Scored
from unsharp.evaluation.shadow import lira, lira_leave_one_out, margins, rmia, u_lira
from unsharp.evaluation.shadow_pool import (
    UNLEARNING,
    _seed,
    against_unseen,
    u_lira_on_pools,
    unlearn_pool,
    unlearned_pool_of,
)
from unsharp.models import ModelConfig
from unsharp.pool.grow import Work, grow, plan_of, pool_of
from unsharp.pool.plan import Plan, PoolConfig
from unsharp.pool.store import Pool, read_weights
from unsharp.reference import Recipe
from unsharp.stages import origin_of
from unsharp.sweep import SweepError
from unsharp.training import TrainConfig, initial_model
from unsharp.unlearning import configure

CPU = torch.device("cpu")
TRAIN = TrainConfig(epochs=20, batch_size=16, optimizer=OptimizerConfig(lr=0.1))
M = 24
WORK = Work(stack=M, device="cpu")
BARELY = configure("finetune", batch_size=16, lr=1e-5, epochs=1)
RETRAIN = configure("retrain")


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))


def images(n: int = 60, seed: int = 0) -> ImageSamples:
    """Noise with random labels: what a network knows of a sample, it remembers."""
    rng = np.random.default_rng(seed)
    pixels, labels = rng.integers(0, 256, (n, 4, 4, 1), dtype=np.uint8), rng.integers(0, 3, n)
    return ImageSamples(pixels, labels, ["a", "b", "c"], mean=(0.5,), std=(0.3,))


SAMPLES, TEST = images(), images(60, 5)
FORGET = from_indices(np.arange(12), SAMPLES)


def plan(**changes) -> Plan:
    given = {"recipe": Recipe(network, TRAIN), "samples": SAMPLES, "config": PoolConfig(fraction=0.7, seed=1)}
    return Plan(**(given | changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store with a trained pool, with oracles, and with the pool after two ways to forget."""
    store = tmp_path_factory.mktemp("pools")
    trained = grow(plan(), range(M), store, WORK, test=TEST)
    oracles = grow(plan(config=PoolConfig(fraction=0.7, seed=2), without=FORGET), range(M), store, WORK, test=TEST)
    ways = {
        name: unlearn_pool(plan(), FORGET, how, store, WORK, test=TEST).outputs()
        for name, how in (("barely", BARELY), ("retrain", RETRAIN))
    }
    return store, trained.outputs(), oracles.outputs(), ways


def test_lira_finds_the_members_of_a_pool_that_memorized(made) -> None:
    _, trained, _, _ = made
    scored = Scored.of(lira_leave_one_out(trained.train.margin, trained.inside), trained.inside)
    assert scored.roc.auc > 0.9


def test_networks_that_barely_moved_are_found_and_retrained_ones_are_not(made) -> None:
    _, _, oracles, ways = made
    found = {name: u_lira_on_pools(outputs, oracles, FORGET) for name, outputs in ways.items()}
    figures = {name: compared.power() for name, compared in found.items()}
    assert figures["barely"]["unlearned"].auc.low > 0.75
    assert figures["barely"]["unlearned"].balanced_accuracy > 0.75
    assert figures["retrain"]["unlearned"].auc.low < 0.5 < figures["retrain"]["unlearned"].auc.high
    for both in figures.values():
        assert both["retrained"].auc.low < 0.5 < both["retrained"].auc.high
        assert all(at.tpr is None for at in both["unlearned"].at[:1])
    asked_of_samples = {name: u_lira_on_pools(outputs, None, FORGET) for name, outputs in ways.items()}
    assert asked_of_samples["barely"].unlearned.roc.auc > 0.85
    assert asked_of_samples["retrain"].unlearned.roc.auc == pytest.approx(0.5, abs=0.1)
    assert asked_of_samples["barely"].power()["retrained"] is None


@pytest.mark.parametrize("attack", ["lira", "rmia"])
def test_one_network_at_a_time_with_the_retrained_beside_it(made, attack: str) -> None:
    _, _, oracles, ways = made
    barely, retrained = (against_unseen(ways[name], oracles, FORGET, attack=attack) for name in ("barely", "retrain"))
    assert barely.unlearned.roc.auc > 0.8
    assert retrained.unlearned.roc.auc == pytest.approx(0.5, abs=0.12)
    assert barely.retrained.roc.auc == pytest.approx(0.5, abs=0.12)
    assert np.array_equal(barely.retrained.score, retrained.retrained.score)


def test_attacks_on_pools_are_those_on_their_arrays(made) -> None:
    _, _, oracles, ways = made
    outputs = ways["barely"]
    had = outputs.inside[:, :12]
    compared = u_lira_on_pools(outputs, oracles, FORGET)
    j = 3
    rest = np.arange(M) != j
    alone = u_lira(
        outputs.train.margin[rest, :12], oracles.train.margin[:, :12], outputs.train.margin[j, :12], had=had[rest]
    )
    rows = (compared.unlearned.network == j) & compared.unlearned.member
    assert np.array_equal(compared.unlearned.sample[rows], np.flatnonzero(had[j]))
    assert np.allclose(compared.unlearned.score[rows], alone[0][had[j]])
    order = np.random.default_rng(0).permutation(60)
    z, unseen = order[:30], order[30:]
    compared = against_unseen(outputs, oracles, FORGET, attack="rmia")
    known = np.concatenate([oracles.train.margin[:, :12], oracles.test.margin[:, unseen]], 1)
    target = np.concatenate([outputs.train.margin[j, :12], outputs.test.margin[j, unseen]])
    never = np.zeros(known.shape, bool)
    alone = rmia(known, never, target, oracles.test.margin[:, z], outputs.test.margin[j, z])[0]
    of_j = compared.unlearned.of_networks([j])
    assert np.array_equal(of_j.score, np.append(alone[:12][had[j]], alone[12:]))
    assert of_j.member.sum() == had[j].sum()
    compared = against_unseen(outputs, oracles, FORGET)
    known = np.concatenate([oracles.train.margin[:, :12], oracles.test.margin[:, order]], 1)
    target = np.concatenate([outputs.train.margin[j, :12], outputs.test.margin[j, order]])
    alone = lira(known, np.zeros(known.shape, bool), target, form="offline")[0]
    assert np.allclose(compared.unlearned.of_networks([j]).score, np.append(alone[:12][had[j]], alone[12:]))


NEGGRAD = configure("neggrad", batch_size=16, lr=0.01, epochs=1, alpha=0.5)


@pytest.mark.parametrize("config", [BARELY, NEGGRAD], ids=["finetune", "neggrad"])
def test_each_member_forgets_the_part_that_it_had(made, config) -> None:
    store, trained, _, _ = made
    outputs = unlearn_pool(plan(), FORGET, config, store, WORK, members=[0, 7], test=TEST).outputs([0, 7])
    assert np.array_equal(outputs.inside, trained.inside[[0, 7]])
    for row, j in enumerate((0, 7)):
        own = initial_model(network, 0, CPU)
        load_into(own, read_weights(pool_of(plan(), store), j), "here")
        had = np.flatnonzero(trained.inside[j])
        assert 0 < (had < 12).sum() < 12
        how = dataclasses.replace(config, seed=_seed(config.seed, j, UNLEARNING))
        forgot, _ = unlearning.run(own.eval(), SAMPLES, had[had < 12], had[had >= 12], how)
        for said, samples in ((outputs.train, SAMPLES), (outputs.test, TEST)):
            batch = next(samples.batches(np.arange(60), [60], draws=None))
            with torch.no_grad():
                logits = forgot(batch.inputs).numpy()
            assert np.allclose(said.margin[row], margins(logits, samples.labels), atol=1e-5)
            assert np.array_equal(said.predicted[row], logits.argmax(1))
        kept = read_weights(unlearned_pool_of(plan(), FORGET, config, store), j)
        assert all(torch.equal(kept[name], tensor) for name, tensor in forgot.state_dict().items())
    assert np.abs(outputs.train.margin - trained.train.margin[[0, 7]]).max() > 0
    assert len({_seed(0, j, purpose) for j in range(50) for purpose in range(2)}) == 100


def test_it_goes_on_and_does_nothing_twice(made, tmp_path) -> None:
    store, _, _, _ = made
    how = dataclasses.replace(BARELY, seed=9)
    done = unlearn_pool(plan(), FORGET, how, store, WORK, members=[2, 4])
    before = {p: p.stat().st_mtime_ns for p in done.path.rglob("*") if p.is_file()}
    first = done.outputs()
    assert first.members.tolist() == [2, 4]
    again = unlearn_pool(plan(), FORGET, how, store, WORK, members=[1, 2, 4]).outputs()
    assert again.members.tolist() == [1, 2, 4]
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())
    assert np.array_equal(again.train.margin[1:], first.train.margin)
    paths = {unlearned_pool_of(plan(), *what, store).path for what in ((FORGET, how), (FORGET, BARELY))}
    paths.add(unlearned_pool_of(plan(), from_indices([1], SAMPLES), how, store).path)
    assert len(paths) == 3


def test_a_member_that_breaks_is_told_and_left_out(made) -> None:
    store, _, _, _ = made
    how = configure("neggrad", batch_size=16, lr=1e30, epochs=2, alpha=0.5)
    done = unlearn_pool(plan(), FORGET, how, store, WORK, members=[0, 1])
    assert done.failed() == {0, 1}
    assert done.missing([0, 1]) == []
    with pytest.raises(UserError, match="lacks any network"):
        done.outputs()


def test_mistakes_are_refused_before_any_work(made, tmp_path) -> None:
    store, trained, oracles, ways = made
    with pytest.raises(UserError, match="lacks"):
        unlearn_pool(plan(), FORGET, BARELY, store, WORK, members=[0, 99])
    with pytest.raises(UserError, match="train them first"):
        unlearn_pool(plan(), FORGET, BARELY, tmp_path, WORK)
    with pytest.raises(UserError, match="other data"):
        unlearn_pool(plan(), from_indices([1], images(60, 3)), BARELY, store, WORK)
    never = plan(config=PoolConfig(fraction=0.7, seed=2), without=FORGET)
    with pytest.raises(UserError, match="nothing to forget"):
        unlearn_pool(never, FORGET, BARELY, store, WORK)
    bare = plan(config=PoolConfig(fraction=0.7, seed=3))
    grow(bare, range(1), store, dataclasses.replace(WORK, keep_weights=False))
    with pytest.raises(UserError, match="weights kept"):
        unlearn_pool(bare, FORGET, BARELY, store, WORK)
    with pytest.raises(UserError, match="oracles were trained on a sample"):
        u_lira_on_pools(ways["barely"], trained, FORGET)
    with pytest.raises(UserError, match="none of the unlearned networks"):
        u_lira_on_pools(oracles, oracles, FORGET)
    with pytest.raises(UserError, match="too few shadows"):
        u_lira_on_pools(ways["barely"], oracles.first(1), FORGET, variance="global")
    with pytest.raises(UserError, match="unknown attack"):
        against_unseen(ways["barely"], oracles, FORGET, attack="loss")
    untested = dataclasses.replace(oracles, test=None)
    with pytest.raises(UserError, match="give test="):
        against_unseen(ways["barely"], untested, FORGET)


def test_klom_is_at_its_floor_where_the_pool_retrained_and_above_where_it_barely_moved(made) -> None:
    _, _, oracles, ways = made
    barely, retrained = (klom_on_pools(ways[name], oracles, FORGET) for name in ("barely", "retrain"))
    assert set(barely) == {"forget", "retain", "test"}
    none_left, left = retrained["forget"].unlearned, barely["forget"].unlearned
    assert none_left.n_oracles == M
    assert none_left.mean < 2 * none_left.floor
    assert left.mean > 5 * left.floor
    beside = barely["forget"].retrained
    assert beside is not None
    assert beside.mean < 3 * beside.floor


def test_members_without_forget_samples_are_left_out(made) -> None:
    store, trained, _, _ = made
    one = int(np.flatnonzero(trained.inside[0])[0])
    lines: list[str] = []
    few = from_indices([one], SAMPLES)
    outputs = unlearn_pool(plan(), few, BARELY, store, WORK, members=range(4), say=lines.append).outputs()
    assert outputs.members.tolist() == [j for j in range(4) if trained.inside[j, one]]
    had_not = 4 - len(outputs)
    assert (f"{had_not} of 4 networks" in " ".join(lines)) == (had_not > 0)


@pytest.mark.slow
def test_other_processes_do_the_same(tmp_path) -> None:
    """Cells, in processes of their own, from what can be written down; a mistake ends the work at the first."""
    rng = np.random.default_rng(0)
    file = tmp_path / "data.npz"
    arrays = {f"{part}_x": rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8) for part in ("train", "test")}
    np.savez(file, **arrays, train_y=np.arange(40) % 3, test_y=np.arange(40) % 3)
    config = DataConfig(name="npz", dir=str(file), augment="none")
    splits = load(config)
    how = TrainConfig(epochs=2, batch_size=16)
    origin = origin_of(ModelConfig(arch="small_cnn", width=4), config, how, splits)
    made = plan_of(origin, splits.train, PoolConfig(fraction=0.8))
    grow(made, range(2), tmp_path, Work(device="cpu", stack=1), test=splits.test)
    forget = from_indices(np.arange(9), splits.train)
    lines: list[str] = []
    work = Work(device="cpu", workers=1)
    asked = {"origin": origin, "test": splits.test}
    there = unlearn_pool(made, forget, BARELY, tmp_path, work, say=lines.append, **asked).outputs()
    assert "1 more take about" in lines[0]
    pool = unlearned_pool_of(made, forget, BARELY, tmp_path)
    pool.path.rename(tmp_path / "apart")
    here = unlearn_pool(made, forget, BARELY, tmp_path, work, test=splits.test).outputs()
    assert np.allclose(here.train.margin, there.train.margin, atol=1e-5)
    assert np.allclose(here.test.margin, there.test.margin, atol=1e-5)
    assert Pool(tmp_path / "apart").outputs().members.tolist() == [0, 1]
    with pytest.raises(SweepError, match="rewind chooses an epoch"):
        unlearn_pool(made, forget, configure("scrub", rewind=True, epochs=2), tmp_path, work, **asked)


def test_a_retrained_member_is_no_copy_of_the_oracle_of_its_number(tmp_path) -> None:
    """With all samples and one pool seed both would train on the same samples; only their own seeds keep them apart."""
    whole = PoolConfig(fraction=1.0, seed=1)
    grow(plan(config=whole), range(2), tmp_path, WORK)
    oracles = grow(plan(config=whole, without=FORGET), range(2), tmp_path, WORK).outputs()
    retrained = unlearn_pool(plan(config=whole), FORGET, RETRAIN, tmp_path, WORK).outputs()
    for margin in retrained.train.margin:
        assert np.abs(oracles.train.margin - margin).max(1).min() > 0.1
