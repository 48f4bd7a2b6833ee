"""A method of your own, registered in a script: fine-tuning that pushes forget samples towards a uniform answer.

python examples/custom_method.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import unsharp
from unsharp.data import Batch
from unsharp.methods import METHODS, PhasedMethod, Problem
from unsharp.phases import FORGET, RETAIN, CrossEntropy, Moment, Objective, Phase


@dataclass(frozen=True)
class Uniform(Objective):
    """weight · cross-entropy between the uniform distribution and the answer on the forget batch."""

    weight: float

    @property
    def streams(self) -> tuple[str, ...]:
        return (FORGET,)

    def terms(self, model: nn.Module, batches: Mapping[str, Batch], at: Moment) -> Iterator[tuple[str, Tensor]]:
        logits = model(batches[FORGET].inputs).float()
        yield FORGET, -self.weight * logits.log_softmax(1).mean()


@METHODS.register("confuse")
@dataclass(frozen=True, kw_only=True)
class Confuse(PhasedMethod):
    """Fine-tune on retain, and draw the answers on forget towards uniform.

    Args:
        beta: Weight ≥ 0 of the forget term.
    """

    source: ClassVar[str] = "an example"
    formula: ClassVar[str] = "L = mean over retain of CE + β · mean over forget of CE(uniform, p)"

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not self.beta >= 0:
            raise unsharp.UserError(f"beta must be at least 0, got {self.beta}")

    def phases(self, problem: Problem) -> list[Phase]:
        return [
            Phase(objective=CrossEntropy({RETAIN: 1.0}), rule=problem.rule, name=RETAIN),
            Phase(objective=Uniform(self.beta), rule=problem.rule, name=FORGET),
        ]


def main() -> None:
    """Use it under two rules: every rule works with it, though it knows of none."""
    digits = load_digits()
    inputs = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    train_set = TensorDataset(inputs, torch.tensor(digits.target))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    samples = unsharp.from_torch_dataset(train_set, device="cpu")
    unsharp.train(model, samples, np.arange(len(samples)), unsharp.TrainConfig(epochs=10, batch_size=64))

    forget_ids = range(50)
    for rule in ("none", "sam"):
        forgotten, record = unsharp.unlearn(model, samples, forget_ids, "confuse", rule=rule, beta=0.2, epochs=3)
        metrics = unsharp.evaluate(forgotten, samples, forget_ids, record=record)
        print(
            f"rule {rule:>4}: retain {metrics['retain_accuracy']:.1f} %, forget {metrics['forget_accuracy']:.1f} %, "
            f"forget loss {metrics['forget_loss']:.2f}, {metrics['passes']} passes"
        )


if __name__ == "__main__":
    main()
