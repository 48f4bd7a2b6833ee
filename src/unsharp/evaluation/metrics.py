"""What a metric is, the registry of all of them, and the call that computes a whole set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from unsharp.errors import unknown
from unsharp.evaluation.predictions import Evidence
from unsharp.registry import Registry

Direction = Literal["higher", "lower", "to_reference"]
Need = Literal["test", "reference", "features"]
Value = float | Mapping[str, float | None]

ATTACKS = "mia"

LACKS: dict[Need, str] = {
    "test": "no test set was given",
    "reference": "there is no retrained model to compare with",
    "features": "the penultimate features were not collected",
}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure that is computed from network outputs, with all that a reader needs to understand it.

    Args:
        name: Key in results, unique.
        title: What tables print.
        formula: The formula, in plain text.
        direction: Whether "higher" or "lower" is better, or nearer "to_reference" (the retrained model's value).
        ideal: The best value, in words.
        unit: "%", "nats", ...
        source: Paper and place where it is defined.
        compute: From the evidence to the value, or to several named values.
        needs: What of the evidence must be there; without it the metric is None.
        group: Results key under which the metric stands; None for the top level.
    """

    name: str
    title: str
    formula: str
    direction: Direction
    ideal: str
    unit: str
    source: str
    compute: Callable[[Evidence], Value]
    needs: tuple[Need, ...] = ()
    group: str | None = None

    def lacks(self, evidence: Evidence) -> str | None:
        """Why the metric cannot be computed from this evidence; None where it can."""
        present = {
            "test": evidence.model.test is not None,
            "reference": evidence.reference is not None,
            "features": has_features(evidence),
        }
        return "; ".join(LACKS[need] for need in self.needs if not present[need]) or None

    def __call__(self, evidence: Evidence) -> Value | None:
        """The value; None where the evidence lacks something that the metric needs."""
        return None if self.lacks(evidence) else self.compute(evidence)


METRICS: Registry[Metric] = Registry("metric", "unsharp.evaluation")
"""Every registered metric, by name."""


def has_features(evidence: Evidence) -> bool:
    """Whether the penultimate features of the model's retain and forget samples are there."""
    return evidence.model.retain.features is not None and evidence.model.forget.features is not None


def register(metric: Metric) -> Metric:
    """Make a metric known under its name. Raises: ValueError if the name is taken."""
    return METRICS.register(metric.name)(metric)


def attacks() -> tuple[str, ...]:
    """The names of all registered membership attacks."""
    return tuple(name for name, metric in METRICS.items() if metric.group == ATTACKS)


def check_attacks(names: Iterable[str]) -> None:
    """Raise UserError for a name that is no registered membership attack."""
    for name in names:
        if name not in attacks():
            raise unknown("attack", name, attacks())


def _chosen(evidence: Evidence, wanted: Iterable[str] | None) -> list[Metric]:
    names = attacks() if wanted is None else tuple(wanted)
    check_attacks(names)
    metrics = [m for m in METRICS.values() if m.group != ATTACKS or m.name in names]
    # Features are collected on demand: who did not ask for them gets no list of what could have been.
    return [m for m in metrics if "features" not in m.needs or has_features(evidence)]


def measure(evidence: Evidence, attacks: Iterable[str] | None = None) -> dict[str, Any]:
    """Compute every registered metric.

    Args:
        evidence: Outputs of the model and, if there is one, of the retrained reference.
        attacks: Names of the membership attacks to run, all by default. An `svc_` attack on 10,000 + 10,000 samples
            takes ten seconds to a minute, a `threshold_` attack about a millisecond.

    Returns:
        retain_accuracy, forget_accuracy, test_accuracy, tow, tow_signed (0–100), retain_loss, forget_loss, test_loss
        (nats), and mia: for each attack {"mia", "attack_accuracy"} (0–100); divergence, calibration and per_class, and
        entanglement where there are features: for each of their metrics a dictionary. A value is None where the
        evidence lacks what it needs; `reasons` says what.

    Raises:
        UserError: if an attack is unknown.
    """
    values: dict[str, Any] = {ATTACKS: {}}
    for metric in _chosen(evidence, attacks):
        place = values if metric.group is None else values.setdefault(metric.group, {})
        place[metric.name] = metric(evidence)
    return values


def reasons(evidence: Evidence, attacks: Iterable[str] | None = None) -> dict[str, str]:
    """Why each metric that `measure` leaves None is None, by the metric's name."""
    why = {metric.name: metric.lacks(evidence) for metric in _chosen(evidence, attacks)}
    return {name: reason for name, reason in why.items() if reason is not None}


def gap(value: dict[str, Any], reference: dict[str, Any] | None) -> dict[str, Any] | None:
    """Value minus the retrained model's value, key by key and nested alike; None wherever either is None.

    The half-width of an interval (a key that ends in "half_width") is no value but the uncertainty of one: in the gap
    it is the root of the sum of both squares, that of a difference of independent values. The two networks see the same
    sub-samples, so it is rather too wide. A comparison with the retrained model (divergence, per_class) is 0 of that
    model itself, and its gap is the value.

    Args:
        value: Results of the model, as `measure` returns them.
        reference: Results of the retrained model, `measure(evidence.of_reference())`, or None.
    """
    return None if reference is None else {key: _difference(key, v, reference.get(key)) for key, v in value.items()}


def _difference(key: str, value: Any, reference: Any) -> Any:
    if isinstance(value, dict):
        return {inner: _difference(inner, v, (reference or {}).get(inner)) for inner, v in value.items()}
    if value is None or reference is None:
        return None
    return math.hypot(value, reference) if key.endswith("half_width") else value - reference
