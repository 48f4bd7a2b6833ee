"""Does sharpness maximisation make forgetting brittle? Networks of `sharp_minmax_parts`, attacked by fine-tuning.

    python -m unsharp.recipes.relearning --parts DIR --data-dir DIR --out DIR

`--parts` is what `sharp_minmax_parts` wrote; it is read only. Of its variants six are attacked, and the retrained
network beside them, for seeds 0 to 4 and the forget sets high, mid and low of 250 images each. The rule, fixed before
the runs that are shown; seed 100, on which the variants were tuned, took part in no figure:

- Attack "forget": a copy is fine-tuned on k = 50 of the 250 forget images for 10 epochs in batches of 25; the other 200
  are judged. Attack "retain": on 500 retained images for 4 epochs in batches of 25; all 250 are judged. Both: SGD with
  momentum 0.9, no decay, constant rate, no sample chosen by its difficulty, the seed of the attack that of the network,
  so that all networks of a seed and a set meet the same attack.
- Learning rate: of 0.003, 0.01 and 0.03 the one with the largest mean recovery of the six variants on the mid set of
  seed 100, chosen for each attack.
- Recovery: forget accuracy gained over the start, less what the retrained network gains under the same attack, as the
  mean over all points of the curve (`excess_area`), in points; 0 is the ideal.
- Distance: of the weights from the original's, ‖w − w₀‖₂ / ‖w₀‖₂. Barrier: of the loss on the straight way to the
  original, on the retained and on the forget images, at 7 places, 250 images of each set, BatchNorm's statistics
  averaged anew at each place.
- The question is answered by two paired differences of the recovery, 95 % t intervals over the five seeds, each seed
  the mean over the three sets: Sharp MinMax less "ASAM on retain, no maximisation" (under the mask), and "both
  sharpness terms, no mask" less "NegGrad, ASAM on retain" (without a mask). Maximisation makes forgetting brittle
  where an interval lies above 0, does not where it lies below 2 points, and else nothing is decided.
- Rank correlations of the recovery with distance, barrier and start are taken over the six variants within a seed and a
  set, and averaged over the sets; the interval is over the seeds.

A killed run goes on where it was. About half an hour on one core.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from torch import nn

from unsharp import artifacts, checkpoints, config, runtime, stats
from unsharp.checkpoints import MODEL_FILE
from unsharp.difficulty.memorization import spearman
from unsharp.errors import UserError
from unsharp.evaluation.connectivity import Connectivity
from unsharp.evaluation.relearning import Attack, RelearnConfig, recovery
from unsharp.progress import BarProgress
from unsharp.recipes.sharp_minmax_parts import FULL, LEVELS, PLAIN, TUNED_FOR, TUNED_ON, _interval, _table
from unsharp.report.relearning import relearning_curves
from unsharp.stages import read_split
from unsharp.subject import Origin, load_subject
from unsharp.sweep import Cell, SweepError, report, run_cells

HERE = "unsharp.recipes.relearning"
RETRAINED = "retrained"
NO_MAX, NO_MASK, ASAM = "ASAM on retain, no maximisation", "both sharpness terms, no mask", "NegGrad, ASAM on retain"
VARIANTS = (PLAIN, ASAM, "SAUL", NO_MAX, FULL, NO_MASK)
QUESTIONS = {"with the mask": (FULL, NO_MAX), "without a mask": (NO_MASK, ASAM)}
"""Pairs that differ in whether sharpness is maximised on the forget set."""
RATES = (0.003, 0.01, 0.03)
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
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the recipe."""

    parts: str
    """Directory that `sharp_minmax_parts` wrote."""
    data_dir: str
    """CIFAR-100 in the hub's layout."""
    out: str
    """Directory of the cells and of the pages."""
    seeds: int = 5
    """Number of seeds shown, from 0."""
    workers: int | None = None
    """Processes at a time, of one thread each."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The networks of a seed and a forget set.

    Args:
        seed: The seed.
        task: The forget set.
        original: Directory of the network before.
        split: Directory whose `split.json` is the forget set.
        networks: Directory of each network by name, the retrained one among them.
    """

    seed: int
    task: str
    original: str
    split: str
    networks: dict[str, str]


