"""SFRon: coefficients against their formula, the mask against a loop over samples, a run against one by hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unsharp import masks, runtime, unlearning
from unsharp.artifacts import Workspace
from unsharp.data import TensorSamples
from unsharp.data.samples import Batch
from unsharp.data.streams import Stream
from unsharp.errors import UserError
from unsharp.methods import METHODS, Problem
from unsharp.methods.sfron import AdaptiveAscent
from unsharp.phases import FORGET, RETAIN, Moment
from unsharp.sharpness import NO_RULE, Sharpness

N, FORGOTTEN = 24, 7
RETAINED = np.arange(FORGOTTEN, N)


def samples() -> TensorSamples:
    generator = torch.Generator().manual_seed(1)
    return TensorSamples(torch.randn(N, 4, generator=generator, dtype=torch.float64), torch.arange(N) % 3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def problem(workspace: Workspace | None = None) -> Problem:
    return Problem(
        model=network(),
        samples=samples(),
        forget=np.arange(FORGOTTEN),
        retain=RETAINED,
        rule=NO_RULE,
        workspace=workspace,
    )


def forget_batch() -> Batch:
    data = samples()
    return Batch(data.inputs[:FORGOTTEN], torch.from_numpy(data.labels[:FORGOTTEN]), torch.arange(FORGOTTEN))


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("epoch", "share"), [(0, 1.0), (1, 0.75), (2, 0.25)])
def test_the_gradient_is_that_of_the_losses_each_by_its_coefficient(power: float, epoch: int, share: float) -> None:
    model, batch = network(), forget_batch()
    params = list(model.parameters())
    each = [nn.functional.cross_entropy(model(batch.inputs[i : i + 1]), batch.labels[i : i + 1]) for i in range(7)]
    inverse = [float(loss.detach()) ** -power for loss in each]
    slopes = [torch.autograd.grad(loss, params) for loss in each]
    expected = [
        -3.0 * share * sum(c / sum(inverse) * g for c, g in zip(inverse, parts))  # type: ignore[misc]
        for parts in zip(*slopes)
    ]
    ((name, term),) = AdaptiveAscent(weight=3.0, power=power).terms(
        model, {FORGET: batch}, Moment(epoch=epoch, epochs=3)
    )
    assert name == FORGET
    for found, g in zip(torch.autograd.grad(term, params), expected, strict=True):
        torch.testing.assert_close(found, g, rtol=1e-10, atol=1e-14)


def test_power_0_is_the_mean_loss_and_a_loss_of_0_does_not_silence_the_others() -> None:
    model, batch = network().float(), forget_batch()
    batch = Batch(batch.inputs.float(), batch.labels, batch.indices)
    ((_, term),) = AdaptiveAscent(weight=1.0, power=0.0).terms(model, {FORGET: batch}, Moment())
    mean = nn.functional.cross_entropy(model(batch.inputs), batch.labels)
    torch.testing.assert_close(term, -mean)

    class Certain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = model(x).clone()
            logits[0, batch.labels[0]] += 1e4  # its loss is 0 to the last bit
            return logits

    ((_, term),) = AdaptiveAscent(weight=1.0, power=0.5).terms(Certain(), {FORGET: batch}, Moment())
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(term, list(model.parameters()))])
    assert torch.isfinite(slope).all()
    assert float(slope.norm()) > 1e-5


# --- the mask ---------------------------------------------------------------------------------------------------------


def fisher(model: nn.Module, positions: np.ndarray) -> dict[str, Tensor]:
    """Mean of squared gradients, sample by sample."""
    data, found = samples(), {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in positions:
        model.zero_grad()
        nn.functional.cross_entropy(model(data.inputs[i : i + 1]), torch.tensor([data.labels[i]])).backward()
        for n, p in model.named_parameters():
            assert p.grad is not None
            found[n] += p.grad**2 / len(positions)
    return found


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.6])
def test_forgetting_moves_the_weights_that_matter_more_for_the_forget_set(ratio: float) -> None:
    solved = problem()
    forget, retain = METHODS["sfron"](fisher_ratio=ratio).phases(solved)
    of_forget, of_retain = fisher(network(), np.arange(FORGOTTEN)), fisher(network(), RETAINED)
    assert forget.region is not None
    for n, m in forget.region.items():
        assert torch.equal(m, of_forget[n] >= ratio * of_retain[n])
    assert 0 < masks.fraction_of(forget.region) < 1
    assert retain.region is None
    assert (forget.turn, retain.turn) == (0, 1)


def test_the_mask_stays_with_a_killed_run(tmp_path: Path) -> None:
    method = METHODS["sfron"]()
    first = method.phases(problem(Workspace(tmp_path)))[0].region
    assert first is not None
    turned = {n: ~m for n, m in first.items()}
    masks.save(turned, tmp_path / masks.FILE)
    again = method.phases(problem(Workspace(tmp_path)))[0].region
    assert again is not None
    assert all(torch.equal(again[n], m) for n, m in turned.items())


def test_without_a_ratio_all_weights_forget_and_an_impossible_one_is_refused() -> None:
    method = METHODS["sfron"](fisher_ratio=0.0)
    assert method.phases(problem())[0].region is None
    assert method.preparation_passes(problem(), 4) == 0
    assert METHODS["sfron"]().preparation_passes(problem(), 4) == 2 + 5
    with pytest.raises(UserError, match="smaller fisher_ratio"):
        METHODS["sfron"](fisher_ratio=1e9).phases(problem())
    for name, value in (("forget_weight", 0.0), ("loss_power", -1.0), ("fisher_ratio", math.nan), ("fisher_batch", 0)):
        with pytest.raises(UserError, match=name):
            METHODS["sfron"](**{name: value})


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.2])
def test_a_run_climbs_on_forget_and_then_repairs_on_retain_each_with_a_momentum_of_its_own(rho: float) -> None:
    config = unlearning.configure(
        "sfron",
        rule=Sharpness(rho=rho),
        epochs=3,
        batch_size=4,
        forget_weight=2.0,
        lr=0.1,
        weight_decay=0.05,
        schedule="constant",
        clip_norm=0.5,
    )
    found, record = unlearning.run(network(), samples(), np.arange(FORGOTTEN), RETAINED, config)

    model, data = network(), samples()
    of_forget, of_retain = fisher(network(), np.arange(FORGOTTEN)), fisher(network(), RETAINED)
    mask = [(of_forget[n] >= of_retain[n]).double() for n, _ in model.named_parameters()]
    params = list(model.parameters())
    everywhere = [torch.ones_like(p) for p in params]
    speed = {RETAIN: [torch.zeros_like(p) for p in params], FORGET: [torch.zeros_like(p) for p in params]}
    runtime.seed_all(0)

    def loss(name: str, batch: Batch, epoch: int) -> Tensor:
        each = nn.functional.cross_entropy(model(batch.inputs), batch.labels, reduction="none")
        if name == RETAIN:
            return each.mean()
        c = each.detach() ** -0.5
        return -2.0 * (1 + math.cos(math.pi * epoch / 3)) / 2 * (c / c.sum() * each).sum()

    for epoch in range(3):
        for name, positions, moves in ((FORGET, np.arange(FORGOTTEN), mask), (RETAIN, RETAINED, everywhere)):
            for batch in Stream(data, positions, 4, 0).epoch(epoch):
                slope = list(torch.autograd.grad(loss(name, batch, epoch), params))
                if rho:
                    up = [m * g for m, g in zip(moves, slope)]
                    length = torch.cat([u.flatten() for u in up]).norm()
                    kept = [p.detach().clone() for p in params]
                    with torch.no_grad():
                        for p, u in zip(params, up):
                            p += rho * u / length
                    slope = list(torch.autograd.grad(loss(name, batch, epoch), params))
                    with torch.no_grad():
                        for p, w in zip(params, kept):
                            p.copy_(w)
                slope = [m * g for m, g in zip(moves, slope)]
                norm = float(torch.cat([g.flatten() for g in slope]).norm())
                with torch.no_grad():
                    for p, v, g, m in zip(params, speed[name], slope, moves):
                        v.mul_(0.9).add_(m * (g * min(1.0, 0.5 / (norm + 1e-6)) + 0.05 * p))
                        p -= 0.1 * v
    for p, q in zip(found.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    assert record.passes == 3 * (2 + 5) * (2 if rho else 1) + 2 + 5
    assert set(record.history[0]) >= {FORGET, RETAIN}


def test_a_shorter_run_is_not_the_start_of_a_longer_one() -> None:
    """The weight of the forget loss falls over the run, so `unsharp tune` must not read one off the other."""
    assert not METHODS["sfron"].nested_epochs  # type: ignore[attr-defined]
    rate = [AdaptiveAscent.decay(Moment(epoch=1, epochs=n)) for n in (2, 5)]
    assert rate[0] != rate[1]
    assert dataclasses.asdict(METHODS["sfron"]())["fisher_batch"] == 1
