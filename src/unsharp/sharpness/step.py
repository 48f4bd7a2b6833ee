"""One optimiser step in which frozen coordinates and non-finite gradients leave no trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unsharp.errors import NonFiniteError, UserError
from unsharp.sharpness.point import Gradients, global_norm, keep_region
from unsharp.sharpness.replay import Replay

NEEDS_CLOSURE = ("LBFGS", "SAM")
NEEDS_SPARSE = ("SparseAdam",)
NO_SEPARABLE_STATE = ("Adafactor", "LAMB", "Lamb", "LARS", "Lars", "Muon", "Shampoo", "SOAP")
"""Optimisers whose update mixes coordinates: masked weights stand still under them too, but their state at a masked
coordinate depends on the others'."""
HOST_STATE = ("ASGD", "NAdam")
"""Optimisers that keep more than a step counter on the host; a step that turns out broken later could not be undone."""
POOLED_STATE = ("Adafactor",)
"""Optimisers with state of another shape than the weights, which is not copied to be put back later either."""


SCALE_FREE = (
    "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RMSprop", "Rprop",
)  # fmt: skip
"""Optimisers of torch whose step, but for decay and their ε, does not depend on the size of the gradients; of RAdam
the first steps do."""


def can_be_undone_later(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step may be found broken some steps after it; nobody knows what optimisers from elsewhere keep."""
    kind = type(optimizer)
    return kind.__module__.startswith("torch.optim") and kind.__name__ not in HOST_STATE + POOLED_STATE


def check_base(base: type[torch.optim.Optimizer]) -> None:
    """Refuse optimisers that cannot be the base of a sharpness rule.

    Raises:
        UserError: for one that evaluates a closure by itself or works on sparse gradients only.
    """
    if base.__name__ in NEEDS_CLOSURE:
        raise UserError(f"optimizer {base.__name__} evaluates its own closure several times; take SGD or AdamW")
    if base.__name__ in NEEDS_SPARSE:
        raise UserError(f"optimizer {base.__name__} needs sparse gradients, which are not supported; take Adam")


class MaskedOptimizer:
    """A base optimiser that moves the coordinates of its region alone.

    Whatever it does with momentum, decay or adaptive state, a coordinate outside the region keeps its bits, and so does
    the elementwise optimiser state there: both are put back from a copy.

    Args:
        optimizer: The base optimiser; any but those that `check_base` refuses.
        params: The trainable tensors, as the optimiser knows them, in a fixed order.
        region: Per tensor a 0/1 mask of the coordinates that may move, or None where all may.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor], region: Sequence[Tensor | None] | None = None
    ) -> None:
        check_base(type(optimizer))
        self.optimizer = optimizer
        self.region = [None if m is None or bool(m.all()) else m.bool() for m in region or [None] * len(params)]
        self._params = list(params)
        self._idle = [m is not None and not bool(m.any()) for m in self.region]
        self._new_state: list[tuple[int, Tensor]] = []
        self._counted: list[tuple[int, Tensor]] = []

    def hand_over(self, grads: Gradients) -> None:
        """Put the gradients where the optimiser looks for them; they are consumed."""
        for p, g, idle in zip(self._params, grads, self._idle):
            p.grad = None if idle or g is None else g.to(p.dtype)
        grads.clear()

    @torch.no_grad()
    def clip(self, norm: Tensor, clip_norm: float | None) -> None:
        """Scale the gradients that were handed over, of this norm, down to the bound."""
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._params, clip_norm, norm)

    def step(self, healthy: Tensor | None, n_done: int) -> None:
        """The optimiser's step; then everything outside the region, and everything if unhealthy, is put back.

        Args:
            healthy: Device-side flag (0-d bool) of whether this step counts; None where it is known to.
            n_done: Steps taken before this one.
        """
        if healthy is not None:
            self._new_state += [(n_done, p) for p in self.without_state()]
        if healthy is not None and self.skips_by_itself:
            # the one-kernel optimisers skip a step by themselves when they are handed this flag
            self.optimizer.grad_scale, self.optimizer.found_inf = None, (~healthy).float()  # pyright: ignore
            before = self.copies(None)
            self.optimizer.step()
            del self.optimizer.grad_scale, self.optimizer.found_inf  # pyright: ignore
            self.put_back(before, None)
            return
        if healthy is not None:
            self._counted += [(n_done, p) for p in self._params if p.grad is not None]
        before = self.copies(healthy)
        self.optimizer.step()
        self.put_back(before, healthy)

    @property
    def skips_by_itself(self) -> bool:
        """Whether it decides on the device, in one kernel, that a step does not count."""
        return bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))

    def settle(self, first_bad: int | None) -> None:
        """Take the steps so far as good, or take back what those from `first_bad` on left on the host."""
        made, self._new_state = self._new_state, []
        counted, self._counted = self._counted, []
        if first_bad is not None:
            self._take_back_counters([p for step, p in counted if step >= first_bad])
            self.forget([p for step, p in made if step >= first_bad])

    @torch.no_grad()
    def copies(self, healthy: Tensor | None) -> dict[int, tuple[Tensor, dict[str, Tensor]]]:
        """Weights and elementwise state, before the step, of every tensor that may have to be put back."""
        return {
            i: (p.detach().clone(), {k: v.clone() for k, v in self._elementwise_state(p).items()})
            for i, (p, m) in enumerate(zip(self._params, self.region))
            if p.grad is not None and (m is not None or healthy is not None)
        }

    @torch.no_grad()
    def put_back(self, before: dict[int, tuple[Tensor, dict[str, Tensor]]], healthy: Tensor | None) -> None:
        """Undo the step outside the region, and everywhere if unhealthy."""
        for i, (weights, states) in before.items():
            p, keep = self._params[i], self.region[i]
            if keep is None:
                keep = healthy
            elif healthy is not None:
                keep = keep & healthy.to(keep.device)
            if keep is None:
                continue
            p.data.copy_(torch.where(keep, p.data, weights))
            for name, now in self._elementwise_state(p).items():
                old = states.get(name)
                now.copy_(torch.where(keep, now, self._fresh(p, name) if old is None else old))

    def without_state(self) -> list[Tensor]:
        """The tensors for which the coming step makes state."""
        return [p for p in self._params if p.grad is not None and not self.optimizer.state.get(p)]

    def would_leave_unwritten(self) -> bool:
        """Whether a coming step that does not count would leave a one-kernel SGD with momentum that nobody wrote."""
        momentum = any(group.get("momentum") for group in self.optimizer.param_groups)
        return isinstance(self.optimizer, torch.optim.SGD) and momentum and bool(self.without_state())

    def forget(self, tensors: Sequence[Tensor]) -> None:
        """Drop the state that a broken step made; the one-kernel optimisers leave it unwritten."""
        for p in tensors:
            self.optimizer.state.pop(p, None)

    def _elementwise_state(self, p: Tensor) -> dict[str, Tensor]:
        state = self.optimizer.state.get(p, {})
        return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == p.shape and k != "step"}

    def _fresh(self, p: Tensor, name: str) -> Tensor:
        """What a state entry that this step made holds where the step must not count: its value before any step."""
        value = 0.0
        if isinstance(self.optimizer, torch.optim.Rprop) and name == "step_size":
            value = next(g["lr"] for g in self.optimizer.param_groups if any(q is p for q in g["params"]))
        return torch.as_tensor(value, dtype=p.dtype, device=p.device)

    def _take_back_counters(self, counted: Sequence[Tensor]) -> None:
        """Step counters that live on the host counted on while the device stood still, once for each entry here."""
        for p in counted:
            if "step" in self.optimizer.state.get(p, {}):
                self.optimizer.state[p]["step"] -= 1


