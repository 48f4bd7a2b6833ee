"""Selective synaptic dampening against a loop over samples and weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unsharp import unlearning
from unsharp.data import TensorSamples
from unsharp.data.share import share_of
from unsharp.errors import UserError
from unsharp.gradients import groups_of
from unsharp.methods import METHODS
from unsharp.sharpness import RULES
from unsharp.training import Record

N = 60
FORGET = np.array([2, 7, 30])
RETAIN = np.setdiff1d(np.arange(N), FORGET)


def problem() -> tuple[nn.Module, TensorSamples]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    model[0].bias.requires_grad_(False)
    return model, TensorSamples(torch.randn(N, 4, dtype=torch.float64), torch.arange(N) % 3)


def run(model: nn.Module, samples: TensorSamples, **settings: Any) -> tuple[nn.Module, Record]:
    config = unlearning.configure("ssd", batch_size=16, **settings)
    return unlearning.run(model, samples, FORGET, RETAIN, config)


def squares(model: nn.Module, samples: TensorSamples, groups: list[np.ndarray]) -> list[dict[str, Tensor]]:
    """Of each group the squared gradient of its mean loss, by name."""
    model.eval()
    found = []
    for group in groups:
        model.zero_grad()
        labels = torch.from_numpy(samples.labels[group])
        nn.functional.cross_entropy(model(samples.inputs[group]), labels).backward()
        found.append({n: p.grad**2 for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return found


def dampened(
    model: nn.Module, of_forget: list[dict[str, Tensor]], of_all: list[dict[str, Tensor]], alpha: float, lam: float
) -> tuple[dict[str, Tensor], int]:
    """Algorithm 1 of the paper, weight by weight."""
    new, n_selected = {n: p.detach().clone() for n, p in model.named_parameters()}, 0
    for n in of_forget[0]:
        w = new[n].view(-1)
        for k in range(len(w)):
            i_f = sum(float(s[n].view(-1)[k]) for s in of_forget) / len(of_forget)
            i_d = sum(float(s[n].view(-1)[k]) for s in of_all) / len(of_all)
            if i_f > alpha * i_d:
                w[k] *= min(lam * i_d / i_f, 1.0)
                n_selected += 1
    return new, n_selected


@pytest.mark.parametrize(("alpha", "lam"), [(1.5, 1.0), (1.5, 0.0), (1.1, 3.0), (4.0, 0.3)])
def test_weights_are_selected_and_dampened_as_the_paper_says(alpha: float, lam: float) -> None:
    model, samples = problem()
    each = squares(model, samples, groups_of(np.arange(N), 1, 0))
    expected, n_selected = dampened(model, [each[i] for i in FORGET], each, alpha, lam)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found, record = run(model, samples, selection_weight=alpha, dampening=lam)
    n_weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < n_selected < n_weights
    for n, p in found.named_parameters():
        torch.testing.assert_close(p.detach(), expected[n], rtol=1e-9, atol=0)
    assert all(torch.equal(found.get_buffer(n), b) for n, b in model.named_buffers())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    (row,) = record.history
    assert row["dampened"] == n_selected / n_weights
    assert record.passes == 1 + 4  # forget, and the 57 retained ones, in batches of 16: neither is read twice
    assert not found.training


def test_squares_of_batch_gradients_are_taken_where_they_are_asked_for() -> None:
    model, samples = problem()
    expected, n_selected = dampened(
        model,
        squares(model, samples, groups_of(FORGET, 8, 4)),
        squares(model, samples, groups_of(np.arange(N), 8, 4)),
        3.0,
        1.0,
    )
    assert n_selected > 0
    found, _ = run(model, samples, selection_weight=3.0, fisher_batch=8, seed=4)
    for n, p in found.named_parameters():
        torch.testing.assert_close(p.detach(), expected[n], rtol=1e-9, atol=0)


def test_a_share_of_the_retained_samples_stands_for_all_of_them() -> None:
    model, samples = problem()
    each = squares(model, samples, groups_of(np.arange(N), 1, 0))
    read = share_of(samples, RETAIN, 0.4, 0)
    assert len(read) < len(RETAIN)
    weighted = [{n: v * len(RETAIN) / len(read) for n, v in each[i].items()} for i in read]
    zeros = [{n: 0 * v for n, v in each[0].items()}] * (len(RETAIN) - len(read))  # so that the mean is over N
    expected, _ = dampened(model, [each[i] for i in FORGET], [each[i] for i in FORGET] + weighted + zeros, 1.5, 1.0)
    found, _ = run(model, samples, selection_weight=1.5, retain_fraction=0.4)
    for n, p in found.named_parameters():
        torch.testing.assert_close(p.detach(), expected[n], rtol=1e-9, atol=0)


def test_a_weight_on_which_training_data_do_not_depend_is_not_selected() -> None:
    model, samples = problem()
    model.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))  # type: ignore[assignment]
    found, _ = run(model, samples, selection_weight=1.2)
    assert torch.equal(found.get_parameter("unused"), torch.ones(3, dtype=torch.float64))
    assert all(torch.isfinite(p).all() for p in found.parameters())


def test_a_selection_that_no_weight_can_meet_is_refused() -> None:
    model, samples = problem()
    with pytest.raises(UserError, match="selection_weight 20 selects no weight"):
        run(model, samples, selection_weight=20.0)  # the forget set is a twentieth of the data
    _, record = run(model, samples, selection_weight=19.9)
    assert record.history[0]["dampened"] >= 0


def test_it_takes_no_rule_and_no_values_out_of_range() -> None:
    assert [name for name in RULES if METHODS["ssd"].admits(name)[0]] == ["none"]
    for name, value in (("selection_weight", 0.0), ("dampening", -0.1), ("fisher_batch", 0)):
        with pytest.raises(UserError, match=name):
            METHODS["ssd"](**{name: value})
    assert (METHODS["ssd"]().selection_weight, METHODS["ssd"]().dampening) == (10.0, 1.0)
