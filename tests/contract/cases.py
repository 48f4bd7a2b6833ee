"""What the contracts are tried on: every method under every rule, small networks, few samples, two optimisers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unsharp import runtime
from unsharp.data.augment import Augmentation
from unsharp.data.samples import Batch, ImageSamples, Samples, TensorSamples
from unsharp.data.streams import Stream
from unsharp.engine import Loop, LoopConfig
from unsharp.methods import METHODS, Method, PhasedMethod, Problem
from unsharp.phases import FORGET, RETAIN, Moment, Objective, Phase
from unsharp.sharpness import RULES, Rule

SIDE, N_CLASSES = 5, 3
FORGOTTEN = np.arange(0, 40, 4)  # 10 samples: two batches, which cycle beside retain's
RETAINED = np.setdiff1d(np.arange(40), FORGOTTEN)  # 30 samples: four batches of 7 and 8
BATCH_SIZE = 8


# --- methods and rules -----------------------------------------------------------------------------------------------


def _pairs(wanted: Callable[[type[Method], str], bool]) -> list[Any]:
    """(method, rule) names; outside every method × {none, sam, asam} and every rule × two methods they are slow."""
    return [
        pytest.param(
            method,
            rule,
            id=f"{method}-{rule}",
            marks=()
            if rule in ("none", "sam", "asam") or method in ("neggrad", "sharp_minmax")
            else (pytest.mark.slow,),
        )
        for method, rule in itertools.product(METHODS, RULES)
        if wanted(METHODS[method], rule)
    ]


ADMITTED = _pairs(lambda method, rule: method.admits(rule)[0])
REFUSED = _pairs(lambda method, rule: not method.admits(rule)[0])
PHASED = _pairs(lambda method, rule: method.admits(rule)[0] and issubclass(method, PhasedMethod))


def variants(rule: str, **axes: Iterable[Any]) -> list[Rule]:
    """The rule by default and with every combination of the given values, of those fields that it has."""
    cls = RULES[rule]
    fields = {f.name for f in dataclasses.fields(cls)}
    used = {name: values for name, values in axes.items() if name in fields}
    return [cls(**dict(zip(used, values))) for values in itertools.product(*used.values())]


def opposites(rule: str) -> list[Rule]:
    """The rule by default, and a form that differs from it in every way that a mask or a phase may feel."""
    other = variants(rule, sign=["max"], lam=[0.4], perturb=["all"])
    return [RULES[rule](), *(form for form in other if form != RULES[rule]())]


def rule_id(rule: Rule) -> str:
    changed = [
        f"{f.name}={getattr(rule, f.name)}"
        for f in dataclasses.fields(rule)
        if getattr(rule, f.name) != getattr(type(rule)(), f.name)
    ]
    return "-".join([RULES.name_of(type(rule)), *changed])


# --- networks and samples --------------------------------------------------------------------------------------------


class Convolutional(nn.Module):
    """BatchNorm, dropout, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(4 * (SIDE - 2) ** 2, N_CLASSES)
        self.head.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.linspace(-1, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.relu(self.norm(self.conv(x)))).flatten(1))


