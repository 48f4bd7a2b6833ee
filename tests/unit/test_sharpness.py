"""Worst-case and average sharpness, held to closed forms and textbook loops; and the mean loss they stand on."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from weight_problems import (
    Quadratic,
    first_logit,
    images,
    mlp,
    ones,
    permuted,
    rescaled,
    state_of,
    symmetric,
    with_all,
)

from unsharp.errors import NonFiniteError, UserError
from unsharp.evaluation import mean_loss
from unsharp.evaluation.mean_loss import MeanLoss, subsample
from unsharp.evaluation.sharpness import AverageSharpness, WorstCaseSharpness, scales

GEOMETRIES = ("sam", "asam", "tensor")


def by_hand(model: nn.Module, samples, indices) -> torch.Tensor:
    """The mean cross-entropy in one go, with its graph."""
    model = model.eval()
    logits = model(samples.inputs[indices])
    return nn.functional.cross_entropy(logits, torch.from_numpy(samples.labels[indices]))


def stretch_by_hand(w: torch.Tensor, geometry: str) -> torch.Tensor:
    if geometry == "sam":
        return torch.ones_like(w)
    return w.abs() if geometry == "asam" else torch.full_like(w, float(w.norm()) / w.numel() ** 0.5)


def largest_in_ball(m: np.ndarray, c: np.ndarray, rho: float) -> float:
    """max of ½uᵀMu + cᵀu over ‖u‖ ≤ ρ where M has a positive eigenvalue: (μI − M)u = c on the sphere, by bisection."""
    values, vectors = np.linalg.eigh(m)
    assert values[-1] > 0
    along = vectors.T @ c
    low, high = values[-1], values[-1] + np.linalg.norm(c) / rho + 1
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if np.linalg.norm(along / (mu - values)) > rho else (low, mu)
    u = vectors @ (along / (high - values))
    return 0.5 * u @ m @ u + c @ u


# --- the mean loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
def test_value_and_gradient_are_those_of_one_large_batch(batch_size: int):
    model, samples, indices = with_all(), images(), np.array([7, 1, 2, 22, 13, 5, 9])
    around = MeanLoss(model, samples, indices, batch_size=batch_size)
    value, gradient = around.gradient()
    expected = by_hand(model, samples, indices)
    grads = torch.autograd.grad(expected, around.params, allow_unused=True)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert float(around.value()) == pytest.approx(float(expected.detach()), rel=1e-12)
    for name, found, g in zip(around.names, gradient, grads):
        torch.testing.assert_close(found, torch.zeros_like(found) if g is None else g, rtol=1e-10, atol=1e-14, msg=name)
    assert around.names == [name for name, p in model.named_parameters() if p.requires_grad]


def test_batches_that_do_not_stay_on_the_device_give_the_same(monkeypatch):
    model, samples = with_all(), images()
    kept = MeanLoss(model, samples, np.arange(23), batch_size=4)
    first, second = float(kept.value()), float(kept.value())
    monkeypatch.setattr(mean_loss, "RESIDENT_BYTES", 0)
    read = MeanLoss(model, samples, np.arange(23), batch_size=4)
    assert [first, second] == [float(read.value()), float(read.value())]
    assert kept.batches._kept is not None
    assert read.batches._kept is None


def test_a_subsample_is_a_function_of_the_seed():
    indices = np.arange(100, 200)
    assert np.array_equal(subsample(indices, 10, 1), subsample(indices, 10, 1))
    assert not np.array_equal(subsample(indices, 10, 1), subsample(indices, 10, 2))
    found = subsample(indices, 10, 1)
    assert len(np.unique(found)) == 10
    assert set(found) <= set(indices)
    assert subsample(indices, 100, 1) is not None
    assert np.array_equal(subsample(indices[::-1], None, 0), indices[::-1])


# --- the worst case ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_one_step_is_the_perturbation_of_sam(geometry: str):
    model, samples, indices, rho = with_all(), images(), np.arange(3, 20), 0.3
    found = WorstCaseSharpness(rho=rho, geometry=geometry, steps=1, restarts=1, batch_size=4).measure(
        model, samples, indices
    )
    loss = by_hand(model, samples, indices)
    params = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)]
    stretch = [stretch_by_hand(p.detach(), geometry) for p in params]
    length = torch.sqrt(sum(((t * g) ** 2).sum() for t, g in zip(stretch, grads)))
    with torch.no_grad():
        for p, t, g in zip(params, stretch, grads):
            p += rho * t**2 * g / length
    there = float(by_hand(model, samples, indices).detach())
    here = float(loss.detach())
    assert found.loss == pytest.approx(here, rel=1e-12)
    assert found.one_step_rise == pytest.approx(there - here, rel=1e-9)
    assert found.rise == max(found.one_step_rise, 0.0)
    assert found.worst_loss == pytest.approx(found.loss + found.rise, rel=1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("seed", range(3))
def test_the_worst_of_a_quadratic_is_that_of_its_eigenvalues(geometry: str, seed: int):
    draw = np.random.default_rng(seed)
    a, b, w, rho = symmetric(6, seed, 1.0), draw.normal(size=6), draw.normal(size=6), 0.7
    t = stretch_by_hand(torch.tensor(w), geometry).numpy()
    expected = largest_in_ball(t[:, None] * a * t, t * (a @ w + b), rho)
    found = WorstCaseSharpness(rho=rho, geometry=geometry, steps=150, restarts=4, batch_size=3).measure(
        Quadratic(a, b, w), ones(), np.arange(7), loss=first_logit
    )
    assert found.rise == pytest.approx(expected, rel=1e-6)
    assert found.rise <= expected * (1 + 1e-12)


def test_at_a_saddle_only_the_restarts_climb():
    a = np.diag([3.0, 1.0, -2.0])
    model, rho = Quadratic(a, np.zeros(3), np.zeros(3)), 0.5
    one = WorstCaseSharpness(rho=rho, steps=60, restarts=1).measure(model, ones(), np.arange(7), loss=first_logit)
    two = WorstCaseSharpness(rho=rho, steps=60, restarts=2).measure(model, ones(), np.arange(7), loss=first_logit)
    assert (one.rise, one.one_step_rise) == (0.0, 0.0)
    assert two.rise == pytest.approx(0.5 * rho**2 * 3.0, rel=1e-6)
    assert two.rises[0] == 0.0


def test_no_way_leaves_the_ball():
    """On a linear loss the value tells the place: nowhere is it above ρ‖b‖."""
    b = np.array([1.0, -2.0, 0.5])
    for step_size in (0.3, 5.0, None):
        found = WorstCaseSharpness(rho=0.4, steps=9, restarts=3, step_size=step_size).measure(
            Quadratic(np.zeros((3, 3)), b, np.ones(3)), ones(), np.arange(7), loss=first_logit
        )
        assert found.rise == pytest.approx(0.4 * np.linalg.norm(b), rel=1e-12)
        assert max(found.rises) <= 0.4 * np.linalg.norm(b) * (1 + 1e-12)


def test_several_steps_are_never_below_one():
    for seed in range(4):
        model = mlp(seed)
        found = WorstCaseSharpness(rho=1.0, steps=4, restarts=2, seed=seed).measure(model, images(), np.arange(23))
        assert found.rise >= found.one_step_rise


def test_groups_are_taken_each_to_its_own_worst_point():
    model, samples, indices = with_all(), images(), np.arange(20)
    config = WorstCaseSharpness(rho=0.2, steps=2, restarts=1, group_size=8, seed=4)
    found = config.measure(model, samples, indices)
    # twenty in groups of at most eight: three of nearly equal size, in the order of the seed
    groups = np.array_split(np.random.default_rng(4).permutation(indices), 3)
    each = [replace(config, group_size=None).measure(model, samples, np.sort(g)) for g in groups]
    weights = np.array([len(g) for g in groups]) / 20
    rises = np.array([r.rise for r in each])
    assert found.rise == pytest.approx(weights @ rises, rel=1e-12)
    assert found.loss == pytest.approx(weights @ [r.loss for r in each], rel=1e-12)
    assert found.one_step_rise == pytest.approx(weights @ [r.one_step_rise for r in each], rel=1e-12)
    assert found.rise > config.__class__(rho=0.2, steps=2, restarts=1).measure(model, samples, indices).rise
    expected = np.sqrt(np.sum(weights**2 * (rises - weights @ rises) ** 2) * 3 / 2)
    assert found.standard_error == pytest.approx(expected, rel=1e-12)
    alone = replace(config, group_size=1).measure(model, samples, indices)
    assert alone.standard_error == pytest.approx(
        np.std([replace(config, group_size=None).measure(model, samples, [i]).rise for i in indices], ddof=1)
        / np.sqrt(20),
        rel=1e-9,
    )


# --- invariances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_order_of_hidden_units_changes_nothing(geometry: str):
    config = WorstCaseSharpness(rho=0.5, geometry=geometry, steps=5, restarts=1)
    model = mlp(bias=True)
    a, b = (config.measure(m, images(), np.arange(23)) for m in (model, permuted(model)))
    assert b.rise == pytest.approx(a.rise, rel=1e-9)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rescaling_layers_changes_only_what_is_not_relative(geometry: str):
    model = mlp()
    config = WorstCaseSharpness(rho=0.5, geometry=geometry, steps=5, restarts=1)
    average = AverageSharpness(sigma=0.1, geometry=geometry, draws=3)
    worst = [config.measure(m, images(), np.arange(23)).rise for m in (model, rescaled(model, 4.0))]
    mean = [average.measure(m, images(), np.arange(23)).rise for m in (model, rescaled(model, 4.0))]
    same = geometry != "sam"
    assert (worst[1] == pytest.approx(worst[0], rel=1e-9)) == same
    assert (mean[1] == pytest.approx(mean[0], rel=1e-9)) == same


# --- the average ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_average_over_a_quadratic_is_half_a_trace(geometry: str):
    a, w, sigma, draws = symmetric(5, 2, 1.0), np.random.default_rng(5).normal(size=5), 0.3, 400
    t = stretch_by_hand(torch.tensor(w), geometry).numpy()
    m = t[:, None] * a * t
    found = AverageSharpness(sigma=sigma, geometry=geometry, draws=draws).measure(
        Quadratic(a, 10 * np.ones(5), w), ones(), np.arange(7), loss=first_logit
    )
    expected, error = 0.5 * sigma**2 * np.trace(m), sigma**2 * np.linalg.norm(m) / np.sqrt(2 * draws)
    assert found.rise == pytest.approx(expected, abs=4 * error)
    assert found.standard_error == pytest.approx(error, rel=0.25)
    assert found.standard_error == pytest.approx(np.std(found.rises, ddof=1) / np.sqrt(draws), rel=1e-12)


def test_a_slope_alone_has_no_average_sharpness():
    model = Quadratic(np.zeros((4, 4)), np.array([100.0, -3.0, 2.0, 5.0]), np.ones(4))
    found = AverageSharpness(sigma=1.0, geometry="sam", draws=5).measure(model, ones(), np.arange(7), loss=first_logit)
    assert np.abs(found.rises).max() < 1e-10


def test_noise_of_a_tensor_is_as_long_as_it_says():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 300, bias=False)).double()
    around = MeanLoss(model, images(), np.arange(3))
    (noise,), (t,) = around.noise(1, 2, 3), scales(around.params, "tensor")
    assert float((0.1 * t * noise).norm()) == pytest.approx(0.1 * float(around.params[0].detach().norm()), rel=0.05)


# --- what is left behind, and what is refused -------------------------------------------------------------------------

MEASURES = (
    WorstCaseSharpness(rho=0.3, geometry="asam", steps=3, restarts=2),
    WorstCaseSharpness(rho=0.3, steps=2, group_size=5),
    AverageSharpness(sigma=0.2, draws=3),
)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_network_is_left_as_it_was_to_the_bit(measure):
    model = with_all(dtype=torch.float32)
    model.head.eval()
    model.conv.weight.grad = torch.full_like(model.conv.weight, 7.0)
    before = state_of(model)
    measure.measure(model, images(dtype=torch.float32), np.arange(23))
    assert state_of(model) == before


@pytest.mark.parametrize("measure", MEASURES)
def test_it_is_left_so_after_an_error_too(measure):
    model, calls = with_all(dtype=torch.float32), []
    before = state_of(model)

    def loss(logits, labels):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    with pytest.raises(KeyboardInterrupt):
        measure.measure(model, images(dtype=torch.float32), np.arange(23), loss=loss)
    assert state_of(model) == before


@pytest.mark.parametrize("measure", MEASURES)
def test_the_seed_decides_all_that_is_random(measure):
    model, samples = with_all(), images()
    found = measure.measure(model, samples, np.arange(23))
    torch.manual_seed(99)
    assert measure.measure(model, samples, np.arange(23)) == found
    assert replace(measure, seed=1).measure(model, samples, np.arange(23)) != found


def test_the_passes_are_those_that_were_announced(monkeypatch):
    for measure in MEASURES[::2]:
        model, made = with_all(), []
        original = MeanLoss.__init__

        def noted(self, *args, _made=made, _original=original, **more):
            _original(self, *args, **more)
            _made.append(self)

        monkeypatch.setattr(MeanLoss, "__init__", noted)
        found = measure.measure(model, images(), np.arange(23))
        assert {k: v for k, v in made[0].passes.items() if v} == measure.passes_needed == found.passes


def test_a_loss_that_is_not_finite_is_an_error():
    model = with_all()
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = float("nan")
    for measure in MEASURES:
        with pytest.raises(NonFiniteError, match="NaN or infinite"):
            measure.measure(model, images(), np.arange(23))


@pytest.mark.parametrize(
    ("cls", "wrong", "says"),
    [
        (WorstCaseSharpness, {"rho": 0.0}, "rho must be a finite number above 0"),
        (WorstCaseSharpness, {"rho": float("nan")}, "rho must be"),
        (WorstCaseSharpness, {"geometry": "l2"}, "unknown geometry 'l2'"),
        (WorstCaseSharpness, {"steps": 0}, "steps must be a whole number of at least 1"),
        (WorstCaseSharpness, {"step_size": -1.0}, "step_size"),
        (WorstCaseSharpness, {"group_size": 0}, "group_size"),
        (WorstCaseSharpness, {"seed": -1}, "seed"),
        (AverageSharpness, {"sigma": float("inf")}, "sigma"),
        (AverageSharpness, {"geometry": "no"}, "unknown geometry"),
        (AverageSharpness, {"draws": 1.5}, "draws must be a whole number"),
    ],
)
def test_mistakes_are_refused(cls, wrong, says):
    with pytest.raises(UserError, match=says):
        cls(**wrong)


def test_networks_and_samples_that_cannot_be_measured_are_refused():
    frozen = copy.deepcopy(with_all()).requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        WorstCaseSharpness().measure(frozen, images(), np.arange(3))
    with pytest.raises(UserError, match="indices is empty"):
        AverageSharpness().measure(with_all(), images(), np.arange(0))
    with pytest.raises(UserError, match="loss must give a number for each"):
        AverageSharpness().measure(with_all(), images(), np.arange(3), loss=lambda z, y: z.sum())
