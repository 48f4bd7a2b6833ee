"""Influence unlearning against dense matrices, a closed form, and networks retrained to the minimum."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unsharp import unlearning
from unsharp.data import TensorSamples
from unsharp.errors import UserError
from unsharp.methods import METHODS
from unsharp.sharpness import RULES
from unsharp.training import Record


def run(
    model: nn.Module, samples: TensorSamples, forget: np.ndarray, retain: np.ndarray | None = None, **settings: Any
) -> tuple[Tensor, Record]:
    """The step that the method takes, flat, and its record."""
    before = flat(model)
    others = np.setdiff1d(np.arange(len(samples)), forget) if retain is None else retain
    config = unlearning.configure("influence", batch_size=16, **settings)
    found, record = unlearning.run(model, samples, forget, others, config)
    assert torch.equal(flat(model), before)
    return flat(found) - before, record


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def gradient(model: nn.Module, samples: TensorSamples, indices: np.ndarray) -> Tensor:
    params = [p for p in model.parameters() if p.requires_grad]
    loss = nn.functional.cross_entropy(model(samples.inputs[indices]), torch.from_numpy(samples.labels[indices]))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])


# --- against dense matrices -------------------------------------------------------------------------------------------


def small() -> tuple[nn.Module, TensorSamples, np.ndarray, np.ndarray]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    samples = TensorSamples(torch.randn(30, 3, dtype=torch.float64), torch.arange(30) % 3)
    forget = np.array([1, 4, 5, 20])
    return model, samples, forget, np.setdiff1d(np.arange(30), forget)


@pytest.mark.parametrize(("strength", "damping"), [(1.0, 1.0), (2.5, 1e-3)])
def test_the_step_is_that_of_the_dense_empirical_fisher_matrix(strength: float, damping: float) -> None:
    model, samples, forget, retain = small()
    model.eval()
    each = torch.stack([gradient(model, samples, np.array([i])) for i in retain])
    fisher = damping * torch.eye(each.shape[1], dtype=torch.float64) + each.T @ each / len(retain)
    change = gradient(model, samples, np.arange(30)) - gradient(model, samples, retain)
    expected = strength * torch.linalg.solve(fisher, change)
    model.train()
    step, record = run(model, samples, forget, strength=strength, damping=damping)
    torch.testing.assert_close(step, expected, rtol=1e-8, atol=1e-10)
    assert record.history[0]["step_norm"] == pytest.approx(float(expected.norm()))
    assert record.passes == 1 + 2 + 2  # forget, retain, and the rows for the matrix, in batches of 16
    assert record.about["data"] == samples.fingerprint
    assert model.training


def test_groups_and_a_draw_of_samples_estimate_the_matrix() -> None:
    model, samples, forget, retain = small()
    model.eval()
    whole, _ = run(model, samples, forget, damping=0.1)
    drawn = [run(model, samples, forget, damping=0.1, fisher_samples=9, seed=seed)[0] for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2])
    assert not torch.allclose(drawn[0], whole)

    step, _ = run(model, samples, forget, damping=0.1, fisher_batch=100)  # one group: all retained samples
    mean = gradient(model, samples, retain)
    fisher = 0.1 * torch.eye(len(mean), dtype=torch.float64) + torch.outer(mean, mean)
    change = gradient(model, samples, np.arange(30)) - mean
    torch.testing.assert_close(step, torch.linalg.solve(fisher, change), rtol=1e-8, atol=1e-10)


def test_a_share_of_the_retained_samples_does_not_change_the_size_of_the_step() -> None:
    """The factor n_F/n is that of all samples, also where a share of them is read."""
    model, samples, forget, _ = small()
    model.eval()
    config = unlearning.configure("influence", damping=1e6, batch_size=16, retain_fraction=0.5)
    found, record = unlearning.run(model, samples, forget, np.setdiff1d(np.arange(30), forget), config)
    from unsharp.data.share import share_of

    read = share_of(samples, np.setdiff1d(np.arange(30), forget), 0.5, 0)
    assert record.about["n_retained"] == len(read) == 13
    expected = 4 / 30 * (gradient(model, samples, forget) - gradient(model, samples, read)) / 1e6
    torch.testing.assert_close(flat(found) - flat(model), expected, rtol=1e-4, atol=1e-14)


# --- a closed form ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_ones", [10, 100, 1000])
def test_the_log_odds_of_groups_move_as_counting_says(n_ones: int) -> None:
    """Samples of two kinds, each with its own logits: log(a/b) for a ones and b zeros, with one fewer log((a−1)/b)."""
    ones, zeros, other = n_ones, 2 * n_ones, 20
    kinds = torch.tensor([0] * (ones + zeros) + [1] * 2 * other)
    labels = torch.tensor([1] * ones + [0] * zeros + [1] * other + [0] * other)
    samples = TensorSamples(torch.nn.functional.one_hot(kinds, 2).double(), labels)
    model = nn.Linear(2, 2, bias=False).double()
    odds = torch.tensor([math.log(ones / zeros), 0.0], dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.stack([-odds / 2, odds / 2]))

    step, _ = run(model, samples, np.array([0]), damping=1e-9, fisher_samples=10**6)
    moved = step.view(2, 2)[1] - step.view(2, 2)[0]
    p = ones / (ones + zeros)
    newton = -(1 - p) / ((ones - 1) * (1 - p) ** 2 + zeros * p**2)  # with residuals in the place of their variance
    assert float(moved[0]) == pytest.approx(newton, rel=1e-4)
    assert float(moved[0]) == pytest.approx(math.log((ones - 1) / ones), rel=3 / n_ones)
    assert abs(float(moved[1])) < 1e-9


# --- against retraining -----------------------------------------------------------------------------------------------


def logistic(n: int) -> tuple[nn.Module, TensorSamples]:
    """A logistic regression at its minimum, on labels drawn from such a one; there the Fisher matrix is the Hessian."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    truth = torch.tensor([[1.0, -0.5, 0.3], [-0.2, 0.8, 0.1], [0.0, 0.0, -0.6]], dtype=torch.float64)
    labels = torch.multinomial(torch.softmax(inputs @ truth.T, 1), 1, generator=generator)[:, 0]
    samples = TensorSamples(inputs, labels)
    return minimum(samples, np.arange(n)), samples


