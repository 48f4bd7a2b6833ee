"""Losses of forgotten texts against closed forms written out here, and what must hold under every rule and mask."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import language_models as lm
import numpy as np
import pytest
import torch
from torch import nn

from unsharp import masks
from unsharp.artifacts import Workspace
from unsharp.errors import UserError
from unsharp.language import OBJECTIVES, LoRA, Pair, TextSamples, configure, unlearn
from unsharp.language.likelihood import answer_losses, next_tokens
from unsharp.language.mean_loss import TextLoss
from unsharp.language.objectives import Task
from unsharp.language.objectives.rmu import activations
from unsharp.language.texts import Encoded
from unsharp.sharpness import RULES

pytest.importorskip("transformers")
N, T, V = 4, 6, 7
FORGET, RETAIN = [0, 1], [2, 3]


# --- closed forms -----------------------------------------------------------------------------------------------------


def table_samples(lengths: tuple[int, ...], prompts: tuple[int, ...]) -> TextSamples:
    """Texts whose first token is their number; random tokens follow."""
    draw = np.random.default_rng(5)
    texts = [
        Encoded((i, *(int(t) for t in draw.integers(0, V, length - 1))), prompt)
        for i, (length, prompt) in enumerate(zip(lengths, prompts))
    ]
    return TextSamples(texts, [i in FORGET for i in range(len(texts))])


def losses_by_hand(logits: np.ndarray, samples: TextSamples) -> tuple[np.ndarray, np.ndarray]:
    """−log p of each whole answer, token by token, and how many tokens it has."""
    sums, counts = [], []
    for row, text in zip(logits, samples.texts):
        total = 0.0
        for place in range(max(text.n_prompt, 1), len(text.tokens)):
            scores = row[place - 1]
            total -= scores[text.tokens[place]] - math.log(sum(math.exp(s) for s in scores))
        sums.append(total)
        counts.append(len(text.tokens) - max(text.n_prompt, 1))
    return np.array(sums), np.array(counts)


SAMPLES = table_samples((6, 4, 5, 6), (2, 1, 3, 0))
PREFERRED = table_samples((5, 6, 3, 3), (2, 1, 1, 1))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))


def expected(name: str, logits: np.ndarray, before: np.ndarray, how: dict[str, Any]) -> float:
    """The objective's whole loss, γ = 1."""
    (now, n), (then, _) = losses_by_hand(logits, SAMPLES), losses_by_hand(before, SAMPLES)
    (won, n_won), (won_then, _) = losses_by_hand(logits, PREFERRED), losses_by_hand(before, PREFERRED)
    if how.get("reduction") == "mean":
        now_, then_, won_, won_then_ = now / n, then / n, won / n_won, won_then / n_won
    else:
        now_, then_, won_, won_then_ = now, then, won, won_then
    beta = how.get("beta", 1.0)
    forgotten = {
        "grad_diff": -(now / n if how.get("reduction") == "mean" else now),
        "npo": 2 / beta * softplus(-beta * (now_ - then_)),
        "simnpo": 2 / beta * softplus(-beta * (now / n - how.get("margin", 0.0))),
        "dpo": 2 / beta * softplus(-beta * ((won_then_ - won_) - (then_ - now_))),
        "refusal": won / n_won,
    }
    forgotten["idk_dpo"] = forgotten["dpo"]
    return float(forgotten[name][FORGET].mean() + (now / n)[RETAIN].mean())


def value(name: str, model: nn.Module, before: nn.Module, how: dict[str, Any]) -> torch.Tensor:
    objective = OBJECTIVES[name](**how)
    task = Task(model=before, samples=SAMPLES, preferred=PREFERRED)
    forget, retain = objective.forget_loss(task), objective.retain_loss(task)
    return forget(model, SAMPLES.batch(np.array(FORGET))).mean() + retain(model, SAMPLES.batch(np.array(RETAIN))).mean()


