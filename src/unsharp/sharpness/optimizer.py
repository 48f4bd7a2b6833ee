"""`unsharp.SAM`: the sharpness rule as a torch optimiser, usable in anybody's training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from unsharp.errors import UserError
from unsharp.sharpness.perturbation import AdaptiveSharpness, Sharpness
from unsharp.sharpness.point import Point
from unsharp.sharpness.replay import CalledModules, Replay
from unsharp.sharpness.step import MaskedOptimizer, Stepper, check_base, validate_region


class SAM(Optimizer):
    """Sharpness-aware minimisation (or maximisation) around any base optimiser, with masked weights that stand still.

    The step is g₀ + s·λ·(∇L(w + ε) − g₀), ε = ρ·T²·g₀/‖T·g₀‖₂, T = 1 (SAM) or |w| (ASAM), kept to the mask; w comes
    back from a copy. The second pass repeats the first one's dropout and leaves no trace in BatchNorm's statistics.
    A non-finite step raises `NonFiniteError` and changes nothing; under a `GradScaler` it is skipped and backed off.
    `rho=0` is the base optimiser, to the bit, in one pass.

    Args:
        params: Parameters or parameter groups, as for the base optimiser.
        base: Class of the base optimiser; those that need a closure or sparse gradients are refused.
        rho: Radius ρ ≥ 0.
        adaptive: True for ASAM.
        sign: "min" lowers sharpness, "max" raises it.
        lam: Weight λ ≥ 0 of the correction.
        mask: 0/1 tensors in the order of the parameters; a coordinate at 0 never moves, nor does its elementwise state.
        perturb: "region" perturbs the weights inside the mask, "all" every weight.
        check_every: 1 looks at once whether the step was finite, which waits for the device. A larger value reads the
            device's own flag every so many steps; from a broken step on nothing moves until the error is raised.
        **base_kwargs: Arguments of the base optimiser (`lr`, `momentum`, `weight_decay`, ...).

    Examples:
        >>> optimizer = unsharp.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = criterion(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)

    Source:
        Foret et al., ICLR 2021 (arXiv 2010.01412); Kwon et al., ICML 2021 (arXiv 2102.11600); signs and λ: Tang &
        Khanna, ICLR 2026 (arXiv 2506.13715).
    """

    def __init__(
        self,
        params: Iterable[Any],
        base: type[Optimizer] = torch.optim.SGD,
        rho: float = 0.05,
        adaptive: bool = False,
        sign: Literal["min", "max"] = "min",
        lam: float = 1.0,
        mask: Sequence[Tensor | None] | None = None,
        perturb: Literal["region", "all"] = "region",
        check_every: int = 1,
        **base_kwargs: Any,
    ) -> None:
        if not (isinstance(base, type) and issubclass(base, Optimizer)):
            raise UserError(
                f"base must be an optimiser class such as torch.optim.SGD, got {base!r}; its arguments follow"
            )
        check_base(base)
        if perturb == "norm":
            raise UserError(
                "perturb='norm' is not possible here: SAM is given parameters alone and cannot tell which belong to "
                "normalisation layers; take rule sam or asam in unsharp.train or unsharp.unlearn, or perturb='region'"
            )
        rule = AdaptiveSharpness if adaptive else Sharpness
        self.rule = rule(rho=rho, sign=sign, lam=lam, perturb=perturb)
        self.base = base(params, **base_kwargs)
        super().__init__(self.base.param_groups, self.base.defaults)
        self._mask = None if mask is None else list(mask)
        self._check_every = check_every
        self._share()
        self._build_stepper()

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        clip_norm: float | None = None,
    ) -> Any:
        """Take one step.

        Args:
            closure: Clears the gradients, runs all micro-batches of the step forward and backward, returns the loss.
                It is called once for `rho=0`, else twice. With a scaler it calls `scaler.scale(loss).backward()`.
            scaler: The `GradScaler`; call `scaler.update()` afterwards, but neither `unscale_` nor `scaler.step`.
            clip_norm: Upper bound on the norm of the final, masked, unscaled gradient.

        Returns:
            What the first call of the closure returned.

        Raises:
            UserError: without a closure, or for a clip_norm that is no positive number.
            NonFiniteError: if the step was not finite and there is no scaler; nothing has changed then.
        """
        if closure is None:
            raise UserError(
                "SAM.step needs a closure that clears gradients, computes the loss, calls backward, returns it"
            )
        if clip_norm is not None and not (math.isfinite(clip_norm) and clip_norm > 0):
            raise UserError(f"clip_norm must be a finite number above 0, got {clip_norm}")
        returned: list[Any] = []

        def evaluate() -> Tensor:
            loss = closure()
            returned.append(loss)
            return loss if isinstance(loss, Tensor) else torch.as_tensor(0.0 if loss is None else float(loss))

        params = self._params()
        replay = Replay(params[0].device, CalledModules())
        point = Point(params, evaluate, replay, region=self._region)
        grads = self.rule.gradient(point)
        self._stepper.step([grads], point.first_loss(), replay, scaler=scaler, clip_norm=clip_norm)
        return returned[0]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to wrapper and base alike; not possible under a mask, which lists the tensors it was made for."""
        if not hasattr(self, "_stepper"):  # the base constructor, registering the base's own groups
            super().add_param_group(param_group)
            return
        if self._mask is not None:
            raise UserError(
                "a parameter group cannot be added under a mask; build a new SAM with a mask for all tensors"
            )
        self.base.add_param_group(param_group)
        self._share()
        self._build_stepper()

    def state_dict(self) -> dict[str, Any]:
        """The base optimiser's state; rho, sign and mask are arguments, not state.

        Raises:
            NonFiniteError: if a step was not finite and `check_every` has not looked since.
        """
        self._stepper.check()
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the base optimiser's state; wrapper and base share their groups afterwards as before."""
        self.base.load_state_dict(state_dict)
        self._share()
        self._build_stepper()  # a broken step that has not been looked at yet belongs to the state that is gone

    def __getstate__(self) -> dict[str, Any]:
        own = ("rule", "base", "_mask", "_check_every", "_region", "_stepper")
        return super().__getstate__() | {name: self.__dict__[name] for name in own}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        self.base.zero_grad(set_to_none)

    def _share(self) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _build_stepper(self) -> None:
        params = self._params()
        self._region = None if self._mask is None else validate_region(params, self._mask)
        self._stepper = Stepper([MaskedOptimizer(self.base, params, self._region)], check_every=self._check_every)
