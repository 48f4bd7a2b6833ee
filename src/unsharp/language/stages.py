"""The stages of language unlearning: each reads a model and texts, and writes one run directory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from unsharp import config, masks
from unsharp.artifacts import RUN_FILE, Run, Workspace
from unsharp.errors import UserError
from unsharp.language import evaluation, models
from unsharp.language.config import LanguageConfig
from unsharp.language.samples import TextSamples
from unsharp.language.texts import Pair, TextFormat, check_apart, encode, prompt_tokens
from unsharp.language.unlearn import unlearn
from unsharp.stages import METRICS_FILE, RECORD_FILE, Setting

MODEL_DIRECTORY = "model"
REFUSALS = (
    "I don't know.",
    "I'm not sure.",
    "I have no information about that.",
    "I can't say.",
    "That is something I don't know about.",
    "I'm afraid I don't have the answer to that.",
    "I was not told anything about this.",
    "I'm unable to answer that question.",
)
"""What is said in place of a forgotten answer, where the user gives nothing else."""
LIKELY = ("probability", "extraction_strength", "exact_memorization")
SETS = ("forget", "retain", "real_authors", "world_facts")
UTILITY = ("retain", "real_authors", "world_facts")
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus")


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A model with its tokenizer, and how texts are laid out for it.

    Args:
        model: On the device of the work.
        tokenizer: Its tokenizer.
        form: How a pair becomes a text.
        name: Where it was loaded from.
    """

    model: nn.Module
    tokenizer: Any
    form: TextFormat
    name: str

    @property
    def pad(self) -> int:
        """A token that fills batches up."""
        return next(i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if i is not None)

    def samples(self, pairs: Mapping[str, Sequence[Pair]]) -> TextSamples:
        """The pairs as samples, in the order given; those under "forget" are to be forgotten."""
        sizes = {"context": models.context_of(self.model), "n_tokens": models.n_tokens_of(self.model)}
        texts, forgotten = [], []
        for what, some in pairs.items():
            texts += encode(some, self.tokenizer, self.form, what=what, **sizes) if some else []
            forgotten += [what == "forget"] * len(some)
        return TextSamples(texts, forgotten, pad=self.pad, device=next(self.model.parameters()).device)


def open_speaker(
    name: str | Path,
    form: TextFormat,
    at: Setting,
    *,
    tokenizer: str | None = None,
    weights: str = "float32",
    local_files_only: bool = False,
) -> Speaker:
    """Load a model for the texts; a run directory of `unlearn_model` stands for the model in it."""
    place = Path(name)
    if (place / RUN_FILE).is_file():
        place = place / MODEL_DIRECTORY
    found = models.load(
        place if place.is_dir() else name,
        at.device,
        tokenizer=tokenizer,
        weights=weights,
        local_files_only=local_files_only,
    )
    return Speaker(model=found.model, tokenizer=found.tokenizer, form=form, name=str(name))