CASES = [
    ("grad_diff", {"reduction": "mean"}),
    ("grad_diff", {"reduction": "sum"}),
    ("npo", {"beta": 0.3, "reduction": "sum"}),
    ("npo", {"beta": 2.0, "reduction": "mean"}),
    ("simnpo", {"beta": 1.5, "margin": 0.7}),
    ("dpo", {"beta": 0.4, "reduction": "sum"}),
    ("dpo", {"beta": 1.3, "reduction": "mean"}),
    ("idk_dpo", {"beta": 0.2, "reduction": "sum"}),
    ("refusal", {}),
]


@pytest.mark.parametrize(("name", "how"), CASES, ids=[f"{n}-{h.get('reduction', '')}" for n, h in CASES])
def test_losses_are_the_closed_forms_and_their_gradients_those_of_finite_differences(name: str, how: dict[str, Any]):
    draw = np.random.default_rng(1)
    logits, start = draw.normal(size=(2, N, T, V)) * 1.5
    model, before = lm.Table(torch.tensor(logits)), lm.Table(torch.tensor(start))
    found = value(name, model, before, how)
    assert found.item() == pytest.approx(expected(name, logits, start, how), rel=1e-12)
    found.backward()
    gradient, step = model.logits.grad, 1e-6
    assert gradient is not None
    for place in zip(*(draw.integers(0, n, 40) for n in (N, T, V))):
        up, down = logits.copy(), logits.copy()
        up[place] += step
        down[place] -= step
        slope = (expected(name, up, start, how) - expected(name, down, start, how)) / (2 * step)
        assert gradient[place].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_npo_looks_at_each_sample_and_not_at_the_mean_of_a_batch():
    draw = np.random.default_rng(2)
    logits, start = draw.normal(size=(2, N, T, V)) * 4
    task = Task(model=lm.Table(torch.tensor(start)), samples=SAMPLES)
    loss = OBJECTIVES["npo"](beta=1.0).forget_loss(task)
    model = lm.Table(torch.tensor(logits))
    alone = [loss(model, SAMPLES.batch(np.array([i]))).item() for i in FORGET]
    assert loss(model, SAMPLES.batch(np.array(FORGET))).tolist() == pytest.approx(alone, rel=1e-12)
    now, then = (losses_by_hand(x, SAMPLES)[0][FORGET].mean() for x in (logits, start))
    assert np.mean(alone) != pytest.approx(2 * softplus(-(now - then)), rel=1e-3)


