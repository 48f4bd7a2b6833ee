"""Arrays in a .npz file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from unsharp.data.config import DataConfig
from unsharp.data.source import SOURCES, Source, Split
from unsharp.errors import UserError, listed

IMAGES = ("x", "images", "image", "data")
LABELS = ("y", "labels", "label", "targets")


@SOURCES.register("npz")
def npz(config: DataConfig) -> Source:
    """A .npz file with train_x, train_y (and test_x, test_y), or x, y (also images, labels) and a test_dir file."""
    if config.dir is None:
        raise UserError(
            "data 'npz' needs dir (--data-dir): a .npz file with x and y, or train_x, train_y, test_x, test_y"
        )
    arrays = read_arrays("dir", config.dir)
    train = _split(arrays, "train_", config) or _split(arrays, "", config)
    if train is None:
        raise UserError(
            f"{config.dir!r} has no images and labels, found {listed(sorted(arrays)) or 'nothing'}; "
            "expected x and y, or train_x and train_y; give image_column and label_column for other names"
        )
    if config.test_dir is None:
        test = _split(arrays, "test_", config)
    else:
        others = read_arrays("test_dir", config.test_dir)
        test = _split(others, "test_", config) or _split(others, "", config)
        if test is None:
            raise UserError(f"test_dir {config.test_dir!r} has no x and y, found {listed(sorted(others)) or 'nothing'}")
    return Source(train=train, test=test, class_names=_class_names(arrays, train, test))


def read_arrays(argument: str, path: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz file, by name. Raises: UserError, naming the argument, if it is no such file."""
    if not Path(path).is_file():
        raise UserError(f"{argument} {path!r} is not a file; give a .npz file")
    try:
        # NumPy leaves the files that it opens itself open when they are damaged.
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{argument} {path!r} is no .npz file of plain arrays ({str(error)[:120]})") from None


def _split(arrays: dict[str, np.ndarray], prefix: str, config: DataConfig) -> Split | None:
    def key(chosen: str | None, usual: tuple[str, ...]) -> str | None:
        return next((prefix + name for name in ((chosen,) if chosen else usual) if prefix + name in arrays), None)

    x, y = key(config.image_column, IMAGES), key(config.label_column, LABELS)
    if x is None or y is None:
        return None
    ids = key(config.id_column, ()) if config.id_column else None
    if config.id_column and ids is None:
        raise UserError(f"the .npz file has no {prefix + config.id_column!r}, found {listed(sorted(arrays))}")
    images, labels = as_images(x, arrays[x]), arrays[y]
    if len(images) != len(labels):
        raise UserError(f"{x!r} has {len(images)} images and {y!r} {len(labels)} labels; give one label per image")
    return Split(images=images, labels=labels, ids=None if ids is None else arrays[ids])


def as_images(name: str, x: np.ndarray) -> np.ndarray:
    """Arrays (n, H, W), (n, H, W, C) or (n, C, H, W) with C of 1 or 3 as (n, H, W, C) uint8.

    Args:
        name: What the user calls the array.
        x: uint8; integers in 0..255; or floats in [0, 1] that are multiples of 1/255.

    Raises:
        UserError: if it has other dimensions, or values that eight bits do not hold.
    """
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim == 4 and x.shape[3] not in (1, 3) and x.shape[1] in (1, 3):
        x = x.transpose(0, 2, 3, 1)
    if x.ndim != 4 or x.shape[3] not in (1, 3) or 0 in x.shape:
        raise UserError(f"{name!r} has shape {x.shape}; images are (n, height, width) or (n, height, width, 1 or 3)")
    if x.dtype == np.uint8:
        return x
    if x.dtype.kind not in "iuf":
        raise UserError(f"{name!r} holds {x.dtype}; images are uint8, or floats in [0, 1]")
    if not np.isfinite(x).all():
        raise UserError(f"{name!r} holds values that are not finite in {_bad(~np.isfinite(x))}; repair or remove them")
    top = 1 if x.dtype.kind == "f" else 255
    if x.min() < 0 or x.max() > top:
        raise UserError(f"{name!r} holds {x.dtype} in {x.min()}..{x.max()}, accepted is 0..{top}; store uint8")
    scaled = x * 255.0 if top == 1 else x
    rounded = np.rint(scaled)
    if np.abs(scaled - rounded).max() > 0.01:
        raise UserError(
            f"{name!r} holds floats that are not multiples of 1/255, so that 8 bits would lose something; store uint8, "
            "or pass the set through unsharp.data.from_torch_dataset"
        )
    return rounded.astype(np.uint8)


def _bad(where: np.ndarray) -> str:
    rows = np.unique(np.nonzero(where)[0])
    return f"{len(rows)} images (first: {rows[0]})"


def _class_names(arrays: dict[str, np.ndarray], train: Split, test: Split | None) -> tuple[str, ...]:
    if "class_names" in arrays:
        return tuple(str(name) for name in arrays["class_names"])
    labels = [split.labels for split in (train, test) if split is not None]
    # Labels of another type are refused later, where the sample can be named.
    tops = [int(y.max()) for y in labels if y.size and y.dtype.kind in "iu"]
    return tuple(str(i) for i in range(max(tops, default=0) + 1))
