"""Where retain and forget samples lie in a network's features, before and after, on one pair of axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from unsharp.errors import UserError, unknown
from unsharp.evaluation.features import prepared
from unsharp.evaluation.predictions import Outputs, check_seed
from unsharp.report.figures import as_svg, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Align = Literal["project", "procrustes"]
Layout = Literal["pca", "umap"]
ALIGNMENTS: tuple[Align, ...] = ("procrustes", "project")
ALIGNED_ON = 10_000
"""Most retain samples that an alignment is found on."""
LAYOUTS: tuple[Layout, ...] = ("pca", "umap")

RETAIN, FORGET, MOVED = "#8fb8d4", "#b23c00", "#333333"
"""Blue and vermilion keep apart for colour-blind eyes and, the one pale and the other dark, in grey."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """How features become a picture.

    Args:
        layout: "pca", the two directions of largest variance; "umap", neighbourhoods (extra `umap`).
        align: How the other networks come onto the axes of the first: "procrustes" turns, mirrors and shifts their
            features first, as near to the first network's as that brings them; "project" takes them as they are, which
            only a network that descends from the first allows.
        normalise: Whether a feature vector counts by its direction only.
        only_class: Show the samples of this class only; None shows all.
        n_retain: Most retain samples shown, ≥ 2.
        n_forget: Most forget samples shown, ≥ 1.
        seed: Seed of which samples are shown and of UMAP, ≥ 0.

    Raises:
        UserError: if a value is out of range.
    """

    layout: Layout = "pca"
    align: Align = "procrustes"
    normalise: bool = True
    only_class: int | None = None
    n_retain: int = 600
    n_forget: int = 150
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("layout", self.layout, LAYOUTS), ("align", self.align, ALIGNMENTS)):
            if value not in known:
                raise unknown(name, value, known)
        for name, least in (("n_retain", 2), ("n_forget", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        check_seed(self.seed)


@dataclass(frozen=True, eq=False)
class Shown:
    """One network in the picture.

    Args:
        name: What stands above it.
        retain: (n, 2) float64, where the retain samples lie.
        forget: (m, 2) float64, where the forget samples lie.
        share: Share, in [0, 1], of the variance of this network's features that the plane holds; None with UMAP.
        retain_moved: Mean distance, in all dimensions, between the features of the retain samples shown here and in
            the first network, after alignment; 0 for the first.
        forget_moved: Likewise of the forget samples.
    """

    name: str
    retain: np.ndarray
    forget: np.ndarray
    share: float | None
    retain_moved: float
    forget_moved: float


@dataclass(frozen=True, eq=False)
class Embedding:
    """Several networks on the axes of the first, the same samples in the same order in each.

    Args:
        networks: The first is the one whose axes these are.
        retain_rows: (n,) which retain samples are shown.
        forget_rows: (m,) which forget samples are shown.
        config: How it was made.
    """

    networks: tuple[Shown, ...]
    retain_rows: np.ndarray
    forget_rows: np.ndarray
    config: EmbeddingConfig


Pair = tuple[np.ndarray, np.ndarray]
"""Features of retain and of forget samples."""


Plane = Callable[[np.ndarray], np.ndarray]
"""A map from features (n, D) to the plane (n, 2)."""

# --- planes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PrincipalPlane:
    """The two directions of largest variance of the features it was fitted to.

    Args:
        centre: (D,) float64, their mean.
        directions: (2, D) float64, orthonormal; the entry of largest magnitude in each is positive, which fixes the
            sign that a singular value decomposition leaves open.
    """

    centre: np.ndarray
    directions: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """The coordinates (n, 2) of features (n, D)."""
        return (features - self.centre) @ self.directions.T

    def share(self, features: np.ndarray) -> float:
        """The share of the variance of features (n, D) that lies in this plane; 1 where there is no variance."""
        x = features - features.mean(axis=0)
        whole = float((x * x).sum())
        return float(((x @ self.directions.T) ** 2).sum()) / whole if whole > 0 else 1.0


def principal_plane(features: np.ndarray) -> PrincipalPlane:
    """Fit a plane to features (n, D) float64, n ≥ 2, by a singular value decomposition; a D of 1 gives a line."""
    centre = features.mean(axis=0)
    directions = np.linalg.svd(features - centre, full_matrices=False)[2][:2]
    largest = np.abs(directions).argmax(axis=1)
    signs = np.where(directions[np.arange(len(directions)), largest] < 0, -1.0, 1.0)
    found = np.zeros((2, features.shape[1]))
    found[: len(directions)] = directions * signs[:, None]
    return PrincipalPlane(centre, found)


def umap_plane(features: np.ndarray, seed: int) -> Plane:
    """Fit UMAP (correlation metric, standardised features, as in the paper) to features (n, D).

    Raises:
        UserError: if umap-learn is not installed.
    """
    try:
        from umap import UMAP  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "layout='umap' needs umap-learn; install it with `pip install 'unsharp[umap]'`, or take layout='pca'"
        ) from None
    mean, std = features.mean(axis=0), features.std(axis=0)
    std[std == 0] = 1.0
    neighbours = min(15, len(features) - 1)
    mapper = UMAP(metric="correlation", n_neighbors=neighbours, random_state=seed, n_jobs=1)
    mapper.fit((features - mean) / std)
    return lambda x: np.asarray(mapper.transform((x - mean) / std), dtype=np.float64)


def procrustes(features: np.ndarray, onto: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rotation or reflection, with a shift, that brings features nearest to others of the same samples.

    Args:
        features: (n, D) float64.
        onto: (n, D) float64, the same samples in the same order.

    Returns:
        (turn (D, D), from (D,), to (D,)): (x − from) @ turn + to is the aligned x. Nothing is scaled.

    Source: Schönemann 1966; computed by SciPy.
    """
    from scipy.linalg import orthogonal_procrustes

    start, end = features.mean(axis=0), onto.mean(axis=0)
    turn, _ = orthogonal_procrustes(features - start, onto - end)
    return turn, start, end


