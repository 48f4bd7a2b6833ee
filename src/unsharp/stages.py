"""The stages as functions: each reads typed artefacts and writes one run directory. The commands call these."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from unsharp import artifacts, checkpoints, config, data, masks, runtime, seal, unlearning
from unsharp.artifacts import Run, Workspace, perform
from unsharp.checkpoints import MODEL_FILE
from unsharp.corrections import Corrections
from unsharp.data import DataConfig, Samples, Splits
from unsharp.difficulty import ForgetConfig, ForgetSet, choose
from unsharp.errors import UserError
from unsharp.evaluation import Judged, Outputs, check_attacks, check_seed, judge, predict
from unsharp.evaluation import pictures as showing
from unsharp.evaluation.accuracy import accuracy
from unsharp.models import ModelConfig
from unsharp.progress import SILENT, Progress
from unsharp.reference import RECORD_FILE, Recipe, Reference, retrain
from unsharp.stopping import NOT_RETRAINABLE
from unsharp.subject import Origin, Subject, accuracies, chance, check_reference, check_trained, load_subject, watch
from unsharp.tracking import flat
from unsharp.training import Record, TrainConfig, initial_model, train
from unsharp.unlearning import UnlearnConfig

if TYPE_CHECKING:
    from unsharp.audit.record import AuditConfig

OUTPUTS, EMBEDDING_FILE = "outputs", "embedding.svg"
SHOWN_AS = {"original": "Original", "model": "Unlearned", "reference": "Retrained"}
METRICS_FILE, ABOUT_FILE, BEFORE_FILE, REPORT_FILE = "metrics.json", "about.json", "before.json", "report.html"
ANSWER_FILES = (MODEL_FILE, RECORD_FILE, METRICS_FILE, ABOUT_FILE, REPORT_FILE)
DONE = ("wrote", "found done")
TRAIN_METRICS = ("train_accuracy", "test_accuracy")
SPLIT_FILE, MASK_FILE = "split.json", masks.FILE


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how stages run; nothing that a result is named by.

    Args:
        device: Where networks and data are.
        store: Directory of retrained references.
        force: Redo what is found done.
        save_seconds: Seconds between two savings of the state from which a killed run goes on.
        progress: Told of all long work.
        say: Takes a line for the user.
        wait: Wait for another process that is at work on the same, and take its result.
    """

    device: torch.device
    store: Path
    force: bool = False
    save_seconds: float = 60.0
    progress: Progress = SILENT
    say: Callable[[str], None] = lambda line: None
    wait: bool = False

    def perform(
        self, out: str | Path | None, stage: str, settings: Mapping[str, Any], work: Callable[[Workspace], None]
    ) -> Run:
        """Do the work into `out`, or where its content puts it, or find it done."""
        whole = {"threads": torch.get_num_threads(), "device": self.device.type, **config.to_dict(settings)}
        path = Path(out) if out is not None else Path("runs") / f"{stage}-{config.digest(whole)[:12]}"
        run = perform(
            path, stage, whole, work, provenance=runtime.describe(self.device), force=self.force, wait=self.wait
        )
        self.say(f"{DONE[run.reused]}: {run.path}")
        return run


def train_network(
    model: ModelConfig, data_config: DataConfig, how: TrainConfig, out: str | Path | None, at: Setting
) -> Run:
    """Train a network: checkpoint with its origin, record, metrics (train and test accuracy).

    Raises:
        UserError: for bad input, before any work.
        NonFiniteError: if a step is not finite; the last good state stays in the unfinished run.
    """
    splits = data.load(data_config, at.device)
    origin = origin_of(model, data_config, how, splits)
    network = initial_model(origin.build, how.seed, at.device)
    everything = np.arange(len(splits.train))

    def work(workspace: Workspace) -> None:
        record = train(
            network,
            splits.train,
            everything,
            how,
            workspace=workspace,
            save_seconds=at.save_seconds,
            progress=at.progress,
        )
        network.eval()
        checkpoints.save_model(workspace.file(MODEL_FILE), network, {"origin": origin})
        workspace.write_json(RECORD_FILE, record)
        workspace.write_json(METRICS_FILE, _train_metrics(network, splits, record))

    run = at.perform(out, "train", {"origin": origin}, work)
    if (warning := untrained(run.json(METRICS_FILE), splits.train.labels, origin.n_classes)) is not None:
        at.say(f"warning: {warning}")
    return run


