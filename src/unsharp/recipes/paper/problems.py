"""The problems on which the paper's tables are made anew: data, network, training and forget sets at three sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unsharp.data import DataConfig
from unsharp.errors import UserError
from unsharp.models import ModelConfig

Size = Literal["smoke", "small", "paper"]
SIZES: tuple[Size, ...] = ("smoke", "small", "paper")
Task = Literal["cifar100", "cifar10 random", "tiny_imagenet random", "imagenet"]
LEVELS = ("high", "mid", "low")
TUNED_ON, TUNED_FOR = 100, "mid"
"""Seed and forget set on which settings are chosen; the seed takes part in no figure."""
ABOUT_SCORES = "memorization or C-scores, FILE[:KEY], such as cifar100_infl_matrix.npz of Feldman & Zhang"


@dataclass(frozen=True, kw_only=True)
class Where:
    """What a user gives.

    Args:
        out: Directory of all that is made.
        data_dir: The data, in the hub's layout; None downloads them, where a download is possible.
        scores: Scores by which forget sets are graded.
    """

    out: Path
    data_dir: str | None = None
    scores: str | None = None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is unlearned, and from which networks.

    Args:
        size: The size.
        data: The data.
        model: The network.
        train: How it is trained: fields of a `TrainConfig` but rule and seed.
        loop: Settings of every unlearning.
        forget: The forget sets: fields of a `ForgetConfig`, and their names.
        seeds: The seeds.
        chosen: Whether settings are chosen on a seed of their own, with validation samples in place of the test set.
    """

    size: Size
    data: DataConfig
    model: ModelConfig
    train: Mapping[str, Any]
    loop: Mapping[str, Any]
    forget: tuple[dict[str, Any], ...]
    seeds: tuple[int, ...]
    chosen: bool = False


def problem(task: Task, size: Size, where: Where) -> Problem:
    """The problem of a task at a size. Raises: UserError for data or scores that a size needs and that are missing."""
    if size == "smoke":
        return _smoke(task, where)
    if size == "small" and where.data_dir is None:
        raise UserError("--data-dir: give a directory with the data in the hub's layout; this size downloads nothing")
    return _small(task, where) if size == "small" else _paper(task, where)


def _smoke(task: Task, where: Where) -> Problem:
    """Digits, and whatever shows in a minute that all parts work; no figure of it means anything."""
    random = {"name": "random", "random": 25}
    graded = _graded(f"{where.out / 'scores.npz'}:score", 25, "cscore")
    return Problem(
        size="smoke",
        data=DataConfig(name="digits", classes=5, per_class=100),
        model=ModelConfig(arch="small_cnn", width=8),
        train={"epochs": 6, "batch_size": 64},
        loop={"epochs": 2, "batch_size": 64},
        forget=(random,) if task.endswith("random") else graded,
        seeds=(0, 1),
    )


def _small(task: Task, where: Where) -> Problem:
    """The first ten classes of the real images, 250 of each, a narrow network: hours of a processor."""
    name = task.partition(" ")[0]
    return Problem(
        size="small",
        data=DataConfig(name=name, dir=where.data_dir, classes=10, per_class=300, validation=50, augment="flip"),
        model=ModelConfig(arch="resnet18", width=8),
        train={"epochs": 30, "batch_size": 128},
        loop={"epochs": 5, "batch_size": 128},
        forget=_forget(task, where, 125),
        seeds=(0, 1, 2),
        chosen=True,
    )


def _paper(task: Task, where: Where) -> Problem:
    """As published, as far as it is known."""
    name = task.partition(" ")[0]
    large = name == "imagenet"
    return Problem(
        size="paper",
        data=DataConfig(name=name, dir=where.data_dir, validation=None if large else 0.1),
        model=ModelConfig(arch="resnet50"),
        train={"epochs": 90 if large else 200, "batch_size": 256, "optimizer": {"lr": 0.1, "weight_decay": 5e-4}},
        loop={"epochs": 10, "batch_size": 256},
        forget=_forget(task, where, 3000),
        seeds=(0, 1, 2),
    )


def _forget(task: Task, where: Where, n: int) -> tuple[dict[str, Any], ...]:
    if task.endswith("random"):
        return ({"name": "random", "random": n},)
    if where.scores is None:
        raise UserError(f"--scores: forget sets are graded by {ABOUT_SCORES}; give it")
    return _graded(where.scores, n, None)


def _graded(scores: str, n: int, kind: str | None) -> tuple[dict[str, Any], ...]:
    own = {} if kind is None else {"score_kind": kind}
    return tuple({"name": level, "scores": scores, "level": level, "n": n, **own} for level in LEVELS)
