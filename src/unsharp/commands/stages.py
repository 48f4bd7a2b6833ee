"""The commands of the way of the data: train, split, mask, unlearn, evaluate, and forget, which does all."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from unsharp.commands.shared import (
    Answer,
    by_level,
    data_of,
    forget_set_of,
    read_train_config,
    run_answer,
    setting,
    show_evaluation,
    subject_of,
    train_config_of,
)
from unsharp.data import DataConfig
from unsharp.errors import UserError
from unsharp.models import ModelConfig
from unsharp.options import Common, Data, Forget, Method, Network, Rule, Text, Training, Words


@dataclass(kw_only=True)
class Train(Common, Data, Network, Rule, Training):
    """Train a network; the checkpoint remembers how."""

    out: Text = None
    """Run directory; named by content under runs/ if left out."""
    config: Text = None
    """JSON file of a training configuration (`unsharp show RUN` prints one); options override it."""

    def run(self) -> Answer:
        from unsharp import stages

        how = train_config_of(self)
        with setting(self) as at:
            run = stages.train_network(
                self.model_config("small_cnn") or ModelConfig(), self.data_config() or DataConfig(), how, self.out, at
            )
        metrics = run.json(stages.METRICS_FILE)
        if not self.json:
            print(stages.sentence(metrics))
        return run_answer(run) | metrics


@dataclass(kw_only=True)
class Split(Common, Data, Forget):
    """Choose the samples to forget, and write them down."""

    out: Text = None
    """Run directory; named by content under runs/ if left out."""
    model: Text = None
    """Checkpoint whose data are meant, in place of --data."""

    def run(self) -> Answer:
        from unsharp import stages

        if self.split is not None:
            raise UserError("split makes a split; give --ids, --random, --forget-classes or --scores")
        chosen = self.forget_config()
        with setting(self) as at:
            if self.level_alone:
                chosen = by_level(self, self.model, at)
            run = stages.split_samples(data_of(self), chosen, self.out, at)
        made = run.json(stages.SPLIT_FILE)
        if not self.json:
            print(made["rule"])
        return run_answer(run) | {"n": made["n"], "rule": made["rule"]}


@dataclass(kw_only=True)
class Mask(Common, Data, Network, Forget):
    """Mark the weights that carry the forget set."""

    model: str
    """Checkpoint: a file, or the directory of a run."""
    out: Text = None
    """Run directory; named by content under runs/ if left out."""
    fraction: float = 0.3
    """Share of the weights that is marked, in (0, 1]."""
    select: str = "largest"
    """Which weights: a selection (`unsharp list selections`), such as largest, the largest forget gradients."""
    per_layer: bool = False
    """Take the fraction within each tensor rather than over all."""
    n_probes: int = 30
    """Random vectors for selections by the diagonal of a matrix (hessian, ggn)."""
    score_on: Text = None
    """Samples that the selection looks at: forget or training; the selection's own, if left out."""
    score_samples: int = 1000
    """Most samples that selections by curvature (hessian, ggn, fisher) look at."""
    seed: int = 0
    """Seed of what is drawn."""

    def run(self) -> Answer:
        from unsharp import masks, stages

        choice = masks.Choice(
            fraction=self.fraction,
            select=self.select,
            per_layer=self.per_layer,
            n_probes=self.n_probes,
            score_on=self.score_on,  # pyright: ignore[reportArgumentType]
            score_samples=self.score_samples,
            seed=self.seed,
        )
        with setting(self) as at:
            subject = subject_of(self, self.model, at)
            run = stages.make_mask(
                subject,
                forget_set_of(self, subject),
                self.out,
                at,
                choice=choice,
            )
        return run_answer(run) | {"fraction": masks.fraction_of(masks.load(run.file(stages.MASK_FILE)))}


