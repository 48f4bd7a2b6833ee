"""What the gain of Sharp MinMax is made of: its parts one at a time, beside NegGrad and SAUL, on real images.

    python -m unsharp.recipes.sharp_minmax_parts --data-dir DIR --scores scores.npz:cifar100_cscore --out DIR

20 classes × 250 images of CIFAR-100, a ResNet-18 of width 8, forget sets of 250 by C-score (high, mid, low), five
epochs of unlearning at batches of 128 under SGD with momentum 0.9. The rule for choosing, fixed before the runs: each
variant has a grid of six points (three values of its forget weight, two learning rates); the point with the highest ToW
on the mid set of seed 100, with 1,000 validation images in place of the test images, is taken for all sets and seeds
0 to 4. The last group of variants was added, with grids fixed before its runs, after the others had been seen. A killed
run goes on where it was; what is finished is shown. About twelve hours on one core.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from unsharp import artifacts, runtime, stats
from unsharp.errors import UserError
from unsharp.progress import BarProgress
from unsharp.recipes import cifar100_slice
from unsharp.recipes.comparison import Comparison, Point, Variant, compare, tune
from unsharp.sharpness import RULES

TUNED_ON = 100
TUNED_FOR = "mid"
LEVELS = cifar100_slice.LEVELS
ATTACKS = ("svc_confidence", "threshold_modified_entropy")
LOOP: dict[str, Any] = {"epochs": 5, "batch_size": 128}
GRID: dict[str, Any] = {"alpha": [0.98, 0.95, 0.9], "lr": [0.03, 0.1]}
MINMAX: dict[str, Any] = LOOP | {"rho": 1.0, "fraction": 0.3}
ALIKE, APART = 0.05, 0.03
"""In the figure: costs that count as one, and how far apart their variants stand."""
FULL = "Sharp MinMax"
PLAIN = "NegGrad"


def _neggrad(name: str, rule: str, **settings: Any) -> Variant:
    return Variant(name=name, method="neggrad", rule=rule, settings=LOOP | settings, grid=GRID)


def _minmax(name: str, rule: str = "asam", without: Sequence[str] = (), **settings: Any) -> Variant:
    kept = {key: value for key, value in MINMAX.items() if key not in without}
    return Variant(name=name, method="sharp_minmax", rule=rule, settings=kept | settings, grid=GRID)


TIERS: tuple[tuple[Variant, ...], ...] = (
    (
        _neggrad(PLAIN, "none"),
        _neggrad("NegGrad, SAM on the sum", "sam", rho=0.1),
        _neggrad("NegGrad, ASAM on the sum", "asam", rho=1.0),
        _neggrad("NegGrad, SAM on retain", "sam", rho=0.1, sharpness_on="retain"),
        _neggrad("NegGrad, ASAM on retain", "asam", rho=1.0, sharpness_on="retain"),
        Variant(
            name="SAUL",
            method="saul",
            rule="sam",
            settings=LOOP | {"rho": 0.1},
            grid={"forget_level": [1.0, 2.0, 3.0], "lr": [0.03, 0.1]},
        ),
        _minmax(FULL),
    ),
    (
        _minmax("the mask alone, no sharpness", "none", without=("rho",)),
        _minmax("ASAM on retain, no maximisation", rho_forget=0.0),
        _minmax("both sharpness terms, no mask", select="all"),
        _minmax("ASAM every 10th step", every=10),
        _minmax("LookSAM, adaptive, every 10th step", "looksam", adaptive=True, every=10),
        _minmax("single-step ASAM", "s2sam", adaptive=True),
    ),
    (
        _minmax("mask of the smallest gradients", select="smallest"),
        _minmax("random mask", select="random"),
        _minmax("fraction 5 %", fraction=0.05),
        _minmax("fraction 10 %", fraction=0.1),
        _minmax("fraction 50 %", fraction=0.5),
        _minmax("perturbed everywhere", perturb="all"),
        Variant(
            name="as the published code",
            method="sharp_minmax",
            rule="asam",
            settings=MINMAX | {"published": True},
            grid={"alpha": [0.99, 0.97, 0.95], "lr": [1e-3, 3e-3]},
        ),
    ),
    (
        _minmax("both sharpness terms, no mask, single-step ASAM", "s2sam", adaptive=True, select="all"),
        _minmax("both sharpness terms, no mask, ASAM every 10th step", every=10, select="all"),
        Variant(
            name="as the published code, smaller steps",
            method="sharp_minmax",
            rule="asam",
            settings=MINMAX | {"published": True},
            grid={"alpha": [0.99, 0.95], "lr": [1e-5, 3e-5, 1e-4]},
        ),
    ),
)
"""The variants, the most telling first; the last group was added after the others had been seen."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the recipe."""

    data_dir: str
    """CIFAR-100 in the hub's layout."""
    scores: str
    """C-scores, FILE:KEY."""
    out: str
    """Directory of all runs and of the pages."""
    seeds: int = 5
    """Number of seeds shown, from 0."""
    workers: int | None = None
    """Processes at a time, of one thread each."""
    tiers: int = len(TIERS)
    """How many of the groups of variants are run, the most telling first."""
    epochs: int = 30
    """Epochs of training."""
    train_rule: str = "none"
    """Sharpness rule of the training, with its default radius."""
    per_class: int = 300
    """Images of each class, the last 50 of them for validation."""
    forget: int = 250
    """Size of each forget set."""


