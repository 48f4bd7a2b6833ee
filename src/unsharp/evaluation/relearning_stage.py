"""The relearning attacks as a stage: on an unlearned network and the retrained one, kept curve by curve."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
from torch import nn

from unsharp import artifacts, config, data, runtime, stats
from unsharp.artifacts import Run, Workspace
from unsharp.data import DataConfig, Samples
from unsharp.errors import UserError, unknown
from unsharp.evaluation.predictions import predict
from unsharp.evaluation.relearning import Attack, On, RelearnConfig, recovery
from unsharp.progress import SILENT, Progress, duration
from unsharp.report.relearning import relearning_curves, write_relearning
from unsharp.stages import REPORT_FILE, Setting, find_reference, open_unlearned
from unsharp.training import TrainConfig

UNLEARNED, RETRAINED = "unlearned", "retrained"
RELEARNING_FILE, FIGURE_FILE = "relearning.json", "relearning.svg"
TITLES: dict[str, str] = {"forget": "forget samples", "retain": "retained samples", "other": "unrelated samples"}
BACKWARD = 3
"""A step takes about as long as so many forward passes over its samples."""


@dataclass(frozen=True, kw_only=True)
class RelearnPlan:
    """Which attacks are run, each on the unlearned and on the retrained network.

    Args:
        on: What a copy is fine-tuned on, an attack for each: "forget", "retain", "other".
        n: Samples to fine-tune on, at least 1; None takes a fifth of the forget set for "forget", and as many as the
            forget set has for the others.
        epochs: Epochs over these, at least 1, each a point of the curve.
        batch_size: Samples in a step, at least 1.
        lr: Learning rate of SGD with momentum 0.9, above 0.
        seed: The first seed of the attacks, at least 0.
        seeds: Number of seeds, at least 1.
        watched: Retained and test samples, at most, on which accuracy is watched, at least 1.

    Raises:
        UserError: if a value is not as above.
    """

    on: tuple[On, ...] = ("forget", "retain")
    n: int | None = None
    epochs: int = 10
    batch_size: int = 32
    lr: float = 0.01
    seed: int = 0
    seeds: int = 1
    watched: int = 500

    def __post_init__(self) -> None:
        if not self.on:
            raise UserError(f"on is empty; name at least one of {', '.join(get_args(On))}")
        for name in self.on:
            if name not in get_args(On):
                raise unknown("attack", name, get_args(On))
        if len(set(self.on)) < len(self.on):
            raise UserError(f"on names an attack twice ({', '.join(self.on)}); name each once")
        for name in ("seeds", "watched"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for attack in self.configs(2):
            attack.train_config()

    def configs(self, n_forget: int) -> list[RelearnConfig]:
        """The attacks on a forget set of that size, each with each seed."""
        made = []
        for on in self.on:
            n = self.n if self.n is not None else max(1, n_forget // 5 if on == "forget" else n_forget)
            how = {name: getattr(self, name) for name in ("epochs", "batch_size", "lr")}
            made += [RelearnConfig(on=on, n=n, seed=self.seed + i, **how) for i in range(self.seeds)]
        return made

    def attacks(
        self, samples: Samples, forget: np.ndarray, test: Samples | None = None, other: Samples | None = None
    ) -> list[Attack]:
        """The attacks on these samples. Raises: UserError as `Attack` does."""
        if other is not None and "other" not in self.on:
            raise UserError("unrelated samples are given, and no attack uses them; add other to the attacks")
        return [
            Attack(config=how, samples=samples, forget=forget, test=test, other=other, watched=self.watched)
            for how in self.configs(len(forget))
        ]


class AnyAttack(Protocol):
    """What is run on networks and gives a curve: of images as of texts."""

    @property
    def config(self) -> Any:
        """The attack's configuration, with `on` and `seed`."""

    def run(
        self, model: nn.Module, *, original: nn.Module | None = None, progress: Progress = SILENT
    ) -> list[dict[str, float]]:
        """Rows of a curve, as `Attack.run` gives them."""
        ...


def attack_all(
    networks: Mapping[str, nn.Module],
    attacks: Sequence[AnyAttack],
    *,
    original: nn.Module | None = None,
    workspace: Workspace | None = None,
    progress: Progress = SILENT,
    judged_by: str = "forget_accuracy",
) -> dict[str, Any]:
    """Attack every network alike.

    Args:
        networks: By name; without `RETRAINED` among them there is no recovery.
        attacks: The attacks.
        original: As for `Attack.run`.
        workspace: Where finished curves are kept, from which a killed run goes on; None keeps none.
        progress: Told of each batch.
        judged_by: The column of the curves by which recovery is judged.

    Returns:
        By attack ("forget", ...): "config"; "rows", those of `Attack.run` with "model" and "seed"; "recovery" for each
        other network, the figures of `recovery` with their intervals over the seeds.
    """
    device = runtime.device_of(next(iter(networks.values())))
    state = None if workspace is None else workspace.load_state(device)
    done: dict[str, list[dict[str, float]]] = {} if state is None else dict(state["curves"])
    for attack in attacks:
        for name, network in networks.items():
            key = f"{attack.config.on} {attack.config.seed} {name}"
            if key in done:
                continue
            done[key] = attack.run(network, original=original, progress=progress)
            if workspace is not None:
                workspace.save_state({"curves": done})
    found: dict[str, Any] = {}
    for on in dict.fromkeys(attack.config.on for attack in attacks):
        configs = [attack.config for attack in attacks if attack.config.on == on]
        curves = {(how.seed, name): done[f"{on} {how.seed} {name}"] for how in configs for name in networks}
        found[on] = {
            "config": config.to_dict(configs[0]),
            "rows": [{"model": name, "seed": seed, **row} for (seed, name), rows in curves.items() for row in rows],
            "recovery": {
                name: _over_seeds(
                    [recovery(curves[how.seed, name], curves[how.seed, RETRAINED], judged_by) for how in configs]
                )
                for name in networks
                if name != RETRAINED and RETRAINED in networks
            },
        }
    return found


