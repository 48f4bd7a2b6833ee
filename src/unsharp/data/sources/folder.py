"""A folder of images with one folder per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from unsharp.data.config import DataConfig
from unsharp.data.source import SOURCES, Source, Split, refuse
from unsharp.errors import UserError, listed

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
TEST_NAMES = ("test", "val", "valid", "validation")
LAYOUT = "expected DIR/train/CLASS/*.png with an optional DIR/test/CLASS/*.png, or DIR/CLASS/*.png"


@SOURCES.register("folder")
def folder(config: DataConfig) -> Source:
    """A folder of images: DIR/train/CLASS/* and DIR/test/CLASS/*, or DIR/CLASS/* with a test_dir of its own."""
    refuse(config, "label_column", "image_column")
    if config.id_column not in (None, "path"):
        raise UserError(f"id_column of a folder is 'path' or nothing (positions), got {config.id_column!r}")
    if config.dir is None:
        raise UserError(f"data 'folder' needs dir (--data-dir): {LAYOUT}")
    root = _directory("dir", config.dir)
    train = root / "train" if (root / "train").is_dir() else root
    tests = [_directory("test_dir", config.test_dir)] if config.test_dir else []
    if train != root and not tests:
        tests = [root / name for name in TEST_NAMES if (root / name).is_dir()][:1]
    names = _classes(train)
    by_path = config.id_column is not None
    return Source(
        train=_split(train, names, by_path),
        test=_split(tests[0], names, by_path) if tests else None,
        class_names=names,
    )


def _directory(argument: str, path: str) -> Path:
    if not Path(path).is_dir():
        raise UserError(f"{argument} {path!r} is not a directory; {LAYOUT}")
    return Path(path)


def _classes(root: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _split(root: Path, names: tuple[str, ...], by_path: bool) -> Split:
    unknown = [name for name in _classes(root) if name not in names]
    if unknown:
        raise UserError(f"{str(root)!r} has classes that the training set lacks: {listed(unknown)}")
    files = [[p for p in sorted((root / name).rglob("*")) if p.suffix.lower() in SUFFIXES] for name in names]
    paths = [path for of_class in files for path in of_class]
    if not paths:
        found = listed(sorted(p.name for p in root.iterdir()), 5) or "nothing"
        raise UserError(f"{str(root)!r} has no images in folders of classes, found {found}; {LAYOUT}")
    labels = np.repeat(np.arange(len(names)), [len(of_class) for of_class in files])
    ids = np.array([path.relative_to(root).as_posix() for path in paths]) if by_path else None
    return Split(images=lambda rows: [paths[row] for row in rows], labels=labels, ids=ids)
