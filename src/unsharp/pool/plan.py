"""What a pool is a pool of: one recipe, one set of samples, one way to draw subsets of them."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from unsharp import config
from unsharp.data.samples import Samples
from unsharp.difficulty.forget import ForgetSet
from unsharp.errors import UserError
from unsharp.pool.stack import Member
from unsharp.pool.subsets import Subsets
from unsharp.reference import Recipe, described, state_digest
from unsharp.training import TrainConfig, initial_model


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """How the subsets of a pool are drawn.

    Args:
        fraction: Share of the samples that each network is trained on, in (0, 1].
        seed: Seed of the pool, at least 0: of all subsets, weights and orders.
    """

    fraction: float = 0.7
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the members of a pool have in common.

    Args:
        recipe: How each is trained; the seed of its training is not used.
        samples: The training samples; they need a fingerprint.
        config: How subsets are drawn.
        without: Samples that no member may have, so that all of them are oracles for these; None for none.

    Raises:
        UserError: if the samples have no fingerprint, or a subset would be empty.
    """

    recipe: Recipe
    samples: Samples
    config: PoolConfig
    without: ForgetSet | None = None

    def __post_init__(self) -> None:
        if self.samples.fingerprint is None:
            raise UserError(
                "a pool is found again by the content of its data, which these do not have; give fingerprint="
            )
        if self.recipe.make_optimizer is not None:
            raise UserError("a pool cannot be named by a make_optimizer; give the optimiser by its configuration")
        self.subsets  # noqa: B018

    @functools.cached_property
    def drawn_from(self) -> np.ndarray:
        """(k,) int64, ascending: the samples that subsets are drawn from."""
        n = len(self.samples)
        return np.arange(n) if self.without is None else self.without.retain_indices(n)

    @functools.cached_property
    def subsets(self) -> Subsets:
        """The subsets, as positions in `drawn_from`."""
        return Subsets(n=len(self.drawn_from), fraction=self.config.fraction, seed=self.config.seed)

    def member(self, number: int) -> Member:
        """What a member is trained on, and its seed."""
        return Member(self.drawn_from[self.subsets.indices(number)], self.subsets.training_seed(number))

    def inside(self, numbers: Any) -> np.ndarray:
        """(m, n) bool: whether a sample is in the subset of a member."""
        found = np.zeros((len(numbers), len(self.samples)), bool)
        found[:, self.drawn_from] = self.subsets.inside(numbers)
        return found

    @property
    def train(self) -> TrainConfig:
        """How a member is trained, but for its seed."""
        return dataclasses.replace(self.recipe.train, seed=0)

    @functools.cached_property
    def key(self) -> str:
        """Hash of all that distinguishes these members, as random draws, from others.

        Versions, device and thread count are not part of it: they change the bits of a member, not what it is a draw
        of. They stand in the provenance of each shard.
        """
        network = initial_model(self.recipe.make_model, 0, torch.device("cpu"))
        architecture = self.recipe.architecture
        return config.digest(
            {
                "architecture": described(network) if architecture is None else architecture,
                "initialisation": state_digest(network),
                "train": config.to_dict(self.train),
                "data": self.samples.fingerprint,
                "inputs": dict(self.samples.treatment),
                "pool": config.to_dict(self.config),
                "without": None if self.without is None else self.without.hash,
            }
        )
