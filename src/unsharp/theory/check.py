"""The acceptance checks: what must come out of the model, each with the bounds that were set before it was written.

The bounds are those of the specification, found with another implementation on other seeds; they are not fitted to what
comes out here. A check that says "report" has no bound.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from unsharp.errors import UserError, unknown
from unsharp.theory import thresholds
from unsharp.theory.bench import COARSE, D3, D5, FURTHER, METHODS, SIZES, UNLEARN, Bench, Tolerance
from unsharp.theory.data import Setup
from unsharp.theory.metrics import slope
from unsharp.theory.unlearn import Plan

PASS, FAIL, REPORT = "pass", "fail", "report"
GROUPS = ("retain_same", "forget_same", "forget_opposite")


@dataclass
class Outcome:
    """What came out.

    Args:
        got: In words.
        values: The figures.
        met: Whether each bound is met; empty where there is none.
    """

    got: str
    values: dict[str, Any] = field(default_factory=dict)
    met: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Args:
        id: Its name.
        what: What is measured.
        accept: The bounds, in words.
        measure: Measures and judges.
    """

    id: str
    what: str
    accept: str
    measure: Callable[[Bench], Outcome]


CHECKS: dict[str, Check] = {}


def _check(id: str, what: str, accept: str) -> Callable[[Callable[[Bench], Outcome]], Callable[[Bench], Outcome]]:
    def add(measure: Callable[[Bench], Outcome]) -> Callable[[Bench], Outcome]:
        CHECKS[id] = Check(id, what, accept, measure)
        return measure

    return add


def run_checks(
    ids: Sequence[str] | None = None, seed_base: int = 0, device: torch.device | str = "cpu"
) -> Iterator[dict[str, Any]]:
    """Do the checks one after the other.

    Args:
        ids: Which, by name, in any case; all if left out.
        seed_base: The first seed of each, at least 0.
        device: Where the reduced model computes.

    Yields:
        `id`, `what`, `got`, `accept`, `verdict` ("pass", "fail" or "report"), `values`, `seconds` of each. A
        measurement that several checks share is done, and counted, in the first of them.

    Raises:
        UserError: for an unknown name or a negative seed, before anything is done.
    """
    known = {name.lower(): name for name in CHECKS}
    for name in ids or ():
        if name.lower() not in known:
            raise unknown("check", name, CHECKS)
    if seed_base < 0:
        raise UserError(f"seed_base must be at least 0, got {seed_base}")
    return _each([CHECKS[known[name.lower()]] for name in (ids or CHECKS)], Bench(seed_base, device=device))


def _each(chosen: Sequence[Check], bench: Bench) -> Iterator[dict[str, Any]]:
    for check in chosen:
        started = time.perf_counter()
        outcome = check.measure(bench)
        verdict = REPORT if not outcome.met else PASS if all(outcome.met) else FAIL
        yield {
            "id": check.id,
            "what": check.what,
            "got": outcome.got,
            "accept": check.accept,
            "verdict": verdict,
            "values": _plain(outcome.values),
            "seconds": time.perf_counter() - started,
        }


# --- exactness --------------------------------------------------------------------------------------------------------


@_check("A1", "weights after 30 joint steps, coefficients against autograd, float64", "≤ 1e-10")
def _a1(bench: Bench) -> Outcome:
    worst = max(bench.against_autograd(phi) for phi in (3.0, 6.0))
    return Outcome(f"{worst:.1e}", {"difference": worst}, [worst <= 1e-10])


@_check(
    "A2",
    "residual of w − w⁰ on φ and ξ by least squares, float32; float64; κ and ζ solved against tracked (float64)",
    "≤ 1e-5; ≤ 1e-10; ≤ 1e-10",
)
def _a2(bench: Bench) -> Outcome:
    single, double = (bench.against_least_squares(p) for p in ("float32", "float64"))
    apart = max(double["kappa"], double["zeta"])
    values = {"float32": single, "float64": double}
    met = [single["residual"] <= 1e-5, double["residual"] <= 1e-10, apart <= 1e-10]
    return Outcome(f"{single['residual']:.1e}; {double['residual']:.1e}; {apart:.1e}", values, met)


