"""The library from Python: any module, any map-style Dataset, ids, and nothing that the caller owns is touched."""

from __future__ import annotations

import copy
import inspect
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import unsharp
from integration.helpers import python
from unsharp import OptimizerConfig, TrainConfig, UserError
from unsharp.methods import Method

N, CLASSES = 96, 3
FORGET = [3, 14, 15, 42, 65, 92]
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 32, "lr": 0.02}
TRAIN = TrainConfig(epochs=20, batch_size=32, optimizer=OptimizerConfig(lr=0.05))


def blobs(n: int = N, seed: int = 0) -> TensorDataset:
    """Three clouds of points."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    centres = 3 * torch.eye(CLASSES, 6)[labels]
    return TensorDataset(centres + torch.randn(n, 6, generator=generator), labels)


class Own(nn.Module):
    """A network as a user writes it: BatchNorm, dropout, a frozen part, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.normalise = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.1)
        self.frozen = nn.Linear(16, 16)
        self.frozen.requires_grad_(False)
        self.last = nn.Linear(16, CLASSES)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.normalise(self.first(x))) * self.scale
        return self.last(self.drop(torch.relu(self.frozen(x))))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    network = Own()
    samples = unsharp.from_torch_dataset(blobs(), device="cpu")
    unsharp.train(network, samples, np.arange(N), TRAIN)
    network.train()
    network.drop.eval()
    return network


def whole_state(network: nn.Module) -> dict[str, Any]:
    """Everything about a network that a careless library would change."""
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return {
        **tensors,
        "identity": [id(p) for p in network.parameters()],
        "strides": [p.stride() for p in network.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in network.parameters()],
        "requires_grad": [p.requires_grad for p in network.parameters()],
        "modes": [m.training for m in network.modules()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in network.modules()],
        "random": torch.get_rng_state(),
    }


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


PAIRS = [
    (name, rule)
    for name, method in unsharp.METHODS.items()
    for rule in ("none", "sam", "asam")
    if method.admits(rule)[0]
]


