"""The closed-form updates against dense linear algebra, networks retrained to the minimum, and corrections that fit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from unsharp import masks, unlearning
from unsharp.corrections import Corrections, read_corrections
from unsharp.data import TensorSamples, from_torch_dataset
from unsharp.data.samples import ImageSamples
from unsharp.errors import UserError
from unsharp.methods import METHODS
from unsharp.methods.second_order import conjugate_gradients
from unsharp.sharpness import RULES
from unsharp.training import Record

METHOD = ("first_order", "second_order")
FORGET = np.array([1, 4, 5, 20])
OTHERS = np.setdiff1d(np.arange(30), FORGET)
draw = torch.Generator().manual_seed(8)
RIGHT = torch.randn(4, 3, generator=draw, dtype=torch.float64)
LABELS = np.array([2, 0, 0, 1])


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def run(
    method: str,
    model: nn.Module,
    samples: TensorSamples,
    forget: np.ndarray = FORGET,
    corrections: Corrections | None = None,
    **settings: Any,
) -> tuple[Tensor, Record]:
    """The step that the method takes, flat, and its record."""
    before = flat(model)
    others = np.setdiff1d(np.arange(len(samples)), forget)
    config = unlearning.configure(method, **{"batch_size": 16} | settings)
    found, record = unlearning.run(model, samples, forget, others, config, corrections=corrections)
    assert torch.equal(flat(model), before)
    return flat(found) - before, record


def small() -> tuple[nn.Module, TensorSamples]:
    """BatchNorm with statistics of its own, dropout, a frozen weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    model[1].running_mean.normal_()
    model[4].bias.requires_grad_(False)
    return model, TensorSamples(torch.randn(30, 3, dtype=torch.float64), torch.arange(30) % 3)


KINDS = {
    "removal": None,
    "labels": Corrections(ids=FORGET[::-1], labels=LABELS[::-1]),
    "inputs": Corrections(ids=FORGET, inputs=RIGHT.numpy()),
    "both": Corrections(ids=FORGET[::-1], labels=LABELS[::-1], inputs=RIGHT.numpy()[::-1]),
}
kinds = pytest.mark.parametrize("kind", KINDS)


