"""Which runs belong together: same forget task, same settings, another seed; and what each such group is called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from unsharp import config

Kind = Literal["original", "retrained", "unlearned"]
Values = Mapping[str, Any]

SYMBOLS = {"alpha": "α", "rho": "ρ", "lam": "λ", "eta": "η", "rho_retain": "ρ retain", "rho_forget": "ρ forget"}
TITLES = {"neggrad": "NegGrad", "sharp_minmax": "Sharp MinMax", "finetune": "Fine-tuning", "retrain": "Retraining"}
RULES = {"sam": "SAM", "asam": "ASAM"}
SEED = re.compile(r"(,? drawn at random) with seed \d+")
LOCAL = ("dir", "test_dir", "class_order", "ids", "scores", "path", "checkpoint")  # settings that name local files
PATH = re.compile(r"^([/\\~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|file:)|\\|/.*/|/[^/]*\.\w{1,8}(:\w+)?$")
HIDDEN = "(local, left out)"


@dataclass(frozen=True)
class Task:
    """What was to be forgotten, by which network; runs that differ in it are never averaged.

    Args:
        name: What the runs call it, or a letter, where a report has more than one task; else empty.
        rule: The sentence that says how the forget set was chosen, without a seed.
        n: Number of samples to forget.
        subject: Network and data, in a few words.
    """

    name: str
    rule: str
    n: int
    subject: str


@dataclass(frozen=True)
class Group:
    """The networks that one row of a table is about.

    Args:
        label: What the row is called.
        kind: What the networks are.
        task: What they were asked.
        values: Metrics of each network, as `evaluate_network` returns them.
        gaps: The same minus the retrained model's, or None.
        seeds: The seed of each.
        runs: The runs they come from.
    """

    label: str
    kind: Kind
    task: Task
    values: tuple[Values, ...]
    gaps: tuple[Values | None, ...]
    seeds: tuple[int, ...]
    runs: tuple[Mapping[str, Any], ...]

    @property
    def title(self) -> str:
        """The label, with the task where there are several."""
        return f"{self.task.name}: {self.label}" if self.task.name else self.label


def group(runs: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Group runs over seeds: for each task the original, the retrained reference, then each method.

    Args:
        runs: Each `stages.about()` with the `evaluate_network()` values under "metrics" and, if tasks have names, the
            task's under "task"; exact copies count once.
    """
    runs = list({config.digest(run): run for run in runs}.values())
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        by_task.setdefault(_task_key(run), []).append(run)
    found: list[Group] = []
    for i, members in enumerate(by_task.values()):
        task = _task(members[0], str(members[0].get("task") or _letters(i)) if len(by_task) > 1 else "")
        found += _beside(members, "original", task) + _beside(members, "retrained", task) + _unlearned(members, task)
    return found


