"""The command line as a person uses it: stage by stage, in one go, again, interrupted, on own data and networks."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import unsharp
from integration.helpers import QUICK, Process, call, done, python, read, sha256, steady, tree, wait_for
from unsharp.data import DataConfig, load
from unsharp.tracking import flat

REAL = Path(os.environ.get("UNSHARP_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
NEGGRAD = ("--method", "neggrad", "--epochs", 1, "--lr", 0.02, *QUICK)
ATTACKS = ("--attacks", "threshold_confidence", "svc_correctness")
VALUES = {"retain_accuracy", "forget_accuracy", "test_accuracy", "tow", "tow_signed", "mia", "seconds", "passes",
          "peak_memory_bytes"}  # fmt: skip


@pytest.fixture(scope="module")
def flow(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with every stage, one after the other, each called as a user would."""
    root = tmp_path_factory.mktemp("flow")
    split = ("--split", root / "split")
    done("split", "--model", trained, "--random", 40, "--out", root / "split", "--threads", 1)
    done("mask", "--model", trained, *split, "--out", root / "mask", "--threads", 1)
    done("unlearn", "--model", trained, *split, "--out", root / "unlearned", *NEGGRAD)
    how = ("--original", trained, "--store", root / "store", *ATTACKS, "--threads", 1)
    done("evaluate", root / "unlearned", "--out", root / "evaluated", *how)
    done("report", root / "evaluated", "--out", root / "report.html")
    return root


def test_wrong_labels_are_put_right_from_a_file(trained: Path, here: Path) -> None:
    labels = load(DataConfig()).train.labels
    ids = list(range(20, 40))
    (here / "ids.txt").write_text("\n".join(map(str, ids)))
    np.savez(here / "right.npz", ids=ids, labels=(labels[ids] + 1) % 10)
    how = ("--model", trained, "--ids", "ids.txt", "--method", "second_order", "--select", "hessian", "--fraction", 0.1,
           "--n-probes", 2, "--hessian-samples", 50, "--cg-steps", 3, *QUICK)  # fmt: skip
    done("unlearn", *how, "--corrected", "right.npz", "--out", "right")
    done("unlearn", *how, "--out", "removed")
    before, right, removed = (load_file(p / "model.safetensors") for p in (trained, here / "right", here / "removed"))
    assert any(not right[name].equal(removed[name]) for name in right)
    moved = {name: right[name] != before[name] for name in right}
    weights = sum(w.numel() for name, w in right.items() if not re.search("running|num_batches", name))
    assert 0 < sum(int(m.sum()) for m in moved.values()) <= round(0.1 * weights)
    assert read(here / "right" / "record.json")["about"]["corrections"]
    assert read(here / "right" / "run.json")["config"]["corrections"]
    for out in ("right", "removed"):
        done("evaluate", out, "--out", f"{out}-judged", "--store", "store", *ATTACKS, "--threads", 1)
    told = read(here / "right-judged" / "about.json")["corrections"]
    assert told == {"digest": read(here / "right" / "record.json")["about"]["corrections"], "n": 20}
    assert "corrections" not in read(here / "removed-judged" / "about.json")
    refused = call("unlearn", *how, "--method", "neggrad", "--corrected", "right.npz", "--out", "other")
    assert refused.code == 2
    np.savez(here / "right.npz", ids=ids[1:], labels=labels[ids[1:]])
    refused = call("unlearn", *how, "--corrected", "right.npz", "--out", "other")
    assert refused.code == 2
    assert "lack 20" in refused.err
    assert not (here / "other").exists()


def json_numbers(values: Any) -> list[float]:
    if isinstance(values, dict):
        return [n for v in values.values() for n in json_numbers(v)]
    return [values] if isinstance(values, (int, float)) else []


