"""What a reproduction is: a grid at one of three sizes, the figures that are read off it, claims, published values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from unsharp.recipes.paper.problems import Problem, Task
from unsharp.registry import Registry

Axis = Literal["variant", "pretraining", "forget"]
Pick = Mapping[Axis, str]
"""Which cells of a grid are meant: the value of some axes; over the others the mean is taken."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A variant of unlearning, with its settings at each size.

    Args:
        name: What pages call it.
        method: Name of the method.
        rule: Name of the rule; None takes the method's default.
        fixed: Settings at every size.
        paper: Settings as published, at the sizes smoke and paper; where nothing is known, those of the library.
        choose: Settings from which the size small chooses, a list of values for each; every combination is tried.
    """

    name: str
    method: str
    rule: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)
    choose: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def block(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The block of a grid with these settings beside the fixed ones."""
        return {"name": self.name, "method": self.method, "rule": self.rule, **self.fixed, **settings}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A column of a grid's results that is shown.

    Args:
        title: Its name on pages.
        column: The column.
        better: Which values are better: higher ones, lower ones, or those nearer to zero.
        digits: Decimals shown.
    """

    title: str
    column: str
    better: Literal["higher", "lower", "nearer zero"]
    digits: int = 1

    def merit(self, value: float) -> float:
        """The value turned so that more is better."""
        return {"higher": value, "lower": -value, "nearer zero": -abs(value)}[self.better]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something the paper says that a difference between cells decides.

    Args:
        claim: Number of the claim, "C1".
        says: What it says, in a sentence.
        better: The cells that should be better.
        worse: The cells beside which they should be so.
        figure: The column by which it is judged.
    """

    claim: str
    says: str
    better: Pick
    worse: Pick
    figure: str = "tow"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure that the paper, or its code, prints.

    Args:
        of: The cells that are its counterpart here.
        value: The figure.
        about: On which data, averaged over what.
        figure: The column that is its counterpart here.
    """

    of: Pick
    value: float
    about: str
    figure: str = "tow"


@dataclass(frozen=True, kw_only=True)
class Beyond:
    """What is measured of each network that forgot, after the grid.

    Args:
        function: "package.module:name", a cell that takes `run`, `original`, `store`, `size` and `seed`; what it
            returns becomes columns.
        picture: File in the cell's directory that pages show for the first seed, if any.
    """

    function: str
    picture: str | None = None


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """A table or figure of the paper.

    Args:
        title: What it is.
        shows: What the paper shows with it.
        figures: What is read off, the first one being what settings are chosen by.
        compared: The variants.
        task: Data and network.
        pretraining: How networks are trained, by name: the rule, with its settings.
        claims: What it decides.
        published: What the paper prints.
        unknown: What of the paper's settings is not known, in sentences.
        baseline: Name of the variant beside which the others are put.
        attacks: Membership attacks that are run; None for all.
        features: Whether penultimate features are collected.
        adapt: Changes the problem of a size: another network, optimiser or corruption.
        beyond: What is measured besides.
    """

    title: str
    shows: str
    figures: tuple[Figure, ...]
    compared: tuple[Compared, ...]
    task: Task = "cifar100"
    pretraining: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"SGD": {"name": "none"}})
    claims: tuple[Claim, ...] = ()
    published: tuple[Published, ...] = ()
    unknown: tuple[str, ...] = ()
    baseline: str | None = None
    attacks: tuple[str, ...] | None = ()
    features: bool = False
    adapt: Callable[[Problem], Problem] = lambda problem: problem
    beyond: Beyond | None = None


REPRODUCTIONS: Registry[Reproduction] = Registry("reproduction", "unsharp.recipes.paper")


def register(name: str, what: Reproduction) -> Reproduction:
    """Make a reproduction known by its name."""
    return REPRODUCTIONS.register(name)(what)
