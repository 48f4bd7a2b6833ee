"""Saliency against a loop over samples, masks against a sort, files against what was written."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call

from unsharp import masks, runtime
from unsharp.data.samples import TensorSamples
from unsharp.errors import NonFiniteError, UserError

quick = settings(deadline=None, max_examples=40)


class Net(nn.Module):
    """BatchNorm, dropout, tied weights, a frozen and an unused parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.again = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.again.weight
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return self.last(self.drop(self.tied(self.again(x).relu()) * self.frozen))


def network(dtype=torch.float32):
    torch.manual_seed(0)
    model = Net().to(dtype)
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model.train()


def data(dtype=torch.float32, n=23):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, 4, generator=generator, dtype=torch.float64).to(dtype)
    return TensorSamples(inputs, torch.randint(0, 3, (n,), generator=generator).numpy(), ("a", "b", "c"))


def by_loop(model, samples, indices):
    """|sum of per-sample gradients|, one sample at a time, by the gradient of minus the log-probability."""
    model = model.eval()
    params = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters() if p.requires_grad}
    sums = {k: torch.zeros_like(p) for k, p in params.items()}
    for i in indices:
        logits = functional_call(model, params, (samples.inputs[i : i + 1],))[0]
        loss = logits.exp().sum().log() - logits[samples.labels[i]]
        for (k, _), g in zip(params.items(), torch.autograd.grad(loss, list(params.values()), allow_unused=True)):
            sums[k] += 0 if g is None else g
    return {k: s.abs() for k, s in sums.items()}


FORGET = np.array([1, 4, 5, 9, 12, 17, 22])


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_saliency_is_the_loop_over_samples(batch_size):
    samples = data(torch.float64)
    expected = by_loop(network(torch.float64), samples, FORGET)
    found = masks.saliency(network(torch.float64), samples, FORGET, batch_size=batch_size)
    assert list(found) == list(expected)
    assert "tied.weight" not in found
    assert "frozen" not in found
    assert found["unused"].eq(0).all()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


def test_saliency_in_float32_depends_on_batches_only_by_rounding():
    one, many = (masks.saliency(network(), data(), FORGET, batch_size=b) for b in (1, 100))
    for name in one:
        assert one[name].dtype == torch.float32
        torch.testing.assert_close(one[name], many[name], rtol=1e-4, atol=1e-6)


def test_saliency_under_autocast_and_no_grad_is_the_same():
    plain = masks.saliency(network(), data(), FORGET)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        other = masks.saliency(network(), data(), FORGET)
    assert all(torch.equal(plain[k], other[k]) for k in plain)


def test_the_model_is_left_as_it_was():
    model = network()
    model.drop.eval()
    model.first.weight.grad = torch.ones_like(model.first.weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    masks.saliency_mask(model, data(), FORGET, fraction=0.1)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert model.norm.training
    assert not model.drop.training
    assert model.first.weight.grad.eq(1).all()
    assert model.last.weight.grad is None
    assert not model.frozen.requires_grad


def test_a_broken_weight_is_named():
    model = network()
    with torch.no_grad():
        model.last.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"last\.weight"):
        masks.saliency(model, data(), FORGET)
    assert model.training


def test_saliency_mask_marks_the_largest():
    model, samples = network(), data()
    flat = torch.cat([v.flatten() for v in masks.saliency(model, samples, FORGET).values()])
    for select, descending in (("largest", True), ("smallest", False)):
        mask = masks.saliency_mask(model, samples, FORGET, fraction=0.25, select=select)
        expected = torch.zeros(len(flat), dtype=torch.bool)
        expected[torch.sort(flat, descending=descending, stable=True).indices[: round(0.25 * len(flat))]] = True
        assert torch.equal(torch.cat([m.flatten() for m in mask.values()]), expected)
        masks.check(mask, model)


levels = st.sampled_from([0.0, 1e-40, 1e-3, 0.5, 1.0, 7.0, 3e38])
shapes = st.lists(st.sampled_from([(), (1,), (5,), (2, 3), (3, 1, 2)]), min_size=1, max_size=4)


