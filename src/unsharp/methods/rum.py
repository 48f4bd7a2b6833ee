"""RUM: cut the forget set into parts of like difficulty, and forget one after the other, each by its own method."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
from torch import nn

from unsharp import config, runtime
from unsharp.errors import UserError, unknown
from unsharp.methods.base import METHODS, AppliedMethod, Method, Problem
from unsharp.sharpness.base import RULES, Rule

if TYPE_CHECKING:
    from unsharp.training import Record

KEEP = "keep"
PARTS_FILE = "parts.json"
LOOP_SETTINGS = {"epochs": int, "lr": float}
Difficulty = Literal["loss", "confidence", "entropy"]
Order = Literal["easiest_first", "hardest_first"]
Later = Literal["set_aside", "retain"]


@dataclass(frozen=True)
class Step:
    """What is done to a part: a method, with the settings of the loop that differ; None leaves the part alone."""

    method: Method | None
    settings: Mapping[str, Any]


@METHODS.register("rum")
@dataclass(frozen=True, kw_only=True)
class RUM(AppliedMethod):
    """Cut the forget set into parts from easy to hard, and unlearn them in sequence, each by its own method.

    Args:
        parts: Number of parts, of nearly equal size, at least 1.
        methods: A method for each part from the easiest to the hardest, or one for all of them. Each is NAME or
            NAME:KEY=VALUE,KEY=VALUE with parameters of the method, epochs and lr; "keep" leaves a part alone.
        difficulty: What a sample is hard by, asked of the original network: its loss, its largest probability
            (confidence; low is hard), or the entropy of its prediction.
        part_scores: File of memorisation scores, FILE[:KEY] (.npz, .csv, .parquet), in place of `difficulty`.
        part_order: Which part comes first.
        later_parts: Whether parts whose turn has not come yet are set aside, or count as samples to retain.
    """

    source: ClassVar[str] = "Zhao et al., NeurIPS 2024 (arXiv 2406.01257); proxies: Zhao et al. 2024 (arXiv 2410.16516)"
    formula: ClassVar[str] = "F = F₁ ∪ … ∪ F_K by difficulty;  wₖ = Uₖ(wₖ₋₁, forget Fₖ, retain R)"

    tunable: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (0.001, 0.003, 0.01, 0.03, 0.1), "epochs": (1, 2, 3, 4, 5)}

    parts: int = 3
    methods: tuple[str, ...] = ("neggrad",)
    difficulty: Literal["loss", "confidence", "entropy"] = "loss"
    part_scores: str | None = None
    part_order: Literal["easiest_first", "hardest_first"] = "easiest_first"
    later_parts: Literal["set_aside", "retain"] = "set_aside"

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise UserError(f"parts must be at least 1, got {self.parts}")
        if len(self.methods) not in (1, self.parts):
            raise UserError(f"methods must name one method, or one for each of {self.parts} parts, got {self.methods}")
        for name, known in (("difficulty", Difficulty), ("part_order", Order), ("later_parts", Later)):
            if getattr(self, name) not in get_args(known):
                raise unknown(name, getattr(self, name), get_args(known))
        if all(step.method is None for step in self.steps):
            raise UserError("methods keep every part, so nothing would be forgotten; give one of them a method")

    @property
    def steps(self) -> list[Step]:
        """What is done to each part, from the easiest to the hardest."""
        found = [_parsed(text) for text in self.methods]
        return found * self.parts if len(found) == 1 else found

    def check(self, rule: Rule) -> None:
        name = RULES.name_of(type(rule))
        for step in self.steps:
            if step.method is not None:
                admitted, why = step.method.admits(name)
                if not admitted:
                    raise UserError(f"rum: {METHODS.name_of(type(step.method))} does not take rule {name}: {why}")
                step.method.check(rule)

    def apply(self, problem: Problem) -> tuple[nn.Module, Record]:
        from unsharp.training import Record

        if problem.unlearn is None:
            raise UserError("rum runs other methods, and nobody here can; call unsharp.unlearn")
        if len(problem.forget) < self.parts:
            raise UserError(f"parts is {self.parts}, but only {len(problem.forget)} samples are to be forgotten")
        started = time.monotonic()
        parts = self._kept_parts(problem)
        scoring = time.monotonic() - started
        total = Record(history=[], seconds=scoring, passes=self._scoring_passes(problem), peak_memory_bytes=None)
        network = problem.model
        order = range(self.parts) if self.part_order == "easiest_first" else range(self.parts - 1, -1, -1)
        for place, i in enumerate(order):
            step = self.steps[i]
            if step.method is None:
                continue
            retain = problem.retain
            if self.later_parts == "retain":
                retain = np.sort(np.concatenate([retain, *(parts[j] for j in order[place + 1 :])]))
            network, record = problem.unlearn(
                network, step.method, parts[i], retain, stage=f"part-{i + 1}", settings=step.settings
            )
            total = _joined(total, record, i + 1)
        return network, total

    def _kept_parts(self, problem: Problem) -> list[np.ndarray]:
        """The parts, from the easiest to the hardest, found again after a kill."""
        if problem.workspace is None:
            return self._made_parts(problem)
        path = problem.workspace.file(PARTS_FILE)
        if path.exists():
            return [np.array(part, np.int64) for part in config.read_json(path)["parts"]]
        parts = self._made_parts(problem)
        if runtime.world()[0] == 0:
            about = {"difficulty": self.part_scores or self.difficulty, "parts": [part.tolist() for part in parts]}
            problem.workspace.write_json(PARTS_FILE, about)
        return parts

    def _made_parts(self, problem: Problem) -> list[np.ndarray]:
        if self.parts == 1:
            return [problem.forget]
        hardness = self._hardness(problem)
        by_id = np.argsort(problem.samples.ids[problem.forget], kind="stable")
        order = by_id[np.argsort(hardness[by_id], kind="stable")]
        return [np.sort(problem.forget[part]) for part in np.array_split(order, self.parts)]

    def _hardness(self, problem: Problem) -> np.ndarray:
        """(k,) float64 for the forget samples, higher is harder."""
        if self.part_scores is not None:
            from unsharp.difficulty.scores import load_scores

            return load_scores(self.part_scores, problem.samples)[problem.forget]
        from unsharp.evaluation.predictions import predict

        found = predict(problem.model, problem.samples, problem.forget, problem.batch_size)
        return hardness(found.logits, found.labels, self.difficulty)

    def _scoring_passes(self, problem: Problem) -> int:
        if self.parts == 1 or self.part_scores is not None:
            return 0
        return round(math.ceil(len(problem.forget) / problem.batch_size) / 3)  # forward alone is a third of a pass


def hardness(logits: np.ndarray, labels: np.ndarray, difficulty: Difficulty) -> np.ndarray:
    """How hard samples are for a network.

    Args:
        logits: (n, K).
        labels: (n,) int64.
        difficulty: "loss": the cross-entropy in nats; "confidence": minus the largest probability; "entropy": the
            entropy of the prediction in nats.

    Returns:
        (n,) float64, higher is harder.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    if difficulty == "loss":
        return -log_p[np.arange(len(labels)), labels]
    if difficulty == "confidence":
        return -np.exp(log_p.max(axis=1))
    return -(np.exp(log_p) * log_p).sum(axis=1)


