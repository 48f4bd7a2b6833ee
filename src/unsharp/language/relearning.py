"""Relearning of texts: how fast a language model that forgot gets them back, beside one that never had them."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from unsharp.data.samples import Batch
from unsharp.data.streams import Stream
from unsharp.engine import Loop, LoopConfig, OptimizerConfig, Schedule
from unsharp.errors import NonFiniteError, UserError, unknown
from unsharp.evaluation.relearning import l2_apart
from unsharp.language import evaluation
from unsharp.language.config import LoRA
from unsharp.language.likelihood import answer_losses
from unsharp.language.models import with_adapters
from unsharp.language.objectives.base import SampleLosses
from unsharp.language.samples import TextSamples
from unsharp.phases import RETAIN, Phase
from unsharp.progress import SILENT, Progress
from unsharp.training import run_loop

On = Literal["forget", "retain", "other"]
Answers = Callable[[nn.Module, np.ndarray], "Mapping[str, float]"]
"""(model, positions) → figures of what a model says by itself of the texts there."""
Row = dict[str, float]
MOST_WATCHED = 100
POINTS = 10
"""Points of a curve, at least, where only its steps are given."""


@dataclass(frozen=True, kw_only=True)
class RelearnConfig(LoopConfig):
    """An attack on a language model.

    Args:
        on: What a copy is fine-tuned on: "forget" (some of the forgotten texts; the others are judged), "retain"
            (retained texts alone), or "other" (unrelated texts).
        n: How many of them, drawn with the seed, at least 1.
        steps: Steps in all, at least 1, in place of `epochs`.
        look_every: Steps between two points of the curve, a divisor of all steps. None takes an epoch, or where `steps`
            is given the longest way that leaves ten points.
        micro_batch: Texts that go forward and backward at a time; their gradients add up to that of the batch. None
            takes the batch at once.
        lora: Fresh adapters to train in place of the weights; None trains the weights.
    """

    on: On = "forget"
    n: int = 20
    steps: int | None = None
    look_every: int | None = None
    micro_batch: int | None = None
    lora: LoRA | None = None
    epochs: int = 5
    batch_size: int = 4
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(name="adamw", lr=1e-5, weight_decay=0.0))
    schedule: Schedule = "constant"
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on not in get_args(On):
            raise unknown("on", self.on, get_args(On))
        for name in ("n", "steps", "look_every", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")

    @property
    def per_epoch(self) -> int:
        """Steps in which each text comes once."""
        return math.ceil(self.n / self.batch_size)

    @property
    def total(self) -> int:
        """Steps of the attack."""
        return self.steps if self.steps is not None else self.epochs * self.per_epoch

    @property
    def stride(self) -> int:
        """Steps between two points of the curve."""
        if self.look_every is not None:
            return self.look_every
        if self.steps is None:
            return self.per_epoch
        return max(k for k in range(1, max(1, self.steps // POINTS) + 1) if self.steps % k == 0)

    @property
    def points(self) -> int:
        """Points of the curve after the first."""
        return self.total // self.stride


@dataclass(frozen=True, eq=False)
class Attack:
    """Which texts a copy is fine-tuned on, and which are judged; the same for every model that is compared.

    Args:
        config: The attack.
        samples: All texts, in the tokens of the models.
        pools: Positions (k,) int64 in them, by what they are: "forget", and any of "retain", "other", and "judge"
            (texts that are judged in place of the forgotten ones that are left).
        watched: Retained texts, at most, that are looked at, and judged ones that are answered; evenly spread.
        answers: What is looked at of whole answers, before the attack and at its end; None looks at none.
        batch_size: Texts of a pass without a gradient.

    Raises:
        UserError: if `watched` is below 1, there are fewer texts than the attack takes, none would be left to judge, or
            the points do not divide the steps.
    """

    config: RelearnConfig
    samples: TextSamples
    pools: Mapping[str, np.ndarray]
    watched: int = MOST_WATCHED
    answers: Answers | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        on, n = self.config.on, self.config.n
        if self.watched < 1:
            raise UserError(f"watched must be at least 1, got {self.watched}")
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}")
        for needed in ("forget", on):
            if len(self.pools.get(needed, ())) == 0:
                raise UserError(f"there are no {needed} texts; the attack on {on} needs them")
        if n > len(self.pools[on]):
            raise UserError(f"n is {n}, and there are {len(self.pools[on])} {on} texts; take fewer")
        if self.config.total % self.config.stride:
            raise UserError(
                f"look_every is {self.config.look_every}, and an attack on {n} {on} texts has {self.config.total} "
                "steps; take a number that divides them, so that the curve ends where the attack does"
            )
        if len(self.judged) == 0:
            raise UserError(
                f"n is {n}, and there are {n} forget texts: fine-tune on fewer, so that some are left to judge, or "
                "give others that are judged"
            )

    @property
    def tuned_on(self) -> np.ndarray:
        """(n,) int64, positions of the texts that the copy is fine-tuned on, ascending."""
        rng = np.random.default_rng(self.config.seed)
        return np.sort(rng.choice(self.pools[self.config.on], self.config.n, replace=False))

    @property
    def judged(self) -> np.ndarray:
        """Positions of the texts by which the forgetting is judged; the copy is fine-tuned on none of them."""
        if len(self.pools.get("judge", ())):
            return self.pools["judge"]
        forget = self.pools["forget"]
        return np.setdiff1d(forget, self.tuned_on) if self.config.on == "forget" else np.sort(forget)

    @property
    def looks(self) -> dict[str, np.ndarray]:
        """Positions of the texts that are looked at, at each point of the curve."""
        retained = np.setdiff1d(self.pools.get("retain", np.array([], np.int64)), self.tuned_on)
        found = {"forget": self.judged, "tuned": self.tuned_on, "retain": self._spread(retained)}
        return {name: at for name, at in found.items() if len(at)}

    @property
    def answered(self) -> np.ndarray:
        """Positions of the judged texts of which whole answers are looked at."""
        return self._spread(self.judged) if self.answers is not None else self.judged[:0]

    @property
    def passes(self) -> int:
        """Forward–backward passes of the attack on one model."""
        return self.config.total

    @property
    def trained(self) -> int:
        """Texts that go through these passes, about."""
        return round(self.config.total * self.config.n / self.config.per_epoch)

    @property
    def looked(self) -> int:
        """Texts that go forward besides, before the attack and at each point."""
        return (self.config.points + 1) * sum(map(len, self.looks.values()))

    def run(self, model: nn.Module, *, original: nn.Module | None = None, progress: Progress = SILENT) -> list[Row]:
        """Attack one model; it is left as it is.

        Args:
            model: A causal model of transformers, on the device where the work shall happen; all of its weights are
                fine-tuned, or fresh adapters on it.
            original: The model before it forgot, to say how far the copy comes back to its weights.
            progress: Told of each batch.

        Returns:
            A row for each point, the first of them before the attack: step, epoch, passes; of the judged ("forget_"),
            the fine-tuned ("tuned_") and the watched retained texts ("retain_") probability, loss (mean over texts of
            the mean loss of an answer's tokens), exact_memorization and extraction_strength; in the first and the last
            row what `answers` gives, as "forget_"; where weights are trained, distance (from the start) and to_original
            (from the original, in units of the distance at the start).

        Raises:
            NonFiniteError: if a step or a figure of a row is not finite.
        """
        network = copy.deepcopy(model)
        way = None if self.config.lora is not None else _Way(network, original)
        if self.config.lora is not None:
            network = with_adapters(network, self.config.lora, self.config.seed)
        how = dataclasses.replace(self.config, steps=None, look_every=None, epochs=self.config.points)
        stream = _Rounds(
            self.samples, self.tuned_on, how.batch_size, how.seed, last_batch=how.last_batch, steps=self.config.stride
        )
        losses = {RETAIN: (1.0, lambda model, batch: answer_losses(model, batch, "mean"))}
        objective = SampleLosses(losses=losses, micro_batch=how.micro_batch)
        loop = Loop(network, [Phase(objective=objective)], {RETAIN: stream}, how, widen=True)
        rows = [self._row(network, way, whole=True)]
        run_loop(
            loop,
            workspace=None,
            save_seconds=math.inf,
            on_epoch=lambda: rows.append(self._row(network, way, whole=len(rows) == how.epochs)) or {},
            progress=progress,
            label="relearning",
        )
        each = [i * self.config.stride for i in range(len(rows))]
        return [
            {"step": float(k), "epoch": k / self.config.per_epoch, "passes": float(k)} | row
            for k, row in zip(each, rows)
        ]

    def _row(self, network: nn.Module, way: _Way | None, *, whole: bool) -> Row:
        looks = self.looks
        order = np.concatenate(list(looks.values()))
        scores = evaluation.score(network, self.samples.subset(order), batch_size=self.batch_size)
        found: Row = {}
        for name, at in looks.items():
            mine, scores = scores[: len(at)], scores[len(at) :]
            found |= {f"{name}_{what}": value for what, value in figures(mine).items()}
        if whole and self.answers is not None and len(self.answered):
            found |= {f"forget_{what}": value for what, value in self.answers(network, self.answered).items()}
        found |= {} if way is None else way.gone(network)
        for name, value in found.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"{name} is {value} in a curve of relearning; the weights of the model are broken")
        return found

    def _spread(self, positions: np.ndarray) -> np.ndarray:
        return positions[:: max(1, math.ceil(len(positions) / self.watched))]


def figures(scores: Sequence[evaluation.TokenScores]) -> Row:
    """What one pass tells of some texts, each the mean over the texts."""
    return {
        "probability": float(np.mean([evaluation.probability(s) for s in scores])),
        "loss": float(np.mean([-s.log_p.mean() for s in scores])),
        "exact_memorization": float(np.mean([evaluation.exact_memorization(s) for s in scores])),
        "extraction_strength": float(np.mean([evaluation.extraction_strength(s) for s in scores])),
    }


def relearn(
    models: Mapping[str, nn.Module],
    attack: Attack,
    *,
    original: nn.Module | None = None,
    seeds: Sequence[int] = (0,),
    progress: Progress = SILENT,
) -> list[dict[str, float | str]]:
    """Attack several language models alike, with each seed.

    Args:
        models: By name; a retrained one among them, to compare with.
        attack: The attack; its seed is replaced by each of `seeds`.
        original: As for `Attack.run`.
        seeds: Seeds of the attack: of which texts are drawn, and of their order.
        progress: Told of each batch.

    Returns:
        The rows of `Attack.run`, with "model" and "seed".
    """
    rows: list[dict[str, float | str]] = []
    for seed in seeds:
        this = dataclasses.replace(attack, config=dataclasses.replace(attack.config, seed=seed))
        for name, model in models.items():
            found = this.run(model, original=original, progress=progress)
            rows += [{"model": name, "seed": float(seed), **row} for row in found]
    return rows


class _Way:
    """How far a model has gone from where it was, and from its original."""

    def __init__(self, network: nn.Module, original: nn.Module | None) -> None:
        self._start = [p.detach().clone() for p in network.parameters()]
        self._goal: list[Tensor] | None = None if original is None else [p.detach() for p in original.parameters()]
        if self._goal is not None and [p.shape for p in self._goal] != [p.shape for p in self._start]:
            raise UserError("the original has other weights than the model; give the model from before the unlearning")
        self._apart = None if self._goal is None else l2_apart(self._start, self._goal)

    def gone(self, network: nn.Module) -> Row:
        now = [p.detach() for p in network.parameters()]
        found = {"distance": l2_apart(now, self._start)}
        if self._goal is not None and self._apart:
            found["to_original"] = l2_apart(now, self._goal) / self._apart
        return found


@dataclass(frozen=True, eq=False)
class _Rounds(Stream):
    """A stream of which an epoch of the loop is so many steps; the order is drawn anew after each run through all."""

    steps: int = 1

    @property
    def n_batches(self) -> int:
        return self.steps

    @property
    def sizes(self) -> np.ndarray:  # type: ignore[override]
        return self._whole.sizes

    @property
    def _whole(self) -> Stream:
        """The texts as a stream of which an epoch runs through all."""
        return Stream(self.samples, self.indices, self.batch_size, self.seed, last_batch=self.last_batch)

    def epoch(self, epoch: int, start: int = 0, n_batches: int | None = None) -> Iterator[Batch]:
        whole = self._whole
        end = self.steps if n_batches is None else n_batches
        for step in range(epoch * self.steps + start, epoch * self.steps + end):
            through, at = divmod(step, whole.n_batches)
            yield from whole.epoch(through, at, at + 1)


def prepared(model: nn.Module) -> nn.Module:
    """A model as an attacker has it: adapters merged into the weights, all of which are trainable."""
    whole: Any = model
    if hasattr(model, "merge_and_unload"):
        whole = whole.merge_and_unload()
    for p in whole.parameters():
        p.requires_grad_(bool(torch.is_floating_point(p)))
    return whole


__all__ = ["Answers", "Attack", "RelearnConfig", "figures", "prepared", "relearn"]
