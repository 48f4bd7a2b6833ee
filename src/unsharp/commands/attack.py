"""The command that attacks an unlearned network with shadow networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tyro

from unsharp.commands.shared import read_train_config, setting
from unsharp.options import Common, Count, Data, Text


@dataclass(kw_only=True)
class Attack(Common, Data):
    """Attack an unlearned network with shadow networks: does it betray what it was to forget?"""

    run_dir: tyro.conf.Positional[str]
    """Directory of an `unlearn` run."""
    out: Text = None
    """Run directory; named by content under runs/ if left out."""
    attacks: tuple[str, ...] = ("lira",)
    """lira, rmia (the run itself), u-lira (its method, on a pool that forgets in the same way); several may follow."""
    networks: int = 64
    """Networks of each pool; those that are there count."""
    against: str = "networks"
    """lira, rmia: tell forget samples from the same in networks that never had them, or from test samples (samples)."""
    form: Text = None
    """online (shadows with and without the sample) or offline (without it alone); as suits the attack, if left out."""
    variance: str = "auto"
    """lira, u-lira: a deviation for each sample (per_sample), one for all (global), or as networks allow (auto)."""
    tail: str = "both"
    """u-lira offline: what is held for a trace, a margin above that of retrained networks, below it, or both."""
    gamma: float = 2.0
    """rmia: by how much a sample's ratio must exceed that of another."""
    linear: float = 0.3
    """rmia: a of the line p_in = a·p_out + 1 − a, in [0, 1]."""
    pool_fraction: float = 0.7
    """Share of the samples that each network of a pool is trained on; that of `memorize`, to take its networks."""
    pool_seed: int = 0
    """Seed of the pool; the oracles of u-lira take the next one."""
    seed: int = 0
    """Seed of what attacks and intervals draw."""
    train_config: Text = None
    """JSON file that says how the network was trained, for a checkpoint that does not know."""
    stack: Count = None
    """Networks trained together on a device; what suits device and network, if left out."""
    processes: Count = None
    """Processes at a time; as many as the processors carry with --threads each (one on an accelerator), if left out."""
    backend: str = "local"
    """Where networks are trained: local (processes of this machine) or ray (a cluster)."""
    address: Text = None
    """With --backend ray: the cluster, such as HOST:PORT or auto; one is started on this machine, if left out."""

    def run(self) -> dict[str, Any]:
        from unsharp.evaluation import attack_stage
        from unsharp.pool.grow import Work
        from unsharp.pool.plan import PoolConfig
        from unsharp.sweep import backend_from

        how = attack_stage.AttackConfig(
            attacks=tuple(name.replace("-", "_") for name in self.attacks),
            networks=self.networks,
            against=self.against,  # pyright: ignore[reportArgumentType]
            form=self.form,  # pyright: ignore[reportArgumentType]
            variance=self.variance,  # pyright: ignore[reportArgumentType]
            tail=self.tail,  # pyright: ignore[reportArgumentType]
            gamma=self.gamma,
            linear=self.linear,
            seed=self.seed,
        )
        self.threads = self.threads or 1
        with setting(self) as at:
            work = Work(
                stack=self.stack,
                workers=self.processes,
                threads=self.threads,
                device=self.device,
                save_seconds=self.save_seconds,
                backend=backend_from(self.backend, self.address),
            )
            run = attack_stage.attack(
                self.run_dir,
                how,
                PoolConfig(fraction=self.pool_fraction, seed=self.pool_seed),
                work,
                self.out,
                at,
                data_config=self.data_config(),
                train_config=read_train_config(self.train_config),
            )
        found = run.json(attack_stage.ATTACK_FILE)
        if not self.json:
            print("\n".join(attack_stage.sentences(found)))
        return {"run": str(run.path), "stage": run.stage, "reused": run.reused} | found
