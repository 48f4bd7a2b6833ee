"""Contracts that every admitted pair of method and rule keeps: strength 0, buffers, masks, resuming, same seed."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from contract import cases
from unsharp import unlearning
from unsharp.data.samples import Samples
from unsharp.engine import Loop, LoopConfig, OptimizerConfig
from unsharp.errors import UserError
from unsharp.methods import METHODS, AppliedMethod, PhasedMethod
from unsharp.sharpness import NO_RULE, RULES, Rule
from unsharp.training import Record, TrainConfig, train

APART = [
    (m, r, steps)
    for m in ("sharp_minmax", "saul", "scrub")
    for r in ("none", "sam")
    for steps in ("separate", "alternate")
]
"""Pairs whose phases have states of their own, or step one after the other on each batch, because the user says so."""
apart = pytest.mark.parametrize(("method", "rule", "phase_steps"), APART)
networks = pytest.mark.parametrize("network", cases.NETWORKS)
bases = pytest.mark.parametrize("base", cases.BASES)


# --- which pairs there are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "rule"), cases.REFUSED)
def test_a_pair_that_is_not_declared_is_refused_when_it_is_configured(method: str, rule: str) -> None:
    with pytest.raises(UserError, match=f"{method} does not take rule {rule}: .+; it takes .+"):
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
        loop = cases.make_loop(cases.network(network), method, rule, cases.images(), cases.BASES[base])
        counted = cases.Counted(loop.model)
        loop.run()
        assert loop.passes == len(counted.sizes) == counted.backwards
        return cases.snapshot(loop), counted.sizes, loop.passes, torch.get_rng_state().tolist()

    plain = result(NO_RULE)
    fields = [f.name for f in dataclasses.fields(RULES[rule])]
    strengths = [name for name in RULES[rule].strengths if name in fields]
    assert strengths or rule == "none" or RULES[rule].strengths == (), (
        f"rule {rule} has none of the fields {RULES[rule].strengths}: declare in `strengths` at whose 0 it is off"
    )
    for strength in strengths:
        for form in cases.variants(rule, **{strength: [0.0]}, sign=["min", "max"], perturb=["region", "all"]):
            if (method, network, base) != ("neggrad", "convolutional", "sgd") and form.turned() != RULES[rule](
                **{strength: 0.0}
            ):
                continue
            assert form.passes == 1
            assert cases.differing(result(form)[0], plain[0]) == []
            assert result(form)[1:] == plain[1:]


@pytest.mark.parametrize(("method", "rule"), [pair for pair in cases.PHASED if pair.values[1] != "none"])
def test_a_rule_of_some_strength_differs_from_none_and_takes_the_passes_that_it_states(method: str, rule: str) -> None:
    def result(rule: Rule) -> dict[str, Any]:
        loop = cases.make_loop(cases.network(), method, rule, cases.images(), epochs=3)
        counted = cases.Counted(loop.model, pieces=rule.pieces)
        expected = sum(
            phase.passes * n
            for epoch in range(3)
            for members, _, n in loop._turns(epoch)
            for phase in (loop.phases[i] for i in members)
        )
        loop.run()
        per_step = sum(phase.passes for phase in loop.phases)
        assert loop.passes == counted.backwards
        # a mean over many steps: the last period of a rule that does more every so many steps may be cut short
        assert abs(loop.passes - expected) <= 2 * per_step
        return cases.snapshot(loop)

    assert "conv.weight" in cases.differing(result(RULES[rule]()), result(NO_RULE))


# --- what a rule declares --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_says_that_it_draws_nothing_does_not_depend_on_torchs_seed(rule: str) -> None:
    def result(seed: int) -> dict[str, Any]:
        loop = cases.make_loop(cases.network("smooth"), "neggrad", RULES[rule](), cases.images())
        torch.manual_seed(seed)
        loop.run()
        return cases.snapshot(loop)

    first = result(1)
    assert cases.differing(first, result(1)) == []
    assert bool(cases.differing(first, result(2))) == RULES[rule].draws


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_takes_its_perturbation_from_another_loss_or_says_that_it_cannot(rule: str) -> None:
    method = cases.method_of("neggrad", sharpness_on="unsigned")
    if not RULES[rule].perturbs_by_another:
        with pytest.raises(UserError, match="takes its perturbation from the loss itself"):
            cases.make_loop(cases.network(), method, RULES[rule](), cases.images())
        return
    form = RULES[rule]()
    loop = cases.make_loop(cases.network(), method, form, cases.images())
    counted = cases.Counted(loop.model, pieces=form.pieces)
    loop.run()
    assert loop.passes == counted.backwards == 2 * 4 * loop.phases[0].passes


# --- 3: masks --------------------------------------------------------------------------------------------------------


@networks
@bases
@pytest.mark.parametrize(("method", "rule"), cases.PHASED)
def test_masked_weights_and_their_state_stand_still(method: str, rule: str, network: str, base: str) -> None:
    every = cases.variants(rule, sign=["min", "max"], lam=[0.4, 1.0, 3.0], perturb=["region", "all"])
    for form in every if (method, network) == ("sharp_minmax", "tied") else cases.opposites(rule):
        model, samples = cases.network(network), cases.images()
        region = cases.random_region(model)
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        loop = cases.make_loop(model, method, form, samples, cases.BASES[base], region=region, clip_norm=5.0)
        loop.run()
        moved = 0
        for n, p in model.named_parameters():
            frozen = ~region[n] if n in region else torch.ones_like(p, dtype=torch.bool)
            assert torch.equal(p[frozen], start[n][frozen]), (n, form)
            moved += int((p != start[n]).sum())
        assert moved > 20
        assert_state_at_rest(loop, [phase.region for phase in loop.phases])


@bases
@pytest.mark.parametrize(("method", "rule"), cases.PHASED)
def test_each_state_stays_within_the_regions_of_its_own_phases(method: str, rule: str, base: str) -> None:
    loop = cases.make_loop(cases.network(), method, RULES[rule](), cases.images(), cases.BASES[base])
    loop.run()
    assert_state_at_rest(loop, [None if phase.leak else phase.region for phase in loop.phases])


def assert_state_at_rest(loop: Loop, regions: Sequence[Mapping[str, Any] | None]) -> None:
    """No optimiser holds anything but 0 outside the regions of its phases."""
    separate = len(loop.optimizers) > 1
    for k, optimizer in enumerate(loop.optimizers):
        mine = [regions[k]] if separate else list(regions)
        for n, p in loop.model.named_parameters():
            if not p.requires_grad or any(region is None for region in mine):
                continue
            moving = torch.stack([region[n] for region in mine if region is not None]).any(0)
            for key, value in optimizer.state.get(p, {}).items():
                assert key == "step" or not value[~moving].any(), (n, key, k)


# --- 4: buffers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("method", "rule"), cases.PHASED)
def test_batchnorm_sees_each_batch_once_in_the_order_of_the_phases_never_two_at_once(
    method: str, rule: str, momentum: float | None
) -> None:
    for form in cases.opposites(rule):
        assert_statistics_are_those_of_each_batch_once(method, form, momentum, "together")


@apart
def test_batchnorm_sees_each_batch_once_where_phases_step_apart(method: str, rule: str, phase_steps: str) -> None:
    assert_statistics_are_those_of_each_batch_once(method, RULES[rule](), 0.1, phase_steps)


def assert_statistics_are_those_of_each_batch_once(
    method: str, form: Rule, momentum: float | None, phase_steps: str
) -> None:
    model, samples = cases.network(), cases.images()
    assert isinstance(model, cases.Convolutional)
    model.norm.momentum = momentum  # type: ignore[assignment]
    loop = cases.make_loop(model, method, form, samples, phase_steps=phase_steps)
    kernels: list[torch.Tensor] = []
    buffers: list[dict[str, torch.Tensor]] = []

    def note(model: Any = model, kernels: Any = kernels, buffers: Any = buffers) -> None:
        kernels.append(model.conv.weight.detach().clone())
        buffers.append({n: b.clone() for n, b in model.norm.named_buffers()})

    cases.before_each_step(loop, note)
    loop.run()

    mean, var, count = np.zeros(4), np.ones(4), 0
    for seen, kernel, batches in zip(
        buffers, kernels, forwarded(loop, samples, alternate=phase_steps == "alternate"), strict=True
    ):
        for inputs in batches:
            x = nn.functional.conv2d(inputs.double(), kernel.double()).transpose(0, 1).flatten(1)
            count += 1
            share = 1 / count if momentum is None else momentum
            mean = (1 - share) * mean + share * x.mean(1).numpy()
            var = (1 - share) * var + share * x.var(1, unbiased=True).numpy()
        assert int(seen["num_batches_tracked"]) == count
        if form.starts_at_weights:
            np.testing.assert_allclose(seen["running_mean"], mean, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(seen["running_var"], var, rtol=1e-4)
    if not cases.ends_elsewhere(form):
        assert all(torch.equal(b, buffers[-1][n]) for n, b in model.norm.named_buffers())


def forwarded(loop: Loop, samples: Samples, *, alternate: bool) -> Iterator[list[torch.Tensor]]:
    """Per step the inputs that BatchNorm sees, one after another: turns, phases, pieces, streams."""
    for epoch in range(loop.config.epochs):
        acting = [phase for phase in loop.phases if phase.until is None or epoch < phase.until]
        for turn in sorted({phase.turn for phase in acting}):
            together = [phase for phase in acting if phase.turn == turn]
            read = {s: cases.streams(samples)[s] for phase in together for s in phase.objective.streams}
            n = read["retain" if "retain" in read else min(read)].n_batches
            for step in zip(*(stream.epoch(epoch, n_batches=n) for stream in read.values()), strict=True):
                inputs = {s: batch.inputs for s, batch in zip(read, step)}
                seen = [
                    [
                        torch.tensor_split(inputs[s], phase.rule.pieces)[k]
                        for k in range(phase.rule.pieces)
                        for s in phase.objective.streams
                    ]
                    for phase in together
                ]
                yield from seen if alternate else [[x for of_phase in seen for x in of_phase]]


@pytest.mark.parametrize(("method", "rule"), cases.PHASED)
def test_buffers_equal_those_of_rule_none_to_the_bit_where_the_weights_are_the_same(method: str, rule: str) -> None:
    def buffers(form: Rule) -> dict[str, Any]:
        def still(named: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for _, p in named], lr=0.0)

        loop = cases.make_loop(cases.network(), method, form, cases.images(), still)
        found: dict[str, Any] = {}
        cases.before_each_step(
            loop, lambda: found.update({n: cases.as_bytes(b.clone()) for n, b in loop.model.named_buffers()})
        )
        loop.run()
        return found

    expected = buffers(NO_RULE)
    assert len(expected) == 3
    for form in cases.opposites(rule):
        if form.starts_at_weights and form.pieces == 1:
            assert cases.differing(buffers(form), expected) == []


# --- 5: resuming -----------------------------------------------------------------------------------------------------


@networks
@bases
@pytest.mark.parametrize(("method", "rule"), cases.PHASED)
def test_a_run_that_is_saved_and_loaded_in_any_turn_goes_on_to_the_same_bits(
    method: str, rule: str, network: str, base: str
) -> None:
    assert_it_goes_on_to_the_same_bits(method, rule, network, base, "together")


@apart
def test_a_run_whose_phases_step_apart_goes_on_to_the_same_bits(method: str, rule: str, phase_steps: str) -> None:
    assert_it_goes_on_to_the_same_bits(method, rule, "convolutional", "sgd", phase_steps)


def assert_it_goes_on_to_the_same_bits(method: str, rule: str, network: str, base: str, phase_steps: str) -> None:
    samples = cases.images()

    def run(state: bytes | None) -> tuple[list[tuple[int, int, Any]], list[bytes], Any, list[int]]:
        model = cases.network(network)
        config: dict[str, Any] = {"schedule": "cosine", "epochs": 3, "phase_steps": phase_steps}
        loop = cases.make_loop(model, method, RULES[rule](), samples, cases.BASES[base], **config)
        if state is not None:
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(1)
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
        end = (cases.snapshot(loop), history, loop.passes, torch.get_rng_state().tolist())
        return seen, states, end, [n * loop._steps_per_batch(members) for members, _, n in loop._turns(1)]

    seen, states, end, turns = run(None)
    places = {(epoch, batch): i for i, (epoch, batch, _) in enumerate(seen)}
    stops = {(1, 0), (1, sum(turns) // 2)}  # at an epoch's start, and beyond the forget stream's first cycle
    for k, n in enumerate(turns):
        stops |= {(1, sum(turns[:k]) + max(1, n // 2))}  # within each turn
    for stop in sorted(stop for stop in stops if stop[1] < sum(turns)):
        later, _, later_end, _ = run(states[places[stop]])
        for (*at, expected), (*at_too, found) in zip(seen[places[stop] + 1 :], later, strict=True):
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
        chosen = cases.method_of(method)
        config = unlearning.configure(chosen, rule=rule, epochs=2, batch_size=cases.BATCH_SIZE, seed=seed, lr=0.05)

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
    drawn = METHODS[method].draws if issubclass(METHODS[method], AppliedMethod) else True  # at least the batches are
    assert ("head.weight" in cases.differing(first, result(2))) == drawn
    assert "head.weight" in cases.differing(first, before)
    assert cases.differing({n: cases.as_bytes(t) for n, t in model.state_dict().items()}, before) == []


# --- the optimiser ----------------------------------------------------------------------------------------------------


def test_the_optimizer_config_of_the_engine_is_the_one_that_the_bases_stand_for() -> None:
    """The bases above are built by hand; the configuration's own way gives the same steps."""

    def result(make: Any, config: OptimizerConfig) -> dict[str, Any]:
        loop = cases.make_loop(cases.network(), "neggrad", RULES["sam"](), cases.images(), make, optimizer=config)
        loop.run()
        return cases.snapshot(loop)

    for name, hand in (
        ("sgd", lambda named: torch.optim.SGD([p for _, p in named], lr=0.05, momentum=0.9, weight_decay=0.1)),
        ("adamw", lambda named: torch.optim.AdamW([p for _, p in named], lr=0.05, weight_decay=0.1)),
    ):
        config = OptimizerConfig(name=name, lr=0.05, weight_decay=0.1)
        assert cases.differing(result(hand, config), result(None, config)) == []
