"""Contract 2: every rule, in all its forms, under every method equals a textbook's plain loops in float64."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from contract import cases
from contract.book import methods as book_methods
from contract.book import rules as book_rules
from contract.book import training as book
from unsharp.data.samples import Batch
from unsharp.methods import METHODS, Method, PhasedMethod
from unsharp.phases import FORGET, RETAIN
from unsharp.sharpness import RULES, Rule
from unsharp.sharpness.perturbation import PerturbedGradient

EPOCHS = 2

FORMS: list[Rule] = [
    *cases.variants("none"),
    *cases.variants("sam", rho=[0.3], sign=["min", "max"], lam=[1.0, 0.7, 2.0], perturb=["region", "all"]),
    *cases.variants("sam", rho=[0.3], sign=["max"], max_form=["ascent"], lam=[1.0, 0.7]),
    *cases.variants("sam", rho=[0.3], sign=["min", "max"], lam=[1.0, 0.7], every=[3]),
    *cases.variants("asam", rho=[1.0], sign=["min", "max"], lam=[1.0, 0.7, 2.0], perturb=["region", "all"]),
    *cases.variants("asam", rho=[1.0], sign=["max"], max_form=["ascent"], lam=[1.0, 0.7]),
    *cases.variants("asam", rho=[1.0], eta=[0.05], adapt=["all", "weights"]),
    *cases.variants("asam", rho=[1.0], every=[3]),
    *cases.variants("looksam", rho=[0.3], sign=["min", "max"], lam=[1.0, 0.7], every=[3], perturb=["region", "all"]),
    *cases.variants("looksam", rho=[0.3], sign=["max"], max_form=["ascent"], lam=[1.0, 0.7], every=[2]),
    *cases.variants("looksam", rho=[0.3], adaptive=[True], reuse=[0.0, 2.0], every=[1, 4]),
    *cases.variants("sam", rho=[0.3], sign=["min", "max"], perturb=["norm"]),
    *cases.variants("asam", rho=[1.0], sign=["min", "max"], perturb=["norm"]),
    *cases.variants("gsam", rho=[0.3], sign=["min", "max"], lam=[1.0, 0.7], gap_weight=[0.0, 0.3], every=[1, 3]),
    *cases.variants("gsam", rho=[0.3], adaptive=[True], perturb=["all", "norm"], max_form=["ascent"], sign=["max"]),
    *cases.variants("msam", rho=[0.3], sign=["min", "max"], lam=[1.0, 0.7], micro_batches=[2, 3], every=[1, 3]),
    *cases.variants("msam", rho=[0.3], adaptive=[True], perturb=["all", "norm"], max_form=["ascent"], sign=["max"]),
    *cases.variants(
        "randomized_smoothing", sigma=[0.05], sign=["min", "max"], antithetic=[False, True], lam=[1.0, 0.7]
    ),
    *cases.variants("randomized_smoothing", sigma=[0.05], n_samples=[1], perturb=["all", "norm"], every=[2]),
    *cases.variants("gradient_penalty", penalty=[0.3], sign=["min", "max"], lam=[1.0, 0.7], perturb=["region", "norm"]),
    *cases.variants("gradient_penalty", penalty=[0.3], perturb=["all"], every=[2]),
    *cases.variants("curvature", penalty=[0.3], sign=["min", "max"], lam=[1.0, 0.7], perturb=["region", "norm"]),
    *cases.variants("curvature", penalty=[0.3], distance=[0.02], perturb=["all"], every=[2]),
    *cases.variants("weight_averaging", start=[0.0, 0.3, 1.0], interval=[1, 3]),
    *cases.variants("s2sam", rho=[0.3], sign=["min", "max"], adaptive=[False, True], perturb=["region", "all"]),
]

METHOD_FORMS: list[Method] = [
    *(cases.method_of("neggrad", sharpness_on=on) for on in ("retain", "separate", "unsigned")),
    *(cases.method_of("sharp_minmax", leak=leak, select=s) for leak in (False, True) for s in ("smallest", "all")),
    cases.method_of("sharp_minmax", leak=True),
    cases.method_of("sharp_minmax", rho_retain=0.05, rho_forget=0.4),
    cases.method_of("saul", forget_level=1.0, multiplier_rate=2.0),
    cases.method_of("saul", forget_level=3.0, multiplier_rate=0.1),
    cases.method_of("l1_sparse", l1_free_epochs=1),
    cases.method_of("random_label", alpha=0.3, other_classes=False),
    cases.method_of("salun", fraction=0.2, select="smallest"),
    cases.method_of("salun", select="all"),
    cases.method_of("boundary_shrink", alpha=0.0, bound=0.5, other_classes=False),
    cases.method_of("scrub", msteps=2, gamma=0.0, beta=0.7, temperature=1.5),
    cases.method_of("scrub", msteps=0),
    cases.method_of("bad_teacher", alpha=0.4, temperature=2.0),
    cases.method_of("sfron", loss_power=0.0, fisher_ratio=0.0),
    cases.method_of("sfron", loss_power=1.5, fisher_ratio=1.3),
]


# --- the textbook ----------------------------------------------------------------------------------------------------


@functools.cache
def feed(epoch: int, streams: tuple[str, ...]) -> list[Mapping[str, Batch]]:
    """The batches of an epoch: retain leads where it is read, and the other stream cycles beside it."""
    read = {s: cases.streams(cases.doubles())[s] for s in streams}
    n = read[RETAIN if RETAIN in read else min(read)].n_batches
    return [dict(zip(read, step)) for step in zip(*(s.epoch(epoch, n_batches=n) for s in read.values()), strict=True)]


def lines_of(method: Method, network: str, region: Mapping[str, Tensor] | None) -> list[book.Line]:
    """The textbook's phases, those of weight 0 left out, each kept to the region beside its own."""
    setting = book_methods.Setting(
        model=cases.network(network, dtype=torch.float64),
        samples=cases.doubles(),
        forget=cases.FORGOTTEN,
        retain=cases.RETAINED,
    )
    lines = book_methods.PHASES[METHODS.name_of(type(method))](method, setting)
    for line in lines:
        if region is not None:
            own = line.region
            line.region = dict(region) if own is None else {n: own[n] & m for n, m in region.items()}
    return lines


