"""The errors that carry meaning for a caller: a mistake to mend, or a run that broke."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """A mistake of the caller, raised before any work starts.

    The message is one line: which argument, what came, what is accepted, what to do. The command line prints it and
    exits with code 2.
    """


class NonFiniteError(ArithmeticError):
    """A loss or gradient was NaN or infinite; weights, buffers and optimiser state are those before the step."""


def unknown(kind: str, value: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not known, with the nearest known one suggested."""
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else "."
    return UserError(f"unknown {kind} {value!r}{guess} Known: {', '.join(names)}.")


def listed(values: Sequence[object], limit: int = 8) -> str:
    """The first few of `values` as text, with a count of the rest."""
    shown = ", ".join(str(v) for v in values[:limit])
    return shown if len(values) <= limit else f"{shown} and {len(values) - limit} more"
