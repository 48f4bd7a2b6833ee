"""Many small networks of one architecture, trained together on one device, each as if it were trained alone."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from unsharp import runtime
from unsharp.artifacts import Workspace
from unsharp.config import digest
from unsharp.data.samples import ImageSamples, Samples, StreamedSamples, TensorSamples, spans
from unsharp.data.streams import Stream, evaluation_batches
from unsharp.errors import NonFiniteError, UserError, listed, unknown
from unsharp.models.modes import evaluating
from unsharp.phases import RETAIN
from unsharp.pool.grouped import CannotStack, Form, Grouped, Mapped, check_form, tensors_of
from unsharp.progress import SILENT, Progress
from unsharp.sharpness.base import NO_RULE
from unsharp.training import Record, TrainConfig, initial_model, named_by, train

Kind = Literal["vmap", "grouped", "single", "auto"]

ELEMENTWISE = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "ASGD")
"""Optimisers of `torch.optim` that treat each weight for itself, so that one of them can step for many networks."""
PLANNED = 2**21
"""Inputs whose order and draws are laid out at a time: a hundred megabytes on the host."""
AUTO, AUTO_HOST = ("grouped", "vmap"), ("grouped",)
"""What "auto" tries, in this order. On a host vmap was never quicker than one by one."""
HOST_BYTES = 8 * 2**20
"""On a host a stack took 0.57 to 1.00 of the time of one by one where all members' outputs of the largest layer were no
more than this, near the size of a processor's cache; above it stacks lose more and more (`benchmarks/stack.py`)."""
TRIAL_BATCH, TRIAL_MEMBERS = 4, 3
MEMBERS_DIRECTORY = ".members"
LOSS = f"loss/{RETAIN}"
"""What the history calls the loss, as where a network is trained alone."""


@dataclass(frozen=True, eq=False)
class Member:
    """One network of a stack.

    Args:
        indices: (k,) int64, sorted positions to train on.
        seed: Seed of initialisation, order, augmentation and dropout, at least 0.
    """

    indices: np.ndarray
    seed: int


