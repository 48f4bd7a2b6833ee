"""The optimiser in anybody's loop: against the formulas, against plain training, and wherever a step goes wrong."""

import contextlib
import copy
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unsharp.errors import NonFiniteError, UserError
from unsharp.sharpness import SAM

BASES = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
]
BASE_IDS = ["sgd", "nesterov", "adamw", "amsgrad", "rmsprop"]
each_base = pytest.mark.parametrize(("base", "kwargs"), BASES, ids=BASE_IDS)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Counter(nn.Module):
    """Replaces its buffer by another tensor, where BatchNorm writes into it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen = self.seen + x.detach().abs().sum()
        return x


NORMS = {
    "batch": lambda: nn.BatchNorm1d(6),
    "cumulative": lambda: nn.BatchNorm1d(6, momentum=None),
    "instance": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, affine=True, track_running_stats=True), nn.Flatten()
    ),
    "counter": Counter,
}
each_norm = pytest.mark.parametrize("norm", NORMS)


def smooth(dtype=torch.float64):
    """A network without random or stateful parts, with tied weights, a frozen and an unused parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3))
    model[4].weight = model[2].weight
    model[0].bias.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    return model.to(dtype)


def stateful(norm="batch"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), NORMS[norm](), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3))


def batches(n=5, dtype=torch.float64, size=8):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, size, 4, generator=g, dtype=torch.float64).to(dtype)
    return list(zip(x, torch.randint(0, 3, (n, size), generator=g)))


def closure_of(optimizer, model, x, y, *, factor=lambda call: 1.0, calls=None, scaler=None):
    """The closure of the documentation; `factor` of the call's number multiplies the loss."""
    calls = [] if calls is None else calls

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).double(), y) * factor(len(calls))
        calls.append(loss.detach())
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    return closure


def masks_for(params, seed=0):
    """0/1 masks of which one lets everything move and one nothing."""
    g = torch.Generator().manual_seed(seed)
    out = [(torch.rand(p.shape, generator=g) < 0.5).to(p.dtype) for p in params]
    out[-1], out[-2] = torch.ones_like(out[-1]), torch.zeros_like(out[-2])
    return out


def state_of(model, optimizer):
    """Everything that a step may change, as copies."""
    return copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()))


def flat(tensors, like):
    return torch.cat([torch.zeros_like(p).flatten() if t is None else t.flatten() for t, p in zip(tensors, like)])


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def textbook(model, params, x, y, *, rho, adaptive, sign, lam, mask, perturb):
    """M∘g on one long vector, straight from the formulas."""
    w = flat(params, params).detach()
    moves = torch.ones_like(w) if mask is None else flat(mask, params)

    def gradient(at):
        with torch.no_grad():
            nn.utils.vector_to_parameters(at, params)
        loss = nn.functional.cross_entropy(model(x), y)
        trained = [p for p in params if p.requires_grad]
        found = dict(zip(map(id, trained), torch.autograd.grad(loss, trained, allow_unused=True)))
        return flat([found.get(id(p)) for p in params], params)

    g0 = gradient(w)
    scale = w.abs() if adaptive else torch.ones_like(w)
    d = g0 * moves if perturb == "region" else g0
    g1 = gradient(w + rho * scale**2 * d / (scale * d).square().sum().sqrt())
    with torch.no_grad():
        nn.utils.vector_to_parameters(w, params)
    return moves * (g0 + {"min": 1, "max": -1}[sign] * lam * (g1 - g0))


@each_base
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize(("sign", "lam"), [("min", 1.0), ("max", 1.0), ("min", 0.3), ("max", 2.0)])
@pytest.mark.parametrize("where", ["everywhere", "region", "all"])
def test_steps_equal_the_formulas(base, kwargs, adaptive, sign, lam, where):
    ours, theirs = smooth(), smooth()
    params, others = list(ours.parameters()), list(theirs.parameters())
    mask = None if where == "everywhere" else masks_for(params)
    how = {"rho": 0.2, "adaptive": adaptive, "sign": sign, "lam": lam}
    how |= {"mask": mask, "perturb": "all" if where == "all" else "region"}
    optimizer = SAM(params, base, **how, **kwargs)
    plain = base(others, **kwargs)
    start = [p.detach().clone() for p in others]
    for x, y in batches():
        optimizer.step(closure_of(optimizer, ours, x, y))
        g = textbook(theirs, others, x, y, **how)
        for p, part in zip(others, g.split([p.numel() for p in others])):
            p.grad = part.view_as(p) if p.requires_grad and p.shape != (2,) else None
        plain.step()
        for p, s, m in zip(others, start, mask or [None] * len(start)):
            if m is not None:
                p.data = torch.where(m.bool(), p.data, s)
    for p, q in zip(params, others):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert not torch.equal(params[1], start[1])


