"""The same flow on real images: a slice of CIFAR-100, forget sets by C-score, retrained networks beside."""

from __future__ import annotations

import importlib.util
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from integration.helpers import call, done, read

REAL = Path(os.environ.get("UNSHARP_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
CLASSES, PER_CLASS, FORGET = 6, 80, 48
LEVELS = ("high", "mid", "low")
METHODS = {
    "neggrad": ("--method", "neggrad", "--rule", "none"),
    "sharp_minmax": ("--method", "sharp_minmax", "--rule", "asam", "--rho", 1.0),
}
UNLEARN = ("--epochs", 3, "--batch-size", 64, "--lr", 0.01, "--alpha", 0.95, "--threads", 1)
ATTACKS = ("--attacks", "threshold_confidence", "svc_correctness")
pytestmark = pytest.mark.skipif(not (REAL / "cifar100_train_1of2.ctx.npz").exists(), reason=f"no real images in {REAL}")


def reader() -> Any:
    """The module that stands beside the images and decodes them."""
    spec = importlib.util.spec_from_file_location("real_images", REAL / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kept(labels: np.ndarray, per_class: int) -> np.ndarray:
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(CLASSES)]))


def write_hub_directory(root: Path) -> None:
    """All 50,000 rows in the hub's layout, so that scores belong to positions; rows out of use share a tiny image."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def png(image: np.ndarray) -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    real = reader()
    names = [str(n) for n in real.scores()["cifar100_names"]]
    features = {"img": {"_type": "Image"}, "fine_label": {"names": names, "_type": "ClassLabel"}}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    root.mkdir(parents=True, exist_ok=True)
    for split, per_class in (("train", PER_CLASS), ("test", 100)):
        images, labels = real.load("cifar100", split)
        files = [png(np.zeros((1, 1, 3), np.uint8))] * len(labels)
        for row in kept(labels, per_class):
            files[row] = png(images[row])
        table = pa.table({"img": pa.array(files, type=kind), "fine_label": pa.array(labels.astype(np.int64))})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, root / f"{split}-00000-of-00001.parquet")


@pytest.fixture(scope="session")
def directory(request: pytest.FixtureRequest) -> Path:
    """The directory, kept from one session to the next."""
    assert request.config.cache is not None
    root = Path(request.config.cache.mkdir("cifar100")) / f"{CLASSES}-{PER_CLASS}"
    if not (root / "test-00000-of-00001.parquet").exists():
        write_hub_directory(root)
    return root


@pytest.fixture(scope="module")
def original(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    datasets = pytest.importorskip("datasets")
    out = tmp_path_factory.mktemp("cifar100")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(out / "cache"))
        what = ("--data", "cifar100", "--data-dir", directory, "--augment", "none")
        part = ("--classes", CLASSES, "--per-class", PER_CLASS)
        how = ("--epochs", 15, "--batch-size", 32, "--lr", 0.05, "--threads", 1)
        done("train", *what, *part, "--arch", "resnet18", "--width", 8, *how, "--out", out / "original")
        yield out / "original"


def test_the_flow_on_real_images(original: Path, here: Path, tmp_path: Path) -> None:
    metrics: dict[tuple[str, str], dict[str, Any]] = {}
    store = ("--store", tmp_path / "store")
    scores = f"{REAL / 'scores.npz'}:cifar100_cscore"
    for level in LEVELS:
        chosen = ("--scores", scores, "--score-kind", "cscore", "--level", level, "--n", FORGET)
        done("split", "--model", original, *chosen, "--out", level, "--threads", 1)
        for method, how in METHODS.items():
            out = f"{method}-{level}"
            command = ("forget", "--model", original, "--split", level, *how, *UNLEARN, *ATTACKS, *store)
            metrics[method, level] = done(*command, "--out", out, "--json").json
    with np.load(REAL / "scores.npz") as file:
        cscore = file["cifar100_cscore"]
    ids = {level: np.array(read(here / level / "split.json")["ids"]) for level in LEVELS}
    means = [float(cscore[ids[level]].mean()) for level in LEVELS]
    assert means == sorted(means)  # hard samples have low C-scores
    assert all(len(i) == FORGET for i in ids.values())

    reference = {level: metrics["neggrad", level]["reference"] for level in LEVELS}
    for level in LEVELS:
        assert metrics["sharp_minmax", level]["reference"] == reference[level]  # retrained once, then found
    assert len(list((tmp_path / "store").iterdir())) == len(LEVELS)
    unseen = [reference[level]["forget_accuracy"] for level in LEVELS]
    print("retrained forget accuracy", dict(zip(LEVELS, unseen)))
    assert unseen[0] < unseen[1] < unseen[2]
    for (method, level), found in metrics.items():
        print(method, level, {k: found[k] for k in ("retain_accuracy", "forget_accuracy", "test_accuracy", "tow")},
              found["original"]["forget_accuracy"])  # fmt: skip
        assert found["original"]["retain_accuracy"] > 85  # 92 to 100, by the processor's rounding
        assert found["n"] == {"retain": CLASSES * PER_CLASS - FORGET, "forget": FORGET, "test": CLASSES * 100}
        assert found["forget_accuracy"] <= found["original"]["forget_accuracy"]
        assert found["test_accuracy"] > 100 / CLASSES
    hard = metrics["neggrad", "high"]
    assert hard["forget_accuracy"] < hard["original"]["forget_accuracy"] - 5
    assert hard["tow"] > hard["original"]["tow"]
    done("report", *(f"{method}-high" for method in METHODS), "--out", "report.html")
    assert (here / "report.html").stat().st_size > 20_000


def test_scores_of_a_slice_alone_are_refused(original: Path, here: Path) -> None:
    """Scores stand at positions of the full set; a file of another length belongs to other data."""
    np.savez(here / "few.npz", score=np.linspace(0, 1, CLASSES * PER_CLASS))
    chosen = ("--scores", "few.npz", "--score-kind", "cscore", "--level", "high", "--n", FORGET)
    answer = call("split", "--model", original, *chosen, "--out", "out", "--threads", 1)
    assert answer.code == 2
    assert "50000" in answer.err
    assert not (here / "out").exists()