# --- the embedding ----------------------------------------------------------------------------------------------------


def embed(networks: Mapping[str, Outputs], config: EmbeddingConfig | None = None) -> Embedding:
    """Bring the features of several networks onto the axes of the first.

    The axes are fitted to the first network's features of the samples shown. With `align="procrustes"` the alignment is
    found on retain samples alone, shown or not: what the forget samples did must not be turned away.

    Args:
        networks: By the name that stands above each, all on the same samples, all with features; the first is the
            original, as a rule.
        config: How; PCA of normalised features by default.

    Raises:
        UserError: if features are missing or do not fit, or no sample is of the class asked for.
    """
    how = config or EmbeddingConfig()
    sets = [_features(name, found, how.normalise) for name, found in networks.items()]
    if not sets:
        raise UserError("networks is empty; at least one is needed")
    first = next(iter(networks.values()))
    for (name, found), ours in zip(networks.items(), sets):
        _check_alike(name, found, first, ours, sets[0])
    retain_rows = _rows("retain", first.retain.labels, how.only_class, how.n_retain, 2, [how.seed, 0])
    forget_rows = _rows("forget", first.forget.labels, how.only_class, how.n_forget, 1, [how.seed, 1])
    shown = [(retain[retain_rows], forget[forget_rows]) for retain, forget in sets]
    if how.align == "procrustes":
        some = _rows("retain", first.retain.labels, None, ALIGNED_ON, 1, [how.seed, 2])
        shown[1:] = [_turned(pair, retain[some], sets[0][0][some]) for pair, (retain, _) in zip(shown[1:], sets[1:])]
    return Embedding(tuple(_laid_out(list(networks), shown, how)), retain_rows, forget_rows, how)


def _turned(pair: Pair, retain: np.ndarray, onto: np.ndarray) -> Pair:
    turn, start, end = procrustes(retain, onto)
    return (pair[0] - start) @ turn + end, (pair[1] - start) @ turn + end


def _laid_out(names: Sequence[str], sets: Sequence[Pair], how: EmbeddingConfig) -> list[Shown]:
    base = np.concatenate(sets[0])
    plane: Plane = umap_plane(base, how.seed) if how.layout == "umap" else principal_plane(base)
    laid_out = []
    for name, pair in zip(names, sets):
        share = plane.share(np.concatenate(pair)) if isinstance(plane, PrincipalPlane) else None
        moved = (float(np.linalg.norm(now - before, axis=1).mean()) for now, before in zip(pair, sets[0]))
        laid_out.append(Shown(name, plane(pair[0]), plane(pair[1]), share, *moved))
    return laid_out


def _features(name: str, found: Outputs, normalise: bool) -> Pair:
    retain, forget = found.retain.features, found.forget.features
    if retain is None or forget is None:
        raise UserError(f"network {name!r} comes without features; collect them with `outputs_with_features`")
    return prepared(retain, normalise), prepared(forget, normalise)


def _check_alike(name: str, found: Outputs, first: Outputs, ours: Pair, base: Pair) -> None:
    for split in ("retain", "forget"):
        if not np.array_equal(getattr(found, split).labels, getattr(first, split).labels):
            raise UserError(f"network {name!r} must be evaluated on the same {split} samples as the first, in order")
    if ours[0].shape[1] != base[0].shape[1]:
        raise UserError(
            f"network {name!r} has {ours[0].shape[1]} features, the first has {base[0].shape[1]}; only networks of "
            "equally many features fit onto the same axes"
        )


