"""What a proxy of memorization is, and how one is estimated."""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from unsharp import runtime
from unsharp.artifacts import Workspace
from unsharp.config import digest, to_dict
from unsharp.data.samples import Samples
from unsharp.difficulty.result import Scores
from unsharp.errors import NonFiniteError, UserError, unknown
from unsharp.progress import SILENT, Progress
from unsharp.registry import Registry
from unsharp.training import TrainConfig

if TYPE_CHECKING:
    from unsharp.reference import Recipe

PROXIES: Registry[type[Proxy]] = Registry("proxy", "unsharp.difficulty.proxies")

Needs = Literal["model", "recipe", "either"]
FORWARD = 1 / 3
"""What a pass forward alone costs, in passes forward and backward."""


@dataclass(frozen=True)
class Cost:
    """What a proxy takes.

    Args:
        networks: Networks that are trained.
        passes: Passes forward and backward over all samples, those of training included; one forward alone is a third.
    """

    networks: int
    passes: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a proxy is asked to score.

    Args:
        samples: The training samples, all of which get a score.
        recipe: How networks are trained; None where none is to be.
        model: A trained network; None where networks are trained for the purpose.
        held_out: Samples that the given network has not seen; None where there are none.
        device: Where networks are.
        workspace: Where finished networks' scores and the state of an unfinished one are kept, so that a killed
            estimate goes on; None keeps nothing.
        save_seconds: Seconds between two savings within an epoch.
        batch_size: Samples that are evaluated together.
        progress: Told of each batch.
    """

    samples: Samples
    recipe: Recipe | None = None
    model: nn.Module | None = None
    held_out: Samples | None = None
    device: torch.device
    workspace: Workspace | None = None
    save_seconds: float = 60.0
    batch_size: int = 512
    progress: Progress = SILENT

    @property
    def indices(self) -> np.ndarray:
        """(n,) int64, the positions of all samples."""
        return np.arange(len(self.samples))

    @property
    def train(self) -> TrainConfig:
        """How networks are trained."""
        assert self.recipe is not None  # by estimate()
        return self.recipe.train

    @property
    def seed(self) -> int:
        """Seed of whatever a proxy draws."""
        return 0 if self.recipe is None else self.recipe.train.seed


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """What a proxy found.

    Args:
        raw: (n,) float64, the scores as the proxy defines them.
        standard_error: (n,) float64 of their mean over networks; None where there was one.
        extras: Scores of other kinds that came with them, by kind.
        networks: Networks that were trained.
        passes: Passes forward and backward over batches; forward alone is a third of one.
    """

    raw: np.ndarray
    standard_error: np.ndarray | None = None
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    networks: int = 0
    passes: int = 0


@dataclass(frozen=True, kw_only=True)
class Proxy(ABC):
    """A cheap relative of memorization; its fields are its parameters."""

    registry: ClassVar[Registry[type[Proxy]]] = PROXIES
    title: ClassVar[str]
    """What a sentence calls one score."""
    source: ClassVar[str]
    formula: ClassVar[str]
    higher_is_harder: ClassVar[bool] = True
    unit_scale: ClassVar[bool] = False
    """Whether a score is a probability, so that 0.5 is a middle."""
    needs: ClassVar[Needs]
    """Whether it looks at a given network, trains its own by a recipe, or either."""

    @abstractmethod
    def cost(self, train: TrainConfig | None) -> Cost:
        """What it takes, before any work.

        Args:
            train: How networks are trained; None for the scores of a given network.
        """

    @abstractmethod
    def measure(self, task: Task) -> Measured:
        """Score all samples. Raises: NonFiniteError if a network breaks down."""

    def check(self, task: Task) -> None:
        """Refuse a task that the proxy cannot do. Raises: UserError if it cannot."""
        return


def configure(name: str | Proxy, **options: Any) -> Proxy:
    """The proxy of that name with these parameters.

    Raises:
        UserError: if there is no such proxy, or it does not take a parameter or its value.
    """
    if isinstance(name, Proxy):
        if options:
            raise UserError(f"parameters ({', '.join(options)}) go with the name of a proxy, not with a proxy")
        return name
    cls = PROXIES[name]
    known = [f.name for f in dataclasses.fields(cls)]
    for option in options:
        if option not in known:
            if not known:
                raise UserError(f"proxy {name} takes no parameter, got {option!r}")
            raise unknown(f"parameter of proxy {name}", option, known)
    return cls(**options)


def estimate(
    name: str | Proxy,
    samples: Samples,
    *,
    recipe: Recipe | None = None,
    model: nn.Module | None = None,
    held_out: Samples | None = None,
    device: torch.device | None = None,
    workspace: Workspace | None = None,
    save_seconds: float = 60.0,
    batch_size: int = 512,
    progress: Progress = SILENT,
    **options: Any,
) -> Scores:
    """Score every sample by a proxy of memorization.

    Args:
        name: Name of a proxy, or the proxy itself.
        samples: The training samples.
        recipe: How networks are trained, for proxies that train their own. The first network is the recipe's very own,
            further ones differ in the seed.
        model: A trained network, for proxies that look at one. Those that can do either take one of the two.
        held_out: Samples that the given network has not seen, for the proxy that tunes it on such.
        device: Where networks are; None takes the device of the samples.
        workspace: Where a killed estimate goes on from; None keeps nothing.
        save_seconds: Seconds between two savings within an epoch.
        batch_size: Samples that are evaluated together, at least 1.
        progress: Told of each batch.
        **options: Parameters of the proxy.

    Returns:
        The scores, raw and as difficulties, with a standard error where there were several networks.

    Raises:
        UserError: for a mistake in the arguments, before any work.
        NonFiniteError: if a network breaks down in training, or its outputs are NaN or infinite.
    """
    proxy = configure(name, **options)
    kind = PROXIES.name_of(type(proxy))
    _check_given(proxy, kind, recipe, model)
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    if runtime.world()[1] > 1:
        raise UserError("proxies are estimated in one process; start one, without torchrun")
    task = Task(
        samples=samples,
        recipe=recipe,
        model=model,
        held_out=held_out,
        device=_device(samples, model, device),
        workspace=workspace,
        save_seconds=save_seconds,
        batch_size=batch_size,
        progress=progress,
    )
    proxy.check(task)
    started = time.monotonic()
    found = proxy.measure(task)
    if not np.isfinite(found.raw).all():
        bad = int((~np.isfinite(found.raw)).sum())
        raise NonFiniteError(f"the {proxy.title}s of {bad} samples are NaN or infinite; weights or inputs are broken")
    return Scores(
        kind=kind,
        raw=np.asarray(found.raw, np.float64),
        ids=samples.ids,
        positions=samples.source_positions,
        standard_error=found.standard_error,
        labels=samples.labels,
        extras=found.extras,
        provenance={
            "proxy": to_dict(proxy),
            "source": proxy.source,
            "seed": task.seed,
            "train": None if recipe is None else to_dict(recipe.train),
            "config": digest(proxy, None if recipe is None else recipe.train),
            "data": samples.fingerprint,
            "networks": found.networks,
            "passes": found.passes,
            "seconds": time.monotonic() - started,
            "versions": runtime.versions(),
            "device": runtime.describe(task.device),
            "threads": torch.get_num_threads(),
        },
    )


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The mean of (m, n) values over m networks, and its standard error; None for one network.

    The error is √(s²/m) with the unbiased variance s² over the networks.
    """
    error = None if len(values) < 2 else values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return values.mean(axis=0), error


def check_count(name: str, value: int) -> None:
    """Raises: UserError unless `value` is at least 1."""
    if value < 1:
        raise UserError(f"{name} must be at least 1, got {value}")


def _check_given(proxy: Proxy, kind: str, recipe: Recipe | None, model: nn.Module | None) -> None:
    if proxy.needs == "model" and (model is None or recipe is not None):
        raise UserError(f"{kind} looks at a trained network and trains none; give model, and no recipe")
    if proxy.needs == "recipe" and (recipe is None or model is not None):
        raise UserError(f"{kind} trains networks of its own; give recipe, and no model")
    if proxy.needs == "either" and (recipe is None) == (model is None):
        raise UserError(
            f"{kind} trains networks of its own by a recipe, or looks at a given model; give just one of recipe, model"
        )


def _device(samples: Samples, model: nn.Module | None, device: torch.device | None) -> torch.device:
    if model is not None:
        return runtime.device_of(model)
    return device if device is not None else torch.device(getattr(samples, "device", "cpu"))