def compare(
    method: Method,
    rule: Rule,
    network: str,
    base: str,
    *,
    restricted: bool = False,
    phase_steps: str = "together",
    clip_norm: float | None = None,
) -> None:
    """Two epochs (eight steps where retain leads) of the engine, and as many of the textbook."""
    samples = cases.doubles()
    model, expected = (cases.network(network, dtype=torch.float64) for _ in range(2))
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    region = cases.random_region(model) if restricted else None
    loop = cases.make_loop(
        model,
        method,
        rule,
        samples,
        cases.BASES[base],
        region=region,
        phase_steps=phase_steps,
        epochs=EPOCHS,
        clip_norm=clip_norm,
    )
    loop.run()

    named = [(n, p) for n, p in expected.named_parameters() if p.requires_grad]
    names = {p: n for n, p in named}
    groups = cases.BASES[base](named).param_groups
    assert isinstance(method, PhasedMethod)
    lines = lines_of(method, network, region)
    torch.manual_seed(0)
    book.train(
        expected,
        lines,
        rule,
        RULES.name_of(type(rule)),
        feed,
        base,
        {names[p]: {k: g[k] for k in ("lr", "weight_decay")} for g in groups for p in g["params"]},
        separate=method.separate_states or phase_steps == "separate",
        alternate=phase_steps == "alternate",
        epochs=EPOCHS,
        clip_norm=clip_norm,
    )
    moved = 0.0
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, dict(expected.named_parameters())[n], rtol=1e-9, atol=1e-10)
        moved = max(moved, float((p - start[n]).detach().abs().max()))
    assert moved > 1e-3


def test_every_method_that_is_phases_is_in_the_book() -> None:
    phased = {name for name in METHODS if issubclass(METHODS[name], PhasedMethod)}
    missing, unknown = phased - set(book_methods.PHASES), set(book_methods.PHASES) - phased
    assert not missing, (
        f"write the phases of {sorted(missing)}, from the paper, into PHASES of contract/book/methods.py"
    )
    assert not unknown, f"contract/book/methods.py has {sorted(unknown)}, which no method is called"


def test_every_rule_is_in_the_book_and_in_the_forms() -> None:
    missing, unknown = set(RULES) - set(book_rules.GRADIENTS), set(book_rules.GRADIENTS) - set(RULES)
    assert not missing, (
        f"write the gradient of {sorted(missing)}, from the paper, into GRADIENTS of contract/book/rules.py"
    )
    assert not unknown, f"contract/book/rules.py has {sorted(unknown)}, which no rule is called"
    absent = set(RULES) - {RULES.name_of(type(form)) for form in FORMS}
    assert not absent, f"add the forms of {sorted(absent)}, with values of all its fields, to FORMS in this file"
    for name in RULES:
        ends, looks = (
            getattr(RULES[name], hook) is not getattr(Rule, hook) for hook in ("final_weights", "after_step")
        )
        assert ends == (name in book_rules.FINAL), (
            f"write the final weights of {name} into FINAL of contract/book/rules.py"
        )
        assert looks == (name in book_rules.AFTER), (
            f"write what {name} does after a step into AFTER of contract/book/rules.py"
        )


@pytest.mark.parametrize("network", cases.NETWORKS)
@pytest.mark.parametrize("base", cases.BASES)
@pytest.mark.parametrize(("method", "rule"), cases.PHASED)
def test_every_pair_equals_the_textbook(method: str, rule: str, network: str, base: str) -> None:
    compare(cases.method_of(method), RULES[rule](), network, base)


