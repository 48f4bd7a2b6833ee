"""The command that runs the signal–noise model: its maps, its lemma, its thresholds, and the acceptance checks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from unsharp.commands.shared import setting
from unsharp.errors import UserError, unknown
from unsharp.options import Common, Count, Number, Text, Words

Whole = Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="INT [INT ...]", help_behavior_hint="")]
Numbers = Annotated[tuple[float, ...] | None, tyro.conf.arg(metavar="FLOAT [FLOAT ...]", help_behavior_hint="")]

DATA = ("n_filters", "n_patches", "sigma_p", "sigma_init", "flip", "noise", "out_scale", "n_test", "precision")
STEP = ("T", "eta", "c", "tau", "batch_size", "lam", "adaptive")
GRID = ("d", "phi", "seeds", "seed_base", "n")
NEGGRAD = ("alpha", "n_forget", "perturb", "start", "fraction", "pretrain_steps")
TAKES = {
    "pretrain-map": {*GRID, *DATA, *STEP, "preset", "out"},
    "unlearn-map": {*GRID, *DATA, *STEP, *NEGGRAD, "out"},
    "alpha-sweep": {*GRID, *DATA, *STEP, *NEGGRAD, "out"},
    "lemma31": {*GRID, *DATA, *STEP, *NEGGRAD, "out"} - {"batch_size"},
    "trajectories": {*GRID, *DATA, *STEP, *NEGGRAD, "every", "out"},
    "check": {"id", "seed_base"},
}
"""The options of each kind, but for those of every command."""


@dataclass(kw_only=True)
class Theory(Common):
    """Run the signal–noise model of the paper: maps, Lemma 3.1, how small alpha may be, and the acceptance checks."""

    what: tyro.conf.Positional[str]
    """pretrain-map, unlearn-map, alpha-sweep, lemma31, trajectories or check."""
    out: Text = None
    """Run directory; named by content under runs/ if left out."""
    id: Words = None
    """check: which checks, such as A5; all if left out."""
    d: Whole = None
    """Dimensions; trajectories takes one."""
    phi: Numbers = None
    """Strengths ‖φ‖ of the signal; a map takes several."""
    alpha: Numbers = None
    """Weights α of the retain loss; alpha-sweep takes several."""
    seeds: Count = None
    """Number of seeds; 8, or 5 for maps, if left out."""
    seed_base: Count = None
    """The first seed; 0, if left out."""
    n: Whole = None
    """Samples; 20 in pretrain-map, else 40. alpha-sweep takes several."""
    n_forget: Count = None
    """Forget samples; a fifth, if left out."""
    n_filters: Count = None
    """Filters m of each output sign; 10, if left out."""
    n_patches: Count = None
    """Patches P of a sample; 2, if left out."""
    sigma_p: Number = None
    """Standard deviation σ_p of the noise; 1, if left out."""
    sigma_init: Number = None
    """Standard deviation σ_0 of the first weights; 1/√(3d), if left out."""
    flip: Number = None
    """Chance that a training label is wrong; 0, if left out."""
    noise: Text = None
    """shared (one noise vector in all patches of a sample) or independent; shared, if left out."""
    out_scale: Text = None
    """Second layer: mean (±1/m) or sum (±1); mean, if left out."""
    n_test: Count = None
    """Fresh noises of the test error; 1000, if left out."""
    precision: Text = None
    """float32 or float64; float32, if left out."""
    perturb: Words = None
    """Whose gradient gives ε: sgd (no ε), joint, ce, retain, sep, minmax, sharp_minmax; several stand side by side."""
    start: Words = None
    """Where unlearning starts: init, sgd_pretrained, sam_pretrained; init, if left out (lemma31: all)."""
    pretrain_steps: Count = None
    """Steps of the training before a pretrained start; 200, if left out."""
    T: Count = None
    """Passes over the retained samples; 200, if left out."""
    eta: Number = None
    """Step size η; 0.1, if left out."""
    c: Numbers = None
    """Radius in units of the theorem's, τ = c·m√B/(Pσ_p√d); 1, if left out. lemma31 takes several: .25, .5, 1."""
    tau: Number = None
    """Radius τ itself, in place of c."""
    batch_size: Count = None
    """Samples of a batch; all, if left out."""
    lam: Number = None
    """Weight λ of the correction g1 − g0; 1, if left out."""
    adaptive: bool = False
    """Scale each filter's part of ε by the filter's norm."""
    fraction: Number = None
    """sharp_minmax: share of the filters given to the forget set; 0.3, if left out."""
    every: Count = None
    """trajectories: passes between two records; a hundredth of them, if left out."""
    preset: Text = None
    """pretrain-map: paper, the settings of the figure in Chen et al. (2023), but for what is given."""

    def run(self) -> dict[str, Any]:
        if self.what not in TAKES:
            raise unknown("kind of theory", self.what, TAKES)
        self._refuse_others()
        return self._check() if self.what == "check" else self._sweep()

    def _refuse_others(self) -> None:
        """Refuse an option that would be ignored."""
        mine = Theory.__annotations__.keys() - {"what", "run"}
        given = [name for name in mine if getattr(self, name) is not None and getattr(self, name) is not False]
        if extra := sorted(f"--{name.replace('_', '-')}" for name in given if name not in TAKES[self.what]):
            raise UserError(f"{self.what} does not take {' '.join(extra)}; leave it out")

    # --- check --------------------------------------------------------------------------------------------------------

    def _check(self) -> dict[str, Any]:
        import json

        from unsharp.theory.stage import run_check

        def show(row: dict[str, Any]) -> None:
            text = f"{row['id']:<5} {row['verdict']:<6} got {row['got']}  accepted {row['accept']}"
            if not self.json:
                print(f"{text}  ({row['seconds']:.1f} s)", flush=True)
            elif not self.quiet:
                print(text, file=sys.stderr, flush=True)

        with setting(self) as at:
            checks = run_check(self.id, self.seed_base or 0, at, show)
        count = {v: sum(row["verdict"] == v for row in checks) for v in ("pass", "fail", "report")}
        answer = {"checks": checks, "seed_base": self.seed_base or 0, **count}
        answer["seconds"] = sum(row["seconds"] for row in checks)
        if not self.json:
            print(f"{count['pass']} passed, {count['fail']} failed, {count['report']} reported")
        if count["fail"]:
            if self.json:
                print(json.dumps(answer, allow_nan=False))
            raise SystemExit(1)
        return answer

    # --- sweeps -------------------------------------------------------------------------------------------------------

    def _sweep(self) -> dict[str, Any]:
        from unsharp.theory import stage

        build = {
            "pretrain-map": self._pretrain_map,
            "unlearn-map": self._unlearn_map,
            "alpha-sweep": self._alpha_sweep,
            "lemma31": self._lemma,
            "trajectories": self._trajectories,
        }[self.what]
        how = build()
        with setting(self) as at:
            if self.what == "alpha-sweep":
                run = stage.run_alpha(how, self._sizes(), self.out, at)
            elif self.what == "lemma31":
                starts = tuple(dict.fromkeys(self.start or ("init", "sgd_pretrained", "sam_pretrained")))
                run = stage.run_lemma(how, starts, self.out, at)
            elif self.what == "trajectories":
                run = stage.run_trajectories(how, self.out, at)
            else:
                run = stage.run_map(how, self.out, at)
        summary = run.json(stage.SUMMARY)
        if not self.json:
            _show(summary)
        return {"run": str(run.path), "stage": run.stage, "reused": run.reused, "summary": summary}

    def _pretrain_map(self) -> Any:
        from unsharp.theory.bench import MAP_D, MAP_PHI
        from unsharp.theory.sweep import Sweep
        from unsharp.theory.unlearn import Plan

        if self.preset not in (None, "paper"):
            raise unknown("preset", self.preset or "", ["paper"])
        preset: dict[str, Any] = {"eta": 0.01, "steps": 100} if self.preset else {}
        shared = preset | self._plan()
        sam: list[dict[str, Any]] = (
            [{}] if {"c", "tau"} & shared.keys() else [{"tau": 0.03}] if self.preset else [{"tau": 0.03}, {"c": 1.0}]
        )
        plans = [Plan(**{k: v for k, v in shared.items() if k not in ("c", "tau")})]
        plans += [Plan(perturb="joint", **(shared | radius)) for radius in sam]
        grid = self._grid(MAP_D, MAP_PHI, (), 10 if self.preset else 5)
        return Sweep(setup=self._setup(forget=False), grid=grid, plans=tuple(plans), phase="pretrain")

    def _unlearn_map(self) -> Any:
        from unsharp.theory.bench import MAP_D, MAP_PHI

        _one("alpha", self.alpha)
        return self._neggrad(self._grid(MAP_D, MAP_PHI, (0.95,), 5), ("sgd", "ce", "retain", "joint"))

    def _alpha_sweep(self) -> Any:
        import numpy as np

        from unsharp.theory.bench import D5

        _one("phi", self.phi)
        d = D5 if len(self.n or ()) < 2 else (8000,)
        alpha = tuple(1 - x for x in np.geomspace(1e-3, 0.6, 24).tolist())
        return self._neggrad(self._grid(d, (7.0,), alpha, 8), ("sgd", "ce", "retain"))

    def _lemma(self) -> Any:
        import dataclasses

        _one("phi", self.phi)
        _one("alpha", self.alpha)
        how = self._neggrad(self._grid((1000, 4000, 16000), (4.0,), (0.8,), 8), ("joint", "ce"), several_starts=True)
        radii = [None] if self.tau is not None else dict.fromkeys(self.c or (0.25, 0.5, 1.0))
        plans = [p if c is None else dataclasses.replace(p, c=c) for c in radii for p in how.plans]
        return dataclasses.replace(how, plans=tuple(plans))

    def _trajectories(self) -> Any:
        import dataclasses

        for name in ("d", "phi", "alpha"):
            _one(name, getattr(self, name))
        how = self._neggrad(self._grid((8000,), (7.0,), (0.95,), 8), ("sgd", "ce", "retain", "joint"))
        every = max(1, max(plan.steps for plan in how.plans) // 100) if self.every is None else self.every
        return dataclasses.replace(how, every=every)

    def _neggrad(self, grid: Any, perturb: tuple[str, ...], *, several_starts: bool = False) -> Any:
        from unsharp.theory.sweep import Sweep
        from unsharp.theory.unlearn import Plan

        if not several_starts:
            _one("start", self.start)
        plans = tuple(Plan(perturb=name, **self._plan()) for name in dict.fromkeys(self.perturb or perturb))
        more: dict[str, Any] = {} if self.pretrain_steps is None else {"pretrain_steps": self.pretrain_steps}
        start = "init" if several_starts or self.start is None else self.start[0]
        return Sweep(setup=self._setup(forget=True), grid=grid, plans=plans, start=start, **more)

    def _setup(self, *, forget: bool) -> Any:
        from unsharp.theory.data import Setup

        names = {"sigma_init": "sigma_0"}
        given = {names.get(name, name): value for name in DATA if (value := getattr(self, name)) is not None}
        if not forget:
            _one("n", self.n)
            return Setup(**given, n=20 if self.n is None else self.n[0])
        if self.what != "alpha-sweep":
            _one("n", self.n)
        n, n_forget = self._sizes()[0]
        return Setup(**given, n=n, n_forget=n_forget)

    def _sizes(self) -> list[tuple[int, int]]:
        """Samples and forget samples."""
        return [(n, max(1, n // 5) if self.n_forget is None else self.n_forget) for n in dict.fromkeys(self.n or (40,))]

    def _grid(self, d: Sequence[int], phi: Sequence[float], alpha: Sequence[float], seeds: int) -> Any:
        from unsharp.theory.sweep import Grid

        given: dict[str, Any] = {"d": self.d or d, "phi": self.phi or phi, "alpha": self.alpha or alpha or (1.0,)}
        given = {name: tuple(sorted(set(values))) for name, values in given.items()}  # a seed counts once in a cell
        seeds = seeds if self.seeds is None else self.seeds
        return Grid(**given, seeds=seeds, seed_base=self.seed_base or 0)

    def _plan(self) -> dict[str, Any]:
        if self.c is not None and self.tau is not None:
            raise UserError("c and tau both say the radius; leave one out")
        if self.what != "lemma31":
            _one("c", self.c)
        names = {"T": "steps"}
        given = {names.get(name, name): getattr(self, name) for name in (*STEP, "fraction") if name != "c"}
        given = {name: value for name, value in given.items() if value is not None}
        return given if not self.c else given | {"c": self.c[0]}


def _one(name: str, values: Sequence[Any] | None) -> None:
    if values is not None and len(values) != 1:
        raise UserError(f"{name} takes one value here, got {len(values)}")


def _show(summary: Sequence[dict[str, Any]]) -> None:
    """The means over seeds as text: a matrix for each way where d and ‖φ‖ both vary, else a table."""
    figures = [name for name, value in summary[0].items() if isinstance(value, dict)]
    figures = [name for name in figures if any(row[name]["mean"] is not None for row in summary)]
    names = [name for name in summary[0] if name not in figures and not isinstance(summary[0][name], dict)]
    fixed = {name: summary[0][name] for name in names if len({row[name] for row in summary}) == 1}
    print(", ".join(f"{name} {_cell(value)}" for name, value in fixed.items() if value is not None))
    if {"d", "phi"}.isdisjoint(fixed) and "step" in names:
        _show_maps(summary, figures)
        return
    shown = [name for name in names if name not in fixed] + figures
    _print([shown, *([_cell(row[name]) for name in shown] for row in summary)])


def _show_maps(summary: Sequence[dict[str, Any]], figures: Sequence[str]) -> None:
    ways: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in summary:
        radius = ("c", row["c"]) if row["c"] is not None else ("tau", row["tau"])
        ways.setdefault((row["perturb"], *(radius if row["tau"] is not None else ())), []).append(row)
    for way, rows in ways.items():
        strengths = sorted({row["phi"] for row in rows})
        for figure in (name for name in ("test_error", "forget_error") if name in figures):
            print(
                f"\n{' '.join(_cell(word) for word in way)}: {figure.replace('_', ' ')} over d (down) and phi (across)"
            )
            of = {(row["d"], row["phi"]): row[figure]["mean"] for row in rows}
            lines = [[str(d), *(f"{of[d, p]:.2f}" for p in strengths)] for d in sorted({row["d"] for row in rows})]
            _print([["", *(f"{p:g}" for p in strengths)], *lines])


def _print(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(word.rjust(width) for word, width in zip(line, widths)))


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        if value["mean"] is None:
            return "-"
        return f"{value['mean']:.3f}" + ("" if value["half_width"] is None else f" ± {value['half_width']:.3f}")
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
