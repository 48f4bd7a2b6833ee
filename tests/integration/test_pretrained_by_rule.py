"""Every method, under AdamW and a sharpness rule, from a network that was pretrained under both."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from integration.helpers import QUICK, done, read
from unsharp.methods import METHODS

ADAMW = ("--optimizer", "adamw", *QUICK)
N, FORGOTTEN, BATCH = 1437, 64, 64
EPOCHS = 2
ONE_SHOT = ("retrain", "ssd", "influence", "first_order", "second_order")


@pytest.fixture(scope="module", params=["sam", "asam"])
def pretrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The rule, and the run of `train` under it."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    done("train", "--rule", request.param, "--epochs", EPOCHS, "--lr", 0.001, *ADAMW, "--out", out)
    return request.param, out


def test_training_takes_the_rule_and_both_of_its_passes(pretrained: tuple[str, Path]) -> None:
    rule, out = pretrained
    assert read(out / "run.json")["config"]["origin"]["train"]["rule"]["name"] == rule
    assert read(out / "record.json")["passes"] == 2 * EPOCHS * -(-N // BATCH)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_from_there(pretrained: tuple[str, Path], method: str, here: Path) -> None:
    rule, out = pretrained
    own = {"rum": ("--parts", 2), "ssd": ("--selection-weight", 2)}.get(method, ())
    under = rule if METHODS[method].admits(rule)[0] else "none"
    assert (under == "none") == (method in ONE_SHOT)
    loop = () if method in ONE_SHOT else ("--epochs", 1, "--lr", 3e-4)
    done("unlearn", "--model", out, "--random", FORGOTTEN, "--method", method, "--rule", under, *own, *loop, *ADAMW,
         "--out", "u")  # fmt: skip
    before, after = load_file(out / "model.safetensors"), load_file("u/model.safetensors")
    assert all(bool(after[name].isfinite().all()) for name in before if after[name].is_floating_point())
    assert any(not after[name].equal(before[name]) for name in before)
    record = read(here / "u" / "record.json")
    asked = read(here / "u" / "run.json")["config"]["unlearn"]
    assert (asked["method"]["name"], asked["rule"]["name"], asked["optimizer"]["name"]) == (method, under, "adamw")
    batches = -(-(N - FORGOTTEN) // BATCH)
    if method == "retrain":
        assert record["passes"] == 2 * EPOCHS * batches  # as the original was trained: under its rule
    elif method in ("finetune", "l1_sparse"):
        assert record["passes"] == 2 * batches
    elif method in ("neggrad", "random_label", "saul"):
        assert record["passes"] == 4 * batches
    else:
        assert record["passes"] > 0
