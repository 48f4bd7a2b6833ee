"""What a grid is, as a TOML file or as plain values says it, and the variants that it spells out."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

from unsharp import config
from unsharp.data import DataConfig
from unsharp.difficulty import ForgetConfig
from unsharp.errors import UserError, unknown
from unsharp.evaluation import METRICS, check_attacks
from unsharp.evaluation.metrics import ATTACKS
from unsharp.evaluation.suite import COST
from unsharp.models import ModelConfig
from unsharp.sweep.grid.variants import Block, Variant, labels_of, name_of, naming, spelt_out
from unsharp.training import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Given = Union[str, Path, Mapping[str, Any], "Grid", Callable[[], Any]]
"""What says a grid: a TOML file, "package.module:function", the function, what it returns, or a grid itself."""
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
BESIDE = ("gap", "reference", "original")
DIFFERS = ("seconds", "peak_memory_bytes")
"""Last parts of the names of figures that differ between two runs of the same cell: they cannot be compared."""
DATA_PATHS = ("dir", "test_dir", "class_order")
FORGET_PATHS = ("ids", "scores")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every method under every rule with every setting, on every forget set and pretraining, for every seed.

    Args:
        unlearn: Blocks of what is compared: `method`, `rule` (the method's default if left out), any setting of method,
            rule, optimiser or loop, and `name`, what the block is called. A list stands for all of its values; so
            `rule = ["none", "sam"]` and `alpha = [0.9, 0.95]` are four variants. A method or rule with settings of its
            own is a table: `rule = ["none", {name = "sam", rho = [0.05, 0.1]}]`.
        forget: Forget sets: the fields of a `ForgetConfig`, and `name`.
        seeds: Seeds; each has networks of its own, trained and retrained, and is the seed of unlearning and metrics.
        data: The data.
        model: The network.
        train: How it is trained: the fields of a `TrainConfig` but its seed. A rule may be its name alone.
        pretraining: What each pretraining has that differs from `train`, and `name`; networks are retrained likewise.
        settings: Settings of every block of `unlearn` that does not name them itself.
        attacks: Membership attacks to run; None for all.
        features: Whether to collect penultimate features, for the metrics on them. Unlike the command `evaluate` a grid
            does not by default, since that may take several times as long as everything else in a cell.
        keep_networks: Keep the networks that forgot, as `unlearn` runs in the cells' directories.
        device: Device of every cell; None takes the accelerator where there is one.
        judged_on: What stands for unseen samples: the test set, or the validation set where settings are to be chosen.
        baseline: The variant beside which the others are put, by its label; None compares none.
        outcome: The metric that is compared and shown while the grid runs, levels joined by dots.
    """

    unlearn: tuple[dict[str, Any], ...]
    forget: tuple[dict[str, Any], ...]
    seeds: tuple[int, ...] = (0,)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: dict[str, Any] = field(default_factory=dict)
    pretraining: tuple[dict[str, Any], ...] = ({},)
    settings: dict[str, Any] = field(default_factory=dict)
    attacks: tuple[str, ...] | None = None
    features: bool = False
    keep_networks: bool = False
    device: str | None = None
    judged_on: Literal["test", "validation"] = "test"
    baseline: str | None = None
    outcome: str = "tow"

    def __post_init__(self) -> None:
        for name in ("unlearn", "forget", "seeds", "pretraining"):
            if not getattr(self, name):
                raise UserError(f"{name} of the grid is empty; give at least one")
        if len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds must be different, got {', '.join(map(str, self.seeds))}")
        if any(seed < 0 for seed in self.seeds):
            raise UserError(f"seeds must be at least 0, got {min(self.seeds)}")
        if self.judged_on == "validation" and self.data.validation is None:
            raise UserError("judged_on is validation, but data holds no samples out for it; set data.validation")
        check_attacks(self.attacks or ())
        _check_outcome(self.outcome, self.attacks, self.features)
        variants = self.variants()
        if self.baseline is not None and self.baseline not in variants:
            raise unknown("baseline", self.baseline, variants)
        self.pretrainings()
        self.forget_sets()

    def variants(self) -> dict[str, Variant]:
        """What is compared, by label. Raises: UserError for a setting that nobody takes, or one that stands twice."""
        found: list[Variant] = []
        for i, block in enumerate(self.unlearn):
            with naming(f"unlearn[{i}]"):
                found += spelt_out(self.settings, block)
        labels = labels_of(found)
        by_label = dict(zip(labels, found))
        if len(by_label) < len(found):
            twice = next(label for label in labels if labels.count(label) > 1)
            raise UserError(f"unlearn: {twice!r} stands there twice; leave one out, or give each block a name")
        return by_label

    def pretrainings(self) -> dict[str, TrainConfig]:
        """How the networks are trained, by name; the seed is yet to be put in."""
        found: dict[str, TrainConfig] = {}
        for i, block in enumerate(self.pretraining):
            where = f"pretraining[{i}]"
            own = {key: value for key, value in block.items() if key != "name"}
            for part in (self.train, own):
                if "seed" in part:
                    raise UserError("the seeds of training are those of the grid; leave seed out of train")
            how = config.from_dict(TrainConfig, _merged(_ruled(self.train), _ruled(own)), where if own else "train")
            name = name_of(block, where) or config.to_dict(how)["rule"]["name"]
            if name in found:
                raise UserError(f"two pretrainings are called {name!r}; give each a name of its own")
            found[name] = how
        return found

    def forget_sets(self) -> dict[str, ForgetConfig]:
        """How the forget sets are chosen, by name."""
        found: dict[str, ForgetConfig] = {}
        for i, block in enumerate(self.forget):
            where = f"forget[{i}]"
            own = {key: value for key, value in block.items() if key != "name"}
            chosen = config.from_dict(ForgetConfig, own, where)
            with naming(where):
                chosen.check()
            name = name_of(block, where) or f"forget {i + 1}"
            if name in found:
                raise UserError(f"two forget sets are called {name!r}; give each a name of its own")
            found[name] = chosen
        return found