class TwoCalls:
    """The published shape of the algorithm: climb, take the gradient there, come down, step."""

    def __init__(self, params, base, rho, adaptive):
        self.params, self.base, self.rho, self.adaptive = list(params), base, rho, adaptive

    @torch.no_grad()
    def first_step(self):
        self.old = {p: p.clone() for p in self.params if p.grad is not None}
        scales = {p: p.abs() if self.adaptive else 1.0 for p in self.old}
        norm = sum(float((scales[p] * p.grad).square().sum()) for p in self.old) ** 0.5
        for p in self.old:
            p.add_(p.grad * scales[p] ** 2, alpha=self.rho / norm)
            p.grad = None

    @torch.no_grad()
    def second_step(self):
        for p, old in self.old.items():
            p.copy_(old)
        self.base.step()


@each_base
@pytest.mark.parametrize("adaptive", [False, True])
def test_agrees_with_the_two_call_form(base, kwargs, adaptive):
    ours, theirs = smooth(torch.float32), smooth(torch.float32)
    optimizer = SAM(ours.parameters(), base, rho=0.1, adaptive=adaptive, **kwargs)
    plain = base(theirs.parameters(), **kwargs)
    reference = TwoCalls(theirs.parameters(), plain, 0.1, adaptive)
    for x, y in batches(dtype=torch.float32):
        optimizer.step(closure_of(optimizer, ours, x, y))
        for half in (reference.first_step, reference.second_step):
            plain.zero_grad()
            nn.functional.cross_entropy(theirs(x).double(), y).backward()
            half()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@each_base
def test_radius_zero_is_the_base_optimiser(base, kwargs):
    for strength in ({"rho": 0.0}, {"rho": 0.1, "lam": 0.0}):
        ours, theirs = stateful(), stateful()
        optimizer, plain = SAM(ours.parameters(), base, **strength, **kwargs), base(theirs.parameters(), **kwargs)
        calls = []
        for x, y in batches(dtype=torch.float32):
            torch.manual_seed(3)
            optimizer.step(closure_of(optimizer, ours, x, y, calls=calls))
            after = torch.get_rng_state()
            torch.manual_seed(3)
            plain.step(closure_of(plain, theirs, x, y))
            assert torch.equal(after, torch.get_rng_state())
        assert len(calls) == 5
        assert_same(state_of(ours, optimizer), state_of(theirs, plain))


def test_closure_is_called_twice_and_its_first_loss_returned():
    model = smooth()
    optimizer, calls = SAM(model.parameters(), rho=0.1, lr=0.1), []
    loss = optimizer.step(closure_of(optimizer, model, *batches()[0], calls=calls))
    assert len(calls) == 2
    assert loss.detach() == calls[0] < calls[1]


def test_closure_may_return_a_number_or_nothing():
    model = smooth()
    optimizer = SAM(model.parameters(), lr=0.1)
    inner = closure_of(optimizer, model, *batches()[0])
    assert isinstance(optimizer.step(lambda: inner().item()), float)
    assert optimizer.step(lambda: inner() and None) is None


@each_norm
@pytest.mark.parametrize("sign", ["min", "max"])
def test_second_pass_repeats_dropout_and_leaves_no_trace(norm, sign):
    model, once = stateful(norm), stateful(norm)
    optimizer = SAM(model.parameters(), rho=0.5, sign=sign, lr=0.0)
    kept = []
    model[3].register_forward_hook(lambda _m, _i, out: kept.append(out != 0))
    torch.manual_seed(5)
    for x, y in batches(3, torch.float32):
        calls = []
        optimizer.step(closure_of(optimizer, model, x, y, calls=calls))
        assert calls[0] != calls[1]
    after = torch.get_rng_state()
    torch.manual_seed(5)
    for x, _ in batches(3, torch.float32):
        once(x)
    assert torch.equal(after, torch.get_rng_state())
    assert_same(dict(model.named_buffers()), dict(once.named_buffers()))
    assert all(torch.equal(a, b) for a, b in zip(kept[::2], kept[1::2]))
    assert not torch.equal(kept[0], kept[2])


