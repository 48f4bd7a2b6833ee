"""Corrupted images against scipy, colorsys and plain loops; their noise against SplitMix64 written out."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from unsharp import data
from unsharp.data import DataConfig
from unsharp.data import corruption as c
from unsharp.data.corruption import CORRUPTIONS, Corruption, Noise
from unsharp.errors import UserError

ALL = (1 << 64) - 1
NUMBERS = torch.tensor([3, 17, 40, 2])


def images(shape: tuple[int, ...] = (4, 13, 17, 3), seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def floats(shape: tuple[int, ...] = (4, 3, 13, 17), seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(shape, dtype=np.float32))


# --- random numbers ---------------------------------------------------------------------------------------------------


def split_mix(state: int) -> int:
    """The output of SplitMix64 for a state, in Python's own integers."""
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & ALL
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & ALL
    return z ^ (z >> 31)


def test_the_generator_gives_its_known_sequence() -> None:
    states = [(1234567 + (i + 1) * 0x9E3779B97F4A7C15) & ALL for i in range(3)]
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [split_mix(s) for s in states] == known
    signed = torch.from_numpy(np.array(states, np.uint64).view(np.int64))
    assert [v & ALL for v in c.mixed(signed).tolist()] == known


def test_uniform_numbers_are_those_of_the_formula() -> None:
    found = Noise(5, NUMBERS).uniform(2, 3)
    for row, number in enumerate(NUMBERS.tolist()):
        key = split_mix((split_mix(number + 1) + 2 * 5 + 1) & ALL)
        expected = [(split_mix((key + (i + 1) * 0x9E3779B97F4A7C15) & ALL) >> 40) / 2**24 for i in range(6)]
        assert found[row].flatten().tolist() == expected


