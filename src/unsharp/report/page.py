"""Pages that are not about evaluated runs: a template of their own in the style of the report."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

TEMPLATE, SCRIPT = "template.html", "sort.js"


def page(template: str, **values: Any) -> str:
    """Fill a template of this folder; every value is escaped unless it is `markup`, and none may be missing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # All pages look alike: the style is that of the report.
    style = re.search(r"<style>.*?</style>", (folder / TEMPLATE).read_text(encoding="utf-8"), re.DOTALL)
    assert style is not None
    return environment.get_template(template).render(style=markup(style[0]), **values)


def markup(text: str) -> Any:
    """Text that is markup of ours and is not escaped."""
    from markupsafe import Markup

    return Markup(text)


def sorting() -> tuple[Any, str]:
    """The script that sorts tables, as markup, and its sum, by which a page allows this script and no other."""
    text = (Path(__file__).parent / SCRIPT).read_text(encoding="utf-8")
    return markup(text), "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