def test_each_stage_writes_a_whole_run(flow: Path) -> None:
    expected = {
        "split": {"run.json", "split.json"},
        "mask": {"run.json", "mask.safetensors"},
        "unlearned": {"run.json", "model.safetensors", "record.json", "split.json", "before.json"},
        "evaluated": {"run.json", "metrics.json", "about.json", "embedding.svg"},
        "report.html": set(),
        "store": {p.name for p in (flow / "store").iterdir()},
    }
    assert {p.name for p in flow.iterdir()} == set(expected)
    for name, files in expected.items():
        if name != "report.html":
            assert {p.name for p in (flow / name).iterdir()} == files
    run = read(flow / "unlearned" / "run.json")
    assert run["stage"] == "unlearn"
    assert run["config"]["unlearn"]["method"]["name"] == "neggrad"
    assert {"device", "threads", "versions", "finished"} <= set(run["provenance"])
    assert read(flow / "split" / "split.json")["n"] == 40
    n = sum(t.numel() for t in load_file(flow / "mask" / "mask.safetensors").values())
    assert sum(int(t.sum()) for t in load_file(flow / "mask" / "mask.safetensors").values()) == round(0.3 * n)


def test_metrics_have_their_keys_and_scales(flow: Path) -> None:
    metrics = read(flow / "evaluated" / "metrics.json")
    assert set(metrics) >= VALUES
    assert set(metrics["mia"]) == {"threshold_confidence", "svc_correctness"}
    shares = [v for k, v in metrics.items() if k in VALUES and k.endswith(("accuracy", "tow", "mia"))]
    assert all(0 <= number <= 100 for share in shares for number in json_numbers(share))
    assert metrics["retain_accuracy"] > 50  # a percentage, no fraction
    for part in ("gap", "reference", "original"):
        assert set(metrics[part]) >= VALUES
    assert metrics["reference"]["tow"] == 100.0
    for name in ("retain_accuracy", "forget_accuracy", "test_accuracy", "tow", "passes"):
        assert metrics["gap"][name] == pytest.approx(metrics[name] - metrics["reference"][name])
    confidence = [m["mia"]["threshold_confidence"]["mia"] for m in (metrics, metrics["gap"], metrics["reference"])]
    assert confidence[1] == pytest.approx(confidence[0] - confidence[2])
    assert metrics["n"] == {"retain": 1393, "forget": 40, "test": 364}
    gaps = [abs(metrics["gap"][f"{part}_accuracy"]) / 100 for part in ("forget", "retain", "test")]
    assert metrics["tow"] == pytest.approx(100 * np.prod([1 - g for g in gaps]))


def test_forget_in_one_go_equals_the_stages(flow: Path, trained: Path, here: Path) -> None:
    split, store = ("--split", flow / "split"), ("--store", flow / "store")
    before = tree(trained), tree(flow)
    done("forget", "--model", trained, *split, *store, "--out", "out", *NEGGRAD, *ATTACKS)
    assert (tree(trained), tree(flow)) == before
    assert {p.name for p in here.iterdir()} == {"out"}
    assert {p.name for p in (here / "out").iterdir()} == {
        "run.json", "model.safetensors", "record.json", "metrics.json", "about.json", "report.html", "audit.json",
        "audit.html",
    }  # fmt: skip
    assert steady(read(here / "out" / "metrics.json")) == steady(read(flow / "evaluated" / "metrics.json"))
    weights = load_file(here / "out" / "model.safetensors"), load_file(flow / "unlearned" / "model.safetensors")
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_the_new_checkpoint_can_be_the_next_ones_input(flow: Path, here: Path) -> None:
    """A second deletion request starts from the first one's result."""
    done("unlearn", "--model", flow / "unlearned", "--random", 20, "--split-seed", 1, "--out", "out", *NEGGRAD)
    assert (here / "out" / "model.safetensors").is_file()


