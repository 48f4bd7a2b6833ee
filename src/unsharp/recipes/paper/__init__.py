"""The paper's tables and figures, each one file, at three sizes: `unsharp reproduce NAME`."""

from unsharp.recipes.paper.base import REPRODUCTIONS, Beyond, Claim, Compared, Figure, Published, Reproduction
from unsharp.recipes.paper.problems import SIZES, Where
from unsharp.recipes.paper.run import Asked, Made, outlook, reproduce

__all__ = [
    "REPRODUCTIONS",
    "SIZES",
    "Asked",
    "Beyond",
    "Claim",
    "Compared",
    "Figure",
    "Made",
    "Published",
    "Reproduction",
    "Where",
    "outlook",
    "reproduce",
]