class Stack:
    """M networks of one architecture that are trained together, to the same weights as each alone but for rounding.

    Member j becomes what `training.train` makes of `initial_model(make_model, seed_j)` with `indices_j` and `seed_j`:
    the same order, augmentation, BatchNorm statistics, schedule, decay and clipping, each of its own. In a stack the
    sum of the members' losses goes backward, which gives each one the gradient of its own loss, and one elementwise
    optimiser steps for all.

    A member whose loss is no longer finite harms no other: it is told in `failed`, and its outputs and weights are NaN.

    Args:
        make_model: Makes a network from torch's random state; always of the same architecture.
        samples: The whole training set.
        members: Whom to train, each on equally many samples.
        config: How; `config.seed` is not used.
        device: Where.
        kind: "grouped" makes one network with M times the channels of them, "vmap" maps one over the stacked weights,
            "single" trains one after the other, "auto" takes what was measured to be quickest on this kind of device.
            What is not possible falls back in this order; `reason` says why. With a sharpness rule, fp16, dropout or
            other randomness within the network, an optimiser that mixes coordinates, or several processes it is always
            "single".

    Attributes:
        kind: The form that was chosen.
        reason: Why it is not the one that was asked for; "" where it is.

    Raises:
        UserError: if there is no member, members differ in their number of samples, or indices or seed are not valid.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        samples: Samples,
        members: Sequence[Member],
        config: TrainConfig,
        device: torch.device,
        *,
        kind: Kind = "auto",
    ) -> None:
        if kind not in get_args(Kind):
            raise unknown("kind", kind, get_args(Kind))
        self.members = list(members)
        self.samples, self.config, self.device = samples, config, device
        self._streams = _streams(samples, self.members, config)
        self._template = initial_model(make_model, self.members[0].seed, device)
        self.kind, self.reason = self._choose(kind)
        self._form: Form | None = None
        self._models: list[nn.Module] = []
        if self.kind == "single":
            self._models = [initial_model(make_model, member.seed, device) for member in self.members]
        else:
            self._form = self._formed(self.kind, self._template, len(self.members))
            for j, member in enumerate(self.members):
                self._form.put(j, initial_model(make_model, member.seed, torch.device("cpu")))
        self._failed: set[int] = set()
        self._started = False

    def __len__(self) -> int:
        return len(self.members)

    @property
    def failed(self) -> list[int]:
        """The members whose training came upon a loss, or ended with weights, that are not finite."""
        return sorted(self._failed)

    # --- training ----------------------------------------------------------------------------------------------------

    def train(
        self,
        *,
        workspace: Workspace | None = None,
        save_seconds: float = 60.0,
        progress: Progress = SILENT,
        label: str = "training",
        on_epoch: Callable[[], Mapping[str, float]] | None = None,
    ) -> Record:
        """Train all members to the end.

        Args:
            workspace: Where the state is kept from which a killed run goes on, to the same bits; None keeps none.
            save_seconds: Seconds between two savings within an epoch.
            progress: Told of each step of the stack, or of each member where they are trained one by one.
            label: Shown with the progress.
            on_epoch: Called after each epoch, of the stack or of each single member; what it returns joins the history.

        Returns:
            The record of the run: a row per epoch with the mean over the members that have not failed; passes are
            counted for each member.

        Raises:
            UserError: if the stack was trained before, or the workspace holds the state of a stack of another kind or
                of other members.
        """
        if self._started:
            raise UserError(
                "this stack was trained before: its weights are no longer those of the start; make another one"
            )
        self._started = True
        if self._form is None:
            record = self._train_single(workspace, save_seconds, progress, label, on_epoch)
        else:
            record = self._train_stacked(self._form, workspace, save_seconds, progress, label, on_epoch)
        about = named_by(self.config, self.samples) | {
            "seed": [member.seed for member in self.members],
            "kind": self.kind,
            "reason": self.reason,
            "failed": self.failed,
        }
        return dataclasses.replace(record, about=about)

    def _train_stacked(
        self,
        form: Form,
        workspace: Workspace | None,
        save_seconds: float,
        progress: Progress,
        label: str,
        on_epoch: Callable[[], Mapping[str, float]] | None,
    ) -> Record:
        steps = _Steps(form, self._streams, self.config, self.device)
        if workspace is not None:
            # Optimisers keep counters on the host, and move all else to the device by themselves.
            state = workspace.load_state(torch.device("cpu"))
            if state is not None:
                self._check_identity(workspace, state)
                steps.load_state_dict(state)

        def save() -> None:
            if workspace is not None:
                workspace.save_state({"stack": self._identity(), **steps.state_dict()})

        with runtime.PeakMemory(self.device) as memory:
            steps.run(None if workspace is None else save, save_seconds, progress, label, on_epoch)
        self._failed = steps.failed()
        return Record(history=steps.history, seconds=steps.seconds, passes=steps.passes, peak_memory_bytes=memory.bytes)

    def _train_single(
        self,
        workspace: Workspace | None,
        save_seconds: float,
        progress: Progress,
        label: str,
        on_epoch: Callable[[], Mapping[str, float]] | None,
    ) -> Record:
        if workspace is not None:
            self._check_identity(workspace, workspace.load_state(torch.device("cpu")))
        records: list[Record] = []
        for j, (member, model) in enumerate(zip(self.members, self._models)):
            try:
                records.append(
                    train(
                        model,
                        self.samples,
                        member.indices,
                        dataclasses.replace(self.config, seed=member.seed),
                        workspace=_part(workspace, j),
                        save_seconds=save_seconds,
                        progress=progress,
                        label=f"{label} {j + 1} of {len(self)}",
                        on_epoch=on_epoch,
                    )
                )
            except NonFiniteError:
                self._failed.add(j)
                continue
            if not all(bool(torch.isfinite(t).all()) for _, t in tensors_of(model) if t.is_floating_point()):
                self._failed.add(j)
        return _together(records)

    def _identity(self) -> str:
        """What a saved state belongs to."""
        subsets = hashlib.sha256(b"".join(stream.indices.tobytes() for stream in self._streams)).hexdigest()
        return f"{self.kind} {digest([stream.seed for stream in self._streams], subsets)}"

    def _check_identity(self, workspace: Workspace, state: Mapping[str, Any] | None) -> None:
        if state is None or state.get("stack") == self._identity():
            return
        raise UserError(
            f"{workspace.path} holds the unfinished work of other members, or of kind "
            f"{str(state.get('stack')).split()[0]!r} where this is {self.kind!r}; name that kind, or take another place"
        )

    # --- what comes out ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, samples: Samples, indices: np.ndarray, batch_size: int = 1000) -> Tensor:
        """What the members say of some samples, in evaluation mode, in float32 and without augmentation.

        Args:
            samples: Where the inputs come from; each is read once for all members.
            indices: (n,) int64 positions in `samples`, at least one.
            batch_size: Samples that are read at a time, at least 1; they go forward in parts where the members
                together would need more memory for them than for a training step.

        Returns:
            (M, n, classes) float32 on the host; NaN for a member that has failed.

        Raises:
            UserError: if there is nothing to predict.
        """
        if len(indices) == 0:
            raise UserError("indices is empty; there is nothing to predict")
        part = batch_size if self._form is None else max(batch_size // len(self), self.config.batch_size)
        batches = evaluation_batches(samples, indices, batch_size)
        outputs = (self._evaluated(inputs) for batch in batches for inputs in batch.inputs.split(part))
        first = next(outputs)
        logits, done = torch.empty(len(self), len(indices), first.shape[-1]), 0
        for output in itertools.chain([first], outputs):
            logits[:, done : done + output.shape[1]] = output.cpu()
            done += output.shape[1]
        logits[self.failed] = float("nan")
        return logits

    def _evaluated(self, inputs: Tensor) -> Tensor:
        if self._form is not None:
            self._form.train(False)
            return self._form.shared_logits(inputs)
        found = []
        for model in self._models:
            with evaluating(model):
                found.append(model(inputs))
        return torch.stack(found)

    @torch.no_grad()
    def state(self, j: int) -> dict[str, Tensor]:
        """The state dict of member j as if it had been trained alone, on the host; NaN where it has failed.

        Raises:
            UserError: if there is no such member.
        """
        if not 0 <= j < len(self):
            raise UserError(f"member must be in 0..{len(self) - 1}, got {j}")
        if self._form is not None:
            self._form.take(j, self._template)
        model = self._template if self._form is not None else self._models[j]
        state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        if j in self._failed:
            for tensor in state.values():
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
        return state

    # --- the choice of a form ----------------------------------------------------------------------------------------

    def _choose(self, kind: Kind) -> tuple[str, str]:
        """The form to take, and why it is not the one that was asked for."""
        if kind == "single":
            return "single", ""
        reason = _never_stacked(self.config, self._template)
        if reason is not None:
            return "single", reason
        inputs = self._trial_inputs()
        reason = _not_repeatable(self._template, inputs[0], self.device)
        if reason is not None:
            return "single", reason
        if kind == "auto" and not 1 < len(self) <= _most(self._template, inputs[0], self._streams[0], self.device):
            return "single", ""
        forms = {"vmap": ("vmap",), "auto": AUTO_HOST if runtime.is_host(self.device) else AUTO}
        reasons = []
        for form in forms.get(kind, AUTO):
            try:
                self._try(form, inputs)
                return form, "; ".join(reasons)
            except CannotStack as error:
                reasons.append(f"{form} does not fit this network: {error}")
        return "single", "; ".join(reasons)

    def _trial_inputs(self) -> Tensor:
        """(m, b, ...): a few inputs for each of a few members."""
        m, b = min(len(self), TRIAL_MEMBERS), min(self._streams[0].smallest_batch, TRIAL_BATCH)
        order = np.resize(self._streams[0].indices, m * b)
        inputs = torch.cat([batch.inputs for batch in evaluation_batches(self.samples, order)])
        # a sample that is broken is a matter for the training, not for the choice
        return (inputs.nan_to_num(0, 0, 0) if inputs.is_floating_point() else inputs).unflatten(0, (m, b))

    def _try(self, kind: str, inputs: Tensor) -> None:
        """Hold a form to the networks themselves, a few of them on a few inputs. Raises: CannotStack."""
        models = [copy.deepcopy(self._template) for _ in inputs]
        _make_different(models)
        exact = _takes_double(models[0], inputs[0])
        if exact:
            models, inputs = [model.double() for model in models], inputs.double()
        with runtime.full_float32():
            check_form(lambda m, n: self._formed(kind, m, n), models, inputs, tolerance=1e-7 if exact else 1e-2)

    def _formed(self, kind: str, template: nn.Module, n: int) -> Form:
        if kind == "vmap":
            return Mapped(template, n)
        return Grouped(template, n, channels_last=self.config.channels_last)


class _Steps:
    """The steps of a stack in its form, which can stop after any of them and go on to the same bits."""

    def __init__(self, form: Form, streams: Sequence[Stream], config: TrainConfig, device: torch.device) -> None:
        self._form, self._streams, self._config, self._device = form, streams, config, device
        self._n, self._n_batches = len(streams), streams[0].n_batches
        self._optimizer = config.optimizer.build(list(form.leaves.items()))
        for group in self._optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._sums = torch.zeros(self._n, device=device)
        self._alive = torch.ones(self._n, dtype=torch.bool, device=device)
        self.epoch, self.batch = 0, 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []

    @property
    def done(self) -> int:
        """Steps taken so far, each with a batch for every member."""
        return self.epoch * self._n_batches + self.batch

    @property
    def passes(self) -> int:
        """Forward–backward passes so far, one for each batch of a member."""
        return self._n * self.done

    def run(
        self,
        save: Callable[[], None] | None,
        save_seconds: float,
        progress: Progress,
        label: str,
        on_epoch: Callable[[], Mapping[str, float]] | None,
    ) -> None:
        """Take all steps that are left, as long as a member lives."""
        total, saved = self._config.epochs * self._n_batches, time.monotonic()
        progress.start(label, total, done=self.done)
        try:
            while self.epoch < self._config.epochs and bool(self._alive.any()):
                self._form.train(True)
                started = time.monotonic()
                for inputs, labels in self._batches():
                    factor = self._config.lr_factor(self.done, total)
                    for group in self._optimizer.param_groups:
                        group["lr"] = group["initial_lr"] * factor
                    self._step(inputs, labels)
                    self.batch += 1
                    progress.advance()
                    if save is not None and time.monotonic() - saved >= save_seconds:
                        self.seconds += time.monotonic() - started
                        save()
                        started = saved = time.monotonic()
                self._end_epoch(started, on_epoch)
                if save is not None:
                    save()
                    saved = time.monotonic()
        finally:
            progress.finish()

    def failed(self) -> set[int]:
        """The members that came upon a loss that is not finite, or have such weights or buffers now."""
        good = self._alive.clone()
        for tensor in self._form.views.values():
            if tensor.is_floating_point():
                good &= torch.isfinite(tensor).reshape(self._n, -1).all(1)
        return set(torch.nonzero(~good).flatten().tolist())

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, as tensors and plain values."""
        return {
            "tensors": {name: tensor.detach() for name, tensor in self._form.stored.items()},
            "optimizer": self._optimizer.state_dict(),
            "sums": self._sums,
            "alive": self._alive,
            "at": {"epoch": self.epoch, "batch": self.batch, "seconds": self.seconds},
            "history": self.history,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where `state_dict` was taken."""
        for name, tensor in self._form.stored.items():
            tensor.copy_(state["tensors"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._sums.copy_(state["sums"])
        self._alive.copy_(state["alive"])
        at = state["at"]
        self.epoch, self.batch, self.seconds = at["epoch"], at["batch"], at["seconds"]
        self.history = list(state["history"])

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of this epoch: inputs (M, B, ...) and labels (M, B) of each step."""
        samples, n, sizes = self._streams[0].samples, self._n, self._streams[0].sizes.tolist()
        if not isinstance(samples, (ImageSamples, TensorSamples, StreamedSamples)):
            for parts in zip(*(stream.epoch(self.epoch, self.batch) for stream in self._streams)):
                yield torch.stack([part.inputs for part in parts]), torch.stack([part.labels for part in parts])
            return
        # One pass over the images serves all: the members' batches of a step lie behind one another.
        drawn = [stream.drawn(self.epoch) for stream in self._streams]
        steps = list(spans(sizes))[self.batch :]
        at_a_time = max(1, PLANNED // (n * max(sizes)))
        for first in range(0, len(steps), at_a_time):
            planned = steps[first : first + at_a_time]
            order = np.concatenate([positions[step] for step in planned for positions, _ in drawn])
            rows = np.concatenate([rows[step] for step in planned for _, rows in drawn])
            counts = [n * (step.stop - step.start) for step in planned]
            for batch in samples.batches_by_row(order, counts, rows):
                yield batch.inputs.unflatten(0, (n, -1)), batch.labels.unflatten(0, (n, -1))

    def _step(self, inputs: Tensor, labels: Tensor) -> None:
        self._optimizer.zero_grad()
        with runtime.autocast(self._device, self._config.precision):
            losses = _losses(self._form.logits(inputs), labels, self._config.label_smoothing)
            losses.sum().backward()
        if self._config.clip_norm is not None:
            self._clip(self._config.clip_norm)
        self._optimizer.step()
        losses = losses.detach()
        self._alive &= torch.isfinite(losses)
        self._sums += losses

    @torch.no_grad()
    def _clip(self, clip_norm: float) -> None:
        """Scale each member's gradient down to the bound."""
        gradients = [p.grad.unflatten(0, (self._n, -1)) for p in self._form.leaves.values() if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
        factors = (clip_norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))

    def _end_epoch(self, started: float, on_epoch: Callable[[], Mapping[str, float]] | None) -> None:
        alive = self._alive.tolist()
        losses = [loss / self._n_batches for loss, lives in zip(self._sums.tolist(), alive) if lives]
        self._silence([j for j, lives in enumerate(alive) if not lives])
        self.seconds += time.monotonic() - started
        self.epoch, self.batch = self.epoch + 1, 0
        self._sums.zero_()
        row: dict[str, float] = {
            "epoch": self.epoch,
            "lr": self._optimizer.param_groups[0]["lr"],
            "seconds": self.seconds,
            "passes": self.passes,
        }
        row |= {LOSS: sum(losses) / len(losses)} if losses else {}
        self.history.append(row | dict(on_epoch() if on_epoch is not None else {}))

    @torch.no_grad()
    def _silence(self, members: Sequence[int]) -> None:
        """Set failed members to zero, lest a kernel that works on several members at once carries their NaN over."""
        if not members:
            return
        states = [s for p in self._form.leaves.values() for s in elementwise_state(self._optimizer, p)]
        apart = [s.unflatten(0, (self._n, -1)) for s in states]
        for tensor in [*self._form.views.values(), *apart]:
            if tensor.is_floating_point():
                tensor[members] = 0


def elementwise_state(optimizer: torch.optim.Optimizer, p: Tensor) -> list[Tensor]:
    """What an optimiser keeps for each weight of a tensor."""
    return [v for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor) and v.shape == p.shape]


def _losses(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """(M,) the mean cross-entropy of each member."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), label_smoothing=label_smoothing, reduction="none"
    )
    return each.view(labels.shape).mean(1)


def members_at_once(
    make_model: Callable[[], nn.Module], samples: Samples, member: Member, config: TrainConfig, device: torch.device
) -> int | None:
    """How many members a stack should have on this kind of device so that "auto" stacks them, at least 1.

    Args:
        make_model: As for `Stack`.
        samples: As for `Stack`.
        member: One of the members.
        config: As for `Stack`.
        device: Where.

    Returns:
        The number, 1 where members are best trained one by one; None where only memory sets a bound.
    """
    stack = Stack(make_model, samples, [member, member], config, device)
    if stack.kind == "single":
        return 1
    most = _most(stack._template, stack._trial_inputs()[0], stack._streams[0], device)
    return None if math.isinf(most) else int(most)


# --- checks ----------------------------------------------------------------------------------------------------------


def _streams(samples: Samples, members: Sequence[Member], config: TrainConfig) -> list[Stream]:
    """The members' streams. Raises: UserError as `Stack` says."""
    if not members:
        raise UserError("members is empty: a stack needs at least one network")
    sizes = sorted({len(member.indices) for member in members})
    if len(sizes) > 1:
        raise UserError(
            f"members must have equally many samples, or their batches do not fit together; got {listed(sizes)}"
        )
    for member in members:
        dataclasses.replace(config, seed=member.seed)
    return [Stream(samples, m.indices, config.batch_size, m.seed, 0, 1, config.last_batch) for m in members]


def _never_stacked(config: TrainConfig, template: nn.Module) -> str | None:
    """What keeps networks of this configuration from being stacked in any form."""
    if config.rule != NO_RULE:
        return "a sharpness rule evaluates each network's gradient for itself"
    if config.precision == "fp16":
        return "fp16 scales the loss of each network for itself"
    if config.phase_lr or config.phase_schedule:
        return "phase_lr and phase_schedule are settings of the single loop"
    if config.optimizer.optimizer_class().__name__ not in ELEMENTWISE:
        return f"{config.optimizer.optimizer_class().__name__} mixes the weights of a tensor"
    if runtime.world()[1] > 1:
        return "several processes share the batches"
    if not any(p.requires_grad for p in template.parameters()):
        return "the network has no trainable parameter"
    return None


def _most(model: nn.Module, inputs: Tensor, stream: Stream, device: torch.device) -> float:
    """Up to how many members a stack is quicker than one by one, as far as that was measured."""
    if not runtime.is_host(device):
        return math.inf
    return HOST_BYTES / max(1, _largest_output(model, inputs) * int(stream.sizes.max()))


def _largest_output(model: nn.Module, inputs: Tensor) -> int:
    """Bytes for each input of the largest output of a layer, in training."""
    model, largest = copy.deepcopy(model).train(), [0]

    def note(module: nn.Module, arguments: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            largest.append(output.nbytes // len(inputs))

    for module in model.modules():
        module.register_forward_hook(note)
    with torch.no_grad():
        model(inputs)
    return max(largest)


def _takes_double(model: nn.Module, inputs: Tensor) -> bool:
    """Whether device and network know float64, in which rounding hides no mistake."""
    try:
        with torch.no_grad():
            copy.deepcopy(model).double()(inputs.double())
    except (RuntimeError, TypeError):
        return False
    return True


def _not_repeatable(model: nn.Module, inputs: Tensor, device: torch.device) -> str | None:
    """What keeps a network from being compared with its stacked form at all."""
    model, before = copy.deepcopy(model).train(), runtime.rng_state(device)
    try:
        with torch.no_grad():
            model(inputs)
    except Exception as error:  # training it alone will say it where it stands
        return f"the network does not take {len(inputs)} inputs: {error}"
    after = runtime.rng_state(device)
    if all(torch.equal(before[name], after[name]) for name in before):
        return None
    return "the network draws random numbers in training (dropout), each member from its own seed"


def _make_different(models: Sequence[nn.Module]) -> None:
    """Move the weights of each a little, so that no two networks and no two channels of a layer are alike."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (p for model in models for p in model.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))


# --- one by one ------------------------------------------------------------------------------------------------------


def _part(workspace: Workspace | None, j: int) -> Workspace | None:
    """A place for the state of member j alone."""
    if workspace is None:
        return None
    path = workspace.path / MEMBERS_DIRECTORY / str(j)
    path.mkdir(parents=True, exist_ok=True)
    return Workspace(path)


def _together(records: Sequence[Record]) -> Record:
    """One record of several runs: costs are added, what an epoch's row measures is averaged."""
    history: list[dict[str, float]] = []
    for rows in itertools.zip_longest(*(record.history for record in records)):
        present = [row for row in rows if row is not None]
        names = dict.fromkeys(name for row in present for name in row)
        mean = {name: float(np.mean([row[name] for row in present if name in row])) for name in names}
        history.append(mean | {name: sum(row[name] for row in present) for name in ("seconds", "passes")})
    peaks = [record.peak_memory_bytes for record in records if record.peak_memory_bytes is not None]
    return Record(
        history=history,
        seconds=sum(record.seconds for record in records),
        passes=sum(record.passes for record in records),
        peak_memory_bytes=max(peaks, default=None),
    )
