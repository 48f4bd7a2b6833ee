"""Attacks, relearning and surroundings of an unlearned network as a person asks for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import load_file

from integration.helpers import QUICK, Answer, call, done, read, steady, tree
from unsharp.evaluation import attack_stage
from unsharp.evaluation.landscape import Landscape
from unsharp.evaluation.relearning import Attack
from unsharp.evaluation.sharpness import WorstCaseSharpness

FEW = ("--data", "digits", "--per-class", 12, "--augment", "none", "--width", 4)
COMMANDS: dict[str, tuple[object, ...]] = {
    "attack": ("--networks", 20, "--attacks", "lira", "rmia", "--pool-fraction", 0.5, "--stack", 20, "--processes", 1),
    "relearn": ("--epochs", 2, "--seeds", 2, "--n", 5, "--watched", 40, "--original", "ORIGINAL"),
    "landscape": ("--points", 3, "--n-samples", 20, "--steps", 2, "--restarts", 1, "--draws", 2, "--most-steps", 5,
                  "--trace-draws", 6, "--density-draws", 1, "--density-steps", 4, "--original", "ORIGINAL"),
    "robustness": ("--corruptions", "gaussian_noise", "contrast", "--severities", 2, 5, "--original", "ORIGINAL"),
}  # fmt: skip
FILES = {
    "attack": {"attack.json", "roc.svg", "run.json"},
    "relearn": {"relearning.json", "relearning.svg", "report.html", "run.json"},
    "landscape": {"landscape.json", "surfaces.safetensors", "sharpness.svg", "ways.svg", "run.json",
                  *(f"{kind}-{on}.svg" for kind in ("surface", "spectrum") for on in ("retain", "forget", "test"))},
    "robustness": {"robustness.json", "robustness.svg", "run.json"},
}  # fmt: skip
VALUES = {"attack": "attack.json", "relearn": "relearning.json", "landscape": "landscape.json",
          "robustness": "robustness.json"}  # fmt: skip
SAYS = {"attack": "TPR at 1 % FPR", "relearn": "in excess", "landscape": "barrier in the loss",
        "robustness": "points lost"}  # fmt: skip
ONE = ("--attacks", "threshold_confidence", "--threads", 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small network, what it was after it forgot, and a store."""
    root = tmp_path_factory.mktemp("around")
    done("train", *FEW, "--out", root / "original", "--epochs", 4, *QUICK)
    how = ("--method", "neggrad", "--epochs", 1, "--lr", 0.02, *QUICK)
    done("unlearn", "--model", root / "original", "--random", 12, "--out", root / "unlearned", *how)
    return root


@pytest.fixture(scope="module")
def ran(place: Path) -> Callable[[str], Answer]:
    """The first call of each command, into `place`/COMMAND."""
    answers: dict[str, Answer] = {}

    def run(name: str) -> Answer:
        if name not in answers:
            answers[name] = done(*line(name, place), "--out", place / name)
        return answers[name]

    return run


def line(name: str, place: Path) -> tuple[object, ...]:
    """The command on the network of `place`."""
    own = [place / "original" if word == "ORIGINAL" else word for word in COMMANDS[name]]
    return (name, place / "unlearned", *own, "--store", place / "store", "--threads", 1)


def finite(values: Any) -> bool:
    """Whether nested values hold no number that JSON cannot."""
    if isinstance(values, (dict, list)):
        return all(finite(v) for v in (values.values() if isinstance(values, dict) else values))
    return not isinstance(values, float) or bool(np.isfinite(values))


@pytest.mark.parametrize("name", list(COMMANDS))
def test_it_writes_a_whole_run_and_says_what_it_costs_and_found(name: str, place: Path, ran: Any) -> None:
    answer = ran(name)
    assert {path.name for path in (place / name).iterdir()} == FILES[name]
    for picture in (place / name).glob("*.svg"):
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert "about" in answer.err  # how long it will take, before
    assert SAYS[name] in answer.out
    assert finite(read(place / name / VALUES[name]))


@pytest.mark.parametrize("name", list(COMMANDS))
def test_it_is_found_done_and_told_as_one_json_object(name: str, place: Path, ran: Any) -> None:
    ran(name)
    before = tree(place / name)
    again = done(*line(name, place), "--out", place / name, "--json")
    assert again.json["reused"] is True
    assert again.json["stage"] == name
    assert {k: v for k, v in again.json.items() if k not in ("run", "stage", "reused")} == read(
        place / name / VALUES[name]
    )
    assert tree(place / name) == before
    other = call(*line(name, place), "--seed", 7, "--out", place / name)
    assert other.code == 2
    assert "seed" in other.err


