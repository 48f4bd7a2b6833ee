"""The α adviser: its clock against real optimisers, its probes against real runs, its readings against brute force."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from unsharp import unlearning
from unsharp.data import ImageSamples
from unsharp.difficulty.forget import from_indices
from unsharp.engine import OptimizerConfig
from unsharp.errors import NonFiniteError, UserError
from unsharp.evaluation.accuracy import accuracy
from unsharp.evaluation.predictions import predict
from unsharp.methods.neggrad import NegGrad
from unsharp.methods.sharp_minmax import SharpMinMax
from unsharp.recipes import suggest_alpha as recipe
from unsharp.theory import adviser
from unsharp.theory.adviser import Look, Probe
from unsharp.training import TrainConfig, train
from unsharp.tuning.target import Target
from unsharp.unlearning import configure

AIM = Target(accuracy=50.0, kind="given")


def images(n: int = 90, seed: int = 0) -> ImageSamples:
    """Noise with random labels: what a network knows of a sample, it remembers."""
    rng = np.random.default_rng(seed)
    pixels, labels = rng.integers(0, 256, (n, 4, 4, 1), dtype=np.uint8), rng.integers(0, 3, n)
    return ImageSamples(pixels, labels, ["a", "b", "c"], mean=(0.5,), std=(0.3,))


SAMPLES = images()
FORGET = from_indices(np.arange(20), SAMPLES)
RETAIN = np.arange(20, 90)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3))
    train(network, SAMPLES, np.arange(90), TrainConfig(epochs=80, batch_size=15, optimizer=OptimizerConfig(lr=0.1)))
    network.eval()
    assert accuracy(predict(network, SAMPLES, np.arange(90))) > 95
    return network


def run(**changes: Any) -> unlearning.UnlearnConfig:
    return configure(**({"method": "neggrad", "rule": "none", "batch_size": 10, "epochs": 4, "lr": 0.02} | changes))


def bench(network: nn.Module, how: unlearning.UnlearnConfig) -> adviser._Bench:
    return adviser._Bench(network, SAMPLES, FORGET, how, None)


# --- the clock --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("momentum", "options"),
    [
        *((momentum, options) for momentum in (0.0, 0.5, 0.9) for options in ({}, {"dampening": 0.3})),
        *((momentum, {"nesterov": True}) for momentum in (0.5, 0.9)),  # torch has none without momentum
    ],
)
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "step"])
def test_effective_steps_are_how_far_an_optimiser_goes_under_a_constant_gradient(momentum, schedule, options) -> None:
    how = run(
        momentum=momentum, schedule=schedule, warmup=0.2 if schedule == "linear" else 0.0, options=options, lr=0.5
    )
    for steps in (1, 2, 17):
        w = nn.Parameter(torch.zeros((), dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=1.0, momentum=momentum, **options)
        for k in range(steps):
            optimizer.param_groups[0]["lr"] = how.lr_factor(k, steps)
            w.grad = torch.ones_like(w)
            optimizer.step()
        assert adviser.effective_steps(how, steps) == pytest.approx(-w.item(), rel=1e-12)
    if schedule == "constant":
        assert adviser.effective_steps(how, 17) == adviser.effective_steps(how, 17, constant=True)


def test_the_clock_is_that_of_the_forget_phase() -> None:
    how = run(method="sharp_minmax", rule="none", momentum=0.0, phase_schedule={"forget": "linear"})
    assert adviser.effective_steps(how, 4) == pytest.approx(1 + 0.75 + 0.5 + 0.25)
    assert adviser.effective_steps(how, 4, constant=True) == 4


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_a_probe_takes_the_fewest_steps_that_ascend_as_far_as_the_run(momentum, schedule, alpha) -> None:
    how = run(momentum=momentum, schedule=schedule)
    found = adviser.steps_of_probe(how, 28, alpha, 0.8)
    wanted = 0.2 * adviser.effective_steps(how, 28)
    by_hand = next(
        n for n in range(1, 200) if (1 - alpha) * adviser.effective_steps(how, n, constant=True) >= wanted * (1 - 1e-12)
    )
    assert found == by_hand
    if schedule == "constant" and alpha == 0.8:
        assert found == 28  # then the probe is the run itself


# --- readings ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.floats(0, 100))
def test_the_first_crossing_is_where_a_fine_walk_first_gets_down_to_the_level(values, level) -> None:
    ascent = np.cumsum(np.linspace(1, 2, len(values))) - 1
    found = adviser.first_crossing(list(ascent), values, level)
    if min(values) > level:
        assert found is None
        return
    assert found is not None
    if values[0] <= level:
        assert found == ascent[0]
        return
    assert float(np.interp(found, ascent, values)) == pytest.approx(level, abs=1e-6)
    before = np.linspace(ascent[0], found, 400, endpoint=False)
    assert (np.interp(before, ascent, values) >= level - 1e-6).all()


@given(st.integers(1, 3000), st.integers(1, 30))
def test_a_probe_is_looked_at_at_most_so_often_and_at_its_end(steps, looks) -> None:
    found = adviser.look_steps(steps, looks)
    assert found == sorted(set(found))
    assert 1 <= len(found) <= looks
    assert found[-1] == steps or looks == 1
    assert found[0] == 1


def looks(**figures: list[float]) -> tuple[Look, ...]:
    """Looks at an ascent of 0, 10, 20, ..."""
    rows = zip(*figures.values())
    return tuple(
        Look(step=i, ascent=10.0 * i, values=dict(zip(figures, map(float, row)))) for i, row in enumerate(rows)
    )


def test_limits_are_read_where_the_first_of_them_is_passed() -> None:
    seen = looks(retain_accuracy=[100, 100, 80], retain_loss=[0, 1, 2], forget_accuracy=[100, 50, 0])
    assert adviser.least_alpha(seen, {"retain_accuracy": 90}, 100) == pytest.approx(0.85)
    assert adviser.least_alpha(seen, {"retain_accuracy": 90, "retain_loss": 0.5}, 100) == pytest.approx(0.95)
    assert adviser.least_alpha(seen, {"retain_loss": 0.5}, 100) == pytest.approx(0.95)
    assert adviser.least_alpha(seen, {"retain_accuracy": 70, "retain_loss": 3}, 100) is None
    assert adviser.reaching_alpha(seen, 75, 100) == pytest.approx(0.95)
    assert adviser.reaching_alpha(seen, 100, 100) == 1
    assert adviser.reaching_alpha(seen, 10, 18) == 0  # more ascent than the whole run has: no α below 0
    assert adviser.reaching_alpha(seen, -1, 100) is None


def advice(probes: list[tuple[float, tuple[Look, ...]]], target: Target, method: Any = None) -> adviser.Advice:
    """What is made of probes of a run of 100 effective steps, with 90 % to be kept on retained samples."""
    limits = {"retain_accuracy": 90.0}
    found = tuple(
        Probe(
            alpha=alpha,
            looks=seen,
            least=adviser.least_alpha(seen, limits, 100),
            target=adviser.reaching_alpha(seen, target.accuracy, 100),
            passes=30,
        )
        for alpha, seen in probes
    )
    at = SimpleNamespace(
        balance=lambda: 0.5,
        run_passes=lambda: 200,
        parts={name: (None, np.arange(50)) for name in ("retain", "forget")},
        preparation=7,
        how=SimpleNamespace(method=method or NegGrad(alpha=0.3), batch_size=10),
        total=100.0,
        run_steps=100,
    )
    return adviser._advice(found, at, target, limits, 5.0)  # type: ignore[arg-type]


HARMLESS = [100.0, 100.0, 100.0]


def test_the_largest_alpha_that_reaches_the_target_is_suggested() -> None:
    found = advice([(0.8, looks(retain_accuracy=HARMLESS, forget_accuracy=[100, 60, 20]))], AIM)
    assert found.alpha == pytest.approx(1 - 12.5 / 100)
    assert found.reached
    assert found.least is None
    assert found.low == found.high == found.alpha
    assert found.passes == 7 + 30 + 10
    assert any("reach the target" in line and line.startswith("suggested") for line in found.reasons)


def test_none_is_suggested_that_leaves_the_tolerance() -> None:
    found = advice([(0.8, looks(retain_accuracy=[100, 80, 60], forget_accuracy=[100, 60, 20]))], AIM)
    assert found.alpha == found.least == pytest.approx(0.95)
    assert not found.reached
    assert (found.low, found.high) == (pytest.approx(0.875), pytest.approx(0.95))
    assert any("stay within the tolerance" in line for line in found.reasons if line.startswith("suggested"))


def test_where_nothing_is_reached_the_smallest_that_was_probed_is_suggested() -> None:
    found = advice([(0.8, looks(retain_accuracy=HARMLESS, forget_accuracy=[100, 99, 98]))], AIM)
    assert found.alpha == found.low == found.high == 0.8
    assert not found.reached
    assert any("the smallest that was probed" in line for line in found.reasons)


def test_other_probes_and_the_error_of_the_target_widen_the_range_but_do_not_speak() -> None:
    slow, fast = (
        looks(retain_accuracy=HARMLESS, forget_accuracy=curve) for curve in ([100.0, 60.0, 20.0], [100.0, 40.0, 20.0])
    )
    target = Target(accuracy=50.0, kind="classes", error=10.0)
    found = advice([(0.5, fast), (0.8, slow)], target)
    assert found.alpha == pytest.approx(1 - 12.5 / 100)
    assert found.low == pytest.approx(1 - 15 / 100)  # slow, at 40 %
    assert found.high == pytest.approx(1 - 100 / 15 / 100)  # fast, at 60 %


@pytest.mark.parametrize("accuracy", [100.0, 97.0, 93.0])
def test_where_there_is_nothing_to_bring_down_the_methods_default_is_kept(accuracy) -> None:
    seen = looks(retain_accuracy=HARMLESS, forget_accuracy=[95, 60, 20])
    target = Target(accuracy=accuracy, kind="classes", error=1.0)
    found = advice([(0.8, seen)], target)
    assert found.alpha == NegGrad().alpha
    assert found.reached
    assert found.low <= found.alpha <= found.high
    assert adviser.is_forgotten(95, target, 5)
    assert not adviser.is_forgotten(accuracy + 2.1, target, 5)
    unsure = Target(accuracy=accuracy, kind="scores", error=12.0)
    assert adviser.is_forgotten(accuracy + 4.9, unsure, 5)
    assert not adviser.is_forgotten(accuracy + 5.1, unsure, 5)  # far above it, however unsure
    harmful = looks(retain_accuracy=[100, 0, 0], forget_accuracy=[95, 60, 20])
    assert advice([(0.8, harmful)], target).alpha == pytest.approx(0.99)  # the tolerance asks for just that
    assert advice([(0.8, looks(retain_accuracy=[90, 0, 0], forget_accuracy=[95, 60, 20]))], target).alpha == 1


def test_the_clock_of_sharp_minmax_is_warned_of() -> None:
    seen = looks(retain_accuracy=HARMLESS, forget_accuracy=[100, 60, 20])
    assert adviser.UNSTEADY in advice([(0.8, seen)], AIM, SharpMinMax()).reasons
    assert adviser.UNSTEADY not in advice([(0.8, seen)], AIM).reasons


def test_an_advice_is_plain_values() -> None:
    seen = looks(retain_accuracy=HARMLESS, forget_accuracy=[100, 60, 20])
    found = adviser.plain(dataclasses.replace(advice([(0.8, seen)], AIM), balance=math.nan))
    assert found["balance"] is None
    assert found["probes"][0]["looks"][1] == {"step": 1, "ascent": 10.0} | dict(seen[1].values)
    assert found["limits"] == {"retain_accuracy": 90.0}


# --- the balance ------------------------------------------------------------------------------------------------------


def test_balanced_alpha_is_where_the_retain_loss_stands_still() -> None:
    assert adviser.balanced_alpha(1.0, 1.0) == 0.5
    assert adviser.balanced_alpha(1.0, -1.0) == 0
    assert adviser.balanced_alpha(0.0, 2.0) == 1
    assert math.isnan(adviser.balanced_alpha(0.0, -2.0))


class AsDouble(nn.Module):
    """Inputs as float64."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


