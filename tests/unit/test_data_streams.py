"""Draws and streams: each sample once per cycle, balanced batches, and randomness that belongs to the sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unsharp.data import COLUMNS, ImageSamples, Stream, draws, evaluation_batches
from unsharp.data.augment import AUGMENTATIONS
from unsharp.data.draws import draws_at
from unsharp.errors import UserError

quick = settings(deadline=None, max_examples=20)


def toy(n: int = 60, side: int = 8, channels: int = 3, augment: str = "crop_flip") -> ImageSamples:
    rng = np.random.default_rng(n)
    images = rng.integers(0, 256, (n, side, side, channels), dtype=np.uint8)
    return ImageSamples(images, rng.integers(0, 5, n), tuple("abcde"), augmentation=AUGMENTATIONS[augment])


TOY = toy()


@quick
@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(0, 50), st.integers(1, 80))
def test_draws_are_a_function_of_seed_epoch_cycle_and_row(seed: int, epoch: int, cycle: int, n: int) -> None:
    table = draws(seed, epoch, n, cycle)
    assert table.shape == (n, COLUMNS)
    assert table.min() >= 0
    assert table.max() < 1
    np.testing.assert_array_equal(table, draws(seed, epoch, n + 13, cycle)[:n])
    for other in (draws(seed + 1, epoch, n, cycle), draws(seed, epoch + 1, n, cycle), draws(seed, epoch, n, cycle + 1)):
        assert not np.isin(table, other).any()


@quick
@given(st.lists(st.integers(0, 499), max_size=8), st.integers(0, 5), st.integers(0, 5))
def test_few_rows_are_those_of_the_whole_table(rows: list[int], seed: int, cycle: int) -> None:
    chosen = np.array(rows, dtype=np.int64)
    np.testing.assert_array_equal(draws_at(chosen, seed, 1, 500, cycle), draws(seed, 1, 500, cycle)[chosen])


def test_draws_of_a_large_seed_do_not_meet_those_of_a_small_one() -> None:
    # 2**32 · 5 + 3 consists of the words 3 and 5: as plain entropy it would equal (seed 3, epoch 5, cycle 1).
    assert not np.isin(draws(2**32 * 5 + 3, 1, 4), draws(3, 5, 4, 1)).any()


def test_draws_are_uniform() -> None:
    from scipy.stats import kstest

    table = np.concatenate([draws(0, epoch, 2000) for epoch in range(3)])
    for column in table.T:
        assert kstest(column, "uniform").pvalue > 1e-4
    correlation = np.corrcoef(table.T) - np.eye(COLUMNS)
    assert np.abs(correlation).max() < 0.06


def test_negative_seed_is_refused() -> None:
    with pytest.raises(UserError, match="at least 0"):
        draws(-1, 0, 3)


@quick
@given(st.sets(st.integers(0, 59), min_size=1), st.integers(1, 70), st.integers(0, 5), st.integers(1, 4))
def test_each_sample_comes_once_per_cycle_in_balanced_batches(
    chosen: set[int], size: int, seed: int, cycles: int
) -> None:
    stream = Stream(TOY, np.array(sorted(chosen)), size, seed)
    batches = list(stream.epoch(1, n_batches=cycles * stream.n_batches))
    assert len(batches) == cycles * -(-len(chosen) // size)
    for cycle in range(cycles):
        part = batches[cycle * stream.n_batches : (cycle + 1) * stream.n_batches]
        sizes = [len(b.labels) for b in part]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= size
        assert sorted(torch.cat([b.indices for b in part]).tolist()) == sorted(chosen)
        for b in part:
            assert b.labels.tolist() == TOY.labels[b.indices.numpy()].tolist()


@quick
@given(st.integers(0, 20), st.integers(0, 21))
def test_a_start_skips_batches_and_changes_none(start: int, end: int) -> None:
    stream = Stream(TOY, np.arange(3, 45), 10, seed=4)
    whole = list(stream.epoch(2, n_batches=end))
    rest = list(stream.epoch(2, start=start, n_batches=end))
    assert len(whole) == end
    assert len(rest) == max(0, end - start)
    for a, b in zip(whole[start:], rest):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.indices, b.indices)


def test_each_cycle_and_epoch_has_an_order_and_augmentation_of_its_own() -> None:
    stream = Stream(TOY, np.arange(60), 60, seed=0)
    runs = [*stream.epoch(0, n_batches=2), *stream.epoch(1)]
    sorted_inputs = [b.inputs[b.indices.argsort()] for b in runs]
    for i in range(3):
        for j in range(i):
            assert runs[i].indices.tolist() != runs[j].indices.tolist()
            assert not torch.equal(sorted_inputs[i], sorted_inputs[j])


@quick
@given(st.sets(st.integers(0, 59), min_size=2, max_size=30), st.integers(0, 3))
def test_a_sample_looks_the_same_in_whatever_subset_it_stands(chosen: set[int], seed: int) -> None:
    indices = np.array(sorted(chosen))
    (whole,) = Stream(TOY, np.arange(60), 60, seed).epoch(3)
    (part,) = Stream(TOY, indices, 60, seed).epoch(3)
    (slice_,) = Stream(TOY.subset(indices), np.arange(len(indices)), 60, seed).epoch(3)
    at = {int(i): x for i, x in zip(whole.indices, whole.inputs)}
    assert all(torch.equal(at[int(i)], x) for i, x in zip(part.indices, part.inputs))
    # The order of a part is the order of the whole with the others left out; a slice of its own keeps both.
    assert part.indices.tolist() == [int(i) for i in whole.indices if int(i) in chosen]
    assert indices[slice_.indices.numpy()].tolist() == part.indices.tolist()
    assert torch.equal(slice_.inputs, part.inputs)


def test_ranks_share_each_batch() -> None:
    (one, two), (a1, a2), (b1, b2) = (
        list(Stream(TOY, np.arange(40), 20, 7, rank, world).epoch(0)) for rank, world in ((0, 1), (0, 2), (1, 2))
    )
    for whole, a, b in ((one, a1, b1), (two, a2, b2)):
        assert torch.equal(whole.inputs[0::2], a.inputs)
        assert torch.equal(whole.inputs[1::2], b.inputs)
        assert torch.equal(whole.indices[1::2], b.indices)


def test_evaluation_is_in_order_and_not_augmented() -> None:
    indices = np.array([5, 3, 9, 50, 0])
    batches = list(evaluation_batches(TOY, indices, 2))
    assert [len(b.labels) for b in batches] == [2, 2, 1]
    got = torch.cat([b.inputs for b in batches])
    expected = (TOY.images[torch.from_numpy(indices)].double() / 255 - 0.5) / 0.25
    torch.testing.assert_close(got.double(), expected.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-6)
    assert list(evaluation_batches(TOY, np.array([], dtype=np.int64))) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"indices": np.array([], dtype=np.int64)}, "empty"),
        ({"indices": np.array([1, 1])}, "1 repeats"),
        ({"indices": np.array([60])}, "0..59"),
        ({"indices": np.array([0.5])}, "integers"),
        ({"batch_size": 0}, "batch_size"),
        ({"rank": 2, "world": 2}, "rank"),
        ({"batch_size": 1, "world": 2}, "2 processes"),
    ],
)
def test_a_wrong_stream_is_refused(change: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Stream(**{"samples": TOY, "indices": np.arange(4), "batch_size": 2, "seed": 0, **change})


@quick
@given(st.integers(1, 60), st.integers(1, 25), st.integers(0, 3))
def test_short_batches_are_full_but_for_the_last_as_a_loader_gives_them(n: int, batch_size: int, epoch: int) -> None:
    loader = torch.utils.data.DataLoader(list(range(n)), batch_size=batch_size)  # pyright: ignore[reportArgumentType]
    short = Stream(TOY, np.arange(n), batch_size, 0, last_batch="short")
    balanced = Stream(TOY, np.arange(n), batch_size, 0)
    found = [batch.indices.tolist() for batch in short.epoch(epoch)]
    assert [len(batch) for batch in found] == [len(batch) for batch in loader]
    assert [i for batch in found for i in batch] == [i for b in balanced.epoch(epoch) for i in b.indices.tolist()]
