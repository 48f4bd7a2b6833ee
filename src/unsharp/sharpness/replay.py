"""What makes a second pass leave no trace: the same random draws, and buffers as they were after the first."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from unsharp import runtime


class BufferSnapshot:
    """Copies of the buffers of modules in training mode, and the way back to them."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._owners: list[tuple[nn.Module, str]] = []
        self._buffers: list[Tensor] = []
        self._copies: list[Tensor] = []

    def add(self, module: nn.Module) -> None:
        """Copy the module's own buffers, once; a module in evaluation mode changes none of them."""
        if not module.training or not module._buffers or id(module) in self._seen:
            return
        self._seen.add(id(module))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                self._owners.append((module, name))
                self._buffers.append(buffer)
                self._copies.append(buffer.detach().clone())

    @torch.no_grad()
    def restore(self) -> None:
        """Put every buffer back, also one that its module replaced by another tensor."""
        for (module, name), buffer, copy in zip(self._owners, self._buffers, self._copies):
            buffer.copy_(copy)
            module._buffers[name] = buffer

    @torch.no_grad()
    def restore_unless(self, ok: Tensor) -> None:
        """Put every buffer back where the device-side flag `ok` (0-d bool) is false, without reading it on the host."""
        for (module, name), copy in zip(self._owners, self._copies):
            now = module._buffers[name]
            if now is not None:
                now.copy_(torch.where(ok, now, copy))


class CalledModules:
    """Watches every module that is called meanwhile, whoever owns it: for the rule that knows parameters alone."""

    @contextlib.contextmanager
    def watch(self) -> Iterator[BufferSnapshot]:
        snapshot, caller = BufferSnapshot(), threading.get_ident()

        def before_forward(module: nn.Module, _: Any) -> None:
            if threading.get_ident() == caller:
                snapshot.add(module)

        handle = register_module_forward_pre_hook(before_forward)
        try:
            yield snapshot
        finally:
            handle.remove()


class WholeModel:
    """Watches the modules of one model, without hooks: for the engine, which knows its model."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [m for m in model.modules() if m._buffers]

    @contextlib.contextmanager
    def watch(self) -> Iterator[BufferSnapshot]:
        snapshot = BufferSnapshot()
        for module in self._modules:
            snapshot.add(module)
        yield snapshot


class Replay:
    """One step's first pass, and any number of later ones on the same draws and buffers.

    Args:
        device: Whose random generator the passes use, beside the host's.
        watcher: What finds the buffers to protect.
    """

    def __init__(self, device: torch.device, watcher: CalledModules | WholeModel) -> None:
        self._device = device
        self._watcher = watcher
        self._firsts: list[BufferSnapshot] = []
        self._start: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """A pass that counts: buffers move, random state advances; both are remembered."""
        self._start = runtime.rng_state(self._device)
        with self._watcher.watch() as snapshot:
            self._firsts.append(snapshot)
            yield

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """A pass that leaves no trace: it repeats the first one's draws, and buffers and random state come back."""
        after = runtime.rng_state(self._device)
        runtime.set_rng_state(self._start, self._device)
        with self._watcher.watch() as snapshot:
            try:
                yield
            finally:
                snapshot.restore()
                runtime.set_rng_state(after, self._device)

    def roll_back(self, ok: Tensor | bool) -> None:
        """Undo what the first passes did to buffers where `ok` is false, and forget them.

        A flag given as a tensor is not read on the host.
        """
        for snapshot in reversed(self._firsts):
            if isinstance(ok, Tensor):
                snapshot.restore_unless(ok)
            elif not ok:
                snapshot.restore()
        self._firsts.clear()
