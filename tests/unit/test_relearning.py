"""Relearning against fine-tuning written out, and on networks whose forgetting is known to be deep or shallow."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from unsharp.data import ImageSamples
from unsharp.errors import UserError
from unsharp.evaluation.relearning import Attack, RelearnConfig, recovery, relearn
from unsharp.evaluation.relearning_stage import figure
from unsharp.report.relearning import write_relearning
from unsharp.training import TrainConfig, train

N, FORGET = 120, np.arange(0, 120, 3)


def samples(seed: int = 0, n: int = N, side: int = 6) -> ImageSamples:
    """Random images with random labels: what a network knows of them, it knows by heart."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, side, side, 1), dtype=np.uint8)
    return ImageSamples(images, np.arange(n) % 4, ["a", "b", "c", "d"])


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 64), nn.ReLU(), nn.Linear(64, 4))


def trained(seed: int, indices: np.ndarray) -> nn.Module:
    model = network(seed)
    train(model, samples(), indices, TrainConfig(epochs=60, batch_size=16, seed=seed, schedule="constant"))
    return model


def right(model: nn.Module, data: ImageSamples, indices: np.ndarray) -> float:
    batch = next(data.batches(indices, [len(indices)], draws=None))
    return 100 * float((model(batch.inputs).argmax(1) == batch.labels).float().mean())


def test_the_attack_is_fine_tuning_written_out() -> None:
    data, model = samples(), network(1)
    config = RelearnConfig(on="forget", n=10, epochs=3, batch_size=16, lr=0.05, seed=4)
    attack = Attack(config=config, samples=data, forget=FORGET)
    before = copy.deepcopy(model.state_dict())
    rows = attack.run(model)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))

    assert set(attack.tuned_on) | set(attack.judged) == set(FORGET)
    assert not set(attack.tuned_on) & set(attack.judged)
    plain, velocity = copy.deepcopy(model), None
    batch = next(data.batches(attack.tuned_on, [10], draws=None))
    for row in rows:
        assert row["forget_accuracy"] == pytest.approx(right(plain, data, attack.judged))
        assert row["tuned_accuracy"] == pytest.approx(right(plain, data, attack.tuned_on))
        moved = [(a - b).flatten() for a, b in zip(plain.parameters(), model.parameters())]
        assert row["distance"] == pytest.approx(float(torch.cat(moved).detach().norm()), rel=1e-4, abs=1e-6)
        loss = nn.functional.cross_entropy(plain(batch.inputs), batch.labels)  # one batch: its order does not matter
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        velocity = list(gradients) if velocity is None else [0.9 * v + g for v, g in zip(velocity, gradients)]
        with torch.no_grad():
            for p, v in zip(plain.parameters(), velocity):
                p -= 0.05 * v
    assert [row["passes"] for row in rows] == [0, 1, 2, 3]


def test_on_retain_the_forget_set_is_never_shown() -> None:
    attack = Attack(config=RelearnConfig(on="retain", n=50), samples=samples(), forget=FORGET)
    assert len(attack.tuned_on) == 50
    assert not set(attack.tuned_on) & set(FORGET)
    assert np.array_equal(attack.judged, FORGET)


def test_unrelated_samples_are_tuned_on_and_the_forget_set_is_judged() -> None:
    other = samples(seed=9, n=20)
    attack = Attack(config=RelearnConfig(on="other", n=100, epochs=2), samples=samples(), forget=FORGET, other=other)
    rows = attack.run(network(0))
    assert len(attack.tuned_on) == 20
    assert rows[0]["tuned_accuracy"] == pytest.approx(right(network(0), other, np.arange(20)))


def test_shallow_forgetting_comes_back_and_deep_forgetting_does_not() -> None:
    """A shifted bias hides what is known by heart, and retained samples mend it; labels never seen stay unknown."""
    retained = np.setdiff1d(np.arange(N), FORGET)
    networks = {"hidden": trained(0, np.arange(N)), "retrained": trained(1, retained), "another": trained(2, retained)}
    with torch.no_grad():
        for model in networks.values():
            model[3].bias += 4 * torch.tensor([1.0, -1.0, 1.0, -1.0])  # pyright: ignore[reportIndexIssue]
    attack = Attack(
        config=RelearnConfig(on="retain", n=80, epochs=12, batch_size=20, lr=0.02), samples=samples(), forget=FORGET
    )
    rows = relearn(networks, attack)
    curves = {name: [r for r in rows if r["model"] == name] for name in networks}
    shallow = recovery(curves["hidden"], curves["retrained"])  # pyright: ignore[reportArgumentType]
    deep = recovery(curves["another"], curves["retrained"])  # pyright: ignore[reportArgumentType]
    assert shallow["excess"] > 25
    assert abs(deep["excess"]) < 25


def test_recovery_is_the_difference_of_the_gains() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.random(5) * 100, rng.random(5) * 100
    found = recovery(*([{"forget_accuracy": a} for a in curve] for curve in (ours, theirs)))
    assert found["excess"] == pytest.approx((ours[4] - ours[0]) - (theirs[4] - theirs[0]))
    assert found["excess_area"] == pytest.approx(np.mean(ours - ours[0] - theirs + theirs[0]))
    with pytest.raises(UserError, match="same attack"):
        recovery([{"forget_accuracy": 1.0}], [])


def test_the_way_back_is_measured_in_units_of_the_way_there() -> None:
    data, original = samples(), trained(0, np.arange(N))
    forgotten = copy.deepcopy(original)
    with torch.no_grad():
        forgotten[1].weight += 0.01
    attack = Attack(config=RelearnConfig(n=5, epochs=1), samples=data, forget=FORGET)
    rows = attack.run(forgotten, original=original)
    assert rows[0]["to_original"] == pytest.approx(1.0)
    assert rows[1]["to_original"] != 1.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n": 40}, "left to judge"),
        ({"on": "other"}, "unrelated samples"),
        ({"on": "test"}, "forget"),
        ({"n": 0}, "n "),
    ],
)
def test_attacks_that_cannot_be_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Attack(config=RelearnConfig(**options), samples=samples(), forget=FORGET)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="shape"):
        Attack(config=RelearnConfig(on="other"), samples=samples(), forget=FORGET, other=samples(side=5))


@pytest.mark.parametrize("models", [("unlearned", "retrained"), ("unlearned",)])
def test_the_page_names_the_line_of_the_retrained_model_only_where_there_is_one(
    models: tuple[str, ...], tmp_path: Path
) -> None:
    rows = [{"model": m, "seed": 0, "epoch": e, "forget_accuracy": 50.0 + e} for m in models for e in (0, 1)]
    found = {"forget": {"config": {"n": 3}, "rows": rows}}
    write_relearning(tmp_path / "page.html", found, figure(found), ["It came back."], reference="retrained")
    page = (tmp_path / "page.html").read_text()
    assert ("The dashed dark line is the retrained model" in page) == ("retrained" in models)
    assert ("There is no retrained model" in page) == ("retrained" not in models)