def test_json_is_one_object_on_standard_output(flow: Path, trained: Path, here: Path) -> None:
    runs = {
        "split": ("--random", 9, "--out", "s"),
        "mask": ("--model", trained, "--split", "s", "--out", "m"),
        "unlearn": ("--model", trained, "--split", "s", "--out", "u", *NEGGRAD),
        "evaluate": ("u", "--out", "e", *ATTACKS),
        "report": ("e", "--out", "r.html"),
        "forget": ("--model", trained, "--split", "s", "--out", "f", *NEGGRAD, *ATTACKS),
        "train": ("--epochs", 1, "--out", "t", *QUICK),
        "list": ("methods",),
        "show": ("e",),
        "doctor": (),
    }
    answers = {command: done(command, *arguments, "--json") for command, arguments in runs.items()}
    for answer in answers.values():
        assert isinstance(answer.json, dict)
        assert answer.out.count("\n") == 1
    assert set(answers["evaluate"].json) >= VALUES | {"gap"}
    assert steady({k: answers["evaluate"].json[k] for k in VALUES}) == steady(
        {k: v for k, v in read(here / "e" / "metrics.json").items() if k in VALUES}
    )
    assert answers["train"].json.items() >= {"run": "t", "stage": "train", "reused": False}.items()
    assert "wrote: t" in answers["train"].err


def test_reports_and_listings_are_for_people_too(flow: Path) -> None:
    for what in ("methods", "rules", "metrics", "data", "models"):
        listed = done("list", what)
        assert listed.out
        rows = done("list", what, "--json").json[what]
        assert all(rows[0].keys() == row.keys() for row in rows)
    assert {row["name"] for row in done("list", "methods", "--json").json["methods"]} >= {
        "retrain", "finetune", "gradient_ascent", "neggrad", "sharp_minmax"
    }  # fmt: skip
    metrics = done("list", "metrics", "--json").json["metrics"]
    assert all(row[k] for row in metrics for k in ("formula", "better", "ideal", "source"))
    doctor = done("doctor", "--json").json
    assert doctor["step works"] is True
    assert {"torch", "device", "store", "extras"} <= set(doctor)
    assert "step works" in done("doctor").out
    shown = json.loads(done("show", flow / "evaluated").out)
    assert shown["stage"] == "evaluate"
    assert shown["metrics"] == read(flow / "evaluated" / "metrics.json")
    assert "neggrad" in done("report", flow / "evaluated", "--out", "r.html").out.lower()


