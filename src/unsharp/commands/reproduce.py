"""The command that makes a table or figure of the paper anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from unsharp.commands.shared import ended, foreseen, open_in_browser, teller_of, watch_of, where_of
from unsharp.errors import UserError
from unsharp.options import Cells, Count, Text

Names = tuple[str, ...] | None


@dataclass(kw_only=True)
class Reproduce(Cells):
    """Make a table or figure of the paper anew, beside the published figures; without a name, say which there are."""

    name: tyro.conf.Positional[Text] = None
    """Name of the reproduction."""
    size: Literal["smoke", "small", "paper"] = "smoke"
    """smoke (digits, a minute), small (ten classes of the real images, hours of a processor), paper (as published)."""
    data_dir: Text = None
    """The data in the hub's layout; downloaded at the size paper, if left out."""
    scores: Text = None
    """Memorization or C-scores by which forget sets are graded, FILE[:KEY], at the sizes small and paper."""
    out: Text = None
    """Directory of all that is made; runs/NAME-SIZE, if left out. What is done there is found."""
    seeds: Count = None
    """So many seeds, from 0; those of the size, if left out."""
    forget: Names = None
    """Forget sets, by name; all, if left out."""
    only: Names = None
    """Variants, by name; all, if left out."""
    pretraining: Names = None
    """Pretrainings, by name; all, if left out."""
    no_open: bool = False
    """Do not open the page in a browser."""

    def run(self) -> dict[str, Any]:
        from unsharp.recipes.paper import REPRODUCTIONS

        if self.name is None:
            return self._listed()
        if self.name not in REPRODUCTIONS and self.name.lower().startswith(("table", "figure", "fig")):
            raise UserError(
                f"{self.name}: tables and figures are called by what they show, not by number; the main table is "
                f"methods, and there are {', '.join(REPRODUCTIONS)}"
            )
        return self._made()

    def _made(self) -> dict[str, Any]:
        from unsharp.recipes.paper import Asked, Where, outlook, reproduce

        assert self.name is not None
        out = Path(self.out or f"runs/{self.name}-{self.size}").absolute()
        asked = Asked(
            name=self.name,
            size=self.size,
            where=Where(out=out, data_dir=self.data_dir, scores=self.scores),
            seeds=self.seeds,
            forget=self.forget,
            only=self.only,
            pretraining=self.pretraining,
        )
        if self.dry_run:
            return {part: foreseen(self, found) for part, found in outlook(asked, **where_of(self)).items()}
        made = reproduce(
            asked, **where_of(self), retry_failed=self.retry_failed, watch=lambda: watch_of(self), say=teller_of(self)
        )
        return self._told(made)

    def _told(self, made: Any) -> dict[str, Any]:
        from rich.console import Console
        from rich.table import Table

        from unsharp.recipes.paper.page import decide

        decided = decide(made.asked.what, made.rows)
        page = made.files[0]
        if not self.json:
            table = Table("claim", "what it says", "verdict")
            for one in decided:
                table.add_row(one.claim.claim, one.claim.says, one.verdict)
            if decided:
                Console().print(table)
            print(f"page: {page}")
            open_in_browser(page, self.no_open)
        answer = {"out": str(made.swept.out), "cells": len(made.rows), "failed": made.n_failed}
        answer |= {"verdicts": [{"claim": d.claim.claim, "says": d.claim.says, "verdict": d.verdict} for d in decided]}
        answer |= {"failures": made.failures, "files": [str(file) for file in made.files]}
        return ended(self, answer)

    def _listed(self) -> dict[str, Any]:
        from rich.console import Console
        from rich.table import Table

        from unsharp.recipes.paper import REPRODUCTIONS

        if not self.json:
            table = Table("name", "what", "claims")
            for name, what in REPRODUCTIONS.items():
                claims = dict.fromkeys(one.claim for one in what.claims)
                table.add_row(name, what.title, ", ".join(claims))
            Console().print(table)
        return {
            "reproductions": [
                {"name": name, "title": what.title, "shows": what.shows} for name, what in REPRODUCTIONS.items()
            ]
        }
