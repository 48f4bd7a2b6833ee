"""Proxies of memorization against loops by hand, closed forms and exact Hessians; interrupted, saved and read again."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from unsharp.artifacts import Workspace
from unsharp.config import to_dict
from unsharp.data.samples import TensorSamples
from unsharp.difficulty import ForgetConfig, choose, from_scores, load_scores
from unsharp.difficulty.kinds import kind_named, kind_names
from unsharp.difficulty.proxies import PROXIES, configure, estimate
from unsharp.difficulty.proxies.base import Task, mean_and_error
from unsharp.difficulty.proxies.dynamics import Dynamics
from unsharp.difficulty.proxies.loss_curvature import STEP, LossCurvature, _mixed, _mixed_number, _signed, signs
from unsharp.difficulty.proxies.networks import seed_of, true_class
from unsharp.difficulty.scores import read_scores
from unsharp.engine import OptimizerConfig
from unsharp.errors import NonFiniteError, UserError
from unsharp.evaluation import predict
from unsharp.progress import Progress
from unsharp.reference import Recipe
from unsharp.sharpness import RULES
from unsharp.training import TrainConfig, initial_model, train
from unsharp.tuning.target import chances

N, FEATURES, CLASSES, EPOCHS = 48, 5, 3, 10
CPU = torch.device("cpu")
SMALL = {
    "el2n": {"networks": 2},
    "grand": {"networks": 2},
    "loss_curvature": {"draws": 2, "every_epochs": 4},
    "held_out": {"folds": 4},
}
TRAINED = [name for name in PROXIES if PROXIES[name].needs != "model"]
GIVEN = [name for name in PROXIES if PROXIES[name].needs != "recipe"]


class Network(nn.Module):
    """BatchNorm, dropout, a tied weight and a frozen one, smooth."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 8)
        self.norm = nn.BatchNorm1d(8)
        self.inner = nn.Linear(8, 8, bias=False)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.inner.weight
        self.again.bias.requires_grad_(False)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.again(torch.tanh(self.inner(self.norm(self.first(x))))))
        return self.head(self.dropout(h))


def network(dtype: torch.dtype = torch.float64) -> Network:
    torch.manual_seed(3)
    model = Network().to(dtype)
    model.norm.running_mean += torch.randn(8).to(dtype)  # pyright: ignore[reportOperatorIssue]
    return model.train()


def samples(n: int = N, dtype: torch.dtype = torch.float32, flipped: int = 0, ids=None) -> TensorSamples:
    """Three clouds; the labels of the first few samples are wrong."""
    rng = np.random.default_rng(5)
    labels = np.arange(n) % CLASSES
    centres = 2.5 * rng.standard_normal((CLASSES, FEATURES))
    inputs = torch.from_numpy(centres[labels] + rng.standard_normal((n, FEATURES))).to(dtype)
    labels[:flipped] = (labels[:flipped] + 1) % CLASSES
    return TensorSamples(inputs, labels, ids=ids)


def recipe(epochs: int = EPOCHS, **changes) -> Recipe:
    made = {"epochs": epochs, "batch_size": 12, "optimizer": OptimizerConfig(lr=0.1), "seed": 2} | changes
    return Recipe(Network, TrainConfig(**made))


def task(**changes) -> Task:
    return Task(**({"samples": samples(), "recipe": recipe(), "device": CPU} | changes))


def watched_training(seed: int, epochs: int = EPOCHS, until: int | None = None, indices=None):
    """The logits of all samples after each epoch of a training of its own."""
    data, how = samples(), dataclasses.replace(recipe(epochs).train, seed=seed)
    model, seen, states = initial_model(Network, seed, CPU), [], []

    def look():
        seen.append(predict(model, data, np.arange(N)).logits.astype(np.float64))
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return {}

    train(model, data, np.arange(N) if indices is None else indices, how, on_epoch=look)
    return data.labels, np.stack(seen), states


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# --- what becomes of samples while a network learns ------------------------------------------------------------------


