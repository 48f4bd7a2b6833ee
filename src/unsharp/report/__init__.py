"""Stage 7: what was found, as tables, figures and one offline page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unsharp.report.html import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> Any:
    """Loaded when asked for: some pages need no registry, and so no torch."""
    if name != "write_report":
        raise AttributeError(f"module 'unsharp.report' has no attribute {name!r}")
    from unsharp.report.html import write_report

    return write_report