class Tied(nn.Module):
    """One weight in two modules, dropout, a frozen layer, an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(SIDE**2, 8).requires_grad_(False)
        self.inner = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8, bias=False)
        self.again.weight = self.inner.weight
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, N_CLASSES)
        self.unused = nn.Parameter(torch.linspace(-1, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(torch.tanh(self.frozen(x.flatten(1)))))
        return self.head(self.dropout(torch.tanh(self.again(h))))


class Smooth(nn.Sequential):
    """Nothing random, nothing that batches share; with `matrices_only`, nothing but matrices to train."""

    def __init__(self, *, matrices_only: bool = False) -> None:
        bias = not matrices_only
        super().__init__(nn.Flatten(), nn.Linear(SIDE**2, 8, bias=bias), nn.Tanh(), nn.Linear(8, N_CLASSES, bias=bias))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"convolutional": Convolutional, "tied": Tied}


def network(name: str = "convolutional", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    make = {**NETWORKS, "smooth": Smooth, "matrices": lambda: Smooth(matrices_only=True)}[name]
    return make().to(dtype)


def images() -> ImageSamples:
    """40 random images that are cropped and flipped."""
    random = np.random.default_rng(7)
    pixels = random.integers(0, 256, (40, SIDE, SIDE, 1), dtype=np.uint8)
    labels = np.concatenate([np.arange(N_CLASSES), random.integers(0, N_CLASSES, 40 - N_CLASSES)])
    return ImageSamples(pixels, labels, augmentation=Augmentation(crop=True, flip=True))


def doubles(*, dtype: torch.dtype = torch.float64) -> TensorSamples:
    """The same images, neither cropped nor flipped, in double precision."""
    samples = images()
    order = np.arange(40)
    (batch,) = samples.batches(order, [40], draws=None)
    return TensorSamples(batch.inputs.to(dtype), samples.labels)


def random_region(model: nn.Module, *, seed: int = 3, fraction: float = 0.6) -> dict[str, Tensor]:
    """A random part of the weights; where there are so many, of the third tensor nothing and of the fourth all."""
    generator = torch.Generator().manual_seed(seed)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    region = {n: torch.rand(p.shape, generator=generator) < fraction for n, p in named}
    if len(named) > 3:
        region[named[2][0]].zero_()
        region[named[3][0]].fill_(True)
    return region


# --- optimisers ------------------------------------------------------------------------------------------------------


def groups(named: list[tuple[str, nn.Parameter]], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels with weight decay; the rest without it, at half the rate."""
    large, small = [p for _, p in named if p.dim() > 1], [p for _, p in named if p.dim() <= 1]
    return [
        {"params": large, "lr": lr, "weight_decay": weight_decay},
        {"params": small, "lr": lr / 2, "weight_decay": 0.0},
    ]


def sgd(named: list[tuple[str, nn.Parameter]], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups(named, 0.05, 0.1), momentum=0.9, **options)


def adamw(named: list[tuple[str, nn.Parameter]], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(named, 0.01, 0.1), **options)


BASES = {"sgd": sgd, "adamw": adamw}


# --- runs ------------------------------------------------------------------------------------------------------------

STRONG: dict[str, dict[str, Any]] = {
    "neggrad": {"alpha": 0.6},
    "sharp_minmax": {"alpha": 0.6},
    "saul": {"forget_level": 1.2, "multiplier_rate": 0.7},
    "scrub": {"msteps": 1},
    "boundary_shrink": {"alpha": 0.5},
    "l1_sparse": {"l1_gamma": 0.02},
    "sfron": {"forget_weight": 2.0},
    "ssd": {"selection_weight": 1.2},
    "influence": {"fisher_samples": 8},
    "second_order": {"hessian_samples": 8},
}
"""Parameters with which every part of a method has a say on so few samples; the others have it by default."""


def method_of(name: str, **settings: Any) -> Method:
    return METHODS[name](**(STRONG.get(name, {}) | settings))


def phases_of(
    method: str | Method,
    rule: Rule,
    model: nn.Module,
    samples: Samples,
    *,
    seed: int = 0,
    forget: np.ndarray = FORGOTTEN,
    retain: np.ndarray = RETAINED,
) -> list[Phase]:
    """The phases of a method that have something to do."""
    chosen = method_of(method) if isinstance(method, str) else method
    assert isinstance(chosen, PhasedMethod)
    problem = Problem(model=model, samples=samples, forget=forget, retain=retain, rule=rule, seed=seed)
    return [phase for phase in chosen.phases(problem) if phase.objective.streams]


def within(phases: Iterable[Phase], region: Mapping[str, Tensor]) -> list[Phase]:
    """The phases, each kept to that part of its region which lies in `region`."""
    return [
        dataclasses.replace(p, region={n: m & p.region[n] if p.region is not None else m for n, m in region.items()})
        for p in phases
    ]


def streams(samples: Samples, *, seed: int = 0, rank: int = 0, world: int = 1) -> dict[str, Stream]:
    return {
        name: Stream(samples, indices, BATCH_SIZE, seed, rank, world)
        for name, indices in ((RETAIN, RETAINED), (FORGET, FORGOTTEN))
    }


