"""Grids before and after the work: what a file spells out, refusals, costs, forecasts, tables; no cell runs here."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats as reference

from unsharp import artifacts, runtime
from unsharp.config import digest
from unsharp.engine import OptimizerConfig
from unsharp.errors import UserError
from unsharp.sweep import Cell, Result
from unsharp.sweep.cells import Failure
from unsharp.sweep.grid import Grid, table
from unsharp.sweep.grid.config import grid_from, grid_of
from unsharp.sweep.grid.forecast import Forecast, told_seconds
from unsharp.sweep.grid.live import LineWatch, TableWatch, Watch, effects_table, summary_table
from unsharp.sweep.grid.plan import Plan, kind_of
from unsharp.sweep.grid.run import look_ahead, run_grid
from unsharp.unlearning import configure

DIGITS = {"name": "digits", "classes": 3, "per_class": 20}
RANDOM = {"name": "random", "random": 6}
SMALL = {
    "data": DIGITS,
    "model": {"arch": "small_cnn", "width": 4},
    "train": {"epochs": 3, "batch_size": 16},
    "settings": {"epochs": 2, "batch_size": 16},
    "seeds": [0, 1],
    "forget": [RANDOM, {"name": "ones", "classes": [1]}],
    "unlearn": [{"method": "finetune"}, {"method": "neggrad", "rule": ["none", "sam"], "alpha": [0.9, 0.95]}],
}


def grid(**changed) -> Grid:
    return grid_of({**SMALL, **changed})


def a_grid():
    return SMALL


# --- what a file spells out -------------------------------------------------------------------------------------------


def test_a_file_a_dictionary_and_a_function_say_the_same(tmp_path, monkeypatch):
    (tmp_path / "grid.toml").write_text(
        """
        seeds = [0, 1]
        [data]
        name = "digits"
        classes = 3
        per_class = 20
        [model]
        arch = "small_cnn"
        width = 4
        [train]
        epochs = 3
        batch_size = 16
        [settings]
        epochs = 2
        batch_size = 16
        [[forget]]
        name = "random"
        random = 6
        [[forget]]
        name = "ones"
        classes = [1]
        [[unlearn]]
        method = "finetune"
        [[unlearn]]
        method = "neggrad"
        rule = ["none", "sam"]
        alpha = [0.9, 0.95]
        """
    )
    read = grid_from(tmp_path / "grid.toml")
    assert read == grid_from(str(tmp_path / "grid.toml")) == grid_from(SMALL) == grid_from(a_grid) == grid_from(read)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_grids.py").write_text(f"def first():\n    return {SMALL!r}\n")
    assert grid_from("my_grids:first") == read


def test_lists_are_spelt_out_and_the_last_setting_changes_first():
    block = {"method": "neggrad", "rule": ["none", {"name": "sam", "rho": [0.05, 0.1]}], "alpha": [0.9, 0.95]}
    variants = list(grid(unlearn=[block]).variants().values())
    found = [(v.rule, v.settings["alpha"], v.settings.get("rho")) for v in variants]
    rules = [("none", None), ("sam", 0.05), ("sam", 0.1)]
    assert sorted(found, key=str) == sorted(
        [(r, a, rho) for (r, rho), a in itertools.product(rules, (0.9, 0.95))], key=str
    )
    assert found[:3] == [("none", 0.9, None), ("none", 0.95, None), ("sam", 0.9, 0.05)]
    for variant in variants:
        assert digest(variant.how) == digest(configure("neggrad", rule=variant.rule, **variant.settings))


def test_a_block_overrides_the_settings_and_a_rule_overrides_its_block():
    shared = {"epochs": 2, "batch_size": 16, "lr": 0.01}
    blocks = [
        {"method": "finetune", "lr": 0.1},
        {"method": "neggrad", "lr": 0.02, "rule": ["none", {"name": "asam", "lr": 0.03}]},
        {"method": [{"name": "salun", "fraction": 0.2}, "random_label"], "rule": "none"},
    ]
    found = [(v.method, v.rule, v.how.optimizer.lr) for v in grid(settings=shared, unlearn=blocks).variants().values()]
    assert found == [
        ("finetune", "none", 0.1),
        ("neggrad", "none", 0.02),
        ("neggrad", "asam", 0.03),
        ("salun", "none", 0.01),
        ("random_label", "none", 0.01),
    ]


def test_a_setting_that_is_a_list_stands_in_a_list():
    (variant,) = grid(unlearn=[{"method": "rum", "methods": [["neggrad", "finetune", "neggrad"]]}]).variants().values()
    assert variant.how.method.methods == ("neggrad", "finetune", "neggrad")


def test_labels_name_what_differs_and_nothing_else():
    blocks = [
        {"method": "finetune", "lr": 0.1},
        {"method": "neggrad", "rule": ["none", {"name": "sam", "rho": [0.05, 0.1]}], "alpha": 0.9},
        {"name": "ours", "method": ["neggrad", "finetune"], "lr": 0.5, "epochs": [1, 2]},
    ]
    assert list(grid(unlearn=blocks).variants()) == [
        "finetune none",
        "neggrad none",
        "neggrad sam rho=0.05",
        "neggrad sam rho=0.1",
        *(f"ours method={m} epochs={e}" for m in ("neggrad", "finetune") for e in (1, 2)),
    ]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=1, max_size=3, unique=True), st.booleans())
def test_as_many_variants_as_combinations_with_labels_of_their_own(alphas, two_rules):
    rules = ["none", "sam"] if two_rules else "none"
    found = grid(unlearn=[{"method": "neggrad", "rule": rules, "alpha": alphas, "lr": [0.1, 0.2]}]).variants()
    assert len(found) == len(alphas) * (1 + two_rules) * 2


def test_pretrainings_differ_from_the_training_entry_by_entry():
    train = {"epochs": 3, "optimizer": {"lr": 0.2, "weight_decay": 0.1}, "rule": {"name": "sam", "rho": 0.3}}
    own = [
        {},
        {"name": "wide", "rule": {"name": "sam", "rho": 0.5}},
        {"rule": "none", "optimizer": {"lr": 0.4}},
        {"name": "adam", "optimizer": {"name": "adamw"}, "epochs": 1},
    ]
    found = grid(train=train, pretraining=own).pretrainings()
    assert list(found) == ["sam", "wide", "none", "adam"]
    assert [(how.optimizer.name, how.optimizer.lr, how.optimizer.weight_decay) for how in found.values()][:3] == [
        ("sgd", 0.2, 0.1),
        ("sgd", 0.2, 0.1),
        ("sgd", 0.4, 0.1),
    ]
    assert [getattr(how.rule, "rho", None) for how in found.values()] == [0.3, 0.5, None, 0.3]
    assert found["adam"].optimizer == OptimizerConfig(name="adamw")  # rate and decay of another are none of its own
    assert [how.epochs for how in found.values()] == [3, 3, 3, 1]


def test_relative_paths_begin_where_the_file_is(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    text = '[[unlearn]]\nmethod = "finetune"\n[data]\nname = "npz"\ndir = "data.npz"\n'
    text += '[[forget]]\nids = "ids.csv:id"\n[[forget]]\nscores = "/elsewhere/s.npz"\nlevel = "high"\nn = 3\n'
    (tmp_path / "grid.toml").write_text(text)
    monkeypatch.chdir(tmp_path / "here")
    found = grid_from("../grid.toml")
    assert Path(found.data.dir).resolve() == tmp_path / "data.npz"
    assert Path(found.forget[0]["ids"]).resolve() == tmp_path / "ids.csv:id"
    assert found.forget[1]["scores"] == "/elsewhere/s.npz"
    assert grid(data={"name": "npz", "dir": "data.npz"}).data.dir == str(tmp_path / "here" / "data.npz")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sede": [0]}, r"unknown field of grid 'sede'; did you mean 'seeds'\?"),
        ({"seeds": []}, "seeds of the grid is empty; give at least one"),
        ({"seeds": 3}, "grid.seeds must be a list, got 3"),
        ({"seeds": ["a"]}, r"grid.seeds\[0\] must be of type int, got 'a'"),
        ({"seeds": [1, 1]}, "seeds must be different, got 1, 1"),
        ({"seeds": [-1]}, "seeds must be at least 0, got -1"),
        ({"forget": {"random": 6}}, r"forget must be a list of tables; in TOML write \[\[forget\]\]"),
        (
            {"forget": [{"random": 6, "clases": [1]}]},
            r"unknown field of forget\[0\] 'clases'; did you mean 'classes'\?",
        ),
        ({"forget": [{"name": "none"}]}, r"forget\[0\]: give exactly one of random, classes, ids, scores; got none"),
        ({"forget": [RANDOM, RANDOM]}, "two forget sets are called 'random'"),
        ({"forget": [{"name": 3, "random": 6}]}, r"forget\[0\].name must be text, got 3"),
        ({"data": {"name": "digits", "size": 0}}, "size must be at least 1, got 0"),
        ({"train": {"epoch": 3}}, r"unknown field of train 'epoch'; did you mean 'epochs'\?"),
        ({"train": {"seed": 3}}, "the seeds of training are those of the grid; leave seed out of train"),
        ({"train": {"rule": "sa"}}, "unknown rule 'sa'"),
        ({"pretraining": [{"rule": "sam"}, {"rule": "sam"}]}, "two pretrainings are called 'sam'"),
        ({"pretraining": [{"rhoo": 1}]}, r"unknown field of pretraining\[0\] 'rhoo'"),
        ({"unlearn": [{"rule": "sam"}]}, r"unlearn\[0\]: the block lacks its method; give one"),
        ({"unlearn": [{"method": "negrad"}]}, r"unlearn\[0\]: unknown method 'negrad'; did you mean 'neggrad'\?"),
        (
            {"unlearn": [{"method": "finetune"}, {"method": "neggrad", "alpa": 1}]},
            r"unlearn\[1\]: unknown setting.*'alpa'",
        ),
        ({"unlearn": [{"method": "neggrad", "alpha": []}]}, "alpha is an empty list; give at least one value"),
        ({"unlearn": [{"method": []}]}, "method is an empty list; give at least one name"),
        ({"unlearn": [{"method": "neggrad", "alpha": 2.0}]}, r"alpha must .*\[0, 1\].* 2\.0"),
        ({"unlearn": [{"method": "neggrad", "seed": 2}]}, "the seeds of unlearning are those of the grid"),
        ({"unlearn": [{"method": "neggrad", "rule": [{"rho": 2}]}]}, "a rule with settings needs its name"),
        ({"unlearn": [{"method": "neggrad", "rule": [3]}]}, "rule must be a name or a table with a name, got 3"),
        ({"unlearn": [{"method": "ssd", "rule": "sam"}]}, "ssd"),
        ({"unlearn": [{"method": "finetune"}, {"method": "finetune"}]}, "'finetune none' stands there twice"),
        ({"settings": {"rule": "sam"}}, "settings: rule is no setting"),
        ({"attacks": ["svc"]}, "unknown attack 'svc'"),
        ({"baseline": "neggrad"}, "unknown baseline 'neggrad'; did you mean 'neggrad "),
        ({"outcome": "tov"}, r"unknown outcome 'tov'; did you mean 'tow'\?"),
        ({"outcome": "gap.forget_acuracy"}, "unknown outcome 'gap.forget_acuracy'; did you mean 'forget_accuracy'"),
        ({"outcome": "seconds"}, "unknown outcome 'seconds'"),
        ({"outcome": "mia"}, "unknown outcome 'mia'"),
        ({"outcome": "mia.svc_entropy.mia", "attacks": ["threshold_entropy"]}, "unknown outcome 'mia.svc_entropy.mia'"),
        ({"outcome": "entanglement.wasserstein_1"}, "is measured on features; set features = true"),
    ],
)
def test_a_mistake_is_told_by_its_place(changed, message, tmp_path):
    with pytest.raises(UserError, match=message):
        grid(**changed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"outcome": "mia.threshold_entropy.mia", "attacks": ["threshold_entropy"]},
        {"outcome": "gap.forget_accuracy"},
        {"outcome": "entanglement.wasserstein_1", "features": True},
        {"outcome": "passes"},
        {"outcome": "original.tow"},
    ],
)
def test_other_outcomes_are_taken(changed):
    assert grid(**changed).outcome == changed["outcome"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = [", r"grid\.toml is not TOML: "),
        ("seeds = [0]\n", r"grid\.toml: grid lacks unlearn, forget"),
        (
            '[[forget]]\nrandom = 6\n[[unlearn]]\nmethod = "negrad"\n',
            r"grid\.toml: unlearn\[0\]: unknown method 'negrad'",
        ),
        ('[[forget]]\nrandom = 0\n[[unlearn]]\nmethod = "finetune"\n', r"grid\.toml: forget\[0\]: random is 0: the"),
        (
            '[[forget]]\nclasses = ["x"]\n[[unlearn]]\nmethod = "finetune"\n',
            r"grid\.toml: forget set 'forget 1': .*'x'",
        ),
        (
            '[data]\nname = "npz"\ndir = "no"\n[[forget]]\nrandom = 6\n[[unlearn]]\nmethod = "finetune"\n',
            r"grid\.toml: .*no",
        ),
        ('[model]\narch = "no"\n[[forget]]\nrandom = 6\n[[unlearn]]\nmethod = "finetune"\n', r"grid\.toml: .*'no'"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_name_and_nothing_is_written(text, message, tmp_path):
    (tmp_path / "grid.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        run_grid(tmp_path / "grid.toml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no.toml", r"no\.toml does not exist; give a TOML file, or package\.module:function"),
        ("no_such_module:f", "no_such_module:f cannot be imported"),
        ("math:pi", "math:pi is a float, not a function that returns a grid"),
        ("math:nothing", "math:nothing cannot be imported"),
        ("time:time", "time:time: grid must be an object with fields"),
    ],
)
def test_what_is_no_grid_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        grid_from(given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"accelerators": 99}, "each cell is to get 99, but this machine has"),
        ({"accelerators": 0, "backend": iter}, "accelerators: the backend says it already"),
    ],
)
def test_options_are_checked_before_any_work(options, message, tmp_path):
    for function in (run_grid, look_ahead):
        with pytest.raises(UserError, match=message):
            function(SMALL, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_two_names_for_the_same_are_refused():
    for changed, message in (
        (
            {"forget": [{"name": "a", "classes": [1]}, {"name": "b", "classes": ["1"]}]},
            "forget sets 'a' and 'b' are the",
        ),
        ({"pretraining": [{}, {"name": "b", "epochs": 3}]}, "pretrainings 'none' and 'b' are the same"),
        (
            {"unlearn": [{"method": "finetune"}, {"name": "b", "method": "finetune", "rule": "none"}]},
            "'finetune none' and 'b'",
        ),
    ):
        with pytest.raises(UserError, match=message):
            Plan(grid(**changed))


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan(grid(pretraining=[{"rule": "none"}, {"rule": "sam"}], baseline="finetune none"))


def test_what_is_shared_stands_once(plan):
    kinds = [kind_of(cell) for cell in plan.cells]
    assert (kinds.count("train"), kinds.count("retrain"), kinds.count("unlearn")) == (2 * 2, 2 * 2 * 2, 5 * 2 * 2 * 2)
    assert len({cell.key for cell in plan.cells}) == len(kinds)
    for job in plan.jobs:
        trained, retrained = (need.arguments for need in job.needs)
        assert (
            trained["train"]["seed"] == retrained["train"]["seed"] == job.seed == job.cell.arguments["unlearn"]["seed"]
        )
        assert retrained["forget_hash"] == job.cell.arguments["forget_hash"] == plan.forget[job.forget].hash
        assert trained["train"]["rule"]["name"] == job.pretraining
    for cell in plan.cells:
        cell.bind(workspace=None)  # as the functions take them
    train, retrain = plan.shared[0], next(cell for cell in plan.shared if kind_of(cell) == "retrain")
    assert plan.title(train) == "training, pretraining none, seed 0"
    assert plan.title(retrain) == "training without random, pretraining none, seed 0"
    assert plan.title(plan.jobs[0].cell) == "finetune none, forget random, pretraining none, seed 0"


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({"seeds": [0, 1, 2]}, "all"),
        ({"outcome": "forget_accuracy", "baseline": "finetune none"}, "all"),
        ({"unlearn": [{"method": "neggrad", "rule": "sam", "alpha": 0.9}]}, "shared"),
        ({"attacks": ["threshold_entropy"]}, "shared"),
        ({"features": True}, "shared"),
        ({"keep_networks": True}, "shared"),
        ({"settings": {"epochs": 1, "batch_size": 16}}, "shared"),
        ({"train": {"epochs": 4, "batch_size": 16}}, "none"),
        ({"data": DIGITS | {"per_class": 19}}, "none"),
        ({"device": "cpu"}, "none"),
    ],
)
def test_another_grid_finds_what_it_shares(changed, kept):
    def keys(plan):
        return {cell.key for cell in plan.shared}, {job.cell.key for job in plan.jobs}

    (shared, cells), (others, other_cells) = keys(Plan(grid())), keys(Plan(grid(**changed)))
    assert (shared <= others) == (kept != "none")
    assert (cells <= other_cells) == (kept == "all")
    if kept == "none":
        assert not shared & others


def test_names_are_no_part_of_a_cell():
    first = Plan(grid(unlearn=[{"method": "finetune"}], forget=[RANDOM]))
    other = Plan(grid(unlearn=[{"name": "x", "method": "finetune"}], forget=[RANDOM | {"name": "y"}]))
    assert [cell.key for cell in first.cells] == [cell.key for cell in other.cells]


def test_passes_are_counted_by_hand(plan):
    n, forget = 60, 6
    trainings = {plan.passes[cell.key] for cell in plan.shared if kind_of(cell) == "train"}
    batches = math.ceil(n / 16)
    assert trainings == {3 * batches, 3 * 2 * batches}  # none, sam
    known = {row["variant"]: row["passes"] for row in plan.table()}
    retained = math.ceil((n - forget) / 16)
    assert known["finetune none"]["random"] == 2 * retained
    assert known["neggrad none alpha=0.9"]["random"] == 2 * 2 * retained  # a forget batch beside each
    assert known["neggrad sam alpha=0.9"]["random"] == 2 * 2 * 2 * retained
    assert known["finetune none"]["ones"] == 2 * math.ceil(40 / 16)


def test_a_method_that_does_not_tell_weighs_as_the_mean_of_the_others():
    plan = Plan(grid(unlearn=[{"method": "finetune"}, {"method": "neggrad"}, {"method": "retrain"}], forget=[RANDOM]))
    by_variant = {job.variant: job.cell for job in plan.jobs}
    assert plan.passes[by_variant["retrain none"].key] is None
    weights = {label: plan.weight(cell) for label, cell in by_variant.items()}
    others = [weight for label, weight in weights.items() if label != "retrain none"]
    assert weights["retrain none"] == np.mean(others)
    assert "or so, for some methods do not tell" in plan.estimate([])[1]


def test_what_is_to_be_done_is_told_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Plan, "seconds_per_pass", lambda self: 0.01)
    found = look_ahead(SMALL, tmp_path / "out", workers=2)
    passes = found["passes"]
    assert found["todo"] == {"train": 2, "retrain": 4, "unlearn": 20}
    assert (found["done"], found["failed"]) == (0, 0)
    assert found["lines"] == [
        "20 cells: 5 variants × 2 forget sets × 1 pretraining × 2 seeds",
        f"to do: 2 trainings, 4 retrainings, 20 cells; {passes:,.0f} passes",
        f"about {told_seconds(found['seconds'])}, 2 at a time (from a pass timed here, without evaluations)",
    ]
    assert found["seconds"] == pytest.approx(0.01 * passes / 2, abs=1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_pass_is_timed():
    plan = Plan(grid())
    before = {name: value.clone() for name, value in plan.model.named_parameters()}
    assert 0 < plan.seconds_per_pass() < 5
    assert all((before[name] == value).all() for name, value in plan.model.named_parameters())
    assert all(value.grad is None for value in plan.model.parameters())


# --- the forecast -----------------------------------------------------------------------------------------------------


class Weights:
    """A plan of cells whose passes are given: names such as train1."""

    def __init__(self, **weights):
        self.cells = [Cell(f"m:{name.rstrip('0123456789')}", {"name": name}) for name in weights]
        self._weights = {cell.arguments["name"]: weight for cell, weight in zip(self.cells, weights.values())}
        self.by_name = {cell.arguments["name"]: cell for cell in self.cells}

    def weight(self, cell):
        return self._weights[cell.arguments["name"]]


def test_the_time_left_follows_the_passes_of_each_kind():
    now = [0.0]
    plan = Weights(train1=10, train2=10, retrain1=8, unlearn1=4, unlearn2=2)
    forecast = Forecast(plan, {}, 1, at_first=None, clock=lambda: now[0])
    assert forecast.seconds() is None
    forecast.ended(plan.by_name["train1"], 20.0)  # 2 s a pass
    assert forecast.seconds() == 2 * (10 + 8 + 4 + 2)
    forecast.ended(plan.by_name["unlearn1"], 40.0)  # 10 s a pass; of retraining nothing is known but all passes
    assert forecast.seconds() == pytest.approx(2 * 10 + 10 * 2 + 60 / 14 * 8)
    now[0] = 3.0
    assert forecast.seconds() == pytest.approx(2 * 10 + 10 * 2 + 60 / 14 * 8 - 3)
    for name in ("train2", "retrain1"):
        forecast.ended(plan.by_name[name], None)  # failed: it tells nothing, and is over
    assert forecast.seconds() == 20
    now[0] = 100.0
    assert forecast.seconds() == 0
    forecast.ended(plan.by_name["unlearn2"], 7.0)
    forecast.ended(plan.by_name["unlearn2"], 7.0)  # once is enough
    assert forecast.seconds() == 0


def test_the_time_left_knows_how_many_run_at_a_time():
    now = [0.0]
    names = {f"unlearn{i}": 1 for i in range(8)}
    plan = Weights(**names)
    found = {plan.cells[0].key: 6.0}
    assert Forecast(plan, found, 2, clock=lambda: now[0]).seconds() == 21
    assert Forecast(plan, found, 100, clock=lambda: now[0]).seconds() == 6  # no more than there are
    assert Forecast(plan, {}, 4, at_first=3.0, clock=lambda: now[0]).seconds() == 6
    unknown = Forecast(plan, found, None, clock=lambda: now[0])
    assert unknown.seconds() == 42
    now[0] = 6.0
    for name in ("unlearn1", "unlearn2", "unlearn3"):  # three in the time of one
        unknown.ended(plan.by_name[name], 6.0)
    assert unknown.seconds() == pytest.approx(4 * 6 / 3)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 seconds"), (89, "89 seconds"), (120, "2 minutes"), (7200, "2.0 hours")]
)
def test_durations_in_words(seconds, text):
    assert told_seconds(seconds) == text


# --- tables -----------------------------------------------------------------------------------------------------------


def some_rows(seed: int, missing: float = 0.2) -> list[dict]:
    draw = np.random.default_rng(seed)
    places = itertools.product(("base", "x", "y"), ("f", "g"), ("p", "q"), range(5))
    rows = []
    for variant, forget, pretraining, at in places:
        value = None if draw.random() < missing else float(draw.normal(50, 10))
        rows.append({"variant": variant, "forget": forget, "pretraining": pretraining, "seed": at, "tow": value})
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_means_and_intervals_equal_those_of_pandas_and_scipy(seed):
    rows = some_rows(seed)
    groups = pd.DataFrame(rows).groupby(["variant", "forget", "pretraining"])["tow"]
    found = table.summary_of(rows, "tow")
    assert len(found) == groups.ngroups
    for row in found:
        values = groups.get_group((row["variant"], row["forget"], row["pretraining"])).astype(float)
        assert (row["n"], row["missing"]) == (values.count(), values.isna().sum())
        if row["n"] == 0:
            assert row["mean"] is None
            continue
        assert row["mean"] == pytest.approx(values.mean(), rel=1e-12)
        if row["n"] == 1:
            assert row["low"] is row["high"] is None
            continue
        low, high = reference.t.interval(0.95, row["n"] - 1, loc=values.mean(), scale=reference.sem(values.dropna()))
        assert (row["low"], row["high"]) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize("seed", range(5))
def test_effects_are_paired_by_seed_and_the_grid_is_one_family(seed):
    rows = some_rows(seed)
    frame = pd.DataFrame(rows).pivot(index="seed", columns=["variant", "forget", "pretraining"], values="tow")
    frame = frame.astype(float)
    found = table.effects_of(rows, "tow", "base")
    tested = [row for row in found if row["n"] > 1]
    plain = []
    for row in found:
        place = (row["forget"], row["pretraining"])
        pairs = frame[[(row["variant"], *place), ("base", *place)]].dropna().to_numpy()
        assert row["n"] == len(pairs)
        assert row["difference"] == pytest.approx((pairs[:, 0] - pairs[:, 1]).mean())
        if row["n"] > 1:
            test = reference.ttest_rel(pairs[:, 0], pairs[:, 1])
            assert row["p"] == pytest.approx(test.pvalue)
            alone = test.confidence_interval(0.95)
            together = test.confidence_interval(1 - 0.05 / len(tested))
            assert (row["low"], row["high"]) == (pytest.approx(alone.low), pytest.approx(alone.high))
            assert (row["all_low"], row["all_high"]) == (pytest.approx(together.low), pytest.approx(together.high))
            plain.append(row["p"])
    assert {row["family"] for row in found} == {len(tested)}
    ordered = sorted(tested, key=lambda row: row["p"])
    least = 0.0
    for i, row in enumerate(ordered):  # Holm
        least = max(least, min(1.0, row["p"] * (len(tested) - i)))
        assert row["p_adjusted"] == pytest.approx(least)
    assert "base" not in {row["variant"] for row in found}


def test_figures_are_single_flat_and_without_what_is_no_figure():
    metrics = {
        "mia": {"a": {"mia": 1.5, "accuracy": None}},
        "tow": 90.25,
        "curve": [1, 2],
        "gap": None,
        "reference": {"tow": 100.0, "seconds": 3.0, "reasons": {"x": "y"}, "n": {"test": 3}},
        "original": None,
        "reasons": {"gap": "none"},
        "seed": 3,
        "n": {"test": 9},
    }
    assert table.figures(metrics) == {
        "tow": 90.25,
        "original": None,
        "mia.a.mia": 1.5,
        "mia.a.accuracy": None,
        "reference.tow": 100.0,
        "reference.seconds": 3.0,
    }
    assert next(iter(table.figures(metrics))) == "tow"


def test_files_hold_the_same_bits(tmp_path):
    rows = [
        {"variant": 'a,"b"\n', "error": None, "mixed": 1, "v": 0.1 + 0.2, "text": None, "flag": True, "either": "x"},
        {"variant": "ü", "error": "no", "mixed": 2.5, "v": 1e-300, "text": "t", "flag": None, "either": 2},
    ]
    files = table.write_tables(tmp_path, rows, [{"cell": "c", "seconds": 1.5}], {"grid": {}})
    assert [file.name for file in files] == ["results.json", "results.csv", "times.csv", "results.parquet"]
    assert json.loads(files[0].read_text())["rows"] == rows
    read = list(csv.DictReader(io.StringIO(files[1].read_text())))
    assert [float(row["v"]) for row in read] == [0.1 + 0.2, 1e-300]
    assert [row["variant"] for row in read] == ['a,"b"\n', "ü"]
    assert [row["error"] for row in read] == ["", "no"]
    parquet = pd.read_parquet(files[3]).to_dict("records")
    assert [row["v"] for row in parquet] == [0.1 + 0.2, 1e-300]
    assert [row["mixed"] for row in parquet] == [1.0, 2.5]
    assert [row["either"] for row in parquet] == ["x", "2"]
    before = [file.read_bytes() for file in files]
    assert [
        file.read_bytes() for file in table.write_tables(tmp_path, rows, [{"cell": "c", "seconds": 1.5}], {"grid": {}})
    ] == before


@pytest.fixture
def partly_done(plan, tmp_path) -> dict[str, Result]:
    """Results of some cells: done with figures that were made up, failed, and one that is not there."""
    found = {}
    for i, job in enumerate(plan.jobs[:-1]):
        if i % 7 == 3:
            found[job.cell.key] = Result(job.cell, error=Failure("failed", f"no {i}"))
            continue
        path = tmp_path / job.cell.key
        metrics = {"tow": float(i), "seconds": 2.0, "gap": {"tow": -1.0, "seconds": 1.0}}
        artifacts.perform(path, "cell", {}, lambda w, metrics=metrics: w.write_json("metrics.json", metrics))
        found[job.cell.key] = Result(job.cell, path, seconds=3.0)
    return found


def test_rows_stand_in_the_order_of_the_grid_and_say_how_each_ended(plan, partly_done):
    last = plan.jobs[-1].cell.key
    rows, times = table.rows_of(plan, partly_done, {last: "not tried: training failed"})
    assert [row["cell"] for row in rows] == [time["cell"] for time in times] == [job.cell.key for job in plan.jobs]
    assert rows[3] | {} == rows[3]
    assert [rows[i]["status"] for i in (0, 3, -1)] == ["done", "failed", "blocked"]
    assert [rows[i]["error"] for i in (0, 3, -1)] == [None, "no 3", "not tried: training failed"]
    assert [rows[i]["tow"] for i in (0, 3, 4)] == [0.0, None, 4.0]
    assert len({tuple(row) for row in rows}) == len({tuple(time) for time in times}) == 1
    assert not [name for name in rows[0] if name.rpartition(".")[2] == "seconds"]
    assert (times[0]["seconds"], times[0]["gap.seconds"], times[0]["cell_seconds"]) == (2.0, 1.0, 3.0)
    assert times[0]["version.torch"] == runtime.versions()["torch"]
    own = rows[1]
    assert (own["variant"], own["method"], own["rule"]) == ("neggrad none alpha=0.9", "neggrad", "none")
    assert (own["setting.alpha"], own["setting.epochs"], rows[0]["setting.alpha"]) == (0.9, 2, None)
    assert (own["n_forget"], own["pretraining"], own["train_rule"], own["seed"]) == (6, "none", "none", 0)


def test_an_outcome_that_no_cell_has_is_told(plan, partly_done):
    rows, _ = table.rows_of(plan, partly_done, {plan.jobs[-1].cell.key: "x"})
    table.check_outcome(rows, "tow")
    with pytest.raises(UserError, match=r"the cells are done, but unknown outcome 'mia\.x'"):
        table.check_outcome(rows, "mia.x")
    table.check_outcome([row for row in rows if row["status"] != "done"], "mia.x")  # there is nothing to tell by


# --- while it runs ----------------------------------------------------------------------------------------------------


def watched(watch: Watch, plan: Plan, results: dict[str, Result]) -> None:
    forecast = Forecast(plan, {}, 1, at_first=1.0, clock=lambda: 0.0)
    watch.start(plan, forecast)
    for cell in plan.shared:
        watch.ended(Result(cell, Path("somewhere")))
        forecast.ended(cell, plan.weight(cell))
    for key, result in results.items():
        watch.ended(result)
        forecast.ended(plan.whose[key].cell, None if result.error else plan.weight(result.cell))


def test_the_line_counts_and_foresees(plan, partly_done):
    said = []
    watch = LineWatch(said.append, every=1e9)
    with watch:
        watched(watch, plan, partly_done)
        assert said == []
    n_failed = sum(result.error is not None for result in partly_done.values())
    left = f"about {plan.weight(plan.jobs[-1].cell):.0f} seconds left"
    assert said == [f"4 of 4 trained, 8 of 8 retrained, {39 - n_failed} of 40 cells, {n_failed} failed, {left}"]
    often = LineWatch(said.append, every=0.0)
    watched(often, plan, partly_done)
    assert len(said) == 1 + 12 + 39


def text_of(renderable, width: int = 100, height: int = 40) -> str:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(renderable)
    return console.file.getvalue()


def test_the_table_fills(plan, partly_done):
    watch = TableWatch(Console(file=io.StringIO(), width=200, height=40))
    assert text_of(watch.render()).strip() == ""
    with watch:
        watched(watch, plan, partly_done)
        lines = text_of(watch.render(), 200).splitlines()
    assert lines[0] == "tow: mean over the seeds done"
    by_variant = {
        line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:-1]] for line in lines if "│" in line
    }
    expected = {}
    for i, job in enumerate(plan.jobs):
        place = expected.setdefault(job.variant, {}).setdefault(f"{job.forget}, {job.pretraining}", [[], 0])
        if i < len(plan.jobs) - 1:
            place[0].extend([] if i % 7 == 3 else [i])
            place[1] += i % 7 == 3
    for variant, places in expected.items():
        for (values, lost), cell in zip(places.values(), by_variant[variant]):
            shown = f"{np.mean(values):.2f}" if values else "·"
            assert cell == f"{shown} ({len(values)}/2{f', {lost} failed' if lost else ''})"


def test_a_table_that_is_too_long_shows_what_ended_last():
    alphas = [round(0.5 + i / 100, 2) for i in range(40)]
    plan = Plan(grid(unlearn=[{"method": "neggrad", "rule": "none", "alpha": alphas}], forget=[RANDOM], seeds=[0]))
    watch = TableWatch(Console(file=io.StringIO(), width=80, height=20))
    watch.start(plan, Forecast(plan, {}, 1, at_first=1.0))
    watch.ended(Result(plan.jobs[30].cell, error=Failure("failed", "x")))
    watch.stop()
    text = text_of(watch.render(), 80, 20)
    assert len(text.splitlines()) < 20
    assert "alpha=0.8 " in text
    assert "alpha=0.5 " not in text
    assert "12 of 40 variants" in text


def test_the_tables_at_the_end(plan, partly_done):
    rows, _ = table.rows_of(plan, partly_done, {plan.jobs[-1].cell.key: "x"})
    shown = grid(pretraining=[{"rule": "none"}, {"rule": "sam"}], baseline="finetune none")
    text = text_of(summary_table(shown, table.summary_of(rows, "tow")), 140)
    assert text.startswith("tow: mean over 2 seeds ± half-width of the 95 % t interval\n")
    first = next(line for line in text.splitlines() if "│ neggrad none alpha=0.9 " in line)
    own = [row for row in rows if row["variant"] == "neggrad none alpha=0.9" and row["pretraining"] == "none"]
    values = [row["tow"] for row in own if row["forget"] == "random"]
    half = (values[1] - values[0]) / 2 * reference.t.ppf(0.975, 1)
    assert f"{np.mean(values):.2f} ± {half:.2f}" in first
    assert "(n = 1)" in text
    text = text_of(effects_table(shown, table.effects_of(rows, "tow", "finetune none")), 140)
    assert "beside 'finetune none', paired over seeds" in text
    markup = grid(unlearn=[{"name": "[red]x[/red]", "method": "finetune"}], forget=[RANDOM], seeds=[0])
    row = {
        "variant": "[red]x[/red]",
        "forget": "random",
        "pretraining": "none",
        "low": None,
        "mean": 1.0,
        "missing": 0,
        "n": 1,
    }
    assert "[red]x[/red]" in text_of(summary_table(markup, [row]))
