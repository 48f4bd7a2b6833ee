"""Language models: the same rules, masks and loop on causal models of transformers, with objectives of their own."""

from unsharp.language.config import LanguageConfig, LoRA, configure
from unsharp.language.objectives import OBJECTIVES, LanguageObjective
from unsharp.language.relearning import Attack, RelearnConfig, relearn
from unsharp.language.samples import TextBatch, TextSamples
from unsharp.language.texts import Pair, TextFormat, encode, read_pairs
from unsharp.language.unlearn import unlearn

__all__ = [
    "OBJECTIVES",
    "Attack",
    "LanguageConfig",
    "LanguageObjective",
    "LoRA",
    "Pair",
    "RelearnConfig",
    "TextBatch",
    "TextFormat",
    "TextSamples",
    "configure",
    "encode",
    "read_pairs",
    "relearn",
    "unlearn",
]