@_check(
    "A3",
    "test error, reduced against vectors in R^d: GD, SAM at (d, ‖φ‖) = (4000, 2); (16000, 4)",
    "means differ ≤ .04",
)
def _a3(bench: Bench) -> Outcome:
    shown, values, met = [], {}, []
    for d, phi in ((4000, 2.0), (16000, 4.0)):
        found = bench.against_vectors(d, phi)
        for rule in ("gd", "sam"):
            a, b = found[f"{rule}_reduced"], found[f"{rule}_vectors"]
            shown.append(f"{_pm(a)} vs {_pm(b)}")
            values[f"{rule}_{d}"] = {"reduced": a, "vectors": b}
            met.append(bool(abs(a.mean() - b.mean()) <= 0.04))
    return Outcome("; ".join(shown), values, met)


# --- Lemma 3.1 --------------------------------------------------------------------------------------------------------


def _erf(d: int, c: float) -> float:
    tau = thresholds.sam_radius(UNLEARN.n_filters, UNLEARN.n, UNLEARN.n_patches, UNLEARN.sigma_p, d, c)
    return thresholds.deactivation_prob(tau, thresholds.first_std(d), UNLEARN.n_filters, UNLEARN.n)


def _shares(bench: Bench, perturb: str, group: str, pretrained: str | None = None) -> dict[tuple[int, float], float]:
    found = bench.lemma(perturb, pretrained)
    return {key: _mean(stats[f"deact_{group}"]) for key, stats in found.items()}


def _ranges(shares: dict[tuple[int, float], float]) -> str:
    """The least and largest share over d, for each c."""
    of_c: dict[float, list[float]] = {}
    for (_, c), share in shares.items():
        of_c.setdefault(c, []).append(share)
    return " / ".join(_range(v) for v in of_c.values())


def _against_erf(bench: Bench, group: str, room: float) -> Outcome:
    shares = _shares(bench, "joint", group)
    met = [abs(share - _erf(*key)) <= room for key, share in shares.items()]
    worst = max(abs(share - _erf(*key)) for key, share in shares.items())
    return Outcome(f"{_ranges(shares)}; largest difference {_n(worst)}", _named(shares), met)


@_check(
    "A4",
    "noise neurons turned off at first weights, joint, α = .8, c = .25/.5/1: R, j = y",
    "within .10 of erf (.506/.829/.994)",
)
def _a4(bench: Bench) -> Outcome:
    return _against_erf(bench, "retain_same", 0.10)


@_check("A5", "noise neurons turned off at first weights, joint, α = .8, c = .25/.5/1: F, j = y", "≤ .01")
def _a5(bench: Bench) -> Outcome:
    shares = _shares(bench, "joint", "forget_same")
    return Outcome(_ranges(shares), _named(shares), [s <= 0.01 for s in shares.values()])


@_check("A6", "noise neurons turned off at first weights, joint, α = .8, c = .25/.5/1: F, j = −y", "within .12 of erf")
def _a6(bench: Bench) -> Outcome:
    return _against_erf(bench, "forget_opposite", 0.12)


@_check("A7", "noise neurons turned off at first weights, ce, α = .8: F, j = −y; F, j = y at c = 1", "≤ .01; ≥ .90")
def _a7(bench: Bench) -> Outcome:
    opposite, same = (_shares(bench, "ce", f"forget_{side}") for side in ("opposite", "same"))
    full = {key: share for key, share in same.items() if key[1] == 1.0}
    met = [s <= 0.01 for s in opposite.values()] + [s >= 0.90 for s in full.values()]
    values = {"opposite": _named(opposite), "same": _named(full)}
    return Outcome(f"{_ranges(opposite)}; {_ranges(full)}", values, met)


@_check(
    "A8",
    "noise neurons turned off after 200 steps of training, joint, ‖φ‖ = 4: R, j = y from GD; from SAM; F, j = y",
    "≤ .10; in [.45, .90]; ≤ .03",
)
def _a8(bench: Bench) -> Outcome:
    gd, sam = (_shares(bench, "joint", "retain_same", start) for start in ("sgd", "joint"))
    forget = [s for start in ("sgd", "joint") for s in _shares(bench, "joint", "forget_same", start).values()]
    met = [s <= 0.10 for s in gd.values()] + [0.45 <= s <= 0.90 for s in sam.values()] + [s <= 0.03 for s in forget]
    values = {"gd": _named(gd), "sam": _named(sam), "forget": forget}
    return Outcome(f"{_list(gd.values())}; {_list(sam.values())}; {_range(forget)}", values, met)


# --- signal thresholds in pretraining ---------------------------------------------------------------------------------

GD, SAM = Plan(steps=400), Plan(perturb="joint", steps=400)


