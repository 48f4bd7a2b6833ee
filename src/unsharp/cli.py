"""The command line: each command is a thin call of a function of `stages`, `recipes` or `report`."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import re
import sys
import traceback
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

import unsharp
from unsharp import config, runtime
from unsharp.commands_alpha import SuggestAlpha
from unsharp.commands_attack import Attack
from unsharp.commands_audit import Purge, Verify
from unsharp.commands_landscape import Landscape
from unsharp.commands_language import Language
from unsharp.commands_memorize import Memorize
from unsharp.commands_relearn import Relearn
from unsharp.commands_robustness import RobustnessCommand
from unsharp.commands_sweep import Sweep
from unsharp.commands_theory import Theory
from unsharp.commands_tune import Tune
from unsharp.data import DataConfig
from unsharp.errors import NonFiniteError, UserError, unknown
from unsharp.models import ModelConfig
from unsharp.options import Common, Count, Data, Forget, Method, Network, Rule, Text, Training, Words
from unsharp.progress import SILENT, BarProgress, LineProgress, Progress
from unsharp.tracking import tracked
from unsharp.training import TrainConfig

PROGRAM = "unsharp"
console = Console(stderr=True, highlight=False)
Answer = dict[str, Any]


@dataclass(kw_only=True)
class Quickstart(Common):
    """Train, unlearn by several methods, retrain, evaluate, and open one report: the whole job in a minute."""

    out: str = "runs/quickstart"
    """Directory of the runs and the report."""
    seeds: int = 3
    """Number of seeds."""
    tiny: bool = False
    """One seed, two epochs: only to see that everything works."""
    workers: Count = None
    """Processes at a time; as many as there are processors, up to three, if left out."""
    no_open: bool = False
    """Do not open the report in a browser."""

    def run(self) -> Answer:
        from unsharp.recipes import quickstart

        with _setting(self) as at:
            result = quickstart.run(
                self.out, at, seeds=1 if self.tiny else self.seeds, tiny=self.tiny, workers=self.workers
            )
        print(result.text, file=sys.stderr if self.json else sys.stdout)
        _open(result.report, self.no_open or self.json)
        return {"report": str(result.report), "out": self.out, "rows": result.rows}


@dataclass(kw_only=True)
class Train(Common, Data, Network, Rule, Training):
    """Train a network; the checkpoint remembers how."""

    out: Text = None
    """Run directory; named by content under runs/ if left out."""
    config: Text = None
    """JSON file of a training configuration (`unsharp show RUN` prints one); options override it."""

    def run(self) -> Answer:
        from unsharp import stages

        how = _train_config(self)
        with _setting(self) as at:
            run = stages.train_network(
                self.model_config("small_cnn") or ModelConfig(), self.data_config() or DataConfig(), how, self.out, at
            )
        metrics = run.json(stages.METRICS_FILE)
        if not self.json:
            print(stages.sentence(metrics))
        return _run_answer(run) | metrics


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
        with _setting(self) as at:
            if self.level_alone:
                chosen = _by_level(self, self.model, at)
            run = stages.split_samples(_data_of(self), chosen, self.out, at)
        made = run.json(stages.SPLIT_FILE)
        if not self.json:
            print(made["rule"])
        return _run_answer(run) | {"n": made["n"], "rule": made["rule"]}


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
    """Which weights: largest saliency, smallest (as the published code does), or random."""
    per_layer: bool = False
    """Take the fraction within each tensor rather than over all."""
    seed: int = 0
    """Seed of the random choice."""

    def run(self) -> Answer:
        from unsharp import masks, stages

        masks.check_choice(self.fraction, self.select, self.seed)
        with _setting(self) as at:
            subject = _subject(self, self.model, at)
            run = stages.make_mask(
                subject,
                _forget_set(self, subject),
                self.out,
                at,
                fraction=self.fraction,
                select=self.select,  # pyright: ignore[reportArgumentType]
                per_layer=self.per_layer,
                seed=self.seed,
            )
        return _run_answer(run) | {"fraction": masks.fraction_of(masks.load(run.file(stages.MASK_FILE)))}


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

    def run(self) -> Answer:
        from unsharp import stages

        how = self.unlearn_config(self.config)
        with _setting(self) as at:
            subject = _subject(self, self.model, at, self.train_config)
            run = stages.unlearn_network(subject, _forget_set(self, subject), how, self.out, at)
        record = run.json(stages.RECORD_FILE)
        cost = {k: record[k] for k in ("seconds", "passes", "peak_memory_bytes")}
        if not self.json:
            print(f"{cost['seconds']:.1f} s, {cost['passes']} passes; next: {PROGRAM} evaluate {run.path}")
        course = {"stop": record["about"].get("stop"), "warnings": record["about"].get("warnings", [])}
        return _run_answer(run) | cost | course | {"before": run.json(stages.BEFORE_FILE)}


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

    def run(self) -> Answer:
        from unsharp import stages

        with _setting(self) as at:
            run = stages.evaluate_run(
                self.run_dir,
                self.out,
                at,
                seed=self.seed,
                attacks=self.attacks,
                data_config=self.data_config(),
                train_config=_read_train_config(self.train_config),
                original=self.original,
                features=self.features,
                keep_outputs=self.keep_outputs,
            )
        _show_evaluation(self, run)
        return run.json(stages.METRICS_FILE) | {"run": str(run.path)}


@dataclass(kw_only=True)
class Report(Common):
    """Write one offline HTML page about evaluated runs."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Directories of `evaluate` or `forget` runs, seeds of one method averaged; or one that holds runs, for all."""
    out: str = "report.html"
    """The HTML file."""
    table: Words = None
    """Files to write the table to besides, with intervals: .csv, .parquet, .tex, .md or .json by their ending."""
    title: str = "Unlearning report"
    """Heading of the page."""
    show_samples: bool = False
    """Name the forgotten samples."""
    open: bool = False
    """Open the page in a browser."""

    def run(self) -> Answer:
        from unsharp import stages
        from unsharp.commands_index import holds_runs, report_all
        from unsharp.report import write_report
        from unsharp.report.export import check_table_file, write_table
        from unsharp.report.tables import summarise

        if not self.runs:
            raise UserError("report needs at least one evaluated run; give directories that `unsharp evaluate` wrote")
        if len(self.runs) == 1 and holds_runs(self.runs[0]):
            return report_all(self.runs[0], self.out, title=self.title, tables=self.table or (), show=not self.json)
        for file in self.table or ():
            check_table_file(file)
        facts = [stages.read_evaluation(path) for path in self.runs]
        write_report(self.out, facts, title=self.title, show_samples=self.show_samples)
        for file in self.table or ():
            write_table(file, summarise(facts))
        _show_facts(self, facts)
        _open(Path(self.out), not self.open)
        return {"report": self.out, "runs": len(facts), "tables": list(self.table or ())}


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
        from unsharp.commands_audit import audit_config, verdict_of

        how = self.unlearn_config(self.config)
        audit = audit_config(self)
        with _setting(self) as at:
            subject = _subject(self, self.model, at, self.train_config)
            forget = _forget_set(self, subject)
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
        _show_evaluation(self, run)
        if not self.json:
            print(verdict_of(run))
        return (
            run.json(stages.METRICS_FILE)
            | _run_answer(run)
            | {
                "report": str(run.file(stages.REPORT_FILE)),
                "audit": run.json("audit.json")["verdict"],
            }
        )


