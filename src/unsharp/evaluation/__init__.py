"""How well the forget set was removed: accuracies, ToW, membership inference; each metric says how it is to be read."""

from unsharp.evaluation.metrics import METRICS, Metric, attacks, check_attacks, gap, measure, reasons, register
from unsharp.evaluation.predictions import Evidence, Outputs, Predictions, check_seed, predict
from unsharp.evaluation.suite import Judged, judge, outputs

__all__ = [
    "METRICS",
    "Evidence",
    "Judged",
    "Metric",
    "Outputs",
    "Predictions",
    "attacks",
    "check_attacks",
    "check_seed",
    "gap",
    "judge",
    "measure",
    "outputs",
    "predict",
    "reasons",
    "register",
]
