"""The rules and two optimisers as a textbook writes them: plain loops over named tensors, nothing shared, no care."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unsharp.data.samples import Batch, Samples

Named = dict[str, Tensor]


@dataclass
class TextbookPhase:
    """`losses`: signed weight of the cross-entropy per stream; `sign`: +1 for min, −1 for max."""

    losses: Mapping[str, float]
    rule: str
    settings: Any
    sign: int
    region: Named | None


def gradient(model: nn.Module, losses: Mapping[str, float], batches: Mapping[str, Batch]) -> Named:
    """∇L by name; a tensor that L does not reach is left out."""
    value = torch.zeros((), dtype=torch.float64)
    for stream, weight in losses.items():
        log_p = torch.log_softmax(model(batches[stream].inputs), dim=1)
        labels = batches[stream].labels
        value = value - weight * sum(log_p[i, labels[i]] for i in range(len(labels))) / len(labels)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
    return {n: g for n, g in zip(params, grads) if g is not None}


def phase_gradient(model: nn.Module, phase: TextbookPhase, batches: Mapping[str, Batch]) -> Named:
    draws = torch.get_rng_state()
    g0 = gradient(model, phase.losses, batches)
    if phase.rule == "none":
        return g0
    s, params = phase.settings, dict(model.named_parameters())
    scale, scaled = {}, {}
    for n, g in g0.items():
        scale[n] = torch.ones_like(g)
        if phase.rule == "asam" and (s.adapt == "all" or n.endswith("weight")):
            scale[n] = params[n].detach().abs() + s.eta
        scaled[n] = scale[n] * g
        if s.perturb == "region" and phase.region is not None:
            scaled[n] = torch.where(phase.region[n], scaled[n], 0.0)
    norm = sum((v**2).sum() for v in scaled.values()) ** 0.5
    epsilon = {n: s.rho * scale[n] * scaled[n] / norm for n in g0}
    towards = -1 if phase.sign < 0 and s.max_form == "ascent" else 1
    kept = {n: params[n].detach().clone() for n in g0}
    for n, e in epsilon.items():
        params[n].data += towards * e
    torch.set_rng_state(draws)
    g1 = gradient(model, phase.losses, batches)
    for n, w in kept.items():
        params[n].data = w
    if phase.sign < 0 and s.max_form == "difference":
        return {n: g0[n] - s.lam * (g1[n] - g0[n]) for n in g0}
    return {n: g0[n] + s.lam * (g1[n] - g0[n]) for n in g0}


def train(
    model: nn.Module,
    phases: list[TextbookPhase],
    batches: Iterable[Mapping[str, Batch]],
    base: str,
    hyper: Mapping[str, Mapping[str, float]],
    clip_norm: float | None = None,
) -> None:
    """Train `model` in place.

    Args:
        base: "sgd" with momentum 0.9, or "adamw" with torch's default betas.
        hyper: lr and weight_decay by parameter name.
    """
    params = dict(model.named_parameters())
    first: Named = {n: torch.zeros_like(p.data) for n, p in params.items()}
    second: Named = {n: torch.zeros_like(p.data) for n, p in params.items()}
    model.train()
    for step, batch in enumerate(batches, start=1):
        total: Named = {}
        for phase in phases:
            for n, g in phase_gradient(model, phase, batch).items():
                kept = g if phase.region is None else torch.where(phase.region[n], g, 0.0)
                total[n] = total[n] + kept if n in total else kept
        if clip_norm is not None:
            norm = sum((g**2).sum() for g in total.values()) ** 0.5
            total = {n: g * min(1.0, clip_norm / (float(norm) + 1e-6)) for n, g in total.items()}
        for n, g in total.items():
            w, lr, decay = params[n].data, hyper[n]["lr"], hyper[n]["weight_decay"]
            if base == "sgd":
                m = 0.9 * first[n] + g + decay * w
                v, new = second[n], w - lr * m
            else:
                m, v = 0.9 * first[n] + 0.1 * g, 0.999 * second[n] + 0.001 * g**2
                ratio = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)) ** 0.5 + 1e-8)
                new = w - lr * decay * w - lr * ratio
            may_move = torch.ones_like(w, dtype=torch.bool)
            if all(phase.region is not None for phase in phases):
                may_move = torch.stack([phase.region[n] for phase in phases if phase.region is not None]).any(0)
            first[n], second[n] = torch.where(may_move, m, first[n]), torch.where(may_move, v, second[n])
            params[n].data = torch.where(may_move, new, w)


def most_salient(model: nn.Module, samples: Samples, positions: Iterable[int], fraction: float) -> Named:
    """The largest `fraction` of |Σ ∇CE|, sample by sample in evaluation mode, by a plain sort."""
    model.eval()
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    sums = {n: torch.zeros_like(p.data) for n, p in params.items()}
    for i in positions:
        (batch,) = samples.batches(torch.tensor([i]).numpy(), [1], draws=None)
        for n, g in gradient(model, {"one": 1.0}, {"one": batch}).items():
            sums[n] += g
    entries = [(-abs(float(v)), n, i) for n, total in sums.items() for i, v in enumerate(total.flatten())]
    order = {n: rank for rank, n in enumerate(sums)}
    entries.sort(key=lambda entry: (entry[0], order[entry[1]], entry[2]))
    mask = {n: torch.zeros(p.numel(), dtype=torch.bool) for n, p in params.items()}
    for _, n, i in entries[: round(fraction * len(entries))]:
        mask[n][i] = True
    model.train()
    return {n: m.view(params[n].shape) for n, m in mask.items()}