def test_an_attack_asks_the_retrained_network_the_same(place: Path, ran: Any) -> None:
    ran("attack")
    found = read(place / "attack" / "attack.json")
    assert found["networks"]["pool"] == 20
    for figures in found["attacks"].values():
        for who in ("unlearned", "retrained"):
            area = figures[who]["auc"]
            assert 0 <= area["low"] <= area["value"] <= area["high"] <= 1
            assert [rate["fpr"] for rate in figures[who]["at"]] == [0.001, 0.01]
            # a rate that so few scores cannot tell is not told
            assert all((r["tpr"] is None) == (figures[who]["n_others"] < r["needed"]) for r in figures[who]["at"])


def test_relearning_begins_alike_for_every_attack_and_has_its_intervals(place: Path, ran: Any) -> None:
    ran("relearn")
    found = read(place / "relearn" / "relearning.json")["attacks"]
    assert set(found) == {"forget", "retain"}
    for one in found.values():
        rows = one["rows"]
        assert {(r["model"], r["seed"], r["epoch"]) for r in rows} == {
            (m, s, e) for m in ("unlearned", "retrained") for s in (0, 1) for e in (0.0, 1.0, 2.0)
        }
        assert all(r["distance"] == 0 and r["to_original"] == 1 for r in rows if r["epoch"] == 0)
        ends = {(r["model"], r["seed"]): r for r in rows if r["epoch"] == 2}
        starts = {(r["model"], r["seed"]): r for r in rows if r["epoch"] == 0}
        gains = {key: ends[key]["forget_accuracy"] - starts[key]["forget_accuracy"] for key in ends}
        excess = [gains["unlearned", s] - gains["retrained", s] for s in (0, 1)]
        assert one["recovery"]["unlearned"]["excess"]["mean"] == pytest.approx(np.mean(excess))
        assert one["recovery"]["unlearned"]["excess"]["n"] == 2


def test_surroundings_stand_beside_those_of_the_retrained_network(place: Path, ran: Any) -> None:
    ran("landscape")
    found = read(place / "landscape" / "landscape.json")
    assert found["networks"] == ["original", "unlearned", "retrained"]
    for on in ("retain", "forget", "test"):
        row = {network: found["sharpness"][network][on]["sam"]["rise"] for network in found["networks"]}
        assert all(rise > 0 for rise in row.values())
        assert found["gap"][on]["sam_rise"] == pytest.approx(row["unlearned"] - row["retrained"])
    grids = load_file(place / "landscape" / "surfaces.safetensors")
    assert any(array.shape[-2:] == (3, 3) for array in grids.values())
    assert set(found["connectivity"]) == {"original to unlearned", "original to retrained"}


def test_corrupted_accuracies_stand_beside_clean_ones(place: Path, ran: Any) -> None:
    ran("robustness")
    found = read(place / "robustness" / "robustness.json")
    said = done(
        "evaluate", place / "unlearned", "--out", place / "clean", "--store", place / "store", *ONE, "--json"
    ).json
    for on, one in found["sets"].items():
        assert one["clean"]["unlearned"] == pytest.approx(said[f"{on}_accuracy"])
        assert one["clean"]["retrained"] == pytest.approx(said["reference"][f"{on}_accuracy"])
        rows = [one["corrupted"][name][severity] for name in ("gaussian_noise", "contrast") for severity in ("2", "5")]
        for network in ("original", "unlearned", "retrained"):
            assert one["mean"][network] == pytest.approx(np.mean([row[network] for row in rows]))
        assert one["drop_gap"]["mean"] == pytest.approx(one["drop"]["unlearned"] - one["drop"]["retrained"])


def test_a_network_trained_on_corrupted_images_keeps_them(place: Path, here: Path) -> None:
    done("train", *FEW, "--corrupt", "gaussian_noise:2", "--out", here / "noisy", "--epochs", 6, *QUICK)
    how = ("--method", "neggrad", "--epochs", 1, *QUICK)
    done("unlearn", "--model", here / "noisy", "--random", 12, "--out", here / "forgot", *how)
    config = read(here / "forgot" / "run.json")["config"]["origin"]
    assert config["data"]["corrupt"] == "gaussian_noise:2"
    other = call("unlearn", "--model", here / "noisy", *FEW[:6], "--random", 12, "--out", here / "clean", *how)
    assert other.code == 2
    assert "the data are not those" in other.err


def test_parts_and_sets_may_be_left_out(place: Path, here: Path) -> None:
    some = ("--parts", "distance", "--on", "forget", "--out", here / "run", "--store", place / "store", "--threads", 1)
    answer = done("landscape", place / "unlearned", *some)
    assert set(read(here / "run" / "landscape.json")) & {"sharpness", "curvature", "surface"} == set()
    assert "apart" in answer.out


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_store_that_cannot_be_written_is_refused_before_any_work(name: str, place: Path, here: Path) -> None:
    (here / "file").write_text("")
    words = [here / "file" / "store" if word == place / "store" else word for word in line(name, place)]
    answer = call(*words, "--out", here / "run")
    assert answer.code == 2
    assert "--store" in answer.err
    assert "cannot be written" in answer.err
    assert {path.name for path in here.iterdir()} == {"file"}


