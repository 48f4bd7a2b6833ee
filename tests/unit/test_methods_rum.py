"""RUM: its parts, that it is its methods one after the other, to the bit, also after a kill, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unsharp import config as configuration
from unsharp import unlearning
from unsharp.artifacts import Workspace, perform
from unsharp.data import TensorSamples
from unsharp.data.share import share_of
from unsharp.errors import UserError
from unsharp.methods import METHODS
from unsharp.methods.base import AppliedMethod, Problem
from unsharp.methods.rum import RUM, hardness
from unsharp.sharpness import RULES
from unsharp.training import Record
from unsharp.unlearning import UnlearnConfig

N = 40
FORGET = np.arange(0, 40, 3)  # 14 samples
RETAIN = np.setdiff1d(np.arange(N), FORGET)
LOOP: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 0.05, "rule": "sam", "rho": 0.1}


def problem(ids: list[str] | None = None) -> tuple[nn.Module, TensorSamples]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
    return model.eval(), TensorSamples(torch.randn(N, 4), torch.arange(N) % 3, ids=ids)


def run(method: str, forget: np.ndarray = FORGET, model: nn.Module | None = None, **settings: Any) -> Any:
    retain = settings.pop("retain", RETAIN)
    workspace = settings.pop("workspace", None)
    own, samples = problem()
    config = unlearning.configure(method, **LOOP | settings)
    extra = {"workspace": workspace, "save_seconds": 0.0}
    return unlearning.run(own if model is None else model, samples, forget, retain, config, **extra)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


def curves(record: Record) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in record.history]


def parts_of(**settings: Any) -> list[np.ndarray]:
    """The parts, in the order in which they are named."""
    model, samples = problem()
    with torch.no_grad():
        logits = model(samples.inputs[FORGET])
    log_p = torch.log_softmax(logits.double(), 1)
    by = settings.get("difficulty", "loss")
    hard = {
        "loss": -log_p[torch.arange(len(FORGET)), torch.from_numpy(samples.labels[FORGET])],
        "confidence": -log_p.exp().max(1).values,
        "entropy": -(log_p.exp() * log_p).sum(1),
    }[by]
    ranked = sorted(range(len(FORGET)), key=lambda i: (float(hard[i]), int(FORGET[i])))
    n = settings.get("parts", 3)
    sizes = [len(FORGET) // n + (k < len(FORGET) % n) for k in range(n)]
    found, at = [], 0
    for size in sizes:
        found.append(np.sort(FORGET[ranked[at : at + size]]))
        at += size
    return found


# --- it is its methods, one after the other ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["neggrad", "saul", "sharp_minmax", "sfron"])
def test_with_one_part_it_is_the_method_to_the_bit(method: str) -> None:
    text = f"{method}:alpha=0.8" if method in ("neggrad", "sharp_minmax") else method
    found, record = run("rum", parts=1, methods=(text,))
    own = {"alpha": 0.8} if method in ("neggrad", "sharp_minmax") else {}
    loop = {"schedule": "constant", "clip_norm": None} if method == "sfron" else {}
    how = unlearning.configure(method, **LOOP | own)
    how = dataclasses.replace(how, **loop)  # what a method suggests for its loop is not for a part
    model, samples = problem()
    expected, alone = unlearning.run(model, samples, FORGET, RETAIN, how)
    assert same(found, expected)
    assert record.passes == alone.passes
    assert [{k: v for k, v in row.items() if k != "part"} for row in curves(record)] == curves(alone)
    assert {row["part"] for row in record.history} == {1}
    assert not found.training


@pytest.mark.parametrize("order", ["easiest_first", "hardest_first"])
@pytest.mark.parametrize("later", ["set_aside", "retain"])
def test_several_parts_are_the_methods_by_hand_one_after_the_other(order: str, later: str) -> None:
    methods = ("neggrad:alpha=0.9", "keep", "gradient_ascent:lr=0.003,epochs=1", "finetune")
    settings = {"parts": 4, "methods": methods, "part_order": order, "later_parts": later}
    before = state(problem()[0])
    found, record = run("rum", **settings)

    parts = parts_of(parts=4)
    assert [len(p) for p in parts] == [4, 4, 3, 3]
    by_hand = [
        ("neggrad", {"alpha": 0.9}),
        None,
        ("gradient_ascent", {"lr": 0.003, "epochs": 1}),
        ("finetune", {}),
    ]
    turn = [0, 1, 2, 3] if order == "easiest_first" else [3, 2, 1, 0]
    model, rows, passes = None, [], 0
    for place, i in enumerate(turn):
        if by_hand[i] is None:
            continue
        name, own = by_hand[i]  # type: ignore[misc]
        later_ones = [parts[j] for j in turn[place + 1 :]] if later == "retain" else []
        retain = np.sort(np.concatenate([RETAIN, *later_ones]))
        model, part = run(name, parts[i], model, retain=retain, **own)
        rows += [(i + 1, len(rows) + k + 1, row) for k, row in enumerate(curves(part))]
        passes += part.passes
    assert model is not None
    assert same(found, model)
    assert record.passes == passes + 1  # two batches forward, to score the forget samples
    assert [row["part"] for row in record.history] == [number for number, _, _ in rows]
    assert [row["epoch"] for row in record.history] == [1, 2, 3, 4, 5]
    assert [row["lr"] for row in record.history] == [row["lr"] for _, _, row in rows]
    assert all(a["seconds"] <= b["seconds"] for a, b in zip(record.history, record.history[1:]))
    assert record.seconds >= record.history[-1]["seconds"]
    assert record.about["seed"] == 0
    assert all(torch.equal(t, problem()[0].state_dict()[n]) for n, t in before.items())


def test_one_shot_methods_serve_as_well() -> None:
    found, record = run("rum", rule="none", rho=None, parts=2, methods=("ssd:selection_weight=1.5", "influence"))
    easy, hard = parts_of(parts=2)
    model, first = run("ssd", easy, rule="none", rho=None, selection_weight=1.5, epochs=None, lr=None)
    model, second = run("influence", hard, model, rule="none", rho=None, epochs=None, lr=None)
    assert same(found, model)
    assert [row["part"] for row in record.history] == [1, 2]
    assert record.passes == first.passes + second.passes + 1


def test_a_share_of_the_retained_samples_is_drawn_once() -> None:
    read = share_of(problem()[1], RETAIN, 0.5, 0)
    assert len(read) < len(RETAIN)
    found, _ = run("rum", parts=2, retain_fraction=0.5)
    model = None
    for part in parts_of(parts=2):
        model, _ = run("neggrad", part, model, retain=read)
    assert model is not None
    assert same(found, model)


@pytest.mark.parametrize("later", ["set_aside", "retain"])
@pytest.mark.parametrize("method", ["ssd:selection_weight=1.5", "influence"])
def test_a_one_shot_method_within_knows_how_many_samples_the_share_stands_for(method: str, later: str) -> None:
    """SSD and influence weigh by numbers of samples; a share that was taken for all would change the result."""
    one_shot: dict[str, Any] = {"rule": "none", "rho": None, "retain_fraction": 0.5}
    name, own = ("ssd", {"selection_weight": 1.5}) if method.startswith("ssd") else (method, {})
    found, _ = run("rum", parts=2, methods=(method, "keep"), later_parts=later, **one_shot)
    easy, hard = parts_of(parts=2)
    model, samples = problem()
    read, later_ones = share_of(samples, RETAIN, 0.5, 0), hard if later == "retain" else hard[:0]
    how = unlearning.configure(name, rule="none", batch_size=8, **own)
    task = Problem(
        model=model,
        samples=samples,
        forget=easy,
        retain=np.sort(np.concatenate([read, later_ones])),
        rule=how.rule,
        n_retained=len(RETAIN) + len(later_ones),
        batch_size=8,
    )
    assert isinstance(how.method, AppliedMethod)
    expected, _ = how.method.apply(task)
    assert same(found, expected)
    other, _ = how.method.apply(dataclasses.replace(task, n_retained=None))
    assert not same(found, other)


def test_every_part_starts_from_a_network_that_is_laid_out_as_the_original() -> None:
    """Or a run that goes on from the file of a part would round otherwise than one that was never killed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3)).eval()
    samples = TensorSamples(torch.randn(N, 3, 4, 4), torch.arange(N) % 3)
    how = unlearning.configure("rum", parts=2, **LOOP)
    found, _ = unlearning.run(model, samples, FORGET, RETAIN, how)
    assert found[0].weight.stride() == model[0].weight.stride()  # type: ignore[union-attr]
    assert not same(found, model)


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("difficulty", ["loss", "confidence", "entropy"])
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_the_parts_share_out_the_forget_set_from_easy_to_hard(difficulty: str, parts: int, tmp_path: Path) -> None:
    run("rum", parts=parts, difficulty=difficulty, epochs=1, workspace=Workspace(tmp_path))
    found = json.loads((tmp_path / "parts.json").read_text())
    assert found["difficulty"] == difficulty
    assert found["parts"] == [p.tolist() for p in parts_of(parts=parts, difficulty=difficulty)]
    assert sorted(i for part in found["parts"] for i in part) == FORGET.tolist()