def loss_on(network: nn.Module, indices: np.ndarray) -> torch.Tensor:
    batch = next(SAMPLES.batches(indices, [len(indices)], draws=None))
    return nn.functional.cross_entropy(network(batch.inputs), batch.labels)


@pytest.mark.parametrize("method", ["neggrad", "sharp_minmax"])
def test_a_small_step_at_the_balance_leaves_the_retain_loss_where_it_is(method) -> None:
    torch.manual_seed(5)
    network = nn.Sequential(nn.Flatten(), AsDouble(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    rates = {"phase_lr": {"forget": 0.05, "retain": 0.01}} if method == "sharp_minmax" else {}
    at = bench(network, run(method=method, **rates))
    balance = at.balance()
    assert 0 < balance < 1
    params = list(network.parameters())
    retain, forget = (torch.autograd.grad(loss_on(network, i), params) for i in (RETAIN, FORGET.indices))
    parts = [torch.ones_like(p) for p in params]
    if method == "sharp_minmax":
        mask = at.phases(balance)[1].region
        assert mask is not None
        parts = [mask[name].double() for name, _ in network.named_parameters()]
    split = method == "sharp_minmax"
    slopes = {}
    for alpha in (balance, balance + 0.1, balance - 0.1):
        moved = [
            rates.get("phase_lr", {}).get("forget", 1.0) * (1 - alpha) * m * f
            - rates.get("phase_lr", {}).get("retain", 1.0) * alpha * ((1 - m) if split else m) * r
            for m, r, f in zip(parts, retain, forget)
        ]
        after, step = copy.deepcopy(network), 1e-5
        with torch.no_grad():
            for p, d in zip(after.parameters(), moved):
                p += step * d
            slopes[alpha] = float(loss_on(after, RETAIN) - loss_on(network, RETAIN)) / step
    assert abs(slopes[balance]) < 1e-3 * abs(slopes[balance + 0.1])
    assert slopes[balance + 0.1] < 0 < slopes[balance - 0.1]


# --- probes against runs ----------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "neggrad": {},
    "neggrad under sam": {"rule": "sam", "rho": 0.05},
    "neggrad, sharpness of retain, looksam": {"rule": "looksam", "sharpness_on": "retain"},
    "neggrad on a share, short batches": {"retain_fraction": 0.5, "last_batch": "short", "cycle": "repeat"},
    "sharp minmax": {"method": "sharp_minmax", "rule": "asam", "rho": 0.5},
    "sharp minmax, a state each": {"method": "sharp_minmax", "rule": "sam", "rho": 0.05, "phase_steps": "separate"},
    "sharp minmax in turn": {"method": "sharp_minmax", "rule": "none", "phase_steps": "alternate"},
    "sharp minmax, a rate each": {"method": "sharp_minmax", "rule": "none", "phase_lr": {"forget": 0.005}},
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_probe_sees_what_a_run_at_its_alpha_passes_through(trained, changes, monkeypatch) -> None:
    how = run(epochs=3, **changes)
    at = bench(trained, how)
    monkeypatch.setattr(adviser, "look_steps", lambda steps: list(range(1, steps + 1)))
    probe = at.probe(0.6, at.run_steps, at.look(trained), {}, 50.0, adviser.SILENT)
    settled = dataclasses.replace(how, method=dataclasses.replace(how.method, alpha=0.6))  # type: ignore[call-arg]
    seen: list[dict[str, float]] = []

    def look(network: nn.Module) -> dict[str, float]:
        seen.append(at.look(network))
        return {}

    _, record = unlearning.run(trained, SAMPLES, FORGET.indices, RETAIN, settled, on_epoch=look)
    ends = [look.values for look in probe.looks if look.step > 0 and look.step % at.batches == 0]
    assert ends == seen
    assert len({look.values["forget_loss"] for look in probe.looks if look.step}) == at.run_steps
    asked = len(at.parts["retain"][1]) + 20
    spent = record.passes - at.preparation
    assert probe.passes == spent + round((at.run_steps + 1) * asked / 10 / 3)
    if changes.get("rule") != "looksam":  # what that takes is a mean
        assert at.run_passes() == record.passes


def test_a_probe_stops_when_it_has_left_the_tolerance_at_two_looks(trained) -> None:
    at = bench(trained, run(lr=0.3))
    start = at.look(trained)
    limits = {"retain_accuracy": start["retain_accuracy"] - 5}
    probe = at.probe(0.2, 100, start, limits, 50.0, adviser.SILENT)
    low = [look.values["retain_accuracy"] < limits["retain_accuracy"] for look in probe.looks]
    assert probe.looks[-1].step < 100
    assert low[-2:] == [True, True]
    assert not any(a and b for a, b in itertools.pairwise(low[:-1]))
    assert probe.least is not None


def test_a_probe_that_breaks_off_says_what_it_saw_before(trained) -> None:
    at = bench(trained, run(lr=1e30))
    probe = at.probe(0.5, 20, at.look(trained), {}, 50.0, adviser.SILENT)
    assert probe.failed is not None
    found = adviser.advise(trained, SAMPLES, FORGET, run(lr=1e30), AIM)
    assert any("broke off" in line for line in found.reasons)
    assert 0.8 <= found.low <= found.alpha <= found.high <= 1


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["neggrad", "sharp_minmax"])
def test_a_run_at_the_suggestion_forgets_and_the_network_is_left_as_it_was(trained, method) -> None:
    before = copy.deepcopy(trained.state_dict())
    how = run(method=method, lr=0.3, momentum=0.5, epochs=20)
    found = adviser.advise(trained, SAMPLES, FORGET, how, AIM, unseen=images(60, 1), tolerance=60.0)
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
    assert not trained.training
    assert set(found.limits) == {"retain_accuracy", "unseen_accuracy"}
    assert found.limits["retain_accuracy"] == pytest.approx(found.probes[0].looks[0].values["retain_accuracy"] - 60)
    assert [probe.alpha for probe in found.probes] == list(adviser.PROBES)
    assert found.low <= found.alpha <= found.high
    assert found.reached
    settled = dataclasses.replace(how, method=dataclasses.replace(how.method, alpha=found.alpha))  # type: ignore[call-arg]
    network, _ = unlearning.run(trained, SAMPLES, FORGET.indices, RETAIN, settled)
    after = accuracy(predict(network, SAMPLES, FORGET.indices))
    assert abs(after - AIM.accuracy) < abs(found.probes[0].looks[0].values["forget_accuracy"] - AIM.accuracy)


def test_a_bound_on_the_losses_asks_for_a_larger_alpha(trained) -> None:
    how = run(lr=0.3, momentum=0.5, epochs=20)
    loose, tight = (
        adviser.advise(trained, SAMPLES, FORGET, how, AIM, tolerance=60.0, loss_tolerance=bound)
        for bound in (None, 0.01)
    )
    start = loose.probes[0].looks[0].values
    assert tight.limits == dict(loose.limits) | {"retain_loss": start["retain_loss"] + 0.01}
    assert tight.least is not None
    assert tight.least > (loose.least or 0)


# --- bad input --------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "finetune"}, "finetune"),
    "retrain": ({"method": "retrain"}, "retrain"),
    "optimizer": ({"optimizer": "adamw"}, "adamw"),
    "clipping": ({"clip_norm": 1.0}, "clip_norm"),
    "averaging": ({"rule": "weight_averaging"}, "weight_averaging"),
    "stop": ({"stop_at": 50.0}, "stop_at"),
}


