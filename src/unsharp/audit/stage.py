"""The audit as part of an answer: written with it, and amended when what derives from the samples is deleted."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unsharp import artifacts, config, seal
from unsharp.artifacts import Workspace, open_run
from unsharp.audit import derived
from unsharp.audit.derived import Artefact, Request
from unsharp.audit.keyed import code_of, code_of_list, name_of
from unsharp.audit.record import AUDIT_FILE, PAGE_FILE
from unsharp.errors import UserError, listed

if TYPE_CHECKING:
    from unsharp.difficulty import ForgetSet
    from unsharp.subject import Subject


@dataclass(frozen=True)
class Purge:
    """What derives from the samples of a request, and what becomes of it.

    Args:
        answer: The run of `forget` whose audit tells of the request.
        found: All that derives, what is kept too.
        roots: Where it was looked for.
    """

    answer: Path
    found: tuple[Artefact, ...]
    roots: tuple[Path, ...]

    @property
    def doomed(self) -> list[Artefact]:
        """What is to be deleted."""
        return [one for one in self.found if not one.kept]

    def carry_out(self) -> tuple[list[Artefact], list[str]]:
        """Delete it, and record that in the audit: once before, and once after, so that a kill leaves a trace.

        Returns:
            What was deleted, and a line for each thing that was left.
        """
        begun = {"event": "purge", "of": _asked(self.answer)["hash"], "written": _now(), "state": "begun"}
        event = begun | {"run": seal.sha256_of(self.answer / seal.RUN_FILE)}
        event |= {"deleted": [one.public() for one in self.doomed], "left": 0}
        _record(self.answer, event)
        deleted, left = derived.purge(self.doomed, self.roots)
        _record(self.answer, event | {"state": "done", "deleted": [o.public() for o in deleted], "left": len(left)})
        return deleted, left


def traces(subject: Subject, forget: ForgetSet, store: Path, out: Path) -> list[Artefact]:
    """What derives from the samples in the store, beside the checkpoint, and beside the answer."""
    request = Request(
        subject.splits.train.fingerprint,
        forget.hash,
        absent=(forget.absent.hash,),
        checkpoints=(subject.digest,),
    )
    found = {one.path.resolve(): one for one in derived.find(request, [store])}
    homes = {out.absolute().parent, *([subject.path.absolute().parent] if subject.path.is_dir() else [])}
    for home in homes - {store.absolute()}:
        found |= {one.path.resolve(): one for one in derived.find(request, [home], deep=False)}
    # The answer itself is on its way, under its hidden name.
    return [one for path, one in sorted(found.items()) if out.name not in (path.name, path.name[1:].rpartition(".")[0])]


def write(workspace: Workspace, audit: Mapping[str, Any]) -> None:
    """Write audit.json and audit.html."""
    workspace.write_json(AUDIT_FILE, audit)
    artifacts.write_text(workspace.file(PAGE_FILE), _page(audit))


def plan_purge(answer: str | Path, ids: Sequence[object], roots: Sequence[str | Path]) -> Purge:
    """Look for what derives from the samples of a request.

    Args:
        answer: The run of `forget`.
        ids: The ids that were asked for; they must be those of the request.
        roots: Directories to look in, such as the store and those of runs.

    Raises:
        UserError: if the answer has changed since it was written, the ids are others, or a directory is missing.
    """
    run = open_run(answer, "forget")
    if problems := seal.broken(run.path):
        raise UserError(f"{answer} is not as it was written ({listed(problems, 2)}); nothing is deleted on its word")
    check_ids(run.path, ids)
    if absent := [root for root in roots if not Path(root).is_dir()]:
        raise UserError(f"{absent[0]} is no directory; give the store with --store, and those of runs with --runs")
    asked, audit = _asked(run.path), run.json(AUDIT_FILE)
    request = Request(
        asked["fingerprint"],
        asked["hash"],
        absent=(asked["hash_absent"],),
        checkpoints=(audit["done"]["checkpoint_before"],),
    )
    found = {one.path.resolve(): one for one in derived.find(request, roots)}
    return Purge(run.path, tuple(found[path] for path in sorted(found)), tuple(Path(root) for root in roots))


def check_ids(answer: str | Path, ids: Sequence[object]) -> None:
    """Raise UserError where the ids are not those of the request that the answer's audit tells of."""
    asked = _asked(Path(answer))
    if all(not _hash_is(kind, ids, asked) for kind in (int, str)):
        raise UserError(
            f"these {len(ids)} ids are not the {asked['n']} of the request (their hash differs); give the same list"
        )


def known_ids(answer: str | Path, ids: Sequence[object], key: bytes) -> tuple[int, bool]:
    """How many of the ids were in the request, by their codes, and whether they are just those of it.

    Raises:
        UserError: if the audit has no codes, or they were made with another key.
    """
    codes = _asked(Path(answer))["codes"]
    if codes is None:
        raise UserError(f"the audit of {answer} has no codes of ids, since no key was given; use --ids without --key")
    if codes["key"] != name_of(key):
        raise UserError(f"the audit of {answer} was made with another key ({codes['key']}); name that key's file")
    known = set(codes["ids"])
    inside = sum(code_of(key, one) in known for one in ids)
    return inside, code_of_list(key, ids) == codes["list"]


def _hash_is(kind: type, ids: Sequence[object], asked: Mapping[str, Any]) -> bool:
    """Whether ids, read as integers or as text, have the hash of the request."""
    try:
        told = sorted(kind(str(one).strip()) for one in ids)
    except ValueError:
        return False
    # As `ForgetSet.hash`, without the data.
    content: list[Any] = [asked["fingerprint"], asked["n_samples"], told]
    if asked["n_absent"] > asked["n"]:
        content.append(asked["hash_before"])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest() == asked["hash"]


def _asked(answer: Path) -> dict[str, Any]:
    if not (answer / AUDIT_FILE).is_file():
        raise UserError(f"{answer} holds no {AUDIT_FILE}; give the directory that `unsharp forget` wrote")
    return config.read_json(answer / AUDIT_FILE)["asked"]


def _record(answer: Path, event: Mapping[str, Any]) -> None:
    """Write an event into the history of an audit; one that was begun at the same time is replaced."""

    def fill(folder: Path) -> None:
        audit = config.read_json(folder / AUDIT_FILE)
        kept = [e for e in audit["history"] if (e["event"], e.get("written")) != (event["event"], event["written"])]
        changed = audit | {"history": [*kept, dict(event)]}
        artifacts.write_json(folder / AUDIT_FILE, changed)
        artifacts.write_text(folder / PAGE_FILE, _page(changed))

    artifacts.amend(answer, fill)


def _page(audit: Mapping[str, Any]) -> str:
    from unsharp.report.audit import render_audit

    return render_audit(audit)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds")
