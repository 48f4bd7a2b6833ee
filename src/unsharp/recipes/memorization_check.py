"""How good are memorization scores from few networks? Real images, with wrong labels planted among them.

    python -m unsharp.recipes.memorization_check --data cifar100 --data-dir DIR --scores FILE:KEY --out DIR
    python -m unsharp.recipes.memorization_check --data fashion_mnist --data-dir DIR --out DIR

A slice of the data gets one label in a hundred wrong, drawn among the other classes. A pool of networks is trained on
it without augmentation, so that they fit their training samples. Shown, as the pool grows: how well two halves of it
agree (rank correlation, overlap of the forget sets), the rank correlation with published C-scores on the samples whose
label is right, and the share of the wrong labels among the 2 % with the highest scores. A killed run goes on where it
was.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from unsharp import artifacts, data, runtime
from unsharp.data import DataConfig, ImageSamples
from unsharp.difficulty import load_scores
from unsharp.difficulty.memorization import memorization, spearman
from unsharp.difficulty.stage import MemorizeConfig, estimate, write_arrays
from unsharp.engine import OptimizerConfig
from unsharp.errors import UserError
from unsharp.models import ModelConfig
from unsharp.pool.grow import Work, plan_of
from unsharp.pool.plan import PoolConfig
from unsharp.pool.store import PoolOutputs
from unsharp.progress import BarProgress
from unsharp.stages import Setting, origin_of
from unsharp.training import TrainConfig

LEVELS = ("high", "mid", "low")
SUSPECTS = 0.02
"""Share of the samples, those with the highest scores, among which the wrong labels are looked for."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the recipe."""

    data: str
    """cifar100 or fashion_mnist."""
    data_dir: str
    """The data in the hub's layout."""
    out: str
    """Directory of the pool and of the page."""
    scores: str | None = None
    """C-scores of the data, FILE:KEY."""
    classes: int = 10
    """The first so many classes."""
    per_class: int = 500
    """The first so many images of each."""
    arch: str = "resnet18"
    """Architecture."""
    width: int = 8
    """Its width."""
    epochs: int = 30
    """Epochs of each network."""
    lr: float = 0.1
    """Learning rate, falling to 0 along a cosine."""
    models: int = 100
    """Networks."""
    planted: float = 0.01
    """Share of the labels that are made wrong."""
    n: float = 0.05
    """Share of the samples in each forget set."""
    seed: int = 0
    """Seed of everything."""
    workers: int | None = None
    """Processes at a time, of one thread each."""
    device: str | None = None
    """Where to train."""
    stack: int | None = None
    """Networks in a stack."""


def main(options: Options) -> None:
    """Train the pool, and write `page.md` and `rows.json`."""
    out = Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    device = runtime.pick_device(options.device)
    noisy, wrong, scores = _planted(options, out)
    splits = data.load(noisy, device)
    how = TrainConfig(epochs=options.epochs, batch_size=128, optimizer=OptimizerConfig(lr=options.lr))
    origin = origin_of(ModelConfig(arch=options.arch, width=options.width), noisy, how, splits)
    plan = plan_of(origin, splits.train, PoolConfig(seed=options.seed))
    asked = MemorizeConfig(models=options.models, settle=0, watch=LEVELS, n=options.n)
    work = Work(workers=options.workers, keep_weights=False, device=options.device, stack=options.stack)
    with BarProgress() as bar:
        at = Setting(device=device, store=out / "store", progress=bar, say=print)
        found = estimate(plan, asked, out / "store", work, origin=origin, test=splits.test, at=at)
    rows = [row | judged(found.outputs.first(int(row["models"])), wrong, scores) for row in found.rounds]
    seen = [float(right[had].mean()) for right, had in zip(found.outputs.train.correct, found.outputs.inside)]
    artifacts.write_json(out / "rows.json", rows)
    artifacts.write_text(out / "page.md", page(options, rows, seen, len(splits.train)))
    print(f"wrote {out / 'page.md'}")


def judged(outputs: PoolOutputs, wrong: np.ndarray, scores: np.ndarray | None) -> dict[str, float]:
    """What the estimate of these networks says of the wrong labels, and how it stands to published difficulties.

    Args:
        outputs: Of the networks.
        wrong: (n,) bool, which labels are wrong.
        scores: (n,) float64, published difficulty, higher is harder.
    """
    mem = memorization(outputs.inside, outputs.train.correct).memorization
    known = np.isfinite(mem)
    suspects = np.argsort(-np.where(known, mem, -np.inf), kind="stable")[: round(SUSPECTS * len(mem))]
    found = {"recall": float(wrong[suspects].sum() / wrong.sum()), "known": float(known.mean())}
    clean = known & ~wrong
    if scores is not None and clean.sum() > 1:
        found["cscore"] = spearman(mem[clean], -scores[clean])
    return found


def page(options: Options, rows: list[dict[str, Any]], seen: list[float], n: int) -> str:
    """The table in Markdown."""
    lines = [
        f"`python -m unsharp.recipes.memorization_check --data {options.data} --data-dir DIR "
        f"{'--scores FILE:KEY ' if options.scores else ''}--out DIR`: {options.classes} classes × {options.per_class} "
        f"images, {options.arch} of width {options.width}, {options.epochs} epochs, {n:,} samples, "
        f"{round(options.planted * n)} of them with a wrong label, sets of {round(options.n * n)}; torch "
        f"{runtime.versions()['torch']}, {datetime.date.today().isoformat()}. Accuracy of a network on its own "
        f"training samples: mean {100 * np.mean(seen):.2f} %, least {100 * min(seen):.2f} %.",
        "| networks | rank correlation of halves | high | mid | low | with C-scores | wrong labels found |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [f"{row['models']}", _two(row["spearman"]), *(_two(row[level]) for level in LEVELS)]
        cells += [_two(row.get("cscore")), f"{100 * row['recall']:.0f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n\n".join([lines[0], "\n".join(lines[1:])]) + "\n"


def _two(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.2f}"


def _planted(options: Options, out: Path) -> tuple[DataConfig, np.ndarray, np.ndarray | None]:
    """Write the slice with wrong labels; which are wrong, and the published difficulties."""
    config = DataConfig(
        name=options.data,
        dir=str(Path(options.data_dir).absolute()),
        classes=options.classes,
        per_class=options.per_class,
    )
    splits = data.load(config)
    train, test = splits.train, splits.test
    if not isinstance(train, ImageSamples) or not isinstance(test, ImageSamples):
        raise UserError("the recipe needs images that fit in memory, with a test set")
    scores = None if options.scores is None else load_scores(options.scores, train, kind="cscore")
    rng = np.random.default_rng(options.seed)
    wrong = np.zeros(len(train), bool)
    wrong[rng.choice(len(train), round(options.planted * len(train)), replace=False)] = True
    labels = train.labels.copy()
    labels[wrong] = (labels[wrong] + rng.integers(1, train.n_classes, wrong.sum())) % train.n_classes
    write_arrays(
        out / "planted.npz",
        {
            "train_x": train.images.cpu().numpy(),
            "train_y": labels,
            "test_x": test.images.cpu().numpy(),
            "test_y": test.labels,
        },
    )
    treated = {"mean": train.mean, "std": train.std, "augment": "none"}
    return DataConfig(name="npz", dir=str(out / "planted.npz"), **treated), wrong, scores


if __name__ == "__main__":
    from unsharp.recipes import memorization_check

    memorization_check.main(tyro.cli(memorization_check.Options, description=__doc__))