class Stepper:
    """Steps with one or several masked optimisers on the same weights, or with none of them on a broken gradient.

    Args:
        optimizers: They step one after another, each with a gradient of its own.
        check_every: 1 decides on the host, at once, whether a gradient is finite. A larger value decides on the device
            and reads the flag every so many steps; meanwhile nothing moves any more. Optimisers whose state could not
            be put back then (`can_be_undone_later`) are looked at at once in any case.
    """

    def __init__(self, optimizers: Sequence[MaskedOptimizer], *, check_every: int = 1) -> None:
        if check_every < 1:
            raise UserError(f"check_every must be at least 1, got {check_every}")
        self.optimizers = list(optimizers)
        self.check_every = check_every if all(can_be_undone_later(o.optimizer) for o in optimizers) else 1
        self.steps = 0
        self.skipped = False
        """Whether the last step with a scaler overflowed."""
        self._params = self.optimizers[0]._params
        self._healthy: Tensor | None = None
        self._healthy_steps: Tensor | None = None

    def step(
        self,
        gradients: Sequence[Gradients | None],
        loss: Tensor,
        replay: Replay,
        *,
        active: Sequence[Tensor | None] = (),
        scaler: torch.amp.GradScaler | None = None,
        clip_norm: float | None = None,
    ) -> None:
        """Step with the gradients, each kept to its optimiser's region.

        Args:
            gradients: Per optimiser, one entry per tensor in the order of the parameters; None where it does not step.
                Scaled if there is a scaler. They are consumed.
            loss: The loss of this step, 0-d.
            replay: Holds what the passes of this step did to buffers, which a broken step undoes.
            active: Per optimiser a device-side flag (0-d bool) of whether its part of the step is taken; None, or
                nothing at all, takes it.
            scaler: Unscales the gradient once, and skips the step on overflow; for a single optimiser.
            clip_norm: Upper bound on each final gradient's norm.

        Raises:
            NonFiniteError: if loss or gradient is not finite and there is no scaler; weights, buffers and optimiser
                state are then as before.
        """
        for grads, masked in zip(gradients, self.optimizers):
            keep_region(grads or [], masked.region)
        if scaler is not None and scaler.is_enabled():
            masked, grads = self.optimizers[0], gradients[0]
            if len(self.optimizers) > 1 or grads is None:
                raise UserError("fp16 scales one gradient alone; take precision bf16 or float32 with several states")
            masked.hand_over(grads)
            self._scaled_step(masked, scaler, replay, clip_norm)
        else:
            self._plain_step(gradients, loss, replay, active or [None] * len(self.optimizers), clip_norm)
        self.steps += 1
        for p in self._params:
            p.grad = None
        if self._healthy is not None and self.steps % self.check_every == 0:
            self.check()

    @property
    def healthy(self) -> Tensor | None:
        """Device-side flag (0-d bool) of whether all steps since the last check count; None where they are known to."""
        return self._healthy

    def counted(self, value: Tensor) -> Tensor:
        """`value` if the last step counts, else 0; decided on the device where the step is."""
        return value if self._healthy is None else torch.where(self._healthy, value, 0.0)

    def check(self) -> None:
        """Read the device's flag now. Raises: NonFiniteError if a step since the last check was not finite."""
        if self._healthy is None or self._healthy_steps is None or bool(self._healthy):
            for masked in self.optimizers:
                masked.settle(None)
            return
        first_bad = int(self._healthy_steps)
        for masked in self.optimizers:
            masked.settle(first_bad)
        self.steps, self._healthy = first_bad, None
        raise _non_finite(first_bad + 1)

    def _plain_step(
        self,
        gradients: Sequence[Gradients | None],
        loss: Tensor,
        replay: Replay,
        active: Sequence[Tensor | None],
        clip_norm: float | None,
    ) -> None:
        # with idle tensors: what is not finite there breaks the step as well
        norms = [None if grads is None else global_norm(grads) for grads in gradients]
        finite = torch.isfinite(loss.detach())
        for norm in norms:
            if norm is not None:
                finite = finite.to(norm.device) & torch.isfinite(norm)
        healthy = self._judged(finite, replay)
        for grads, norm, masked, flag in zip(gradients, norms, self.optimizers, active):
            if grads is None or norm is None:
                continue
            masked.hand_over(grads)
            if flag is not None and (healthy is None or not masked.skips_by_itself or masked.would_leave_unwritten()):
                if not bool(flag):
                    continue
                flag = None
            masked.clip(norm, clip_norm)
            masked.step(healthy if flag is None or healthy is None else healthy & flag, self.steps)

    def _judged(self, finite: Tensor, replay: Replay) -> Tensor | None:
        """The flag under which this step is taken, or None where it is known to be good."""
        if self.check_every == 1:
            good = bool(finite)
            replay.roll_back(good)
            if not good:
                for p in self._params:
                    p.grad = None
                raise _non_finite(self.steps + 1)
            return None
        if self._healthy is None or self._healthy_steps is None:
            self._healthy = torch.ones((), dtype=torch.bool, device=finite.device)
            self._healthy_steps = torch.full((), self.steps, dtype=torch.int64, device=finite.device)
        self._healthy &= finite
        self._healthy_steps += self._healthy
        replay.roll_back(self._healthy)
        return self._healthy

    def _scaled_step(
        self, masked: MaskedOptimizer, scaler: torch.amp.GradScaler, replay: Replay, clip_norm: float | None
    ) -> None:
        scaler.unscale_(masked.optimizer)
        if clip_norm is not None:
            masked.clip(global_norm([p.grad for p in self._params]), clip_norm)
        before, new = masked.copies(None), masked.without_state()
        scaler.step(masked.optimizer)
        masked.put_back(before, None)
        found = scaler._per_optimizer_states[id(masked.optimizer)]["found_inf_per_device"]
        overflow = torch.stack([f.reshape(()) for f in found.values()]).sum() > 0 if found else torch.tensor(False)
        self.skipped = bool(overflow)
        if self.skipped:
            masked.forget(new)
        replay.roll_back(not self.skipped)