def flatten(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested settings as one level, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        flat |= flatten(value, path) if isinstance(value, Mapping) and value else {path: value}
    return flat


def method_title(run: Mapping[str, Any]) -> str:
    """Method and rule in a few words: "Sharp MinMax · ASAM ρ=1", or "First order, corrected"."""
    method, rule = run["method"]["name"], run["rule"]
    corrected = ", corrected" if run.get("corrections") else ""
    title = TITLES[method] if method in TITLES else method.replace("_", " ").capitalize()
    if rule["name"] == "none":
        return title + corrected
    radius = f" ρ={shown('rho', rule['rho'])}" if "rho" in rule else ""
    return f"{title} · {RULES.get(rule['name'], rule['name'])}{radius}{corrected}"


def shown(key: str, value: Any) -> str:
    """A setting's value as short text, without file paths, which may name what was forgotten.

    Args:
        key: What it is called; levels joined by dots.
        value: A plain value.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(key, v) for v in value) or "none"
    if isinstance(value, str) and (key.rpartition(".")[2] in LOCAL or PATH.search(value)):
        return HIDDEN
    return "none" if value is None or value == {} else str(value)


def _without(values: Mapping[str, Any] | None, *keys: str) -> dict[str, Any] | None:
    return None if values is None else {k: v for k, v in values.items() if k not in keys}


def _task_key(run: Mapping[str, Any]) -> str:
    origin, forget = run["origin"], run["forget"]
    drawn = SEED.search(forget["rule"]) is not None
    subject = [
        _without(origin["data"], *LOCAL, "workers"),
        _without(origin["train"], "seed"),
        _without(origin, "data", "train"),
    ]
    # Sets drawn with different seeds are repetitions of one task; other sets that differ are other tasks.
    return config.digest(subject, forget["n"], SEED.sub(r"\1", forget["rule"]), None if drawn else forget["hash"])


def _task(run: Mapping[str, Any], name: str) -> Task:
    origin, forget = run["origin"], run["forget"]
    return Task(
        name,
        SEED.sub(r"\1", forget["rule"]),
        forget["n"],
        f"{shown('arch', origin['model']['arch'])} on {shown('name', origin['data']['name'])}",
    )


def _letters(i: int) -> str:
    return chr(ord("A") + i % 26) * (1 + i // 26)


def _beside(runs: Sequence[Mapping[str, Any]], kind: Literal["original", "retrained"], task: Task) -> list[Group]:
    """The networks that several runs were compared with, each once."""
    key = {"original": "original", "retrained": "reference"}[kind]
    seen: dict[Any, Mapping[str, Any]] = {}
    for run in runs:
        if run["metrics"].get(key) is not None:
            seen.setdefault((_origin_seed(run), run["forget"]["hash"]), run)
    if not seen:
        return []
    from unsharp.evaluation import gap  # not above: grouping alone needs no torch

    values = tuple(run["metrics"][key] for run in seen.values())
    against = [run["metrics"].get("reference") for run in seen.values()]
    gaps = tuple(gap(v, r) if kind == "original" else None for v, r in zip(values, against))
    label = {"original": "Original", "retrained": "Retrained"}[kind]
    return [Group(label, kind, task, values, gaps, tuple(s for s, _ in seen), tuple(seen.values()))]


def _origin_seed(run: Mapping[str, Any]) -> int:
    train = run["origin"]["train"]
    return run["metrics"].get("seed", 0) if train is None else train["seed"]


def _unlearned(runs: Sequence[Mapping[str, Any]], task: Task) -> list[Group]:
    by_settings: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        # samples put right are not averaged with samples removed; which ones they are may differ with the seed
        key = config.digest(_without(run["unlearn"], "seed"), bool(run.get("corrections")))
        by_settings.setdefault(key, []).append(run)
    members = list(by_settings.values())
    labels = _labels([m[0] for m in members])
    return [
        Group(
            label,
            "unlearned",
            task,
            tuple(r["metrics"] for r in m),
            tuple(r["metrics"].get("gap") for r in m),
            tuple(r["unlearn"].get("seed", 0) for r in m),
            tuple(m),
        )
        for label, m in zip(labels, members)
    ]


def _labels(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Method and rule, and where several have the same, the settings in which these differ."""
    titles = [method_title(run) for run in runs]
    settings = [flatten(_without(run["unlearn"], "seed") or {}) for run in runs]
    labels = []
    for title, own in zip(titles, settings):
        alike = [s for t, s in zip(titles, settings) if t == title]
        keys = dict.fromkeys(k for s in alike for k in s)
        differing = [k for k in keys if len({config.digest(s.get(k)) for s in alike}) > 1]
        labels.append(" · ".join([title, *(f"{_short(k)}={shown(k, own.get(k))}" for k in differing)]))
    return labels


def _short(path: str) -> str:
    *parents, last = path.split(".")
    name = parents[-1] if last == "name" and parents else last
    return SYMBOLS.get(name, name.replace("_", " "))
