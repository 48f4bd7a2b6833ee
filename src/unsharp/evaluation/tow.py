"""ToW, the tug of war: how near the three accuracies are to those of the retrained model, in one figure.

Both forms need the retrained model and a test set. Without either they are None: a product of the remaining factors
would be another quantity under the same name.
"""

from __future__ import annotations

import math

from unsharp.errors import UserError
from unsharp.evaluation.accuracy import accuracy
from unsharp.evaluation.metrics import Metric, register
from unsharp.evaluation.predictions import Evidence, Outputs

Accuracies = tuple[float, float, float]


def tow(model: Accuracies, reference: Accuracies) -> float:
    """Π (1 − |a − a*|) over retain, forget, test, times 100.

    Args:
        model: Accuracies on retain, forget, test, 0–100.
        reference: Those of the retrained model.

    Returns:
        0–100; 100 where all three are equal. Source: Zhao et al. 2024 (RUM, arXiv 2406.01257).
    """
    return 100.0 * math.prod(1.0 - abs(a - b) / 100.0 for a, b in zip(model, reference))


def tow_signed(model: Accuracies, reference: Accuracies) -> float:
    """(1 − (r* − r)) (1 − (f − f*)) (1 − (t* − t)), times 100: the product of the published code.

    A forget accuracy below, or a retain or test accuracy above the retrained model's raises it beyond 100.

    Args:
        model: Accuracies on retain, forget, test, 0–100.
        reference: Those of the retrained model.

    Returns:
        0–800; 100 where all three are equal. Source: code of Tang & Khanna 2026 (arXiv 2506.13715).
    """
    (r, f, t), (r_star, f_star, t_star) = model, reference
    return 100.0 * (1.0 - (r_star - r) / 100.0) * (1.0 - (f - f_star) / 100.0) * (1.0 - (t_star - t) / 100.0)


def _accuracies(outputs: Outputs | None) -> Accuracies:
    if outputs is None or outputs.test is None:
        raise UserError("ToW needs the outputs of a retrained model, and a test set")
    return accuracy(outputs.retain), accuracy(outputs.forget), accuracy(outputs.test)


def _tow(evidence: Evidence) -> float:
    return tow(_accuracies(evidence.model), _accuracies(evidence.reference))


def _tow_signed(evidence: Evidence) -> float:
    return tow_signed(_accuracies(evidence.model), _accuracies(evidence.reference))


register(
    Metric(
        name="tow",
        title="ToW",
        formula="100 · (1 − |r − r*|) (1 − |f − f*|) (1 − |t − t*|); accuracies as fractions, * = retrained",
        direction="higher",
        ideal="100",
        unit="%",
        source="Zhao et al. 2024 (RUM, arXiv 2406.01257)",
        compute=_tow,
        needs=("reference", "test"),
    )
)

register(
    Metric(
        name="tow_signed",
        title="ToW (signed)",
        formula="100 · (1 − (r* − r)) (1 − (f − f*)) (1 − (t* − t)); accuracies as fractions, * = retrained",
        direction="to_reference",
        ideal="100; above it more was forgotten, or less lost, than by retraining",
        unit="%",
        source="code of Tang & Khanna 2026 (arXiv 2506.13715), with measured accuracies in place of typed ones",
        compute=_tow_signed,
        needs=("reference", "test"),
    )
)
