"""What a report writes besides its page: figures, PDF, and the tables of a whole directory."""

from __future__ import annotations

import base64
import importlib.util
import io
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from test_index import keep
from test_report import run, without_reference

from unsharp.commands.index import quick, report_all
from unsharp.commands.report import Report
from unsharp.errors import UserError
from unsharp.index import Index, read_index
from unsharp.report import figures
from unsharp.report.files import check_figure_files, write_figures
from unsharp.report.html import render
from unsharp.report.overview import records
from unsharp.report.overview import render as render_overview
from unsharp.report.pdf import _printed, check_pdf, write_pdf
from unsharp.report.plain import bar, latex
from unsharp.report.tables import summarise

HOSTILE = r"a|b & 50 % \input{x} #1 _^~ $ <script>x</script>" + "\nnext"


def why_no_pdf() -> str:
    try:
        check_pdf()
    except UserError as error:
        return str(error)
    return ""


needs_pdf = pytest.mark.skipif(bool(why_no_pdf()), reason=why_no_pdf() or "a PDF can be made")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed in range(3):
        keep(tmp_path / "runs" / f"seed-{seed}", run(seed, accuracy=80 + seed**2))
    keep(tmp_path / "runs" / "evil", run(0, method=HOSTILE))
    return tmp_path / "runs"


def test_the_table_of_a_directory_as_latex_and_markdown(root: Path, tmp_path: Path) -> None:
    tables = [str(tmp_path / f"all.{ending}") for ending in ("md", "tex")]
    report_all(root, tmp_path / "all.html", tables=tables, show=False)
    markdown, tex = (Path(file).read_text() for file in tables)
    rows = {row["label"]: row for row in records(read_index(root))}
    (label,) = [name for name in rows if name.startswith("NegGrad")]
    row = rows[label]
    mean, half = row["forget_accuracy_mean"], row["forget_accuracy_half_width"]
    gap, gap_half = row["forget_accuracy_gap_mean"], row["forget_accuracy_gap_half_width"]
    text = f"{mean:.2f} ± {half:.2f} ({gap:+.2f} ± {gap_half:.2f})".replace("-", "−")
    (line,) = [line for line in markdown.splitlines() if line.startswith("| NegGrad")]
    assert text in line
    assert text.replace("±", r"$\pm$").replace("−", "$-$") in tex
    assert "95 % t interval" in markdown
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {9}
    assert "<script" not in markdown
    body = re.search(r"\\midrule\n(.*)\n\\bottomrule", tex, re.DOTALL)
    assert body is not None
    assert [len(re.findall(r"(?<!\\)&", line)) for line in body.group(1).splitlines()] == [7, 7]
    assert r"\input" not in tex
    assert r"\toprule" in tex
    for sign in "%#_&":  # outside of comments none is left bare
        assert not re.search(rf"(?<!\\){sign}", re.sub(r"^%.*$", "", body.group(1).replace(" & ", " "), flags=re.M))


def test_a_file_of_a_run_without_figures_is_refused() -> None:
    check_figure_files([], {})
    with pytest.raises(UserError, match=r"no figures, so a\.svg cannot"):
        check_figure_files(["a.svg"], {})


