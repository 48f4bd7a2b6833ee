"""What a terminal shows of a report: the outcome in words, accuracies and costs."""

from __future__ import annotations

from unsharp.report.tables import ACCURACY, COST, Table, to_text
from unsharp.report.verdict import verdicts


def brief(table: Table, *, width: int | None = None) -> str:
    """The headline of each task, then the pieces that most people look for.

    Args:
        table: What `summarise` made.
        width: Columns of the terminal; None asks it.
    """
    headlines = "\n".join(verdict.headline for verdict in verdicts(table))
    return f"{headlines}\n\n{to_text(table, pieces=(ACCURACY, COST), width=width)}"