def minimum(samples: TensorSamples, indices: np.ndarray) -> nn.Module:
    """By Newton's method; of the weights that give one and the same answer, those that sum to 0 over the classes."""
    inputs, labels = samples.inputs[indices], torch.from_numpy(samples.labels[indices])

    def loss(weights: Tensor) -> Tensor:
        return nn.functional.cross_entropy(inputs @ weights.view(3, 3).T, labels)

    weights = torch.zeros(9, dtype=torch.float64)
    for _ in range(15):
        hessian = torch.autograd.functional.hessian(loss, weights)
        slope = torch.autograd.functional.jacobian(loss, weights)
        weights = weights - torch.linalg.pinv(hessian, rtol=1e-10) @ slope  # type: ignore[arg-type]
    assert float(torch.autograd.functional.jacobian(loss, weights).norm()) < 1e-12  # type: ignore[union-attr]
    model = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(weights.view(3, 3))
    return model


def test_the_step_goes_where_retraining_goes_for_one_sample_and_for_many() -> None:
    def error(n: int, forget: np.ndarray) -> float:
        model, samples = logistic(n)
        retrained = flat(minimum(samples, np.setdiff1d(np.arange(n), forget))) - flat(model)
        step, _ = run(model, samples, forget, damping=1e-9, fisher_samples=n)
        return float((step - retrained).norm() / retrained.norm())

    one = [np.mean([error(n, np.array([i])) for i in range(3)]) for n in (100, 400, 3000)]
    assert one[0] > one[1] > one[2]
    assert one[2] < 0.07
    assert error(3000, np.arange(30)) < 0.1


def test_it_takes_no_rule_and_no_values_out_of_range() -> None:
    assert [name for name in RULES if METHODS["influence"].admits(name)[0]] == ["none"]
    with pytest.raises(UserError, match="influence"):
        unlearning.configure("influence", rule="sam")
    for name, value in (("strength", 0.0), ("damping", -1.0), ("damping", math.inf), ("fisher_samples", 0)):
        with pytest.raises(UserError, match=name):
            METHODS["influence"](**{name: value})