class Scripted(nn.Module):
    """Gives each sample the logits of a table, by the number that the sample is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.table[x[:, 0].long()]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9).flatmap(lambda t: st.lists(st.lists(st.booleans(), min_size=t, max_size=t), min_size=1)))
def test_events_are_counted_as_in_the_words_that_right_and_wrong_spell(histories):
    table = np.array(histories)  # (n, epochs)
    n, epochs = table.shape
    data = TensorSamples(torch.arange(n)[:, None].float(), np.zeros(n, np.int64), ("a", "b"))
    model = Scripted()
    watch = Dynamics(task(samples=data, batch_size=3), model)
    odds = np.random.default_rng(0).uniform(0.1, 3, (n, epochs))
    for epoch in range(epochs):
        sign = np.where(table[:, epoch], 1.0, -1.0) * odds[:, epoch]
        model.table = torch.from_numpy(np.stack([sign, -sign], 1))
        watch.after_epoch()
    found = watch.result()
    for i, history in enumerate(histories):
        word = "".join("1" if right else "0" for right in history)
        assert found["forgetting_events"][i] == (word.count("10") if "1" in word else epochs)
        assert found["learning_epoch"][i] == len(word.rstrip("1")) + 1
        mean = np.mean([1 / (1 + math.exp(-2 * s * o)) for s, o in zip(np.where(table[i], 1, -1), odds[i])])
        assert found["mean_confidence"][i] == pytest.approx(mean, abs=1e-12)


def test_never_right_is_harder_than_any_count():
    for epochs in range(1, 12):
        word = ("10" * epochs)[:epochs]
        assert word.count("10") < epochs


def test_forgetting_events_are_those_of_a_training_by_hand():
    labels, logits, _ = watched_training(2)
    right = logits.argmax(-1) == labels
    p = softmax(logits)[:, np.arange(N), labels]
    found = estimate("forgetting_events", samples(), recipe=recipe(), batch_size=7)
    words = ["".join("1" if r else "0" for r in right[:, i]) for i in range(N)]
    assert found.raw.tolist() == [w.count("10") if "1" in w else EPOCHS for w in words]
    assert found.extras["learning_epoch"].tolist() == [len(w.rstrip("1")) + 1 for w in words]
    assert np.allclose(found.extras["mean_confidence"], p.mean(0), rtol=0, atol=1e-7)
    assert len(set(found.raw)) > 1  # the numbers say something
    assert found.standard_error is None


def test_several_networks_are_averaged_and_the_first_is_the_recipes_own():
    each = []
    for number in range(3):
        labels, logits, _ = watched_training(seed_of(task(), number))
        each.append(softmax(logits)[:, np.arange(N), labels].mean(0))
    found = estimate("mean_confidence", samples(), recipe=recipe(), networks=3)
    assert np.allclose(found.raw, np.mean(each, 0), atol=1e-7)
    assert np.allclose(found.standard_error, scipy.stats.sem(each, axis=0), atol=1e-7)
    alone = estimate("mean_confidence", samples(), recipe=recipe())
    assert np.allclose(alone.raw, each[0], atol=1e-7)
    assert seed_of(task(), 0) == 2
    assert len({seed_of(task(recipe=recipe(seed=s)), k) for s in range(4) for k in range(5)}) == 20


def test_mean_and_error_are_those_of_scipy():
    values = np.random.default_rng(0).standard_normal((4, 9))
    mean, error = mean_and_error(values)
    assert np.allclose(mean, values.mean(0))
    assert np.allclose(error, scipy.stats.sem(values, axis=0))
    assert mean_and_error(values[:1])[1] is None


# --- one network as it stands ----------------------------------------------------------------------------------------


def test_final_confidence_keeps_what_a_probability_near_one_would_lose():
    data, model = samples(dtype=torch.float64), network()
    found = estimate("final_confidence", data, model=model, batch_size=7)
    p = softmax(model.eval()(data.inputs).detach().numpy())[np.arange(N), data.labels]
    assert np.allclose(found.raw, 1 - p, rtol=1e-12, atol=0)
    one = TensorSamples(torch.zeros(2, 1), [0, 0], ("a", "b"))
    sure = Scripted()
    sure.table = torch.tensor([[90.0, 0.0]], dtype=torch.float64)
    _, p, rest = true_class(sure, task(samples=one))
    assert p.tolist() == [1.0, 1.0]
    assert rest.tolist() == pytest.approx([math.exp(-90)] * 2, rel=1e-9)


def test_el2n_is_the_length_of_the_error_vector():
    data, model = samples(dtype=torch.float64), network()
    found = estimate("el2n", data, model=model, batch_size=7)
    p = softmax(model.eval()(data.inputs).detach().numpy())
    expected = [math.sqrt(sum((p[i, c] - (c == data.labels[i])) ** 2 for c in range(CLASSES))) for i in range(N)]
    assert np.allclose(found.raw, expected, rtol=1e-12)
    assert found.raw.max() <= math.sqrt(2)


def test_el2n_of_training_is_taken_early_on_the_schedule_of_the_whole_and_averaged():
    each = []
    for number in range(2):
        labels, logits, _ = watched_training(seed_of(task(), number))  # 10 epochs of cosine
        each.append(np.linalg.norm(softmax(logits[2]) - np.eye(CLASSES)[labels], axis=1))  # after the third
    found = estimate("el2n", samples(), recipe=recipe(), networks=2, early=0.3)
    assert np.allclose(found.raw, np.mean(each, 0), atol=1e-6)
    assert np.allclose(found.standard_error, np.abs(each[0] - each[1]) / 2, atol=1e-6)


def test_grand_is_the_length_of_each_samples_gradient():
    data, model = samples(dtype=torch.float64), network()
    found = estimate("grand", data, model=model, batch_size=7)
    model.eval()  # for the loop by hand; dropout off, BatchNorm at its running statistics
    expected = []
    for i in range(N):
        model.zero_grad()
        nn.functional.cross_entropy(model(data.inputs[i : i + 1]), torch.tensor([data.labels[i]])).backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
        expected.append(torch.cat(grads).norm().item())
    assert np.allclose(found.raw, expected, rtol=1e-9)


def test_grand_of_training_sees_the_network_after_the_early_epoch():
    data, (_, _, states) = samples(), watched_training(2)
    model = initial_model(Network, 2, CPU)
    model.load_state_dict(states[4])
    by_model = estimate("grand", data, model=model)
    by_training = estimate("grand", data, recipe=recipe(), networks=1, early=0.5)
    assert np.allclose(by_model.raw, by_training.raw, rtol=1e-5)


def test_measuring_leaves_the_network_as_it_was():
    for name in GIVEN:
        model = network(torch.float32)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        options = {k: v for k, v in SMALL.get(name, {}).items() if k == "draws"}
        estimate(name, samples(), model=model, held_out=samples(20), **options)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), name
        assert all(m.training for m in model.modules()), name
        assert all(p.grad is None for p in model.parameters()), name


# --- tuned on others -------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A linear network: what tuning makes of it is written down in a few lines."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def tuned_by_hand(model: Plain, held_out: TensorSamples, epochs: int, lr: float) -> Plain:
    """One full batch an epoch: gradient descent with momentum 0.9 and decay 5e-4, its rate falling along a cosine."""
    (batch,) = held_out.batches(np.arange(len(held_out)), [len(held_out)], draws=None)
    made = copy.deepcopy(model)
    moved = {name: torch.zeros_like(p) for name, p in made.named_parameters()}
    for epoch in range(epochs):
        made.zero_grad()
        nn.functional.cross_entropy(made(batch.inputs), batch.labels).backward()
        with torch.no_grad():
            for name, p in made.named_parameters():
                assert p.grad is not None
                moved[name] = 0.9 * moved[name] + p.grad + 5e-4 * p
                p -= lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs)) * moved[name]
    return made


def test_holdout_retraining_is_the_symmetric_divergence_between_before_and_after():
    torch.manual_seed(0)
    model, data = Plain(), samples()
    held_out = samples(n=60, flipped=20)
    held_out = TensorSamples(held_out.inputs[:16], held_out.labels[:16])
    found = estimate("holdout_retraining", data, model=model, held_out=held_out, tuning_passes=2.0, tuning_lr=0.1)
    after = tuned_by_hand(model, held_out, epochs=6, lr=0.1)  # twice 48 samples are six times 16
    with torch.no_grad():
        p, q = (softmax(net(data.inputs).double().numpy()) for net in (model, after))
    expected = scipy.stats.entropy(p, q, axis=1) + scipy.stats.entropy(q, p, axis=1)
    assert expected.max() > 10 * expected.min()
    assert np.allclose(found.raw, expected, rtol=1e-3, atol=1e-6)
    assert found.provenance["passes"] == 6 + 1  # a batch each, and two passes forward over one batch of evaluation


def test_tuning_on_others_moves_what_was_learnt_by_heart():
    """Only what was learnt by heart: a label that the network never took up does not move either."""
    data, more = samples(n=90, flipped=9), samples(n=290)
    unseen = TensorSamples(more.inputs[90:], more.labels[90:])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    how = TrainConfig(epochs=400, batch_size=30, optimizer=OptimizerConfig(name="adam", lr=0.02, weight_decay=0))
    train(model, data, np.arange(90), how)
    assert (predict(model, data, np.arange(90)).logits.argmax(1) == data.labels).all()
    found = estimate("holdout_retraining", data, model=model, held_out=unseen, tuning_passes=20.0, tuning_lr=0.03)
    assert roc_auc_score(np.arange(90) < 9, found.difficulty) > 0.8


def test_tuning_that_was_killed_goes_on_to_the_same_bits(tmp_path):
    model, data, held_out = network(torch.float32), samples(), samples(20)
    options = {"model": model, "held_out": held_out, "tuning_passes": 5.0}  # twelve steps
    whole = estimate("holdout_retraining", data, **options)
    place = Workspace(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        estimate("holdout_retraining", data, workspace=place, save_seconds=0, progress=Interrupt(7), **options)
    counted = Interrupt(10**9)
    again = estimate("holdout_retraining", data, workspace=place, save_seconds=0, progress=counted, **options)
    assert np.array_equal(again.raw, whole.raw)
    assert 10**9 - counted.left == 12 - 6


# --- curvature -------------------------------------------------------------------------------------------------------


def hessians(model: nn.Module, data: TensorSamples) -> list[Tensor]:
    model.eval()

    def loss(x: Tensor, label: int) -> Tensor:
        return nn.functional.cross_entropy(model(x[None]), torch.tensor([label]))

    return [
        torch.autograd.functional.hessian(lambda x, i=i: loss(x, int(data.labels[i])), data.inputs[i])  # pyright: ignore
        for i in range(len(data))
    ]


@pytest.mark.parametrize("statistic", ["squared", "norm"])
def test_curvature_is_the_exact_hessian_along_the_drawn_directions(statistic):
    data, model = samples(n=12, dtype=torch.float64), network()
    found = estimate("loss_curvature", data, model=model, draws=3, step=1e-5, statistic=statistic, batch_size=5)
    rows = torch.arange(12)
    v = torch.stack([signs(rows, data.inputs, 0, 0, draw) for draw in range(3)])  # (draws, n, d)
    along = torch.einsum("nij,knj->kni", torch.stack(hessians(model, data)), v).norm(dim=-1)
    expected = (along**2 if statistic == "squared" else along).mean(0)
    assert np.allclose(found.raw, expected, rtol=1e-3)


def test_curvature_tends_to_the_trace_of_the_squared_hessian():
    data, model = samples(n=12, dtype=torch.float64), network()
    found = estimate("loss_curvature", data, model=model, draws=1500, step=1e-5)
    exact = torch.stack([(h @ h).trace() for h in hessians(model, data)]).numpy()
    v = 2.0 * np.random.default_rng(0).integers(0, 2, (4000, FEATURES)) - 1
    spread = np.array([np.square(v @ h.numpy()).sum(1).std() for h in hessians(model, data)]) / math.sqrt(1500)
    assert (np.abs(found.raw - exact) < 4.5 * spread + 1e-3 * exact).all()


def test_curvature_is_averaged_over_the_epochs_that_are_measured():
    assert list(LossCurvature(every_epochs=4).moments(10)) == [10, 6, 2]
    assert list(LossCurvature().moments(3)) == [3, 2, 1]
    data, (_, _, states) = samples(), watched_training(2)
    proxy, parts = configure("loss_curvature", draws=2, every_epochs=4), []
    model = initial_model(Network, 2, CPU)
    for epoch in (2, 6, 10):
        model.load_state_dict(states[epoch - 1])
        parts.append(proxy.score(model, task(), epoch).numpy())  # pyright: ignore[reportAttributeAccessIssue]
    found = estimate(proxy, data, recipe=recipe())
    assert np.allclose(found.raw, np.mean(parts, 0), rtol=1e-5)


def test_directions_do_not_depend_on_batches_or_slices():
    data, model = samples(), network(torch.float32)
    whole = estimate("loss_curvature", data, model=model, draws=2)
    for size in (1, 5):
        other = estimate("loss_curvature", data, model=model, draws=2, batch_size=size)
        assert np.allclose(whole.raw, other.raw, rtol=2e-2, atol=1e-6)  # sums in another order, times 1/h²
    like = torch.zeros(N, 4, 3)
    rows = torch.arange(N)
    assert torch.equal(signs(rows, like, 1, 2, 3)[[7, 30]], signs(rows[[7, 30]], like[:2], 1, 2, 3))


def test_signs_are_fair_and_differ_by_seed_epoch_draw_and_sample():
    like = torch.zeros(64, 16, 16)
    rows = torch.arange(64)
    drawn = torch.stack([signs(rows, like, *at) for at in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))])
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    n = 64 * 256
    assert abs(float(drawn.mean())) < 4 / math.sqrt(4 * n)
    for a in range(4):
        for b in range(a):
            assert abs(float((drawn[a] * drawn[b]).mean())) < 4 / math.sqrt(n)
    flat = drawn[0].flatten(1)
    products = (flat @ flat.T / 256).fill_diagonal_(0)
    assert float(products.abs().max()) < 5.5 / 16  # 2,016 pairs of samples
    neighbours = (flat @ flat.T.roll(1, 1)).diagonal().mean() / 256
    assert abs(float(neighbours)) < 4 / math.sqrt(n)
    columns = (flat.T @ flat / 64).fill_diagonal_(0)
    assert float(columns.abs().max()) < 6.5 / 8  # 32,640 pairs of pixels


def test_the_scattering_is_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [_mixed_number(1234567 + k * STEP) for k in range(1, 5)] == published
    counters = torch.tensor([_signed(1234567 + k * STEP) for k in range(1, 5)])
    assert [x % 2**64 for x in _mixed(counters).tolist()] == published


# --- held out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["probability", "correct"])
def test_held_out_scores_are_those_of_networks_that_have_not_seen_the_sample(outcome):
    data = samples()
    found = estimate("held_out", data, recipe=recipe(3), folds=4, repeats=2, outcome=outcome)
    proxy = configure("held_out", folds=4, repeats=2, outcome=outcome)
    expected = np.full((2, N), np.nan)
    for repeat in range(2):
        parts = proxy.parts(task(), repeat)  # pyright: ignore[reportAttributeAccessIssue]
        assert sorted(np.concatenate(parts).tolist()) == list(range(N))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        for fold, part in enumerate(parts):
            seen = np.array([i for i in range(N) if i not in set(part.tolist())])
            seed = seed_of(task(), repeat * 4 + fold)
            labels, logits, _ = watched_training(seed, epochs=3, indices=seen)
            p = softmax(logits[-1])
            right = p.argmax(1) == labels
            expected[repeat, part] = (p[np.arange(N), labels] if outcome == "probability" else right)[part]
    assert np.allclose(found.raw, expected.mean(0), atol=1e-6)
    assert np.allclose(found.standard_error, np.abs(expected[0] - expected[1]) / 2, atol=1e-6)
    assert not np.array_equal(*(np.concatenate(proxy.parts(task(), r)) for r in (0, 1)))  # pyright: ignore


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PROXIES if name != "holdout_retraining"])
def test_wrong_labels_come_out_as_hard(name):
    """Whatever a proxy measures, samples whose label is wrong must tend to be hard by it."""
    data = samples(n=90, flipped=9)
    how = recipe(12, optimizer=OptimizerConfig(lr=0.05))
    if PROXIES[name].needs == "model":
        model = how.start(CPU)
        train(model, data, np.arange(90), how.train)
        found = estimate(name, data, model=model)
    else:
        options = {"networks": 3} if hasattr(PROXIES[name], "networks") else {"folds": 3}
        options |= {"early": 0.5} if hasattr(PROXIES[name], "early") else {}
        options |= {"draws": 3, "every_epochs": 3, "networks": 1} if name == "loss_curvature" else {}
        found = estimate(name, data, recipe=how, **options)
    # Around a sample that is wrong for sure the loss is nearly a plane: curvature sees those that are being fitted.
    least = 0.65 if name == "loss_curvature" else 0.8
    assert roc_auc_score(np.arange(90) < 9, found.difficulty) > least


@pytest.mark.parametrize("name", TRAINED)
def test_the_cost_that_is_declared_is_the_cost_that_is_paid(name):
    proxy = configure(name, **SMALL.get(name, {}))
    for rule in ("none", "sam"):
        how = recipe(6, rule=RULES[rule]())
        found = estimate(proxy, samples(), recipe=how)
        cost = proxy.cost(how.train)
        assert found.provenance["networks"] == cost.networks
        n_batches = N / how.train.batch_size
        assert found.provenance["passes"] == pytest.approx(n_batches * cost.passes, abs=cost.networks)
    for model_name in GIVEN:
        given = configure(model_name)
        assert given.cost(None).networks == 0
        assert given.cost(None).passes > 0


class Interrupt(Progress):
    """Breaks off after so many steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, n: int = 1, note: str = "") -> None:
        self.left -= n
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", TRAINED)
def test_an_interrupted_estimate_goes_on_to_the_same_bits(name, tmp_path):
    options = {k: v for k, v in SMALL.get(name, {}).items() if k in ("draws", "every_epochs")}
    options |= {"networks": 2} if hasattr(PROXIES[name], "networks") else {"folds": 2}
    options |= {"early": 0.5} if hasattr(PROXIES[name], "early") else {}
    data, how = samples(), recipe(6)
    whole = estimate(name, data, recipe=how, **options)
    steps = 4 * 6 if name != "held_out" else 2 * 6
    steps = 4 * 3 if "early" in options else steps
    for where in (2, steps // 2, steps + 3):  # in the first epoch, in the middle, in the second network
        place = Workspace(tmp_path / f"{name}-{where}")
        place.path.mkdir()
        with pytest.raises(KeyboardInterrupt):
            estimate(name, data, recipe=how, workspace=place, save_seconds=0, progress=Interrupt(where), **options)
        counted = Interrupt(10**9)
        again = estimate(name, data, recipe=how, workspace=place, save_seconds=0, progress=counted, **options)
        assert np.array_equal(again.raw, whole.raw)
        assert all(np.array_equal(again.extras[k], whole.extras[k]) for k in whole.extras)
        assert again.provenance["passes"] == whole.provenance["passes"]
        assert 10**9 - counted.left <= 2 * steps - where + 1  # it did not begin anew
        assert all(p.name.startswith(".") for p in place.path.iterdir())


def test_every_proxy_says_what_it_is():
    for name in PROXIES:
        cls = PROXIES[name]
        assert cls.title, name
        assert cls.source, name
        assert cls.formula, name
        assert cls.needs in ("model", "recipe", "either"), name
        kind = kind_named(name)
        assert (kind.higher_is_harder, kind.unit_scale) == (cls.higher_is_harder, cls.unit_scale)
        assert to_dict(cls())["name"] == name
        assert kind_names()[:2] == ["memorization", "cscore"]
        assert name in kind_names()


# --- results ---------------------------------------------------------------------------------------------------------


IDS = np.array([f"im{i:03d}" for i in np.random.default_rng(1).permutation(N)])


@pytest.mark.parametrize("suffix", [".npz", ".csv", ".parquet"])
@pytest.mark.parametrize("ids", [None, IDS])
def test_scores_that_were_written_are_read_without_being_told_what_they_are(suffix, ids, tmp_path):
    data = samples(ids=ids)
    found = estimate("mean_confidence", data, recipe=recipe(3), networks=2)  # lower is harder
    path = tmp_path / f"s{suffix}"
    found.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert np.array_equal(load_scores(str(path), data), -found.raw)
    assert np.array_equal(found.difficulty, -found.raw)
    read = read_scores(str(path), data)
    assert (read.kind, read.direction) == ("mean_confidence", "lower is harder")
    assert np.allclose(read.standard_error, found.standard_error, rtol=1e-12)
    part = data.subset([7, 2, 40])
    assert np.array_equal(load_scores(str(path), part), -found.raw[[7, 2, 40]])
    events = read_scores(f"{path}:forgetting_events", part)
    assert events.kind == "forgetting_events"
    assert np.array_equal(events.difficulty, found.extras["forgetting_events"][[7, 2, 40]])
    assert events.standard_error is None
    with pytest.raises(UserError, match="'mean_confidence', not 'cscore'"):
        load_scores(str(path), data, kind="cscore")
    if suffix == ".npz":
        assert read.provenance["proxy"]["networks"] == 2
        with np.load(path, allow_pickle=False) as arrays:
            assert str(arrays["kind"]) == "mean_confidence"
            assert json.loads(str(arrays["provenance"]))["train"]["epochs"] == 3


def test_scores_of_other_labels_are_refused(tmp_path):
    data = samples()
    path = tmp_path / "s.npz"
    estimate("final_confidence", data, model=network(torch.float32)).save(path)
    changed = data.labels.copy()
    changed[5] = (changed[5] + 1) % CLASSES
    with pytest.raises(UserError, match=r"labels of 1 of 48 samples .*sample 5"):
        load_scores(str(path), TensorSamples(data.inputs, changed))


def test_the_directory_of_a_run_is_a_score_file(tmp_path):
    data = samples()
    found = estimate("el2n", data, model=network(torch.float32))
    with pytest.raises(UserError, match=r"holds no scores\.npz"):
        load_scores(str(tmp_path), data)
    found.save(tmp_path / "scores.npz")
    assert np.array_equal(load_scores(str(tmp_path), data), found.raw)
    assert np.array_equal(load_scores(f"{tmp_path}:el2n", data), found.raw)
    odd = tmp_path / "run.npz"  # a directory that ends like a file
    odd.mkdir()
    found.save(odd / "scores.npz")
    assert np.array_equal(load_scores(str(odd), data), found.raw)
    chosen = choose(ForgetConfig(scores=str(tmp_path), level="high", n=5), data)
    assert chosen.indices.tolist() == sorted(np.argsort(-found.raw)[:5].tolist())
    assert "EL2N score" in chosen.rule


def test_the_layout_of_a_memorization_run_is_read(tmp_path):
    data = samples(ids=IDS)
    values = np.random.default_rng(0).uniform(-0.1, 1, N)
    order = np.random.default_rng(1).permutation(N)
    np.savez(
        tmp_path / "scores.npz",
        memorization=values[order],
        memorization_id=IDS[order],
        standard_error=0.1 + values[order],
        inside=np.ones(N),
        labels=data.labels[order],
        kind=np.array("memorization"),
    )
    read = read_scores(str(tmp_path), data)
    assert read.kind == "memorization"
    assert np.array_equal(read.raw, values)
    assert np.allclose(read.standard_error, 0.1 + values)


def test_the_middle_of_scores_that_are_no_probabilities_is_the_median():
    data = samples()
    events = estimate("learning_epoch", data, recipe=recipe(4))
    for level in ("mid", "mix"):
        with pytest.raises(UserError, match="no probabilities; take mid='median'"):
            from_scores(events, data, level=level, n=6)
    chosen = from_scores(events, data, level="mid", n=6, mid="median")
    distance = np.abs(events.raw - np.median(events.raw))
    assert distance[chosen.indices].max() <= np.delete(distance, chosen.indices).min()
    assert from_scores(events, data, level="high", n=6).rule.endswith("learning epoch")
    confident = estimate("mean_confidence", data, recipe=recipe(4))  # a probability, and low is hard
    near = np.abs(confident.raw - 0.5)
    chosen = from_scores(confident, data, level="mid", n=6)
    assert near[chosen.indices].max() <= np.delete(near, chosen.indices).min()
    hardest = from_scores(confident, data, level="high", n=6)
    assert confident.raw[hardest.indices].max() <= np.delete(confident.raw, hardest.indices).min()
    with pytest.raises(UserError, match="just these"):
        from_scores(confident, data.subset(range(20)), level="high", n=6)


def test_tuning_can_aim_at_held_out_scores_alone_among_proxies():
    chance = np.random.default_rng(0).random(9)
    assert np.allclose(chances(-chance, "held_out"), chance)
    for name in set(PROXIES) - {"held_out"}:
        with pytest.raises(UserError, match=f"these are {PROXIES[name].title}s"):
            chances(chance, name)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grend", {}, "did you mean 'grand'"),
        ("el2n", {"network": 3}, "did you mean 'networks'"),
        ("final_confidence", {"networks": 3}, "takes no parameter"),
        ("el2n", {"networks": 0}, "networks must be at least 1"),
        ("el2n", {"early": 0.0}, r"early must be a fraction of the epochs in \(0, 1\]"),
        ("grand", {"early": math.nan}, "early"),
        ("held_out", {"folds": 1}, "folds must be at least 2"),
        ("held_out", {"folds": N + 1}, "there are 48 samples"),
        ("held_out", {"repeats": 0}, "repeats"),
        ("held_out", {"outcome": "corect"}, "did you mean 'correct'"),
        ("holdout_retraining", {"tuning_passes": 0.0}, "tuning_passes"),
        ("holdout_retraining", {"tuning_lr": math.inf}, "tuning_lr"),
        ("loss_curvature", {"draws": 0}, "draws"),
        ("loss_curvature", {"every_epochs": 0}, "every_epochs"),
        ("loss_curvature", {"step": 0.0}, "step"),
        ("loss_curvature", {"statistic": "sqared"}, "did you mean 'squared'"),
    ],
)
def test_mistakes_are_refused_before_any_work(name, options, message):
    with pytest.raises(UserError, match=message):
        estimate(name, samples(), recipe=recipe(10**6), **options)


