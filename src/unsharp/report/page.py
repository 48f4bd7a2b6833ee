"""Offline pages: each a template that fills the frame of `base.html`, in one style."""

from __future__ import annotations

import base64
import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from unsharp.errors import UserError

STYLE, SCRIPT, TURN = "style.css", "sort.js", "turn.js"


def page(template: str, *, sortable: bool = False, turning: bool = False, **values: Any) -> str:
    """Fill a template of this folder; every value is escaped unless it is `markup`, and none may be missing.

    Args:
        template: Name of the file.
        sortable: Whether its tables can be sorted.
        turning: Whether it has surfaces that can be turned; plotly's script, 5 MB, is then part of it.
        **values: What stands in it, `title` among them.

    A page allows its own scripts, each by its sum, and no other.
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
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    scripts = _scripts(sortable, turning)
    does = " and ".join([*["sort tables"] * sortable, *["turn surfaces"] * turning])
    style = markup((folder / STYLE).read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, scripts=scripts, does=does, **values)


def markup(text: str) -> Any:
    """Text that is markup of ours and is not escaped."""
    from markupsafe import Markup

    return Markup(text)


def check_plotly() -> None:
    """Raise UserError where plotly is not installed, and surfaces could not be turned."""
    if find_spec("plotly") is None:
        raise UserError("a page with loss surfaces to turn needs plotly, which is not installed; pip install plotly")


def plotly_script() -> str:
    """Plotly's own script as its Python package carries it; the package itself is not imported."""
    check_plotly()
    spec = find_spec("plotly")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    if "</script" in text.lower():
        raise UserError("plotly's script would end the page's; install another version of plotly")
    return text


def _scripts(sortable: bool, turning: bool) -> list[tuple[Any, str]]:
    """The scripts of a page as markup, each with its sum."""
    folder = Path(__file__).parent
    texts = [(folder / SCRIPT).read_text(encoding="utf-8")] if sortable else []
    texts += [plotly_script(), (folder / TURN).read_text(encoding="utf-8")] if turning else []
    return [(markup(text), _sum(text)) for text in texts]


def _sum(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
