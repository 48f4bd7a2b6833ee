"""Rates and schedules of single phases; runs that stop by themselves; runs that break down and say so."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_report
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import unsharp
from unsharp import cli, config, stopping, unlearning
from unsharp.artifacts import Workspace
from unsharp.data import Samples, TensorSamples
from unsharp.errors import UserError
from unsharp.report.tables import summarise
from unsharp.report.verdict import verdicts
from unsharp.stopping import Breakdown, Target, forget_accuracy, told
from unsharp.training import Record
from unsharp.unlearning import UnlearnConfig, configure

N, K, BATCH = 240, 4, 16
FORGET = np.arange(0, N, 8)  # 30 samples
RETAIN = np.setdiff1d(np.arange(N), FORGET)


def samples(*, n_classes: int = K) -> TensorSamples:
    """Blobs that overlap, so that a network has to learn some of them by heart."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(N) % n_classes
    centres = 0.8 * torch.randn(n_classes, 12, generator=generator)
    return TensorSamples(centres[labels] + torch.randn(N, 12, generator=generator), labels)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    data = samples()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, K))
    (batch,) = data.batches(np.arange(N), [N], draws=None)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.inputs), batch.labels, label_smoothing=0.2).backward()
        optimizer.step()
    assert correct(model, data, FORGET) == len(FORGET)
    assert correct(model, data, RETAIN) == len(RETAIN)
    return model


@torch.no_grad()
def correct(model: nn.Module, data: Samples, positions: np.ndarray) -> int:
    """How many of the samples the network gets right, counted one by one."""
    (batch,) = data.batches(positions, [len(positions)], draws=None)
    logits = copy.deepcopy(model).eval()(batch.inputs)
    return sum(int(max(range(K), key=lambda c: row[c])) == int(y) for row, y in zip(logits.tolist(), batch.labels))


def neggrad(**settings: Any) -> UnlearnConfig:
    given = {"alpha": 0.9, "lr": 0.02, "epochs": 8, "batch_size": BATCH, "weight_decay": 0.0} | settings
    return configure("neggrad", **given)


def run(model: nn.Module, how: UnlearnConfig, **more: Any) -> tuple[nn.Module, Record]:
    return unlearning.run(model, samples(), FORGET, RETAIN, how, **more)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- rates and schedules of single phases ----------------------------------------------------------------------------


def parsed(*words: str) -> UnlearnConfig:
    return cli._parse(["unlearn", "--model", "m", "--random", "3", *words]).unlearn_config()


