"""Grids: method × rule × settings × forget set × pretraining × seed, each cell a run, shared training done once."""

from unsharp.sweep.grid.config import Grid, read_grid
from unsharp.sweep.grid.run import Swept, run_grid

__all__ = ["Grid", "Swept", "read_grid", "run_grid"]
