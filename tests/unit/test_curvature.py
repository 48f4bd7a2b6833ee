"""Curvature of the mean loss, held to the dense matrices of tiny networks in float64."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from weight_problems import Quadratic, first_logit, images, mlp, ones, permuted, rescaled, state_of, symmetric, with_all

from unsharp.errors import NonFiniteError, UserError
from unsharp.evaluation import curvature
from unsharp.evaluation.curvature import Curvature, CurvatureMatrix, Density, _Lanczos, density, eigenvalues, trace
from unsharp.evaluation.mean_loss import MeanLoss

INDICES = np.arange(2, 19)
MATRICES = ("hessian", "ggn")


def matrix_of(model, samples=None, matrix="hessian", batch_size=6, **more) -> CurvatureMatrix:
    return CurvatureMatrix(MeanLoss(model, samples or images(), INDICES, batch_size=batch_size, **more), matrix)


class Known(CurvatureMatrix):
    """A matrix that is there as a whole: quick, and of any dtype."""

    def __init__(self, a: np.ndarray, dtype: torch.dtype = torch.float64) -> None:
        model = Quadratic(a, np.zeros(len(a)), np.ones(len(a))).to(dtype)
        super().__init__(MeanLoss(model, ones(), np.arange(7), loss=first_logit))
        self.a = torch.tensor(a, dtype=dtype)

    def _times(self, vectors):
        self.around.passes["products"] += vectors.shape[1]
        return self.a @ vectors


def quadratic(a: np.ndarray) -> CurvatureMatrix:
    return Known(a)


def logits_at(model: nn.Module, samples):
    """The logits as a function of one flat vector of all trainable weights, and that vector."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.eval()

    def logits(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([p.numel() for p in named.values()])
        weights = {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts)}
        return torch.func.functional_call(model, weights, (samples.inputs[INDICES],))

    return logits, torch.cat([p.detach().flatten() for p in named.values()])


def dense_by_hand(model: nn.Module, samples, matrix: str) -> np.ndarray:
    """The Hessian by torch's own, or Jᵀ(diag p − ppᵀ)J from the whole Jacobian, in one batch."""
    logits, w = logits_at(model, samples)
    labels = torch.from_numpy(samples.labels[INDICES])
    if matrix == "hessian":
        return torch.autograd.functional.hessian(lambda v: nn.functional.cross_entropy(logits(v), labels), w).numpy()
    jacobian = torch.autograd.functional.jacobian(logits, w).numpy()
    p = torch.softmax(logits(w), 1).numpy()
    inner = np.einsum("ij,jk->ijk", p, np.eye(p.shape[1])) - np.einsum("ij,ik->ijk", p, p)
    return np.einsum("nkp,nkl,nlq->pq", jacobian, inner, jacobian) / len(p)


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("make", [with_all, mlp])
def test_products_are_those_of_the_dense_matrix(make, matrix: str):
    model = make()
    expected = dense_by_hand(model, images(), matrix)
    found = matrix_of(model, matrix=matrix)
    np.testing.assert_allclose(found.dense().numpy(), expected, atol=1e-12, rtol=1e-9)
    v = found.noise(3)
    np.testing.assert_allclose((found @ v).numpy(), expected @ v.numpy(), atol=1e-12, rtol=1e-9)
    assert np.abs(expected).max() > 1e-3


def test_products_of_a_transformer_are_those_of_the_dense_matrix():
    """Fused attention has no second derivative; the plain form must be taken."""

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            tokens = x.flatten(1).view(len(x), 9, 4)
            return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    model = Attending().double()
    for matrix in MATRICES:
        found = matrix_of(model, matrix=matrix)
        v = found.noise(3)
        with sdpa_kernel(SDPBackend.MATH):
            expected = dense_by_hand(model, images(), matrix) @ v.numpy()
        np.testing.assert_allclose((found @ v).numpy(), expected, atol=1e-12, rtol=1e-8)


