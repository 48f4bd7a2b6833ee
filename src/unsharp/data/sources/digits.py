"""Handwritten digits, 8 × 8 pixels, from scikit-learn's own files (UCI ML, Alpaydin & Kaynak 1998)."""

from __future__ import annotations

import numpy as np

from unsharp.data.config import DataConfig
from unsharp.data.source import SOURCES, Source, Split, refuse

TEST_EVERY = 5


@SOURCES.register("digits")
def digits(config: DataConfig) -> Source:
    """1,797 handwritten digits of 8 × 8 grey pixels, embedded: 1,433 to train on, 364 to test on."""
    from sklearn.datasets import load_digits

    refuse(config, "dir", "test_dir", "id_column", "label_column", "image_column")
    pixels, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    images = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    # The source has no split of its own. Within each class every fifth sample of a fixed shuffle is for the test.
    shuffled = np.random.Generator(np.random.Philox(0)).permutation(len(labels))
    by_class = [shuffled[labels[shuffled] == c] for c in range(10)]
    test = np.sort(np.concatenate([rows[::TEST_EVERY] for rows in by_class]))
    train = np.setdiff1d(np.arange(len(labels)), test)
    return Source(
        train=Split(images=images[train], labels=labels[train]),
        test=Split(images=images[test], labels=labels[test]),
        class_names=tuple(str(c) for c in range(10)),
        augment="crop",
        channels=1,
    )