def origin_of(model: ModelConfig, data_config: DataConfig, how: TrainConfig | None, splits: Splits) -> Origin:
    """The origin of a network that is yet to be trained on these data."""
    return Origin(
        model=model,
        data=data_config,
        train=how,
        fingerprint=splits.train.fingerprint,
        n_classes=splits.train.n_classes,
        input_shape=splits.train.input_shape,
    )


def sentence(metrics: Mapping[str, Any]) -> str:
    """The figures of a training in a line."""
    shown = [
        f"{name.split('_')[0]} accuracy {metrics[name]:.1f} %" for name in TRAIN_METRICS if metrics[name] is not None
    ]
    return f"{', '.join(shown)}; {metrics['seconds']:.1f} s, {metrics['passes']} passes"


def untrained(metrics: Mapping[str, Any], labels: np.ndarray, n_classes: int) -> str | None:
    """A warning where a network has learnt nothing, else None."""
    if metrics["train_accuracy"] > chance(labels, n_classes):
        return None
    return (
        f"the network is right on {metrics['train_accuracy']:.1f} % of its training samples, no better than a guess; "
        "lower the learning rate, or train longer"
    )


def split_samples(data_config: DataConfig, forget: ForgetConfig, out: str | Path | None, at: Setting) -> Run:
    """Choose a forget set: `split.json`, which the later stages take. Raises: UserError for a choice that cannot be."""
    samples = data.load(data_config, at.device).train
    chosen = choose(forget, samples, id_column=data_config.id_column)
    settings = {"data": data_config, "fingerprint": samples.fingerprint, "forget": forget, "hash": chosen.hash}
    return at.perform(out, "split", settings, lambda w: w.write_json(SPLIT_FILE, chosen.to_dict()))


def read_split(path: str | Path, samples: Samples) -> ForgetSet:
    """The forget set of a `split` run or file. Raises: UserError if it is missing or of other data."""
    path = Path(path)
    return ForgetSet.from_dict(config.read_json(path / SPLIT_FILE if path.is_dir() else path), samples)


def make_mask(
    subject: Subject,
    forget: ForgetSet,
    out: str | Path | None,
    at: Setting,
    *,
    choice: masks.Choice,
) -> Run:
    """A mask of a forget set: `mask.safetensors`. Raises: UserError if there is no weight to mark."""
    how = config.to_dict(choice)
    samples = subject.splits.train

    def work(workspace: Workspace) -> None:
        training = np.union1d(forget.retain_indices(len(samples)), forget.indices)
        basis = masks.Basis(model=subject.model, samples=samples, forget=forget.indices, training=training)
        masks.save(masks.make_mask(basis, choice), workspace.file(MASK_FILE), {"forget": forget.hash, **how})

    settings = {"checkpoint": subject.digest, "forget": forget.hash, **how}
    return at.perform(out, "mask", settings, work)


def unlearn_network(
    subject: Subject,
    forget: ForgetSet,
    how: UnlearnConfig,
    out: str | Path | None,
    at: Setting,
    corrections: Corrections | None = None,
) -> Run:
    """Make the network forget: new checkpoint, record, the split; the subject's own file is left as it is.

    With corrections the samples are put right rather than removed.

    Raises:
        UserError: if the network is no better than a guess, or for bad input, before the work.
        NonFiniteError: if a step is not finite.
    """
    settings = {"checkpoint": subject.digest, "origin": subject.origin, "unlearn": how, **asked(subject, forget)}
    if corrections is not None:
        unlearning.corrected_for(how.method, corrections, subject.splits.train, forget.indices)
        settings |= {"corrections": corrections.digest}
    _check_stop(subject, how, at)
    subject.check_before(forget)

    def work(workspace: Workspace) -> None:
        before = subject.outputs_of(subject.model, forget)
        for warning in check_trained(before):
            at.say(f"warning: {warning}")
        network, record = unlearning.run(
            subject.model,
            subject.splits.train,
            forget.indices,
            forget.retain_indices(len(subject.splits.train)),
            how,
            retrain=_retraining(subject, forget, at),
            workspace=workspace,
            save_seconds=at.save_seconds,
            on_epoch=watch(subject.splits.train, forget),
            progress=at.progress,
            validation=subject.splits.validation,
            say=at.say,
            corrections=corrections,
        )
        made = {"origin": subject.origin, "unlearn": how, **asked(subject, forget)}
        checkpoints.save_model(workspace.file(MODEL_FILE), network, made)
        workspace.write_json(RECORD_FILE, record)
        workspace.write_json(SPLIT_FILE, forget.to_dict())
        workspace.write_json(BEFORE_FILE, accuracies(before))

    return at.perform(out, "unlearn", settings, work)