def test_npo_with_small_beta_has_the_gradient_of_gradient_difference():
    torch.manual_seed(0)
    model = lm.Table(torch.randn(N, T, V, dtype=torch.float64))
    gradients = []
    for name, how in (("npo", {"beta": 1e-7}), ("grad_diff", {"reduction": "sum"})):
        model.zero_grad()
        value(name, model, copy.deepcopy(model), how).backward()
        assert model.logits.grad is not None
        gradients.append(model.logits.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


# --- small models -----------------------------------------------------------------------------------------------------


class Problem:
    """A small model, four facts to forget, four to retain, refusals."""

    def __init__(self, *, dropout: float = 0.0, double: bool = False) -> None:
        self.words = lm.tokenizer()
        torch.manual_seed(3)
        self.model = lm.gpt2(len(self.words), dropout=dropout)
        if double:
            self.model.double()
        self.samples = lm.samples(self.model, self.words, lm.facts(0, 4), lm.facts(4, 4))
        refusals = [Pair(prompt=p.prompt, answer=str(p.preferred)) for p in lm.facts(0, 4)]
        self.preferred = lm.samples(self.model, self.words, refusals, [])

    def weights_after(self, objective: str, **how: Any) -> dict[str, torch.Tensor]:
        settings = {"epochs": 2, "batch_size": 2, "lr": 1e-3} | how
        mask = settings.pop("mask", None)
        model, _ = unlearn(
            self.model, self.samples, configure(objective, **settings), preferred=self.preferred, mask=mask
        )
        return {name: w.detach().clone() for name, w in model.state_dict().items()}


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem()


@pytest.fixture(scope="module")
def with_dropout() -> Problem:
    return Problem(dropout=0.1)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def plain(with_dropout: Problem) -> Callable[[str], dict[str, torch.Tensor]]:
    """The weights after a run of an objective under no rule."""
    return functools.cache(with_dropout.weights_after)


def zero_of(rule: str) -> str:
    return next(s for s in RULES[rule].strengths if s in RULES[rule].__dataclass_fields__)


STRENGTHENED = [rule for rule in RULES if RULES[rule].strengths and rule != "none"]


def pairs(rules: Iterable[str]) -> list[Any]:
    """All objectives under all these rules; at once, those where one of the two is the usual one."""
    return [
        pytest.param(o, r, marks=() if o == "npo" or r == "sam" else pytest.mark.slow)
        for o in OBJECTIVES
        for r in rules
    ]


@pytest.mark.parametrize(("objective", "rule"), pairs(STRENGTHENED))
def test_strength_zero_is_the_plain_objective_to_the_bit(
    objective: str, rule: str, with_dropout: Problem, plain: Callable[[str], dict[str, torch.Tensor]]
):
    assert same(with_dropout.weights_after(objective, rule=rule, **{zero_of(rule): 0.0}), plain(objective))


@pytest.mark.parametrize(
    ("objective", "rule"), pairs(rule for rule in RULES if rule not in ("none", "weight_averaging"))
)
def test_every_rule_changes_the_step(
    objective: str, rule: str, with_dropout: Problem, plain: Callable[[str], dict[str, torch.Tensor]]
):
    how: dict[str, Any] = {"micro_batches": 2} if rule == "msam" else {}
    assert not same(with_dropout.weights_after(objective, rule=rule, **how), plain(objective))


@pytest.mark.parametrize("sharpness", ["forget", "each", "sum"])
def test_the_rule_perturbs_what_sharpness_says(sharpness: str):
    problem = Problem(double=True)
    how = {"rule": "sam", "rho": 0.2, "optimizer": "sgd", "weight_decay": 0.0, "schedule": "constant", "gamma": 2.0}
    found = problem.weights_after(
        "npo", sharpness=sharpness, epochs=1, batch_size=4, lr=0.1, clip_norm=0.5, micro_batch=3, **how
    )
    samples, reference = problem.samples, copy.deepcopy(problem.model)
    before = answer_losses(reference, samples.batch(samples.forget), "sum").detach()

    def forget(model: nn.Module) -> torch.Tensor:
        now = answer_losses(model, samples.batch(samples.forget), "sum")
        return (2 / 0.1 * nn.functional.softplus(-0.1 * (now - before))).mean()

    def retain(model: nn.Module) -> torch.Tensor:
        return 2.0 * answer_losses(model, samples.batch(samples.retain), "mean").mean()

    def gradient(loss: Any, model: nn.Module, offset: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, o in zip(moved.parameters(), offset or []):
                p += o
        return list(torch.autograd.grad(loss(moved), list(moved.parameters())))

    def sharp(loss: Any, model: nn.Module) -> list[torch.Tensor]:
        g = gradient(loss, model)
        norm = torch.sqrt(sum((x**2).sum() for x in g))
        return gradient(loss, model, [0.2 * x / norm for x in g])

    parts = {
        "forget": lambda: [a + b for a, b in zip(sharp(forget, reference), gradient(retain, reference))],
        "each": lambda: [a + b for a, b in zip(sharp(forget, reference), sharp(retain, reference))],
        "sum": lambda: sharp(lambda m: forget(m) + retain(m), reference),
    }
    step = parts[sharpness]()
    norm = torch.sqrt(sum((x**2).sum() for x in step))
    assert norm > 0.5
    for (name, w), g in zip(reference.named_parameters(), step):
        torch.testing.assert_close(found[name], w - 0.1 * g * 0.5 / (norm + 1e-6), rtol=1e-9, atol=1e-10)


def step_of(problem: Problem, **how: Any) -> torch.Tensor:
    """The gradient of one step on all texts, all weights in a row."""
    plain = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "clip_norm": 1e9}
    after = problem.weights_after("npo", epochs=1, batch_size=4, lr=1.0, sharpness="sum", **plain, **how)
    return torch.cat([(w - after[name]).flatten() for name, w in problem.model.named_parameters()]).detach()


def test_sam_and_the_gradient_penalty_of_its_radius_agree_to_first_order():
    problem, distances = Problem(double=True), []
    plain = step_of(problem)
    for rho in (1e-3, 5e-4):
        sam = step_of(problem, rule="sam", rho=rho) - plain
        penalty = step_of(problem, rule="gradient_penalty", penalty=rho) - plain
        distances.append(((sam - penalty).norm() / penalty.norm()).item())
    assert distances[0] < 0.05
    assert distances[1] == pytest.approx(distances[0] / 2, rel=0.2)


@pytest.mark.parametrize("rule", ["gradient_penalty", "curvature"])
def test_penalties_have_the_gradient_of_finite_differences(rule: str):
    problem, penalty, distance = Problem(double=True), 0.3, 0.1
    samples, model = problem.samples, problem.model
    params, before = list(model.parameters()), answer_losses(model, samples.batch(samples.forget), "sum").detach()

    def loss_at(offset: torch.Tensor) -> tuple[float, torch.Tensor]:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, o in zip(moved.parameters(), offset.split([p.numel() for p in params])):
                p += o.view(p.shape)
        now = answer_losses(moved, samples.batch(samples.forget), "sum")
        loss = (20 * nn.functional.softplus(-0.1 * (now - before))).mean()
        loss = loss + answer_losses(moved, samples.batch(samples.retain), "mean").mean()
        return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(moved.parameters()))])

    g0 = loss_at(torch.zeros(sum(p.numel() for p in params), dtype=torch.float64))[1]
    way = distance * g0 / g0.norm()

    def penalised(offset: torch.Tensor) -> float:
        loss, g = loss_at(offset)
        return loss + penalty * (g if rule == "gradient_penalty" else loss_at(offset + way)[1] - g).norm().item()

    found = step_of(
        problem, rule=rule, penalty=penalty, **({} if rule == "gradient_penalty" else {"distance": distance})
    )
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        along = torch.randn(g0.shape, generator=draw, dtype=torch.float64) + 5 * g0 / g0.norm()
        slope = (penalised(1e-5 * along) - penalised(-1e-5 * along)) / 2e-5
        assert (found @ along).item() == pytest.approx(slope, rel=1e-4)
        assert (g0 @ along).item() != pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize(
    ("objective", "rule"), [("npo", "sam"), ("npo", "gradient_penalty"), ("dpo", "none"), ("rmu", "sam")]
)
def test_parts_of_a_batch_add_up_to_the_batch(objective: str, rule: str):
    problem = Problem(double=True)
    whole = problem.weights_after(objective, rule=rule, batch_size=4, clip_norm=0.3)
    for parts in (1, 3):
        found = problem.weights_after(objective, rule=rule, batch_size=4, clip_norm=0.3, micro_batch=parts)
        for name, w in whole.items():
            torch.testing.assert_close(found[name], w, rtol=1e-7, atol=1e-9)


