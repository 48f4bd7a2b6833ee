"""The picture of features: planes against scikit-learn, alignment against known rotations, and what is drawn."""

import re
import sys
import types

import numpy as np
import pytest
from scipy.stats import ortho_group
from sklearn.decomposition import PCA

from unsharp.errors import UserError
from unsharp.evaluation import Outputs, Predictions
from unsharp.report import embedding as module
from unsharp.report.embedding import EmbeddingConfig, draw, embed, largest_forget_class, principal_plane, procrustes

DIM = 6
RAW = {"normalise": False}


def network(move: float = 0.0, turn: np.ndarray | None = None, seed: int = 0) -> Outputs:
    """A network whose forget samples lie `move` off, all features turned and shifted where `turn` is given."""
    draws = np.random.default_rng(seed)
    labels = np.arange(80) % 4, np.array([2, 1, 2, 0, 2, 1, 3, 3])
    scale = np.array([5.0, 3, 1, 1, 0.5, 0.2])
    retain, forget = (draws.normal(2, 1, (len(y), DIM)) * scale for y in labels)
    forget = forget + move * np.eye(DIM)[0]
    if turn is not None:
        retain, forget = retain @ turn + 7, forget @ turn + 7
    return Outputs(*(Predictions(np.zeros((len(y), 4)), y, x) for x, y in zip((retain, forget), labels)))


def features(found: Outputs) -> tuple[np.ndarray, np.ndarray]:
    assert found.retain.features is not None
    assert found.forget.features is not None
    return found.retain.features.astype(np.float64), found.forget.features.astype(np.float64)


def test_the_plane_is_that_of_scikit_learn_with_signs_fixed() -> None:
    x = np.concatenate(features(network()))
    plane, fitted = principal_plane(x), PCA(2).fit(x)
    signs = np.sign((plane.directions * fitted.components_).sum(axis=1))
    assert plane.directions == pytest.approx(fitted.components_ * signs[:, None], rel=1e-9, abs=1e-12)
    assert plane(x) == pytest.approx(fitted.transform(x) * signs, rel=1e-9, abs=1e-12)
    assert plane.share(x) == pytest.approx(fitted.explained_variance_ratio_.sum(), rel=1e-12)
    assert (plane.directions[[0, 1], np.abs(plane.directions).argmax(axis=1)] > 0).all()
    again = principal_plane(2 * x.mean(axis=0) - x)  # mirrored at the mean: the same directions, signs and all
    assert again.directions == pytest.approx(plane.directions, rel=1e-9, abs=1e-12)
    line = principal_plane(x[:, :1])
    assert line(x[:, :1])[:, 1].tolist() == [0] * len(x)
    assert principal_plane(np.ones((3, 4))).share(np.ones((3, 4))) == 1


def test_procrustes_finds_a_rotation_and_never_scales() -> None:
    x, turn = features(network())[0], ortho_group.rvs(DIM, random_state=1)
    found, start, end = procrustes(x @ turn + 3, x)
    assert (x @ turn + 3 - start) @ found + end == pytest.approx(x, abs=1e-9)
    found, start, end = procrustes(2 * x, x)
    assert found @ found.T == pytest.approx(np.eye(DIM), abs=1e-12)
    assert (2 * x - start) @ found + end != pytest.approx(x, abs=1e-2)


def test_a_network_that_differs_by_a_rotation_lies_where_the_first_does() -> None:
    turn = ortho_group.rvs(DIM, random_state=1)
    networks = {"Original": network(), "Turned": network(turn=turn)}
    first, second = embed(networks, EmbeddingConfig(**RAW)).networks
    assert second.retain == pytest.approx(first.retain, abs=1e-4)
    assert second.forget == pytest.approx(first.forget, abs=1e-4)
    assert second.share == pytest.approx(first.share, rel=1e-5)
    assert max(second.retain_moved, second.forget_moved) < 1e-4
    projected = embed(networks, EmbeddingConfig(align="project", **RAW)).networks[1]
    assert projected.forget_moved > 5


def test_the_movement_of_forget_samples_is_not_aligned_away() -> None:
    turn = ortho_group.rvs(DIM, random_state=2)
    networks = {"Original": network(), "Unlearned": network(move=4.0, turn=turn)}
    found = embed(networks, EmbeddingConfig(n_retain=5, **RAW)).networks[1]
    assert found.forget_moved == pytest.approx(4.0, rel=1e-4)
    assert found.retain_moved < 1e-4


def test_samples_shown_are_the_same_in_all_networks_and_of_the_class_asked_for() -> None:
    networks = {"a": network(), "b": network(move=1.0), "c": network(seed=3)}
    found = embed(networks, EmbeddingConfig(n_retain=10, n_forget=3, only_class=2))
    labels = networks["a"].retain.labels[found.retain_rows], networks["a"].forget.labels[found.forget_rows]
    assert [set(y) for y in labels] == [{2}, {2}]
    assert [len(y) for y in labels] == [10, 3]
    assert all(n.retain.shape == (10, 2) and n.forget.shape == (3, 2) for n in found.networks)
    again = embed(networks, EmbeddingConfig(n_retain=10, n_forget=3, only_class=2))
    other = embed(networks, EmbeddingConfig(n_retain=10, n_forget=3, only_class=2, seed=1))
    assert np.array_equal(found.retain_rows, again.retain_rows)
    assert not np.array_equal(found.retain_rows, other.retain_rows)
    x = np.concatenate([a[rows] for a, rows in zip(features(networks["a"]), (found.retain_rows, found.forget_rows))])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    expected = principal_plane(x)(x)
    assert np.concatenate([found.networks[0].retain, found.networks[0].forget]) == pytest.approx(expected, abs=1e-12)
    assert largest_forget_class(networks["a"]) == 2


