"""Contract 2: SAM and ASAM, in all their forms and under every method, equal a textbook's plain loops in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract import cases, textbook
from unsharp.methods import METHODS, Method
from unsharp.phases import FORGET, RETAIN, Phase
from unsharp.sharpness import RULES, Rule
from unsharp.sharpness.perturbation import PerturbedGradient

TEXTBOOK_METHODS: dict[str, Callable[[Any, Any], list[tuple[dict[str, float], int, Any]]]] = {
    "finetune": lambda m, mask: [({RETAIN: 1.0}, 1, None)],
    "gradient_ascent": lambda m, mask: [({FORGET: -1.0}, 1, None)],
    "neggrad": lambda m, mask: [({RETAIN: m.alpha, FORGET: m.alpha - 1.0}, 1, None)],
    "sharp_minmax": lambda m, mask: [
        ({RETAIN: m.alpha}, 1, {n: ~v for n, v in mask.items()}),
        ({FORGET: m.alpha - 1.0}, -1, mask),
    ],
}
"""Losses, sign of the sharpness and region of each phase, from the methods' papers."""

FORMS: list[Rule] = [
    *cases.variants("none"),
    *cases.variants("sam", rho=[0.3], sign=["min", "max"], lam=[1.0, 0.7, 2.0], perturb=["region", "all"]),
    *cases.variants("sam", rho=[0.3], sign=["max"], max_form=["ascent"], lam=[1.0, 0.7]),
    *cases.variants("asam", rho=[1.0], sign=["min", "max"], lam=[1.0, 0.7, 2.0], perturb=["region", "all"]),
    *cases.variants("asam", rho=[1.0], sign=["max"], max_form=["ascent"], lam=[1.0, 0.7]),
    *cases.variants("asam", rho=[1.0], eta=[0.05], adapt=["all", "weights"]),
]


def compare(
    method: Method,
    rule: Rule,
    network: str,
    base: str,
    *,
    restricted: bool,
    clip_norm: float | None = None,
) -> None:
    """Two epochs (eight steps where there is retain) of the engine, and as many of the textbook."""
    samples = cases.doubles()
    model, expected = (cases.network(network, dtype=torch.float64) for _ in range(2))
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    phases = cases.phases_of(method, rule, model, samples)
    region = cases.random_region(model) if restricted else None
    loop = cases.make_loop(
        model,
        phases if region is None else cases.within(phases, region),
        samples,
        cases.BASES[base],
        clip_norm=clip_norm,
    )
    loop.run()

    fraction = getattr(method, "fraction", None)
    mask = None if fraction is None else textbook.most_salient(expected, samples, cases.FORGOTTEN, fraction)
    train_by_the_book(expected, method, mask, rule, phases, region, base, clip_norm, loop.n_batches)
    moved = 0.0
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, dict(expected.named_parameters())[n], rtol=1e-9, atol=1e-10)
        moved = max(moved, float((p - start[n]).detach().abs().max()))
    assert moved > 1e-3


def train_by_the_book(
    model: nn.Module,
    method: Method,
    mask: dict[str, Tensor] | None,
    rule: Rule,
    phases: list[Phase],
    region: dict[str, Tensor] | None,
    base: str,
    clip_norm: float | None,
    n_batches: int,
) -> None:
    sign = -1 if getattr(rule, "sign", "min") == "max" else 1
    name = METHODS.name_of(type(method))
    parts = TEXTBOOK_METHODS[name](method, mask)
    book = []
    for losses, turn, part in parts:
        within = part if region is None else region if part is None else {n: part[n] & m for n, m in region.items()}
        book.append(textbook.TextbookPhase(losses, RULES.name_of(type(rule)), rule, sign * turn, within))
    used = [s for phase in phases for s in phase.objective.streams]
    streams = {s: cases.streams(cases.doubles())[s] for s in used}
    batches = [
        dict(zip(used, step))
        for epoch in range(2)
        for step in zip(*(streams[s].epoch(epoch, n_batches=n_batches) for s in used))
    ]
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = cases.BASES[base](named)
    names = {p: n for n, p in named}
    hyper = {names[p]: {k: g[k] for k in ("lr", "weight_decay")} for g in optimizer.param_groups for p in g["params"]}
    torch.manual_seed(0)
    textbook.train(model, book, batches, base, hyper, clip_norm)


def test_every_method_that_is_phases_and_every_rule_has_a_textbook_form() -> None:
    assert {case.values[0] for case in cases.PHASED} == set(TEXTBOOK_METHODS), "write the new one's phases here"
    assert set(RULES) == {"none", "sam", "asam"}, "write the new one's gradient in textbook.py, and its forms here"


@pytest.mark.parametrize("network", cases.NETWORKS)
@pytest.mark.parametrize("base", cases.BASES)
@pytest.mark.parametrize(("method", "rule"), cases.PHASED)
def test_every_pair_equals_the_textbook(method: str, rule: str, network: str, base: str) -> None:
    settings = {"alpha": 0.6} if method in ("neggrad", "sharp_minmax") else {}
    compare(METHODS[method](**settings), RULES[rule](), network, base, restricted=False)


@pytest.mark.parametrize("base", cases.BASES)
@pytest.mark.parametrize("method", ["neggrad", "sharp_minmax"])
@pytest.mark.parametrize("rule", FORMS, ids=cases.rule_id)
def test_every_form_of_the_rules_equals_the_textbook_under_masks(rule: Rule, method: str, base: str) -> None:
    compare(METHODS[method](alpha=0.6), rule, "convolutional", base, restricted=True)


@pytest.mark.parametrize("rule", ["none", "sam", "asam"])
def test_clipping_is_that_of_the_whole_final_gradient(rule: str) -> None:
    compare(METHODS["sharp_minmax"](alpha=0.6), RULES[rule](), "tied", "sgd", restricted=True, clip_norm=0.05)


