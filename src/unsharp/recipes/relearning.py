"""Does sharpness maximisation make forgetting brittle? Networks that forgot, attacked by fine-tuning.

    python -m unsharp.recipes.relearning --data-dir DIR --scores scores.npz:cifar100_cscore --out DIR

The problem is that of `sharp_minmax_parts`: 20 classes × 250 images of CIFAR-100, a ResNet-18 of width 8, forget sets
of 250 images by C-score, and the settings that were chosen there (on the mid set of seed 100, which takes part in no
figure here). Four of its variants are attacked, and the retrained network beside them, for seeds 0 to 4. The rule,
fixed before the runs:

- Attack "forget": a copy is fine-tuned on k = 50 of the 250 forget images for 10 epochs in batches of 25; the other 200
  are judged. Attack "retain": on 500 retained images for 4 epochs in batches of 25; all 250 are judged. Both: SGD with
  momentum 0.9, no decay, constant rate, no sample chosen by its difficulty, the seed of the attack that of the network,
  so that all networks of a seed and a set meet the same attack.
- Learning rate: 0.01 answers the question; 0.003 and 0.03 are shown beside it.
- Recovery: forget accuracy gained over the start, less what the retrained network gains under the same attack, as the
  mean over all points of the curve (`excess_area`), in points; 0 is the ideal.
- Distance: of the weights from the original's, ‖w − w₀‖₂ / ‖w₀‖₂. Barrier: of the loss on the straight way to the
  original, on the retained and on the forget images, at 7 places, 250 images of each set, BatchNorm's statistics
  averaged anew at each place.
- The question is answered by two paired differences of the recovery, 95 % t intervals over the five seeds, each seed
  the mean over the sets that were run: Sharp MinMax less "ASAM on retain, no maximisation" (under the mask), and "both
  sharpness terms, no mask" less "NegGrad, ASAM on retain" (without a mask). Maximisation makes forgetting brittle
  where an interval lies above 0, does not where it lies below 2 points, and else nothing is decided.
- Rank correlations of the recovery with distance, barrier and start are taken over the variants within a seed and a
  set, and averaged over the sets; the interval is over the seeds.

Sets are done one after the other, mid first, seed by seed, and the page is written after each. A killed run goes on
where it was; its pages are balanced once a set is whole.
About an hour of one core for each set.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from torch import nn

from unsharp import artifacts, checkpoints, config, runtime, stats
from unsharp.difficulty import ForgetSet
from unsharp.difficulty.memorization import spearman
from unsharp.evaluation.connectivity import Connectivity
from unsharp.evaluation.relearning import Attack, RelearnConfig, recovery
from unsharp.progress import BarProgress
from unsharp.recipes import sharp_minmax_parts
from unsharp.recipes.comparison import Comparison, Point, _done, _problem, _setting, compare, unlearned_at
from unsharp.recipes.sharp_minmax_parts import FULL, LEVELS, TIERS, _interval, _table
from unsharp.report.relearning import relearning_curves
from unsharp.stages import find_reference
from unsharp.subject import Subject
from unsharp.sweep import Cell, run_cells

QUICK = ("threshold_modified_entropy",)
HERE = "unsharp.recipes.relearning"
RETRAINED = "retrained"
NO_MAX, NO_MASK, ASAM = "ASAM on retain, no maximisation", "both sharpness terms, no mask", "NegGrad, ASAM on retain"
CHOSEN: dict[str, dict[str, float]] = {
    FULL: {"alpha": 0.98, "lr": 0.03},
    NO_MAX: {"alpha": 0.95, "lr": 0.03},
    NO_MASK: {"alpha": 0.98, "lr": 0.03},
    ASAM: {"alpha": 0.95, "lr": 0.03},
}
"""The variants, with the settings that `sharp_minmax_parts` chose for them (docs/results/sharp_minmax_parts.md)."""
VARIANTS = tuple(CHOSEN)
QUESTIONS = {"with the mask": (FULL, NO_MAX), "without a mask": (NO_MASK, ASAM)}
"""Pairs that differ in whether sharpness is maximised on the forget set."""
RATES = (0.003, 0.01, 0.03)
RATE = 0.01
"""The learning rate that answers the question."""
ATTACKS = {
    "forget": RelearnConfig(on="forget", n=50, epochs=10, batch_size=25),
    "retain": RelearnConfig(on="retain", n=500, epochs=4, batch_size=25),
}
TITLES = {"forget": "50 of the 250 forget images", "retain": "500 retained images"}
WATCHED = 250
"""Retained images on which accuracy is watched."""
WAY = Connectivity(points=7, batchnorm="recomputed", n_samples=250)
SMALL = 2.0
"""Points of recovery that do not matter."""
ORDER = ("mid", "high", "low")
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the recipe."""

    data_dir: str
    """CIFAR-100 in the hub's layout."""
    scores: str
    """C-scores, FILE:KEY."""
    out: str
    """Directory of all runs and of the page."""
    seeds: int = 5
    """Number of seeds shown, from 0."""
    sets: tuple[str, ...] = ORDER
    """Forget sets, in the order in which they are done."""
    epochs: int = 30
    """Epochs of training."""
    per_class: int = 300
    """Images of each class, the last 50 of them for validation."""
    forget: int = 250
    """Size of each forget set."""
    workers: int | None = None
    """Processes at a time, of one thread each."""


