"""Loss surfaces of networks before and after unlearning, with the paper's figures of flatness."""

from __future__ import annotations

from pathlib import Path

from unsharp import runtime
from unsharp.artifacts import Workspace
from unsharp.recipes.paper.base import Beyond, Claim, Figure, Reproduction, register
from unsharp.recipes.paper.problems import Size
from unsharp.recipes.paper.variants import RULES, TOW, method, sharp_minmax
from unsharp.surroundings.findings import UNLEARNED, Findings
from unsharp.surroundings.measure import Surroundings
from unsharp.surroundings.stage import VALUES_FILE, look_around

HERE = "unsharp.recipes.paper.landscape"
SETS = ("forget", "test")
PICTURE = "landscape/surface-forget.svg"
POINTS: dict[Size, int] = {"smoke": 3, "small": 11, "paper": 25}
SAMPLES: dict[Size, int] = {"smoke": 25, "small": 250, "paper": 1000}
READ = ("standard_deviation", "mean_gradient", "basin_ratio")


def look(run: str, original: str, store: str, size: Size, seed: int, workspace: Workspace) -> dict[str, float | None]:
    """Cell: the surfaces around one network that forgot, the original and the retrained one."""
    from unsharp.stages import Setting

    how = Surroundings(
        parts=("surface",), on=SETS, points=POINTS[size], n_samples=SAMPLES[size], normalise="tensor", seed=seed
    )
    at = Setting(device=runtime.pick_device(None), store=Path(store), wait=True)
    found = look_around(run, how, workspace.file("landscape"), at, original=original)
    values = Findings(found.json(VALUES_FILE))
    shown = {on: values.headlines(on) for on in SETS}
    return {
        f"{on}.{network}.{name}": shown[on][name][network]
        for on in SETS
        for network in values.values["networks"]
        for name in READ
    }


def _figure(network: str, on: str, name: str, title: str) -> Figure:
    return Figure(title=title, column=f"{on}.{network}.{name}", better="lower", digits=3)


NAMES = ("NegGrad",)

register(
    "landscape",
    Reproduction(
        title="The loss surface before and after unlearning",
        shows="Networks are said to lie flatter under SAM, and those of SGD to become flatter by unlearning (C5).",
        figures=(
            TOW,
            _figure("original", "test", "standard_deviation", "deviation on test, original"),
            _figure(UNLEARNED, "test", "standard_deviation", "deviation on test, unlearned"),
            _figure(UNLEARNED, "test", "mean_gradient", "mean gradient on test, unlearned"),
            _figure("original", "forget", "standard_deviation", "deviation on forget, original"),
            _figure(UNLEARNED, "forget", "standard_deviation", "deviation on forget, unlearned"),
        ),
        compared=(*(method(name, rule) for name in NAMES for rule in RULES), sharp_minmax()),
        pretraining=RULES,
        claims=tuple(
            Claim(
                claim="C5",
                says=f"NegGrad ends in a flatter place of the test loss under {rule} than under SGD",
                better={"variant": f"NegGrad, {rule}"},
                worse={"variant": "NegGrad"},
                figure=f"test.{UNLEARNED}.standard_deviation",
            )
            for rule in RULES
            if rule != "SGD"
        ),
        unknown=("Which networks the paper's surfaces belong to; one seed is shown there.",),
        beyond=Beyond(function=f"{HERE}:look", picture=PICTURE),
    ),
)