@st.composite
def saliencies(draw):
    """A few tensors with many equal values, one of them in another memory order."""
    values = {}
    for i, shape in enumerate(draw(shapes)):
        n = int(np.prod(shape))
        tensor = torch.tensor(draw(st.lists(levels, min_size=n, max_size=n)), dtype=torch.float32).reshape(shape)
        values[f"w{i}"] = tensor.t().contiguous().t() if len(shape) == 2 else tensor
    return values


fractions = st.floats(0, 1, exclude_min=True)


def by_sort(values, fraction, select):
    """The mask by Python's sort of (value, position)."""
    flat = [v for t in values for v in t.flatten().tolist()]
    order = sorted(range(len(flat)), key=lambda i: (-flat[i] if select == "largest" else flat[i], i))
    chosen = set(order[: round(fraction * len(flat))])
    return [i in chosen for i in range(len(flat))]


@quick
@given(saliencies(), fractions, st.sampled_from(["largest", "smallest"]), st.booleans())
def test_select_entries_is_a_sort_with_ties_by_position(values, fraction, select, per_layer):
    mask = masks.select_entries(values, fraction=fraction, select=select, per_layer=per_layer)
    assert {k: m.shape for k, m in mask.items()} == {k: v.shape for k, v in values.items()}
    groups = [[k] for k in values] if per_layer else [list(values)]
    for names in groups:
        found = [v for k in names for v in mask[k].flatten().tolist()]
        assert found == by_sort([values[k] for k in names], fraction, select)


@quick
@given(saliencies(), fractions)
def test_what_is_kept_is_at_least_what_is_dropped(values, fraction):
    mask = masks.select_entries(values, fraction=fraction)
    flat = torch.cat([v.flatten() for v in values.values()])
    kept = torch.cat([m.flatten() for m in mask.values()])
    assert int(kept.sum()) == round(fraction * len(flat))
    if kept.any() and not kept.all():
        assert flat[kept].min() >= flat[~kept].max()


@quick
@given(saliencies(), fractions)
def test_a_mask_and_its_complement_part_the_entries(values, fraction):
    mask = masks.select_entries(values, fraction=fraction)
    other = masks.complement(mask)
    assert all((mask[k] ^ other[k]).all() for k in values)
    assert masks.fraction_of(mask) + masks.fraction_of(other) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_select_entries_in_other_precisions(dtype):
    values = {"w": torch.rand(200, generator=torch.Generator().manual_seed(0)).to(dtype)}
    mask = masks.select_entries(values, fraction=0.3)
    assert mask["w"].tolist() == by_sort([values["w"]], 0.3, "largest")


def test_minus_zero_ties_with_zero_and_negative_values_are_refused():
    mask = masks.select_entries({"w": torch.tensor([-0.0, 0.0, 1.0, -0.0])}, fraction=0.5)
    assert mask["w"].tolist() == [True, False, True, False]
    with pytest.raises(UserError, match="at least 0"):
        masks.select_entries({"w": torch.tensor([-1.0, 2.0])}, fraction=0.5)
    with pytest.raises(NonFiniteError, match="w"):
        masks.select_entries({"w": torch.tensor([float("inf"), 2.0])}, fraction=0.5)


@quick
@given(fractions, st.integers(0, 2**31), st.booleans())
def test_random_masks_have_the_exact_count_and_follow_the_seed(fraction, seed, per_layer):
    model = network()
    mask = masks.random_mask(model, fraction=fraction, per_layer=per_layer, seed=seed)
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    expected = sum(round(fraction * n) for n in sizes) if per_layer else round(fraction * sum(sizes))
    assert sum(int(m.sum()) for m in mask.values()) == expected
    again = masks.saliency_mask(
        model, data(), FORGET, fraction=fraction, select="random", per_layer=per_layer, seed=seed
    )
    assert all(torch.equal(mask[k], again[k]) for k in mask)