class Dense:
    """Gradients and curvature of a network, by functional derivatives of a log-sum-exp written out here."""

    def __init__(self, model: nn.Module, samples: TensorSamples) -> None:
        self.model, self.inputs, self.labels = model.eval(), samples.inputs, torch.from_numpy(samples.labels)
        self.named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        self.at = flat(model)

    def logits(self, vector: Tensor, inputs: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in self.named.values()])
        weights = {n: part.view(p.shape) for (n, p), part in zip(self.named.items(), parts)}
        return functional_call(self.model, weights, (inputs,))

    def loss(self, vector: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = self.logits(vector, inputs)
        return (logits.logsumexp(1) - logits[torch.arange(len(logits)), labels]).sum()

    def difference(self, kind: str, at: Tensor | None = None) -> Tensor:
        """Σ∇ℓ(as it should be) − Σ∇ℓ(as it was)."""
        at = self.at if at is None else at
        wrong = jacrev(self.loss)(at, self.inputs[FORGET], self.labels[FORGET])
        if kind == "removal":
            return -wrong
        inputs = RIGHT if kind in ("inputs", "both") else self.inputs[FORGET]
        labels = torch.from_numpy(LABELS) if kind in ("labels", "both") else self.labels[FORGET]
        return jacrev(self.loss)(at, inputs, labels) - wrong

    def matrix(self, name: str) -> Tensor:
        if name == "hessian":
            return jacrev(jacrev(self.loss))(self.at, self.inputs, self.labels) / len(self.inputs)
        j, p = jacrev(self.logits)(self.at, self.inputs), self.logits(self.at, self.inputs).softmax(1)
        return torch.einsum("nkp,nkl,nlq->pq", j, torch.diag_embed(p) - p[:, :, None] * p[:, None, :], j) / len(p)


# --- against dense linear algebra -------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("steps", [1, 3])
def test_the_first_order_step_is_the_closed_form(kind: str, steps: int) -> None:
    model, samples = small()
    dense = Dense(model, samples)
    at = dense.at
    for _ in range(steps):
        at = at - 0.02 * dense.difference(kind, at)
    model.train()
    step, record = run("first_order", model, samples, corrections=KINDS[kind], tau=0.02, steps=steps)
    torch.testing.assert_close(step, at - dense.at, rtol=1e-9, atol=1e-12)
    assert len(record.history) == steps
    assert record.passes == steps * (1 if kind == "removal" else 2)
    assert record.history[-1]["gradient_share"] == 1
    assert record.about.get("corrections") == (None if kind == "removal" else KINDS[kind].digest)
    assert model.training


@kinds
@pytest.mark.parametrize(("matrix", "damping", "strength"), [("hessian", 1.5, 1.0), ("ggn", 0.01, 2.5)])
def test_the_second_order_step_is_that_of_the_dense_matrix(
    kind: str, matrix: str, damping: float, strength: float
) -> None:
    model, samples = small()
    dense = Dense(model, samples)
    whole = dense.matrix(matrix) + damping * torch.eye(len(dense.at), dtype=torch.float64)
    expected = -strength / 30 * torch.linalg.solve(whole, dense.difference(kind))
    how = {"matrix": matrix, "damping": damping, "strength": strength, "cg_tolerance": 1e-12, "cg_steps": 200}
    step, record = run("second_order", model, samples, corrections=KINDS[kind], **how)
    torch.testing.assert_close(step, expected, rtol=1e-7, atol=1e-12)
    (row,) = record.history
    assert row["step_norm"] == pytest.approx(float(expected.norm()))
    assert row["cg_residual"] <= 1e-12
    # two batches of 15 in the mean loss; each product is a pass, and its graph another
    assert record.passes == (1 if kind == "removal" else 2) + 2 * 2 * row["cg_steps"]


@pytest.mark.parametrize("select", ["hessian", "random", "last_layer"])
@pytest.mark.parametrize("method", METHOD)
def test_a_mask_keeps_the_step_to_its_weights_to_the_bit(method: str, select: str) -> None:
    model, samples = small()
    with torch.no_grad():
        model[0].weight[:2] = -0.0  # zeros have a sign that an addition would lose
    dense = Dense(model, samples)
    mask = masks.saliency_mask(model, samples, FORGET, fraction=0.3, select=select, n_probes=5)
    chosen = torch.cat([m.flatten() for m in mask.values()])
    v = dense.difference("labels")
    how: dict[str, Any] = {"select": select, "fraction": 0.3, "n_probes": 5}
    if method == "first_order":
        how |= {"tau": 0.02}
        expected = -0.02 * v[chosen]
    else:
        how |= {"matrix": "ggn", "damping": 0.1, "cg_tolerance": 1e-12}
        block = dense.matrix("ggn")[chosen][:, chosen] + 0.1 * torch.eye(int(chosen.sum()), dtype=torch.float64)
        expected = -torch.linalg.solve(block, v[chosen]) / 30
    config = unlearning.configure(method, batch_size=16, **how)
    found, record = unlearning.run(model, samples, FORGET, OTHERS, config, corrections=KINDS["labels"])
    torch.testing.assert_close((flat(found) - dense.at)[chosen], expected, rtol=1e-7, atol=1e-13)
    bits = [w[~chosen].numpy().tobytes() for w in (flat(found), dense.at)]
    assert bits[0] == bits[1]
    assert record.history[0]["gradient_share"] == pytest.approx(float((v[chosen] ** 2).sum() / (v**2).sum()))
    _, without = run(method, model, samples, corrections=KINDS["labels"], **how | {"select": "all"})
    mask_passes = masks.passes(masks.Choice(select=select, n_probes=5), model, FORGET, np.arange(30), 16)
    products = [2 * 2 * r.history[0].get("cg_steps", 0) for r in (record, without)]
    assert record.passes - products[0] == without.passes - products[1] + mask_passes


def test_a_share_of_the_samples_gives_the_matrix_and_not_the_size_of_the_step() -> None:
    model, samples = small()
    dense = Dense(model, samples)
    expected = -dense.difference("labels") / 30 / 1e6
    how = {"damping": 1e6, "hessian_samples": 7}
    config = unlearning.configure("second_order", batch_size=16, retain_fraction=0.5, **how)
    found, _ = unlearning.run(model, samples, FORGET, OTHERS, config, corrections=KINDS["labels"])
    torch.testing.assert_close(flat(found) - dense.at, expected, rtol=1e-4, atol=1e-14)
    few = [run("second_order", model, samples, damping=0.1, hessian_samples=7, seed=seed)[0] for seed in (1, 1, 2)]
    assert torch.equal(few[0], few[1])
    assert not torch.allclose(few[0], few[2])


def test_a_hessian_that_is_not_positive_definite_is_refused() -> None:
    model, samples = small()
    lowest = float(torch.linalg.eigvalsh(Dense(model, samples).matrix("hessian"))[0])
    assert lowest < -1e-3
    with pytest.raises(UserError, match="take more damping, or matrix ggn"):
        run("second_order", model, samples, matrix="hessian", damping=1e-3 * -lowest, cg_tolerance=1e-10, cg_steps=200)


# --- conjugate gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_conjugate_gradients_solve(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    a, b = root @ root.T + 0.1 * torch.eye(9), torch.randn(9, generator=generator, dtype=torch.float64)
    found = conjugate_gradients(lambda x: a @ x, b, 1e-12, 100)
    torch.testing.assert_close(found.solution, torch.linalg.solve(a, b), rtol=1e-8, atol=1e-10)
    assert 0 < float(torch.linalg.eigvalsh(a)[0]) <= found.lowest * (1 + 1e-9)
    early = conjugate_gradients(lambda x: a @ x, b, 1e-12, 3)
    assert early.products == 3
    assert early.residual == pytest.approx(float((b - a @ early.solution).norm() / b.norm()), rel=1e-6)
    loose = conjugate_gradients(lambda x: a @ x, b, 0.3, 100)
    assert loose.residual <= 0.3
    assert loose.products < found.products
    turned = conjugate_gradients(lambda x: (a - 0.5 * torch.linalg.eigvalsh(a)[-1]) @ x, b, 1e-12, 100)
    shifted = conjugate_gradients(lambda x: -(a @ x), b, 1e-12, 100)
    assert shifted.lowest < 0
    assert shifted.products == 1
    assert not bool(shifted.solution.any())
    assert turned.solution.isfinite().all()
    nothing = conjugate_gradients(lambda x: a @ x, torch.zeros(9, dtype=torch.float64), 1e-12, 100)
    assert (nothing.products, nothing.residual) == (0, 0.0)


# --- against retraining -----------------------------------------------------------------------------------------------

DECAY = 1e-2


def logistic(n: int) -> TensorSamples:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    truth = torch.tensor([[1.0, -0.5, 0.3], [-0.2, 0.8, 0.1], [0.0, 0.0, -0.6]], dtype=torch.float64)
    return TensorSamples(
        inputs, torch.multinomial(torch.softmax(inputs @ truth.T, 1), 1, generator=generator)[:, 0], ("a", "b", "c")
    )


def minimum(inputs: Tensor, labels: Tensor, decay: float = DECAY) -> nn.Module:
    """The logistic regression with the smallest mean loss + ½·decay·‖w‖², by Newton's method."""

    def loss(weights: Tensor) -> Tensor:
        logits = inputs @ weights.view(3, 3).T
        return nn.functional.cross_entropy(logits, labels) + 0.5 * decay * weights @ weights

    weights = torch.zeros(9, dtype=torch.float64)
    for _ in range(12):
        step = torch.linalg.solve(jacrev(jacrev(loss))(weights), jacrev(loss)(weights))
        weights = weights - step
    assert float(jacrev(loss)(weights).norm()) < 1e-12
    model = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(weights.view(3, 3))
    return model


@kinds
def test_newtons_step_goes_where_retraining_goes(kind: str) -> None:
    """The relative error falls as one over the number of samples: the step is that of retraining to first order."""

    def error(n: int) -> float:
        samples = logistic(n)
        inputs, labels = samples.inputs.clone(), torch.from_numpy(samples.labels).clone()
        model = minimum(inputs, labels)
        keep = np.setdiff1d(np.arange(n), FORGET) if kind == "removal" else np.arange(n)
        if kind in ("inputs", "both"):
            inputs[FORGET] = RIGHT
        if kind in ("labels", "both"):
            labels[FORGET] = torch.from_numpy(LABELS)
        # of the sum of n losses and n·½δ‖w‖² the removal leaves the second as it is
        retrained = flat(minimum(inputs[keep], labels[keep], DECAY * n / len(keep))) - flat(model)
        how = {"matrix": "hessian", "damping": DECAY, "cg_tolerance": 1e-12, "hessian_samples": n, "batch_size": 5000}
        step, _ = run("second_order", model, samples, corrections=KINDS[kind], **how)
        return float((step - retrained).norm() / retrained.norm())

    errors = [error(n) for n in (100, 400, 3200)]
    assert errors[0] > 2 * errors[1] > 8 * errors[2]
    assert errors[2] < 0.005


# --- what corrections must be -----------------------------------------------------------------------------------------


def test_a_correction_to_what_a_sample_is_does_nothing() -> None:
    model, samples = small()
    same = Corrections(ids=FORGET, labels=samples.labels[FORGET], inputs=samples.inputs[FORGET].numpy())
    for method in METHOD:
        step, record = run(method, model, samples, corrections=same)
        assert not bool(step.any())
        assert record.history[0]["gradient_share"] == 0


def test_images_are_corrected_as_they_are_stored_and_seen_as_the_network_sees_them() -> None:
    random = np.random.default_rng(0)
    images, other = (random.integers(0, 256, (n, 4, 4, 1), dtype=np.uint8) for n in (20, 3))
    ids = [f"s{i}" for i in range(20)]
    samples = ImageSamples(images, np.arange(20) % 4, mean=(0.3,), std=(0.2,), ids=ids)
    forget = np.array([2, 7, 11])
    how = Corrections(ids=["s7", "s2", "s11"], inputs=other, labels=[3, 2, 1])
    right = how.applied(samples, forget)
    (batch,) = right.batches(np.arange(3), [3], draws=None)
    expected = (other[[1, 0, 2]].astype(np.float32) / 255 - 0.3) / 0.2
    np.testing.assert_allclose(batch.inputs.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
    assert batch.labels.tolist() == [2, 3, 1]
    (part,) = right.subset([2, 0]).batches(np.arange(2), [2], draws=None)
    assert part.labels.tolist() == [1, 2]
    scaled = Corrections(ids=["s2", "s7", "s11"], inputs=(other / 255.0).transpose(0, 3, 1, 2)).applied(samples, forget)
    assert torch.equal(scaled.images, torch.from_numpy(other))  # type: ignore[attr-defined]
    for wrong in (other[:, :3], other.astype(float)):
        with pytest.raises(UserError, match="corrected inputs"):
            Corrections(ids=["s2", "s7", "s11"], inputs=wrong).applied(samples, forget)


def test_samples_of_a_dataset_are_corrected_too() -> None:
    inputs = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    data = [(x, i % 3) for i, x in enumerate(inputs)]
    samples = from_torch_dataset(data, device="cpu")  # type: ignore[arg-type]
    right = Corrections(ids=[4, 9], inputs=np.ones((2, 5))).applied(samples, np.array([4, 9]))
    (batch,) = right.batches(np.arange(2), [2], draws=None)
    assert batch.inputs.dtype == torch.float32
    assert batch.inputs.eq(1).all()
    assert batch.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ids": FORGET}, "labels or inputs"),
        ({"ids": FORGET, "labels": [0, 1]}, "one per id"),
        ({"ids": FORGET, "labels": 1}, "one per id"),
        ({"ids": 5, "labels": [1]}, r"one dimension, got the shape \(\)"),
        ({"ids": [[1, 4], [5, 20]], "labels": [0, 0]}, r"one dimension, got the shape \(2, 2\)"),
        ({"ids": [1, 4, 5], "labels": [0, 0, 0]}, "lack 20"),
        ({"ids": [1, 4, 5, 20, 21], "labels": [0] * 5}, "also name 21"),
        ({"ids": [1, 4, 5, 5], "labels": [0] * 4}, "more than once"),
        ({"ids": ["a", "b", "c", "d"], "labels": [0] * 4}, "ids are integers"),
        ({"ids": FORGET, "labels": [0, 1, 3, 0]}, "corrected labels: label 3"),
        ({"ids": FORGET, "labels": [0.0, 1.0, 0.0, 0.0]}, "corrected labels: labels must be integers"),
        ({"ids": FORGET, "inputs": np.zeros((4, 2))}, r"shape \(3,\)"),
        ({"ids": FORGET, "inputs": np.full((4, 3), np.nan)}, "finite"),
    ],
)
def test_corrections_that_do_not_fit_are_refused(given: dict[str, Any], words: str) -> None:
    model, samples = small()
    with pytest.raises(UserError, match=words):
        run("first_order", model, samples, corrections=Corrections(**given))


