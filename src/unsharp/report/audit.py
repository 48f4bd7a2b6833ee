"""The audit of a deletion request as one offline page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unsharp.report.groups import flatten
from unsharp.report.page import page
from unsharp.report.provenance import SHORT, public

HEADLINES = {
    "pass": "The tests that were set before are passed.",
    "fail": "Not all tests that were set before are passed.",
    "not tested": "Whether anything was forgotten could not be tested.",
}
EVIDENCE = "Evidence, not proof."


def render_audit(audit: Mapping[str, Any]) -> str:
    """The page as text. Args: audit: As `audit.record.audit_of` makes it."""
    asked, done = audit["asked"], audit["done"]
    return page(
        "audit.html",
        title="Audit of a deletion request",
        headline=f"{asked['n']:,} sample{'' if asked['n'] == 1 else 's'} unlearned. {HEADLINES[audit['verdict']]}",
        evidence=EVIDENCE,
        audit=audit,
        points=_points(audit),
        tests=[_line(test) for test in audit["tests"]],
        reasons=[(test["title"], test["reason"].replace("± ", "±\u00a0")) for test in audit["tests"] if test["reason"]],
        settings=public(flatten(done["unlearn"])),
        origin={k: v[:SHORT] if k == "fingerprint" else v for k, v in public(flatten(done["origin"])).items()},
        inputs=[(one["what"], one["sha256"] or "none") for one in audit["inputs"]],
        outputs=[(one["file"], one["sha256"]) for one in audit["outputs"]],
        history=[_event(event) for event in audit["history"]],
        ids=asked.get("ids"),
    )


def _points(audit: Mapping[str, Any]) -> list[tuple[str, str]]:
    asked, done = audit["asked"], audit["done"]
    before = asked["n_absent"] - asked["n"]
    also = f" {before:,} more were forgotten in earlier requests, and stay out." if before else ""
    codes = (
        "No key was given, so single ids cannot be recognised here."
        if asked["codes"] is None
        else f"Ids stand here as {asked['codes']['scheme']} codes under the key {asked['codes']['key']}, which stays "
        "with its owner."
    )
    retrained = (
        f"Compared with a network retrained without the samples ({done['retrained'][:SHORT]})."
        if done["retrained"]
        else f"There is no retrained network to compare with: {done['why_not_retrained'] or 'it was not kept'}."
    )
    return [
        ("Verdict", f"{audit['verdict'][:1].upper()}{audit['verdict'][1:]}: {audit['reason']}."),
        ("What was asked", f"To forget {asked['n']:,} of {asked['n_samples']:,} samples.{also} {codes}"),
        ("What was done", f"Method {done['method']} under rule {done['rule']}. {retrained}"),
        ("Bounds", f"Set {audit['bounds']['set']}, from {audit['bounds']['from']}."),
    ]


def _line(test: Mapping[str, Any]) -> dict[str, str]:
    def shown(name: str, signed: bool = False) -> str:
        value = test[name]
        return "—" if value is None else f"{value:{'+' if signed else ''}.2f}".replace("-", "−")

    half = "" if test["half_width"] is None else f" ± {test['half_width']:.2f}"
    return {
        "title": test["title"],
        "about": test["about"],
        "value": shown("value"),
        "reference": shown("reference"),
        "gap": shown("gap", signed=True) + half,
        "bound": test["shown"],
        "before": test["before"] or "—",
        "verdict": test["verdict"],
    }


def _event(event: Mapping[str, Any]) -> tuple[str, str, str]:
    """When, what, and how it ended."""
    when = event.get("written", "—")
    if event["event"] == "purge":
        n, left = len(event["deleted"]), event["left"]
        more = f", {left} left in place" if left else ""
        state = "" if event["state"] == "done" else " (begun, its end is not recorded)"
        return when, f"{n} derived artefact{'' if n == 1 else 's'} deleted{more}{state}", "—"
    asked = event["asked"]
    what = f"{asked['n']:,} samples" if "n" in asked else "samples"
    return when, f"request to forget {what} ({asked['hash'][:SHORT]})", event.get("verdict", "not known")
