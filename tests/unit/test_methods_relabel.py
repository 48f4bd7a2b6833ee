"""Methods that give forget samples other labels: the draws, the attack, and the steps, each computed another way."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from torch import nn

from unsharp import unlearning
from unsharp.artifacts import Workspace
from unsharp.data import DataConfig, ImageSamples, TensorSamples, load, loading
from unsharp.data.augment import Augmentation
from unsharp.data.samples import Batch, Samples, StreamedSamples
from unsharp.engine import OptimizerConfig
from unsharp.errors import UserError
from unsharp.methods import METHODS, Problem
from unsharp.methods.boundary_shrink import LABELS_FILE, nearest_classes
from unsharp.methods.relabel import RandomLabels, Relabelled
from unsharp.models.modes import evaluating
from unsharp.phases import FORGET, RETAIN, Moment
from unsharp.sharpness import NO_RULE
from unsharp.training import TrainConfig, train

N, D, K = 40, 6, 5
FORGOTTEN = np.arange(0, N, 4)
RETAINED = np.setdiff1d(np.arange(N), FORGOTTEN)
PLAIN = OptimizerConfig(lr=0.3, momentum=0.9, weight_decay=0.0)


def data(labels: Any = None) -> TensorSamples:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(N, D, dtype=torch.float64, generator=generator)
    return TensorSamples(inputs, np.arange(N) % K if labels is None else labels, [str(c) for c in range(K)])


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, K)).double()


def unlearn(name: str, *, samples: Samples | None = None, model: nn.Module | None = None, **settings: Any) -> Any:
    config = unlearning.configure(name, **{"batch_size": N, "epochs": 3, "optimizer": PLAIN, **settings})
    return unlearning.run(model or network(), samples or data(), FORGOTTEN, RETAINED, config)


def problem(model: nn.Module, samples: Samples, workspace: Workspace | None = None) -> Problem:
    return Problem(model=model, samples=samples, forget=FORGOTTEN, retain=RETAINED, rule=NO_RULE, workspace=workspace)


def assert_close(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# --- random labels ---------------------------------------------------------------------------------------------------


def drawn(samples: Samples, *, seed: int = 0, epochs: int = 1, other_classes: bool = True) -> np.ndarray:
    labels = RandomLabels(samples, other_classes=other_classes)
    return np.stack([labels(Moment(epoch=e, epochs=epochs, seed=seed)).numpy() for e in range(epochs)])


def test_other_classes_are_equally_likely_and_the_own_one_never_comes() -> None:
    samples = data()
    labels = drawn(samples, epochs=600)
    away = (labels - samples.labels) % K
    assert away.min() == 1
    assert chisquare(np.bincount(away.ravel(), minlength=K)[1:]).pvalue > 1e-3
    for i in range(0, N, 7):
        assert chisquare(np.bincount(away[:, i], minlength=K)[1:]).pvalue > 1e-4


def test_all_classes_are_equally_likely_where_the_own_one_may_come() -> None:
    samples = data()
    away = (drawn(samples, epochs=600, other_classes=False) - samples.labels) % K
    assert chisquare(np.bincount(away.ravel(), minlength=K)).pvalue > 1e-3


def test_draws_of_epochs_samples_and_seeds_are_independent() -> None:
    labels = drawn(data(np.zeros(N, np.int64)), epochs=400)
    others = drawn(data(np.zeros(N, np.int64)), epochs=400, seed=1)
    pairs = {
        "epochs": (labels[1:], labels[:-1]),
        "samples": (labels[:, 1:], labels[:, :-1]),
        "seeds": (labels, others),
    }
    for name, (a, b) in pairs.items():
        counts = np.bincount(((a - 1) * (K - 1) + b - 1).ravel(), minlength=(K - 1) ** 2)
        assert chisquare(counts).pvalue > 1e-3, name


def test_a_draw_belongs_to_the_place_in_the_full_source() -> None:
    samples = data()
    some = np.array([3, 8, 20, 39])
    np.testing.assert_array_equal(drawn(samples.subset(some), epochs=5), drawn(samples, epochs=5)[:, some])


def test_epochs_in_any_order_give_the_same_draws() -> None:
    labels = RandomLabels(data(), other_classes=True)
    forth = [labels(Moment(epoch=e)).clone() for e in range(3)]
    back = [labels(Moment(epoch=e)) for e in (2, 1, 0)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forth, back))


def test_the_labels_of_a_batch_are_those_of_its_samples() -> None:
    samples, model = data(), network()
    labels = RandomLabels(samples, other_classes=True)
    at = Moment(epoch=1, epochs=2, seed=3)
    positions = torch.tensor([8, 0, 36])
    forget = Batch(samples.inputs[positions], torch.from_numpy(samples.labels)[positions], positions)
    retain = Batch(samples.inputs[1:3], torch.from_numpy(samples.labels)[1:3], torch.arange(1, 3))
    terms = dict(Relabelled(0.3, labels).terms(model, {RETAIN: retain, FORGET: forget}, at))
    new = drawn(samples, seed=3, epochs=2)[1][positions]
    log_p = model(forget.inputs).log_softmax(1)
    assert terms[FORGET].item() == pytest.approx(-0.7 * np.mean([log_p[i, c].item() for i, c in enumerate(new)]))
    log_p = model(retain.inputs).log_softmax(1)
    assert terms[RETAIN].item() == pytest.approx(-0.3 * np.mean([log_p[i, i + 1].item() for i in range(2)]))


def test_by_default_it_is_training_on_all_samples_with_the_forget_labels_replaced() -> None:
    found, record = unlearn("random_label", seed=4)
    new = data().labels.copy()
    expected, velocity = network(), None
    for epoch in range(3):
        new[FORGOTTEN] = drawn(data(), seed=4, epochs=3)[epoch][FORGOTTEN]
        loss = nn.functional.cross_entropy(expected(data().inputs), torch.from_numpy(new))
        grads = torch.autograd.grad(loss, list(expected.parameters()))
        velocity = grads if velocity is None else [0.9 * v + g for v, g in zip(velocity, grads)]
        with torch.no_grad():
            for p, v in zip(expected.parameters(), velocity):
                p -= 0.3 * v
    assert_close(found, expected)
    assert record.passes == 3 * 2


def test_alpha_1_is_finetune_and_another_alpha_is_another_run() -> None:
    assert_equal(unlearn("random_label", alpha=1.0)[0], unlearn("finetune")[0])
    some, others = unlearn("random_label", alpha=0.5)[0], unlearn("random_label")[0]
    assert not torch.equal(next(some.parameters()), next(others.parameters()))


def test_logits_of_low_precision_give_a_loss_in_float32() -> None:
    inputs = torch.randn(4, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    model = nn.Linear(D, K).bfloat16()
    batch = Batch(inputs, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    ((_, loss),) = Relabelled(0.0, lambda at: torch.ones(4, dtype=torch.int64)).terms(model, {FORGET: batch}, Moment())
    assert loss.dtype == torch.float32


def test_a_single_class_is_refused() -> None:
    samples = TensorSamples(torch.randn(4, 2), [0, 0, 0, 0])
    for name in ("random_label", "salun", "boundary_shrink"):
        with pytest.raises(UserError, match="another class"):
            METHODS[name]().phases(
                dataclasses.replace(problem(nn.Linear(2, 1), samples), forget=np.arange(1), retain=np.arange(1, 4))
            )


# --- SalUn -----------------------------------------------------------------------------------------------------------


def test_salun_with_every_weight_is_random_label() -> None:
    expected = unlearn("random_label")[0]
    assert_equal(unlearn("salun", fraction=1.0)[0], expected)
    assert_equal(unlearn("salun", select="all")[0], expected)


def test_salun_moves_the_most_salient_weights_alone() -> None:
    model, samples = network(), data()
    found, record = unlearn("salun", fraction=0.4, weight_decay=0.1, batch_size=6)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for i in FORGOTTEN:
        loss = nn.functional.cross_entropy(model(samples.inputs[[i]]), torch.tensor([samples.labels[i]]))
        for t, g in zip(total, torch.autograd.grad(loss, list(model.parameters()))):
            t += g
    saliency = torch.cat([t.abs().flatten() for t in total])
    border = saliency.sort(descending=True).values[round(0.4 * len(saliency)) - 1]
    before, after = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, found))
    assert torch.equal(before != after, saliency >= border)
    assert record.passes == 3 * 5 * 2 + 2  # two batches for the mask


def test_choices_of_salun_that_cannot_be_are_refused() -> None:
    for settings, message in (({"fraction": 0.0}, "fraction"), ({"select": "best"}, "select"), ({"alpha": 2.0}, "al")):
        with pytest.raises(UserError, match=message):
            METHODS["salun"](**settings)


# --- Boundary Shrink -------------------------------------------------------------------------------------------------


def attacked(w: np.ndarray, b: np.ndarray, x: np.ndarray, y: int, step: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """The logits of a linear classifier after the attack, from the closed form of its gradient."""
    z = w @ x + b
    p = np.exp(z - z.max())
    p /= p.sum()
    p[y] -= 1
    return w @ np.clip(x + step * np.sign(p @ w), low, high) + b


@pytest.mark.parametrize("other_classes", [True, False])
def test_labels_are_those_of_the_closed_form_for_a_linear_classifier(other_classes: bool) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, K, 200)
    x = random.normal(size=(200, D))
    samples = TensorSamples(torch.from_numpy(x), labels, [str(c) for c in range(K)])
    model = nn.Linear(D, K).double()
    w, b = model.weight.detach().numpy(), model.bias.detach().numpy()
    found = nearest_classes(model, samples, np.arange(200), bound=0.3, other_classes=other_classes)
    changed = 0
    for i, y in enumerate(labels):
        z = attacked(w, b, x[i], y, np.full(D, 0.3), -np.inf, np.inf)
        candidates = [c for c in range(K) if c != y or not other_classes]
        assert found[i] == max(candidates, key=lambda c: z[c]), i
        plain = w @ x[i] + b
        changed += found[i] != max(candidates, key=lambda c: plain[c])
    assert changed > 5  # the attack matters
    assert bool((found == torch.from_numpy(labels)).any()) is not other_classes


def test_the_bound_of_images_is_on_the_scale_of_their_pixels_and_they_stay_within_black_and_white() -> None:
    random = np.random.default_rng(1)
    pixels = random.choice([0, 20, 128, 235, 255], (120, 3, 3, 2)).astype(np.uint8)
    labels = random.integers(0, K, 120)
    mean, std = np.array([0.4, 0.6]), np.array([0.1, 0.5])
    samples = ImageSamples(
        pixels, labels, mean=tuple(mean), std=tuple(std), augmentation=Augmentation(crop=True, flip=True)
    )
    torch.manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, K))
    found = nearest_classes(model, samples, np.arange(120), bound=0.25)
    # the same network on raw pixels: (x − mean) / std goes into its weights
    linear = model[1]
    w = linear.weight.detach().double().numpy().reshape(K, 2, 9) / std[None, :, None]
    b = linear.bias.detach().double().numpy() - (w * mean[None, :, None]).sum((1, 2))
    unclipped = 0
    for i, y in enumerate(labels):
        x = pixels[i].transpose(2, 0, 1).reshape(-1) / 255
        z, free = (
            attacked(w.reshape(K, -1), b, x, y, np.full(18, 0.25), low, high)
            for low, high in ((0, 1), (-np.inf, np.inf))
        )
        z[y] = free[y] = -np.inf
        assert found[i] == z.argmax(), i
        unclipped += z.argmax() != free.argmax()
    assert unclipped > 3


def test_images_that_are_read_as_they_are_needed_are_attacked_like_those_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(2)
    for i in range(60):
        file = tmp_path / "train" / "abc"[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(file)
    config = DataConfig(name="folder", dir=str(tmp_path), size=4, mean=(0.2, 0.4, 0.6), std=(0.1, 0.3, 0.5))
    resident = load(config).train
    monkeypatch.setattr(loading, "RESIDENT_BYTES", 0)
    streamed = load(config).train
    assert (type(resident), type(streamed)) == (ImageSamples, StreamedSamples)
    assert streamed.treatment == streamed.subset([1, 2]).treatment == resident.treatment
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    a, b = (nearest_classes(model, s, np.arange(60), bound=0.05, other_classes=False) for s in (resident, streamed))
    assert torch.equal(a, b)


def test_finding_the_labels_leaves_the_network_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, K)).double()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    with evaluating(model):
        expected = nearest_classes(model, data(), FORGOTTEN, bound=0.2)
    model.train()
    assert torch.equal(nearest_classes(model, data(), FORGOTTEN, bound=0.2), expected)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_it_is_training_on_the_forget_set_with_the_new_labels() -> None:
    new = data().labels.copy()
    new[FORGOTTEN] = nearest_classes(network(), data(), FORGOTTEN, bound=0.4)
    found, record = unlearn("boundary_shrink", bound=0.4, batch_size=4)
    expected = network()
    train(expected, data(new), FORGOTTEN, TrainConfig(epochs=3, batch_size=4, optimizer=PLAIN, schedule="constant"))
    assert_equal(found, expected)
    assert record.passes == 3 * 3 + 3 + 1  # three batches: one pass, and a third of one forward


def test_retained_samples_take_part_where_alpha_says_so() -> None:
    (phase,) = METHODS["boundary_shrink"](alpha=0.3).phases(problem(network(), data()))
    assert phase.objective.streams == (RETAIN, FORGET)
    (phase,) = METHODS["boundary_shrink"]().phases(problem(network(), data()))
    assert phase.objective.streams == (FORGET,)


def test_a_killed_run_goes_on_with_its_own_labels(tmp_path: Path) -> None:
    def labels() -> torch.Tensor:
        (phase,) = METHODS["boundary_shrink"]().phases(problem(network(), data(), Workspace(tmp_path)))
        assert isinstance(phase.objective, Relabelled)
        return phase.objective._labels(Moment())[FORGOTTEN]

    first = labels()
    turned = (first + 1) % K  # as if the device had summed otherwise
    torch.save(turned, tmp_path / LABELS_FILE)
    assert torch.equal(labels(), turned)


def test_what_cannot_be_attacked_is_refused() -> None:
    words = TensorSamples(torch.randint(0, 9, (N, D)), np.arange(N) % K)
    model = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(3 * D, K))
    with pytest.raises(UserError, match="int64"):
        METHODS["boundary_shrink"]().phases(problem(model, words))
    for settings, message in (({"bound": 0.0}, "bound"), ({"alpha": -0.1}, "alpha")):
        with pytest.raises(UserError, match=message):
            METHODS["boundary_shrink"](**settings)
