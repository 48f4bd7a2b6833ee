"""Moments and kept rows of features against NumPy on the whole array, and the passes of real networks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unsharp.data import TensorSamples
from unsharp.difficulty import from_ids
from unsharp.errors import UserError
from unsharp.evaluation import Predictions, outputs, predict
from unsharp.evaluation.features import (
    FeatureSet,
    Moments,
    outputs_with_features,
    predict_with_features,
    prepared,
    read_features,
    streamed,
)

several = settings(max_examples=40, deadline=None)


def drawn(n: int, dim: int, n_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw.normal(3, 2, (n, dim)).astype(np.float32), draw.integers(0, n_classes, n)


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6), st.lists(st.integers(1, 30)))
@several
def test_moments_of_batches_equal_numpy_on_all(n: int, dim: int, n_classes: int, seed: int, sizes: list[int]) -> None:
    x, labels = drawn(n, dim, n_classes, seed)
    moments = Moments(n_classes, dim)
    cuts = np.unique(np.minimum(np.cumsum([0, *sizes]), n))
    for first, last in zip(cuts, [*cuts[1:], n]):
        if last > first:
            moments.add(x[first:last], labels[first:last])
    x = x.astype(np.float64)
    assert moments.classes.tolist() == np.unique(labels).tolist()
    for label in np.unique(labels):
        mine, found = x[labels == label], moments.of_class(label)
        assert found.n == len(mine)
        assert found.mean == pytest.approx(mine.mean(axis=0), rel=1e-12)
        assert found.variance == pytest.approx(np.trace(np.cov(mine.T, bias=True).reshape(dim, dim)), abs=1e-12)
    total = moments.total()
    assert total.n == n
    assert total.mean == pytest.approx(x.mean(axis=0), rel=1e-12)
    assert total.variance == pytest.approx(x.var(axis=0).sum(), rel=1e-11, abs=1e-12)


def test_a_small_variance_beside_a_large_mean_keeps_its_digits() -> None:
    draw = np.random.default_rng(0)
    x = 1e8 + draw.normal(0, 1, (1000, 3))
    moments = Moments(1, 3)
    for block in np.array_split(x, 13):
        moments.add(block, np.zeros(len(block), dtype=np.int64))
    naive = (x**2).mean(axis=0).sum() - (x.mean(axis=0) ** 2).sum()
    exact = (x - 1e8).var(axis=0).sum()
    assert moments.total().variance == pytest.approx(exact, rel=1e-6)
    assert naive != pytest.approx(exact, rel=1e-2)  # what the update avoids


@pytest.mark.parametrize("normalise", [True, False])
def test_a_streamed_set_equals_the_one_in_memory(normalise: bool) -> None:
    x, labels = drawn(100, 6, 4, 0)
    x[7] = 0
    whole = FeatureSet.of(x, labels, normalise=normalise)
    keep = np.array([99, 3, 41, 7])
    parts = ((x[i : i + 13], labels[i : i + 13]) for i in range(0, 100, 13))
    part = streamed(parts, 9, keep=keep, normalise=normalise)
    assert part.kept.shape == (4, 6)
    assert np.array_equal(part.at(keep), whole.at(keep))
    rows = x.astype(np.float64)[keep]
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    assert whole.at(keep) == pytest.approx(rows / np.where(norms == 0, 1, norms) if normalise else rows)
    for ours, theirs in zip(part.moments.total(), whole.moments.total()):
        assert ours == pytest.approx(theirs, rel=1e-13)
    assert np.array_equal(part.labels, labels)
    assert len(part) == 100
    with pytest.raises(UserError, match=r"features of rows 4, 50 were not kept"):
        part.at(np.array([3, 4, 50]))
    assert streamed([(x, labels)], 4, keep=np.zeros(0)).kept.shape == (0, 6)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = drawn(50, 3, 2, 1)
    whole = FeatureSet.of(x, labels).moments.total()
    monkeypatch.setattr("unsharp.evaluation.features.BLOCK", 7)
    for ours, theirs in zip(FeatureSet.of(x, labels).moments.total(), whole):
        assert ours == pytest.approx(theirs, rel=1e-13)


def test_a_vector_of_zeros_stays() -> None:
    assert prepared(np.array([[3.0, 4.0], [0.0, 0.0]]), True).tolist() == [[0.6, 0.8], [0.0, 0.0]]


def test_bad_features_are_refused() -> None:
    x, labels = drawn(5, 3, 2, 0)
    with pytest.raises(UserError, match="label for each row"):
        FeatureSet.of(x, labels[:4])
    with pytest.raises(UserError, match="at least 0, got -1"):
        FeatureSet.of(x, labels - labels.max() - 1 + labels.max())
    with pytest.raises(UserError, match="NaN or infinite"):
        FeatureSet.of(np.where(x == x[2, 1], np.nan, x), labels)
    with pytest.raises(UserError, match="NaN or infinite"):
        streamed([(np.full((2, 3), np.inf), labels[:2])], 2, keep=None)
    with pytest.raises(UserError, match=r"rows in \[0, 5\), got 2 to 5"):
        streamed([(x, labels)], 2, keep=np.array([5, 2]))
    with pytest.raises(UserError, match="at least one sample"):
        streamed([], 2, keep=None)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def samples() -> TensorSamples:
    draw = np.random.default_rng(0)
    return TensorSamples(torch.from_numpy(draw.normal(2, 3, (40, 4)).astype(np.float32)), np.arange(40) % 3)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)).train()


def by_hand(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    first, norm = model[0], model[1]
    hidden = (x @ first.weight.T + first.bias - norm.running_mean) / torch.sqrt(norm.running_var + norm.eps)
    return torch.relu(hidden * norm.weight + norm.bias).detach().numpy()


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_features_come_with_the_logits_of_predict(model: nn.Module, samples: TensorSamples, batch_size: int) -> None:
    indices = np.array([3, 39, 0, 7, 8, 11, 12, 13])
    found = predict_with_features(model, samples, indices, batch_size)
    alone = predict(model, samples, indices, batch_size)
    assert alone.features is None
    assert np.array_equal(found.logits, alone.logits)
    assert np.array_equal(found.labels, alone.labels)
    assert found.features is not None
    assert found.features.dtype == np.float32
    assert found.features == pytest.approx(by_hand(model, samples.inputs[indices]), rel=1e-5, abs=1e-6)
    assert all(module.training for module in model.modules())
    read = read_features(model, samples, indices, keep=np.array([1, 5]), batch_size=batch_size)
    whole = FeatureSet.of(found.features, found.labels)
    assert np.array_equal(read.at(np.array([5, 1])), whole.at(np.array([5, 1])))
    assert read.moments.total().scatter == pytest.approx(whole.moments.total().scatter, rel=1e-13)


def test_each_sample_passes_through_the_network_once(model: nn.Module, samples: TensorSamples) -> None:
    forget = from_ids([1, 5, 6], samples)
    seen: list[int] = []
    model.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    found = outputs_with_features(model, samples, samples, forget, batch_size=16)
    assert seen[0] == 2  # the layer is found on two samples
    assert sum(seen[1:]) == 80
    for ours, theirs in zip(
        (found.retain, found.forget, found.test), vars(outputs(model, samples, samples, forget)).values()
    ):
        assert ours is not None
        assert ours.features is not None
        assert np.array_equal(ours.labels, theirs.labels)
        assert ours.logits == pytest.approx(theirs.logits, rel=1e-5, abs=1e-6)
    assert outputs_with_features(model, samples, None, forget).test is None


def test_networks_without_work_or_features_are_refused(model: nn.Module, samples: TensorSamples) -> None:
    with pytest.raises(UserError, match="empty"):
        predict_with_features(model, samples, np.arange(0))
    with pytest.raises(UserError, match="cannot be found"):
        predict_with_features(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), samples, np.arange(5))
    with pytest.raises(UserError, match="unknown precision"):
        read_features(model, samples, np.arange(5), precision="float23")


# --- stored with the logits -------------------------------------------------------------------------------------------


def test_features_are_stored_with_the_logits(tmp_path) -> None:
    x, labels = drawn(9, 6, 3, 0)
    whole = Predictions(x[:, :3], labels, x)
    whole.save(tmp_path / "with.safetensors")
    Predictions(x[:, :3], labels).save(tmp_path / "without.safetensors")
    again = Predictions.load(tmp_path / "with.safetensors")
    assert again.features is not None
    assert np.array_equal(again.features, x)
    assert np.array_equal(again.logits, x[:, :3])
    assert Predictions.load(tmp_path / "without.safetensors").features is None


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (np.zeros((4, 2)), "n = 3 samples, D ≥ 1"),
        (np.zeros((3, 0)), "got shape (3, 0)"),
        (np.zeros(3), "got shape (3,)"),
        ([[0, 1], [0, np.inf], [np.nan, 1]], "2 of 3 samples are NaN or infinite (first at row 1)"),
    ],
)
def test_bad_features_beside_logits_are_refused(features: object, words: str) -> None:
    with pytest.raises(UserError) as error:
        Predictions(np.zeros((3, 2)), np.zeros(3, dtype=int), np.asarray(features))
    assert words in str(error.value)
