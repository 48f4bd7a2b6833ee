"""What was found around some networks, as plain values, and its figures in a line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from unsharp.config import to_dict
from unsharp.evaluation.curvature import Density, Eigenvalues
from unsharp.evaluation.landscape import Surfaces

if TYPE_CHECKING:
    from unsharp.report.landscape import Course

SETS = ("retain", "forget", "test")
ORIGINAL, UNLEARNED, RETRAINED = NETWORKS = ("original", "unlearned", "retrained")
HEADLINES = {
    "sharpness": {
        "sam_rise": ("sam", "rise"),
        "asam_rise": ("asam", "rise"),
        "average_rise": ("average", "rise"),
    },
    "curvature": {
        "largest_eigenvalue": ("largest", "values", 0),
        "trace": ("trace", "value"),
    },
    "surface": {
        "standard_deviation": ("standard_deviation",),
        "mean_gradient": ("mean_gradient",),
        "basin_ratio": ("basin_ratio",),
    },
}
"""The figures of each part that are told in a line, and where in its values they stand."""


@dataclass(frozen=True, eq=False)
class Findings:
    """What was found around some networks.

    Args:
        values: All figures as plain values, as `landscape.json` holds them.
        surfaces: The loss surfaces; None where they were not asked for.
        ways: The ways from the original by name ("original to unlearned"); empty where they were not asked for.
    """

    values: dict[str, Any]
    surfaces: Surfaces | None = None
    ways: Mapping[str, Course] = field(default_factory=dict)

    def spectra(self, on: str) -> dict[str, tuple[Density, list[Eigenvalues]]]:
        """Spectral density and single eigenvalues of each network on a set, as far as they were measured."""
        found = {}
        for network, of in self.values.get("curvature", {}).items():
            row = of.get(on)
            if row is not None and row["density"] is not None:
                arrays = {name: np.array(row["density"][name], float) for name in ("nodes", "weights")}
                ends = [Eigenvalues(**row[end]) for end in ("largest", "smallest") if row[end] is not None]
                found[network] = (Density(**row["density"] | arrays), ends)
        return found

    def headlines(self, on: str) -> dict[str, dict[str, float | None]]:
        """The figures of a set that are told in a line: by figure and network."""
        return {
            name: {network: reach(self.values[part][network].get(on), where) for network in self.values[part]}
            for part, figures in HEADLINES.items()
            if part in self.values
            for name, where in figures.items()
        }


@dataclass(frozen=True, eq=False)
class KeptWay:
    """What a run keeps of a `Way`: its curves.

    Args:
        sets: Names of the sets.
        places: (T,) from 0, the first network, to 1, the second.
        loss: (sets, T) float64 mean losses, NaN where one was not finite.
        accuracy: (sets, T) float64, 0–100.
    """

    sets: tuple[str, ...]
    places: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> KeptWay:
        """From a row of `values["connectivity"]`."""
        sets = tuple(name for name in row if name not in ("places", "about"))
        loss, accuracy = (np.array([row[on][what] for on in sets], float) for what in ("loss", "accuracy"))
        return cls(sets, np.array(row["places"], float), loss, accuracy)


def gaps(found: Findings) -> dict[str, Any] | None:
    """The headline figures of the unlearned network minus those of the retrained one; None without one."""
    if RETRAINED not in found.values["networks"]:
        return None
    apart: dict[str, Any] = {}
    for on in found.values["sets"]:
        pairs = {name: (of[UNLEARNED], of[RETRAINED]) for name, of in found.headlines(on).items()}
        apart[on] = {name: None if a is None or b is None else a - b for name, (a, b) in pairs.items()}
    return apart


def plain(values: Any) -> Any:
    """Values as JSON has them: dataclasses as objects, arrays as lists, None for what is not finite."""
    return _finite(to_dict(values))


def reach(values: Any, where: tuple[str | int, ...]) -> Any:
    """What stands in nested plain values, or None where a level is missing."""
    for step in where:
        if values is None:
            return None
        if isinstance(values, list):
            values = values[step] if isinstance(step, int) and step < len(values) else None
        else:
            values = values.get(step)
    return values


def _finite(values: Any) -> Any:
    if isinstance(values, np.ndarray):
        return _finite(values.tolist())
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
