"""Image sets on the device against the per-sample reference; checks of labels, ids and images; fingerprints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unsharp.data import ImageSamples, Stream, draws
from unsharp.data.augment import AUGMENTATIONS, reference, resized_crop, to_size
from unsharp.data.draws import AREA, ASPECT, FLIP
from unsharp.errors import UserError


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 20),
    st.sampled_from([(8, 8), (5, 9), (16, 12)]),
    st.sampled_from([1, 3]),
    st.sampled_from(["none", "crop", "flip", "crop_flip"]),
    st.integers(0, 1000),
)
def test_batches_equal_the_reference_to_the_bit(
    n: int, shape: tuple[int, int], channels: int, name: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, *shape, channels), dtype=np.uint8)
    mean, std = rng.random(channels), rng.random(channels) + 0.1
    samples = ImageSamples(
        images, rng.integers(0, 3, n), tuple("abc"), mean=mean, std=std, augmentation=AUGMENTATIONS[name]
    )
    table = draws(seed, 2, n)
    order = rng.permutation(n)[: max(1, n - 2)]
    scale = {"mean": torch.tensor(mean * 255).float(), "std": torch.tensor(std * 255).float()}
    for rows in (table, None):
        batches = list(samples.batches(order, [len(order) // 2, len(order) - len(order) // 2], draws=rows))
        got = torch.cat([b.inputs for b in batches])
        plain = [
            reference(images[i], None if rows is None else rows[i], augmentation=AUGMENTATIONS[name], **scale)
            for i in order
        ]
        assert torch.equal(got, torch.stack(plain))


def test_a_crop_shows_the_image_shifted_within_black() -> None:
    image = np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8, 1)
    samples = ImageSamples(image, [0], mean=(0.0,), std=(1 / 255,), augmentation=AUGMENTATIONS["crop_flip"])
    padded = np.pad(image[0, :, :, 0], 1)
    windows = [padded[t : t + 8, left : left + 8] for t in range(3) for left in range(3)]
    possible = {w.astype(np.float32).tobytes() for base in windows for w in (base, base[:, ::-1])}
    seen = {
        np.rint(b.inputs[0, 0].numpy()).tobytes()
        for epoch in range(200)
        for b in Stream(samples, np.array([0]), 1, 0).epoch(epoch)
    }
    assert seen == possible
    assert samples.input_shape == (1, 8, 8)


def test_batches_are_channels_last_and_on_the_device() -> None:
    samples = ImageSamples(np.zeros((6, 8, 8, 3), np.uint8), np.arange(6) % 2)
    (batch,) = samples.batches(np.arange(6), [6], draws=None)
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
    assert (batch.inputs.dtype, batch.labels.dtype, batch.indices.dtype) == (torch.float32, torch.int64, torch.int64)
    assert samples.images.dtype == torch.uint8
    assert samples.n_classes == 2


def test_a_subset_keeps_ids_and_places_and_its_pixels() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    ids = [f"s{i}" for i in range(9)]
    whole = ImageSamples(images, np.arange(9) % 3, ids=ids, mean=(0.3, 0.4, 0.5), augmentation=AUGMENTATIONS["crop"])
    part = whole.subset([7, 2]).subset([1])
    assert part.ids.tolist() == ["s2"]
    assert part.source_positions.tolist() == [2]
    assert part.source_size == 9
    assert part.n_classes == 3
    (a,), (b,) = whole.batches(np.array([2]), [1], draws=None), part.batches(np.array([0]), [1], draws=None)
    assert torch.equal(a.inputs, b.inputs)


def test_the_fingerprint_follows_content_and_nothing_else() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    labels = np.array([0, 1, 1, 0, 1])
    base = ImageSamples(images, labels).fingerprint
    assert base == ImageSamples(images.copy(), labels, augmentation=AUGMENTATIONS["crop_flip"], mean=(0.1,)).fingerprint
    changed = images.copy()
    changed[4, 7, 7, 0] ^= 1
    others = [
        ImageSamples(changed, labels),
        ImageSamples(images, 1 - labels),
        ImageSamples(images, labels, ("a", "b")),
        ImageSamples(images, labels, ids=[9, 1, 2, 3, 4]),
        ImageSamples(images.reshape(5, 4, 16, 1), labels),
        ImageSamples(images, labels).subset([0, 1]),
    ]
    prints = {base, *(samples.fingerprint for samples in others)}
    assert len(prints) == 1 + len(others)


IMAGES = np.zeros((3, 8, 8, 1), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"labels": [0, 1, -1]}, "label -1 of sample 2"),
        ({"labels": [0, 5, 1], "class_names": ("a", "b")}, "label 5 of sample 1 is out of range: there are 2"),
        ({"labels": [0.0, 1.0, 1.0]}, "integers"),
        ({"labels": [0, 1]}, "shape \\(2"),
        ({"labels": []}, "at least one"),
        ({"ids": [1, 2, 2]}, "repeat: 2"),
        ({"ids": [1, 2]}, "one per sample"),
        ({"ids": [0.5, 1.5, 2.5]}, "integers or text"),
        ({"images": IMAGES.astype(np.float32)}, "uint8"),
        ({"images": IMAGES[..., 0]}, "uint8 of shape"),
        ({"mean": (0.1, 0.2)}, "mean needs 1 value"),
        ({"augmentation": AUGMENTATIONS["resized_crop_flip"]}, "crop_flip"),
    ],
)
def test_wrong_samples_are_refused(arguments: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        ImageSamples(**{"images": IMAGES, "labels": [0, 1, 1], **arguments})


def test_to_size_keeps_the_centre() -> None:
    image_module = pytest.importorskip("PIL.Image")
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, 4:12] = 200
    assert (np.array(to_size(image_module.fromarray(pixels), 8)) == 200).all()
    assert to_size(image_module.fromarray(pixels), 4).size == (4, 4)
    assert to_size(image_module.fromarray(pixels), 7, 8).size == (7, 7)


def test_a_resized_crop_follows_its_row() -> None:
    image_module = pytest.importorskip("PIL.Image")
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    row = np.full(6, 0.5)
    row[[AREA, ASPECT, FLIP]] = 1 - 1e-9, 0.5, 0.9
    whole = np.array(resized_crop(image_module.fromarray(ramp), row, 64)).astype(int)
    assert np.abs(whole - ramp).max() <= 1  # full area at aspect 1 is the image itself
    row[FLIP] = 0.1
    assert np.abs(np.array(resized_crop(image_module.fromarray(ramp), row, 64)).astype(int) - ramp[:, ::-1]).max() <= 1
    row[AREA] = 0.0
    part = np.array(resized_crop(image_module.fromarray(ramp), row, 64)).astype(int)
    assert part.max() - part.min() < 0.4 * 255  # 8 % of the area is 28 % of the side


def test_what_the_fingerprint_leaves_out_is_said_apart() -> None:
    pixels, labels = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4, 1), [0, 1]
    plain = ImageSamples(pixels, labels)
    others = [
        ImageSamples(pixels, labels, mean=(0.1,)),
        ImageSamples(pixels, labels, std=(0.1,)),
        ImageSamples(pixels, labels, augmentation=AUGMENTATIONS["flip"]),
    ]
    for other in others:
        assert other.fingerprint == plain.fingerprint
        assert other.treatment != plain.treatment
    assert plain.subset([1]).treatment == plain.treatment


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
def test_a_deviation_that_is_not_positive_is_refused(std: float) -> None:
    with pytest.raises(UserError, match="std must be above 0"):
        ImageSamples(np.zeros((2, 4, 4, 1), np.uint8), [0, 1], std=(std,))
