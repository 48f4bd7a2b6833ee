"""Networks and losses whose behaviour around their weights is known, for the tests of sharpness and landscapes."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from unsharp.data.samples import TensorSamples


class Quadratic(nn.Module):
    """Every sample x has the loss x·½wᵀAw + bᵀw; there is nothing else in it. The weights are one row or a matrix."""

    def __init__(self, a: np.ndarray, b: np.ndarray, w: np.ndarray, shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(w, dtype=torch.float64).reshape(shape or w.shape))
        self.a, self.b = torch.tensor(a), torch.tensor(b)

    def forward(self, inputs: Tensor) -> Tensor:
        w = self.weight.flatten()
        return inputs * (0.5 * w @ self.a @ w) + self.b @ w


def first_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of `Quadratic`."""
    return logits[:, 0]


def ones(n: int = 7) -> TensorSamples:
    """Samples for `Quadratic` whose mean is 1, and no one of them is."""
    x = np.linspace(0.5, 1.5, n)
    return TensorSamples(torch.tensor(x)[:, None], np.zeros(n, int))


def symmetric(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """A random symmetric matrix, its eigenvalues moved by `shift`."""
    m = np.random.default_rng(seed).normal(size=(n, n))
    return (m + m.T) / 2 + shift * np.eye(n)


def images(n: int = 23, classes: int = 3, *, dtype: torch.dtype = torch.float64, side: int = 6) -> TensorSamples:
    """Random inputs of one channel with random labels."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(n, 1, side, side, generator=draw, dtype=torch.float64)
    return TensorSamples(
        x.to(dtype), np.random.default_rng(3).integers(0, classes, n), [str(c) for c in range(classes)]
    )


class WithAll(nn.Module):
    """BatchNorm with statistics of its own, dropout, biases, a frozen and an unused parameter, tied weights."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.one = nn.Linear(3, 3)
        self.two = nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.head = nn.Linear(3, classes)
        self.head.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.conv(x))).amax((2, 3))
        return self.head(self.drop(torch.tanh(self.two(torch.tanh(self.one(h))))))


def with_all(seed: int = 0, dtype: torch.dtype = torch.float64) -> WithAll:
    """A `WithAll` in training mode, whose statistics are not those of the start."""
    torch.manual_seed(seed)
    model = WithAll().to(dtype)
    model.norm.running_mean = 0.3 * torch.randn(3, dtype=dtype)
    model.norm.running_var = 0.5 + torch.rand(3, dtype=dtype)
    return model


def mlp(seed: int = 0, hidden: int = 5, *, bias: bool = False, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """One hidden layer of rectified units on `images`."""
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(36, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, 3, bias=bias)]
    return nn.Sequential(*layers).to(dtype)


def rescaled(model: nn.Sequential, factor: float) -> nn.Sequential:
    """The same function as a `mlp` without biases: its first layer times the factor, its second divided by it."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].weight.mul_(factor)
        other[3].weight.div_(factor)
    return other


def permuted(model: nn.Sequential, seed: int = 1) -> nn.Sequential:
    """The same function as a `mlp`: its hidden units in another order."""
    other, order = copy.deepcopy(model), torch.from_numpy(np.random.default_rng(seed).permutation(len(model[1].weight)))
    with torch.no_grad():
        other[1].weight.copy_(model[1].weight[order])
        other[3].weight.copy_(model[3].weight[:, order])
        if model[1].bias is not None:
            other[1].bias.copy_(model[1].bias[order])
    return other


def state_of(model: nn.Module) -> tuple:
    """All that a measurement must leave alone, as bytes: weights, buffers, gradients, modes, torch's random state."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(name, t.detach().numpy().tobytes()) for name, t in tensors],
        [None if p.grad is None else p.grad.numpy().tobytes() for p in model.parameters()],
        [m.training for m in model.modules()],
        [getattr(m, "momentum", None) for m in model.modules()],
        torch.get_rng_state().numpy().tobytes(),
    )
