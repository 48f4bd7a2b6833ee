"""Curvature of the mean loss in the weights: extreme eigenvalues, trace and spectral density of the Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from unsharp.data.samples import Samples
from unsharp.errors import NonFiniteError, UserError, unknown
from unsharp.evaluation.mean_loss import (
    MATRICES,
    Loss,
    Matrix,
    MeanLoss,
    check_finite,
    check_positive,
    check_whole,
    cross_entropy,
)
from unsharp.progress import SILENT, Progress

Estimator = Literal["hutchinson", "hutch++"]
START, TRACE, SKETCH, DENSITY, DIAGONAL = 11, 12, 13, 14, 15
LOOK_EVERY = 5
"""Lanczos steps between two looks at what has converged."""
BLOCK = 16
"""Lanczos vectors that are kept in one tensor."""
AT_ONCE_BYTES = 2**29
"""Vectors that share the graph of a batch take at most this much memory."""


def at_once(length: int, element_size: int) -> int:
    """How many vectors of so many numbers, of so many bytes each, share the graph of a batch; at least 1."""
    return max(1, AT_ONCE_BYTES // (length * element_size))


class CurvatureMatrix:
    """The Hessian of a mean loss, or its Gauss–Newton part, as products with vectors.

    Args:
        around: The mean loss.
        matrix: "hessian" or "ggn".
    """

    def __init__(self, around: MeanLoss, matrix: Matrix = "hessian") -> None:
        if matrix not in MATRICES:
            raise unknown("matrix", matrix, MATRICES)
        self.around = around
        self.matrix: Matrix = matrix
        self.dtype = around.params[0].dtype

    def __len__(self) -> int:
        return self.around.length

    @property
    def products(self) -> int:
        """Vectors multiplied so far, each by a pass over all samples."""
        return self.around.passes["products"]

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The product with a vector (P,) or with the columns of (P, m)."""
        if vectors.ndim == 1:
            return self._times(vectors[:, None])[:, 0]
        size = at_once(len(self), vectors.element_size())
        return torch.cat([self._times(part) for part in vectors.split(size, dim=1)], dim=1)

    def dense(self) -> Tensor:
        """The matrix itself, (P, P), symmetric to the bit; a pass for each weight."""
        whole = self @ torch.eye(len(self), dtype=self.dtype, device=self.around.device)
        return (whole + whole.T) / 2

    def noise(self, *words: int) -> Tensor:
        """(P,) standard normal numbers, a function of the words alone."""
        return _flat(self.around.noise(*words))

    def signs(self, *words: int) -> Tensor:
        """(P,) signs −1 or 1, a function of the words alone."""
        return _flat(self.around.signs(*words))

    def _times(self, vectors: Tensor) -> Tensor:
        columns = [self.around.split(vectors[:, j]) for j in range(vectors.shape[1])]
        return torch.stack([_flat(p) for p in self.around.products(columns, self.matrix)], dim=1)


