"""Tests with pass bounds that are set before a run, and their verdicts: pass, fail, or not tested, with the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from unsharp import config
from unsharp.errors import UserError, unknown

About = Literal["forgetting", "utility"]
Verdict = Literal["pass", "fail", "not tested"]
MEMBERSHIP = "membership"
"""The figure that is the largest gap among the membership attacks that work."""
WORKS = 55.0
"""Balanced accuracy in % from which an attack counts as one that works; guessing has 50."""
NORMAL = 1.959963984540054
"""97.5 % quantile of the normal distribution."""
SHARES = {
    "retain_accuracy": ("retain", "divergence.retain_divergence.churn"),
    "forget_accuracy": ("forget", "divergence.forget_divergence.churn"),
    "test_accuracy": ("test", "divergence.test_divergence.churn"),
    MEMBERSHIP: ("forget", None),
}
"""Figures that are shares of samples: of which, and where the share stands that two networks class differently."""
TITLES = {
    "retain_accuracy": "Accuracy on the retained samples",
    "forget_accuracy": "Accuracy on the forgotten samples",
    "test_accuracy": "Accuracy on the test samples",
    MEMBERSHIP: "Membership inference, the attack with the largest gap",
}


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What a figure must keep to pass; at least one limit.

    Args:
        about: Whether the figure speaks of "forgetting" or of the "utility" that is kept.
        gap_at_least: Least value minus the retrained network's.
        gap_at_most: Largest value minus the retrained network's.
        at_least: Least value.
        at_most: Largest value.

    Raises:
        UserError: if no limit is given, one is not finite, or no value can keep them.
    """

    about: About = "utility"
    gap_at_least: float | None = None
    gap_at_most: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        limits = {n: getattr(self, n) for n in ("gap_at_least", "gap_at_most", "at_least", "at_most")}
        given = {n: v for n, v in limits.items() if v is not None}
        if not given:
            raise UserError(f"a bound needs a limit: one of {', '.join(limits)}")
        if bad := [n for n, v in given.items() if not math.isfinite(v)]:
            raise UserError(f"{bad[0]} must be a finite number, got {given[bad[0]]}")
        for low, high in (("gap_at_least", "gap_at_most"), ("at_least", "at_most")):
            if low in given and high in given and given[low] > given[high]:
                raise UserError(f"{low} ({given[low]}) lies above {high} ({given[high]}); no figure can keep both")

    @property
    def needs_reference(self) -> bool:
        """Whether the retrained network is needed to judge it."""
        return self.gap_at_least is not None or self.gap_at_most is not None

    def __str__(self) -> str:
        parts = []
        for name, low, high in (
            ("gap", self.gap_at_least, self.gap_at_most),
            ("value", self.at_least, self.at_most),
        ):
            if low is not None and high is not None:
                parts.append(f"{low:g} ≤ {name} ≤ {high:g}")
            elif low is not None:
                parts.append(f"{name} ≥ {low:g}")
            elif high is not None:
                parts.append(f"{name} ≤ {high:g}")
        return ", ".join(parts).replace("-", "−")


Bounds = Mapping[str, Bound]
DEFAULT: Bounds = MappingProxyType(
    {
        "forget_accuracy": Bound(about="forgetting", gap_at_least=-5.0, gap_at_most=5.0),
        MEMBERSHIP: Bound(about="forgetting", gap_at_least=-10.0, gap_at_most=10.0),
        "retain_accuracy": Bound(gap_at_least=-2.0),
        "test_accuracy": Bound(gap_at_least=-2.0),
    }
)
"""What is tested where no file says otherwise; conventions, not derived from anything."""


@dataclass(frozen=True)
class Measured:
    """A figure of one network beside the retrained one.

    Args:
        value: Its value; None where it was not measured.
        reference: The retrained network's.
        half_width: Half-width of the 95 % interval of their difference; None where none is known.
        reason: Why the value, or the retrained network's, is missing.
    """

    value: float | None
    reference: float | None
    half_width: float | None = None
    reason: str | None = None

    @property
    def gap(self) -> float | None:
        """Value minus the retrained network's."""
        return None if self.value is None or self.reference is None else self.value - self.reference


