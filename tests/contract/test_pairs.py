"""Contracts that every admitted pair of method and rule keeps: strength 0, buffers, masks, resuming, same seed."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from contract import cases
from unsharp import unlearning
from unsharp.engine import LoopConfig, OptimizerConfig
from unsharp.errors import UserError
from unsharp.methods import METHODS, AppliedMethod, PhasedMethod
from unsharp.sharpness import NO_RULE, RULES, Rule
from unsharp.training import Record, TrainConfig, train

networks = pytest.mark.parametrize("network", cases.NETWORKS)
bases = pytest.mark.parametrize("base", cases.BASES)


# --- which pairs there are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "rule"), cases.REFUSED)
def test_a_pair_that_is_not_declared_is_refused_when_it_is_configured(method: str, rule: str) -> None:
    with pytest.raises(UserError, match=method):
        unlearning.configure(method, rule=rule)


def test_retraining_is_declared_under_no_rule_but_none() -> None:
    assert {pair.values[1] for pair in cases.ADMITTED if pair.values[0] == "retrain"} == {"none"}
    assert all(len([p for p in cases.PHASED if p.values[1] == rule]) >= 4 for rule in ("none", "sam", "asam"))


@pytest.mark.parametrize(("method", "rule"), cases.ADMITTED)
def test_a_declared_pair_can_be_configured_and_names_its_source(method: str, rule: str) -> None:
    config = unlearning.configure(method, rule=rule)
    assert (type(config.method), type(config.rule)) == (METHODS[method], RULES[rule])
    assert isinstance(config.method, (PhasedMethod, AppliedMethod))
    for part in (config.method, config.rule):
        assert part.source
        assert part.formula
        assert part.__doc__


# --- 1: strength 0 ---------------------------------------------------------------------------------------------------


@networks
@bases
@pytest.mark.parametrize(("method", "rule"), cases.PHASED)
def test_strength_0_equals_rule_none_to_the_bit_in_as_many_passes(
    method: str, rule: str, network: str, base: str
) -> None:
    def result(rule: Rule) -> tuple[Any, ...]:
        model, samples = cases.network(network), cases.images()
        phases = cases.phases_of(method, rule, model, samples)
        forwards = cases.count_forwards(model)
        loop = cases.make_loop(model, phases, samples, cases.BASES[base])
        loop.run()
        assert loop.passes == len(forwards)
        return cases.snapshot(loop), forwards, loop.passes, torch.get_rng_state().tolist()

    plain = result(NO_RULE)
    strengths = [f.name for f in dataclasses.fields(RULES[rule]) if f.name in ("rho", "lam")]
    assert strengths or rule == "none", f"rule {rule} has no strength that could be 0: neither rho nor lam"
    for strength in strengths:
        for form in cases.variants(rule, **{strength: [0.0]}, sign=["min", "max"], perturb=["region", "all"]):
            assert cases.differing(result(form)[0], plain[0]) == []
            assert result(form)[1:] == plain[1:]


@pytest.mark.parametrize(("method", "rule"), [pair for pair in cases.PHASED if pair.values[1] != "none"])
def test_a_rule_of_some_strength_differs_from_none_and_counts_its_passes(method: str, rule: str) -> None:
    def result(rule: Rule) -> dict[str, Any]:
        model, samples = cases.network(), cases.images()
        phases = cases.phases_of(method, rule, model, samples)
        forwards = cases.count_forwards(model)
        loop = cases.make_loop(model, phases, samples)
        loop.run()
        assert loop.passes == len(forwards)
        return cases.snapshot(loop)

    assert "conv.weight" in cases.differing(result(RULES[rule]()), result(NO_RULE))


# --- 3: masks --------------------------------------------------------------------------------------------------------


@networks
@bases
@pytest.mark.parametrize(("method", "rule"), cases.PHASED)
def test_masked_weights_and_their_state_stand_still(method: str, rule: str, network: str, base: str) -> None:
    for form in cases.variants(rule, sign=["min", "max"], lam=[0.4, 1.0, 3.0], perturb=["region", "all"]):
        model, samples = cases.network(network), cases.images()
        region = cases.random_region(model)
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        phases = cases.within(cases.phases_of(method, form, model, samples), region)
        loop = cases.make_loop(model, phases, samples, cases.BASES[base], clip_norm=5.0)
        loop.run()
        frozen = {n: ~region[n] if n in region else torch.ones_like(p, dtype=torch.bool) for n, p in start.items()}
        moved = 0
        for n, p in model.named_parameters():
            assert torch.equal(p[frozen[n]], start[n][frozen[n]]), (n, form)
            moved += int((p != start[n]).sum())
            for key, value in loop.optimizer.state.get(p, {}).items():
                if key != "step":
                    assert not value[frozen[n]].any(), (n, key, form)
        assert moved > 20


# --- 4: buffers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("method", "rule"), cases.PHASED)
def test_batchnorm_sees_each_batch_once_retain_first_never_both_at_once(
    method: str, rule: str, momentum: float | None
) -> None:
    forms = cases.variants(rule, sign=["min", "max"], lam=[0.5, 1.0])
    for form in forms:
        model, samples = cases.network(), cases.images()
        assert isinstance(model, cases.Convolutional)
        model.norm.momentum = momentum  # type: ignore[assignment]
        phases = cases.phases_of(method, form, model, samples)
        loop = cases.make_loop(model, phases, samples)
        kernels: list[torch.Tensor] = []
        cases.at_each_step(loop, lambda seen=kernels, m=model: seen.append(m.conv.weight.detach().clone()))
        loop.run()

        order = [s for phase in phases for s in phase.objective.streams]
        assert order == sorted(order, key=["retain", "forget"].index)
        mean, var, count = np.zeros(4), np.ones(4), 0
        steps = iter(kernels)
        for epoch in range(2):
            epochs = [cases.streams(samples)[s].epoch(epoch, n_batches=loop.n_batches) for s in order]
            for batches in zip(*epochs):
                kernel = next(steps)
                for batch in batches:
                    x = nn.functional.conv2d(batch.inputs.double(), kernel.double()).transpose(0, 1).flatten(1)
                    count += 1
                    share = 1 / count if momentum is None else momentum
                    mean = (1 - share) * mean + share * x.mean(1).numpy()
                    var = (1 - share) * var + share * x.var(1, unbiased=True).numpy()
        assert next(steps, None) is None
        np.testing.assert_allclose(model.norm.running_mean, mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(model.norm.running_var, var, rtol=1e-4)
        assert int(model.norm.num_batches_tracked) == count == loop.epoch * loop.n_batches * len(order)


@pytest.mark.parametrize(("method", "rule"), cases.PHASED)
def test_buffers_equal_those_of_rule_none_to_the_bit_where_the_weights_are_the_same(method: str, rule: str) -> None:
    def buffers(form: Rule) -> dict[str, Any]:
        model, samples = cases.network(), cases.images()
        phases = cases.phases_of(method, form, model, samples)
        cases.make_loop(model, phases, samples, lambda named: torch.optim.SGD([p for _, p in named], lr=0.0)).run()
        return {name: cases.as_bytes(buffer) for name, buffer in model.named_buffers()}

    expected = buffers(NO_RULE)
    assert len(expected) == 3
    for form in cases.variants(rule, sign=["min", "max"], lam=[0.5, 1.0], perturb=["region", "all"]):
        assert cases.differing(buffers(form), expected) == []


# --- 5: resuming -----------------------------------------------------------------------------------------------------


@networks
@bases
@pytest.mark.parametrize(("method", "rule"), cases.PHASED)
def test_a_run_that_is_saved_and_loaded_goes_on_to_the_same_bits(
    method: str, rule: str, network: str, base: str
) -> None:
    samples = cases.images()
    phases = cases.phases_of(method, RULES[rule](), cases.network(network), samples)
    config = {"schedule": "cosine", "epochs": 3}

    def run(state: bytes | None) -> tuple[list[tuple[int, int, Any]], list[bytes], Any]:
        loop = cases.make_loop(
            cases.network(network, seed=0 if state is None else 99), phases, samples, cases.BASES[base], **config
        )
        if state is not None:
            torch.manual_seed(12345)
            loop.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
        seen, states = [], []

        def save(at: Any) -> None:
            file = io.BytesIO()
            torch.save(at.state_dict(), file)
            seen.append((at.epoch, at.batch, cases.snapshot(at)))
            states.append(file.getvalue())

        loop.run(save=save, save_seconds=0)
        history = [{k: v for k, v in row.items() if k != "seconds"} for row in loop.history]
        return seen, states, (history, loop.passes, torch.get_rng_state().tolist())

    seen, states, end = run(None)
    middles = [i for i, (epoch, batch, _) in enumerate(seen) if epoch == 1]
    assert any(seen[i][1] > 0 for i in middles)
    for stopped in (middles[0], middles[len(middles) // 2]):  # within the forget stream's first and second cycle
        later, _, later_end = run(states[stopped])
        for (*at, expected), (*at_too, found) in zip(seen[stopped + 1 :], later, strict=True):
            assert at == at_too
            assert cases.differing(expected, found) == []
        assert later_end == end


# --- 7: seeds --------------------------------------------------------------------------------------------------------


@networks
@pytest.mark.parametrize(("method", "rule"), cases.ADMITTED)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(method: str, rule: str, network: str) -> None:
    samples, model = cases.images(), cases.network(network)
    before = {name: cases.as_bytes(t) for name, t in model.state_dict().items()}

    def result(seed: int) -> dict[str, Any]:
        torch.manual_seed(int(torch.randint(10**6, ()).item()))  # the state in which a run finds torch does not matter
        config = unlearning.configure(method, rule=rule, epochs=2, batch_size=cases.BATCH_SIZE, seed=seed, lr=0.05)

        def retrain() -> tuple[nn.Module, Record]:
            fresh = cases.network(network, seed=5)
            shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(LoopConfig)}
            return fresh, train(fresh, samples, cases.RETAINED, TrainConfig(**shared))

        found, record = unlearning.run(
            model, samples, cases.FORGOTTEN, cases.RETAINED, config, retrain=retrain, make_optimizer=None
        )
        curves = [{k: v for k, v in row.items() if k != "seconds"} for row in record.history]
        assert all(math.isfinite(v) for row in curves for v in row.values())
        return {n: cases.as_bytes(t) for n, t in found.state_dict().items()} | {"curves": curves}

    first = result(1)
    assert cases.differing(first, result(1)) == []
    assert "head.weight" in cases.differing(first, result(2))
    assert "head.weight" in cases.differing(first, before)
    assert cases.differing({n: cases.as_bytes(t) for n, t in model.state_dict().items()}, before) == []


# --- the optimiser ----------------------------------------------------------------------------------------------------


def test_the_optimizer_config_of_the_engine_is_the_one_that_the_bases_stand_for() -> None:
    """The bases above are built by hand; the configuration's own way gives the same steps."""

    def result(make: Any, config: OptimizerConfig) -> dict[str, Any]:
        model, samples = cases.network(), cases.images()
        phases = cases.phases_of("neggrad", RULES["sam"](), model, samples)
        loop = cases.make_loop(model, phases, samples, make, optimizer=config)
        loop.run()
        return cases.snapshot(loop)

    for name, hand in (
        ("sgd", lambda named: torch.optim.SGD([p for _, p in named], lr=0.05, momentum=0.9, weight_decay=0.1)),
        ("adamw", lambda named: torch.optim.AdamW([p for _, p in named], lr=0.05, weight_decay=0.1)),
    ):
        config = OptimizerConfig(name=name, lr=0.05, weight_decay=0.1)
        assert cases.differing(result(hand, config), result(None, config)) == []
