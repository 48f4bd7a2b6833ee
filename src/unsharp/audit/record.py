"""The audit of a deletion request as plain values: what was asked, done, tested, found, and what it does not show."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unsharp import artifacts, config, runtime, seal
from unsharp.audit import bounds as bounding
from unsharp.audit import keyed
from unsharp.audit.bounds import DEFAULT, Bounds
from unsharp.audit.derived import Artefact
from unsharp.checkpoints import MODEL_FILE
from unsharp.difficulty import ForgetSet, from_ids
from unsharp.difficulty.files import read_ids, split_spec
from unsharp.errors import UserError
from unsharp.report.provenance import without_local
from unsharp.subject import Subject

AUDIT_FILE, PAGE_FILE = "audit.json", "audit.html"
FORMAT = 1
SUFFIXES = (".csv", ".json", ".npz", ".parquet", ".txt", ".toml")
THREATS = (
    (
        "Who",
        "someone who asks the network about inputs of their choice and sees all of its logits; they know which samples "
        "may have been forgotten, and some that were retained and some that were never seen, to set a threshold by",
    ),
    (
        "What they try",
        "to tell from the answers whether a sample was in the training data (the membership attacks of metrics.json)",
    ),
    (
        "Against what",
        "a network trained in the same way without the samples: whatever can be told of that one as well, forgetting "
        "cannot hide",
    ),
    (
        "What they do not have",
        "the weights, the network from before, networks trained for comparison, the retrained network, or the power to "
        "train this one further",
    ),
)
LIMITS = (
    "Evidence, not proof: it says what was measured on the networks named here, and does not show that nothing of the "
    "samples is left in the weights.",
    "Whoever has more than the threat model grants may see more: the weights, the network from before (the "
    "difference of both says much), shadow networks (`unsharp attack`), or further training (`unsharp relearn`).",
    "The bounds are conventions of whoever set them. Within a bound is near, not equal.",
    "One retrained network was compared with, and another seed would give another one. The intervals cover the choice "
    "of samples alone.",
    "A figure that the network before unlearning passes as well cannot show that anything was forgotten.",
    "The sums show that files are those that were written, not who wrote them or when. Whoever can write a file can "
    "write its sum too; keep the digest that `unsharp verify` prints elsewhere.",
    "Whoever holds the data can tell by trial which small set has the hash of the forget set. Codes under a key do not "
    "have this weakness as long as the key is kept.",
    "What derives from the samples was looked for in the store and beside the checkpoint and the answer. What lies "
    "elsewhere is not listed.",
)
NOT_SEEN = (
    "the data themselves, and every copy and backup of them",
    "the checkpoint from before, where no run of unsharp holds it, its copies, and networks derived from it elsewhere",
    "caches of data sets, logs, figures and reports outside of run directories",
)
WHO = (
    "Whoever holds the checkpoint from before, the data and the list of ids can run this again; on the same machine "
    "with the same versions and threads the new checkpoint is the same to the bit. Without them, `unsharp verify` "
    "shows whether files have changed."
)


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """What an audit is made of beyond the work itself; all of it is settled before the run.

    Args:
        bounds: The tests and their pass bounds, by figure.
        bounds_from: "defaults", or "file" where the user set them.
        key: Codes of ids are made with it; None makes none.
        inputs: Files that the work reads, by what they are; their sums are told, their names are not.
        command: The command that does it again, in words, with files by what they are; None where it is not known.
    """

    bounds: Bounds = field(default_factory=lambda: DEFAULT)
    bounds_from: str = "defaults"
    key: bytes | None = None
    inputs: Mapping[str, str | Path] = field(default_factory=dict)
    command: Sequence[str] | None = None

    def settings(self) -> dict[str, Any]:
        """What of it a result is named by."""
        return {
            "bounds": {name: config.to_dict(bound) for name, bound in self.bounds.items()},
            "key": None if self.key is None else keyed.name_of(self.key),
        }


def audit_of(
    subject: Subject,
    forget: ForgetSet,
    about: Mapping[str, Any],
    metrics: Mapping[str, Any],
    how: AuditConfig,
    *,
    reference: str | None,
    outputs: Mapping[str, str],
    derived: Sequence[Artefact],
    show_samples: bool,
) -> dict[str, Any]:
    """The audit of one request.

    Args:
        subject: The network before.
        forget: The samples to be forgotten.
        about: From `stages.about`.
        metrics: From `judge`.
        how: Bounds, key, inputs, command.
        reference: sha256 of the retrained network's file; None where it was not kept or there is none.
        outputs: sha256 of the files that were written, by name.
        derived: What still derives from the samples.
        show_samples: Whether ids are told.
    """
    tests = bounding.test(how.bounds, metrics)
    verdict, reason = bounding.overall(tests)
    origin = without_local(about["origin"])
    return {
        "format": FORMAT,
        "written": _now(),
        "verdict": verdict,
        "reason": reason,
        "asked": asked(forget, how.key, show_samples),
        "done": {
            "method": about["method"]["name"],
            "rule": about["rule"]["name"],
            "unlearn": without_local(about["unlearn"]),
            "origin": origin,
            "checkpoint_before": subject.digest,
            "checkpoint_after": outputs[MODEL_FILE],
            "seconds": metrics.get("seconds"),
            "passes": metrics.get("passes"),
            "retrained": reference,
            "why_not_retrained": metrics.get("reasons", {}).get("gap"),
            "warnings": list(about.get("warnings", ())),
        },
        "bounds": {"set": "before the run", "from": how.bounds_from, "sha256": config.digest(how.settings()["bounds"])},
        "tests": tests,
        "n": metrics["n"],
        "threat_model": [{"about": name, "text": text} for name, text in THREATS],
        "limits": list(LIMITS),
        "rerun": {"who": WHO, "command": _command(how, forget)},
        "inputs": inputs_of(subject, how),
        "outputs": [{"file": name, "sha256": total} for name, total in outputs.items()],
        "derived": [one.public() for one in derived],
        "not_seen": list(NOT_SEEN),
        "history": history_of(subject),
        "versions": runtime.versions(),
    }


def asked(forget: ForgetSet, key: bytes | None, show_samples: bool) -> dict[str, Any]:
    """What was asked, without an id unless `show_samples`."""
    ids, absent = forget.ids.tolist(), forget.absent.ids.tolist()
    found: dict[str, Any] = {
        "n": len(forget),
        "n_samples": forget.n_samples,
        "fingerprint": forget.fingerprint,
        "rule": forget.rule,
        "hash": forget.hash,
        "n_absent": len(absent),
        "hash_absent": forget.absent.hash,
        "hash_before": None if forget.before is None else forget.before.absent.hash,
        "codes": None,
    }
    if key is not None:
        found["codes"] = {
            "scheme": keyed.SCHEME,
            "key": keyed.name_of(key),
            "list": keyed.code_of_list(key, ids),
            "ids": keyed.codes_of(key, ids),
            "absent": keyed.codes_of(key, absent),
        }
    return found | ({"ids": ids, "ids_absent": absent} if show_samples else {})


def inputs_of(subject: Subject, how: AuditConfig) -> list[dict[str, Any]]:
    """sha256 of every input, by what it is."""
    told = [
        {"what": "checkpoint before", "sha256": subject.digest},
        {"what": "training data (fingerprint)", "sha256": subject.splits.train.fingerprint},
    ]
    test = subject.splits.test
    if test is not None:
        told.append({"what": "test data (fingerprint)", "sha256": test.fingerprint})
    return told + [{"what": what, "sha256": _sum(spec)} for what, spec in how.inputs.items()]


def history_of(subject: Subject) -> list[dict[str, Any]]:
    """The requests that the network has answered before, and what became of them; the oldest first."""
    file = _beside(subject, AUDIT_FILE)
    if file is None:
        return [{"event": "request", "asked": {"hash": one}} for one in subject.requests]
    earlier = config.read_json(file)
    one = {
        "event": "request",
        "written": earlier["written"],
        "asked": earlier["asked"],
        "method": earlier["done"]["method"],
        "rule": earlier["done"]["rule"],
        "checkpoint_before": earlier["done"]["checkpoint_before"],
        "checkpoint_after": earlier["done"]["checkpoint_after"],
        "verdict": earlier["verdict"],
        "run": seal.sha256_of(file.parent / seal.RUN_FILE),
    }
    purges = [
        event for event in earlier["history"] if event["event"] == "purge" and event["of"] == one["asked"]["hash"]
    ]
    before = [event for event in earlier["history"] if event not in purges]
    return [*before, one, *purges]


def forgotten_before(
    subject: Subject, given: str | None, key: bytes | None, *, id_column: str | None = None
) -> ForgetSet | None:
    """What a network has forgotten in earlier requests; None where it says of none.

    Found in the file that is given, else in the split beside the checkpoint, else in the audit beside it: by its ids if
    it tells them, else by their codes, with the key.

    Raises:
        UserError: if it is not found, or what is given is not what the checkpoint says.
    """
    samples = subject.splits.train
    if given is None and subject.absent is None:
        return None
    ids = _ids_beside(subject, key) if given is None else read_ids(given, id_column)
    if ids is None:
        raise UserError(
            f"{subject.path} has forgotten samples before, and they must stay out of what is retained: name them with "
            "--forgotten FILE, or with --key FILE if that request was made with a key"
        )
    found = from_ids(ids, samples)
    if subject.absent is not None and found.absent.hash != subject.absent:
        raise UserError(
            f"these {len(found)} samples are not those that {subject.path} has forgotten (their hash differs); give "
            "all of its earlier requests, and nothing else, with --forgotten FILE"
        )
    return found


def _command(how: AuditConfig, forget: ForgetSet) -> str | None:
    """The command that does it again; who has no key must name what was forgotten before."""
    if how.command is None:
        return None
    more = forget.before is not None and "--forgotten" not in how.command
    return " ".join([*how.command, *(("--forgotten", "FORGOTTEN") if more else ())])


def _ids_beside(subject: Subject, key: bytes | None) -> list[Any] | None:
    split, audit = _beside(subject, "split.json"), _beside(subject, AUDIT_FILE)
    if split is not None:
        values = config.read_json(split)
        return [*values["ids"], *values.get("before", ())]
    if audit is None:
        return None
    told = config.read_json(audit)["asked"]
    if "ids_absent" in told:
        return told["ids_absent"]
    if key is None or told["codes"] is None:
        return None
    if told["codes"]["key"] != keyed.name_of(key):
        raise UserError(f"{audit} was made with another key than this one; give that one, or --forgotten FILE")
    ids = subject.splits.train.ids.tolist()
    return [ids[i] for i in keyed.found_again(key, ids, told["codes"]["absent"])]


def _beside(subject: Subject, name: str) -> Path | None:
    folder = subject.path if subject.path.is_dir() else subject.path.parent
    file = folder / name
    return file if file.is_file() and (folder / artifacts.RUN_FILE).is_file() else None


def _sum(spec: str | Path) -> str | None:
    """sha256 of the file that an option names, perhaps with a column behind it; of all files of a directory."""
    known = split_spec(str(spec), SUFFIXES)
    path = Path(spec) if known is None else known[0]
    if path.is_dir():
        return seal.digest_of(seal.contents(path))
    return seal.sha256_of(path) if path.is_file() else None


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
