"""Write what the pages say about registered things: python docs/generate.py [--check].

A page holds blocks `<!-- generated: NAME ARGUMENTS -->` ... `<!-- end -->`; the function `NAME` of `BLOCKS` makes their
content. `--check` changes nothing and exits with 1 where a page is not up to date.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from torch import nn

import unsharp
from unsharp import cli, options
from unsharp.data import SOURCES, ImageSamples
from unsharp.difficulty.proxies import PROXIES
from unsharp.evaluation import METRICS
from unsharp.language.objectives import OBJECTIVES
from unsharp.masks import SELECTIONS, Choice
from unsharp.methods import METHODS, Method, PhasedMethod, Problem
from unsharp.models import MODELS
from unsharp.phases import Phase
from unsharp.recipes.paper import REPRODUCTIONS, Asked, Where
from unsharp.registry import Registry, summary
from unsharp.sharpness import RULES, Rule
from unsharp.training import TrainConfig
from unsharp.tuning.search import declared

HERE = Path(__file__).resolve().parent
PAGES = (HERE.parent / "README.md", HERE.parent / "CONTRIBUTING.md", *sorted(HERE.rglob("*.md")))
BLOCK = re.compile(r"<!-- generated: ([^\n]+?) -->\n.*?<!-- end -->", re.DOTALL)
COMPARED = ("none", "sam")
DIRECTIONS = {"higher": "higher is better", "lower": "lower is better", "to_reference": "near the retrained model's"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells in which no star and no bar is markup."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(re.sub(r"[|*]", r"\\\g<0>", cell) for cell in line) + " |" for line in lines)


def described(cls: type, field: str) -> str:
    """What the docstring of a class, or of one above it, says of a parameter."""
    for base in cls.__mro__:
        found = re.search(rf"^ +{field}: (.+?)(?=^ +\w+: |^ *$|\Z)", base.__doc__ or "", re.MULTILINE | re.DOTALL)
        if found:
            return " ".join(found[1].split())
    raise SystemExit(f"{cls.__name__} does not say what {field} is")


# --- registered things ------------------------------------------------------------------------------------------------


def methods() -> str:
    """Every method in a line."""
    rows = [[f"[`{n}`]({n}.md)", summary(c), c.formula, f"`{c.default_rule}`"] for n, c in METHODS.items()]
    return table(["method", "what it does", "loss", "default rule"], rows)


def methods_by_rules() -> str:
    """Which method works under which rule."""
    head = ["method", *(f"`{rule}`" for rule in RULES)]
    rows = [[f"`{n}`", *("yes" if c.admits(rule)[0] else "no" for rule in RULES)] for n, c in METHODS.items()]
    why: dict[tuple[str, str], list[str]] = {}
    others = [f"`{rule}`" for rule in RULES if rule != "none"]
    for n, c in METHODS.items():
        for rule in RULES:
            admitted, reason = c.admits(rule)
            if not admitted:
                why.setdefault((n, reason), []).append(f"`{rule}`")
    refused = [
        f"- `{n}` under {'every rule but `none`' if under == others else ', '.join(under)}: {reason}."
        for (n, reason), under in why.items()
    ]
    return "\n\n".join([table(head, rows), "\n".join(refused)])


def methods_compared() -> str:
    """What each method reads, moves and costs, read from its phases on a small problem."""
    head = ["method", "reads", "phases", "optimiser states", "moves", *(f"passes, `{r}`" for r in COMPARED), "source"]
    return table(head, [[f"[`{n}`]({n}.md)", *compared(c), c.source] for n, c in METHODS.items()])


def compared(cls: type[Method]) -> list[str]:
    """The cells of a method between its name and its source."""
    if not issubclass(cls, PhasedMethod):
        return ["—", "none: a procedure of its own", "—", "—", *("—" for _ in COMPARED)]
    rule = next(r for r in (cls.default_rule, *COMPARED) if cls.admits(r)[0])
    phases = phases_on_a_small_problem(cls, rule)
    turns = sorted({phase.turn for phase in phases})
    reads = dict.fromkeys(s for phase in phases for s in phase.streams)
    masked = any(phase.region is not None for phase in phases)
    passes = [
        ", then ".join(
            f"{sum(p.passes for p in phases_on_a_small_problem(cls, r) if p.turn == turn):g}" for turn in turns
        )
        if cls.admits(r)[0]
        else "—"
        for r in COMPARED
    ]
    how = "one" if len(phases) == 1 else f"{len(phases)} {'in turn' if len(turns) > 1 else 'together'}"
    states = "one per phase" if cls.separate_states else "one"
    return [", ".join(reads), how, states, "a part of the weights" if masked else "all weights", *passes]


def phases_on_a_small_problem(cls: type[PhasedMethod], rule: str) -> list[Phase]:
    """The method's phases, with its defaults, for a small network and twelve images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 1), dtype=np.uint8)
    samples = ImageSamples(images, np.arange(12) % 3)
    problem = Problem(model=model, samples=samples, forget=np.arange(4), retain=np.arange(4, 12), rule=RULES[rule]())
    return cls().phases(problem)


