"""What commands have in common: where they run, what their options name, and how they answer."""

from __future__ import annotations

import contextlib
import json
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from unsharp import config, runtime
from unsharp.data import DataConfig
from unsharp.errors import UserError
from unsharp.options import Cells, Common
from unsharp.progress import SILENT, BarProgress, LineProgress, Progress
from unsharp.tracking import tracked
from unsharp.training import TrainConfig

console = Console(stderr=True, highlight=False)
Answer = dict[str, Any]


@contextlib.contextmanager
def setting(options: Common) -> Any:
    from unsharp.stages import Setting

    runtime.set_threads(options.threads)
    if not options.save_seconds > 0:
        raise UserError(f"--save-seconds must be above 0, got {options.save_seconds}")
    with contextlib.ExitStack() as stack:
        yield Setting(
            device=runtime.pick_device(options.device),
            store=store_of(options.store),
            force=options.force,
            save_seconds=options.save_seconds,
            progress=stack.enter_context(tracked(progress_of(options, stack), options.track)),
            say=say,
        )


def progress_of(options: Common, stack: contextlib.ExitStack) -> Progress:
    """A bar for a person, lines for a log, nothing for who wants quiet."""
    if options.quiet:
        return SILENT
    return stack.enter_context(BarProgress()) if sys.stderr.isatty() else LineProgress(say)


def say(line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)


def store_of(given: str | None) -> Path:
    return Path(given) if given else runtime.store_directory()


def train_config_of(options: Any) -> TrainConfig:
    base = config.to_dict(read_train_config(options.config) or TrainConfig())
    optimizer, rule = options.optimizer_values(), {"name": options.rule or base["rule"]["name"]}
    if optimizer.get("name", base["optimizer"]["name"]) != base["optimizer"]["name"]:
        base["optimizer"] |= {"momentum": None, "options": {}}
    if rule["name"] == base["rule"]["name"]:
        rule = base["rule"]
    values = {"optimizer": base["optimizer"] | optimizer, "rule": rule | options.rule_values()}
    return config.from_dict(TrainConfig, base | options.loop_values() | values, "train")


def read_train_config(path: str | None) -> TrainConfig | None:
    return None if path is None else config.load(TrainConfig, path)


def data_of(options: Any) -> DataConfig:
    """The data that the options name, or those of the checkpoint that they name."""
    from unsharp.stages import data_of_checkpoint

    given = options.data_config()
    return given or (DataConfig() if options.model is None else data_of_checkpoint(options.model))


def subject_of(options: Any, checkpoint: str, at: Any, train_config: str | None = None) -> Any:
    from unsharp.subject import load_subject

    if options.split is None:
        options.forget_config()
    return load_subject(
        checkpoint,
        at.device,
        model=options.model_config(),
        data_config=options.data_config(),
        train=read_train_config(train_config),
    )


def forget_set_of(options: Any, subject: Any) -> Any:
    from unsharp.audit.keyed import open_key
    from unsharp.audit.record import forgotten_before
    from unsharp.difficulty import choose
    from unsharp.difficulty.stage import estimated
    from unsharp.stages import read_split

    samples, id_column = subject.splits.train, subject.origin.data.id_column
    key = None if options.key is None else open_key(options.key)
    before = forgotten_before(subject, options.forgotten, key, id_column=id_column)
    if options.split is None:
        pool = str(estimated(subject.origin, samples, store_of(options.store))) if options.level_alone else ""
        return choose(options.forget_config(pool), samples, id_column=id_column, before=before)
    names = ("ids", "random", "forget_classes", "scores", "level", "n")
    if given := [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]:
        raise UserError(f"--split already says what to forget; leave {', '.join(given)} out")
    chosen = read_split(options.split, samples)
    return chosen if chosen.before is not None else chosen.after(before)


def by_level(options: Any, checkpoint: str | None, at: Any) -> Any:
    """The choice of a forget set by a level alone, where only the checkpoint says whose networks are meant."""
    from unsharp.difficulty.stage import estimated
    from unsharp.subject import load_subject

    if checkpoint is None:
        raise UserError("--level alone needs --model, whose memorization is taken; or name scores with --scores")
    subject = load_subject(checkpoint, at.device, data_config=options.data_config())
    return options.forget_config(str(estimated(subject.origin, subject.splits.train, at.store)))


def run_answer(run: Any) -> Answer:
    return {"run": str(run.path), "stage": run.stage, "reused": run.reused}


def show_evaluation(options: Common, run: Any) -> None:
    from unsharp.stages import read_evaluation

    show_facts(options, [read_evaluation(run.path)])


def show_facts(options: Common, facts: list[Answer]) -> None:
    """The outcome in words, accuracies and costs, for a person."""
    from unsharp.report.brief import brief
    from unsharp.report.tables import summarise

    if not options.json:
        print(brief(summarise(facts)))


def open_in_browser(path: Path, stay: bool) -> None:
    if not stay and sys.stdout.isatty():
        with contextlib.suppress(Exception):
            webbrowser.open(path.resolve().as_uri())


AGAIN = "call again: cells whose process died are tried in any case, the others with --retry-failed"


def where_of(options: Cells) -> Answer:
    """Where cells run, and how many at a time, as `run_grid` takes it."""
    from unsharp.sweep import backend_from

    if options.dry_run and options.retry_failed:
        raise UserError("--dry-run tries nothing; leave --retry-failed out")
    where: Answer = {"workers": options.processes, "threads": options.threads}
    if options.backend == "local" and options.address is None:
        return where | {"accelerators": options.accelerators}
    return where | {"backend": backend_from(options.backend, options.address, accelerators=options.accelerators)}


def watch_of(options: Cells) -> Any:
    """A table for a person, lines for a log, nothing for who wants quiet."""
    from unsharp.sweep.grid.live import LineWatch, TableWatch, Watch

    if options.quiet:
        return Watch()
    return TableWatch(console) if sys.stderr.isatty() else LineWatch(say)


def teller_of(options: Cells) -> Callable[[str], None]:
    """What takes lines for the user."""
    return (lambda line: None) if options.quiet else say


def foreseen(options: Cells, outlook: Answer) -> Answer:
    """Show what would be done, and what it would cost."""
    if not options.json:
        from unsharp.sweep.grid.live import variants_table

        Console().print(variants_table(outlook["variants"]))
        print("\n".join(outlook["lines"]))
    return outlook


def ended(options: Cells, answer: Answer) -> Answer:
    """The answer; where cells failed, the command says so and ends with 1."""
    if answer["failures"]:
        print(f"{answer['failures']}\n{AGAIN}", file=sys.stderr)
        if options.json:
            print(json.dumps(config.to_dict(answer), allow_nan=False))
        raise SystemExit(1)
    return answer
