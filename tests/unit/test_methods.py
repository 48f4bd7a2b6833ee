"""What methods prepare before the engine runs them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from unsharp import masks, unlearning
from unsharp.artifacts import Workspace
from unsharp.data import TensorSamples
from unsharp.errors import UserError
from unsharp.methods import METHODS, Problem
from unsharp.phases import FORGET, RETAIN
from unsharp.sharpness import NO_RULE, AdaptiveSharpness, Sharpness


def problem(workspace: Workspace | None = None, n_in: int = 6) -> Problem:
    torch.manual_seed(0)
    samples = TensorSamples(torch.randn(20, n_in), torch.arange(20) % 3)
    model = nn.Sequential(nn.Linear(n_in, 5), nn.Tanh(), nn.Linear(5, 3))
    rule = AdaptiveSharpness(rho=0.3)
    return Problem(
        model=model, samples=samples, forget=np.arange(4), retain=np.arange(4, 20), rule=rule, workspace=workspace
    )


def test_the_two_parts_of_sharp_minmax_share_out_the_weights() -> None:
    solved = problem()
    retain, forget = METHODS["sharp_minmax"](fraction=0.2, rho_forget=0.7).phases(solved)
    n = sum(p.numel() for p in solved.model.parameters())
    assert retain.region is not None
    assert forget.region is not None
    assert sum(int(m.sum()) for m in forget.region.values()) == round(0.2 * n)
    assert all(torch.equal(retain.region[name], ~m) for name, m in forget.region.items())
    assert (retain.rule, forget.rule) == (AdaptiveSharpness(rho=0.3), AdaptiveSharpness(rho=0.7, sign="max"))
    assert retain.objective.streams == (RETAIN,)
    assert forget.objective.streams == (FORGET,)


def test_a_killed_run_goes_on_with_its_own_mask(tmp_path: Path) -> None:
    method = METHODS["sharp_minmax"](fraction=0.2)
    first = method.phases(problem(Workspace(tmp_path)))[1].region
    assert first is not None
    turned = {name: torch.roll(m, 1, -1) for name, m in first.items()}  # as if the device had summed otherwise
    masks.save(turned, tmp_path / masks.FILE)
    again = method.phases(problem(Workspace(tmp_path)))[1].region
    assert again is not None
    assert all(torch.equal(again[name], m) for name, m in turned.items())


def test_a_part_without_weights_is_refused() -> None:
    with pytest.raises(UserError, match="leaves a part empty of weights"):
        METHODS["sharp_minmax"](fraction=0.001).phases(problem())


def test_a_radius_needs_a_rule_that_has_one() -> None:
    with pytest.raises(UserError, match="rho_retain"):
        METHODS["sharp_minmax"](rho_retain=0.1).phases(dataclasses.replace(problem(), rule=NO_RULE))
    assert Sharpness(rho=0.1).turned().turned() == Sharpness(rho=0.1)


APART = {"phase_steps": "separate"}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("sharp_minmax", {"optimizer": "adamw"}),
        ("sharp_minmax", {"optimizer": "adamw", "select": "all"}),
        ("sharp_minmax", {"optimizer": "adamw", "select": "all"} | APART),
        ("sharp_minmax", {"optimizer": "rmsprop", "phase_lr": {FORGET: 0.02}}),
        ("sharp_minmax", {"optimizer": "sgd"} | APART),
        ("neggrad", {"optimizer": "adamw"}),
        ("neggrad", {"optimizer": "adamw"} | APART),
        ("neggrad", {"optimizer": "adamw", "sharpness_on": "retain"}),
        ("neggrad", {"optimizer": "adamw", "sharpness_on": "retain"} | APART),
        ("neggrad", {"optimizer": "adamw", "sharpness_on": "separate", "phase_schedule": {FORGET: "linear"}}),
        ("neggrad", {"optimizer": "sgd", "sharpness_on": "separate"} | APART),
    ],
)
def test_a_run_says_where_the_optimiser_makes_alpha_void(method: str, settings: dict[str, Any]) -> None:
    asked, found, said = problem(), [], []
    start = nn.utils.parameters_to_vector(asked.model.parameters()).detach()
    for alpha in (0.95, 0.5):
        how = unlearning.configure(
            method, rule="sam", rho=0.1, alpha=alpha, lr=0.01, epochs=3, batch_size=8, weight_decay=0.0, **settings
        )
        lines: list[str] = []
        run = unlearning.run(asked.model, asked.samples, asked.forget, asked.retain, how, say=lines.append)
        found.append(nn.utils.parameters_to_vector(run[0].parameters()).detach())
        said.append([line for line in run[1].about.get("warnings", []) if "next to no effect" in line])
        assert [line for line in lines if "effect" in line] == [f"warning: {line}" for line in said[-1]]
    void = float((found[0] - found[1]).abs().max()) < 1e-3 * float((found[0] - start).abs().max())
    assert [len(lines) for lines in said] == [void, void]