@dataclass(kw_only=True)
class Unlearn(Common, Data, Network, Forget, Method):  # pyright: ignore[reportGeneralTypeIssues]
    """Make a network forget samples, and write a new checkpoint."""

    model: str
    """Checkpoint: a file, or the directory of a run. It is read only."""
    out: Text = None
    """Run directory; named by content under runs/ if left out."""
    train_config: Text = None
    """JSON file that says how the network was trained, for a checkpoint that does not know (needed to retrain)."""
    config: Text = None
    """JSON file of method, rule and loop, such as the `unlearn.json` of a `tune` run; --seed may stand beside it."""
    corrected: Text = None
    """File .npz with ids of the forget set and the labels or inputs they should have had, to put right, not remove."""

    def run(self) -> Answer:
        from unsharp import stages
        from unsharp.corrections import read_corrections

        how = self.unlearn_config(self.config)
        corrections = None if self.corrected is None else read_corrections(self.corrected)
        with setting(self) as at:
            subject = subject_of(self, self.model, at, self.train_config)
            run = stages.unlearn_network(subject, forget_set_of(self, subject), how, self.out, at, corrections)
        record = run.json(stages.RECORD_FILE)
        cost = {k: record[k] for k in ("seconds", "passes", "peak_memory_bytes")}
        if not self.json:
            print(f"{cost['seconds']:.1f} s, {cost['passes']} passes; next: unsharp evaluate {run.path}")
        course = {"stop": record["about"].get("stop"), "warnings": record["about"].get("warnings", [])}
        return run_answer(run) | cost | course | {"before": run.json(stages.BEFORE_FILE)}


@dataclass(kw_only=True)
class Evaluate(Common, Data):
    """Measure an unlearned network beside the retrained one."""

    run_dir: tyro.conf.Positional[str]
    """Directory of an `unlearn` run, or of an `evaluate` run that kept its outputs."""
    out: Text = None
    """Run directory; named by content under runs/ if left out."""
    original: Text = None
    """Checkpoint before unlearning, to show it beside."""
    train_config: Text = None
    """JSON file that says how the network was trained, for a checkpoint that does not know."""
    attacks: Words = None
    """Membership attacks (`unsharp list metrics`); all by default."""
    seed: int = 0
    """Seed of what the metrics draw."""
    features: bool = True
    """Whether to measure how retain and forget lie in the penultimate features."""
    keep_outputs: bool = False
    """Keep logits, labels and features, from which the run can be evaluated again without network and data."""
    pictures: int = 0
    """Keep so many forgotten samples, drawn at random, as pictures, for reports that are asked to show them."""

    def run(self) -> Answer:
        from unsharp import stages

        with setting(self) as at:
            run = stages.evaluate_run(
                self.run_dir,
                self.out,
                at,
                seed=self.seed,
                attacks=self.attacks,
                data_config=self.data_config(),
                train_config=read_train_config(self.train_config),
                original=self.original,
                features=self.features,
                keep_outputs=self.keep_outputs,
                pictures=self.pictures,
            )
        show_evaluation(self, run)
        return run.json(stages.METRICS_FILE) | {"run": str(run.path)}


@dataclass(kw_only=True)
class ForgetCommand(Common, Data, Network, Forget, Method):  # pyright: ignore[reportGeneralTypeIssues]
    """Answer a deletion request in one go: new checkpoint, metrics, report, audit."""

    model: str
    """Checkpoint: a file, or the directory of a run. It is read only."""
    out: str
    """Directory of the result."""
    train_config: Text = None
    """JSON file that says how the network was trained, for a checkpoint that does not know."""
    attacks: Words = None
    """Membership attacks (`unsharp list metrics`); all by default."""
    show_samples: bool = False
    """Name the forgotten samples in report and audit."""
    bounds: Text = None
    """JSON or TOML file of the tests of the audit and their pass bounds; the defaults of docs/audit.md, if left out."""
    config: Text = None
    """JSON file of method, rule and loop, such as the `unlearn.json` of a `tune` run; --seed may stand beside it."""

    def run(self) -> Answer:
        from unsharp import stages
        from unsharp.commands.audit import audit_config, verdict_of

        how = self.unlearn_config(self.config)
        audit = audit_config(self)
        with setting(self) as at:
            subject = subject_of(self, self.model, at, self.train_config)
            forget = forget_set_of(self, subject)
            run = stages.forget_samples(
                subject,
                forget,
                how,
                self.out,
                at,
                attacks=self.attacks,
                show_samples=self.show_samples,
                audit=audit,
            )
        show_evaluation(self, run)
        if not self.json:
            print(verdict_of(run))
        return (
            run.json(stages.METRICS_FILE)
            | run_answer(run)
            | {
                "report": str(run.file(stages.REPORT_FILE)),
                "audit": run.json("audit.json")["verdict"],
            }
        )
