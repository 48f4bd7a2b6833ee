"""Relatives of SAM against loops written by hand: GSAM, micro-batches, normalisation layers alone, every k-th step."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from contract import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_points import network, poisons
from torch import Tensor, nn

import unsharp
from unsharp.data.samples import Batch
from unsharp.errors import UserError
from unsharp.phases import RETAIN, CrossEntropy, Phase
from unsharp.sharpness import AdaptiveSharpness, NoRule, Rule, Sharpness
from unsharp.sharpness.gradient_penalty import GradientPenalty
from unsharp.sharpness.gsam import SurrogateGap
from unsharp.sharpness.msam import MicroBatchSharpness
from unsharp.sharpness.normalisation import normalisation_weights
from unsharp.sharpness.randomized_smoothing import RandomizedSmoothing
from unsharp.sharpness.replay import Replay

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
radii = st.floats(1e-3, 0.5)
lams = st.sampled_from([1.0, 0.5, 2.0])
signs = st.sampled_from(["min", "max"])
forms = st.sampled_from(["difference", "ascent"])

Named = dict[str, Tensor]


# --- GSAM ------------------------------------------------------------------------------------------------------------


@quick
@given(
    seeds,
    radii,
    st.floats(0.01, 2),
    lams,
    signs,
    st.booleans(),
    st.booleans(),
    st.sampled_from(["difference", "ascent"]),
)
def test_gsam_takes_off_what_lies_across(
    seed: int, rho: float, gap: float, lam: float, sign: Any, adaptive: bool, masked: bool, form: Any
) -> None:
    place = network(seed, masked=masked)
    rule = SurrogateGap(rho=rho, gap_weight=gap, lam=lam, sign=sign, adaptive=adaptive, max_form=form)
    w, moves = place.w.numpy(), place.moves.numpy()
    g0 = place.gradient(place.w).detach().numpy()
    size = np.abs(w) if adaptive else np.ones_like(w)
    scaled = size * g0 * moves
    epsilon = rho * size * scaled / np.sqrt((scaled**2).sum())
    towards, direction = (-1.0, 1.0) if sign == "max" and form == "ascent" else (1.0, 1.0 if sign == "min" else -1.0)
    g_p = place.gradient(torch.from_numpy(w + towards * epsilon)).detach().numpy()
    g_p, own = g_p * moves, g0 * moves
    along = g_p * (own @ g_p) / (g_p @ g_p)
    across = own - along
    assert abs(across @ g_p) < 1e-9 * np.linalg.norm(own) * np.linalg.norm(g_p)
    flat = g_p - gap * across
    expected = own + direction * lam * (flat - own)
    found = place.result(rule).numpy() * moves
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)
    assert len(place.visited) == rule.passes == 2


def test_gsam_without_a_gap_weight_is_sam_to_the_bit() -> None:
    for lam, sign in ((1.0, "min"), (1.0, "max"), (0.5, "min")):
        place = network(4, masked=True)
        how: dict[str, Any] = {"rho": 0.2, "lam": lam, "sign": sign}
        assert torch.equal(place.result(SurrogateGap(gap_weight=0.0, **how)), place.result(Sharpness(**how)))
        adaptive = SurrogateGap(gap_weight=0.0, adaptive=True, **how)
        assert torch.equal(place.result(adaptive), place.result(AdaptiveSharpness(**how)))


def test_both_forms_of_the_maximum_of_gsam_agree_to_first_order() -> None:
    place, distances = network(7), []
    for rho in (2e-3, 1e-3):
        one = SurrogateGap(rho=rho, gap_weight=0.7, sign="max")
        other = dataclasses.replace(one, max_form="ascent")
        distances.append(float((place.result(one) - place.result(other)).norm()))
    assert distances[0] / distances[1] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(
    ("rule", "passes"),
    [
        (Sharpness(), 2),
        (Sharpness(lam=0.5), 3),
        (Sharpness(sign="max"), 3),
        (Sharpness(sign="max", max_form="ascent"), 2),
        (SurrogateGap(), 3),
        (SurrogateGap(gap_weight=0.0), 2),
        (MicroBatchSharpness(sign="max"), 3),
        (Sharpness(sign="max", every=2), 2),
        (Sharpness(rho=0), 1),
    ],
)
def test_a_perturbation_from_another_objective_costs_what_the_rule_states(rule: Any, passes: float) -> None:
    def beside(phases: list[Phase]) -> list[Phase]:
        other = CrossEntropy({RETAIN: 0.5}, label_smoothing=0.2)
        return [dataclasses.replace(phases[0], perturb_objective=other)]

    loop = cases.make_loop(cases.network("smooth"), "finetune", rule, cases.images(), change=beside)
    loop.run()
    assert rule.passes_beside == passes
    assert loop.passes == 8 * passes


# --- micro-batches ---------------------------------------------------------------------------------------------------


def one_step(model: nn.Module, rule: Rule, method: str = "finetune", **config: Any) -> tuple[list[Any], Any]:
    """Gradients per optimiser with which the engine takes its first step, by name, and the loop."""
    loop = cases.make_loop(model, method, rule, cases.doubles(), **config)
    found: list[Any] = []

    def note(gradients: Any, *args: Any, **kwargs: Any) -> None:
        found.extend({n: g.clone() for n, g in zip(loop._names, part) if g is not None} for part in gradients)
        raise StopIteration

    loop._stepper.step = note  # type: ignore[method-assign]
    with pytest.raises(StopIteration):
        loop.run()
    return found, loop


def first_batch() -> Batch:
    return next(cases.streams(cases.doubles())[RETAIN].epoch(0))


def gradients_on(model: nn.Module, inputs: Tensor, labels: Tensor) -> Named:
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = nn.functional.cross_entropy(model(inputs), labels)
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {n: g for n, g in zip(params, grads) if g is not None}


def perturbed_by_hand(
    model: nn.Module, inputs: Tensor, labels: Tensor, rho: float, chosen: Callable[[str], bool] = lambda n: True
) -> tuple[Named, Named]:
    """g₀, and the gradient where the chosen weights stand ρ further along it; on the same dropout."""
    state = torch.get_rng_state()
    g0 = gradients_on(model, inputs, labels)
    buffers, after = {n: b.clone() for n, b in model.named_buffers()}, torch.get_rng_state()
    norm = math.sqrt(sum(float((g**2).sum()) for n, g in g0.items() if chosen(n)))
    params = dict(model.named_parameters())
    kept = {n: params[n].detach().clone() for n in g0}
    with torch.no_grad():
        for n, g in g0.items():
            if chosen(n):
                params[n].add_(rho * g / norm)
    torch.set_rng_state(state)
    g1 = gradients_on(model, inputs, labels)
    with torch.no_grad():
        for n, value in kept.items():
            params[n].copy_(value)
        for n, b in model.named_buffers():
            b.copy_(buffers[n])
    torch.set_rng_state(after)
    return g0, g1


@pytest.mark.parametrize("name", ["convolutional", "tied"])
@pytest.mark.parametrize(("sign", "lam"), [("min", 1.0), ("max", 1.0), ("min", 0.5)])
def test_micro_batches_are_perturbed_each_by_itself(name: str, sign: Any, lam: float) -> None:
    """Batches of 8 and 7 samples in three parts, on the dropout and the statistics of those parts."""
    model = cases.network(name, dtype=torch.float64)
    book = copy.deepcopy(model).train()
    (found,), loop = one_step(model, MicroBatchSharpness(rho=0.3, micro_batches=3, sign=sign, lam=lam))
    batch = first_batch()
    torch.manual_seed(0)
    total: Named = {}
    for inputs, labels in zip(np.array_split(batch.inputs, 3), np.array_split(batch.labels, 3)):
        g0, g1 = perturbed_by_hand(book, inputs, labels, 0.3)
        for n in g0:
            step = g0[n] + {"min": 1, "max": -1}[sign] * lam * (g1[n] - g0[n])
            total[n] = total.get(n, 0) + step / 3
    assert total.keys() == found.keys()
    for n, g in total.items():
        torch.testing.assert_close(found[n], g, rtol=1e-9, atol=1e-12)
    for (n, a), (_, b) in zip(model.named_buffers(), book.named_buffers()):
        torch.testing.assert_close(a, b, msg=n)
    assert loop._passes == pytest.approx(2)


def test_one_micro_batch_is_sam_to_the_bit() -> None:
    (sam,), _ = one_step(cases.network(dtype=torch.float64), Sharpness(rho=0.3))
    (msam,), _ = one_step(cases.network(dtype=torch.float64), MicroBatchSharpness(rho=0.3, micro_batches=1))
    assert all(torch.equal(sam[n], msam[n]) for n in sam)
    (other,), _ = one_step(cases.network(dtype=torch.float64), MicroBatchSharpness(rho=0.3, micro_batches=2))
    assert not torch.allclose(sam["head.weight"], other["head.weight"], rtol=1e-3)


def test_what_follows_the_loss_sees_the_mean_over_the_micro_batches() -> None:
    """SAUL's multiplier moves with the forget loss of the whole batch, at the perturbed weights."""
    rule, multipliers = MicroBatchSharpness(rho=0.3, micro_batches=2), []
    losses: list[float] = []
    model = cases.network("smooth", dtype=torch.float64)
    book = copy.deepcopy(model)
    loop = cases.make_loop(model, "saul", rule, cases.doubles())
    ((turn, taken, batches), *_) = list(loop._batches())
    loop._step(turn, taken, batches)
    multipliers = [m["multiplier"] for m in loop._memories if "multiplier" in m]
    for part in range(2):
        inputs, labels = (torch.tensor_split(t, 2)[part] for t in (batches["forget"].inputs, batches["forget"].labels))
        params = dict(book.named_parameters())
        g0 = gradients_on(book, inputs, labels)
        norm = math.sqrt(sum(float((g**2).sum()) for g in g0.values()))
        moved = {n: p.detach() - 0.3 * g0[n] / norm for n, p in params.items()}  # the phase's loss is −CE
        out = torch.func.functional_call(book, moved, (inputs,))
        losses.append(float(nn.functional.cross_entropy(out, labels)))
    assert float(multipliers[0]) == pytest.approx(0.7 * (1.2 - np.mean(losses)), rel=1e-9)


