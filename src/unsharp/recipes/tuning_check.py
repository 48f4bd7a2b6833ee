"""How good are settings that were chosen without a retrained network? Measured against one.

    python -m unsharp.recipes.tuning_check --out DIR [--data-dir DIR --scores scores.npz:cifar100_cscore]

On the digits, or with --data-dir on the slice of CIFAR-100 of `cifar100_slice`, networks are trained and retrained,
and the points of a method's lattice are run, each epoch a network. Then the search of `unsharp tune` is replayed on
these points with each kind of target, and with the retrained network's own forget accuracy, which only this recipe
knows. Shown are the targets beside that accuracy, and the ToW of the choice beside the highest of all that was run. A
killed run goes on where it was.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from unsharp import artifacts, config, data, runtime
from unsharp.data import DataConfig
from unsharp.difficulty import ForgetConfig
from unsharp.errors import UserError
from unsharp.evaluation import predict
from unsharp.evaluation.accuracy import correctness
from unsharp.evaluation.tow import Accuracies, tow
from unsharp.progress import BarProgress
from unsharp.recipes import cifar100_slice, quickstart
from unsharp.recipes.comparison import HERE, Comparison, Task, _done, _problem, _setting
from unsharp.stages import find_reference
from unsharp.sweep import Cell, run_cells
from unsharp.tuning.plan import Plan, TuneConfig
from unsharp.tuning.search import Goal, Place, Point, Trial, choose, explore
from unsharp.tuning.stage import RETAIN_LOSS
from unsharp.tuning.trials import Bench, at_hand, cell

KINDS = ("classes", "scores", "matched")
TARGETS_ONLY: dict[str, dict[str, Any]] = {
    "hardest 36": {"n": 36},
    "hardest 144": {"n": 144},
    "hardest 288": {"n": 288},
    "mix 144": {"n": 144, "level": "mix"},
}
"""Further forget sets of the digits, for which targets are compared and nothing is searched."""


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
    """Number of seeds, from 0."""
    methods: tuple[str, ...] = ("neggrad:sam", "neggrad:none", "sharp_minmax:asam", "finetune:none")
    """Methods, each as METHOD:RULE."""
    asked_only: bool = False
    """Run only those points of the lattice that a search asks for."""
    workers: int | None = None
    """Processes at a time, of one thread each."""


def main(options: Options) -> None:
    """Run every point, replay the search, write `table.md` and `rows.json`."""
    out = Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    what, unseen_scores = _digits(out) if options.data_dir is None else _slice(options)
    with BarProgress() as bar:
        pool: dict[str, Any] = {"store": out / "cells", "workers": options.workers, "threads": 1, "progress": bar}
        shared = {"what": config.to_dict(what), "root": str(out)}
        seeds = range(options.seeds)
        _done(run_cells([Cell(f"{HERE}:train_one", shared | {"seed": s}) for s in seeds], **pool))
        pairs = [(s, t.name) for s in seeds for t in what.tasks]
        each = [Cell(f"{HERE}:retrain_one", shared | {"seed": s, "task": t}) for s, t in pairs]
        _done(run_cells(each, **pool))
        rows = []
        for (seed, task), named in itertools.product(pairs, options.methods):
            method, _, rule = named.partition(":")
            how = TuneConfig(method=method, rule=rule, settings={"batch_size": what.train.batch_size}, seed=seed)
            case = _Case(what, out, seed, task, how, unseen_scores)
            if task not in TARGETS_ONLY:
                rows += _searched(case, _Table(case.plan, out / "benches" / f"{seed}-{task}", pool), options)
            elif named == options.methods[0]:
                rows += [case.about(kind, goal) for kind, goal in case.goals().items()]
    artifacts.write_json(out / "rows.json", rows)
    artifacts.write_text(out / "table.md", page(options, rows))
    print(page(options, rows))


def _digits(out: Path) -> tuple[Comparison, str]:
    what = quickstart.comparison(out)
    hardest = config.to_dict(what.tasks[0].forget)
    sets = {"easiest": {"level": "low"}} | TARGETS_ONLY
    tasks = [
        what.tasks[0],
        Task(name="random", forget=ForgetConfig(random=quickstart.FORGET)),
        *(Task(name=name, forget=config.from_dict(ForgetConfig, hardest | changes)) for name, changes in sets.items()),
    ]
    return replace(what, tasks=tuple(tasks)), f"{_write_unseen_scores(out)}:score"


def _write_unseen_scores(out: Path) -> Path:
    """Write the probability of each test digit's true class under a logistic regression that has not seen it."""
    from sklearn.linear_model import LogisticRegression

    splits = data.load(DataConfig(name="digits"))
    if not isinstance(splits.train, data.ImageSamples) or not isinstance(splits.test, data.ImageSamples):
        raise TypeError("the digits fit in memory")
    pixels = [s.images.cpu().numpy().reshape(len(s), -1) / 255 for s in (splits.train, splits.test)]
    guesses = LogisticRegression(max_iter=300).fit(pixels[0], splits.train.labels).predict_proba(pixels[1])
    path = out / "unseen_scores.npz"
    with artifacts.atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, score=guesses[np.arange(len(splits.test)), splits.test.labels])
    return path


