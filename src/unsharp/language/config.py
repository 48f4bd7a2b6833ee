"""How a language model is made to forget."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from unsharp import config as configuration
from unsharp import masks
from unsharp.engine import LoopConfig, OptimizerConfig, Schedule
from unsharp.errors import UserError, unknown
from unsharp.language.objectives.base import OBJECTIVES, LanguageObjective
from unsharp.sharpness.base import NO_RULE, RULES, Rule


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Adapters of low rank, which are trained and perturbed in place of the model's own weights.

    Args:
        rank: Rank of each adapter, at least 1.
        scale: An adapter's output is multiplied by scale/rank ("lora_alpha" in peft), above 0.
        dropout: Dropout before each adapter, in [0, 1).
        targets: Names of the layers that get one, as peft takes them; None takes all linear layers but the last.
    """

    rank: int = 8
    scale: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"the rank of LoRA must be at least 1, got {self.rank}")
        if not self.scale > 0:
            raise UserError(f"the scale of LoRA must be above 0, got {self.scale}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"the dropout of LoRA must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(LoopConfig):
    """How a language model is made to forget.

    Args:
        objective: What it is to lose and keep, with its parameters.
        rule: The sharpness rule.
        sharpness: Whose gradient the rule takes: that of the "forget" loss, beside the plain one of the retain loss;
            that of "each" of them for itself; or that of their "sum".
        leading: The texts through which an epoch runs once; the others cycle beside them, or are drawn anew in each.
        micro_batch: Texts that go forward and backward at a time; their gradients add up to that of the batch before
            the rule looks at it. None takes the batch at once.
        mask_fraction: Share of the trainable weights, in (0, 1], that may move: those with the largest saliency on
            the forgotten answers. None lets all move.
        mask_select: Which weights those are: a selection (`unsharp list selections`).
        mask_per_layer: Take the share within each tensor rather than over all.
        mask_n_probes: Random vectors for selections by the diagonal of a matrix (hessian, ggn), at least 1.
        mask_score_on: Texts that the selection looks at: "forget", or "training", the forgotten and the retained; None
            takes the selection's own.
        mask_score_samples: Most texts that selections by curvature (hessian, ggn, fisher) look at, at least 1.
        lora: Adapters to train in place of the weights; None trains the weights.
    """

    objective: LanguageObjective
    rule: Rule = NO_RULE
    sharpness: Literal["forget", "each", "sum"] = "forget"
    leading: Literal["forget", "retain"] = "forget"
    micro_batch: int | None = None
    mask_fraction: float | None = None
    mask_select: str = "largest"
    mask_per_layer: bool = False
    mask_n_probes: int = 30
    mask_score_on: masks.On | None = None
    mask_score_samples: int = 1000
    lora: LoRA | None = None
    epochs: int = 5
    batch_size: int = 32
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(name="adamw", lr=1e-5, weight_decay=0.01)
    )
    schedule: Schedule = "linear"
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sharpness", "leading"):
            known = get_args(get_type_hints(LanguageConfig)[name])
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        if self.micro_batch is not None and self.micro_batch < 1:
            raise UserError(f"micro_batch must be at least 1, got {self.micro_batch}")
        if self.mask_fraction is not None:
            self.mask_choice()
        if self.objective.gamma == 0 and self.leading == "retain":
            raise UserError("gamma is 0, so that no retained text is read; take leading forget")

    def mask_choice(self) -> masks.Choice:
        """Which weights the fields of the mask ask for. Raises: UserError for a value out of range."""
        assert self.mask_fraction is not None
        return masks.Choice(
            fraction=self.mask_fraction,
            select=self.mask_select,
            per_layer=self.mask_per_layer,
            n_probes=self.mask_n_probes,
            score_on=self.mask_score_on,
            score_samples=self.mask_score_samples,
            seed=self.seed,
        )


def configure(objective: str, *, rule: str = "none", lora: LoRA | None = None, **settings: Any) -> LanguageConfig:
    """Build the configuration from loose settings, each given to whom it belongs.

    Args:
        objective: Name of the objective.
        rule: Name of the rule.
        lora: Adapters to train in place of the weights.
        **settings: Parameters of the objective (`beta`), of the rule (`rho`), of the loop (`epochs`, `micro_batch`,
            ...) or of the optimiser (`lr`, `optimizer` by name). None means not given.

    Raises:
        UserError: for an unknown name, a setting that nobody takes, or a value out of range.
    """
    owners = {
        "objective": {f.name: f.name for f in dataclasses.fields(OBJECTIVES[objective])},
        "rule": {f.name: f.name for f in dataclasses.fields(RULES[rule])},
        "loop": {f.name: f.name for f in dataclasses.fields(LanguageConfig)},
        "optimizer": {"optimizer" if f.name == "name" else f.name: f.name for f in dataclasses.fields(OptimizerConfig)},
    }
    for name in ("objective", "rule", "optimizer", "lora"):
        del owners["loop"][name]
    parts: dict[str, dict[str, Any]] = {who: {} for who in owners}
    for name, value in settings.items():
        if value is None:
            continue
        owner = next((who for who, taken in owners.items() if name in taken), None)
        if owner is None:
            known = {name for taken in owners.values() for name in taken}
            raise unknown(f"setting for {objective} under rule {rule}", name, known)
        parts[owner][owners[owner][name]] = value
    default = LanguageConfig.__dataclass_fields__["optimizer"].default_factory()  # pyright: ignore
    return configuration.from_dict(
        LanguageConfig,
        {
            **parts["loop"],
            "objective": {"name": objective, **parts["objective"]},
            "rule": {"name": rule, **parts["rule"]},
            "optimizer": configuration.to_dict(default) | parts["optimizer"],
            "lora": lora,
        },
        "language",
    )
