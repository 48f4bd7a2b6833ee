"""The weights of one step, and the one way to evaluate a gradient at them or beside them."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from unsharp.errors import UserError
from unsharp.sharpness.replay import Replay

Gradients = list[Tensor | None]


class Point:
    """Where a phase stands: its weights w, its region, and its gradient ∇L at w and at w + offset.

    Args:
        params: The trainable tensors, in a fixed order.
        evaluate: Clears the gradients, runs forward and backward of the phase's own signed loss L, returns L (0-d).
        replay: Protects buffers and random state in every pass but the first.
        region: Per tensor a 0/1 mask of the coordinates that may move, or None where all may.
        names: Names of the tensors, for rules that treat some differently.
        norms: Per tensor whether it belongs to a normalisation layer; None where that is not known.
        frozen: The other tensors that a pass meets, where a pass may be computed in float32: tensors in half precision
            are then perturbed in it, since most of a small offset would be lost in their own, coarse grid. None
            perturbs every tensor in its own precision.
        evaluate_perturb: Like `evaluate`, for another objective from which the perturbation comes; it forwards the
            same batches in the same order, since its pass is the one that moves the buffers, unless there is `settle`.
        settle: Sends the batches of the phase's own loss forward alone, to move buffers and random state; given where
            the perturbation comes from other batches, whose pass then leaves no trace.
        value: Runs forward alone and returns L (0-d) with its graph, scaled where gradients are, and L's value; for
            rules that differentiate twice. None where whoever steps gives no such thing.
        parts: Makes points of the same weights on so many parts of the batch; None where that cannot be.
        memory: What the rule keeps from step to step: tensors and plain values. It is saved with the run.
        step: Steps that this phase has taken before.
        leak: Whether the gradient at w acts outside the region as well.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        evaluate: Callable[[], Tensor],
        replay: Replay,
        *,
        region: Sequence[Tensor | None] | None = None,
        names: Sequence[str] | None = None,
        norms: Sequence[bool] | None = None,
        frozen: Sequence[Tensor] | None = None,
        evaluate_perturb: Callable[[], Tensor] | None = None,
        settle: Callable[[], None] | None = None,
        value: Callable[[], tuple[Tensor, Tensor]] | None = None,
        parts: Callable[[int], list[Point]] | None = None,
        memory: dict[str, Any] | None = None,
        step: int = 0,
        leak: bool = False,
    ) -> None:
        self.params = params
        self.region = region
        self.names = names
        self.norms = norms
        self.loss: Tensor | None = None
        self.last_loss: Tensor | None = None
        self.memory: dict[str, Any] = {} if memory is None else memory
        self.step = step
        self.leak = leak
        self.has_own_perturbation = evaluate_perturb is not None
        self._evaluate = evaluate
        self._evaluate_perturb = evaluate_perturb
        self._settle = settle
        self._replay = replay
        self._value = value
        self._parts = parts
        self._frozen = frozen
        self._whole: Point | None = None

    def gradient(self) -> Gradients:
        """∇L(w): the pass that moves buffers and random state. Entries are None where L does not depend on a tensor."""
        with self._replay.first():
            return self._run(self._evaluate)

    def perturbation_gradient(self) -> Gradients:
        """∇ of the perturbation's own objective at w; it takes the place of `gradient` as the pass that counts."""
        if self._evaluate_perturb is None:
            raise ValueError("this phase has no perturb_objective")
        if self._settle is None:
            with self._replay.first():
                return self._run(self._evaluate_perturb)
        with self._replay.first():
            self._settle()
        with self._replay.again():
            return self._run(self._evaluate_perturb)

    def gradient_at(self, offset: Gradients | None, *, first: bool = False) -> Gradients:
        """∇L(w + offset) on the same batch and draws (None: at w); w comes back from a copy, to the bit.

        With `first` it is the pass that moves buffers and random state, for a rule that takes none at w.
        `offset` is used up: its tensors are dead once added, and their memory is the second pass's.
        """
        with self._moved(offset), self._replay.first() if first else self._replay.again():
            return self._run(self._evaluate)

    def parts(self, n: int) -> list[Point]:
        """Points of the same weights on n parts of the batch, whose mean loss is this one's where they are equal.

        Raises:
            UserError: where whoever steps hands over no batch.
        """
        if self._parts is None:
            raise UserError("this rule works on parts of the batch, which only the engine can give it")
        found = self._parts(n)
        for part in found:
            part._whole = self
        return found

    @contextlib.contextmanager
    def graph(self, offset: Gradients | None = None, *, first: bool = True) -> Iterator[Tensor]:
        """L(w + offset) with its graph (None: L(w)); for rules that differentiate twice, within the context.

        With `first` it is the pass that moves buffers and random state, else one that leaves no trace. `offset` is used
        up as in `gradient_at`. Attention takes its plain form, since its fused ones have no second derivative.

        Raises:
            UserError: where whoever steps gives no value without a backward pass.
        """
        if self._value is None:
            raise UserError("this rule differentiates twice, which only the engine can do for it")
        with (
            self._moved(offset),
            self._replay.first() if first else self._replay.again(),
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
        ):
            loss, value = self._value()
            self._note(value)
            yield loss

    def first_loss(self) -> Tensor:
        """The value (0-d) of the first evaluation of this step, or of a later one that was not finite."""
        if self.loss is None:
            raise ValueError("nothing was evaluated at this point")
        return self.loss

    def _moved(self, offset: Gradients | None) -> contextlib.AbstractContextManager[None]:
        """The weights at w + offset meanwhile; afterwards they are w to the bit. `offset` is used up."""
        if offset is None or self._frozen is None or not any(map(is_half, self.params)):
            return self._moved_in_place(offset)
        return self._moved_in_float32(offset)

    @contextlib.contextmanager
    def _moved_in_float32(self, offset: Gradients) -> Iterator[None]:
        """w + offset in float32, and with it all else that a pass meets; w itself stands aside meanwhile."""
        tensors = [*self.params, *(self._frozen or ())]
        kept = [p.data for p in tensors]
        offsets = [*offset, *(None for _ in self._frozen or ())]
        offset.clear()
        try:
            for p, o in zip(tensors, offsets):
                if is_half(p):
                    p.data = p.data.float() if o is None else p.data.float().add_(o)
                elif o is not None:
                    p.data = p.data + o
            offsets.clear()
            yield
        finally:
            for p, w in zip(tensors, kept):
                p.data = w

    @contextlib.contextmanager
    def _moved_in_place(self, offset: Gradients | None) -> Iterator[None]:
        moved = [(p.data, o) for p, o in zip(self.params, offset or ()) if o is not None]
        weights, offsets = [w for w, _ in moved], [o for _, o in moved]
        kept = [w.clone() for w in weights]
        del moved
        if offset is not None:
            offset.clear()
        try:
            if weights:
                torch._foreach_add_(weights, offsets)
                offsets.clear()
                # under an autocast around the whole step, the first pass's copies of the weights would be used again
                torch.clear_autocast_cache()
            yield
        finally:
            if weights:
                torch._foreach_copy_(weights, kept)
                torch.clear_autocast_cache()

    def _run(self, evaluate: Callable[[], Tensor]) -> Gradients:
        with torch.enable_grad():
            loss = evaluate()
        self._note(loss)
        return take_gradients(self.params)

    def _note(self, loss: Tensor) -> None:
        value = loss.detach() if isinstance(loss, Tensor) else torch.as_tensor(float(loss))
        self.last_loss = value
        self.loss = value if self.loss is None else torch.where(torch.isfinite(value), self.loss, value)
        if self._whole is not None:
            self._whole._note(loss)


