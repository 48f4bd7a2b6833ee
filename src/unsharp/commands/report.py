"""The command that writes what was found as a page, and as PDF, tables and figures besides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from unsharp.commands.shared import Answer, open_in_browser, show_facts
from unsharp.errors import UserError
from unsharp.options import Common, Text, Words

TITLE = "Unlearning report"
AROUND = "Around an unlearned network"


@dataclass(kw_only=True)
class Report(Common):
    """Write one offline HTML page about evaluated runs, or about a `landscape` run."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Directories of `evaluate` or `forget` runs, seeds of one method averaged; or one that holds runs, for all; or
    that of one `landscape` run."""
    out: str = "report.html"
    """The HTML file."""
    pdf: Text = None
    """File to write the page to besides as PDF (extra `pdf`)."""
    audit_pdf: Text = None
    """File to write the audit of one `forget` run to as PDF (extra `pdf`)."""
    table: Words = None
    """Files to write the table to besides, with intervals: .csv, .parquet, .tex, .md or .json by their ending."""
    figure: Words = None
    """Files to write figures to besides, each named after its figure: cost.pdf, gaps.svg, surface-forget.png."""
    title: Text = None
    """Heading of the page."""
    show_samples: bool = False
    """Name the forgotten samples."""
    pictures: int = 0
    """Show so many forgotten samples of each run, with what the networks say; `evaluate --pictures` keeps them."""
    open: bool = False
    """Open the page in a browser."""

    def run(self) -> Answer:
        from unsharp.commands.index import holds_runs
        from unsharp.evaluation.pictures import check_pictures
        from unsharp.report.pdf import check_pdf

        if not self.runs:
            raise UserError("report needs at least one evaluated run; give directories that `unsharp evaluate` wrote")
        check_pictures(self.pictures)
        if self.pdf is not None or self.audit_pdf is not None:
            check_pdf()
        if len(self.runs) == 1 and holds_runs(self.runs[0]):
            return self._all(self.runs[0])
        if len(self.runs) == 1 and _is_around(self.runs[0]):
            return self._around(self.runs[0])
        return self._evaluated()

    def _evaluated(self) -> Answer:
        from unsharp import stages
        from unsharp.report.export import check_table_file, write_table
        from unsharp.report.figures import FIGURES
        from unsharp.report.files import check_figure_files, write_figures
        from unsharp.report.html import render
        from unsharp.report.pdf import write_pdf
        from unsharp.report.tables import summarise

        for file in self.table or ():
            check_table_file(file)
        check_figure_files(self.figure or (), FIGURES)
        audit = self._audit()
        facts = [stages.read_evaluation(path, pictures=self.pictures > 0) for path in self.runs]
        table = summarise(facts)
        page = render(table, title=self.title or TITLE, show_samples=self.show_samples, pictures=self.pictures)
        write_figures(self.figure or (), {name: lambda d=draw: d(table) for name, draw in FIGURES.items()})
        for file in self.table or ():
            write_table(file, table)
        answer = self._write(page, page)
        if self.audit_pdf is not None:
            write_pdf(self.audit_pdf, audit)
            answer["audit_pdf"] = self.audit_pdf
        show_facts(self, facts)
        open_in_browser(Path(self.out), not self.open)
        return answer | {"runs": len(facts), "tables": list(self.table or ())}

    def _audit(self) -> str:
        """The page of the audit, as it was written; empty where it is not asked for."""
        from unsharp.artifacts import open_run
        from unsharp.audit.record import PAGE_FILE

        if self.audit_pdf is None:
            return ""
        pages = [open_run(path).file(PAGE_FILE) for path in self.runs]
        if len(pages) > 1 or not pages[0].is_file():
            raise UserError("--audit-pdf needs one run with an audit; give the directory that `forget` wrote, alone")
        return pages[0].read_text(encoding="utf-8")

    def _around(self, run: str) -> Answer:
        from unsharp.artifacts import open_run
        from unsharp.report.around import render_around
        from unsharp.report.files import check_figure_files, write_figures
        from unsharp.report.page import check_plotly
        from unsharp.surroundings.stage import drawings, read

        self._refuse("a `landscape` run", "table", "show_samples", "pictures", "audit_pdf")
        found = read(open_run(run))
        draw = drawings(found)
        if found.surfaces is not None:
            check_plotly()
        if draw or self.figure:
            check_figure_files(self.figure or (), draw)
        title = self.title or AROUND
        pages = [render_around(found, title=title, turning=turning) for turning in (True, False)[: 1 + bool(self.pdf)]]
        write_figures(self.figure or (), draw)
        answer = self._write(pages[0], pages[-1])
        if not self.json:
            print(f"surroundings of an unlearned network: {self.out}")
        open_in_browser(Path(self.out), not self.open)
        return answer | {"runs": 1}

    def _all(self, root: str) -> Answer:
        from unsharp.commands.index import TITLE as RUNS
        from unsharp.commands.index import report_all

        self._refuse("a directory of runs", "figure", "show_samples", "pictures", "audit_pdf")
        show = not self.json
        title = self.title or RUNS
        answer = report_all(root, self.out, title=title, tables=self.table or (), pdf=self.pdf, show=show)
        open_in_browser(Path(self.out), not self.open)
        return answer

    def _refuse(self, what: str, *names: str) -> None:
        """Raise UserError for options that a report of this kind does not know."""
        if given := [f"--{name.replace('_', '-')}" for name in names if getattr(self, name)]:
            raise UserError(f"a report of {what} takes no {', '.join(given)}; leave it out")

    def _write(self, page: str, printed: str) -> Answer:
        """Write the page, and as PDF what is printed of it."""
        from unsharp.artifacts import write_text
        from unsharp.report.pdf import write_pdf

        write_text(self.out, page)
        if self.pdf is not None:
            write_pdf(self.pdf, printed)
        return {"report": self.out, "pdf": self.pdf, "figures": list(self.figure or ())}


def _is_around(path: str) -> bool:
    """Whether a path is that of a `landscape` run."""
    from unsharp.artifacts import open_run
    from unsharp.surroundings.stage import STAGE

    return open_run(path).stage == STAGE