def grid_from(given: Given) -> Grid:
    """The grid that a file, a function or plain values describe; relative paths begin where the file is, or here.

    Raises:
        UserError: naming the file or function, for one that cannot be read or called, an unknown key, or a value that
            does not fit.
    """
    if isinstance(given, str) and FUNCTION.fullmatch(given):
        function = _function(given)
        with naming_source(given):
            return grid_of(function())
    if isinstance(given, (str, Path)):
        return read_grid(given)
    return grid_of(given() if callable(given) else given)


def naming_source(given: Given) -> contextlib.AbstractContextManager[None]:
    """Put the name of the file or function that says a grid before the mistakes that are found in it."""
    return naming(str(given)) if isinstance(given, (str, Path)) else contextlib.nullcontext()


def read_grid(path: str | Path) -> Grid:
    """The grid that a TOML file describes; its relative paths are taken from where the file is.

    Raises:
        UserError: if the file is missing or not TOML, for an unknown key, and for a value that does not fit.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a TOML file, or package.module:function") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    with naming_source(path):
        return grid_of(values, path.absolute().parent)


def grid_of(values: Any, directory: Path | None = None) -> Grid:
    """The grid that plain values describe.

    Args:
        values: As `Grid` has them; a grid is left as it is, but for its paths.
        directory: Where relative paths begin; None for the current directory.

    Raises:
        UserError: for an unknown key or a value that does not fit.
    """
    if isinstance(values, Mapping):
        for name in ("unlearn", "forget", "pretraining"):
            if isinstance(values.get(name), Mapping):
                raise UserError(f"{name} must be a list of tables; in TOML write [[{name}]], not [{name}]")
    grid = values if isinstance(values, Grid) else config.from_dict(Grid, values, "grid")
    # Cells may run where there is another current directory.
    base = directory or Path.cwd()
    data = {name: _absolute(getattr(grid.data, name), base) for name in DATA_PATHS}
    forget = tuple(
        block | {name: _absolute(block[name], base) for name in FORGET_PATHS if name in block} for block in grid.forget
    )
    return dataclasses.replace(grid, data=dataclasses.replace(grid.data, **data), forget=forget)


def _function(name: str) -> Callable[[], Any]:
    module, _, attribute = name.partition(":")
    # The installed command does not search the working directory, where a user's own module usually is.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise UserError(
            f"{name} cannot be imported ({type(error).__name__}: {error}); give package.module:function, or a TOML file"
        ) from error
    if not callable(found):
        raise UserError(f"{name} is a {type(found).__name__}, not a function that returns a grid")
    return found


def _check_outcome(name: str, attacks: Sequence[str] | None, features: bool) -> None:
    """Raise UserError for an outcome that no cell will have, as far as the metrics tell by their names."""
    beside, _, rest = name.partition(".")
    head, _, inner = (rest if beside in BESIDE else name).partition(".")
    inner = inner.partition(".")[0]
    groups = {metric.group for metric in METRICS.values() if metric.group is not None}
    alone = [metric.name for metric in METRICS.values() if metric.group is None]
    if head not in groups:
        known = [*alone, *(figure for figure in COST if figure not in DIFFERS)]
        if head not in known:
            raise unknown("outcome", name, [*known, *(f"{group}.…" for group in groups)])
        return
    members = [m.name for m in METRICS.values() if m.group == head]
    if head == ATTACKS and attacks is not None:
        members = list(attacks)
    if inner not in members:
        raise unknown("outcome", name, [f"{head}.{member}" for member in members])
    if "features" in METRICS[inner].needs and not features:
        raise UserError(f"outcome {name!r} is measured on features; set features = true")


def _absolute(path: Any, base: Path) -> Any:
    return str(base / path) if isinstance(path, str) else path


def _ruled(train: Mapping[str, Any]) -> Block:
    """The same training with a rule that is its name alone spelt out."""
    rule = train.get("rule")
    return {**train, "rule": {"name": rule}} if isinstance(rule, str) else dict(train)


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> Block:
    """Values with others in their place; of two tables that are not of different names, entry by entry."""
    found = dict(base)
    for key, value in own.items():
        old = found.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and value.get("name") in (None, old.get("name")):
            found[key] = {**old, **value}
        else:
            found[key] = value
    return found
