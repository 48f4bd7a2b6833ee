"""Data that do not fit in memory: at no time do more items live than a batch needs, and all figures are the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import unsharp
from unsharp.data import Samples, foreign, from_torch_dataset
from unsharp.data.corruption import Corruption
from unsharp.data.samples import StreamedSamples
from unsharp.evaluation import curvature, mean_loss, predict, predictions
from unsharp.evaluation.features import predict_with_features, read_features
from unsharp.evaluation.robustness import Corrupted
from unsharp.evaluation.sharpness import WorstCaseSharpness

N, BATCH = 96, 8


class Counted:
    """How many tensors live, and how many did at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def watch(self, tensor: Tensor) -> Tensor:
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(tensor, self._gone)
        return tensor

    def _gone(self) -> None:
        self.now -= 1


class Pictures(Dataset[Any]):
    """Images that are made when they are asked for."""

    def __init__(self, n: int = N, seed: int = 0) -> None:
        self.n, self.seed = n, seed
        self.items = Counted()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        draw = np.random.default_rng([self.seed, i])
        return self.items.watch(torch.from_numpy(draw.random((3, 6, 6), dtype=np.float32))), int(draw.integers(3))


class Network(nn.Module):
    """A small classifier that counts the batches that live."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.batches = Counted()

    def forward(self, x: Tensor) -> Tensor:
        self.batches.watch(x)
        return self.head(self.body(x))


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> tuple[Pictures, Samples]:
    monkeypatch.setattr(foreign, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(mean_loss, "RESIDENT_BYTES", 0)
    dataset = Pictures()
    samples = from_torch_dataset(dataset, device="cpu")
    assert isinstance(samples, StreamedSamples)
    return dataset, samples


def test_reading_a_dataset_for_the_first_time_keeps_no_item(streamed: tuple[Pictures, Samples]) -> None:
    assert streamed[0].items.most <= 5
    assert streamed[0].items.now == 0


ALL = np.arange(N)
LOOKS: dict[str, Callable[[nn.Module, Samples], Any]] = {
    "predict": lambda net, samples: predict(net, samples, ALL, BATCH),
    "features": lambda net, samples: predict_with_features(net, samples, ALL, BATCH),
    "moments": lambda net, samples: read_features(net, samples, ALL, keep=np.arange(4), batch_size=BATCH),
    "corrupted": lambda net, samples: predict(net, Corrupted(samples, Corruption("snow", 2)), ALL, BATCH),
    "sharpness": lambda net, samples: WorstCaseSharpness(steps=2, batch_size=BATCH).measure(net, samples, ALL),
    "curvature": lambda net, samples: curvature.Curvature(
        largest=1, most_steps=3, trace_draws=6, batch_size=BATCH
    ).measure(net, samples, ALL),
}


@pytest.mark.parametrize("look", list(LOOKS))
def test_no_more_items_live_than_a_batch_and_no_more_batches_than_two(
    look: str, streamed: tuple[Pictures, Samples]
) -> None:
    (dataset, samples), net = streamed, Network()
    dataset.items.most = 0
    LOOKS[look](net, samples)
    assert 1 <= dataset.items.most <= BATCH + 1
    assert 1 <= net.batches.most <= 2
    assert dataset.items.now == 0


def test_the_count_sees_what_is_kept(streamed: tuple[Pictures, Samples]) -> None:
    dataset, net = streamed[0], Network()
    kept = [dataset[i][0] for i in range(N)]
    net(torch.stack(kept))
    assert dataset.items.most >= N


def test_streamed_data_give_the_figures_of_data_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    net, forget, settings = Network(), list(range(0, N, 8)), {"attacks": ("threshold_confidence",), "seed": 1}
    expected = unsharp.evaluate(net, Pictures(), forget, test_set=Pictures(40, 1), reference=Network(), **settings)
    monkeypatch.setattr(foreign, "RESIDENT_BYTES", 0)
    found = unsharp.evaluate(net, Pictures(), forget, test_set=Pictures(40, 1), reference=Network(), **settings)
    assert found == expected


@pytest.mark.parametrize("held", [1, 200, 10**9])
def test_when_results_are_brought_to_the_host_does_not_matter(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, net = from_torch_dataset(Pictures(), device="cpu"), Network()
    expected = predict_with_features(net, samples, ALL, N)
    monkeypatch.setattr(predictions, "HELD_BYTES", held)
    found = predict_with_features(net, samples, ALL, BATCH)
    np.testing.assert_array_equal(found.labels, expected.labels)
    for name in ("logits", "features"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-6)
    np.testing.assert_allclose(predict(net, samples, ALL, 5).logits, expected.logits, atol=1e-6)
