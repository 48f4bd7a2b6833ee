"""Is a suggested α any better than the default? Measured against a sweep of α, by ToW against retrained networks.

    python -m unsharp.recipes.suggest_alpha --out DIR [--data-dir DIR --scores scores.npz:cifar100_cscore]

On the digits, or with --data-dir on the slice of CIFAR-100 of `sharp_minmax_parts`, each α of `SWEEP` is run for each
method, forget set and seed, and so is the α that `unsharp suggest-alpha` names, with its default target and tolerance.
Learning rates and loops are those of the recipes that exist.

The rule, fixed before the runs: a suggestion is better than the default α where the 95 % t interval over seeds of the
paired difference in ToW lies above 0, worse where it lies below, and else no different. Beside it stand the best α of
the sweep for each seed, and the best constant in hindsight, which nobody knows without retraining.

The two predictions of which a suggestion is made are held against the sweep too: the α at which a whole run comes down
to the target, and the smallest at which it loses no more than the tolerance on retained and on test samples. That the
range begins at the target alone, and that the default is kept where there is nothing to bring down, and when that is
so, was settled on seeds 100 to 102 of the digits. A killed run goes on where it was.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from unsharp import artifacts, config, runtime, stats
from unsharp.difficulty import ForgetConfig
from unsharp.errors import UserError
from unsharp.progress import BarProgress
from unsharp.recipes import quickstart, sharp_minmax_parts
from unsharp.recipes.comparison import HERE, Comparison, Point, Task, Variant, _done, _problem, _setting
from unsharp.sweep import Cell, run_cells
from unsharp.theory import adviser
from unsharp.theory.adviser_stage import target_of
from unsharp.tuning.plan import Plan, TuneConfig
from unsharp.tuning.target import Target

MINE = "unsharp.recipes.suggest_alpha"
SWEEP = (0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
DEFAULT = 0.99
DIGITS = (
    Variant(name="NegGrad", method="neggrad", rule="none", settings=quickstart.LOOP | {"lr": 0.01}),
    Variant(name="NegGrad, SAM", method="neggrad", rule="sam", settings=quickstart.LOOP | {"rho": 0.1, "lr": 0.03}),
    Variant(
        name="Sharp MinMax",
        method="sharp_minmax",
        rule="asam",
        settings=quickstart.LOOP | {"rho": 1.0, "fraction": 0.3, "lr": 0.03},
    ),
)
IMAGES = (
    Variant(name="NegGrad", method="neggrad", rule="none", settings=sharp_minmax_parts.LOOP | {"lr": 0.03}),
    Variant(
        name="NegGrad, SAM", method="neggrad", rule="sam", settings=sharp_minmax_parts.LOOP | {"rho": 0.1, "lr": 0.03}
    ),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the recipe."""

    out: str
    """Directory of all runs and of the page."""
    data_dir: str | None = None
    """CIFAR-100 in the hub's layout; the digits, if left out."""
    scores: str | None = None
    """C-scores of CIFAR-100, FILE:KEY."""
    seeds: int = 3
    """Number of seeds."""
    first_seed: int = 0
    """The first of them."""
    per_class: int = 300
    """Images: of each class, the last 50 of them for validation."""
    epochs: int = 30
    """Images: epochs of training."""
    forget: int = 250
    """Images: size of the forget set."""
    tasks: tuple[str, ...] | None = None
    """Forget sets; hardest and random of the digits, high of the images, if left out."""
    workers: int | None = 1
    """Processes at a time, of one thread each."""


def main(options: Options) -> None:
    """Run everything, seed by seed, and write `rows.json` and `table.md` after each."""
    out = Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    what, variants = _digits(out) if options.data_dir is None else _images(options)
    wanted = options.tasks or tuple(t.name for t in what.tasks)[: 2 if options.data_dir is None else 1]
    what = dataclasses.replace(what, tasks=tuple(what.task(name) for name in wanted), attacks=(), variants=())
    rows: list[dict[str, Any]] = []
    with BarProgress() as bar:
        pool: dict[str, Any] = {"store": out / "cells", "workers": options.workers, "threads": 1, "progress": bar}
        for task in wanted:
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                rows += _measured(what, out, seed, task, variants, pool)
                artifacts.write_json(out / "rows.json", rows)
                artifacts.write_text(out / "table.md", page(options, rows))
    print(page(options, rows))


def _digits(out: Path) -> tuple[Comparison, tuple[Variant, ...]]:
    """The digits with twelve of each class held out, from which the adviser learns what unseen samples are like."""
    base = quickstart.comparison(out)
    random = Task(name="random", forget=ForgetConfig(random=quickstart.FORGET))
    held = dataclasses.replace(base.data, validation=12)
    return dataclasses.replace(base, data=held, tasks=(*base.tasks, random)), DIGITS