def main(options: Options) -> None:
    """Choose the learning rates, attack, and write `facts.json`, `choice.json`, `page.md` and the figures."""
    out, parts = Path(options.out), Path(options.parts)
    seeds = range(options.seeds)
    stored = find_networks(parts, [TUNED_ON, *seeds])
    with BarProgress() as bar:
        pool: dict[str, Any] = {"store": out / "cells", "workers": options.workers, "progress": bar}
        on = next(s for s in stored if s.seed == TUNED_ON)
        rates, tried = choose_rates(on, options.data_dir, pool)
        artifacts.write_json(out / "choice.json", tried)
        facts = attack_all([s for s in stored if s.seed != TUNED_ON], rates, options.data_dir, pool)
    artifacts.write_json(out / "facts.json", facts)
    artifacts.write_text(out / "page.md", page(facts, tried))
    for on in ATTACKS:
        artifacts.write_text(out / f"relearning-{on}.svg", figure(facts, on))
    print(f"wrote {out / 'page.md'}")


def find_networks(parts: Path, seeds: Sequence[int]) -> list[Stored]:
    """Where the networks are: by what their runs say of themselves, not by their names.

    Args:
        parts: What `sharp_minmax_parts` wrote.
        seeds: The seeds; on the one for tuning there is one forget set.

    Raises:
        UserError: if a network is missing.
    """
    facts = config.read_json(parts / "facts.json")
    settings: dict[str, dict[str, Any]] = {}  # the tuned point, without its seed
    forgets: dict[str, str] = {}
    for fact in facts:
        settings.setdefault(fact["variant"], fact["unlearn"] | {"seed": None})
        forgets[fact["task"]] = fact["forget"]["hash"]
    originals = {_sha256(path / MODEL_FILE): path for path in sorted((parts / "originals").iterdir())}
    unlearned: dict[tuple[str, int, str], tuple[Path, str]] = {}
    for path in sorted((parts / "unlearned").iterdir()):
        if not (path / artifacts.RUN_FILE).is_file():
            continue  # another process is at work on it
        made = artifacts.open_run(path).config
        key = config.digest(made["unlearn"] | {"seed": None}), made["unlearn"]["seed"], made["forget"]
        unlearned[key] = path, made["checkpoint"]
    retrained = {}
    for path in sorted((parts / "references").iterdir()):
        if (path / artifacts.RUN_FILE).is_file():
            made = artifacts.open_run(path).config
            retrained[made["seed"], made["forget"]] = path
    found = []
    for seed in seeds:
        for task in LEVELS if seed != TUNED_ON else (TUNED_FOR,):
            networks, before, forget = {}, "", forgets.get(task, "")
            if (seed, forget) not in retrained:
                raise UserError(f"{parts} holds no retrained network of seed {seed} and set {task}")
            for name in VARIANTS:
                key = config.digest(settings[name]) if name in settings else "", seed, forget
                if key not in unlearned:
                    raise UserError(f"{parts} holds no network of {name!r}, seed {seed}, set {task}")
                networks[name], before = str(unlearned[key][0].absolute()), unlearned[key][1]
            split, networks[RETRAINED] = networks[PLAIN], str(retrained[seed, forget].absolute())
            original = str(originals[before].absolute())
            found.append(Stored(seed=seed, task=task, original=original, split=split, networks=networks))
    return found


