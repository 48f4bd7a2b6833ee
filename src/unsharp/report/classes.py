"""The classes of a network beside the retrained one as a table."""

from __future__ import annotations

from collections.abc import Sequence

from unsharp.evaluation.per_class import PerClass
from unsharp.report.plain import bar

HEADS = ("class", "samples", "forgotten", "accuracy", "retrained", "gap", "lost", "won", "p, all classes")


def classes_to_markdown(found: PerClass, names: Sequence[str] | None = None, *, most: int | None = 10) -> str:
    """The most hurt classes as a Markdown table, and below it what can be said of all.

    Args:
        found: From `per_class`.
        names: Names of all classes, by number; the numbers by default.
        most: Rows to show; all where None.
    """
    lines = [bar(HEADS), bar(["---"] + ["---:"] * (len(HEADS) - 1))]
    for row in found.rows(names)[:most]:
        counts = [str(row[key]) for key in ("lost", "won")]
        shares = [f"{row['model']:.1f}", f"{row['reference']:.1f}", f"{row['gap']:+.1f}".replace("-", "−")]
        lines.append(
            bar([str(row["class"]), str(row["n"]), str(row["n_forget"]), *shares, *counts, f"{row['p_adjusted']:.2g}"])
        )
    return "\n".join(lines) + f"\n\n{found.sentence(names)}\n"
