"""A pool on disk: what is written is what the networks say, each member counts once, and growing it changes nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from unsharp import artifacts
from unsharp.data import DataConfig, ImageSamples
from unsharp.difficulty.forget import from_indices
from unsharp.errors import UserError
from unsharp.models import ModelConfig
from unsharp.pool.grow import Work, _cell, grow, pool_of, shares, train_here
from unsharp.pool.plan import Plan, PoolConfig
from unsharp.pool.store import Pool, answers, read_weights, write_shard
from unsharp.reference import Recipe
from unsharp.subject import Origin
from unsharp.training import TrainConfig, initial_model, train

CPU = torch.device("cpu")
TRAIN = TrainConfig(epochs=2, batch_size=8)


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def images(n=30, seed=0):
    rng = np.random.default_rng(seed)
    return ImageSamples(rng.integers(0, 256, (n, 4, 4, 1), dtype=np.uint8), rng.integers(0, 3, n), ["a", "b", "c"])


def plan(**changes) -> Plan:
    given = {"recipe": Recipe(network, TRAIN), "samples": images(), "config": PoolConfig(fraction=0.6, seed=1)}
    return Plan(**(given | changes))


def test_a_member_is_the_network_trained_alone_on_its_subset(tmp_path):
    made, test = plan(), images(7, seed=5)
    pool = grow(made, range(3), tmp_path, Work(stack=2), test=test)
    outputs = pool.outputs()
    assert outputs.members.tolist() == [0, 1, 2]
    for row, member in enumerate(outputs.members.tolist()):
        seed = made.subsets.training_seed(member)
        alone = initial_model(network, seed, CPU)
        chosen = made.subsets.indices(member)
        train(alone, made.samples, chosen, dataclasses.replace(TRAIN, seed=seed))
        assert np.array_equal(np.flatnonzero(outputs.inside[row]), chosen)
        for said, samples in ((outputs.train, made.samples), (outputs.test, test)):
            batch = next(samples.batches(np.arange(len(samples)), [len(samples)], draws=None))
            with torch.no_grad():
                p = alone.double()(batch.inputs.double()).softmax(1).numpy()
            own = p[np.arange(len(samples)), samples.labels]
            assert np.allclose(said.margin[row], np.log(own / (1 - own)), atol=1e-4)
            assert np.allclose(said.confidence[row], own, atol=1e-5)
            assert np.array_equal(said.correct[row], p.argmax(1) == samples.labels)
            alone.float()
        for name, tensor in read_weights(pool, member).items():
            assert torch.allclose(tensor, alone.state_dict()[name], atol=1e-6)


def test_margins_of_sure_networks_are_finite_and_right():
    logits = torch.tensor([[[80.0, 0.0, -3.0], [-200.0, 0.0, 1.0]]])
    margin, predicted = answers(logits, np.array([0, 0]))
    assert margin[0, 0] == pytest.approx(80 - np.log(1 + np.exp(-3)), rel=1e-6)
    assert margin[0, 1] == pytest.approx(-200 - np.log(1 + np.exp(1)), rel=1e-6)
    assert predicted.tolist() == [[0, 2]]


def test_growing_adds_members_and_touches_none(tmp_path):
    made = plan()
    first = grow(made, range(2), tmp_path, Work(stack=2)).outputs()
    before = {p: p.stat().st_mtime_ns for p in pool_of(made, tmp_path).path.rglob("*") if p.is_file()}
    both = grow(made, range(5), tmp_path, Work(stack=3)).outputs()
    assert both.members.tolist() == [0, 1, 2, 3, 4]
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())
    assert np.array_equal(both.train.margin[:2], first.train.margin)
    assert np.array_equal(both.first(2).inside, first.inside)


def test_stacks_and_single_networks_make_the_same_pool(tmp_path):
    single = grow(plan(), range(4), tmp_path / "a", Work(stack=1)).outputs()
    stacked = grow(plan(), range(4), tmp_path / "b", Work(stack=4)).outputs()
    assert np.allclose(single.train.margin, stacked.train.margin, atol=1e-4)


def test_a_member_that_two_shards_have_counts_once(tmp_path):
    made = plan()
    pool = pool_of(made, tmp_path)
    for part in ([0, 1], [1, 2]):
        train_here(made, part, pool, Work())
    assert len(pool.shards()) == 2
    assert pool.outputs().members.tolist() == [0, 1, 2]
    assert pool.missing(range(4)) == [3]


def test_failed_members_are_left_out_and_not_tried_again(tmp_path):
    n, m = 6, 2
    said = (np.zeros((m, n), np.float32), np.zeros((m, n), np.int16), np.zeros(n, np.int64))

    def work(workspace):
        write_shard(workspace, [0, 1], [1], np.zeros((m, n), bool), {"train": said})

    artifacts.perform(tmp_path / "shard", "pool", {}, work)
    pool = Pool(tmp_path)
    assert pool.outputs().members.tolist() == [0]
    assert pool.failed() == {1}
    assert pool.missing(range(3)) == [2]


def test_what_distinguishes_pools_is_in_their_name():
    same = plan()
    assert (
        same.key == plan(recipe=Recipe(network, dataclasses.replace(TRAIN, seed=9))).key
    )  # members have seeds of their own
    others = [
        plan(config=PoolConfig(fraction=0.7, seed=1)),
        plan(config=PoolConfig(fraction=0.6, seed=2)),
        plan(samples=images(seed=3)),
        plan(recipe=Recipe(network, dataclasses.replace(TRAIN, epochs=3))),
        plan(recipe=Recipe(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), TRAIN)),
        plan(without=from_indices([1, 2], images())),
    ]
    assert len({same.key, *(other.key for other in others)}) == 1 + len(others)


def test_oracles_never_have_what_they_are_to_be_without():
    made = plan(without=from_indices([3, 4, 20], images()), config=PoolConfig(fraction=1.0, seed=0))
    for member in range(4):
        assert np.array_equal(made.member(member).indices, np.setdiff1d(np.arange(30), [3, 4, 20]))
    assert not made.inside(range(4))[:, [3, 4, 20]].any()


def test_an_empty_pool_and_missing_weights_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="train them first"):
        Pool(tmp_path / "none").outputs()
    pool = grow(plan(), range(1), tmp_path, Work(keep_weights=False))
    with pytest.raises(UserError, match="weights kept"):
        pool.weights(0)
    with pytest.raises(UserError, match="lacks 7"):
        pool.outputs([7])


def test_other_processes_are_told_how_often_to_save():
    def asked(**changes):
        origin = Origin(model=ModelConfig(), data=DataConfig(), n_classes=3, input_shape=(1, 4, 4))
        return _cell(plan(), [0, 1], Work(**changes), origin).arguments["work"]

    assert asked(save_seconds=5.0)["save_seconds"] == 5
    assert "save_seconds" not in asked()  # nor does it rename what is kept already
    assert Work(**asked(save_seconds=5.0)).save_seconds == 5


def test_a_damaged_shard_is_named(tmp_path):
    pool = grow(plan(), range(1), tmp_path, Work())
    file = next(pool.path.rglob("outputs.safetensors"))
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match="delete"):
        pool.outputs()


def test_samples_that_cannot_be_found_again_are_refused():
    samples = images()
    samples.__dict__["fingerprint"] = None
    with pytest.raises(UserError, match="fingerprint"):
        plan(samples=samples)


def test_a_stack_is_the_same_whatever_else_is_missing():
    assert shares([11, 3, 5, 8, 9], 2) == [[3], [5], [8, 9], [11]]
    assert shares(range(7), 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert shares([4, 5, 3, 6], 3) == shares(range(7), 3)[1:]