# --- interrupted ------------------------------------------------------------------------------------------------------


def stop(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was done before")


def test_an_interrupted_landscape_goes_on(place: Path, ran: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran("landscape")
    with monkeypatch.context() as patch:
        patch.setattr(Landscape, "measure", stop)
        assert call(*line("landscape", place), "--out", here / "run").code == 130
    assert not (here / "run").exists()
    with monkeypatch.context() as patch:
        patch.setattr(WorstCaseSharpness, "measure", never)
        done(*line("landscape", place), "--out", here / "run")
    found, expected = (read(path / "landscape.json") for path in (here / "run", place / "landscape"))
    assert steady(found) == steady(expected)
    assert {path.name for path in (here / "run").iterdir()} == FILES["landscape"]


def test_interrupted_relearning_goes_on(place: Path, ran: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran("relearn")
    whole, count = Attack.run, [0]

    def counted(*arguments: Any, **how: Any) -> Any:
        count[0] += 1
        return stop() if count[0] == 4 else whole(*arguments, **how)

    monkeypatch.setattr(Attack, "run", counted)
    assert call(*line("relearn", place), "--out", here / "run").code == 130
    assert count == [4]
    done(*line("relearn", place), "--out", here / "run")
    assert count == [4 + 5]  # of eight curves three were whole
    assert read(here / "run" / "relearning.json") == read(place / "relearn" / "relearning.json")


def test_an_interrupted_attack_trains_no_network_again(
    place: Path, ran: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran("attack")
    with monkeypatch.context() as patch:
        patch.setattr(attack_stage, "find_reference", stop)
        assert call(*line("attack", place), "--out", here / "run").code == 130
    answer = done(*line("attack", place), "--out", here / "run")
    assert "all 20 networks of each pool are there" in answer.err
    assert read(here / "run" / "attack.json") == read(place / "attack" / "attack.json")


@pytest.mark.slow
def test_the_method_is_asked_by_pools_that_forgot_and_never_had(place: Path, here: Path) -> None:
    words = ("--attacks", "u-lira", "--networks", 4, "--pool-fraction", 1.0, "--processes", 2, "--store", here / "s")
    done("attack", place / "unlearned", *words, "--out", here / "run", "--threads", 1)
    found = read(here / "run" / "attack.json")
    assert found["networks"] == {"pool": 4, "fewest_had": 4, "fewest_never_had": 0, "unlearned": 4, "oracles": 4}
    assert found["attacks"]["u_lira"]["unlearned"]["n_members"] == 4 * 12
    assert 0 <= found["attacks"]["u_lira"]["unlearned"]["auc"]["value"] <= 1


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("attack", "RUN", "--networks", 8), ["8 networks", "are enough", "--networks"]),
        (("attack", "RUN", "--attacks", "lirra"), ["lirra", "did you mean 'lira'"]),
        (("attack", "RUN", "--gamma", 0), ["gamma", "above 0"]),
        (("attack", "RUN", "--form", "online", "--against", "samples"), ["form", "offline"]),
        (("attack", "original"), ["'train'", "'unlearn'"]),
        (("relearn", "RUN", "--n", 12), ["12 samples", "fewer"]),
        (("relearn", "RUN", "--on", "other"), ["--other-data"]),
        (("relearn", "RUN", "--on", "retian"), ["did you mean 'retain'"]),
        (("relearn", "RUN", "--on", "other", "--other-data", "cifar"), ["did you mean 'cifar10'"]),
        (("landscape", "RUN", "--points", 4), ["points", "odd"]),
        (("landscape", "RUN", "--parts", "surf"), ["surf", "connectivity, curvature, distance, sharpness, surface"]),
        (("landscape", "RUN", "--rho", -1), ["rho", "above 0"]),
        (("landscape", "RUN", "--original", "nothing"), ["nothing", "does not exist"]),
        (("robustness", "RUN", "--corruptions", "sno"), ["did you mean 'snow'"]),
        (("robustness", "RUN", "--severities", 6), ["severities", "1 to 5"]),
        (("train", "--corrupt", "sno:3"), ["did you mean 'snow'"]),
    ],
)
def test_mistakes_end_with_one_line_before_any_work(
    words: tuple[object, ...], says: list[str], place: Path, here: Path
) -> None:
    known = {"RUN": place / "unlearned", "original": place / "original"}
    answer = call(*(known.get(str(word), word) for word in words), "--store", here / "store", "--out", here / "out")
    assert answer.code == 2
    assert answer.out == ""
    assert len(answer.err.splitlines()) == 1
    assert all(text in answer.err for text in says), answer.err
    assert not (here / "out").exists()