def test_neither_neighbours_nor_the_side_of_the_padding_change_a_loss():
    problem = Problem(double=True)
    model, samples = problem.model, problem.samples
    left = lm.samples(model, problem.words, lm.facts(0, 4), lm.facts(4, 4), side="left")
    assert samples.batch(np.arange(8)).mask.sum() < samples.batch(np.arange(8)).mask.numel()
    for reduction in ("sum", "mean"):
        alone = torch.cat([answer_losses(model, samples.batch(np.array([i])), reduction) for i in range(8)])
        for texts in (samples, left):
            together = answer_losses(model, texts.batch(np.arange(8)), reduction)
            torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    assert not torch.equal(samples.batch(np.arange(8)).inputs, left.batch(np.arange(8)).inputs)


def test_rmu_is_the_mean_squared_distance_over_the_tokens_of_each_text():
    problem = Problem(double=True)
    model, samples = problem.model, problem.samples
    objective = OBJECTIVES["rmu"](layer=1, steering=3.0, gamma=5.0)
    torch.manual_seed(8)
    other = lm.gpt2(len(problem.words)).double()
    task = Task(model=model, samples=samples, original=lambda: lambda batch, layer: activations(other, batch, layer))
    draw = torch.rand(32, generator=torch.Generator().manual_seed(0)).double()
    target = 3.0 * draw / draw.norm()
    forget = objective.forget_loss(task)(model, samples.batch(samples.forget))
    retain = objective.retain_loss(task)(model, samples.batch(samples.retain))
    for losses, positions, kept in ((forget, samples.forget, False), (retain, samples.retain, True)):
        for loss, i in zip(losses, positions):
            tokens = torch.tensor([samples.texts[i].tokens])
            h, there = (m(tokens, output_hidden_states=True).hidden_states[1][0] for m in (model, other))
            wanted = ((h - (there if kept else target)) ** 2).mean()
            assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize(("objective", "rule"), pairs(["none", "sam", "randomized_smoothing", "weight_averaging"]))