class MemoryGuard:
    """Undoes what a step changed in the memories of rules and scales, where that step turns out to be broken.

    Tensors are put back on the device. What has no like there before (a first value, a plain one) is noted, and taken
    back when the broken step is known. Values are replaced, never changed in place.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[int, dict[str, Any], str, Any]] = []

    def keep(self, before: Mapping[str, Any], now: dict[str, Any], healthy: Tensor | None, step: int) -> None:
        """Put back in `now` what step number `step` changed, unless healthy; None is known to be."""
        if healthy is None:
            return
        for key in before.keys() | now.keys():
            old, new = before.get(key, _NOTHING), now.get(key, _NOTHING)
            if new is old:
                continue
            if _alike(old, new, healthy):
                now[key] = torch.where(healthy, new, old)
            elif (
                isinstance(new, list)
                and isinstance(old, list)
                and len(new) == len(old)
                and all(a is b or _alike(a, b, healthy) for a, b in zip(old, new))
            ):
                now[key] = [b if a is b else torch.where(healthy, b, a) for a, b in zip(old, new)]
            else:
                self._undo.append((step, now, key, old))

    def settle(self, first_bad: int | None) -> None:
        """Take the steps so far as good, or take back what those from `first_bad` on left."""
        for step, memory, key, old in reversed(self._undo):
            if first_bad is not None and step >= first_bad:
                memory.pop(key, None)
                if old is not _NOTHING:
                    memory[key] = old
        self._undo.clear()


_NOTHING = object()


def _alike(old: Any, new: Any, flag: Tensor) -> bool:
    """Whether both are tensors of one kind, on the flag's device."""
    if not (isinstance(old, Tensor) and isinstance(new, Tensor)):
        return False
    return (old.shape, old.dtype, old.device, new.device) == (new.shape, new.dtype, new.device, flag.device)


