"""Settings for a network that nobody retrained: trials, a target for the forget accuracy, a floor for the rest."""

from unsharp.tuning.plan import TuneConfig
from unsharp.tuning.stage import tune_network

__all__ = ["TuneConfig", "tune_network"]
