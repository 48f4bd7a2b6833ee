"""The loop of one turn: learning rates against torch's schedulers, batches and passes against a count, refusals."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from unsharp.data import TensorSamples, from_torch_dataset
from unsharp.data.streams import Stream
from unsharp.engine import Loop, LoopConfig, OptimizerConfig
from unsharp.errors import NonFiniteError, UserError
from unsharp.phases import FORGET, RETAIN, CrossEntropy, Phase
from unsharp.sharpness import RULES, NoRule, Rule, Sharpness

N = 23


def loop(model: nn.Module, forget: int = 0, rule: str = "none", **settings: Any) -> Loop:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(N, 4, generator=generator), torch.arange(N) % 2)
    samples = from_torch_dataset(data, device="cpu")
    indices = {RETAIN: np.arange(forget, N), FORGET: np.arange(forget)}
    config = LoopConfig(**{"epochs": 3, "batch_size": 4, **settings})
    streams = {k: Stream(samples, v, config.batch_size, 0) for k, v in indices.items() if len(v)}
    weights = {RETAIN: 1.0} | ({FORGET: -0.1} if forget else {})
    return Loop(model, [Phase(objective=CrossEntropy(weights), rule=RULES[rule](), name="loss")], streams, config)


def rates(run: Loop) -> list[float]:
    """The learning rate of every step that the optimiser takes."""
    seen: list[float] = []
    step = run.optimizer.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(run.optimizer.param_groups[0]["lr"])
        return step(*args, **kwargs)

    run.optimizer.step = watched  # pyright: ignore[reportAttributeAccessIssue]
    run.run()
    return seen


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "step"])
def test_schedules_are_torchs(schedule: Any) -> None:
    run = loop(nn.Linear(4, 2), schedule=schedule, optimizer=OptimizerConfig(lr=0.2))
    total = 3 * math.ceil(N / 4)
    base = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    made: Any = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(base, factor=1.0),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(base, start_factor=1.0, end_factor=0.0, total_iters=total),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(base, total),
        "step": lambda: torch.optim.lr_scheduler.MultiStepLR(
            base, [math.ceil(0.5 * total), math.ceil(0.75 * total)], gamma=0.1
        ),
    }
    scheduler, expected = made[schedule](), []
    for _ in range(total):
        expected.append(base.param_groups[0]["lr"])
        base.step()
        scheduler.step()
    assert rates(run) == pytest.approx(expected)


def test_warmup_rises_to_the_full_rate() -> None:
    seen = rates(loop(nn.Linear(4, 2), warmup=1 / 3, optimizer=OptimizerConfig(lr=1.0)))
    assert seen[:6] == pytest.approx([(k + 1) / 7 for k in range(6)])
    assert seen[6:] == pytest.approx([1.0] * 12)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_falls_from_the_full_rate_over_what_the_warmup_leaves(schedule: Any) -> None:
    seen = rates(loop(nn.Linear(4, 2), warmup=1 / 3, schedule=schedule, optimizer=OptimizerConfig(lr=1.0)))
    falls = {
        "cosine": [(1 + math.cos(math.pi * k / 12)) / 2 for k in range(12)],
        "linear": [1 - k / 12 for k in range(12)],
    }
    assert seen == pytest.approx([(k + 1) / 7 for k in range(6)] + falls[schedule])


@pytest.mark.parametrize(("rule", "evaluations"), [("none", 1), ("sam", 2)])
def test_passes_are_the_backward_passes(rule: str, evaluations: int) -> None:
    model, count = nn.Linear(4, 2), 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    model.weight.register_hook(counted)
    run = loop(model, forget=5, rule=rule)
    run.run()
    # Five retain batches an epoch; the two forget batches cycle beside them.
    assert run.n_batches == 5
    assert run.passes == count == 3 * 5 * 2 * evaluations


def test_clipping_bounds_the_step() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    one_step = OptimizerConfig(lr=1.0, momentum=0.0, weight_decay=0.0)
    run = loop(model, epochs=1, batch_size=N, clip_norm=1e-3, optimizer=one_step)
    run.run()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state() -> None:
    model = nn.Linear(4, 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model.bias[0] = torch.inf
    broken = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NonFiniteError):
        loop(model).run()
    assert all(torch.equal(model.state_dict()[k], broken[k]) for k in broken)
    assert torch.equal(model.weight, before["weight"])


def test_an_optimizer_without_decay_is_built_where_none_is_asked_for() -> None:
    built = OptimizerConfig(name="rprop", lr=0.01, weight_decay=0.0).build(list(nn.Linear(4, 2).named_parameters()))
    assert isinstance(built, torch.optim.Rprop)
    assert built.param_groups[0]["lr"] == 0.01


def test_what_cannot_be_an_optimizer_is_refused() -> None:
    for settings, message in (
        ({"name": "addamw"}, "did you mean 'adamw'"),
        ({"lr": 0.0}, "above 0"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"name": "adamw", "momentum": 0.9}, "momentum"),
        ({"name": "lbfgs"}, "closure"),
        ({"name": "rprop"}, "weight_decay"),
        ({"options": {"lrr": 1}}, "lrr"),
    ):
        with pytest.raises(UserError, match=message):
            OptimizerConfig(**settings)
    with pytest.raises(UserError, match="momentum"):
        loop(nn.Linear(4, 2), optimizer=OptimizerConfig(momentum=-1.0))


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(UserError, match="trainable"):
        loop(nn.Linear(4, 2).requires_grad_(False))


def test_a_network_with_five_dimensional_weights_is_trained() -> None:
    class Volumes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.volume, self.plane = nn.Conv3d(1, 2, 1), nn.Conv2d(2, 2, (2, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.plane(self.volume(x.view(-1, 1, 1, 2, 2)).squeeze(2)).mean((2, 3))

    run = loop(Volumes(), epochs=1)
    run.run()
    assert run.model.plane.weight.is_contiguous(memory_format=torch.channels_last)  # pyright: ignore


@pytest.mark.parametrize("rule", [NoRule(), Sharpness(rho=0.1), Sharpness(rho=0.1, sign="max"), Sharpness(rho=0)])
def test_passes_are_counted_where_the_perturbation_has_its_own_objective(rule: Rule) -> None:
    calls = 0

    class Counted(CrossEntropy):
        def terms(self, model: nn.Module, batches: Any, at: Any) -> Any:
            nonlocal calls
            calls += 1
            return super().terms(model, batches, at)

    run = loop(nn.Linear(4, 2), epochs=1)
    weights = {RETAIN: 1.0}
    run.phases = [Phase(objective=Counted(weights), perturb_objective=Counted(weights), rule=rule)]
    run.run()
    assert run.passes == calls


@pytest.mark.parametrize("check_every", [1, 4])
def test_a_broken_step_leaves_no_trace_in_the_curve(check_every: int) -> None:
    class Breaks(CrossEntropy):
        calls = 0

        def terms(self, model: nn.Module, batches: Any, at: Any) -> Any:
            type(self).calls += 1
            for name, term in super().terms(model, batches, at):
                yield name, term * float("nan") if type(self).calls == 3 else term

    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    broken, whole = loop(model, check_every=check_every), loop(copy.deepcopy(model))
    broken.phases = [Phase(objective=Breaks({RETAIN: 1.0}))]
    with pytest.raises(NonFiniteError, match="step 3"):
        broken.run()
    for turn, taken, batches in whole._batches():
        if whole.batch == 2:
            break
        whole._step(turn, taken, batches)
        whole.batch += 1
    found, expected = broken.state_dict()["sums"], whole.state_dict()["sums"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_single_sample_under_batch_norm_is_refused_in_words() -> None:
    samples = TensorSamples(torch.randn(9, 4), torch.arange(9) % 2)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    phase = Phase(objective=CrossEntropy({FORGET: -1.0}), name=FORGET)
    loop = Loop(model, [phase], {FORGET: Stream(samples, np.arange(1), 4, 0)}, LoopConfig(epochs=1))
    with pytest.raises(UserError, match="a batch of one sample"):
        loop.run()