def test_modules_in_evaluation_mode_and_gradient_accumulation():
    """The closure runs two micro-batches; the buffers are those of two plain passes, the gradient is their sum."""
    model, once = stateful(), stateful()
    model[3].p = once[3].p = 0.0
    optimizer, calls = SAM(model.parameters(), rho=0.3, lr=0.1), []
    micro = batches(2, torch.float32)

    def closure():
        optimizer.zero_grad()
        total = torch.zeros(())
        for x, y in micro:
            loss = nn.functional.cross_entropy(model(x), y) / 2
            loss.backward()
            total += loss.detach()
        calls.append([p.grad.clone() for p in model.parameters()])
        return total

    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(closure)
    for x, _ in micro:
        once(x)
    assert_same(dict(model.named_buffers()), dict(once.named_buffers()))
    for p, b, g in zip(model.parameters(), before, calls[1]):
        torch.testing.assert_close(p.detach(), b - 0.1 * g)
    summed = torch.autograd.grad(sum(nn.functional.cross_entropy(once(x), y) / 2 for x, y in micro), once.parameters())
    torch.testing.assert_close(calls[0], list(summed))
    model.eval()
    held = copy.deepcopy(dict(model.named_buffers()))
    optimizer.step(closure)
    assert_same(dict(model.named_buffers()), held)


@pytest.mark.parametrize("masked", [False, True])
def test_clipping_bounds_the_final_masked_gradient(masked):
    ours, theirs = smooth(), smooth()
    params, others = list(ours.parameters()), list(theirs.parameters())
    how = {"rho": 0.2, "adaptive": False, "sign": "max", "lam": 1.0, "perturb": "region"}
    how["mask"] = masks_for(params) if masked else None
    optimizer = SAM(params, **how, lr=1.0)
    x, y = batches()[0]
    start = flat(params, params).detach()
    optimizer.step(closure_of(optimizer, ours, x, y), clip_norm=0.01)
    g = textbook(theirs, others, x, y, **how)
    assert g.norm() > 0.02
    torch.testing.assert_close(start - flat(params, params), g * 0.01 / (g.norm() + 1e-6), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bound_that_bounds_nothing_is_refused(clip_norm):
    model, calls = smooth(), []
    optimizer = SAM(model.parameters(), lr=1.0)
    with pytest.raises(UserError, match="clip_norm"):
        optimizer.step(closure_of(optimizer, model, *batches()[0], calls=calls), clip_norm=clip_norm)
    assert not calls


def test_groups_have_their_own_rates():
    model, calls = smooth(), []
    first, rest = [model[0].weight], [p for p in model.parameters() if p is not model[0].weight]
    optimizer = SAM([{"params": first, "lr": 0.5}, {"params": rest}], torch.optim.SGD, rho=0.1, lr=0.01)
    before = [p.detach().clone() for p in first + rest]
    inner, grads = closure_of(optimizer, model, *batches()[0], calls=calls), []

    def closure():
        loss = inner()
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in first + rest])
        return loss

    optimizer.step(closure)
    for p, b, g, lr in zip(first + rest, before, grads[1], [0.5] + [0.01] * len(rest)):
        torch.testing.assert_close(p.detach(), b - lr * g)


def test_add_param_group_reaches_the_base():
    model = smooth()
    optimizer = SAM(model[0].parameters(), rho=0.1, lr=0.1)
    optimizer.add_param_group({"params": list(model[5].parameters()), "lr": 0.2})
    assert optimizer.param_groups is optimizer.base.param_groups
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(closure_of(optimizer, model, *batches()[0]))
    moved = [n for (n, p), b in zip(model.named_parameters(), before) if not torch.equal(p, b)]
    assert moved == ["0.weight", "5.weight", "5.bias"]
    masked = SAM([model[0].weight], mask=[torch.ones(5, 4)], lr=0.1)
    with pytest.raises(UserError, match="under a mask"):
        masked.add_param_group({"params": [model[5].weight]})


