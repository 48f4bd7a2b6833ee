"""SAUL: the constrained minimum in closed form, the multiplier's recursion and both optimisers by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unsharp import runtime, unlearning
from unsharp.data import TensorSamples
from unsharp.data.samples import Batch
from unsharp.data.streams import Stream
from unsharp.engine import Loop, LoopConfig
from unsharp.errors import NonFiniteError, UserError
from unsharp.methods import METHODS, Problem
from unsharp.methods.saul import Multiplier
from unsharp.phases import FORGET, RETAIN, CrossEntropy, Moment, Objective, Phase
from unsharp.sharpness import NO_RULE, AdaptiveSharpness, Rule, Sharpness

N, FORGOTTEN = 22, 6
RETAINED = np.arange(FORGOTTEN, N)


def samples() -> TensorSamples:
    generator = torch.Generator().manual_seed(1)
    return TensorSamples(torch.randn(N, 4, generator=generator, dtype=torch.float64), torch.arange(N) % 3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def streams() -> dict[str, Stream]:
    return {RETAIN: Stream(samples(), RETAINED, 4, 0), FORGET: Stream(samples(), np.arange(FORGOTTEN), 4, 0)}


# --- the constrained minimum ------------------------------------------------------------------------------------------


class Bowl(Objective):
    """sign · ½‖w − centre‖², whatever the batch."""

    def __init__(self, stream: str, sign: float, centre: Tensor) -> None:
        self.stream, self.sign, self.centre = stream, sign, centre

    @property
    def streams(self) -> tuple[str, ...]:
        return (self.stream,)

    def terms(self, model: nn.Module, batches: Mapping[str, Batch], at: Moment) -> Iterator[tuple[str, Tensor]]:
        (w,) = model.parameters()
        yield self.stream, self.sign * 0.5 * ((w - self.centre) ** 2).sum()


def bowls(level: float, rate: float, epochs: int) -> tuple[Tensor, float]:
    """Where the controller ends with two bowls, and its multiplier."""
    retain_at = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)
    forget_at = torch.tensor([0.4, 0.6, 0.0], dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(retain_at)
    phases = [
        Phase(objective=Bowl(RETAIN, 1.0, retain_at), name=RETAIN),
        Phase(objective=Bowl(FORGET, -1.0, forget_at), scale=Multiplier(level=level, rate=rate), name=FORGET),
    ]
    config = LoopConfig(epochs=epochs, batch_size=4)
    loop = Loop(
        model,
        phases,
        streams(),
        config,
        make_optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=0.3),
        separate_states=True,
    )
    loop.run()
    return model.weight.detach()[0], float(loop.state_dict()["memories"][1]["multiplier"])


@pytest.mark.parametrize("level", [1.0, 2.0, 5.0])
def test_it_ends_at_the_constrained_minimum_with_the_multiplier_of_kuhn_and_tucker(level: float) -> None:
    """min ½‖w−a‖² subject to ½‖w−b‖² ≥ c: w = b + t·(a−b) with t = √(2c)/‖a−b‖, and λ = (t−1)/t."""
    a = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)
    b = torch.tensor([0.4, 0.6, 0.0], dtype=torch.float64)
    t = math.sqrt(2 * level) / float((a - b).norm())
    assert t > 1
    w, multiplier = bowls(level, rate=0.03 / level, epochs=100)
    torch.testing.assert_close(w, b + t * (a - b), rtol=1e-6, atol=1e-6)
    assert multiplier == pytest.approx((t - 1) / t, rel=1e-6)
    assert 0.5 * float(((w - b) ** 2).sum()) == pytest.approx(level, rel=1e-6)


def test_where_the_level_is_met_already_the_multiplier_stays_0_and_nothing_moves() -> None:
    w, multiplier = bowls(0.1, rate=0.01, epochs=5)
    assert multiplier == 0
    assert torch.equal(w, torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64))


# --- step by step -----------------------------------------------------------------------------------------------------


class HandMade:
    """An optimiser written out: SGD with momentum, or AdamW."""

    def __init__(self, params: list[Tensor], kind: str, decay: float) -> None:
        self.params, self.kind, self.decay = params, kind, decay
        self.first, self.second = ([torch.zeros_like(p) for p in params] for _ in range(2))
        self.n = 0

    @torch.no_grad()
    def step(self, slopes: list[Tensor]) -> None:
        self.n += 1
        for p, m, v, g in zip(self.params, self.first, self.second, slopes):
            if self.kind == "sgd":
                m.mul_(0.9).add_(g + self.decay * p)
                p -= 0.1 * m
            else:
                p *= 1 - 0.1 * self.decay
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                p -= 0.1 * (m / (1 - 0.9**self.n)) / ((v / (1 - 0.999**self.n)).sqrt() + 1e-8)


def by_hand(
    level: float, rate: float, rho: float, adaptive: bool, kind: str, epochs: int
) -> tuple[nn.Module, list[float]]:
    """Both gradients at the same weights, each beside it; the retain optimiser alone decays; λ = 0 rests the other."""
    model = network()
    params = list(model.parameters())
    keeps, forgets = HandMade(params, kind, 0.05), HandMade(params, kind, 0.0)
    multiplier, course = 0.0, []

    def beside(batch: Batch, sign: float) -> tuple[float, list[Tensor]]:
        """The loss and its gradient where `sign` times the loss is larger by ρ."""

        def loss() -> Tensor:
            return nn.functional.cross_entropy(model(batch.inputs), batch.labels)

        value = loss()
        slope = torch.autograd.grad(value, params)
        if rho:
            sizes = [p.detach().abs() if adaptive else torch.ones_like(p) for p in params]
            length = torch.cat([(t * g).flatten() for t, g in zip(sizes, slope)]).norm()
            kept = [p.detach().clone() for p in params]
            with torch.no_grad():
                for p, t, g in zip(params, sizes, slope):
                    p += sign * rho * t**2 * g / length
            value = loss()
            slope = torch.autograd.grad(value, params)
            with torch.no_grad():
                for p, w in zip(params, kept):
                    p.copy_(w)
        return float(value.detach()), list(slope)

    for epoch in range(epochs):
        read = streams()
        for retain, forget in zip(read[RETAIN].epoch(epoch), read[FORGET].epoch(epoch, n_batches=4), strict=True):
            _, down = beside(retain, 1.0)
            height, up = beside(forget, -1.0)
            multiplier = max(0.0, multiplier + rate * (level - height))
            course.append(multiplier)
            keeps.step(down)
            if multiplier > 0:
                forgets.step([-multiplier * g for g in up])
    return model, course


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("rule", "rho", "adaptive"),
    [(NO_RULE, 0.0, False), (Sharpness(rho=0.2), 0.2, False), (AdaptiveSharpness(rho=1.0), 1.0, True)],
    ids=["none", "sam", "asam"],
)
@pytest.mark.parametrize(("level", "rate"), [(1.3, 0.8), (0.9, 0.3)])
def test_a_run_is_that_of_the_textbook(
    rule: Rule, rho: float, adaptive: bool, kind: str, level: float, rate: float
) -> None:
    expected, course = by_hand(level, rate, rho, adaptive, kind, epochs=4)
    assert 0 < sum(m > 0 for m in course) < len(course) or level > 1  # in one case it rests in between
    config = unlearning.configure(
        "saul",
        rule=rule,
        forget_level=level,
        multiplier_rate=rate,
        epochs=4,
        batch_size=4,
        lr=0.1,
        optimizer=kind,
        weight_decay=0.05,
    )
    found, record = unlearning.run(network(), samples(), np.arange(FORGOTTEN), RETAINED, config)
    for p, q in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert record.passes == 4 * 4 * 2 * (2 if rho else 1)


def test_the_level_is_that_of_a_guess_unless_it_is_given() -> None:
    solved = Problem(model=network(), samples=samples(), forget=np.arange(FORGOTTEN), retain=RETAINED, rule=NO_RULE)
    assert METHODS["saul"]().phases(solved)[1].scale == Multiplier(level=math.log(3), rate=1e-3)
    assert METHODS["saul"](forget_level=2.0).phases(solved)[1].scale == Multiplier(level=2.0, rate=1e-3)


# --- the controller alone ---------------------------------------------------------------------------------------------


def test_the_multiplier_follows_its_recursion_and_survives_a_loss_that_is_not_finite() -> None:
    scale, memory = Multiplier(level=2.0, rate=0.5), {}
    expected = 0.0
    for height in (0.5, 3.0, 7.0, 1.0, 1.9, 2.0):
        expected = max(0.0, expected + 0.5 * (2.0 - height))
        assert float(scale.factor(torch.tensor(-height, dtype=torch.float64), memory)) == pytest.approx(expected)
    broken = scale.factor(torch.tensor(float("nan"), dtype=torch.float64), memory)
    assert not torch.isfinite(broken)  # so that the step is seen to be broken
    assert float(memory["multiplier"]) == pytest.approx(expected)
    for name, value in (("level", math.inf), ("rate", 0.0)):
        with pytest.raises(UserError, match=name):
            Multiplier(**{"level": 1.0, "rate": 0.1} | {name: value})


def test_the_multiplier_serves_any_forget_phase() -> None:
    """It holds the probability P of the labels, which another phase raises, at a half: −P ≥ −0.5."""

    class Likelihood(Objective):
        @property
        def streams(self) -> tuple[str, ...]:
            return (FORGET,)

        def terms(self, model: nn.Module, batches: Mapping[str, Batch], at: Moment) -> Iterator[tuple[str, Tensor]]:
            batch = batches[FORGET]
            yield FORGET, model(batch.inputs).softmax(1).gather(1, batch.labels[:, None]).mean()

    def ends(scale: Multiplier | None) -> float:
        model = network()
        loop = Loop(
            model,
            [
                Phase(objective=CrossEntropy({FORGET: 1.0}), name="raise"),
                Phase(objective=Likelihood(), scale=scale, name=FORGET),
            ],
            {FORGET: Stream(samples(), np.arange(FORGOTTEN), 6, 0)},
            LoopConfig(epochs=300, batch_size=6),
            make_optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=0.2),
            separate_states=True,
        )
        loop.run()
        data = samples()
        with torch.no_grad():
            likely = model(data.inputs[:FORGOTTEN]).softmax(1)
        return float(likely.gather(1, torch.from_numpy(data.labels[:FORGOTTEN])[:, None]).mean())

    assert ends(Multiplier(level=-0.5, rate=0.5)) == pytest.approx(0.5, abs=0.01)
    assert ends(None) > 0.6


def test_a_broken_step_leaves_the_multiplier_as_it_was() -> None:
    class Late(CrossEntropy):
        n = 0

        def terms(self, *args: Any) -> Any:
            type(self).n += 1
            for name, term in super().terms(*args):
                yield name, term * (float("nan") if type(self).n > 3 else 1.0)

    phases = [
        Phase(objective=CrossEntropy({RETAIN: 1.0}), name=RETAIN),
        Phase(objective=Late({FORGET: -1.0}), scale=Multiplier(level=5.0, rate=0.1), name=FORGET),
    ]
    loop = Loop(network(), phases, streams(), LoopConfig(epochs=2, batch_size=4), separate_states=True)
    course: list[Tensor] = []
    runtime.seed_all(0)
    with pytest.raises(NonFiniteError, match="step 4;"):
        loop.run(save=lambda at: course.append(at.state_dict()["memories"][1]["multiplier"]), save_seconds=0)
    assert torch.equal(loop.state_dict()["memories"][1]["multiplier"], course[2])
    assert torch.isfinite(course[2])
