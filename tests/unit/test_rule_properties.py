"""The rule on random tensors: what its formulas promise, whatever the weights, the region and the loss."""

import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from unsharp.errors import UserError
from unsharp.sharpness import RULES, AdaptiveSharpness, NoRule, Point, Sharpness
from unsharp.sharpness.point import global_norm
from unsharp.sharpness.replay import Replay, WholeModel

CPU = torch.device("cpu")
quick = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**31)
radii = st.floats(1e-3, 1.0)
lams = st.floats(0.1, 3.0)
signs = st.sampled_from(["min", "max"])
kinds = st.sampled_from([Sharpness, AdaptiveSharpness])
shapes = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=4)


class Quadratic:
    """L(w) = ½ wᵀAw + bᵀw with a random symmetric A, whose gradient Aw + b is known without autograd."""

    def __init__(self, shapes, seed, masked=False, unused=()):
        g = torch.Generator().manual_seed(seed)
        self.params = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
        self.used = [i for i in range(len(shapes)) if i not in unused]
        n = sum(p.numel() for p in self.params)
        a = torch.randn(n, n, generator=g, dtype=torch.float64)
        inside = self.join([torch.full_like(p, float(i in self.used)) for i, p in enumerate(self.params)])
        self.a = (a + a.T) * inside * inside[:, None]
        self.b = torch.randn(n, generator=g, dtype=torch.float64) * inside
        self.region = [torch.rand(s, generator=g) < 0.6 for s in shapes] if masked else None
        self.visited = []

    def join(self, tensors):
        return torch.cat([(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in zip(tensors, self.params)])

    @property
    def w(self):
        return self.join([p.detach() for p in self.params])

    @property
    def moves(self):
        ones = [torch.ones_like(p) for p in self.params]
        return self.join(ones if self.region is None else [m.double() for m in self.region])

    def gradient(self, at):
        return self.a @ at + self.b

    def point(self, factor=1.0, step=0):
        def evaluate():
            for p in self.params:
                p.grad = None
            self.visited.append(self.w)
            parts = [p if i in self.used else torch.zeros_like(p) for i, p in enumerate(self.params)]
            w = self.join(parts)
            loss = factor * (0.5 * w @ self.a @ w + self.b @ w)
            loss.backward()
            return loss

        return Point(self.params, evaluate, Replay(CPU, WholeModel(torch.nn.Module())), region=self.region, step=step)

    def result(self, rule, factor=1.0, step=0):
        return self.join(rule.gradient(self.point(factor, step)))


@quick
@given(shapes, seeds, kinds, radii, lams, signs, st.booleans(), st.sampled_from(["region", "all"]), st.floats(0, 0.1))
def test_gradient_equals_the_closed_form(shapes, seed, kind, rho, lam, sign, masked, perturb, eta):
    loss = Quadratic(shapes, seed, masked)
    w, g0 = loss.w, loss.gradient(loss.w)
    adaptive = kind is AdaptiveSharpness
    rule = kind(rho=rho, lam=lam, sign=sign, perturb=perturb, **({"eta": eta} if adaptive else {}))
    t = w.abs() + eta if adaptive else torch.ones_like(w)
    d = g0 * loss.moves if perturb == "region" else g0
    norm = (t * d).norm()
    epsilon = torch.zeros_like(w) if norm == 0 else rho * t**2 * d / norm
    g1 = loss.gradient(w + epsilon)
    expected = g0 + {"min": 1, "max": -1}[sign] * lam * (g1 - g0)
    torch.testing.assert_close(loss.result(rule), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss.visited[1], w + epsilon, rtol=1e-12, atol=1e-12)
    assert torch.equal(loss.w, w)


@quick
@given(shapes, seeds, kinds, radii, st.booleans())
def test_the_perturbation_has_length_rho_in_its_own_measure(shapes, seed, kind, rho, masked):
    loss = Quadratic(shapes, seed, masked)
    w = loss.w
    assume(bool((loss.gradient(w) * loss.moves).any()))
    loss.result(kind(rho=rho))
    epsilon = loss.visited[1] - w
    t = w.abs() if kind is AdaptiveSharpness else torch.ones_like(w)
    assert float((epsilon / t).norm()) == pytest.approx(rho, rel=1e-6)
    assert not epsilon[loss.moves == 0].any()
    assert float(epsilon @ loss.gradient(w)) > 0


@quick
@given(shapes, seeds, kinds, radii, lams)
def test_min_and_max_lie_on_both_sides_of_the_plain_gradient(shapes, seed, kind, rho, lam):
    loss = Quadratic(shapes, seed)
    rule = kind(rho=rho, lam=lam)
    low, high, plain = (loss.result(r) for r in (rule, rule.turned(), NoRule()))
    torch.testing.assert_close(low + high, 2 * plain, rtol=1e-9, atol=1e-9)
    assert rule.turned().turned() == rule


@quick
@given(shapes, seeds, kinds, radii, lams, signs, st.floats(1e-3, 1e3))
def test_a_positive_factor_of_the_loss_changes_no_direction(shapes, seed, kind, rho, lam, sign, factor):
    """α cancels in ε, and so does the scale of a gradient scaler."""
    loss = Quadratic(shapes, seed)
    rule = kind(rho=rho, lam=lam, sign=sign)
    torch.testing.assert_close(loss.result(rule, factor), factor * loss.result(rule), rtol=1e-8, atol=1e-8 * factor)


@quick
@given(shapes, seeds, kinds, st.floats(0, 1), signs, st.booleans())
def test_strength_zero_is_the_plain_gradient_to_the_bit_in_one_pass(shapes, seed, kind, value, sign, by_rho):
    loss = Quadratic(shapes, seed, masked=True)
    plain = loss.result(NoRule())
    rule = kind(rho=0.0 if by_rho else value, lam=value if by_rho else 0.0, sign=sign)
    loss.visited.clear()
    assert torch.equal(loss.result(rule), plain)
    assert len(loss.visited) == rule.passes == 1


@quick
@given(seeds, kinds, lams, signs, st.integers(1, 5))
def test_every_so_many_steps_are_corrected_and_the_others_are_plain(seed, kind, lam, sign, every):
    loss = Quadratic([(3, 2), (2,)], seed, masked=True)
    rule = kind(rho=0.3, lam=lam, sign=sign, every=every)
    always, plain = (loss.result(r) for r in (dataclasses.replace(rule, every=1), NoRule()))
    loss.visited.clear()
    for step in range(3 * every):
        assert torch.equal(loss.result(rule, step=step), always if step % every == 0 else plain)
    assert len(loss.visited) == pytest.approx(3 * every * rule.passes)


@quick
@given(shapes, seeds, kinds, radii, st.data())
def test_norm_perturbs_normalisation_layers_within_the_region_alone(shapes, seed, kind, rho, data):
    loss = Quadratic(shapes, seed, masked=True)
    norms = data.draw(st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes)))
    w, g0, t = loss.w, loss.gradient(loss.w), torch.ones_like(loss.w)
    part = loss.moves * loss.join([torch.full_like(p, float(norm)) for p, norm in zip(loss.params, norms)])
    point = loss.point()
    point.norms = norms
    kind(rho=rho, perturb="norm").gradient(point)
    if kind is AdaptiveSharpness:
        t = w.abs()
    length = (t * part * g0).norm()
    expected = torch.zeros_like(w) if length == 0 else rho * t**2 * part * g0 / length
    torch.testing.assert_close(loss.visited[1], w + expected, rtol=1e-12, atol=1e-12)