@dataclass(kw_only=True)
class List:
    """List what is registered (methods, rules, metrics, data, models, proxies, objectives), or the runs in a folder."""

    what: tyro.conf.Positional[str] = "methods"
    """methods, rules, metrics, data, models, proxies, objectives (of language models) or runs."""
    where: tyro.conf.Positional[str] = "runs"
    """With runs: the directory that holds them."""
    json: bool = False
    """Print one JSON object on standard output."""

    def run(self) -> Answer:
        from unsharp.commands_index import list_runs
        from unsharp.listing import listing

        if self.what == "runs":
            return list_runs(self.where, show=not self.json)
        rows = listing(self.what)
        if not self.json:
            from rich.table import Table

            shown = [name for name in rows[0] if name not in ("source", "ideal")]
            table = Table(*shown, title=self.what)
            for row in rows:
                table.add_row(*(row[name] for name in shown))
            Console().print(table)
        return {self.what: rows}


@dataclass(kw_only=True)
class Show:
    """Show a run: what it is, its configuration and its figures."""

    run_dir: tyro.conf.Positional[str]
    """Directory of a run."""
    json: bool = False
    """Print one JSON object on standard output."""

    def run(self) -> Answer:
        from unsharp.artifacts import open_run

        run = open_run(self.run_dir)
        files = sorted(p.name for p in run.path.iterdir())
        answer: Answer = {"run": str(run.path), "stage": run.stage, "files": files, "config": run.config}
        answer["provenance"] = run.provenance
        if "metrics.json" in files:
            answer["metrics"] = run.json("metrics.json")
        if not self.json:
            Console().print_json(data=answer)
        return answer


