"""The loop: turns of phases, the gradient of each, and two optimisers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from contract.book import rules
from unsharp.data.samples import Batch

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Now:
    """Epoch, number of epochs and seed of the run."""

    epoch: int
    epochs: int
    seed: int


Loss = Callable[[nn.Module, Mapping[str, Batch], Now], Tensor]


@dataclass
class Line:
    """A phase.

    Args:
        streams: What it reads, in this order.
        loss: What it minimises.
        perturb: Where its perturbation comes from, if not from the loss.
        others: What that reads, if not the same streams.
        plain: It follows no rule.
        turned: It raises the sharpness that the rule lowers.
        rho: Its own radius.
        region: Where it may act.
        leak: It is only the perturbed gradient that is kept to the region.
        turn: Phases of one turn act together; turns follow one another in each epoch.
        until: Epochs after which it rests.
        multiplier: New factor of its gradient, from the old one (first 0) and the loss where it was last evaluated.
    """

    streams: tuple[str, ...]
    loss: Loss
    perturb: Loss | None = None
    others: tuple[str, ...] = ()
    plain: bool = False
    turned: bool = False
    rho: float | None = None
    region: Named | None = None
    leak: bool = False
    turn: int = 0
    until: int | None = None
    multiplier: Callable[[float, float], float] | None = None


@dataclass
class State:
    """Of an optimiser: two moments and a count per tensor; which phases it serves, and whether it decays."""

    serves: list[int]
    decays: bool
    first: Named = field(default_factory=dict)
    second: Named = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)


def train(
    model: nn.Module,
    lines: list[Line],
    rule: Any,
    rule_name: str,
    feed: Callable[[int, tuple[str, ...]], Iterable[Mapping[str, Batch]]],
    base: str,
    hyper: Mapping[str, Mapping[str, float]],
    *,
    separate: bool,
    alternate: bool = False,
    epochs: int,
    seed: int = 0,
    clip_norm: float | None = None,
) -> None:
    """Train `model` in place.

    Args:
        rule: Whose settings the rule of this name has.
        feed: The batches of an epoch, for these streams side by side.
        base: "sgd" with momentum 0.9, or "adamw" with torch's default betas.
        hyper: lr and weight_decay by parameter name.
        separate: Whether each phase has a state of its own; of phases of a turn that share a weight the first decays.
        alternate: Whether the phases of a turn step one after the other on each batch, each as if it were alone.
    """
    separate = separate or alternate
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    states = [
        State([i], alternate or not any(overlap(lines[j], lines[i]) for j in range(i))) for i in range(len(lines))
    ]
    if not separate:
        states = [State(list(range(len(lines))), True)]
    memories: list[dict[str, Any]] = [{} for _ in lines]
    taken, done = [0 for _ in lines], 0
    plan = [(epoch, members) for epoch in range(epochs) for members in turns(lines, epoch)]
    total = sum(
        len(list(feed(epoch, streams_of(lines, members)))) * (len(members) if alternate else 1)
        for epoch, members in plan
    )
    model.train()
    for epoch, members in plan:
        for batches in feed(epoch, streams_of(lines, members)):
            for together in [[i] for i in members] if alternate else [members]:
                parts: dict[int, Named] = {}
                resting = set()
                for i in together:
                    line = lines[i]
                    here = rules.Here(model, line, batches, Now(epoch, epochs, seed), memories[i], taken[i])
                    parts[i] = rules.gradient(here, "none" if line.plain else rule_name, rule)
                    if line.multiplier is not None:
                        factor = line.multiplier(memories[i].get("multiplier", 0.0), here.last_loss)
                        memories[i]["multiplier"] = factor
                        parts[i] = {n: factor * g for n, g in parts[i].items()}
                        if factor == 0 and separate:
                            resting.add(i)
                    if line.region is not None and not line.leak:
                        parts[i] = {n: torch.where(line.region[n], g, 0.0) for n, g in parts[i].items()}
                    taken[i] += 1
                done += 1
                for state in states:
                    mine = [parts[i] for i in state.serves if i in parts and i not in resting]
                    if mine:
                        step(params, state, summed(mine), may_move(lines, state, params), base, hyper, clip_norm)
                for i in together:
                    if not lines[i].plain:
                        rules.after_step(rule_name, rule, params, memories[i], done / total)
    for line, memory in zip(lines, memories):
        if not line.plain:
            for n, w in rules.final_weights(rule_name, rule, memory).items():
                inside = torch.ones_like(w, dtype=torch.bool) if line.region is None or line.leak else line.region[n]
                params[n].data = torch.where(inside, w, params[n].data)


def turns(lines: list[Line], epoch: int) -> Iterator[list[int]]:
    acting = [i for i, line in enumerate(lines) if line.until is None or epoch < line.until]
    for turn in sorted({lines[i].turn for i in acting}):
        yield [i for i in acting if lines[i].turn == turn]


def streams_of(lines: list[Line], members: list[int]) -> tuple[str, ...]:
    return tuple(sorted({s for i in members for s in (*lines[i].streams, *lines[i].others)}))


def overlap(a: Line, b: Line) -> bool:
    if a.turn != b.turn:
        return False
    if a.region is None or b.region is None or a.leak or b.leak:
        return True
    return any(bool((a.region[n] & b.region[n]).any()) for n in a.region)


def may_move(lines: list[Line], state: State, params: Mapping[str, Tensor]) -> Named:
    mine = [lines[i] for i in state.serves]
    everywhere = any(line.region is None or line.leak for line in mine)
    found = {}
    for n, p in params.items():
        inside = [torch.ones_like(p, dtype=torch.bool)]
        if not everywhere:
            inside = [line.region[n] for line in mine if line.region is not None]
        found[n] = torch.stack(inside).any(0)
    return found


def summed(parts: list[Named]) -> Named:
    total: Named = {}
    for part in parts:
        for n, g in part.items():
            total[n] = total[n] + g if n in total else g
    return total


def step(
    params: Mapping[str, Tensor],
    state: State,
    grads: Named,
    moving: Named,
    base: str,
    hyper: Mapping[str, Mapping[str, float]],
    clip_norm: float | None,
) -> None:
    if clip_norm is not None:
        norm = sum((g**2).sum() for g in grads.values()) ** 0.5
        grads = {n: g * min(1.0, clip_norm / (float(norm) + 1e-6)) for n, g in grads.items()}
    for n, g in grads.items():
        w, lr = params[n].data, hyper[n]["lr"]
        decay = hyper[n]["weight_decay"] if state.decays else 0.0
        first, second = state.first.get(n, torch.zeros_like(w)), state.second.get(n, torch.zeros_like(w))
        state.count[n] = state.count.get(n, 0) + 1
        if base == "sgd":
            m = 0.9 * first + g + decay * w
            v, new = second, w - lr * m
        else:
            m, v = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
            ratio = (m / (1 - 0.9 ** state.count[n])) / ((v / (1 - 0.999 ** state.count[n])) ** 0.5 + 1e-8)
            new = w - lr * decay * w - lr * ratio
        state.first[n], state.second[n] = torch.where(moving[n], m, first), torch.where(moving[n], v, second)
        params[n].data = torch.where(moving[n], new, w)