def main(options: Options) -> None:
    """Make the networks, attack them, and write `facts.json`, `page.md` and the figures as they come."""
    out = Path(options.out).absolute()
    what, points = comparison(options), settled()
    facts: list[dict[str, Any]] = []
    for task in options.sets:
        part = dataclasses.replace(what, tasks=(what.task(task),))
        for seed in range(options.seeds):
            with BarProgress() as bar:
                pool: dict[str, Any] = {"workers": options.workers, "progress": bar}
                compare(part, out, seeds=[seed], points=points, **pool)
                facts += attack_all(part, out, [seed], task, points, pool)
            artifacts.write_json(out / "facts.json", facts)
            artifacts.write_text(out / "page.md", page(facts))
        for on in ATTACKS:
            artifacts.write_text(out / f"relearning-{on}.svg", figure(facts, on))
    print(f"wrote {out / 'page.md'}")


def comparison(options: Options) -> Comparison:
    """The problem of `sharp_minmax_parts`, with a single quick attack."""
    shared = {name: getattr(options, name) for name in ("data_dir", "scores", "out", "epochs", "per_class", "forget")}
    return dataclasses.replace(sharp_minmax_parts.comparison(sharp_minmax_parts.Options(**shared)), attacks=QUICK)


def settled() -> list[Point]:
    """The variants with their settings."""
    named = {variant.name: variant for tier in TIERS for variant in tier}
    return [Point(variant=named[name], settings=named[name].settings | chosen) for name, chosen in CHOSEN.items()]