def _images(options: Options) -> tuple[Comparison, tuple[Variant, ...]]:
    if options.data_dir is None or options.scores is None:
        raise UserError("--data-dir and --scores belong together")
    given = sharp_minmax_parts.Options(
        data_dir=options.data_dir,
        scores=options.scores,
        out=options.out,
        per_class=options.per_class,
        epochs=options.epochs,
        forget=options.forget,
    )
    return sharp_minmax_parts.comparison(given), IMAGES


def _measured(
    what: Comparison, out: Path, seed: int, task: str, variants: Sequence[Variant], pool: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row for each variant: the advice, and the ToW of the sweep and of what was suggested."""
    shared = {"what": config.to_dict(what), "root": str(out), "seed": seed}
    pair = shared | {"task": task}
    _done(run_cells([Cell(f"{HERE}:train_one", shared)], **pool))
    _done(run_cells([Cell(f"{HERE}:retrain_one", pair)], **pool))
    cells = [Cell(f"{MINE}:advise_one", pair | {"variant": config.to_dict(v)}) for v in variants]
    advised = _done(run_cells(cells, **pool))
    tried = [(*SWEEP, _rounded(advice["alpha"])) for advice in advised]
    points = [
        Point(variant=v, settings=v.settings | {"alpha": a}) for v, alphas in zip(variants, tried) for a in alphas
    ]
    each = [Cell(f"{HERE}:unlearn_one", pair | {"point": config.to_dict(point)}) for point in points]
    ran = iter(_done(run_cells(each, **pool)))
    rows = []
    for variant, advice, alphas in zip(variants, advised, tried):
        facts = [next(ran) for _ in alphas]
        rows.append(
            {
                "seed": seed,
                "task": task,
                "variant": variant.name,
                "advice": advice,
                "runs": [_run(alpha, fact) for alpha, fact in zip(alphas, facts)],
                "retrained": {k: facts[0]["metrics"]["reference"][k] for k in ACCURACIES},
                "original": {k: facts[0]["metrics"]["original"][k] for k in ACCURACIES},
                "seconds": stats.mean_interval([f["metrics"]["seconds"] for f in facts]).mean,
            }
        )
    return rows


ACCURACIES = ("retain_accuracy", "forget_accuracy", "test_accuracy")


def _run(alpha: float, fact: Mapping[str, Any]) -> dict[str, float]:
    return {"alpha": alpha, "tow": fact["metrics"]["tow"]} | {k: fact["metrics"][k] for k in ACCURACIES}


def advise_one(what: dict[str, Any], root: str, seed: int, task: str, variant: dict[str, Any]) -> dict[str, Any]:
    """Cell: what the adviser says of one network, forget set and variant."""
    subject, forget = _problem(config.from_dict(Comparison, what), root, seed, task)
    kind = config.from_dict(Variant, variant)
    how = TuneConfig(method=kind.method, rule=kind.rule, settings=kind.settings, seed=seed)
    plan = Plan(subject, forget, how)
    advice = adviser.advise(
        subject.model,
        subject.splits.train,
        forget,
        kind.unlearn_config(kind.settings, seed),
        target_of(plan, _setting(root)),
        unseen=plan.bench.unseen,
    )
    return adviser.plain(advice)


def _rounded(alpha: float) -> float:
    """To three digits of 1 − α."""
    return 1 - float(f"{1 - alpha:.3g}")


# --- what comes of it -------------------------------------------------------------------------------------------------


def tow_at(runs: Sequence[Mapping[str, float]], alpha: float) -> float:
    """ToW at an α between those of the sweep, on straight lines over log(1 − α); the nearest beyond its ends."""
    known = sorted((math.log(1 - run["alpha"]), run["tow"]) for run in runs if run["alpha"] in SWEEP)
    at = math.log(max(1 - alpha, 1e-12))
    return float(np.interp(at, [x for x, _ in known], [y for _, y in known]))


def forget_error_at(runs: Sequence[Mapping[str, float]], alpha: float) -> float:
    """The forget error (%) at an α between those of the sweep, likewise."""
    known = sorted((math.log(1 - run["alpha"]), 100 - run["forget_accuracy"]) for run in runs if run["alpha"] in SWEEP)
    at = math.log(max(1 - alpha, 1e-12))
    return float(np.interp(at, [x for x, _ in known], [y for _, y in known]))


def crossing(runs: Sequence[Mapping[str, float]], figure: str, level: float) -> float | None:
    """The largest α of the sweep at which an accuracy is down to a level, on straight lines over log(1 − α).

    None where no run of the sweep came down so far; the largest α of the sweep where all did.
    """
    known = sorted((math.log(1 - run["alpha"]), run[figure]) for run in runs if run["alpha"] in SWEEP)
    at = adviser.first_crossing([x for x, _ in known], [y for _, y in known], level)
    return None if at is None else 1 - math.exp(at)


def measured(row: Mapping[str, Any]) -> dict[str, float | None]:
    """By the sweep: the α that comes down to the target, and the smallest that stays within the tolerance."""
    kept = {name: row["original"][name] - adviser.TOLERANCE for name in ("retain_accuracy", "test_accuracy")}
    left = [crossing(row["runs"], name, level) for name, level in kept.items()]
    return {
        "target": crossing(row["runs"], "forget_accuracy", row["advice"]["target"]["accuracy"]),
        "least": max((alpha for alpha in left if alpha is not None), default=None),
    }


def predicted(row: Mapping[str, Any]) -> dict[str, float | None]:
    """The same by the probe that speaks."""
    probe = row["advice"]["probes"][-1]
    return {"target": probe["target"], "least": probe["least"]}


def by_sweep(row: Mapping[str, Any]) -> float:
    """What the adviser would have suggested, had it known what the sweep knows."""
    found, target = measured(row), config.from_dict(Target, row["advice"]["target"])
    forgotten = adviser.is_forgotten(row["original"]["forget_accuracy"], target, adviser.TOLERANCE)
    smallest = row["advice"]["probes"][-1]["alpha"]
    return adviser.chosen_alpha(found["least"], DEFAULT if forgotten else found["target"], smallest)


def with_target(row: Mapping[str, Any], accuracy: float) -> float:
    """What the same probes would have suggested, had this forget accuracy been given as the target."""
    probe, total = row["advice"]["probes"][-1], row["advice"]["total"]
    looks = [adviser.Look(step=look["step"], ascent=look["ascent"], values=look) for look in probe["looks"]]
    given = Target(accuracy=accuracy, kind="given")
    if adviser.is_forgotten(looks[0].values["forget_accuracy"], given, adviser.TOLERANCE):
        return adviser.chosen_alpha(probe["least"], DEFAULT, probe["alpha"])
    return adviser.chosen_alpha(probe["least"], adviser.reaching_alpha(looks, accuracy, total), probe["alpha"])


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """ToW of each way to choose α, and the α of each, for one seed."""
    sweep = {run["alpha"]: run["tow"] for run in row["runs"][: len(SWEEP)]}
    best = max(sweep, key=lambda a: (sweep[a], a))
    suggested = row["runs"][-1]
    oracle = with_target(row, row["retrained"]["forget_accuracy"])
    balance = row["advice"]["balance"]
    return {
        "default": sweep[DEFAULT],
        "suggested": suggested["tow"],
        "best": sweep[best],
        "by the sweep": tow_at(row["runs"], by_sweep(row)),
        "true target": tow_at(row["runs"], oracle),
        "balance": tow_at(row["runs"], 0.0 if balance is None else balance),
        "alpha suggested": suggested["alpha"],
        "alpha best": best,
        "alpha true target": oracle,
        "alpha balance": math.nan if balance is None else balance,
        "cost": row["advice"]["passes"] / row["advice"]["run_passes"],
    }


def verdict(suggested: Sequence[float], default: Sequence[float]) -> str:
    """The rule of this page: better, worse, or no different."""
    difference = stats.paired_difference(suggested, default)
    if difference.low is None or difference.high is None:
        return "one seed: no verdict"
    return "better" if difference.low > 0 else "worse" if difference.high < 0 else "no different"


def page(options: Options, rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables, in Markdown."""
    versions = runtime.versions()
    place = (
        "digits"
        if options.data_dir is None
        else f"CIFAR-100, 20 classes × {options.per_class - 50} images, ResNet-18 of width 8, {options.epochs} epochs, "
        f"{options.forget} images to forget"
    )
    command = "python -m unsharp.recipes.suggest_alpha" + "".join(_given(options))
    return (
        "\n\n".join(
            [
                f"`{command}`: {place}, torch {versions['torch']}, Python {versions['python']}, on a processor, one "
                f"thread a run; {datetime.date.today().isoformat()}.",
                "### ToW by how α was chosen",
                _choices(rows),
                "### The α that were chosen, and the forget error (%) there",
                _alphas(rows),
                "### Predicted by the probe, and found by the sweep: α, and the forget error (%) of the sweep there",
                _predictions(rows),
                "### The sweep (ToW, and the forget error in %; means over seeds)",
                _sweep(rows),
                "### Forget accuracy (%): aimed at, and retrained",
                _targets(rows),
            ]
        )
        + "\n"
    )


def _given(options: Options) -> Iterator[str]:
    """The options that differ from their defaults; directories by what they are."""
    words = {"out": "DIR", "data_dir": "DIR", "scores": "FILE:KEY"}
    for each in dataclasses.fields(options):
        value = getattr(options, each.name)
        if each.default is dataclasses.MISSING or value != each.default:
            shown = words.get(each.name) or (" ".join(value) if isinstance(value, tuple) else value)
            yield f" --{each.name.replace('_', '-')} {shown}"


def _groups(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    names = dict.fromkeys((r["variant"], r["task"]) for r in rows)
    return [(f"{v}, {t}", [r for r in rows if (r["variant"], r["task"]) == (v, t)]) for v, t in names]


def _shown(values: Sequence[float], sign: bool = False, digits: int = 1) -> str:
    found = stats.mean_interval(values)
    half = "" if found.half_width is None else f" ± {found.half_width:.{digits}f}"
    return f"{found.mean:{'+' if sign else ''}.{digits}f}{half}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _choices(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["", "n", "default 0.99", "suggested", "suggested − default", "verdict", "best of the sweep"]
    head += ["best constant in hindsight", "the same rule by the sweep", "true target", "first-order balance", "cost"]
    lines = []
    for name, mine in _groups(rows):
        each = [figures(r) for r in mine]
        of = {key: [f[key] for f in each] for key in each[0]}
        means = {a: np.mean([r["runs"][i]["tow"] for r in mine]) for i, a in enumerate(SWEEP)}
        constant = max(means, key=lambda a: means[a])
        difference = [a - b for a, b in zip(of["suggested"], of["default"])]
        lines.append(
            [
                name,
                str(len(mine)),
                _shown(of["default"]),
                _shown(of["suggested"]),
                _shown(difference, sign=True),
                verdict(of["suggested"], of["default"]),
                _shown(of["best"]),
                f"{means[constant]:.1f} (α {constant:g})",
                _shown(of["by the sweep"]),
                _shown(of["true target"]),
                _shown(of["balance"]),
                f"{np.mean(of['cost']):.2f}",
            ]
        )
    return _table(head, lines)


def _alphas(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["", "suggested, by seed", "best of the sweep", "true target", "first-order balance"]
    lines = []
    for name, mine in _groups(rows):
        shown: list[list[str]] = [[], [], [], []]
        for row in mine:
            found, run = figures(row), row["runs"][-1]
            shown[0].append(_with_error(run["alpha"], 100 - run["forget_accuracy"]))
            for cell, key in zip(shown[1:], ("best", "true target", "balance")):
                alpha = found[f"alpha {key}"]
                cell.append("–" if math.isnan(alpha) else _with_error(alpha, forget_error_at(row["runs"], alpha)))
        lines.append([name, *map(", ".join, shown)])
    return _table(head, lines)


def _predictions(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["", "comes down to the target: predicted", "found", "stays within the tolerance: predicted", "found"]
    head += ["by both: suggested", "found", "range", "found in the range"]
    lines = []
    for name, mine in _groups(rows):
        cells: list[list[str]] = [[] for _ in range(7)]
        inside = 0
        for row in mine:
            ours, theirs = predicted(row), measured(row)
            smallest = row["advice"]["probes"][-1]["alpha"]
            both = by_sweep(row)
            low, high = row["advice"]["low"], row["advice"]["high"]
            inside += low <= both <= high
            alphas = [ours["target"], theirs["target"], ours["least"], theirs["least"], row["advice"]["alpha"], both]
            for cell, alpha, floor in zip(cells, alphas, (smallest, min(SWEEP)) * 3):
                cell.append(
                    f"< {floor:g}" if alpha is None else _with_error(alpha, forget_error_at(row["runs"], alpha))
                )
            cells[6].append(f"{low:.3f}–{high:.3f}")
        lines.append([name, *map(", ".join, cells), f"{inside} of {len(mine)}"])
    return _table(head, lines)


def _with_error(alpha: float, error: float) -> str:
    return f"{alpha:.4g} ({error:.0f})"


def _sweep(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for name, mine in _groups(rows):
        runs = [[r["runs"][i] for r in mine] for i in range(len(SWEEP))]
        means = [(np.mean([x["tow"] for x in r]), np.mean([100 - x["forget_accuracy"] for x in r])) for r in runs]
        lines.append([name, *(f"{tow:.1f} ({error:.0f})" for tow, error in means)])
    return _table(["", *(f"α {a:g}" for a in SWEEP)], lines)


def _targets(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for name, mine in _groups(rows):
        aimed = [r["advice"]["target"]["accuracy"] for r in mine]
        retrained = [r["retrained"]["forget_accuracy"] for r in mine]
        got = [r["runs"][-1]["forget_accuracy"] for r in mine]
        lines.append([name, mine[0]["advice"]["target"]["kind"], _shown(aimed), _shown(retrained), _shown(got)])
    return _table(["", "kind", "aimed at", "retrained", "after the run at the suggested α"], lines)


if __name__ == "__main__":
    from unsharp.recipes import suggest_alpha

    suggest_alpha.main(tyro.cli(suggest_alpha.Options, description=re.sub(r"\n(?=\S)", " ", __doc__ or "")))
