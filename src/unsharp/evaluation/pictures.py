"""Some of the forgotten samples as pictures, with what each network says of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from unsharp.data import ImageSamples, Samples
from unsharp.difficulty import ForgetSet
from unsharp.errors import UserError
from unsharp.evaluation.predictions import Predictions

FILE = "pictures.json"
MOST, MOST_PIXELS = 100, 256
"""Most pictures, and most pixels along a side; larger ones are made smaller."""
ANSWERS = 3
"""Classes of a network's answer that are kept, the likeliest first."""
DRAW = 87
"""What tells this draw from others of the same seed."""
MODES = {1: "L", 3: "RGB"}


def check_pictures(n: int, samples: Samples | None = None) -> None:
    """Raise UserError unless `n` is a number of pictures, and pictures can be made of the samples."""
    if not 0 <= n <= MOST:
        raise UserError(f"pictures must be from 0 to {MOST}, got {n}")
    if n == 0 or samples is None:
        return
    if not isinstance(samples, ImageSamples):
        raise UserError(
            "pictures need samples that are held as uint8 images; these are decoded as they are read, or are no "
            "images; leave --pictures out"
        )
    if samples.input_shape[0] not in MODES:
        raise UserError(f"pictures need 1 or 3 channels, these have {samples.input_shape[0]}; leave --pictures out")


def pictures(samples: Samples, forget: ForgetSet, said: Mapping[str, Predictions], n: int, seed: int) -> dict[str, Any]:
    """Some forgotten samples, drawn at random.

    Args:
        samples: The training samples, an `ImageSamples`.
        forget: Which of them were forgotten.
        said: By name of the network its predictions on them, in the order of `forget.indices`.
        n: How many, from 1 to `MOST`; all where there are fewer.
        seed: Seed of the draw.

    Returns:
        Plain values: "n" forgotten in all, "asked" for; "classes" by name, "networks", and for each of the "samples"
        its "id", true "label", PNG in base64, and for each network the "classes" it finds likeliest, their
        "probabilities" in [0, 1], and that of the true class, "true".
    """
    check_pictures(n, samples)
    assert isinstance(samples, ImageSamples)
    draw = np.random.default_rng([seed, DRAW])
    rows = np.sort(draw.choice(len(forget), min(n, len(forget)), replace=False))
    chosen = forget.indices[rows]
    images = samples.images[torch.from_numpy(chosen).to(samples.device)].cpu().numpy()
    from scipy.special import softmax

    probabilities = {name: softmax(of.logits[rows].astype(np.float64), axis=1) for name, of in said.items()}
    kept = []
    for i, (row, at) in enumerate(zip(rows, chosen)):
        label = int(samples.labels[at])
        answers = {name: _answer(p[i], label) for name, p in probabilities.items()}
        kept.append({"id": forget.ids[row].item(), "label": label, "png": _png(images[i]), "answers": answers})
    about = {"n": len(forget), "asked": n, "classes": list(samples.class_names), "networks": list(said)}
    return about | {"samples": kept}


def _answer(probabilities: np.ndarray, label: int) -> dict[str, Any]:
    first = np.argsort(-probabilities, kind="stable")[:ANSWERS]
    likeliest = {"classes": first.tolist(), "probabilities": probabilities[first].tolist()}
    return likeliest | {"true": float(probabilities[label])}


def _png(image: np.ndarray) -> str:
    """An image (H, W, C) of uint8 as PNG in base64."""
    from PIL import Image

    shown = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image, MODES[image.shape[-1]])
    shown.thumbnail((MOST_PIXELS, MOST_PIXELS))
    made = io.BytesIO()
    shown.save(made, "PNG")
    return base64.b64encode(made.getvalue()).decode()