@pytest.mark.parametrize(("method", "base"), [("neggrad", "sgd"), ("sharp_minmax", "adamw")])
@pytest.mark.parametrize("rule", FORMS, ids=cases.rule_id)
def test_every_form_of_the_rules_equals_the_textbook_under_masks(rule: Rule, method: str, base: str) -> None:
    compare(cases.method_of(method), rule, "convolutional", base, restricted=True)


@pytest.mark.parametrize("base", cases.BASES)
@pytest.mark.parametrize("method", METHOD_FORMS, ids=repr)
def test_every_form_of_the_methods_equals_the_textbook(method: Method, base: str) -> None:
    for rule in (RULES["none"](), *cases.variants("sam", rho=[0.3], lam=[1.0, 0.7]), RULES["asam"](every=2)):
        if not (type(rule) is RULES["none"] and getattr(method, "rho_retain", None) is not None):
            compare(method, rule, "convolutional", base, restricted=type(rule) is RULES["asam"])


@pytest.mark.parametrize("phase_steps", ["separate", "alternate"])
@pytest.mark.parametrize("base", cases.BASES)
@pytest.mark.parametrize(
    "method",
    [
        cases.method_of("sharp_minmax"),
        cases.method_of("sharp_minmax", select="all", leak=True),
        cases.method_of("neggrad", sharpness_on="separate"),
        cases.method_of("neggrad", sharpness_on="unsigned"),
        cases.method_of("saul"),
        cases.method_of("scrub"),
    ],
    ids=repr,
)
def test_phases_that_step_apart_equal_the_textbook(method: Method, base: str, phase_steps: str) -> None:
    for rule in (RULES["sam"](rho=0.3), RULES["asam"](every=2), RULES["weight_averaging"](start=0.2, interval=2)):
        if rule.perturbs_by_another or getattr(method, "sharpness_on", "") != "unsigned":
            restricted = type(rule) is RULES["asam"]
            compare(method, rule, "convolutional", base, restricted=restricted, phase_steps=phase_steps)


@pytest.mark.parametrize("method", ["sharp_minmax", "saul"])
@pytest.mark.parametrize("rule", ["none", "sam", "asam"])
def test_clipping_is_that_of_the_whole_final_gradient_of_each_state(rule: str, method: str) -> None:
    compare(cases.method_of(method), RULES[rule](), "tied", "sgd", restricted=True, clip_norm=0.05)


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
        (found,) = first_gradients("gradient_ascent", rule)
        penalised = torch.cat([(-g - rho * b).detach().flatten() for g, b in zip(slope, bend)])
        plain = torch.cat([-g.detach().flatten() for g in slope])
        errors.append(float((found - penalised).norm()))
        assert errors[-1] < 0.2 * float((found - plain).norm())
    assert errors[-1] > 1e-12
    for larger, smaller in itertools.pairwise(errors):
        assert 3.5 < larger / smaller < 4.5


def first_gradients(method: str | Method, rule: Rule) -> list[Tensor]:
    """The gradient of each phase alone, flattened, that the engine steps with on the first batch."""
    samples, found = cases.doubles(), []
    for i in range(len(cases.phases_of(method, rule, cases.network("smooth", dtype=torch.float64), samples))):
        model = cases.network("smooth", dtype=torch.float64)
        loop = cases.make_loop(model, method, rule, samples, change=lambda phases, i=i: [phases[i]], epochs=1)
        seen: list[Tensor] = []

        def note(model: nn.Module = model, seen: list[Tensor] = seen) -> None:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            seen.append(torch.cat([g.flatten() for g in grads]))

        cases.before_each_update(loop, note)
        loop.run()
        found.append(seen[0].clone())
    return found


# --- Sharp MinMax ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sam", "asam"])
def test_the_perturbation_does_not_depend_on_alpha(rule: str) -> None:
    """Each phase's gradient is its weight times one that α does not enter, and its second pass is at the same w + ε."""

    def result(alpha: float) -> tuple[list[Tensor], list[Tensor]]:
        model = cases.network("smooth", dtype=torch.float64)
        method = METHODS["sharp_minmax"](alpha=alpha)
        retain, forget = first_gradients(method, RULES[rule]())

        where: list[Tensor] = []
        loop = cases.make_loop(model, method, RULES[rule](), cases.doubles(), epochs=1)
        model.register_forward_pre_hook(
            lambda *_: where.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        )
        loop.run()
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

    loop = cases.make_loop(model, method, RULES[rule](), samples, cases.BASES[base])
    counted = cases.Counted(model, pieces=RULES[rule]().pieces)
    read = [{int(i) for batch in stream.epoch(0) for i in batch.indices} for stream in loop.streams.values()]
    loop.run()

    assert read == [set(cases.RETAINED if still == FORGET else cases.FORGOTTEN)]
    assert counted.backwards == loop.passes >= 2 * loop.n_batches
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
    loop = cases.make_loop(cases.network(), METHODS["neggrad"](alpha=alpha), RULES["none"](), cases.images(), epochs=1)
    counted = cases.Counted(loop.model)
    loop.run()
    assert sum(counted.sizes) == len(cases.FORGOTTEN if alpha == 0 else cases.RETAINED)