def test_more_micro_batches_than_samples_are_refused_before_the_run() -> None:
    with pytest.raises(UserError, match=r"micro_batches is 6, .* 'forget' has 5 samples"):
        cases.make_loop(cases.network(), "sharp_minmax", MicroBatchSharpness(micro_batches=6), cases.images())
    cases.make_loop(cases.network(), "sharp_minmax", MicroBatchSharpness(micro_batches=5), cases.images())
    cases.make_loop(cases.network(), "sharp_minmax", MicroBatchSharpness(micro_batches=6, rho=0), cases.images())
    for bad in ({"micro_batches": 0}, {"rho": -1.0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            MicroBatchSharpness(**bad)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="gap_weight"):
        SurrogateGap(gap_weight=-1.0)


@pytest.mark.parametrize("rule", [SurrogateGap(), SurrogateGap(lam=0.5), SurrogateGap(sign="max", max_form="ascent")])
def test_a_break_in_any_pass_shows_in_the_gradient(rule: SurrogateGap) -> None:
    for which in range(2):
        for masked in (False, True):
            for poison in poisons():
                place = network(3, masked=masked)
                place.poison = {which: poison}
                before = place.w
                assert not place.result(rule).isfinite().all()
                assert torch.equal(place.w, before)


# --- normalisation layers alone --------------------------------------------------------------------------------------


class ThirdPartyRMSNorm(nn.Module):
    """As libraries of language models write it: of none of torch's classes."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, n))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class LayerNorm2d(nn.LayerNorm):
    pass


class NormalizedHead(nn.Linear):
    pass


class PreNorm(nn.Module):
    """A block around a layer, with weights of its own that normalise nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(2))


class WeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("layer", "is_one"),
    [
        (lambda: nn.BatchNorm1d(3), True),
        (lambda: nn.BatchNorm2d(3), True),
        (lambda: nn.BatchNorm3d(3), True),
        (lambda: nn.SyncBatchNorm(3), True),
        (lambda: nn.LayerNorm((3, 2)), True),
        (lambda: nn.GroupNorm(1, 3), True),
        (lambda: nn.InstanceNorm2d(3, affine=True), True),
        (lambda: nn.RMSNorm(3), True),
        (lambda: ThirdPartyRMSNorm(3), True),
        (lambda: LayerNorm2d(3), True),
        (lambda: type("FrozenBatchNorm2d", (ThirdPartyRMSNorm,), {})(3), True),
        (lambda: type("T5LayerNorm", (ThirdPartyRMSNorm,), {})(3), True),
        (lambda: type("GlobalResponseNormMlp", (ThirdPartyRMSNorm,), {})(3), True),
        (lambda: type("Some_layernorm", (ThirdPartyRMSNorm,), {})(3), True),
        (lambda: type("Enormous", (ThirdPartyRMSNorm,), {})(3), False),
        (lambda: type("NormalHead", (ThirdPartyRMSNorm,), {})(3), False),
        (lambda: NormalizedHead(3, 1), False),
        (lambda: nn.Linear(3, 1), False),
        (PreNorm, False),
        (WeightNorm, False),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 1)), False),
    ],
)
def test_layers_that_normalise_are_known(layer: Callable[[], nn.Module], is_one: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 3), layer())
    params = dict(model.named_parameters())
    found = dict(zip(params, normalisation_weights(model, list(params.values()))))
    assert found == {n: is_one and n.startswith("1.") for n in params}