def tunable() -> str:
    """What `unsharp tune` searches of each method, where nothing is given."""
    rows = []
    for name, method in METHODS.items():
        values = [f"`{setting}` {', '.join(map(str, v))}" for setting, v in declared(method).items()]
        rows.append([f"[`{name}`](methods/{name}.md)", "; ".join(values) or "nothing"])
    return table(["method", "searched"], rows)


def rules() -> str:
    """Every rule in a line."""
    rows = [[f"[`{n}`]({n}.md)", summary(c), c.formula, f"{c().passes:g}"] for n, c in RULES.items()]
    return table(["rule", "what it does", "gradient", "passes"], rows)


def rules_compared() -> str:
    """What each rule needs and leaves behind, by default, read from the rules."""
    head = [
        "rule",
        "off at 0 of",
        "sign",
        "perturbs",
        "BatchNorm's statistics",
        "draws noise",
        "ε of another loss",
        "source",
    ]
    return table(head, [[f"[`{n}`]({n}.md)", *traits(c), c.source] for n, c in RULES.items()])


def traits(cls: type[Rule]) -> list[str]:
    """The cells of a rule between its name and its source."""
    fields, rule = {f.name for f in dataclasses.fields(cls)}, cls()
    perturbs = get_args(get_type_hints(cls)["perturb"]) if "perturb" in fields else ()
    statistics = "at w" if rule.starts_at_weights else "at w + ε"
    if cls.final_weights is not Rule.final_weights:
        statistics = "at w, anew at the end"
    return [
        ", ".join(f"`{name}`" for name in cls.strengths if name in fields) or "—",
        "min, max" if "sign" in fields else "—",
        ", ".join(perturbs) or "—",
        statistics if rule.pieces == 1 else f"{statistics}, of each micro-batch",
        "yes" if cls.draws else "—",
        "yes" if cls.perturbs_by_another and perturbs else "—",
    ]


def about(kind: str, name: str) -> str:
    """Formula, source, and parameters of a method or a rule."""
    cls: Any = {"method": METHODS, "rule": RULES}[kind][name]
    own = inspect.get_annotations(cls)  # what the class is about stands first, what it shares with others after it
    fields = sorted(dataclasses.fields(cls), key=lambda f: f.name not in own)
    rows = [[f"`{f.name}`", f"`--{option(f.name)}`", f"`{f.default!r}`", described(cls, f.name)] for f in fields]
    parts = [f"    {part.strip()}" for part in cls.formula.split(";  ")]
    text = ["\n".join(parts), f"Source: {cls.source}."]
    text.append(table(["parameter", "option", "default", "meaning"], rows) if rows else "It has no parameters.")
    return "\n\n".join(text)


def objectives() -> str:
    """Every objective of language unlearning in a line."""
    rows = [[f"`{n}`", summary(c), c.formula, c.source] for n, c in OBJECTIVES.items()]
    return table(["objective", "what it does", "loss", "source"], rows)


def objective_parameters() -> str:
    """The parameters of the objectives."""
    rows = [
        [f"`{n}`", f"`--{option(f.name)}`", f"`{f.default!r}`", described(c, f.name)]
        for n, c in OBJECTIVES.items()
        for f in dataclasses.fields(c)
    ]
    return table(["objective", "option", "default", "meaning"], rows)


def proxies() -> str:
    """Every proxy of memorization in a line."""
    rows = [[f"[`{n}`]({n}.md)", summary(c), c.formula] for n, c in PROXIES.items()]
    return table(["proxy", "what it is", "score"], rows)


