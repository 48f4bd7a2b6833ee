"""Stacks: each member is what training it alone makes of it, whatever the form, the data and the interruptions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unsharp import models
from unsharp.artifacts import Workspace
from unsharp.data import ImageSamples
from unsharp.data.augment import AUGMENTATIONS, reference
from unsharp.data.samples import Batch, Samples, StreamedSamples, TensorSamples
from unsharp.engine import OptimizerConfig
from unsharp.errors import UserError
from unsharp.evaluation.predictions import predict
from unsharp.models import ModelConfig
from unsharp.pool.stack import ELEMENTWISE, Kind, Member, Stack, members_at_once
from unsharp.progress import Progress
from unsharp.sharpness import Sharpness
from unsharp.training import TrainConfig, initial_model, train

CPU = torch.device("cpu")
N, SIDE, CLASSES = 40, 8, 4
MEAN, STD = (0.45,), (0.25,)
FORMS: tuple[Kind, ...] = ("grouped", "vmap")
SGD = OptimizerConfig(lr=0.05, momentum=0.9, weight_decay=0.01)
ADAMW = OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.1)


def pixels() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return draw.integers(0, 256, (N, SIDE, SIDE, 3), dtype=np.uint8), draw.integers(0, CLASSES, N)


def images() -> ImageSamples:
    x, y = pixels()
    return ImageSamples(x, y, tuple("abcd"), mean=MEAN, std=STD, augmentation=AUGMENTATIONS["crop_flip"])


def members(n: int = 3, size: int = 27, taken: Sequence[int] = range(N)) -> list[Member]:
    draw = np.random.default_rng(1)
    return [Member(np.sort(draw.choice(taken, size, replace=False)), seed) for seed in (5, 0, 2**31 + 7, 12)[:n]]


class Cast(nn.Module):
    """Float64 from the first layer on."""

    def forward(self, x: Tensor) -> Tensor:
        return x.double()


class Perceptron(nn.Module):
    """Two linear layers with BatchNorm, without and with a bias, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3 * SIDE * SIDE, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, CLASSES)
        self.aside = nn.Linear(2, 2)
        self.second.bias.requires_grad_(False)
        nn.init.normal_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.norm(self.first(torch.flatten(x, 1)))))


class Crossing(nn.Module):
    """Adds up over all channels, which in a grouped network are those of several members."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.neighbours = nn.LocalResponseNorm(3)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.neighbours(self.conv(x)).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.b.weight = self.a.weight
        self.out = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.a(x).tanh()).mean((2, 3)))


class Scaled(nn.Module):
    """A temperature, which is a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3 * SIDE * SIDE, CLASSES)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.flatten(1)) / self.temperature