def test_named_parameters_and_generators_are_taken():
    model = smooth()
    optimizer = SAM(((n, p) for n, p in model.named_parameters()), rho=0.1, lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]
    optimizer.step(closure_of(optimizer, model, *batches()[0]))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.StepLR(o, 2),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=6),
        lambda o: lr_scheduler.LambdaLR(o, lambda e: 1 / (1 + e)),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
        ),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    ],
    ids=["step", "cosine", "onecycle", "lambda", "sequential", "plateau"],
)
def test_schedulers_drive_the_wrapper(schedule):
    ours, theirs = smooth(), smooth()
    optimizer = SAM(ours.parameters(), rho=0.0, lr=0.1, momentum=0.9)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    rates = []
    for x, y, (one, other) in [(x, y, (schedule(optimizer), schedule(plain))) for x, y in batches(1)] * 5:
        loss = optimizer.step(closure_of(optimizer, ours, x, y))
        plain.step(closure_of(plain, theirs, x, y))
        for scheduler in (one, other):
            scheduler.step(*([loss.item()] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        rates.append(optimizer.param_groups[0]["lr"])
        assert rates[-1] == plain.param_groups[0]["lr"]
    assert len(set(rates)) > 1
    assert_same(ours.state_dict(), theirs.state_dict())


@each_base
@pytest.mark.parametrize("copied", ["state_dict", "deepcopy", "pickle"])
def test_a_copy_takes_the_same_next_step(base, kwargs, copied):
    model = smooth(torch.float32)
    optimizer = SAM(model.parameters(), base, rho=0.1, mask=masks_for(list(model.parameters())), **kwargs)
    data = batches(4, torch.float32)
    for x, y in data[:2]:
        optimizer.step(closure_of(optimizer, model, x, y))
    if copied == "state_dict":
        twin = smooth(torch.float32)
        twin.load_state_dict(model.state_dict())
        other = SAM(twin.parameters(), base, rho=0.1, mask=masks_for(list(twin.parameters())), **kwargs)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif copied == "deepcopy":
        twin, other = copy.deepcopy((model, optimizer))
    else:
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    assert other.param_groups is other.base.param_groups
    assert other.state is other.base.state
    for x, y in data[2:]:
        optimizer.step(closure_of(optimizer, model, x, y))
        other.step(closure_of(other, twin, x, y))
    assert_same(state_of(model, optimizer), state_of(twin, other))
    before = twin[5].weight.detach().clone()
    for group in other.param_groups:
        group["lr"] = 0.0
    other.step(closure_of(other, twin, *data[0]))
    assert torch.equal(before, twin[5].weight)


def test_the_base_alone_goes_on_from_its_state():
    model = smooth()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=0.01)
    optimizer.step(closure_of(optimizer, model, *batches()[0]))
    plain = torch.optim.AdamW(model.parameters(), lr=1.0)
    plain.load_state_dict(optimizer.state_dict())
    assert_same(plain.state_dict(), optimizer.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    optimizer.step(closure_of(optimizer, model, *batches()[1]))
    assert {float(s["step"]) for s in optimizer.base.state.values()} == {2.0}


@each_base
def test_masked_weights_and_state_stand_still(base, kwargs):
    model = smooth(torch.float32)
    params = list(model.parameters())
    free = SAM(params, base, rho=0.1, **kwargs)
    data = batches(6, torch.float32)
    for x, y in data[:2]:
        free.step(closure_of(free, model, x, y))
    mask = masks_for(params)
    optimizer = SAM(params, base, rho=0.1, sign="max", lam=2.0, mask=mask, **kwargs)
    optimizer.load_state_dict(free.state_dict())
    weights = [p.detach().clone() for p in params]
    before = copy.deepcopy(optimizer.state_dict()["state"])
    for x, y in data[2:]:
        optimizer.step(closure_of(optimizer, model, x, y))
    after = optimizer.state_dict()["state"]
    for i, (p, w, m) in enumerate(zip(params, weights, mask)):
        assert torch.equal(p[m == 0], w[m == 0])
        for name, value in after.get(i, {}).items():
            if isinstance(value, torch.Tensor) and value.shape == p.shape:
                assert torch.equal(value[m == 0], before[i][name][m == 0])
    moving = [i for i, p in enumerate(params) if p.requires_grad and p.shape != (2,) and mask[i].any()]
    assert len(moving) > 2
    assert all((params[i] != weights[i])[mask[i] == 1].any() for i in moving)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adaptive", [False, True])
def test_weights_come_back_to_the_bit(dtype, adaptive):
    model = smooth(dtype)
    optimizer, calls = SAM(model.parameters(), rho=0.3, adaptive=adaptive, lr=0.0), []
    before = copy.deepcopy(model.state_dict())
    for x, y in batches(dtype=dtype):
        optimizer.step(closure_of(optimizer, model, x, y, calls=calls))
    assert all(a != b for a, b in zip(calls[::2], calls[1::2]))
    assert_same(dict(model.state_dict()), dict(before))


@each_norm
@each_base
@pytest.mark.parametrize("bad", [0, 1], ids=["first", "second"])
def test_nan_raises_and_nothing_moves(norm, base, kwargs, bad):
    model = stateful(norm)
    optimizer = SAM(model.parameters(), base, rho=0.1, sign="max", **kwargs)
    data = batches(2, torch.float32)
    optimizer.step(closure_of(optimizer, model, *data[0]))
    before = state_of(model, optimizer)
    with pytest.raises(NonFiniteError, match="step 2"):
        optimizer.step(closure_of(optimizer, model, *data[1], factor=lambda call: float("nan") if call == bad else 1.0))
    assert_same(state_of(model, optimizer), before)
    optimizer.step(closure_of(optimizer, model, *data[1]))
    assert not torch.equal(model[0].weight, before[0]["0.weight"])


@each_norm
def test_a_second_pass_that_overflows_leaves_no_trace(norm):
    model = stateful(norm)
    optimizer, calls = SAM(model.parameters(), rho=1e300, lr=0.1), []
    before = state_of(model, optimizer)
    with pytest.raises(NonFiniteError, match="step 1"):
        optimizer.step(closure_of(optimizer, model, *batches(1, torch.float32)[0], calls=calls))
    assert calls[0].isfinite()
    assert calls[1].isnan()
    assert_same(state_of(model, optimizer), before)


def test_nan_in_a_masked_gradient_is_noticed():
    model = smooth()
    params = list(model.parameters())
    mask = [torch.zeros_like(p) for p in params[:-1]] + [torch.ones_like(params[-1])]
    optimizer = SAM(params, rho=0.1, mask=mask, lr=0.1)
    before = state_of(model, optimizer)
    params[1].register_hook(lambda g: g * float("nan"))
    with pytest.raises(NonFiniteError):
        optimizer.step(closure_of(optimizer, model, *batches()[0]))
    assert_same(state_of(model, optimizer), before)


LATE = [
    *BASES,
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    (torch.optim.AdamW, {"lr": 0.1, "fused": True}),
    (torch.optim.NAdam, {"lr": 0.1}),
    (torch.optim.ASGD, {"lr": 0.1}),
    (torch.optim.Rprop, {"lr": 0.1}),
]


@each_norm
@pytest.mark.parametrize(
    ("base", "kwargs"), LATE, ids=[*BASE_IDS, "fused_sgd", "fused_adamw", "nadam", "asgd", "rprop"]
)
@pytest.mark.parametrize("good", [0, 2], ids=["at_once", "later"])
def test_a_late_look_finds_everything_as_before_the_broken_step(norm, base, kwargs, good):
    """Bits as after `good` steps, whatever came between the broken step and the look; then it goes on."""
    model, twin = stateful(norm), stateful(norm)
    model.register_parameter("scalar", nn.Parameter(torch.ones(())))
    twin.register_parameter("scalar", nn.Parameter(torch.ones(())))
    late = SAM(model.parameters(), base, rho=0.1, check_every=5, **kwargs)
    plain = SAM(twin.parameters(), base, rho=0.1, **kwargs)
    data = batches(5, torch.float32)

    def run(optimizer, net, step, factor=1.0):
        torch.manual_seed(step)
        inner = closure_of(optimizer, lambda x: net(x) * net.scalar, *data[step], factor=lambda _: factor)
        optimizer.step(inner)

    for step in range(good):
        run(plain, twin, step)
    with pytest.raises(NonFiniteError, match=f"step {good + 1}"):  # noqa: PT012
        for step in range(5):
            run(late, model, step, float("nan") if step == good else 1.0)
    assert_same(state_of(model, late), state_of(twin, plain))
    for step in range(2):
        run(plain, twin, step)
        run(late, model, step)
    assert_same(state_of(model, late), state_of(twin, plain))
    assert not torch.equal(model[0].weight, stateful(norm)[0].weight)


def test_a_state_is_not_given_out_before_the_look():
    model = smooth()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, check_every=50)
    optimizer.step(closure_of(optimizer, model, *batches()[0], factor=lambda _: float("nan")))
    with pytest.raises(NonFiniteError, match="step 1"):
        optimizer.state_dict()
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.1


def test_an_optimiser_from_elsewhere_is_looked_at_at_once():
    class Counting(torch.optim.Optimizer):
        """Keeps a counter that is no tensor, so that only a step that was never taken leaves it alone."""

        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr, "taken": 0})

        @torch.no_grad()
        def step(self, closure=None):  # type: ignore[override]
            for group in self.param_groups:
                group["taken"] += 1
                for p in (p for p in group["params"] if p.grad is not None):
                    p -= group["lr"] / group["taken"] * p.grad

    model = smooth()
    optimizer = SAM(model.parameters(), Counting, rho=0.1, lr=0.1, check_every=50)
    x, y = batches()[0]
    optimizer.step(closure_of(optimizer, model, x, y))
    with pytest.raises(NonFiniteError, match="step 2"):
        optimizer.step(closure_of(optimizer, model, x, y, factor=lambda _: float("nan")))
    assert optimizer.base.param_groups[0]["taken"] == 1


