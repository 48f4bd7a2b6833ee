"""The main job in a minute: scikit-learn's digits, a small convolutional network, the samples hardest to predict.

The forget set is the 5 % of the training digits whose true class a logistic regression, cross-validated, finds least
likely: samples that a network gets right because it has seen them. Settings were chosen on the seeds `TUNED_ON`, apart
from those that are shown, from six points for each method, by mean ToW: `python -m unsharp.recipes.quickstart` repeats
that. A first choice on one seed had been shown before; `docs/pitfalls.md` tells both.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unsharp import artifacts, data
from unsharp.data import DataConfig
from unsharp.difficulty import ForgetConfig
from unsharp.errors import UserError
from unsharp.models import ModelConfig
from unsharp.recipes.comparison import Comparison, Point, Task, Variant, compare, tune
from unsharp.stages import Setting
from unsharp.training import TrainConfig

FORGET = 72
WORKERS = 3  # each takes some 350 MB, and the whole shall stay below 1.5 GB
TUNED_ON = (100, 101, 102)
LOOP: dict[str, Any] = {"epochs": 5, "batch_size": 64}
NEGATIVE = {"alpha": [0.99, 0.95, 0.9], "lr": [0.01, 0.03]}
VARIANTS = (
    Variant(method="finetune", settings=LOOP, grid={"lr": [0.003, 0.01, 0.03, 0.05, 0.1, 0.2]}),
    Variant(method="gradient_ascent", settings=LOOP, grid={"lr": [3e-4, 1e-3, 3e-3, 5e-3, 1e-2, 2e-2]}),
    Variant(method="neggrad", rule="none", settings=LOOP, grid=NEGATIVE),
    Variant(method="neggrad", rule="sam", settings=LOOP | {"rho": 0.1}, grid=NEGATIVE),
    Variant(method="neggrad", rule="asam", settings=LOOP | {"rho": 1.0}, grid=NEGATIVE),
    Variant(method="sharp_minmax", rule="asam", settings=LOOP | {"rho": 1.0, "fraction": 0.3}, grid=NEGATIVE),
)
CHOSEN: tuple[dict[str, Any], ...] = (
    {"lr": 0.1},
    {"lr": 0.01},
    {"alpha": 0.95, "lr": 0.01},
    {"alpha": 0.95, "lr": 0.03},
    {"alpha": 0.95, "lr": 0.03},
    {"alpha": 0.99, "lr": 0.03},
)


@dataclass(frozen=True)
class Quickstart:
    """What the recipe made: the page, the table as text, and its rows."""

    report: Path
    text: str
    rows: list[dict[str, Any]]


def run(out: str | Path, at: Setting, *, seeds: int = 3, tiny: bool = False, workers: int | None = None) -> Quickstart:
    """Train, unlearn by six variants, retrain, evaluate, report.

    Args:
        out: Directory of all runs and of the page.
        at: Progress and messages.
        seeds: Number of seeds, from 0.
        tiny: Two epochs instead of twenty-five.
        workers: Processes at a time; None for as many as there are processors, up to three.

    Returns:
        Where the page is, and its table.
    """
    from unsharp.report import write_report
    from unsharp.report.brief import brief
    from unsharp.report.tables import ACCURACY, COST, summarise, to_json, to_markdown

    for name, value in (("seeds", seeds), ("workers", workers)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    out = Path(out)
    with artifacts.writing(out / "report.html"):
        out.mkdir(parents=True, exist_ok=True)
    what = comparison(out, epochs=2 if tiny else 25)
    points = [Point(variant=v, settings=v.settings | chosen) for v, chosen in zip(VARIANTS, CHOSEN)]
    at.say(f"{seeds} seed(s): each one network trained, one retrained, {len(points)} unlearned; about a minute")
    workers = min(WORKERS, os.cpu_count() or 1) if workers is None else workers
    facts = compare(what, out, seeds=range(seeds), points=points, workers=workers, progress=at.progress)
    page = out / "report.html"
    write_report(page, facts, title="unsharp quickstart: unlearning hard digits")
    table = summarise(facts)
    artifacts.write_text(out / "table.json", to_json(table))
    artifacts.write_text(out / "table.md", to_markdown(table, pieces=(ACCURACY, COST)))
    at.say(f"report: {page}")
    return Quickstart(page, brief(table), json.loads(to_json(table))["rows"])


def comparison(out: Path, *, epochs: int = 25) -> Comparison:
    """The digits, the network, the forget set; writes the scores by which the forget set is chosen."""
    scores = write_scores(out)
    hardest = ForgetConfig(scores=f"{scores}:score", score_kind="cscore", level="high", n=FORGET)
    return Comparison(
        data=DataConfig(name="digits"),
        model=ModelConfig(arch="small_cnn", width=16),
        train=TrainConfig(epochs=epochs, batch_size=64),
        tasks=(Task(name="hardest", forget=hardest),),
        variants=VARIANTS,
    )


def write_scores(out: Path) -> Path:
    """Write the cross-validated probability of each training digit's true class; low is hard."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    samples = data.load(DataConfig(name="digits")).train
    if not isinstance(samples, data.ImageSamples):
        raise TypeError("the digits fit in memory")
    pixels = samples.images.cpu().numpy().reshape(len(samples), -1) / 255
    guesses: Any = cross_val_predict(LogisticRegression(max_iter=300), pixels, samples.labels, method="predict_proba")
    path = out.absolute() / "scores.npz"
    with artifacts.atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, score=guesses[np.arange(len(samples)), samples.labels])
    return path


def _retune(out: Path) -> None:
    points, rows = tune(comparison(out), out, seeds=TUNED_ON)
    for row in rows:
        mark, name = "*" if row["chosen"] else " ", f"{row['method']} {row['rule'] or ''}"
        print(f"{mark} {name:>22} {row['tow']:6.2f} {row['settings']}")
    chosen = tuple({k: p.settings[k] for k in p.variant.grid} for p in points)
    print("as in CHOSEN" if chosen == CHOSEN else f"differs from CHOSEN: {chosen}")


if __name__ == "__main__":
    target = Path("runs/quickstart-tuning")
    target.mkdir(parents=True, exist_ok=True)
    _retune(target)