def asked(subject: Subject, forget: ForgetSet) -> dict[str, Any]:
    """What a checkpoint and a run say of the samples to be forgotten: hashes, those of earlier requests too."""
    if forget.before is None:
        return {"forget": forget.hash}
    return {"forget": forget.hash, "before": list(subject.requests), "absent": forget.absent.hash}


def find_reference(subject: Subject, forget: ForgetSet, at: Setting) -> tuple[Reference | None, str | None]:
    """The retrained reference, computed or found; or None and why there is none."""
    recipe = subject.origin.recipe
    if recipe is None:
        return None, "nothing is known of how the network was trained; give --train-config to compare with retraining"
    return _reference(recipe, subject, forget, at), None


def look_at(
    subject: Subject,
    forget: ForgetSet,
    model: nn.Module,
    record: Record | None,
    at: Setting,
    *,
    original: nn.Module | None = None,
    features: bool = False,
) -> tuple[dict[str, Judged], str | None]:
    """What a network that forgot says, and beside it the retrained reference, computed or found, and the original.

    Args:
        subject: Data and origin of the network.
        forget: The forget set.
        model: The network that forgot.
        record: What making it took.
        at: Device and the like.
        original: The network before, to show it beside.
        features: Whether penultimate features are collected.

    Returns:
        "model" and, where there are such networks, "reference" and "original"; and why there is no reference.
    """
    reference, why_not = find_reference(subject, forget, at)
    networks = {
        "model": (model, record),
        "reference": (None, None) if reference is None else (reference.model, reference.record),
        "original": (original, None),
    }
    judged = {
        name: Judged(subject.outputs_of(network, forget, features=features, say=at.say), cost)
        for name, (network, cost) in networks.items()
        if network is not None
    }
    if "original" in judged and "reference" in judged:
        for warning in check_reference(judged["original"].outputs, judged["reference"].outputs):
            at.say(f"warning: {warning}")
    return judged, why_not


def evaluate_network(
    subject: Subject,
    forget: ForgetSet,
    model: nn.Module,
    record: Record | None,
    at: Setting,
    *,
    seed: int = 0,
    attacks: Sequence[str] | None = None,
    original: nn.Module | None = None,
    features: bool = False,
) -> dict[str, Any]:
    """What `judge` finds of a network that forgot; arguments as for `look_at` and `judge`."""
    judged, why_not = look_at(subject, forget, model, record, at, original=original, features=features)
    return judge(**judged, attacks=attacks, seed=seed, why_no_reference=why_not)


def unlearn_and_judge(
    subject: Subject,
    forget: ForgetSet,
    how: UnlearnConfig,
    out: str | Path,
    at: Setting,
    *,
    attacks: Sequence[str] | None = None,
    features: bool = False,
) -> tuple[Run, dict[str, Any]]:
    """Make a network forget, and judge it beside the retrained one and the original, with the seed of the unlearning.

    Returns:
        The `unlearn` run in `out`, and what `about` says of it, with the metrics under "metrics".
    """
    run = unlearn_network(subject, forget, how, out, at)
    record = config.from_dict(Record, run.json(RECORD_FILE))
    model = load_subject(run.path, at.device, data_config=subject.origin.data).model
    values = evaluate_network(
        subject, forget, model, record, at, seed=how.seed, attacks=attacks, original=subject.model, features=features
    )
    return run, about(subject, forget, config.to_dict(how), record) | {"metrics": values}


