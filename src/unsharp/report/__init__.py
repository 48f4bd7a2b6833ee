"""Stage 7: what was found, as tables, figures and one offline page."""

from unsharp.report.html import write_report

__all__ = ["write_report"]