def _slice(options: Options) -> tuple[Comparison, None]:
    if options.data_dir is None or options.scores is None:
        raise UserError("--data-dir and --scores belong together")
    given = cifar100_slice.Options(data_dir=options.data_dir, scores=options.scores, out=options.out)
    return cifar100_slice.comparison(given), None


# --- one network and forget set ---------------------------------------------------------------------------------------


class _Case:
    """A network and a forget set, with what a retrained network says of them."""

    def __init__(
        self, what: Comparison, root: Path, seed: int, task: str, how: TuneConfig, unseen_scores: str | None
    ) -> None:
        self.subject, self.forget = _problem(what, str(root), seed, task)
        reference, _ = find_reference(self.subject, self.forget, _setting(str(root)))
        assert reference is not None  # the originals were trained here
        self.seed, self.task, self.how, self._unseen_scores = seed, task, how, unseen_scores
        self.plan = self._planned("classes")
        self.retrained, self.before = (_accuracies(self.plan.bench, m) for m in (reference.model, self.subject.model))
        unseen = self.plan.bench.unseen
        assert unseen is not None
        found = predict(self.subject.model, unseen, np.arange(len(unseen)))
        self._correct = correctness(found.logits, found.labels)

    def _planned(self, kind: str) -> Plan:
        scores = self._unseen_scores if kind == "matched" else None
        how = config.to_dict(self.how) | {"target": kind, "unseen_scores": scores}
        return Plan(self.subject, self.forget, config.from_dict(TuneConfig, how))

    def goals(self) -> dict[str, Goal]:
        """What a search aims at with each kind of target that this forget set has, and with the retrained network's."""
        floor = self.before[0] - RETAIN_LOSS
        scored = self.forget.config is not None and self.forget.config.scores is not None
        has = {"classes": True, "scores": scored, "matched": scored and self._unseen_scores is not None}
        found = {}
        for kind in (kind for kind in KINDS if has[kind]):
            target = self._planned(kind).target
            assert target is not None
            found[kind] = Goal(target=target.target(self._correct).accuracy, floor=floor)
        return found | {"retrained": Goal(target=self.retrained[1], floor=floor)}

    def about(self, kind: str, goal: Goal) -> dict[str, Any]:
        """What is known before any trial."""
        return {
            "seed": self.seed,
            "task": self.task,
            "n": len(self.forget),
            "kind": kind,
            "target": goal.target,
            "retrained": self.retrained[1],
            "unseen": 100 * float(self._correct.mean()),
        }


def _searched(case: _Case, table: _Table, options: Options) -> list[dict[str, Any]]:
    """Rows, one for each kind of target: what a search would choose."""
    plan = case.plan
    if not options.asked_only:
        table.run(list(itertools.product(*(range(len(values)) for values in plan.axes.values()))), 0)
    rows = []
    for kind, goal in case.goals().items():
        tried = explore(plan.axes, goal, seed=case.seed, budget=plan.budget, cost=plan.cost, run=table.run)
        chosen = choose([p for t in tried for p in t.points], goal)
        rows.append(
            case.about(kind, goal)
            | {
                "method": case.how.method,
                "rule": case.how.rule,
                "settings": chosen.settings,
                "retain_accuracy": chosen.retain_accuracy,
                "forget_accuracy": chosen.forget_accuracy,
                "met_floor": goal.met_by(chosen),
                "tow": _tow(chosen, case.retrained),
                "original_tow": tow(case.before, case.retrained),
                "trials": len(tried),
                "epochs": sum(t.passes for t in tried) / plan.unit,
            }
        )
    best = max(_tow(p, case.retrained) for t in table.trials.values() for p in t.points)
    return [row | {"best_tow": best, "run": len(table.trials)} for row in rows]


