"""Bool tensors over the trainable entries of a network: choosing exactly so many, turning round, checking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from unsharp.errors import NonFiniteError, UserError, listed, unknown

Mask = dict[str, Tensor]
ENDS = ("largest", "smallest")


def select_entries(
    values: Mapping[str, Tensor],
    *,
    fraction: float,
    select: Literal["largest", "smallest"] = "largest",
    per_layer: bool = False,
    signed: bool = False,
) -> Mask:
    """The mask of the entries with the largest (or smallest) values.

    Exactly `round(fraction * n)` of the n entries are 1, with Python's `round` (halves go to the even number); with
    `per_layer` this holds for each tensor. Equal values go by position: order of the names, then row-major index.

    Args:
        values: Scores by parameter name, finite, on one device; at least 0 unless `signed`.
        fraction: In (0, 1].
        select: Which end.
        per_layer: Whether each tensor is ranked alone.
        signed: Whether scores may be below 0, as curvature may.

    Raises:
        UserError: for an argument out of its range.
        NonFiniteError: if a value is NaN or infinite.
    """
    check_fraction(fraction)
    if select not in ENDS:
        raise unknown("select", select, ENDS)
    refuse_non_finite(values, "saliency")
    negative = [name for name, v in values.items() if not signed and bool((v < 0).any())]
    if negative:
        raise UserError(
            f"values must be at least 0, they are not in {listed(negative)}; take their absolute value, or signed=True"
        )
    if per_layer:
        return {name: _extreme(v.flatten(), fraction, select).view(v.shape) for name, v in values.items()}
    flat = torch.cat([v.flatten() for v in values.values()])
    return _split(_extreme(flat, fraction, select), values)


def random_mask(model: nn.Module, *, fraction: float, per_layer: bool = False, seed: int = 0) -> Mask:
    """A mask of as many entries as `select_entries` takes, drawn uniformly; the same for a seed on every device."""
    check_fraction(fraction)
    if seed < 0:
        raise UserError(f"seed must be at least 0, got {seed}")
    params = trainable(model)
    generator = torch.Generator().manual_seed(seed)

    def drawn(n: int) -> Tensor:
        chosen = torch.zeros(n, dtype=torch.bool)
        chosen[torch.randperm(n, generator=generator)[: round(fraction * n)]] = True
        return chosen

    if per_layer:
        mask = {name: drawn(p.numel()).view(p.shape) for name, p in params.items()}
    else:
        mask = _split(drawn(sum(p.numel() for p in params.values())), params)
    return {name: m.to(params[name].device) for name, m in mask.items()}


def complement(mask: Mapping[str, Tensor]) -> Mask:
    """The mask that is 1 where `mask` is 0."""
    return {name: ~m for name, m in mask.items()}


def fraction_of(mask: Mapping[str, Tensor]) -> float:
    """The share of entries that are 1, in [0, 1]."""
    n = sum(m.numel() for m in mask.values())
    if n == 0:
        raise UserError("mask is empty: it has no tensor with an entry")
    return sum(int(m.count_nonzero()) for m in mask.values()) / n


def check(mask: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise UserError unless `mask` has a bool tensor of the right shape for every trainable parameter of `model`."""
    params = trainable(model)
    missing = [name for name in params if name not in mask]
    extra = [name for name in mask if name not in params]
    if missing or extra:
        parts = [f"{what} {listed(names)}" for what, names in (("lacks", missing), ("also has", extra)) if names]
        raise UserError(f"mask does not fit the model's trainable parameters: it {' and '.join(parts)}")
    differing = [
        f"{name} {tuple(mask[name].shape)}, model {tuple(p.shape)}"
        for name, p in params.items()
        if mask[name].shape != p.shape
    ]
    if differing:
        raise UserError(f"mask does not fit the model, shapes differ: {listed(differing)}")
    other = [f"{name} {m.dtype}" for name, m in mask.items() if m.dtype != torch.bool]
    if other:
        raise UserError(f"mask must hold bool tensors, got {listed(other)}")


def check_fraction(fraction: float) -> None:
    """Raises: UserError unless it is in (0, 1]."""
    if isinstance(fraction, bool) or not 0 < fraction <= 1:
        raise UserError(f"mask fraction must lie in (0, 1], got {fraction}")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, a tied one once. Raises: UserError if there is none."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise UserError("model has no trainable parameter; set requires_grad on those that may move")
    return params


def refuse_non_finite(values: Mapping[str, Tensor], what: str) -> None:
    """Raises: NonFiniteError if a value is NaN or infinite; `what` says of what."""
    broken = [name for name, v in values.items() if not bool(torch.isfinite(v).all())]
    if broken:
        raise NonFiniteError(f"{what} is NaN or infinite in {listed(broken)}; the weights or the inputs are broken")


def _extreme(flat: Tensor, fraction: float, select: str) -> Tensor:
    """Bool (n,): the round(fraction·n) entries at one end, equal ones by position."""
    n = flat.numel()
    k = round(fraction * n)
    if k in (0, n):
        return torch.full_like(flat, k == n, dtype=torch.bool)
    if select == "largest":
        border = _kth_largest(flat, k)
        chosen = flat > border
    else:
        border = _kth_largest(flat, n - k + 1)
        chosen = flat < border
    ties = torch.nonzero(flat == border).flatten()
    chosen[ties[: k - int(chosen.count_nonzero())]] = True
    return chosen


def _kth_largest(flat: Tensor, k: int) -> Tensor:
    """The k-th largest of finite floats, by bisection.

    Floats are ordered as their bits are when read as integers, once those of the negative ones are turned round, so
    that a count for each bit finds the value. Sorting or `kthvalue` take more memory, and the latter has no
    deterministic form on accelerators.
    """
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    bits = (flat + 0.0).view(kind)  # -0.0 + 0.0 is 0.0
    magnitude = torch.iinfo(kind).max
    order = torch.where(bits < 0, bits ^ magnitude, bits)
    low, high = int(order.min()), int(order.max())
    while low < high:
        middle = (low + high + 1) // 2
        if int((order >= middle).count_nonzero()) >= k:
            low = middle
        else:
            high = middle - 1
    return torch.tensor(low if low >= 0 else low ^ magnitude, dtype=kind, device=flat.device).view(flat.dtype)


def _split(flat: Tensor, like: Mapping[str, Tensor]) -> Mask:
    """Cut a flat mask into tensors of their own, shaped as in `like`."""
    parts = flat.split([v.numel() for v in like.values()])
    return {name: part.view(v.shape).clone() for (name, v), part in zip(like.items(), parts)}
