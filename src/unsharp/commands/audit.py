"""The commands that look after a deletion request once it is answered: verify and purge."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from unsharp import seal
from unsharp.errors import UserError
from unsharp.options import Text

PLACES = {
    "model": "CHECKPOINT",
    "out": "ANSWER",
    "ids": "IDS",
    "split": "SPLIT",
    "scores": "SCORES",
    "forgotten": "FORGOTTEN",
    "key": "KEY",
    "train_config": "TRAINING",
    "config": "METHOD",
    "bounds": "BOUNDS",
    "data_dir": "DATA",
    "test_dir": "TEST",
    "class_order": "CLASSES",
}
"""Options that name files or directories, by what stands for these in an audit."""
READ = ("ids", "split", "scores", "forgotten", "train_config", "config", "bounds", "class_order")
"""Those of them whose files are inputs; checkpoint and data have sums of their own."""
PASSING = ("store", "force", "save_seconds", "json", "track", "quiet")
"""Options that no result depends on."""


@dataclass(kw_only=True)
class Verify:
    """Say whether the files of a run, or of all runs in a directory, are as they were written."""

    path: tyro.conf.Positional[str]
    """Directory of a run, or one that holds runs."""
    digest: Text = None
    """The digest that was printed before and kept elsewhere, to compare with."""
    ids: Text = None
    """File of ids, to be told whether they are those of the request that this directory answers."""
    key: Text = None
    """Key file of the audit; with --ids, single ids are recognised too."""
    json: bool = False
    """Print one JSON object on standard output."""

    def run(self) -> dict[str, Any]:
        if self.key is not None and self.ids is None:
            raise UserError("--key recognises ids; name them with --ids")
        found = seal.verify(self.path)
        lines = seal.told(found, self.digest)
        same = not found.problems and self.digest in (None, found.digest)
        answer = {"as_written": same, "digest": found.digest, "runs": found.runs, "files": found.files}
        answer |= {"problems": list(found.problems), "outside": list(found.loose)}
        if self.ids is not None:
            lines[-1:-1] = [self._ids(answer)]
        if not self.json:
            print("\n".join(lines if same else [*lines, seal.CANNOT_SEE] if found.problems else lines))
        elif not same:
            print("\n".join(lines), file=sys.stderr)
        return answer

    def _ids(self, answer: dict[str, Any]) -> str:
        """What is known of the ids, in a line."""
        from unsharp.audit.keyed import open_key
        from unsharp.audit.stage import check_ids, known_ids
        from unsharp.difficulty.files import read_ids

        assert self.ids is not None
        ids = read_ids(self.ids)
        if self.key is None:
            check_ids(self.path, ids)
            answer |= {"ids": len(ids), "ids_asked": len(ids)}
            return f"these {len(ids)} ids are those of the request"
        if not Path(self.key).is_file():
            raise UserError(f"key file {self.key} does not exist; name the one that `unsharp forget` had")
        inside, all_of_it = known_ids(self.path, ids, open_key(self.key))
        answer |= {"ids": len(ids), "ids_asked": inside}
        return f"{inside} of these {len(ids)} ids were in the request" + ("; they are all of it" if all_of_it else "")


@dataclass(kw_only=True)
class Purge:
    """Delete what still derives from the samples of a request, after showing it, and record that in the audit."""

    answer: tyro.conf.Positional[str]
    """Directory that `unsharp forget` wrote."""
    ids: str
    """File of the ids that were to be deleted, as for `forget`."""
    runs: tuple[str, ...] = ("runs",)
    """Directories in which runs are looked for, at any depth."""
    store: Text = None
    """Directory of retrained networks and pools (default: the user's cache, or $UNSHARP_STORE)."""
    yes: bool = False
    """Delete without asking."""
    dry_run: bool = False
    """Only show what would be deleted."""
    json: bool = False
    """Print one JSON object on standard output."""

    def run(self) -> dict[str, Any]:
        from unsharp import runtime
        from unsharp.audit.stage import plan_purge
        from unsharp.difficulty.files import read_ids

        store = Path(self.store) if self.store else runtime.store_directory()
        roots = [Path(root) for root in self.runs if Path(root).is_dir() or self.runs != ("runs",)]
        roots += [store] if store.is_dir() or self.store else []
        plan = plan_purge(self.answer, read_ids(self.ids), roots)
        out = sys.stderr if self.json else sys.stdout
        for one in plan.found:
            print(
                f"{'keep  ' if one.kept else 'delete'} {one.path} ({one.stage}, {one.bytes:,} bytes): {one.what}",
                file=out,
            )
        answer = {"found": [{"path": str(one.path)} | one.public() for one in plan.found], "deleted": [], "left": []}
        if self.dry_run or not plan.doomed:
            print("nothing was deleted" if self.dry_run else "nothing is left to delete", file=out)
            return answer
        self._ask(len(plan.doomed))
        deleted, left = plan.carry_out()
        for line in left:
            print(f"left   {line}", file=out)
        print(f"deleted {len(deleted)} of {len(plan.doomed)}; recorded in the audit of {self.answer}", file=out)
        print("not touched: the data, checkpoints outside of runs, and copies; they are yours to delete", file=out)
        return answer | {"deleted": [str(one.path) for one in deleted], "left": left}

    def _ask(self, n: int) -> None:
        """Raise UserError unless the user agrees."""
        if self.yes:
            return
        if not sys.stdin.isatty():
            raise UserError(f"{n} directories would be deleted; say --yes to do it, or --dry-run to see them only")
        if input(f"delete these {n} directories for good? [y/N] ").strip().lower() not in ("y", "yes"):
            raise UserError("nothing was deleted; say y to delete")


def audit_config(options: Any) -> Any:
    """What the options of `forget` say of its audit: bounds, key, inputs, and the command that does it again.

    Raises:
        UserError: for bounds or a key that cannot be.
    """
    from unsharp.audit import keyed
    from unsharp.audit.bounds import DEFAULT, read_bounds
    from unsharp.audit.record import AuditConfig

    if options.key is not None:
        keyed.check_outside(options.key, options.out)
    bounds = DEFAULT if options.bounds is None else read_bounds(options.bounds)
    key = None if options.key is None else keyed.open_key(options.key)
    inputs = {PLACES[name]: value for name in READ if (value := getattr(options, name)) is not None}
    return AuditConfig(
        bounds=bounds,
        bounds_from="defaults" if options.bounds is None else "file",
        key=key,
        inputs=inputs,
        command=command_of(options),
    )


def command_of(options: Any) -> list[str]:
    """The words of the command that does the same again, with words in capitals for files and directories."""
    import torch

    words = ["unsharp", "forget"]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        given = field.default is dataclasses.MISSING or value != field.default
        if not given or field.name in PASSING or field.name in ("threads", "key"):
            continue
        if field.name in PLACES:
            value = PLACES[field.name]
        several = value if isinstance(value, tuple) else () if value is True else (value,)
        words += [f"--{field.name.replace('_', '-')}", *map(str, several)]
    return [*words, "--threads", str(options.threads or torch.get_num_threads())]


def verdict_of(run: Any) -> str:
    """The verdict of the audit in a line."""
    from unsharp.audit.record import AUDIT_FILE, PAGE_FILE

    audit = run.json(AUDIT_FILE)
    return f"audit: {audit['verdict']} ({audit['reason']}); {run.file(PAGE_FILE)}"
