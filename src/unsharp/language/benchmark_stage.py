"""Published tests as a stage: a language model under them, beside the retrained one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from unsharp import config
from unsharp.artifacts import Run, Workspace
from unsharp.errors import UserError, unknown
from unsharp.language import benchmarks, evaluation, models
from unsharp.language.benchmarks import Choices, Muse, Question
from unsharp.language.samples import TextSamples
from unsharp.language.stages import Speaker
from unsharp.language.texts import Encoded
from unsharp.stages import METRICS_FILE, Setting

MODEL, REFERENCE = "model", "reference"


@dataclass(frozen=True, kw_only=True)
class Benchmarks:
    """What a model is asked.

    Args:
        questions: Multiple-choice questions by the name of their set ("wmdp", "mmlu").
        choices: How they are answered: by "letters" or by whole "answers".
        muse: What there is of MUSE; None asks nothing of it.
        tasks: Tasks of lm-evaluation-harness.

    Raises:
        UserError: if there is nothing to ask, or `choices` is unknown.
    """

    questions: Mapping[str, Sequence[Question]] = field(default_factory=dict)
    choices: Choices = "letters"
    muse: Muse | None = None
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.choices not in get_args(Choices):
            raise unknown("choices", self.choices, get_args(Choices))
        if not self.questions and self.muse is None and not self.tasks:
            raise UserError("nothing is asked; give at least one of wmdp, mmlu, muse and lm_eval")
        if len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"lm_eval names a task twice ({', '.join(self.tasks)}); name each once")


def benchmark_model(
    speaker: Speaker,
    asked: Benchmarks,
    out: str | Path | None,
    at: Setting,
    *,
    reference: Speaker | None = None,
    batch_size: int = 8,
) -> Run:
    """Ask a model what published tests ask, beside a model that was retrained without the forgotten texts.

    Args:
        speaker: The model that forgot; of its form, `too_long` alone counts.
        asked: The tests.
        out: The run directory; None names it by its content.
        at: Device and the like.
        reference: The retrained model; without it there is no privacy leakage.
        batch_size: Texts of a pass.

    Raises:
        UserError: for bad input, before any work.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    if asked.tasks:
        benchmarks.check_tasks(asked.tasks)
    speakers = {MODEL: speaker} | ({} if reference is None else {REFERENCE: reference})
    prepared = {name: _Asked.of(one, asked) for name, one in speakers.items()}
    settings = {
        "models": {name: models.digest(one.model) for name, one in speakers.items()},
        "texts": {name: one.fingerprint for name, one in prepared.items()},
        "asked": config.digest(asked),
        "too_long": speaker.form.too_long,
        "batch_size": batch_size,
    }

    def work(workspace: Workspace) -> None:
        found: dict[str, Any] = {
            name: one.measured(speakers[name], asked, batch_size) for name, one in prepared.items()
        }
        if asked.muse is not None and asked.muse.privacy:
            aucs = [found[name]["muse"]["privacy_auc"] for name in found]
            leak = benchmarks.privacy_leak(*aucs) if len(aucs) == 2 else None
            found[MODEL]["muse"]["privacy_leak"] = leak
        workspace.write_json(METRICS_FILE, {MODEL: found[MODEL], REFERENCE: found.get(REFERENCE)})

    return at.perform(out, "language-benchmark", settings, work)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The tests in the tokens of one model."""

    choices: Mapping[str, TextSamples]
    prompts: Mapping[str, list[list[int]]]
    privacy: Mapping[str, TextSamples]

    @classmethod
    def of(cls, speaker: Speaker, asked: Benchmarks) -> _Asked:
        words, context, cut = speaker.tokenizer, models.context_of(speaker.model), speaker.form.too_long == "cut"
        choices = {
            name: _samples(
                speaker, benchmarks.encode_choices(some, words, asked.choices, context=context, cut=cut), name
            )
            for name, some in asked.questions.items()
        }
        muse = Muse() if asked.muse is None else asked.muse
        room = {"context": context, "cut": cut}
        prompts = {
            f"knowledge_{name}": [
                _prompt(text, words, f"{name} question {i + 1}", benchmarks.KNOWLEDGE_TOKENS, **room)
                for i, text in enumerate(benchmarks.knowledge_prompts(*some))
            ]
            for name, some in muse.known.items()
        }
        if muse.verbatim:
            prompts["verbatim"] = [
                _prompt(pair.prompt, words, f"verbatim text {i + 1}", benchmarks.VERBATIM_TOKENS, **room)
                for i, pair in enumerate(muse.verbatim)
            ]
        for name, some in prompts.items():
            _samples(speaker, [Encoded(tuple(tokens), 0) for tokens in some], name)
        privacy = {
            name: _samples(
                speaker,
                [_whole(text, words, f"{name} text {i + 1}", **room) for i, text in enumerate(texts)],
                name,
            )
            for name, texts in muse.privacy.items()
        }
        return cls(choices=choices, prompts=prompts, privacy=privacy)

    @property
    def fingerprint(self) -> str:
        parts = {name: samples.fingerprint for name, samples in (*self.choices.items(), *self.privacy.items())}
        return config.digest({"samples": parts, "prompts": self.prompts})

    def measured(self, speaker: Speaker, asked: Benchmarks, batch_size: int) -> dict[str, Any]:
        found: dict[str, Any] = {
            name: {"choices": asked.choices}
            | benchmarks.choice_figures(speaker.model, asked.questions[name], samples, batch_size=batch_size)
            for name, samples in self.choices.items()
        }
        if asked.muse is not None:
            found["muse"] = self._muse(speaker, asked.muse, batch_size)
        if asked.tasks:
            found["lm_eval"] = benchmarks.harness_figures(
                speaker.model, speaker.tokenizer, asked.tasks, batch_size=batch_size
            )
        return found

    def _muse(self, speaker: Speaker, muse: Muse, batch_size: int) -> dict[str, float | None]:
        found: dict[str, float | None] = {}

        def said(name: str, new_tokens: int) -> list[str]:
            return evaluation.greedy_answers(
                speaker.model,
                speaker.tokenizer,
                self.prompts[name],
                new_tokens=new_tokens,
                context=models.context_of(speaker.model),
                batch_size=batch_size,
            )

        for name, (questions, _) in muse.known.items():
            answers = map(benchmarks.until_an_end, said(f"knowledge_{name}", benchmarks.KNOWLEDGE_TOKENS))
            found[f"knowledge_{name}"] = _rouge(answers, [pair.answer for pair in questions])
        if muse.verbatim:
            n = benchmarks.VERBATIM_TOKENS
            true = [benchmarks.shortened(pair.answer, speaker.tokenizer, n) for pair in muse.verbatim]
            found["verbatim"] = _rouge(said("verbatim", n), true)
        if self.privacy:
            scores = {
                name: evaluation.score(speaker.model, samples, batch_size=batch_size)
                for name, samples in self.privacy.items()
            }
            found["privacy_auc"] = benchmarks.privacy_auc(scores["forget"], scores["holdout"])
        return found


def _rouge(said: Any, true: Sequence[str]) -> float:
    return float(np.mean([evaluation.rouge_l(answer, text).f for answer, text in zip(said, true, strict=True)]))


def _prompt(text: str, words: Any, where: str, n_answer: int, *, context: int | None, cut: bool) -> list[int]:
    """The tokens of a prompt, behind which there is room for a whole answer."""
    tokens = list(words(text).input_ids)
    if context is None or len(tokens) + n_answer <= context:
        return tokens
    if context <= n_answer:
        raise UserError(
            f"{where} needs room for an answer of {n_answer} tokens, and the model takes {context} at most with the "
            "prompt; leave this part of MUSE out"
        )
    if not cut:
        raise UserError(
            f"{where} has {len(tokens)} tokens with what stands before it, its answer has up to {n_answer}, and the "
            f"model takes {context} at most; leave it out, or say too_long cut to lose its beginning"
        )
    return tokens[n_answer - context :]


def _whole(text: str, words: Any, where: str, *, context: int | None, cut: bool) -> Encoded:
    tokens = list(words(text).input_ids)
    if context is not None and len(tokens) > context and not cut:
        raise UserError(
            f"{where} has {len(tokens)} tokens, and the model takes {context} at most; shorten it, or say too_long cut "
            "to lose its end"
        )
    if len(tokens) < 2:
        raise UserError(f"{where} has no token to predict after its first; leave it out")
    return Encoded(tuple(tokens[:context]), 0)


def _samples(speaker: Speaker, texts: Sequence[Encoded], what: str) -> TextSamples:
    top, known = max(max(text.tokens) for text in texts), models.n_tokens_of(speaker.model)
    if top >= known:
        raise UserError(
            f"the tokenizer does not fit the model: {what} has token {top}, and the model knows {known}; take the "
            "tokenizer that the model was trained with"
        )
    device = next(speaker.model.parameters()).device
    return TextSamples(texts, [False] * len(texts), pad=speaker.pad, device=device)


def shown(metrics: Mapping[str, Any]) -> str:
    """The figures as a table for a person, with a column for the retrained model whether or not there is one."""
    rows: list[tuple[str, ...]] = [("", "Unlearned", "Retrained")]
    for name, cells in _flat(metrics[MODEL]).items():
        beside = {} if metrics[REFERENCE] is None else _flat(metrics[REFERENCE])
        rows.append((name, *("—" if v is None else f"{v:.3f}" for v in (cells, beside.get(name)))))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in rows
    )


def _flat(found: Mapping[str, Any], before: str = "") -> dict[str, float | None]:
    flat: dict[str, float | None] = {}
    for name, value in found.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{name} ")
        elif not isinstance(value, str) and name not in ("n", "chance"):
            flat[f"{before}{name}".replace("_", " ")] = value
    return flat


__all__ = ["Benchmarks", "benchmark_model", "shown"]