@pytest.mark.parametrize(("changes", "told"), REFUSED.values(), ids=REFUSED)
def test_a_run_without_a_clock_is_refused(changes, told) -> None:
    with pytest.raises(UserError, match=told):
        adviser.check(run(**changes))


@pytest.mark.parametrize("value", [0.0, -1.0, 101.0, math.nan, math.inf])
def test_a_tolerance_out_of_range_is_refused(value) -> None:
    with pytest.raises(UserError, match="tolerance must be points"):
        adviser.check(run(), value)
    if not 0 < value < math.inf:
        with pytest.raises(UserError, match="loss_tolerance"):
            adviser.check(run(), 5.0, value)


@pytest.mark.parametrize("probes", [(), (1.0,), (-0.1,), (0.5, 1.5)])
def test_probes_out_of_range_are_refused(probes) -> None:
    with pytest.raises(UserError, match="probes"):
        adviser.check(run(), 5.0, None, probes)


def test_what_the_run_would_refuse_is_refused_before_the_first_look(trained, monkeypatch) -> None:
    monkeypatch.setattr(adviser._Bench, "look", lambda self, network: pytest.fail("a network was looked at"))
    with pytest.raises(UserError, match="phase_schedule"):
        adviser.advise(trained, SAMPLES, FORGET, run(phase_schedule={"forget": "cosine"}), AIM)


