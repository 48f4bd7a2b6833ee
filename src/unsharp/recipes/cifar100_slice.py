"""Real images on a processor: 20 classes × 250 images of CIFAR-100, a narrow ResNet-18, forget sets by C-score.

    python -m unsharp.recipes.cifar100_slice --data-dir DIR --scores scores.npz:cifar100_cscore --out DIR

Forget sets of 250 images (5 %): high = lowest C-scores, mid = nearest to 0.5, low = highest. Each variant's settings
are chosen from the points of its grid by ToW on the mid set of `TUNED_ON`, a seed apart from those that are shown; the
rule was fixed before the runs. Images are flipped but not cropped, so that thirty epochs fit the training
set, as two hundred do with crops. A killed run goes on where it was. About two hours on one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from unsharp import artifacts, runtime
from unsharp.data import DataConfig
from unsharp.difficulty import ForgetConfig
from unsharp.errors import UserError
from unsharp.models import ModelConfig
from unsharp.progress import BarProgress
from unsharp.recipes.comparison import Comparison, Point, Task, Variant, compare, tune
from unsharp.training import TrainConfig

TUNED_ON = 100
TUNED_FOR = "mid"
LEVELS = ("high", "mid", "low")
LOOP: dict[str, Any] = {"epochs": 5, "batch_size": 128}
NEGATIVE = {"alpha": [0.99, 0.95], "lr": [0.01, 0.03]}
VARIANTS = (
    Variant(method="finetune", settings=LOOP, grid={"lr": [0.01, 0.03, 0.1, 0.2]}),
    Variant(method="gradient_ascent", settings=LOOP, grid={"lr": [3e-4, 1e-3, 3e-3, 1e-2]}),
    Variant(method="neggrad", rule="none", settings=LOOP, grid=NEGATIVE),
    Variant(method="neggrad", rule="sam", settings=LOOP | {"rho": 0.1}, grid=NEGATIVE),
    Variant(method="neggrad", rule="asam", settings=LOOP | {"rho": 1.0}, grid=NEGATIVE),
    Variant(method="sharp_minmax", rule="asam", settings=LOOP | {"rho": 1.0, "fraction": 0.3}, grid=NEGATIVE),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the recipe."""

    data_dir: str
    """CIFAR-100 in the hub's layout."""
    scores: str
    """C-scores, FILE:KEY."""
    out: str
    """Directory of all runs and of the pages."""
    seeds: int = 3
    """Number of seeds shown, from 0."""
    workers: int | None = None
    """Processes at a time, of one thread each."""
    classes: int = 20
    """The first so many classes."""
    per_class: int = 250
    """The first so many images of each."""
    width: int = 8
    """Width of the ResNet-18."""
    epochs: int = 30
    """Epochs of training."""
    forget: int = 250
    """Size of each forget set."""
    tuned: bool = True
    """Tune; else take the middle of each grid, to try the recipe out."""


def main(options: Options) -> None:
    """Tune, compare, and write `report.html`, `table.md` and `tuning.json`."""
    from unsharp.report import write_report
    from unsharp.report.tables import summarise, to_markdown

    out = Path(options.out)
    what = comparison(options)
    with BarProgress() as bar:
        pool: dict[str, Any] = {"workers": options.workers, "progress": bar}
        if options.tuned:
            points, rows = tune(what, out, seeds=[TUNED_ON], tasks=[TUNED_FOR], **pool)
        else:
            points = [Point(variant=v, settings=(tried := v.points())[len(tried) // 2]) for v in VARIANTS]
            rows = []
        artifacts.write_json(out / "tuning.json", rows)
        facts = compare(what, out, seeds=range(options.seeds), points=points, **pool)
    artifacts.write_json(out / "facts.json", facts)
    write_report(out / "report.html", facts, title="CIFAR-100, 20 classes: unlearning by difficulty")
    artifacts.write_text(out / "table.md", page(options, rows, to_markdown(summarise(facts))))
    print(f"wrote {out / 'table.md'} and {out / 'report.html'}")


def comparison(options: Options) -> Comparison:
    """What the recipe compares."""
    file, _, _ = options.scores.rpartition(":")
    if not Path(file or options.scores).is_file():
        raise UserError(f"scores {options.scores!r}: there is no such file; give FILE:KEY")
    return Comparison(
        data=DataConfig(
            name="cifar100",
            dir=str(Path(options.data_dir).absolute()),
            classes=options.classes,
            per_class=options.per_class,
            augment="flip",
        ),
        model=ModelConfig(arch="resnet18", width=options.width),
        train=TrainConfig(epochs=options.epochs, batch_size=128),
        tasks=tuple(
            Task(
                name=level,
                forget=ForgetConfig(
                    scores=str(Path(file).absolute()) + options.scores[len(file) :],
                    score_kind="cscore",
                    level=level,
                    n=options.forget,
                ),
            )
            for level in LEVELS
        ),
        variants=VARIANTS,
    )


def page(options: Options, rows: list[dict[str, Any]], table: str) -> str:
    """The result page, in Markdown."""
    versions = runtime.versions()
    tried = [
        f"| {r['method']} | {r['rule'] or 'default'} | {_plain(r['settings'])} | {r['tow']:.2f} | "
        f"{'chosen' if r['chosen'] else ''} |"
        for r in rows
    ]
    return "\n".join(
        [
            "# CIFAR-100, 20 classes × 250 images: unlearning by difficulty",
            "",
            "`python -m unsharp.recipes.cifar100_slice --data-dir DIR --scores scores.npz:cifar100_cscore --out DIR`"
            f" with {options.seeds} seeds, width {options.width}, {options.epochs} epochs, {options.forget} to forget; "
            f"torch {versions['torch']}, Python {versions['python']}, processor, one thread a run.",
            "",
            table,
            "",
            "## How the settings were chosen",
            "",
            f"By ToW on the {TUNED_FOR} set of seed {TUNED_ON}, which is not among the seeds above.",
            "",
            "| method | rule | settings | ToW | |",
            "|---|---|---|---|---|",
            *tried,
            "",
        ]
    )


def _plain(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name not in LOOP)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
