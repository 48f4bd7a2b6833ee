"""The straight way between two networks, held to closed forms and to networks built by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_landscape import KillAfter, Killed, at_hand, by_hand, cnn, sets
from torch import nn
from weight_problems import Quadratic, first_logit, images, mlp, ones, permuted, state_of, symmetric, with_all

from unsharp.artifacts import Workspace
from unsharp.data.samples import TensorSamples
from unsharp.errors import UserError
from unsharp.evaluation.connectivity import Connectivity, barrier, weight_distance

SMALL = Connectivity(points=5, n_samples=None, batch_size=7, form="single")


def between(a: nn.Module, b: nn.Module, t: float) -> nn.Module:
    """A network of its own with all parameters and statistics at t of the way."""
    other, theirs = copy.deepcopy(a).eval(), b.state_dict()
    state = {k: (1 - t) * v + t * theirs[k] if v.is_floating_point() else v for k, v in a.state_dict().items()}
    other.load_state_dict(state)
    return other


def test_the_way_over_a_quadratic_is_known():
    a, b = symmetric(5, 1), np.random.default_rng(1).normal(size=5)
    u, v = np.random.default_rng(2).normal(size=(2, 5))
    found = Connectivity(points=9, batch_size=3).measure(
        Quadratic(a, b, u), Quadratic(a, b, v), {"all": (ones(), np.arange(7))}, loss=first_logit
    )
    for t, loss in zip(np.linspace(0, 1, 9), found.loss[0]):
        w = (1 - t) * u + t * v
        assert loss == pytest.approx(0.5 * w @ a @ w + b @ w, rel=1e-11)
    # along a line of curvature k = dᵀAd the curve is k·t(t − 1)/2 above the chord: highest in the middle if k < 0
    k = (v - u) @ a @ (v - u)
    height = found.loss_barrier("all")
    assert height.height == pytest.approx(max(-k / 8, 0.0), abs=1e-12)
    assert height.at == (0.5 if k < 0 else 0.0)


def test_a_convex_loss_has_no_barrier():
    """A linear network under cross-entropy."""
    torch.manual_seed(0)
    one, two = (nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double() for _ in range(2))
    found = SMALL.measure(one, two, sets())
    for name in found.sets:
        assert found.loss_barrier(name).height == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("form", ["single", "grouped", "vmap"])
def test_each_place_is_the_network_there(form: str):
    one, two, data = cnn(0), cnn(1), sets()
    before = state_of(one), state_of(two)
    found = replace(SMALL, form=form).measure(one, two, data)
    assert (state_of(one), state_of(two)) == before
    assert found.about["form"] == form
    for s, (samples, indices) in enumerate(data.values()):
        for i, t in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
            loss, accuracy, _ = by_hand(between(one, two, t), samples, indices)
            assert found.loss[s, i] == pytest.approx(loss, rel=1e-9)
            assert found.accuracy[s, i] == pytest.approx(accuracy, rel=1e-12)


def test_the_ends_are_the_networks_to_the_bit():
    one, two, data = cnn(0, torch.float32), cnn(1, torch.float32), sets(dtype=torch.float32)
    there, back = SMALL.measure(one, two, data), SMALL.measure(two, one, data)
    np.testing.assert_array_equal(there.loss[:, [0, -1]], back.loss[:, [-1, 0]])


def test_networks_that_do_the_same_may_lie_behind_a_barrier():
    model, samples = mlp(bias=True, hidden=9), images()
    with torch.no_grad():
        model[3].weight.mul_(10)
        right = model(samples.inputs).argmax(1).numpy()
    data = {"retain": (TensorSamples(samples.inputs, right, samples.class_names), np.arange(23))}
    found = SMALL.measure(model, permuted(model), data)
    assert found.loss[0, 0] == pytest.approx(found.loss[0, -1], rel=1e-12)
    assert found.loss_barrier("retain").height > 0.01
    same = SMALL.measure(model, copy.deepcopy(model), data)
    assert same.loss_barrier("retain").height == pytest.approx(0.0, abs=1e-12)
    assert same.distance.l2 == 0.0


def test_recomputed_statistics_are_those_of_each_place():
    one, two, data = cnn(0), cnn(1), sets()
    found = replace(SMALL, batchnorm="recomputed", batch_size=100).measure(one, two, data)
    for i, t in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        there = between(one, two, t)
        for layer in (there[1], there[5]):
            layer.momentum, layer.training = 1.0, True
        with torch.no_grad():
            there(data["retain"][0].inputs[data["retain"][1]])
        there.eval()
        for s, (samples, indices) in enumerate(data.values()):
            assert found.loss[s, i] == pytest.approx(by_hand(there, samples, indices)[0], rel=1e-9)


def test_barriers_by_hand():
    places = np.linspace(0, 1, 5)
    found = barrier(places, np.array([1.0, 2.0, 5.0, 4.0, 3.0]))
    assert (found.height, found.at) == (3.0, 0.5)
    assert found.above_ends == 3.0
    slope = barrier(places, np.array([0.0, 2.0, 2.5, 2.0, 4.0]))
    assert (slope.height, slope.at) == (1.0, 0.25)
    assert slope.above_ends == 2.0
    assert barrier(places, np.array([1.0, 0.0, 0.0, 0.0, 2.0])).height == 0.0


def test_the_barrier_in_accuracy_is_a_fall():
    one, two, data = cnn(0), cnn(1), sets()
    found = SMALL.measure(one, two, data)
    curve = found.accuracy[0]
    chord = np.linspace(curve[0], curve[-1], 5)
    assert found.accuracy_barrier("retain").height == pytest.approx((chord - curve).max())
    assert found.accuracy_barrier("retain").above_ends == pytest.approx((curve[0] + curve[-1]) / 2 - curve.min())


def test_the_distance_is_that_of_the_vectors():
    one, two = with_all(0), with_all(1)
    with torch.no_grad():
        two.head.weight.copy_(one.head.weight)
    named = [(n, p.detach().numpy(), q.detach().numpy()) for (n, p), q in zip(one.named_parameters(), two.parameters())]
    used = [(n, p, q) for n, p, q in named if n != "head.bias"]
    a, b = (np.concatenate([t[i].ravel() for t in used]) for i in (1, 2))
    found = weight_distance(one, two)
    assert found.l2 == pytest.approx(np.linalg.norm(b - a), rel=1e-12)
    assert found.relative == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-12)
    assert found.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-12)
    assert found.moved == (a != b).mean() < 1.0
    assert found.largest == np.abs(b - a).max()
    for name, p, q in used:
        if np.any(p):
            assert found.tensors[name] == pytest.approx(np.linalg.norm(q - p) / np.linalg.norm(p), rel=1e-12)
    assert found.tensors["head.weight"] == 0.0
    assert set(found.tensors) == {name for name, *_ in used}
    zero = copy.deepcopy(one)
    with torch.no_grad():
        for p in zero.parameters():
            p.zero_()
    nothing = weight_distance(zero, one)
    assert (nothing.relative, nothing.cosine) == (None, None)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    one, two, data = cnn(0, torch.float32), cnn(1, torch.float32), sets(dtype=torch.float32)
    whole, workspace = SMALL.measure(one, two, data), Workspace(tmp_path)
    with pytest.raises(Killed):
        SMALL.measure(one, two, data, workspace=workspace, save_seconds=0.0, progress=KillAfter(3))
    np.testing.assert_array_equal(SMALL.measure(one, two, data, workspace=workspace).loss, whole.loss)
    with pytest.raises(UserError, match="unfinished work of another kind"):
        SMALL.measure(two, one, data, workspace=workspace)


def test_the_cost_is_told_before():
    cost = SMALL.estimate(cnn(0), cnn(1), sets())
    assert (cost.points, cost.samples_per_point) == (5, 23)
    assert cost.seconds > 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"points": 2}, "points"), ({"batchnorm": "mixed"}, "unknown batchnorm"), ({"n_samples": -1}, "n_samples")],
)
def test_mistakes_are_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        Connectivity(**wrong)


def test_networks_of_two_architectures_are_refused():
    with pytest.raises(UserError, match="one architecture"):
        SMALL.measure(mlp(hidden=4), mlp(hidden=5), sets())
    with pytest.raises(UserError, match="one architecture"):
        weight_distance(mlp(), cnn())
    with pytest.raises(UserError, match="unknown set 'test'"):
        SMALL.measure(mlp(), mlp(1), sets()).loss_barrier("test")


def test_surfaces_and_ways_meet():
    """The way from w to w + d₁ is a part of the surface's first axis."""
    from unsharp.evaluation.landscape import Landscape, directions

    model, data = cnn(), sets()
    surface = Landscape(points=5, n_samples=None, form="single").measure({"it": model}, data)
    way = Connectivity(points=3, n_samples=None).measure(model, at_hand(model, directions(model), 1.0, 0.0), data)
    np.testing.assert_allclose(way.loss[0], surface.surface("it", "retain")[[2, 3, 4], 2], rtol=1e-6)