@dataclass(frozen=True, kw_only=True, eq=False)
class Unlearned:
    """An `unlearn` run, with what a judgement of its network starts from.

    Args:
        run: The run.
        subject: The network that forgot, with its data.
        forget: What it forgot.
        before: The network before, where it is shown beside.
    """

    run: Run
    subject: Subject
    forget: ForgetSet
    before: Subject | None

    @property
    def identity(self) -> dict[str, Any]:
        """What of it a judgement's run is named by."""
        return {
            "checkpoint": self.subject.digest,
            "original": None if self.before is None else self.before.digest,
            "forget": self.forget.hash,
            "train": self.subject.origin.train,
        }


def open_unlearned(
    run: str | Path,
    at: Setting,
    *,
    original: str | Path | None = None,
    data_config: DataConfig | None = None,
    train_config: TrainConfig | None = None,
) -> Unlearned:
    """Open an `unlearn` run for a judgement of its network.

    Args:
        run: The run directory.
        at: Device and store.
        original: The checkpoint before unlearning; None leaves it out.
        data_config: Where the data are, if not where they were.
        train_config: How the original was trained, where its checkpoint does not know.

    Raises:
        UserError: if it is another run, data or original do not fit it, or the store cannot be written.
    """
    unlearned = artifacts.open_run(run, "unlearn")
    _check_store(at)
    subject = load_subject(unlearned.path, at.device, data_config=data_config, train=train_config)
    return Unlearned(
        run=unlearned,
        subject=subject,
        forget=read_split(unlearned.path, subject.splits.train),
        before=None if original is None else subject.beside(original),
    )


def evaluate_run(
    run: str | Path,
    out: str | Path | None,
    at: Setting,
    *,
    seed: int = 0,
    attacks: Sequence[str] | None = None,
    data_config: DataConfig | None = None,
    train_config: TrainConfig | None = None,
    original: str | Path | None = None,
    features: bool = True,
    keep_outputs: bool = False,
    pictures: int = 0,
) -> Run:
    """Evaluate an `unlearn` run, or once more an `evaluate` run that kept what its networks said: `metrics.json`.

    Args:
        run: The run directory.
        out: Where to write.
        at: Device and the like.
        seed: Seed of what the metrics draw.
        attacks: Membership attacks, all by default.
        data_config: Where the data are, if not where they were.
        train_config: How the original was trained, where its checkpoint does not know.
        original: The checkpoint before unlearning, to show it beside; None leaves it out.
        features: Whether to collect the penultimate features, for the metrics on them.
        keep_outputs: Whether to keep logits, labels and features of every network, for metrics yet to come.
        pictures: How many of the forgotten samples to keep as pictures, for reports that are asked to show them.
    """
    check_attacks(attacks or ())
    check_seed(seed)
    showing.check_pictures(pictures)
    found = artifacts.open_run(run)
    if found.stage == "evaluate":
        if pictures:
            raise UserError(f"pictures need the samples; evaluate the `unlearn` run of {run} with --pictures")
        return measure_again(found, out, at, seed=seed, attacks=attacks)
    unlearned = open_unlearned(run, at, original=original, data_config=data_config, train_config=train_config)
    subject, forget, before = unlearned.subject, unlearned.forget, unlearned.before
    record = config.from_dict(Record, unlearned.run.json(RECORD_FILE))
    settings = unlearned.identity | {
        "unlearn": unlearned.run.config["unlearn"],
        "attacks": attacks,
        "seed": seed,
        "features": features,
        "keep_outputs": keep_outputs,
    }
    if pictures:
        showing.check_pictures(pictures, subject.splits.train)
        settings["pictures"] = pictures

    def work(workspace: Workspace) -> None:
        whole = None if before is None else before.model
        judged, why_not = look_at(subject, forget, subject.model, record, at, original=whole, features=features)
        if keep_outputs:
            for name, found in judged.items():
                found.outputs.save(workspace.file(OUTPUTS) / name)
        values = judge(**judged, attacks=attacks, seed=seed, why_no_reference=why_not)
        at.progress.log(flat({"evaluation": values}))
        workspace.write_json(METRICS_FILE, values)
        workspace.write_json(ABOUT_FILE, about(subject, forget, unlearned.run.config["unlearn"], record))
        if pictures:
            said = {name: judged[name].outputs.forget for name in SHOWN_AS if name in judged}
            kept = showing.pictures(subject.splits.train, forget, said, pictures, seed)
            workspace.write_json(showing.FILE, kept)
        _draw_features(judged, workspace)

    return at.perform(out, "evaluate", settings, work)


