"""L1-sparse against a hand-written loop, and what its penalty counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from unsharp import unlearning
from unsharp.data import TensorSamples
from unsharp.engine import OptimizerConfig
from unsharp.errors import UserError
from unsharp.methods import METHODS
from unsharp.methods.l1_sparse import SparseCrossEntropy, l1_norm
from unsharp.phases import Moment

N, D, K = 30, 6, 4
FORGET, RETAIN = np.arange(5), np.arange(5, N)
PLAIN = OptimizerConfig(lr=0.3, momentum=0.0, weight_decay=0.0)


def data() -> TensorSamples:
    torch.manual_seed(1)
    return TensorSamples(torch.randn(N, D, dtype=torch.float64), torch.arange(N) % K)


def linear() -> nn.Linear:
    torch.manual_seed(2)
    model = nn.Linear(D, K).double()
    with torch.no_grad():
        model.weight[0, 0] = 0.0
    return model


def unlearn(model: nn.Module, name: str, **settings: Any) -> Any:
    config = unlearning.configure(name, **{"batch_size": N, "epochs": 4, "optimizer": PLAIN, **settings})
    return unlearning.run(model, data(), FORGET, RETAIN, config)[0]


@pytest.mark.parametrize("free", [0, 2])
def test_steps_are_those_of_softmax_regression_with_the_sign_of_the_weights(free: int) -> None:
    samples, model = data(), linear()
    x, y = samples.inputs[5:].numpy(), samples.labels[5:]
    w, b = model.weight.detach().numpy().copy(), model.bias.detach().numpy().copy()
    for epoch in range(4):
        gamma = {0: [0.2, 0.15, 0.1, 0.05], 2: [0.2, 0.1, 0.0, 0.0]}[free][epoch]
        z = x @ w.T + b
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        p[np.arange(len(y)), y] -= 1
        w, b = (
            w - 0.3 * (p.T @ x / len(y) + gamma * np.sign(w)),
            b - 0.3 * (p.mean(0) + gamma * np.sign(b)),
        )
    found = unlearn(model, "l1_sparse", l1_gamma=0.2, l1_free_epochs=free)
    np.testing.assert_allclose(found.weight.detach(), w, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.bias.detach(), b, rtol=1e-10, atol=1e-12)


def test_without_a_penalty_it_is_finetune() -> None:
    a, b = unlearn(linear(), "l1_sparse", l1_gamma=0.0), unlearn(linear(), "finetune")
    assert torch.equal(a.weight, b.weight)
    assert not torch.equal(a.weight, unlearn(linear(), "l1_sparse").weight)


def test_a_weight_counts_once_if_it_is_shared_and_not_if_it_is_frozen() -> None:
    shared, other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    other.weight = shared.weight
    frozen = nn.Linear(3, 3).requires_grad_(False)
    network = nn.Sequential(shared, other, frozen, nn.BatchNorm1d(3))
    assert l1_norm(network).item() == pytest.approx(sum(abs(v) for v in shared.weight.flatten().tolist()) + 3)
    l1_norm(network).backward()
    assert torch.equal(shared.weight.grad, shared.weight.sign())


def test_low_precision_weights_are_summed_in_float32() -> None:
    network = nn.Linear(100, 100, bias=False).to(torch.bfloat16)
    total = l1_norm(network)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(network.weight.double().abs().sum().item(), rel=1e-5)


def test_strengths_by_epoch() -> None:
    def strengths(epochs: int, free: int) -> list[float]:
        objective = SparseCrossEntropy(0.8, free)
        return [objective.strength(Moment(epoch=e, epochs=epochs)) for e in range(epochs)]

    assert strengths(1, 0) == [0.8]
    assert strengths(4, 0) == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert strengths(5, 3) == pytest.approx([0.8, 0.4, 0, 0, 0])


def test_settings_that_cannot_be_are_refused() -> None:
    for settings, message in (({"l1_gamma": -1.0}, "l1_gamma"), ({"l1_free_epochs": -1}, "l1_free_epochs")):
        with pytest.raises(UserError, match=message):
            METHODS["l1_sparse"](**settings)
    with pytest.raises(UserError, match="leaves none of 4 epochs"):
        unlearn(linear(), "l1_sparse", l1_free_epochs=4)
