"""Pictures of forgotten samples: the pixels and answers they show, and that none is shown unless asked."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_report import run

from unsharp.data import ImageSamples, TensorSamples
from unsharp.difficulty import ForgetSet
from unsharp.errors import UserError
from unsharp.evaluation.pictures import check_pictures, pictures
from unsharp.evaluation.predictions import Predictions
from unsharp.report import figures
from unsharp.report.groups import group
from unsharp.report.html import render
from unsharp.report.pictures import galleries, percent
from unsharp.report.tables import summarise

HOSTILE = '"><img src=x onerror="document.title=\'owned\'"><script>x</script>'


def problem(channels: int = 3, side: int = 9, n: int = 40) -> tuple[ImageSamples, ForgetSet, dict[str, Predictions]]:
    rng = np.random.default_rng(channels + side)
    images = rng.integers(0, 256, (n, side, side + 2, channels), dtype=np.uint8)
    names = [f"class {k} {HOSTILE}" for k in range(5)]
    ids = [f"patient-{i}" for i in range(n)]
    samples = ImageSamples(images, rng.integers(0, 5, n), names, ids=ids)
    chosen = np.sort(rng.choice(n, 12, replace=False))
    forget = ForgetSet(chosen, np.array(ids)[chosen], "12 samples", None, n, samples.fingerprint)
    said = {
        name: Predictions(rng.normal(0, 3, (12, 5)).astype(np.float32), samples.labels[chosen])
        for name in ("original", "model", "reference")
    }
    return samples, forget, said


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_labels_and_answers_are_those_of_the_samples(channels: int) -> None:
    samples, forget, said = problem(channels)
    kept = pictures(samples, forget, said, 7, seed=3)
    assert (kept["n"], kept["asked"], len(kept["samples"])) == (12, 7, 7)
    assert kept["networks"] == ["original", "model", "reference"]
    places = []
    for sample in kept["samples"]:
        at = int(sample["id"].removeprefix("patient-"))
        row = forget.indices.tolist().index(at)
        places.append(row)
        with Image.open(io.BytesIO(base64.b64decode(sample["png"]))) as picture:
            shown = np.asarray(picture).reshape(9, 11, channels)
        np.testing.assert_array_equal(shown, samples.images[at].numpy())
        assert sample["label"] == samples.labels[at]
        for name, predictions in said.items():
            expected = torch.softmax(torch.from_numpy(predictions.logits[row]).double(), 0)
            values, classes = expected.topk(3)
            answer = sample["answers"][name]
            assert answer["classes"] == classes.tolist()
            np.testing.assert_allclose(answer["probabilities"], values.numpy(), rtol=1e-9)
            assert answer["true"] == pytest.approx(float(expected[sample["label"]]), rel=1e-9)
    assert places == sorted(set(places))
    assert pictures(samples, forget, said, 7, seed=3) == kept
    assert pictures(samples, forget, said, 7, seed=4) != kept
    assert len(pictures(samples, forget, said, 100, seed=3)["samples"]) == 12


def test_large_images_are_made_smaller() -> None:
    samples, forget, said = problem(3, side=300, n=13)
    (sample,) = pictures(samples, forget, said, 1, seed=0)["samples"]
    with Image.open(io.BytesIO(base64.b64decode(sample["png"]))) as picture:
        assert max(picture.size) == 256
        assert picture.mode == "RGB"


def test_what_is_no_picture_is_refused() -> None:
    samples, *_ = problem(2)
    tensors = TensorSamples(torch.zeros(4, 3), [0, 1, 0, 1])
    for n, of, match in (
        (101, None, "0 to 100"),
        (-1, None, "0 to 100"),
        (1, tensors, "uint8"),
        (1, samples, "1 or 3"),
    ):
        with pytest.raises(UserError, match=match):
            check_pictures(n, of)
    check_pictures(0, tensors)


def with_pictures(**changes: Any) -> dict[str, Any]:
    return {**run(), "pictures": pictures(*problem(), 6, seed=0)} | changes


def test_the_page_shows_them_only_if_asked_and_names_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "FIGURES", {})
    made = with_pictures()
    silent, asked = (render(summarise([made]), pictures=n) for n in (0, 4))
    assert not re.search(r"<img|img-src|base64|patient-\d", silent)
    assert "samples that were to be forgotten" not in silent
    shown = re.findall(r'<img class="small" src="data:image/png;base64,([^"]+)" alt="([^"]*)">', asked)
    assert [data for data, _ in shown] == [sample["png"] for sample in made["pictures"]["samples"][:4]]
    assert asked.count("<img") == 4
    assert "img-src data:" in asked[: asked.index("<title>")]
    assert "This page shows samples that were to be forgotten" in asked
    assert "4 of 12 forgotten samples" in asked
    assert "<script>x" not in asked
    assert "patient-1" not in asked
    named = render(summarise([made]), pictures=4, show_samples=True)
    assert all(sample["id"] in named for sample in made["pictures"]["samples"][:4])
    first = made["pictures"]["samples"][0]
    for answer in first["answers"].values():
        assert percent(answer["probabilities"][0]).replace("<", "&lt;").replace(">", "&gt;") in asked


def test_pictures_that_are_missing_few_or_broken_are_refused() -> None:
    evil = with_pictures()
    evil["pictures"]["samples"][0]["png"] = 'x" onerror="alert(1)'
    gif = with_pictures()
    gif["pictures"]["samples"][0]["png"] = base64.b64encode(b"GIF89a" + b"\0" * 40).decode()
    for runs, n, match in (
        ([run()], 2, "kept no pictures; evaluate its `unlearn` run again with --pictures 2"),
        ([with_pictures()], 7, "kept 6 pictures"),
        ([evil], 2, "no PNG"),
        ([gif], 2, "no PNG"),
    ):
        with pytest.raises(UserError, match=match):
            galleries(group(runs), n)


def test_probabilities_near_the_ends_are_not_rounded_to_them() -> None:
    shares = (0.0, 1e-9, 0.0005, 0.001, 0.5, 0.999, 0.9995, 1.0)
    assert [percent(p) for p in shares] == [
        "0.0 %", "< 0.1 %", "< 0.1 %", "0.1 %", "50.0 %", "99.9 %", "> 99.9 %", "100.0 %",
    ]  # fmt: skip