def measure_again(
    run: Run, out: str | Path | None, at: Setting, *, seed: int = 0, attacks: Sequence[str] | None = None
) -> Run:
    """Evaluate what the networks of an `evaluate` run said, without the networks and the data.

    Raises:
        UserError: if the run did not keep it, before any work.
    """
    kept = run.file(OUTPUTS)
    if not (kept / "model").is_dir():
        raise UserError(
            f"{run.path} did not keep what its networks said; evaluate the `unlearn` run, with --keep-outputs"
        )
    before, facts = run.json(METRICS_FILE), run.json(ABOUT_FILE)
    settings = {"outputs": run.config, "attacks": attacks, "seed": seed}

    def work(workspace: Workspace) -> None:
        judged = {
            name: Judged(Outputs.load(kept / name), before if name == "model" else before[name])
            for name in SHOWN_AS
            if (kept / name).is_dir()
        }
        why_not = before["reasons"].get("gap")
        workspace.write_json(METRICS_FILE, judge(**judged, attacks=attacks, seed=seed, why_no_reference=why_not))
        workspace.write_json(ABOUT_FILE, facts)
        _draw_features(judged, workspace)

    return at.perform(out, "evaluate", settings, work)


def _draw_features(judged: Mapping[str, Judged], workspace: Workspace) -> None:
    """Write where retain and forget lie in the features of each network, where features were collected."""
    from unsharp.report.embedding import draw, embed

    shown = {title: judged[name].outputs for name, title in SHOWN_AS.items() if name in judged}
    if all(found.retain.features is not None for found in shown.values()):
        artifacts.write_text(workspace.file(EMBEDDING_FILE), draw(embed(shown)))


def forget_samples(
    subject: Subject,
    forget: ForgetSet,
    how: UnlearnConfig,
    out: str | Path,
    at: Setting,
    *,
    attacks: Sequence[str] | None = None,
    show_samples: bool = False,
    audit: AuditConfig | None = None,
) -> Run:
    """A deletion request in one go: new checkpoint, metrics, report, audit.

    Args:
        subject: The network.
        forget: The samples to be forgotten.
        how: Method, rule and loop.
        out: Where to write.
        at: Device and the like.
        attacks: Membership attacks, all by default.
        show_samples: Whether report and audit name the samples.
        audit: Bounds and key of the audit; the defaults, and no key, if left out.

    Raises:
        UserError: if the network is no better than a guess, or for bad input, before the work.
    """
    from unsharp.audit import stage as auditing
    from unsharp.audit.bounds import check_figures
    from unsharp.audit.record import AuditConfig, audit_of
    from unsharp.evaluation import METRICS
    from unsharp.report import write_report

    audit = audit or AuditConfig()
    check_figures(audit.bounds, [metric.group or name for name, metric in METRICS.items()])
    check_attacks(attacks or ())
    _check_store(at)
    _check_stop(subject, how, at)
    subject.check_before(forget)
    settings = {
        "checkpoint": subject.digest,
        "origin": subject.origin,
        **asked(subject, forget),
        "unlearn": how,
        "attacks": None if attacks is None else sorted(attacks),
        "show_samples": show_samples,
        "audit": audit.settings(),
    }

    def work(workspace: Workspace) -> None:
        inner = dataclasses.replace(
            at, say=lambda line: None if line.startswith(("wrote", "found done")) else at.say(line)
        )
        unlearned, facts = unlearn_and_judge(
            subject, forget, how, workspace.file("unlearn"), inner, attacks=attacks, features=True
        )
        values = facts.pop("metrics")
        at.progress.log(flat({"evaluation": values}))
        if not show_samples:
            facts.pop("ids", None)
        workspace.write_json(METRICS_FILE, values)
        workspace.write_json(ABOUT_FILE, facts)
        page = workspace.file(REPORT_FILE)
        write_report(page, [facts | {"metrics": values}], title="Deletion report", show_samples=show_samples)
        for name in (MODEL_FILE, RECORD_FILE):
            shutil.copyfile(unlearned.file(name), workspace.file(name))
        reference = find_reference(subject, forget, inner)[0]
        kept = None if reference is None or reference.run is None else reference.run.file(MODEL_FILE)
        written = audit_of(
            subject,
            forget,
            facts,
            values,
            audit,
            reference=None if kept is None else seal.sha256_of(kept),
            outputs={name: seal.sha256_of(workspace.file(name)) for name in ANSWER_FILES},
            derived=auditing.traces(subject, forget, at.store, Path(out)),
            show_samples=show_samples,
        )
        auditing.write(workspace, written)
        artifacts.remove_run(unlearned)

    return at.perform(out, "forget", settings, work)


