"""How good are memorization scores from few networks? Real images, with wrong labels planted among them.

    python -m unsharp.recipes.memorization_check --data cifar100 --data-dir DIR --scores FILE:KEY --out DIR
    python -m unsharp.recipes.memorization_check --data fashion_mnist --data-dir DIR --out DIR

A slice of the data gets one label in a hundred wrong, drawn among the other classes. A pool of networks is trained on
it without augmentation, so that they fit their training samples. Shown, as the pool grows: how well two halves of it
agree (rank correlation, overlap of the forget sets), the rank correlation with published C-scores on the samples whose
label is right, and the share of the wrong labels among the 2 % with the highest scores. A killed run goes on where it
was.

Then, of the whole pool, why they are found or not. A clean sample that networks get right only if they had it has the
score of a wrong label and takes its place among the 2 %, so the recall has a bound that no number of networks lifts.
Besides the score itself, three finer readings of the same answers are judged; all are shown, whatever comes out. With
`--published` the scores are compared with memorization scores that others published for some of the samples.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from unsharp import artifacts, data, runtime
from unsharp.data import DataConfig, ImageSamples, Samples, Splits
from unsharp.difficulty import load_scores
from unsharp.difficulty.files import find, split_spec
from unsharp.difficulty.memorization import memorization, spearman
from unsharp.difficulty.stage import MemorizeConfig, estimate, write_arrays
from unsharp.engine import OptimizerConfig
from unsharp.errors import UserError
from unsharp.models import ModelConfig
from unsharp.pool.grow import Work, plan_of
from unsharp.pool.plan import Plan, PoolConfig
from unsharp.pool.store import PoolOutputs
from unsharp.progress import BarProgress
from unsharp.stages import Setting, origin_of
from unsharp.subject import Origin
from unsharp.training import TrainConfig

LEVELS = ("high", "mid", "low")
SHARES = (0.01, 0.02, 0.05)
"""Shares of the samples, those with the highest scores, among which the wrong labels are looked for."""
SUSPECTS = SHARES[1]
AIM, FITTED = 0.9, 0.995
"""Share of the wrong labels that should be found, where networks have this accuracy on what they were trained on."""


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
    published: str | None = None
    """Published memorization of some samples, FILE:KEY; FILE:KEY_index has their positions in the full training set."""
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


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A slice of the data with wrong labels.

    Args:
        data: The slice, as data that any command can read.
        wrong: (n,) bool, which labels are wrong.
        cscore: (n,) float64, C-scores, low is hard; None where none were named.
        published: (n,) float64, published memorization, NaN where there is none; None where none was named.
    """

    data: DataConfig
    wrong: np.ndarray
    cscore: np.ndarray | None
    published: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What networks are trained on, and how.

    Args:
        planted: The samples.
        splits: They and the test samples, on the device.
        origin: Network, data and training.
        plan: Of the pool.
    """

    planted: Planted
    splits: Splits
    origin: Origin
    plan: Plan


def main(options: Options) -> None:
    """Train the pool, and write `page.md` and `rows.json`."""
    out = Path(options.out).absolute()
    device = runtime.pick_device(options.device)
    problem = pose(options, device)
    asked = MemorizeConfig(models=options.models, settle=0, watch=LEVELS, n=options.n)
    work = Work(workers=options.workers, keep_weights=False, device=options.device, stack=options.stack)
    with BarProgress() as bar:
        at = Setting(device=device, store=out / "store", progress=bar, say=print)
        splits = problem.splits
        found = estimate(problem.plan, asked, at.store, work, origin=problem.origin, test=splits.test, at=at)
    planted = problem.planted
    rows = [plain(row | judged(found.outputs.first(int(row["models"])), planted)) for row in found.rounds]
    why = explained(found.outputs, planted)
    artifacts.write_json(out / "rows.json", {"rows": rows, "why": why})
    artifacts.write_text(out / "page.md", page(options, rows, why))
    print(f"wrote {out / 'page.md'}")


def pose(options: Options, device: torch.device) -> Problem:
    """Write the slice into the directory of the recipe, and say how networks are trained on it."""
    out = Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    planted = plant(options, out)
    splits = data.load(planted.data, device)
    how = TrainConfig(epochs=options.epochs, batch_size=128, optimizer=OptimizerConfig(lr=options.lr))
    origin = origin_of(ModelConfig(arch=options.arch, width=options.width), planted.data, how, splits)
    plan = plan_of(origin, splits.train, PoolConfig(seed=options.seed))
    return Problem(planted=planted, splits=splits, origin=origin, plan=plan)


def judged(outputs: PoolOutputs, planted: Planted) -> dict[str, float]:
    """What the estimate of these networks says of the wrong labels, and how it stands to published difficulties."""
    mem = memorization(outputs.inside, outputs.train.correct).memorization
    known, wrong = np.isfinite(mem), planted.wrong
    found = {"recall": recall(mem, wrong, SUSPECTS), "known": float(known.mean())}
    for name, theirs in (("cscore", planted.cscore), ("published", planted.published)):
        if theirs is not None:
            both = known & ~wrong & np.isfinite(theirs)
            found |= {name: spearman(mem[both], theirs[both])} if both.sum() > 2 else {}
    return found


def explained(outputs: PoolOutputs, planted: Planted) -> dict[str, Any]:
    """Why the wrong labels are found or not: the networks, the samples that look like them, and finer scores.

    Returns:
        "networks", "train" and "test" accuracies in percent, "rivals" (clean samples of score 1), "alike" (wrong labels
        of score 1), "wrong", "samples", "published" (samples with a published score), and "scores": for each reading
        "recall" by share, and "needed", the share that one has to look at to find 90 %.
    """
    wrong, mem = planted.wrong, memorization(outputs.inside, outputs.train.correct)
    right = outputs.train.correct
    whole = mem.memorization >= 1
    return {
        "networks": len(outputs),
        "train": [100 * float(r[had].mean()) for r, had in zip(right, outputs.inside)],
        "test": None if outputs.test is None else [100 * float(r.mean()) for r in outputs.test.correct],
        "rivals": int((whole & ~wrong).sum()),
        "alike": int((whole & wrong).sum()),
        "wrong": int(wrong.sum()),
        "samples": len(wrong),
        "published": 0 if planted.published is None else int(np.isfinite(planted.published).sum()),
        "scores": {
            name: {"recall": {str(s): recall(score, wrong, s) for s in SHARES}, "needed": needed(score, wrong)}
            for name, score in readings(outputs).items()
        },
    }


def readings(outputs: PoolOutputs) -> dict[str, np.ndarray]:
    """Scores that the networks' answers give, each (n,), the highest the most suspicious; NaN where not known.

    "memorization" counts right and wrong. "ties by margin" is the same, and samples of equal score go by the mean
    margin of the networks that had not seen them, lowest first. "confidence" puts the probability of the label in place
    of right and wrong. "held-out margin" is that margin alone, negated.
    """
    mem = memorization(outputs.inside, outputs.train.correct).memorization
    without = ~outputs.inside
    with np.errstate(invalid="ignore", divide="ignore"):
        held_out = -(outputs.train.margin * without).sum(0, dtype=np.float64) / without.sum(0)
    order = np.lexsort((held_out, mem))
    place = np.empty(len(mem))
    place[order] = np.arange(len(mem))
    return {
        "memorization": mem,
        "ties by margin": np.where(np.isfinite(mem), place, np.nan),
        "confidence": memorization(outputs.inside, outputs.train.confidence).memorization,
        "held-out margin": held_out,
    }


def recall(score: np.ndarray, wrong: np.ndarray, share: float) -> float:
    """The share of the wrong labels among the highest scores, expected where equal scores stand in a random order.

    Args:
        score: (n,) the highest the most suspicious; NaN is least of all.
        wrong: (n,) bool, at least one of them true.
        share: Share of the samples that are looked at; at least one is.
    """
    score = np.where(np.isfinite(score), score, -np.inf)
    k = max(1, round(share * len(score)))
    last = np.sort(score)[-k]
    above, tied = score > last, score == last
    found = (wrong & above).sum() + (k - above.sum()) * (wrong & tied).sum() / tied.sum()
    return float(found / wrong.sum())


def needed(score: np.ndarray, wrong: np.ndarray, aim: float = AIM) -> float:
    """The least share of the samples, from the highest score down, with so many of the wrong labels (expected)."""
    n = len(score)
    return next(k / n for k in range(1, n + 1) if recall(score, wrong, k / n) >= aim - 1e-9)


def page(options: Options, rows: list[dict[str, Any]], why: dict[str, Any]) -> str:
    """The tables in Markdown."""
    extra = [name for name in ("cscore", "published") if name in rows[-1]]
    titles = {"cscore": "with C-scores", "published": f"with published scores of {why['published']}"}
    columns = ("spearman", *LEVELS, *extra)
    growing = table(
        ["networks", "halves", *LEVELS, *(titles[name] for name in extra), "wrong labels in the top 2 %"],
        [[f"{r['models']}", *(two(r.get(name)) for name in columns), percent(r["recall"])] for r in rows],
    )
    finer = table(
        ["score", *(f"in the top {100 * s:g} %" for s in SHARES), "to be looked at for 90 %"],
        [
            [name, *(percent(of["recall"][str(s)]) for s in SHARES), f"{100 * of['needed']:.1f} %"]
            for name, of in why["scores"].items()
        ],
    )
    reason = (
        f"With all {why['networks']} networks {why['alike']} of the {why['wrong']} wrong labels have a score of 1 "
        f"(right in every network that had the sample, in no other), and so do {why['rivals']} clean samples. The top "
        f"2 % are {round(SUSPECTS * why['samples'])} samples."
    )
    return "\n\n".join([_about(options, why), growing, reason, finer]) + "\n"


def _about(options: Options, why: dict[str, Any]) -> str:
    """The command, the data, and how well the networks fit."""
    n, seen = why["samples"], why["train"]
    given = "".join(f" --{name} FILE:KEY" for name in ("scores", "published") if getattr(options, name))
    tested = "" if why["test"] is None else f"; on test samples mean {np.mean(why['test']):.1f} %"
    below = sum(accuracy < 100 * FITTED for accuracy in seen)
    return (
        f"`python -m unsharp.recipes.memorization_check --data {options.data} --data-dir DIR{given} --out DIR "
        f"--classes {options.classes} --per-class {options.per_class} --arch {options.arch} --width {options.width} "
        f"--epochs {options.epochs} --models {why['networks']} --seed {options.seed}`: {n:,} samples, {why['wrong']} "
        f"of them with a wrong label, sets of {round(options.n * n)}; torch {runtime.versions()['torch']}, "
        f"{datetime.date.today().isoformat()}. Accuracy of a network on its own training samples: mean "
        f"{np.mean(seen):.2f} %, least {min(seen):.2f} % ({below} of {len(seen)} below {100 * FITTED:g} %){tested}. "
        f"Halves: rank correlation of the scores of two halves of the networks, and overlap of their forget sets."
    )


def table(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---:"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def two(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.2f}"


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """The same with None for what is not known."""
    return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in row.items()}


def plant(options: Options, out: Path) -> Planted:
    """Write the slice with wrong labels as `planted.npz`."""
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
    cscore = None if options.scores is None else -load_scores(options.scores, train, kind="cscore")
    published = None if options.published is None else published_scores(options.published, train)
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
    written = DataConfig(name="npz", dir=str(out / "planted.npz"), **treated)
    return Planted(data=written, wrong=wrong, cscore=cscore, published=published)


def published_scores(spec: str, samples: Samples) -> np.ndarray:
    """(n,) float64: published memorization of the samples that have one, else NaN."""
    path, key = split_spec(spec, [".npz"]) or (Path(spec), None)
    if key is None or not path.is_file():
        raise UserError(f"published must be FILE.npz:KEY, got {spec!r}")
    with np.load(path, allow_pickle=False) as file:
        if missing := [name for name in (key, f"{key}_index") if name not in file]:
            raise UserError(f"{path} has no {missing[0]!r}; it has {', '.join(file)}")
        values, positions = file[key].astype(np.float64), file[f"{key}_index"].astype(np.int64)
    rows, known = find(samples.source_positions, positions)
    return np.where(known, values[rows], np.nan)


if __name__ == "__main__":
    from unsharp.recipes import memorization_check

    memorization_check.main(tyro.cli(memorization_check.Options, description=__doc__))
