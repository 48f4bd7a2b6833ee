"""The published code of Sharp MinMax, written from its description in plain loops, against the runs of this library."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unsharp import cli, unlearning
from unsharp.data import Samples, TensorSamples
from unsharp.data.augment import Augmentation
from unsharp.data.samples import ImageSamples
from unsharp.data.streams import Stream
from unsharp.engine import Loop
from unsharp.errors import NonFiniteError, UserError
from unsharp.methods import METHODS, PhasedMethod, Problem
from unsharp.phases import FORGET, RETAIN, CrossEntropy, Phase
from unsharp.published import OF_METHODS, OF_RULES, published_settings
from unsharp.sharpness import RULES
from unsharp.unlearning import configure

N, EPOCHS, BATCH, SEED = 29, 3, 5, 4
FORGOTTEN = np.arange(0, 28, 4)  # 7 samples: batches of 5 and 2
RETAINED = np.setdiff1d(np.arange(N), FORGOTTEN)  # 22 samples: batches of 5, 5, 5, 5 and 2
ALPHA, FRACTION, RATE, DECAY = 0.7, 0.3, 0.03, 0.1
RADII = {"sam": 0.3, "asam": 1.0}


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """With BatchNorm; no bias before it, whose gradient is nothing but rounding, which Adam would blow up."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def samples(dtype: torch.dtype = torch.float64) -> TensorSamples:
    generator = torch.Generator().manual_seed(3)
    return TensorSamples(torch.randn(N, 6, generator=generator, dtype=torch.float64).to(dtype), torch.arange(N) % 3)


# --- the published code ----------------------------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor]


def chunks(data: Samples, indices: np.ndarray, epoch: int) -> list[Batch]:
    """A loader's batches: all of one size but the last. The order is that in which this library shuffles."""
    (whole,) = Stream(data, indices, len(indices), SEED).epoch(epoch)
    starts = range(0, len(indices), BATCH)
    return [(whole.inputs[i : i + BATCH], whole.labels[i : i + BATCH]) for i in starts]


def least_salient(model: nn.Module, data: Samples) -> list[Tensor]:
    """The published mask: an argsort from below of |Σ of the forget gradients|."""
    model = copy.deepcopy(model).eval()
    for x, y in chunks(data, FORGOTTEN, 0):
        nn.functional.cross_entropy(model(x), y, reduction="sum").neg().backward()
    flat = torch.cat([p.grad.abs().flatten() for p in model.parameters() if p.grad is not None])
    ranks = torch.argsort(torch.argsort(flat))
    chosen = (ranks < round(FRACTION * len(flat))).to(flat.dtype)
    return [m.view(p.shape) for m, p in zip(chosen.split([p.numel() for p in model.parameters()]), model.parameters())]


class Sam:
    """The published optimiser: two steps, the first to w + ε over all weights, the second back and on."""

    def __init__(self, model: nn.Module, rule: str, optimizer: torch.optim.Optimizer, sign: int) -> None:
        self.model, self.rule, self.optimizer, self.sign = model, rule, optimizer, sign
        self.params = list(model.parameters())

    def step(self, loss: Callable[[], Tensor], mask: list[Tensor] | None) -> None:
        g0 = torch.autograd.grad(loss(), self.params)
        g1 = list(g0 if self.rule == "none" else self.perturbed(loss, g0))
        if mask is not None:
            g1 = [g * m for g, m in zip(g1, mask)]
        for p, a, b in zip(self.params, g0, g1):
            p.grad = b if self.rule == "none" or self.sign > 0 else 2 * a - b
        self.optimizer.step()

    def perturbed(self, loss: Callable[[], Tensor], g0: Iterable[Tensor]) -> tuple[Tensor, ...]:
        sizes = [p.detach().abs() if self.rule == "asam" else torch.ones_like(p) for p in self.params]
        norm = sum(float(((t * g) ** 2).sum()) for t, g in zip(sizes, g0)) ** 0.5
        weights = [p.detach().clone() for p in self.params]
        statistics = [b.clone() for b in self.model.buffers()]
        for p, t, g in zip(self.params, sizes, g0):
            p.data += RADII[self.rule] * t**2 * g / norm
        found = torch.autograd.grad(loss(), self.params)
        for p, w in zip(self.params, weights):
            p.data = w
        for b, old in zip(self.model.buffers(), statistics):
            b.copy_(old)
        return found


