"""The estimate as it is run: against every subset trained by hand, stopped when it is enough, resumed after a kill."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from unsharp.data import ImageSamples
from unsharp.difficulty.memorization import memorization
from unsharp.difficulty.stage import MemorizeConfig, estimate
from unsharp.engine import OptimizerConfig
from unsharp.pool.grow import Work, grow, pool_of
from unsharp.pool.plan import Plan, PoolConfig
from unsharp.progress import Progress
from unsharp.reference import Recipe
from unsharp.stages import Setting
from unsharp.training import TrainConfig

N, SIZE, CLASSES, EPOCHS, LR = 8, 5, 3, 25, 0.5


class FromZero(nn.Module):
    """A linear network that starts at zero: trained on whole subsets, it draws nothing, so its answer is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1))


def images(n=N, seed=0):
    rng = np.random.default_rng(seed)
    pixels, labels = rng.integers(0, 256, (n, 2, 2, 1), dtype=np.uint8), rng.integers(0, CLASSES, n)
    return ImageSamples(pixels, labels, ["a", "b", "c"], mean=(0.5,), std=(0.25,))


def plan(samples, epochs=EPOCHS, batch_size=SIZE, seed=0):
    how = TrainConfig(
        epochs=epochs,
        batch_size=batch_size,
        schedule="constant",
        optimizer=OptimizerConfig(lr=LR, momentum=0.0, weight_decay=0.0),
    )
    return Plan(recipe=Recipe(FromZero, how), samples=samples, config=PoolConfig(fraction=SIZE / N, seed=seed))


def by_hand(samples):
    """(n,) memorization over all subsets of the size, each fitted by gradient descent written out in NumPy."""
    x = np.concatenate([(samples.images.numpy().reshape(N, -1) / 255 - 0.5) / 0.25, np.ones((N, 1))], axis=1)
    y = np.eye(CLASSES)[samples.labels]
    hits, counts = np.zeros((2, N)), np.zeros((2, N))
    for subset in map(list, itertools.combinations(range(N), SIZE)):
        w = np.zeros((x.shape[1], CLASSES))
        for _ in range(EPOCHS):
            p = np.exp(x[subset] @ w)
            w -= LR * x[subset].T @ (p / p.sum(1, keepdims=True) - y[subset]) / SIZE
        right = (x @ w).argmax(1) == samples.labels
        inside = np.isin(np.arange(N), subset).astype(int)
        hits[inside, np.arange(N)] += right
        counts[inside, np.arange(N)] += 1
    return hits[1] / counts[1] - hits[0] / counts[0]


def test_trained_networks_converge_to_all_subsets_within_their_standard_error(tmp_path):
    z, errors = [], {30: [], 480: []}
    for trial in range(5):
        samples = images(seed=trial)
        truth = by_hand(samples)
        pool = grow(plan(samples, seed=trial), range(480), tmp_path, Work(stack=160, keep_weights=False))
        for m in errors:
            outputs = pool.outputs().first(m)
            found = memorization(outputs.inside, outputs.train.correct)
            errors[m].append(found.memorization - truth)
        z.append(errors[480][-1] / found.standard_error)
    z = np.concatenate(z)
    assert np.abs(z).max() < 4.5
    moving = z[np.abs(z) > 1e-9]  # the others are right in all networks or in none, and exact
    assert len(moving) > 20
    assert 0.75 < np.sqrt((moving**2).mean()) < 1.3
    # Sixteen times the networks, a quarter of the error.
    few, many = (np.sqrt((np.concatenate(errors[m]) ** 2).mean()) for m in errors)
    assert 2.5 < few / many < 6


class Watched(Progress):
    """Interrupts after so many steps, and keeps what each piece of work began with."""

    def __init__(self, after: int = 10**9) -> None:
        self.left, self.begun = after, []

    def start(self, label: str, total: int, done: int = 0) -> None:
        self.begun.append((label, done))

    def advance(self, n: int = 1, note: str = "") -> None:
        self.left -= n
        if self.left == 0:
            raise KeyboardInterrupt


def run(tmp_path, progress=None, samples=None, **how):
    """An estimate of two epochs of three steps for each network, in stacks of three."""
    asked = MemorizeConfig(**({"models": 14, "settle": 0, "n": 4} | how))
    at = Setting(device=torch.device("cpu"), store=tmp_path, progress=progress or Progress())
    made = plan(images(40, seed=1) if samples is None else samples, epochs=2, batch_size=9)
    return made, estimate(made, asked, tmp_path, Work(stack=3, save_seconds=0), at=at)


def looks(found):
    return [{k: v for k, v in row.items() if k != "minutes"} for row in found.rounds]


@pytest.mark.parametrize("after", [4, 20, 29])  # in the first stack, in the fourth, in the fifth
def test_an_interrupted_estimate_goes_on_in_the_stack_where_it_was_and_shows_the_same_looks(tmp_path, after):
    _, whole = run(tmp_path / "whole")
    assert [row["models"] for row in whole.rounds] == [9, 14]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", Watched(after))
    watched = Watched()
    made, again = run(tmp_path / "killed", watched)
    stacks, within = divmod(after, 6)
    at_work = [entry for entry in watched.begun if entry[0].startswith("network")]
    assert at_work[0] == (f"network {3 * stacks} to {min(3 * stacks + 2, 13)}", within - 1)
    assert all(done == 0 for _, done in at_work[1:])
    assert len(at_work) == 5 - stacks
    assert looks(again) == looks(whole)
    assert np.array_equal(again.outputs.train.margin, whole.outputs.train.margin)
    assert len(pool_of(made, tmp_path / "killed").shards()) == 5


def test_a_gap_in_the_pool_is_filled_by_the_stack_that_left_it(tmp_path):
    made = plan(images(40, seed=1), epochs=2, batch_size=9)
    grow(made, [*range(9), 12, 13], tmp_path, Work(stack=3))
    watched = Watched()
    _, found = run(tmp_path, watched)
    assert [label for label, _ in watched.begun if label.startswith("network")] == ["network 9 to 11"]
    assert [row["models"] for row in found.rounds] == [9, 14]


def test_networks_that_are_there_count_even_where_fewer_are_settled(tmp_path):
    _, first = run(tmp_path, settle=0)
    _, again = run(tmp_path, settle=1e-9, models=40)  # settled from the first look on
    assert again.settled
    assert len(again.outputs) == 14
    assert looks(again) == looks(first)
    _, fresh = run(tmp_path / "fresh", settle=1e-9, models=40)
    assert len(fresh.outputs) == 9


def test_no_more_networks_are_begun_than_there_is_time_for(tmp_path):
    _, found = run(tmp_path, models=200, minutes=1e-6)
    assert len(found.outputs) == 9
    assert not found.settled