class Links(HTMLParser):
    """Everything that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        here = ("#", "data:")
        self.found += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith(here)]


def test_the_report_is_one_offline_file(flow: Path) -> None:
    page = (flow / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert links.found == []
    assert "<script src" not in page
    assert "@import" not in page
    assert "url(http" not in page


def test_quickstart_tiny(here: Path) -> None:
    answer = done("quickstart", "--tiny", "--no-open", "--workers", 2, "--out", "quick", "--json")
    rows = answer.json["rows"]
    assert (here / "quick" / "report.html").is_file()
    assert {row["label"] for row in rows} >= {"Original", "Retrained"}
    assert len(rows) >= 8
    before = tree(here)
    again = done("quickstart", "--tiny", "--no-open", "--workers", 2, "--out", "quick", "--json")
    assert again.json["rows"] == rows
    models = [path for path in before if path.endswith("model.safetensors")]
    assert models
    assert all(tree(here)[path] == before[path] for path in models)


def test_identical_work_is_found_and_force_redoes_it(trained: Path, here: Path) -> None:
    command = ("unlearn", "--model", trained, "--random", 30, "--out", "out", *NEGGRAD)
    first = done(*command, "--json").json
    content, seen = tree(here), (here / "out" / "run.json").stat().st_mtime_ns
    again = done(*command, "--json")
    assert (first["reused"], again.json["reused"]) == (False, True)
    assert "found done: out" in again.err
    assert (tree(here), (here / "out" / "run.json").stat().st_mtime_ns) == (content, seen)
    assert done(*command, "--force", "--json").json["reused"] is False
    assert (here / "out" / "run.json").stat().st_mtime_ns > seen
    assert tree(here)["out/model.safetensors"] == content["out/model.safetensors"]
    assert {p.name for p in here.iterdir()} == {"out"}
    other = call(*command, "--alpha", 0.5)
    assert other.code == 2
    assert "unlearn.method.alpha" in other.err
    assert tree(here)["out/model.safetensors"] == content["out/model.safetensors"]
    assert done(*command, "--alpha", 0.5, "--force", "--json").json["reused"] is False
    assert tree(here)["out/model.safetensors"] != content["out/model.safetensors"]


def test_without_out_a_run_is_named_by_content(trained: Path, here: Path) -> None:
    command = ("split", "--model", trained, "--random", 30, "--threads", 1, "--json")
    first, other = done(*command).json, done(*command, "--split-seed", 1).json
    assert Path(first["run"]).parent == Path("runs")
    assert first["run"] != other["run"]
    assert done(*command).json == first | {"reused": True}


def test_the_reference_is_kept_by_content(trained: Path, here: Path, tmp_path: Path) -> None:
    store = tmp_path / "references"

    def evaluate(name: str, model: Path, *forget: object, train_config: Path | None = None) -> set[str]:
        """Evaluate an unlearning and return the names of the references that it added."""
        known = {p.name for p in store.iterdir()} if store.exists() else set()
        done("unlearn", "--model", model, *forget, "--out", f"u-{name}", *NEGGRAD)
        how = () if train_config is None else ("--train-config", train_config)
        done("evaluate", f"u-{name}", "--out", f"e-{name}", "--store", store, "--attacks",
             "threshold_confidence", "--threads", 1, *how)  # fmt: skip
        return {p.name for p in store.iterdir()} - known

    forget = ("--random", 30)
    (reference,) = evaluate("first", trained, *forget)
    made = tree(store), (store / reference / "run.json").stat().st_mtime_ns
    done("evaluate", "u-first", "--out", "e-again", "--store", store, *ATTACKS, "--threads", 1)
    assert (tree(store), (store / reference / "run.json").stat().st_mtime_ns) == made
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(read(here / "u-first" / "split.json")["ids"][::-1]))
    assert evaluate("same-ids", trained, "--ids", ids) == set()
    assert len(evaluate("other-ids", trained, *forget, "--split-seed", 1)) == 1
    changed = read(trained / "run.json")["config"]["origin"]["train"] | {"label_smoothing": 0.1}
    (tmp_path / "train.json").write_text(json.dumps(changed))
    assert len(evaluate("other-training", trained, *forget, train_config=tmp_path / "train.json")) == 1
    done("train", "--epochs", 3, *QUICK, "--seed", 1, "--out", "seed-1")
    assert len(evaluate("other-seed", here / "seed-1", *forget)) == 1
    done("train", "--epochs", 3, *QUICK, "--per-class", 60, "--out", "less-data")
    assert len(evaluate("other-data", here / "less-data", *forget)) == 1


def test_retraining_as_a_method_is_the_reference(trained: Path, here: Path) -> None:
    done("unlearn", "--model", trained, "--random", 30, "--method", "retrain", "--out", "u", "--threads", 1)
    metrics = done("evaluate", "u", "--out", "e", *ATTACKS, "--threads", 1, "--json").json
    apart = flat(metrics["gap"])
    differing = {k for k, v in apart.items() if v != 0 and not k.endswith("half_width")}  # an uncertainty is no gap
    assert differing <= {"seconds", "peak_memory_bytes"}
    assert {"forget_accuracy", "mia/threshold_confidence/mia"} <= apart.keys()
    assert metrics["tow"] == 100.0


# --- networks and data from elsewhere ---------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(trained: Path, tmp_path: Path) -> dict[str, Path]:
    """One network in the layouts in which others write it."""
    weights = load_file(trained / "model.safetensors")
    wrapped = {f"module._orig_mod.{k}": v for k, v in weights.items()}
    paths = {name: tmp_path / name for name in ("plain.pt", "nested.pt", "lightning.pth", "plain.safetensors")}
    torch.save(weights, paths["plain.pt"])
    torch.save({"epoch": 7, "state_dict": wrapped, "optimizer": {"lr": 0.1}}, paths["nested.pt"])
    torch.save({"model": {f"_orig_mod.module.{k}": v for k, v in weights.items()}}, paths["lightning.pth"])
    save_file(weights, paths["plain.safetensors"])
    return paths


@pytest.mark.parametrize("name", ["plain.pt", "nested.pt", "lightning.pth", "plain.safetensors"])
def test_a_foreign_checkpoint(name: str, checkpoints: dict[str, Path], trained: Path, here: Path) -> None:
    (here / "ids.csv").write_text("id\n3\n14\n159\n")
    before = {path: sha256(path) for path in (checkpoints[name], here / "ids.csv")}
    what = ("--arch", "small_cnn", "--data", "digits", "--ids", "ids.csv")
    answer = done("forget", "--model", checkpoints[name], *what, "--out", "out", *NEGGRAD, *ATTACKS, "--json").json
    assert {path: sha256(path) for path in before} == before
    done("unlearn", "--model", trained, "--ids", "ids.csv", "--out", "own", *NEGGRAD)
    weights = load_file(here / "out" / "model.safetensors"), load_file(here / "own" / "model.safetensors")
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[1])
    assert answer["gap"] is None
    assert answer["tow"] is None
    assert answer["tow_signed"] is None
    assert "--train-config" in answer["reasons"]["gap"]
    assert answer["reasons"]["tow"]
    assert answer["mia"]["threshold_confidence"]["mia"] is not None
    assert "--train-config" in (here / "out" / "report.html").read_text()


def test_a_training_configuration_makes_the_reference(checkpoints: dict[str, Path], trained: Path, here: Path) -> None:
    how = read(trained / "run.json")["config"]["origin"]["train"]
    (here / "train.json").write_text(json.dumps(how))
    what = ("--arch", "small_cnn", "--data", "digits", "--random", 30, "--train-config", "train.json")
    foreign = done("forget", "--model", checkpoints["plain.pt"], *what, "--out", "a", *NEGGRAD, *ATTACKS, "--json").json
    own = done("forget", "--model", trained, "--random", 30, "--out", "b", *NEGGRAD, *ATTACKS, "--json").json
    assert foreign["tow"] is not None
    assert steady(foreign["gap"]) == steady(own["gap"])


def digits(test: bool = True) -> dict[str, np.ndarray]:
    splits = load(DataConfig(), "cpu")
    arrays = {}
    for name, samples in (("train", splits.train), ("test", splits.test)):
        if name == "train" or test:
            arrays[f"{name}_x"] = samples.images.numpy()  # pyright: ignore
            arrays[f"{name}_y"] = samples.labels  # pyright: ignore
    return arrays


def save_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    return path


def foreign(model: Path, data: Path, *more: object) -> tuple[object, ...]:
    return ("forget", "--model", model, "--arch", "small_cnn", "--data", "npz", "--data-dir", data, "--random", 30,
            "--out", "out", "--augment", "none", *NEGGRAD, *ATTACKS, "--json", *more)  # fmt: skip


def test_the_order_of_classes(checkpoints: dict[str, Path], tmp_path: Path, here: Path) -> None:
    """The data count their classes in another order than the network does."""
    arrays = digits()
    names = list("3456789012")
    place = np.array([names.index(str(i)) for i in range(10)])
    turned = {k: place[v] if k.endswith("_y") else v for k, v in arrays.items()}
    data = save_npz(tmp_path / "turned.npz", class_names=np.array(names), **turned)
    refused = call(*foreign(checkpoints["plain.pt"], data))
    assert refused.code == 2
    assert refused.out == ""
    assert len(refused.err.splitlines()) == 1
    for text in ("no better than a guess", "preprocessing", "--class-order", "--mean"):
        assert text in refused.err
    assert tree(here) == {}
    (tmp_path / "order.txt").write_text("\n".join("0123456789"))
    answer = done(*foreign(checkpoints["plain.pt"], data, "--class-order", tmp_path / "order.txt")).json
    assert answer["original"]["retain_accuracy"] > 80


def test_preprocessing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Images at half the brightness and twice the size are brought back by --mean, --std and --size."""
    arrays = digits()
    for name in ("train_x", "test_x"):
        arrays[name] = arrays[name].repeat(2, axis=1).repeat(2, axis=2) // 2
    data = save_npz(tmp_path / "other.npz", **arrays)
    right = ("--mean", 0.25, "--std", 0.125, "--size", 8)
    answer = done(*foreign(checkpoints["plain.pt"], data, *right)).json
    assert answer["original"]["retain_accuracy"] > 80
    plain = call(*foreign(checkpoints["plain.pt"], data, "--force"))
    assert plain.code == 2 or plain.json["original"]["retain_accuracy"] < answer["original"]["retain_accuracy"] - 5


