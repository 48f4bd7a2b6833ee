"""A deletion request for a network that unsharp did not train: checkpoint, data and ids in, evidence out.

python examples/deletion_request.py [DIR]

The first half makes what you would already have: a function that builds the network, a checkpoint of plain tensors,
the data with their ids, the list of ids to delete, and what is known of the training. The second half is one command.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

NETWORK = """
from torch import nn

def build(n_classes, input_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, n_classes))
"""
HOW = {"epochs": 20, "batch_size": 64, "optimizer": {"lr": 0.1}, "schedule": "constant"}


def prepare(folder: Path) -> None:
    """Write network.py, data.npz, checkpoint.pt, delete.csv and training.json."""
    (folder / "network.py").write_text(NETWORK)
    digits = load_digits()
    images = np.rint(digits.images * 255 / 16).astype(np.uint8)
    names = np.array([f"person-{i:04d}" for i in range(len(images))])
    np.savez(
        folder / "data.npz",
        train_x=images[:1500], train_y=digits.target[:1500], train_name=names[:1500],
        test_x=images[1500:], test_y=digits.target[1500:], test_name=names[1500:],
    )  # fmt: skip
    (folder / "delete.csv").write_text("name\n" + "\n".join(names[10:1500:50]) + "\n")
    (folder / "training.json").write_text(json.dumps(HOW))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    inputs = (torch.tensor(images[:1500], dtype=torch.float32) / 255 - 0.5) / 0.25
    labels = torch.tensor(digits.target[:1500])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(20):
        for rows in torch.randperm(1500).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, folder / "checkpoint.pt")


def main() -> None:
    """Prepare, run the command, show what it wrote."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    command = (
        "forget --model checkpoint.pt --arch network:build"
        " --data npz --data-dir data.npz --id-column name --mean 0.5 --std 0.25 --augment none"
        " --ids delete.csv:name --train-config training.json"
        " --method sharp_minmax --epochs 5 --batch-size 64"
        " --store references --key owner.key --out answer"
    )
    print(f"unsharp {command}")
    subprocess.run([sys.executable, "-m", "unsharp", *command.split()], cwd=folder, check=True)
    metrics = json.loads((folder / "answer" / "metrics.json").read_text())
    for split in ("retain", "forget", "test"):
        key = f"{split}_accuracy"
        print(f"{split:>7}: {metrics['original'][key]:5.1f} % before, {metrics[key]:5.1f} % now, ", end="")
        print(f"{metrics['reference'][key]:5.1f} % retrained")
    audit = json.loads((folder / "answer" / "audit.json").read_text())
    print(f"audit: {audit['verdict']}: {audit['reason']}")
    print(f"for the one who asked: {folder / 'answer' / 'audit.html'} and {folder / 'answer' / 'report.html'}")


if __name__ == "__main__":
    main()
