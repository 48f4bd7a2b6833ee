"""The command that estimates how hard each training sample is to forget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unsharp.commands.shared import setting, train_config_of
from unsharp.errors import UserError
from unsharp.options import Common, Count, Data, Network, Number, Proxy, Rule, Text, Training, amount


@dataclass(kw_only=True)
class Memorize(Common, Data, Network, Proxy, Rule, Training):
    """Estimate how much each training sample is memorized, from many networks on random subsets."""

    model: Text = None
    """Checkpoint whose architecture, data and training are taken, in place of --arch, --data and the rest."""
    config: Text = None
    """JSON file of a training configuration (`unsharp show RUN` prints one); options override it."""
    out: Text = None
    """Run directory; named by content under runs/ if left out. One with fewer networks of the same kind is renewed."""
    models: int = 200
    """Networks at most."""
    by: str = "memorization"
    """What is estimated: memorization, or a cheaper relative (`unsharp list proxies`)."""
    fraction: float = 0.7
    """Share of the samples that each network is trained on."""
    settle: float = 0.9
    """Stop earlier where the forget sets of two halves of the networks overlap so far; 0 never stops earlier."""
    watch: tuple[str, ...] = ("high",)
    """The forget sets that must settle: high, mid, low, mix."""
    n: float = 0.05
    """Their size: a number of samples (1 or more), or a fraction of them (below 1)."""
    minutes: Number = None
    """Stop earlier where the next networks would end after so many minutes."""
    influence: Number = None
    """Write down influences on test samples of at least this much, such as 0.15."""
    stack: Count = None
    """Networks trained together on a device; what suits device and network, if left out."""
    outputs_only: bool = False
    """Keep what the networks say of every sample, but not their weights."""
    processes: Count = None
    """Processes at a time; as many as the processors carry with --threads each (one on an accelerator), if left out."""
    backend: str = "local"
    """Where networks are trained: local (processes of this machine) or ray (a cluster)."""
    address: Text = None
    """With --backend ray: the cluster, such as HOST:PORT or auto; one is started on this machine, if left out."""

    def run(self) -> dict[str, Any]:
        from unsharp.difficulty.proxies import configure
        from unsharp.difficulty.stage import SUMMARY_FILE, MemorizeConfig, memorize
        from unsharp.pool.grow import Work
        from unsharp.pool.plan import PoolConfig
        from unsharp.sweep import backend_from

        how = MemorizeConfig(
            models=self.models,
            settle=self.settle,
            watch=self.watch,  # pyright: ignore[reportArgumentType]
            n=amount(self.n) or 0,
            minutes=self.minutes,
            influence=self.influence,
        )
        pool = PoolConfig(fraction=self.fraction, seed=self.seed)
        if self.by != "memorization":
            return self._by_proxy(configure(self.by, **self.proxy_values()))
        if given := self.proxy_values():
            raise UserError(f"--{next(iter(given))} is of a proxy; name it with --by, or leave it out")
        self.threads = self.threads or 1
        with setting(self) as at:
            work = Work(
                stack=self.stack,
                keep_weights=not self.outputs_only,
                workers=self.processes,
                threads=self.threads,
                device=self.device,
                save_seconds=self.save_seconds,
                backend=backend_from(self.backend, self.address),
            )
            origin, splits, _ = self._origin(at)
            run = memorize(origin, splits, pool, how, work, self.out, at)
        summary = run.json(SUMMARY_FILE)
        if not self.json:
            print(
                f"{summary['memorized']:,} of {summary['samples']:,} samples have a score of at least 0.25; next: "
                f"unsharp split --scores {run.path} --level high --n 0.05"
            )
        told = ("models", "settled", "memorized", "unknown", "mean_standard_error")
        return {"run": str(run.path), "stage": run.stage, "reused": run.reused} | {k: summary[k] for k in told}

    def _by_proxy(self, proxy: Any) -> dict[str, Any]:
        from unsharp.difficulty.stage import SUMMARY_FILE, score

        with setting(self) as at:
            origin, splits, subject = self._origin(at)
            run = score(proxy, origin, splits, subject, self.out, at)
        if not self.json:
            print(f"next: unsharp split --scores {run.path} --level high --n 0.05")
        return {"run": str(run.path), "stage": run.stage, "reused": run.reused} | run.json(SUMMARY_FILE)

    def _origin(self, at: Any) -> Any:
        """Origin and data, and the trained network where one is named."""
        from unsharp import data
        from unsharp.data import DataConfig
        from unsharp.models import ModelConfig
        from unsharp.stages import origin_of
        from unsharp.subject import load_subject

        if self.model is not None:
            given = [*self.loop_values(), *self.optimizer_values(), *self.rule_values()]
            named = [n for n in given if n != "seed"] + [n for n in ("arch", "rule", "config") if getattr(self, n)]
            if named:
                options = ", ".join(f"--{name.replace('_', '-')}" for name in named)
                raise UserError(
                    f"--model says architecture and training; leave {options} out, or leave --model out and say all"
                )
            subject = load_subject(self.model, at.device, data_config=self.data_config())
            return subject.origin, subject.splits, subject
        how = train_config_of(self)  # pyright: ignore[reportArgumentType]
        data_config = self.data_config() or DataConfig()
        splits = data.load(data_config, at.device)
        return origin_of(self.model_config("small_cnn") or ModelConfig(), data_config, how, splits), splits, None
