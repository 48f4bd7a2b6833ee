"""The command that runs a whole grid of methods, rules, forget sets and seeds."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from unsharp import config
from unsharp.commands.shared import console, say
from unsharp.errors import UserError
from unsharp.options import Count, Number, Text

AGAIN = "call again: cells whose process died are tried in any case, the others with --retry-failed"


@dataclass(kw_only=True)
class Sweep:
    """Run every method × rule × setting × forget set × seed of a grid, and write its tables and one report."""

    grid: tyro.conf.Positional[str]
    """TOML file of the grid (docs/sweeps.md), or package.module:function that returns one."""
    out: Text = None
    """Directory of all runs and tables; runs/ and the name of the grid, if left out. What is done there is found."""
    dry_run: bool = False
    """Only say what would be done and what it would cost; nothing is written."""
    retry_failed: bool = False
    """Try cells again that ended by an error of their own; those whose process was killed are tried again anyway."""
    processes: Count = None
    """Cells at a time; as many as processors (with --threads each) or accelerators carry, if left out."""
    threads: int = 1
    """Threads of each cell; results are equal to the bit only at equal thread counts."""
    accelerators: Number = None
    """Accelerators of each cell: 0.25 lets four share one, 0 takes none; one where there are any, if left out."""
    backend: str = "local"
    """Where cells run: local (processes of this machine) or ray (a cluster)."""
    address: Text = None
    """With --backend ray: the cluster, such as HOST:PORT or auto; one is started on this machine, if left out."""
    json: bool = False
    """Print one JSON object on standard output, and everything else on standard error."""
    quiet: bool = False
    """No progress."""

    def run(self) -> dict[str, Any]:
        from unsharp.sweep import backend_from
        from unsharp.sweep.grid.run import look_ahead, run_grid

        where: dict[str, Any] = {"workers": self.processes, "threads": self.threads}
        if self.backend == "local" and self.address is None:
            where["accelerators"] = self.accelerators
        else:
            where["backend"] = backend_from(self.backend, self.address, accelerators=self.accelerators)
        out = Path(self.out or f"runs/{Path(self.grid.replace(':', '.')).stem}")
        if self.dry_run:
            if self.retry_failed:
                raise UserError("--dry-run tries nothing; leave --retry-failed out")
            return self._foresee(look_ahead(self.grid, out, **where))
        say = (lambda line: None) if self.quiet else _say
        found = run_grid(self.grid, out, **where, retry_failed=self.retry_failed, watch=self._watch(), say=say)
        return self._told(found)

    def _watch(self) -> Any:
        """A table for a person, lines for a log, nothing for who wants quiet."""
        from unsharp.sweep.grid.live import LineWatch, TableWatch, Watch

        if self.quiet:
            return Watch()
        return TableWatch(console) if sys.stderr.isatty() else LineWatch(_say)

    def _foresee(self, outlook: dict[str, Any]) -> dict[str, Any]:
        if not self.json:
            from rich.console import Console

            from unsharp.sweep.grid.live import variants_table

            Console().print(variants_table(outlook["variants"]))
            print("\n".join(outlook["lines"]))
        return outlook

    def _told(self, found: Any) -> dict[str, Any]:
        from rich.console import Console

        from unsharp.sweep.grid.live import effects_table, summary_table

        if not self.json:
            console = Console()
            console.print(summary_table(found.grid, found.summary))
            if found.effects:
                console.print(effects_table(found.grid, found.effects))
            print(f"wrote into {found.out}: {', '.join(file.name for file in found.files)}")
        answer = {"out": str(found.out), "cells": len(found.rows), "failed": found.n_failed}
        answer |= {"summary": found.summary, "effects": found.effects, "failures": found.failures}
        answer["files"] = [str(file) for file in found.files]
        if found.failures:
            print(f"{found.failures}\n{AGAIN}", file=sys.stderr)
            if self.json:
                print(json.dumps(config.to_dict(answer), allow_nan=False))
            raise SystemExit(1)
        return answer


def _say(line: str) -> None:

    say(line)