def test_the_gauss_newton_part_of_another_loss():
    """Of the mean of ½‖z‖², whose Hessian by the logits is the identity, it is the mean of JᵀJ."""
    model, samples = mlp(), images()
    found = matrix_of(model, samples, "ggn", loss=lambda z, y: 0.5 * z.square().sum(1)).dense().numpy()
    logits, w = logits_at(model, samples)
    jacobian = torch.autograd.functional.jacobian(logits, w).numpy()
    np.testing.assert_allclose(found, np.einsum("nkp,nkq->pq", jacobian, jacobian) / len(INDICES), atol=1e-12)


def test_vectors_share_a_pass_only_as_far_as_memory_reaches(monkeypatch):
    found = matrix_of(mlp())
    vectors = torch.stack([found.noise(j) for j in range(5)], dim=1)
    together = found @ vectors
    monkeypatch.setattr(curvature, "AT_ONCE_BYTES", 2 * len(found) * 8)
    np.testing.assert_allclose((found @ vectors).numpy(), together.numpy(), atol=1e-14)
    assert found.products == 10


def test_a_network_whose_loss_is_linear_has_no_curvature():
    model = Quadratic(np.zeros((4, 4)), np.ones(4), np.ones(4))
    found = CurvatureMatrix(MeanLoss(model, ones(), np.arange(7), loss=first_logit))
    assert torch.equal(found @ torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("matrix", MATRICES)
def test_products_equal_those_of_curvlinops(matrix: str):
    other = pytest.importorskip("curvlinops")
    model, samples = mlp().eval(), images()
    found = matrix_of(model, samples, matrix)
    data = [(samples.inputs[part], torch.from_numpy(samples.labels[part])) for part in np.array_split(INDICES, 3)]
    operator = {"hessian": other.HessianLinearOperator, "ggn": other.GGNLinearOperator}[matrix]
    theirs = operator(model, nn.CrossEntropyLoss(), list(model.parameters()), data)
    v = found.noise(1)
    np.testing.assert_allclose((found @ v).numpy(), (theirs @ v).detach().numpy(), atol=1e-12)


# --- eigenvalues ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", MATRICES)
def test_eigenvalues_are_those_of_the_dense_matrix(matrix: str):
    model = with_all()
    found = matrix_of(model, matrix=matrix)
    expected = np.linalg.eigvalsh(dense_by_hand(model, images(), matrix))
    top, bottom = eigenvalues(found, 4, 2, 1e-9)
    np.testing.assert_allclose(top.values, expected[:-5:-1], rtol=1e-8)
    n = 2 if matrix == "hessian" else 1  # the Gauss–Newton matrix has the eigenvalue 0 many times
    np.testing.assert_allclose(bottom.values[:n], expected[:n], rtol=1e-8, atol=1e-9)
    assert top.converged
    assert bottom.converged
    assert max(top.residuals + bottom.residuals) < 1e-8


def test_the_smallest_eigenvalue_tells_that_it_is_no_minimum():
    assert eigenvalues(matrix_of(with_all()))[1].values[0] < -1e-4
    assert eigenvalues(matrix_of(with_all(), matrix="ggn"))[1].values[0] > -1e-6


def test_many_eigenvalues_near_zero_do_not_keep_lanczos():
    """An accuracy relative to the eigenvalue itself is never reached there."""
    a = np.diag(np.r_[50.0, 20.0, 10.0, 1e-9 * np.arange(200)])
    matrix = quadratic(a)
    top, bottom = eigenvalues(matrix, 2, 1)
    np.testing.assert_allclose(top.values, (50.0, 20.0), rtol=1e-6)
    assert bottom.values[0] == pytest.approx(0.0, abs=0.05)
    assert top.converged
    assert bottom.converged
    assert matrix.products < 20


@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-5])
def test_an_eigenvalue_lies_within_its_residual(tolerance: float):
    a = symmetric(200, 1)
    values = np.linalg.eigvalsh(a)
    for result in eigenvalues(quadratic(a), 3, 3, tolerance, most_steps=200):
        assert result.converged
        for value, residual in zip(result.values, result.residuals):
            assert np.abs(values - value).min() <= residual * (1 + 1e-9)
            assert residual <= tolerance * np.abs(values).max() * 1.001
    assert max(result.residuals) > 1e-3 * tolerance


