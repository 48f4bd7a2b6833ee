"""The published score files, read as they are: which array is which, and whose scores they are.

| file | arrays that are read | whose |
| --- | --- | --- |
| `cifar100_infl_matrix.npz` (Feldman & Zhang 2020) | `tr_mem`, `tr_labels` | in the training set's order |
| `cifar100_high_infl_pairs_infl0.15_mem0.25.npz` (the same) | `mem`, `tr_idx` | by position; a few hundred samples |
| `imagenet_index.npz` (the same) | `tr_mem`, `tr_labels`, `tr_filenames` | by file name |
| `cifar10-cscores-orig-order.npz`, `cifar100-…` (Jiang et al. '21) | `scores`, `labels` | in the training set's order |
| `imagenet-cscores-with-filename.npz` (the same) | `scores`, `labels`, `filenames` | by file name |
| `estimates_results_woShuffle.npz` (Zhao et al. 2024, CIFAR-10) | `memorization` | in the training set's order |

None of these files was at hand. The names of the arrays, and how their rows are meant, are those by which public code
reads them: google-research/heldout-influence-estimation (`build_dataset.py`, `mnist_infl_mem.py`),
HaoranTang/sharp-unlearn (`mem_infl_cifar100.py`, `imagenet_mem_subset.py`), kairanzhao/RUM (`main_forget.py`), and the
page of the C-scores (pluskid.github.io/structural-regularity). So labels, where a file has them, are compared with the
samples', and a file that does not fit is refused. `estimates_results_woShuffle.npz` has none, so its order is taken on
trust.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unsharp.difficulty.kinds import ScoreKind
from unsharp.errors import UserError, listed

SURE = 10
"""Samples per class from which on classes that are merely numbered otherwise tell that an order is right."""


@dataclass(frozen=True)
class Layout:
    """Which array of a published file is which.

    Args:
        title: What a sentence calls such a file.
        scores: The array of scores.
        labels: That of the labels under which they were computed; None where there is none.
        filenames: That of file names; None where there is none.
        positions: That of positions in the full source; None where there is none.
        kind: What the scores are; None where the arrays do not tell.
    """

    title: str
    scores: str
    labels: str | None = None
    filenames: str | None = None
    positions: str | None = None
    kind: ScoreKind | None = None


def recognise(path: Path, names: Collection[str]) -> Layout | None:
    """The layout of an archive with arrays of these names, or None where it is no published one.

    Args:
        path: The file; its name tells C-scores from other scores with labels.
        names: Names of its arrays.
    """
    has = set(names)
    if {"tr_mem", "tr_labels"} <= has:
        filenames = "tr_filenames" if "tr_filenames" in has else None
        title = "memorization estimates of Feldman & Zhang"
        return Layout(title, "tr_mem", "tr_labels", filenames, kind="memorization")
    if {"tr_idx", "tt_idx", "infl", "mem"} <= has:
        return Layout("high-influence pairs of Feldman & Zhang", "mem", positions="tr_idx", kind="memorization")
    if {"scores", "labels"} <= has <= {"scores", "labels", "filenames"}:
        filenames = "filenames" if "filenames" in has else None
        kind = "cscore" if "cscore" in path.name.lower().replace("-", "").replace("_", "") else None
        return Layout("C-scores of Jiang et al.", "scores", "labels", filenames, kind=kind)
    return None


def stem(filename: str) -> str:
    """What names an image in every copy of a data set: its file name without folders, ending and repeated class.

    "train/n01440764/n01440764_10026.JPEG" and "n01440764_10026_n01440764.JPEG" both give "n01440764_10026".
    """
    base = re.split(r"[/\\]", filename)[-1]
    base = re.sub(r"\.\w+$", "", base)
    parts = base.split("_")
    return "_".join(parts[:2]) if len(parts) == 3 and parts[2] == parts[0] else base


def check_labels(theirs: np.ndarray, ours: np.ndarray, source: str, *, named: bool) -> None:
    """Refuse scores that were computed under other labels, which is how a wrong order shows.

    Classes that are numbered otherwise, one to one, are the same classes; where the order alone says which sample is
    which, only if there are enough samples for that to be no accident.

    Args:
        theirs: (n,) labels that the file gives the samples.
        ours: (n,) int64 labels of the samples.
        source: Where they come from, for the error.
        named: Whether ids or file names say which sample is which.

    Raises:
        UserError: if they disagree.
    """
    if theirs.dtype.kind in "iu" and np.array_equal(theirs, ours):
        return
    pairs = np.unique(np.stack([np.unique(theirs, return_inverse=True)[1], ours]), axis=1)
    one_to_one = len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]
    if one_to_one and (named or len(ours) >= SURE * pairs.shape[1]):
        return
    differ = np.flatnonzero(theirs.astype(str) != ours.astype(str))
    at = int(differ[0]) if len(differ) else 0
    raise UserError(
        f"{source}: the labels of {len(differ)} of {len(ours)} samples are not those of the data (sample {at}: "
        f"{theirs[at]} in the file, {ours[at]} here); either the file is of other data or in another order, or labels "
        "were changed since; scores beside a column of ids are read in any order"
    )


def read_names(path: Path, key: str) -> np.ndarray:
    """An array of file names in an `.npz` archive, as text: (n,) str.

    It may be of bytes, text, or objects. Arrays of objects are pickled, and a pickle can run anything; this one is read
    by a reader that knows arrays of bytes and text and nothing else.

    Raises:
        UserError: if it holds something else.
    """
    with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
        content = io.BytesIO(file.read())
    version = np.lib.format.read_magic(content)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in header:
        raise UserError(f"{path}: {key!r} is written in a format of NumPy that is not known, {version}")
    shape, _, dtype = header[version](content)
    if dtype.kind not in "SUO" or len(shape) != 1:
        raise UserError(f"{path}: {key!r} must be a list of file names, it is {dtype} of shape {shape}")
    if dtype.kind != "O":
        content.seek(0)
        values = np.load(content, allow_pickle=False).tolist()
    else:
        try:
            values = _Names(content).load().values
        except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: {key!r} cannot be read as file names: {error}") from None
    if len(values) != shape[0] or not all(isinstance(v, bytes | str) for v in values):
        raise UserError(f"{path}: {key!r} must hold file names and nothing else")
    return np.array([v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in values], dtype=str)


class _Array:
    """Stands for a pickled array of objects and keeps its elements; no array is built from what a file says."""

    values: list[Any] = []

    def __setstate__(self, state: Any) -> None:
        self.values = list(state[4])


class _Type:
    """Stands for the pickled type of an array."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _array(*_: Any) -> _Array:
    return _Array()