def test_masked_weights_stand_still(objective: str, rule: str, problem: Problem):
    draw = torch.Generator().manual_seed(0)
    mask = {n: torch.rand(p.shape, generator=draw) < 0.3 for n, p in problem.model.named_parameters()}
    found = problem.weights_after(objective, rule=rule, mask=mask, weight_decay=0.3)
    moved = 0
    for name, w in problem.model.named_parameters():
        assert torch.equal(found[name][~mask[name]], w[~mask[name]])
        moved += int((found[name] != w).sum())
    assert moved > 0


def test_a_mask_is_chosen_by_the_pull_of_the_forgotten_answers(problem: Problem):
    found = problem.weights_after("npo", mask_fraction=0.1, micro_batch=3)
    total = answer_losses(problem.model, problem.samples.batch(problem.samples.forget), "mean").sum()
    named = dict(problem.model.named_parameters())
    pull = torch.cat([g.abs().flatten() for g in torch.autograd.grad(total, list(named.values()))])
    moved = torch.cat([(found[name] != w).flatten() for name, w in named.items()])
    assert pull[moved].min() >= pull.topk(round(0.1 * len(pull))).values.min() * (1 - 1e-3)
    assert 0.05 * len(pull) < int(moved.sum()) <= round(0.1 * len(pull))


def test_products_with_the_curvature_of_texts_are_those_of_finite_differences():
    problem = Problem(double=True)
    model, samples = problem.model.eval(), problem.samples
    around = TextLoss(model, samples, np.arange(len(samples)), batch_size=3)
    vector, params, h = [v / around.length**0.5 for v in around.noise(1)], around.params, 1e-3
    batch = samples.batch(np.arange(len(samples)))

    def at(t: float) -> tuple[torch.Tensor, torch.Tensor]:
        with around.moved([t * v for v in vector]), torch.enable_grad():
            loss = answer_losses(model, batch, "mean").mean()
            grads = torch.autograd.grad(loss, params, allow_unused=True)
            logits = next_tokens(model, batch)[0].detach()
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(params, grads)]), logits

    (up, above), (down, below), (_, here) = at(h), at(-h), at(0)
    found = {m: torch.cat([p.flatten() for p in around.products([vector], m)[0]]) for m in ("hessian", "ggn")}
    torch.testing.assert_close(found["hessian"], (up - down) / (2 * h), rtol=1e-4, atol=1e-6)
    moved, p = (above - below) / (2 * h), here.softmax(-1)
    weight = (batch.labels[:, 1:] != -100) / (batch.labels[:, 1:] != -100).sum(1, keepdim=True) / len(samples)
    bent = ((p * moved**2).sum(-1) - (p * moved).sum(-1) ** 2) * weight
    flat = torch.cat([v.flatten() for v in vector])
    assert float(found["ggn"] @ flat) == pytest.approx(float(bent.sum()), rel=1e-6)


@pytest.mark.parametrize("select", masks.SELECTIONS)
def test_every_selection_makes_a_mask_of_a_language_model(select: str, problem: Problem):
    how = {"mask_select": select, "mask_n_probes": 2, "epochs": 1, "batch_size": 4, "lr": 1e-3}
    model, record = unlearn(problem.model, problem.samples, configure("grad_diff", mask_fraction=0.1, **how))
    plain, without = unlearn(problem.model, problem.samples, configure("grad_diff", **how))
    found = dict(model.named_parameters())
    moved = sum(int((found[n] != p).sum()) for n, p in problem.model.named_parameters())
    n_weights = sum(p.numel() for p in problem.model.parameters())
    assert 0 < moved <= (round(0.1 * n_weights) if masks.SELECTIONS[select].ranks else plain.lm_head.weight.numel())
    batches = {"forget": 1, "training": 2, "": 0}[masks.SELECTIONS[select].reads]
    each = {"hessian": 3, "hessian_abs": 3, "ggn": 3}.get(select, 1)
    assert record.passes - without.passes == batches * each