def test_more_steps_are_taken_only_where_they_are_needed():
    a = symmetric(200, 1)
    counts = []
    for tolerance in (0.3, 1e-2, 1e-5):
        matrix = quadratic(a)
        eigenvalues(matrix, 1, 0, tolerance, most_steps=200)
        counts.append(matrix.products)
    assert counts[0] < counts[1] < counts[2] < 120


def test_what_has_not_converged_is_said():
    a = np.diag(np.linspace(0.0, 1.0, 300))
    top, bottom = eigenvalues(quadratic(a), 3, 0, tolerance=1e-9, most_steps=12)
    assert not top.converged
    assert len(top.values) == 3
    assert bottom == curvature.Eigenvalues((), (), True)


@pytest.mark.parametrize(("largest", "smallest"), [(1, 0), (3, 2), (0, 5), (5, 0)])
def test_few_weights_can_all_be_asked_for(largest: int, smallest: int):
    a = symmetric(5, 3)
    values = np.linalg.eigvalsh(a)
    top, bottom = eigenvalues(quadratic(a), largest, smallest, 1e-9)
    np.testing.assert_allclose(top.values, values[::-1][:largest], atol=1e-10)
    np.testing.assert_allclose(bottom.values, values[:smallest], atol=1e-10)


def test_an_eigenvalue_that_comes_several_times_is_found_as_often():
    """The vectors from one start meet it once; a fresh one must follow."""
    q, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(9, 9)))
    a = q @ np.diag([4.0, 4.0, 4.0, 1.0, 1.0, 0.0, 0.0, 0.0, -2.0]) @ q.T
    top, bottom = eigenvalues(quadratic(a), 5, 2, 1e-9)
    np.testing.assert_allclose(top.values, (4, 4, 4, 1, 1), atol=1e-8)
    np.testing.assert_allclose(bottom.values, (-2, 0), atol=1e-8)


def test_eigenvalues_in_single_precision():
    model, single = mlp(hidden=9), mlp(hidden=9, dtype=torch.float32)
    a = eigenvalues(matrix_of(model), 3, 0, 1e-6)[0].values
    b = eigenvalues(matrix_of(single, images(dtype=torch.float32)), 3, 0)[0].values
    np.testing.assert_allclose(b, a, rtol=1e-3)


# --- trace ------------------------------------------------------------------------------------------------------------


def test_the_error_of_hutchinson_is_the_one_that_theory_gives():
    """Var zᵀHz = 2(‖H‖_F² − Σ Hᵢᵢ²) for random signs."""
    a, draws = symmetric(12, 7, 0.5), 600
    found = trace(quadratic(a), draws, "hutchinson")
    error = np.sqrt(2 * ((a**2).sum() - (np.diag(a) ** 2).sum()) / draws)
    assert found.value == pytest.approx(np.trace(a), abs=4 * error)
    assert found.standard_error == pytest.approx(error, rel=0.15)
    assert found.mean_eigenvalue == found.value / 12
    assert found.products == draws


def test_hutchinson_is_exact_for_a_diagonal():
    found = trace(quadratic(np.diag([3.0, -1.0, 5.0])), 4, "hutchinson")
    assert found.value == pytest.approx(7.0, rel=1e-12)
    assert found.standard_error == pytest.approx(0.0, abs=1e-12)


def test_hutch_plus_plus_is_exact_where_the_basis_holds_the_whole_matrix():
    low = np.random.default_rng(0).normal(size=(40, 4))
    found = trace(quadratic(low @ low.T), 15)
    assert found.value == pytest.approx(np.trace(low @ low.T), rel=1e-10)
    assert found.standard_error == pytest.approx(0.0, abs=1e-8)
    whole = trace(quadratic(symmetric(3, 1)), 30)
    assert whole.value == pytest.approx(np.trace(symmetric(3, 1)), rel=1e-10)