def test_random_masks_are_uniform_and_leave_the_random_state():
    model = nn.Linear(4, 5, bias=False)
    state = torch.get_rng_state()
    drawn = torch.stack([masks.random_mask(model, fraction=0.3, seed=s)["weight"].float() for s in range(2000)])
    assert torch.equal(state, torch.get_rng_state())
    # 2000 draws of p = 0.3: four standard errors are 0.041.
    assert (drawn.mean(0) - 0.3).abs().max() < 0.041


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan"), True])
def test_a_fraction_out_of_range_is_refused_before_any_work(fraction):
    def never(_):
        raise AssertionError("the model ran")

    model = network()
    model.forward = never
    with pytest.raises(UserError, match="fraction"):
        masks.saliency_mask(model, data(), FORGET, fraction=fraction)


def test_other_wrong_arguments():
    model = network()
    with pytest.raises(UserError, match="largest"):
        masks.saliency_mask(model, data(), FORGET, fraction=0.1, select="larges")
    with pytest.raises(UserError, match="seed"):
        masks.random_mask(model, fraction=0.1, seed=-1)
    with pytest.raises(UserError, match="at least one sample"):
        masks.saliency_mask(model, data(), [], fraction=0.1)
    with pytest.raises(UserError, match="no trainable"):
        masks.saliency(network().requires_grad_(False), data(), FORGET)


def test_files_keep_mask_and_metadata(tmp_path):
    model = network()
    mask = masks.random_mask(model, fraction=0.4)
    path = tmp_path / "mask.safetensors"
    masks.save(mask, path, {"fraction": 0.4, "rule": "größte", "nested": [1, None]})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with safe_open(path, framework="pt") as file:
        kept = {key: json.loads(value) for key, value in file.metadata().items()}
    assert kept == {"fraction": 0.4, "rule": "größte", "nested": [1, None]}
    for read in (masks.load(path), masks.load(path, model)):
        assert read.keys() == mask.keys()
        assert all(read[k].dtype == torch.bool and torch.equal(read[k], mask[k]) for k in mask)
    assert list(masks.load(path, model)) == list(mask)


def test_a_mask_of_another_model_is_refused_with_what_differs(tmp_path):
    mask = masks.random_mask(network(), fraction=0.4)
    path = tmp_path / "mask.safetensors"
    masks.save({**mask, "last.bias": torch.ones(9, dtype=torch.bool)}, path)
    with pytest.raises(UserError, match=r"last\.bias \(9,\), model \(3,\)"):
        masks.load(path, network())
    lacking = {k: m for k, m in mask.items() if k != "first.bias"}
    with pytest.raises(UserError, match=r"lacks first\.bias and also has other"):
        masks.check({**lacking, "other": mask["first.bias"]}, network())
    with pytest.raises(UserError, match="bool"):
        masks.check({k: m.float() for k, m in mask.items()}, network())


def test_bytes_of_0_and_1_are_read_and_others_refused(tmp_path):
    path = tmp_path / "mask.safetensors"
    save_file({"w": torch.tensor([0, 1, 1], dtype=torch.uint8)}, path, metadata={"by": "hand"})
    assert masks.load(path)["w"].tolist() == [False, True, True]
    for wrong in (torch.tensor([0, 2], dtype=torch.uint8), torch.tensor([0.0, 1.0])):
        save_file({"w": wrong}, path)
        with pytest.raises(UserError, match="0/1"):
            masks.load(path)


def test_missing_truncated_and_unwritable_files(tmp_path):
    path = tmp_path / "mask.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        masks.load(path)
    masks.save(masks.random_mask(network(), fraction=0.4), path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="whole safetensors"):
        masks.load(path)
    path.write_text(json.dumps({"w": 1}))
    with pytest.raises(UserError, match="whole safetensors"):
        masks.load(path)
    with pytest.raises(UserError, match="cannot be written"):
        masks.save({"w": torch.ones(2, dtype=torch.bool)}, path / "mask.safetensors")


def test_full_float32_switches_nothing_else_off():
    library, names = torch.backends.cudnn, ("enabled", "benchmark", "deterministic")
    before = {name: getattr(library, name) for name in names}
    with runtime.full_float32():
        assert {name: getattr(library, name) for name in names} == before
        assert not library.allow_tf32
    assert {name: getattr(library, name) for name in names} == before