def test_a_loaded_state_does_not_inherit_a_broken_step():
    model = smooth()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, check_every=50)
    x, y = batches()[0]
    optimizer.step(closure_of(optimizer, model, x, y))
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.step(closure_of(optimizer, model, x, y, factor=lambda _: float("nan")))
    optimizer.load_state_dict(state)
    before = model[0].weight.detach().clone()
    optimizer.step(closure_of(optimizer, model, x, y))
    optimizer.state_dict()
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_second_pass_brings_the_weights_back(error):
    model, once = stateful(), stateful()
    optimizer, calls = SAM(model.parameters(), rho=0.1, lr=0.1), []
    x, y = batches(1, torch.float32)[0]

    def factor(call):
        if call == 1:
            raise error("stop")
        return 1.0

    torch.manual_seed(2)
    with pytest.raises(error):
        optimizer.step(closure_of(optimizer, model, x, y, factor=factor, calls=calls))
    after = torch.get_rng_state()
    torch.manual_seed(2)
    once(x)
    assert_same(dict(model.state_dict()), dict(once.state_dict()))
    assert torch.equal(after, torch.get_rng_state())
    assert not nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize("adaptive", [False, True])
def test_bf16_autocast(adaptive):
    model, exact = smooth(torch.float32), smooth(torch.float32)
    optimizer = SAM(model.parameters(), rho=0.1, adaptive=adaptive, lr=0.1)
    other = SAM(exact.parameters(), rho=0.1, adaptive=adaptive, lr=0.1)
    for x, y in batches(dtype=torch.float32):
        seen = []

        def cast(x, seen=seen):
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x)
            seen.append(out.dtype)
            return out

        optimizer.step(closure_of(optimizer, cast, x, y))
        other.step(closure_of(other, exact, x, y))
        assert seen == [torch.bfloat16] * 2
    for p, q in zip(model.parameters(), exact.parameters()):
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, q, rtol=0.05, atol=0.02)
    assert not torch.equal(model[0].weight, exact[0].weight)