def _non_finite(step: int) -> NonFiniteError:
    return NonFiniteError(
        f"loss or gradient was not finite at step {step}; weights, buffers and optimiser state are those before it. "
        "Lower the learning rate or rho, clip the gradient (clip_norm), or use precision float32"
    )


def validate_region(params: Sequence[Tensor], region: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The region as bool tensors on the parameters' devices.

    Raises:
        UserError: if its length, a shape or a value does not fit.
    """
    if len(region) != len(params):
        raise UserError(f"mask has {len(region)} tensors for {len(params)} parameters; give one 0/1 tensor for each")
    checked: list[Tensor | None] = []
    for i, (p, m) in enumerate(zip(params, region)):
        if m is None:
            checked.append(None)
            continue
        if not isinstance(m, Tensor):
            raise UserError(
                f"mask {i} must be a 0/1 tensor or None, got {type(m).__name__}; a mask by name goes in as its values, "
                "in the order of the parameters"
            )
        if m.shape != p.shape:
            raise UserError(f"mask {i} has shape {tuple(m.shape)}, its parameter has {tuple(p.shape)}")
        if m.dtype != torch.bool and not bool(((m == 0) | (m == 1)).all()):
            raise UserError(f"mask {i} must hold 0 and 1 only; threshold it first")
        checked.append(m.to(p.device).bool())
    return checked