def base(name: str, model: nn.Module, decay: float) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=decay)


def published(
    method: str,
    rule: str,
    optimizer: str,
    model: nn.Module,
    data: Samples,
    decay: float = DECAY,
    epochs: int = EPOCHS,
) -> None:
    """Train `model` in place, as the published code does."""

    def ce(batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def pairs(epoch: int) -> Iterator[tuple[Batch, Batch]]:
        """The retain loader once, and beside it the forget loader's batches, again and again."""
        return zip(chunks(data, RETAINED, epoch), itertools.cycle(chunks(data, FORGOTTEN, epoch)))

    mask = least_salient(model, data)
    first = Sam(model, rule, base(optimizer, model, decay), 1)
    second = Sam(model, rule, base(optimizer, model, decay), -1)
    model.train()
    for epoch in range(epochs):
        if method == "finetune":
            for r in chunks(data, RETAINED, epoch):
                first.step(lambda r=r: ce(r), None)
        elif method == "gradient_ascent":
            for f in chunks(data, FORGOTTEN, epoch):
                first.step(lambda f=f: -ce(f), None)
        elif method == "neggrad":
            for r, f in pairs(epoch):
                first.step(lambda r=r, f=f: ALPHA * ce(r) - (1 - ALPHA) * ce(f), None)
        else:
            for r, f in pairs(epoch):
                first.step(lambda r=r: ALPHA * ce(r), [1 - m for m in mask])
                second.step(lambda f=f: -(1 - ALPHA) * ce(f), mask)


# --- the library -----------------------------------------------------------------------------------------------------


def settings_of(method: str, rule: str, optimizer: str, decay: float = DECAY) -> dict[str, Any]:
    found: dict[str, Any] = {"epochs": EPOCHS, "batch_size": BATCH, "seed": SEED, "lr": RATE, "weight_decay": decay}
    found |= {} if optimizer == "adamw" else {"optimizer": optimizer}
    found |= {"alpha": ALPHA} if method in ("neggrad", "sharp_minmax") else {}
    found |= {"fraction": FRACTION} if method == "sharp_minmax" else {}
    return found | ({} if rule == "none" else {"rho": RADII[rule]})


def run(method: str, rule: str, model: nn.Module, data: Samples, **settings: Any) -> nn.Module:
    how = configure(method, rule=rule, published=True, **settings)
    forgotten, _ = unlearning.run(model, data, FORGOTTEN, RETAINED, how)
    return forgotten


def distance(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of weights and of BatchNorm's statistics."""
    pairs = zip(a.state_dict().items(), b.state_dict().values(), strict=True)
    return max(float((x - y).abs().max()) for (name, x), y in pairs if not name.endswith("num_batches_tracked"))


CASES = [(m, r, o) for m in OF_METHODS for r in OF_RULES for o in ("adamw", "sgd")]


@pytest.mark.parametrize(("method", "rule", "optimizer"), CASES)
def test_a_published_run_is_rebuilt_step_for_step(method: str, rule: str, optimizer: str) -> None:
    decay = (
        0.0 if (method, rule) == ("sharp_minmax", "none") else DECAY
    )  # what is not offered is the decay beyond masks
    start, expected = network(), network()
    published(method, rule, optimizer, expected, samples(), decay)
    found = run(method, rule, start, samples(), **settings_of(method, rule, optimizer, decay))
    assert distance(found, expected) < 1e-10
    assert distance(start, expected) > 1e-2


@pytest.mark.parametrize("method", ["neggrad", "sharp_minmax"])
@pytest.mark.parametrize("rule", ["sam", "asam"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_and_in_single_precision(method: str, rule: str, optimizer: str) -> None:
    """One epoch: rounding grows from step to step, most in a batch of two samples, and Adam divides by the gradient."""
    expected, data = network(torch.float32), samples(torch.float32)
    published(method, rule, optimizer, expected, data, epochs=1)
    settings = settings_of(method, rule, optimizer) | {"epochs": 1}
    found = run(method, rule, network(torch.float32), data, **settings)
    assert distance(found, expected) < (1e-6 if optimizer == "sgd" else 1e-5)


@pytest.mark.parametrize(
    ("method", "setting", "other"),
    [
        ("neggrad", "sharpness_on", "separate"),
        ("neggrad", "cycle", "anew"),
        ("sharp_minmax", "select", "largest"),
        ("sharp_minmax", "leak", False),
        ("sharp_minmax", "phase_steps", "together"),
        ("sharp_minmax", "phase_steps", "separate"),
        ("sharp_minmax", "perturb", "region"),
        ("sharp_minmax", "last_batch", "balanced"),
        ("sharp_minmax", "cycle", "anew"),
        ("sharp_minmax", "optimizer", "sgd"),
    ],
)
def test_each_of_the_settings_is_needed_and_can_be_given_otherwise(method: str, setting: str, other: Any) -> None:
    expected = network()
    published(method, "asam", "adamw", expected, samples())
    assert published_settings(method, "asam")[setting] != other
    given = settings_of(method, "asam", "adamw") | {setting: other}
    assert distance(run(method, "asam", network(), samples(), **given), expected) > 1e-4


@pytest.mark.parametrize("steps", ["alternate", "separate"])
def test_phases_with_a_state_each_under_masks_that_hold(steps: str) -> None:
    """Without `leak` each part of the weights has its own momentum; "alternate" shows the second the first's step."""
    data, model = samples(), network()
    mask = least_salient(model, data)
    settings = settings_of("sharp_minmax", "none", "sgd") | {"phase_steps": steps}
    found = run("sharp_minmax", "none", network(), data, **settings)
    params = list(model.parameters())
    momenta: dict[tuple[int, int], Tensor] = {}
    model.train()

    def gradient(k: int, batch: Batch) -> list[Tensor]:
        loss = (ALPHA, ALPHA - 1)[k] * nn.functional.cross_entropy(model(batch[0]), batch[1])
        return list(torch.autograd.grad(loss, params))

    for epoch in range(EPOCHS):
        for batches in zip(chunks(data, RETAINED, epoch), itertools.cycle(chunks(data, FORGOTTEN, epoch))):
            before = [gradient(k, batch) for k, batch in enumerate(batches)] if steps == "separate" else None
            for k, batch in enumerate(batches):
                grads = gradient(k, batch) if before is None else before[k]
                for i, (p, g, m) in enumerate(zip(params, grads, mask)):
                    momenta[k, i] = 0.9 * momenta.get((k, i), torch.zeros_like(g)) + g + DECAY * p.detach()
                    p.data -= RATE * (m if k else 1 - m) * momenta[k, i]
    assert distance(found, model) < 1e-10


# --- what the loop makes of it ---------------------------------------------------------------------------------------


def loop_of(model: nn.Module, phases: list[Phase] | None = None, **more: Any) -> Loop:
    settings = settings_of("sharp_minmax", "sam", "adamw") | more
    how = configure("sharp_minmax", rule="sam", published=True, **settings)
    data = samples()
    assert isinstance(how.method, PhasedMethod)
    problem = Problem(model=model, samples=data, forget=FORGOTTEN, retain=RETAINED, rule=how.rule, seed=SEED)
    streams = {
        name: Stream(data, indices, BATCH, SEED, last_batch="short", cycle="repeat")
        for name, indices in ((RETAIN, RETAINED), (FORGET, FORGOTTEN))
    }
    return Loop(model, phases or how.method.phases(problem), streams, how, alternate=True)


class Broken(CrossEntropy):
    """Not finite at the call of this number."""

    number = 0
    calls = 0

    def terms(self, model: nn.Module, batches: Any, at: Any) -> Any:
        type(self).calls += 1
        for name, term in super().terms(model, batches, at):
            yield name, term * float("nan") if self.calls == self.number else term


class Stopped(Exception):
    pass


def test_a_run_goes_on_from_between_the_two_steps_of_a_batch() -> None:
    whole = loop_of(network())
    whole.run()
    assert (whole.n_batches, whole.passes) == (10, EPOCHS * 5 * 4)
    cut, saved = loop_of(network()), []

    def save(loop: Loop) -> None:
        if (loop.epoch, loop.batch) == (1, 7):  # after the fourth retain step, before the forget step beside it
            saved.append(copy.deepcopy(loop.state_dict()))
            raise Stopped

    with pytest.raises(Stopped):
        cut.run(save=save, save_seconds=0)
    resumed = loop_of(network())
    resumed.load_state_dict(saved[0])
    resumed.run()
    assert distance(resumed.model, whole.model) == 0
    without = [[{k: v for k, v in row.items() if k != "seconds"} for row in run.history] for run in (resumed, whole)]
    assert without[0] == without[1]


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize("check_every", [1, 4])
def test_a_broken_step_leaves_the_network_as_the_step_before_it(phase: int, check_every: int) -> None:
    def phases() -> list[Phase]:
        made = loop_of(network()).phases
        objective = made[phase].objective
        assert isinstance(objective, CrossEntropy)
        broken = type("Broken", (Broken,), {"number": 5, "calls": 0})(objective.weights)
        made[phase] = dataclasses.replace(made[phase], objective=broken)
        return made

    loop = loop_of(network(), phases(), check_every=check_every)
    with pytest.raises(NonFiniteError):
        loop.run()  # the fifth evaluation of this phase is that of its third step
    assert (loop.epoch, loop.batch) == (0, 2 * 2 + phase)
    other = loop_of(network())
    for turn, taken, batches in other._batches():
        if other.batch == 4 + phase:
            break
        other._set_lr(other._done(), 30)
        other._step(turn, taken, batches)
        other.batch += 1
    assert distance(loop.model, other.model) == 0


def test_repeated_batches_are_the_same_down_to_their_augmentation() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 6, 6, 1), dtype=np.uint8)
    data = ImageSamples(pixels, np.arange(9) % 3, augmentation=Augmentation(crop=True, flip=True))
    for cycle, same in (("repeat", True), ("anew", False)):
        stream = Stream(data, np.arange(9), 4, 0, cycle=cycle)  # pyright: ignore[reportArgumentType]
        batches = list(stream.epoch(2, n_batches=8))
        for a, b in zip(batches, batches[3:]):
            assert (torch.equal(a.inputs, b.inputs) and torch.equal(a.indices, b.indices)) == same
        late = list(stream.epoch(2, start=4, n_batches=8))
        assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(batches[4:], late, strict=True))
        other = next(stream.epoch(3))
        assert not torch.equal(other.indices, batches[0].indices)


# --- configuration ---------------------------------------------------------------------------------------------------


def test_the_command_line_takes_the_same_settings() -> None:
    words = ["unlearn", "--model", "m", "--random", "3", "--published", "--rule", "asam", "--alpha", "0.9"]
    assert cli._parse(words).unlearn_config() == configure("sharp_minmax", rule="asam", published=True, alpha=0.9)
    other = cli._parse([*words, "--optimizer", "sgd", "--last-batch", "balanced"]).unlearn_config()
    assert (other.optimizer.name, other.optimizer.momentum, other.last_batch) == ("sgd", None, "balanced")
    assert other.method.leak
    listed = [f"--{name.replace('_', '-')}={v}" for name, v in published_settings("neggrad", "sam").items()]
    one_by_one = cli._parse(["unlearn", "--model", "m", "--method", "neggrad", "--rule", "sam", *listed])
    assert one_by_one.unlearn_config() == configure("neggrad", rule="sam", published=True)


def test_what_the_published_code_lacks_is_refused() -> None:
    for method, rule in (("saul", "sam"), ("sharp_minmax", "looksam")):
        with pytest.raises(UserError, match="published: the steps of the published code are offered for"):
            configure(method, rule=rule, published=True)
    with pytest.raises(UserError, match="give both by their names"):
        configure(METHODS["neggrad"](), rule="sam", published=True)
    with pytest.raises(UserError, match="give both by their names"):
        configure("neggrad", rule=RULES["sam"](), published=True)
    words = ["unlearn", "--model", "m", "--random", "3", "--published"]
    with pytest.raises(UserError, match="leave --published out"):
        cli._parse(words).unlearn_config("some.json")
    with pytest.raises(UserError, match=r"phase_steps must be one of|unknown phase_steps"):
        configure("neggrad", phase_steps="apart")