def unlearn_model(
    speaker: Speaker,
    forget: Sequence[Pair],
    retain: Sequence[Pair],
    how: LanguageConfig,
    out: str | Path | None,
    at: Setting,
    *,
    refusals: Sequence[str] = REFUSALS,
    mask: str | Path | None = None,
) -> Run:
    """Make a model forget: the new model (or its adapters), record, losses before and after.

    Args:
        speaker: The model; its own files are left as they are.
        forget: What is to be forgotten.
        retain: What is to be kept; not needed where the objective's gamma is 0.
        how: Objective, rule and loop.
        out: The run directory; None names it by its content.
        at: Device and the like.
        refusals: What is said in place of forgotten answers, drawn with the seed; for objectives that refuse.
        mask: File of a mask over the trainable weights.

    Raises:
        UserError: for bad input, before any work.
        NonFiniteError: if a step is not finite.
    """
    check_apart(forget, retain)
    samples = speaker.samples({"forget": forget, "retain": retain})
    instead = _preferred(forget, how, refusals)
    preferred = None if instead is None else speaker.samples({"forget": instead})
    region = None
    if mask is not None:
        if how.lora is not None:
            raise UserError("a mask file is for the model's own weights, and LoRA trains others; leave one of them out")
        region = masks.load(mask, speaker.model)
    settings = {
        "model": models.digest(speaker.model),
        "texts": samples.fingerprint,
        "preferred": None if preferred is None else preferred.fingerprint,
        "mask": None if mask is None else hashlib.sha256(Path(mask).read_bytes()).hexdigest(),
        "form": speaker.form,
        "language": how,
    }

    def work(workspace: Workspace) -> None:
        before = _losses(speaker.model, samples, how.batch_size)
        network, record = unlearn(
            speaker.model,
            samples,
            how,
            preferred=preferred,
            mask=region,
            workspace=workspace,
            save_seconds=at.save_seconds,
            progress=at.progress,
            in_place=True,
        )
        workspace.write_json(RECORD_FILE, record)
        workspace.write_json(METRICS_FILE, {"before": before, "after": _losses(network, samples, how.batch_size)})
        models.save(workspace.file(MODEL_DIRECTORY), network, speaker.tokenizer)

    return at.perform(out, "language-unlearn", settings, work)


def _preferred(forget: Sequence[Pair], how: LanguageConfig, refusals: Sequence[str]) -> list[Pair] | None:
    """The forgotten prompts with the answers to give, where the objective wants any."""
    if how.objective.prefers == "":
        return None
    if how.objective.prefers == "given":
        if lacking := [i + 1 for i, pair in enumerate(forget) if not (pair.preferred or "").strip()]:
            raise UserError(
                f"forget text {lacking[0]} has no preferred answer ({len(lacking)} of {len(forget)} lack one); give "
                'each a "preferred", or take idk_dpo'
            )
        return [Pair(prompt=pair.prompt, answer=pair.preferred or "") for pair in forget]
    if not refusals or not all(text.strip() for text in refusals):
        raise UserError("refusals must hold at least one text, none of them empty")
    drawn = np.random.default_rng(how.seed).integers(0, len(refusals), len(forget))
    return [Pair(prompt=pair.prompt, answer=refusals[int(i)]) for pair, i in zip(forget, drawn)]


def _losses(model: nn.Module, samples: TextSamples, batch_size: int) -> dict[str, float | None]:
    """The mean over texts of the mean loss of an answer's tokens."""
    scores = evaluation.score(model, samples, batch_size=batch_size)
    means = np.array([-s.log_p.mean() for s in scores])
    return {
        f"{name}_loss": float(means[at].mean()) if len(at) else None
        for name, at in (("forget", samples.forget), ("retain", samples.retain))
    }


