"""The command that runs a whole grid of methods, rules, forget sets and seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from unsharp.commands.shared import ended, foreseen, teller_of, watch_of, where_of
from unsharp.options import Cells, Text


@dataclass(kw_only=True)
class Sweep(Cells):
    """Run every method × rule × setting × forget set × seed of a grid, and write its tables and one report."""

    grid: tyro.conf.Positional[str]
    """TOML file of the grid (docs/sweeps.md), or package.module:function that returns one."""
    out: Text = None
    """Directory of all runs and tables; runs/ and the name of the grid, if left out. What is done there is found."""

    def run(self) -> dict[str, Any]:
        from unsharp.sweep.grid.run import look_ahead, run_grid

        where = where_of(self)
        out = Path(self.out or f"runs/{Path(self.grid.replace(':', '.')).stem}")
        if self.dry_run:
            return foreseen(self, look_ahead(self.grid, out, **where))
        found = run_grid(
            self.grid, out, **where, retry_failed=self.retry_failed, watch=watch_of(self), say=teller_of(self)
        )
        return self._told(found)

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
        return ended(self, answer | {"files": [str(file) for file in found.files]})