def test_autocast_around_the_whole_step_changes_nothing():
    # Autocast keeps its copies of the weights as long as it lasts: those of w must not serve w + ε, nor the next step.
    inside, outside = smooth(torch.float32), smooth(torch.float32)
    for model, around in ((inside, False), (outside, True)):
        optimizer = SAM(model.parameters(), rho=0.5, lr=0.1)
        for x, y in batches(3, dtype=torch.float32):

            def cast(x, model=model):
                with torch.autocast("cpu", torch.bfloat16):
                    return model(x)

            with torch.autocast("cpu", torch.bfloat16) if around else contextlib.nullcontext():
                optimizer.step(closure_of(optimizer, cast, x, y))
    assert_same(list(inside.parameters()), list(outside.parameters()))


def fp16(model):
    def forward(x):
        with torch.autocast("cpu", torch.float16):
            return model(x)

    return forward


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sign", ["min", "max"])
def test_scaled_steps_equal_unscaled_ones(clip_norm, masked, sign):
    models, dones = [stateful(), stateful()], []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for model, used in zip(models, (scaler, None)):
        params = list(model.parameters())
        mask = masks_for(params) if masked else None
        optimizer = SAM(params, rho=0.1, sign=sign, mask=mask, lr=0.1, momentum=0.9)
        seen = []
        for step, (x, y) in enumerate(batches(dtype=torch.float32)):
            torch.manual_seed(step)
            inner = closure_of(optimizer, fp16(model), x, y, scaler=used)

            def closure(inner=inner, params=params, seen=seen):
                loss = inner()
                seen.append(max(float(p.grad.abs().max()) for p in params))
                return loss

            optimizer.step(closure, scaler=used, clip_norm=clip_norm)
            if used is not None:
                used.update()
        dones.append(seen)
    assert scaler.get_scale() == 2.0**11
    assert all(500 < a / b < 2100 for a, b in zip(*dones))
    for (name, p), q in zip(models[0].state_dict().items(), models[1].state_dict().values()):
        torch.testing.assert_close(p, q, rtol=2e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}")