def choose_rates(
    stored: Stored, data_dir: str, pool: Mapping[str, Any]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The learning rate of each attack with the largest mean recovery of the variants, and all that were tried."""
    tried = [(on, rate) for on in ATTACKS for rate in RATES]
    arguments = {"stored": stored, "data_dir": str(Path(data_dir).absolute()), "watched": 1, "way": False}
    cells = [
        Cell(f"{HERE}:attack_one", arguments | {"attacks": {on: _attack(on, rate, stored.seed)}}) for on, rate in tried
    ]
    rows = []
    for (on, rate), found in zip(tried, _done(run_cells(cells, **pool))):
        curves = {name: network["curves"][on] for name, network in found.items()}
        areas = {name: recovery(curves[name], curves[RETRAINED])["excess_area"] for name in VARIANTS}
        rows.append({"on": on, "lr": rate, "recovery": areas, "mean": float(np.mean(list(areas.values())))})
    best = {on: max((row for row in rows if row["on"] == on), key=lambda row: row["mean"])["lr"] for on in ATTACKS}
    return best, [row | {"chosen": best[row["on"]] == row["lr"]} for row in rows]


def attack_all(
    stored: Sequence[Stored], rates: Mapping[str, float], data_dir: str, pool: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Attack every network; a fact for each."""
    cells = [
        Cell(
            f"{HERE}:attack_one",
            {
                "stored": one,
                "data_dir": str(Path(data_dir).absolute()),
                "attacks": {on: _attack(on, rates[on], one.seed) for on in ATTACKS},
                "watched": WATCHED,
                "way": True,
            },
        )
        for one in stored
    ]
    facts = []
    for one, found in zip(stored, _done(run_cells(cells, **pool))):
        beside = found[RETRAINED]["curves"]
        for name, network in found.items():
            told = {on: recovery(curve, beside[on]) for on, curve in network["curves"].items()}
            facts.append({"variant": name, "training_seed": one.seed, "task": one.task, "recovery": told} | network)
    return facts


def attack_one(
    stored: dict[str, Any], attacks: dict[str, Any], data_dir: str, watched: int, way: bool
) -> dict[str, dict[str, Any]]:
    """Cell: the networks of a seed and a set under the attacks, and how they lie to the original."""
    where = config.from_dict(Stored, stored)
    data = dataclasses.replace(_origin(where.original).data, dir=data_dir)
    original = load_subject(where.original, runtime.pick_device(None), data_config=data)
    samples = original.splits.train
    forget = read_split(where.split, samples)
    sets = {"retain": (samples, forget.retain_indices(len(samples))), "forget": (samples, forget.indices)}
    planned = {
        on: Attack(config=config.from_dict(RelearnConfig, how), samples=samples, forget=forget.indices, watched=watched)
        for on, how in attacks.items()
    }
    found: dict[str, dict[str, Any]] = {}
    for name, path in where.networks.items():
        network = _network(original.model, path)
        found[name] = {"curves": {on: a.run(network, original=original.model) for on, a in planned.items()}}
        if way:
            gone = WAY.measure(original.model, network, sets)
            found[name] |= {"distance": gone.distance.relative}
            found[name] |= {f"barrier_{on}": gone.loss_barrier(on).height for on in sets}
            found[name] |= {f"accuracy_barrier_{on}": gone.accuracy_barrier(on).height for on in sets}
    return found


def page(facts: Rows, tried: Rows) -> str:
    """The result page in Markdown, from the facts alone."""
    names = [name for name in (*VARIANTS, RETRAINED) if any(f["variant"] == name for f in facts)]
    facts = sorted(facts, key=lambda fact: names.index(fact["variant"]))
    ours, levels = [f for f in facts if f["variant"] != RETRAINED], [*LEVELS, "mean"]
    parts = [
        "`python -m unsharp.recipes.relearning --parts DIR --data-dir DIR --out DIR`; "
        f"torch {runtime.versions()['torch']}, on a processor, one thread a run; {datetime.date.today().isoformat()}. "
        "Means over the seeds ± half of the 95 % t interval.",
        "### Does maximisation make forgetting brittle?",
        questions(facts),
        "### Before the attack",
        "Forget accuracy (%):",
        _table(levels, facts, lambda f: f["curves"]["retain"][0]["forget_accuracy"]),
    ]
    parts += [part for on in TITLES for part in _under(on, facts, ours, levels)]
    return "\n\n".join([*parts, *_geometry(facts, ours, levels), *_choice(tried)]) + "\n"


def _under(on: str, facts: Rows, ours: Rows, levels: Sequence[str]) -> list[str]:
    """What the page says of an attack."""
    return [
        f"### Fine-tuned on {TITLES[on]}",
        f"![Forget accuracy under the attack](relearning-{on}.svg)",
        "Recovery: gain in forget accuracy above that of the retrained network, mean over the curve, in points.",
        _table(levels, ours, lambda f: f["recovery"][on]["excess_area"]),
        f"Recovery, paired with {PLAIN}:",
        _table(levels, ours, lambda f: f["recovery"][on]["excess_area"], against=PLAIN),
        "The same at the end of the attack:",
        _table(levels, ours, lambda f: f["recovery"][on]["excess"]),
        "Forget accuracy at the end (%):",
        _table(levels, facts, lambda f: f["curves"][on][-1]["forget_accuracy"]),
        "Retain accuracy at the end (%):",
        _table(levels, facts, lambda f: f["curves"][on][-1]["retain_accuracy"]),
    ]


def questions(facts: Rows) -> str:
    """Recovery with maximisation less that without, and what the rule says of it."""
    lines = ["| attack | | " + " | ".join([*LEVELS, "mean"]) + " | brittle |", "|---|---|" + "---:|" * 4 + "---|"]
    for on, title in TITLES.items():
        for where, (with_max, without) in QUESTIONS.items():
            cells = [paired(facts, on, level, with_max, without) for level in (*LEVELS, "mean")]
            shown = " | ".join(_interval(values, sign=True) for values in cells)
            lines.append(f"| {title} | {where} | {shown} | {verdict(cells[-1])} |")
    return "\n".join(lines)


def paired(facts: Rows, on: str, level: str, first: str, second: str) -> list[float]:
    """Differences of the recovery of two variants by seed, on a set or in the mean over the sets."""
    levels = LEVELS if level == "mean" else (level,)
    area = {
        (f["variant"], f["training_seed"], f["task"]): f["recovery"][on]["excess_area"]
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
            areas = np.array([f["recovery"][on]["excess_area"] for f in mine])
            each.append(spearman(np.array([value(f) for f in mine]), areas))
        if kept := [r for r in each if np.isfinite(r)]:
            found.append(float(np.mean(kept)))
    return found


def figure(facts: Rows, on: str) -> str:
    """The curves of an attack, a panel for each set."""
    panels = {
        f"forget set: {task}": {
            name: [
                [row["forget_accuracy"] for row in f["curves"][on]]
                for f in facts
                if (f["variant"], f["task"]) == (name, task)
            ]
            for name in (*VARIANTS, RETRAINED)
        }
        for task in LEVELS
    }
    return relearning_curves(panels, RETRAINED)


MEASURES = {
    "distance from the original": lambda f: f["distance"],
    "loss barrier, retain": lambda f: f["barrier_retain"],
    "loss barrier, forget": lambda f: f["barrier_forget"],
    "forget accuracy before the attack": lambda f: f["curves"]["retain"][0]["forget_accuracy"],
}


def _geometry(facts: Rows, ours: Rows, levels: Sequence[str]) -> list[str]:
    lines = ["| with | " + " | ".join(TITLES.values()) + " |", "|---|" + "---:|" * len(TITLES)]
    for name, value in MEASURES.items():
        cells = []
        for on in TITLES:
            interval = stats.mean_interval(correlations(ours, on, value))
            half = "" if interval.half_width is None else f" ± {interval.half_width:.2f}"
            cells.append(f"{interval.mean:+.2f}{half}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [
        "### Distance and barrier to the original",
        "Distance of the weights, in % of the norm of the original's:",
        _table(levels, facts, lambda f: 100 * f["distance"]),
        "Loss barrier on the retained images, in hundredths:",
        _table(levels, facts, lambda f: 100 * f["barrier_retain"]),
        "Loss barrier on the forget images, in hundredths:",
        _table(levels, facts, lambda f: 100 * f["barrier_forget"]),
        "How far the attacked network is from the original, in % of what it was before the attack on retained images:",
        _table(levels, facts, lambda f: 100 * f["curves"]["retain"][-1]["to_original"]),
        "### Rank correlation of the recovery",
        "Over the six variants, within a seed and a set:",
        "\n".join(lines),
    ]


def _choice(tried: Rows) -> list[str]:
    lines = ["| attack | learning rate | mean recovery | |", "|---|---:|---:|---|"]
    lines += [
        f"| {TITLES[row['on']]} | {row['lr']} | {row['mean']:+.1f} | {'chosen' if row['chosen'] else ''} |"
        for row in tried
    ]
    return [
        "### How the learning rates were chosen",
        f"By the mean recovery of the six variants on the {TUNED_FOR} set of seed {TUNED_ON}.",
        "\n".join(lines),
    ]


def _attack(on: str, rate: float, seed: int) -> RelearnConfig:
    return dataclasses.replace(ATTACKS[on], lr=rate, seed=seed)


def _network(like: nn.Module, checkpoint: str) -> nn.Module:
    network = copy.deepcopy(like)
    checkpoints.load_into(network, checkpoints.load_weights(checkpoint)[0], checkpoint)
    return network.eval()


def _origin(checkpoint: str) -> Origin:
    return config.from_dict(Origin, checkpoints.load_weights(checkpoint)[1]["origin"], "checkpoint")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _done(results: Sequence[Any]) -> list[Any]:
    failures = report(results)
    if failures:
        raise SweepError(failures)
    return [result.value for result in results]


if __name__ == "__main__":
    from unsharp.recipes import relearning

    relearning.main(tyro.cli(relearning.Options, description=__doc__))
