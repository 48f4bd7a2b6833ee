"""Your own network and your own Dataset: unlearn some samples, and measure how well that worked.

python examples/quickstart_api.py
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import unsharp


def make_model() -> nn.Module:
    """The untrained network: any module from a batch to logits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def main() -> None:
    """Train, unlearn, evaluate, print."""
    digits = load_digits()
    inputs = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    train_set = TensorDataset(inputs[:1500], labels[:1500])
    test_set = TensorDataset(inputs[1500:], labels[1500:])

    # How your network came to be. unsharp.train is one way; your own loop is as good.
    how = unsharp.TrainConfig(epochs=20, batch_size=64)
    samples = unsharp.from_torch_dataset(train_set, device="cpu")
    torch.manual_seed(how.seed)
    model = make_model()
    unsharp.train(model, samples, np.arange(len(samples)), how)

    # The ids of a TensorDataset are its positions. These fifty shall be forgotten.
    forget_ids = range(0, 1500, 30)
    forgotten, record = unsharp.unlearn(model, train_set, forget_ids, method="sharp_minmax", epochs=5, batch_size=64)

    # With make_model and train_config a network is retrained without the samples, as the thing to be near to.
    metrics = unsharp.evaluate(
        forgotten,
        train_set,
        forget_ids,
        test_set=test_set,
        record=record,
        original=model,
        make_model=make_model,
        train_config=how,
        attacks=["svc_confidence", "threshold_confidence"],
    )
    print(f"{'':>10} {'retain':>7} {'forget':>7} {'test':>7} {'ToW':>7} {'MIA':>7}")
    rows = {"original": metrics["original"], "forgotten": metrics, "retrained": metrics["reference"]}
    for name, row in rows.items():
        values = [row[f"{split}_accuracy"] for split in ("retain", "forget", "test")]
        values += [row["tow"], row["mia"]["svc_confidence"]["mia"]]
        print(f"{name:>10} " + " ".join(f"{value:7.1f}" for value in values))


if __name__ == "__main__":
    main()