def test_numbers_have_their_distributions_and_do_not_repeat() -> None:
    noise = Noise(0, torch.arange(400))
    uniform, normal = noise.uniform(500).numpy(), noise.normal(500).numpy()
    assert stats.kstest(uniform.ravel(), "uniform").pvalue > 1e-3
    assert stats.kstest(normal.ravel(), "norm").pvalue > 1e-3
    again = noise.uniform(500).numpy()
    other = Noise(1, torch.arange(400)).uniform(500).numpy()
    for a, b in ((uniform, again), (uniform, other), (uniform[:-1], uniform[1:]), (uniform[:, 1:], uniform[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.012  # five deviations of 200,000 pairs
    whole = Noise(0, torch.arange(400)).whole(-2, 2, 500).numpy()
    assert stats.chisquare(np.bincount(whole.ravel() + 2)).pvalue > 1e-3


@pytest.mark.parametrize("name", list(CORRUPTIONS))
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_the_same_in_every_batch(name: str, channels: int) -> None:
    x, how = images((4, 13, 17, channels)), Corruption(name, 3)
    whole = how(x, NUMBERS)
    assert whole.dtype == torch.uint8
    assert whole.shape == x.shape
    turned = how(x.flip(0), NUMBERS.flip(0)).flip(0)
    single = torch.cat([how(x[i : i + 1], NUMBERS[i : i + 1]) for i in range(4)])
    for other in (turned, single):  # a kernel may round the other way in another batch
        assert int((whole.int() - other.int()).abs().max()) <= 1
    assert not torch.equal(whole, x)


# --- each against another computation ---------------------------------------------------------------------------------


def test_gaussian_noise_has_its_deviation() -> None:
    grey = torch.full((8, 40, 40, 3), 128, dtype=torch.uint8)
    for severity, deviation in enumerate((0.04, 0.06, 0.08, 0.09, 0.10), 1):
        found = Corruption("gaussian_noise", severity)(grey, torch.arange(8)).double() / 255
        assert float(found.std()) == pytest.approx(deviation, rel=0.02)
        assert float(found.mean()) == pytest.approx(128 / 255, abs=0.003)


def test_impulse_noise_hits_a_share_of_values_each_channel_by_itself() -> None:
    grey = torch.full((8, 60, 60, 3), 128, dtype=torch.uint8)
    found = Corruption("impulse_noise", 5)(grey, torch.arange(8))
    hit = found != 128
    assert set(found[hit].tolist()) == {0, 255}
    n = hit.numel()
    assert float(hit.double().mean()) == pytest.approx(0.07, abs=5 * math.sqrt(0.07 * 0.93 / n))
    assert float((found[hit] == 255).double().mean()) == pytest.approx(0.5, abs=0.05)
    both = float((hit[..., 0] & hit[..., 1]).double().mean())
    assert both == pytest.approx(0.07**2, rel=0.25)


@pytest.mark.parametrize("deviation", [0.05, 0.4, 1.0, 3.0, 6.0])
def test_gaussian_blur_equals_scipy(deviation: float) -> None:
    x = floats()
    expected = ndimage.gaussian_filter(x.double().numpy(), (0, 0, deviation, deviation), mode="nearest", truncate=4.0)
    np.testing.assert_allclose(c.gaussian_blur(x, deviation).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("strength", [(0.4, 1, 2), (0.9, 2, 1), (1.5, 4, 2)])
def test_glass_blur_equals_loops(strength: tuple[float, int, int]) -> None:
    deviation, reach, rounds = strength
    x, noise = floats((3, 2, 12, 15)), Noise(0, torch.arange(3))
    found = c.glass_blur(x, strength, Noise(0, torch.arange(3))).numpy()
    steps = [noise.whole(-reach, reach, 2, 12, 15).numpy() for _ in range(rounds)]

    def blurred(image: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(image, (deviation, deviation, 0), mode="nearest", truncate=4.0)

    for i in range(3):
        image = np.floor(c.gaussian_blur(x[i : i + 1], deviation)[0].permute(1, 2, 0).numpy() * 255)
        for step in steps:
            for h in range(12 - reach, reach, -1):
                for w in range(15 - reach, reach, -1):
                    dx, dy = step[i, :, h, w]
                    here, there = image[h, w].copy(), image[h + dy, w + dx].copy()
                    image[h, w], image[h + dy, w + dx] = there, here
        expected = blurred(image.astype(np.float64) / 255).transpose(2, 0, 1)
        np.testing.assert_allclose(found[i], expected, atol=2e-6)


@pytest.mark.parametrize("factor", [1.0, 1.25, 1.75, 2.5, 4.0])
@pytest.mark.parametrize("side", [8, 32, 64])
def test_the_zoom_equals_scipy(factor: float, side: int) -> None:
    x = floats((2, 1, side, side))
    part = math.ceil(side / factor)
    top = (side - part) // 2
    for i in range(2):
        middle = x[i, 0, top : top + part, top : top + part].double().numpy()
        large = ndimage.zoom(middle, (factor, factor), order=1)
        trim = (len(large) - side) // 2
        expected = large[trim : trim + side, trim : trim + side]
        np.testing.assert_allclose(c.zoomed(x, factor)[i, 0].numpy(), expected, atol=1e-5)


def streaked(image: np.ndarray, length: int, deviation: float, degrees: float) -> np.ndarray:
    """ImageMagick's motion blur of (H, W), pixel by pixel."""
    kernel = np.exp(-0.5 * (np.arange(2 * length + 1) / deviation) ** 2)
    kernel /= kernel.sum()
    height, width = image.shape
    found = np.zeros_like(image)
    for k, weight in enumerate(kernel):
        right = math.ceil(k * math.cos(math.radians(degrees)) - 0.5)
        down = math.ceil(k * math.sin(math.radians(degrees)) - 0.5)
        for h in range(height):
            for w in range(width):
                found[h, w] += weight * image[min(max(h + down, 0), height - 1), min(max(w + right, 0), width - 1)]
    return found


def test_the_motion_blur_equals_loops() -> None:
    x, degrees = floats((3, 1, 9, 14)), torch.tensor([-130.0, -91.5, -47.0])
    found = c.motion_blur(x, 4, 2.0, degrees).numpy()
    for i in range(3):
        expected = streaked(x[i, 0].double().numpy(), 4, 2.0, float(degrees[i]))
        np.testing.assert_allclose(found[i, 0], expected, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_snow_equals_its_steps(channels: int, severity: int) -> None:
    strength = CORRUPTIONS["snow"][1][0][severity - 1]
    mean, deviation, zoom, threshold, length, spread, kept = strength
    x, numbers = floats((2, channels, 32, 32)), torch.tensor([4, 9])
    found = c.snow(x, strength, Noise(0, numbers)).numpy()
    noise = Noise(0, numbers)
    drawn, turn = noise.normal(1, 32, 32), noise.uniform()
    layers = c.zoomed(mean + deviation * drawn, zoom).numpy()  # itself tested above
    for i in range(2):
        layer = layers[i, 0].astype(np.float64)
        layer[layer < threshold] = 0
        layer = np.floor(np.clip(layer, 0, 1).astype(np.float32) * np.float32(255)).astype(np.float64)
        layer = streaked(layer, length, spread, -135 + 90 * float(turn[i])) / 255
        image = x[i].permute(1, 2, 0).double().numpy()
        grey = image @ [0.299, 0.587, 0.114] if channels == 3 else image[..., 0]
        image = kept * image + (1 - kept) * np.maximum(image, (grey * 1.5 + 0.5)[..., None])
        expected = image + (layer + np.rot90(layer, 2))[..., None]
        np.testing.assert_allclose(found[i].transpose(1, 2, 0), expected, atol=0.5 / 255 * 2 + 1e-4)


@pytest.mark.parametrize("more", [0.05, 0.3, 0.5])
def test_brightness_equals_colorsys(more: float) -> None:
    x = floats((2, 3, 5, 6))
    x[0, :, 0, 0], x[0, :, 0, 1], x[1, :, 2, 2] = 0.0, 1.0, 0.4
    found = c.brightness(x, more, Noise(0, torch.arange(2))).permute(0, 2, 3, 1).numpy()
    for place in np.ndindex(2, 5, 6):
        h, s, v = colorsys.rgb_to_hsv(*x.permute(0, 2, 3, 1)[place].tolist())
        assert found[place] == pytest.approx(colorsys.hsv_to_rgb(h, s, min(v + more, 1.0)), abs=1e-5)


def test_contrast_equals_numpy() -> None:
    x = floats()
    means = x.double().numpy().mean(axis=(2, 3), keepdims=True)
    expected = (x.double().numpy() - means) * 0.4 + means
    np.testing.assert_allclose(c.contrast(x, 0.4, Noise(0, torch.arange(4))).numpy(), expected, atol=1e-6)


# --- as a whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [32, 96])
def test_strengths_are_those_of_the_size_and_grow(side: int) -> None:
    smooth = np.add.outer(np.arange(side), 2 * np.arange(side))[None, :, :, None] * np.array([1, 0.7, 0.4])
    x = torch.from_numpy((80 + 100 * np.sin(smooth / 4)).clip(0, 255).astype(np.uint8)).repeat(4, 1, 1, 1)
    for name in ("gaussian_noise", "impulse_noise", "gaussian_blur", "brightness", "contrast"):
        apart = [
            float((Corruption(name, s)(x, torch.arange(4)).float() - x.float()).abs().mean()) for s in (1, 2, 3, 4, 5)
        ]
        assert apart == sorted(apart)
        assert apart[0] > 0
    means = x.float().mean(dim=(1, 2), keepdim=True)
    share = 0.75 if side == 32 else 0.4
    found = Corruption("contrast", 1)(x, torch.arange(4)).float()
    assert float((found - ((x.float() - means) * share + means)).abs().max()) <= 0.51


def test_the_seed_changes_noise_and_nothing_else() -> None:
    x = images()
    for name in CORRUPTIONS:
        same = torch.equal(Corruption(name, 3, 0)(x, NUMBERS), Corruption(name, 3, 1)(x, NUMBERS))
        assert same == (name in ("gaussian_blur", "brightness", "contrast"))


def test_training_images_are_corrupted_and_test_images_are_not() -> None:
    clean = data.load(DataConfig(name="digits"))
    noisy = data.load(DataConfig(name="digits", corrupt="gaussian_noise:4"))
    few = data.load(DataConfig(name="digits", corrupt="gaussian_noise:4", per_class=3)).train
    assert isinstance(clean.train, data.ImageSamples)
    assert isinstance(noisy.train, data.ImageSamples)
    assert isinstance(few, data.ImageSamples)
    numbers = torch.from_numpy(clean.train.source_positions)
    expected = Corruption("gaussian_noise", 4)(clean.train.images.contiguous(), numbers)
    assert torch.equal(noisy.train.images, expected)
    assert torch.equal(few.images, expected[np.isin(clean.train.source_positions, few.source_positions)])
    assert noisy.train.fingerprint != clean.train.fingerprint
    assert noisy.test is not None
    assert clean.test is not None
    assert noisy.test.fingerprint == clean.test.fingerprint


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gausian_noise", "did you mean 'gaussian_noise'"),
        ("snow:6", "1 to 5"),
        ("snow:x", "NAME:SEVERITY"),
        ("", "Known"),
    ],
)
def test_mistakes_are_refused(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        DataConfig(corrupt=text)
    with pytest.raises(UserError, match="seed"):
        Corruption("snow", 1, -1)