@dataclass(frozen=True)
class Eigenvalues:
    """Eigenvalues at one end of the spectrum.

    Args:
        values: Eigenvalues, the outermost first.
        residuals: ‖H·v − λ·v‖₂ for each with its unit vector v, computed by another product: an eigenvalue of H lies
            within this distance of λ.
        converged: Whether Lanczos came to the tolerance for all of them.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    converged: bool


@dataclass(frozen=True)
class Trace:
    """An estimate of a trace.

    Args:
        value: The estimate, unbiased.
        standard_error: Of the estimate over its draws; 0 where nothing is left to chance, None for a single draw.
        mean_eigenvalue: value divided by the number of weights.
        products: Products with the matrix that it took.
    """

    value: float
    standard_error: float | None
    mean_eigenvalue: float
    products: int


@dataclass(frozen=True, eq=False)
class Diagonal:
    """An estimate of a diagonal.

    Args:
        values: (P,) estimates, unbiased.
        standard_error: (P,) of each over its draws; None for a single draw.
        products: Products with the matrix that it took.
    """

    values: Tensor
    standard_error: Tensor | None
    products: int


@dataclass(frozen=True, eq=False)
class Density:
    """How the eigenvalues are spread, by stochastic Lanczos quadrature: draws of a discrete measure of total weight 1.

    Args:
        nodes: (draws, steps) places on the axis of eigenvalues.
        weights: (draws, steps) the share of the spectrum that each stands for; a row sums to 1, and ends in zeros where
            a draw needed fewer steps.
        n_weights: Number of weights of the network, P.
        products: Products with the matrix that it took.
    """

    nodes: np.ndarray
    weights: np.ndarray
    n_weights: int
    products: int

    def moment(self, power: int) -> tuple[float, float | None]:
        """tr(H^power)/P, the mean of λ^power, and its standard error over the draws (None for one draw).

        The estimate of a draw is exact but for chance while power ≤ 2·steps − 1.
        """
        each = (self.weights * self.nodes**power).sum(axis=1)
        error = None if len(each) == 1 else float(each.std(ddof=1) / math.sqrt(len(each)))
        return float(each.mean()), error

    def share(self, low: float = -math.inf, high: float = math.inf) -> float:
        """The share of eigenvalues in [low, high), up to the resolution of the nodes."""
        inside = (self.nodes >= low) & (self.nodes < high)
        return float((self.weights * inside).sum(axis=1).mean())

    def at(self, values: np.ndarray, width: float) -> np.ndarray:
        """The density at some eigenvalues, each node spread to a normal curve of deviation `width` > 0."""
        check_positive("width", width)
        z = (np.asarray(values)[:, None] - self.nodes.reshape(1, -1)) / width
        bumps = np.exp(-0.5 * z * z) / (width * math.sqrt(2 * math.pi))
        return bumps @ self.weights.reshape(-1) / len(self.nodes)


@dataclass(frozen=True)
class CurvatureReport:
    """Curvature of a network over fixed samples.

    Args:
        loss: The mean loss.
        gradient_norm: ‖∇L‖₂: curvature says how the loss rises only as far as this is small.
        largest: The largest eigenvalues; None where none was asked for.
        smallest: The smallest, negative where the network stands at no minimum; None where none was asked for.
        trace: None where none was asked for.
        density: None where none was asked for.
        n: Number of samples.
        n_weights: Number of weights.
        passes: Passes over all samples: "gradients" and "products".
    """

    loss: float
    gradient_norm: float
    largest: Eigenvalues | None
    smallest: Eigenvalues | None
    trace: Trace | None
    density: Density | None
    n: int
    n_weights: int
    passes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """Eigenvalues, trace and spectral density of the Hessian of the mean loss in the trainable weights.

    Args:
        matrix: "hessian", or "ggn" for its generalised Gauss–Newton part.
        largest: How many of the largest eigenvalues, at least 0.
        smallest: How many of the smallest, at least 0.
        tolerance: Largest residual > 0 of an eigenvalue, relative to the largest one by absolute value.
        most_steps: Lanczos steps after which the eigenvalues are taken as they are, at least 1; as many vectors of P
            numbers are in memory.
        trace_draws: Products for the trace, 0 for none; "hutch++" takes a multiple of 3, at least 6.
        estimator: "hutch++", which takes the outer part of the spectrum out and leaves only the rest to chance, or
            "hutchinson".
        density_draws: Random starts of the spectral density, 0 for none.
        density_steps: Lanczos steps of each, at least 2; as many vectors of P numbers are in memory.
        batch_size: Samples that go through together, at least 1.
        seed: Seed of all that is drawn.

    Raises:
        UserError: if a value is not as above.

    Source: Lanczos 1950, reorthogonalised; Hutchinson 1989; Hutch++: Meyer, Musco,
    Musco & Woodruff, SOSA 2021 (arXiv 2010.09649); spectral density: Ghorbani, Krishnan & Xiao, ICML 2019 (arXiv
    1901.10159); for networks: Yao et al. 2020 (PyHessian, arXiv 1912.07145).
    """

    matrix: Matrix = "hessian"
    largest: int = 5
    smallest: int = 1
    tolerance: float = 1e-3
    most_steps: int = 100
    trace_draws: int = 30
    estimator: Estimator = "hutch++"
    density_draws: int = 0
    density_steps: int = 40
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("matrix", MATRICES), ("estimator", get_args(Estimator))):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        for name in ("largest", "smallest", "trace_draws", "density_draws", "seed"):
            check_whole(name, getattr(self, name), 0)
        check_whole("density_steps", self.density_steps, 2)
        check_whole("most_steps", self.most_steps)
        check_whole("batch_size", self.batch_size)
        check_positive("tolerance", self.tolerance)
        if self.estimator == "hutch++" and self.trace_draws % 3 + (self.trace_draws == 3):
            raise UserError(
                f"trace_draws must be a multiple of 3, and at least 6, for 'hutch++', got {self.trace_draws}; "
                "take another number or estimator='hutchinson'"
            )

    def measure(
        self,
        model: nn.Module,
        samples: Samples,
        indices: np.ndarray,
        *,
        loss: Loss = cross_entropy,
        progress: Progress = SILENT,
    ) -> CurvatureReport:
        """Compute what was asked for; the network is left as it was.

        Args:
            model: Maps (B, ...) inputs to (B, K) logits; curvature is that in its trainable parameters.
            samples: Where the inputs come from.
            indices: (n,) positions in `samples`, at least one.
            loss: From logits and labels to a loss for each sample.
            progress: Told of each figure.

        Raises:
            UserError: if there is no sample or no trainable parameter, or fewer weights than eigenvalues.
            NonFiniteError: if the loss or its gradient is not finite.
        """
        around = MeanLoss(model, samples, indices, loss=loss, batch_size=self.batch_size)
        if self.largest + self.smallest > around.length:
            raise UserError(f"largest and smallest together must be at most {around.length}, the number of weights")
        matrix = CurvatureMatrix(around, self.matrix)
        value, gradient = around.gradient()
        norm = torch.linalg.vector_norm(_flat(gradient))
        check_finite(torch.stack([value, norm.to(value.dtype)]), "the loss or its gradient")
        ends = self.largest + self.smallest
        progress.start("curvature", sum(1 for n in (ends, self.trace_draws, self.density_draws) if n))
        found: dict[str, Any] = dict.fromkeys(("largest", "smallest", "trace", "density"))
        if ends:
            both = eigenvalues(matrix, self.largest, self.smallest, self.tolerance, self.seed, self.most_steps)
            found["largest"], found["smallest"] = (
                e if n else None for e, n in zip(both, (self.largest, self.smallest))
            )
            progress.advance(note="eigenvalues")
        if self.trace_draws:
            found["trace"] = trace(matrix, self.trace_draws, self.estimator, self.seed)
            progress.advance(note="trace")
        if self.density_draws:
            found["density"] = density(matrix, self.density_draws, self.density_steps, self.seed)
            progress.advance(note="density")
        progress.finish()
        return CurvatureReport(
            loss=float(value), gradient_norm=float(norm), n=around.n, n_weights=around.length,
            passes={name: around.passes[name] for name in ("gradients", "products")}, **found,
        )  # fmt: skip


def eigenvalues(
    matrix: CurvatureMatrix,
    largest: int = 5,
    smallest: int = 1,
    tolerance: float = 1e-3,
    seed: int = 0,
    most_steps: int = 100,
) -> tuple[Eigenvalues, Eigenvalues]:
    """The outermost eigenvalues at both ends, by one run of Lanczos with full reorthogonalisation.

    An eigenvalue counts as found when its residual is at most `tolerance` times the largest eigenvalue by absolute
    value; the error is then smaller still, about the square of the residual over the gap to the next one.
    (ARPACK asks for a residual relative to the eigenvalue itself, which the many eigenvalues near 0 never reach.) Of an
    eigenvalue that occurs several times the run may find one.

    Args:
        matrix: The matrix, with P weights.
        largest: How many of the largest, at least 0.
        smallest: How many of the smallest (most negative), at least 0; both together at most P.
        tolerance: > 0.
        seed: Seed of the start.
        most_steps: Products, and vectors of P numbers in memory, after which what is there is taken.

    Returns:
        The largest, descending, and the smallest, ascending.
    """
    check_whole("largest", largest, 0)
    check_whole("smallest", smallest, 0)
    check_positive("tolerance", tolerance)
    wanted = largest + smallest
    if wanted > len(matrix):
        raise UserError(f"largest and smallest together must be at most {len(matrix)}, the number of weights")
    if not wanted:
        return Eigenvalues((), (), True), Eigenvalues((), (), True)
    run = _Lanczos(matrix, matrix.noise(seed, START))
    while True:
        more = run.step(fresh=lambda j: matrix.noise(seed, START, j))
        if len(run) < wanted or (more and len(run) < most_steps and len(run) % LOOK_EVERY):
            continue
        values, vectors = run.eigen()
        chosen = np.r_[np.arange(len(values) - 1, len(values) - 1 - largest, -1), np.arange(smallest)]
        scale = np.abs(values).max()
        found = run.following * np.abs(vectors[-1, chosen]) <= tolerance * scale
        if found.all() or not more or len(run) >= max(most_steps, wanted):
            break
    units = run.combined(vectors[:, chosen])
    at = torch.as_tensor(values[chosen].copy(), dtype=matrix.dtype, device=units.device)
    residuals = torch.linalg.vector_norm(matrix @ units - units * at, dim=0).tolist()
    upper, lower = slice(largest), slice(largest, wanted)
    return tuple(  # pyright: ignore[reportReturnType]
        Eigenvalues(tuple(values[chosen][part].tolist()), tuple(residuals[part]), bool(found[part].all()))
        for part in (upper, lower)
    )


def trace(matrix: CurvatureMatrix, draws: int, estimator: Estimator = "hutch++", seed: int = 0) -> Trace:
    """The trace from `draws` products with random signs.

    "hutchinson" averages zᵀHz. "hutch++" spends a third of the products on an orthonormal basis Q of H·S with random S,
    takes tr(QᵀHQ) as it is, and Hutchinson's average of the rest, (I − QQᵀ)·H·(I − QQᵀ).

    Args:
        matrix: The matrix.
        draws: At least 1; a multiple of 3 for "hutch++".
        estimator: "hutchinson" or "hutch++".
        seed: Seed of the signs.
    """
    if estimator not in get_args(Estimator):
        raise unknown("estimator", estimator, get_args(Estimator))
    check_whole("draws", draws)
    if estimator == "hutchinson":
        z = torch.stack([matrix.signs(seed, TRACE, j) for j in range(draws)], dim=1)
        return _estimated(0.0, (z * (matrix @ z)).sum(0, dtype=torch.float64), len(matrix), draws)
    if draws % 3:
        raise UserError(f"draws must be a multiple of 3 for 'hutch++', got {draws}")
    third = min(draws // 3, len(matrix))
    sketch = torch.stack([matrix.signs(seed, SKETCH, j) for j in range(third)], dim=1)
    q, _ = torch.linalg.qr(matrix @ sketch)
    inner = float((q * (matrix @ q)).sum(dtype=torch.float64))
    z = torch.stack([matrix.signs(seed, TRACE, j) for j in range(draws // 3)], dim=1)
    z -= q @ (q.T @ z)
    return _estimated(inner, (z * (matrix @ z)).sum(0, dtype=torch.float64), len(matrix), 2 * third + draws // 3)


def diagonal(matrix: CurvatureMatrix, draws: int, seed: int = 0) -> Diagonal:
    """The diagonal from `draws` products with random signs z: the mean of z∘(H·z).

    An entry is off by the sum of z_i·z_j·H_ij over j ≠ i, so that its variance is Σ_j≠i H_ij²/draws, and a diagonal
    matrix comes out exact with one draw.

    Args:
        matrix: The matrix.
        draws: At least 1.
        seed: Seed of the signs.

    Source: Hutchinson 1989; Bekas, Kokiopoulou & Saad, Applied Numerical Mathematics 2007.
    """
    check_whole("draws", draws)
    total = torch.zeros(len(matrix), dtype=torch.float64, device=matrix.around.device)
    squares = torch.zeros_like(total)
    size = at_once(len(matrix), matrix.around.params[0].element_size())
    for first in range(0, draws, size):
        signs = [matrix.signs(seed, DIAGONAL, j) for j in range(first, min(first + size, draws))]
        z = torch.stack(signs, dim=1)
        each = z * (matrix @ z)
        total += each.sum(1, dtype=torch.float64)
        squares += (each.double() ** 2).sum(1)
    mean = total / draws
    error = None
    if draws > 1:
        error = ((squares / draws - mean**2).clamp_(min=0) / (draws - 1)).sqrt_()
    return Diagonal(mean, error, draws)


def density(matrix: CurvatureMatrix, draws: int, steps: int, seed: int = 0) -> Density:
    """The spectral density by stochastic Lanczos quadrature, each draw from a random unit vector.

    Args:
        matrix: The matrix.
        draws: Random starts, at least 1.
        steps: Lanczos steps of each, at least 1; at most P are taken.
        seed: Seed of the starts.
    """
    check_whole("draws", draws)
    check_whole("steps", steps)
    before, steps = matrix.products, min(steps, len(matrix))
    nodes, weights = np.zeros((draws, steps)), np.zeros((draws, steps))
    for draw in range(draws):
        values, shares = _quadrature(matrix, matrix.noise(seed, DENSITY, draw), steps)
        nodes[draw, : len(values)], weights[draw, : len(values)] = values, shares
        nodes[draw, len(values) :] = values[-1]
    return Density(nodes, weights, len(matrix), matrix.products - before)


class _Lanczos:
    """The tridiagonal matrix that Lanczos makes of H from a start, step by step, with full reorthogonalisation.

    Without it, rounding brings the largest eigenvalues back again and again, and a density counts them several times.

    Args:
        matrix: The matrix H.
        start: (P,) any vector but 0.

    Attributes:
        following: Length of the part of H·q that no vector so far explains, for the last vector q.
    """

    def __init__(self, matrix: CurvatureMatrix, start: Tensor) -> None:
        self._matrix = matrix
        self._blocks: list[Tensor] = []
        self._next: Tensor | None = start / torch.linalg.vector_norm(start)
        self._diagonal: list[float] = []
        self._side: list[float] = []
        self._scale = 0.0
        self.following = math.inf

    def __len__(self) -> int:
        return len(self._diagonal)

    def step(self, fresh: Callable[[int], Tensor] | None = None) -> bool:
        """Take another step; False where none is left.

        Args:
            fresh: Gives a vector with which to go on where the vectors so far span a space that H maps into itself; the
                run ends there without it.
        """
        if self._next is None:
            return False
        n, q = len(self), self._next
        if n % BLOCK == 0:
            self._blocks.append(torch.empty(BLOCK, len(q), dtype=q.dtype, device=q.device))
        self._blocks[-1][n % BLOCK] = q
        product = self._matrix @ q
        self._scale = max(self._scale, float(torch.linalg.vector_norm(product)))
        self._diagonal.append(float(product.double() @ q.double()))
        self._orthogonalise(product)
        self.following = float(torch.linalg.vector_norm(product))
        self._next = None
        if len(self) == len(q):
            self.following = 0.0
        elif self.following > 100 * torch.finfo(q.dtype).eps * self._scale:
            self._next = product / self.following
            self._side.append(self.following)
        else:
            self.following = 0.0
            if fresh is not None:
                other = fresh(len(self))
                self._orthogonalise(other)
                self._next = other / torch.linalg.vector_norm(other)
                self._side.append(0.0)
        return self._next is not None

    def eigen(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues, ascending, and eigenvectors (columns) of the tridiagonal matrix so far, in float64."""
        from scipy.linalg import eigh_tridiagonal

        if not np.isfinite([*self._diagonal, *self._side]).all():
            raise NonFiniteError("a product with the matrix is NaN or infinite; the weights or the inputs are broken")
        found: Any = eigh_tridiagonal(np.array(self._diagonal), np.array(self._side[: len(self) - 1]))
        return found

    def combined(self, columns: np.ndarray) -> Tensor:
        """(P, m) combinations of the vectors so far, made of unit length, from (steps, m) coefficients."""
        coefficients = torch.from_numpy(np.ascontiguousarray(columns)).to(self._blocks[0])
        parts = zip(self._used(), coefficients.split(BLOCK))
        vectors = sum(
            (block.T @ part for block, part in parts), torch.zeros((), dtype=coefficients.dtype).to(self._blocks[0])
        )
        return vectors / torch.linalg.vector_norm(vectors, dim=0)

    def _orthogonalise(self, vector: Tensor) -> None:
        for _ in range(2):  # once is not enough where much cancels
            for block in self._used():
                vector -= block.T @ (block @ vector)

    def _used(self) -> list[Tensor]:
        return [block[: len(self) - i * BLOCK] for i, block in enumerate(self._blocks)]


def _quadrature(matrix: CurvatureMatrix, start: Tensor, steps: int) -> tuple[np.ndarray, np.ndarray]:
    run = _Lanczos(matrix, start)
    while run.step() and len(run) < steps:
        pass
    values, vectors = run.eigen()
    return values, vectors[0] ** 2


def _estimated(inner: float, each: Tensor, n_weights: int, products: int) -> Trace:
    values = each.cpu().numpy()
    value = inner + float(values.mean())
    error = None if len(values) == 1 else float(values.std(ddof=1) / math.sqrt(len(values)))
    return Trace(value, error, value / n_weights, products)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])
