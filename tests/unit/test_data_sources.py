"""Sources by name, on files made here and, where they are there, on real images in the hub's layout."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unsharp.data import SOURCES, DataConfig, ImageSamples, StreamedSamples, evaluation_batches, load
from unsharp.data.draws import draws
from unsharp.errors import UserError

REAL = Path(os.environ.get("UNSHARP_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def hub_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def png(image: np.ndarray) -> bytes:
    image_module = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image_module.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def write_hub(root: Path, splits: dict[str, tuple[np.ndarray, np.ndarray]], image: str, label: str) -> str:
    """A directory in the hub's layout, with a column "key" of ids."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root.mkdir(exist_ok=True)
    for split, (x, y) in splits.items():
        n_classes = int(max(labels.max() for _, labels in splits.values())) + 1
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns = {
            image: pa.array([{"bytes": png(a), "path": None} for a in x], type=kind),
            label: pa.array(y.astype(np.int64)),
            "key": pa.array([f"{split}{i}" for i in range(len(y))]),
        }
        features = {
            image: {"_type": "Image"},
            label: {"names": [f"c{i}" for i in range(n_classes)], "_type": "ClassLabel"},
            "key": {"dtype": "string", "_type": "Value"},
        }
        meta = {"huggingface": json.dumps({"info": {"features": features}})}
        table = pa.table(columns).replace_schema_metadata(meta)
        pq.write_table(table, root / f"{split}-00000-of-00001.parquet")
    return str(root)


