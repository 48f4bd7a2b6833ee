"""What only an accelerator can show: no wait for the host in a step, the device's own decisions, and equal results."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from unsharp import models, runtime, unlearning
from unsharp.data import ImageSamples
from unsharp.data.streams import Stream
from unsharp.engine import Loop, LoopConfig, OptimizerConfig
from unsharp.errors import NonFiniteError
from unsharp.masks import saliency
from unsharp.models import ModelConfig
from unsharp.phases import FORGET, RETAIN, CrossEntropy, Phase
from unsharp.sharpness import SAM, AdaptiveSharpness, Sharpness
from unsharp.training import TrainConfig, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine"),
]


@pytest.fixture(scope="module")
def device() -> torch.device:
    return runtime.pick_device(None)


def images(device: torch.device, n: int = 256) -> ImageSamples:
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    return ImageSamples(pixels, draw.integers(0, 10, n), device=device)


def network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(arch="resnet18", width=8)
    return models.build(config, n_classes=10, input_shape=(3, 32, 32)).to(device)


def loop_on(device: torch.device, rule: Sharpness | AdaptiveSharpness, **settings: object) -> Loop:
    samples = images(device)
    config = LoopConfig(epochs=1, batch_size=64, optimizer=OptimizerConfig(lr=0.05), **settings)  # type: ignore[arg-type]
    phases = [
        Phase(objective=CrossEntropy({RETAIN: 0.9}), rule=rule, name=RETAIN),
        Phase(objective=CrossEntropy({FORGET: -0.1}), rule=rule.turned(), name=FORGET),
    ]
    streams = {
        RETAIN: Stream(samples, np.arange(32, 256), 64, 0),
        FORGET: Stream(samples, np.arange(32), 64, 0),
    }
    return Loop(network(device), phases, streams, config)


@pytest.mark.parametrize("rule", [Sharpness(rho=0.1), AdaptiveSharpness(rho=1.0)])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_step_never_waits_for_the_host(device: torch.device, rule: Sharpness, precision: str) -> None:
    if device.type != "cuda":
        pytest.skip("only this backend can refuse synchronisation")
    loop = loop_on(device, rule, precision=precision)
    step = next(loop._batches())
    loop._step(*step)  # the optimiser's state is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop._step(*step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_training_fits_in_every_precision(device: torch.device, precision: str) -> None:
    samples, model = images(device, 128), network(device)
    config = TrainConfig(epochs=25, batch_size=64, precision=precision, rule=Sharpness(rho=0.02))  # type: ignore[arg-type]
    record = train(model, samples, np.arange(128), config)
    assert record.history[-1]["loss/retain"] < 0.5 * record.history[0]["loss/retain"]
    assert record.peak_memory_bytes is not None
    assert record.peak_memory_bytes > 0


@pytest.mark.parametrize("name", ["sgd", "adamw", "adagrad", "rmsprop"])
def test_a_broken_step_is_noticed_later_and_nothing_has_moved(device: torch.device, name: str) -> None:
    samples = images(device)
    broken = 3
    config = LoopConfig(epochs=2, batch_size=64, optimizer=OptimizerConfig(name=name, lr=0.01), check_every=4)
    model = network(device)

    class Breaks(CrossEntropy):
        calls = 0

        def terms(self, model, batches, at):  # type: ignore[no-untyped-def]
            for term_name, term in super().terms(model, batches, at):
                type(self).calls += 1
                yield term_name, term * float("nan") if type(self).calls == broken else term

    loop = Loop(
        model, [Phase(objective=Breaks({RETAIN: 1.0}))], {RETAIN: Stream(samples, np.arange(256), 64, 0)}, config
    )
    states = []
    step = loop._step

    def remember(*of_step) -> None:  # type: ignore[no-untyped-def]
        states.append({k: v.detach().clone() for k, v in model.state_dict().items()})
        step(*of_step)

    loop._step = remember  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=f"step {broken}"):
        loop.run()
    assert all(torch.equal(v, states[broken - 1][k]) for k, v in model.state_dict().items())


def test_a_mask_holds_under_the_one_kernel_optimisers(device: torch.device) -> None:
    model = network(device)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mask = {n: torch.rand_like(p) < 0.3 for n, p in model.named_parameters()}
    phase = Phase(objective=CrossEntropy({RETAIN: 1.0}), rule=AdaptiveSharpness(rho=0.5), region=mask)
    config = LoopConfig(epochs=2, batch_size=64, optimizer=OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.1))
    loop = Loop(model, [phase], {RETAIN: Stream(images(device), np.arange(256), 64, 0)}, config)
    assert loop.optimizer.defaults.get("fused", False) or device.type != "cuda"
    loop.run()
    for name, p in model.named_parameters():
        assert torch.equal(p.detach()[~mask[name]], before[name][~mask[name]])
    moved = sum(int((p.detach() != before[name]).sum()) for name, p in model.named_parameters())
    assert moved > 0.9 * sum(int(m.sum()) for m in mask.values())


def test_the_device_gives_the_gradients_of_the_host(device: torch.device) -> None:
    on_host = saliency(network(torch.device("cpu")), images(torch.device("cpu"), 64), np.arange(64))
    on_device = saliency(network(device), images(device, 64), np.arange(64))
    for name, expected in on_host.items():
        torch.testing.assert_close(on_device[name].cpu(), expected, rtol=1e-3, atol=1e-4)


def test_resuming_gives_the_same_bits(device: torch.device) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = loop_on(device, Sharpness(rho=0.1))
        whole.run()
        half = loop_on(device, Sharpness(rho=0.1))
        steps = half._batches()
        half._step(*next(steps))
        half.batch += 1
        again = loop_on(device, Sharpness(rho=0.1))
        again.load_state_dict(half.state_dict())
        again.run()
    finally:
        torch.use_deterministic_algorithms(False)
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values()):
        assert torch.equal(a, b), name


def test_sam_with_a_scaler_survives_overflow(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).to(device)
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.05)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40)
    x, y = torch.randn(32, 8, device=device), torch.randint(2, (32,), device=device)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.float16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        return loss

    optimizer.step(closure, scaler=scaler)
    scaler.update()
    assert scaler.get_scale() < 2.0**40
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_unlearning_runs_on_the_device(device: torch.device) -> None:
    samples, model = images(device), network(device)
    how = unlearning.configure("sharp_minmax", epochs=1, batch_size=64, alpha=0.9, precision="bf16")
    forgotten, record = unlearning.run(model, samples, np.arange(32), np.arange(32, 256), how)
    assert runtime.device_of(forgotten).type == device.type
    assert np.isfinite(record.history[-1][RETAIN])
