"""Weight averaging against torch's own averaged model and its way to renew BatchNorm's statistics."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from contract import cases
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from unsharp.engine import Loop
from unsharp.errors import UserError
from unsharp.phases import RETAIN, CrossEntropy, Phase
from unsharp.sharpness import NoRule, Rule
from unsharp.sharpness.weight_averaging import WeightAveraging

EPOCHS, STEPS = 3, 12


def loop_under(rule: Rule, method: str = "finetune", **settings: Any) -> Loop:
    return cases.make_loop(cases.network(), method, rule, cases.images(), epochs=EPOCHS, **settings)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def after_each_step(loop: Loop, note: Any) -> None:
    take = loop._step

    def step(*args: Any) -> None:
        take(*args)
        note(loop.model)

    loop._step = step  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("start", "interval", "averaged"),
    [
        (0.0, 1, range(12)),
        (0.5, 1, range(6, 12)),
        (0.5, 2, (6, 8, 10)),
        (0.5, 4, (6, 10)),
        (0.75, 5, (9,)),
        (0.7, 2, (8, 10)),
        (0.95, 3, (11,)),
    ],
)
def test_it_ends_as_torchs_averaged_model_does(start: float, interval: int, averaged: Any) -> None:
    plain = loop_under(NoRule())
    mean, n_steps = AveragedModel(plain.model), 0

    def note(model: nn.Module) -> None:
        nonlocal n_steps
        if n_steps in averaged:
            mean.update_parameters(model)
        n_steps += 1

    after_each_step(plain, note)
    plain.run()
    assert n_steps == STEPS
    update_bn((batch.inputs for batch in plain.streams[RETAIN].epoch(EPOCHS)), mean)

    loop = loop_under(WeightAveraging(start=start, interval=interval))
    loop.run()
    for (name, a), b in zip(loop.model.state_dict().items(), mean.module.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    assert loop.passes == plain.passes
    last = any(not torch.allclose(a, b, rtol=1e-4) for a, b in zip(loop.model.parameters(), plain.model.parameters()))
    assert last == (tuple(averaged) != (11,))


def test_averaging_from_the_end_of_the_run_on_is_rule_none_to_the_bit() -> None:
    for method in ("finetune", "sharp_minmax"):
        results = []
        for rule in (NoRule(), WeightAveraging(start=1.0, interval=1)):
            loop = loop_under(rule, method)
            loop.run()
            results.append((cases.snapshot(loop), loop.passes, torch.get_rng_state().tolist()))
        assert cases.differing(results[0][0], results[1][0]) == []
        assert results[0][1:] == results[1][1:]


def test_only_the_region_is_averaged_and_masked_weights_stand_still() -> None:
    start, plain = cases.network(), loop_under(NoRule(), region=(region := cases.random_region(cases.network())))
    seen: list[dict[str, Tensor]] = []
    after_each_step(plain, lambda model: seen.append({n: p.detach().clone() for n, p in model.named_parameters()}))
    plain.run()
    loop = loop_under(WeightAveraging(start=0.5, interval=1), region=region)
    loop.run()
    for n, p in loop.model.named_parameters():
        if n not in region:
            continue
        mean = torch.stack([step[n].double() for step in seen[6:]]).mean(0)
        torch.testing.assert_close(p[region[n]].double(), mean[region[n]], rtol=1e-5, atol=1e-6)
        assert torch.equal(p[~region[n]], dict(start.named_parameters())[n][~region[n]])


def test_each_phase_averages_its_own_part() -> None:
    """Under Sharp MinMax one part of the weights is averaged by each phase; together that is all of them."""
    plain = loop_under(NoRule(), "sharp_minmax")
    seen: list[list[Tensor]] = []
    after_each_step(plain, lambda model: seen.append(weights(model)))
    plain.run()
    loop = loop_under(WeightAveraging(start=0.5, interval=3), "sharp_minmax")
    loop.run()
    for i, p in enumerate(loop.model.parameters()):
        mean = torch.stack([seen[k][i] for k in (6, 9)]).mean(0)
        torch.testing.assert_close(p.detach(), mean, rtol=1e-5, atol=1e-6)


def test_a_run_that_is_resumed_within_the_averaging_ends_the_same() -> None:
    rule, states = WeightAveraging(start=0.4, interval=2), []

    def save(at: Loop) -> None:
        file = io.BytesIO()
        torch.save(at.state_dict(), file)
        states.append(file.getvalue())

    whole = loop_under(rule)
    whole.run(save=save, save_seconds=0)
    for state in states[5::3]:
        loop = loop_under(rule)
        loop.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
        loop.run()
        assert cases.differing(cases.snapshot(whole), cases.snapshot(loop)) == []


def test_the_mean_of_short_weights_is_kept_in_single_precision() -> None:
    rule, memory = WeightAveraging(start=0.0, interval=1), {}
    values = [1.0, 1.0078125, 1.0, 1.0078125, 1.015625]
    for value in values:
        rule.after_step([torch.tensor([value], dtype=torch.bfloat16)], memory, 0.5)
    found = rule.final_weights(memory)
    assert found is not None
    assert found[0].dtype == torch.float32
    assert found[0].item() == pytest.approx(sum(values) / 5, rel=1e-6)


def test_what_is_kept_is_replaced_and_never_changed_in_place() -> None:
    rule, memory = WeightAveraging(start=0.0, interval=1), {}
    w = torch.ones(3)
    rule.after_step([w], memory, 0.5)
    before = copy.copy(memory)
    w += 1
    rule.after_step([w], memory, 0.6)
    assert before["mean"][0].tolist() == [1.0] * 3
    assert memory["mean"][0].tolist() == [1.5] * 3


def test_it_has_no_sign_and_refuses_what_makes_no_sense() -> None:
    rule = WeightAveraging()
    assert rule.turned() is rule
    assert rule.passes == 1
    for bad in ({"start": -0.1}, {"start": 1.1}, {"start": float("nan")}, {"interval": 0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            WeightAveraging(**bad)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="perturbation"):
        Phase(objective=CrossEntropy({RETAIN: 1.0}), perturb_objective=CrossEntropy({RETAIN: 2.0}), rule=rule)
