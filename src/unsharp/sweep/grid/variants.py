"""What a grid compares: blocks of methods, rules and settings, spelt out into one variant for each combination."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unsharp import config
from unsharp.errors import UserError
from unsharp.unlearning import UnlearnConfig, configure

Block = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the things that are compared.

    Args:
        name: What its block is called; None leaves it to method and rule.
        method: Name of the method.
        rule: Name of the rule.
        settings: The settings that were given.
        how: The whole configuration; the seed is yet to be put in.
    """

    name: str | None
    method: str
    rule: str
    settings: dict[str, Any]
    how: UnlearnConfig

    @property
    def title(self) -> str:
        """What it is called, without its settings."""
        return self.name or f"{self.method} {self.rule}"


def spelt_out(shared: Mapping[str, Any], block: Mapping[str, Any]) -> Iterator[Variant]:
    """All variants of a block, the last setting changing first."""
    name = name_of(block, "block")
    if "method" not in block:
        raise UserError('the block lacks its method; give one, such as method = "neggrad"')
    if taken := sorted({"method", "rule", "name", "seed"} & set(shared)):
        raise UserError(f"settings: {taken[0]} is no setting; it belongs to unlearn or is an axis of the grid")
    if "seed" in block:
        raise UserError("the seeds of unlearning are those of the grid; leave seed out of unlearn")
    settings = {key: value for key, value in {**shared, **block}.items() if key not in ("name", "method", "rule")}
    for method, of_method in _each("method", block["method"]):
        for rule, of_rule in _each("rule", block.get("rule")):
            for point in _product({**settings, **of_method, **of_rule}):
                yield _variant(name, str(method), rule, point)


def _variant(name: str | None, method: str, rule: str | None, settings: Block) -> Variant:
    if misplaced := sorted({"method", "rule", "seed"} & set(settings)):
        raise UserError(f"{misplaced[0]} is no setting of {method}; it stands beside method in the block")
    how = configure(method, rule=rule, **settings)
    return Variant(name=name, method=method, rule=config.to_dict(how)["rule"]["name"], settings=settings, how=how)


def _each(kind: str, given: Any) -> Iterator[tuple[str | None, Block]]:
    """Each method or rule that is named, with the settings that are its own."""
    if isinstance(given, (list, tuple)) and not given:
        raise UserError(f"{kind} is an empty list; give at least one name")
    for one in given if isinstance(given, (list, tuple)) else [given]:
        if isinstance(one, Mapping):
            if not isinstance(one.get("name"), str):
                raise UserError(f'a {kind} with settings needs its name, as in {{name = "..."}}; got {one!r}')
            yield one["name"], {key: value for key, value in one.items() if key != "name"}
        elif one is None or isinstance(one, str):
            yield one, {}
        else:
            raise UserError(f"{kind} must be a name or a table with a name, got {one!r}")


def _product(settings: Mapping[str, Any]) -> Iterator[Block]:
    """Every combination of the values that lists hold."""
    for key, value in settings.items():
        if isinstance(value, (list, tuple)) and not value:
            raise UserError(f"{key} is an empty list; give at least one value")
    axes = [value if isinstance(value, (list, tuple)) else [value] for value in settings.values()]
    for values in itertools.product(*axes):
        yield dict(zip(settings, values))


def labels_of(variants: Sequence[Variant]) -> list[str]:
    """A label for each: its title, and those of its settings in which variants of this title differ."""
    labels = []
    for variant in variants:
        alike = [other for other in variants if other.title == variant.title]
        names = dict.fromkeys(name for other in alike for name in other.settings)
        telling = [n for n in names if len({repr(other.settings.get(n)) for other in alike}) > 1]
        if len({other.method for other in alike}) > 1:
            telling = ["method", *telling]
        if len({other.rule for other in alike}) > 1:
            telling = ["rule", *telling]
        known = {"method": variant.method, "rule": variant.rule, **variant.settings}
        shown = [f"{n}={known[n]}" for n in telling if n in known]
        labels.append(" ".join([variant.title, *shown]))
    return labels


def name_of(block: Mapping[str, Any], where: str) -> str | None:
    """What a block is called, if it says so. Raises: UserError if that is no text."""
    name = block.get("name")
    if name is not None and (not isinstance(name, str) or not name):
        raise UserError(f"{where}.name must be text, got {name!r}")
    return name


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Put a place before the mistakes that are found in the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
