"""What is answered from the index of a directory alone, without torch: `list runs` and `report DIR`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unsharp.artifacts import write_text
from unsharp.errors import UserError
from unsharp.index import FIGURES, Index, read_index
from unsharp.seal import RUN_FILE

SHOWN = ("path", "stage", "seed", *FIGURES)
RUNS, TITLE, OUT = "runs", "Runs", "report.html"
TABLES = (".csv", ".json", ".md", ".parquet", ".tex")


def quick(arguments: Sequence[str]) -> int | None:
    """Do a command that the index answers, and return its exit code; None where it is another command."""
    command = _parsed(arguments)
    if command is None:
        return None
    try:
        answer = command()
    except UserError as error:
        print(f"unsharp: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if "--json" in arguments:
        print(json.dumps(answer, allow_nan=False))
    return 0


def holds_runs(path: str | Path) -> bool:
    """Whether a path is a directory that is no run itself, so that a report of it is one of all runs in it."""
    return Path(path).is_dir() and not (Path(path) / RUN_FILE).is_file()


def list_runs(root: str | Path, *, show: bool = True) -> dict[str, Any]:
    """All runs below a directory, a line each."""
    index = read_index(root)
    rows = [_row(path, run) for path, run in sorted(index.runs.items())]
    if show:
        print("\n".join(_columns([list(SHOWN), *([_text(row[name]) for name in SHOWN] for row in rows)])))
    return {"runs": rows}


def report_all(
    root: str | Path,
    out: str | Path,
    *,
    title: str = TITLE,
    tables: Sequence[str] = (),
    pdf: str | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """One page about all evaluated runs below a directory, as PDF besides, and its rows as files."""
    from unsharp.report.overview import records, render
    from unsharp.report.pdf import check_pdf, write_pdf

    if pdf is not None:
        check_pdf()

    for file in tables:
        if Path(file).suffix.lower() not in TABLES:
            raise UserError(f"table file {file} of a whole directory must end in one of {', '.join(TABLES)}")
    index = read_index(root)
    if not index.groups:
        raise UserError(f"{root} holds no evaluated run; give directories that `unsharp evaluate` or `forget` wrote")
    page = render(index, title=title)
    write_text(out, page)
    if pdf is not None:
        write_pdf(pdf, page)
    rows = records(index) if tables else []
    for file in tables:
        _write(Path(file), rows)
    if show:
        print(f"{len(index.groups):,} groups of {_evaluated(index):,} evaluated networks: {out}")
    answer = {"report": str(out), "runs": _evaluated(index), "groups": len(index.groups), "tables": list(tables)}
    return answer | {"pdf": pdf}


def _evaluated(index: Index) -> int:
    return sum("group" in run for run in index.runs.values())


def _row(path: str, run: dict[str, Any]) -> dict[str, Any]:
    figures = run.get("figures", {})
    about = {"path": path, "stage": run["stage"], "finished": run["finished"], "seed": run.get("seed")}
    return about | {name: figures.get(name) for name in FIGURES}


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    from unsharp.report.overview import to_latex, to_markdown

    ending = path.suffix.lower()
    texts = {".json": lambda: json.dumps(rows, indent=2, allow_nan=False) + "\n"}
    texts |= {".md": lambda: to_markdown(rows), ".tex": lambda: to_latex(rows)}
    if ending in texts:
        write_text(path, texts[ending]())
        return
    import pandas as pd

    from unsharp.artifacts import atomic, writing

    frame = pd.DataFrame(rows)
    with writing(path, "--table"), atomic(path) as temporary:
        if ending == ".csv":
            frame.to_csv(temporary, index=False)
        else:
            frame.to_parquet(temporary, index=False)


def _parsed(arguments: Sequence[str]) -> Any:
    """The call that arguments ask for; None where they are not just those of a quick command."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--json", action="store_true")
    if arguments[:2] == ["list", RUNS]:
        parser.add_argument("where", nargs="?", default="runs")
    elif arguments[:1] == ["report"]:
        parser.add_argument("where")
        parser.add_argument("--out", default=OUT)
        parser.add_argument("--title", default=TITLE)
        parser.add_argument("--table", nargs="+", default=[])
        parser.add_argument("--pdf")
    else:
        return None
    rest = arguments[2:] if arguments[0] == "list" else arguments[1:]
    try:
        given, unknown = parser.parse_known_args(list(rest))
    except (argparse.ArgumentError, SystemExit):
        return None
    if unknown:
        return None
    if arguments[0] == "list":
        return lambda: list_runs(given.where, show=not given.json)
    if not holds_runs(given.where):
        return None
    return lambda: report_all(
        given.where, given.out, title=given.title, tables=given.table, pdf=given.pdf, show=not given.json
    )