def read_bounds(path: str | Path) -> dict[str, Bound]:
    """Bounds by figure from a JSON or TOML file: a table for each figure, named by its key in `metrics.json`.

    Raises:
        UserError: if the file is missing or broken, holds no bound, or one that cannot be.
    """
    path = Path(path)
    values = _toml(path) if path.suffix.lower() == ".toml" else config.read_json(path)
    if not isinstance(values, Mapping) or not values:
        raise UserError(
            f'{path} must hold a table for each figure, such as {{"retain_accuracy": {{"gap_at_least": -2}}}}'
        )
    return {str(figure): config.from_dict(Bound, bound, f"{path}: {figure}") for figure, bound in values.items()}


def check_figures(bounds: Bounds, known: Sequence[str]) -> None:
    """Raise UserError for a figure that no evaluation has: its first level must be among `known`."""
    for figure in bounds:
        if figure.split(".")[0] not in (*known, MEMBERSHIP):
            raise unknown("figure of a bound", figure, [*known, MEMBERSHIP])


def test(bounds: Bounds, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every bound against the metrics of a network that forgot.

    Args:
        bounds: By figure.
        metrics: As `judge` makes them.

    Returns:
        For each bound figure, title, about, bound, value, reference, gap, half_width (of the 95 % interval of the gap),
        verdict, reason, and `before`: the verdict on the network before unlearning, None where it was not measured.
    """
    found = []
    for figure, bound in bounds.items():
        measured = measure(figure, metrics, metrics)
        verdict, reason = judge(bound, measured)
        original = metrics.get("original")
        before = None if original is None else judge(bound, measure(figure, original, metrics))[0]
        if verdict == "pass" and before == "pass" and bound.about == "forgetting":
            reason = "the network before unlearning passes as well, so this test cannot tell whether it forgot"
        found.append(
            {
                "figure": figure,
                "title": TITLES.get(figure, figure),
                "about": bound.about,
                "bound": {k: v for k, v in config.to_dict(bound).items() if v is not None and k != "about"},
                "shown": str(bound),
                "value": measured.value,
                "reference": measured.reference,
                "gap": measured.gap,
                "half_width": measured.half_width,
                "verdict": verdict,
                "reason": reason,
                "before": before,
            }
        )
    return found


def overall(tests: Sequence[Mapping[str, Any]]) -> tuple[Verdict, str]:
    """One verdict on all tests, and the reason.

    It is a pass only where no test fails and a test of forgetting passes that the network before unlearning fails: else
    nothing that was measured shows that anything was forgotten.
    """
    failed = [t["title"] for t in tests if t["verdict"] == "fail"]
    if failed:
        return "fail", f"outside its bound: {'; '.join(failed)}"
    telling = [t for t in tests if t["about"] == "forgetting" and t["verdict"] == "pass" and t["before"] == "fail"]
    if not telling:
        return "not tested", (
            "no test of forgetting is passed that the network before unlearning fails, so nothing here shows that "
            "anything was forgotten"
        )
    left = [t["title"] for t in tests if t["verdict"] == "not tested"]
    return "pass", f"not tested: {'; '.join(left)}" if left else "every test was passed"


def judge(bound: Bound, found: Measured) -> tuple[Verdict, str | None]:
    """The verdict on one figure, and its reason where there is something to say.

    A gap whose 95 % interval is wider than the bound cannot be told to keep it: it fails where the whole interval lies
    outside, and is otherwise not tested.
    """
    if found.value is None:
        return "not tested", found.reason or "it was not measured"
    if bound.at_least is not None and found.value < bound.at_least:
        return "fail", None
    if bound.at_most is not None and found.value > bound.at_most:
        return "fail", None
    if not bound.needs_reference:
        return "pass", None
    if found.gap is None:
        return "not tested", found.reason or "there is no retrained network to compare with"
    low = -math.inf if bound.gap_at_least is None else bound.gap_at_least
    high = math.inf if bound.gap_at_most is None else bound.gap_at_most
    half = found.half_width or 0.0
    if half <= min(abs(low), abs(high)):
        return ("pass" if low <= found.gap <= high else "fail"), None
    if found.gap + half < low or found.gap - half > high:
        return "fail", None
    return "not tested", f"too few samples: the gap is known to ± {half:.1f} points, wider than the bound"


def measure(figure: str, values: Mapping[str, Any], metrics: Mapping[str, Any]) -> Measured:
    """A figure of one network, and the retrained network's.

    Args:
        figure: Its key, levels joined by dots, or `MEMBERSHIP`.
        values: The metrics of the network.
        metrics: Those of the whole evaluation, with "reference", "n" and "reasons".
    """
    reference = metrics.get("reference")
    if figure == MEMBERSHIP:
        return _membership(values, reference, metrics)
    value, other = at(values, figure), at(reference or {}, figure)
    reasons = metrics.get("reasons", {})
    why = reasons.get(figure.split(".")[-1]) or reasons.get(figure.split(".")[0])
    if value is not None and other is None:
        why = why or reasons.get("gap")
    return Measured(value, other, _half_width(figure, value, other, values, metrics), why)


def at(values: Mapping[str, Any], figure: str) -> float | None:
    """The figure at a key, levels joined by dots; None where there is none, or no number."""
    found: Any = values
    for level in figure.split("."):
        found = found.get(level) if isinstance(found, Mapping) else None
    return None if isinstance(found, bool) or not isinstance(found, int | float) else float(found)


def _membership(values: Mapping[str, Any], reference: Any, metrics: Mapping[str, Any]) -> Measured:
    own, theirs = values.get("mia") or {}, (reference or {}).get("mia") or {}
    if reference is None:
        return Measured(None, None, None, metrics.get("reasons", {}).get("gap"))
    both = [name for name in own if own[name] is not None and theirs.get(name) is not None]
    if not both:
        return Measured(None, None, None, "no membership attack was run")
    # An attack that only one of the networks betrays itself to is one that works.
    working = [n for n in both if max(own[n]["attack_accuracy"], theirs[n]["attack_accuracy"]) >= WORKS]
    if not working:
        why = f"no attack tells retained from test samples with a balanced accuracy of at least {WORKS:g} %"
        return Measured(None, None, None, why)
    worst = max(working, key=lambda n: abs(own[n]["mia"] - theirs[n]["mia"]))
    value, other = own[worst]["mia"], theirs[worst]["mia"]
    return Measured(value, other, _half_width(MEMBERSHIP, value, other, values, metrics))


def _half_width(
    figure: str, value: float | None, other: float | None, values: Mapping[str, Any], metrics: Mapping[str, Any]
) -> float | None:
    """Of the 95 % interval of the difference of two shares, in points; None for figures that are no shares.

    For two networks on n samples each: as of independent shares (Agresti & Caffo 2000); or, where it is known on which
    share c of the samples they differ, from the variance of the paired differences, which is at most c. The smaller
    one, since both hold.
    """
    of, churn = SHARES.get(figure, (None, None))
    n = None if of is None else metrics.get("n", {}).get(of)
    if n is None or value is None or other is None:
        return None
    shares = [(p / 100 * n + 1) / (n + 2) for p in (value, other)]
    found = [NORMAL * math.sqrt(sum(p * (1 - p) / (n + 2) for p in shares))]
    differ = None if churn is None else at(values, churn)
    if differ is not None:
        found.append(NORMAL * math.sqrt((differ / 100 * n + 1) / (n + 2) / n))
    return 100 * min(found)


def _toml(path: Path) -> Any:
    try:
        import tomllib  # pyright: ignore[reportMissingImports]  # from Python 3.11 on
    except ImportError:
        raise UserError(f"{path}: TOML needs Python 3.11; write the bounds as JSON") from None
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as TOML: {error}") from None
