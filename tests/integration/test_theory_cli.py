"""`unsharp theory` as a person uses it: every kind, what it writes and prints, checks that fail, bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from integration.helpers import call, done, read
from unsharp.commands.theory import TAKES, Theory
from unsharp.theory import check as checks

TINY = ("--n-filters", 3, "--n-test", 30, "--T", 4, "--threads", 1, "--quiet")
SWEEPS: dict[str, tuple[object, ...]] = {
    "pretrain-map": ("--d", 100, 300, "--phi", 2, 4, "--seeds", 2, "--n", 8, *TINY),
    "unlearn-map": ("--d", 100, 300, "--phi", 2, 4, "--seeds", 2, "--n", 10, "--alpha", 0.8, *TINY),
    "alpha-sweep": ("--d", 200, 800, "--phi", 6, "--seeds", 2, "--n", 10, *TINY),
    "lemma31": ("--d", 300, "--phi", 3, "--seeds", 2, "--n", 20, "--pretrain-steps", 3, *TINY),
    "trajectories": ("--d", 300, "--phi", 3, "--seeds", 2, "--n", 10, "--perturb", "sgd", "sharp_minmax", *TINY),
}
FILES = {"run.json", "rows.csv", "rows.json", "summary.json", "figure.png", "figure.svg"}
MORE = {"alpha-sweep": {"alpha.csv", "alpha.json"}, "lemma31": {"figure-mean.png", "figure-mean.svg"}}


@pytest.mark.parametrize("what", SWEEPS)
def test_a_sweep_writes_tidy_rows_a_summary_and_a_figure(what: str, here: Path) -> None:
    answer = done("theory", what, *SWEEPS[what], "--out", "run", "--json").json
    assert {p.name for p in (here / "run").iterdir()} == FILES | MORE.get(what, set())
    assert answer["run"] == "run"
    assert answer["summary"] == read(here / "run" / "summary.json")
    rows = read(here / "run" / "rows.json")
    with open(here / "run" / "rows.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) > 3
    names = {"d", "phi", "n", "n_forget", "seed", "optimiser", "perturb", "start", "tau"}
    assert names <= set(rows[0])
    assert {row["seed"] for row in rows} == {0, 1}
    for row, line in zip(rows, table):
        assert float(line["phi"]) == row["phi"]
        if "test_error" in row:
            assert float(line["test_error"]) == pytest.approx(row["test_error"])
    run = read(here / "run" / "run.json")
    assert run["config"]["sweep"]["setup"]["n_filters"] == 3
    assert {"device", "threads", "versions", "finished"} <= set(run["provenance"])


def test_a_sweep_that_is_done_is_found_done_and_another_is_refused(here: Path) -> None:
    command = ("theory", "trajectories", *SWEEPS["trajectories"], "--out", "run")
    done(*command)
    figure = (here / "run" / "figure.svg").read_bytes()
    again = done(*command, "--json").json
    assert again["reused"]
    refused = call(*command, "--eta", 0.2)
    assert refused.code == 2
    assert "run" in refused.err
    done(*command, "--force")
    assert (here / "run" / "figure.svg").read_bytes() == figure  # the same seeds draw the same lines


def test_for_a_person_every_figure_of_alpha_stands_beside_the_forget_error() -> None:
    text = done("theory", "unlearn-map", *SWEEPS["unlearn-map"], "--out", "map").out
    assert text.count("test error over d (down) and phi (across)") == 4
    assert text.count("forget error over d (down) and phi (across)") == 4
    text = done("theory", "alpha-sweep", *SWEEPS["alpha-sweep"], "--out", "alpha").out
    head = next(line for line in text.splitlines() if "one_less_alpha" in line)
    assert "forget_error" in head
    assert "start init" in text


def test_what_is_named_twice_counts_once(here: Path) -> None:
    twice = ("--d", 300, 300, "--phi", 3, "--perturb", "ce", "ce", "--start", "init", "init", "--c", 1, 1)
    done("theory", "lemma31", *twice, "--n", 20, "--seeds", 2, *TINY, "--out", "run")
    assert len(read(here / "run" / "rows.json")) == 2 * 2 * 4  # seeds, times, groups


def test_an_alpha_sweep_may_go_over_sizes(here: Path) -> None:
    sizes = ("--d", 400, "--n", 10, 20, "--phi", 6, "--seeds", 2, "--alpha", 0.5, 0.7, 0.9, *TINY)
    done("theory", "alpha-sweep", *sizes, "--out", "run")
    found = read(here / "run" / "alpha.json")
    assert {(r["n"], r["n_forget"]) for r in found} == {(10, 2), (20, 4)}
    assert "samples n" in (here / "run" / "figure.svg").read_text()


def test_the_options_reach_the_model(here: Path) -> None:
    done("theory", "unlearn-map", *SWEEPS["unlearn-map"], "--n-patches", 3, "--noise", "independent", "--flip", 0.1,
         "--sigma-p", 0.5, "--sigma-init", 0.02, "--out-scale", "sum", "--precision", "float64", "--batch-size", 3,
         "--adaptive", "--lam", 0.5, "--c", 0.7, "--eta", 0.05, "--fraction", 0.4, "--perturb", "sharp_minmax",
         "--start", "sam_pretrained", "--pretrain-steps", 2, "--n-forget", 3, "--seed-base", 7,
         "--out", "run")  # fmt: skip
    sweep = read(here / "run" / "run.json")["config"]["sweep"]
    setup = {"n": 10, "n_forget": 3, "n_filters": 3, "n_patches": 3, "sigma_p": 0.5, "sigma_0": 0.02, "flip": 0.1,
             "noise": "independent", "out_scale": "sum", "n_test": 30, "precision": "float64"}  # fmt: skip
    assert sweep["setup"] == setup
    (plan,) = sweep["plans"]
    assert plan == {"perturb": "sharp_minmax", "steps": 4, "eta": 0.05, "c": 0.7, "tau": None, "batch_size": 3,
                    "lam": 0.5, "adaptive": True, "fraction": 0.4}  # fmt: skip
    assert sweep["grid"] == {"d": [100, 300], "phi": [2.0, 4.0], "alpha": [0.8], "seeds": 2, "seed_base": 7}
    assert (sweep["start"], sweep["pretrain_steps"]) == ("sam_pretrained", 2)


def test_the_maps_without_options_are_those_that_were_asked_for() -> None:
    """77 cells, three ways; the preset of the paper's figure."""
    for options, eta, steps, radii, seeds in ((("--T", 1), 0.1, 1, [0.03, None], 5),
                                              (("--preset", "paper", "--T", 1), 0.01, 1, [0.03], 10)):  # fmt: skip
        answer = done("theory", "pretrain-map", *options, "--n-test", 5, "--threads", 1, "--quiet", "--json").json
        sweep = read(Path(answer["run"]) / "run.json")["config"]["sweep"]
        assert len(sweep["grid"]["d"]) * len(sweep["grid"]["phi"]) == 77
        assert [plan["tau"] for plan in sweep["plans"]] == [None, *radii]
        assert {plan["eta"] for plan in sweep["plans"]} == {eta}
        assert {plan["steps"] for plan in sweep["plans"]} == {steps}
        assert sweep["grid"]["seeds"] == seeds


