"""The command that attacks an unlearned network by fine-tuning, beside the retrained one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tyro

from unsharp.commands.shared import read_train_config, setting
from unsharp.errors import UserError
from unsharp.options import Common, Count, Data, Text


@dataclass(kw_only=True)
class Relearn(Common, Data):
    """Try to bring the forget set back by a little fine-tuning, beside the retrained network under the same attack."""

    run_dir: tyro.conf.Positional[str]
    """Directory of an `unlearn` run."""
    out: Text = None
    """Run directory; named by content under runs/ if left out."""
    on: tuple[str, ...] = ("forget", "retain")
    """What copies are fine-tuned on, an attack for each: forget (a part of it; the rest is judged), retain, other."""
    n: Count = None
    """Samples to fine-tune on; a fifth of the forget set with forget, else as many as it has, if left out."""
    epochs: int = 10
    """Epochs of an attack, each a point of the curve."""
    batch_size: int = 32
    """Samples in a step."""
    lr: float = 0.01
    """Learning rate of SGD with momentum 0.9."""
    seed: int = 0
    """The first seed of the attacks."""
    seeds: int = 1
    """Number of seeds; with several, figures have 95 % intervals."""
    watched: int = 500
    """Retained and test samples, at most, on which accuracy is watched."""
    original: Text = None
    """Checkpoint before unlearning, to say how far an attacked network comes back to it."""
    other_data: Text = None
    """With `--on other`: unrelated data of the same shape, by name as for --data."""
    other_dir: Text = None
    """Where they are, as for --data-dir."""
    train_config: Text = None
    """JSON file that says how the network was trained, for a checkpoint that does not know."""

    def run(self) -> dict[str, Any]:
        from unsharp.data import DataConfig
        from unsharp.evaluation.relearning_stage import RELEARNING_FILE, RelearnPlan, relearn_run, sentences

        plan = RelearnPlan(
            on=self.on,  # pyright: ignore[reportArgumentType]
            **{f: getattr(self, f) for f in ("n", "epochs", "batch_size", "lr", "seed", "seeds", "watched")},
        )
        if ("other" in self.on) != (self.other_data is not None):
            raise UserError("--on other and --other-data belong together: give both, or neither")
        other = None if self.other_data is None else DataConfig(name=self.other_data, dir=self.other_dir)
        with setting(self) as at:
            run = relearn_run(
                self.run_dir,
                self.out,
                at,
                plan,
                data_config=self.data_config(),
                train_config=read_train_config(self.train_config),
                original=self.original,
                other=other,
            )
        found = run.json(RELEARNING_FILE)
        if not self.json:
            print("\n".join(sentences(found["attacks"])))
        return {"run": str(run.path), "stage": run.stage, "reused": run.reused} | found