@each_norm
@pytest.mark.parametrize("bad", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
@pytest.mark.parametrize(
    ("base", "kwargs"), [BASES[1], BASES[2], (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True})]
)
@pytest.mark.parametrize("sign", ["min", "max"])
def test_one_overflow_decision_for_both_passes(norm, bad, base, kwargs, sign):
    model = stateful(norm)
    optimizer = SAM(model.parameters(), base, rho=0.1, sign=sign, **kwargs)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    data = batches(2, torch.float32)
    optimizer.step(closure_of(optimizer, fp16(model), *data[0], scaler=scaler), scaler=scaler)
    scaler.update()
    before = state_of(model, optimizer)
    overflows = closure_of(
        optimizer, fp16(model), *data[1], factor=lambda call: float("inf") if call in bad else 1.0, scaler=scaler
    )
    optimizer.step(overflows, scaler=scaler, clip_norm=1.0)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert_same(state_of(model, optimizer), before)
    optimizer.step(closure_of(optimizer, fp16(model), *data[1], scaler=scaler), scaler=scaler)
    assert not torch.equal(model[0].weight, before[0]["0.weight"])


def test_an_overflow_at_the_very_first_step_leaves_clean_momentum():
    ours, theirs = smooth(torch.float32), smooth(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = SAM(ours.parameters(), rho=0.1, lr=0.1, momentum=0.9, fused=True)
    other = SAM(theirs.parameters(), rho=0.1, lr=0.1, momentum=0.9, fused=True)
    x, y = batches(1, torch.float32)[0]
    optimizer.step(closure_of(optimizer, ours, x, y, factor=lambda _: float("inf"), scaler=scaler), scaler=scaler)
    scaler.update()
    assert not optimizer.state
    for _ in range(2):
        optimizer.step(closure_of(optimizer, ours, x, y, scaler=scaler), scaler=scaler)
        scaler.update()
        other.step(closure_of(other, theirs, x, y))
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q)


def test_a_scaler_that_is_switched_off_hides_nothing():
    model = smooth()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    before = state_of(model, optimizer)
    with pytest.raises(NonFiniteError):
        optimizer.step(
            closure_of(optimizer, model, *batches()[0], factor=lambda _: float("nan"), scaler=scaler), scaler=scaler
        )
    assert_same(state_of(model, optimizer), before)