@dataclass(kw_only=True)
class Doctor:
    """Say what this machine offers: versions, device, stores, extras, and whether a step works."""

    json: bool = False
    """Print one JSON object on standard output."""

    def run(self) -> Answer:
        from unsharp.listing import doctor

        answer = doctor(_store(None))
        if not self.json:
            for name, value in answer.items():
                print(f"{name:>20}  {value}")
        return answer


COMMANDS: dict[str, type] = {
    "quickstart": Quickstart,
    "train": Train,
    "memorize": Memorize,
    "split": Split,
    "mask": Mask,
    "unlearn": Unlearn,
    "tune": Tune,
    "suggest-alpha": SuggestAlpha,
    "evaluate": Evaluate,
    "relearn": Relearn,
    "landscape": Landscape,
    "attack": Attack,
    "robustness": RobustnessCommand,
    "report": Report,
    "forget": ForgetCommand,
    "sweep": Sweep,
    "verify": Verify,
    "purge": Purge,
    "language": Language,
    "theory": Theory,
    "list": List,
    "show": Show,
    "doctor": Doctor,
}


def _order(command: type) -> None:
    """Put what a command alone has first in its help, and what all commands have last."""
    bases = sorted(command.__mro__, key=lambda base: base is Common)
    names = dict.fromkeys(name for base in bases for name in inspect.get_annotations(base))
    fields = command.__dataclass_fields__
    command.__dataclass_fields__ = {name: fields[name] for name in names if name in fields}


for _command in COMMANDS.values():
    _order(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 a mistake of the user, 1 a failure, 130 interrupted."""
    sys.exit(_guarded(list(sys.argv[1:] if arguments is None else arguments)))


def _guarded(arguments: list[str]) -> int:
    try:
        if arguments == ["--version"]:
            print(PROGRAM, unsharp.__version__)
            return 0
        command = _parse(arguments)
        answer = command.run()
        if command.json:
            print(json.dumps(config.to_dict(answer), allow_nan=False))
        return int(answer.get("as_written") is False)
    except UserError as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        _complain("interrupted; everything finished so far is kept, and the same command goes on from there")
        return 130
    except NonFiniteError as error:
        _complain(str(error))
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("UNSHARP_DEBUG"):
            traceback.print_exc()
        _complain(f"failed: {type(error).__name__}: {error} (UNSHARP_DEBUG=1 shows where)")
        return 1


def _parse(arguments: list[str]) -> Any:
    """The command; a mistake in the arguments becomes one line."""
    if not arguments:
        raise UserError(f"give a command: {', '.join(COMMANDS)}; see {PROGRAM} --help")
    if not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        raise unknown("command", arguments[0], COMMANDS)
    noise = io.StringIO()
    try:
        with contextlib.redirect_stderr(noise):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog=PROGRAM,
                description="Sharpness-aware machine unlearning, with the evidence of how well it worked.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(noise.getvalue())) from None


def _one_line(box: str) -> str:
    """What an error box of the parser says, without the box."""
    lines = [re.sub(r"[│╭╮╰╯]|─{2,}", " ", line).strip() for line in box.splitlines()]
    text = " ".join(line for line in lines[1:] if line)
    text, _, near = text.partition("Perhaps you meant")
    if found := re.search(r"--[\w-]+", near):
        text = f"{text.strip()}; did you mean {found[0]}?"
    text = re.sub(r"-{8,}", " ", text)
    text = re.split(r"Got errors:|Argument helptext:|For full helptext", text)[0]
    text = re.sub(r"(?<=Expected one of )\(.*?\)", _choices, text)
    text = re.sub(r"no type matching (\S+) could be instantiated from \[(.*?)\]\.?", r"it takes \1, got \2", text)
    return re.sub(r"\s+", " ", text).strip() or "the arguments could not be read; see unsharp --help"


def _choices(found: re.Match[str]) -> str:
    """The values of an option that may be left out, in an order of their own: the parser's is that of a set."""
    return ", ".join(sorted(set(re.findall(r"'(.*?)'", found[0])) - {"None"}))


def _complain(message: str) -> None:
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)