def test_hutch_plus_plus_is_unbiased_and_its_error_is_right():
    a = symmetric(30, 4) + 0.2 * np.eye(30)
    runs = [trace(quadratic(a), 12, seed=seed) for seed in range(150)]
    values, errors = np.array([r.value for r in runs]), np.array([r.standard_error for r in runs])
    assert values.mean() == pytest.approx(np.trace(a), abs=4 * values.std() / np.sqrt(150))
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.2)
    assert runs[0].products == 12


def test_outliers_cost_hutch_plus_plus_nothing():
    """Many small eigenvalues and a few large ones, as networks have them, in a random basis."""
    q, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(60, 60)))
    a = q @ np.diag(np.r_[100.0, 50.0, 30.0, np.full(57, 0.1)]) @ q.T
    plain, better = trace(quadratic(a), 30, "hutchinson"), trace(quadratic(a), 30)
    assert better.standard_error < 0.05 * plain.standard_error
    assert better.value == pytest.approx(np.trace(a), abs=4 * better.standard_error + 1e-9)


def test_the_trace_of_a_network():
    model = with_all()
    expected = np.trace(dense_by_hand(model, images(), "hessian"))
    for estimator in ("hutchinson", "hutch++"):
        found = trace(matrix_of(model), 60, estimator)
        assert found.value == pytest.approx(expected, abs=4 * found.standard_error)


# --- spectral density -------------------------------------------------------------------------------------------------


def ran(matrix: CurvatureMatrix, steps: int) -> _Lanczos:
    run = _Lanczos(matrix, matrix.noise(0))
    while run.step() and len(run) < steps:
        pass
    return run


def test_all_lanczos_steps_give_all_eigenvalues():
    a = symmetric(40, 5)
    np.testing.assert_allclose(ran(quadratic(a), 40).eigen()[0], np.linalg.eigvalsh(a), atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lanczos_brings_no_eigenvalue_twice(dtype: torch.dtype):
    """Without reorthogonalisation the large ones come back: the reason for it."""
    values = np.r_[1e4, 1e3, np.linspace(0, 1, 98)]
    found = ran(Known(np.diag(values), dtype), 60).eigen()[0]
    assert (found > 500).sum() == 2


def test_lanczos_ends_where_nothing_is_left():
    low = np.random.default_rng(0).normal(size=(20, 3))
    matrix = quadratic(low @ low.T)
    assert len(ran(matrix, 15)) == 4
    found = density(matrix, 2, 15)
    assert found.nodes.shape == (2, 15)
    np.testing.assert_allclose(found.weights.sum(1), 1.0)
    assert np.isfinite(found.nodes).all()


def test_a_draw_of_the_density_is_the_measure_of_its_start():
    """With all steps: eigenvalues as nodes, squared parts of the start along the eigenvectors as weights."""
    a = symmetric(9, 6)
    matrix = quadratic(a)
    found = density(matrix, 3, 9, seed=5)
    values, vectors = np.linalg.eigh(a)
    for draw in range(3):
        start = matrix.noise(5, curvature.DENSITY, draw).numpy()
        np.testing.assert_allclose(found.nodes[draw], values, atol=1e-10)
        np.testing.assert_allclose(found.weights[draw], (vectors.T @ start / np.linalg.norm(start)) ** 2, atol=1e-9)
    assert found.products == 27


def test_moments_and_shares_of_the_density():
    a = symmetric(40, 8, 0.3)
    values = np.linalg.eigvalsh(a)
    found = density(quadratic(a), 60, 8)
    for power in (1, 2, 3):
        mean, error = found.moment(power)
        assert mean == pytest.approx((values**power).mean(), abs=4 * error)
    exact = density(quadratic(a), 200, 40)
    for low, high in ((-np.inf, 0.0), (0.0, 2.0), (2.0, np.inf)):
        assert exact.share(low, high) == pytest.approx(((values >= low) & (values < high)).mean(), abs=0.03)
    assert found.share() == pytest.approx(1.0)
    assert density(quadratic(a), 1, 8).moment(1)[1] is None


def test_the_density_is_the_spread_of_the_eigenvalues():
    a = symmetric(40, 8)
    values, width = np.linalg.eigvalsh(a), 0.8
    grid = np.linspace(-20, 20, 801)
    found = density(quadratic(a), 300, 40).at(grid, width)
    bumps = np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2) / (width * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(found, bumps.mean(1), atol=0.006)
    assert found.sum() * (grid[1] - grid[0]) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(UserError, match="width"):
        Density(np.zeros((1, 1)), np.ones((1, 1)), 1, 1).at(grid, 0.0)


# --- the whole report -------------------------------------------------------------------------------------------------

ALL = Curvature(largest=2, smallest=2, trace_draws=9, density_draws=2, density_steps=6, batch_size=6)


def test_the_report_holds_all_that_was_asked_for():
    model, samples = with_all(), images()
    report = ALL.measure(model, samples, INDICES)
    dense = dense_by_hand(model, samples, "hessian")
    np.testing.assert_allclose(report.largest.values, np.linalg.eigvalsh(dense)[:-3:-1], rtol=1e-3)
    np.testing.assert_allclose(report.smallest.values, np.linalg.eigvalsh(dense)[:2], rtol=1e-3)
    logits, w = logits_at(model, samples)
    w = w.requires_grad_()
    loss = nn.functional.cross_entropy(logits(w), torch.from_numpy(samples.labels[INDICES]))
    (gradient,) = torch.autograd.grad(loss, w)
    assert report.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    assert report.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-9)
    assert (report.n, report.n_weights) == (17, len(dense))
    assert report.passes["gradients"] == 1
    assert report.passes["products"] > report.trace.products + report.density.products == 9 + 12
    nothing = Curvature(largest=0, smallest=0, trace_draws=0).measure(model, samples, INDICES)
    assert (nothing.largest, nothing.smallest, nothing.trace, nothing.density) == (None,) * 4
    assert nothing.passes == {"gradients": 1, "products": 0}