def is_half(tensor: Tensor) -> bool:
    """Whether the tensor holds floats of less than 32 bits."""
    return tensor.is_floating_point() and tensor.element_size() < 4


def take_gradients(params: Sequence[Tensor]) -> Gradients:
    """Move the gradients out of the parameters, so that the next backward pass starts from none.

    Those of weights in half precision come in float32, in which rules add and scale them.
    """
    grads: Gradients = []
    for p in params:
        g = p.grad
        if g is not None and g.is_sparse:
            raise UserError("sparse gradients are not supported: build the embedding with sparse=False")
        # a view into a communication bucket would be overwritten by the next backward pass
        g = g.clone() if g is not None and g._is_view() else g
        grads.append(g.float() if g is not None and is_half(g) else g)
        p.grad = None
    return grads


@torch.no_grad()
def keep_region(grads: Gradients, region: Sequence[Tensor | None] | None) -> None:
    """Zero the gradients outside the region, in place; NaN stays NaN, so that it is noticed."""
    if region is not None:
        for g, m in zip(grads, region):
            if g is not None and m is not None:
                g.mul_(m)


@torch.no_grad()
def global_norm(grads: Gradients) -> Tensor:
    """‖g‖₂ over all tensors, 0-d on the first tensor's device, in at least float32; 0 where there is none."""
    present = [g for g in grads if g is not None]
    if not present:
        return torch.zeros(())
    dtype = reduce(torch.promote_types, {g.dtype for g in present}, torch.float32)
    norms = torch._foreach_norm(present, 2, dtype)
    return torch.linalg.vector_norm(torch.stack([n.to(present[0].device) for n in norms]))


@torch.no_grad()
def scale_gradients(grads: Gradients, factor: Tensor) -> None:
    """Multiply all gradients by a 0-d tensor, in place, without reading it on the host."""
    kinds = defaultdict(list)
    for g in grads:
        if g is not None:
            kinds[g.device, g.dtype].append(g)
    for (device, dtype), group in kinds.items():
        torch._foreach_mul_(group, factor.to(device, dtype))