def test_hardness_is_that_of_its_formulas() -> None:
    logits = np.array([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0], [-500.0, 500.0, 0.0]], np.float32)
    labels = np.array([0, 2, 0])
    p = np.exp([2.0, 0.0, -1.0]) / np.exp([2.0, 0.0, -1.0]).sum()
    assert hardness(logits, labels, "loss") == pytest.approx([-np.log(p[0]), np.log(3), 1000.0])
    assert hardness(logits, labels, "confidence") == pytest.approx([-p[0], -1 / 3, -1.0])
    assert hardness(logits, labels, "entropy") == pytest.approx([-(p * np.log(p)).sum(), np.log(3), 0.0])


def test_scores_from_a_file_take_the_place_of_the_network_and_equal_ones_go_by_id(tmp_path: Path) -> None:
    scores = np.zeros(N)
    scores[[0, 9, 30]] = 0.9, 0.5, 0.7
    np.savez(tmp_path / "scores.npz", memory=scores)
    names = [f"{(7 * i) % N:02d}" for i in range(N)]
    model, samples = problem(names)
    how = unlearning.configure("rum", parts=2, part_scores=f"{tmp_path}/scores.npz:memory", **LOOP)
    place = tmp_path / "run"
    place.mkdir()
    unlearning.run(model, samples, FORGET, RETAIN, how, workspace=Workspace(place))
    easy, hard = json.loads((place / "parts.json").read_text())["parts"]
    assert {0, 9, 30} < set(hard)
    zeros = sorted((i for i in FORGET.tolist() if scores[i] == 0), key=lambda i: names[i])
    assert set(easy) == set(zeros[:7])
    assert set(hard) == {0, 9, 30, *zeros[7:]}