def evaluate_model(
    speaker: Speaker,
    texts: Mapping[str, Sequence[Pair]],
    out: str | Path | None,
    at: Setting,
    *,
    reference: Speaker | None = None,
    holdout: Sequence[Pair] = (),
    batch_size: int = 8,
    new_tokens: int = 100,
) -> Run:
    """Measure what a model still says of texts, beside a model that was retrained without the forgotten ones.

    Args:
        speaker: The model that forgot.
        texts: By name of the set: "forget", and any of "retain", "real_authors" and "world_facts".
        out: The run directory; None names it by its content.
        at: Device and the like.
        reference: The retrained model; without it there is no forget quality.
        holdout: Texts that no model saw, for membership inference; none measures none.
        batch_size: Texts of a pass.
        new_tokens: Tokens of a generated answer at most.

    Raises:
        UserError: for bad input, before any work.
    """
    if batch_size < 1 or new_tokens < 1:
        raise UserError(f"batch_size and new_tokens must be at least 1, got {batch_size} and {new_tokens}")
    if reference is not None and reference.form != speaker.form:
        raise UserError("model and reference must be asked in one form")
    speakers = {"model": speaker} | ({} if reference is None else {"reference": reference})
    prepared = {name: _Questions.of(one, texts, holdout) for name, one in speakers.items()}
    settings = {
        "models": {name: models.digest(one.model) for name, one in speakers.items()},
        "texts": {name: q.fingerprint for name, q in prepared.items()},
        "form": speaker.form,
        "batch_size": batch_size,
        "new_tokens": new_tokens,
    }

    def work(workspace: Workspace) -> None:
        answers = {
            name: q.answered(speakers[name], batch_size=batch_size, new_tokens=new_tokens)
            for name, q in prepared.items()
        }
        measured = {name: a.metrics() for name, a in answers.items()}
        ratios = [answers[name].truth_ratios.get("forget") for name in answers]
        quality = evaluation.forget_quality(*ratios) if len(ratios) == 2 and all(ratios) else None  # pyright: ignore
        found = {
            "model": measured["model"],
            "reference": measured.get("reference"),
            "forget_quality": quality,
            "why_no_forget_quality": None if quality is not None else _why_no_quality(reference, texts["forget"]),
        }
        workspace.write_json(METRICS_FILE, found)

    return at.perform(out, "language-evaluate", settings, work)


def _why_no_quality(reference: Speaker | None, forget: Sequence[Pair]) -> str:
    if reference is None:
        return "no retrained model was given to compare with"
    return "the forgotten texts have no perturbed answers" if not forget[0].perturbed else "some lack perturbed answers"


