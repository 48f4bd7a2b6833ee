"""Losses in double precision, points on them for a rule to stand at, and derivatives by differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from unsharp.sharpness import Point, Rule
from unsharp.sharpness.replay import Replay, WholeModel

Loss = Callable[[Sequence[Tensor]], Tensor]


class Place:
    """A loss L of some tensors, and where a phase stands on it.

    Args:
        loss: L of the tensors.
        params: The tensors.
        masked: Whether a random region is kept to.
    """

    def __init__(self, loss: Loss, params: Sequence[Tensor], *, masked: bool = False, seed: int = 0) -> None:
        self.loss = loss
        self.params = [p.detach().clone().requires_grad_() for p in params]
        generator = torch.Generator().manual_seed(seed)
        self.region = [torch.rand(p.shape, generator=generator) < 0.6 for p in params] if masked else None
        self.visited: list[Tensor] = []
        self.poison: dict[int, Callable[[Sequence[Tensor]], Tensor]] = {}
        """What is added to L, by number of the evaluation."""

    @property
    def w(self) -> Tensor:
        return self.join([p.detach() for p in self.params])

    @property
    def moves(self) -> Tensor:
        """1 where a weight may move, else 0."""
        return self.join([torch.ones_like(p) for p in self.params] if self.region is None else self.region).double()

    def join(self, tensors: Sequence[Tensor | None]) -> Tensor:
        return torch.cat([(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in zip(tensors, self.params)])

    def split(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split([p.numel() for p in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params)]

    def value(self, at: Tensor) -> Tensor:
        return self.loss(self.split(at))

    def gradient(self, at: Tensor) -> Tensor:
        """∇L, with its graph where `at` needs it."""
        at = at if at.requires_grad else at.clone().requires_grad_()
        return torch.autograd.grad(self.value(at), at, create_graph=True)[0]

    def by_differences(self, f: Callable[[Tensor], Tensor], h: float = 1e-5) -> Tensor:
        """The gradient of f at w, by central differences."""
        w, found = self.w, []
        for e in torch.eye(len(w), dtype=w.dtype):
            found.append(float(f(w + h * e) - f(w - h * e)) / (2 * h))
        return torch.tensor(found, dtype=w.dtype)

    def point(self, **about: Any) -> Point:
        def evaluated() -> Tensor:
            value = self.loss(self.params)
            if len(self.visited) in self.poison:
                value = value + self.poison[len(self.visited)](self.params)
            self.visited.append(self.w)
            return value

        def evaluate() -> Tensor:
            for p in self.params:
                p.grad = None
            value = evaluated()
            value.backward()
            return value

        def value() -> tuple[Tensor, Tensor]:
            found = evaluated()
            return found, found.detach()

        replay = Replay(torch.device("cpu"), WholeModel(torch.nn.Module()))
        return Point(self.params, evaluate, replay, **{"region": self.region, "value": value, **about})

    def result(self, rule: Rule, **about: Any) -> Tensor:
        self.visited.clear()
        return self.join(rule.gradient(self.point(**about)))


def network(seed: int, *, masked: bool = False) -> Place:
    """Cross-entropy of a small network on random data; its last tensor does nothing."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 2), (3,), (3, 3), (3,), (2,)]
    params = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    x = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (5,), generator=generator)

    def loss(p: Sequence[Tensor]) -> Tensor:
        return torch.nn.functional.cross_entropy(torch.tanh(x @ p[0].T + p[1]) @ p[2].T + p[3], y)

    return Place(loss, params, masked=masked, seed=seed)


class _Poison(torch.autograd.Function):
    """0, with a gradient of `value` at the first entry."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, value: float) -> Tensor:  # type: ignore[override]
        ctx.shape, ctx.value = weights.shape, value
        return weights.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        found = torch.zeros(ctx.shape, dtype=torch.float64)
        found.view(-1)[0] = ctx.value
        return found, None


def poisons() -> Iterator[Callable[[Sequence[Tensor]], Tensor]]:
    """What breaks an evaluation: a gradient that is not finite, in a tensor that does something or nothing else."""
    for value in (float("nan"), float("inf")):
        for tensor in (0, -1):
            yield lambda params, value=value, tensor=tensor: _Poison.apply(params[tensor], value)  # type: ignore[return-value]
