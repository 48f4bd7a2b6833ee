"""Gradients of samples, importances and products with the inverse Fisher matrix, against loops and dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unsharp import gradients
from unsharp.data import TensorSamples
from unsharp.errors import NonFiniteError, UserError
from unsharp.gradients import SampleGradients, groups_of, importances, inverse_fisher_product, mean_gradient

N = 17


class Everything(nn.Module):
    """Convolution, BatchNorm, dropout, a tied, a frozen and an unused weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.inner = nn.Linear(27, 27, bias=False)
        self.again = nn.Linear(27, 27)
        self.again.weight = self.inner.weight
        self.again.bias.requires_grad_(False)
        self.head = nn.Linear(27, 3)
        self.unused = nn.Parameter(torch.ones(2))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x))).flatten(1)
        return self.head(self.dropout(torch.tanh(self.again(torch.tanh(self.inner(h))))))


class OneByOne(Everything):
    """Looks at its input on the host, which cannot be mapped over samples."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (2.0 if float(x.sum()) > 1e9 else 1.0))


def network(kind: type[Everything] = Everything, dtype: torch.dtype = torch.float64) -> Everything:
    torch.manual_seed(0)
    model = kind().to(dtype)
    assert isinstance(model.norm.running_mean, Tensor)
    model.norm.running_mean += torch.randn(3).to(dtype)
    return model.train()


def samples(dtype: torch.dtype = torch.float64) -> TensorSamples:
    generator = torch.Generator().manual_seed(1)
    return TensorSamples(torch.randn(N, 1, 3, 3, generator=generator).to(dtype), torch.arange(N) % 3)


def by_hand(model: nn.Module, group: np.ndarray) -> Tensor:
    """The gradient of the mean loss of these samples, by a backward pass in evaluation mode."""
    model.eval()
    model.zero_grad()
    data = samples()
    loss = nn.functional.cross_entropy(model(data.inputs[group]), torch.from_numpy(data.labels[group]))
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model.train()
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("kind", [Everything, OneByOne])
@pytest.mark.parametrize("most", [1, 4, 256])
@pytest.mark.parametrize("size", [1, 5])
def test_each_row_is_the_gradient_of_its_group(kind: type[Everything], most: int, size: int) -> None:
    model = network(kind)
    groups = groups_of(np.arange(N), size, 3)
    rows = SampleGradients(model, samples(), groups, most=most)
    expected = torch.stack([by_hand(model, group) for group in groups])
    torch.testing.assert_close(rows.matrix(range(len(groups))), expected, rtol=1e-10, atol=1e-12)
    assert rows._many == (kind is Everything and most > 1 and size == 1)
    diagonal = importances(rows)
    flat = torch.cat([diagonal[n].flatten() for n, p in model.named_parameters() if p.requires_grad])
    torch.testing.assert_close(flat, (expected**2).mean(0), rtol=1e-10, atol=1e-14)


def test_groups_hold_each_sample_once_and_are_of_nearly_equal_size() -> None:
    some = np.array([3, 4, 8, 10, 11, 15, 16])
    assert [g.tolist() for g in groups_of(some, 1, 5)] == [[3], [4], [8], [10], [11], [15], [16]]
    for size in (2, 3, 7, 99):
        groups = groups_of(some, size, 5)
        assert sorted(np.concatenate(groups).tolist()) == some.tolist()
        assert max(map(len, groups)) <= size
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
    assert [g.tolist() for g in groups_of(some, 3, 5)] != [g.tolist() for g in groups_of(some, 3, 6)]


def test_the_mean_gradient_is_that_of_all_samples_whatever_the_batches() -> None:
    model = network()
    for batch_size in (1, 4, 100):
        found = mean_gradient(model, samples(), np.arange(2, N), batch_size=batch_size)
        torch.testing.assert_close(found, by_hand(model, np.arange(2, N)), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("damping", [1.0, 1e-2, 1e-6])
@pytest.mark.parametrize("fitting", [N, 6, 1])
def test_the_product_with_the_inverse_is_that_of_the_dense_matrix_and_of_the_recursion(
    damping: float, fitting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    groups = groups_of(np.arange(N), 1, 0)
    matrix = torch.stack([by_hand(model, group) for group in groups])
    n = matrix.shape[1]
    monkeypatch.setattr(gradients, "BLOCK", fitting * n)
    monkeypatch.setattr(gradients, "COLUMNS", 50)
    vector = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rows = SampleGradients(model, samples(), groups)
    assert len(rows.blocks()) == -(-N // fitting)
    found = inverse_fisher_product(rows, vector, damping)

    dense = damping * torch.eye(n, dtype=torch.float64) + matrix.T @ matrix / N
    torch.testing.assert_close(found, torch.linalg.solve(dense, vector), rtol=1e-6, atol=1e-8)

    inverse = torch.eye(n, dtype=torch.float64) / damping
    for g in matrix:
        along = inverse @ g
        inverse = inverse - torch.outer(along, along) / (N + g @ along)
    torch.testing.assert_close(found, inverse @ vector, rtol=1e-6, atol=1e-6)


def test_rows_that_do_not_fit_are_computed_again_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    rows = SampleGradients(model, samples(), groups_of(np.arange(N), 1, 0))
    vector = torch.ones(rows.length, dtype=torch.float64)
    whole = inverse_fisher_product(rows, vector, 0.1)
    assert rows.taken == N
    monkeypatch.setattr(gradients, "BLOCK", 6 * rows.length)
    again = SampleGradients(model, samples(), groups_of(np.arange(N), 1, 0))
    torch.testing.assert_close(inverse_fisher_product(again, vector, 0.1), whole, rtol=1e-12, atol=1e-14)
    blocks = [6, 6, 5]
    assert again.taken == sum(blocks) + (6 + 5 + 5) + sum(blocks)
    assert gradients.blocks_to_compute(len(blocks)) == 3 + 3 + 3


def test_the_network_is_left_as_it_was() -> None:
    model = network(dtype=torch.float32)
    model.head.eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    rows = SampleGradients(model, samples(torch.float32), groups_of(np.arange(N), 1, 0))
    importances(rows)
    mean_gradient(model, samples(torch.float32), np.arange(N))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training
    assert not model.head.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_broken_weights_and_nothing_to_do_are_refused() -> None:
    model = network()
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    with pytest.raises(NonFiniteError):
        importances(SampleGradients(model, samples(), groups_of(np.arange(3), 1, 0)))
    with pytest.raises(NonFiniteError):
        mean_gradient(model, samples(), np.arange(3))
    with pytest.raises(UserError, match="no sample"):
        SampleGradients(model, samples(), [])
    with pytest.raises(UserError, match="trainable"):
        SampleGradients(model.requires_grad_(False), samples(), groups_of(np.arange(3), 1, 0))
