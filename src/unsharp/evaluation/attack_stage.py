"""Attacks with shadow networks as a stage: pools grow as far as is needed, and what an attack finds is written.

A pool is found again by content (`unsharp memorize` grows the same), and whatever of it is there is not trained again.
What is asked of the networks stands in `QUESTIONS`; each says which networks it needs and what it finds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unsharp import artifacts, config
from unsharp.artifacts import Run, Workspace
from unsharp.data import DataConfig
from unsharp.difficulty.forget import ForgetSet
from unsharp.errors import UserError, unknown
from unsharp.evaluation import shadow_pool, shadow_run
from unsharp.evaluation.roc import Power
from unsharp.evaluation.shadow import FEWEST, Form, Tail, Variance
from unsharp.evaluation.shadow_pool import Compared
from unsharp.evaluation.shadow_run import Against, Asked
from unsharp.pool.grow import Work, grow, plan_of, pool_of, probe
from unsharp.pool.plan import PoolConfig
from unsharp.pool.store import PoolOutputs
from unsharp.progress import duration
from unsharp.report.roc import Curve, roc_curves
from unsharp.stages import RECORD_FILE, Setting, find_reference, open_unlearned
from unsharp.subject import Subject
from unsharp.training import Record, TrainConfig
from unsharp.unlearning import UnlearnConfig

STAGE = "attack"
ATTACK_FILE, FIGURE_FILE = "attack.json", "roc.svg"
MOST_TRIED = 1024
"""Networks up to which it is said how many are enough."""
TITLES = {"lira": "LiRA", "rmia": "RMIA", "u_lira": "U-LiRA"}


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """Which attacks, and how.

    Args:
        attacks: Of `QUESTIONS`.
        networks: Networks of each pool, at least 4.
        against: What lira and rmia tell the forget samples from: networks of the pool that never had them, or test
            samples.
        form: online (shadows that had the sample and shadows that had not) or offline (the latter alone); None takes
            what suits the attack.
        variance: Of LiRA and U-LiRA: per_sample, global, or auto.
        tail: What offline U-LiRA holds for a trace: above, below or both.
        gamma: γ of RMIA, above 0.
        linear: a of RMIA's line, in [0, 1].
        seed: Seed of what the attacks and intervals draw.

    Raises:
        UserError: if a value is unknown or out of range.
    """

    attacks: tuple[str, ...] = ("lira",)
    networks: int = 64
    against: Against = "networks"
    form: Form | None = None
    variance: Variance = "auto"
    tail: Tail = "both"
    gamma: float = 2.0
    linear: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        from unsharp.evaluation.shadow import _check_rmia, _check_tail

        if not self.attacks:
            raise UserError(f"name at least one attack of {', '.join(QUESTIONS)}")
        for name in self.attacks:
            if name not in QUESTIONS:
                raise unknown("attack", name, QUESTIONS)
            if name != "u_lira":
                shadow_run.form_of(name, self.against, self.form)
        if self.networks < 4:
            raise UserError(f"networks must be at least 4, got {self.networks}; 64 and more tell something")
        if self.variance not in ("auto", *FEWEST):
            raise unknown("variance", self.variance, ("auto", *FEWEST))
        if self.seed < 0:
            raise UserError(f"seed must be at least 0, got {self.seed}")
        _check_rmia(self.form or "online", self.gamma, self.linear)
        _check_tail(self.tail)


@dataclass(frozen=True, eq=False)
class Ready:
    """The networks that questions are asked of.

    Args:
        how: The questions.
        forget: The forget set.
        pool: What the networks on random parts say.
        run: What the network that forgot says.
        retrained: What its retrained reference says.
        unlearned: What the networks of the pool say after they forgot; None where no question needs them.
        oracles: What networks trained without the forget set say; None likewise.
    """

    how: AttackConfig
    forget: ForgetSet
    pool: PoolOutputs
    run: Asked
    retrained: Asked | None
    unlearned: PoolOutputs | None = None
    oracles: PoolOutputs | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """Something that is asked of networks.

    Args:
        unlearns: Whether it needs a pool that forgot, and one of oracles.
        ask: From the networks to its figures, and to the curves of the figure, if any.
    """

    unlearns: bool
    ask: Callable[[Ready], tuple[dict[str, Any], list[Curve]]]


def _of_run(name: str) -> Question:
    def ask(ready: Ready) -> tuple[dict[str, Any], list[Curve]]:
        how = ready.how
        compared = shadow_run.attack_run(
            ready.pool,
            ready.run,
            ready.retrained,
            ready.forget,
            attack=name,  # pyright: ignore[reportArgumentType]
            against=how.against,
            form=how.form,
            variance=how.variance,
            gamma=how.gamma,
            linear=how.linear,
            seed=how.seed,
        )
        about = {"asks": "the run", "against": how.against, "form": shadow_run.form_of(name, how.against, how.form)}
        return about | _figures(compared.power(over="samples", seed=how.seed)), _curves(TITLES[name], compared)

    return Question(unlearns=False, ask=ask)


def _u_lira(ready: Ready) -> tuple[dict[str, Any], list[Curve]]:
    how = ready.how
    assert ready.unlearned is not None  # by `unlearns`
    compared = shadow_pool.u_lira_on_pools(
        ready.unlearned, ready.oracles, ready.forget, form=how.form or "online", variance=how.variance, tail=how.tail
    )
    about = {"asks": "the method, on the networks of the pool", "against": "networks", "form": how.form or "online"}
    return about | _figures(compared.power(over="both", seed=how.seed)), _curves(TITLES["u_lira"], compared)


QUESTIONS: dict[str, Question] = {
    "lira": _of_run("lira"),
    "rmia": _of_run("rmia"),
    "u_lira": Question(unlearns=True, ask=_u_lira),
}
"""What can be asked, by name."""


def attack(
    run: str | Path,
    how: AttackConfig,
    pool: PoolConfig,
    work: Work,
    out: str | Path | None,
    at: Setting,
    *,
    data_config: DataConfig | None = None,
    train_config: TrainConfig | None = None,
) -> Run:
    """Attack an unlearned network with the networks of a pool, which grows as far as is needed.

    Args:
        run: Directory of an `unlearn` run.
        how: Which attacks.
        pool: How the subsets of the pool are drawn; the oracles take the next seed.
        work: How networks are trained.
        out: Where to write.
        at: Device, store, progress.
        data_config: Where the data are, if not where they were.
        train_config: How the original was trained, where its checkpoint does not know.

    Raises:
        UserError: for bad input, or if so many networks are too few, before any work.
        SweepError: if a network could not be trained; those that were finished are kept.
    """
    unlearned = open_unlearned(run, at, data_config=data_config, train_config=train_config)
    subject, forget = unlearned.subject, unlearned.forget
    if forget.before is not None:
        raise UserError(f"{run} builds on an earlier request, and pools know of none; attack the first one's network")
    method = config.from_dict(UnlearnConfig, unlearned.run.config["unlearn"], "unlearn")
    seconds = config.from_dict(Record, unlearned.run.json(RECORD_FILE)).seconds
    plans = _Plans(subject, forget, method, how, pool, seconds)
    settings = {
        "checkpoint": subject.digest,
        "forget": forget.hash,
        "attack": how,
        "pool": plans.trained.key,
        **({"unlearn": method, "oracles": plans.oracles.key} if plans.unlearns else {}),
    }

    def do(workspace: Workspace) -> None:
        ready = plans.grown(work.settled(plans.trained), at)
        found: dict[str, dict[str, Any]] = {}
        curves: list[Curve] = []
        for name in dict.fromkeys(how.attacks):
            found[name], more = QUESTIONS[name].ask(ready)
            curves += more
        workspace.write_json(ATTACK_FILE, plans.about() | {"networks": _counts(ready), "attacks": found})
        if curves:
            artifacts.write_text(workspace.file(FIGURE_FILE), roc_curves(curves))

    return at.perform(out, STAGE, settings, do)


class _Plans:
    """Which networks there will be; checked before any is trained."""

    def __init__(
        self,
        subject: Subject,
        forget: ForgetSet,
        method: UnlearnConfig,
        how: AttackConfig,
        pool: PoolConfig,
        seconds: float,
    ) -> None:
        self.subject, self.forget, self.method, self.how, self.seconds = subject, forget, method, how, seconds
        self.trained = plan_of(subject.origin, subject.splits.train, pool)
        self.oracles = plan_of(
            subject.origin, subject.splits.train, dataclasses.replace(pool, seed=pool.seed + 1), forget
        )
        self.wanted = range(how.networks)
        self.unlearns = any(QUESTIONS[name].unlearns for name in how.attacks)
        self._check()

    def _check(self) -> None:
        """Raise UserError where an attack would find too few networks; subsets are known before the networks are."""
        if self.subject.splits.test is None and (self.how.against == "samples" or "rmia" in self.how.attacks):
            raise UserError("this attack asks about test samples, and the data have none; take --attacks lira u_lira")
        inside = self.trained.inside(self.wanted)[:, self.forget.indices]
        had, never = int(inside.sum(0).min()), int((~inside).sum(0).min())
        fewest = FEWEST["global" if self.how.variance == "auto" else self.how.variance] + 1  # one is attacked itself
        for name in self.how.attacks:
            least = 2 if name == "rmia" else fewest
            form = self.how.form or "online" if name == "u_lira" else None
            form = form or shadow_run.form_of(name, self.how.against, self.how.form)
            needed = [("had", had)] if form == "online" else []
            needed += [("never had", never)] if name != "u_lira" else []
            for what, count in needed:
                if count >= least:
                    continue
                enough = self._enough([kind == "had" for kind, _ in needed], least)
                raise UserError(
                    f"{name}: of {self.how.networks} networks only {count} {what} the forget sample that fewest "
                    f"{what}; at least {least} are needed: raise --networks"
                    + (f" ({enough} are enough)" if enough else "")
                    + ", or choose another --pool-fraction"
                    + (", or take --form offline" if what == "had" else "")
                )

    def _enough(self, kinds: Sequence[bool], least: int) -> int | None:
        """The fewest networks of which `least` had each forget sample (True), or never had it (False), of each kind."""
        inside = self.trained.inside(range(MOST_TRIED))[:, self.forget.indices]
        reached = np.all([np.cumsum(inside == had, axis=0).min(1) >= least for had in kinds], axis=0)
        return int(reached.argmax()) + 1 if reached.any() else None

    def cost(self, work: Work, at: Setting) -> list[str]:
        """What is to be done, in lines; times a few steps of training to know."""
        todo = len(pool_of(self.trained, at.store).missing(self.wanted))
        more = len(pool_of(self.oracles, at.store).missing(self.wanted)) if self.unlearns else 0
        done = shadow_pool.unlearned_pool_of(self.trained, self.forget, self.method, at.store)
        forgets = len(done.missing(self.wanted)) if self.unlearns else 0
        words = [f"{todo} of {len(self.wanted)} networks to train"]
        words += [f"{more} oracles to train, {forgets} networks to make forget"] if self.unlearns else []
        if not todo + more + forgets:
            return [f"all {len(self.wanted)} networks of each pool are there"]
        each = probe(self.trained, work) if todo + more else 0.0
        seconds = ((todo + more) * each + forgets * self.seconds) / (work.workers or 1)
        return [f"{'; '.join(words)}: about {duration(seconds)} here"]

    def grown(self, work: Work, at: Setting) -> Ready:
        """The networks, trained as far as they are not there."""
        for line in self.cost(work, at):
            at.say(line)
        subject, test = self.subject, self.subject.splits.test
        shared: dict[str, Any] = {"origin": subject.origin, "test": test, "progress": at.progress}
        trained = grow(self.trained, self.wanted, at.store, work, **shared)
        unlearned = oracles = None
        if self.unlearns:
            oracles = grow(self.oracles, self.wanted, at.store, work, **shared)
            unlearned = shadow_pool.unlearn_pool(
                self.trained,
                self.forget,
                self.method,
                at.store,
                work,
                members=[j for j in trained.members() if j in self.wanted],
                validation=subject.splits.validation,
                say=at.say,
                **shared,
            )
        reference, _ = find_reference(subject, self.forget, at)
        return Ready(
            self.how,
            self.forget,
            trained.outputs([j for j in trained.members() if j in self.wanted]),
            Asked.of(subject.model, subject.splits),
            None if reference is None else Asked.of(reference.model, subject.splits),
            None if unlearned is None else unlearned.outputs([j for j in unlearned.members() if j in self.wanted]),
            None if oracles is None else oracles.outputs([j for j in oracles.members() if j in self.wanted]),
        )

    def about(self) -> dict[str, Any]:
        """What the figures are figures of."""
        return {
            "forget": {"n": len(self.forget), "hash": self.forget.hash, "rule": self.forget.rule},
            "pool": {"key": self.trained.key, **config.to_dict(self.trained.config)},
            "attack": config.to_dict(self.how),
        }


def _counts(ready: Ready) -> dict[str, int]:
    inside = ready.pool.inside[:, ready.forget.indices]
    found = {"pool": len(ready.pool), "fewest_had": int(inside.sum(0).min())}
    found["fewest_never_had"] = int((~inside).sum(0).min())
    more = {"unlearned": ready.unlearned, "oracles": ready.oracles}
    return found | {name: len(outputs) for name, outputs in more.items() if outputs is not None}


def _figures(both: Mapping[str, Power | None]) -> dict[str, Any]:
    return {name: None if power is None else dataclasses.asdict(power) for name, power in both.items()}


def _curves(title: str, compared: Compared) -> list[Curve]:
    found = [Curve(title, compared.unlearned.roc)]
    if compared.retrained is not None:
        found.append(Curve(f"{title}, retrained", compared.retrained.roc, reference=True))
    return found


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What `attack.json` says, for a person: a line for each attack and network."""
    lines = []
    for name, figures in found["attacks"].items():
        for who in ("unlearned", "retrained"):
            if (power := figures.get(who)) is not None:
                lines.append(f"{TITLES.get(name, name):<7} {figures['form']:<8} {who:<10} {_told(power)}")
    return lines


def _told(power: Mapping[str, Any]) -> str:
    auc, rates = power["auc"], []
    interval = "" if auc["low"] is None else f" [{auc['low']:.3f}, {auc['high']:.3f}]"
    for at in power["at"]:
        shown = (
            f"{100 * at['tpr']:.1f} %" if at["tpr"] is not None else f"not resolved ({at['needed']:,} others needed)"
        )
        rates.append(f"TPR at {100 * at['fpr']:g} % FPR {shown}")
    return (
        f"area {auc['value']:.3f}{interval}, {', '.join(rates)}; {power['n_members']:,} + {power['n_others']:,} scores"
    )
