"""Contract 8: two processes, each on half of every batch, take the steps that one process takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from contract import cases
from contract.workers import TwoProcesses
from unsharp import runtime
from unsharp.data.streams import Stream
from unsharp.engine import Loop, LoopConfig
from unsharp.errors import NonFiniteError
from unsharp.methods import PhasedMethod
from unsharp.sharpness import RULES

POSITIONS = {"retain": np.arange(0, 24), "forget": np.arange(24, 40)}  # batches of 8, so that both shards are equal


@dataclasses.dataclass
class Steps:
    """The gradients of all steps, the weights at the end, and the loss of each stream."""

    gradients: list[dict[str, np.ndarray]]
    weights: dict[str, np.ndarray]
    losses: list[dict[str, float]]
    error: str = ""


def steps(method: str, rule: dict[str, Any], base: str, dtype: str, broken_rank: int | None = None) -> Steps:
    """Two epochs in this process, as its rank in the group or alone."""
    samples = cases.doubles(dtype=getattr(torch, dtype))
    model = cases.network("smooth", dtype=getattr(torch, dtype))
    chosen = cases.method_of(method)
    form = RULES[rule["name"]](**{k: v for k, v in rule.items() if k != "name"})
    phases = cases.phases_of(chosen, form, model, samples, **POSITIONS)
    with torch.no_grad():  # beside where a teacher stands: there a divergence is 0, and rounding gives its direction
        for p in model.parameters():
            p.mul_(1.1)
    rank, world = runtime.world()
    if broken_rank == rank:  # the loss alone, of one process alone: what the gradients do not carry to the other one
        broken = cases.Summed(phases[0].objective, lambda model: float("inf"))
        phases[0] = dataclasses.replace(phases[0], objective=broken)
    streams = {name: Stream(samples, p, cases.BATCH_SIZE, 0, rank, world) for name, p in POSITIONS.items()}
    assert isinstance(chosen, PhasedMethod)
    loop = Loop(
        model,
        phases,
        streams,
        LoopConfig(epochs=2, batch_size=cases.BATCH_SIZE, clip_norm=2.0),
        make_optimizer=cases.BASES[base],
        separate_states=chosen.separate_states,
    )
    runtime.seed_all(0)
    gradients: list[dict[str, np.ndarray]] = []
    cases.before_each_update(
        loop,
        lambda: gradients.append({n: array(p.grad) for n, p in model.named_parameters() if p.grad is not None}),
    )
    error = ""
    try:
        loop.run()
    except NonFiniteError as e:
        error = str(e)
    losses = [{k: v for k, v in row.items() if k != "seconds"} for row in loop.history]
    return Steps(gradients, {n: array(p) for n, p in model.named_parameters()}, losses, error)


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().copy()


@pytest.mark.parametrize("base", cases.BASES)
@pytest.mark.parametrize(("method", "rule"), cases.PHASED)
def test_two_processes_take_the_steps_of_one(two_processes: TwoProcesses, method: str, rule: str, base: str) -> None:
    for settings in ({}, {"sign": "max", "lam": 0.5, "perturb": "all"}):
        fields = {f.name for f in dataclasses.fields(RULES[rule])}
        job = (method, {"name": rule} | {k: v for k, v in settings.items() if k in fields}, base, "float64")
        alone, ranks = steps(*job), two_processes.run(steps, *job)
        assert len(alone.gradients) >= 4
        for rank in ranks:
            assert len(rank.gradients) == len(alone.gradients)
            for found, expected in zip([*rank.gradients, rank.weights], [*alone.gradients, alone.weights]):
                assert found.keys() == expected.keys()
                for name, value in expected.items():
                    np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-10 * np.abs(value).max())
            for row, expected_row in zip(rank.losses, alone.losses, strict=True):
                assert row == pytest.approx(expected_row, rel=1e-9)
        assert all(np.array_equal(ranks[0].weights[n], ranks[1].weights[n]) for n in alone.weights)


@pytest.mark.parametrize("rule", ["none", "sam", "asam"])
def test_the_first_step_agrees_in_single_precision(two_processes: TwoProcesses, rule: str) -> None:
    job = ("sharp_minmax", {"name": rule}, "sgd", "float32")
    alone, ranks = steps(*job), two_processes.run(steps, *job)
    for rank in ranks:
        for name, value in alone.gradients[0].items():
            np.testing.assert_allclose(rank.gradients[0][name], value, rtol=1e-5, atol=1e-5 * np.abs(value).max())


@pytest.mark.parametrize("broken_rank", [0, 1])
@pytest.mark.parametrize("rule", ["none", "sam"])
def test_a_break_in_one_process_stops_both(two_processes: TwoProcesses, rule: str, broken_rank: int) -> None:
    ranks = two_processes.run(steps, "neggrad", {"name": rule}, "sgd", "float64", broken_rank)
    assert all("not finite at step 1;" in rank.error for rank in ranks)
    start = {n: array(1.1 * p) for n, p in cases.network("smooth", dtype=torch.float64).named_parameters()}
    assert all(np.array_equal(rank.weights[n], start[n]) for rank in ranks for n in start)