def _parsed(text: str) -> Step:
    """`NAME` or `NAME:KEY=VALUE,KEY=VALUE` as a method and settings of the loop. Raises: UserError for other text."""
    name, _, rest = text.partition(":")
    if name == KEEP:
        if rest:
            raise UserError(f"methods: {KEEP!r} leaves a part alone and takes no parameter, got {text!r}")
        return Step(None, {})
    if name in ("rum", "retrain"):
        raise UserError(f"methods: {name!r} cannot work on a part of the forget set; name another method")
    method = METHODS[name]
    values: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"methods must be NAME or NAME:KEY=VALUE,KEY=VALUE, got {text!r}")
        values[key.strip().replace("-", "_")] = _value(value)
    settings = {key: _loop_setting(key, values.pop(key)) for key in LOOP_SETTINGS if key in values}
    return Step(config.from_dict(Method, {"name": METHODS.name_of(method), **values}, f"methods {name}"), settings)


def _loop_setting(key: str, value: Any) -> Any:
    kind = LOOP_SETTINGS[key]
    good = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not (good and math.isfinite(value) and (value > 0 if key == "lr" else value >= 1)):
        raise UserError(
            f"methods: {key} must be a number {'above 0' if key == 'lr' else 'of at least 1'}, got {value!r}"
        )
    return kind(value)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _joined(total: Record, part: Record, number: int) -> Record:
    """The record of the parts so far and of one more: times and passes add up, epochs go on counting, warnings stay."""
    from unsharp.training import Record

    before: dict[str, float] = {
        "epoch": max((row["epoch"] for row in total.history), default=0),
        "seconds": total.seconds,
        "passes": total.passes,
    }
    rows: list[dict[str, float]] = [
        {"part": number} | {name: value + before.get(name, 0) for name, value in row.items()} for row in part.history
    ]
    said = [f"part-{number}: {line}" for line in part.about.get("warnings", [])]
    warnings = [*total.about.get("warnings", []), *said]
    peaks = [r.peak_memory_bytes for r in (total, part) if r.peak_memory_bytes is not None]
    return Record(
        history=[*total.history, *rows],
        seconds=total.seconds + part.seconds,
        passes=total.passes + part.passes,
        peak_memory_bytes=max(peaks, default=None),
        about={"warnings": warnings} if warnings else {},
    )
