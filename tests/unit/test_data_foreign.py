"""Any map-style Dataset: what its items may look like, and where its random numbers come from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from unsharp.data import Stream, StreamedSamples, TensorSamples, evaluation_batches, from_torch_dataset
from unsharp.errors import UserError


class Listed(Dataset):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


class Noisy(Dataset):
    """Items that draw from all three global generators."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Any:
        return torch.tensor([i + torch.rand(()).item(), random.random(), np.random.rand()]), i % 3  # noqa: NPY002


class Private(Noisy):
    """Items that differ without any global generator."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __getitem__(self, i: int) -> Any:
        return torch.tensor([float(i), self.rng.random()]), i % 3


def read(samples: Any, **epoch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(Stream(samples, np.arange(len(samples)), 5, 3).epoch(0, **epoch))
    return torch.cat([b.inputs for b in batches]), torch.cat([b.indices for b in batches])


def test_a_tensor_dataset_is_moved_to_the_device_once() -> None:
    x, y = torch.randn(20, 3, 4, 4), torch.arange(20) % 4
    samples = from_torch_dataset(TensorDataset(x, y), device="cpu")
    assert isinstance(samples, TensorSamples)
    inputs, indices = read(samples)
    assert torch.equal(inputs, x[indices])
    assert samples.n_classes == 4
    assert samples.input_shape == (3, 4, 4)
    assert samples.fingerprint == from_torch_dataset(TensorDataset(x.clone(), y), device="cpu").fingerprint
    x2 = x.clone()
    x2[19, 2, 3, 3] += 1
    assert samples.fingerprint != from_torch_dataset(TensorDataset(x2, y), device="cpu").fingerprint
    assert samples.fingerprint != from_torch_dataset(TensorDataset(x, y), device="cpu", ids=range(1, 21)).fingerprint


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_random_items_are_a_function_of_seed_epoch_and_sample(workers: int) -> None:
    samples = from_torch_dataset(Noisy(), device="cpu", num_workers=workers)
    assert isinstance(samples, StreamedSamples)
    assert samples.fingerprint is None
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    inputs, indices = read(samples, n_batches=6)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    np.testing.assert_array_equal(before[2], after[2])
    torch.manual_seed(99)
    again, _ = read(samples, n_batches=6)
    assert torch.equal(inputs, again)
    # A later start, and a part of the samples in one batch, see the same items.
    later, _ = read(samples, start=4, n_batches=6)
    assert torch.equal(later, inputs[-len(later) :])
    (part,) = Stream(samples, np.array([2, 7]), 5, 3).epoch(0)
    first = dict(zip(indices[:12].tolist(), inputs[:12]))
    assert all(torch.equal(first[i], x) for i, x in zip(part.indices.tolist(), part.inputs))
    # Cycles differ from each other; evaluations do not.
    second = dict(zip(indices[12:].tolist(), inputs[12:]))
    assert all(not torch.equal(first[i], x) for i, x in second.items())
    e1, e2 = ([b.inputs for b in evaluation_batches(samples, np.arange(12))] for _ in range(2))
    assert torch.equal(e1[0], e2[0])
    sub = samples.subset([7, 2])
    (s,) = Stream(sub, np.arange(2), 5, 3).epoch(0)
    assert torch.equal(s.inputs, part.inputs)


def test_workers_read_the_same_as_this_process() -> None:
    mine, yours = (from_torch_dataset(Noisy(), device="cpu", num_workers=w) for w in (0, 1))
    for _ in range(2):  # the second time with the workers of the first
        assert torch.equal(read(mine)[0], read(yours)[0])


@pytest.mark.slow
def test_workers_stay_though_nobody_reads_beyond_the_last_batch() -> None:
    samples = from_torch_dataset(Noisy(), device="cpu", num_workers=1)
    stream = Stream(samples, np.arange(len(samples)), 2, 0)
    loaders = set()
    for epoch in range(2):
        batches = stream.epoch(epoch)
        for _ in range(stream.n_batches):
            next(batches)
        del batches
        loaders |= {id(loader) for loader in samples._idle}
        assert len(samples._idle) == 1
    assert len(loaders) == 1


def test_items_that_differ_have_no_fingerprint_unless_one_is_given() -> None:
    assert from_torch_dataset(Private(), device="cpu").fingerprint is None
    assert from_torch_dataset(Private(), device="cpu", fingerprint="mine").fingerprint == "mine"


def test_forms_of_items() -> None:
    image_module = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    picture = image_module.fromarray(pixels)
    forms = [
        (pixels, 1),
        [picture, np.int64(1)],
        {"img": pixels, "fine_label": 1},
        {"pixel_values": expected, "labels": torch.tensor(1)},
        (torch.from_numpy(pixels).permute(2, 0, 1), 1),
        (expected.double(), 1),
    ]
    samples = from_torch_dataset(Listed(forms), device="cpu", class_names=["a", "b"])
    (batch,) = evaluation_batches(samples, np.arange(len(forms)))
    assert torch.equal(batch.inputs, expected.expand(len(forms), -1, -1, -1))
    assert batch.labels.tolist() == [1] * len(forms)
    assert samples.class_names == ("a", "b")


X = torch.zeros(2)


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        (Listed([]), "empty"),
        (Listed([(X, 0.5)]), "label of dataset\\[0\\]"),
        (Listed([(X, 0), (X, -1)]), "label of dataset\\[1\\] is -1"),
        (Listed([(X, 0), (torch.zeros(3), 0)]), "one shape"),
        (Listed([(torch.tensor([float("nan")]), 0)]), "not finite"),
        (Listed([X]), "accepted is \\(input, label\\)"),
        (Listed([{"picture": X, "label": 0}]), "keys picture, label"),
        (Listed([("text", 0)]), "accepted is a tensor"),
        (type("Endless", (IterableDataset,), {"__iter__": lambda self: iter(())})(), "map-style"),
        (type("NoLength", (Dataset,), {"__getitem__": lambda self, i: (X, 0)})(), "no length"),
    ],
)
def test_a_wrong_dataset_is_refused(dataset: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        from_torch_dataset(dataset, device="cpu")
    assert "\n" not in str(error.value)