@pytest.mark.slow
def test_layers_of_transformers_are_known() -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name in ("Llama", "ViT", "Bert"):
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**shape))
        params = dict(model.named_parameters())
        found = {n for n, is_one in zip(params, normalisation_weights(model, list(params.values()))) if is_one}
        assert found == {n for n in params if "norm" in n.lower()}
        assert found


@pytest.mark.parametrize("kind", [Sharpness, AdaptiveSharpness])
@pytest.mark.parametrize(("sign", "lam"), [("min", 1.0), ("max", 0.5)])
def test_only_normalisation_layers_are_perturbed_and_all_weights_step(kind: Any, sign: Any, lam: float) -> None:
    model = cases.network(dtype=torch.float64)
    with torch.no_grad():
        model.norm.weight.fill_(1.0)  # type: ignore[union-attr]
        model.norm.bias.fill_(-1.0)  # type: ignore[union-attr]
    book = copy.deepcopy(model).train()
    (found,), _ = one_step(model, kind(rho=0.3, perturb="norm", sign=sign, lam=lam))
    batch = first_batch()
    torch.manual_seed(0)
    g0, g1 = perturbed_by_hand(book, batch.inputs, batch.labels, 0.3, lambda n: n.startswith("norm"))
    for n in g0:  # |w| is 1 in all layers that are perturbed, so both rules do the same
        step = g0[n] + {"min": 1, "max": -1}[sign] * lam * (g1[n] - g0[n])
        torch.testing.assert_close(found[n], step, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found["conv.weight"], g0["conv.weight"], rtol=1e-3)


def test_a_region_keeps_the_perturbation_of_normalisation_layers() -> None:
    """Outside the region nothing is perturbed: with the scales alone to move, the shifts stay where they are."""
    place = network(3)
    place.region = [torch.zeros_like(p, dtype=torch.bool) for p in place.params]
    place.region[1][:2] = True
    place.result(Sharpness(rho=0.5, perturb="norm"), norms=[False, True, False, True, False])
    moved = place.split(place.visited[1] - place.visited[0])
    assert [bool(m.any()) for m in moved] == [False, True, False, False, False]
    assert bool(moved[1][:2].all())
    assert not moved[1][2]
    assert float(moved[1].norm()) == pytest.approx(0.5)


def test_a_network_without_normalisation_is_refused_before_the_first_step() -> None:
    for rule in (Sharpness(perturb="norm"), GradientPenalty(perturb="norm"), RandomizedSmoothing(perturb="norm")):
        with pytest.raises(UserError, match="this network has none"):
            cases.make_loop(cases.network("tied"), "neggrad", rule, cases.images())
        cases.make_loop(cases.network(), "neggrad", rule, cases.images())
        cases.make_loop(cases.network("tied"), "neggrad", dataclasses.replace(rule, lam=0.0), cases.images())
        frozen = cases.network()
        frozen.norm.requires_grad_(False)  # type: ignore[union-attr]
        with pytest.raises(UserError, match="trainable"):
            cases.make_loop(frozen, "neggrad", rule, cases.images())
        region = {n: torch.ones_like(p, dtype=torch.bool) for n, p in frozen.named_parameters() if "norm" not in n}
        region |= {n: torch.zeros(4, dtype=torch.bool) for n in ("norm.weight", "norm.bias")}
        with pytest.raises(UserError, match="phase 'neggrad' trains none"):
            cases.make_loop(cases.network(), "neggrad", rule, cases.images(), region=region)