class Mixed(nn.Module):
    """Normalisation in groups and per sample, a convolution that is grouped by itself, one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
        self.groups = nn.GroupNorm(2, 4)
        self.again = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(self.conv(x)).tanh()
        x = x + self.again(self.again(x))
        return self.out(self.pool(self.instance(x)).view(len(x), -1))


def registered(arch: str, width: int, **options: int | float) -> Callable[[], nn.Module]:
    config = ModelConfig(arch=arch, width=width, options=dict(options))
    return lambda: models.build(config, n_classes=CLASSES, input_shape=(3, SIDE, SIDE))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small_cnn": registered("small_cnn", 3),
    "resnet18": registered("resnet18", 2),
    "vit_small": registered("vit_small", 4, depth=1, patch=4),
    "perceptron": Perceptron,
    "crossing": Crossing,
    "tied": Tied,
    "scaled": Scaled,
    "mixed": Mixed,
}
NOT_GROUPED = {
    "vit_small": "tensors of its own",
    "scaled": "tensors of its own",
    "crossing": "not those of the networks alone",
    "tied": "share",
}


def exact(name: str) -> Callable[[], nn.Module]:
    """The network in float64, in which another order of additions does not show."""
    return lambda: nn.Sequential(Cast(), NETWORKS[name]().double())


def alone(make_model: Callable[[], nn.Module], samples: Samples, member: Member, config: TrainConfig) -> Any:
    """What training this member alone gives: the network and its history."""
    model = initial_model(make_model, member.seed, CPU)
    record = train(model, samples, member.indices, dataclasses.replace(config, seed=member.seed))
    return model, record.history


def assert_same(stack: Stack, j: int, model: nn.Module, rtol: float) -> None:
    state, expected = stack.state(j), model.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_members_are_those_of_training_alone(name: str, kind: Kind) -> None:
    samples, chosen = images(), members()
    optimizer = ADAMW if name in ("small_cnn", "vit_small", "mixed") else SGD
    config = TrainConfig(
        epochs=3, batch_size=8, optimizer=optimizer, warmup=0.2, clip_norm=0.5, label_smoothing=0.1, schedule="cosine"
    )
    stack = Stack(exact(name), samples, chosen, config, CPU, kind=kind)
    refused = kind == "grouped" and name in NOT_GROUPED
    assert stack.kind == ("vmap" if refused else kind)
    assert (NOT_GROUPED[name] in stack.reason) if refused else stack.reason == ""
    record = stack.train()
    histories = []
    for j, member in enumerate(chosen):
        model, history = alone(exact(name), samples, member, config)
        assert_same(stack, j, model, rtol=1e-8)
        histories.append([row["loss/retain"] for row in history])
    assert stack.failed == []
    np.testing.assert_allclose([row["loss/retain"] for row in record.history], np.mean(histories, axis=0), rtol=1e-5)
    assert [row["lr"] for row in record.history] == [row["lr"] for row in history]
    assert record.passes == 3 * 3 * 4


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("last_batch", ["balanced", "short"])
def test_members_are_those_of_training_alone_in_float32(kind: Kind, last_batch: Any) -> None:
    samples, chosen = images(), members(4, 26)
    config = TrainConfig(epochs=2, batch_size=8, last_batch=last_batch, schedule="step", optimizer=SGD)
    stack = Stack(NETWORKS["small_cnn"], samples, chosen, config, CPU, kind=kind)
    stack.train()
    for j, member in enumerate(chosen):
        assert_same(stack, j, alone(NETWORKS["small_cnn"], samples, member, config)[0], rtol=1e-4)


def test_a_stack_may_be_of_one_and_needs_no_layout_of_its_own() -> None:
    samples, (member,) = images(), members(1)
    config = TrainConfig(epochs=1, batch_size=8, channels_last=False)
    for kind in FORMS:
        stack = Stack(exact("small_cnn"), samples, [member], config, CPU, kind=kind)
        assert stack.kind == kind
        stack.train()
        assert_same(stack, 0, alone(exact("small_cnn"), samples, member, config)[0], rtol=1e-8)


def test_a_mean_over_all_batches_is_counted_by_each_member() -> None:
    def cumulative() -> nn.Module:
        return nn.Sequential(Cast(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.Flatten()).double()

    samples, chosen = images(), members(2)
    config = TrainConfig(epochs=2, batch_size=8, optimizer=SGD)
    stack = Stack(cumulative, samples, chosen, config, CPU, kind="grouped")
    assert stack.kind == "grouped"
    stack.train()
    for j, member in enumerate(chosen):
        assert_same(stack, j, alone(cumulative, samples, member, config)[0], rtol=1e-8)
    vmapped = Stack(cumulative, samples, chosen, config, CPU, kind="vmap")  # which reads the counter on the host
    assert (vmapped.kind, "vmap does not fit" in vmapped.reason) == ("single", True)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_every_elementwise_optimiser_steps_for_all(name: str) -> None:
    samples, chosen = images(), members(2)
    config = TrainConfig(epochs=1, batch_size=8, optimizer=OptimizerConfig(name=name, lr=0.01, weight_decay=0.0))
    stack = Stack(exact("perceptron"), samples, chosen, config, CPU, kind="grouped")
    assert stack.kind == "grouped"
    stack.train()
    for j, member in enumerate(chosen):
        assert_same(stack, j, alone(exact("perceptron"), samples, member, config)[0], rtol=1e-8)


class Deferred(Samples):
    """Samples of a sort that the library does not know."""

    def __init__(self, samples: ImageSamples) -> None:
        super().__init__(samples.labels, samples.class_names)
        self.inner, self.input_shape, self.fingerprint = samples, samples.input_shape, "deferred"

    def batches(self, order: np.ndarray, sizes: Sequence[int], *, draws: np.ndarray | None) -> Iterator[Batch]:
        return self.inner.batches(order, sizes, draws=draws)

    def subset(self, indices: Any) -> Samples:
        raise NotImplementedError


def streamed() -> StreamedSamples:
    x, y = pixels()
    scale = {"mean": torch.tensor(MEAN * 3) * 255, "std": torch.tensor(STD * 3) * 255}

    def read(position: int, row: np.ndarray | None) -> Tensor:
        return reference(x[position], row, augmentation=AUGMENTATIONS["crop_flip"], **scale)

    return StreamedSamples(read, y, tuple("abcd"), input_shape=(3, SIDE, SIDE))


def test_it_does_not_matter_where_the_images_come_from() -> None:
    config = TrainConfig(epochs=2, batch_size=8, optimizer=SGD)
    states = []
    for samples in (images(), streamed(), Deferred(images())):
        stack = Stack(NETWORKS["small_cnn"], samples, members(), config, CPU, kind="grouped")
        assert stack.kind == "grouped"
        stack.train()
        states.append([stack.state(j) for j in range(3)])
    for other in states[1:]:
        for mine, theirs in zip(states[0], other):
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_order_of_a_long_epoch_is_laid_out_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(epochs=1, batch_size=8, optimizer=SGD)
    states = []
    for planned in (2**20, 1):
        monkeypatch.setattr("unsharp.pool.stack.PLANNED", planned)
        stack = Stack(NETWORKS["small_cnn"], images(), members(), config, CPU, kind="grouped")
        stack.train()
        states.append(stack.state(2))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grouped", "vmap", "single"])
def test_logits_are_those_of_each_network(kind: Kind) -> None:
    samples, chosen = images(), members()
    config = TrainConfig(epochs=1, batch_size=8, optimizer=SGD)
    stack = Stack(NETWORKS["resnet18"], samples, chosen, config, CPU, kind=kind)
    stack.train()
    indices = np.array([3, 39, 0, 7, 8, 21, 30, 31, 5, 11, 12, 13, 14])
    for batch_size in (1000, 9):
        logits = stack.logits(samples, indices, batch_size)
        assert (logits.shape, logits.dtype, logits.device) == ((3, 13, CLASSES), torch.float32, CPU)
        for j in range(3):
            model = NETWORKS["resnet18"]()
            model.load_state_dict(stack.state(j))
            np.testing.assert_allclose(logits[j], predict(model, samples, indices).logits, rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="empty"):
        stack.logits(samples, np.zeros(0, np.int64))


class Keeps(Progress):
    """Breaks off at a step."""

    def __init__(self, at: int) -> None:
        self.left = at

    def advance(self, n: int = 1, note: str = "") -> None:
        self.left -= n
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["grouped", "vmap", "single"])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, kind: Kind, optimizer: OptimizerConfig) -> None:
    samples, config = images(), TrainConfig(epochs=3, batch_size=8, optimizer=optimizer)

    def make() -> Stack:
        return Stack(NETWORKS["small_cnn"], samples, members(), config, CPU, kind=kind)

    whole = make()
    expected = whole.train()
    workspace = Workspace(tmp_path)
    for steps in (6, 5, 14 if kind == "single" else 2):  # in the midst of an epoch, of the next; in a second member
        with pytest.raises(KeyboardInterrupt):
            make().train(workspace=workspace, save_seconds=0.0, progress=Keeps(steps))
    resumed = make()
    record = resumed.train(workspace=workspace)
    for j in range(3):
        mine, theirs = resumed.state(j), whole.state(j)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert [row["loss/retain"] for row in record.history] == [row["loss/retain"] for row in expected.history]
    assert record.passes == expected.passes


def test_a_state_of_other_members_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    samples, config, chosen = images(), TrainConfig(epochs=1, batch_size=8), members()
    network, workspace = NETWORKS["small_cnn"], Workspace(tmp_path)
    Stack(network, samples, chosen, config, CPU, kind="grouped").train(workspace=workspace)
    others = [*chosen[:2], Member(members(3, 27, range(1, N))[2].indices, chosen[2].seed)]
    for kind, wanted in (("vmap", chosen), ("single", chosen), ("grouped", chosen[::-1]), ("grouped", others)):
        with pytest.raises(UserError, match="other members, or of kind 'grouped'"):
            Stack(network, samples, wanted, config, CPU, kind=kind).train(workspace=workspace)  # type: ignore[arg-type]


def test_what_is_called_after_each_epoch_joins_the_history() -> None:
    config = TrainConfig(epochs=2, batch_size=8)
    for kind in ("grouped", "single"):
        calls: list[int] = []

        def count(calls: list[int] = calls) -> dict[str, float]:
            calls.append(0)
            return {"calls": float(len(calls))}

        stack = Stack(NETWORKS["small_cnn"], images(), members(2), config, CPU, kind=kind)  # type: ignore[arg-type]
        record = stack.train(on_epoch=count)
        assert [row["calls"] for row in record.history] == ([1, 2] if kind == "grouped" else [2, 3])
        assert record.about["kind"] == kind
        assert record.about["seed"] == [5, 0]


# --- members that fail -----------------------------------------------------------------------------------------------


def with_first(value: float) -> TensorSamples:
    inputs = torch.randn(N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    inputs[0, 1] = value
    return TensorSamples(inputs, np.arange(N) % CLASSES, fingerprint=str(value))


@pytest.mark.parametrize("kind", ["grouped", "vmap", "single"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_member_that_fails_harms_no_other(kind: Kind, broken: float) -> None:
    chosen = members(4, 20, range(1, N))
    chosen[1] = Member(np.arange(20), 4)  # it alone sees the broken sample
    config = TrainConfig(epochs=3, batch_size=8, optimizer=SGD, clip_norm=1.0)
    stacks = []
    for value in (1.0, broken):
        stack = Stack(NETWORKS["small_cnn"], with_first(value), chosen, config, CPU, kind=kind)
        record = stack.train()
        stacks.append(stack)
    good, bad = stacks
    assert (good.failed, bad.failed) == ([], [1])
    logits = bad.logits(with_first(1.0), np.arange(N))
    for j in (0, 2, 3):
        mine, theirs = bad.state(j), good.state(j)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        assert torch.equal(logits[j], good.logits(with_first(1.0), np.arange(N))[j])
    assert logits[1].isnan().all()
    assert all(t.isnan().all() for t in bad.state(1).values() if t.is_floating_point())
    assert bad.state(1).keys() == good.state(1).keys()
    assert all(np.isfinite(row["loss/retain"]) for row in record.history)
    assert record.about["failed"] == [1]


@pytest.mark.parametrize("kind", FORMS)
def test_a_member_that_failed_once_stays_failed_also_after_a_kill(tmp_path: Path, kind: Kind) -> None:
    chosen = members(2, 20, range(1, N))
    chosen[1] = Member(np.arange(20), 4)
    config, samples = TrainConfig(epochs=3, batch_size=8, optimizer=ADAMW), with_first(float("nan"))

    def make() -> Stack:
        return Stack(NETWORKS["small_cnn"], samples, chosen, config, CPU, kind=kind)

    epochs: list[int] = []

    def mend() -> dict[str, float]:
        epochs.append(0)
        samples.inputs[0] = 1.0
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return {}

    killed = make()
    with pytest.raises(KeyboardInterrupt):
        killed.train(workspace=Workspace(tmp_path), save_seconds=0.0, on_epoch=mend)
    assert killed._form is not None
    assert all(bool(t.isfinite().all()) for t in killed._form.stored.values())  # nothing is left that could spread
    stack = make()
    stack.train(workspace=Workspace(tmp_path))
    assert stack.failed == [1]
    assert stack.state(1)["0.weight"].isnan().all()


def test_training_alone_fails_again_after_a_kill(tmp_path: Path) -> None:
    chosen = [Member(np.arange(20), 4), *members(2, 20, range(1, N))]
    config = TrainConfig(epochs=2, batch_size=8)

    def make() -> Stack:
        return Stack(NETWORKS["small_cnn"], with_first(float("nan")), chosen, config, CPU, kind="single")

    with pytest.raises(KeyboardInterrupt):
        make().train(workspace=Workspace(tmp_path), save_seconds=0.0, progress=Keeps(9))
    stack = make()
    stack.train(workspace=Workspace(tmp_path))
    assert stack.failed == [0]


def test_when_all_have_failed_the_work_ends() -> None:
    chosen = [Member(np.arange(20), seed) for seed in (0, 1)]
    for kind in ("grouped", "single"):
        config = TrainConfig(epochs=5, batch_size=8)
        stack = Stack(NETWORKS["small_cnn"], with_first(float("nan")), chosen, config, CPU, kind=kind)  # type: ignore[arg-type]
        assert stack.kind == kind
        record = stack.train()
        assert stack.failed == [0, 1]
        assert len(record.history) <= 1
        assert all(np.isfinite(value) for row in record.history for value in row.values())


def test_weights_that_end_infinite_are_told() -> None:
    inputs = torch.ones(N, 2)
    inputs[20:] = 1e3
    samples = TensorSamples(inputs, np.arange(N) % CLASSES)
    chosen = [Member(np.arange(20), 0), Member(np.arange(20, 40), 0)]
    config = TrainConfig(epochs=1, batch_size=40, optimizer=OptimizerConfig(lr=1e37, momentum=0.0, weight_decay=0.0))
    for kind in ("grouped", "vmap", "single"):  # one step: its loss is finite, what it leaves behind is not
        stack = Stack(lambda: nn.Linear(2, CLASSES), samples, chosen, config, CPU, kind=kind)  # type: ignore[arg-type]
        record = stack.train()
        assert np.isfinite(record.history[0]["loss/retain"])
        assert stack.failed == [1]


# --- what is not stacked ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "network", "reason"),
    [
        ({"rule": Sharpness(rho=0.05)}, "small_cnn", "sharpness rule"),
        ({"optimizer": OptimizerConfig(name="adafactor", lr=0.01)}, "perceptron", "Adafactor mixes"),
        ({"phase_lr": {"loss": 0.02}}, "perceptron", "phase_lr"),
        ({}, "dropout", "random numbers"),
    ],
)
def test_what_cannot_be_stacked_is_trained_one_by_one(changed: dict[str, Any], network: str, reason: str) -> None:
    make = registered("vit_small", 4, depth=1, dropout=0.5) if network == "dropout" else NETWORKS[network]
    samples, chosen = images(), members(2)
    config = dataclasses.replace(TrainConfig(epochs=1, batch_size=8), **changed)
    stack = Stack(make, samples, chosen, config, CPU, kind="grouped")
    assert stack.kind == "single"
    assert reason in stack.reason
    stack.train()
    for j, member in enumerate(chosen):
        model = alone(make, samples, member, config)[0]
        assert all(torch.equal(stack.state(j)[name], tensor) for name, tensor in model.state_dict().items())


def test_fp16_is_not_stacked() -> None:
    stack = Stack(NETWORKS["small_cnn"], images(), members(), TrainConfig(precision="fp16"), CPU, kind="vmap")
    assert (stack.kind, "fp16" in stack.reason) == ("single", True)


class Branching(nn.Module):
    """Decides on the host by what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3)).sum(1, keepdim=True)
        return self.scale * (means if float(means.mean()) > 0 else means.square())


