"""The report command: pictures where asked for, figures and PDF besides, and the page of a `landscape` run."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from integration.helpers import QUICK, call, done, read

pytestmark = pytest.mark.xdist_group("report_command")  # one process makes what all of them read

ATTACKS = ("--attacks", "threshold_confidence", "--threads", 1)


@pytest.fixture(scope="module")
def place(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unlearned network, evaluated with and without pictures, and its surroundings."""
    root, how = tmp_path_factory.mktemp("place"), ("--method", "neggrad", "--epochs", 1, "--lr", 0.02, *QUICK)
    store = ("--store", root / "store")
    done("unlearn", "--model", trained, "--random", 40, "--out", root / "unlearned", *how)
    done("evaluate", root / "unlearned", "--out", root / "plain", *store, "--no-features", *ATTACKS)
    more = ("--pictures", 5, "--original", trained, "--no-features")
    done("evaluate", root / "unlearned", "--out", root / "pictured", *store, *more, *ATTACKS)
    around = ("--parts", "surface", "--points", 3, "--n-samples", 20, "--original", trained, "--threads", 1)
    done("landscape", root / "unlearned", "--out", root / "around", *store, *around)
    return root


def test_pictures_are_kept_and_shown_only_if_asked(place: Path, here: Path) -> None:
    assert not (place / "plain" / "pictures.json").exists()
    kept = read(place / "pictured" / "pictures.json")
    ids = read(place / "pictured" / "about.json")["ids"]
    digits = load_digits()
    for sample in kept["samples"]:
        assert sample["id"] in ids
        with Image.open(io.BytesIO(base64.b64decode(sample["png"]))) as picture:
            shown = np.asarray(picture).astype(int)
        # digits are given as 0 to 16; ids are places among those that train
        (at,) = np.flatnonzero(np.abs(digits.images * 255 / 16 - shown).max(axis=(1, 2)) <= 1)
        assert sample["label"] == digits.target[at]
    assert kept["networks"] == ["original", "model", "reference"]
    done("report", place / "pictured", "--out", here / "silent.html")
    done("report", place / "pictured", "--pictures", 3, "--out", here / "asked.html")
    assert "<img" not in (here / "silent.html").read_text()
    asked = (here / "asked.html").read_text()
    data = re.findall(r'src="data:image/png;base64,([^"]+)"', asked)
    assert data == [sample["png"] for sample in kept["samples"][:3]]
    assert "img-src data:" in asked


def refusals(place: Path) -> dict[str, tuple[tuple[Any, ...], str]]:
    return {
        "none kept": (("report", place / "plain", "--pictures", 1), "kept no pictures"),
        "too few": (("report", place / "pictured", "--pictures", 6), "kept 5 pictures"),
        "too many": (("report", place / "pictured", "--pictures", 1000), "0 to 100"),
        "of a landscape": (("report", place / "around", "--pictures", 1), "takes no --pictures"),
        "table of one": (("report", place / "around", "--table", "x.csv"), "takes no --table"),
        "mixed": (("report", place / "around", place / "plain"), "one `landscape` run alone"),
        "of a directory": (("report", place, "--figure", "cost.pdf"), "takes no --figure"),
        "figure": (("report", place / "plain", "--figure", "what.pdf"), "one of the figures"),
        "no surface": (("report", place / "around", "--figure", "ways.pdf"), "surface-forget"),
        "no data": (("evaluate", place / "pictured", "--pictures", 2, *ATTACKS), "need the samples"),
    }


@pytest.mark.parametrize("name", list(refusals(Path())))
def test_what_cannot_be_is_refused_in_a_line(name: str, place: Path, here: Path) -> None:
    words, match = refusals(place)[name]
    answer = call(*words)
    assert answer.code == 2
    assert match in answer.err
    assert list(here.iterdir()) == []


def test_a_landscape_run_has_a_page_that_turns(place: Path, here: Path) -> None:
    done("report", place / "around", "--out", here / "a.html", "--figure", here / "surface-forget.pdf")
    page = (here / "a.html").read_text()
    assert page.count('class="scene"') == 9  # three networks on three sets
    assert "Plotly" in page
    assert (here / "surface-forget.pdf").read_bytes().startswith(b"%PDF")
    assert "next: unsharp report" in done(
        "landscape", place / "unlearned", "--parts", "sharpness", "--steps", 1, "--restarts", 1, "--draws", 2,
        "--n-samples", 10, "--on", "forget", "--store", place / "store", "--threads", 1, "--out", here / "sharp",
    ).out  # fmt: skip
    done("report", here / "sharp", "--out", here / "s.html")
    assert "<script" not in (here / "s.html").read_text()