def split_of(n: int, side: int, channels: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    return RNG.integers(0, 256, (n, side, side, channels), dtype=np.uint8), np.arange(n) % classes


def test_digits_is_embedded_and_split_within_classes() -> None:
    train, test, _ = load(DataConfig(), "cpu")
    assert test is not None
    assert len(train) + len(test) == 1797
    counts = np.bincount(train.labels), np.bincount(test.labels)
    np.testing.assert_allclose(counts[1] / (counts[0] + counts[1]), 0.2, atol=0.01)
    assert train.input_shape == (1, 8, 8)
    assert train.fingerprint == load(DataConfig(), "cpu").train.fingerprint
    pixels = [{image.numpy().tobytes() for image in s.images} for s in (train, test)]
    assert not pixels[0] & pixels[1]


def test_a_slice_keeps_ids_and_source_positions() -> None:
    whole = load(DataConfig(), "cpu").train
    train, test, _ = load(DataConfig(classes=4, per_class=5), "cpu")
    assert np.bincount(train.labels).tolist() == [5] * 4
    assert train.source_size == len(whole)
    np.testing.assert_array_equal(train.ids, train.source_positions)
    np.testing.assert_array_equal(whole.labels[train.source_positions], train.labels)
    assert torch.equal(whole.images[torch.from_numpy(train.source_positions)], train.images)
    for c in range(4):
        np.testing.assert_array_equal(train.source_positions[train.labels == c], np.flatnonzero(whole.labels == c)[:5])
    assert test is not None
    assert set(test.labels) == {0, 1, 2, 3}


def test_class_order_moves_labels(tmp_path: Path) -> None:
    order = tmp_path / "order.txt"
    order.write_text("\n".join(str(c) for c in reversed(range(10))))
    plain, moved = (load(DataConfig(class_order=path), "cpu").train for path in (None, str(order)))
    np.testing.assert_array_equal(moved.labels, 9 - plain.labels)
    assert moved.class_names == tuple(str(c) for c in reversed(range(10)))
    order.write_text("0\n1\n")
    with pytest.raises(UserError, match="lacks 2, 3"):
        load(DataConfig(class_order=str(order)), "cpu")


@pytest.mark.parametrize(
    ("name", "image", "label", "channels"),
    [("cifar100", "img", "fine_label", 3), ("fashion_mnist", "image", "label", 1)],
)
def test_hub_layout(tmp_path: Path, name: str, image: str, label: str, channels: int) -> None:
    splits = {"train": split_of(11, 12, channels), "test": split_of(5, 12, channels)}
    path = write_hub(tmp_path / "hub", splits, image, label)
    train, test, _ = load(DataConfig(name=name, dir=path), "cpu")
    assert test is not None
    for samples, (x, y) in ((train, splits["train"]), (test, splits["test"])):
        np.testing.assert_array_equal(samples.images.numpy(), x)
        np.testing.assert_array_equal(samples.labels, y)
    assert train.class_names == ("c0", "c1", "c2")
    named = load(DataConfig(name=name, dir=path, id_column="key", classes=2, size=8), "cpu").train
    assert named.ids.tolist() == [f"train{i}" for i in range(11) if i % 3 < 2]
    assert named.input_shape == (channels, 8, 8)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_large_sets_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    splits = {"train": split_of(7, 40, 3), "validation": split_of(4, 40, 3)}
    path = write_hub(tmp_path / "hub", splits, "image", "label")
    config = DataConfig(name="imagenet", dir=path, size=16, workers=workers)
    assert isinstance(load(config, "cpu").test, ImageSamples)  # few enough to lie on the device
    monkeypatch.setattr("unsharp.data.loading.RESIDENT_BYTES", 100)
    train, test, _ = load(config, "cpu")
    assert isinstance(train, StreamedSamples)
    assert isinstance(test, StreamedSamples)
    table = draws(0, 0, 7)
    order = np.array([3, 1, 6])
    a, b = (torch.cat([x.inputs for x in train.batches(order, sizes, draws=table)]) for sizes in ([3], [1, 2]))
    assert torch.equal(a, b)
    assert a.shape == (3, 3, 16, 16)
    plain = torch.cat([x.inputs for x in evaluation_batches(train, order)])
    assert not torch.equal(a, plain)
    resident_config = DataConfig(name="imagenet", dir=path, size=16, augment="none")
    monkeypatch.undo()
    resident = load(resident_config, "cpu").train
    assert isinstance(resident, ImageSamples)
    assert torch.equal(plain, torch.cat([x.inputs for x in evaluation_batches(resident, order)]))
    assert train.fingerprint != train.subset([0]).fingerprint


def test_folder(tmp_path: Path) -> None:
    x, y = split_of(9, 8, 3)
    for i, (image, label) in enumerate(zip(x, y)):
        place = tmp_path / ("test" if i > 5 else "train") / f"class{label}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(png(image))
    train, test, _ = load(DataConfig(name="folder", dir=str(tmp_path), id_column="path"), "cpu")
    assert test is not None
    assert train.class_names == ("class0", "class1", "class2")
    assert train.ids.tolist() == [
        "class0/0.png",
        "class0/3.png",
        "class1/1.png",
        "class1/4.png",
        "class2/2.png",
        "class2/5.png",
    ]
    np.testing.assert_array_equal(train.images.numpy(), x[[0, 3, 1, 4, 2, 5]])
    flat = load(DataConfig(name="folder", dir=str(tmp_path / "train")), "cpu")
    assert flat.test is None
    both = load(DataConfig(name="folder", dir=str(tmp_path / "train"), test_dir=str(tmp_path / "test")), "cpu")
    assert both.test is not None
    assert torch.equal(both.test.images, test.images)
    (tmp_path / "train" / "class0" / "big.png").write_bytes(png(np.zeros((10, 8, 1), np.uint8)))
    with pytest.raises(UserError, match=r"differ in size.*give size"):
        load(DataConfig(name="folder", dir=str(tmp_path)), "cpu")
    assert load(DataConfig(name="folder", dir=str(tmp_path), size=8), "cpu").train.input_shape == (3, 8, 8)
    (tmp_path / "train" / "class0" / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bad\.png"):
        load(DataConfig(name="folder", dir=str(tmp_path)), "cpu")


def test_threads_decode_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from unsharp.data import loading

    x, _ = split_of(9, 8, 3)
    files = [png(image) for image in x]
    for limit in (0, 10**9):
        monkeypatch.setattr(loading, "THREADED_PIXELS", limit)
        decoded = loading.decode(lambda rows: [files[i] for i in rows], np.array([8, 0, 3]), loading.Decoder(3, None))
        np.testing.assert_array_equal(decoded, x[[8, 0, 3]])


def save(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_npz(tmp_path: Path) -> None:
    (x, y), (tx, ty) = split_of(6, 8, 3), split_of(3, 8, 3)
    both = save(tmp_path / "a.npz", train_x=x / np.float32(255), train_y=y, test_x=tx.transpose(0, 3, 1, 2), test_y=ty)
    train, test, _ = load(DataConfig(name="npz", dir=both), "cpu")
    assert test is not None
    np.testing.assert_array_equal(train.images.numpy(), x)
    np.testing.assert_array_equal(test.images.numpy(), tx)
    alone = save(tmp_path / "b.npz", images=x[..., 0], labels=y, who=np.arange(6) + 10)
    config = DataConfig(name="npz", dir=alone, id_column="who")
    train, test, _ = load(config, "cpu")
    assert test is None
    assert train.ids.tolist() == list(range(10, 16))
    assert train.input_shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.full((2, 4, 4), np.nan), "y": [0, 1]}, "not finite in 2 images"),
        ({"x": np.full((2, 4, 4), 7.0), "y": [0, 1]}, "accepted is 0..1"),
        ({"x": np.full((2, 4, 4), 0.0011), "y": [0, 1]}, "multiples of 1/255"),
        ({"x": np.zeros((2, 4), np.uint8), "y": [0, 1]}, "shape \\(2, 4\\)"),
        ({"x": np.zeros((2, 4, 4), np.uint8), "y": [0, -1]}, "label -1 of sample 1"),
        ({"x": np.zeros((2, 4, 4), np.uint8), "y": [0.0, 1.0]}, "integers"),
        ({"x": np.zeros((2, 4, 4), np.uint8), "y": [0, 3], "class_names": ["a", "b"]}, "label 3.*2 classes"),
        ({"x": np.zeros((2, 4, 4), np.uint8), "y": [0]}, "2 images and 'y' 1 labels"),
        ({"pictures": np.zeros((2, 4, 4), np.uint8), "y": [0, 1]}, "found pictures, y"),
        ({"x": np.array([{}, {}]), "y": [0, 1]}, "plain arrays"),
    ],
)
def test_a_wrong_npz_is_refused(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        load(DataConfig(name="npz", dir=save(tmp_path / "x.npz", **arrays)), "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "cifar1000"}, "did you mean 'cifar100'"),
        ({"name": "cifar100", "dir": "missing"}, "not a directory"),
        ({"name": "folder"}, "needs dir"),
        ({"name": "npz", "dir": "missing.npz"}, "not a file"),
        ({"name": "digits", "dir": "x"}, "does not apply"),
        ({"classes": 11}, "at most 10"),
        ({"classes": 0}, "at least 1"),
        ({"augment": "crop_flop"}, "did you mean 'crop_flip'"),
        ({"std": (0.0,)}, "above 0"),
        ({"class_order": "missing.txt"}, "cannot be read"),
    ],
)
def test_a_wrong_config_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load(DataConfig(**settings), "cpu")


