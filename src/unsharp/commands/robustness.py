"""The command that looks at an unlearned network on corrupted inputs, beside the retrained one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tyro

from unsharp.commands.shared import read_train_config, setting
from unsharp.options import Common, Data, Text, Words


@dataclass(kw_only=True)
class RobustnessCommand(Common, Data):
    """Measure accuracy on corrupted inputs (noise, blur, snow, light), beside the retrained network."""

    run_dir: tyro.conf.Positional[str]
    """Directory of an `unlearn` run."""
    out: Text = None
    """Run directory; named by content under runs/ if left out."""
    original: Text = None
    """Checkpoint before unlearning, to show it beside."""
    corruptions: Words = None
    """gaussian_noise, impulse_noise, gaussian_blur, glass_blur, snow, brightness, contrast; all if left out."""
    severities: tuple[int, ...] = (1, 3, 5)
    """How strong, of 1 to 5; several may follow."""
    on: Words = None
    """On which samples: retain, forget, test; all if left out."""
    n_samples: int = 1000
    """At most so many samples of each set, drawn by the seed; 0 takes all."""
    batch_size: int = 250
    """Samples that go through together."""
    seed: int = 0
    """Seed of samples and noise."""
    train_config: Text = None
    """JSON file that says how the network was trained, for a checkpoint that does not know."""

    def run(self) -> dict[str, Any]:
        from unsharp.evaluation.robustness import Robustness
        from unsharp.evaluation.robustness_stage import VALUES_FILE, robustness_run, sentences

        names = ("corruptions", "severities", "on", "n_samples", "batch_size", "seed")
        how = Robustness(**{name: getattr(self, name) for name in names})
        with setting(self) as at:
            run = robustness_run(
                self.run_dir,
                how,
                self.out,
                at,
                original=self.original,
                data_config=self.data_config(),
                train_config=read_train_config(self.train_config),
            )
        found = run.json(VALUES_FILE)
        if not self.json:
            print("\n".join(sentences(found)))
        return {"run": str(run.path), "stage": run.stage, "reused": run.reused} | found