def test_a_network_that_no_form_fits_is_trained_one_by_one() -> None:
    stack = Stack(Branching, images(), members(), TrainConfig(epochs=1, batch_size=8), CPU, kind="grouped")
    assert stack.kind == "single"
    assert "grouped does not fit" in stack.reason
    assert "vmap does not fit" in stack.reason
    stack.train()
    assert stack.failed == []


@pytest.mark.parametrize("kind", FORMS)
def test_bf16_is_that_of_training_alone_but_for_its_rounding(kind: Kind) -> None:
    samples, chosen = images(), members(2)
    config = TrainConfig(epochs=2, batch_size=8, precision="bf16", optimizer=SGD)
    half, full = (
        Stack(NETWORKS["small_cnn"], samples, chosen, dataclasses.replace(config, precision=precision), CPU, kind=kind)  # type: ignore[arg-type]
        for precision in ("bf16", "float32")
    )
    losses = [row["loss/retain"] for row in half.train().history]
    assert half.kind == kind
    expected = np.mean(
        [[row["loss/retain"] for row in alone(NETWORKS["small_cnn"], samples, m, config)[1]] for m in chosen], axis=0
    )
    np.testing.assert_allclose(losses, expected, rtol=0.02)
    assert losses != [row["loss/retain"] for row in full.train().history]
    assert all(t.dtype == torch.float32 for t in half.state(0).values() if t.is_floating_point())