@contextlib.contextmanager
def _setting(options: Common) -> Any:
    from unsharp.stages import Setting

    runtime.set_threads(options.threads)
    if not options.save_seconds > 0:
        raise UserError(f"--save-seconds must be above 0, got {options.save_seconds}")
    with contextlib.ExitStack() as stack:
        yield Setting(
            device=runtime.pick_device(options.device),
            store=_store(options.store),
            force=options.force,
            save_seconds=options.save_seconds,
            progress=stack.enter_context(tracked(_progress(options, stack), options.track)),
            say=_say,
        )


def _progress(options: Common, stack: contextlib.ExitStack) -> Progress:
    """A bar for a person, lines for a log, nothing for who wants quiet."""
    if options.quiet:
        return SILENT
    return stack.enter_context(BarProgress()) if sys.stderr.isatty() else LineProgress(_say)


def _say(line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)


def _store(given: str | None) -> Path:
    return Path(given) if given else runtime.store_directory()


def _train_config(options: Train) -> TrainConfig:
    base = config.to_dict(_read_train_config(options.config) or TrainConfig())
    optimizer, rule = options.optimizer_values(), {"name": options.rule or base["rule"]["name"]}
    if optimizer.get("name", base["optimizer"]["name"]) != base["optimizer"]["name"]:
        base["optimizer"] |= {"momentum": None, "options": {}}
    if rule["name"] == base["rule"]["name"]:
        rule = base["rule"]
    values = {"optimizer": base["optimizer"] | optimizer, "rule": rule | options.rule_values()}
    return config.from_dict(TrainConfig, base | options.loop_values() | values, "train")


def _read_train_config(path: str | None) -> TrainConfig | None:
    return None if path is None else config.load(TrainConfig, path)


def _data_of(options: Any) -> DataConfig:
    """The data that the options name, or those of the checkpoint that they name."""
    from unsharp.stages import data_of_checkpoint

    given = options.data_config()
    return given or (DataConfig() if options.model is None else data_of_checkpoint(options.model))


def _subject(options: Any, checkpoint: str, at: Any, train_config: str | None = None) -> Any:
    from unsharp.subject import load_subject

    if options.split is None:
        options.forget_config()
    return load_subject(
        checkpoint,
        at.device,
        model=options.model_config(),
        data_config=options.data_config(),
        train=_read_train_config(train_config),
    )


def _forget_set(options: Any, subject: Any) -> Any:
    from unsharp.audit.keyed import open_key
    from unsharp.audit.record import forgotten_before
    from unsharp.difficulty import choose
    from unsharp.difficulty.stage import estimated
    from unsharp.stages import read_split

    samples, id_column = subject.splits.train, subject.origin.data.id_column
    key = None if options.key is None else open_key(options.key)
    before = forgotten_before(subject, options.forgotten, key, id_column=id_column)
    if options.split is None:
        pool = str(estimated(subject.origin, samples, _store(options.store))) if options.level_alone else ""
        return choose(options.forget_config(pool), samples, id_column=id_column, before=before)
    names = ("ids", "random", "forget_classes", "scores", "level", "n")
    if given := [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]:
        raise UserError(f"--split already says what to forget; leave {', '.join(given)} out")
    chosen = read_split(options.split, samples)
    return chosen if chosen.before is not None else chosen.after(before)


def _by_level(options: Any, checkpoint: str | None, at: Any) -> Any:
    """The choice of a forget set by a level alone, where only the checkpoint says whose networks are meant."""
    from unsharp.difficulty.stage import estimated
    from unsharp.subject import load_subject

    if checkpoint is None:
        raise UserError("--level alone needs --model, whose memorization is taken; or name scores with --scores")
    subject = load_subject(checkpoint, at.device, data_config=options.data_config())
    return options.forget_config(str(estimated(subject.origin, subject.splits.train, at.store)))


def _run_answer(run: Any) -> Answer:
    return {"run": str(run.path), "stage": run.stage, "reused": run.reused}


def _show_evaluation(options: Common, run: Any) -> None:
    from unsharp.stages import read_evaluation

    _show_facts(options, [read_evaluation(run.path)])


def _show_facts(options: Common, facts: list[Answer]) -> None:
    """The outcome in words, accuracies and costs, for a person."""
    from unsharp.report.brief import brief
    from unsharp.report.tables import summarise

    if not options.json:
        print(brief(summarise(facts)))


def _open(path: Path, stay: bool) -> None:
    if not stay and sys.stdout.isatty():
        with contextlib.suppress(Exception):
            webbrowser.open(path.resolve().as_uri())