def test_it_warns_where_the_training_samples_are_not_known_better(
    checkpoints: dict[str, Path], tmp_path: Path, here: Path
) -> None:
    arrays = digits()
    wrong = np.random.default_rng(0).random(len(arrays["train_y"])) < 0.3
    arrays["train_y"] = np.where(wrong, (arrays["train_y"] + 1) % 10, arrays["train_y"])
    answer = done(*foreign(checkpoints["plain.pt"], save_npz(tmp_path / "noisy.npz", **arrays)))
    (warning,) = [line for line in answer.err.splitlines() if line.startswith("warning")]
    assert "no better than on the test samples" in warning
    assert (here / "out" / "metrics.json").is_file()


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_a_missing_test_set_is_allowed_and_said(kind: str, trained: Path, tmp_path: Path, here: Path) -> None:
    arrays, data = digits(test=False), tmp_path / "data"
    if kind == "npz":
        data = save_npz(tmp_path / "data.npz", **arrays)
    else:
        for i, (image, label) in enumerate(zip(arrays["train_x"][:300], arrays["train_y"])):
            (data / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(data / str(label) / f"{i}.png")
    what = ("--data", kind, "--data-dir", data, "--arch", "small_cnn")
    done("train", *what, "--epochs", 4, *QUICK, "--lr", 0.05, "--batch-size", 16, "--out", "t")
    answer = done("forget", "--model", "t", "--random", 30, "--out", "out", *NEGGRAD, "--json")
    assert "there is no test set" in answer.err
    assert answer.json["test_accuracy"] is None
    assert answer.json["n"]["test"] is None
    assert answer.json["reasons"]["test_accuracy"]
    assert answer.json["gap"]["retain_accuracy"] is not None
    assert "no test" in (here / "out" / "report.html").read_text().lower()


@pytest.mark.parametrize("show", [False, True])
def test_a_deletion_names_no_sample_unless_asked(show: bool, trained: Path, tmp_path: Path, here: Path) -> None:
    arrays = digits()
    names = np.array([f"person-{i:05d}" for i in range(len(arrays["train_y"]))])
    tests = np.array([f"tester-{i:05d}" for i in range(len(arrays["test_y"]))])
    data = save_npz(tmp_path / "people.npz", train_name=names, test_name=tests, **arrays)
    wanted = names[[3, 14, 159, 265]]
    ids = tmp_path / "request-from-jane.txt"
    ids.write_text("\n".join(wanted))
    what = ("--arch", "small_cnn", "--data", "npz", "--data-dir", data, "--id-column", "name", "--ids", ids)
    save_file(load_file(trained / "model.safetensors"), tmp_path / "plain.safetensors")
    done("forget", "--model", tmp_path / "plain.safetensors", *what, "--out", "out", *NEGGRAD, *ATTACKS,
         *(["--show-samples"] if show else []))  # fmt: skip
    page = (here / "out" / "report.html").read_text()
    assert all((name in page) == show for name in wanted)
    if not show:
        for path in (here / "out").iterdir():
            content = path.read_bytes()
            assert b"person-" not in content, path.name
            assert b"jane" not in content, path.name


def test_a_report_of_stages_names_no_sample_unless_asked(flow: Path, here: Path) -> None:
    ids = read(flow / "split" / "split.json")["ids"]
    done("report", flow / "evaluated", "--out", "named.html", "--show-samples")
    named, hidden = (here / "named.html").read_text(), (flow / "report.html").read_text()
    section = re.search(r'<section id="samples".*?</section>', named, re.DOTALL)
    assert section is not None
    assert set(map(str, ids)) <= set(re.findall(r"\d+", section[0]))
    assert 'id="samples"' not in hidden


def test_ids_from_files_of_every_kind(here: Path) -> None:
    ids = [3, 14, 159, 265]
    (here / "a.txt").write_text("# by request\n" + "\n".join(map(str, ids)) + "\n")
    (here / "b.csv").write_text("id,why\n" + "\n".join(f"{i},x" for i in reversed(ids)))
    (here / "c.csv").write_text("who,number\n" + "\n".join(f"x,{i}" for i in ids))
    (here / "d.json").write_text(json.dumps(ids))
    (here / "e.json").write_text(json.dumps({"ids": [str(i) for i in ids]}))
    hashes = set()
    for spec in ("a.txt", "b.csv", "c.csv:number", "d.json", "e.json"):
        done("split", "--ids", spec, "--out", f"out-{spec[0]}", "--threads", 1)
        made = read(here / f"out-{spec[0]}" / "split.json")
        hashes.add(made["hash"])
        assert made["ids"] == ids
    assert len(hashes) == 1
    done("split", "--ids", "out-a/split.json", "--out", "again", "--threads", 1)
    assert read(here / "again" / "split.json")["hash"] in hashes


def test_a_list_of_ids_may_be_headed_as_the_data_call_them(tmp_path: Path, here: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", x=images, y=np.arange(20) % 2, name=[f"person-{i}" for i in range(20)])
    (here / "alone.csv").write_text("name\nperson-7\n")
    (here / "beside.csv").write_text("id,name\nA-1,person-7\n")
    (here / "other.csv").write_text("who\nperson-7\n")
    own = ("split", "--data", "npz", "--data-dir", tmp_path / "own.npz", "--id-column", "name", "--threads", 1)
    for file in ("alone", "beside"):
        done(*own, "--ids", f"{file}.csv", "--out", file)
        assert read(here / file / "split.json")["ids"] == ["person-7"]
    answer = call(*own, "--ids", "other.csv", "--out", "other")
    assert answer.code == 2
    assert "who" in answer.err
    assert "look like 'person-0'" in answer.err


def hub_directory(root: Path, name: str, splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    """Images as the hub keeps them: parquet files with encoded images and labels."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image, label = ("img", "fine_label") if name.startswith("cifar100") else ("image", "label")
    root.mkdir(exist_ok=True)
    for split, (images, labels) in splits.items():
        files = []
        for array in images:
            buffer = io.BytesIO()
            Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(buffer, "PNG")
            files.append({"bytes": buffer.getvalue(), "path": None})
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        features = {
            image: {"_type": "Image"},
            label: {"names": [f"class {i}" for i in range(int(labels.max()) + 1)], "_type": "ClassLabel"},
        }
        table = pa.table({image: pa.array(files, type=kind), label: pa.array(labels.astype(np.int64))})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, root / f"{split}-00000-of-00001.parquet")
    return root


@pytest.mark.skipif(not (REAL / "fashion_mnist_small.npz").exists(), reason=f"no real images in {REAL}")
def test_real_images_in_the_hubs_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with np.load(REAL / "fashion_mnist_small.npz") as real:
        splits = {split: (real[f"{split}_x"], real[f"{split}_y"]) for split in ("train", "test")}
    data = hub_directory(tmp_path / "fashion", "fashion_mnist", splits)
    what = ("--data", "fashion_mnist", "--data-dir", data)
    done("train", *what, "--epochs", 15, "--lr", 0.01, "--batch-size", 20, "--threads", 1, "--out", "t")
    forget = ("--forget-classes", "class 0", "--method", "finetune", "--epochs", 1, *QUICK)
    answer = done("forget", "--model", "t", *forget, "--out", "out", *ATTACKS, "--json").json
    assert answer["n"] == {"retain": 180, "forget": 20, "test": 100}
    assert answer["original"]["retain_accuracy"] > 50
    assert answer["reference"]["forget_accuracy"] == 0  # a class that it never saw


# --- the process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shell_completion(shell: str) -> None:
    answer = call("--tyro-print-completion", shell)
    assert answer.code == 0
    assert "unsharp" in answer.out


def test_help_names_every_command() -> None:
    answer = call("--help")
    assert answer.code == 0
    for command in ("quickstart", "train", "split", "mask", "unlearn", "evaluate", "report", "forget", "list", "show",
                    "doctor"):  # fmt: skip
        assert command in answer.out
        assert call(command, "--help").code == 0


def test_version() -> None:
    answer = call("--version")
    assert (answer.code, answer.out) == (0, f"unsharp {unsharp.__version__}\n")


def test_help_begins_with_what_the_command_alone_has() -> None:
    options = re.findall(r"--[a-z][a-z-]*", call("forget", "--help").out)
    assert options[1:3] == ["--model", "--out"]
    assert options[-2:] == ["--json", "--quiet"]


def test_in_a_process_of_its_own(here: Path) -> None:
    answer = python("-m", "unsharp", "train", "--epochs", "1", *QUICK, "--out", "out", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["run"] == "out"
    assert answer.out.count("\n") == 1
    with safe_open(here / "out" / "model.safetensors", framework="pt") as file:
        assert "origin" in json.loads(file.metadata()["unsharp"])


def test_a_failure_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    diverges = call("train", "--epochs", 2, *QUICK, "--lr", 1e30, "--optimizer", "sgd", "--out", "out")
    assert diverges.code == 1
    assert [line.partition(":")[0] for line in diverges.err.splitlines()] == ["training", "unsharp"]
    assert not (here / "out").exists()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("something unforeseen")

    monkeypatch.setattr("unsharp.stages.train", broken)
    answer = call("train", "--epochs", 1, *QUICK, "--out", "other")
    assert answer.code == 1
    assert "something unforeseen" in answer.err
    assert len(answer.err.splitlines()) == 1


@pytest.mark.parametrize("command", ["train", "forget"])
def test_an_interrupt_keeps_what_is_finished(command: str, trained: Path, here: Path) -> None:
    what = () if command == "train" else ("--model", trained, "--random", 30, "--method", "finetune", *ATTACKS)
    arguments = (command, *what, "--epochs", 12, *QUICK, "--save-seconds", 0.05)
    process = Process(here, *arguments, "--out", "out")
    wait_for(lambda: any(here.rglob("resume.pt")))
    process.signal(signal.SIGINT)
    answer = process.end()
    assert answer.code == 130, answer.err
    assert "interrupted" in answer.err
    assert "Traceback" not in answer.err
    assert not (here / "out").exists()
    assert any(here.rglob("resume.pt"))
    done(*arguments, "--out", "out")
    done(*arguments, "--out", "undisturbed")
    for name in ("metrics.json", "record.json"):
        assert steady(read(here / "out" / name)) == steady(read(here / "undisturbed" / name))
    assert sha256(here / "out" / "model.safetensors") == sha256(here / "undisturbed" / "model.safetensors")
