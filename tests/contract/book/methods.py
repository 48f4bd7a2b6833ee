"""Each method's losses and phases, from its paper.

A new method: write its phases as a function of (settings, setting) and put it into `PHASES` under its name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from contract.book.training import Line, Loss, Named, Now
from unsharp.data.samples import Batch, Samples
from unsharp.phases import FORGET, RETAIN


@dataclass(frozen=True)
class Setting:
    """What a method works on: the trained network (its own copy), all samples, and which of them to forget."""

    model: nn.Module
    samples: Samples
    forget: np.ndarray
    retain: np.ndarray
    seed: int = 0


# --- losses ----------------------------------------------------------------------------------------------------------


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean log-probability of the labels."""
    log_p = logits - torch.logsumexp(logits, dim=1, keepdim=True)
    return sum(log_p[i, int(labels[i])] for i in range(len(labels))) / len(labels)  # type: ignore[return-value]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return -log_likelihood(model(batch.inputs), batch.labels)


def entropies(**weights: float) -> Loss:
    """Σ weight · cross-entropy, stream by stream; a stream of weight 0 is not read."""
    return lambda model, batches, now: sum(  # type: ignore[return-value]
        weight * cross_entropy(model, batches[s]) for s, weight in weights.items() if weight != 0
    )


def divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T² · mean of KL(teacher ‖ student), both at temperature T."""
    p, q = (torch.softmax(logits / temperature, dim=1) for logits in (teacher, student))
    return temperature**2 * (p * (torch.log(p) - torch.log(q))).sum() / len(p)


# --- methods ---------------------------------------------------------------------------------------------------------


def finetune(m: Any, setting: Setting) -> list[Line]:
    return [Line((RETAIN,), entropies(retain=1.0))]


def gradient_ascent(m: Any, setting: Setting) -> list[Line]:
    return [Line((FORGET,), entropies(forget=-1.0))]


def neggrad(m: Any, setting: Setting) -> list[Line]:
    a = m.alpha
    joint = entropies(retain=a, forget=a - 1)
    return {
        "joint": [Line((RETAIN, FORGET), joint)],
        "retain": [Line((RETAIN,), entropies(retain=a)), Line((FORGET,), entropies(forget=a - 1), plain=True)],
        "separate": [Line((RETAIN,), entropies(retain=a)), Line((FORGET,), entropies(forget=a - 1))],
        "unsigned": [Line((RETAIN, FORGET), joint, perturb=entropies(retain=a, forget=1 - a))],
    }[m.sharpness_on]


def sharp_minmax(m: Any, setting: Setting) -> list[Line]:
    forgets = retains = None
    if m.select != "all":
        forgets = most_salient(setting, m.fraction, smallest=m.select == "smallest")
        retains = {n: ~part for n, part in forgets.items()}
    return [
        Line((RETAIN,), entropies(retain=m.alpha), region=retains, leak=m.leak, rho=m.rho_retain),
        Line((FORGET,), entropies(forget=m.alpha - 1), region=forgets, leak=m.leak, rho=m.rho_forget, turned=True),
    ]


def saul(m: Any, setting: Setting) -> list[Line]:
    level = math.log(setting.samples.n_classes) if m.forget_level is None else m.forget_level
    return [
        Line((RETAIN,), entropies(retain=1.0)),
        Line(
            (FORGET,),
            entropies(forget=-1.0),
            multiplier=lambda old, loss: max(0.0, old + m.multiplier_rate * (level - (-loss))),
        ),
    ]


def uam(m: Any, setting: Setting) -> list[Line]:
    return [Line((RETAIN,), entropies(retain=1.0), perturb=entropies(forget=1.0), others=(FORGET,))]


def l1_sparse(m: Any, setting: Setting) -> list[Line]:
    def loss(model: nn.Module, batches: Mapping[str, Batch], now: Now) -> Tensor:
        left = 1 - now.epoch / (now.epochs - m.l1_free_epochs)
        fit = cross_entropy(model, batches[RETAIN])
        if left <= 0:
            return fit
        return fit + m.l1_gamma * left * sum(p.abs().sum() for p in model.parameters() if p.requires_grad)

    return [Line((RETAIN,), loss)]


def random_label(m: Any, setting: Setting) -> list[Line]:
    alpha, region = share(m.alpha, setting), None
    if getattr(m, "select", "all") != "all":
        region = most_salient(setting, m.fraction, smallest=m.select == "smallest")

    def label(i: int, now: Now) -> int:
        """Drawn by the sample's row of a table of the seed and the epoch."""
        bits = np.random.Philox(np.random.SeedSequence(now.seed, spawn_key=(now.epoch, 0, 1)))
        classes = list(range(setting.samples.n_classes))
        if m.other_classes:
            classes.remove(int(setting.samples.labels[i]))
        return classes[int(np.random.Generator(bits).random(len(setting.samples))[i] * len(classes))]

    return [relabelled(alpha, label, region)]


