"""Accuracy on corrupted inputs against loops over images that were corrupted beforehand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from unsharp.artifacts import Workspace
from unsharp.data import ImageSamples, from_torch_dataset
from unsharp.data.corruption import Corruption
from unsharp.data.samples import TensorSamples
from unsharp.errors import UserError
from unsharp.evaluation import predict
from unsharp.evaluation.robustness import Corrupted, Robustness
from unsharp.report.robustness import curves

SMALL = Robustness(corruptions=("gaussian_noise", "contrast"), severities=(1, 4), n_samples=0, batch_size=7)


def samples(n: int = 40, channels: int = 3, seed: int = 0) -> ImageSamples:
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (n, 6, 6, channels), dtype=np.uint8)
    return ImageSamples(pixels, draw.integers(0, 3, n), ["a", "b", "c"], mean=(0.4,), std=(0.3,))


def network(seed: int, channels: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(36 * channels, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


NETWORKS = {"original": network(0), "unlearned": network(1), "retrained": network(2)}


def sets(part: ImageSamples | None = None) -> dict[str, Any]:
    whole = part or samples()
    return {
        "retain": (whole, np.arange(10, 40)),
        "forget": (whole, np.arange(10)),
        "test": (samples(20, 3, 5), np.arange(20)),
    }


def corrupted_beforehand(part: ImageSamples, how: Corruption) -> ImageSamples:
    found = how(part.images.contiguous(), torch.arange(len(part)))
    return ImageSamples(found, part.labels, part.class_names, mean=part.mean, std=part.std)


@pytest.mark.parametrize("name", ["gaussian_noise", "snow", "brightness"])
@pytest.mark.parametrize("channels", [1, 3])
def test_samples_corrupted_as_they_are_read_are_those_corrupted_beforehand(name: str, channels: int) -> None:
    whole, how = samples(23, channels), Corruption(name, 3)
    expected = predict(network(0, channels), corrupted_beforehand(whole, how), np.arange(23))
    for batch_size in (5, 23):
        found = predict(network(0, channels), Corrupted(whole, how), np.arange(23), batch_size)
        np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
        np.testing.assert_array_equal(found.labels, expected.labels)
    part = np.array([4, 9, 17])
    some = predict(network(0, channels), Corrupted(whole, how).subset(part), np.arange(3))
    np.testing.assert_allclose(some.logits, expected.logits[part], atol=1e-5)


def test_the_figures_are_those_of_loops() -> None:
    data = sets()
    found = SMALL.measure(NETWORKS, data)
    for on, (part, indices) in data.items():
        one, right = found["sets"][on], {}
        for name, model in NETWORKS.items():
            clean = predict(model, part, indices)
            right[name, "clean"] = clean.logits.argmax(1) == clean.labels
            assert one["clean"][name] == pytest.approx(100 * right[name, "clean"].mean())
            rows = []
            for corruption in ("gaussian_noise", "contrast"):
                for severity in (1, 4):
                    said = predict(model, corrupted_beforehand(part, Corruption(corruption, severity)), indices)
                    rows.append(said.logits.argmax(1) == said.labels)
                    assert one["corrupted"][corruption][str(severity)][name] == pytest.approx(100 * rows[-1].mean())
            right[name, "share"] = 100 * np.mean(rows, axis=0)
            assert one["mean"][name] == pytest.approx(right[name, "share"].mean())
            assert one["drop"][name] == pytest.approx(one["clean"][name] - one["mean"][name])
        apart = right["unlearned", "share"] - right["retrained", "share"]
        assert one["gap"]["mean"] == pytest.approx(apart.mean())
        quantile = {30: 2.0452, 10: 2.2622, 20: 2.0930}[len(apart)]  # Student's t at 0.975, n − 1 degrees of freedom
        error = apart.std(ddof=1) / math.sqrt(len(apart))
        assert one["gap"]["half_width"] == pytest.approx(quantile * error, rel=1e-3)
        assert one["drop_gap"]["mean"] == pytest.approx(one["drop"]["unlearned"] - one["drop"]["retrained"])
    assert curves(found).startswith("<svg")


def test_equal_networks_have_no_gap_and_without_a_retrained_one_there_is_none() -> None:
    same = SMALL.measure({"unlearned": network(1), "retrained": network(1)}, sets())
    assert all(one["gap"]["mean"] == 0 and one["drop_gap"]["half_width"] == 0 for one in same["sets"].values())
    alone = SMALL.measure({"unlearned": network(1)}, sets())
    assert all(one["gap"] is None for one in alone["sets"].values())


def test_networks_are_left_as_they_are_and_the_seed_decides() -> None:
    before = {name: value.clone() for name, value in NETWORKS["unlearned"].state_dict().items()}
    NETWORKS["unlearned"].train()
    one, again = (SMALL.measure(NETWORKS, sets()) for _ in range(2))
    assert one == again
    assert NETWORKS["unlearned"].training
    assert all(torch.equal(value, before[name]) for name, value in NETWORKS["unlearned"].state_dict().items())
    noise = Robustness(corruptions=("gaussian_noise",), severities=(5,), n_samples=0, seed=3)
    other = Robustness(corruptions=("gaussian_noise",), severities=(5,), n_samples=0, seed=4)
    assert noise.measure(NETWORKS, sets())["sets"] != other.measure(NETWORKS, sets())["sets"]


def test_a_killed_run_looks_at_nothing_twice(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unsharp.evaluation import robustness

    whole, seen = robustness.correct, [0]

    def counted(*arguments: Any) -> Any:
        seen[0] += 1
        if seen[0] == 8:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(robustness, "correct", counted)
    with pytest.raises(KeyboardInterrupt):
        SMALL.measure(NETWORKS, sets(), workspace=Workspace(tmp_path))
    found = SMALL.measure(NETWORKS, sets(), workspace=Workspace(tmp_path))
    assert seen[0] == 15 + 1  # three sets, clean and four corruptions; the eighth was begun twice
    assert found == SMALL.measure(NETWORKS, sets())


class Pictures(Dataset[Any]):
    """Images as a user's Dataset gives them, normalised in a way of its own."""

    def __init__(self, part: ImageSamples, normalised: bool) -> None:
        self.part, self.normalised = part, normalised

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        x = self.part.images[i].permute(2, 0, 1).float() / 255
        return (x - 0.4) / 0.3 if self.normalised else x, int(self.part.labels[i])


