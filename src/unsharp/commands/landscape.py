"""The command that measures what lies around an unlearned network's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tyro

from unsharp.commands.shared import read_train_config, setting
from unsharp.options import Around, Common, Data, Text

TITLES = {
    "sam_rise": "worst rise, SAM",
    "asam_rise": "worst rise, ASAM",
    "average_rise": "average rise",
    "largest_eigenvalue": "largest eigenvalue",
    "trace": "trace",
    "standard_deviation": "surface, deviation",
    "mean_gradient": "surface, gradient",
    "basin_ratio": "surface, basin",
}


@dataclass(kw_only=True)
class Landscape(Common, Data, Around):  # pyright: ignore[reportGeneralTypeIssues]
    """Measure sharpness, curvature, loss surface and ways around an unlearned network, beside the retrained one."""

    run_dir: tyro.conf.Positional[str]
    """Directory of an `unlearn` run."""
    out: Text = None
    """Run directory; named by content under runs/ if left out."""
    original: Text = None
    """Checkpoint before unlearning, to show it beside; the ways start from it."""
    train_config: Text = None
    """JSON file that says how the network was trained, for a checkpoint that does not know."""

    def run(self) -> dict[str, Any]:
        from unsharp.surroundings.findings import Findings
        from unsharp.surroundings.stage import VALUES_FILE, look_around

        how = self.surroundings()
        with setting(self) as at:
            run = look_around(
                self.run_dir,
                how,
                self.out,
                at,
                original=self.original,
                data_config=self.data_config(),
                train_config=read_train_config(self.train_config),
            )
        values = run.json(VALUES_FILE)
        if not self.json:
            _show(Findings(values))
            print(f"next: unsharp report {run.path}")
        return {"run": str(run.path), "stage": run.stage, "reused": run.reused} | values


def _show(found: Any) -> None:
    """The figures that are told in a line, and barriers and distances, for a person."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    for on in found.values["sets"]:
        rows = found.headlines(on)
        if rows:
            table = Table("", *found.values["networks"], title=f"on the {on} samples")
            for name, of in rows.items():
                table.add_row(TITLES[name], *(_number(of[network]) for network in found.values["networks"]))
            console.print(table)
    for name, way in found.values.get("connectivity", {}).items():
        heights = [f"{on} {_number(way[on]['loss_barrier']['height'])}" for on in found.values["sets"]]
        console.print(f"{name}: barrier in the loss {', '.join(heights)}")
    for name, of in found.values.get("distance", {}).items():
        weights = f"weights {_number(of['weights']['relative'])} of the first's length apart"
        alike = [f"{on} {_number(_cka(of[on]))}" for on in found.values["sets"]]
        console.print(f"{name}: {weights}; features alike (debiased CKA) {', '.join(alike)}")


def _cka(row: Any) -> float | None:
    return None if row is None or row["features"] is None else row["features"]["debiased"]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