def boundary_shrink(m: Any, setting: Setting) -> list[Line]:
    """The class beyond the nearest boundary: the largest logit but the true one after a step up the loss."""
    found, model = {}, setting.model.eval()
    for i, batch in zip(setting.forget, one_by_one(setting.samples, setting.forget)):
        x = batch.inputs.clone().requires_grad_()
        (slope,) = torch.autograd.grad(-log_likelihood(model(x), batch.labels), x)
        logits = model(batch.inputs + m.bound * slope.sign())[0].tolist()
        if m.other_classes:
            logits[int(batch.labels[0])] = -math.inf
        found[int(i)] = logits.index(max(logits))
    return [relabelled(m.alpha, lambda i, now: found[i], None)]


def scrub(m: Any, setting: Setting) -> list[Line]:
    teacher, t = answers(setting, setting.model), m.temperature

    def away(model: nn.Module, batches: Mapping[str, Batch], now: Now) -> Tensor:
        batch = batches[FORGET]
        return -divergence(teacher[batch.indices], model(batch.inputs), t)

    def back(model: nn.Module, batches: Mapping[str, Batch], now: Now) -> Tensor:
        batch = batches[RETAIN]
        logits = model(batch.inputs)
        apart = divergence(teacher[batch.indices], logits, t)
        return -m.gamma * log_likelihood(logits, batch.labels) + m.beta * apart

    lines = [Line((FORGET,), away, until=m.msteps), Line((RETAIN,), back, turn=1)]
    return lines if m.msteps > 0 else lines[1:]


def bad_teacher(m: Any, setting: Setting) -> list[Line]:
    """The incompetent teacher is the same network with weights drawn anew."""
    alpha, t = share(m.alpha, setting), m.temperature
    ignorant = copy.deepcopy(setting.model)
    with torch.random.fork_rng():
        torch.manual_seed(
            int(np.random.SeedSequence(setting.seed, spawn_key=(0, 0, 2)).generate_state(1, np.uint64)[0])
        )
        for module in ignorant.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
    teachers = {RETAIN: answers(setting, setting.model), FORGET: answers(setting, ignorant)}
    weights = {s: w for s, w in ((RETAIN, alpha), (FORGET, 1 - alpha)) if w != 0}

    def loss(model: nn.Module, batches: Mapping[str, Batch], now: Now) -> Tensor:
        return sum(  # type: ignore[return-value]
            weight * divergence(teachers[s][batches[s].indices], model(batches[s].inputs), t)
            for s, weight in weights.items()
        )

    return [Line(tuple(weights), loss)]


def sfron(m: Any, setting: Setting) -> list[Line]:
    def ascent(model: nn.Module, batches: Mapping[str, Batch], now: Now) -> Tensor:
        """What is well known weighs more: by the inverse of its loss to a power, held fixed."""
        batch = batches[FORGET]
        logits = model(batch.inputs)
        losses = [-log_likelihood(logits[i : i + 1], batch.labels[i : i + 1]) for i in range(len(logits))]
        inverse = [1 / float(loss.detach()) ** m.loss_power for loss in losses]
        fall = (1 + math.cos(math.pi * now.epoch / now.epochs)) / 2
        return -m.forget_weight * fall * sum(w * loss for w, loss in zip(inverse, losses)) / sum(inverse)

    region = None
    if m.fisher_ratio > 0:
        forget, retain = fisher(setting, setting.forget), fisher(setting, setting.retain)
        region = {n: (forget[n] + 1e-15) / (retain[n] + 1e-15) >= m.fisher_ratio for n in forget}
    return [Line((FORGET,), ascent, region=region), Line((RETAIN,), entropies(retain=1.0), turn=1)]