def test_the_picture_tells_the_sets_apart_by_shape_and_colour() -> None:
    found = embed({"Original": network(), "A < B": network(move=3.0), "Retrained": network(seed=1)})
    svg = draw(found)
    assert svg == draw(found)
    assert svg.count("principal direction 1") == 3
    assert svg.count("principal direction 2") == 1
    for words in ("Original", "A &lt; B", "retain (80 shown)", "forget (8 shown)", "movement from original"):
        assert words in svg
    assert len(re.findall(r"plane holds \d+ % of variance", svg)) == 3
    assert len(re.findall(r"moved: forget \d\.\d\d, retain \d\.\d\d", svg)) == 2
    # Every sample in every plot, and one of each in the legend.
    assert len(re.findall(rf"<use [^>]*stroke: {module.RETAIN}", svg)) == 3 * 80 + 1
    assert len(re.findall(rf"<use [^>]*fill: {module.FORGET}", svg)) == 3 * 8 + 1
    assert len(re.findall(rf"<path [^>]*stroke: {module.MOVED}", svg)) == 2 * 8 + 1
    circles, triangles = (
        {re.search(r'href="#(\w+)"', use)[1] for use in re.findall(rf"<use [^>]*{colour}[^>]*>", svg)}  # type: ignore[index]
        for colour in (f"stroke: {module.RETAIN}", f"fill: {module.FORGET}")
    )
    assert not circles & triangles
    alone = draw(embed({"Original": network()}, EmbeddingConfig(only_class=2)), class_names=["a", "b", "cat", "d"])
    assert "movement" not in alone
    assert "retain of class cat (20 shown)" in alone


def test_colours_differ_in_lightness() -> None:
    def lightness(colour: str) -> float:
        linear = [(int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]
        return 116 * float(np.dot([0.2126, 0.7152, 0.0722], linear)) ** (1 / 3) - 16

    assert lightness(module.RETAIN) > lightness(module.FORGET) + 25


def test_all_plots_have_equal_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(module, "as_svg", lambda figure: seen.extend(figure.axes) or "")
    draw(embed({"Original": network(), "Moved": network(move=9.0)}, EmbeddingConfig(**RAW)))
    (x, y), rest = (seen[0].get_xlim(), seen[0].get_ylim()), seen[1:]
    assert all(ax.get_xlim() == x and ax.get_ylim() == y for ax in rest)
    assert x[1] - x[0] == pytest.approx(y[1] - y[0])
    assert all(ax.get_aspect() == 1 for ax in seen)


def test_umap_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UserError, match=r"pip install 'unsharp\[umap\]'"):
        embed({"Original": network()}, EmbeddingConfig(layout="umap"))


def test_umap_gets_standardised_features_and_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict = {}

    class Mapper:
        def __init__(self, **how) -> None:
            asked.update(how)

        def fit(self, x: np.ndarray) -> None:
            asked["fitted"] = x

        def transform(self, x: np.ndarray) -> np.ndarray:
            return x[:, :2].astype(np.float32)

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=Mapper))
    found = embed({"a": network(), "b": network(move=1.0)}, EmbeddingConfig(layout="umap", seed=5))
    assert asked["metric"] == "correlation"
    assert asked["random_state"] == 5
    assert asked["fitted"].mean(axis=0) == pytest.approx(np.zeros(DIM), abs=1e-9)
    assert asked["fitted"].std(axis=0) == pytest.approx(np.ones(DIM))
    assert found.networks[0].share is None
    assert "UMAP 1" in (svg := draw(found))
    assert "of variance" not in svg


def test_mistakes_are_refused() -> None:
    bare = Outputs(*(Predictions(p.logits, p.labels) for p in (network().retain, network().forget)))
    fewer = Outputs(*(Predictions(p.logits, p.labels, p.features[:, :4]) for p in (network().retain, network().forget)))  # type: ignore[index]
    others = Outputs(network().retain, Predictions(np.zeros((8, 4)), np.zeros(8, dtype=int), np.ones((8, DIM))))
    for networks, words in (
        ({}, "networks is empty"),
        ({"a": bare}, "'a' comes without features"),
        ({"a": network(), "b": fewer}, "'b' has 4 features, the first has 6"),
        ({"a": network(), "b": others}, "'b' must be evaluated on the same forget samples"),
    ):
        with pytest.raises(UserError, match=words):
            embed(networks)
    with pytest.raises(UserError, match="2 retain sample\\(s\\) of class 9 are needed"):
        embed({"a": network()}, EmbeddingConfig(only_class=9))
    with pytest.raises(UserError, match="share no class"):
        largest_forget_class(
            Outputs(Predictions(np.zeros((2, 2)), np.zeros(2)), Predictions(np.zeros((2, 2)), np.ones(2)))
        )
    with pytest.raises(UserError, match="did you mean 'procrustes'"):
        EmbeddingConfig(align="procrustis")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="n_retain must be at least 2, got 1"):
        EmbeddingConfig(n_retain=1)
