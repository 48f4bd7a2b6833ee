"""Pages as PDF, by WeasyPrint (extra `pdf`): as they are printed, with nothing fetched."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from unsharp import artifacts
from unsharp.errors import UserError

INSTALL = "pip install 'unsharp[pdf]'"


def check_pdf() -> None:
    """Raise UserError, with what to do, where no PDF can be made here."""
    _weasyprint()


def write_pdf(path: str | Path, page: str) -> None:
    """Write a page as PDF, as it would be printed; scripts do not run, and no address is opened.

    Args:
        path: The file.
        page: HTML of this library.

    Raises:
        UserError: if WeasyPrint or a library it needs is missing, or the file cannot be written.
    """
    weasyprint = _weasyprint()
    nothing = weasyprint.urls.URLFetcher(allowed_protocols=("data",), allow_redirects=False)
    log = logging.getLogger("weasyprint")
    level, log.level = log.level, logging.CRITICAL  # it complains of each style that only screens know
    try:
        content = weasyprint.HTML(string=_printed(page), url_fetcher=nothing).write_pdf()
    finally:
        log.level = level
    with artifacts.writing(path, "--pdf"), artifacts.atomic(path) as temporary:
        temporary.write_bytes(content)


def _weasyprint() -> Any:
    try:
        import weasyprint
        import weasyprint.urls
    except ImportError:
        raise UserError(
            f"a PDF needs WeasyPrint, which is not installed; {INSTALL}, or print the page from a browser"
        ) from None
    except OSError as error:
        raise UserError(
            f"WeasyPrint is installed, but not a system library that it needs ({str(error).splitlines()[0]}); install "
            "pango (Debian: apt install libpango-1.0-0 libpangoft2-1.0-0 libharfbuzz-subset0), or print the page from "
            "a browser"
        ) from None
    return weasyprint


def _printed(page: str) -> str:
    """The page without scripts, and with the figures' colours written out: WeasyPrint knows no variables there."""
    page = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)
    colours = dict(re.findall(r"(--\w+): (#[0-9a-f]{3,6})", _root(page)))
    plain = lambda svg: re.sub(r"var\((--\w+)\)", lambda name: colours[name.group(1)], svg.group())  # noqa: E731
    return re.sub(r"<svg\b.*?</svg>", plain, page, flags=re.DOTALL)


def _root(page: str) -> str:
    """The variables of the page's style that hold in print."""
    style = page.partition("</style>")[0]
    return style[: style.index("}")] + style.partition("@media print")[2].partition("}")[0]
