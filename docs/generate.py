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
from typing import Any, get_type_hints

import unsharp
from unsharp import cli, options
from unsharp.data import SOURCES
from unsharp.evaluation import METRICS
from unsharp.methods import METHODS
from unsharp.models import MODELS
from unsharp.registry import Registry, summary
from unsharp.sharpness import RULES

HERE = Path(__file__).resolve().parent
PAGES = (HERE.parent / "README.md", HERE.parent / "CONTRIBUTING.md", *sorted(HERE.rglob("*.md")))
BLOCK = re.compile(r"<!-- generated: ([^\n]+?) -->\n.*?<!-- end -->", re.DOTALL)
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
    refused = [f"`{n}` under `{r}`: {c.admits(r)[1]}." for n, c in METHODS.items() for r in RULES if not c.admits(r)[0]]
    return "\n\n".join([table(head, rows), *refused])


def rules() -> str:
    """Every rule in a line."""
    rows = [[f"[`{n}`]({n}.md)", summary(c), c.formula, str(c().passes)] for n, c in RULES.items()]
    return table(["rule", "what it does", "gradient", "passes"], rows)


def about(kind: str, name: str) -> str:
    """Formula, source, and parameters of a method or a rule."""
    cls: Any = {"method": METHODS, "rule": RULES}[kind][name]
    fields = dataclasses.fields(cls)
    rows = [[f"`{f.name}`", f"`--{option(f.name)}`", f"`{f.default!r}`", described(cls, f.name)] for f in fields]
    parts = [f"    {part.strip()}" for part in cls.formula.split(";  ")]
    text = ["\n".join(parts), f"Source: {cls.source}."]
    text.append(table(["parameter", "option", "default", "meaning"], rows) if rows else "It has no parameters.")
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


def models() -> str:
    """Every network in a line."""
    return table(["`--arch`", "what it is"], [[f"`{n}`", summary(f)] for n, f in MODELS.items()])


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
    for module in (cli, options):
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
    for f in (methods, methods_by_rules, rules, about, metrics, about_metrics, data, models, names, group, command)
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