@_check("A9", "‖φ‖ at test error .1, GD, n = 20, T = 400, d = 1000/4000/16000", "within 15 % of 2.6/3.8/5.9")
def _a9(bench: Bench) -> Outcome:
    found = bench.signal_thresholds(D3, GD, Setup())
    met = [abs(_mean(v) / w - 1) <= 0.15 for v, w in zip(found, (2.6, 3.8, 5.9))]
    return Outcome(_spread(found), {"threshold": found}, met)


@_check("A10", "log-log slope in d of ‖φ‖ at test error .1, GD, n = 20, T = 400 (theory .25)", "in [.22, .36]")
def _a10(bench: Bench) -> Outcome:
    found = slope(D3, bench.signal_thresholds(D3, GD, Setup()).T)
    return Outcome(_pm(found), {"slope": found}, [_in(found, 0.22, 0.36)])


@_check(
    "A11",
    "‖φ‖ at test error .1, SAM, n = 20, T = 400, d = 1000/4000/16000; its slope in d (theory 0)",
    "in [1.2, 1.75]; ≤ .12",
)
def _a11(bench: Bench) -> Outcome:
    found = bench.signal_thresholds(D3, SAM, Setup())
    slopes = slope(D3, found.T)
    met = [_in(v, 1.2, 1.75) for v in found] + [_in(slopes, -np.inf, 0.12)]
    return Outcome(f"{_spread(found)}; slope {_pm(slopes)}", {"threshold": found, "slope": slopes}, met)


@_check(
    "A12",
    "GD, d = 8000: slope in n = 10–160 (theory −.25); linear in σ_p = .5, 1, 2 (η/σ_p², σ_0/σ_p); P = 2, 3, 5",
    "in [−.36, −.20]; ≤ 1 %; threshold/(P − 1) in [4, 6.5]",
)
def _a12(bench: Bench) -> Outcome:
    d, sizes = (8000,), (10, 20, 40, 80, 160)
    in_n = np.concatenate([bench.signal_thresholds(d, GD, Setup(n=n)) for n in sizes])
    slopes = slope(sizes, in_n.T)
    first = thresholds.first_std(d[0])
    deviations = (0.5, 1.0, 2.0)
    in_sigma = [
        bench.signal_thresholds(d, Plan(steps=400, eta=0.1 / s**2), Setup(sigma_p=s, sigma_0=first / s)).mean()
        for s in deviations
    ]
    apart = max(abs(v / (s * in_sigma[1]) - 1) for v, s in zip(in_sigma, deviations))
    patches = (2, 3, 5)
    in_patches = [bench.signal_thresholds(d, GD, Setup(n_patches=p)) for p in patches]
    met = [_in(slopes, -0.36, -0.20), bool(apart <= 0.01)]
    met += [_in(v / (p - 1), 4.0, 6.5) for v, p in zip(in_patches, patches)]
    values = {"n": in_n, "slope": slopes, "sigma_p": in_sigma, "patches": in_patches}
    shown = f"{_pm(slopes)}; {'/'.join(f'{v:.3f}' for v in in_sigma)}, apart {100 * apart:.1g} %; "
    return Outcome(shown + "/".join(f"{v.mean():.1f}" for v in in_patches), values, met)


# --- NegGrad from first weights ---------------------------------------------------------------------------------------


@_check(
    "A13",
    "NegGrad from first weights, d = 8000, ‖φ‖ = 7, α = .95: test error of sgd; ce; retain",
    "≥ .5; ≤ .12; ≤ .07",
)
def _a13(bench: Bench) -> Outcome:
    found = {m: f["test_error"] for m, f in bench.from_first_weights().items()}
    forget = {m: f["forget_error"].mean() for m, f in bench.from_first_weights().items()}
    met = [_in(found["sgd"], 0.5, 1), _in(found["ce"], 0, 0.12), _in(found["retain"], 0, 0.07)]
    shown = "; ".join(f"{_pm(found[m])} (forget error {forget[m]:.2f})" for m in METHODS)
    return Outcome(shown, found, met)


@_check(
    "A14",
    "NegGrad from first weights, d = 8000, ‖φ‖ = 7, α = .95: forget, retain error of sgd, ce, retain; κ of sgd; of ce",
    "≥ .95; ≤ .02; ≤ 0; ≥ 1.6",
)
def _a14(bench: Bench) -> Outcome:
    found = bench.from_first_weights()
    forget, retain = ([found[m][f"{s}_error"].mean() for m in METHODS] for s in ("forget", "retain"))
    kappa = {m: found[m]["kappa_mean"] for m in ("sgd", "ce")}
    met = [bool(v >= 0.95) for v in forget] + [bool(v <= 0.02) for v in retain]
    met += [_in(kappa["sgd"], -np.inf, 0), _in(kappa["ce"], 1.6, np.inf)]
    shown = f"{_list(forget, 2)}; {_list(retain, 2)}; {_pm(kappa['sgd'])}; {_pm(kappa['ce'])}"
    return Outcome(shown, {"forget_error": forget, "retain_error": retain, "kappa_mean": kappa}, met)