W = torch.ones(2, 3)
BAD = {
    "base name": ({"base": "sgd"}, "base must be an optimiser class"),
    "lbfgs": ({"base": torch.optim.LBFGS}, "LBFGS"),
    "sparse adam": ({"base": torch.optim.SparseAdam}, "SparseAdam"),
    "itself": ({"base": SAM}, "SAM"),
    "rho": ({"rho": -0.1}, "rho"),
    "rho nan": ({"rho": float("nan")}, "rho"),
    "rho text": ({"rho": "0.1"}, "rho"),
    "lam": ({"lam": -1.0}, "lam"),
    "lam inf": ({"lam": float("inf")}, "lam"),
    "sign": ({"sign": "up"}, "sign must be one of min, max"),
    "perturb": ({"perturb": "some"}, "perturb must be one of region, all"),
    "check_every": ({"check_every": 0}, "check_every"),
    "mask length": ({"mask": [W, W]}, "mask has 2 tensors for 1 parameters"),
    "mask shape": ({"mask": [W.T]}, r"mask 0 has shape \(3, 2\)"),
    "mask values": ({"mask": [W * 0.5]}, "0 and 1 only"),
    "mask nan": ({"mask": [W * float("nan")]}, "0 and 1 only"),
    "mask by name": ({"mask": {"weight": W}}, "mask 0 must be a 0/1 tensor or None, got str"),
    "mask array": ({"mask": [W.numpy()]}, "mask 0 must be a 0/1 tensor or None, got ndarray"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case):
    arguments, message = BAD[case]
    with pytest.raises(UserError, match=message):
        SAM([nn.Parameter(W.clone())], **{"lr": 0.1} | arguments)


def test_a_closure_is_needed():
    with pytest.raises(UserError, match="closure"):
        SAM([nn.Parameter(W.clone())], lr=0.1).step()


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = SAM(table.parameters(), lr=0.1)
    before = table.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = table(torch.tensor([1, 2])).sum()
        loss.backward()
        return loss

    with pytest.raises(UserError, match="sparse=False"):
        optimizer.step(closure)
    assert torch.equal(table.weight, before)


def test_no_gradient_at_all_moves_nothing():
    """Where the gradient is zero there is no direction to climb, and no 0/0."""
    model = smooth()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1)
    before = state_of(model, optimizer)
    optimizer.step(closure_of(optimizer, model, *batches()[0], factor=lambda _: 0.0))
    assert_same(dict(model.state_dict()), before[0])


def test_half_precision_norms_do_not_overflow():
    p = nn.Parameter(torch.zeros(10_000, dtype=torch.float16))
    optimizer, seen = SAM([p], rho=1.0, lr=0.0), []

    def closure():
        optimizer.zero_grad()
        seen.append(p.detach().clone())
        p.grad = torch.full_like(p, 1000.0)  # its norm, 1e5, is above the largest half
        return torch.zeros(())

    optimizer.step(closure)
    torch.testing.assert_close(seen[1], torch.full_like(p, 0.01))


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that come to life under it and are alive at once, at most."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        old = {t.untyped_storage()._cdata for t in inputs}
        out = func(*args, **kwargs or {})
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in old | set(self.known):
                self._add(t.untyped_storage())
        return out

    def _add(self, storage):
        key, n = storage._cdata, storage.nbytes()

        def dead(_):
            self.live -= n
            del self.known[key]

        self.known[key] = weakref.ref(storage, dead)
        self.live += n
        self.peak = max(self.peak, self.live)


@pytest.mark.parametrize(
    "how", [{}, {"sign": "max"}, {"lam": 0.5}, {"adaptive": True}, {"adaptive": True, "sign": "max"}], ids=str
)
def test_a_step_holds_two_more_copies_of_the_weights_at_most(how):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(200, 200, bias=False) for _ in range(6)])
    n_bytes = sum(p.nbytes for p in model.parameters())
    x, y = torch.randn(4, 200), torch.randint(0, 200, (4,))
    peaks = []
    for optimizer in (torch.optim.SGD(model.parameters(), lr=0.1), SAM(model.parameters(), rho=0.1, lr=0.1, **how)):
        optimizer.step(closure_of(optimizer, model, x, y))
        optimizer.zero_grad()
        with LiveBytes() as tracked:
            optimizer.step(closure_of(optimizer, model, x, y))
        peaks.append(tracked.peak)
    assert peaks[0] >= n_bytes  # the gradients at least are seen
    assert peaks[1] - peaks[0] <= 2 * n_bytes + 256  # and a few scalars
