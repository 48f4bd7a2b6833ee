"""The α adviser: its clock against real optimisers, its probes against real runs, its readings against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from unsharp.data import ImageSamples
from unsharp.difficulty.forget import from_indices
from unsharp.engine import OptimizerConfig
from unsharp.evaluation.accuracy import accuracy
from unsharp.evaluation.predictions import predict
from unsharp.theory.adviser import effective_steps
from unsharp.training import TrainConfig, train
from unsharp.tuning.target import Target
from unsharp.unlearning import configure

AIM = Target(accuracy=50.0, kind="given")


def images(n: int = 90, seed: int = 0) -> ImageSamples:
    """Noise with random labels: what a network knows of a sample, it remembers."""
    rng = np.random.default_rng(seed)
    pixels, labels = rng.integers(0, 256, (n, 4, 4, 1), dtype=np.uint8), rng.integers(0, 3, n)
    return ImageSamples(pixels, labels, ["a", "b", "c"], mean=(0.5,), std=(0.3,))


SAMPLES = images()
FORGET = from_indices(np.arange(20), SAMPLES)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3))
    train(network, SAMPLES, np.arange(90), TrainConfig(epochs=80, batch_size=15, optimizer=OptimizerConfig(lr=0.1)))
    network.eval()
    assert accuracy(predict(network, SAMPLES, np.arange(90))) > 95
    return network


def run(**changes):
    return configure(**({"method": "neggrad", "rule": "none", "batch_size": 10, "epochs": 4, "lr": 0.02} | changes))


# --- the clock --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_effective_steps_are_how_far_an_optimiser_goes_under_a_constant_gradient(momentum, schedule, steps) -> None:
    how = run(momentum=momentum, schedule=schedule, warmup=0.2 if schedule == "linear" else 0.0, weight_decay=0.0)
    w = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=1.0, momentum=momentum)
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = how.lr_factor(k, steps)
        w.grad = torch.ones_like(w)
        optimizer.step()
    reference = -w.item()
    # torch scales the whole velocity by the rate of the step, this counts by that of the gradient: equal if constant.
    if schedule == "constant" or momentum == 0:
        assert effective_steps(how, steps) == pytest.approx(reference, rel=1e-12)
    else:
        assert effective_steps(how, steps) == pytest.approx(reference, rel=0.35)
