"""Settings and versions as a report may show them: complete, but for what names local files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unsharp.report.groups import HIDDEN, Group, Task, flatten, shown

SHORT = 12  # hex digits of a hash


def public(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as flat text, without directories and file paths, which may name what was forgotten."""
    return {key: shown(key, value) for key, value in flatten(settings).items()}


def without_local(values: Any, key: str = "") -> Any:
    """Plain values as they are, but for directories and file paths, which may name what was forgotten."""
    if isinstance(values, Mapping):
        return {k: without_local(v, str(k)) for k, v in values.items()}
    if isinstance(values, (list, tuple)):
        return [without_local(v, key) for v in values]
    return HIDDEN if isinstance(values, str) and shown(key, values) == HIDDEN else values


def unlearning(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """How each method was run: a line for each setting, a value for each group, a single one where all agree."""
    settings = [public({k: v for k, v in g.runs[0]["unlearn"].items() if k != "seed"}) for g in groups]
    keys = sorted(dict.fromkeys(k for s in settings for k in s), key=_importance)
    lines = [(key, [s.get(key, "–") for s in settings]) for key in keys]
    return [(key, values if len(set(values)) > 1 else values[:1]) for key, values in lines]


def _importance(key: str) -> int:
    order = ("method", "rule", "epochs", "batch_size", "optimizer")
    return next((i for i, name in enumerate(order) if key.split(".")[0] == name), len(order))


def origin(group: Group) -> dict[str, str]:
    """How the original network was trained, and on what; of its seed see `runs`."""
    values = dict(group.runs[0]["origin"])
    if values["train"] is None:
        values["train"] = "not known"
    else:
        values["train"] = {k: v for k, v in values["train"].items() if k != "seed"}
    values["fingerprint"] = (values.get("fingerprint") or "none")[:SHORT]
    return public(values)


def runs(groups: Sequence[Group]) -> list[list[str]]:
    """A line for each run: network, its seeds, forget set."""
    lines = []
    for group in groups:
        for run, seed in zip(group.runs, group.seeds):
            train = run["origin"]["train"]
            evaluated = run["metrics"].get("seed")
            seeds = [str(seed), "–" if train is None else str(train["seed"]), shown("seed", evaluated)]
            counts = [_count(run["metrics"].get("n", {}).get(part)) for part in ("retain", "forget", "test")]
            lines.append([group.title, *seeds, *counts, run["forget"]["hash"][:SHORT]])
    return lines


def _count(n: int | None) -> str:
    return "–" if n is None else f"{n:,}"


def versions(groups: Sequence[Group]) -> dict[str, str]:
    """Versions of the software; several where runs differ."""
    found: dict[str, dict[str, None]] = {}
    for group in groups:
        for run in group.runs:
            for name, version in run.get("versions", {}).items():
                found.setdefault(name, {})[str(version)] = None
    return {name: ", ".join(seen) for name, seen in found.items()}


def samples(groups: Sequence[Group]) -> list[tuple[Task, str, list[str]]]:
    """The ids of each forget set that is known, with its task and the start of its hash."""
    found = {run["forget"]["hash"]: (g.task, run["ids"]) for g in groups for run in g.runs if run.get("ids")}
    return [(task, digest[:SHORT], [str(i) for i in ids]) for digest, (task, ids) in found.items()]