class _Table:
    """Trials of one network and forget set, each run once, whoever asks for it."""

    def __init__(self, plan: Plan, place: Path, pool: Mapping[str, Any]) -> None:
        self.plan, self.file, self.pool = plan, place / "bench.json", pool
        self.trials: dict[Place, Trial] = {}

    def run(self, places: Sequence[Place], first: int) -> list[Trial]:
        """The trials at some places, numbered from `first`."""
        new = [p for p in places if p not in self.trials]
        with at_hand(self.file, self.plan.bench):
            values = _done(run_cells([cell(self.file, self.plan.config_at(p)) for p in new], **self.pool))
        self.trials |= {p: self.plan.trial(0, p, value) for p, value in zip(new, values)}
        return [_renumbered(self.trials[place], first + i) for i, place in enumerate(places)]


def _renumbered(trial: Trial, number: int) -> Trial:
    return replace(trial, number=number, points=tuple(replace(p, trial=number) for p in trial.points))


def _accuracies(bench: Bench, model: Any) -> Accuracies:
    found = bench.look(model)
    return found["retain_accuracy"], found["forget_accuracy"], found["unseen_accuracy"]


def _tow(point: Point, retrained: Accuracies) -> float:
    assert point.unseen_accuracy is not None
    return tow((point.retain_accuracy, point.forget_accuracy, point.unseen_accuracy), retrained)


# --- the page ---------------------------------------------------------------------------------------------------------


def page(options: Options, rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables, in Markdown: what targets are worth, and what the choices are worth."""
    versions = runtime.versions()
    place = "digits" if options.data_dir is None else "CIFAR-100, 20 classes × 250 images"
    command = "python -m unsharp.recipes.tuning_check --out DIR"
    command += "" if options.data_dir is None else " --data-dir DIR --scores FILE:KEY"
    return (
        "\n\n".join(
            [
                f"`{command}`: {place}, {options.seeds} seed(s), torch {versions['torch']}, Python "
                f"{versions['python']}, on a processor, one thread a run; {datetime.date.today().isoformat()}.",
                "### Targets beside the retrained network's forget accuracy (%)",
                _targets(rows),
                "### ToW of the choice",
                _choices(rows),
            ]
        )
        + "\n"
    )


def _targets(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over seeds."""
    head = ["forget set", "samples", "retrained", "unseen", *KINDS]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for task in dict.fromkeys(r["task"] for r in rows):
        mine = [r for r in rows if r["task"] == task]
        found = {k: [r["target"] for r in mine if r["kind"] == k] for k in KINDS}
        cells = [f"{np.mean([r[name] for r in mine]):.1f}" for name in ("retrained", "unseen")]
        cells += [f"{np.mean(values):.1f}" if values else "–" for values in found.values()]
        lines.append(f"| {task} | {mine[0]['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _choices(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over seeds."""
    kinds = (*KINDS, "retrained")
    head = [*(f"target: {k}" for k in kinds), "best of all run", "original", "cost"]
    lines = ["| method | forget set | " + " | ".join(head) + " |", "|---|---|" + "---:|" * len(head)]
    searched = [r for r in rows if "tow" in r]
    for method, rule, task in dict.fromkeys((r["method"], r["rule"], r["task"]) for r in searched):
        mine = [r for r in searched if (r["method"], r["rule"], r["task"]) == (method, rule, task)]

        def mean(name: str, kind: str | None = None, mine: Any = mine) -> str:
            values = [r[name] for r in mine if kind in (None, r["kind"])]
            return f"{np.mean(values):.1f}" if values else "–"

        cells = [*(mean("tow", k) for k in kinds), mean("best_tow"), mean("original_tow")]
        lines.append(f"| {method} {rule} | {task} | {' | '.join(cells)} | {mean('epochs')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options, description=re.sub(r"\n(?=\S)", " ", __doc__ or "")))
