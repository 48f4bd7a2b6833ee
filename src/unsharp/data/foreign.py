"""Any map-style `torch.utils.data.Dataset`, however its items look and whatever random numbers it uses."""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data import Dataset as TorchDataset

from unsharp.data.draws import ITEM_SEED
from unsharp.data.loading import RESIDENT_BYTES
from unsharp.data.samples import Samples, StreamedSamples, TensorSamples, content_of, numbered
from unsharp.errors import UserError, listed

INPUT_KEYS = ("image", "img", "pixel_values", "x", "inputs", "input")
LABEL_KEYS = ("label", "labels", "y", "fine_label", "target", "targets")
N_REREAD = 64


def from_torch_dataset(
    dataset: Any,
    *,
    device: torch.device | str,
    ids: Any = None,
    class_names: Sequence[str] | None = None,
    fingerprint: str | None = None,
    num_workers: int = 0,
) -> Samples:
    """Samples from a map-style Dataset; one pass reads labels, shapes and content.

    An item that draws from torch's, Python's or NumPy's global generator is seeded by (seed, epoch, cycle, position),
    and the generators are put back afterwards. Items that draw nothing and are equal in two reads are moved to the
    device once, where they fit; the others are read anew in each epoch.

    Args:
        dataset: `dataset[i]` is (input, label), or a mapping with keys such as "image" and "label". The input is a
            tensor, an array or a PIL image; uint8 becomes float32 in [0, 1], and arrays and PIL images of uint8 change
            from (H, W, C) to (C, H, W). The label is an integer from 0.
        device: Where the batches appear.
        ids: (n,) integers or text, each once; None takes the positions.
        class_names: One per class; None takes `dataset.classes`, else "0", "1", ...
        fingerprint: A name for the content; None computes the sha256 where items are equal in two reads.
        num_workers: Number of processes that read.

    Returns:
        Samples whose `fingerprint` is None where items differ between two reads and none was given.

    Raises:
        UserError: if the dataset is iterable only, has no length or no item, or an item is not as described.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise UserError(f"dataset is a {type(dataset).__name__} without positions; give a map-style Dataset")
    try:
        n = len(dataset)
    except (TypeError, NotImplementedError):
        raise UserError(f"dataset {type(dataset).__name__} has no length; give a Dataset with __len__") from None
    if n == 0:
        raise UserError("dataset is empty; give at least one sample")
    seen = scan(dataset, n, num_workers)
    steady = seen.steady and rereads_equal(dataset, n)
    about: dict[str, Any] = {
        "labels": seen.labels,
        "class_names": _class_names(dataset, class_names, seen.labels),
        "ids": ids,
        "device": device,
        "fingerprint": fingerprint,
    }
    if steady and seen.inputs is not None:
        return TensorSamples(seen.inputs, **about)
    content = seen.sha256 if steady else None
    return StreamedSamples(ReadItem(dataset), input_shape=seen.shape, content=content, workers=num_workers, **about)


class Scan(NamedTuple):
    """What one pass over a Dataset found: `inputs` only where they fit, `steady` if no item drew a random number."""

    labels: np.ndarray
    shape: tuple[int, ...]
    sha256: str
    steady: bool
    inputs: Tensor | None


def scan(dataset: Any, n: int, num_workers: int = 0) -> Scan:
    """Read every item once, each from a fixed seed."""
    labels = np.empty(n, np.int64)
    digest, steady, first, kept = hashlib.sha256(), True, None, None
    # A generator of its own: the loader would draw its seed from the training's.
    loader = DataLoader(
        _Looks(dataset, n), num_workers=num_workers, batch_size=None, generator=torch.Generator(), collate_fn=_same
    )
    for i, (x, label, drew) in enumerate(_mended(loader)):
        if first is None:
            first = x
            if x.numel() * x.element_size() * n <= RESIDENT_BYTES:
                kept = torch.empty((n, *x.shape), dtype=x.dtype)
        if x.shape != first.shape or x.dtype != first.dtype:
            raise UserError(
                f"dataset[{i}] is {_kind(x)} and dataset[0] {_kind(first)}; bring all items to one shape and dtype"
            )
        labels[i] = label
        steady &= not drew
        digest.update(label.to_bytes(8, "little") + content_of(x))
        if not steady:
            kept = None
        if kept is not None:
            kept[i] = x
    assert first is not None
    digest.update(f"{n} {_kind(first)}".encode())
    return Scan(labels, tuple(first.shape), digest.hexdigest(), steady, kept)


def _mended(loader: DataLoader[Any]) -> Iterator[Any]:
    """The items; an error of the user that a worker wrapped in its traceback becomes one line again."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("unsharp.errors.UserError: ")) from None


