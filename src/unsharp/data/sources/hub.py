"""Image sets of the Hugging Face hub, downloaded or from a local directory in the same layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unsharp.data.config import DataConfig
from unsharp.data.source import SOURCES, Source, Split, refuse
from unsharp.errors import UserError, listed


@dataclass(frozen=True, kw_only=True)
class HubSet:
    """Where a set stands on the hub and how it is usually prepared; mean and std are the published constants.

    Args:
        repo: Repository on the hub.
        about: One sentence.
        image: Column of the images.
        label: Column of the labels.
        test: Name of the split to test on.
        mean: Per channel on the scale [0, 1].
        std: Per channel on the scale [0, 1].
        size: Side in pixels, where images differ in size.
    """

    repo: str
    about: str
    image: str = "image"
    label: str = "label"
    test: str = "test"
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str = "crop_flip"
    size: int | None = None

    def __call__(self, config: DataConfig) -> Source:
        """The source that `config` asks for."""
        refuse(config, "test_dir")
        splits = _load(config, self.repo)
        image, label = config.image_column or self.image, config.label_column or self.label
        for split in ("train", self.test):
            _check(splits, split, [image, label, *([config.id_column] if config.id_column else [])], config)
        train, test = splits["train"], splits[self.test]
        return Source(
            train=_split(train, image, label, config.id_column),
            test=_split(test, image, label, config.id_column),
            class_names=_class_names(train, test, label),
            mean=self.mean,
            std=self.std,
            augment=self.augment,
            channels=len(self.mean),
            resize_ratio=256 / 224 if self.size else 1.0,
            size=self.size,
        )


HUB_SETS = {
    "cifar10": HubSet(
        repo="uoft-cs/cifar10",
        about="CIFAR-10: 50,000 + 10,000 images of 32 × 32 pixels in 10 classes (Krizhevsky 2009)",
        image="img",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": HubSet(
        repo="uoft-cs/cifar100",
        about="CIFAR-100: 50,000 + 10,000 images of 32 × 32 pixels in 100 classes (Krizhevsky 2009)",
        image="img",
        label="fine_label",
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
    "fashion_mnist": HubSet(
        repo="zalando-datasets/fashion_mnist",
        about="Fashion-MNIST: 60,000 + 10,000 grey images of 28 × 28 pixels in 10 classes (Xiao et al. 2017)",
        mean=(0.2860,),
        std=(0.3530,),
    ),
    "tiny_imagenet": HubSet(
        repo="zh-plus/tiny-imagenet",
        about="Tiny ImageNet: 100,000 + 10,000 images of 64 × 64 pixels in 200 classes (Le & Yang 2015)",
        test="valid",
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
    ),
    "imagenet": HubSet(
        repo="ILSVRC/imagenet-1k",
        about="ImageNet: 1,281,167 + 50,000 images in 1,000 classes at 224 × 224 pixels (Russakovsky et al. 2015)",
        test="validation",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        augment="resized_crop_flip",
        size=224,
    ),
}


def _source(spec: HubSet) -> Callable[[DataConfig], Source]:
    def source(config: DataConfig) -> Source:
        return spec(config)

    source.__doc__ = f"{spec.about}."
    return source


for _name, _spec in HUB_SETS.items():
    SOURCES.register(_name)(_source(_spec))


def _load(config: DataConfig, repo: str) -> Any:
    from datasets import disable_progress_bars, load_dataset, load_from_disk

    disable_progress_bars()  # they would come between an error and its one line
    if config.dir is None:
        try:
            return load_dataset(repo)
        except Exception as error:
            raise UserError(
                f"data {config.name!r} could not be fetched from the hub ({repo}: {_line(error)}); "
                "give dir (--data-dir), a local directory in the hub's layout"
            ) from None
    path = Path(config.dir)
    if not path.is_dir():
        raise UserError(f"dir {config.dir!r} is not a directory; give one in the hub's layout, or leave it out")
    try:
        saved = (path / "dataset_dict.json").exists()
        return load_from_disk(str(path)) if saved else load_dataset(str(path))
    except Exception as error:
        found = listed(sorted(p.name for p in path.iterdir()), 5) or "nothing"
        raise UserError(
            f"dir {config.dir!r} has another layout than the hub's ({_line(error)}); "
            f"expected files like train-00000-of-00001.parquet, found {found}"
        ) from None


def _check(splits: Any, split: str, columns: Sequence[str], config: DataConfig) -> None:
    where = repr(config.dir) if config.dir else "the hub"
    if split not in splits:
        raise UserError(f"{where} has no split {split!r} for {config.name!r}, found {listed(sorted(splits))}")
    found = splits[split].column_names
    missing = [column for column in columns if column not in found]
    if missing:
        raise UserError(
            f"{where} has no column {listed(missing)} in split {split!r} for {config.name!r}, found {listed(found)}; "
            "give image_column, label_column or id_column"
        )


def _split(rows: Any, image: str, label: str, id_column: str | None) -> Split:
    from datasets import Image

    if not isinstance(rows.features[image], Image):
        raise UserError(f"column {image!r} holds {type(rows.features[image]).__name__}, not images; give image_column")
    return Split(
        images=ImageColumn(rows.select_columns(image).with_format("arrow"), image),
        labels=np.asarray(rows.with_format("numpy")[label][:]),
        ids=None if id_column is None else np.asarray(rows.with_format("numpy")[id_column][:]),
    )


def _class_names(train: Any, test: Any, label: str) -> tuple[str, ...]:
    names = getattr(train.features[label], "names", None)
    if names is None:
        top = max(int(np.max(split.with_format("numpy")[label][:], initial=-1)) for split in (train, test))
        names = range(top + 1)
    return tuple(str(name) for name in names)


@dataclass(frozen=True, eq=False)
class ImageColumn:
    """The encoded images of a hub set's rows."""

    rows: Any
    column: str

    def __call__(self, rows: np.ndarray) -> list[bytes | Path]:
        files = self.rows[rows.tolist()][self.column].to_pylist()
        return [file["bytes"] if file["bytes"] is not None else Path(file["path"]) for file in files]


def _line(error: Exception) -> str:
    """Type and first line of an error that another library raised."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
