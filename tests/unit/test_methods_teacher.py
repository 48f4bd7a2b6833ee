"""Methods that follow other networks: divergences in closed form, SCRUB and bad teacher against plain loops."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from unsharp import unlearning
from unsharp.artifacts import Workspace
from unsharp.data import ImageSamples, TensorSamples, from_torch_dataset
from unsharp.data.augment import Augmentation
from unsharp.data.samples import Samples
from unsharp.data.streams import Stream
from unsharp.engine import OptimizerConfig
from unsharp.errors import NonFiniteError, UserError
from unsharp.methods import METHODS, Problem
from unsharp.methods import teacher as teachers
from unsharp.methods.base import Choice
from unsharp.methods.scrub import expected_error
from unsharp.methods.teacher import Teacher, divergence, looks_the_same, untrained
from unsharp.phases import FORGET, RETAIN, Moment
from unsharp.progress import Progress
from unsharp.sharpness import NO_RULE

N, D, K = 40, 6, 4
FORGOTTEN = np.arange(0, N, 4)
RETAINED = np.setdiff1d(np.arange(N), FORGOTTEN)
PLAIN = OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=0.01)


def drawn(n: int, seed: int) -> TensorSamples:
    """Points with the class of the largest of a few linear functions, one in five with another."""
    inputs = torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rule = torch.randn(D, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = (inputs @ rule).argmax(1).numpy()
    return TensorSamples(inputs, (labels + (np.arange(n) % 5 == 1)) % K, [str(c) for c in range(K)])


def data() -> TensorSamples:
    return drawn(N, 1)


def held_out() -> TensorSamples:
    return drawn(60, 9)


def images(*, augmented: bool) -> ImageSamples:
    pixels = np.random.default_rng(3).integers(0, 256, (N, 4, 4, 1), dtype=np.uint8)
    return ImageSamples(pixels, np.arange(N) % K, augmentation=Augmentation(crop=augmented, flip=augmented))


class Linear(nn.Linear):
    """A linear classifier that counts how many batches went through it and its copies."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Linear.calls += 1
        return super().forward(x.flatten(1))


def linear(n_in: int = D) -> Linear:
    torch.manual_seed(2)
    return Linear(n_in, K).double()


def configured(name: str, **settings: Any) -> unlearning.UnlearnConfig:
    return unlearning.configure(name, **{"batch_size": 8, "epochs": 4, "optimizer": PLAIN, **settings})


def unlearn(name: str, *, samples: Samples | None = None, model: nn.Module | None = None, **settings: Any) -> Any:
    run = {key: settings.pop(key) for key in ("workspace", "validation", "progress", "save_seconds") if key in settings}
    return unlearning.run(
        model or linear(), samples or data(), FORGOTTEN, RETAINED, configured(name, **settings), **run
    )


def problem(model: nn.Module, samples: Samples, **more: Any) -> Problem:
    return Problem(model=model, samples=samples, forget=FORGOTTEN, retain=RETAINED, rule=NO_RULE, **more)


# --- the divergence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_the_divergence_and_its_gradient_are_those_of_the_closed_form(temperature: float) -> None:
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=(2, 7, K)) * 5
    z = torch.from_numpy(student).requires_grad_()
    value = divergence(z, torch.from_numpy(teacher), temperature)
    p, q = softmax(teacher / temperature, axis=1), softmax(student / temperature, axis=1)
    assert value.item() == pytest.approx(temperature**2 * rel_entr(p, q).sum(1).mean(), rel=1e-12)
    (slope,) = torch.autograd.grad(value, z)
    np.testing.assert_allclose(slope, temperature * (q - p) / 7, rtol=1e-9, atol=1e-14)
    assert torch.autograd.gradcheck(lambda t: divergence(t, torch.from_numpy(teacher), temperature), z)


def test_the_divergence_is_taken_in_float32_at_least_and_stays_finite() -> None:
    student, teacher = torch.tensor([[300.0, -300.0, 0.0]]), torch.tensor([[-300.0, 300.0, 0.0]])
    assert divergence(student, teacher, 1.0).item() == pytest.approx(600)
    low = divergence(student.bfloat16(), teacher.bfloat16(), 1.0)
    assert low.dtype == torch.float32
    assert divergence(student.double(), teacher, 1.0).dtype == torch.float64


# --- what a teacher says ---------------------------------------------------------------------------------------------