def test_inputs_of_a_dataset_are_on_the_scale_of_images_or_their_scale_is_given() -> None:
    whole, how = samples(12), Corruption("contrast", 3)
    expected = predict(network(0), corrupted_beforehand(whole, how), np.arange(12)).logits
    normalised = from_torch_dataset(Pictures(whole, True), device="cpu")
    given = predict(network(0), Corrupted(normalised, how, mean=(0.4,), std=(0.3,)), np.arange(12)).logits
    np.testing.assert_allclose(given, expected, atol=1e-4)
    with pytest.raises(UserError, match="give mean and std"):
        predict(network(0), Corrupted(normalised, how), np.arange(12))
    plain = from_torch_dataset(Pictures(whole, False), device="cpu")
    assert predict(network(0), Corrupted(plain, how), np.arange(12)).logits.shape == (12, 3)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"corruptions": ("sno",)}, "did you mean 'snow'"),
        ({"corruptions": ()}, "at least one"),
        ({"severities": (1, 1)}, "none twice"),
        ({"severities": (6,)}, "1 to 5"),
        ({"on": ("tset",)}, "did you mean 'test'"),
        ({"n_samples": -1}, "n_samples"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_mistakes_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Robustness(**wrong)


def test_what_cannot_be_corrupted_is_refused() -> None:
    vectors = TensorSamples(torch.rand(8, 5), np.arange(8) % 2)
    with pytest.raises(UserError, match="images of 1 or 3 channels"):
        SMALL.measure({"unlearned": nn.Linear(5, 2)}, {"forget": (vectors, np.arange(4))})
    with pytest.raises(UserError, match="lacks 'unlearned'"):
        SMALL.measure({"original": network(0)}, sets())
    with pytest.raises(UserError, match="no such samples"):
        Robustness(on=("test",)).measure(NETWORKS, {"forget": (samples(), np.arange(3))})
    broken = network(1)
    with torch.no_grad():
        broken[1].weight.fill_(math.nan)  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(UserError, match="unlearned network are not finite"):
        SMALL.measure({"unlearned": broken}, sets())
