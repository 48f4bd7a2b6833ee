"""Attacks on one unlearned network with the networks of a pool: does it betray its forget set?

The pool holds networks on random parts of the training samples, so that each forget sample was in some and not in
others (`unsharp memorize` grows such pools). The network that forgot is asked about its forget samples; the retrained
network is asked the same, in the same place. What they are told from is a choice:

    "networks"   the same samples in those networks of the pool that never had them, each attacked with the others as
                 its shadows: the question is the network, and hard samples are compared with themselves
    "samples"    test samples in the same network: a forget set that is harder than the test set is told from it in
                 the retrained network as well

The shadows never forgot anything. A network that forgot by a trick may look like neither kind; the attack that knows
the trick is U-LiRA (`shadow_pool.u_lira_on_pools`), which needs a pool that forgot in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from torch import nn

from unsharp.data import Samples, Splits
from unsharp.difficulty.forget import ForgetSet
from unsharp.errors import UserError, unknown
from unsharp.evaluation.predictions import predict
from unsharp.evaluation.roc import Scored
from unsharp.evaluation.shadow import (
    ENOUGH,
    Form,
    Variance,
    lira,
    lira_leave_one_out,
    margins,
    rmia,
    rmia_leave_one_out,
)
from unsharp.evaluation.shadow_pool import Compared
from unsharp.pool.store import PoolOutputs

Attack = Literal["lira", "rmia"]
Against = Literal["networks", "samples"]


@dataclass(frozen=True, eq=False)
class Asked:
    """What one network says of all samples.

    Args:
        train: (n,) float64 margins on the training samples.
        test: (k,) float64 margins on the test samples; None where there are none.
    """

    train: np.ndarray
    test: np.ndarray | None

    @classmethod
    def of(cls, network: nn.Module, splits: Splits) -> Asked:
        """Ask a network about training and test samples."""

        def ask(samples: Samples) -> np.ndarray:
            said = predict(network, samples, np.arange(len(samples)))
            return margins(said.logits, said.labels)

        return cls(ask(splits.train), None if splits.test is None else ask(splits.test))


def attack_run(
    pool: PoolOutputs,
    unlearned: Asked,
    retrained: Asked | None,
    forget: ForgetSet,
    *,
    attack: Attack = "lira",
    against: Against = "networks",
    form: Form | None = None,
    variance: Variance = "auto",
    gamma: float = 2.0,
    linear: float = 0.3,
    seed: int = 0,
) -> Compared:
    """Attack a network that forgot, and the retrained one in its place, with the networks of a pool as shadows.

    Args:
        pool: Networks on random parts of the training samples.
        unlearned: The network that forgot.
        retrained: The retrained one; None where there is none.
        forget: What was forgotten.
        attack: "lira" or "rmia".
        against: What the forget samples are told from.
        form: As for `shadow.lira` and `shadow.rmia`; None takes "online" for LiRA on networks, else "offline". Against
            samples it is "offline": no shadow had a test sample.
        variance: As for `shadow.lira`.
        gamma: As for `shadow.rmia`.
        linear: As for `shadow.rmia`.
        seed: Seed of the half of the test samples that RMIA against samples takes for its population.

    Raises:
        UserError: if the pool is of other samples, there are no test samples where they are needed, or too few
            networks.
    """
    form = form_of(attack, against, form)
    targets = [asked for asked in (unlearned, retrained) if asked is not None]
    if any(len(asked.train) != pool.inside.shape[1] for asked in targets):
        raise UserError(f"the pool was asked about {pool.inside.shape[1]} samples, the network about others")
    forget.retain_indices(pool.inside.shape[1])
    if (attack == "rmia" or against == "samples") and (pool.test is None or any(a.test is None for a in targets)):
        raise UserError(
            "this attack asks about test samples, and there are none; take attack lira against networks, or give data "
            "with a test set"
        )
    arguments: dict[str, Any] = {"gamma": gamma, "linear": linear}
    if against == "networks":
        scored = _against_networks(pool, targets, forget.indices, attack, form, variance, arguments)
    else:
        scored = _against_samples(pool, targets, forget.indices, attack, variance, arguments, seed)
    own = 0.0 if attack == "lira" and form == "online" else None
    return Compared(scored[0], None if retrained is None else scored[1], own)


def form_of(attack: str, against: str, form: Form | None) -> Form:
    """The form that is meant. Raises: UserError for a name that is unknown, or a form that cannot be."""
    for name, value, known in (("attack", attack, Attack), ("against", against, Against)):
        if value not in get_args(known):
            raise unknown(name, value, get_args(known))
    if form is None:
        return "online" if attack == "lira" and against == "networks" else "offline"
    if form not in get_args(Form):
        raise unknown("form", form, get_args(Form))
    if form == "online" and against == "samples":
        raise UserError("no network of the pool had a test sample, which form online needs; take form offline")
    return form


def variance_of(inside: np.ndarray, form: Form, variance: Variance) -> Variance:
    """What "auto" means where each network of the pool is attacked by the others: the same for all scores.

    Args:
        inside: (m, n) bool.
        form: Settled.
        variance: As for `shadow.lira`.
    """
    if variance != "auto":
        return variance
    out = int((~inside).sum(0).min()) - 1
    fewest = min(out, int(inside.sum(0).min()) - 1) if form == "online" else out
    return "per_sample" if fewest >= ENOUGH else "global"


def _against_networks(
    pool: PoolOutputs,
    targets: list[Asked],
    columns: np.ndarray,
    attack: Attack,
    form: Form,
    variance: Variance,
    of_rmia: dict[str, Any],
) -> list[Scored]:
    margin, inside = pool.train.margin[:, columns], pool.inside[:, columns]
    at = np.stack([asked.train[columns] for asked in targets])
    if attack == "lira":
        chosen = variance_of(inside, form, variance)
        found = lira(margin, inside, at, form=form, variance=chosen)
        own = lira_leave_one_out(margin, inside, form=form, variance=chosen)
    else:
        z, z_at = _tests(pool, targets)
        found = rmia(margin, inside, at, z, z_at, form=form, **of_rmia)
        own = rmia_leave_one_out(margin, inside, z, form=form, **of_rmia)
    never = np.where(inside, np.nan, own)
    return [Scored.between(row[None], never, same_samples=True) for row in found]


def _against_samples(
    pool: PoolOutputs,
    targets: list[Asked],
    columns: np.ndarray,
    attack: Attack,
    variance: Variance,
    of_rmia: dict[str, Any],
    seed: int,
) -> list[Scored]:
    tests, tests_at = _tests(pool, targets)
    order = np.random.default_rng(seed).permutation(tests.shape[1])
    half = len(order) // 2 if attack == "rmia" else 0
    population, unseen = order[:half], order[half:]
    margin = np.concatenate([pool.train.margin[:, columns], tests[:, unseen]], 1)
    inside = np.concatenate([pool.inside[:, columns], np.zeros((len(pool), len(unseen)), bool)], 1)
    at = np.concatenate([np.stack([asked.train[columns] for asked in targets]), tests_at[:, unseen]], 1)
    if attack == "lira":
        found = lira(margin, inside, at, form="offline", variance=variance)
    else:
        found = rmia(margin, inside, at, tests[:, population], tests_at[:, population], **of_rmia)
    n = len(columns)
    return [Scored.between(row[None, :n], row[None, n:], same_samples=False) for row in found]


def _tests(pool: PoolOutputs, targets: list[Asked]) -> tuple[np.ndarray, np.ndarray]:
    """Margins on the test samples: of the pool, and of the targets."""
    assert pool.test is not None  # or the attack would have been refused
    return pool.test.margin, np.stack([asked.test for asked in targets if asked.test is not None])
