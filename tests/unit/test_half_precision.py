"""Weights in half precision: a perturbation smaller than their grid counts, and leaves no bit behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from unsharp.data.samples import TensorSamples
from unsharp.data.streams import Stream
from unsharp.engine import Loop, LoopConfig, OptimizerConfig
from unsharp.phases import RETAIN, CrossEntropy, Phase
from unsharp.sharpness import RULES
from unsharp.sharpness.point import Point
from unsharp.sharpness.replay import Replay, WholeModel


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def point_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor, seen: list[torch.dtype], frozen: bool = True) -> Point:
    params = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in model.parameters() if not p.requires_grad]

    def evaluate() -> torch.Tensor:
        seen.append(params[0].dtype)
        loss = nn.functional.cross_entropy(model(x.to(params[0].dtype)).float(), y)
        loss.backward()
        return loss

    replay = Replay(torch.device("cpu"), WholeModel(model))
    return Point(params, evaluate, replay, frozen=others if frozen else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("freeze", [False, True])
def test_a_perturbation_below_the_grid_counts_in_full(dtype: torch.dtype, freeze: bool):
    model, x, y = network(dtype), torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    if freeze:
        model[0].weight.requires_grad_(False)  # pyright: ignore
    before, storage = copy.deepcopy(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    seen: list[torch.dtype] = []
    point = point_of(model, x, y, seen)
    point.gradient()
    offset = [1e-4 * torch.randn(p.shape) for p in point.params]
    half = sum(int(((p.detach() + o.to(dtype)) == p.detach()).sum()) for p, o in zip(point.params, offset))
    assert half > 0.3 * sum(p.numel() for p in point.params)  # in its own precision much of it would be lost
    found = point.gradient_at([o.clone() for o in offset])
    wide = copy.deepcopy(model).float()
    with torch.no_grad():
        for p, o in zip((p for p in wide.parameters() if p.requires_grad), offset):
            p += o
    nn.functional.cross_entropy(wide(x), y).backward()
    for g, p in zip(found, (p for p in wide.parameters() if p.requires_grad)):
        assert g is not None
        torch.testing.assert_close(g, p.grad, rtol=1e-5, atol=1e-7)
    assert seen == [dtype, torch.float32]
    assert [p.data_ptr() for p in model.parameters()] == storage
    assert all(torch.equal(w, before[n]) and w.dtype == dtype for n, w in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_weights_come_back_after_an_error_too():
    model = network(torch.bfloat16)
    seen: list[torch.dtype] = []
    before = copy.deepcopy(model.state_dict())
    point = point_of(model, torch.randn(2, 6), torch.tensor([0, 9]), seen)
    with pytest.raises(IndexError):
        point.gradient_at([torch.ones(p.shape) for p in point.params], first=True)
    assert seen == [torch.float32]
    assert all(torch.equal(w, before[n]) and w.dtype == torch.bfloat16 for n, w in model.state_dict().items())


def test_where_the_rest_of_the_model_is_not_known_weights_move_in_their_own_precision():
    seen: list[torch.dtype] = []
    model = network(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    point = point_of(model, torch.randn(2, 6), torch.tensor([0, 1]), seen, frozen=False)
    point.gradient_at([torch.ones(p.shape) for p in point.params], first=True)
    assert seen == [torch.bfloat16]
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "none"])
def test_every_rule_steps_weights_in_half_precision(rule: str):
    how = {"micro_batches": 2} if rule == "msam" else {}
    torch.manual_seed(1)
    data = TensorSamples(torch.randint(0, 10, (8, 6)), torch.arange(8).numpy() % 3)
    after = []
    for chosen in (RULES["none"](), RULES[rule](**how)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.LayerNorm(24), nn.Linear(24, 3)).bfloat16()
        config = LoopConfig(epochs=3, batch_size=4, optimizer=OptimizerConfig(name="adamw", lr=0.01))
        phase = Phase(objective=CrossEntropy({RETAIN: 1.0}), rule=chosen)
        Loop(model, [phase], {RETAIN: Stream(data, torch.arange(8).numpy(), 4, 0)}, config, widen=True).run()
        assert all(p.dtype == torch.bfloat16 and bool(p.isfinite().all()) for p in model.parameters())
        after.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert not torch.equal(*after)