def test_the_network_is_left_as_it_was_to_the_bit():
    model = with_all(dtype=torch.float32)
    model.head.eval()
    model.conv.weight.grad = torch.full_like(model.conv.weight, 7.0)
    before = state_of(model)
    ALL.measure(model, images(dtype=torch.float32), INDICES)
    replace(ALL, matrix="ggn").measure(model, images(dtype=torch.float32), INDICES)
    assert state_of(model) == before


def test_the_seed_decides_all_that_is_random():
    def flat(report):
        values = asdict(report)
        return [
            np.asarray(v).tolist() for v in (values["density"].pop("nodes"), values["density"].pop("weights"))
        ], values

    model, samples = with_all(), images()
    first = flat(ALL.measure(model, samples, INDICES))
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    assert flat(ALL.measure(model, samples, INDICES)) == first
    assert flat(replace(ALL, seed=1).measure(model, samples, INDICES)) != first


def test_eigenvalues_do_not_see_the_order_of_units_but_do_see_the_scale_of_layers():
    model = mlp(bias=True)
    a, b = (eigenvalues(matrix_of(m), 3, 0, 1e-8)[0].values for m in (model, permuted(model)))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    a, b = (eigenvalues(matrix_of(m), 3, 0, 1e-8)[0].values for m in (mlp(), rescaled(mlp(), 4.0)))
    assert b[0] > 2 * a[0]


def test_a_loss_that_is_not_finite_is_an_error():
    model = with_all()
    with torch.no_grad():
        model.conv.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        ALL.measure(model, images(), INDICES)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"matrix": "fisher"}, "unknown matrix 'fisher'"),
        ({"largest": -1}, "largest must be a whole number of at least 0"),
        ({"trace_draws": 10}, "multiple of 3"),
        ({"trace_draws": 3}, "at least 6"),
        ({"estimator": "xtrace"}, "unknown estimator"),
        ({"density_steps": 1}, "density_steps"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_mistakes_are_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        Curvature(**wrong)
    assert Curvature(trace_draws=0).trace_draws == 0


def test_more_eigenvalues_than_weights_are_refused():
    with pytest.raises(UserError, match="together must be at most"):
        Curvature(largest=10**6).measure(mlp(), images(), INDICES)
    with pytest.raises(UserError, match="together must be at most 3"):
        eigenvalues(quadratic(np.eye(3)), 2, 2)