def test_on_a_host_auto_stacks_what_fits_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, config, network = images(), TrainConfig(epochs=1, batch_size=8), NETWORKS["small_cnn"]
    largest = 7 * 6 * SIDE * SIDE * 4  # a batch of 7, six channels at full resolution, four bytes each
    for room, kind, most in ((3 * largest, "grouped", 3), (3 * largest - 1, "single", 2), (largest, "single", 1)):
        monkeypatch.setattr("unsharp.pool.stack.HOST_BYTES", room)
        stack = Stack(network, samples, members(), config, CPU)
        assert (stack.kind, stack.reason) == (kind, "")
        assert members_at_once(network, samples, members()[0], config, CPU) == most
    monkeypatch.undo()
    assert Stack(network, samples, members(1), config, CPU).kind == "single"
    transformer = Stack(NETWORKS["vit_small"], samples, members(), config, CPU)
    assert transformer.kind == "single"  # vmap is slower on a host, so auto does not take it
    assert "grouped does not fit" in transformer.reason


@pytest.mark.parametrize(
    ("chosen", "kind", "message"),
    [
        ([], "auto", "members is empty"),
        ([Member(np.arange(5), 0), Member(np.arange(6), 1)], "auto", r"equally many samples.*got 5, 6"),
        ([Member(np.arange(5), -1)], "auto", "seed must be at least 0"),
        ([Member(np.array([0, N]), 0)], "auto", "indices must be in"),
        ([Member(np.arange(5), 0)], "grouping", "unknown kind"),
    ],
)
def test_mistakes_are_named(chosen: list[Member], kind: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Stack(NETWORKS["small_cnn"], images(), chosen, TrainConfig(), CPU, kind=kind)


def test_a_batch_of_one_meets_batchnorm_as_in_training_alone() -> None:
    stack = Stack(
        registered("resnet18", 2), images(), [Member(np.arange(1), 0)], TrainConfig(epochs=1), CPU, kind="grouped"
    )
    with pytest.raises(UserError, match="batch of one sample"):
        stack.train()


def test_a_stack_is_trained_once() -> None:
    stack = Stack(NETWORKS["small_cnn"], images(), members(2), TrainConfig(epochs=1), CPU)
    stack.train()
    with pytest.raises(UserError, match="make another"):
        stack.train()


def test_a_member_that_does_not_exist_is_refused() -> None:
    stack = Stack(NETWORKS["small_cnn"], images(), members(2), TrainConfig(), CPU)
    with pytest.raises(UserError, match=r"0\.\.1, got 2"):
        stack.state(2)