def _rows(split: str, labels: np.ndarray, only: int | None, most: int, least: int, seed: list[int]) -> np.ndarray:
    rows = np.arange(len(labels)) if only is None else np.flatnonzero(labels == only)
    if len(rows) < least:
        where = "" if only is None else f" of class {only}"
        raise UserError(f"{least} {split} sample(s){where} are needed for a picture, there are {len(rows)}")
    return np.sort(np.random.default_rng(seed).permutation(rows)[:most])


def largest_forget_class(outputs: Outputs) -> int:
    """The class of most forget samples among those that the retain set has too; of equals the lowest.

    Raises:
        UserError: if the sets share no class.
    """
    kept = np.unique(outputs.retain.labels)
    shared = outputs.forget.labels[np.isin(outputs.forget.labels, kept)]
    if not len(shared):
        raise UserError("retain and forget samples share no class; leave only_class at None to show all")
    return int(np.bincount(shared).argmax())


# --- the figure -------------------------------------------------------------------------------------------------------


def draw(embedding: Embedding, class_names: Sequence[str] | None = None) -> str:
    """The embedding as SVG: a plot for each network, all with the same axes.

    Retain samples are pale blue circles, forget samples dark vermilion triangles; a thin line leads from where a forget
    sample lay in the first network.

    Args:
        embedding: What `embed` found.
        class_names: Names of the classes, for the title; None prints numbers.
    """
    networks = embedding.networks
    limits = _limits(np.concatenate([points for n in networks for points in (n.retain, n.forget)]))
    with canvas(1.15 + 7.1 / max(len(networks), 2), len(networks), sharey=True) as (figure, axes):
        for i, (ax, network) in enumerate(zip(axes, networks)):
            _cloud(ax, network, networks[0] if i else None)
            ax.set(xlim=limits[0], ylim=limits[1], aspect="equal")
            ax.grid(visible=False)
            ax.set_title(_title(network, first=i == 0), loc="left")
            ax.set_xlabel(_axis(embedding.config, 1))
            ax.tick_params(labelbottom=False, labelleft=False)
        axes[0].set_ylabel(_axis(embedding.config, 2))
        _legend(figure, embedding, class_names)
        return as_svg(figure)


def _cloud(ax: Axes, network: Shown, before: Shown | None) -> None:
    # Hollow and pale behind, full and dark before: the two sets keep apart in grey, too.
    ax.scatter(*network.retain.T, s=11, marker="o", facecolors="none", edgecolors=RETAIN, linewidths=0.8, zorder=2)
    if before is not None:
        ends = np.stack([before.forget, network.forget])
        ax.plot(*ends.transpose(2, 0, 1), color=MOVED, linewidth=0.5, alpha=0.7, zorder=3)
    ax.scatter(
        *network.forget.T, s=17, marker="^", facecolors=FORGET, edgecolors="white", linewidths=0.4, zorder=4
    )  # fmt: skip


def _title(network: Shown, *, first: bool) -> str:
    parts = [] if network.share is None else [f"plane holds {100 * network.share:.0f} % of variance"]
    if not first:
        parts.append(f"moved: forget {network.forget_moved:.2f}, retain {network.retain_moved:.2f}")
    return "\n".join([network.name, *parts])


def _axis(config: EmbeddingConfig, i: int) -> str:
    return f"{'UMAP' if config.layout == 'umap' else 'principal direction'} {i}"


def _limits(points: np.ndarray) -> list[tuple[float, float]]:
    """Limits of both axes, equally far apart, so that all points (n, 2) are in and distances are true."""
    low, high = points.min(axis=0), points.max(axis=0)
    half = 0.54 * float((high - low).max()) or 1.0
    return [(float(middle) - half, float(middle) + half) for middle in (low + high) / 2]


def _legend(figure: Any, embedding: Embedding, class_names: Sequence[str] | None) -> None:
    from matplotlib.lines import Line2D

    first, config = embedding.networks[0], embedding.config
    only = config.only_class
    of = "" if only is None else f" of class {only if class_names is None else class_names[only]}"
    circle: dict[str, Any] = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": RETAIN, "markersize": 4.5}
    triangle: dict[str, Any] = {"marker": "^", "color": FORGET, "markeredgecolor": "white", "markersize": 6}
    handles = [
        Line2D([], [], linestyle="none", label=f"retain{of} ({len(first.retain)} shown)", **circle),
        Line2D([], [], linestyle="none", label=f"forget{of} ({len(first.forget)} shown)", **triangle),
    ]
    if len(embedding.networks) > 1:
        label = f"movement from {first.name[:1].lower()}{first.name[1:]}"
        handles.append(Line2D([], [], color=MOVED, linewidth=0.8, label=label))
    figure.legend(handles=handles, loc="outside upper left", ncols=3, handletextpad=0.5, columnspacing=1.6)
