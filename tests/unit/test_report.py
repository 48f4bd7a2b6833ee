"""The report: grouping and intervals against hand computation, what the page shows, hides and escapes."""

from __future__ import annotations

import copy
import csv
import html
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from unsharp.errors import UserError
from unsharp.evaluation import Evidence, Outputs, Predictions, measure
from unsharp.report import figures, write_report
from unsharp.report.details import details
from unsharp.report.export import WRITERS, to_latex, write_table
from unsharp.report.groups import group
from unsharp.report.html import inline, render
from unsharp.report.page import SCRIPT
from unsharp.report.tables import grids, summarise, to_csv, to_json, to_markdown, to_text
from unsharp.report.verdict import verdicts

T_2 = 4.302652729749464  # 97.5 % quantile of Student's t with 2 degrees of freedom
VOID = {"meta", "br", "link", "img", "input", "hr"}


def metrics(retain: float, forget: float, test: float | None, *, tow: float | None, seconds: float) -> dict[str, Any]:
    mia = None if test is None else {"mia": 40.0 + forget / 10, "attack_accuracy": 60.0}
    return {
        "retain_accuracy": retain,
        "forget_accuracy": forget,
        "test_accuracy": test,
        "tow": tow,
        "tow_signed": tow,
        "retain_loss": 0.1,
        "forget_loss": 0.2,
        "test_loss": None if test is None else 0.3,
        "mia": {"threshold_confidence": mia},
        "seconds": seconds,
        "passes": 10,
        "peak_memory_bytes": None,
    }


def gap(a: Any, b: Any) -> Any:
    if isinstance(a, dict):
        return {k: gap(v, (b or {}).get(k)) for k, v in a.items()}
    return None if a is None or b is None else a - b


def run(seed: int = 0, *, method: str = "neggrad", accuracy: float = 90.0, **changes: Any) -> dict[str, Any]:
    """A run as the stages describe it; the metrics depend on seed and `accuracy` (on forget) alone."""
    own = metrics(95.0 + seed, accuracy, 92.0, tow=90.0 + seed, seconds=2.0 + seed)
    reference = metrics(96.0, 85.0, 91.0, tow=100.0, seconds=20.0)
    original = metrics(99.0, 99.0, 92.0, tow=80.0, seconds=1.0) | {"seconds": None, "passes": None}
    how = {"name": method, "alpha": changes.pop("alpha", 0.9)}
    rule = changes.pop("rule", {"name": "none"})
    return {
        "method": how,
        "rule": rule,
        "unlearn": {"method": how, "rule": rule, "epochs": 2, "lr": changes.pop("lr", 0.1), "seed": seed},
        "origin": {
            "model": {"arch": "small_cnn", "options": {}},
            "data": {"name": "digits", "dir": "/home/maria/patient-7", "class_order": "names.txt", "workers": 0},
            "train": {"epochs": 3, "seed": seed},
            "fingerprint": "f" * 64,
            "n_classes": 10,
            "input_shape": [1, 8, 8],
        },
        "forget": {
            "rule": f"3 of 100 samples, drawn at random with seed {seed}",
            "n": 3,
            "hash": f"{seed:064x}",
        },
        "ids": ["patient-7-a.png", "patient-7-b.png", "patient-7-c.png"],
        "history": [{"epoch": e, "retain_accuracy": 95.0, "forget_accuracy": 95.0 - e} for e in (1, 2)],
        "versions": {"python": "3.11.1", "torch": "2.6"},
        "metrics": own
        | {"gap": gap(own, reference), "reference": reference, "original": original, "reasons": {}, "seed": seed}
        | {"n": {"retain": 97, "forget": 3, "test": 50}},
    } | changes


def without_reference() -> dict[str, Any]:
    """A run with neither test set nor retrained model."""
    made = run()
    made["origin"]["train"] = None
    made["metrics"] |= metrics(95.0, 90.0, None, tow=None, seconds=2.0)
    made["metrics"] |= {"gap": None, "reference": None, "original": None}
    lack = "no test set was given"
    names = ("test_accuracy", "test_loss", "tow", "tow_signed", "threshold_confidence")
    made["metrics"]["reasons"] = dict.fromkeys(names, lack) | {"gap": "nothing is known of <how> it was trained"}
    made["history"] = []
    return made


