"""Tables of text as Markdown and LaTeX; whatever stands in a cell is shown as it is."""

from __future__ import annotations

from collections.abc import Sequence

ESCAPED = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}
SYMBOLS = {"±": "pm", "·": "cdot", "α": "alpha", "ρ": "rho", "λ": "lambda", "η": "eta"}
IN_LATEX = {"−": "$-$", "—": "---", "–": "--"} | {symbol: rf"$\{name}$" for symbol, name in SYMBOLS.items()}
IN_MARKDOWN = {"<": "&lt;", "&": "&amp;", **{c: f"\\{c}" for c in "\\|`*_[]~"}}


def latex(text: str) -> str:
    """Text that LaTeX prints as it is; a line ends no cell."""
    return "".join(IN_LATEX.get(c, ESCAPED.get(c, c)) for c in " ".join(text.split()))


def tabular(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table as LaTeX (package booktabs), the first column to the left; heads are text, cells are LaTeX."""
    return "\n".join(
        [
            latex_comment(title),
            rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
            r"\toprule",
            " & ".join(map(latex, heads)) + r" \\",
            r"\midrule",
            *(" & ".join(line) + r" \\" for line in lines),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def latex_comment(text: str) -> str:
    """A line that LaTeX does not print."""
    return f"% {' '.join(text.split())}"


def bar(texts: Sequence[str]) -> str:
    """A line of a Markdown table; markup in a cell is text."""
    return "| " + " | ".join("".join(IN_MARKDOWN.get(c, c) for c in " ".join(t.split())) for t in texts) + " |"


def bars(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left."""
    return "\n".join([bar(heads), "| " + " | ".join(["---"] + ["---:"] * (len(heads) - 1)) + " |", *map(bar, lines)])