def test_a_hub_directory_in_another_layout_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "readme.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"another layout.*found readme\.bin") as error:
        load(DataConfig(name="cifar10", dir=str(empty)), "cpu")
    assert "\n" not in str(error.value)
    path = write_hub(tmp_path / "fashion", {"train": split_of(3, 8, 1), "test": split_of(3, 8, 1)}, "image", "label")
    with pytest.raises(UserError, match=r"no column img, fine_label.*found image, label, key"):
        load(DataConfig(name="cifar100", dir=path), "cpu")
    with pytest.raises(UserError, match=r"no split 'validation'.*found test, train"):
        load(DataConfig(name="imagenet", dir=path), "cpu")


def test_an_unreachable_hub_says_to_give_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", fail)
    with pytest.raises(UserError, match=r"uoft-cs/cifar10: ConnectionError: no route.*--data-dir"):
        load(DataConfig(name="cifar10"), "cpu")


@pytest.mark.parametrize(
    ("name", "image", "label"), [("cifar100", "img", "fine_label"), ("fashion_mnist", "image", "label")]
)
def test_real_images_survive_the_hub_layout(tmp_path: Path, name: str, image: str, label: str) -> None:
    file = REAL / f"{name}_small.npz"
    if not file.exists():
        pytest.skip(f"the real images ({file.name}) are not here; UNSHARP_TEST_DATA names their directory")
    with np.load(file) as z:
        splits = {s: (z[f"{s}_x"], z[f"{s}_y"].astype(np.int64)) for s in ("train", "test")}
    train, test, _ = load(DataConfig(name=name, dir=write_hub(tmp_path / "hub", splits, image, label)), "cpu")
    direct = load(DataConfig(name="npz", dir=str(file)), "cpu")
    assert test is not None
    assert direct.test is not None
    assert torch.equal(train.images, direct.train.images)
    assert torch.equal(test.images, direct.test.images)
    np.testing.assert_array_equal(train.labels, splits["train"][1])
    per_channel = train.images.double().mean((0, 1, 2)) / 255
    published = torch.tensor({"cifar100": (0.5071, 0.4865, 0.4409), "fashion_mnist": (0.2860,)}[name]).double()
    torch.testing.assert_close(per_channel, published, atol=0.06, rtol=0)


def test_every_source_tells_what_it_is() -> None:
    from unsharp.registry import summary

    names = {"digits", "cifar10", "cifar100", "fashion_mnist", "tiny_imagenet", "imagenet", "folder", "npz"}
    assert names <= set(SOURCES)
    assert all(len(summary(SOURCES[name])) > 20 for name in names)
    assert "CIFAR-100" in summary(SOURCES["cifar100"])


@pytest.mark.parametrize("amount", [3, 0.25])
def test_validation_takes_the_last_of_each_class_out_of_the_training_and_leaves_the_test_set(amount: float) -> None:
    whole, split = load(DataConfig(per_class=20)), load(DataConfig(per_class=20, validation=amount))
    n = 3 if amount == 3 else 5
    for c in range(10):
        positions = whole.train.source_positions[whole.train.labels == c]
        assert split.validation is not None
        held = split.validation.source_positions[split.validation.labels == c]
        kept = split.train.source_positions[split.train.labels == c]
        assert held.tolist() == sorted(positions)[-n:]
        assert kept.tolist() == sorted(positions)[:-n]
    assert whole.validation is None
    assert whole.test is not None
    assert split.test is not None
    assert whole.test.fingerprint == split.test.fingerprint
    alone = load(DataConfig(per_class=20 - n))
    assert alone.train.fingerprint == split.train.fingerprint


@pytest.mark.parametrize("amount", [0, -1, 1.5])
def test_an_amount_of_validation_that_means_nothing_is_refused(amount: float) -> None:
    with pytest.raises(UserError, match="validation"):
        DataConfig(validation=amount)


def test_validation_that_leaves_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(UserError, match="leaves class 0 nothing to train on"):
        load(DataConfig(per_class=3, validation=3))