def attack_all(
    what: Comparison, out: Path, seeds: Sequence[int], task: str, points: Sequence[Point], pool: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Attack the networks of a set; a fact for each."""
    shared = {"what": config.to_dict(what), "root": str(out), "task": task, "points": config.to_dict(points)}
    cells = [Cell(f"{HERE}:attack_one", shared | {"seed": seed}) for seed in seeds]
    facts = []
    for seed, found in zip(seeds, _done(run_cells(cells, out / "attacks", **pool))):
        beside = found[RETRAINED]["curves"]
        for name, network in found.items():
            told = {key: recovery(curve, beside[key]) for key, curve in network["curves"].items()}
            facts.append({"variant": name, "training_seed": seed, "task": task, "recovery": told} | network)
    return facts


def attack_one(
    what: dict[str, Any], root: str, task: str, points: list[dict[str, Any]], seed: int
) -> dict[str, dict[str, Any]]:
    """Cell: the networks of a seed and a set under the attacks, and how they lie to the original."""
    subject, forget = _problem(config.from_dict(Comparison, what), root, seed, task)
    samples = subject.splits.train
    sets = {"retain": (samples, forget.retain_indices(len(samples))), "forget": (samples, forget.indices)}
    attacks = {
        key_of(on, rate): Attack(
            config=dataclasses.replace(how, lr=rate, seed=seed), samples=samples, forget=forget.indices, watched=WATCHED
        )
        for on, how in ATTACKS.items()
        for rate in RATES
    }
    found: dict[str, dict[str, Any]] = {}
    for name, network in _networks(subject, forget, root, points, seed):
        gone = WAY.measure(subject.model, network, sets)
        found[name] = {
            "curves": {key: attack.run(network, original=subject.model) for key, attack in attacks.items()},
            "distance": gone.distance.relative,
            **{f"barrier_{on}": gone.loss_barrier(on).height for on in sets},
            **{f"accuracy_barrier_{on}": gone.accuracy_barrier(on).height for on in sets},
        }
    return found


def key_of(on: str, rate: float = RATE) -> str:
    """Under which name the curve of an attack stands."""
    return f"{on} {rate:g}"


def _networks(
    subject: Subject, forget: ForgetSet, root: str, points: Sequence[Any], seed: int
) -> Iterator[tuple[str, nn.Module]]:
    """Those that forgot, by the name of their variant, and the retrained one."""
    for point in points:
        made = config.from_dict(Point, point)
        where = unlearned_at(root, subject, forget, made.variant.unlearn_config(made.settings, seed))
        network = copy.deepcopy(subject.model)
        checkpoints.load_into(network, checkpoints.load_weights(where)[0], str(where))
        yield str(made.variant.name), network.eval()
    reference, why_not = find_reference(subject, forget, _setting(root))
    assert reference is not None, why_not
    yield RETRAINED, reference.model


def page(facts: Rows) -> str:
    """The result page in Markdown, from the facts alone."""
    names = [name for name in (*VARIANTS, RETRAINED) if any(f["variant"] == name for f in facts)]
    facts = sorted(facts, key=lambda fact: names.index(fact["variant"]))
    ours, levels = [f for f in facts if f["variant"] != RETRAINED], _levels(facts)
    parts = [
        "`python -m unsharp.recipes.relearning --data-dir DIR --scores scores.npz:cifar100_cscore --out DIR`; "
        f"torch {runtime.versions()['torch']}, on a processor, one thread a run; {datetime.date.today().isoformat()}. "
        "Means over the seeds ± half of the 95 % t interval.",
        "### Does maximisation make forgetting brittle?",
        f"Recovery with maximisation less that without, in points; the learning rate {RATE:g} answers the question.",
        questions(facts),
        "### Before the attack",
        "Forget accuracy (%):",
        _table(levels, facts, _start),
    ]
    parts += [part for on in TITLES for part in _under(on, facts, ours, levels)]
    return "\n\n".join([*parts, *_geometry(facts, ours, levels)]) + "\n"


def _levels(facts: Rows) -> list[str]:
    """The sets that were run, and their mean where there are several."""
    found = [task for task in LEVELS if any(f["task"] == task for f in facts)]
    return [*found, "mean"] if found == list(LEVELS) else found


def _start(fact: Mapping[str, Any]) -> float:
    return fact["curves"][key_of("retain")][0]["forget_accuracy"]


def _under(on: str, facts: Rows, ours: Rows, levels: Sequence[str]) -> list[str]:
    """What the page says of an attack."""
    key = key_of(on)
    return [
        f"### Fine-tuned on {TITLES[on]}",
        f"![Forget accuracy under the attack](relearning-{on}.svg)",
        "Recovery: gain in forget accuracy above that of the retrained network, mean over the curve, in points.",
        _table(levels, ours, lambda f: f["recovery"][key]["excess_area"]),
        "The same at the end of the attack:",
        _table(levels, ours, lambda f: f["recovery"][key]["excess"]),
        "Forget accuracy at the end (%):",
        _table(levels, facts, lambda f: f["curves"][key][-1]["forget_accuracy"]),
        "Retain accuracy at the end (%):",
        _table(levels, facts, lambda f: f["curves"][key][-1]["retain_accuracy"]),
    ]


def questions(facts: Rows) -> str:
    """Recovery with maximisation less that without, and what the rule says of it."""
    levels = [task for task in LEVELS if any(f["task"] == task for f in facts)]
    head = "| attack | learning rate | | " + " | ".join([*levels, "mean"]) + " | brittle |"
    lines = [head, "|---|---:|---|" + "---:|" * (len(levels) + 1) + "---|"]
    for on, title in TITLES.items():
        for rate in RATES:
            for where, (with_max, without) in QUESTIONS.items():
                each = [paired(facts, key_of(on, rate), [level], with_max, without) for level in levels]
                whole = paired(facts, key_of(on, rate), levels, with_max, without)
                shown = " | ".join(_interval(values, sign=True) for values in (*each, whole))
                lines.append(f"| {title} | {rate:g} | {where} | {shown} | {verdict(whole)} |")
    return "\n".join(lines)


def paired(facts: Rows, key: str, levels: Sequence[str], first: str, second: str) -> list[float]:
    """Differences of the recovery of two variants under an attack, for each seed the mean over some sets."""
    area = {
        (f["variant"], f["training_seed"], f["task"]): f["recovery"][key]["excess_area"]
        for f in facts
        if f["variant"] in (first, second)
    }
    seeds = sorted({f["training_seed"] for f in facts})
    return [float(np.mean([area[first, s, t] - area[second, s, t] for t in levels])) for s in seeds]


def verdict(differences: Sequence[float]) -> str:
    """Whether maximisation makes forgetting brittle: yes, no (by less than two points), or undecided."""
    interval = stats.mean_interval(differences)
    if interval.low is None or interval.high is None:
        return "undecided"
    return "yes" if interval.low > 0 else "no" if interval.high < SMALL else "undecided"


def correlations(facts: Rows, on: str, value: Any) -> list[float]:
    """For each seed the mean over the sets of the rank correlation, over the variants, of a value with the recovery.

    A set on which the value is the same for all variants is left out of the mean, and a seed without any such set.
    """
    found = []
    for seed in sorted({f["training_seed"] for f in facts}):
        each = []
        for task in LEVELS:
            mine = [f for f in facts if (f["training_seed"], f["task"]) == (seed, task) and f["variant"] != RETRAINED]
            areas = np.array([f["recovery"][key_of(on)]["excess_area"] for f in mine])
            each.append(spearman(np.array([value(f) for f in mine]), areas) if mine else np.nan)
        if kept := [r for r in each if np.isfinite(r)]:
            found.append(float(np.mean(kept)))
    return found


def figure(facts: Rows, on: str) -> str:
    """The curves of an attack, a panel for each set."""
    panels = {
        f"forget set: {task}": {
            name: [
                [row["forget_accuracy"] for row in f["curves"][key_of(on)]]
                for f in facts
                if (f["variant"], f["task"]) == (name, task)
            ]
            for name in (*VARIANTS, RETRAINED)
        }
        for task in LEVELS
        if any(f["task"] == task for f in facts)
    }
    return relearning_curves(panels, RETRAINED)


MEASURES = {
    "distance from the original": lambda f: f["distance"],
    "loss barrier, retain": lambda f: f["barrier_retain"],
    "loss barrier, forget": lambda f: f["barrier_forget"],
    "forget accuracy before the attack": _start,
}


def _geometry(facts: Rows, ours: Rows, levels: Sequence[str]) -> list[str]:
    lines = ["| with | " + " | ".join(TITLES.values()) + " |", "|---|" + "---:|" * len(TITLES)]
    for name, value in MEASURES.items():
        lines.append(f"| {name} | {' | '.join(_correlation(correlations(ours, on, value)) for on in TITLES)} |")
    return [
        "### Distance and barrier to the original",
        "Distance of the weights, in % of the norm of the original's:",
        _table(levels, facts, lambda f: 100 * f["distance"]),
        "Loss barrier on the retained images, in hundredths:",
        _table(levels, facts, lambda f: 100 * f["barrier_retain"]),
        "Loss barrier on the forget images, in hundredths:",
        _table(levels, facts, lambda f: 100 * f["barrier_forget"]),
        "How far the attacked network is from the original, in % of what it was before the attack on retained images:",
        _table(levels, facts, lambda f: 100 * f["curves"][key_of("retain")][-1]["to_original"]),
        "### Rank correlation of the recovery",
        f"Over the {len(VARIANTS)} variants, within a seed and a set:",
        "\n".join(lines),
    ]


def _correlation(found: Sequence[float]) -> str:
    if not found:
        return "–"
    interval = stats.mean_interval(found)
    return f"{interval.mean:+.2f}" + ("" if interval.half_width is None else f" ± {interval.half_width:.2f}")


if __name__ == "__main__":
    from unsharp.recipes import relearning

    relearning.main(tyro.cli(relearning.Options, description=__doc__))