def main(options: Options) -> None:
    """Tune and compare, group by group, and write `facts.json`, `tuning.json` and `page.md` after each."""
    out, what = Path(options.out), comparison(options)
    rows: list[dict[str, Any]] = []
    facts: list[dict[str, Any]] = []
    for variants in TIERS[: options.tiers]:
        part = dataclasses.replace(what, variants=variants)
        with BarProgress() as bar:
            pool: dict[str, Any] = {"workers": options.workers, "progress": bar}
            points, tried = tune(part, out, seeds=[TUNED_ON], tasks=[TUNED_FOR], **pool)
            rows += tried
            artifacts.write_json(out / "tuning.json", rows)
            facts += _by_seed(part, points, out, options.seeds, pool, facts, rows, options)
    print(f"wrote {out / 'page.md'}")


def _by_seed(
    what: Comparison,
    points: list[Point],
    out: Path,
    seeds: int,
    pool: dict[str, Any],
    before: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    options: Options,
) -> list[dict[str, Any]]:
    """Run a group seed by seed, so that what is finished is balanced, and write the page after each."""
    found: list[dict[str, Any]] = []
    for seed in range(seeds):
        found += compare(what, out, seeds=[seed], points=points, **pool)
        artifacts.write_json(out / "facts.json", before + found)
        artifacts.write_text(out / "page.md", page(options, rows, before + found))
        artifacts.write_text(out / "frontier.svg", figure(before + found))
    return found


def comparison(options: Options) -> Comparison:
    """What the recipe compares, without the variants."""
    if options.per_class <= 50:
        raise UserError(f"per_class must be above 50, of which 50 are held out, got {options.per_class}")
    shared = cifar100_slice.Options(
        data_dir=options.data_dir,
        scores=options.scores,
        out=options.out,
        per_class=options.per_class,
        epochs=options.epochs,
        forget=options.forget,
    )
    base = cifar100_slice.comparison(shared)
    data = dataclasses.replace(base.data, validation=50)
    train = dataclasses.replace(base.train, rule=RULES[options.train_rule]())
    return dataclasses.replace(base, data=data, train=train, attacks=ATTACKS, variants=())


def page(options: Options, rows: list[dict[str, Any]], facts: list[dict[str, Any]]) -> str:
    """The result page in Markdown: ToW of each variant on each set, paired differences, accuracies, cost, choice."""
    versions = runtime.versions()
    parts = [
        "`python -m unsharp.recipes.sharp_minmax_parts --data-dir DIR --scores scores.npz:cifar100_cscore --out DIR`; "
        f"torch {versions['torch']}, on a processor, one thread a run; {datetime.date.today().isoformat()}.",
        "### ToW",
        _table([*LEVELS, "mean"], facts, lambda f: f["metrics"]["tow"]),
        f"### ToW, paired with {PLAIN}",
        _table([*LEVELS, "mean"], facts, lambda f: f["metrics"]["tow"], against=PLAIN),
        f"### ToW, paired with {FULL}",
        _table([*LEVELS, "mean"], facts, lambda f: f["metrics"]["tow"], against=FULL),
    ]
    parts += ["### Accuracy (%) of the networks before and retrained", _networks(facts)]
    shown = {
        "Retain accuracy (%)": "retain_accuracy",
        "Forget accuracy (%)": "forget_accuracy",
        "Test accuracy (%)": "test_accuracy",
    }
    for title, key in shown.items():
        parts += [f"### {title}, gap to the retrained network", _gaps(facts, key)]
    parts += [
        "### Membership inference (SVC on confidence; % of the forget set called unseen), gap to the retrained network",
        _gaps(facts, ATTACKS[0]),
        "### Membership inference (threshold on modified entropy), gap to the retrained network",
        _gaps(facts, ATTACKS[1]),
        "### Cost",
        _costs(facts),
        f"### ToW for its cost: is it within a point of {FULL}?",
        "Mean over the three sets. It holds where the 95 % interval of the paired difference lies above −1, fails "
        "where the interval lies below −1, and is undecided otherwise. The numbers are those of the figure.",
        _frontier(facts),
        "### How the settings were chosen",
        f"By ToW on the {TUNED_FOR} set of seed {TUNED_ON} with the validation images.",
        _choices(rows),
    ]
    return "\n\n".join(parts) + "\n"


