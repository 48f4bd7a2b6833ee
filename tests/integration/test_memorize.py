"""`unsharp memorize` as its users call it: estimate, choose by it, add networks, be killed and go on."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import unsharp
from integration.helpers import QUICK, Process, call, done, wait_for
from unsharp.artifacts import RESUME_FILE
from unsharp.pool.store import Pool

pytestmark = pytest.mark.xdist_group("memorize")  # one process makes what all of them read

ASKED = ("memorize", "--data", "digits", "--epochs", 1, *QUICK, "--processes", 2, "--settle", 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memorize")
    answer = done(*ASKED, "--models", 9, "--influence", 0.4, "--store", root / "store", "--out", root / "run", "--json")
    assert answer.json["models"] == 9
    assert not answer.json["settled"]
    assert "at most 9 networks" in answer.err
    assert "disk" in answer.err
    return root


def scores_of(run: Path) -> dict[str, np.ndarray]:
    with np.load(run / "scores.npz", allow_pickle=False) as file:
        return dict(file)


def test_the_scores_are_those_of_the_pool(made: Path) -> None:
    (path,) = (made / "store").glob("pool-*")
    outputs = Pool(path).outputs()
    scores, table = scores_of(made / "run"), pd.read_parquet(made / "run" / "scores.parquet")
    for i in range(0, len(scores["memorization"]), 97):
        had = outputs.inside[:, i]
        right = outputs.train.predicted[:, i] == outputs.train.labels[i]
        expected = right[had].mean() - right[~had].mean() if had.any() and not had.all() else np.nan
        assert scores["memorization"][i] == pytest.approx(expected, abs=1e-12, nan_ok=True)
        assert table["memorization"][i] == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert scores["id"].tolist() == table["id"].tolist()
    pairs = np.load(made / "run" / "influence.npz", allow_pickle=False)
    assert outputs.test is not None
    assert (pairs["influence"] >= 0.4).all()
    assert pairs["test"].max() < len(outputs.test.labels)


def test_the_page_is_whole_and_loads_nothing(made: Path) -> None:
    page = (made / "run" / "report.html").read_text()
    assert "</html>" in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_later_run_adds_networks_to_the_same_estimate(made: Path) -> None:
    (path,) = (made / "store").glob("pool-*")
    before = {p.name for p in path.iterdir()}
    answer = done(*ASKED, "--models", 12, "--store", made / "store", "--out", made / "run", "--json")
    assert answer.json["models"] == 12
    assert "9 are there already" in answer.err
    assert before < {p.name for p in path.iterdir()}
    again = done(*ASKED, "--models", 12, "--store", made / "store", "--out", made / "run", "--json")
    assert again.json["reused"]


def test_the_hardest_are_one_option_away(tmp_path: Path) -> None:
    few, run = ("--data", "digits", "--classes", 3, "--per-class", 20), tmp_path / "run"
    done(*ASKED, *few[2:], "--fraction", 0.5, "--models", 20, "--store", tmp_path / "store", "--out", run)
    scores = scores_of(run)
    assert np.isfinite(scores["memorization"]).all()  # 20 networks that all have one of 60 samples: 1 in 10,000
    done("split", *few, "--scores", run, "--level", "high", "--n", 12, "--out", tmp_path / "split")
    chosen = json.loads((tmp_path / "split" / "split.json").read_text())["ids"]
    threshold = np.sort(scores["memorization"])[-12]
    assert (scores["memorization"][np.isin(scores["id"], chosen)] >= threshold).all()
    none = call("split", "--data", "digits", "--scores", run, "--level", "high", "--n", 12)
    assert none.code == 2
    assert "no score" in none.err


def test_a_level_alone_takes_what_the_store_knows_of_this_network(tmp_path: Path) -> None:
    store, model = ("--store", tmp_path / "store"), tmp_path / "model"
    few = ("--data", "digits", "--classes", 3, "--per-class", 20)
    done("train", *few, "--epochs", 8, "--batch-size", 10, "--threads", 1, *store, "--out", model)
    asked = ("--model", model, "--level", "high", *store)
    none = call("unlearn", *asked, "--out", tmp_path / "none")
    assert none.code == 2
    assert "unsharp memorize" in none.err
    assert not (tmp_path / "none").exists()

    quick = ("--processes", 2, "--threads", 1, "--settle", 0)
    done("memorize", "--model", model, "--models", 24, *quick, *store, "--out", tmp_path / "run")
    scores = scores_of(tmp_path / "run")
    assert np.isfinite(scores["memorization"]).all()
    done("split", *asked, "--out", tmp_path / "split")
    chosen = json.loads((tmp_path / "split" / "split.json").read_text())
    named = ("--scores", tmp_path / "run", "--n", 0.05)
    done("split", "--model", model, "--level", "high", *named, "--out", tmp_path / "named")
    assert chosen["ids"] == json.loads((tmp_path / "named" / "split.json").read_text())["ids"]
    assert chosen["n"] == 3  # a twentieth
    hardest = np.sort(scores["memorization"])[-3]
    assert (scores["memorization"][np.isin(scores["id"], chosen["ids"])] >= hardest).all()
    for level in ("low", "mix"):
        mask = done("mask", "--model", model, "--level", level, "--n", 6, *store, "--out", tmp_path / level, "--json")
        assert mask.json["stage"] == "mask"
    rule = ("--method", "neggrad", "--epochs", 1, "--threads", 1)
    done("unlearn", *asked, *rule, "--out", tmp_path / "unlearned")
    assert json.loads((tmp_path / "unlearned" / "split.json").read_text())["ids"] == chosen["ids"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("split", "--data", "digits", "--level", "high"), "--model"),
        (("unlearn", "--model", "MODEL", "--level", "hard"), "high"),
        (("unlearn", "--model", "MODEL", "--split", "x", "--level", "high"), "--level"),
        (("unlearn", "--model", "MODEL", "--level", "high", "--random", 3), "belong to scores"),
    ],
)
def test_mistakes_about_a_level_alone_are_refused(
    options: tuple[object, ...], says: str, trained: Path, tmp_path: Path
) -> None:
    given = [trained if option == "MODEL" else option for option in options]
    answer = call(*given, "--store", tmp_path / "store", "--out", tmp_path / "o")
    assert answer.code == 2
    assert says in answer.err
    assert not (tmp_path / "o").exists()


def test_holes_in_the_scores_are_refused_by_number(made: Path) -> None:
    answer = call("split", "--data", "digits", "--scores", made / "run", "--level", "high", "--n", 30)
    unknown = int(np.isnan(scores_of(made / "run")["memorization"]).sum())
    assert unknown
    assert answer.code == 2
    assert f"{unknown} samples" in answer.err


def there(root: Path, pattern: str) -> int:
    try:
        return len(list(root.glob(pattern)))
    except FileNotFoundError:  # a directory got its name while it was looked into
        return 0


def test_killed_it_goes_on_and_counts_nothing_twice(made: Path, here: Path, tmp_path: Path) -> None:
    command = (*ASKED, "--models", 9, "--store", tmp_path / "store", "--out", "run", "--save-seconds", 0.001)
    begun, shards = f"store/pool-*/.*.partial/**/{RESUME_FILE}", "store/pool-*/*/run.json"
    for pattern, count in ((begun, 1), (shards, 1), (shards, 2)):
        process = Process(here, *command)
        wait_for(lambda: not process.running or there(tmp_path, pattern) >= count)  # noqa: B023
        process.signal(signal.SIGKILL)
        assert process.end().code == -signal.SIGKILL
        if pattern == begun:
            left = {p.name for p in tmp_path.glob("store/pool-*/.*.partial")}
    done(*command[:-3], tmp_path / "run", *command[-2:])
    (path,) = (tmp_path / "store").glob("pool-*")
    assert left
    assert {name[1:].removesuffix(".partial") for name in left} <= {p.name for p in path.iterdir()}  # and were taken up
    shards = Pool(path).shards()
    assert sorted(j for shard in shards for j in shard.members) == list(range(9))
    (undisturbed,) = (made / "store").glob("pool-*")
    ours, theirs = Pool(path).outputs(), Pool(undisturbed).outputs(list(range(9)))
    assert np.array_equal(ours.train.margin, theirs.train.margin)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--models", 1), "at least 2"),
        (("--fraction", 1.5), "fraction"),
        (("--settle", 2), "settle"),
        (("--watch", "hard"), "high"),
        (("--n", 0), "forget set is empty"),
        (("--n", 5000), "1433 samples"),
        (("--stack", 0), "stack"),
        (("--influence", 0), "influence"),
        (("--minutes", 0), "minutes"),
    ],
)
def test_mistakes_are_refused_before_any_work(options: tuple[object, ...], says: str, tmp_path: Path) -> None:
    answer = call("memorize", "--data", "digits", "--store", tmp_path / "s", "--out", tmp_path / "o", *options)
    assert answer.code == 2
    assert says in answer.err
    assert not (tmp_path / "o").exists()
    assert not (tmp_path / "s").exists()


def test_own_networks_and_data_in_python(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(60, 4)
    data = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())
    asked = {"models": 10, "settle": 0, "n": 5, "stack": 2, "store": tmp_path, "fingerprint": "mine"}
    how = unsharp.TrainConfig(epochs=2, batch_size=16)
    found = unsharp.memorize(lambda: nn.Linear(4, 2), data, how, test_set=data, **asked)
    assert len(found.outputs) == 10
    assert found.outputs.test is not None
    assert found.estimate.memorization.shape == (60,)
    assert [row["models"] for row in found.rounds] == [8, 10]
    more = unsharp.memorize(lambda: nn.Linear(4, 2), data, how, test_set=data, **(asked | {"models": 14}))
    assert np.array_equal(more.outputs.train.margin[:10], found.outputs.train.margin)


@pytest.mark.parametrize(
    ("by", "options"),
    [("el2n", ("--networks", 1)), ("held_out", ("--folds", 2)), ("forgetting_events", ())],
)
def test_a_cheaper_relative_takes_its_place(by: str, options: tuple[object, ...], tmp_path: Path) -> None:
    run, data = tmp_path / "run", ("--data", "digits", "--classes", 3, "--per-class", 20)
    asked = ("--epochs", 2, *QUICK, "--by", by, *options)
    answer = done("memorize", *data, *asked, "--out", run, "--json")
    assert answer.json["kind"] == by
    done("split", *data, "--scores", run, "--level", "high", "--n", 5, "--out", tmp_path / "split")
    again = done("memorize", *data, *asked, "--out", run, "--json")
    assert again.json["reused"]


def test_a_relative_looks_at_the_network_that_is_named(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done("memorize", "--model", trained, "--by", "final_confidence", "--out", run)
    done("split", "--model", trained, "--scores", run, "--level", "high", "--n", 5, "--out", tmp_path / "split")
    none = call("memorize", "--data", "digits", "--by", "final_confidence", "--out", tmp_path / "none")
    assert none.code == 2
    assert "--model" in none.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--by", "hardness"), "held_out"),
        (("--by", "el2n", "--folds", 3), "folds"),
        (("--folds", 3), "--by"),
        (("--address", "here:1"), "--backend"),
        (("--backend", "cloud"), "local"),
    ],
)
def test_mistakes_about_proxies_and_backends_are_refused(
    options: tuple[object, ...], says: str, tmp_path: Path
) -> None:
    answer = call("memorize", "--data", "digits", "--out", tmp_path / "o", *options)
    assert answer.code == 2
    assert says in answer.err
    assert not (tmp_path / "o").exists()
