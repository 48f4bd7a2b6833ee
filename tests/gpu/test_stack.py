"""Stacks on an accelerator: no wait for the host in a step, the members' own results, and no NaN that spreads."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from unsharp import models, runtime
from unsharp.data import ImageSamples
from unsharp.data.augment import AUGMENTATIONS
from unsharp.data.samples import TensorSamples
from unsharp.engine import OptimizerConfig
from unsharp.models import ModelConfig
from unsharp.pool.stack import Kind, Member, Stack, _Steps
from unsharp.training import TrainConfig, initial_model, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine"),
]
FORMS: tuple[Kind, ...] = ("grouped", "vmap")


@pytest.fixture(scope="module")
def device() -> torch.device:
    return runtime.pick_device(None)


def images(device: torch.device, n: int = 128) -> ImageSamples:
    draw = np.random.default_rng(0)
    pixels, labels = draw.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8), draw.integers(0, 10, n)
    return ImageSamples(pixels, labels, augmentation=AUGMENTATIONS["crop_flip"], device=device)


def network(arch: str = "resnet18", width: int = 4) -> nn.Module:
    return models.build(ModelConfig(arch=arch, width=width), n_classes=10, input_shape=(3, 16, 16))


def members(n: int = 4) -> list[Member]:
    draw = np.random.default_rng(1)
    return [Member(np.sort(draw.choice(np.arange(1, 128), 96, replace=False)), seed) for seed in range(n)]


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_never_waits_for_the_host(device: torch.device, kind: Kind, precision: str, name: str) -> None:
    if device.type != "cuda":
        pytest.skip("only this backend can refuse synchronisation")
    config = TrainConfig(
        epochs=1,
        batch_size=32,
        precision=precision,
        clip_norm=1.0,
        optimizer=OptimizerConfig(name=name, lr=0.01),  # type: ignore[arg-type]
    )
    stack = Stack(network, images(device), members(), config, device, kind=kind)
    assert stack.kind == kind
    assert stack._form is not None
    steps = _Steps(stack._form, stack._streams, config, device)
    batches = steps._batches()
    steps._step(*next(batches))  # the optimiser's state is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps._step(*next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", FORMS)
def test_members_are_those_of_training_alone(device: torch.device, kind: Kind) -> None:
    config = TrainConfig(epochs=2, batch_size=32, optimizer=OptimizerConfig(lr=0.02), clip_norm=1.0, warmup=0.2)
    samples, chosen = images(device), members(3)

    def make() -> nn.Module:
        return network("small_cnn", 8)

    with runtime.full_float32():
        stack = Stack(make, samples, chosen, config, device, kind=kind)
        assert stack.kind == kind
        stack.train()
        for j, member in enumerate(chosen):
            model = initial_model(make, member.seed, device)
            train(model, samples, member.indices, dataclasses.replace(config, seed=member.seed))
            for tensor_name, tensor in stack.state(j).items():
                expected = model.state_dict()[tensor_name].cpu()
                torch.testing.assert_close(tensor, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_member_that_fails_harms_no_other(device: torch.device, kind: Kind, precision: str) -> None:
    generator, chosen = torch.Generator().manual_seed(0), members(4)
    inputs = torch.randn(128, 3, 16, 16, generator=generator)
    chosen[2] = Member(np.arange(96), 9)  # it alone sees the first sample
    config = TrainConfig(epochs=2, batch_size=32, precision=precision)  # type: ignore[arg-type]
    for width in (3, 8):
        inputs[0] = float("nan")
        samples = TensorSamples(inputs, np.arange(128) % 10, device=device)
        stack = Stack(lambda w=width: network("small_cnn", w), samples, chosen, config, device, kind=kind)
        stack.train()
        assert stack.kind == kind
        assert stack.failed == [2]
        logits = stack.logits(samples, np.arange(1, 128))
        assert logits[[0, 1, 3]].isfinite().all()
        assert logits[2].isnan().all()
