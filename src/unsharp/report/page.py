"""Offline pages: each a template that fills the frame of `base.html`, in one style."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

STYLE, SCRIPT = "style.css", "sort.js"


def page(template: str, *, sortable: bool = False, **values: Any) -> str:
    """Fill a template of this folder; every value is escaped unless it is `markup`, and none may be missing.

    Args:
        template: Name of the file.
        sortable: Whether its tables can be sorted, by the only script that the page then allows.
        **values: What stands in it, `title` among them.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script, allowed = _sorting() if sortable else (None, None)
    style = markup((folder / STYLE).read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, script=script, allowed=allowed, **values)


def markup(text: str) -> Any:
    """Text that is markup of ours and is not escaped."""
    from markupsafe import Markup

    return Markup(text)


def _sorting() -> tuple[Any, str]:
    """The script that sorts tables, as markup, and its sum, by which a page allows this script and no other."""
    text = (Path(__file__).parent / SCRIPT).read_text(encoding="utf-8")
    return markup(text), "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