PHASES: dict[str, Callable[[Any, Setting], list[Line]]] = {
    "bad_teacher": bad_teacher,
    "boundary_shrink": boundary_shrink,
    "finetune": finetune,
    "gradient_ascent": gradient_ascent,
    "l1_sparse": l1_sparse,
    "neggrad": neggrad,
    "random_label": random_label,
    "salun": random_label,
    "saul": saul,
    "scrub": scrub,
    "sfron": sfron,
    "sharp_minmax": sharp_minmax,
    "uam": uam,
}
"""By name of the method: its phases, given its parameters and what it works on."""


# --- labels, teachers, weights ---------------------------------------------------------------------------------------


def share(alpha: float | None, setting: Setting) -> float:
    """Its default is that of the retained samples."""
    return len(setting.retain) / (len(setting.retain) + len(setting.forget)) if alpha is None else alpha


def relabelled(alpha: float, label: Callable[[int, Now], int], region: Named | None) -> Line:
    """α · CE on retain + (1−α) · CE on forget under other labels, by position."""

    def loss(model: nn.Module, batches: Mapping[str, Batch], now: Now) -> Tensor:
        total = torch.zeros(())
        if alpha > 0:
            total = alpha * cross_entropy(model, batches[RETAIN])
        if alpha < 1:
            batch = batches[FORGET]
            labels = torch.tensor([label(int(i), now) for i in batch.indices])
            total = total - (1 - alpha) * log_likelihood(model(batch.inputs), labels)
        return total

    return Line(tuple(s for s, w in ((RETAIN, alpha), (FORGET, 1 - alpha)) if w > 0), loss, region=region)


def answers(setting: Setting, model: nn.Module) -> Tensor:
    """Logits of every sample, in evaluation mode, sample by sample."""
    model.eval()
    with torch.no_grad():
        every = one_by_one(setting.samples, range(len(setting.samples)))
        return torch.cat([model(batch.inputs) for batch in every])


def fisher(setting: Setting, positions: Iterable[int]) -> Named:
    """Mean square of the samples' gradients, in evaluation mode."""
    model = setting.model.eval()
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total, count = {n: torch.zeros_like(p.data) for n, p in params.items()}, 0
    for batch in one_by_one(setting.samples, positions):
        grads = torch.autograd.grad(cross_entropy(model, batch), list(params.values()), allow_unused=True)
        total = {n: total[n] + (0 if g is None else g**2) for n, g in zip(params, grads)}
        count += 1
    return {n: t / count for n, t in total.items()}


# --- masks -----------------------------------------------------------------------------------------------------------


def most_salient(setting: Setting, fraction: float, *, smallest: bool = False) -> Named:
    """The largest `fraction` of |Σ over forget of ∇CE|, sample by sample in evaluation mode, by a plain sort."""
    model = setting.model
    model.eval()
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    sums = {n: torch.zeros_like(p.data) for n, p in params.items()}
    for batch in one_by_one(setting.samples, setting.forget):
        grads = torch.autograd.grad(cross_entropy(model, batch), list(params.values()), allow_unused=True)
        for n, g in zip(params, grads):
            sums[n] += 0 if g is None else g
    order = {n: rank for rank, n in enumerate(sums)}
    entries = [
        ((1 if smallest else -1) * abs(float(v)), order[n], i, n)
        for n, total in sums.items()
        for i, v in enumerate(total.flatten())
    ]
    mask = {n: torch.zeros(p.numel(), dtype=torch.bool) for n, p in params.items()}
    for _, _, i, n in sorted(entries)[: round(fraction * len(entries))]:
        mask[n][i] = True
    model.train()
    return {n: m.view(params[n].shape) for n, m in mask.items()}


def one_by_one(samples: Samples, positions: Iterable[int]) -> Iterable[Batch]:
    for i in positions:
        yield from samples.batches(np.array([i]), [1], draws=None)