def estimate(network: nn.Module, attacks: Sequence[Attack], n_networks: int) -> dict[str, float]:
    """What the attacks will cost: curves, passes, and seconds from a measured forward pass."""
    samples = attacks[0].samples
    some = np.arange(min(len(samples), 256))
    taken: list[float] = []
    for _ in range(2):
        started = time.perf_counter()
        predict(network, samples, some, batch_size=attacks[0].config.batch_size)
        taken.append((time.perf_counter() - started) / len(some))
    forward = sum(BACKWARD * a.trained + a.looked for a in attacks) * n_networks
    passes = sum(a.passes for a in attacks) * n_networks
    return {"curves": len(attacks) * n_networks, "passes": passes, "seconds": forward * taken[-1]}


def figure(found: Mapping[str, Any]) -> str:
    """The curves of `attack_all` as SVG, a panel for each attack."""
    panels: dict[str, dict[str, list[list[float]]]] = {}
    for on, one in found.items():
        names = dict.fromkeys(row["model"] for row in one["rows"])
        seeds = dict.fromkeys(row["seed"] for row in one["rows"])
        panels[f"fine-tuned on {one['config']['n']} {TITLES[on]}"] = {
            name: [
                [r["forget_accuracy"] for r in one["rows"] if (r["model"], r["seed"]) == (name, seed)] for seed in seeds
            ]
            for name in names
        }
    return relearning_curves(panels, RETRAINED)


def relearn_run(
    run: str | Path,
    out: str | Path | None,
    at: Setting,
    plan: RelearnPlan,
    *,
    data_config: DataConfig | None = None,
    train_config: TrainConfig | None = None,
    original: str | Path | None = None,
    other: DataConfig | None = None,
) -> Run:
    """Attack the network of an `unlearn` run and its retrained reference: `relearning.json`, its figure, `report.html`.

    Args:
        run: The run directory.
        out: Where to write.
        at: Device and the like.
        plan: The attacks.
        data_config: Where the data are, if not where they were.
        train_config: How the original was trained, where its checkpoint does not know.
        original: The checkpoint before unlearning, to say how far a network comes back to it; None leaves that out.
        other: Unrelated data, for the attack "other".

    Raises:
        UserError: for bad input, or where no retrained reference can be had, before any work.
        NonFiniteError: if a step is not finite.
    """
    unlearned = open_unlearned(run, at, original=original, data_config=data_config, train_config=train_config)
    subject, forget, before = unlearned.subject, unlearned.forget, unlearned.before
    if subject.origin.recipe is None:
        raise UserError(
            "relearning is judged beside a retrained network, and nothing is known of how the network was trained; "
            "give --train-config"
        )
    others = None if other is None else data.load(other, at.device).train
    attacks = plan.attacks(subject.splits.train, forget.indices, subject.splits.test, others)
    settings = unlearned.identity | {"plan": plan, "other": None if others is None else others.fingerprint}

    def work(workspace: Workspace) -> None:
        reference, why_not = find_reference(subject, forget, at)
        if reference is None:
            raise UserError(str(why_not))
        networks = {UNLEARNED: subject.model, RETRAINED: reference.model}
        cost = estimate(subject.model, attacks, len(networks))
        at.say(
            f"relearning: {cost['curves']} curves, {cost['passes']:,} passes and the looks at each epoch; about "
            f"{duration(cost['seconds'])}"
        )
        found = attack_all(
            networks,
            attacks,
            original=None if before is None else before.model,
            workspace=workspace,
            progress=at.progress,
        )
        n = {name: len(part) for name, part in (("forget", forget), ("train", subject.splits.train))}
        about = {
            "unlearn": unlearned.run.config["unlearn"],
            "forget": {"rule": forget.rule, "hash": forget.hash},
            "n": n,
        }
        workspace.write_json(RELEARNING_FILE, {"attacks": found, **about})
        drawn = figure(found)
        artifacts.write_text(workspace.file(FIGURE_FILE), drawn)
        write_relearning(workspace.file(REPORT_FILE), found, drawn, sentences(found), reference=RETRAINED)

    return at.perform(out, "relearn", settings, work)


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What `attack_all` found, in a line for each attack and network that is not the retrained one."""
    lines = []
    for on, one in found.items():
        for name, told in one["recovery"].items():
            excess, area = told["excess"], told["excess_area"]
            half = "" if excess["half_width"] is None else f" ± {excess['half_width']:.1f}"
            lines.append(
                f"fine-tuned on {one['config']['n']} {TITLES[on]}: {name} gains {told['gain']['mean']:+.1f} points of "
                f"forget accuracy, {RETRAINED} {told['reference_gain']['mean']:+.1f}: {excess['mean']:+.1f}{half} in "
                f"excess at the end, {area['mean']:+.1f} over the curve"
            )
    return lines


def _over_seeds(found: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    return {name: dataclasses.asdict(stats.mean_interval([one[name] for one in found])) for name in found[0]}


__all__ = ["AnyAttack", "RelearnPlan", "attack_all", "estimate", "figure", "relearn_run", "sentences"]
