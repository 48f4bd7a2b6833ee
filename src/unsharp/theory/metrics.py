"""Figures over grids: thresholds of signal and of α, and errors at equal forgetting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unsharp.errors import UserError
from unsharp.theory.model import State, error_on_test


def threshold(x: Sequence[float] | np.ndarray, error: np.ndarray, level: float = 0.1) -> np.ndarray:
    """Where the error first falls to a level, by linear interpolation between the points of a grid.

    Args:
        x: Rising grid of k values, such as signal strengths.
        error: Errors on the grid, (..., k).
        level: The level.

    Returns:
        (...): x at the first crossing; NaN where there is none, because the error is at the level from the start of the
        grid or never gets there.

    Raises:
        UserError: unless the grid rises and fits the errors.
    """
    grid, values = _grid(x, error)
    below = values <= level
    first = below.argmax(-1)
    before = np.maximum(first - 1, 0)
    high, low = _at(values, before), _at(values, first)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = grid[before] + (high - level) / (high - low) * (grid[first] - grid[before])
    return np.where(below.any(-1) & (first > 0), found, np.nan)


def alpha_star(one_less_alpha: Sequence[float] | np.ndarray, error: np.ndarray, level: float = 0.1) -> np.ndarray:
    """The largest 1 − α on a grid whose error is at most a level, carried on to the level in log(1 − α).

    Args:
        one_less_alpha: Rising grid of k values of 1 − α above 0.
        error: Errors on the grid, (..., k).
        level: The level.

    Returns:
        (...): 1 − α*; NaN where no value of the grid gets to the level, or the largest one still does.

    Raises:
        UserError: unless the grid rises, is above 0, and fits the errors.
    """
    grid, values = _grid(one_less_alpha, error)
    if not grid[0] > 0:
        raise UserError(f"1 − α must be above 0, got {grid[0]:g}")
    below = values <= level
    k = len(grid)
    last = k - 1 - below[..., ::-1].argmax(-1)
    after = np.minimum(last + 1, k - 1)
    low, high = _at(values, last), _at(values, after)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = (level - low) / (high - low)
        found = np.exp(np.log(grid[last]) + share * (np.log(grid[after]) - np.log(grid[last])))
    return np.where(below.any(-1) & (last < k - 1), found, np.nan)


def at_alpha_star(
    one_less_alpha: Sequence[float] | np.ndarray, error: np.ndarray, other: np.ndarray, level: float = 0.1
) -> np.ndarray:
    """Another figure on the grid, such as the forget error, at 1 − α*, interpolated in log(1 − α) as well."""
    grid, values = _grid(one_less_alpha, other)
    star = alpha_star(one_less_alpha, error, level)
    found = np.full(star.shape, np.nan)
    for place in np.ndindex(star.shape):
        if np.isfinite(star[place]):
            found[place] = np.interp(np.log(star[place]), np.log(grid), values[place])
    return found


class FirstTime:
    """Keeps each network as it is when its forget error first reaches a level; to be called after each step.

    Args:
        level: The forget error, in [0, 1].
        every: Look after every so many steps, at least 1. Where test error grows fast, looking more rarely shows
            more of it, and more of the faster method's.
    """

    def __init__(self, level: float = 0.5, every: int = 1) -> None:
        self.level, self.every = level, every
        self.reached: Tensor | None = None
        self.steps: Tensor | None = None
        self._kept: Tensor | None = None

    def __call__(self, taken: int, state: State) -> None:
        if taken % self.every:
            return
        wrong = (state.point().margins[..., state.problem.forget] <= 0).to(state.problem.gram).mean(-1)
        now = wrong >= self.level
        if self.reached is None or self.steps is None or self._kept is None:
            self.reached, self._kept = now, state.coefficients.clone()
            self.steps = torch.where(now, taken, -1)
            return
        new = now & ~self.reached
        self._kept = torch.where(new[..., None, None], state.coefficients, self._kept)
        self.steps = torch.where(new, taken, self.steps)
        self.reached = self.reached | now

    def test_error(self, state: State) -> Tensor:
        """The test error at that time, (B, V); NaN where the level was never reached."""
        assert self.reached is not None
        assert self._kept is not None
        then = State(state.problem, state.phi, self._kept, state.reference)
        return torch.where(self.reached, error_on_test(then), torch.nan)

    def share_reached(self) -> float:
        """The share of the networks that reached the level."""
        assert self.reached is not None
        return float(self.reached.double().mean())


def slope(x: Sequence[float] | np.ndarray, y: np.ndarray) -> np.ndarray:
    """Slope of log y in log x by least squares, for y of shape (..., k); NaN where a value is."""
    across = np.log(np.asarray(x, dtype=np.float64))
    centred = across - across.mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        return (np.log(np.asarray(y, dtype=np.float64)) * centred).sum(-1) / (centred**2).sum()


def _grid(x: Sequence[float] | np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    grid, values = np.asarray(x, dtype=np.float64), np.asarray(error, dtype=np.float64)
    if grid.ndim != 1 or len(grid) == 0 or not (np.diff(grid) > 0).all():
        raise UserError("the grid must be a rising list of at least one value")
    if values.shape[-1:] != grid.shape:
        raise UserError(f"errors must end in the {len(grid)} values of the grid, got shape {values.shape}")
    return grid, values


def _at(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, index[..., None], -1)[..., 0]
