"""The acceptance checks: a part of them as they stand, and that each can fail."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unsharp.errors import UserError
from unsharp.theory.bench import SIZES, Bench, Tolerance
from unsharp.theory.check import CHECKS, run_checks

IDS = [*(f"A{i}" for i in range(1, 20)), "A19b", "A20", "A21", "A21b", "A22", "A23"]
QUICK = ["A1", "A2", "A4", "A5", "A6", "A7", "A8", "A9", "A10", "A13", "A14", "A15", "A16", "A20", "A22"]
DOCS = Path(__file__).resolve().parents[2] / "docs" / "theory.md"


def test_every_check_of_the_specification_is_there() -> None:
    assert list(CHECKS) == IDS


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in run_checks(QUICK, seed_base=0)}


@pytest.mark.parametrize("name", QUICK)
def test_the_quick_checks_pass(name: str, results: dict[str, dict[str, Any]]) -> None:
    assert results[name]["verdict"] == "pass", results[name]["got"]


@pytest.mark.slow
def test_the_others_pass_but_for_the_one_without_a_bound() -> None:
    rows = {row["id"]: row for row in run_checks([i for i in IDS if i not in QUICK and i != "A23"], seed_base=0)}
    assert {i: r["got"] for i, r in rows.items() if r["verdict"] == "fail"} == {}
    assert [i for i, r in rows.items() if r["verdict"] == "report"] == ["A19b"]


def test_results_say_what_how_and_how_long(results: dict[str, dict[str, Any]]) -> None:
    for row in results.values():
        assert set(row) == {"id", "what", "got", "accept", "verdict", "values", "seconds"}
        assert row["got"]
        assert row["accept"]
        assert "nan" not in row["got"]


def test_ids_are_taken_in_any_case_and_unknown_ones_refused() -> None:
    assert [row["id"] for row in run_checks(["a5"])] == ["A5"]
    with pytest.raises(UserError, match="unknown check 'A99'"):
        run_checks(["A5", "A99"])
    with pytest.raises(UserError, match="seed_base"):
        run_checks(["A5"], seed_base=-1)


def test_other_seeds_give_other_figures() -> None:
    got = {next(iter(run_checks(["A13"], seed_base=base)))["got"] for base in (0, 0, 40)}
    assert len(got) == 2


# --- a measurement that is out of bounds fails ------------------------------------------------------------------------


class Broken(Bench):
    """Measurements, each of them far from what must come out."""

    def against_autograd(self, phi: float) -> float:
        return 1e-9

    def against_least_squares(self, precision: str) -> dict[str, float]:
        return {"residual": 1e-12, "kappa": 1e-12, "zeta": 1e-9}

    def against_vectors(self, d: int, phi: float) -> dict[str, np.ndarray]:
        return {f"{r}_{k}": np.full(8, 0.1 if k == "reduced" else 0.15) for r in ("gd", "sam") for k in
                ("reduced", "vectors")}  # fmt: skip

    def lemma(self, perturb: str, pretrained: str | None = None) -> dict[tuple[int, float], dict[str, np.ndarray]]:
        keys = [(d, c) for d in (1000, 4000, 16000) for c in (0.25, 0.5, 1.0)]
        names = [f"deact_{s}_{t}" for s in ("retain", "forget") for t in ("same", "opposite")]
        return {key: {name: np.full(8, 0.3) for name in names} for key in keys}

    def signal_thresholds(self, d: Any, plan: Any, setup: Any, *args: Any, **more: Any) -> np.ndarray:
        return np.array([[2.0 * (x / 1000) ** 0.6 + setup.sigma_p**2] * 8 for x in d])

    def kappa_ratio(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        phi = np.arange(1.0, 11.0)
        return phi, np.stack([phi**2] * 8)

    def from_first_weights(self) -> dict[str, dict[str, np.ndarray]]:
        names = ("test_error", "forget_error", "retain_error", "kappa_mean", "zeta_forget_opposite", "zeta_retain_same")
        return {m: {name: np.full(8, 0.6) for name in names} for m in ("sgd", "ce", "retain", "joint")}

    def tolerance_in_d(self, phi: float) -> Tolerance:
        of = {"sgd": 0.01, "ce": 0.02, "retain": 0.01}
        return Tolerance({m: np.full((5, 8), v) for m, v in of.items()}, {m: np.full((5, 8), 0.5) for m in of})

    def tolerance_in_n(self, phi: float) -> Tolerance:
        found = self.tolerance_in_d(phi)
        return Tolerance(*({m: v[: len(SIZES)] for m, v in part.items()} for part in (found.star, found.forget)))

    def from_pretrained(self) -> dict[str, dict[str, np.ndarray]]:
        return {m: {"test": np.full(8, 0.5), "forget": np.full(8, 0.5)} for m in ("sgd", "joint")}

    def matched(self, d: int, phi: float, pretrain: str, perturb: str, c: float = 1.0) -> dict[str, np.ndarray]:
        value = 0.4 if perturb == "retain" else 0.1
        return {name: np.full(20, value) for name in ("test", "coarse", "steps")}


@pytest.mark.parametrize("name", [i for i in IDS if i not in ("A19b", "A23")])
def test_each_check_can_fail(name: str) -> None:
    outcome = CHECKS[name].measure(Broken())
    assert outcome.met
    assert not all(outcome.met)


def test_a_measurement_that_found_nothing_fails() -> None:
    class Nothing(Bench):
        def signal_thresholds(self, d: Any, *args: Any, **more: Any) -> np.ndarray:
            return np.full((len(d), 8), np.nan)

    for name in ("A9", "A10", "A11", "A17"):
        assert not all(CHECKS[name].measure(Nothing()).met)


def test_the_documentation_has_a_row_for_every_check() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert [i for i in IDS if not re.search(rf"^\| {i} \|", text, re.MULTILINE)] == []
