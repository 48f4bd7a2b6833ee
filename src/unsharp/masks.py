"""Which weights carry the forget set: saliency, and 0/1 masks of exactly so many entries."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unsharp import artifacts, runtime
from unsharp.errors import NonFiniteError, UserError, listed, unknown
from unsharp.models.modes import evaluating

if TYPE_CHECKING:
    from unsharp.data.samples import Batch, Samples

Mask = dict[str, Tensor]
FILE = "mask.safetensors"
Select = Literal["largest", "smallest", "random"]
SELECTS = ("largest", "smallest", "random")


def saliency(
    model: nn.Module,
    samples: Samples,
    indices: Sequence[int] | np.ndarray,
    *,
    batch_size: int = 256,
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
) -> Mask:
    """How strongly the loss on some samples pulls at each weight: |sum over the samples of ∇CE|.

    Evaluation mode, no augmentation, no autocast; a sum, so that the size of the batches matters only to rounding. The
    model is left as it was: modes, buffers, gradients. A tied weight counts once; one that gets no gradient has 0.

    Args:
        model: Maps (B, ...) inputs to (B, K) logits; on the samples' device.
        samples: Where the inputs come from.
        indices: Positions in `samples`, at least one.
        batch_size: Samples per pass, at least 1.
        loss: Sum (0-d) of the losses of a batch's samples; None is the cross-entropy of the logits.

    Returns:
        For each trainable parameter, by name, its saliency (its shape; float32, or float64 for a float64 parameter).

    Raises:
        UserError: if there is no trainable parameter or no sample.
        NonFiniteError: if a gradient is NaN or infinite.

    Source: Fan et al. 2024 (SalUn), eq. 3; Tang & Khanna 2026, Sharp MinMax.
    """
    from unsharp.data.streams import evaluation_batches

    if len(indices) == 0:
        raise UserError("indices is empty; a saliency needs at least one sample")
    params = _trainable(model)
    sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params.values()]
    device, summed = runtime.device_of(model), loss or _summed_cross_entropy
    with evaluating(model), torch.enable_grad(), runtime.full_float32(), torch.autocast(device.type, enabled=False):
        for batch in evaluation_batches(samples, np.asarray(indices), batch_size):
            found = torch.autograd.grad(summed(model, batch), list(params.values()), allow_unused=True)
            for total, grad in zip(sums, found):
                if grad is not None:
                    total += grad
    values = {name: total.abs_() for name, total in zip(params, sums)}
    _refuse_non_finite(values)
    return values


def _summed_cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch.inputs), batch.labels, reduction="sum")


def saliency_mask(
    model: nn.Module,
    samples: Samples,
    forget_indices: Sequence[int] | np.ndarray,
    *,
    fraction: float,
    select: Select = "largest",
    per_layer: bool = False,
    seed: int = 0,
    batch_size: int = 256,
) -> Mask:
    """The weights that carry the forget set: a fraction of all trainable entries, chosen by their saliency.

    Args:
        model: As for `saliency`.
        samples: As for `saliency`.
        forget_indices: Positions of the forget set in `samples`.
        fraction: Share of the entries that are 1, in (0, 1].
        select: "largest" saliency; "smallest", as the published code of Sharp MinMax has it (its argsort lacks a minus
            sign); or "random", drawn with `seed`.
        per_layer: Take the fraction of each tensor rather than of all together.
        seed: Seed of the random choice, at least 0.
        batch_size: As for `saliency`.

    Returns:
        Bool tensors by parameter name, for every trainable parameter; see `select_entries` for the exact count.

    Raises:
        UserError: for an argument out of its range.
        NonFiniteError: if a gradient is NaN or infinite.
    """
    check_choice(fraction, select, seed)
    if select == "random":
        return random_mask(model, fraction=fraction, per_layer=per_layer, seed=seed)
    values = saliency(model, samples, forget_indices, batch_size=batch_size)
    return select_entries(values, fraction=fraction, select=select, per_layer=per_layer)


def select_entries(
    values: Mapping[str, Tensor],
    *,
    fraction: float,
    select: Literal["largest", "smallest"] = "largest",
    per_layer: bool = False,
) -> Mask:
    """The mask of the entries with the largest (or smallest) values.

    Exactly `round(fraction * n)` of the n entries are 1, with Python's `round` (halves go to the even number); with
    `per_layer` this holds for each tensor. Equal values go by position: order of the names, then row-major index.

    Args:
        values: Saliencies by parameter name, finite and at least 0, on one device.
        fraction: In (0, 1].
        select: Which end.
        per_layer: Whether each tensor is ranked alone.

    Raises:
        UserError: for an argument out of its range.
        NonFiniteError: if a value is NaN or infinite.
    """
    check_choice(fraction, select, 0)
    if select == "random":
        raise UserError("select 'random' looks at no values; use random_mask")
    _refuse_non_finite(values)
    negative = [name for name, v in values.items() if bool((v < 0).any())]
    if negative:
        raise UserError(f"values must be at least 0, they are not in {listed(negative)}; take their absolute value")
    if per_layer:
        return {name: _extreme(v.flatten(), fraction, select).view(v.shape) for name, v in values.items()}
    flat = torch.cat([v.flatten() for v in values.values()])
    return _split(_extreme(flat, fraction, select), values)


def random_mask(model: nn.Module, *, fraction: float, per_layer: bool = False, seed: int = 0) -> Mask:
    """A mask of as many entries as `select_entries` takes, drawn uniformly; the same for a seed on every device."""
    check_choice(fraction, "random", seed)
    params = _trainable(model)
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
    params = _trainable(model)
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


def save(mask: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a mask as safetensors, whole or not at all.

    Args:
        mask: Bool tensors by parameter name.
        path: The file.
        metadata: JSON values, kept in the file's header as JSON text.

    Raises:
        UserError: if the file cannot be written.
    """
    tensors = {name: m.detach().to("cpu", torch.bool, copy=True).contiguous() for name, m in mask.items()}
    header = {key: json.dumps(value) for key, value in (metadata or {}).items()}
    with artifacts.writing(path), artifacts.atomic(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def load(path: str | Path, model: nn.Module | None = None) -> Mask:
    """Read a mask from a safetensors file of bool or 0/1 uint8 tensors.

    Args:
        path: The file.
        model: If given, the mask must fit its trainable parameters, stands in their order and lies on their devices.

    Raises:
        UserError: if the file is missing, broken or no mask, or does not fit the model (what differs is named).
    """
    with _opened(path) as file:
        mask = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    other = [f"{name} {m.dtype}" for name, m in mask.items() if m.dtype not in (torch.bool, torch.uint8)]
    other += [f"{name} up to {int(m.max())}" for name, m in mask.items() if m.dtype == torch.uint8 and (m > 1).any()]
    if other or not mask:
        raise UserError(f"mask {str(path)!r} must hold bool or 0/1 uint8 tensors, it has {listed(other) or 'none'}")
    mask = {name: m.bool() for name, m in mask.items()}
    if model is None:
        return mask
    check(mask, model)
    return {name: mask[name].to(p.device) for name, p in _trainable(model).items()}


def load_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `save` wrote. Raises: UserError if the file is missing or broken."""
    with _opened(path) as file:
        header = file.metadata() or {}
    try:
        return {key: json.loads(value) for key, value in header.items()}
    except ValueError:
        raise UserError(f"mask {str(path)!r} has metadata that are not JSON; another program wrote it") from None


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise UserError("model has no trainable parameter; set requires_grad on those that may move")
    return params


def check_choice(fraction: float, select: str, seed: int) -> None:
    if isinstance(fraction, bool) or not 0 < fraction <= 1:
        raise UserError(f"mask fraction must lie in (0, 1], got {fraction}")
    if select not in SELECTS:
        raise unknown("select", select, SELECTS)
    if seed < 0:
        raise UserError(f"seed must be at least 0, got {seed}")


def _refuse_non_finite(values: Mapping[str, Tensor]) -> None:
    broken = [name for name, v in values.items() if not bool(torch.isfinite(v).all())]
    if broken:
        raise NonFiniteError(f"saliency is NaN or infinite in {listed(broken)}; the weights or the inputs are broken")


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
    """The k-th largest of floats that are at least 0, by bisection.

    Such floats are ordered as their bits are when read as integers, so 31 counts find the value. Sorting or `kthvalue`
    take more memory, and the latter has no deterministic form on accelerators.
    """
    bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    low, high = 0, int(bits.max())  # the bits of -0.0 are below 0, so it counts as 0
    while low < high:
        middle = (low + high + 1) // 2
        if int((bits >= middle).count_nonzero()) >= k:
            low = middle
        else:
            high = middle - 1
    return torch.tensor(low, dtype=bits.dtype, device=flat.device).view(flat.dtype)


def _split(flat: Tensor, like: Mapping[str, Tensor]) -> Mask:
    """Cut a flat mask into tensors of their own, shaped as in `like`."""
    parts = flat.split([v.numel() for v in like.values()])
    return {name: part.view(v.shape).clone() for (name, v), part in zip(like.items(), parts)}


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    if not Path(path).is_file():
        raise UserError(f"mask {str(path)!r} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"mask {str(path)!r} is no whole safetensors file ({error}); make it again") from None
