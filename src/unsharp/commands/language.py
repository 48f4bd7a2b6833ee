"""The command for language models: make one forget texts, measure what it still says of them, or teach them again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from unsharp import config
from unsharp.commands.shared import run_answer, setting
from unsharp.errors import UserError, unknown
from unsharp.options import (
    Common,
    Count,
    Form,
    FormFields,
    LanguageFields,
    LoRAFields,
    Objective,
    OptimizerFields,
    Text,
    Words,
)

if TYPE_CHECKING:
    from unsharp.language import Pair

BESIDE = {"reference", "new_tokens"}
OF_EVALUATION = {"holdout", "real_authors", "world_facts"}
OF_RELEARNING = {"on", "n", "steps", "look_every", "seeds", "watched", "original", "other", "judge"}
LOOP = {f.name for group in (LoRAFields, OptimizerFields, LanguageFields) for f in dataclasses.fields(group)} | {"seed"}
LOOP -= {"batch_size", "sharpness", "leading"} | {name for name in LOOP if name.startswith("mask_")}
"""What a fine-tuning takes of the options of a loop."""
OF_UNLEARNING = {"mask", "refusals", *(f.name for f in dataclasses.fields(Objective))} - {"batch_size"} - LOOP
LAID_OUT = {f.name for f in dataclasses.fields(FormFields)} - {"too_long"}
"""What published tests have in a form of their own."""
OF_BENCHMARKS = {"wmdp", "mmlu", "choices", "muse", "lm_eval"}
NOT_TAKEN = {
    "unlearn": BESIDE | OF_EVALUATION | OF_RELEARNING | OF_BENCHMARKS,
    "evaluate": OF_RELEARNING | OF_UNLEARNING | LOOP | OF_BENCHMARKS,
    "relearn": OF_EVALUATION | OF_UNLEARNING | OF_BENCHMARKS,
    "benchmark": {"forget", "retain", "new_tokens"} | LAID_OUT | OF_EVALUATION | OF_RELEARNING | OF_UNLEARNING | LOOP,
}


@dataclass(kw_only=True)
class Language(Common, Form, Objective):  # pyright: ignore[reportGeneralTypeIssues]
    """Make a language model forget texts, measure what it still says of them, or try to bring them back."""

    what: tyro.conf.Positional[str]
    """unlearn, evaluate, relearn or benchmark."""
    model: str
    """Model of transformers: a name on the hub, a directory, or an `unlearn` run. It is read only."""
    forget: Text = None
    """What is to be forgotten: JSON, JSON Lines or Parquet, FILE or FILE:PART, with prompts and answers; benchmark does
    not take it."""
    retain: Text = None
    """What is to be kept, likewise; unlearn needs it unless --gamma is 0."""
    out: Text = None
    """Run directory; named by content under runs/ if left out."""
    tokenizer: Text = None
    """Tokenizer: a name or a directory; that beside the model, if left out."""
    weights: str = "float32"
    """Precision in which weights are loaded and kept: float32, bf16 or fp16."""
    local_files_only: bool = False
    """Ask no hub; take what its cache on this machine has."""
    mask: Text = None
    """unlearn: mask over the weights, as masks.save writes it, in place of --mask-fraction."""
    refusals: Text = None
    """unlearn: file with a refusal per line, for objectives that refuse; eight short ones, if left out."""
    reference: Text = None
    """evaluate, relearn, benchmark: model that was trained without the forgotten texts."""
    holdout: Text = None
    """evaluate: texts that no model saw, for membership inference."""
    real_authors: Text = None
    """evaluate: questions on real authors with perturbed answers, for the model utility of TOFU."""
    world_facts: Text = None
    """evaluate: questions on the world with perturbed answers, likewise."""
    new_tokens: int = 100
    """evaluate, relearn: tokens of a generated answer at most."""
    on: tuple[str, ...] = ("forget", "retain")
    """relearn: what copies are fine-tuned on, an attack for each: forget (the others are judged), retain, other."""
    n: Count = None
    """relearn: texts to fine-tune on; a fifth of the forgotten with forget, else as many as those, if left out."""
    steps: Count = None
    """relearn: steps of an attack, in place of --epochs."""
    look_every: Count = None
    """relearn: steps between two points of the curve; an epoch, or with --steps what leaves ten points, if left out."""
    seeds: int = 1
    """relearn: number of seeds, counted from --seed; with several, figures have 95 % intervals."""
    watched: int = 100
    """relearn: retained texts, at most, that are looked at, and judged ones that are answered."""
    original: Text = None
    """relearn: model before it forgot, which is attacked beside it."""
    other: Text = None
    """relearn: unrelated texts, for --on other."""
    judge: Text = None
    """relearn: texts that are judged, in place of the forgotten ones that a copy is not fine-tuned on."""

    wmdp: Text = None
    """benchmark: multiple-choice questions on what is to be forgotten, in the layout of cais/wmdp."""
    mmlu: Text = None
    """benchmark: multiple-choice questions on what is to be kept, in the layout of cais/mmlu."""
    choices: str = "letters"
    """benchmark: whether the likeliest of the letters is taken, or of the whole answers."""
    muse: Text = None
    """benchmark: directory with MUSE-News or MUSE-Books, in the layout of the hub."""
    lm_eval: Words = None
    """benchmark: tasks of lm-evaluation-harness, for which it must be installed (extra [lm_eval])."""

    def run(self) -> dict[str, Any]:
        if self.what not in NOT_TAKEN:
            raise unknown("kind of language", self.what, NOT_TAKEN)
        others = NOT_TAKEN[self.what]
        given = [f.name for f in dataclasses.fields(self) if f.name in others and getattr(self, f.name) != f.default]
        if self.forget is None and "forget" not in others:
            raise UserError(f"{self.what} needs --forget, the texts that are to be forgotten")
        if given:
            named = " ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{self.what} does not take {named}; leave it out")
        return {
            "unlearn": self._unlearn,
            "evaluate": self._evaluate,
            "relearn": self._relearn,
            "benchmark": self._benchmark,
        }[self.what]()

    def _unlearn(self) -> dict[str, Any]:
        from unsharp.language import stages

        how, form = self.language_config(), self.text_format()
        forget, retain = _pairs(self.forget), _pairs(self.retain)
        refusals = stages.REFUSALS if self.refusals is None else _lines(self.refusals)
        with setting(self) as at:
            speaker = self._speaker(self.model, form, at)
            run = stages.unlearn_model(speaker, forget, retain, how, self.out, at, refusals=refusals, mask=self.mask)
        record, metrics = run.json(stages.RECORD_FILE), run.json(stages.METRICS_FILE)
        cost = {k: record[k] for k in ("seconds", "passes", "peak_memory_bytes")}
        if not self.json:
            for name in ("forget", "retain"):
                before, after = (metrics[when][f"{name}_loss"] for when in ("before", "after"))
                if before is not None:
                    print(f"{name} loss per token {before:.3f} → {after:.3f}")
            print(
                f"{cost['seconds']:.1f} s, {cost['passes']} passes; next: unsharp language evaluate --model {run.path}"
            )
        return run_answer(run) | cost | metrics

    def _evaluate(self) -> dict[str, Any]:
        from unsharp.language import stages

        form, texts = self.text_format(), {"forget": _pairs(self.forget)}
        for name in stages.SETS[1:]:
            if (path := getattr(self, name)) is not None:
                texts[name] = _pairs(path)
        holdout = _pairs(self.holdout)
        with setting(self) as at:
            speaker = self._speaker(self.model, form, at)
            reference = None if self.reference is None else self._speaker(self.reference, form, at)
            run = stages.evaluate_model(
                speaker,
                texts,
                self.out,
                at,
                reference=reference,
                holdout=holdout,
                batch_size=8 if self.batch_size is None else self.batch_size,
                new_tokens=self.new_tokens,
            )
        metrics = run.json(stages.METRICS_FILE)
        if not self.json:
            print(stages.shown(metrics))
        return run_answer(run) | metrics

    def _relearn(self) -> dict[str, Any]:
        from unsharp.language import relearning_stage as stage
        from unsharp.language.relearning import RelearnConfig

        given = {"steps": self.steps, "look_every": self.look_every, "batch_size": self.batch_size}
        how = config.from_dict(
            RelearnConfig,
            self.loop_values(config.to_dict(RelearnConfig())) | {k: v for k, v in given.items() if v is not None},
            "relearn",
        )
        plan = stage.RelearnPlan(
            on=self.on,  # pyright: ignore[reportArgumentType]
            how=how,
            **{name: getattr(self, name) for name in ("n", "seeds", "watched", "new_tokens")},
        )
        if ("other" in self.on) != (self.other is not None):
            raise UserError("--on other and --other belong together: give both, or neither")
        form, texts = self.text_format(), {"forget": _pairs(self.forget)}
        for name in ("retain", "other", "judge"):
            if (path := getattr(self, name)) is not None:
                texts[name] = _pairs(path)
        with setting(self) as at:
            named = {stage.UNLEARNED: self.model, stage.ORIGINAL: self.original, stage.RETRAINED: self.reference}
            speakers = {who: self._speaker(name, form, at) for who, name in named.items() if name is not None}
            run = stage.relearn_texts(speakers, texts, self.out, at, plan)
        found = run.json(stage.RELEARNING_FILE)
        if not self.json:
            print("\n".join(stage.sentences(found["attacks"])))
        return run_answer(run) | found

    def _benchmark(self) -> dict[str, Any]:
        from unsharp.language import benchmark_stage as stage
        from unsharp.language.benchmarks import read_muse, read_questions

        named = {name: path for name in ("wmdp", "mmlu") if (path := getattr(self, name)) is not None}
        form, tasks = self.text_format(), self.lm_eval or ()
        asked = stage.Benchmarks(
            questions={name: read_questions(path) for name, path in named.items()},
            choices=self.choices,  # pyright: ignore[reportArgumentType]
            muse=None if self.muse is None else read_muse(self.muse),
            tasks=tuple(task for word in tasks for task in word.split(",") if task),
        )
        size = 8 if self.batch_size is None else self.batch_size
        with setting(self) as at:
            speaker = self._speaker(self.model, form, at)
            reference = None if self.reference is None else self._speaker(self.reference, form, at)
            run = stage.benchmark_model(speaker, asked, self.out, at, reference=reference, batch_size=size)
        metrics = run.json(stage.METRICS_FILE)
        if not self.json:
            print(stage.shown(metrics))
        return run_answer(run) | metrics

    def _speaker(self, name: str, form: Any, at: Any) -> Any:
        from unsharp.language.stages import open_speaker

        return open_speaker(
            name,
            form,
            at,
            tokenizer=self.tokenizer,
            weights=self.weights,
            local_files_only=self.local_files_only,
        )


def _pairs(path: str | None) -> Sequence[Pair]:
    from unsharp.language import read_pairs

    return [] if path is None else read_pairs(path)


def _lines(path: str) -> list[str]:
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"refusals {path} cannot be read ({error}); give a text file with one per line") from None