@dataclass(frozen=True, kw_only=True)
class _Questions:
    """Texts in the tokens of one model: what it is asked."""

    texts: Mapping[str, Sequence[Pair]]
    holdout: Sequence[Pair]
    samples: Mapping[str, TextSamples]

    @classmethod
    def of(cls, speaker: Speaker, texts: Mapping[str, Sequence[Pair]], holdout: Sequence[Pair]) -> _Questions:
        samples = {name: speaker.samples({name: pairs}) for name, pairs in texts.items()}
        if holdout:
            samples["holdout"] = speaker.samples({"holdout": holdout})
        for name, pairs in texts.items():
            if all(pair.perturbed for pair in pairs):
                wrong = [Pair(prompt=p.prompt, answer=text) for p in pairs for text in p.perturbed]
                right = [Pair(prompt=p.prompt, answer=p.paraphrase or p.answer) for p in pairs]
                samples[f"{name}/perturbed"] = speaker.samples({name: wrong})
                samples[f"{name}/paraphrase"] = speaker.samples({name: right})
        return cls(texts=texts, holdout=holdout, samples=samples)

    @property
    def fingerprint(self) -> str:
        return config.digest({name: samples.fingerprint for name, samples in self.samples.items()})

    def answered(self, speaker: Speaker, *, batch_size: int, new_tokens: int) -> _Answers:
        scores = {
            name: evaluation.score(speaker.model, samples, batch_size=batch_size)
            for name, samples in self.samples.items()
        }
        context = models.context_of(speaker.model)
        said = {
            name: evaluation.greedy_answers(
                speaker.model,
                speaker.tokenizer,
                [prompt_tokens(pair, speaker.tokenizer, speaker.form) for pair in pairs],
                new_tokens=new_tokens,
                context=context,
                batch_size=batch_size,
            )
            for name, pairs in self.texts.items()
        }
        return _Answers(questions=self, scores=scores, said=said)


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """What one model said."""

    questions: _Questions
    scores: Mapping[str, list[evaluation.TokenScores]]
    said: Mapping[str, list[str]]

    @property
    def truth_ratios(self) -> dict[str, list[float]]:
        """Of each set with perturbed answers, one for each question."""
        found = {}
        for name, pairs in self.questions.texts.items():
            if f"{name}/perturbed" in self.scores:
                rights = self.scores[f"{name}/paraphrase"]
                found[name] = [
                    evaluation.truth_ratio(right, wrong) for right, wrong in zip(rights, self._wrong(name, pairs))
                ]
        return found

    def metrics(self) -> dict[str, Any]:
        """All figures of the model."""
        sets = {name: self._of_set(name, pairs) for name, pairs in self.questions.texts.items()}
        return sets | {"model_utility": self._utility(sets), "membership": self._membership()}

    def _of_set(self, name: str, pairs: Sequence[Pair]) -> dict[str, Any]:
        scores, ratios = self.scores[name], self.truth_ratios.get(name)
        rouge = [evaluation.rouge_l(said, pair.answer).recall for said, pair in zip(self.said[name], pairs)]
        found: dict[str, Any] = {"n": len(pairs), "perplexity": evaluation.perplexity(scores)}
        found |= {what: float(np.mean([getattr(evaluation, what)(s) for s in scores])) for what in LIKELY}
        if name in ("real_authors", "world_facts") and ratios is not None:
            chosen = zip(scores, self._wrong(name, pairs))
            found["probability"] = float(np.mean([evaluation.choice_probability(s, wrong) for s, wrong in chosen]))
        found["rouge_l"] = float(np.mean(rouge))
        found["truth_ratio"] = None if ratios is None else float(np.mean(ratios))
        found["truthfulness"] = None if ratios is None else float(np.mean([max(0.0, 1 - r) for r in ratios]))
        return found

    def _wrong(self, name: str, pairs: Sequence[Pair]) -> list[list[evaluation.TokenScores]]:
        scores = iter(self.scores[f"{name}/perturbed"])
        return [[next(scores) for _ in pair.perturbed] for pair in pairs]

    def _utility(self, sets: Mapping[str, Mapping[str, Any]]) -> float | None:
        if any(name not in sets or sets[name]["truthfulness"] is None for name in UTILITY):
            return None
        parts = [sets[name][what] for name in UTILITY for what in ("probability", "rouge_l", "truthfulness")]
        return evaluation.model_utility(parts)

    def _membership(self) -> dict[str, float] | None:
        if not self.questions.holdout:
            return None
        pairs = {"forget": self.questions.texts["forget"], "holdout": self.questions.holdout}
        found = {}
        for attack in ATTACKS:
            values = [
                [_member_score(attack, s, pair) for s, pair in zip(self.scores[name], some)]
                for name, some in pairs.items()
            ]
            found[attack] = evaluation.membership_auc(*values)
        return found


def _member_score(attack: str, scores: evaluation.TokenScores, pair: Pair) -> float:
    if attack == "loss":
        return float(scores.log_p.mean())
    if attack == "zlib":
        return evaluation.zlib_score(scores, pair.answer)
    return getattr(evaluation, attack)(scores)


def shown(metrics: Mapping[str, Any]) -> str:
    """The figures as a table for a person, with a row for the retrained model whether or not there is one."""
    columns = [("forget", w) for w in ("probability", "rouge_l", "extraction_strength", "truth_ratio")]
    columns += [("retain", w) for w in ("probability", "rouge_l")]
    head = ["", *(f"{name} {what.replace('_', ' ')}" for name, what in columns), "model utility"]
    lines = [head]
    for title, name in (("Unlearned", "model"), ("Retrained", "reference")):
        found = metrics[name]
        cells = [None if found is None else found.get(s, {}).get(what) for s, what in columns]
        cells.append(None if found is None else found["model_utility"])
        lines.append([title, *("—" if c is None or not math.isfinite(c) else f"{c:.3f}" for c in cells)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    table = ["  ".join(cell.rjust(w) for cell, w in zip(line, widths)) for line in lines]
    quality = metrics["forget_quality"]
    last = f"none: {metrics['why_no_forget_quality']}" if quality is None else f"{quality:.3g} (p-value; 1 is best)"
    return "\n".join([*table, f"forget quality {last}"])