def _to_sgd(bench: Bench, figure: str, methods: Sequence[str]) -> dict[str, np.ndarray]:
    found = bench.from_first_weights()
    return {m: found[m][figure] / found["sgd"][figure] for m in methods}


@_check(
    "A15",
    "NegGrad from first weights, d = 8000, ‖φ‖ = 7, α = .95: ζ of F, j = −y, over that of sgd: ce; retain; joint",
    "in [.9, 1.2]; in [.9, 1.1]; ≤ .5",
)
def _a15(bench: Bench) -> Outcome:
    found = _to_sgd(bench, "zeta_forget_opposite", ("ce", "retain", "joint"))
    met = [_in(found["ce"], 0.9, 1.2), _in(found["retain"], 0.9, 1.1), _in(found["joint"], -np.inf, 0.5)]
    return Outcome("; ".join(map(_pm, found.values())), found, met)


@_check(
    "A16",
    "NegGrad from first weights, d = 8000, ‖φ‖ = 7, α = .95: ζ of R, j = y, over that of sgd: ce; retain",
    "≤ .5; ≤ .3",
)
def _a16(bench: Bench) -> Outcome:
    found = _to_sgd(bench, "zeta_retain_same", ("ce", "retain"))
    met = [_in(found["ce"], -np.inf, 0.5), _in(found["retain"], -np.inf, 0.3)]
    return Outcome("; ".join(map(_pm, found.values())), found, met)


@_check(
    "A17",
    "NegGrad from first weights, α = .995, T = 200: ‖φ‖ at test error .1, d = 1000/4000/16000, and slope: sgd; ce",
    "slope of sgd in [.25, .55]; |slope of ce| ≤ .08; thresholds of ce in [1.25, 1.65]",
)
def _a17(bench: Bench) -> Outcome:
    found = {m: bench.signal_thresholds(D3, Plan(perturb=m), UNLEARN, 0.995, FURTHER) for m in ("sgd", "ce")}
    slopes = {m: slope(D3, v.T) for m, v in found.items()}
    met = [_in(slopes["sgd"], 0.25, 0.55), _in(slopes["ce"], -0.08, 0.08)] + [_in(v, 1.25, 1.65) for v in found["ce"]]
    shown = "; ".join(f"{_spread(v)}, slope {_pm(slopes[m])}" for m, v in found.items())
    return Outcome(shown, {"threshold": found, "slope": slopes}, met)


# --- how small α may be -----------------------------------------------------------------------------------------------


@_check(
    "A18",
    "1 − α* (test error ≤ .1) of NegGrad from first weights, ‖φ‖ = 7, T = 200, n = 40, d = 1000–16000: sgd; ce; retain",
    "sgd within 40 %, ce within 25 % of the closed forms; retain in [1.0, 1.9] × that of ce",
)
def _a18(bench: Bench) -> Outcome:
    found = bench.tolerance_in_d(7.0)
    how: dict[str, Any] = {"m": UNLEARN.n_filters, "eta": 0.1, "steps": 200}
    sgd = np.array([thresholds.alpha_sgd(n=UNLEARN.n, d=d, **how) for d in D5])
    ce = np.array([thresholds.alpha_ce(n_forget=UNLEARN.n_forget, d=d, **how) for d in D5])
    means = {m: np.array([_mean(row) for row in v]) for m, v in found.star.items()}
    ratios = {"sgd": means["sgd"] / sgd, "ce": means["ce"] / ce, "retain": means["retain"] / ce}
    forget = {m: np.array([_mean(row) for row in v]) for m, v in found.forget.items()}
    met = [bool(abs(r - 1) <= 0.40) for r in ratios["sgd"]] + [bool(abs(r - 1) <= 0.25) for r in ratios["ce"]]
    met += [bool(1.0 <= r <= 1.9) for r in ratios["retain"]]
    shown = "; ".join(
        f"{m} {'/'.join(f'{x:.4f}' for x in means[m])} (×{_list(ratios[m], 2)}; forget error ≥ {forget[m].min():.2f})"
        for m in METHODS
    )
    values = {"one_less_alpha": found.star, "forget_error": found.forget, "to_closed_form": ratios}
    return Outcome(shown + _undefined(found), values, met)


