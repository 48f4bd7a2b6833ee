"""Evaluation as a person uses it: features by default, what networks said kept, and measured again without them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

import unsharp
from integration.helpers import QUICK, call, done, read, tree

ATTACKS = ("--attacks", "threshold_confidence")


@pytest.fixture(scope="module")
def unlearned(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unlearned") / "run"
    how = ("--method", "neggrad", "--epochs", 1, "--lr", 0.02, *QUICK)
    done("unlearn", "--model", trained, "--random", 40, "--out", out, *how)
    return out


@pytest.fixture(scope="module")
def kept(unlearned: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kept")
    how = ("--original", trained, "--store", root / "store", *ATTACKS, "--threads", 1)
    done("evaluate", unlearned, "--keep-outputs", "--out", root / "run", *how)
    return root / "run"


def variance_ratio(retain: np.ndarray, forget: np.ndarray) -> float:
    """(tr Σ_R + tr Σ_F) / (½(‖μ_R − μ‖² + ‖μ_F − μ‖²)) of features divided by their norms."""
    r, f = (x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (retain, forget))
    middle = np.concatenate([r, f]).mean(axis=0)
    within = r.var(axis=0).sum() + f.var(axis=0).sum()
    return float(within / (0.5 * sum(((x.mean(axis=0) - middle) ** 2).sum() for x in (r, f))))


def test_features_are_measured_by_default(kept: Path) -> None:
    metrics = read(kept / "metrics.json")
    for values in (metrics, metrics["reference"], metrics["original"], metrics["gap"]):
        assert values["entanglement"]["variance_entanglement"]["ratio"] is not None


def test_the_features_are_drawn(kept: Path) -> None:
    picture = ElementTree.parse(kept / "embedding.svg").getroot()
    said = " ".join(text.strip() for text in picture.itertext() if text.strip())
    assert all(name in said for name in ("Original", "Unlearned", "Retrained"))


def test_kept_outputs_are_what_the_figures_are_made_of(kept: Path) -> None:
    metrics = read(kept / "metrics.json")
    assert {p.name for p in (kept / "outputs").iterdir()} == {"model", "reference", "original"}
    for name, values in (("model", metrics), ("reference", metrics["reference"]), ("original", metrics["original"])):
        found = {s: load_file(kept / "outputs" / name / f"{s}.safetensors") for s in ("retain", "forget", "test")}
        for split, arrays in found.items():
            right = float(np.mean(arrays["logits"].argmax(axis=1) == arrays["labels"]))
            assert values[f"{split}_accuracy"] == pytest.approx(100 * right)
        expected = variance_ratio(found["retain"]["features"], found["forget"]["features"])
        assert values["entanglement"]["variance_entanglement"]["ratio"] == pytest.approx(expected, rel=1e-4)


def test_measured_again_without_network_and_data(kept: Path, here: Path) -> None:
    before = tree(kept)
    done("evaluate", kept, "--out", "again", *ATTACKS)
    assert read(here / "again" / "metrics.json") == read(kept / "metrics.json")
    assert (here / "again" / "embedding.svg").read_bytes() == (kept / "embedding.svg").read_bytes()
    done("evaluate", kept, "--out", "more", "--attacks", "threshold_entropy")
    assert set(read(here / "more" / "metrics.json")["mia"]) == {"threshold_entropy"}
    assert tree(kept) == before
    assert "neggrad" in done("report", "more", "--out", "r.html").out.lower()


def test_what_was_not_kept_cannot_be_measured_again(unlearned: Path, here: Path) -> None:
    done("evaluate", unlearned, "--out", "e", "--no-features", *ATTACKS, "--threads", 1)
    assert "entanglement" not in read(here / "e" / "metrics.json")
    assert not (here / "e" / "embedding.svg").exists()
    answer = call("evaluate", "e", "--out", "again")
    assert answer.code == 2
    assert "--keep-outputs" in answer.err
    assert not (here / "again").exists()


class Odd(nn.Module):
    """Logits that come from no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(x, self.centres)


def test_a_model_without_findable_features_is_measured_without_them() -> None:
    rng = np.random.default_rng(0)
    points = torch.tensor(rng.normal(size=(60, 4)), dtype=torch.float32)
    data = torch.utils.data.TensorDataset(points, torch.tensor(rng.integers(0, 3, 60)))

    def measured(**how: Any) -> Mapping[str, Any]:
        return unsharp.evaluate(Odd(), data, range(9), attacks=(), **how)

    with pytest.warns(UserWarning, match="metrics on features are left out"):
        assert "entanglement" not in measured()
    assert "entanglement" not in measured(features=False)
