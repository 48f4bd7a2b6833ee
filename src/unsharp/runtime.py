"""Device, precision, seeds, threads, distribution, memory: the only file that names an accelerator's backend."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unsharp.errors import UserError, unknown

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the accelerator where there is one, else the CPU.

    Raises:
        UserError: if the device does not exist on this machine.
    """
    if name is None or name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device(found.type) if found is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {name!r} is not usable here ({str(error).splitlines()[0]}); leave --device out"
        ) from None
    return device


def device_of(module: nn.Module) -> torch.device:
    """The device of the module's first parameter."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def is_host(device: torch.device) -> bool:
    """True where reading a scalar costs no synchronisation."""
    return device.type == "cpu"


def set_threads(n: int | None) -> int:
    """Set torch's thread count for this process (None leaves it) and return the one in force."""
    if n is not None:
        if n < 1:
            raise UserError(f"threads must be at least 1, got {n}")
        torch.set_num_threads(n)
    return torch.get_num_threads()


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def accelerators() -> int:
    """Accelerators that this process may use."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def seeing(index: int, count: int = 1) -> dict[str, str]:
    """The variables under which a process that is yet to start sees `count` of this one's accelerators, from `index`.

    A kind of accelerator that cannot be hidden gives none.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    name = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}.get("" if found is None else found.type)
    if name is None:
        return {}
    mine = [part.strip() for part in os.environ.get(name, "").split(",") if part.strip()]
    chosen = range(index, index + count)
    return {name: ",".join(mine[i] if i < len(mine) else str(i) for i in chosen)}


def seed_all(seed: int) -> None:
    """Seed torch (all devices) for weights and dropout; the randomness of data has its own tables (`data.draws`)."""
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators on the host and on `device`."""
    state = {"cpu": torch.get_rng_state()}
    if not is_host(device):
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if not is_host(device):
        torch.get_device_module(device).set_rng_state(state[device.type], device)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast to `precision` on `device`; nothing for float32."""
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    dtype = PRECISIONS[precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler | None:
    """A gradient scaler where the precision needs one (fp16), else None."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None


def fused_optimizer(cls: type[torch.optim.Optimizer], device: torch.device) -> dict[str, bool]:
    """`fused=True` where the optimiser's one-kernel form exists on this accelerator."""
    names = {torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW}
    return {"fused": True} if device.type == "cuda" and cls in names else {}


def world() -> tuple[int, int]:
    """(rank, world size) of the default process group; (0, 1) without one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def mean_over_ranks(tensors: Sequence[Tensor | None]) -> None:
    """Average the tensors over all processes, in place and in one message; nothing to do for a single process."""
    n_ranks = world()[1]
    present = [t for t in tensors if t is not None]
    if n_ranks == 1 or not present:
        return
    flat = torch.cat([t.reshape(-1) for t in present])
    torch.distributed.all_reduce(flat)
    flat /= n_ranks
    for tensor, mean in zip(present, flat.split([t.numel() for t in present])):
        tensor.copy_(mean.view_as(tensor))


class PeakMemory:
    """The peak memory of a block of work, in bytes, as `.bytes` afterwards.

    On an accelerator: the allocator's peak. On a CPU: how far the resident memory of this process grew during the
    block, or None where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if is_host(self.device):
            self._before = _start_host_peak()
        else:
            torch.get_device_module(self.device).reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *exc: object) -> None:
        if is_host(self.device):
            peak = _host_memory("VmHWM")
            self.bytes = None if self._before is None or peak is None else max(0, peak - self._before)
        else:
            self.bytes = int(torch.get_device_module(self.device).max_memory_allocated(self.device))


def _start_host_peak() -> int | None:
    """Forget the process's earlier peak; its resident bytes now, or None where that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _host_memory("VmRSS")


def _host_memory(field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def store_directory() -> Path:
    """Where retrained references are kept: $UNSHARP_STORE, or a directory in the user's cache."""
    given = os.environ.get("UNSHARP_STORE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else cache / "unsharp" / "references"


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions and products in full float32, not in the shorter format that some accelerators take for it."""
    before, library = torch.get_float32_matmul_precision(), torch.backends.cudnn
    torch.set_float32_matmul_precision("highest")
    kept = {name: getattr(library, name) for name in ("enabled", "benchmark", "deterministic")}
    try:
        with library.flags(**kept, allow_tf32=False):  # what is not named would be switched off
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def versions(names: Iterable[str] = ("unsharp", "torch", "numpy", "safetensors")) -> dict[str, str]:
    """Versions of Python and of the named distributions ("source" where one is not installed)."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "source"
    found["torch"] = torch.__version__
    return found


def describe(device: torch.device) -> dict[str, Any]:
    """The machine as provenance states it: device type and name, thread count, number of processors."""
    name = platform.processor() or platform.machine()
    if not is_host(device):
        name = torch.get_device_module(device).get_device_name(device)
    return {
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "numpy": np.__version__,
    }