def _ratio_slopes(found: Tolerance, x: Sequence[float]) -> dict[str, np.ndarray]:
    """Slope of (1 − α*)/(1 − α*_SGD) for each seed."""
    return {m: slope(x, (found.star[m] / found.star["sgd"]).T) for m in ("ce", "retain")}


def _slopes_of_ratio(bench: Bench, phi: float) -> tuple[dict[str, Any], str]:
    in_d, in_n = bench.tolerance_in_d(phi), bench.tolerance_in_n(phi)
    values = {"in_d": _ratio_slopes(in_d, D5), "in_n": _ratio_slopes(in_n, SIZES)}
    shown = [f"in {axis[3:]}: " + ", ".join(f"{m} {_pm(v)}" for m, v in s.items()) for axis, s in values.items()]
    lowest = min(_mean(row) for t in (in_d, in_n) for v in t.forget.values() for row in v)
    found = {m: np.concatenate([in_d.star[m], in_n.star[m]]) for m in METHODS}
    return values, "; ".join(shown) + f"; forget error ≥ {lowest:.2f}" + _undefined(Tolerance(found))


@_check(
    "A19",
    "slope of (1 − α*_SAM)/(1 − α*_SGD) at ‖φ‖ = 7: in d (order √(d/n): .5); in n (−.5)",
    "in [.35, .8]; in [−1.0, −.35]",
)
def _a19(bench: Bench) -> Outcome:
    values, shown = _slopes_of_ratio(bench, 7.0)
    met = [_in(v, 0.35, 0.8) for v in values["in_d"].values()] + [_in(v, -1.0, -0.35) for v in values["in_n"].values()]
    return Outcome(shown, values, met)


@_check(
    "A19b",
    "slope of (1 − α*_SAM)/(1 − α*_SGD) at ‖φ‖ = 5, which reaches the boundary of SGD at d = 16000",
    "no bound (steeper than ½)",
)
def _a19b(bench: Bench) -> Outcome:
    values, shown = _slopes_of_ratio(bench, 5.0)
    return Outcome(shown, values)


# --- from a trained network -------------------------------------------------------------------------------------------


@_check(
    "A20",
    "400 steps from a GD-pretrained network, d = 8000, ‖φ‖ = 7, α = .8: forget/test error of sgd; of joint",
    "≥ .8/≥ .6; ≤ .05/≤ .02",
)
def _a20(bench: Bench) -> Outcome:
    found = bench.from_pretrained()
    sgd, joint = found["sgd"], found["joint"]
    met = [_in(sgd["forget"], 0.8, 1), _in(sgd["test"], 0.6, 1)]
    met += [_in(joint["forget"], 0, 0.05), _in(joint["test"], 0, 0.02)]
    return Outcome("; ".join(f"{_pm(f['forget'])}/{_pm(f['test'])}" for f in (sgd, joint)), found, met)


CELLS = ((4000, 4.0), (4000, 7.0), (16000, 7.0))


@_check(
    "A21",
    "test error at forget error ≥ .5, α = .8, SGD, GD- less SAM-trained: (d, ‖φ‖) = (4000, 4); (4000, 7); (16000, 7)",
    "(4000, 4) and (16000, 7) ≥ .03; (4000, 7) no bound",
)
def _a21(bench: Bench) -> Outcome:
    shown, values, met = [], {}, []
    for d, phi in CELLS:
        gd, sam = (bench.matched(d, phi, start, "sgd") for start in ("sgd", "joint"))
        apart, coarse = gd["test"] - sam["test"], gd["coarse"] - sam["coarse"]
        longer = _mean(sam["steps"]) / _mean(gd["steps"])
        reached = int(np.isfinite(apart).sum())
        shown.append(f"{_mean_se(apart)} ({reached} of {len(apart)} reached, {longer:.1f}× the steps; "
                     f"looked at every {COARSE} steps {_mean_se(coarse)})")  # fmt: skip
        values[f"{d}_{phi:g}"] = {"every_step": apart, f"every_{COARSE}": coarse}
        if (d, phi) != (4000, 7.0):
            met.append(_mean(apart) >= 0.03)
    return Outcome("; ".join(shown), values, met)


