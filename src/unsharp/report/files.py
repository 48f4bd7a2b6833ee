"""Figures as files: SVG, PDF or PNG by their ending, which figure by their name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from unsharp import artifacts
from unsharp.errors import UserError, listed
from unsharp.report.figures import kept_as

FORMS = ("svg", "pdf", "png")


def check_figure_files(files: Sequence[str], names: Collection[str]) -> None:
    """Raise UserError for a file whose name is not that of one of the figures, with the ending of a form.

    There may be no figures: then every file is refused.
    """
    if files and not names:
        raise UserError(f"this run has no figures, so {files[0]} cannot be written; leave --figure out")
    for file in files:
        if Path(file).suffix.lower().lstrip(".") not in FORMS:
            raise UserError(f"figure file {file} must end in .svg, .pdf or .png, which says its form")
        if Path(file).stem not in names:
            raise UserError(
                f"figure file {file} must be named after one of the figures: {listed(list(names))}; as in "
                f"{Path(file).with_stem(next(iter(names)))}"
            )


def write_figures(files: Sequence[str], draw: Mapping[str, Callable[[], str | None]]) -> None:
    """Write figures, each drawn anew, by themselves on white.

    Args:
        files: Each named after its figure.
        draw: By name, what draws it; None where there is nothing to show.

    Raises:
        UserError: for another name or ending, or a figure with nothing to show, before any is written.
    """
    check_figure_files(files, draw)
    made: dict[str, bytes] = {}
    for file in files:
        with kept_as(Path(file).suffix.lower().lstrip(".")) as kept:
            if draw[Path(file).stem]() is None:
                raise UserError(f"there is nothing to show in figure {Path(file).stem!r} of these runs; leave it out")
        made[file] = kept[-1]
    for file, content in made.items():
        with artifacts.writing(file, "--figure"), artifacts.atomic(file) as temporary:
            temporary.write_bytes(content)