@pytest.mark.parametrize(("method", "rule"), PAIRS)
def test_every_method_makes_a_new_network_and_leaves_the_old_one(method: str, rule: str, model: nn.Module) -> None:
    before, seeds = whole_state(model), (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    how = QUICK if method != "retrain" else {}
    made = {"make_model": Own, "train_config": TRAIN} if method == "retrain" else {}
    own = {"selection_weight": 1.2} if method == "ssd" else {}  # of so small a set hardly a weight is selected
    forgotten, record = unsharp.unlearn(model, blobs(), FORGET, method, rule=rule, **how, **made, **own)
    after = whole_state(model)
    assert_same({k: v for k, v in before.items() if k != "random"}, {k: v for k, v in after.items() if k != "random"})
    assert seeds == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert forgotten is not model
    assert not any(m.training for m in forgotten.modules())
    assert type(forgotten) is Own
    assert not {id(p) for p in forgotten.parameters()} & set(before["identity"])
    assert torch.equal(forgotten.frozen.weight, model.frozen.weight) or method == "retrain"
    assert not torch.equal(forgotten.last.weight, model.last.weight)
    assert [p.requires_grad for p in forgotten.parameters()] == before["requires_grad"]
    rows = {"retrain": TRAIN.epochs, "influence": 1, "first_order": 1, "second_order": 1, "ssd": 1, "rum": 3 * 2}
    assert len(record.history) == rows.get(method, 2)
    assert record.seconds > 0
    assert record.passes > 0
    assert {"seed", "config", "data", "versions"} <= set(record.about)


def test_equal_calls_give_equal_bits_whatever_the_global_seed(model: nn.Module) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(unsharp.unlearn(model, blobs(), FORGET, "neggrad", rule="sam", **QUICK).model.state_dict())
    assert_same(dict(results[0]), dict(results[1]))
    other = unsharp.unlearn(model, blobs(), FORGET, "neggrad", rule="sam", seed=1, **QUICK).model.state_dict()
    assert not torch.equal(other["last.weight"], results[0]["last.weight"])


def test_parameter_groups(model: nn.Module) -> None:
    """The last layer stands still at a rate of 0; the other group moves."""
    seen: list[torch.optim.Optimizer] = []

    def make(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        last = [p for n, p in named if n.startswith("last")]
        rest = [p for n, p in named if not n.startswith("last")]
        assert all(p.requires_grad for _, p in named)
        seen.append(torch.optim.AdamW([{"params": rest, "lr": 0.01}, {"params": last, "lr": 0.0}], weight_decay=0.0))
        return seen[0]

    forgotten, _ = unsharp.unlearn(
        model, blobs(), FORGET, "sharp_minmax", make_optimizer=make, epochs=1, batch_size=32, schedule="cosine"
    )
    assert len(seen) == 1
    assert torch.equal(forgotten.last.weight, model.last.weight)
    assert not torch.equal(forgotten.first.weight, model.first.weight)


class Noisy(Dataset[Any]):
    """Each item draws from every global generator, as transforms do."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        x, y = self.data[i]
        noise = random.gauss(0, 1) + np.random.normal() + float(torch.randn(()))  # noqa: NPY002
        return x + 0.01 * noise, int(y)


def test_a_dataset_with_random_items_gives_equal_bits(model: nn.Module) -> None:
    results = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        results.append(unsharp.unlearn(model, Noisy(blobs()), FORGET, "neggrad", **QUICK))
    assert_same(*(dict(r.model.state_dict()) for r in results))
    assert results[0].record.about["data"] is None
    named = unsharp.unlearn(model, Noisy(blobs()), FORGET, "neggrad", fingerprint="noisy-1", **QUICK)
    assert named.record.about["data"] == "noisy-1"


def test_ids_of_text_and_other_ways_to_say_what_to_forget(model: nn.Module) -> None:
    names = [f"person-{i}" for i in range(N)]
    samples = unsharp.from_torch_dataset(blobs(), device="cpu", ids=names)
    by_name = unsharp.unlearn(model, samples, [names[i] for i in FORGET], "neggrad", **QUICK)
    by_position = unsharp.unlearn(model, blobs(), np.array(FORGET), "neggrad", **QUICK)
    assert_same(dict(by_name.model.state_dict()), dict(by_position.model.state_dict()))
    chosen = unsharp.unlearn(model, blobs(), unsharp.ForgetConfig(classes=(1,)), "finetune", **QUICK)
    assert chosen.record.passes == 2 * 2  # 64 samples are left, in batches of 32
    with pytest.raises(UserError, match="person-7, 14"):
        unsharp.unlearn(model, samples, ["person-3", "person-7, 14"], "neggrad", **QUICK)
    for wrong, message in (([], "empty"), ([3, 3], "more than once"), ([N], "96"), (range(N), "all 96"), ("3", "list")):
        with pytest.raises(UserError, match=message):
            unsharp.unlearn(model, blobs(), wrong, "neggrad", **QUICK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "sharp_minmx"}, "did you mean 'sharp_minmax'"),
        ({"rule": "sma"}, "did you mean 'sam'"),
        ({"alpha": 1.5}, r"\[0, 1\]"),
        ({"alhpa": 0.5}, "did you mean 'alpha'"),
        ({"epochs": 0}, "epochs"),
        ({"optimizer": "adamm"}, "did you mean 'adam'"),
        ({"method": "retrain"}, "make_model"),
        ({"make_model": Own}, "together"),
    ],
)
def test_mistakes(arguments: dict[str, Any], message: str, model: nn.Module) -> None:
    before = whole_state(model)
    with pytest.raises(UserError, match=message):
        unsharp.unlearn(model, blobs(), FORGET, **arguments)
    assert_same(before, whole_state(model))


def test_evaluate_without_test_set_and_reference(model: nn.Module) -> None:
    before = whole_state(model)
    values = unsharp.evaluate(model, blobs(), FORGET)
    assert_same(before, whole_state(model))
    assert values["test_accuracy"] is None
    assert values["tow"] is None
    assert values["gap"] is None
    assert values["reference"] is None
    assert set(values["reasons"]) >= {"test_accuracy", "tow", "gap"}
    assert all(v is None for v in values["mia"].values())
    with torch.no_grad():
        network = copy.deepcopy(model).eval()
        x, y = blobs().tensors
        right = (network(x).argmax(1) == y).double()
    retained = np.setdiff1d(np.arange(N), FORGET)
    assert values["retain_accuracy"] == pytest.approx(100 * float(right[retained].mean()))
    assert values["forget_accuracy"] == pytest.approx(100 * float(right[FORGET].mean()))


def test_evaluate_beside_a_reference(model: nn.Module, tmp_path: Path) -> None:
    forgotten, record = unsharp.unlearn(model, blobs(), FORGET, "neggrad", **QUICK)
    tests = blobs(60, seed=1)
    made = unsharp.evaluate(
        forgotten, blobs(), FORGET, test_set=tests, record=record, original=model, make_model=Own, train_config=TRAIN,
        store=tmp_path / "store", attacks=["threshold_confidence"],
    )  # fmt: skip
    retrained = unsharp.unlearn(model, blobs(), FORGET, "retrain", make_model=Own, train_config=TRAIN)
    given = unsharp.evaluate(
        forgotten, blobs(), FORGET, test_set=tests, record=record, reference=retrained.model,
        attacks=["threshold_confidence"],
    )  # fmt: skip
    for name in ("retain_accuracy", "forget_accuracy", "test_accuracy", "tow", "tow_signed", "mia"):
        assert made[name] == given[name]
        assert made["gap"][name] == given["gap"][name]
    assert made["passes"] == record.passes
    assert made["seconds"] == record.seconds
    assert made["gap"]["passes"] == record.passes - made["reference"]["passes"]
    assert given["gap"]["passes"] is None
    assert made["original"]["retain_accuracy"] > 80
    assert len(list((tmp_path / "store").iterdir())) == 1


def test_references_are_kept_for_steady_or_named_data_only(model: nn.Module, tmp_path: Path) -> None:
    def evaluate(data: Any, store: str, **more: Any) -> list[Path]:
        how: dict[str, Any] = {"make_model": Own, "train_config": TRAIN, "attacks": []}
        unsharp.evaluate(model, data, FORGET, store=tmp_path / store, **how, **more)
        return sorted((tmp_path / store).glob("*")) if (tmp_path / store).exists() else []

    assert evaluate(Noisy(blobs()), "noisy") == []
    (kept,) = evaluate(Noisy(blobs()), "named", fingerprint="blobs with noise")
    written = (kept / "run.json").stat().st_mtime_ns
    assert evaluate(Noisy(blobs()), "named", fingerprint="blobs with noise") == [kept]
    assert (kept / "run.json").stat().st_mtime_ns == written
    assert len(evaluate(Noisy(blobs()), "named", fingerprint="others")) == 2
    (steady,) = evaluate(blobs(), "steady")
    assert evaluate(blobs(), "steady") == [steady]
    assert len(evaluate(blobs(seed=2), "steady")) == 2


def test_a_rule_and_a_method_may_be_objects(model: nn.Module) -> None:
    named = unsharp.unlearn(model, blobs(), FORGET, "neggrad", rule="sam", rho=0.1, alpha=0.9, **QUICK)
    method, rule = unsharp.METHODS["neggrad"](alpha=0.9), unsharp.RULES["sam"](rho=0.1)
    assert isinstance(method, Method)
    objects = unsharp.unlearn(model, blobs(), FORGET, method, rule=rule, **QUICK)
    assert_same(dict(named.model.state_dict()), dict(objects.model.state_dict()))
    assert named.record.about == objects.record.about


def test_public_names_have_docstrings() -> None:
    for name in unsharp.__all__:
        value = getattr(unsharp, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert (value.__doc__ or "").strip(), name
            assert not (value.__doc__ or "").startswith(f"{name}("), f"{name} has no docstring of its own"
    assert set(unsharp.__all__) <= set(dir(unsharp))
    with pytest.raises(AttributeError, match="nothing"):
        unsharp.nothing  # noqa: B018


BLOCKED = """
import sys
for name in ("scipy", "sklearn", "pandas", "pyarrow", "datasets", "rich", "tyro", "jinja2", "matplotlib", "PIL",
             "transformers", "timm", "torchvision"):
    sys.modules[name] = None
"""


def test_import_is_quick() -> None:
    script = """
import time, torch, numpy, safetensors.torch
start = time.perf_counter()
import unsharp
print(time.perf_counter() - start)
unsharp.unlearn, unsharp.evaluate
print(time.perf_counter() - start)
"""
    answer = python("-c", script)
    assert answer.code == 0, answer.err
    bare, with_unlearn = map(float, answer.out.split())
    assert bare < 0.2
    assert with_unlearn < 1.0


def test_training_and_unlearning_need_torch_numpy_and_safetensors_only(tmp_path: Path) -> None:
    script = (
        BLOCKED
        + """
import torch, unsharp
from torch import nn
from torch.utils.data import TensorDataset
torch.set_num_threads(1)
for name in unsharp.__all__:
    getattr(unsharp, name)
data = TensorDataset(torch.randn(40, 4), torch.arange(40) % 2)
make = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
config = unsharp.TrainConfig(epochs=1, batch_size=16)
for method in unsharp.METHODS:
    more = {"make_model": make, "train_config": config} if method == "retrain" else {"epochs": 1}
    forgotten, record = unsharp.unlearn(make(), data, [1, 2, 3], method, **more)
print("done", record.passes)
"""
    )
    answer = python("-c", script)
    assert answer.code == 0, answer.err
    assert answer.out.startswith("done")
    refused = python("-c", BLOCKED + "import scipy")
    assert refused.code == 1
    assert "import of scipy halted" in refused.err
