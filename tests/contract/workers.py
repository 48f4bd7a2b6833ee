"""Two processes that form one gloo group over the loopback interface and run the jobs that they are sent."""

from __future__ import annotations

import os
import queue
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

WORLD = 2


class TwoProcesses:
    """Runs a function in both processes of the group.

    Args:
        store: Path of a file, not yet there, through which the processes find each other.
    """

    def __init__(self, store: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._jobs = [context.Queue() for _ in range(WORLD)]
        self._results = context.Queue()
        self._processes = [
            context.Process(target=_work, args=(rank, str(store), self._jobs[rank], self._results), daemon=True)
            for rank in range(WORLD)
        ]
        for process in self._processes:
            process.start()

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """What `job(*args)` returns (plain values or arrays) in each process, by rank."""
        for jobs in self._jobs:
            jobs.put((job, args))
        found: dict[int, Any] = {}
        for _ in range(WORLD):
            try:
                rank, result, error = self._results.get(timeout=60)
            except queue.Empty:
                raise TimeoutError(f"no answer from the ranks other than {sorted(found)}") from None
            if error:
                raise RuntimeError(f"rank {rank} failed:\n{error}")
            found[rank] = result
        return [found[rank] for rank in range(WORLD)]

    def close(self) -> None:
        """End the group."""
        for jobs in self._jobs:
            jobs.put(None)
        for process in self._processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
        for q in (*self._jobs, self._results):
            q.close()


def _work(rank: int, store: str, jobs: Any, results: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    while (job := jobs.get()) is not None:
        function, args = job
        try:
            results.put((rank, function(*args), None))
        except Exception:
            results.put((rank, None, traceback.format_exc()))
    torch.distributed.destroy_process_group()