def _scalar(_: Any, value: Any = b"") -> Any:
    return value.rstrip(b"\0") if isinstance(value, bytes) else value


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding!r}")
    return str(text).encode("latin1")


KNOWN = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encoded,  # how Python 2's protocol writes bytes
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
}


class _Names(pickle.Unpickler):
    """Reads pickled arrays of bytes and text; whatever else a file names is refused before it runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return KNOWN[module, name]


def match_names(names: np.ndarray, ids: np.ndarray, source: str) -> tuple[np.ndarray, np.ndarray]:
    """The file names of a published file and the ids of samples, both in the form in which they can be compared.

    Args:
        names: (m,) str, as the file has them.
        ids: (n,) the samples' ids.
        source: Where the names come from, for the error.

    Raises:
        UserError: if ids are no file names, or two of them are the same image.
    """
    if ids.dtype.kind in "iu":
        raise UserError(
            f"{source} tells samples by their file names, such as {names[0]!r}, but the ids of the data are numbers; "
            "give --id-column path for a folder, or the column that holds file names"
        )
    stems = [np.array([stem(str(v)) for v in values]) for values in (names, ids)]
    for values, where in zip(stems, (source, "the data")):
        found, counts = np.unique(values, return_counts=True)
        if len(found) < len(values):
            raise UserError(f"{where}: several samples have the file name {listed(found[counts > 1].tolist(), 4)}")
    return stems[0], stems[1]