@pytest.mark.parametrize("asked", [True, False])
def test_the_page_of_a_directory_is_opened_where_it_is_asked_for(
    root: Path, tmp_path: Path, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    page = tmp_path / "all.html"
    Report(runs=(str(root),), out=str(page), open=asked).run()
    assert opened == ([page.as_uri()] if asked else [])


def test_cells_are_text() -> None:
    assert bar(["a|b", "c\\|d", "e\nf", "<b>&"]) == r"| a\|b | c\\\|d | e f | &lt;b>&amp; |"
    assert bar(["__init__", "*a*", "[b](c)"]) == r"| \_\_init\_\_ | \*a\* | \[b\](c) |"
    assert bar(["~~d~~", "`e`"]) == r"| \~\~d\~\~ | \`e\` |"
    assert latex("\\a_b{c}\n 5 % — −1 ± ρ") == r"\textbackslash{}a\_b\{c\} 5 \% --- $-$1 $\pm$ $\rho$"


def test_figures_as_files_are_what_the_page_shows(tmp_path: Path) -> None:
    table = summarise([run(seed) for seed in range(2)])
    draw = {name: lambda d=d: d(table) for name, d in figures.FIGURES.items()}
    names = ("gaps.svg", "cost.pdf", "gaps.png")
    write_figures([str(tmp_path / name) for name in names], draw)
    svg = ElementTree.parse(tmp_path / "gaps.svg").getroot()
    inline = ElementTree.fromstring(figures.gaps(table) or "")
    for tag in ("text", "use"):  # letters, and marks where they stand
        here, there = ([e for e in of.iter() if e.tag.endswith(f"}}{tag}")] for of in (svg, inline))
        assert [e.text for e in here] == [e.text for e in there]
        for axis in "xy":
            places = [[float(e.get(axis, 0)) for e in of] for of in (here, there)]
            np.testing.assert_allclose(*places, atol=0.01)
        assert len(here) > 5
    assert (tmp_path / "cost.pdf").read_bytes().startswith(b"%PDF")
    assert b"CreationDate" not in (tmp_path / "cost.pdf").read_bytes()
    with Image.open(tmp_path / "gaps.png") as picture:
        assert picture.size[0] == pytest.approx(200 * figures.WIDTH, abs=1)
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    first = (tmp_path / "cost.pdf").read_bytes()
    write_figures([str(tmp_path / "cost.pdf")], draw)
    assert (tmp_path / "cost.pdf").read_bytes() == first
    # drawing for a page afterwards keeps nothing
    assert figures._WANTED.get() == ()


def test_figures_that_cannot_be_are_refused_before_any_is_written(tmp_path: Path) -> None:
    table = summarise([without_reference()])
    draw = {name: lambda d=d: d(table) for name, d in figures.FIGURES.items()}
    for name, match in (("cost.jpg", "must end in"), ("cots.svg", "named after one of the figures: accuracies")):
        with pytest.raises(UserError, match=match):
            check_figure_files([name], figures.FIGURES)
    with pytest.raises(UserError, match="nothing to show in figure 'cost'"):
        write_figures([str(tmp_path / "accuracies.svg"), str(tmp_path / "cost.svg")], draw)
    assert list(tmp_path.iterdir()) == []


def test_the_printed_page_has_no_script_and_no_variable_in_its_figures() -> None:
    page = render(summarise([run(0)]), title=HOSTILE)
    printed = _printed(page)
    assert "<script" in page
    assert "<script" not in printed
    figures_of = re.findall(r"<svg\b.*?</svg>", printed, re.DOTALL)
    assert len(figures_of) >= 4
    assert not any("var(" in svg for svg in figures_of)
    # the colours of paper, not of the screen
    assert all("#000" in svg and "#e4e9ea" not in svg for svg in figures_of)
    assert any("#0072b2" in svg for svg in figures_of)


@needs_pdf
def test_a_page_is_printed_and_nothing_is_fetched(tmp_path: Path) -> None:
    """A picture inside the page is in the PDF, one from a file beside it is not."""
    picture = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(picture, "PNG")
    (tmp_path / "x.png").write_bytes(picture.getvalue())
    within = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    made = {}
    page = render_overview(Index(tmp_path), title=HOSTILE)
    for name, source in (("within", within), ("beside", (tmp_path / "x.png").as_uri())):
        write_pdf(tmp_path / f"{name}.pdf", page.replace("</header>", f'<img src="{source}"></header>'))
        made[name] = (tmp_path / f"{name}.pdf").read_bytes()
        assert made[name].startswith(b"%PDF")
    assert made["within"].count(b"/Subtype /Image") == 1
    assert b"/Subtype /Image" not in made["beside"]


@needs_pdf
def test_a_directory_is_printed(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["report", str(root), "--out", str(tmp_path / "all.html"), "--pdf", str(tmp_path / "all.pdf")]
    assert quick(words) == 0
    assert (tmp_path / "all.pdf").read_bytes().startswith(b"%PDF")
    assert "all.html" in capsys.readouterr().out


def test_without_the_extra_nothing_is_begun(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "weasyprint", None)
    with pytest.raises(UserError, match=r"pip install 'unsharp\[pdf\]'"):
        report_all(root, tmp_path / "all.html", pdf=str(tmp_path / "all.pdf"))
    assert not (tmp_path / "all.html").exists()


def test_a_missing_system_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weasyprint.py").write_text("raise OSError('cannot load library libpango-1.0-0: no such file\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "weasyprint"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=r"libpango-1\.0-0: no such file\); install pango"):
        check_pdf()