# --- kills ------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5])
def test_a_killed_run_goes_on_to_the_same_bits(after: int, tmp_path: Path) -> None:
    """Killed in an epoch of any part; what was done is not done again."""
    settings = {"parts": 3, "methods": ("neggrad:alpha=0.9", "sharp_minmax:alpha=0.9", "saul"), **LOOP}
    model, samples = problem()
    how = unlearning.configure("rum", **settings)
    expected, whole = unlearning.run(model, samples, FORGET, RETAIN, how)
    calls = 0

    def look(_: nn.Module) -> dict[str, float]:
        nonlocal calls
        if calls == after and not resumed:
            raise Killed
        calls += 1
        return {}

    extra: dict[str, Any] = {"workspace": Workspace(tmp_path), "save_seconds": 0.0, "on_epoch": look}
    resumed = False
    with pytest.raises(Killed):
        unlearning.run(model, samples, FORGET, RETAIN, how, **extra)
    resumed, done, calls = True, calls, 0
    torch.manual_seed(77)
    found, record = unlearning.run(model, samples, FORGET, RETAIN, how, **extra)
    assert calls == 6 - done
    assert same(found, expected)
    assert curves(record) == curves(whole)
    assert record.passes == whole.passes


def test_the_parts_leave_nothing_but_their_names_in_the_finished_run(tmp_path: Path) -> None:
    def work(workspace: Workspace) -> None:
        run("rum", parts=2, workspace=workspace)

    done = perform(tmp_path / "run", "unlearn", {"a": 1}, work)
    assert sorted(p.name for p in done.path.iterdir()) == ["parts.json", "run.json"]


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": 0}, "parts must be at least 1"),
        ({"parts": 2, "methods": ("neggrad", "finetune", "saul")}, "one for each of 2 parts"),
        ({"methods": ()}, "one for each of 3 parts"),
        ({"methods": ("negrad",)}, "did you mean 'neggrad'"),
        ({"methods": ("neggrad:alhpa=0.9",)}, "alhpa"),
        ({"methods": ("neggrad:alpha=2",)}, "alpha must be in"),
        ({"methods": ("neggrad:alpha",)}, "KEY=VALUE"),
        ({"methods": ("neggrad:lr=0",)}, "lr must be a number above 0"),
        ({"methods": ("neggrad:epochs=1.5",)}, "epochs must be a number of at least 1"),
        ({"methods": ("rum",)}, "cannot work on a part"),
        ({"methods": ("retrain",)}, "cannot work on a part"),
        ({"methods": ("keep",)}, "nothing would be forgotten"),
        ({"methods": ("keep:alpha=1",)}, "takes no parameter"),
        ({"difficulty": "los"}, "difficulty"),
        ({"part_order": "random"}, "part_order"),
        ({"later_parts": "forget"}, "later_parts"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_configured(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        RUM(**settings)


def test_it_takes_the_rules_that_all_of_its_methods_take() -> None:
    assert all(RUM.admits(rule)[0] for rule in RULES)
    UnlearnConfig(method=RUM(methods=("neggrad", "uam", "saul")), rule=RULES["sam"]())
    for methods, rule in ((("neggrad", "uam", "saul"), "none"), (("ssd", "keep", "neggrad"), "sam")):
        refused = "uam" if rule == "none" else "ssd"
        with pytest.raises(UserError, match=f"rum: {refused} does not take rule {rule}"):
            UnlearnConfig(method=RUM(methods=methods), rule=RULES[rule]())


def test_too_few_samples_for_the_parts_are_refused_before_the_work() -> None:
    with pytest.raises(UserError, match="parts is 3, but only 2 samples"):
        run("rum", FORGET[:2])


def test_it_can_be_written_down_and_read_again() -> None:
    how = unlearning.configure("rum", parts=2, methods=["neggrad:alpha=0.9", "keep"], rule="sam", rho=0.2)
    assert how.method == RUM(parts=2, methods=("neggrad:alpha=0.9", "keep"))
    assert configuration.from_dict(UnlearnConfig, json.loads(json.dumps(configuration.to_dict(how)))) == how
    assert METHODS.name_of(type(how.method)) == "rum"
