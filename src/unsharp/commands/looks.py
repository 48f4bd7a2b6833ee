"""The commands that only look: what there is, what a run holds, what the machine offers."""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from rich.console import Console

from unsharp.commands.shared import Answer, store_of


@dataclass(kw_only=True)
class List:
    """List what is registered (methods, rules, selections, metrics, data, models, ...), or the runs in a folder."""

    what: tyro.conf.Positional[str] = "methods"
    """methods, rules, selections, metrics, data, models, proxies, objectives (of language models) or runs."""
    where: tyro.conf.Positional[str] = "runs"
    """With runs: the directory that holds them."""
    json: bool = False
    """Print one JSON object on standard output."""

    def run(self) -> Answer:
        from unsharp.commands.index import list_runs
        from unsharp.listing import listing

        if self.what == "runs":
            return list_runs(self.where, show=not self.json)
        rows = listing(self.what)
        if not self.json:
            from rich.table import Table

            shown = [name for name in rows[0] if name not in ("source", "ideal")]
            table = Table(*shown, title=self.what)
            for row in rows:
                table.add_row(*(row[name] for name in shown))
            Console().print(table)
        return {self.what: rows}


@dataclass(kw_only=True)
class Show:
    """Show a run: what it is, its configuration and its figures."""

    run_dir: tyro.conf.Positional[str]
    """Directory of a run."""
    json: bool = False
    """Print one JSON object on standard output."""

    def run(self) -> Answer:
        from unsharp.artifacts import open_run

        run = open_run(self.run_dir)
        files = sorted(p.name for p in run.path.iterdir())
        answer: Answer = {"run": str(run.path), "stage": run.stage, "files": files, "config": run.config}
        answer["provenance"] = run.provenance
        if "metrics.json" in files:
            answer["metrics"] = run.json("metrics.json")
        if not self.json:
            Console().print_json(data=answer)
        return answer


@dataclass(kw_only=True)
class Doctor:
    """Say what this machine offers: versions, device, stores, extras, and whether a step works."""

    json: bool = False
    """Print one JSON object on standard output."""

    def run(self) -> Answer:
        from unsharp.listing import doctor

        answer = doctor(store_of(None))
        if not self.json:
            for name, value in answer.items():
                print(f"{name:>20}  {value}")
        return answer