@pytest.mark.parametrize("objective", ["npo", "rmu"])
def test_adapters_alone_move(objective: str, problem: Problem):
    model, record = unlearn(
        problem.model, problem.samples, configure(objective, rule="sam", epochs=1, lr=1e-2, lora=LoRA(rank=2))
    )
    before = dict(problem.model.named_parameters())
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert record.about["trained_parameters"] == sum(p.numel() for p in adapters.values())
    assert any(bool((p != 0).any()) for n, p in adapters.items() if "lora_B" in n)
    for name, p in model.named_parameters():
        if "lora_" not in name:
            own = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(p, before[own])
            assert not p.requires_grad


def test_a_lora_layer_that_is_not_there_is_refused(problem: Problem):
    with pytest.raises(UserError, match="LoRA does not fit the model"):
        unlearn(problem.model, problem.samples, configure("npo", lora=LoRA(targets=("nowhere",))))


def test_references_are_computed_once(problem: Problem):
    model, calls = copy.deepcopy(problem.model), []
    model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    unlearn(model, problem.samples, configure("npo", epochs=3, batch_size=4, micro_batch=2), in_place=True)
    assert calls.count(False) == 2
    assert calls.count(True) == 3 * (2 + 2)


def test_a_killed_run_goes_on_to_the_same_bits(problem: Problem, tmp_path):
    how = configure("npo", rule="sam", epochs=3, batch_size=2, lr=1e-3, mask_fraction=0.5)
    whole, _ = unlearn(problem.model, problem.samples, how)
    rows: list[int] = []

    def stop(_: nn.Module) -> dict[str, float]:
        rows.append(1)
        if len(rows) == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        unlearn(problem.model, problem.samples, how, workspace=Workspace(tmp_path), on_epoch=stop)
    found, record = unlearn(problem.model, problem.samples, how, workspace=Workspace(tmp_path))
    assert same(found.state_dict(), whole.state_dict())
    assert len(record.history) == 3


def test_nothing_to_forget_or_to_retain_is_refused(problem: Problem):
    facts = lm.facts(0, 2)
    only = lm.samples(problem.model, problem.words, facts, [])
    with pytest.raises(UserError, match="no text is to be retained"):
        unlearn(problem.model, only, configure("npo"))
    found, _ = unlearn(problem.model, only, configure("npo", gamma=0.0, epochs=1))
    assert not same(found.state_dict(), problem.model.state_dict())
    with pytest.raises(UserError, match="no text is to be forgotten"):
        unlearn(problem.model, lm.samples(problem.model, problem.words, [], facts), configure("npo"))
    with pytest.raises(UserError, match="needs an answer to give in place"):
        unlearn(problem.model, problem.samples, configure("dpo"))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"objective": "nop"}, "did you mean 'npo'"),
        ({"objective": "npo", "margin": 1.0}, "unknown setting for npo under rule none 'margin'"),
        ({"objective": "npo", "beta": 0.0}, "beta must be above 0"),
        ({"objective": "npo", "gamma": -1.0}, "gamma must be"),
        ({"objective": "npo", "reduction": "max"}, "reduction"),
        ({"objective": "rmu", "layer": 0}, "layer must be at least 1"),
        ({"objective": "npo", "sharpness": "both"}, "sharpness"),
        ({"objective": "npo", "micro_batch": 0}, "micro_batch must be at least 1"),
        ({"objective": "npo", "mask_fraction": 1.5}, "mask fraction must lie in"),
    ],
)
def test_settings_that_cannot_be_are_refused(how: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        configure(**how)


def test_a_layer_that_the_model_lacks_is_refused(problem: Problem):
    with pytest.raises(UserError, match=r"layer must be in 1\.\.2"):
        unlearn(problem.model, problem.samples, configure("rmu", layer=3))
