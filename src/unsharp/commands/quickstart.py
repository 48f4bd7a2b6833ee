"""The command that shows the whole job in a minute."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from unsharp.commands.shared import Answer, open_in_browser, setting
from unsharp.options import Common, Count


@dataclass(kw_only=True)
class Quickstart(Common):
    """Train, unlearn by several methods, retrain, evaluate, and open one report: the whole job in a minute."""

    out: str = "runs/quickstart"
    """Directory of the runs and the report."""
    seeds: int = 3
    """Number of seeds."""
    tiny: bool = False
    """One seed, two epochs: only to see that everything works."""
    workers: Count = None
    """Processes at a time; as many as there are processors, up to three, if left out."""
    no_open: bool = False
    """Do not open the report in a browser."""

    def run(self) -> Answer:
        from unsharp.recipes import quickstart

        with setting(self) as at:
            result = quickstart.run(
                self.out, at, seeds=1 if self.tiny else self.seeds, tiny=self.tiny, workers=self.workers
            )
        print(result.text, file=sys.stderr if self.json else sys.stdout)
        open_in_browser(result.report, self.no_open or self.json)
        return {"report": str(result.report), "out": self.out, "rows": result.rows}
