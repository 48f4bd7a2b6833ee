"""The command line: which commands there are, how their arguments are read, and how they end."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import tyro

import unsharp
from unsharp import config
from unsharp.commands.alpha import SuggestAlpha
from unsharp.commands.attack import Attack
from unsharp.commands.audit import Purge, Verify
from unsharp.commands.landscape import Landscape
from unsharp.commands.language import Language
from unsharp.commands.looks import Doctor, List, Show
from unsharp.commands.memorize import Memorize
from unsharp.commands.quickstart import Quickstart
from unsharp.commands.relearn import Relearn
from unsharp.commands.report import Report
from unsharp.commands.reproduce import Reproduce
from unsharp.commands.robustness import RobustnessCommand
from unsharp.commands.stages import Evaluate, ForgetCommand, Mask, Split, Train, Unlearn
from unsharp.commands.sweep import Sweep
from unsharp.commands.theory import Theory
from unsharp.commands.tune import Tune
from unsharp.errors import NonFiniteError, UserError, unknown
from unsharp.options import Common

PROGRAM = "unsharp"


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
    "reproduce": Reproduce,
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