@_check(
    "A21b",
    "test error at forget error ≥ .5 from GD-pretrained, in the cells of A21: sgd less retain; ce; joint with c = .25",
    "|retain| ≤ .10; joint ≤ −.03 (SAM is worse)",
)
def _a21b(bench: Bench) -> Outcome:
    shown, values, met = [], {}, []
    for method, c in (("retain", 1.0), ("ce", 1.0), ("joint", 0.25)):
        apart = [
            bench.matched(d, p, "sgd", "sgd")["test"] - bench.matched(d, p, "sgd", method, c)["test"] for d, p in CELLS
        ]
        shown.append(f"{method} " + ", ".join(_mean_se(a) for a in apart))
        values[method] = apart
        if method == "retain":
            met += [abs(_mean(a)) <= 0.10 for a in apart]
        elif method == "joint":
            met += [_mean(a) <= -0.03 for a in apart]
    return Outcome("; ".join(shown), values, met)


@_check(
    "A22",
    "mean κ of SAM over GD in pretraining, d = 8000, n = 40: at T = 1 for ‖φ‖ = 1–10; slope in ‖φ‖ at T = 400",
    "in [1.3, 1.7]; in [−1.15, −.85]",
)
def _a22(bench: Bench) -> Outcome:
    first = bench.kappa_ratio(1)[1].mean(0)
    slopes = slope(*bench.kappa_ratio(400))
    met = [bool(1.3 <= r <= 1.7) for r in first] + [_in(slopes, -1.15, -0.85)]
    return Outcome(f"{first.min():.2f}–{first.max():.2f}; {_pm(slopes)}", {"first": first, "slope": slopes}, met)


@_check("A23", "seconds for the maps of 7 d × 11 ‖φ‖ × 5 seeds under GD and SAM with two radii, T = 200", "≤ 60")
def _a23(bench: Bench) -> Outcome:
    started = time.perf_counter()
    bench.maps()
    seconds = time.perf_counter() - started
    return Outcome(f"{seconds:.1f}", {"seconds": seconds}, [seconds <= 60])


# --- figures in words -------------------------------------------------------------------------------------------------


def _in(values: np.ndarray, low: float, high: float) -> bool:
    """Whether the mean lies between the bounds; not where nothing was found."""
    return bool(low <= _mean(values) <= high)


def _mean(values: np.ndarray) -> float:
    """The mean over what was found; NaN, which meets no bound, where nothing was."""
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if len(kept) else math.nan


def _n(value: float, digits: int = 3) -> str:
    """A number without the zero before its point."""
    text = f"{value:.{digits}f}"
    return (
        text.replace("-", "−").replace("0.", ".", 1) if abs(value) < 1 and float(text) != 0 else text.replace("-", "−")
    )


def _range(values: Sequence[float]) -> str:
    low, high = _n(min(values)), _n(max(values))
    return low if low == high else f"{low}–{high}"


def _list(values: Any, digits: int = 3) -> str:
    return "/".join(_n(float(v), digits) for v in values)


def _pm(values: np.ndarray, digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    kept = values[np.isfinite(values)]
    return "none" if len(kept) == 0 else f"{_n(kept.mean(), digits)}±{_n(kept.std(), digits)}"


def _mean_se(values: np.ndarray) -> str:
    kept = values[np.isfinite(values)]
    return f"{_n(kept.mean())} SE {_n(kept.std(ddof=1) / len(kept) ** 0.5)}" if len(kept) > 1 else "none"


def _spread(rows: np.ndarray) -> str:
    kept = ", ".join(_pm(v, 2) for v in rows)
    missing = int(np.isnan(rows).sum())
    return kept + (f" ({missing} seeds never there)" if missing else "")


def _undefined(found: Tolerance) -> str:
    missing = {m: int(np.isnan(v).sum()) for m, v in found.star.items()}
    shown = ", ".join(f"{m} {k} of {found.star[m].size}" for m, k in missing.items() if k)
    return f"; undefined: {shown}" if shown else ""


def _named(shares: dict[tuple[int, float], float]) -> dict[str, float]:
    return {f"d={d},c={c:g}": share for (d, c), share in shares.items()}


def _plain(values: Any) -> Any:
    """As JSON has it: lists, and None for what is not a number."""
    if isinstance(values, dict):
        return {str(k): _plain(v) for k, v in values.items()}
    if isinstance(values, np.ndarray):
        return _plain(values.tolist())
    if isinstance(values, (list, tuple)):
        return [_plain(v) for v in values]
    if isinstance(values, (float, np.floating)):
        return float(values) if np.isfinite(values) else None
    return values