def test_norm_without_knowing_the_layers_is_refused():
    with pytest.raises(UserError, match="normalisation"):
        Quadratic([(2,)], 0).result(Sharpness(rho=0.1, perturb="norm"))


@quick
@given(seeds, st.floats(0.1, 10), st.floats(0.1, 10))
def test_asam_is_blind_to_rescaling_within_a_network(seed, a, rho):
    """L(u, v) that depends on u∘v alone: after (u·a, v/a) the perturbed loss is the same."""
    g = torch.Generator().manual_seed(seed)
    u, v, y = (torch.randn(5, generator=g, dtype=torch.float64) for _ in range(3))

    def perturbed_loss(u, v):
        params, seen = [u.clone().requires_grad_(), v.clone().requires_grad_()], []

        def evaluate():
            for p in params:
                p.grad = None
            loss = ((params[0] * params[1] - y) ** 2).sum()
            loss.backward()
            seen.append(loss.item())
            return loss

        point = Point(params, evaluate, Replay(CPU, WholeModel(torch.nn.Module())))
        AdaptiveSharpness(rho=rho).gradient(point)
        return seen

    torch.testing.assert_close(perturbed_loss(u * a, v / a), perturbed_loss(u, v), rtol=1e-6, atol=1e-9)


@quick
@given(seeds, kinds, lams, signs)
def test_both_forms_of_the_maximum_agree_to_first_order(seed, kind, lam, sign):
    """g₀ − λ(∇L(w+ε) − g₀) and g₀ + λ(∇L(w−ε) − g₀) differ by O(ρ²); for a quadratic not at all."""
    loss = Quadratic([(3, 2), (2,)], seed)
    difference = kind(rho=0.3, lam=lam, sign="max")
    ascent = dataclasses.replace(difference, max_form="ascent")
    torch.testing.assert_close(loss.result(difference), loss.result(ascent), rtol=1e-9, atol=1e-9)
    one, other = (dataclasses.replace(r, sign="min") for r in (difference, ascent))
    torch.testing.assert_close(loss.result(one), loss.result(other), rtol=1e-9, atol=1e-9)