def test_a_network_that_answers_nothing_finite_is_refused(trained) -> None:
    broken = copy.deepcopy(trained)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    with pytest.raises(NonFiniteError):
        adviser.advise(broken, SAMPLES, FORGET, run(), AIM)


# --- the recipe's arithmetic ------------------------------------------------------------------------------------------


def sweep(forget: list[float], retain: list[float]) -> list[dict[str, float]]:
    return [
        {"alpha": a, "tow": f, "forget_accuracy": f, "retain_accuracy": r, "test_accuracy": 90.0}
        for a, f, r in zip(recipe.SWEEP, forget, retain)
    ]


def test_the_sweep_is_read_on_lines_over_log_of_one_less_alpha() -> None:
    runs = sweep([0, 10, 20, 60, 80, 90, 100], [50, 60, 90, 97, 100, 100, 100])
    assert recipe.tow_at(runs, 0.9) == pytest.approx(20)
    assert recipe.tow_at(runs, 1 - math.sqrt(0.1 * 0.05)) == pytest.approx(40)
    assert recipe.tow_at(runs, 0.5) == 0
    assert recipe.tow_at(runs, 1.0) == 100
    assert recipe.forget_error_at(runs, 1 - math.sqrt(0.1 * 0.05)) == pytest.approx(60)
    assert recipe.crossing(runs, "forget_accuracy", 40) == pytest.approx(1 - math.sqrt(0.1 * 0.05))
    assert recipe.crossing(runs, "retain_accuracy", 97) == pytest.approx(0.95)
    assert recipe.crossing(runs, "retain_accuracy", 10) is None
    advised = {"target": dataclasses.asdict(Target(accuracy=40.0, kind="given")), "probes": [{"alpha": 0.8}]}
    original = {"forget_accuracy": 100.0, "retain_accuracy": 100.0, "test_accuracy": 94.0}
    row = {"runs": runs, "advice": advised, "original": original}
    found = recipe.measured(row)
    at_95 = recipe.crossing(runs, "retain_accuracy", 95)
    assert found["target"] == pytest.approx(1 - math.sqrt(0.1 * 0.05))
    assert found["least"] == at_95
    assert recipe.by_sweep(row) == max(found["target"] or 0, at_95 or 0)


def test_the_verdict_follows_the_interval() -> None:
    assert recipe.verdict([3.0, 3.1, 2.9], [1.0, 1.0, 1.0]) == "better"
    assert recipe.verdict([1.0, 1.0, 1.0], [3.0, 3.1, 2.9]) == "worse"
    assert recipe.verdict([3.0, 0.0, 1.0], [1.0, 1.0, 1.0]) == "no different"
    assert recipe.verdict([3.0], [1.0]).startswith("one seed")


def test_the_default_of_the_recipe_is_that_of_the_methods() -> None:
    assert NegGrad().alpha == SharpMinMax().alpha == recipe.DEFAULT


def test_the_page_names_the_command_that_made_it() -> None:
    given = recipe.Options(out="here", data_dir="there", scores="s.npz:x", seeds=2, tasks=("high", "low"))
    words = "".join(recipe._given(given))
    assert words == " --out DIR --data-dir DIR --scores FILE:KEY --seeds 2 --tasks high low"