def proxies_compared() -> str:
    """What each proxy needs and costs, with its defaults and the default training."""
    train = TrainConfig()
    rows = []
    for name, cls in PROXIES.items():
        given = "—" if cls.needs == "recipe" else f"{cls().cost(None).passes:.3g}"
        cost = None if cls.needs == "model" else cls().cost(train)
        trained = ["—", "—"] if cost is None else [str(cost.networks), f"{cost.passes:.3g}"]
        hard = "high" if cls.higher_is_harder else "low"
        rows.append([f"[`{name}`]({name}.md)", hard, "yes" if cls.unit_scale else "no", given, *trained])
    head = ["proxy", "hard is", "0.5 is a middle", "passes, given network", "networks trained"]
    return table([*head, f"passes, {train.epochs} epochs"], rows)


def about_proxy(name: str) -> str:
    """Formula, direction, source and parameters of a proxy."""
    cls = PROXIES[name]
    hard = "Higher is harder." if cls.higher_is_harder else "Lower is harder."
    rows = [[f"`{f.name}`", f"`{f.default!r}`", described(cls, f.name)] for f in dataclasses.fields(cls)]
    parts = [f"    {part.strip()}" for part in cls.formula.split(";  ")]
    text = ["\n".join(parts), f"{hard} Source: {cls.source}."]
    text.append(table(["parameter", "default", "meaning"], rows) if rows else "It has no parameters.")
    return "\n\n".join(text)


def metrics() -> str:
    """Every metric in a line, with the page that explains it."""
    rows = [[f"[`{n}`]({metric_page(n)})", m.title, DIRECTIONS[m.direction], m.ideal] for n, m in METRICS.items()]
    return table(["metric", "title", "better", "ideal"], rows)


def metric_page(name: str) -> str:
    """The page with a block about this metric."""
    for path in sorted((HERE / "metrics").glob("*.md")):
        blocks = re.findall(r"<!-- generated: about_metrics (.*?) -->", path.read_text(encoding="utf-8"))
        if name in " ".join(blocks).split():
            return path.name
    raise SystemExit(f"no page in docs/metrics has a block `<!-- generated: about_metrics {name} -->`")


def about_metrics(*names: str) -> str:
    """What the metric objects say of themselves."""
    chosen = [METRICS[name] for name in names]
    rows = [[f"`{m.name}`", m.formula, m.unit, DIRECTIONS[m.direction], m.ideal] for m in chosen]
    sources = "; ".join(dict.fromkeys(m.source for m in chosen))
    return table(["key", "formula", "unit", "better", "ideal"], rows) + f"\n\nSource: {sources}."


def data() -> str:
    """Every data source in a line."""
    return table(["`--data`", "what it is"], [[f"`{n}`", summary(f)] for n, f in SOURCES.items()])


def selections() -> str:
    """Every selection of weights in a line, with what it costs by default."""
    rows = []
    for name, selection in SELECTIONS.items():
        passes = selection.passes(1, Choice(select=name), nn.Linear(1, 1))
        samples = {"forget": "forget", "training": "training set", "": "—"}[selection.reads]
        over = " over at most `score_samples`" if selection.capped else " over them all"
        cost = f"{passes}{over}" if passes else "0"
        rows.append([f"`{name}`", summary(selection), selection.formula, samples, cost, selection.source])
    return table(["selection", "what it marks", "by", "looks at", "passes, by default", "source"], rows)


def models() -> str:
    """Every network in a line."""
    return table(["`--arch`", "what it is"], [[f"`{n}`", summary(f)] for n, f in MODELS.items()])


def reproductions() -> str:
    """Every table and figure of the paper, and how much it takes at the sizes small and paper."""
    rows = []
    for name, what in REPRODUCTIONS.items():
        claims = ", ".join(dict.fromkeys(one.claim for one in what.claims)) or "—"
        rows.append([f"`{name}`", what.title, what.shows, claims, *map(str, _extent(name))])
    return table(["name", "what", "what the paper shows with it", "claims", "networks", "cells"], rows)


