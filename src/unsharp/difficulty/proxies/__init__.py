"""Proxies of memorization: what a few networks tell about the difficulty of samples, at a fraction of the cost."""

from unsharp.difficulty.proxies.base import PROXIES, Cost, Proxy, Task, configure, estimate

__all__ = ["PROXIES", "Cost", "Proxy", "Task", "configure", "estimate"]
