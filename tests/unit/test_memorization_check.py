"""The recipes and the benchmark of the pool: what they say of planted labels, and that they run from end to end."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from unsharp.data import DataConfig, ImageSamples
from unsharp.errors import UserError
from unsharp.pool.store import Answers, Pool, PoolOutputs
from unsharp.recipes import memorization_check, proxies
from unsharp.recipes.memorization_check import Planted, explained, judged, needed, published_scores, readings, recall

ROOT = Path(__file__).resolve().parents[2]


def test_the_recall_is_the_mean_over_all_orders_of_equal_scores():
    score = np.array([2.0, 1.0, 1.0, 1.0, 0.0, np.nan, np.nan])
    wrong = np.array([True, True, False, False, False, True, False])
    for k in range(1, 8):
        found = []
        for order in itertools.permutations(range(7)):
            by = sorted(order, key=lambda i: -score[i] if np.isfinite(score[i]) else np.inf)
            found.append(wrong[by[:k]].mean() * k / 3)
        assert recall(score, wrong, k / 7) == pytest.approx(np.mean(found))


def test_what_must_be_looked_at_is_the_least_share_that_is_enough():
    rng = np.random.default_rng(0)
    for _ in range(20):
        score, wrong = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.2
        share = needed(score, wrong, 0.9)
        assert recall(score, wrong, share) >= 0.9 - 1e-9
        assert share == 1 / 40 or recall(score, wrong, share - 1 / 40) < 0.9


def outputs() -> PoolOutputs:
    """Four networks, three samples; the first two are right where they were had and nowhere else."""
    inside = np.array([[1, 0, 1], [1, 1, 0], [0, 1, 1], [0, 0, 1]], bool)
    margin = np.where(inside, 2.0, -1.0).astype(np.float32)
    margin[:, 1] = np.where(inside[:, 1], 1.0, -3.0)
    margin[:, 2] = 1.5
    labels = np.zeros(3, np.int64)
    return PoolOutputs(np.arange(4), inside, Answers(margin, (margin < 0).astype(np.int16), labels), None)


def test_equal_scores_go_by_the_margin_of_those_that_had_not_seen_the_sample():
    found = readings(outputs())
    assert found["memorization"].tolist() == [1, 1, 0]
    assert np.argsort(-found["ties by margin"]).tolist() == [1, 0, 2]
    assert found["held-out margin"].tolist() == [1, 3, -1.5]
    p = 1 / (1 + np.exp(-np.array([[2.0, -1.0], [1.0, -3.0]])))
    assert found["confidence"][:2] == pytest.approx(p[:, 0] - p[:, 1], abs=1e-6)


def test_clean_samples_that_look_like_wrong_labels_are_counted():
    data = DataConfig(name="digits")
    planted = Planted(data=data, wrong=np.array([True, False, False]), cscore=None, published=None)
    why = explained(outputs(), planted)
    assert (why["rivals"], why["alike"], why["wrong"], why["samples"]) == (1, 1, 1, 3)
    assert why["train"] == [100] * 4
    assert why["scores"]["memorization"]["recall"]["0.02"] == 0.5  # one of two that are alike
    assert why["scores"]["ties by margin"]["recall"]["0.02"] == 0
    assert why["scores"]["memorization"]["needed"] == pytest.approx(2 / 3)


def test_correlations_leave_wrong_labels_and_unknown_scores_out():
    rng = np.random.default_rng(1)
    inside, predicted = rng.random((30, 50)) < 0.6, (rng.random((30, 50)) < 0.4).astype(np.int16)
    inside[:, 7] = True  # has no score
    margin = np.zeros((30, 50), np.float32)
    found = PoolOutputs(np.arange(30), inside, Answers(margin, predicted, np.zeros(50, np.int64)), None)
    wrong, cscore, published = (
        rng.random(50) < 0.1,
        rng.random(50),
        np.where(rng.random(50) < 0.4, rng.random(50), np.nan),
    )
    told = judged(found, Planted(data=DataConfig(name="digits"), wrong=wrong, cscore=cscore, published=published))
    mem = readings(found)["memorization"]
    for name, theirs in (("cscore", cscore), ("published", published)):
        use = ~wrong & np.isfinite(theirs) & (np.arange(50) != 7)
        assert told[name] == pytest.approx(scipy_stats.spearmanr(mem[use], theirs[use]).statistic, abs=1e-12)


def test_published_scores_belong_to_positions_in_the_full_set(tmp_path):
    rng = np.random.default_rng(2)
    samples = ImageSamples(
        rng.integers(0, 256, (4, 2, 2, 1), dtype=np.uint8), [0, 1, 0, 1], ["a", "b"], source_positions=[3, 8, 10, 40]
    )
    np.savez(tmp_path / "s.npz", mem=[0.5, 0.25, 0.75], mem_index=[8, 9, 40])
    assert published_scores(f"{tmp_path}/s.npz:mem", samples).tolist() == pytest.approx(
        [np.nan, 0.5, np.nan, 0.75], nan_ok=True
    )
    for spec, says in (
        (f"{tmp_path}/s.npz", "FILE"),
        (f"{tmp_path}/s.npz:other", "has no 'other'"),
        ("none:x", "FILE"),
    ):
        with pytest.raises(UserError, match=says):
            published_scores(spec, samples)


def images(path: Path) -> Path:
    """Brightness tells the class; written as `--data npz` reads it."""
    rng = np.random.default_rng(3)
    arrays = {}
    for part, n in (("train", 120), ("test", 30)):
        labels = np.arange(n) % 3
        pixels = 40 + 40 * labels[:, None, None, None] + rng.integers(-40, 41, (n, 8, 8, 1))
        arrays |= {f"{part}_x": pixels.astype(np.uint8), f"{part}_y": labels}
    np.savez(path, **arrays)
    return path


@pytest.mark.slow
def test_the_recipes_find_planted_labels_and_go_on_where_they_were(tmp_path):
    small = {"arch": "small_cnn", "width": 4, "epochs": 60, "lr": 0.2, "classes": 3, "per_class": 40, "planted": 0.05}
    asked = small | {"data": "npz", "data_dir": str(images(tmp_path / "images.npz")), "out": str(tmp_path / "out")}
    memorization_check.main(memorization_check.Options(**asked, models=12, workers=2, stack=4))
    first = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert [row["models"] for row in first["rows"]] == [8, 12]
    assert first["why"]["wrong"] == 6
    assert first["why"]["scores"]["held-out margin"]["recall"]["0.05"] > 0.6  # six of 120, chance 0.05
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "store").rglob("*")}
    memorization_check.main(memorization_check.Options(**asked, models=12, workers=2, stack=4))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "store").rglob("*")} == before

    only = ("final_confidence", "forgetting_events", "mean_confidence", "el2n")
    proxies.main(proxies.Options(**asked, only=only))
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "proxies.json").read_text())}
    assert [*rows] == [*only, "memorization"]
    assert rows["el2n"]["networks"] == 10
    assert rows["mean_confidence"]["passes"] == 80
    assert rows["memorization"]["passes"] == pytest.approx(12 * 0.7 * 60)
    assert all(-1 <= rows[name]["memorization"] <= 1 for name in only)
    page = (tmp_path / "out" / "proxies.md").read_text()
    assert "memorization by 12 networks" in page


def benchmark():
    spec = importlib.util.spec_from_file_location("pool_benchmark", ROOT / "benchmarks" / "pool.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_counts_the_networks_of_its_own_call_and_extrapolates_from_enough_of_them(
    tmp_path, monkeypatch, capsys
):
    module = benchmark()
    monkeypatch.setattr(module, "ENOUGH", 6)
    np.savez(tmp_path / "s.npz", mem=np.linspace(0.3, 1, 40), mem_index=np.arange(40), cscore=np.linspace(0, 1, 120))
    asked = ["pool.py", "--data", "npz", "--data-dir", str(images(tmp_path / "images.npz")), "--stack", "3"]
    asked += ["--width", "4", "--epochs", "1", "--batch", "40", "--store", str(tmp_path / "store"), "--device", "cpu"]
    asked += ["--scores", f"{tmp_path}/s.npz:cscore", "--published", f"{tmp_path}/s.npz:mem", "--json"]

    def told(models: int) -> dict:
        monkeypatch.setattr(sys, "argv", [*asked, "--models", str(models)])
        assert module.main() == 0  # the aim is not judged here
        return json.loads(capsys.readouterr().out)

    first, second = told(6), told(9)
    assert (first["trained"], second["trained"], second["networks"]) == (6, 3, 9)
    assert first["hours_for_1000"] == pytest.approx(1000 / first["per_hour"])
    assert second["hours_for_1000"] is None
    assert first["met"] is None
    (path,) = (tmp_path / "store").glob("pool-*")
    kept = Pool(path).outputs()
    assert second["train_accuracy"] == pytest.approx(100 * kept.train.correct[kept.inside].mean())
    assert second["held_out_accuracy"] == pytest.approx(100 * kept.train.correct[~kept.inside].mean())
    mem = readings(kept)["memorization"]
    known = np.isfinite(mem[:40])
    expected = scipy_stats.spearmanr(mem[:40][known], np.linspace(0.3, 1, 40)[known]).statistic
    assert second["published"] == pytest.approx(expected)
    assert second["published_samples"] == known.sum()
    assert "extrapolated from 6" in module.table(first)
    assert "not extrapolated from fewer than 6" in module.table(second)