def _extent(name: str) -> tuple[int, int]:
    """Networks and cells of a reproduction at the size paper."""
    asked = Asked(name=name, size="paper", where=Where(out=Path("runs"), scores="scores.npz"))
    posed, what = asked.problem(), asked.what
    trained = len(what.pretraining) * len(posed.seeds)
    return trained * (1 + len(posed.forget)), trained * len(posed.forget) * len(what.compared)


def names() -> str:
    """Every public name in a line."""

    def line(obj: Any) -> str:
        return f"Every registered {obj.kind}, by name." if isinstance(obj, Registry) else summary(obj)

    return table(["name", "what it is"], [[f"`unsharp.{n}`", line(getattr(unsharp, n))] for n in unsharp.__all__])


# --- the command line -------------------------------------------------------------------------------------------------


def option(field: str) -> str:
    """A field as it is called on the command line, without the dashes."""
    return field.replace("_", "-")


def texts() -> dict[str, str]:
    """What stands under the fields of the classes of options, by `Class.field`."""
    found: dict[str, str] = {}
    commands = dict.fromkeys(command.__module__ for command in cli.COMMANDS.values())
    for module in (options, *(sys.modules[name] for name in commands)):
        classes = (node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef))
        for cls in classes:
            for field, text in itertools.pairwise(cls.body):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    found[f"{cls.name}.{ast.unparse(field.target)}"] = " ".join(ast.literal_eval(text.value).split())
    return found


def meaning(cls: type, field: str) -> str:
    """What the help says of an option."""
    for extra in getattr(get_type_hints(cls, include_extras=True)[field], "__metadata__", ()):
        if getattr(extra, "help", None):
            return f"{extra.help} {extra.help_behavior_hint or ''}".strip()
    known = texts()
    return next(known[name] for base in cls.__mro__ if (name := f"{base.__name__}.{field}") in known)


def options_of(command: str) -> set[str]:
    """The options of a command, with their dashes."""
    cls = cli.COMMANDS[command]
    return {f"--{option(f.name)}" for f in dataclasses.fields(cls) if not positional(cls, f.name)} | {"--help"}


def positional(cls: type, field: str) -> bool:
    """Whether a field is given by its place, without a name."""
    return any("Positional" in str(inspect.get_annotations(base).get(field)) for base in cls.__mro__)


def group(name: str) -> str:
    """The options that commands share."""
    cls = getattr(options, name)
    return table(
        ["option", "meaning"], [[f"`--{option(f.name)}`", meaning(cls, f.name)] for f in dataclasses.fields(cls)]
    )


def command(name: str) -> str:
    """A command's own options, and the groups it shares with others."""
    cls = cli.COMMANDS[name]
    own = [field for field in cls.__annotations__ if field != "run"]
    rows = [[f"`{f.upper()}`" if positional(cls, f) else f"`--{option(f)}`", meaning(cls, f)] for f in own]
    shared = [f"[{b.__name__}](#{b.__name__.lower()}-options)" for b in cls.__bases__ if b is not object]
    return table(["option", "meaning"], rows) + (f"\n\nAnd the options of {', '.join(shared)}." if shared else "")


BLOCKS: dict[str, Callable[..., str]] = {
    f.__name__: f
    for f in (
        methods,
        tunable,
        methods_compared,
        methods_by_rules,
        rules,
        rules_compared,
        about,
        objectives,
        objective_parameters,
        proxies,
        proxies_compared,
        about_proxy,
        metrics,
        about_metrics,
        data,
        models,
        reproductions,
        selections,
        names,
        group,
        command,
    )
}


def generated(text: str) -> str:
    """A page's text with every block up to date."""

    def fill(found: re.Match[str]) -> str:
        name, *arguments = found[1].split()
        return f"<!-- generated: {found[1]} -->\n\n{BLOCKS[name](*arguments)}\n\n<!-- end -->"

    return BLOCK.sub(fill, text)


def stale() -> list[Path]:
    """The pages that are not up to date."""
    return [page for page in PAGES if generated(text := page.read_text(encoding="utf-8")) != text]


def main() -> int:
    """Check or write. Returns the exit code."""
    pages = stale()
    for page in pages:
        print(f"{'not up to date' if '--check' in sys.argv else 'wrote'}: {page.relative_to(HERE.parent)}")
        if "--check" not in sys.argv:
            page.write_text(generated(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 1 if pages and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
