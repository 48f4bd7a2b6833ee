"""Each selection against dense matrices, loops and sorts; what holds for every one of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import weight_problems as problems
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from unsharp import masks, unlearning
from unsharp.data.samples import TensorSamples
from unsharp.errors import NonFiniteError, UserError
from unsharp.evaluation.curvature import CurvatureMatrix, diagonal
from unsharp.evaluation.mean_loss import MeanLoss
from unsharp.masks import Basis, Choice

SELECTIONS = list(masks.SELECTIONS)
RANKING = [name for name in SELECTIONS if masks.SELECTIONS[name].ranks]
READING = [name for name in SELECTIONS if masks.SELECTIONS[name].reads]
FORGET = np.array([2, 3, 11, 17])
TRAINING = np.arange(20)  # the last three samples are not of the training set


def basis(model: nn.Module | None = None, samples: TensorSamples | None = None, **more) -> Basis:
    return Basis(
        model=problems.with_all() if model is None else model,
        samples=problems.images() if samples is None else samples,
        forget=FORGET,
        training=TRAINING,
        batch_size=6,
        **more,
    )


def scores(name: str, on: Basis, **choice) -> dict[str, Tensor]:
    how = Choice(select=name, **choice)
    selection = how.selection
    assert isinstance(selection, masks.ScoredSelection)
    return selection.scores(on, how.positions(np.asarray(on.forget), np.asarray(on.training)), how)


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([v.flatten() for v in values.values()])


# --- independent forms -----------------------------------------------------------------------------------------------


class Flat:
    """A network as a function of one vector of its trainable weights."""

    def __init__(self, model: nn.Module, samples: TensorSamples, indices: np.ndarray) -> None:
        self.model = model.eval()
        self.named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        self.inputs, self.labels = samples.inputs[indices], torch.from_numpy(samples.labels[indices])
        self.at = torch.cat([p.flatten() for p in self.named.values()])

    def logits(self, vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in self.named.values()])
        weights = {n: part.view(p.shape) for (n, p), part in zip(self.named.items(), parts)}
        if hasattr(self.model, "two"):  # the tied matrix has two names
            weights["two.weight"] = weights["one.weight"]
        return functional_call(self.model, weights, (self.inputs,), tie_weights=False)

    def losses(self, vector: Tensor) -> Tensor:
        logits = self.logits(vector)
        return logits.logsumexp(1) - logits[torch.arange(len(logits)), self.labels]

    def hessian(self) -> Tensor:
        return jacrev(jacrev(lambda v: self.losses(v).mean()))(self.at)

    def ggn(self) -> Tensor:
        jacobian, p = jacrev(self.logits)(self.at), self.logits(self.at).softmax(1)
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return torch.einsum("nkp,nkl,nlq->pq", jacobian, inner, jacobian) / len(p)

    def fisher(self) -> Tensor:
        return (jacrev(self.losses)(self.at) ** 2).mean(0)


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_the_diagonal_is_that_of_the_dense_matrix_within_its_standard_error(matrix: str) -> None:
    model, samples = problems.with_all(), problems.images()
    exact = getattr(Flat(problems.with_all(), samples, TRAINING), matrix)()
    around = MeanLoss(model, samples, TRAINING, batch_size=10)
    found = diagonal(CurvatureMatrix(around, matrix), 300, seed=4)
    error = found.values - exact.diagonal()
    assert found.standard_error is not None
    assert found.products == around.passes["products"] == 300
    # the variance of an entry is the sum of the squares beside it in its row
    spread = ((exact**2).sum(1) - exact.diagonal() ** 2).sqrt()
    torch.testing.assert_close(found.standard_error * 300**0.5, spread, rtol=0.25, atol=1e-10)
    reached = spread > 1e-10
    z = error[reached] / found.standard_error[reached]
    assert z.abs().max() < 5
    assert 0.7 < float((z**2).mean().sqrt()) < 1.4
    assert error[~reached].abs().max() < 1e-12  # the unused weights
    few = diagonal(CurvatureMatrix(around, matrix), 12, seed=5).values - exact.diagonal()
    assert 3 < float(few.norm() / error.norm()) < 8  # 1/√draws: 5
    assert diagonal(CurvatureMatrix(around, matrix), 1).standard_error is None


def test_a_diagonal_quadratic_comes_out_exact_with_one_draw() -> None:
    d = np.array([3.0, -2.0, 0.5, 0.0, 7.0])
    model = problems.Quadratic(np.diag(d), np.ones(5), np.arange(5.0))
    around = MeanLoss(model, problems.ones(), np.arange(7), loss=problems.first_logit)
    np.testing.assert_allclose(diagonal(CurvatureMatrix(around), 1, seed=2).values.numpy(), d, atol=1e-12)


def test_many_draws_go_through_in_parts_that_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = CurvatureMatrix(MeanLoss(problems.mlp(), problems.images(), TRAINING))
    whole = diagonal(matrix, 7).values
    monkeypatch.setattr("unsharp.evaluation.curvature.AT_ONCE_BYTES", 3 * 8 * len(matrix))
    torch.testing.assert_close(diagonal(matrix, 7).values, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["hessian", "hessian_abs", "ggn"])
def test_curvature_scores_converge_to_the_diagonal(name: str) -> None:
    matrix = getattr(Flat(problems.with_all(), problems.images(), TRAINING), name.removesuffix("_abs"))()
    exact = matrix.diagonal()
    found = scores(name, basis(), n_probes=100, seed=3)
    expected = exact.abs() if name == "hessian_abs" else exact
    spread = ((matrix**2).sum() - (exact**2).sum()).div(100).sqrt()
    assert float((flat(found) - expected).norm()) < 1.5 * float(spread)
    assert float(expected.norm()) > 2 * float(spread)
    assert "two.weight" not in found
    assert "head.bias" not in found


@pytest.mark.parametrize("on", ["forget", "training"])
def test_fisher_is_the_mean_square_of_single_gradients(on: str) -> None:
    indices = {"forget": FORGET, "training": TRAINING}[on]
    exact = Flat(problems.with_all(), problems.images(), indices).fisher()
    torch.testing.assert_close(flat(scores("fisher", basis(), score_on=on)), exact, rtol=1e-8, atol=1e-14)

    def loss(model: nn.Module, batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch.inputs), batch.labels, reduction="sum")

    torch.testing.assert_close(flat(scores("fisher", basis(loss=loss), score_on=on)), exact, rtol=1e-8, atol=1e-14)


def test_magnitude_is_the_weights() -> None:
    model = problems.with_all()
    mask = masks.make_mask(basis(model), Choice(select="magnitude", fraction=0.3))
    weights = flat({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    chosen = set(torch.nonzero(flat(mask)).flatten().tolist())
    order = sorted(range(len(weights)), key=lambda i: (-abs(float(weights[i])), i))
    assert chosen == set(order[: round(0.3 * len(weights))])


def test_the_last_layer_is_marked_whole_even_where_its_matrix_has_another_name() -> None:
    mask = masks.make_mask(basis(), Choice(select="last_layer", fraction=0.01))
    assert [n for n, m in mask.items() if m.any()] == ["head.weight"]  # its bias is frozen
    assert mask["head.weight"].all()
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    mask = masks.make_mask(basis(tied), Choice(select="last_layer"))
    assert {n: bool(m.all()) for n, m in mask.items()} == {"0.weight": True, "2.bias": True}


def test_the_sharpest_come_first_and_negative_curvature_last() -> None:
    """L = ½Σdᵢwᵢ², so that the diagonal is d; two logits whose softmax is replaced by a plain sum."""
    d = torch.tensor([3.0, -2.0, 0.5, 0.0, 7.0, -9.0], dtype=torch.float64)
    model = problems.Quadratic(np.diag(d.numpy()), np.zeros(6), np.ones(6))

    def around(model, samples, indices, *, batch_size):
        return MeanLoss(model, samples, indices, loss=problems.first_logit, batch_size=batch_size)

    on = Basis(model=model, samples=problems.ones(), forget=[0], training=np.arange(7), mean_loss=around)
    expected = {"hessian": [[4], [0, 4], [0, 2, 4], [0, 2, 3, 4], [0, 1, 2, 3, 4]],
                "hessian_abs": [[5], [4, 5], [0, 4, 5], [0, 1, 4, 5], [0, 1, 2, 4, 5]]}  # fmt: skip
    for name, places in expected.items():
        for k, place in enumerate(places, 1):
            mask = masks.make_mask(on, Choice(select=name, fraction=k / 6, n_probes=1))
            assert torch.nonzero(mask["weight"]).flatten().tolist() == place


# --- what holds for every selection ----------------------------------------------------------------------------------


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("name", RANKING)
def test_exactly_so_many_trainable_entries_are_marked_and_the_model_is_left_as_it_was(
    name: str, per_layer: bool
) -> None:
    model = problems.with_all()
    model.drop.eval()
    before = problems.state_of(model)
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    for fraction in (0.001, 0.1, 0.5, 1.0):
        choice = Choice(select=name, fraction=fraction, per_layer=per_layer, n_probes=3)
        mask = masks.make_mask(basis(model), choice)
        masks.check(mask, model)
        counts = {n: int(m.sum()) for n, m in mask.items()}
        if per_layer:
            assert counts == {n: round(fraction * size) for n, size in sizes.items()}
        else:
            assert sum(counts.values()) == round(fraction * sum(sizes.values()))
    assert problems.state_of(model) == before


@pytest.mark.parametrize("name", RANKING)
def test_counts_are_exact_where_all_scores_are_equal(name: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3, bias=False)).double()
    with torch.no_grad():
        model[1].weight.zero_()
    samples = TensorSamples(torch.zeros(23, 1, 6, 6, dtype=torch.float64), np.arange(23) % 3)
    mask = masks.make_mask(basis(model, samples), Choice(select=name, fraction=0.25, n_probes=2))
    assert int(flat(mask).sum()) == 27
    if name != "random":
        assert flat(mask)[:27].all()


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_mask_follows_from_its_seed(name: str) -> None:
    how = {"select": name, "n_probes": 2, "score_samples": 9}
    first, again, other = (flat(masks.make_mask(basis(), Choice(seed=seed, **how))) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    drawn = masks.SELECTIONS[name].capped or name == "random"
    assert torch.equal(first, other) is not drawn


@pytest.mark.parametrize("name", [*READING, "magnitude"])
def test_a_broken_weight_is_no_score(name: str) -> None:
    model = problems.with_all()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        scores(name, basis(model), n_probes=2)


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_network_without_trainable_weights_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="no trainable"):
        masks.make_mask(basis(problems.with_all().requires_grad_(False)), Choice(select=name))


@pytest.mark.parametrize("name", SELECTIONS)
def test_passes_are_those_of_the_batches_that_go_through(name: str) -> None:
    model, made = problems.with_all(), []
    forwards = []
    model.head.register_forward_hook(lambda *_: forwards.append(1))

    def around(*args, **more):
        made.append(MeanLoss(*args, **more))
        return made[-1]

    choice = Choice(select=name, n_probes=4, score_samples=13)
    masks.make_mask(basis(model, mean_loss=around), choice)
    expected = len(forwards) + sum(loss.passes["products"] * len(loss.batches) for loss in made)
    assert masks.passes(choice, model, FORGET, TRAINING, 6) == expected
    assert (expected > 0) == (name in READING)


@pytest.mark.parametrize("name", ["hessian", "ggn"])
@pytest.mark.parametrize("most", [1, 3, 7, 100])
def test_each_part_of_the_probes_has_a_graph_of_its_own(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, forwards = problems.mlp(), []
    n_weights = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr("unsharp.evaluation.curvature.AT_ONCE_BYTES", most * 8 * n_weights)
    model.register_forward_hook(lambda *_: forwards.append(1))
    choice = Choice(select=name, n_probes=7, score_samples=13)
    masks.make_mask(basis(model), choice)
    n_batches = 3
    assert len(forwards) == n_batches * {1: 7, 3: 3, 7: 1, 100: 1}[most]
    assert masks.passes(choice, model, FORGET, TRAINING, 6) == len(forwards) + 7 * n_batches


def test_what_is_looked_at_is_what_was_asked_for() -> None:
    assert np.array_equal(Choice(select="hessian").positions(FORGET, TRAINING), TRAINING)
    assert np.array_equal(Choice(select="largest").positions(FORGET, TRAINING), FORGET)
    assert np.array_equal(Choice(select="largest", score_on="training").positions(FORGET, TRAINING), TRAINING)
    assert np.array_equal(Choice(select="hessian", score_on="forget").positions(FORGET, TRAINING), FORGET)
    drawn = Choice(select="fisher", score_samples=5).positions(FORGET, TRAINING)
    assert len(set(drawn.tolist())) == 5
    assert set(drawn.tolist()) <= set(TRAINING.tolist())
    assert len(Choice(select="largest", score_samples=2).positions(FORGET, TRAINING)) == len(FORGET)
    assert len(Choice(select="random").positions(FORGET, TRAINING)) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"select": "hesian"}, "did you mean 'hessian'"),
        ({"n_probes": 0}, "n_probes"),
        ({"score_samples": 0}, "score_samples"),
        ({"score_on": "tests"}, "score_on"),
        ({"select": "random", "score_on": "forget"}, "looks at no sample"),
        ({"select": "last_layer", "per_layer": True}, "whole layers"),
        ({"seed": -1}, "seed"),
        ({"fraction": 0.0}, "fraction"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Choice(**settings)


# --- scores of any sign ----------------------------------------------------------------------------------------------

levels = st.sampled_from([0.0, -0.0, 1e-40, -1e-40, -1.0, 1.0, -0.5, 3e38, -3e38])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(levels, min_size=1, max_size=12),
    st.floats(0, 1, exclude_min=True),
    st.sampled_from(["largest", "smallest"]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_signed_scores_are_ranked_as_a_sort_ranks_them(
    values: list[float], fraction: float, select: str, dtype: torch.dtype
) -> None:
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    mask = masks.select_entries({"w": tensor}, fraction=fraction, select=select, signed=True)["w"].tolist()  # type: ignore[arg-type]
    exact = tensor.tolist()
    order = sorted(range(len(exact)), key=lambda i: (-exact[i] if select == "largest" else exact[i], i))
    chosen = set(order[: round(fraction * len(exact))])
    assert mask == [i in chosen for i in range(len(exact))]


# --- in methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("method", ["salun", "sharp_minmax"])
def test_methods_act_where_each_selection_says_and_count_its_passes(method: str, select: str) -> None:
    model, samples = problems.with_all(dtype=torch.float32), problems.images(dtype=torch.float32)
    retain = np.setdiff1d(TRAINING, FORGET)
    how = {"select": select, "n_probes": 3, "fraction": 0.2, "batch_size": 8, "epochs": 2, "lr": 0.05}
    config = unlearning.configure(method, weight_decay=0.1, **how)
    network, record = unlearning.run(model, samples, FORGET, retain, config)
    everywhere = unlearning.configure(method, **how | {"select": "all"})
    _, plain = unlearning.run(model, samples, FORGET, retain, everywhere)
    choice = Choice(select=select, n_probes=3, fraction=0.2)
    assert record.passes - plain.passes == masks.passes(choice, model, FORGET, TRAINING, 8)
    mask = masks.make_mask(basis(model, samples), choice)
    start, end = dict(model.named_parameters()), dict(network.named_parameters())
    moved = {n: end[n] != start[n] for n in mask}
    if method == "salun":
        assert not any(bool(moved[n][~mask[n]].any()) for n in mask)
        assert any(bool(m.any()) for m in moved.values())
    else:
        assert bool(moved["head.weight"].all())  # each part by its own phase