def _names(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(f["variant"] for f in facts))


def _values(facts: Sequence[Mapping[str, Any]], name: str, level: str, value: Any) -> dict[int, float]:
    """A variant's values on a set, by seed; on "mean" their mean over the sets, where a seed has all of them."""
    found = {(f["training_seed"], f["task"]): value(f) for f in facts if f["variant"] == name and value(f) is not None}
    seeds = sorted({seed for seed, _ in found})
    if level != "mean":
        return {seed: found[seed, level] for seed in seeds if (seed, level) in found}
    whole = [seed for seed in seeds if all((seed, task) in found for task in LEVELS)]
    return {seed: sum(found[seed, task] for task in LEVELS) / len(LEVELS) for seed in whole}


def _interval(values: Sequence[float], sign: bool = False) -> str:
    if not values:
        return "—"
    interval = stats.mean_interval(values)
    half = "" if interval.half_width is None else f" ± {interval.half_width:.1f}"
    return f"{interval.mean:+.1f}{half}" if sign else f"{interval.mean:.1f}{half}"


def _table(levels: Sequence[str], facts: Sequence[Mapping[str, Any]], value: Any, against: str | None = None) -> str:
    lines = ["| variant | n | " + " | ".join(levels) + " |", "|---|---:|" + "---:|" * len(levels)]
    for name in _names(facts):
        if name == against:
            continue
        cells, n = [], 0
        for level in levels:
            own = _values(facts, name, level, value)
            other = None if against is None else _values(facts, against, level, value)
            paired = own if other is None else {s: own[s] - other[s] for s in own if s in other}
            cells.append(_interval(list(paired.values()), sign=against is not None))
            n = max(n, len(paired))
        lines.append(f"| {name} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _networks(facts: Sequence[Mapping[str, Any]]) -> str:
    """Retain, forget and test accuracy of the original and of the retrained networks on each set, over the seeds."""
    kinds = ("retain_accuracy", "forget_accuracy", "test_accuracy")
    lines = ["| network | set | n | retain | forget | test |", "|---|---|---:|---:|---:|---:|"]
    for name, key in (("before", "original"), ("retrained", "reference")):
        for level in LEVELS:
            # every variant of a seed and set is measured beside the same networks
            found = {f["training_seed"]: f["metrics"][key] for f in facts if f["task"] == level}
            cells = [_interval([found[seed][kind] for seed in sorted(found)]) for kind in kinds]
            lines.append(f"| {name} | {level} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gaps(facts: Sequence[Mapping[str, Any]], key: str) -> str:
    def gap(fact: Mapping[str, Any]) -> float | None:
        gaps = fact["metrics"]["gap"]
        return gaps["mia"].get(key, {}).get("mia") if key in ATTACKS else gaps.get(key)

    return _table(LEVELS, facts, gap)


def _costs(facts: Sequence[Mapping[str, Any]]) -> str:
    """Seconds and passes of each variant, and their ratio to NegGrad's of the same set and seed."""
    lines = ["| variant | seconds | passes | time / NegGrad | passes / NegGrad |", "|---|---:|---:|---:|---:|"]
    plain = {(f["training_seed"], f["task"]): f["metrics"] for f in facts if f["variant"] == PLAIN}
    for name in _names(facts):
        mine = [f for f in facts if f["variant"] == name]
        pairs = [
            (f["metrics"], plain[f["training_seed"], f["task"]])
            for f in mine
            if (f["training_seed"], f["task"]) in plain
        ]
        cells = [
            _interval([f["metrics"]["seconds"] for f in mine]),
            _interval([f["metrics"]["passes"] for f in mine]),
            *(
                f"{stats.mean_interval([m[k] / p[k] for m, p in pairs]).mean:.2f}" if pairs else "—"
                for k in ("seconds", "passes")
            ),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _frontier(facts: Sequence[Mapping[str, Any]]) -> str:
    """Passes against ToW, cheapest first: what each variant is worth beside the full method."""
    lines = [f"| | variant | passes / {PLAIN} | ToW | less {FULL} | within a point |", "|---:|---|---:|---:|---:|---|"]
    for i, (name, cost, own, paired) in enumerate(sorted(worth(facts), key=lambda row: (row[1], row[0])), 1):
        lines.append(
            f"| {i} | {name} | {cost:.2f} | {_interval(own)} | {_interval(paired, sign=True)} | {verdict(paired)} |"
        )
    return "\n".join(lines)


def worth(facts: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, list[float], list[float]]]:
    """Of each variant: its passes over NegGrad's, its mean ToW for each seed, and that less the full method's."""

    def mean_tow(name: str) -> dict[int, float]:
        return _values(facts, name, "mean", lambda f: f["metrics"]["tow"])

    def mean_passes(name: str) -> float:
        return stats.mean_interval([f["metrics"]["passes"] for f in facts if f["variant"] == name]).mean

    full, found = mean_tow(FULL), []
    for name in _names(facts):
        own = mean_tow(name)
        paired = [own[seed] - full[seed] for seed in own if seed in full]
        if paired:
            found.append((name, mean_passes(name) / mean_passes(PLAIN), list(own.values()), paired))
    return found


def verdict(paired: Sequence[float], within: float = 1.0) -> str:
    """Whether differences show that a variant loses no more than `within` points: holds, fails, or undecided."""
    interval = stats.mean_interval(paired)
    if interval.low is None or interval.high is None:
        return "undecided"
    return "holds" if interval.low > -within else "fails" if interval.high < -within else "undecided"


def figure(facts: Sequence[Mapping[str, Any]]) -> str:
    """Mean ToW against passes, as SVG; numbers name the variants in the order of the table.

    Variants of nearly equal cost stand side by side about it.
    """
    from unsharp.report import figures

    rows = sorted(worth(facts), key=lambda row: (row[1], row[0]))
    with figures.canvas(4.2, 1, sharey=False) as (drawn, (ax,)):
        for i, (name, cost, own, _) in enumerate(rows):
            interval = stats.mean_interval(own)
            masked = name not in (PLAIN, "SAUL") and not name.startswith((f"{PLAIN},", "both"))
            colour, marker = (figures.COLOURS[1], "s") if masked else (figures.COLOURS[0], "o")
            alike = [j for j, row in enumerate(rows) if abs(row[1] - cost) < ALIKE]
            at = cost + APART * (alike.index(i) - (len(alike) - 1) / 2)
            half = interval.half_width or 0.0
            ax.errorbar(at, interval.mean, yerr=half, color=colour, marker=marker, markersize=4, linestyle="none")
            ax.annotate(f"{i + 1}", (at, interval.mean + half), (0, 2), textcoords="offset points", ha="center")
        ax.set_xticks(sorted({round(cost, 1) for _, cost, _, _ in rows}))
        ax.set_xlabel("passes, relative to NegGrad")
        ax.set_title("ToW, mean over the sets, 95 % interval over seeds", loc="left")
        for label, marker, colour in (("with a mask", "s", 1), ("without", "o", 0)):
            ax.plot([], [], color=figures.COLOURS[colour], marker=marker, linestyle="none", label=label)
        drawn.legend(loc="outside upper left", ncols=2)
        return figures.as_svg(drawn)


def _choices(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| variant | point | ToW | |", "|---|---|---:|---|"]
    for row in rows:
        grid = ", ".join(f"{k} {v}" for k, v in row["settings"].items() if k in ("alpha", "forget_level", "lr"))
        lines.append(f"| {row['name']} | {grid} | {row['tow']:.1f} | {'chosen' if row['chosen'] else ''} |")
    return "\n".join(lines)


if __name__ == "__main__":
    from unsharp.recipes import sharp_minmax_parts

    sharp_minmax_parts.main(tyro.cli(sharp_minmax_parts.Options, description=__doc__))