def rereads_equal(dataset: Any, n: int) -> bool:
    """Whether up to 64 items are the same when they are read twice, with other random numbers."""
    for i in np.linspace(0, n - 1, min(n, N_REREAD)).astype(int).tolist():
        (a, label_a), (b, label_b) = (read_item(dataset, i, seed) for seed in (i, n + i))
        if label_a != label_b or not torch.equal(a, b):
            return False
    return True


@dataclass(frozen=True, eq=False)
class ReadItem:
    """Reads an item of a Dataset, its random numbers being a function of the row of the epoch's table."""

    dataset: Any

    def __call__(self, position: int, row: np.ndarray | None) -> Tensor:
        seed = position if row is None else int(row[ITEM_SEED] * 2**53)
        return read_item(self.dataset, position, seed)[0]


def read_item(dataset: Any, position: int, seed: int) -> tuple[Tensor, int]:
    """Input and label of an item, read with the global generators at `seed` and put back afterwards."""
    with global_seed(seed):
        item = dataset[position]
    return as_input_and_label(item, position)


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed the host's global generators (torch, random, NumPy) within the block, and put them back after it."""
    before = _global_state()
    try:
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  a Dataset may use the legacy generator
        yield
    finally:
        torch.default_generator.set_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])  # noqa: NPY002


def _global_state() -> tuple[Tensor, Any, Any]:
    return torch.default_generator.get_state(), random.getstate(), np.random.get_state()  # noqa: NPY002


def _same_state(a: tuple[Tensor, Any, Any], b: tuple[Tensor, Any, Any]) -> bool:
    (_, keys_a, *rest_a), (_, keys_b, *rest_b) = a[2], b[2]
    return torch.equal(a[0], b[0]) and a[1] == b[1] and rest_a == rest_b and np.array_equal(keys_a, keys_b)


@dataclass(frozen=True, eq=False)
class _Looks(TorchDataset[Any]):
    """Item i as (input, label, whether reading it drew from a global generator)."""

    dataset: Any
    n: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, int, bool]:
        with global_seed(i):
            before = _global_state()
            item = self.dataset[i]
            drew = not _same_state(before, _global_state())
        x, label = as_input_and_label(item, i)
        if not torch.isfinite(x).all():
            raise UserError(f"dataset[{i}] has an input with values that are not finite; repair or remove it")
        return x, label, drew


def _same(item: Any) -> Any:
    return item


def as_input_and_label(item: Any, position: int) -> tuple[Tensor, int]:
    """Input as a tensor and label as an integer from an item of a Dataset. Raises: UserError if they are not there."""
    if isinstance(item, Mapping):
        x, y = (_pick(item, keys, position) for keys in (INPUT_KEYS, LABEL_KEYS))
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        x, y = item
    else:
        raise UserError(f"dataset[{position}] is {_kind(item)}, accepted is (input, label) or a mapping with both")
    try:
        label = operator.index(y)
    except (TypeError, ValueError):
        raise UserError(f"the label of dataset[{position}] is {_kind(y)}, accepted is an integer from 0") from None
    if label < 0:
        raise UserError(f"the label of dataset[{position}] is {label}, accepted is an integer from 0")
    return as_input(x, position), label


def as_input(x: Any, position: int) -> Tensor:
    """A tensor: uint8 as float32 in [0, 1], float64 as float32, images of uint8 from (H, W, C) to (C, H, W)."""
    if hasattr(x, "convert") and hasattr(x, "mode"):
        x = np.asarray(x if x.mode in ("L", "RGB") else x.convert("L" if x.mode in ("1", "LA") else "RGB"))
    if isinstance(x, np.ndarray):
        picture = x.dtype == np.uint8 and x.ndim in (2, 3)
        x = x.reshape(*x.shape[:2], -1).transpose(2, 0, 1) if picture else x
        x = torch.from_numpy(np.ascontiguousarray(x))
    if not isinstance(x, Tensor):
        raise UserError(
            f"the input of dataset[{position}] is {_kind(x)}, accepted is a tensor, an array or a PIL image"
        )
    if x.dtype == torch.uint8:
        return x.to(torch.float32) / 255
    return x.to(torch.float32) if x.dtype == torch.float64 else x


def _pick(item: Mapping[str, Any], keys: Sequence[str], position: int) -> Any:
    for key in keys:
        if key in item:
            return item[key]
    raise UserError(f"dataset[{position}] has keys {listed(list(item))}, expected one of {listed(keys)}")


def _kind(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__} ({str(value)[:40]})"


def _class_names(dataset: Any, given: Sequence[str] | None, labels: np.ndarray) -> tuple[str, ...]:
    if given is not None:
        return tuple(given)
    own = getattr(dataset, "classes", None)
    named = isinstance(own, (list, tuple)) and len(own) > labels.max() and all(isinstance(c, str) for c in own)
    return tuple(own) if named and own is not None else numbered(labels)
