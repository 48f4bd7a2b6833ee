"""Loss surfaces, held to closed forms and to a loop that builds each network by hand; and the points they stand on."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
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

from unsharp.artifacts import Workspace
from unsharp.data.samples import TensorSamples
from unsharp.difficulty import ForgetSet
from unsharp.errors import UserError
from unsharp.evaluation import points as points_module
from unsharp.evaluation.landscape import Landscape, Surfaces, directions, flatness
from unsharp.evaluation.points import Batches, Points, chosen, recompute_batchnorm, task_sets
from unsharp.progress import Progress

SMALL = Landscape(points=5, reach=0.8, n_samples=None, batch_size=7, form="single")


def sets(n: int = 23, *, dtype: torch.dtype = torch.float64, side: int = 6):
    samples = images(n, dtype=dtype, side=side)
    return {"retain": (samples, np.arange(0, n - 8)), "forget": (samples, np.arange(n - 8, n))}


def cnn(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Convolutions with BatchNorm, pooling, a linear layer; statistics that are not those of the start."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    model = model.to(dtype)
    for layer in (model[1], model[5]):
        layer.running_mean = 0.1 * torch.randn_like(layer.running_mean)
        layer.running_var = 0.5 + torch.rand_like(layer.running_var)
    return model


def at_hand(model: nn.Module, both, a: float, b: float) -> nn.Module:
    """A network of its own at w + a·d₁ + b·d₂."""
    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name in both.first:
                p += a * both.first[name] + b * both.second[name]
    return other


def by_hand(model: nn.Module, samples, indices) -> tuple[float, float, float]:
    """Loss, accuracy and the losses' deviation (n − 1) in one batch."""
    with torch.no_grad():
        logits = model(samples.inputs[indices])
    labels = torch.from_numpy(samples.labels[indices])
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return float(losses.mean()), 100 * float((logits.argmax(1) == labels).double().mean()), float(losses.std())


# --- directions -------------------------------------------------------------------------------------------------------


def parts_of(tensor: Tensor, normalise: str) -> Tensor:
    return tensor.reshape(len(tensor), -1) if normalise == "filter" else tensor.reshape(1, -1)


@pytest.mark.parametrize("normalise", ["filter", "tensor"])
def test_directions_are_as_long_as_the_weights_and_orthogonal_part_by_part(normalise: str):
    model = cnn()
    both = directions(model, normalise)
    own = dict(model.named_parameters())
    assert list(both.first) == ["0.weight", "4.weight", "8.weight"]
    for name in both.first:
        w, a, b = (parts_of(t.detach(), normalise) for t in (own[name], both.first[name], both.second[name]))
        for part, first, second in zip(w, a, b):
            assert float(first.norm()) == pytest.approx(float(part.norm()), rel=1e-12)
            assert float(second.norm()) == pytest.approx(float(part.norm()), rel=1e-12)
            assert abs(float(first @ second)) < 1e-12 * float(part.norm()) ** 2
    assert abs(both.cosine) < 1e-12


def test_directions_are_gaussian_and_drawn_by_the_seed_alone():
    model = nn.Linear(200, 300).double()
    raw = directions(model, "none").first["weight"].numpy().ravel()
    assert abs(raw.mean()) < 0.02
    assert raw.std() == pytest.approx(1.0, abs=0.02)
    assert np.mean(raw**4) == pytest.approx(3.0, abs=0.2)
    torch.manual_seed(8)
    again = directions(copy.deepcopy(model), "none")
    assert np.array_equal(again.first["weight"].numpy().ravel(), raw)
    other = directions(model, "none", seed=1)
    assert abs(np.corrcoef(other.first["weight"].numpy().ravel(), raw)[0, 1]) < 0.02
    single = directions(copy.deepcopy(model).float(), "none").first["weight"].double().numpy().ravel()
    np.testing.assert_allclose(single, raw, rtol=1e-6)


def test_networks_of_one_architecture_get_the_same_numbers():
    a, b = cnn(0), cnn(1)
    raw_a, raw_b = (directions(m, "tensor") for m in (a, b))
    for name, d in raw_a.first.items():
        torch.testing.assert_close(d / d.norm(), raw_b.first[name] / raw_b.first[name].norm())


