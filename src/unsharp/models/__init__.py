"""Networks for small images and for ImageNet, any other by name, and the penultimate features of all of them."""

from unsharp.models.base import MODELS, ModelConfig
from unsharp.models.builder import build
from unsharp.models.modes import evaluating
from unsharp.models.penultimate import Features, features, logits_of, with_features

__all__ = ["MODELS", "Features", "ModelConfig", "build", "evaluating", "features", "logits_of", "with_features"]
