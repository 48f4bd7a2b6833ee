"""The penultimate representation of any classifier: what its last linear layer receives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unsharp.errors import UserError
from unsharp.models.modes import evaluating
from unsharp.runtime import rng_state, set_rng_state


class Features:
    """Logits and penultimate features of one model in one forward pass; the layer is found once, at the first call.

    The layer is the last module with a matrix as `weight` whose output, brought to (B, K), is the logits; logits that
    pass a log-softmax afterwards count as the same. Its input, brought to (B, D) in the same way, is the features: as
    it stands for a linear layer on vectors, the first token or the mean over tokens for one on sequences, the mean
    over positions for a 1x1 convolution. A model whose logits come about otherwise states its features itself, by a
    method `with_features(x)` that returns (logits (B, K), features (B, D)); such a method is always preferred.

    Passes run in evaluation mode, whatever the mode of the model, which is put back; BatchNorm's statistics stay as
    they are. Gradients flow unless the caller switches them off.

    Args:
        model: Any classifier; outputs with `.logits`, a "logits" entry or a leading tensor are unwrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        # A compiled model would run past the hooks.
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self._place: _Place | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and features (B, D) of the inputs `x` (B, ...).

        Raises:
            UserError: where the layer cannot be found.
        """
        with evaluating(self.model):
            own = getattr(self.model, "with_features", None)
            if own is not None and not isinstance(own, nn.Module):
                logits, found = own(x)
                return logits_of(logits), found.flatten(1)
            if self._place is None:
                self._place = _find(self.model, x[:2])
            logits, calls = _run(self.model, x, [self._place.module])
            return logits, self._place.bring(calls[self._place.call].input)


def with_features(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, K) and penultimate features (B, D) of `x`; `Features` is the form for many batches.

    Args: as `Features`. Raises: UserError where the features cannot be found.
    """
    return Features(model)(x)


def features(model: nn.Module, x: Tensor) -> Tensor:
    """Penultimate features (B, D) of `x`: what the last linear layer receives (see `Features`).

    Args: as `Features`. Raises: UserError where the features cannot be found.
    """
    return with_features(model, x)[1]


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: a tensor, an object with `.logits`, a mapping with "logits", or a tuple's first.

    Raises:
        UserError: for anything else.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, dict) and isinstance(output.get("logits"), Tensor):
        return output["logits"]
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise UserError(
        f"the model returned {type(output).__name__}; a classifier returns its logits as a tensor (B, classes)"
    )


class _Call(NamedTuple):
    module: nn.Module
    input: Tensor
    output: Tensor


class _Place(NamedTuple):
    """Where the features are: which call of which module in a pass, and how its tensors are brought to (B, D)."""

    module: nn.Module
    call: int
    bring: Callable[[Tensor], Tensor]


def _flat(t: Tensor) -> Tensor:
    return t.flatten(1)


def _first_token(t: Tensor) -> Tensor:
    return t.flatten(1, -2)[:, 0]


def _mean_of_tokens(t: Tensor) -> Tensor:
    return t.flatten(1, -2).mean(1)


def _mean_of_positions(t: Tensor) -> Tensor:
    return t.flatten(2).mean(2)


def _find(model: nn.Module, x: Tensor) -> _Place:
    """Find the classifier by the values it gives on the few samples `x`; nothing of the model or of torch changes."""
    matrices = [m for m in model.modules() if _has_matrix(m)]
    random = rng_state(x.device)
    with torch.no_grad():
        logits, calls = _run(model, x, matrices)
    set_rng_state(random, x.device)
    for i, (module, _, output) in reversed(list(enumerate(calls))):
        # Vectors stay as they are; a sequence or a map has several ways to become one.
        ways = (_flat, _first_token, _mean_of_tokens, _mean_of_positions) if output.ndim > 2 else (_flat,)
        for bring in ways:
            if _same_logits(bring(output), logits):
                return _Place(module, sum(call.module is module for call in calls[:i]), bring)
    raise UserError(
        f"the penultimate features of {type(model).__name__} cannot be found, because its logits are not the output of "
        "a linear layer among its modules; give the model a method with_features(x) that returns (logits, features)"
    )


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim >= 2


def _same_logits(output: Tensor, logits: Tensor) -> bool:
    """Equal up to rounding, and up to one constant per row, which a softmax does not see."""
    if output.shape != logits.shape:
        return False
    tolerance = torch.finfo(logits.dtype).eps ** 0.5
    a, b = output.double(), logits.double()
    if b.ndim == 2 and b.shape[1] > 1:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return bool(((a - b).abs() <= tolerance * b.abs().amax()).all())


def _run(model: nn.Module, x: Tensor, modules: Iterable[nn.Module]) -> tuple[Tensor, list[_Call]]:
    """One forward pass: its logits, and the calls of `modules` in the order in which they ended."""
    calls: list[_Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        received = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(received, Tensor) and isinstance(output, Tensor):
            calls.append(_Call(module, received, output))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        return logits_of(model(x)), calls
    finally:
        for handle in handles:
            handle.remove()
