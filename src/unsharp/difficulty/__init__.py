"""Difficulty scores and the choice of the forget set."""

from unsharp.difficulty.forget import ForgetConfig, ForgetSet, choose, from_ids, from_indices, from_scores
from unsharp.difficulty.scores import load_scores

__all__ = ["ForgetConfig", "ForgetSet", "choose", "from_ids", "from_indices", "from_scores", "load_scores"]