def test_answers_once_for_all_are_those_on_the_batch() -> None:
    samples = images(augmented=False)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, K))
    model[2].running_mean = torch.linspace(-1, 1, 8)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    teacher = Teacher(model, samples, FORGOTTEN)
    assert teacher.forwards == 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    plain = copy.deepcopy(model).eval()
    for batch in Stream(samples, FORGOTTEN, 4, 0).epoch(0):
        torch.testing.assert_close(teacher.logits(batch), plain(batch.inputs).detach())


def test_where_images_are_augmented_it_looks_at_each_batch_once() -> None:
    samples = images(augmented=True)
    model = nn.Sequential(linear(16).float(), nn.BatchNorm1d(K), nn.Dropout(0.5))
    model[1].running_mean = torch.linspace(-1, 1, K)
    teacher = Teacher(model, samples, FORGOTTEN)
    assert teacher.forwards == 1
    (batch, other, *_) = Stream(samples, FORGOTTEN, 4, 0).epoch(0)
    expected = copy.deepcopy(model).eval()(batch.inputs).detach()
    with torch.no_grad():
        model[0].weight.add_(1)  # it is trained meanwhile
    Linear.calls = 0
    assert torch.equal(teacher.logits(batch), expected)
    assert torch.equal(teacher.logits(batch), expected)
    assert not torch.equal(teacher.logits(other), expected[: len(other.labels)])
    assert Linear.calls == 2
    assert not teacher.logits(batch).requires_grad


def test_too_many_answers_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "TABLE_BYTES", 4 * K * len(FORGOTTEN))
    assert Teacher(linear(), data(), FORGOTTEN).forwards == 0
    assert Teacher(linear(), data(), RETAINED).forwards == 1


def test_which_samples_look_the_same_in_every_epoch() -> None:
    drawing = from_torch_dataset(Noisy(), device="cpu")
    steady = from_torch_dataset(TensorDataset(torch.randn(4, 2), torch.arange(4) % 2), device="cpu")
    found = [looks_the_same(s) for s in (data(), images(augmented=False), images(augmented=True), drawing, steady)]
    assert found == [True, True, False, False, True]
    assert looks_the_same(images(augmented=True).subset([1, 2])) is False


class Noisy(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.randn(2), i % 2


def test_broken_weights_are_found_before_the_run() -> None:
    model = linear()
    with torch.no_grad():
        model.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match="original network"):
        METHODS["scrub"]().phases(problem(model, data()))


# --- SCRUB -----------------------------------------------------------------------------------------------------------


