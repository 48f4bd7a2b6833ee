"""Which weights a phase may act on: selections that rank the weights, and 0/1 masks of exactly so many entries."""

from unsharp.masks.base import SELECTIONS, Basis, Choice, Mask, On, ScoredSelection, Selection
from unsharp.masks.choosing import make_mask, passes, saliency_mask
from unsharp.masks.entries import check, complement, fraction_of, random_mask, select_entries
from unsharp.masks.files import FILE, load, save
from unsharp.masks.saliency import saliency

__all__ = [
    "FILE",
    "SELECTIONS",
    "Basis",
    "Choice",
    "Mask",
    "On",
    "ScoredSelection",
    "Selection",
    "check",
    "complement",
    "fraction_of",
    "load",
    "make_mask",
    "passes",
    "random_mask",
    "saliency",
    "saliency_mask",
    "save",
    "select_entries",
]
