"""Real images on a processor: 20 classes × 250 images of CIFAR-100, a narrow ResNet-18, forget sets by C-score.

    python -m unsharp.recipes.cifar100_slice --data-dir DIR --scores scores.npz:cifar100_cscore --out DIR

Forget sets of 250 images (5 %): high = lowest C-scores, mid = nearest to 0.5, low = highest. Each variant's settings
are chosen from the points of its grid by ToW on the mid set of `TUNED_ON`, a seed apart from those that are shown; the
rule was fixed before the runs. Images are flipped but not cropped, so that thirty epochs fit the training
set, as two hundred do with crops. A killed run goes on where it was. About two hours on one core.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from unsharp import artifacts, runtime, stats
from unsharp.data import DataConfig
from unsharp.difficulty import ForgetConfig
from unsharp.errors import UserError
from unsharp.methods import METHODS
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
    artifacts.write_text(out / "table.md", page(options, rows, facts))
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


def page(options: Options, rows: list[dict[str, Any]], facts: list[dict[str, Any]]) -> str:
    """The result page, in Markdown: paired differences, a table for each forget set, the choice of settings."""
    from unsharp.report.tables import summarise, to_markdown

    versions = runtime.versions()
    tried = [
        f"| {r['method']} | {r['rule'] or 'default'} | {_plain(r['settings'])} | {r['tow']:.2f} | "
        f"{'chosen' if r['chosen'] else ''} |"
        for r in rows
    ]
    parts = [
        "`python -m unsharp.recipes.cifar100_slice --data-dir DIR --scores scores.npz:cifar100_cscore --out DIR`: "
        f"{options.seeds} seeds, ResNet-18 of width {options.width}, {options.epochs} epochs, {options.forget} images "
        f"to forget; torch {versions['torch']}, Python {versions['python']}, on a processor, one thread a run; "
        f"{datetime.date.today().isoformat()}.",
        "### ToW, paired with NegGrad under SGD",
        paired(facts),
        *(
            f"### Forget set: {level}\n\n{to_markdown(summarise([f for f in facts if f['task'] == level]))}"
            for level in LEVELS
        ),
        "### How the settings were chosen",
        f"By ToW on the {TUNED_FOR} set of seed {TUNED_ON}, which is not among the seeds above.",
        "\n".join(["| method | rule | settings | ToW | |", "|---|---|---|---:|---|", *tried]),
    ]
    return "\n\n".join(parts) + "\n"


def paired(facts: list[dict[str, Any]]) -> str:
    """Mean difference in ToW to NegGrad under SGD, over the seeds, with its 95 % t interval."""

    def tow(level: str, variant: Variant) -> list[float]:
        rule = variant.rule or METHODS[variant.method].default_rule
        return [
            f["metrics"]["tow"]
            for f in facts
            if (f["task"], f["method"]["name"], f["rule"]["name"]) == (level, variant.method, rule)
        ]

    base = next(v for v in VARIANTS if (v.method, v.rule) == ("neggrad", "none"))
    lines = [f"| variant | {' | '.join(LEVELS)} |", "|---|" + "---:|" * len(LEVELS)]
    for variant in VARIANTS:
        if variant is not base:
            found = [stats.paired_difference(tow(level, variant), tow(level, base)) for level in LEVELS]
            shown = [f"{d.mean:+.1f}" + ("" if d.half_width is None else f" ± {d.half_width:.1f}") for d in found]
            lines.append(f"| {variant.method} {variant.rule or ''} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _plain(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name not in LOOP)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