def test_what_is_moved():
    model = with_all()
    assert list(directions(model).first) == ["conv.weight", "one.weight", "head.weight"]
    every = directions(model, include="all")
    assert set(every.first) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, d in every.first.items():
        if d.ndim == 1:
            assert float(d.norm()) == pytest.approx(float(dict(model.named_parameters())[name].detach().norm()))
    # who is moved besides changes nothing for the others
    assert torch.equal(every.first["conv.weight"], directions(model).first["conv.weight"])


def test_a_part_of_a_single_weight_keeps_its_size():
    model = nn.Linear(1, 4, bias=False).double()
    both = directions(model)
    for d in (both.first["weight"], both.second["weight"]):
        torch.testing.assert_close(d.abs(), model.weight.detach().abs())


def test_weights_of_zero_are_not_moved():
    model = cnn()
    with torch.no_grad():
        model[0].weight[1] = 0.0
    both = directions(model)
    assert float(both.first["0.weight"][1].abs().sum()) == 0.0
    assert float(both.first["0.weight"][0].abs().sum()) > 0.0


# --- surfaces ---------------------------------------------------------------------------------------------------------


def test_the_surface_of_a_quadratic_is_known():
    a, w = symmetric(6, 1), np.random.default_rng(0).normal(size=6)
    b = np.random.default_rng(1).normal(size=6)
    model = Quadratic(a, b, w, shape=(2, 3))
    config = Landscape(points=7, reach=1.5, normalise="tensor", batch_size=3, seed=5)
    found = config.measure({"it": model}, {"all": (ones(), np.arange(7))}, loss=first_logit)
    both = directions(model, "tensor", seed=5)
    d1, d2 = both.first["weight"].numpy().ravel(), both.second["weight"].numpy().ravel()
    for i, x in enumerate(np.linspace(-1.5, 1.5, 7)):
        for j, y in enumerate(np.linspace(-1.5, 1.5, 7)):
            v = w + x * d1 + y * d2
            assert found.loss[0, 0, i, j] == pytest.approx(0.5 * v @ a @ v + b @ v, rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("make", [cnn, with_all])
def test_each_point_is_the_network_there(make):
    models, data = {"original": make(0), "other": make(1)}, sets()
    found = SMALL.measure(models, data)
    axis = np.linspace(-0.8, 0.8, 5)
    for k, model in enumerate(models.values()):
        both = directions(model)
        for s, (samples, indices) in enumerate(data.values()):
            for i, j in ((0, 0), (1, 3), (2, 2), (4, 1)):
                loss, accuracy, _ = by_hand(at_hand(model, both, axis[i], axis[j]), samples, indices)
                assert found.loss[k, s, i, j] == pytest.approx(loss, rel=1e-9)
                assert found.accuracy[k, s, i, j] == accuracy
    assert found.networks == ("original", "other")
    assert found.sets == ("retain", "forget")
    assert found.n == {"retain": 15, "forget": 8}
    assert not found.standard_error.any()


def test_the_middle_is_the_network_itself_to_the_bit():
    model, data = cnn(dtype=torch.float32), sets(dtype=torch.float32)
    found = SMALL.measure({"it": model}, data)
    model.eval()
    for s, (samples, indices) in enumerate(data.values()):
        total = 0.0
        for part in np.array_split(indices, -(-len(indices) // 7)):
            with torch.no_grad():
                z = model(samples.inputs[part])
            losses = nn.functional.cross_entropy(z, torch.from_numpy(samples.labels[part]), reduction="none")
            total += float(losses.double().sum())
        assert found.loss[0, s, 2, 2] == total / len(indices)
    assert SMALL.axis[2] == 0.0
    np.testing.assert_array_equal(SMALL.axis, -SMALL.axis[::-1])


@pytest.mark.parametrize("form", ["grouped", "vmap"])
@pytest.mark.parametrize("make", [cnn, lambda seed, dtype: mlp(seed, bias=True, dtype=dtype)])
def test_many_at_a_time_are_the_same_as_one_by_one(form: str, make):
    """25 points in parts of 7, the last one short; in double precision, so that only rounding may differ."""
    model, data = make(0, torch.float64), sets()
    alone = SMALL.measure({"it": model}, data)
    chosen_sets = chosen(data, None, 7, 0, torch.float64)
    points = Points(model, chosen_sets, form=form)
    points._stack, points.together = None, 7
    points._stack = points._tried(form, 7, data["retain"][0].inputs)
    with points.open():
        sums = points.evaluate(SMALL._fill(model, directions(model)), range(25))
    counts = torch.tensor([15.0, 8.0])
    np.testing.assert_allclose((sums[:, 0, 0] / counts[0]).view(5, 5), alone.loss[0, 0], rtol=1e-11)
    np.testing.assert_allclose((sums[:, 1, 0] / counts[1]).view(5, 5), alone.loss[0, 1], rtol=1e-11)
    np.testing.assert_allclose((100 * sums[:, 0, 2] / counts[0]).view(5, 5), alone.accuracy[0, 0])


@pytest.mark.parametrize("form", ["auto", "grouped", "vmap"])
def test_the_forms_give_the_same_surfaces_of_several_networks(form: str):
    models, data = {"a": cnn(0, torch.float32), "b": cnn(1, torch.float32)}, sets(dtype=torch.float32)
    before = [state_of(m) for m in models.values()]
    alone, found = (replace(SMALL, form=f).measure(models, data) for f in ("single", form))
    np.testing.assert_allclose(found.loss, alone.loss, rtol=2e-5)
    assert {row["form"] for row in found.about["form"].values()} == {"grouped" if form == "auto" else form}
    assert [state_of(m) for m in models.values()] == before


class Mixing(nn.Module):
    """Right in a group only by mistake: it turns the channels around, and divides by the sum over them."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(torch.softmax(self.conv(x), 1).flip(1).mean((2, 3)))


def test_a_network_that_does_not_fit_a_form_goes_one_by_one():
    torch.manual_seed(0)
    model, data = Mixing().double(), sets()
    found = replace(SMALL, form="grouped").measure({"it": model}, data)
    assert found.about["form"]["it"] == {
        "form": "single",
        "together": 1,
        "reason": "grouped does not fit this network: its logits are not those of the network",
    }
    np.testing.assert_array_equal(found.loss, SMALL.measure({"it": model}, data).loss)
    assert replace(SMALL, form="vmap").measure({"it": model}, data).about["form"]["it"]["form"] == "vmap"


def test_nothing_is_read_on_the_host_between_points(monkeypatch):
    model = cnn(dtype=torch.float32)
    chosen_sets = chosen(sets(dtype=torch.float32), None, 7, 0, torch.float32)
    fill = SMALL._fill(model, directions(model))
    for form in ("single", "grouped", "vmap"):
        points = Points(model, chosen_sets, form=form)
        assert points.form == form
        with points.open():
            points.evaluate(fill, range(3))  # batches are prepared once

            def refuse(*_):
                raise AssertionError("a number went to the host")

            with monkeypatch.context() as patch:
                for name in ("item", "cpu", "tolist", "numpy", "__float__", "__bool__", "__int__"):
                    patch.setattr(Tensor, name, refuse)
                points.evaluate(fill, range(5))


# --- invariances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", ["filter", "tensor"])
def test_rescaling_layers_changes_nothing_with_normalised_directions(normalise: str):
    model = mlp()
    config = replace(SMALL, normalise=normalise)
    found = config.measure({"it": model, "scaled": rescaled(model, 8.0)}, sets())
    np.testing.assert_allclose(found.loss[1], found.loss[0], rtol=1e-9)
    for other in (replace(config, normalise="none"), replace(config, scaled_by="first")):
        moved = other.measure({"it": model, "scaled": rescaled(model, 8.0)}, sets())
        assert np.abs(moved.loss[1] - moved.loss[0]).max() > 1e-3


def test_the_order_of_hidden_units_changes_the_plane_but_not_the_function():
    model = mlp(bias=True)
    found = SMALL.measure({"it": model, "permuted": permuted(model)}, sets())
    np.testing.assert_allclose(found.loss[1, :, 2, 2], found.loss[0, :, 2, 2], rtol=1e-12)
    assert np.abs(found.loss[1] - found.loss[0]).max() > 1e-3


def test_all_are_moved_by_the_vectors_of_the_first_if_asked():
    models = {"a": cnn(0), "b": cnn(1)}
    found = replace(SMALL, scaled_by="first").measure(models, sets())
    samples, indices = sets()["retain"]
    there = at_hand(models["b"], directions(models["a"]), -0.8, 0.4)
    assert found.loss[1, 0, 0, 3] == pytest.approx(by_hand(there, samples, indices)[0], rel=1e-9)


# --- BatchNorm --------------------------------------------------------------------------------------------------------


def test_statistics_of_one_batch_are_those_of_the_batch():
    model, (samples, indices) = cnn(), sets()["retain"]
    kept = copy.deepcopy(model)
    recompute_batchnorm(model, Batches(samples, indices, 100, torch.float64))
    with torch.no_grad():
        h = model[0](samples.inputs[indices])
        torch.testing.assert_close(model[1].running_mean, h.mean((0, 2, 3)))
        torch.testing.assert_close(model[1].running_var, h.transpose(0, 1).flatten(1).var(1))
    assert [m.momentum for m in (model[1], model[5])] == [kept[1].momentum, kept[5].momentum]
    assert [m.training for m in model.modules()] == [m.training for m in kept.modules()]


def test_recomputed_statistics_are_those_of_each_point():
    """By hand: one batch in training mode, whose own statistics (with n − 1) are then used."""
    model, data = cnn(), sets()
    config = replace(SMALL, batchnorm="recomputed", batch_size=100)
    found = config.measure({"it": model}, data)
    there = at_hand(model, directions(model), 0.4, -0.8)
    for layer in (there[1], there[5]):
        layer.momentum, layer.training = 1.0, True
    with torch.no_grad():
        there(data["retain"][0].inputs[data["retain"][1]])
    there.eval()
    for s, (samples, indices) in enumerate(data.values()):
        assert found.loss[0, s, 3, 0] == pytest.approx(by_hand(there, samples, indices)[0], rel=1e-9)
    stored = SMALL.measure({"it": model}, data)
    assert np.abs(found.loss - stored.loss).max() > 0.01
    assert found.about["form"]["it"]["form"] == "single"


def test_dropout_stays_off_while_statistics_are_recomputed():
    model, data = with_all(), sets()
    torch.manual_seed(1)
    a = replace(SMALL, batchnorm="recomputed").measure({"it": model}, data).loss
    torch.manual_seed(2)
    np.testing.assert_array_equal(replace(SMALL, batchnorm="recomputed").measure({"it": model}, data).loss, a)


# --- a part of the samples --------------------------------------------------------------------------------------------


def test_a_part_of_the_samples_says_how_uncertain_it_is():
    model, data = cnn(), sets(203)
    config = replace(SMALL, points=3, n_samples=40)
    found = config.measure({"it": model}, data)
    assert found.n == {"retain": 40, "forget": 8}
    samples, indices = data["retain"]
    part = np.sort(np.random.default_rng(0).choice(indices, 40, replace=False))
    loss, _, deviation = by_hand(model.eval(), samples, part)
    assert found.loss[0, 0, 1, 1] == pytest.approx(loss, rel=1e-9)
    assert found.standard_error[0, 0, 1, 1] == pytest.approx(deviation / np.sqrt(40) * np.sqrt(1 - 40 / 195), rel=1e-9)
    assert not found.standard_error[0, 1].any()
    errors = []
    for seed in range(60):
        few = replace(config, seed=seed).measure({"it": model}, {"retain": data["retain"]}).loss[0, 0, 1, 1]
        errors.append(few - by_hand(model.eval(), samples, indices)[0])
    assert np.std(errors) == pytest.approx(found.standard_error[0, 0, 1, 1], rel=0.35)


def test_the_sets_of_a_task():
    train, test = images(10), images(4)
    forget = ForgetSet(np.array([2, 5]), np.array([2, 5]), "given", None, 10, None)
    found = task_sets(train, test, forget)
    assert {name: indices.tolist() for name, (_, indices) in found.items()} == {
        "retain": [0, 1, 3, 4, 6, 7, 8, 9],
        "forget": [2, 5],
        "test": [0, 1, 2, 3],
    }
    assert found["test"][0] is test
    assert list(task_sets(train, None, forget)) == ["retain", "forget"]


# --- flatness ---------------------------------------------------------------------------------------------------------


def test_flatness_by_loops():
    """Each figure as one would write it down, on random numbers."""
    axis = np.linspace(-1, 1, 7)
    loss = np.random.default_rng(0).gamma(2.0, size=(7, 7))
    found = flatness(loss, axis)
    n, h, c = 49, axis[1] - axis[0], loss[3, 3]
    mean = sum(loss.ravel()) / n
    deviation = (sum((x - mean) ** 2 for x in loss.ravel()) / n) ** 0.5
    slopes = []
    for i in range(7):
        for j in range(7):
            up, down, right, left = min(i + 1, 6), max(i - 1, 0), min(j + 1, 6), max(j - 1, 0)
            along = (loss[up, j] - loss[down, j]) / (h * (up - down))
            across = (loss[i, right] - loss[i, left]) / (h * (right - left))
            slopes.append((along**2 + across**2) ** 0.5)
    assert found.centre == c
    assert found.standard_deviation == pytest.approx(deviation, rel=1e-12)
    assert found.mean_gradient == pytest.approx(sum(slopes) / n, rel=1e-12)
    assert found.basin_ratio == sum(abs(x - c) <= deviation / 2 for x in loss.ravel()) / n
    assert found.stability == {
        percent: sum(abs(x - c) <= c * percent / 100 for x in loss.ravel()) / n for percent in (10, 25, 50, 75)
    }


def test_flatness_of_planes_and_of_nothing():
    axis = np.linspace(-1, 1, 25)
    x, y = np.meshgrid(axis, axis, indexing="ij")
    plane = flatness(3.0 * x - 4.0 * y + 10.0, axis)
    assert plane.mean_gradient == pytest.approx(5.0, rel=1e-12)
    flat = flatness(np.full((25, 25), 2.0), axis)
    assert (flat.standard_deviation, flat.basin_ratio) == (0.0, 1.0)
    assert flat.mean_gradient == pytest.approx(0.0, abs=1e-12)
    assert set(flat.stability.values()) == {1.0}
    at_zero = flatness(x**2 + y**2, axis)
    assert set(at_zero.stability.values()) == {None}
    assert at_zero.basin_ratio is not None


def test_a_surface_that_is_not_finite_has_no_figures():
    loss = np.ones((5, 5))
    loss[0, 0], loss[4, 4] = np.inf, np.nan
    found = flatness(loss, np.linspace(-1, 1, 5))
    assert (found.not_finite, found.centre, found.standard_deviation, found.basin_ratio) == (2, 1.0, None, None)
    assert set(found.stability.values()) == {None}


def test_the_grid_of_a_network_that_explodes_is_told_so(tmp_path):
    model = cnn()
    with torch.no_grad():
        model[8].bias[0] = float("inf")
    found = SMALL.measure({"it": model}, sets())
    assert found.flatness("it", "retain").not_finite == 25
    json.dumps(found.summary(), allow_nan=False)
    found.save(tmp_path / "s.safetensors")


@pytest.mark.parametrize("shape", [(4, 4), (5, 4), (1, 1), (3,)])
def test_grids_without_a_middle_are_refused(shape):
    with pytest.raises(UserError, match="odd A"):
        flatness(np.ones(shape), np.linspace(-1, 1, shape[0]))


# --- results, resuming, costs -----------------------------------------------------------------------------------------


def test_what_is_saved_comes_back(tmp_path):
    found = SMALL.measure({"a": cnn(0), "b": cnn(1)}, sets())
    found.save(tmp_path / "surfaces.safetensors")
    back = Surfaces.load(tmp_path / "surfaces.safetensors")
    for name in ("axis", "loss", "accuracy", "standard_error"):
        np.testing.assert_array_equal(getattr(back, name), getattr(found, name))
    assert (back.networks, back.sets, back.n, back.about) == (found.networks, found.sets, found.n, found.about)
    assert back.summary() == found.summary()
    np.testing.assert_array_equal(back.surface("b", "forget"), found.loss[1, 1])
    with pytest.raises(UserError, match="unknown network 'c'"):
        back.surface("c", "forget")
    with pytest.raises(UserError, match="does not exist"):
        Surfaces.load(tmp_path / "no")
    (tmp_path / "broken").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no whole file of surfaces"):
        Surfaces.load(tmp_path / "broken")


class Killed(Exception):
    """In place of a kill."""


class KillAfter(Progress):
    """Ends the process, so to say, after some points."""

    def __init__(self, n: int) -> None:
        self.left = n

    def advance(self, n: int = 1, note: str = "") -> None:
        self.left -= n
        if self.left <= 0:
            raise Killed


class Counting(Progress):
    """Counts points, and remembers how many were done before."""

    def start(self, label: str, total: int, done: int = 0) -> None:
        self.total, self.before, self.n = total, done, 0

    def advance(self, n: int = 1, note: str = "") -> None:
        self.n += n


@pytest.mark.parametrize("form", ["single", "grouped"])
@pytest.mark.parametrize("after", [3, 25, 31])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, form: str, after: int):
    monkeypatch.setattr(points_module, "MOST", 4)
    models, data = {"a": cnn(0, torch.float32), "b": cnn(1, torch.float32)}, sets(dtype=torch.float32)
    config, workspace = replace(SMALL, form=form), Workspace(tmp_path)
    before = [state_of(m) for m in models.values()]
    whole = config.measure(models, data)
    with pytest.raises(Killed):
        config.measure(models, data, workspace=workspace, save_seconds=0.0, progress=KillAfter(after))
    assert [state_of(m) for m in models.values()] == before
    counting = Counting()
    found = config.measure(models, data, workspace=workspace, progress=counting)
    np.testing.assert_array_equal(found.loss, whole.loss)
    np.testing.assert_array_equal(found.accuracy, whole.accuracy)
    assert counting.total == 50
    assert counting.before + counting.n == 50
    assert after - 5 <= counting.before <= after
    assert counting.before > 0 or after < 5
    for other, others in ((replace(config, seed=1), models), (config, {"a": cnn(2, torch.float32), "b": models["b"]})):
        with pytest.raises(UserError, match="unfinished work of another kind"):
            other.measure(others, data, workspace=workspace)


def test_the_same_seed_gives_the_same_bits():
    models, data = {"a": cnn(dtype=torch.float32)}, sets(dtype=torch.float32)
    a = SMALL.measure(models, data)
    torch.manual_seed(4)
    np.testing.assert_array_equal(SMALL.measure(models, data).loss, a.loss)
    assert np.abs(replace(SMALL, seed=1).measure(models, data).loss - a.loss).max() > 1e-3


@pytest.mark.parametrize("batchnorm", ["stored", "recomputed"])
def test_the_network_is_left_as_it_was_to_the_bit(batchnorm: str):
    other, data = with_all(1, torch.float32), sets(dtype=torch.float32)
    model = with_all(dtype=torch.float32)
    model.head.eval()
    model.conv.weight.grad = torch.full_like(model.conv.weight, 7.0)
    before = state_of(model)
    config = replace(SMALL, batchnorm=batchnorm, include="all")
    config.measure({"it": model}, data)
    assert state_of(model) == before
    cost = config.estimate({"it": model, "other": other}, data)
    assert state_of(model) == before
    with pytest.raises(Killed):
        config.measure({"it": model}, data, progress=KillAfter(5))
    assert state_of(model) == before
    assert cost.points == 50
    assert cost.samples_per_point == (23 if batchnorm == "stored" else 38)
    assert cost.seconds == pytest.approx(50 * cost.seconds_per_point)
    assert cost.seconds > 0


def test_the_cost_of_a_grid_smaller_than_what_goes_together():
    models = {"it": cnn(dtype=torch.float32), "other": cnn(1, torch.float32)}
    cost = replace(SMALL, points=3, form="grouped").estimate(models, sets(dtype=torch.float32))
    assert cost.together > 9
    assert cost.points == 18
    assert cost.seconds == pytest.approx(18 * cost.seconds_per_point)


def test_the_inputs_of_resident_samples_are_prepared_once():
    class Watched(TensorSamples):
        reads = 0

        def batches(self, order, sizes, *, draws):
            self.reads += 1
            return super().batches(order, sizes, draws=draws)

    base = images()
    samples = Watched(base.inputs, base.labels, base.class_names)
    SMALL.measure({"it": cnn()}, {"all": (samples, np.arange(23))})
    assert samples.reads == 1


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"points": 24}, "points must be odd"),
        ({"points": 1}, "points must be a whole number of at least 3"),
        ({"reach": 0.0}, "reach"),
        ({"normalise": "layer"}, "unknown normalise 'layer'"),
        ({"include": "biases"}, "unknown include"),
        ({"scaled_by": "each"}, "unknown scaled_by"),
        ({"batchnorm": "train"}, "unknown batchnorm"),
        ({"n_samples": 0}, "n_samples"),
        ({"form": "stack"}, "unknown form"),
        ({"seed": -1}, "seed"),
    ],
)
def test_mistakes_are_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        Landscape(**wrong)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="models is empty"):
        SMALL.measure({}, sets())
    with pytest.raises(UserError, match="sets is empty"):
        SMALL.measure({"it": cnn()}, {})
    with pytest.raises(UserError, match=r"of one architecture: 0\.weight is .* in 'a' and missing in 'b'"):
        SMALL.measure({"a": cnn(), "b": mlp()}, sets())
    with pytest.raises(UserError, match="include='all'"):
        directions(nn.BatchNorm2d(3))
    with pytest.raises(UserError, match="must return logits"):
        SMALL.measure({"it": nn.Sequential(nn.Conv2d(1, 2, 3).double())}, sets())