def test_files_of_corrections(tmp_path) -> None:
    path = tmp_path / "right.npz"
    np.savez(path, ids=FORGET[::-1], labels=LABELS[::-1])
    read = read_corrections(path)
    assert read.digest == KINDS["labels"].digest != KINDS["inputs"].digest
    np.savez(path, ids=FORGET, label=LABELS)
    with pytest.raises(UserError, match="found ids, label"):
        read_corrections(path)
    with pytest.raises(UserError, match="is not a file"):
        read_corrections(tmp_path / "nowhere.npz")
    np.savez(path, ids=5, labels=[1])
    with pytest.raises(UserError, match="one dimension"):
        read_corrections(path)
    path.write_text("no")
    with pytest.raises(UserError, match="plain arrays"):
        read_corrections(path)


def test_other_methods_and_rules_are_refused() -> None:
    model, samples = small()
    for method in set(METHODS) - set(METHOD):
        assert not METHODS[method].corrects
    with pytest.raises(UserError, match="take first_order, second_order"):
        run("neggrad", model, samples, corrections=KINDS["labels"])
    for method in METHOD:
        assert [name for name in RULES if METHODS[method].admits(name)[0]] == ["none"]


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("first_order", "tau", 0.0),
        ("first_order", "tau", math.inf),
        ("first_order", "steps", 0),
        ("first_order", "select", "larges"),
        ("second_order", "damping", -1.0),
        ("second_order", "strength", math.nan),
        ("second_order", "cg_steps", 0),
        ("second_order", "matrix", "fisher"),
        ("second_order", "hessian_samples", 0),
    ],
)
def test_values_out_of_range_are_refused(method: str, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        METHODS[method](**{name: value})