def test_where_layers_are_not_known_it_is_refused() -> None:
    with pytest.raises(UserError, match="parameters alone"):
        unsharp.SAM(cases.network().parameters(), lr=0.1, perturb="norm")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="region, all"):
        unsharp.SAM(cases.network().parameters(), lr=0.1, perturb="some")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="normalisation layers"):
        network(0).result(Sharpness(perturb="norm"))


# --- every k-th step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("kind", [Sharpness, AdaptiveSharpness, SurrogateGap, GradientPenalty, RandomizedSmoothing])
def test_steps_between_take_the_plain_gradient(kind: Any, every: int) -> None:
    """Eight steps of plain SGD in which each k-th, from the first on, is the rule's and the others are rule none's."""
    lr, samples = 0.1, cases.doubles()

    def sgd(named: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for _, p in named], lr=lr)

    rule = kind(every=every)
    loop = cases.make_loop(cases.network("smooth", dtype=torch.float64), "finetune", rule, samples, sgd)
    loop.run()

    book = cases.network("smooth", dtype=torch.float64)
    n_steps = corrected = 0
    for epoch in range(2):
        for batch in cases.streams(samples)[RETAIN].epoch(epoch):
            full = kind()
            one = cases.make_loop(book, "finetune", full if n_steps % every == 0 else NoRule(), samples, sgd)
            gradients = full if n_steps % every == 0 else NoRule()
            point = one._point(0, n_steps, {RETAIN: batch}, replay_of(one), {})
            for p, g in zip(one._params, gradients.gradient(point)):
                if g is not None:
                    p.data -= lr * g
            corrected += n_steps % every == 0
            n_steps += 1
    for a, b in zip(loop.model.parameters(), book.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert loop.passes == n_steps + corrected * (kind().passes - 1)
    if n_steps % every == 0:
        assert loop.passes == pytest.approx(rule.passes * n_steps)
    assert kind(every=every).passes == 1 + (kind().passes - 1) / every


def replay_of(loop: Any) -> Replay:
    return Replay(loop.device, loop._buffers)


# --- what all of them share ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Sharpness, SurrogateGap, GradientPenalty, RandomizedSmoothing])
@pytest.mark.parametrize(("sign", "lam"), [("max", 1.0), ("min", 0.5)])
def test_a_leaking_phase_steps_with_the_plain_gradient_outside_its_region(kind: Any, sign: Any, lam: float) -> None:
    """g₀ + s·λ·(M∘ĝ − g₀): (1 − s·λ)·g₀ outside, and inside what a phase that does not leak takes."""
    torch.manual_seed(0)
    place = network(5, masked=True)
    rule = kind(sign=sign, lam=lam)
    leaking, kept, g0 = place.result(rule, leak=True), place.result(rule), place.result(NoRule())
    inside = place.moves == 1
    s = {"min": 1, "max": -1}[sign]
    torch.testing.assert_close(leaking[~inside], (1 - s * lam) * g0[~inside])
    torch.testing.assert_close(leaking[inside], kept[inside])
    assert not torch.allclose(kept[inside], g0[inside], rtol=1e-6)


@pytest.mark.parametrize("kind", [Sharpness, SurrogateGap, GradientPenalty, RandomizedSmoothing])
@given(seeds, lams, signs)
@quick
def test_turning_a_rule_mirrors_it_at_the_plain_gradient(kind: Any, seed: int, lam: float, sign: Any) -> None:
    place = network(seed)
    torch.manual_seed(seed)
    rule = kind(lam=lam, sign=sign)
    one, other, g0 = place.result(rule), place.result(rule.turned()), place.result(NoRule())
    torch.testing.assert_close(one + other, 2 * g0, rtol=1e-9, atol=1e-11)
    assert rule.turned().turned() == rule