class Page(HTMLParser):
    """Checks nesting, and collects attributes, ids and the text that a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def page(runs: list[dict[str, Any]], **options: Any) -> Page:
    return Page(render(summarise(runs), **options))


def unlearned(runs: list[dict[str, Any]]) -> list[str]:
    return [g.label for g in group(runs) if g.kind == "unlearned"]


# --- grouping and figures ---------------------------------------------------------------------------------------------


def test_seeds_of_one_setting_are_averaged_with_their_interval() -> None:
    table = summarise([run(s) for s in (0, 1, 2)])
    original, retrained, row = table.rows
    assert [r.group.label for r in table.rows] == ["Original", "Retrained", "NegGrad"]
    assert [original.n, retrained.n, row.n] == [3, 3, 3]
    value = row.cells["retain_accuracy"].value  # 95, 96, 97: standard deviation 1
    assert value is not None
    assert value.half_width is not None
    assert value.mean == pytest.approx(96.0)
    assert value.half_width == pytest.approx(T_2 / math.sqrt(3), rel=1e-9)
    difference = row.cells["retain_accuracy"].gap  # −1, 0, 1
    assert difference is not None
    assert difference.mean == pytest.approx(0.0)
    share = row.cells["seconds_share"].value  # 10, 15, 20 %
    assert share is not None
    assert share.mean == pytest.approx(15.0)
    assert "95 % t interval" in table.caption
    assert "n = 3" in table.caption


def test_a_single_run_has_no_interval_and_says_so() -> None:
    table = summarise([run()])
    value = table.rows[-1].cells["tow"].value
    assert value is not None
    assert value.half_width is None
    assert "no interval" in table.caption
    assert "±" not in to_text(table, width=200)


def test_a_run_given_twice_counts_once() -> None:
    assert summarise([run(0), copy.deepcopy(run(0)), run(1)]).rows[-1].n == 2


def test_references_are_counted_once_for_a_seed_and_forget_set() -> None:
    runs = [run(s, method=m) for s in (0, 1) for m in ("neggrad", "finetune")]
    assert [(r.group.label, r.n) for r in summarise(runs).rows] == [
        ("Original", 2),
        ("Retrained", 2),
        ("NegGrad", 2),
        ("Fine-tuning", 2),
    ]


def test_labels_name_the_rule_and_only_what_differs() -> None:
    sam = {"name": "sam", "rho": 0.1}
    runs = [
        run(rule=sam, alpha=0.9),
        run(rule=sam, alpha=0.99),
        run(method="sharp_minmax", rule={"name": "asam", "rho": 1.0}),
    ]
    assert unlearned(runs) == ["NegGrad · SAM ρ=0.1 · α=0.9", "NegGrad · SAM ρ=0.1 · α=0.99", "Sharp MinMax · ASAM ρ=1"]
    assert unlearned(runs[:1]) == ["NegGrad · SAM ρ=0.1"]
    assert unlearned([run(lr=0.1), run(lr=0.2)]) == ["NegGrad · lr=0.1", "NegGrad · lr=0.2"]


def test_different_forget_tasks_are_not_averaged() -> None:
    other = run(1, forget={"rule": "all 9 samples of the class 'cat'", "n": 9, "hash": "c" * 64})
    found = [g for g in group([run(0), other]) if g.kind == "unlearned"]
    assert [g.title for g in found] == ["A: NegGrad", "B: NegGrad"]
    named = {"rule": "3 samples named by id", "n": 3}
    two_requests = [run(0, forget=named | {"hash": "a" * 64}), run(0, forget=named | {"hash": "b" * 64})]
    assert len([g for g in group(two_requests) if g.kind == "unlearned"]) == 2
    assert len(verdicts(summarise(two_requests))) == 2
    assert page(two_requests).open == []


def test_a_value_missing_in_one_of_several_runs_is_missing_with_its_reason() -> None:
    runs = [run(0), run(1)]
    runs[1]["metrics"]["tow"] = None
    runs[1]["metrics"]["reasons"] = {"tow": "because"}
    cell = summarise(runs).rows[-1].cells["tow"]
    assert cell.value is None
    assert cell.reason == "missing in 1 of 2 runs: because"


def test_a_figure_that_is_not_finite_is_refused() -> None:
    broken = run()
    broken["metrics"]["tow"] = math.nan
    with pytest.raises((UserError, ValueError)):
        summarise([broken])


# --- renderers --------------------------------------------------------------------------------------------------------


def test_renderers_agree_on_the_figures() -> None:
    table = summarise([run(s) for s in (0, 1, 2)])
    half = f"{T_2 / math.sqrt(3):.1f}"
    assert f"| NegGrad | 3 | 96.0 ± {half} (+0.0 ± {half}) |" in to_markdown(table)
    shown = to_text(table, width=200)
    assert f"96.0 ± {half} " in shown
    assert f"(+0.0 ± {half})" in shown
    rows = [r for r in csv.DictReader(io.StringIO(to_csv(table))) if r["kind"] == "unlearned"]
    first = next(r for r in rows if r["metric"] == "retain_accuracy")
    stored = json.loads(to_json(table))["rows"][-1]["values"]["retain_accuracy"]
    assert float(first["mean"]) == stored["value"]["mean"] == 96.0
    assert float(first["gap_half_width"]) == stored["gap"]["half_width"]
    assert first["seeds"] == "0 1 2"
    missing = next(r for r in rows if r["metric"] == "peak_memory_bytes")
    assert missing["mean"] == ""
    assert missing["reason"]


def test_what_is_missing_is_a_dash_with_a_footnote() -> None:
    text = to_markdown(summarise([without_reference()]))
    assert r"— \[1\]" in text
    assert "[1] no test set was given." in text


def test_markdown_cells_do_not_break_the_table() -> None:
    text = to_markdown(summarise([run(method="odd|name")]))
    assert "Odd\\|name" in text


def with_details(seed: int = 0) -> dict[str, Any]:
    """A run with divergence, calibration and classes beside the rest; every class has forgotten samples."""
    made = run(seed)
    for part, shift in (("reference", 0.0), ("original", 2.0), (None, 1.0 + seed)):
        classes = {"worst_gap": -8 * shift, "worst_gap_if_alike": -3.0, "classes_lower": 1.0, "other_classes_gap": None}
        found = {
            "divergence": {"forget_divergence": {"kl": 0.25 * shift, "churn": 10 * shift, "js": 0.1, "l2": 0.2}},
            "calibration": {"test_calibration": {"ece": 4.0 + shift, "brier": 0.5}},
            "per_class": {"test_classes": classes},
        }
        where = made["metrics"] if part is None else made["metrics"][part]
        where |= found
    made["metrics"]["gap"] |= {"calibration": {"test_calibration": {"ece": 1.0 + seed, "brier": 0.0}}}
    return made


def test_details_stand_in_small_tables_and_all_of_them_in_the_data() -> None:
    table = summarise([with_details(0), with_details(1)])
    text = to_markdown(table)
    assert [g.title for g in grids(table)][-3:] == ["Divergence from the retrained network", "Calibration", "Classes"]
    assert "| Figure | Original | Retrained | NegGrad |" in text
    assert "| Forget: KL (nats) | 0.500 ± 0.000 | 0.000 ± 0.000 | 0.375 ± " in text  # ¼ and ½
    assert "| Test: expected calibration error (%) | 6.0 ± 0.0 (+2.0 ± 0.0) | 4.0 ± 0.0 | 5.5 ± " in text
    assert "| Test: lowest gap of a class (points) | −16.0 ± 0.0 | 0.0 ± 0.0 | −12.0 ± " in text
    assert "Jensen" not in text
    by_key = {r["metric"]: r for r in csv.DictReader(io.StringIO(to_csv(table))) if r["kind"] == "unlearned"}
    assert float(by_key["divergence.forget_divergence.js"]["mean"]) == pytest.approx(0.1)
    assert "per_class.test_classes.other_classes_gap" not in by_key  # no network has one
    assert page([with_details()]).open == []
    assert "Divergence on forget" in page([with_details()]).text  # what it means is explained
    assert not {"Calibration", "Classes"} & {g.title for g in grids(summarise([run()]))}


def test_every_detail_is_a_value_of_a_metric() -> None:
    rng = np.random.default_rng(0)
    labels = [np.append(rng.integers(0, 3, n), 3) for n in (20, 8, 10)]
    labels[1] %= 3
    ours, theirs = (Outputs(*(Predictions(rng.normal(size=(len(y), 4)), y) for y in labels)) for _ in range(2))
    values = measure(Evidence(ours, theirs), ())
    expected = {
        f"{name}.{metric}.{key}"
        for name in ("divergence", "calibration", "per_class")
        for metric, found in values[name].items()
        for key in found
    }
    assert {detail.key for detail in details()} == expected


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_are_the_same_bytes_again_and_carry_no_date_or_link() -> None:
    table = summarise([run(0), run(1), run(0, method="finetune", accuracy=80.0)])
    for draw in figures.FIGURES.values():
        svg = draw(table)
        assert svg is not None
        assert svg == draw(table)
        assert "metadata" not in svg
        assert 'href="http' not in svg


def test_figures_without_data_are_left_out() -> None:
    table = summarise([without_reference()])
    drawn = {name for name, draw in figures.FIGURES.items() if draw(table) is not None}
    assert drawn == {"accuracies"}


def test_more_groups_than_colours_stay_apart() -> None:
    table = summarise([run(lr=0.01 * (i + 1)) for i in range(9)])
    looks = [figures._look(table, row) for row in table.of_kind("unlearned")]
    assert len({look[:2] for look in looks}) == 9


def test_inlined_ids_are_unique_in_a_page() -> None:
    parsed = page([run(0), run(1)])
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert "xmlns" not in inline(figures.accuracies(summarise([run()])) or "", "x")
    targets = [a["href"] or "" for _, a in parsed.tags if "href" in a]
    assert all(t[1:] in ids for t in targets)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_page_is_whole_offline_and_accessible() -> None:
    text = render(summarise([run(s, method=m) for s in (0, 1) for m in ("neggrad", "sharp_minmax")]))
    parsed = Page(text)
    assert parsed.open == []
    assert "://" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"img", "link", "iframe", "object", "embed", "form"}
    own = (Path(figures.__file__).parent / SCRIPT).read_text()
    assert re.findall(r"<script>(.*?)</script>", text, re.DOTALL) == [own]  # the one that sorts tables
    assert text.count("<script") == 1
    assert all((a["href"] or "").startswith("#") for _, a in parsed.tags if "href" in a)
    assert all("src" not in a for _, a in parsed.tags)
    assert ("html", {"lang": "en"}) in parsed.tags
    assert sum(tag == "table" for tag, _ in parsed.tags) == sum(tag == "caption" for tag, _ in parsed.tags)
    drawings = [a for tag, a in parsed.tags if tag == "div" and a.get("role") == "img"]
    assert len(drawings) == len(figures.FIGURES)
    assert all(a["aria-label"] for a in drawings)


def test_same_runs_give_the_same_bytes(tmp_path: Any) -> None:
    for name in ("a.html", "b.html"):
        write_report(tmp_path / name, [run(0), run(1)])
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert list(tmp_path.glob(".*")) == []


def test_exported_tables_hold_the_same_figures_and_intervals(tmp_path: Path) -> None:
    table = summarise([run(s, alpha=a) for s in range(3) for a in (0.5, 0.6)])
    for ending in WRITERS:
        write_table(tmp_path / f"t{ending}", table)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))
    frame = pandas.read_parquet(tmp_path / "t.parquet")
    assert [str(c) for c in frame.columns] == list(rows[0])
    for name in ("mean", "low", "high", "gap_mean", "gap_half_width"):
        read = [float(row[name]) if row[name] else math.nan for row in rows]
        np.testing.assert_array_equal(frame[name].to_numpy(float), read)
    latex = (tmp_path / "t.tex").read_text()
    values = [float(r["mean"]) for r in rows if r["metric"] == "forget_accuracy"]
    for value in values:
        assert f"{value:.1f}" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == len(grids(table))
    for block in re.findall(r"\\begin\{tabular\}\{(l r*|lr*)\}(.*?)\\end", latex, re.DOTALL):
        lines = [line for line in block[1].splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(block[0])}
    with pytest.raises(UserError, match="must end in"):
        write_table(tmp_path / "t.xls", table)


def test_hostile_names_are_text_in_latex() -> None:
    table = summarise([run(0, method=r"\input{/etc/passwd} 50% & $x$ #1 _^~ \n")])
    latex = "".join(line for line in to_latex(table).splitlines(keepends=True) if not line.startswith("%"))
    assert r"\input" not in latex
    assert r"\textbackslash{}" in latex
    for sign in "%$#_":
        assert not re.search(rf"(?<!\\)\{sign}(?!\\|-\$|$)", re.sub(r"\$-\$|\$\\\w+\$", "", latex))


def test_no_runs_are_refused(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="at least one"):
        write_report(tmp_path / "x.html", [])


def test_nothing_names_the_forget_set_unless_asked() -> None:
    runs = [run()]
    runs[0]["unlearn"]["mask"] = "masks/of/patient-7.safetensors"
    hidden = render(summarise(runs))
    assert "patient" not in hidden
    assert "maria" not in hidden
    assert "names.txt" not in hidden
    shown = page(runs, show_samples=True)
    assert "patient-7-a.png" in shown.text
    assert any(tag == "details" for tag, _ in shown.tags)
    assert "maria" not in shown.text


def test_ids_that_are_not_known_are_said_to_be() -> None:
    made = run()
    del made["ids"]
    assert "not part of these results" in page([made], show_samples=True).text


def test_everything_given_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    made = run(0, method=f"m{evil}", forget={"rule": f"all of class '{evil}'", "n": 3, "hash": "a" * 64})
    made["origin"]["model"]["arch"] = evil
    made["origin"]["data"]["name"] = '"><img src=x onerror=alert(1)>'
    made["ids"] = [evil]
    made["versions"] = {evil: evil}
    made["metrics"]["mia"] = {evil: {"mia": 1.0, "attack_accuracy": 60.0}}
    made["metrics"]["reasons"] = {evil: evil}
    text = render(summarise([made]), title=f"T {evil}", show_samples=True)
    parsed = Page(text)
    assert "img" not in {tag for tag, _ in parsed.tags}
    assert [tag for tag, _ in parsed.tags].count("script") == text.count("<script") == 1
    assert f"T {evil}" in parsed.text
    assert not any(name.startswith("on") for _, a in parsed.tags for name in a)


def test_missing_test_set_and_reference_are_explained() -> None:
    parsed = page([without_reference()])
    assert parsed.open == []
    assert "No test set was given." in parsed.text
    assert "nothing is known of <how> it was trained" in parsed.text
    assert "how close this is to retraining is not known" in parsed.text


def test_verdict_says_what_the_figures_say() -> None:
    (verdict,) = verdicts(summarise([run(s) for s in (0, 1, 2)]))
    text = " ".join(t for _, t in verdict.points).replace("\u00a0", " ")
    assert verdict.headline.startswith("3 samples unlearned with NegGrad: some way from retraining")
    assert "The largest gap is in forget accuracy: +5.0 ± 0.0 points, above" in text
    assert "ToW is 91.0 ± 2.5" in text
    assert "15.0 ± 12.4 % of the time that retraining took" in text
    assert "something of the forget set is left" in text
    assert "ToW changed by +11.0 ± 2.5 points." in text


def test_verdict_tells_when_nothing_was_gained() -> None:
    runs = [run(s) for s in (0, 1)]
    for r in runs:
        r["metrics"]["original"]["tow"] = r["metrics"]["tow"]
    (verdict,) = verdicts(summarise(runs))
    assert "no closer than before unlearning" in verdict.headline


def test_verdict_does_not_rank_what_the_runs_do_not_tell_apart() -> None:
    runs = [run(s, method=m) for s in (0, 1, 2) for m in ("neggrad", "finetune")]
    for i, r in enumerate(runs):
        r["metrics"]["tow"] += 0.1 * (i % 3)
    (verdict,) = verdicts(summarise(runs))
    text = dict(verdict.points)["Which method"]
    assert "do not tell it apart" in text


def test_corrected_samples_are_not_told_of_as_removed() -> None:
    """They are a group of their own, whatever the digests of their seeds, and the verdict says what it is judged by."""
    removed = [run(seed) for seed in range(2)]
    corrected = [run(seed, corrections={"digest": f"{seed:064x}", "n": 3}) for seed in range(2)]
    rows = {row.group.label: row.n for row in summarise([*removed, *corrected]).of_kind("unlearned")}
    assert rows == {"NegGrad": 2, "NegGrad, corrected": 2}
    (verdict,) = verdicts(summarise(corrected))
    text = dict(verdict.points)["What was corrected"]
    assert text.startswith("NegGrad, corrected: the samples were not removed")
    assert "The retrained network has learnt without the samples" in text
    assert "forget accuracy is that on the samples as they were, under the labels that may be wrong" in text
    assert text in html.unescape(render(summarise(corrected)))
    (verdict,) = verdicts(summarise(removed))
    assert "What was corrected" not in dict(verdict.points)
