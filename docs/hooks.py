"""What mkdocs needs besides the pages of docs/: navigation, the pages that stand elsewhere, the API reference, checks.

The pages are written for a code host, where links lead from file to file of the repository. Here they are rewritten to
lead from page to page of the site.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import unsharp

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CODE = re.compile(r"^(```+).*?^\1 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#]*)((?:#[^)\s]*)?)\)")
NAMES = re.compile(rf"(?<!\[)`unsharp\.({'|'.join(unsharp.__all__)})`(?!\])")
FETCHED = {"src", "srcset", "poster", "data"}  # attributes that make a browser fetch, whatever the element


def outside() -> dict[str, str]:
    """The files outside docs/ that are pages of the site: where they stand in the repository, and in the site."""
    pages = {
        "README.md": "quickstart.md",
        "CONTRIBUTING.md": "contributing.md",
        "CHANGELOG.md": "changelog.md",
        "CITATION.cff": "citation.md",
        "LICENSE": "license.md",
        "examples": "examples/index.md",
        "benchmarks/README.md": "benchmarks/index.md",
    }
    for folder in ("examples", "benchmarks"):
        pages |= {f"{folder}/{p.name}": f"{folder}/{p.stem}.md" for p in files(ROOT / folder)}
    return pages


def files(folder: Path) -> list[Path]:
    """The scripts and grids of a folder."""
    return sorted(p for p in folder.iterdir() if p.suffix in (".py", ".toml"))


def reports() -> dict[str, str]:
    """Pages of HTML in docs/, which need a name beside the page that comes of the Markdown of the same name."""
    found = (p.relative_to(DOCS) for p in sorted(DOCS.rglob("*.html")))
    return {f"docs/{p.as_posix()}": p.with_suffix(".report.html").as_posix() for p in found}


def text_of(source: str) -> str:
    """The Markdown of a file outside docs/."""
    path = ROOT / source
    if path.is_dir():
        lines = [f"- [{p.name}]({source}/{p.name}): {first_line(p)}" for p in files(path)]
        return "\n".join([f"# {source.capitalize()}", "", *lines, ""])
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    return f"# {path.name}\n\n````{path.suffix[1:] or 'text'}\n{text.rstrip()}\n````\n"


def first_line(path: Path) -> str:
    """The first sentence of a script's docstring, or of a grid's first comment."""
    return path.read_text(encoding="utf-8").removeprefix('"""').removeprefix("# ").splitlines()[0]


def reference() -> str:
    """The page with every public name; mkdocstrings puts its docstring in."""
    return "\n\n".join(["# API reference", *(f"::: unsharp.{name}" for name in unsharp.__all__)])


# --- navigation -------------------------------------------------------------------------------------------------------


def navigation() -> list[dict[str, Any]]:
    """The site's navigation: the headings and links of docs/index.md, in their order.

    A page joins the pages of its folder where the folder's index.md was linked before it.
    """
    nav: list[dict[str, Any]] = [{"Home": "index.md"}]
    seen = {"index.md"}
    for heading, body in sections((DOCS / "index.md").read_text(encoding="utf-8")):
        entries: list[dict[str, Any]] = []
        folders: dict[str, list[dict[str, Any]]] = {}
        for text, target in re.findall(r"\[([^\]]+)\]\(([^)#\s]+)[^)]*\)", body):
            uri = moved(target, "docs/index.md", "index.md")
            if uri in seen:
                continue
            seen.add(uri)
            folder, file = posixpath.split(uri)
            if file == "index.md":
                folders[folder] = [{"Overview": uri}]
                entries.append({title(uri, text): folders[folder]})
            else:
                folders.get(folder, entries).append({title(uri, text): uri})
            if uri == "api.md":
                entries.append({"API reference": "reference.md"})
        nav.append({heading: entries})
    return nav


def sections(text: str) -> Iterator[tuple[str, str]]:
    """The second-level headings of a page, each with what stands below it."""
    _, *parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return zip(parts[::2], parts[1::2])


def title(uri: str, text: str) -> str:
    """What the navigation calls a page: its heading up to a colon; one from outside docs/ has the link's text."""
    page = DOCS / uri
    if not page.is_file():
        return text[0].upper() + text[1:]
    return page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").split(": ")[0]


# --- links ------------------------------------------------------------------------------------------------------------


def moved(target: str, source: str, uri: str) -> str:
    """A link of the file `source` of the repository, as a link of the page `uri` of the site."""
    if not target or "://" in target or target.startswith("mailto:"):
        return target
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    there = (outside() | reports()).get(path, path.removeprefix("docs/"))
    return posixpath.relpath(there, posixpath.dirname(uri) or ".")


def rewritten(text: str, source: str, uri: str) -> str:
    """A page's Markdown for the site: links moved, public names linked, comments gone; code stays as it is."""

    def prose(part: str) -> str:
        part = re.sub(r"<!--.*?-->\n?", "", part, flags=re.DOTALL)
        part = LINK.sub(lambda found: f"]({moved(found[1], source, uri)}{found[2]})", part)
        return NAMES.sub(r"[`unsharp.\1`][unsharp.\1]", part)

    done, last = [], 0
    for code in CODE.finditer(text):
        done += [prose(text[last : code.start()]), code[0]]
        last = code.end()
    return "".join([*done, prose(text[last:])])


# --- checks -----------------------------------------------------------------------------------------------------------


class Fetches(HTMLParser):
    """Collects what a browser fetches from elsewhere when it opens a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See the class."""
        for name, value in attrs:
            if name in FETCHED or (tag == "link" and name == "href" and not _canonical(dict(attrs))):
                self.found += [part for part in (value or "").split() if re.match(r"(\w+:)?//", part)]
            elif name == "style":
                self.found += styles(value or "")

    def handle_data(self, data: str) -> None:
        """Style sheets and scripts that stand in the page."""
        self.found += styles(data) if self.cdata_elem == "style" else []


def _canonical(attributes: Mapping[str, str | None]) -> bool:
    return attributes.get("rel") in {"canonical", "alternate"}


def styles(text: str) -> list[str]:
    """What a style sheet fetches from elsewhere."""
    return re.findall(r"(?:url\(\s*|@import\s+)[\"']?((?:\w+:)?//[^\"')\s]+)", text)


def fetches(folder: Path) -> list[str]:
    """What the pages and style sheets of a built site would fetch from elsewhere, each with the file that names it."""
    found = []
    for path in sorted(folder.rglob("*.html")):
        parser = Fetches()
        parser.feed(path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(folder)}: {url}" for url in parser.found]
    for path in sorted(folder.rglob("*.css")):
        found += [f"{path.relative_to(folder)}: {url}" for url in styles(path.read_text(encoding="utf-8"))]
    return found


# --- what mkdocs calls ------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Set the navigation."""
    config.nav = navigation()
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that have no file in docs/."""
    from mkdocs.structure.files import File

    for source, uri in outside().items():
        files.append(File.generated(config, uri, content=text_of(source)))
    for source, uri in reports().items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, "reference.md", content=reference()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite a page for the site."""
    uri = page.file.src_uri
    source = next((s for s, there in outside().items() if there == uri), f"docs/{uri}")
    return rewritten(markdown, source, uri)


def on_post_build(config: Any) -> None:
    """Fail where a page would not work offline."""
    from mkdocs.exceptions import PluginError

    if found := fetches(Path(config.site_dir)):
        raise PluginError("the site must work offline, but it fetches " + "; ".join(found))