# --- checks -----------------------------------------------------------------------------------------------------------


def test_check_prints_id_verdict_got_and_accepted() -> None:
    answer = done("theory", "check", "--id", "A5", "A7", "--threads", 1)
    lines = answer.out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["A5", "pass"], ["A7", "pass"]]
    assert all("got" in line and "accepted" in line for line in lines[:2])
    assert lines[2] == "2 passed, 0 failed, 0 reported"


def test_check_as_json_has_what_a_script_needs() -> None:
    answer = done("theory", "check", "--id", "a5", "--seed-base", 60, "--threads", 1, "--json")
    assert answer.out.count("\n") == 1
    assert answer.json["seed_base"] == 60
    (row,) = answer.json["checks"]
    assert {"id", "got", "accept", "verdict"} <= set(row)
    assert (row["id"], row["verdict"]) == ("A5", "pass")


@pytest.mark.parametrize("how", [(), ("--json",)])
def test_a_check_that_fails_is_exit_code_1(how: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(bench: Any) -> checks.Outcome:
        return checks.Outcome("nothing good", {"x": float("nan")}, [True, False])

    monkeypatch.setitem(checks.CHECKS, "A5", checks.Check("A5", "what", "much", fails))
    answer = call("theory", "check", "--id", "A5", "--threads", 1, *how)
    assert answer.code == 1
    if how:
        assert answer.json["checks"][0]["verdict"] == "fail"
        assert answer.json["checks"][0]["values"] == {"x": None}
        assert json.loads(answer.out)["fail"] == 1
    else:
        assert "0 passed, 1 failed" in answer.out


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "kind": ("maps", ["unknown kind of theory", "pretrain-map"]),
    "check": ("check --id A99", ["unknown check 'A99'", "A9"]),
    "seed base": ("check --seed-base -1", ["seed_base"]),
    "ignored by check": ("check --d 100 --alpha 0.5", ["does not take --alpha --d"]),
    "ignored by map": ("pretrain-map --alpha 0.5", ["does not take --alpha"]),
    "ignored though 0": ("check --flip 0", ["does not take --flip"]),
    "ignored by lemma": ("lemma31 --batch-size 4", ["does not take --batch-size"]),
    "preset": ("pretrain-map --preset papr", ["unknown preset", "paper"]),
    "two radii": ("trajectories --c 1 --tau 0.1", ["leave one out"]),
    "several c": ("trajectories --c 1 2", ["c takes one value here"]),
    "several alpha": ("unlearn-map --alpha 0.5 0.6", ["alpha takes one value"]),
    "several d": ("trajectories --d 100 200", ["d takes one value"]),
    "several starts": ("unlearn-map --start init sgd_pretrained", ["start takes one value"]),
    "several n": ("unlearn-map --n 10 20", ["n takes one value"]),
    "d and n": ("alpha-sweep --d 400 800 --n 10 20", ["cannot both have several"]),
    "one alpha": ("alpha-sweep --alpha 0.5", ["at least two values"]),
    "perturb": ("unlearn-map --perturb joynt", ["unknown perturb", "did you mean 'joint'"]),
    "start": ("unlearn-map --start trained", ["unknown start"]),
    "starts": ("lemma31 --start init trained", ["unknown start"]),
    "no ε": ("lemma31 --perturb sgd", ["sgd has no ε"]),
    "small d": ("pretrain-map --d 30", ["d must exceed"]),
    "noise": ("pretrain-map --noise both", ["noise must be one of"]),
    "alpha": ("unlearn-map --alpha 1.5", ["alpha must lie in"]),
    "no forget": ("unlearn-map --n-forget 0", ["needs forget samples"]),
    "seeds": ("pretrain-map --seeds 0", ["seeds must be"]),
    "phi": ("pretrain-map --phi 0 1", ["phi must be above 0"]),
    "every": ("trajectories --every 0", ["every must be"]),
    "form": ("pretrain-map --d many", ["--d"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case: str, here: Path) -> None:
    text, wanted = BAD[case]
    out = [] if text.startswith(("check", "maps")) else ["--out", "run"]
    answer = call("theory", *text.split(), *out, "--threads", 1)
    assert answer.code == 2, answer.err
    assert answer.out == ""
    assert len(answer.err.splitlines()) == 1, answer.err
    for part in wanted:
        assert part in answer.err
    assert list(here.iterdir()) == []


def test_every_option_is_taken_by_some_kind() -> None:
    taken = set.union(*TAKES.values())
    assert taken == set(Theory.__annotations__) - {"what"}
