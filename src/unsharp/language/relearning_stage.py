"""Relearning of texts as a stage: an unlearned language model under attack, beside the original and the retrained."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from torch import nn

from unsharp import artifacts
from unsharp.artifacts import Run, Workspace
from unsharp.errors import UserError, unknown
from unsharp.evaluation.relearning_stage import BACKWARD, FIGURE_FILE, RELEARNING_FILE, RETRAINED, UNLEARNED, attack_all
from unsharp.language import evaluation, models
from unsharp.language.relearning import MOST_WATCHED, Attack, On, RelearnConfig, prepared
from unsharp.language.samples import TextSamples
from unsharp.language.stages import Speaker
from unsharp.language.texts import Pair, check_apart
from unsharp.progress import duration
from unsharp.report.relearning import relearning_curves, write_relearning
from unsharp.stages import REPORT_FILE, Setting

ORIGINAL = "original"
JUDGED_BY = "forget_probability"
TITLES: dict[str, str] = {"forget": "forgotten texts", "retain": "retained texts", "other": "unrelated texts"}


@dataclass(frozen=True, kw_only=True)
class RelearnPlan:
    """Which attacks are run, each on all models alike.

    Args:
        on: What a copy is fine-tuned on, an attack for each: "forget", "retain", "other".
        n: Texts to fine-tune on, at least 1; None takes a fifth of the forgotten texts for "forget", and as many as are
            forgotten for the others, or all there are.
        seeds: Number of seeds, at least 1, counted from that of `how`.
        watched: Retained texts, at most, that are looked at, and judged ones that are answered, at least 1.
        new_tokens: Tokens of a generated answer at most, at least 1.
        how: The fine-tuning; its `on` and `n` give way to those above.

    Raises:
        UserError: if a value is not as above.
    """

    on: tuple[On, ...] = ("forget", "retain")
    n: int | None = None
    seeds: int = 1
    watched: int = MOST_WATCHED
    new_tokens: int = 100
    how: RelearnConfig = dataclasses.field(default_factory=RelearnConfig)

    def __post_init__(self) -> None:
        if not self.on:
            raise UserError(f"on is empty; name at least one of {', '.join(get_args(On))}")
        for name in self.on:
            if name not in get_args(On):
                raise unknown("attack", name, get_args(On))
        if len(set(self.on)) < len(self.on):
            raise UserError(f"on names an attack twice ({', '.join(self.on)}); name each once")
        for name in ("n", "seeds", "watched", "new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    def configs(self, sizes: Mapping[str, int]) -> list[RelearnConfig]:
        """The attacks where there are so many texts of each kind, each with each seed."""
        made, forgotten = [], sizes.get("forget", 0)
        for on in self.on:
            fitting = max(1, forgotten // 5 if on == "forget" else min(forgotten, sizes.get(on, 0)))
            n = fitting if self.n is None else self.n
            made += [dataclasses.replace(self.how, on=on, n=n, seed=self.how.seed + i) for i in range(self.seeds)]
        return made


def relearn_texts(
    speakers: Mapping[str, Speaker],
    texts: Mapping[str, Sequence[Pair]],
    out: str | None,
    at: Setting,
    plan: RelearnPlan,
    *,
    batch_size: int = 8,
) -> Run:
    """Attack language models alike: `relearning.json`, `relearning.svg` and `report.html`.

    Args:
        speakers: By name: `UNLEARNED`, and any of `ORIGINAL` and `RETRAINED`; their adapters are merged.
        texts: By what they are: "forget", and any of "retain", "other", and "judge" (texts that are judged in place of
            the forgotten ones that are left, none of them among those that an attack may fine-tune on).
        out: The run directory; None names it by its content.
        at: Device and the like.
        plan: The attacks.
        batch_size: Texts of a pass without a gradient.

    Raises:
        UserError: for bad input, before any work.
        NonFiniteError: if a step is not finite.
    """
    check_apart(texts["forget"], texts.get("retain", ()))
    check_apart(texts["forget"], texts.get("other", ()), "other")
    for on in plan.on:
        check_apart(texts.get(on, ()), texts.get("judge", ()), "judge", what=on)
    if "other" in texts and "other" not in plan.on:
        raise UserError("unrelated texts are given, and no attack uses them; add other to the attacks")
    samples = _shared_samples(speakers, texts)
    pools, first = {}, 0
    for what, pairs in texts.items():
        pools[what] = np.arange(first, first + len(pairs))
        first += len(pairs)
    speaker = speakers[UNLEARNED]
    everything = [pair for pairs in texts.values() for pair in pairs]
    attacks = [
        Attack(
            config=how,
            samples=samples,
            pools=pools,
            watched=plan.watched,
            answers=answers_of(speaker, samples, everything, new_tokens=plan.new_tokens, batch_size=batch_size),
            batch_size=batch_size,
        )
        for how in plan.configs({what: len(pairs) for what, pairs in texts.items()})
    ]
    settings = {
        "models": {name: models.digest(one.model) for name, one in speakers.items()},
        "texts": samples.fingerprint,
        "parts": {what: len(pairs) for what, pairs in texts.items()},
        "form": speaker.form,
        "plan": plan,
        "batch_size": batch_size,
    }

    def work(workspace: Workspace) -> None:
        networks = {name: prepared(one.model) for name, one in speakers.items()}
        cost = estimate(networks[UNLEARNED], attacks, len(networks))
        at.say(
            f"relearning: {cost['curves']:.0f} curves, {cost['passes']:,.0f} passes and the looks at each point; about "
            f"{duration(cost['seconds'])}"
        )
        found = attack_all(
            networks,
            attacks,
            original=networks.get(ORIGINAL),
            workspace=workspace,
            progress=at.progress,
            judged_by=JUDGED_BY,
        )
        parts = {what: len(pairs) for what, pairs in texts.items()}
        workspace.write_json(RELEARNING_FILE, {"attacks": found, "n": parts, "judged_by": JUDGED_BY})
        drawn = figure(found)
        artifacts.write_text(workspace.file(FIGURE_FILE), drawn)
        write_relearning(workspace.file(REPORT_FILE), found, drawn, sentences(found), reference=RETRAINED)

    return at.perform(out, "language-relearn", settings, work)


def _shared_samples(speakers: Mapping[str, Speaker], texts: Mapping[str, Sequence[Pair]]) -> TextSamples:
    """The texts in tokens, which must be the same for all models."""
    samples = {name: one.samples(texts) for name, one in speakers.items()}
    mine = samples[UNLEARNED]
    for name, theirs in samples.items():
        if theirs.fingerprint != mine.fingerprint:
            raise UserError(
                f"the tokenizer of the {name} model ({speakers[name].name}) cuts the texts into other tokens than that "
                "of the unlearned one; compare models of one tokenizer, or name it with tokenizer"
            )
    return mine


def answers_of(
    speaker: Speaker, samples: TextSamples, pairs: Sequence[Pair], *, new_tokens: int, batch_size: int
) -> Callable[[nn.Module, np.ndarray], dict[str, float]]:
    """What gives ROUGE-L (recall) of greedy answers to the texts at some positions; of those that have a prompt."""

    def give(model: nn.Module, at: np.ndarray) -> dict[str, float]:
        asked = [int(i) for i in at if samples.texts[i].n_prompt]
        if not asked:
            return {}
        said = evaluation.greedy_answers(
            model,
            speaker.tokenizer,
            [samples.texts[i].tokens[: samples.texts[i].n_prompt] for i in asked],
            new_tokens=new_tokens,
            context=models.context_of(speaker.model),
            batch_size=batch_size,
        )
        return {"rouge_l": float(np.mean([evaluation.rouge_l(s, pairs[i].answer).recall for s, i in zip(said, asked)]))}

    return give


def estimate(network: nn.Module, attacks: Sequence[Attack], n_networks: int) -> dict[str, float]:
    """What the attacks will cost: curves, passes, and seconds from a measured forward pass and measured answers."""
    first = attacks[0]
    some = first.judged[: first.batch_size]
    taken: list[float] = []
    for _ in range(2):
        started = time.perf_counter()
        evaluation.score(network, first.samples.subset(some), batch_size=first.batch_size)
        taken.append((time.perf_counter() - started) / len(some))
    answered = 0.0
    if first.answers is not None:
        started = time.perf_counter()
        first.answers(network, some)
        answered = (time.perf_counter() - started) / len(some)
    texts = sum(BACKWARD * a.trained + a.looked for a in attacks)
    spoken = sum(2 * len(a.answered) for a in attacks)
    return {
        "curves": len(attacks) * n_networks,
        "passes": sum(a.passes for a in attacks) * n_networks,
        "seconds": (texts * taken[-1] + spoken * answered) * n_networks,
    }


def figure(found: Mapping[str, Any]) -> str:
    """The curves of `attack_all` as SVG, a panel for each attack."""
    panels: dict[str, dict[str, list[list[float]]]] = {}
    places: dict[str, list[float]] = {}
    for on, one in found.items():
        title = f"fine-tuned on {one['config']['n']} {TITLES[on]}"
        panels[title] = {}
        for row in one["rows"]:
            curves = panels[title].setdefault(row["model"], [])
            if row["step"] == 0:
                curves.append([])
            curves[-1].append(100 * row[JUDGED_BY])
        places[title] = list(dict.fromkeys(row["step"] for row in one["rows"]))
    return relearning_curves(
        panels, RETRAINED, x="step of the attack", y="probability of a forgotten answer (%)", places=places
    )


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What `attack_all` found, in a line for each attack and model."""
    lines = []
    for on, one in found.items():
        of = {name: [r for r in one["rows"] if r["model"] == name] for name in {r["model"]: 0 for r in one["rows"]}}
        for name, rows in of.items():
            last = max(row["step"] for row in rows)
            ends = [float(np.mean([row[JUDGED_BY] for row in rows if row["step"] == step])) for step in (0, last)]
            told = one["recovery"].get(name)
            excess = None if told is None else told["excess"]
            half = "" if excess is None or excess["half_width"] is None else f" ± {excess['half_width']:.3f}"
            beside = "" if excess is None else f"; gains {excess['mean']:+.3f}{half} more than {RETRAINED}"
            lines.append(
                f"fine-tuned on {one['config']['n']} {TITLES[on]}: {name} {ends[0]:.3f} → {ends[1]:.3f} probability of "
                f"a forgotten answer{beside}"
            )
    return lines


__all__ = ["ORIGINAL", "RelearnPlan", "estimate", "figure", "relearn_texts", "sentences"]
