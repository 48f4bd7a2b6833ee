"""Which figures behind the accuracies a report shows in small tables of their own, and which only its data hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

DIVERGENCE, CALIBRATION, CLASSES = "Divergence from the retrained network", "Calibration", "Classes"
SECTIONS = (DIVERGENCE, CALIBRATION, CLASSES)
UNSHOWN = "More"
"""The section of what stands in CSV and JSON alone."""
REASONS = {
    f"per_class.{split}_classes.{key}": why
    for split in ("retain", "test")
    for key, why in (
        ("forget_classes_gap", "no class of these samples has forgotten samples"),
        ("other_classes_gap", "every class has forgotten samples"),
    )
}
"""Why a figure is missing although its metric could be computed, by key."""


@dataclass(frozen=True)
class Detail:
    """One figure of a group of metrics.

    Args:
        key: Where it stands in the metrics, levels joined by dots.
        title: What a table calls it.
        unit: As of a column.
        section: The small table it is shown in, or `UNSHOWN`.
        with_gap: Whether the retrained network has a value of its own; else the figure is a comparison already.
    """

    key: str
    title: str
    unit: str
    section: str
    with_gap: bool


def details() -> Iterator[Detail]:
    """Every figure of divergence, calibration and classes, in the order of the tables."""
    for split in ("retain", "forget", "test"):
        for key, title, unit, section in (
            ("kl", "KL", "nats", DIVERGENCE),
            ("churn", "other class than retrained", "%", DIVERGENCE),
            ("js", "Jensen–Shannon", "nats", UNSHOWN),
            ("l2", "L2 of probabilities", "score", UNSHOWN),
        ):
            yield _detail(f"divergence.{split}_divergence.{key}", split, title, unit, section, False)
    for split in ("retain", "forget", "test"):
        for key, title, unit, section in (
            ("ece", "expected calibration error", "%", CALIBRATION),
            ("brier", "Brier score", "score", CALIBRATION),
            ("ece_equal_mass", "expected calibration error, equal mass", "%", UNSHOWN),
            ("rms_debiased", "calibration error, debiased", "%", UNSHOWN),
            ("overconfidence", "confidence less accuracy", "points", UNSHOWN),
        ):
            yield _detail(f"calibration.{split}_calibration.{key}", split, title, unit, section, True)
    for split, section in (("test", CLASSES), ("retain", UNSHOWN)):
        for key, title, unit in (
            ("worst_gap", "lowest gap of a class", "points"),
            ("worst_gap_if_alike", "the same by chance", "points"),
            ("classes_lower", "classes lower", "classes"),
            ("classes_higher", "classes higher", "classes"),
            ("forget_classes_gap", "mean gap, classes with forgotten samples", "points"),
            ("other_classes_gap", "mean gap, other classes", "points"),
        ):
            yield _detail(f"per_class.{split}_classes.{key}", split, title, unit, section, False)


def _detail(key: str, split: str, title: str, unit: str, section: str, with_gap: bool) -> Detail:
    shown = f" ({unit})" if unit in ("nats", "%", "points") else ""
    return Detail(key, f"{split.capitalize()}: {title}{shown}", unit, section, with_gap)