def batches(positions: np.ndarray, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    samples = data()
    for batch in Stream(samples, positions, 8, 0).epoch(epoch):
        yield samples.inputs.numpy()[batch.indices], samples.labels[batch.indices]


def by_hand(epochs: int, msteps: int, gamma: float, beta: float, t: float) -> tuple[np.ndarray, np.ndarray]:
    """SCRUB of the linear classifier: SGD with momentum and decay, gradients in closed form, one optimiser state."""
    start = linear()
    w0, b0 = start.weight.detach().numpy().copy(), start.bias.detach().numpy().copy()
    state = [[w0.copy(), np.zeros_like(w0)], [b0.copy(), np.zeros_like(b0)]]

    def step(x: np.ndarray, slope: np.ndarray) -> None:
        for entry, g in zip(state, (slope.T @ x / len(x), slope.mean(0))):
            entry[1] = 0.9 * entry[1] + g + 0.01 * entry[0]
            entry[0] = entry[0] - 0.1 * entry[1]

    def outputs(x: np.ndarray, at: float) -> tuple[np.ndarray, np.ndarray]:
        return softmax((x @ state[0][0].T + state[1][0]) / at, axis=1), softmax((x @ w0.T + b0) / at, axis=1)

    for epoch in range(epochs):
        for x, _ in batches(FORGOTTEN, epoch) if epoch < msteps else ():
            p, original = outputs(x, t)
            step(x, -t * (p - original))
        for x, y in batches(RETAINED, epoch):
            p, original = outputs(x, t)
            slope = beta * t * (p - original)
            step(x, slope + gamma * (outputs(x, 1.0)[0] - np.eye(K)[y]))
    return state[0][0], state[1][0]


@pytest.mark.parametrize(
    ("msteps", "gamma", "beta", "temperature"),
    [(2, 1.0, 0.5, 2.0), (9, 0.3, 0.0, 4.0), (1, 0.0, 2.0, 1.0), (0, 0.5, 0.5, 2.0)],
)
@pytest.mark.parametrize("tabulated", [True, False])
def test_scrub_is_the_plain_loop(
    msteps: int, gamma: float, beta: float, temperature: float, tabulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not tabulated:
        monkeypatch.setattr(teachers, "TABLE_BYTES", 0)
    found, record = unlearn("scrub", msteps=msteps, gamma=gamma, beta=beta, temperature=temperature)
    w, b = by_hand(4, msteps, gamma, beta, temperature)
    np.testing.assert_allclose(found.weight.detach(), w, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(found.bias.detach(), b, rtol=1e-9, atol=1e-11)
    assert np.abs(w - linear().weight.detach().numpy()).max() > 1e-3
    forget, retain = 2 * min(msteps, 4), 4 * 4  # batches that went forward and backward
    asked = forget + (retain if beta else 0)
    prepared = (1 if msteps else 0) + (2 if beta else 0)  # a third of 2, and of 4 batches
    assert record.passes == forget + retain + (prepared if tabulated else round(asked / 3))


def test_the_teacher_is_asked_once_a_batch_under_a_rule_that_evaluates_twice() -> None:
    samples = images(augmented=True)
    Linear.calls = 0
    _, record = unlearn("scrub", model=linear(16).float(), samples=samples, rule="sam", epochs=2, msteps=1)
    n_batches = 2 + 2 * 4
    assert Linear.calls == n_batches * (2 + 1)
    assert record.passes == 2 * n_batches + round(n_batches / 3)


def test_the_first_forget_step_finds_no_slope_where_nothing_is_random() -> None:
    """At the original network the divergence is at its minimum."""
    still = OptimizerConfig(lr=1.0, momentum=0.0, weight_decay=0.0)
    found = unlearn("scrub", epochs=1, gamma=0.0, beta=0.0, optimizer=still)[0]
    assert torch.allclose(found.weight, linear().weight, atol=1e-12)


def test_choices_of_scrub_that_cannot_be_are_refused() -> None:
    for settings, message in (
        ({"msteps": -1}, "msteps"),
        ({"gamma": -1.0}, "gamma"),
        ({"beta": np.nan}, "beta"),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(UserError, match=message):
            METHODS["scrub"](**settings)
    with pytest.raises(UserError, match="nothing to do"):
        unlearn("scrub", msteps=0, gamma=0.0, beta=0.0)


# --- rewinding -------------------------------------------------------------------------------------------------------

FAST = OptimizerConfig(lr=0.3, momentum=0.9, weight_decay=0.01)
STRONG = {"gamma": 0.3, "beta": 0.1, "temperature": 1.0, "msteps": 6, "epochs": 7, "optimizer": FAST}


def error(model: nn.Module, samples: TensorSamples, positions: np.ndarray) -> float:
    with torch.no_grad():
        guesses = model(samples.inputs[positions]).argmax(1).numpy()
    return 100 * float((guesses != samples.labels[positions]).mean())


def original() -> nn.Module:
    """A classifier that is right on most of the training samples."""
    model, samples = linear(), data()
    for _ in range(200):
        loss = nn.functional.cross_entropy(model(samples.inputs), torch.from_numpy(samples.labels))
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads):
                p -= 0.5 * g
    return model


def test_rewinding_ends_with_the_epoch_nearest_to_the_expected_error() -> None:
    unseen, start = held_out(), original()
    shorter = [unlearn("scrub", model=start, **(STRONG | {"epochs": e + 1}))[0] for e in range(7)]
    errors = [error(model, data(), FORGOTTEN) for model in shorter]
    # for every forget sample the error on the unseen samples of its class
    reference = np.mean([error(shorter[-1], unseen, np.flatnonzero(unseen.labels == c)) for c in labels_to_forget()])
    distances = [abs(e - reference) for e in errors]
    nearest = max(e for e in range(7) if distances[e] == min(distances))
    assert nearest < 6
    found, record = unlearn("scrub", model=start, rewind=True, validation=unseen, **STRONG)
    chosen = record.about["chosen"]
    assert chosen["forget_errors"] == pytest.approx(errors)
    assert chosen["reference_error"] == pytest.approx(reference)
    assert chosen["epoch"] == nearest + 1
    assert torch.equal(found.weight, shorter[nearest].weight)
    assert not torch.equal(found.weight, shorter[-1].weight)
    assert not found.training
    plain = unlearn("scrub", model=start, **STRONG)[1]
    assert record.passes == plain.passes + -(-(7 * 2 + -(-len(unseen) // 8)) // 3)
    assert len(record.history) == 7


@pytest.mark.parametrize("kept_with_the_run", [True, False])
def test_every_epoch_can_be_had_and_the_last_is_what_the_rule_ends_with(
    kept_with_the_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def choose(self: Any, problem: Problem, network: Any, epochs: int, batch_size: int) -> Choice:
        seen.extend(network(e).weight.detach().clone() for e in range(epochs))
        return Choice(epoch=2, passes=7, about={"why": "a test"})

    monkeypatch.setattr(METHODS["scrub"], "choose_epoch", choose)
    during: list[Tensor] = []
    how = {"validation": held_out(), "workspace": Workspace(tmp_path) if kept_with_the_run else None}
    found, record = unlearning.run(
        linear(),
        data(),
        FORGOTTEN,
        RETAINED,
        configured("scrub", rewind=True, rule="weight_averaging"),
        on_epoch=lambda model: during.append(model.weight.detach().clone()) or {},
        **how,
    )
    plain, before = unlearn("scrub", rule="weight_averaging")
    assert all(torch.equal(a, b) for a, b in zip(seen[:-1], during[:-1], strict=True))
    assert torch.equal(seen[-1], plain.weight)
    assert not torch.equal(seen[-1], during[-1])
    assert torch.equal(found.weight, during[2])
    assert record.passes == before.passes + 7
    assert record.about["chosen"] == {"epoch": 3, "why": "a test"}


def test_of_equally_near_epochs_the_last_is_taken() -> None:
    some = problem(original(), data(), validation=held_out())
    assert METHODS["scrub"](rewind=True).choose_epoch(some, lambda epoch: some.model, 5, 8).epoch == 4


def labels_to_forget() -> np.ndarray:
    return data().labels[FORGOTTEN]


def test_the_expected_error_is_that_of_a_sample_of_the_class_for_each_forget_sample() -> None:
    random = np.random.default_rng(0)
    labels, wrong = random.integers(0, 3, 50), random.integers(0, 2, 50)
    forget = random.integers(0, 3, 20)
    each = [np.mean([w for w, c in zip(wrong, labels) if c == own]) for own in forget]
    assert expected_error(wrong, labels, forget) == pytest.approx(100 * np.mean(each))


class Killed(Exception):
    pass


class Kill(Progress):
    """Ends the run after a share of what is left of it."""

    def __init__(self, share: float) -> None:
        self.share = share

    def start(self, label: str, total: int, done: int = 0) -> None:
        self.left = max(1, int(self.share * (total - done)))

    def advance(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed

    def finish(self) -> None:
        pass


METHODS_HERE = ("bad_teacher", "boundary_shrink", "l1_sparse", "random_label", "salun", "scrub", "rewind")


@pytest.mark.parametrize("name", METHODS_HERE)
@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
def test_a_killed_run_goes_on_to_the_same_bits(
    name: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if share == 0.6:
        monkeypatch.setattr(teachers, "TABLE_BYTES", 0)
    settings: dict[str, Any] = {"seed": 3}
    method = name
    if name == "rewind":
        method = "scrub"
        settings |= STRONG | {"rewind": True, "validation": held_out(), "model": original()}
    expected, record = unlearn(method, **copy.deepcopy(settings))
    work = {"workspace": Workspace(tmp_path), "save_seconds": 0.0}
    for stop in (share, 0.4):
        with pytest.raises(Killed):
            unlearn(method, **copy.deepcopy(settings), **work, progress=Kill(stop))
    found, resumed = unlearn(method, **settings, **work)
    assert all(torch.equal(t, expected.state_dict()[n]) for n, t in found.state_dict().items())
    assert resumed.passes == record.passes
    assert resumed.about == record.about
    untimed = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.history] for r in (record, resumed)]
    assert untimed[0] == untimed[1]


def test_an_epoch_cannot_be_chosen_without_unseen_samples_of_every_class_to_forget() -> None:
    with pytest.raises(UserError, match="--validation"):
        unlearn("scrub", rewind=True)
    wanted = labels_to_forget()
    some = held_out().subset(np.flatnonzero(held_out().labels != wanted[0]))
    with pytest.raises(UserError, match=f"class {wanted[0]}, which"):
        unlearn("scrub", rewind=True, validation=some)
    with pytest.raises(UserError, match="other classes"):
        unlearn("scrub", rewind=True, validation=TensorSamples(torch.randn(4, D), np.arange(4) % 2))


def test_only_a_run_that_does_not_rewind_passes_through_shorter_ones() -> None:
    assert METHODS["scrub"]().nested_epochs
    assert not METHODS["scrub"](rewind=True).nested_epochs


# --- bad teacher -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_bad_teacher_steps_towards_one_teacher_on_retain_and_the_other_on_forget(
    alpha: float | None, temperature: float
) -> None:
    single = OptimizerConfig(lr=0.7, momentum=0.0, weight_decay=0.0)
    start, samples = linear(), data()
    bad = untrained(start, 5)
    found, record = unlearn(
        "bad_teacher",
        **({} if alpha is None else {"alpha": alpha}),
        temperature=temperature,
        seed=5,
        epochs=2,
        batch_size=N,
        optimizer=single,
    )
    a = 0.75 if alpha is None else alpha
    w, b = start.weight.detach().numpy().copy(), start.bias.detach().numpy().copy()
    x = samples.inputs.numpy()

    def at(weight: Any, bias: Any, positions: np.ndarray) -> np.ndarray:
        return softmax((x[positions] @ np.asarray(weight).T + np.asarray(bias)) / temperature, axis=1)

    for _ in range(2):
        dw, db = np.zeros_like(w), np.zeros_like(b)
        for positions, weight, one in ((RETAINED, a, start), (FORGOTTEN, 1 - a, bad)):
            slope = at(w, b, positions) - at(one.weight.detach(), one.bias.detach(), positions)
            dw += weight * temperature * slope.T @ x[positions] / len(positions)
            db += weight * temperature * slope.mean(0)
        w, b = w - 0.7 * dw, b - 0.7 * db
    np.testing.assert_allclose(found.weight.detach(), w, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(found.bias.detach(), b, rtol=1e-9, atol=1e-11)
    assert np.abs(w - start.weight.detach().numpy()).max() > 1e-2
    assert record.passes == 2 * 2 + 2  # tables of one batch each


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.LayerNorm(27), nn.Linear(27, K)
    )


def test_an_untrained_network_is_drawn_as_a_fresh_one_of_its_kind() -> None:
    torch.manual_seed(0)
    trained = small()
    with torch.no_grad():
        for t in (*trained.parameters(), trained[1].running_mean, trained[1].running_var):
            t.add_(0.5)
    trained[5].requires_grad_(False)
    before, state = copy.deepcopy(trained.state_dict()), torch.get_rng_state()
    found = untrained(trained, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in trained.state_dict().items())
    start = np.random.SeedSequence(4, spawn_key=(0, 0, 2)).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(start))
    fresh = small().state_dict()
    assert all(torch.equal(t, fresh[name]) for name, t in found.state_dict().items())
    assert not torch.equal(untrained(trained, 5)[5].weight, found[5].weight)


def test_an_untrained_network_is_not_the_one_that_the_same_seed_started_with() -> None:
    torch.manual_seed(4)
    start = small()
    assert not torch.equal(untrained(start, 4)[5].weight, start[5].weight)


def test_attention_is_drawn_anew_too() -> None:
    attention = nn.MultiheadAttention(8, 2)
    found = untrained(attention, 0)
    assert not torch.equal(found.in_proj_weight, attention.in_proj_weight)
    assert not torch.equal(found.out_proj.weight, attention.out_proj.weight)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, K))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_a_network_that_cannot_be_drawn_anew_is_refused() -> None:
    with pytest.raises(UserError, match="Bare has reset_parameters"):
        METHODS["bad_teacher"]().phases(problem(Bare(), data()))
    (phase,) = METHODS["bad_teacher"](alpha=1.0).phases(problem(Bare().double(), data()))
    assert phase.objective.streams == (RETAIN,)


def test_streams_of_weight_0_are_not_read() -> None:
    def streams(**settings: Any) -> list[tuple[str, ...]]:
        name = settings.pop("name")
        return [p.objective.streams for p in METHODS[name](**settings).phases(problem(linear(), data()))]

    assert streams(name="bad_teacher") == [(RETAIN, FORGET)]
    assert streams(name="bad_teacher", alpha=0.0) == [(FORGET,)]
    assert streams(name="scrub") == [(FORGET,), (RETAIN,)]
    assert streams(name="scrub", msteps=0) == [(), (RETAIN,)]
    assert streams(name="scrub", gamma=0.0, beta=0.0) == [(FORGET,), ()]


def test_a_problem_whose_model_is_trained_in_place_keeps_its_teacher() -> None:
    model = linear(16).float()
    (forget, retain) = METHODS["scrub"]().phases(problem(model, images(augmented=True)))
    batch = next(Stream(images(augmented=True), FORGOTTEN, 8, 0).epoch(0))
    expected = value_of(forget.objective, model, {FORGET: batch})
    assert expected == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        model.weight.mul_(2)
    assert value_of(forget.objective, model, {FORGET: batch}) < -1e-6
    assert retain.turn > forget.turn


def value_of(objective: Any, model: nn.Module, given: Mapping[str, Any]) -> float:
    return sum(term.item() for _, term in objective.terms(model, given, Moment()))