def test_each_proxy_takes_what_it_needs():
    model = network(torch.float32)
    with pytest.raises(UserError, match="give model, and no recipe"):
        estimate("final_confidence", samples(), recipe=recipe())
    with pytest.raises(UserError, match="give test samples"):
        estimate("holdout_retraining", samples(), model=model)
    with pytest.raises(UserError, match="give recipe, and no model"):
        estimate("held_out", samples(), model=model)
    for given_both in ({}, {"recipe": recipe(), "model": model}):
        with pytest.raises(UserError, match="just one of recipe, model"):
            estimate("el2n", samples(), **given_both)
    with pytest.raises(UserError, match="batch_size"):
        estimate("el2n", samples(), model=model, batch_size=0)
    with pytest.raises(UserError, match="with the name"):
        estimate(configure("el2n"), samples(), model=model, networks=2)


def test_inputs_that_are_no_real_numbers_have_no_curvature():
    tokens = TensorSamples(torch.zeros(6, 4, dtype=torch.int64), np.arange(6) % 2)
    with pytest.raises(UserError, match="real numbers"):
        estimate("loss_curvature", tokens, model=network())


@pytest.mark.parametrize("name", GIVEN)
def test_a_broken_network_is_no_score(name):
    model = network(torch.float32)
    with torch.no_grad():
        model.head.bias[0] = math.nan
    with pytest.raises(NonFiniteError):
        estimate(name, samples(), model=model, held_out=samples(20))