def read_evaluation(path: str | Path, *, pictures: bool = False) -> dict[str, Any]:
    """What a report needs of an `evaluate` or `forget` run, with its pictures where they are asked for.

    Raises:
        UserError: if it is another run, or kept no pictures that are asked for.
    """
    run = artifacts.open_run(path)
    if not run.file(ABOUT_FILE).is_file():
        raise UserError(
            f"{path} is a {run.stage!r} run; a report needs `evaluate` or `forget` runs, or one `landscape` run alone"
        )
    facts = run.json(ABOUT_FILE) | {"metrics": run.json(METRICS_FILE)}
    if pictures:
        if not run.file(showing.FILE).is_file():
            raise UserError(f"{path} kept no pictures; evaluate its `unlearn` run again, with --pictures")
        facts["pictures"] = run.json(showing.FILE)
    return facts


def data_of_checkpoint(checkpoint: str | Path) -> DataConfig:
    """The data on which the network in a checkpoint was trained. Raises: UserError if it does not say."""
    _, metadata = checkpoints.load_weights(checkpoint)
    if "origin" not in metadata:
        raise UserError(f"checkpoint {checkpoint} does not say on what it was trained; name the data with --data")
    return config.from_dict(Origin, metadata["origin"], "checkpoint").data


def about(subject: Subject, forget: ForgetSet, how: dict[str, Any], record: Record) -> dict[str, Any]:
    """What a report says of a run beside its metrics; plain values.

    "corrections", where samples were put right rather than removed: the digest of what they should have been, and "n".
    """
    digest = record.about.get("corrections")
    corrected = {} if digest is None else {"corrections": {"digest": digest, "n": len(forget)}}
    return corrected | {
        "method": how["method"],
        "rule": how["rule"],
        "unlearn": how,
        "origin": config.to_dict(subject.origin),
        "forget": {"rule": forget.rule, "n": len(forget), "hash": forget.hash},
        "ids": forget.ids.tolist(),
        "history": record.history,
        "stop": record.about.get("stop"),
        "warnings": record.about.get("warnings", []),
        "versions": runtime.versions(),
    }


def _retraining(subject: Subject, forget: ForgetSet, at: Setting) -> Callable[[], tuple[nn.Module, Record]] | None:
    recipe = subject.origin.recipe
    if recipe is None:
        return None

    def run() -> tuple[nn.Module, Record]:
        found = _reference(recipe, subject, forget, at)
        return found.model, found.record

    return run


def _check_stop(subject: Subject, how: UnlearnConfig, at: Setting) -> None:
    """Raise UserError where the retrained network is to say when to stop, and cannot be had, before any work."""
    if how.stop_at == "retrained":
        if subject.origin.recipe is None:
            raise UserError(NOT_RETRAINABLE)
        _check_store(at)


def _check_store(at: Setting) -> None:
    """Raise UserError where no retrained reference could be kept, before any work."""
    with artifacts.writing(at.store / "references", "--store"):
        pass


def _reference(recipe: Recipe, subject: Subject, forget: ForgetSet, at: Setting) -> Reference:
    return retrain(
        recipe,
        subject.splits.train,
        forget,
        device=at.device,
        store=at.store,
        save_seconds=at.save_seconds,
        progress=at.progress,
    )


def _train_metrics(model: nn.Module, splits: Splits, record: Record) -> dict[str, Any]:
    test = None if splits.test is None else predict(model, splits.test, np.arange(len(splits.test)))
    return {
        "train_accuracy": accuracy(predict(model, splits.train, np.arange(len(splits.train)))),
        "test_accuracy": None if test is None else accuracy(test),
        "seconds": record.seconds,
        "passes": record.passes,
        "peak_memory_bytes": record.peak_memory_bytes,
    }