# --- to first order, both forms of maximisation are the penalised gradient -------------------------------------------


@pytest.mark.parametrize("max_form", ["difference", "ascent"])
@pytest.mark.parametrize("name", ["sam", "asam"])
def test_maximisation_is_minus_the_gradient_minus_rho_times_the_gradient_of_its_norm_up_to_rho_squared(
    name: str, max_form: str
) -> None:
    samples = cases.doubles()
    used = cases.streams(samples)[FORGET]
    batch = next(used.epoch(0))
    model = cases.network("smooth", dtype=torch.float64)
    params = list(model.parameters())
    scale = [p.detach().abs() if name == "asam" else torch.ones_like(p) for p in params]

    loss = nn.functional.cross_entropy(model(batch.inputs), batch.labels)
    slope = torch.autograd.grad(loss, params, create_graph=True)
    norm = torch.sqrt(sum(((t * g) ** 2).sum() for t, g in zip(scale, slope)))  # type: ignore[arg-type]
    bend = torch.autograd.grad(norm, params)

    errors = []
    for rho in (0.02, 0.01, 0.005):
        rule: PerturbedGradient = RULES[name](rho=rho, sign="max", max_form=max_form)  # type: ignore[assignment, call-arg]
        (found,) = first_gradients(cases.phases_of("gradient_ascent", rule, model, samples), samples)
        penalised = torch.cat([(-g - rho * b).detach().flatten() for g, b in zip(slope, bend)])
        plain = torch.cat([-g.detach().flatten() for g in slope])
        errors.append(float((found - penalised).norm()))
        assert errors[-1] < 0.2 * float((found - plain).norm())
    assert errors[-1] > 1e-12
    for larger, smaller in itertools.pairwise(errors):
        assert 3.5 < larger / smaller < 4.5


def first_gradients(phases: list[Phase], samples: Any) -> list[Tensor]:
    """The gradient of each phase alone, flattened, that the engine steps with on the first batch."""
    found: list[Tensor] = []
    for phase in phases:
        model = cases.network("smooth", dtype=torch.float64)
        loop = cases.make_loop(model, [phase], samples, epochs=1)
        seen: list[Tensor] = []

        def note(model: nn.Module = model, seen: list[Tensor] = seen) -> None:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            seen.append(torch.cat([g.flatten() for g in grads]))

        cases.at_each_step(loop, note)
        loop.run()
        found.append(seen[0].clone())
    return found


# --- Sharp MinMax ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sam", "asam"])
def test_the_perturbation_does_not_depend_on_alpha(rule: str) -> None:
    """Each phase's gradient is its weight times one that α does not enter, and its second pass is at the same w + ε."""
    samples = cases.doubles()

    def result(alpha: float) -> tuple[list[Tensor], list[Tensor]]:
        model = cases.network("smooth", dtype=torch.float64)
        method = METHODS["sharp_minmax"](alpha=alpha)
        phases = cases.phases_of(method, RULES[rule](), model, samples)
        retain, forget = first_gradients(phases, samples)

        where: list[Tensor] = []
        model.register_forward_pre_hook(
            lambda *_: where.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        )
        cases.make_loop(model, phases, samples, epochs=1).run()
        return [retain / alpha, forget / (1 - alpha)], where[:4]

    some, others = result(0.2), result(0.85)
    for a, b in zip(some[0] + some[1], others[0] + others[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    at = some[1]
    assert torch.equal(at[0], at[2])
    assert not torch.allclose(at[0], at[1])
    assert not torch.allclose(at[2], at[3])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("base", cases.BASES)
@pytest.mark.parametrize(("alpha", "still"), [(1.0, FORGET), (0.0, RETAIN)])
def test_a_phase_of_weight_0_is_not_run_and_its_weights_stay(rule: str, base: str, alpha: float, still: str) -> None:
    model, samples = cases.network(), cases.images()
    method = METHODS["sharp_minmax"](alpha=alpha)
    everything = METHODS["sharp_minmax"](alpha=0.5)
    regions = {p.name: p.region for p in cases.phases_of(everything, RULES[rule](), model, samples)}
    region, trained = regions[still], regions[RETAIN if still == FORGET else FORGET]
    assert region is not None
    assert trained is not None
    start = {n: p.detach().clone() for n, p in model.named_parameters()}

    seen: list[set[int]] = []
    phases = cases.phases_of(method, RULES[rule](), model, samples)
    forwards = cases.count_forwards(model)
    loop = cases.make_loop(model, phases, samples, cases.BASES[base])
    for stream in loop.streams.values():
        seen.append({int(i) for batch in stream.epoch(0) for i in batch.indices})
    loop.run()

    assert seen == [set(cases.RETAINED if still == FORGET else cases.FORGOTTEN)]
    assert len(forwards) == 2 * loop.n_batches * RULES[rule]().passes
    for n, p in model.named_parameters():
        if n in region:
            assert torch.equal(p[region[n]], start[n][region[n]])
            for key, value in loop.optimizer.state.get(p, {}).items():
                assert key == "step" or not value[region[n]].any()
    assert any(
        not torch.equal(p[trained[n]], start[n][trained[n]]) for n, p in model.named_parameters() if n in trained
    )


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_stream_of_weight_0_is_not_forwarded_by_neggrad(alpha: float) -> None:
    model, samples = cases.network(), cases.images()
    forwards = cases.count_forwards(model)
    phases = cases.phases_of(METHODS["neggrad"](alpha=alpha), RULES["none"](), model, samples)
    loop = cases.make_loop(model, phases, samples, epochs=1)
    loop.run()
    assert sum(forwards) == len(cases.FORGOTTEN if alpha == 0 else cases.RETAINED)