def test_rates_and_schedules_of_phases_on_the_command_line() -> None:
    how = parsed("--phase-lr", "forget=1e-4", "retain=2", "--phase-schedule", "forget=cosine")
    assert (how.phase_lr, how.phase_schedule) == ({"forget": 1e-4, "retain": 2.0}, {"forget": "cosine"})
    assert how == configure("sharp_minmax", phase_lr={"forget": 1e-4, "retain": 2}, phase_schedule={"forget": "cosine"})
    assert config.from_dict(UnlearnConfig, json.loads(json.dumps(config.to_dict(how)))) == how
    assert parsed().phase_lr == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--phase-lr", "forget"], r"--phase-lr must be NAME=FLOAT, such as forget=0\.001; got 'forget'"),
        (["--phase-lr", "forget=fast"], r"--phase-lr must be NAME=FLOAT.*got 'forget=fast'"),
        (["--phase-lr", "=1"], r"--phase-lr must be NAME=FLOAT.*got '=1'"),
        (["--phase-lr", "forget=1", "forget=2"], "--phase-lr names 'forget' twice"),
        (["--phase-lr", "forget=-1"], "the learning rate of phase forget must be a finite number above 0, got -1"),
        (["--phase-schedule", "forget=sine"], r"phase_schedule\.forget must be one of constant, cosine, .*'sine'"),
        (["--stop-at", "101"], r"stop_at must be a forget accuracy in \[0, 100\]"),
        (["--stop-at", "nan"], r"stop_at must be a forget accuracy in \[0, 100\]"),
        (["--stop-at", "10", "--method", "retrain"], "stop_at ends a run between two of its epochs, and retrain has"),
        (["--stop-at", "10", "--method", "scrub", "--rewind"], "both choose the last epoch"),
    ],
)
def test_values_that_cannot_be_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed(*words)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phase_lr": {"forget": "fast"}}, r"unlearn\.phase_lr\.forget must be of type float, got 'fast'"),
        ({"phase_lr": 0.1}, r"unlearn\.phase_lr must be an object, got 0\.1"),
        ({"phase_schedule": {"forget": 3}}, r"unlearn\.phase_schedule\.forget must be one of constant"),
        ({"stop_at": "never"}, "stop_at"),
        ({"stop_at": True}, "stop_at"),
        ({"stop_at": -1.0}, "stop_at must be a forget accuracy"),
    ],
)
def test_and_in_python(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        neggrad(**settings)


def test_each_phase_follows_its_own_rate(trained: nn.Module) -> None:
    """With a rate next to nothing for forgetting, the weights that forget stay; a phase by another name is refused."""
    how = configure("sharp_minmax", rule="none", epochs=1, phase_lr={"forget": 1e-12}, weight_decay=0.0, lr=0.05)
    found, _ = run(trained, how)
    both, _ = run(trained, dataclasses.replace(how, phase_lr={"forget": 0.05}))
    moved = [(weights(m) - weights(trained)).abs() > 1e-9 for m in (found, both)]
    share = [float(m.float().mean()) for m in moved]
    assert share[0] == pytest.approx(0.7, abs=0.02)
    assert share[1] == pytest.approx(1.0, abs=0.02)
    with pytest.raises(UserError, match=r"unknown phase in phase_lr 'forgot'; did you mean 'forget'"):
        run(trained, dataclasses.replace(how, phase_lr={"forgot": 0.05}))


# --- stopping --------------------------------------------------------------------------------------------------------


def curve(model: nn.Module, how: UnlearnConfig) -> list[float]:
    """Forget accuracy after each epoch of a whole run, counted by hand."""
    seen: list[float] = []

    def look(network: nn.Module) -> dict[str, float]:
        seen.append(100 * correct(network, samples(), FORGET) / len(FORGET))
        return {}

    run(model, how, on_epoch=look)
    return seen


def test_a_run_stops_after_the_first_epoch_that_has_come_down_to_the_target(trained: nn.Module) -> None:
    falls = curve(trained, neggrad())
    assert len(falls) == 8
    assert falls[0] > 80
    assert falls[-1] < 20, falls
    for target in (falls[2], (falls[2] + falls[3]) / 2, falls[4] - 1e-9):
        first = next(e for e, value in enumerate(falls, 1) if value <= target)
        lines: list[str] = []
        found, record = run(trained, neggrad(stop_at=target), say=lines.append)
        whole, short = run(trained, neggrad(epochs=first))
        assert torch.equal(weights(found), weights(whole))
        assert len(record.history) == first
        assert record.history[-1]["forget_accuracy"] == pytest.approx(falls[first - 1])
        assert record.about["stop"] == {
            "target": target,
            "of": "given",
            "epoch": first,
            "epochs": 8,
            "reached": True,
            "forget_accuracy": pytest.approx(falls[first - 1]),
        }
        assert lines == [
            f"stopped after epoch {first} of 8: forget accuracy is {falls[first - 1]:.1f} %, and was to come down to "
            f"{target:.1f} %"
        ]
        # looking at 30 samples after each epoch: two batches forward, each a third of a pass
        assert record.passes == short.passes + round(first * 2 / 3)
    assert len({next(e for e, v in enumerate(falls) if v <= t) for t in (falls[2], falls[4] - 1e-9)}) == 2


def test_all_forget_samples_decide_and_not_those_that_are_watched(trained: nn.Module) -> None:
    """The curve that is handed in says another accuracy; it is the run's own measurement that counts and is kept."""
    _, record = run(trained, neggrad(stop_at=50.0), on_epoch=lambda network: {"forget_accuracy": 0.0, "extra": 1.0})
    assert len(record.history) > 1
    assert record.history[-2]["forget_accuracy"] > 50 >= record.history[-1]["forget_accuracy"]
    assert record.history[0]["extra"] == 1.0


def test_looking_for_the_end_is_part_of_the_cost(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    def slow(*arguments: Any) -> float:
        time.sleep(0.2)
        return forget_accuracy(*arguments)

    monkeypatch.setattr(stopping, "forget_accuracy", slow)
    _, record = run(trained, neggrad(epochs=2, stop_at=0.0))
    assert record.seconds > 0.4
    assert record.history[1]["seconds"] - record.history[0]["seconds"] > 0.2


def test_a_target_that_is_never_reached_is_reported(trained: nn.Module) -> None:
    lines: list[str] = []
    found, record = run(trained, neggrad(epochs=2, stop_at=1.0), say=lines.append)
    assert torch.equal(weights(found), weights(run(trained, neggrad(epochs=2))[0]))
    assert (record.about["stop"]["reached"], record.about["stop"]["epoch"]) == (False, 2)
    assert lines == [told(record.about["stop"])]
    assert lines[0].startswith("ran all 2 epochs: forget accuracy is")


def test_a_network_that_has_nothing_to_forget_says_so(trained: nn.Module) -> None:
    lines: list[str] = []
    _, record = run(trained, neggrad(stop_at=100.0), say=lines.append)
    assert record.about["stop"]["epoch"] == 1
    assert "forget accuracy is 100.0 % before the first step" in lines[0]
    assert lines[0] == f"warning: {record.about['warnings'][0]}"


def test_the_retrained_network_says_when_to_stop(trained: nn.Module) -> None:
    other = run(trained, neggrad(epochs=3))[0]
    calls: list[int] = []

    def retrain() -> tuple[nn.Module, Record]:
        calls.append(1)
        return other, Record(history=[], seconds=1.0, passes=1, peak_memory_bytes=None)

    lines: list[str] = []
    found, record = run(trained, neggrad(stop_at="retrained"), retrain=retrain, say=lines.append)
    target = 100 * correct(other, samples(), FORGET) / len(FORGET)
    assert calls == [1]
    assert record.about["stop"] | {"forget_accuracy": 0} == {
        "target": pytest.approx(target),
        "of": "retrained",
        "epoch": 3,
        "epochs": 8,
        "reached": True,
        "forget_accuracy": 0,
    }
    assert torch.equal(weights(found), weights(other))
    assert lines[0].endswith(f"and was to come down to {target:.1f} %, that of the retrained network")
    with pytest.raises(UserError, match="stop_at 'retrained' needs to know how the model was trained"):
        run(trained, neggrad(stop_at="retrained"))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_killed_run_stops_where_it_would_have_stopped(trained: nn.Module, tmp_path: Path, at: int) -> None:
    """Killed while it looked after an epoch, once in the very one in which it stops."""
    target = curve(trained, neggrad())[3]
    how = neggrad(stop_at=target)
    whole, expected = run(trained, how)
    assert len(expected.history) == 4
    looked = 0

    def kill(network: nn.Module) -> dict[str, float]:
        nonlocal looked
        looked += 1
        if looked == at:
            raise Killed
        return {}

    with pytest.raises(Killed):
        run(trained, how, workspace=Workspace(tmp_path), on_epoch=kill)
    lines: list[str] = []
    found, record = run(trained, how, workspace=Workspace(tmp_path), say=lines.append)
    assert torch.equal(weights(found), weights(whole))
    assert record.about["stop"] == expected.about["stop"]
    assert record.passes == expected.passes
    assert len(lines) == 1
    again, record = run(trained, how, workspace=Workspace(tmp_path), say=lines.append)  # its last state says: stopped
    assert torch.equal(weights(again), weights(whole))
    assert record.about["stop"] == expected.about["stop"]


# --- breaking down ---------------------------------------------------------------------------------------------------


def watched(**changes: Any) -> Breakdown:
    start = {"retain_accuracy": 98.0, "forget_accuracy": 96.0}
    return Breakdown(**({"start": start, "epochs": 10, "retain_guess": 10.0, "forget_guess": 10.0} | changes))


def history(retain: list[float], forget: list[float]) -> list[dict[str, float]]:
    return [{"epoch": e, "retain_accuracy": r, "forget_accuracy": f} for e, (r, f) in enumerate(zip(retain, forget), 1)]


@pytest.mark.parametrize(
    ("retain", "forget", "found"),
    [
        ([98, 97, 96], [90, 60, 30], []),
        ([98, 54.0, 90], [90, 60, 30], []),  # half of what 98 % has above 10 %
        ([98, 53.9, 90], [90, 60, 30], ["epoch 2 of 10: retain accuracy has fallen from 98.0 % to 53.9 %"]),
        ([12, 11, 10], [10, 10, 10], ["epoch 1 of 10: retain accuracy has fallen from 98.0 % to 12.0 %"]),
        ([98, 97, 96], [90, 10.0, 0], ["epoch 2 of 10: forget accuracy has fallen from 96.0 % to 10.0 %"]),
        ([98, 97, 96, 95, 95, 95], [90, 80, 60, 40, 10.1, 0], []),  # below a guess in epoch 6 of 10: late enough
        ([98, 97, 96, 95, 95], [90, 80, 60, 40, 10], ["epoch 5 of 10: forget accuracy"]),
        ([98, 97, 20], [90, 5, 5], ["epoch 2 of 10: forget accuracy", "epoch 3 of 10: retain accuracy"]),
        ([98, 20, 20], [90, 50, 5], ["epoch 2 of 10: retain accuracy"]),
    ],
)
def test_what_counts_as_a_breakdown(retain: list[float], forget: list[float], found: list[str]) -> None:
    lines = watched().warnings(history(retain, forget))
    assert [line[: len(start)] for line, start in zip(lines, found)] == found
    assert len(lines) == len(found)


def test_what_cannot_be_judged_is_not() -> None:
    fallen = history([98, 97], [0, 0])
    assert watched(forget_guess=None).warnings(fallen) == []
    lost = history([10, 10], [10, 10])
    assert watched(start={"retain_accuracy": 29.9, "forget_accuracy": 29.9}).warnings(lost) == []
    assert watched(start={}).warnings(lost) == []
    assert watched().warnings([{"epoch": 1, "lr": 0.1}]) == []
    assert watched(epochs=1).warnings(history([98], [0])) == []


def test_what_a_guess_is_and_where_forgetting_may_go_so_far() -> None:
    data, start = samples(), {"retain_accuracy": 98.0, "forget_accuracy": 96.0}
    labels = data.labels

    def made(forget: np.ndarray, target: Target | None = None) -> Breakdown:
        retain = np.setdiff1d(np.arange(N), forget)
        return Breakdown.watched(data, forget, retain, start, epochs=10, target=target)

    random = made(np.arange(0, N, 7))
    assert random.retain_guess == pytest.approx(100 * np.bincount(np.delete(labels, np.arange(0, N, 7))).max() / 205)
    assert random.forget_guess == 25.0
    assert made(np.flatnonzero(labels == 2)).forget_guess is None  # a whole class
    assert made(np.flatnonzero(labels == 2)).retain_guess == pytest.approx(100 / 3)
    assert made(np.flatnonzero(labels == 2)[1:]).forget_guess == 25.0  # all but one of it
    assert made(np.arange(9)).forget_guess is None  # too few
    assert made(np.arange(10)).forget_guess == 25.0
    assert made(np.arange(10), Target(accuracy=5.0)).forget_guess is None  # somebody knows how far


def look(network: nn.Module) -> dict[str, float]:
    data = samples()
    parts = {"retain_accuracy": RETAIN, "forget_accuracy": FORGET}
    return {name: 100 * correct(network, data, at) / len(at) for name, at in parts.items()}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alpha": 0.95, "lr": 0.003}, None),
        ({}, None),  # it goes down to 3 %, but below a guess only when more than half of the epochs are over
        ({"alpha": 0.05, "lr": 0.2}, "retain accuracy has fallen from 100.0 %"),
        ({"alpha": 0.9, "lr": 0.05, "epochs": 40}, "forget accuracy has fallen from 100.0 %"),
    ],
)
def test_runs_that_break_down_say_so_once_and_others_say_nothing(
    trained: nn.Module, settings: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    lines: list[str] = []
    how = neggrad(**settings)
    found, record = run(trained, how, on_epoch=look, say=lines.append)
    silent, other = run(trained, how)
    assert torch.equal(weights(found), weights(silent))  # looking changes nothing
    assert "warnings" not in other.about
    if said is None:
        assert lines == []
        assert "warnings" not in record.about
        return
    (line,) = lines
    assert said in line
    assert line == f"warning: {record.about['warnings'][0]}"
    epoch = int(line.split()[2])
    row = next(row for row in record.history if row["epoch"] == epoch)
    kept = "retain_accuracy" if said.startswith("retain") else "forget_accuracy"
    assert f"to {row[kept]:.1f} %" in line
    assert row[kept] < (62.5 if said.startswith("retain") else 25.1)


def dies(look: Callable[[nn.Module], Mapping[str, float]], at: int) -> Callable[[nn.Module], Mapping[str, float]]:
    calls = 0

    def looked(network: nn.Module) -> Mapping[str, float]:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Killed
        return look(network)

    return looked


def test_a_warning_is_not_said_again_after_a_kill_but_kept(trained: nn.Module, tmp_path: Path) -> None:
    how, lines = neggrad(alpha=0.05, lr=0.2), []
    _, expected = run(trained, how, on_epoch=look, say=lines.append)
    epoch = int(lines[0].split()[2])
    assert epoch < 6
    before: list[str] = []
    with pytest.raises(Killed):  # the first look is at the original
        run(trained, how, on_epoch=dies(look, epoch + 3), say=before.append, workspace=Workspace(tmp_path))
    assert before == lines
    after: list[str] = []
    _, record = run(trained, how, on_epoch=look, say=after.append, workspace=Workspace(tmp_path))
    assert after == []
    assert record.about["warnings"] == expected.about["warnings"]


def test_parts_of_a_run_that_break_down_say_so_by_their_names(trained: nn.Module) -> None:
    lines: list[str] = []
    own = {"parts": 2, "methods": ("neggrad:alpha=0.05", "finetune")}
    how = configure("rum", **own, lr=0.2, epochs=8, batch_size=BATCH, weight_decay=0.0)
    _, record = run(trained, how, on_epoch=look, say=lines.append)
    assert lines == [f"warning: {line}" for line in record.about["warnings"]]
    assert len(lines) == 1
    assert lines[0].startswith("warning: part-1: epoch ")
    assert "retain accuracy has fallen from 100.0 %" in lines[0]


# --- in the report ---------------------------------------------------------------------------------------------------


def verdict_of(runs: list[dict[str, Any]]) -> dict[str, str]:
    (verdict,) = verdicts(summarise(runs))
    return {what: text.replace("\u00a0", " ") for what, text in verdict.points}


def test_the_report_says_where_runs_stopped_and_what_went_wrong() -> None:
    stop = {"target": 85.0, "of": "retrained", "epoch": 2, "epochs": 9, "reached": True, "forget_accuracy": 83.0}
    runs = [
        test_report.run(0, stop=stop),
        test_report.run(1, stop=stop | {"epoch": 4}, warnings=["epoch 3 of 9: the network <breaks> down"]),
        test_report.run(2, stop=stop | {"target": 84.0, "epoch": 9, "reached": False, "forget_accuracy": 90.0}),
    ]
    assert verdict_of(runs)["How the runs went"] == (
        "NegGrad was to stop once the forget accuracy had come down to 85.0 % or 84.0 %, that of the retrained "
        "network, within 9 epochs: after epoch 2, at 83.0 %; after epoch 4, at 83.0 %; it did not. Runs that stop by "
        "themselves differ in the number of their steps. NegGrad, seed 1: epoch 3 of 9: the network <breaks> down."
    )
    assert "the network <breaks> down" in test_report.page(runs).text
    assert "How the runs went" not in verdict_of([test_report.run()])
    assert "How the runs went" not in verdict_of([test_report.run(stop=None, warnings=[])])


# --- in Python -------------------------------------------------------------------------------------------------------


def dataset() -> TensorDataset:
    (batch,) = samples().batches(np.arange(N), [N], draws=None)
    return TensorDataset(batch.inputs, batch.labels)


def test_the_python_call_warns_and_stops(trained: nn.Module, tmp_path: Path) -> None:
    call = {"batch_size": BATCH, "weight_decay": 0.0, "method": "neggrad"}
    with pytest.warns(UserWarning, match=r"epoch \d of 8: retain accuracy has fallen") as caught:
        _, record = unsharp.unlearn(trained, dataset(), FORGET, alpha=0.05, lr=0.2, epochs=8, **call)
    assert [str(w.message) for w in caught] == record.about["warnings"]
    assert set(record.history[0]) >= {"retain_accuracy", "forget_accuracy"}
    how = unsharp.TrainConfig(epochs=6, batch_size=BATCH, optimizer=unsharp.OptimizerConfig(name="adamw", lr=0.02))

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, K))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = {"make_model": make, "train_config": how, "store": tmp_path}
        stopped = {"stop_at": "retrained", "alpha": 0.9, "lr": 0.02, "epochs": 12}
        forgotten, record = unsharp.unlearn(trained, dataset(), FORGET, **call, **stopped, **made)
    (run_of_reference,) = tmp_path.glob("retrain-*")
    assert run_of_reference.is_dir()
    stop = record.about["stop"]
    assert (stop["of"], stop["reached"]) == ("retrained", True)
    assert 100 * correct(forgotten, samples(), FORGET) / len(FORGET) == pytest.approx(stop["forget_accuracy"])
    assert stop["forget_accuracy"] <= stop["target"]
    with pytest.raises(UserError, match="stop_at 'retrained' needs to know how the model was trained"):
        unsharp.unlearn(trained, object(), FORGET, stop_at="retrained")
