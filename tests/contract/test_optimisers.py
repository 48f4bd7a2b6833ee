"""Contract 3 for every optimiser of torch: whatever it keeps, masked weights stand still, and so does their state."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from contract import cases
from unsharp.errors import UserError
from unsharp.sharpness import RULES, Rule
from unsharp.sharpness.step import NEEDS_CLOSURE, NEEDS_SPARSE, NO_SEPARABLE_STATE, SCALE_FREE, check_base

OPTIMISERS: dict[str, type[torch.optim.Optimizer]] = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}
FURTHER: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.5, "fused": True}],
    "Adam": [{"amsgrad": True}, {"fused": True}, {"capturable": False, "foreach": True}],
    "AdamW": [{"amsgrad": True, "fused": True}],
    "NAdam": [{"decoupled_weight_decay": True}],
    "RMSprop": [{"momentum": 0.9, "centered": True}],
    "Adagrad": [{"fused": True}, {"initial_accumulator_value": 0.1}],
}
CASES = [
    pytest.param(name, options, id="-".join([name, *map(str, options)]))
    for name in OPTIMISERS
    if name not in (*NEEDS_CLOSURE, *NEEDS_SPARSE)
    for options in ({}, *FURTHER.get(name, []))
]
FORMS = [*cases.variants("none"), *cases.variants("asam", lam=[0.4, 1.0, 3.0], sign=["min", "max"], perturb=["all"])]


def build(name: str, options: dict[str, Any], named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """The optimiser with weight decay where it takes one."""
    decay = {"weight_decay": 0.1} if "weight_decay" in inspect.signature(OPTIMISERS[name]).parameters else {}
    return OPTIMISERS[name]([p for _, p in named], **(decay | {"lr": 0.02} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in OPTIMISERS if name not in (*NEEDS_CLOSURE, *NEEDS_SPARSE)])
def test_which_steps_do_not_depend_on_the_size_of_the_gradients(name: str) -> None:
    def walked(size: float) -> torch.Tensor:
        p = nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4))
        takes = inspect.signature(OPTIMISERS[name]).parameters
        optimizer = OPTIMISERS[name]([p], **({"weight_decay": 0.0} if "weight_decay" in takes else {}))  # type: ignore[arg-type]
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            p.grad = size * (3 + torch.randn(3, 4, generator=generator, dtype=torch.float64))
            optimizer.step()
        return p.detach()

    same = torch.allclose(walked(100.0), walked(1000.0), rtol=1e-3, atol=0)
    assert (name in SCALE_FREE) == same


@pytest.mark.parametrize("check_every", [1, 3])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_masked_weights_stand_still_under_every_optimiser_and_after_the_mask_is_dropped(
    name: str, options: dict[str, Any], check_every: int
) -> None:
    for form in FORMS:
        separable = name not in NO_SEPARABLE_STATE
        model = cases.network("tied" if separable else "matrices")
        samples = cases.images()
        region = cases.random_region(model)
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        fresh = build(name, options, [(n, p) for n, p in model.named_parameters() if p.requires_grad])
        initial = {p: {k: v.clone() for k, v in s.items() if torch.is_tensor(v)} for p, s in fresh.state.items()}
        loop = cases.make_loop(
            model,
            "neggrad",
            form,
            samples,
            lambda named: build(name, options, named),
            region=region,
            epochs=1,
            check_every=check_every,
        )
        loop.run()

        optimizer = loop.optimizer
        assert all(torch.equal(p[~region[n]], start[n][~region[n]]) for n, p in trained(model))
        assert sum(int((p != start[n]).sum()) for n, p in trained(model)) > 30
        if not separable:
            continue
        states = {}
        for n, p in trained(model):
            for key, value in elementwise(optimizer, p).items():
                at_rest = value[~region[n]]
                states[n, key] = at_rest.clone()
                first = initial.get(p, {}).get(key)
                resting = 0.02 if key == "step_size" else 0.0
                expected = torch.full_like(at_rest, resting) if first is None else first[~region[n]]
                assert torch.equal(at_rest, expected), (n, key)
        for group in optimizer.param_groups:
            group.update({k: 0.0 for k in ("weight_decay", "lambd") if k in group})
        for _ in range(3):
            for _, p in trained(model):
                # torch's fused SGD does not take a tensor whose momentum starts later than the others'
                p.grad = torch.zeros_like(p) if p in optimizer.state or not options.get("fused") else None
            optimizer.step()
        assert all(torch.equal(p[~region[n]], start[n][~region[n]]) for n, p in trained(model))


@pytest.mark.parametrize("name", [*NEEDS_CLOSURE, *NEEDS_SPARSE])
def test_what_cannot_be_a_base_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=name):
        check_base(OPTIMISERS.get(name) or type(name, (torch.optim.SGD,), {}))


@pytest.mark.parametrize("rule", ["none", "sam", "asam"])
@pytest.mark.parametrize("base", cases.BASES)
def test_state_from_before_the_mask_stands_still_too(rule: str, base: str) -> None:
    """A run without a mask, then one with it: what lies outside keeps the weights and the state that it came with."""
    model, samples = cases.network(), cases.images()
    form: Rule = RULES[rule]()
    first = cases.make_loop(model, "neggrad", form, samples, cases.BASES[base], epochs=1)
    first.run()
    region = cases.random_region(model)
    kept = {n: (p.detach().clone(), clone(elementwise(first.optimizer, p))) for n, p in trained(model)}
    cases.make_loop(model, "neggrad", form, samples, lambda _: first.optimizer, region=region, epochs=2).run()
    for n, p in trained(model):
        weights, state = kept[n]
        assert torch.equal(p[~region[n]], weights[~region[n]])
        for key, value in elementwise(first.optimizer, p).items():
            assert torch.equal(value[~region[n]], state[key][~region[n]])
            assert not region[n].any() or not torch.equal(value[region[n]], state[key][region[n]])


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def elementwise(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> dict[str, torch.Tensor]:
    state = optimizer.state.get(p, {})
    return {k: v for k, v in state.items() if torch.is_tensor(v) and v.shape == p.shape}


def clone(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in state.items()}
