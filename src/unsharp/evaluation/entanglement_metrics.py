"""Entanglement as registered metrics: on the penultimate features that the evidence holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from weakref import WeakKeyDictionary

from unsharp.errors import UserError
from unsharp.evaluation.entanglement import (
    Estimate,
    Sampling,
    probe,
    silhouette,
    variance_entanglement,
    variance_entanglement_by_class,
    wasserstein,
)
from unsharp.evaluation.features import FeatureSet
from unsharp.evaluation.metrics import Metric, register
from unsharp.evaluation.predictions import Evidence, Predictions

Figures = dict[str, float | None]


_SUMMED: WeakKeyDictionary[Predictions, FeatureSet] = WeakKeyDictionary()
"""The moments of features are summed once for all metrics."""


def _sets(evidence: Evidence) -> tuple[FeatureSet, FeatureSet]:
    return _set(evidence.model.retain), _set(evidence.model.forget)


def _set(predictions: Predictions) -> FeatureSet:
    if predictions.features is None:
        raise UserError("entanglement needs features; collect them with `outputs_with_features`")
    if predictions not in _SUMMED:
        _SUMMED[predictions] = FeatureSet.of(predictions.features, predictions.labels)
    return _SUMMED[predictions]


def _variance(by_class: bool, evidence: Evidence) -> Figures:
    found = (variance_entanglement_by_class if by_class else variance_entanglement)(*_sets(evidence))
    keys = ("ratio", "bounded", "ratio_if_alike")
    # An infinite ratio cannot be written down nor averaged; the bounded form says 1.
    return {key: None if found is None else _finite(getattr(found, key)) for key in keys}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _named(key: str, found: Estimate | None) -> Iterator[tuple[str, float | None]]:
    yield key, None if found is None else found.value
    yield f"{key}_half_width", None if found is None else found.half_width


def _wasserstein(p: int, by_class: bool, evidence: Evidence) -> Figures:
    found = wasserstein(*_sets(evidence), p, Sampling(seed=evidence.seed), by_class=by_class)
    figures: Figures = {}
    for key in ("entanglement", "distance"):
        figures.update(_named(key, found and getattr(found, key)))
        figures[f"{key}_if_alike"] = found and getattr(found, f"{key}_if_alike").value
    return figures


def _silhouette(by_class: bool, evidence: Evidence) -> Figures:
    found = silhouette(*_sets(evidence), Sampling(seed=evidence.seed), by_class=by_class)
    return dict(_named("silhouette", found))


def _probe(match_classes: bool, evidence: Evidence) -> Figures:
    found = probe(*_sets(evidence), Sampling(seed=evidence.seed), match_classes=match_classes)
    return dict(pair for key in ("balanced_accuracy", "auc") for pair in _named(key, found and getattr(found, key)))


GROUP = "entanglement"
PAPER = "Tang & Khanna 2026 (arXiv 2506.13715)"
BY_CLASS = "; mean over the classes in both sets, weighted by their size"


def _register(
    name: str, title: str, formula: str, unit: str, source: str, compute: Callable[[Evidence], Figures]
) -> None:
    register(
        Metric(
            name=name,
            title=title,
            formula=formula,
            direction="to_reference",
            ideal="that of the retrained model",
            unit=unit,
            source=source,
            compute=compute,
            needs=("features",),
            group=GROUP,
        )
    )


for _by_class in (False, True):
    _ending, _title, _note = ("_by_class", " by class", BY_CLASS) if _by_class else ("", "", "")
    _register(
        f"variance_entanglement{_ending}",
        f"Variance entanglement{_title}",
        "`ratio` = (tr Σ_R + tr Σ_F) / (½(‖μ_R − μ‖² + ‖μ_F − μ‖²)), `bounded` = ratio / (1 + ratio); features divided "
        f"by their norms{_note}",
        "ratio",
        PAPER,
        partial(_variance, _by_class),
    )
    for _p in (1, 2):
        _register(
            f"wasserstein_{_p}{_ending}",
            f"Wasserstein-{_p} entanglement{_title}",
            f"`entanglement` = 1 − min mean d^{_p} / max d^{_p}, `distance` = (min mean d^{_p})^(1/{_p}), d Euclidean; "
            f"features divided by their norms{_note}",
            "ratio, distance",
            PAPER,
            partial(_wasserstein, _p, _by_class),
        )
    _register(
        f"feature_silhouette{_ending}",
        f"Silhouette of forget against retain{_title}",
        f"mean (b − a) / max(a, b), a and b mean distances to the own and to the other set{_note}",
        "in [−1, 1]",
        "Rousseeuw 1987",
        partial(_silhouette, _by_class),
    )

for _matched in (False, True):
    _register(
        "feature_probe_matched" if _matched else "feature_probe",
        "Linear probe, classes matched" if _matched else "Linear probe",
        "balanced accuracy and area under the ROC curve of a logistic regression, forget against retain features, in "
        "5-fold cross-validation" + (", with equally many samples of each class from both sets" if _matched else ""),
        "%",
        "Alain & Bengio 2016 (arXiv 1610.01644)",
        partial(_probe, _matched),
    )