def make_loop(
    model: nn.Module,
    method: str | Method,
    rule: Rule,
    samples: Samples,
    base: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer] = sgd,
    *,
    region: Mapping[str, Tensor] | None = None,
    change: Callable[[list[Phase]], list[Phase]] | None = None,
    phase_steps: str = "together",
    epochs: int = 2,
    seed: int = 0,
    **config: Any,
) -> Loop:
    """A loop, with torch's generator seeded as the program seeds it.

    Args:
        region: What the phases are kept to, beside their own regions.
        phase_steps: As in `UnlearnConfig`.
        change: Makes other phases of the method's.
    """
    method = method_of(method) if isinstance(method, str) else method
    assert isinstance(method, PhasedMethod)
    phases = phases_of(method, rule, model, samples, seed=seed)
    if region is not None:
        phases = within(phases, region)
    loop = Loop(
        model,
        phases if change is None else change(phases),
        streams(samples, seed=seed),
        LoopConfig(epochs=epochs, batch_size=BATCH_SIZE, seed=seed, **config),
        make_optimizer=base,
        separate_states=method.separate_states or phase_steps == "separate",
        alternate=phase_steps == "alternate",
    )
    runtime.seed_all(seed)
    return loop


def ends_elsewhere(rule: Rule) -> bool:
    """Whether a run under the rule ends with other weights than those of its last step."""
    return type(rule).final_weights is not Rule.final_weights


# --- comparison ------------------------------------------------------------------------------------------------------


def snapshot(loop: Loop) -> dict[str, Any]:
    """Weights, buffers, the state of every optimiser, and the memories of rules and scales, as bytes."""
    everything: dict[str, Any] = dict(loop.model.state_dict())
    for k, optimizer in enumerate(loop.optimizers):
        for i, entries in optimizer.state_dict()["state"].items():
            everything |= {f"optimizer {k}/{i}/{key}": value for key, value in entries.items()}
    for i, memory in enumerate(loop.state_dict()["memories"]):
        for key, value in memory.items():
            values = dict(enumerate(value)) if isinstance(value, (list, tuple)) else {"": value}
            everything |= {f"memory {i}/{key}/{j}": v for j, v in values.items()}
    return {name: as_bytes(value) for name, value in everything.items()}


def as_bytes(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.dtype, tuple(value.shape), value.detach().cpu().contiguous().numpy().tobytes()


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Names of the entries in which two snapshots differ."""
    return sorted(name for name in a.keys() | b.keys() if a.get(name, "missing") != b.get(name, "missing"))


class Counted:
    """Counts what a model really does: batches that went forward, and passes backward through them.

    A loss that is differentiated twice goes backward through its batch twice; a piece of a batch is a part of a pass.
    """

    def __init__(self, model: nn.Module, *, pieces: int = 1) -> None:
        self.sizes: list[int] = []
        self._backwards, self._pieces = 0, pieces
        self._handle = model.register_forward_hook(self._forward)

    def _forward(self, _: nn.Module, args: Any, output: Tensor) -> None:
        self.sizes.append(len(args[0]))
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, _: Tensor) -> None:
        self._backwards += 1

    @property
    def backwards(self) -> float:
        return self._backwards / self._pieces


class Summed(Objective):
    """Another objective with something added to its value, evaluation by evaluation."""

    def __init__(self, inner: Objective, added: Callable[[nn.Module], Tensor | float]) -> None:
        self.inner, self.added = inner, added

    @property
    def streams(self) -> tuple[str, ...]:
        return self.inner.streams

    def terms(self, model: nn.Module, batches: Mapping[str, Batch], at: Moment) -> Iterator[tuple[str, Tensor]]:
        *first, (name, last) = list(self.inner.terms(model, batches, at))
        yield from first
        yield name, last + self.added(model)


def before_each_step(loop: Loop, note: Callable[[], None]) -> None:
    """Call `note` when gradients are final and weights are back, before the optimisers of this step move them."""
    take = loop._stepper.step

    def step(*args: Any, **kwargs: Any) -> None:
        note()
        take(*args, **kwargs)

    loop._stepper.step = step  # type: ignore[method-assign]


def before_each_update(loop: Loop, note: Callable[[], None]) -> None:
    """Call `note` whenever one of the loop's optimisers is about to step, with the gradients that it is to use."""
    for optimizer in loop.optimizers:
        optimizer.register_step_pre_hook(lambda *_: note())