@quick
@given(seeds, kinds, signs, st.sets(st.integers(0, 3), min_size=1, max_size=3))
def test_tensors_without_a_gradient_keep_none_or_zero(seed, kind, sign, unused):
    shapes = [(2,), (3,), (1, 2), ()]
    loss = Quadratic(shapes, seed, unused=unused)
    w = loss.w
    grads = kind(rho=0.2, sign=sign).gradient(loss.point())
    assert all(grads[i] is None or not grads[i].any() for i in unused)
    assert torch.equal(loss.w, w)


@quick
@given(seeds, kinds, signs, lams, st.sampled_from([float("nan"), float("inf")]), st.integers(0, 1), st.booleans())
def test_a_broken_pass_shows_in_the_gradient(seed, kind, sign, lam, bad, which, masked):
    loss = Quadratic([(2, 2), (3,)], seed, masked)
    assume(bool(loss.moves.any()))
    point, calls = loss.point(), []
    inner = point._evaluate

    def evaluate():
        value = inner()
        if len(calls) == which:
            loss.params[0].grad[0, 0] = bad
        calls.append(value)
        return value

    point._evaluate = evaluate
    w = loss.w
    result = loss.join(kind(rho=0.2, sign=sign, lam=lam).gradient(point))
    assert not result.isfinite().all()
    assert torch.equal(loss.w, w)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_first_pass_shows_though_the_second_is_finite(bad):
    """The gradient of a linear loss does not see its weights, so nothing carries the NaN on but the rule."""
    p, values = torch.ones(3, requires_grad=True), [bad, 1.0]

    def evaluate():
        p.grad = torch.full_like(p, values.pop(0))
        return torch.zeros(())

    point = Point([p], evaluate, Replay(CPU, WholeModel(torch.nn.Module())))
    (g,) = Sharpness(rho=0.1).gradient(point)
    assert g is not None
    assert not g.isfinite().any()
    assert values == []


@quick
@given(shapes, seeds, st.lists(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])))
def test_the_norm_is_that_of_one_long_vector(shapes, seed, dtypes):
    g = torch.Generator().manual_seed(seed)
    dtypes = (dtypes + [torch.float32] * len(shapes))[: len(shapes)]
    tensors = [torch.randn(s, generator=g).to(d) for s, d in zip(shapes, dtypes)]
    exact = torch.cat([t.double().reshape(-1) for t in tensors]).norm()
    norm = global_norm([None, *tensors])
    assert norm.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    torch.testing.assert_close(norm.double(), exact, rtol=1e-5, atol=1e-7)
    assert global_norm([None]) == 0


def test_weights_only_adaptation_is_the_published_one():
    """Kwon et al.'s code scales tensors named weight by |w| + η and leaves the others as they are."""
    loss = Quadratic([(2, 2), (2,)], 0)
    w, g0 = loss.w, loss.gradient(loss.w)
    point = loss.point()
    rule = AdaptiveSharpness(rho=0.5, eta=0.01, adapt="weights")
    with pytest.raises(UserError, match="names"):
        rule.gradient(point)
    point.names = ["layer.weight", "layer.bias"]
    loss.visited.clear()
    rule.gradient(point)
    t = torch.cat([w[:4].abs() + 0.01, torch.ones(2, dtype=torch.float64)])
    torch.testing.assert_close(loss.visited[1], w + 0.5 * t**2 * g0 / (t * g0).norm())


@given(st.sampled_from(["rho", "lam", "eta"]), st.floats(max_value=-1e-9) | st.just(float("nan")))
@quick
def test_strengths_below_zero_are_refused(name, value):
    with pytest.raises(UserError, match=name):
        AdaptiveSharpness(**{name: value})


def test_every_rule_says_where_it_comes_from():
    assert set(RULES) >= {"none", "sam", "asam"}
    for rule in RULES.values():
        assert rule.source
        assert rule.formula
        assert rule.__doc__
        assert rule().passes >= 1
