"""Which weights should put wrong labels right? First and second order, on masks by every selection.

    python -m unsharp.recipes.parameter_selection --out DIR

scikit-learn's digits, 1,000 of them to train on, a fifth of these under a wrong label; a network of 17,226 weights that
has learnt nearly all of it. The right labels are then given for the wrong ones, and `first_order` (ten steps) and
`second_order` (one) put the network right, moving a part of the weights only. Pixels are in [0, 1], where many are 0
and leave their weights without gradient, or standardised (`--inputs standard`). The rules:

- The rate (tau, or the damping) is chosen for each method, selection, fraction and seed by the accuracy on 433 digits
  that no network saw; what is shown is that on 364 others. All have as many points to choose from.
- Restored: the gain over the wrong network, divided by that of the network trained on the right labels with the same
  seed.
- A selection is better than chance where the 95 % t interval of its accuracy less that of the random mask of the same
  size, paired by seed, lies above 0. The seeds were used for nothing else; training and rates were settled on 0, 1, 100
  and 101.
- Acceptance: (a) the error of the estimated Hessian diagonal falls as 1/√probes on a network of 1,210 weights; (b) no
  weight outside a mask changes a bit; (c) 5 % of the weights by the Hessian hold five times as much of ‖v‖² as random
  ones, on every seed; (d) they restore 0.8 times as much as all weights do, in the mean; (e) the step on all weights is
  the closed form to 1e-6.

About three minutes of one core. A killed run goes on with the next seed.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import nn

from unsharp import artifacts, config, data, masks, runtime, stats, unlearning
from unsharp.artifacts import Workspace
from unsharp.corrections import Corrections
from unsharp.data import DataConfig, Samples
from unsharp.data.samples import TensorSamples
from unsharp.data.streams import evaluation_batches
from unsharp.engine import OptimizerConfig
from unsharp.errors import UserError
from unsharp.evaluation.curvature import CurvatureMatrix, diagonal
from unsharp.evaluation.mean_loss import MeanLoss
from unsharp.methods.masked import ALL
from unsharp.training import TrainConfig, train

SEEDS = (200, 201, 202, 203, 204)
WRONG = 0.2
"""Share of the labels that are made wrong."""
N_TRAIN = 1000
MAIN = 0.05
"""The fraction of the weights that the acceptance is about."""
TAUS = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
N_PROBES = 60
GRIDS: dict[str, list[dict[str, Any]]] = {
    "first_order": [{"tau": tau, "steps": 10} for tau in TAUS],
    "second_order": [
        {"damping": damping, "hessian_samples": 500, "cg_steps": 20} for damping in (0.003, 0.01, 0.03, 0.1)
    ],
}
PROBES = (10, 40, 160, 640)
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the recipe."""

    out: str
    """Directory of the facts and of the page."""
    seeds: tuple[int, ...] = SEEDS
    """Seeds of the split, the wrong labels and the network."""
    fractions: tuple[float, ...] = (0.05, 0.2)
    """Shares of the weights that move; the first method has them all, the second 0.05."""
    epochs: int = 200
    """Epochs of training."""
    inputs: Literal["unit", "standard"] = "unit"
    """Pixels in [0, 1], or with mean 0.5 and deviation 0.25 taken out."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A network that learnt wrong labels.

    Args:
        model: The network.
        samples: What it learnt from.
        wrong: (k,) positions of the wrong labels.
        right: The right ones.
        validation: Digits by which rates are chosen.
        test: Digits on which accuracy is shown.
        bounds: Test accuracy of the network, and of one that learnt from the right labels.
    """

    model: nn.Module
    samples: Samples
    wrong: np.ndarray
    right: Corrections
    validation: Samples
    test: Samples
    bounds: tuple[float, float]


def main(options: Options) -> None:
    """Run the seeds, and write `facts.json` and `page.md` as they come; facts of other seeds are kept.

    Raises:
        UserError: if there is no seed, the fractions lack 0.05, or the directory holds facts found with other options.
    """
    if not options.seeds:
        raise UserError("seeds must name at least one seed, got none")
    if MAIN not in options.fractions:
        raise UserError(f"fractions must have {MAIN} among them, which the acceptance is about: {options.fractions}")
    out = Path(options.out)
    path = out / "facts.json"
    facts = {fact["seed"]: fact for fact in (config.read_json(path) if path.exists() else [])}
    for seed, fact in facts.items():
        if fact.get("options") != asked(options):
            raise UserError(
                f"{path} holds facts of seed {seed} found with other options ({fact.get('options', 'not said')}) than "
                f"{asked(options)}; give another --out, or remove the file"
            )
    for seed in options.seeds:
        if seed not in facts:
            facts[seed] = facts_of(seed, options)
            artifacts.write_json(path, list(facts.values()))
        artifacts.write_text(out / "page.md", page([facts[s] for s in options.seeds if s in facts]))
    print(f"wrote {out / 'page.md'}")


def asked(options: Options) -> dict[str, Any]:
    """What the facts of a seed depend on, as JSON gives it back."""
    return {"fractions": list(options.fractions), "epochs": options.epochs, "inputs": options.inputs}


def facts_of(seed: int, options: Options) -> dict[str, Any]:
    """All that a seed gives."""
    problem = problem_of(seed, options)
    low, high = problem.bounds
    if high <= low:
        raise UserError(f"wrong labels did no harm ({low:.1f} and {high:.1f} % on test); take more epochs")
    rows = [row for method in GRIDS for row in _rows(problem, method, options.fractions, seed)]
    for row in rows:
        row["restored"] = (row["test"] - low) / (high - low)
    return {
        "seed": seed,
        "options": asked(options),
        "learnt": accuracy(problem.model, problem.samples),
        "wrong": low,
        "right": high,
        "rows": rows,
        "closed_form_error": closed_form_error(problem),
        "diagonal_errors": diagonal_errors(problem.samples, seed),
    }


def problem_of(seed: int, options: Options) -> Problem:
    """Digits, a fifth of them under a wrong label, and the network that learnt them."""
    look: dict[str, Any] = {"mean": (0.0,), "std": (1.0,)} if options.inputs == "unit" else {}
    splits = data.load(DataConfig(**look))
    random = np.random.default_rng(seed)
    order = random.permutation(len(splits.train))
    kept = splits.train.subset(np.sort(order[:N_TRAIN]))
    wrong = np.sort(random.choice(N_TRAIN, round(WRONG * N_TRAIN), replace=False))
    inputs = next(evaluation_batches(kept, np.arange(N_TRAIN), N_TRAIN)).inputs
    labels = kept.labels.copy()
    labels[wrong] = (labels[wrong] + random.integers(1, kept.n_classes, len(wrong))) % kept.n_classes
    samples, clean = (TensorSamples(inputs, y, kept.class_names) for y in (labels, kept.labels))
    assert splits.test is not None
    how = TrainConfig(
        epochs=options.epochs,
        batch_size=250,
        seed=seed,
        optimizer=OptimizerConfig(name="adamw", lr=5e-3, weight_decay=0),
    )
    models = []
    for learnt in (samples, clean):
        torch.manual_seed(seed)
        model = network(128, 64)
        train(model, learnt, np.arange(N_TRAIN), how)
        models.append(model.eval())
    return Problem(
        model=models[0],
        samples=samples,
        wrong=wrong,
        right=Corrections(ids=samples.ids[wrong], labels=kept.labels[wrong]),
        validation=splits.train.subset(np.sort(order[N_TRAIN:])),
        test=splits.test,
        bounds=(accuracy(models[0], splits.test), accuracy(models[1], splits.test)),
    )


def network(*hidden: int) -> nn.Module:
    """Linear layers with rectified units between them, from 64 pixels to 10 classes."""
    sizes = [64, *hidden, 10]
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


@torch.no_grad()
def accuracy(model: nn.Module, samples: Samples) -> float:
    """In %."""
    right = sum(
        int((model(b.inputs).argmax(1) == b.labels).sum()) for b in evaluation_batches(samples, np.arange(len(samples)))
    )
    return 100 * right / len(samples)


def _rows(problem: Problem, method: str, fractions: Sequence[float], seed: int) -> list[dict[str, Any]]:
    """A row for each selection and fraction: the rate that does best on validation, and what it gives on test."""
    some = fractions if method == "first_order" else [f for f in fractions if f == MAIN]
    pairs = [(ALL, 1.0)]
    for select, selection in masks.SELECTIONS.items():
        pairs += [(select, fraction) for fraction in (some if selection.ranks else some[:1])]
    return [_best(problem, method, select, fraction, seed) for select, fraction in pairs]


def _best(problem: Problem, method: str, select: str, fraction: float, seed: int) -> dict[str, Any]:
    rest = np.setdiff1d(np.arange(len(problem.samples)), problem.wrong)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:  # the mask is made once for all rates
        for rates in GRIDS[method]:
            how = unlearning.configure(method, select=select, fraction=fraction, n_probes=N_PROBES, seed=seed, **rates)
            try:
                model, record = unlearning.run(
                    problem.model, problem.samples, problem.wrong, rest, how,
                    corrections=problem.right, workspace=Workspace(Path(place)),
                )  # fmt: skip
            except ArithmeticError:  # a rate at which the network breaks is not chosen
                continue
            found.append(
                {
                    "rates": rates,
                    "validation": accuracy(model, problem.validation),
                    "test": accuracy(model, problem.test),
                    "gradient_share": record.history[0]["gradient_share"],
                    "passes": record.passes,
                }
                | _moved(problem.model, model, Path(place) / masks.FILE)
            )
    if not found:
        raise UserError(
            f"{method} on {fraction:g} of the weights by {select} broke the network at every rate (seed {seed}); "
            "take other --inputs or --epochs"
        )
    best = max(found, key=lambda row: row["validation"])
    leaked = sum(row["leaked"] for row in found)
    return {"method": method, "select": select, "fraction": fraction} | best | {"leaked": leaked}


def _moved(before: nn.Module, after: nn.Module, mask: Path) -> dict[str, Any]:
    """The share of the weights that the mask marks, and how many outside it changed."""
    if not mask.exists():
        return {"marked": 1.0, "leaked": 0}
    marked = masks.load(mask, before)
    now = dict(after.named_parameters())
    leaked = sum(int(((now[n] != p) & ~marked[n]).sum()) for n, p in before.named_parameters())
    return {"marked": masks.fraction_of(marked), "leaked": leaked}


def closed_form_error(problem: Problem) -> float:
    """How far the first-order step on all weights is from −τ·v, v by a loop over samples; relative, in float64."""
    model, tau = copy.deepcopy(problem.model).double(), 1e-3
    inputs = next(evaluation_batches(problem.samples, problem.wrong, len(problem.wrong))).inputs.double()
    whole = next(evaluation_batches(problem.samples, np.arange(len(problem.samples)), N_TRAIN)).inputs.double()
    v = [torch.zeros_like(p) for p in model.parameters()]
    for i, x in enumerate(inputs):
        log_p = model(x[None])[0].log_softmax(0)
        loss = log_p[problem.samples.labels[problem.wrong[i]]] - log_p[problem.right.labels[i]]
        v = [a + g for a, g in zip(v, torch.autograd.grad(loss, list(model.parameters())))]
    samples = TensorSamples(whole, problem.samples.labels, problem.samples.class_names)
    rest = np.setdiff1d(np.arange(len(samples)), problem.wrong)
    how = unlearning.configure("first_order", tau=tau)
    found, _ = unlearning.run(model, samples, problem.wrong, rest, how, corrections=problem.right)
    start, end = ([p.detach() for p in m.parameters()] for m in (model, found))
    off = sum(float(((b - a) + tau * g).square().sum()) for a, b, g in zip(start, end, v))
    return float(np.sqrt(off / sum(float((tau * g).square().sum()) for g in v)))


def diagonal_errors(samples: Samples, seed: int) -> dict[str, float]:
    """Relative error of the Hessian's diagonal by so many probes, against the dense matrix of a small network."""
    torch.manual_seed(seed)
    small = network(16)
    train(small, samples, np.arange(len(samples)), TrainConfig(epochs=10, seed=seed))
    matrix = CurvatureMatrix(MeanLoss(small.eval(), samples, np.arange(min(200, len(samples)))))
    exact = matrix.dense().diagonal().double()
    found = {n: diagonal(matrix, n, seed).values for n in PROBES}
    return {str(n): float((values - exact).norm() / exact.norm()) for n, values in found.items()}


# --- the page ---------------------------------------------------------------------------------------------------------


def page(facts: Rows) -> str:
    """The result page in Markdown, from the facts alone."""
    usual = asked(Options(out=""))
    option = "".join(
        f" --{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in facts[0]["options"].items()
        if value != usual[name]
    )
    head = (
        f"`python -m unsharp.recipes.parameter_selection --out DIR{option}`; seeds "
        f"{', '.join(str(f['seed']) for f in facts)}; torch {runtime.versions()['torch']}, on a processor, one thread; "
        f"{datetime.date.today().isoformat()}. Means over the seeds ± half of the 95 % t interval."
    )
    bounds = (
        f"Test accuracy of the network that learnt the wrong labels: {shown([f['wrong'] for f in facts])} %; "
        f"of one that learnt the right ones: {shown([f['right'] for f in facts])} %. The first is right on "
        f"{shown([f['learnt'] for f in facts])} % of what it was trained on, wrong labels included."
    )
    parts = ["### Acceptance", acceptance(facts)]
    for method in GRIDS:
        parts += [f"### {method}", table(facts, method)]
    return "\n\n".join([head, bounds, *parts]) + "\n"


def shown(values: Sequence[float], digits: int = 1, *, sign: bool = False) -> str:
    """The mean and half of its interval."""
    interval = stats.mean_interval(values)
    half = "" if interval.half_width is None else f" ± {interval.half_width:.{digits}f}"
    return f"{interval.mean:{'+' if sign else ''}.{digits}f}{half}"


def values_of(facts: Rows, method: str, select: str, fraction: float, key: str) -> list[float]:
    """A figure of a row, for each seed."""
    wanted = (method, select, fraction)
    return [
        float(row[key]) for fact in facts for row in fact["rows"]
        if (row["method"], row["select"], row["fraction"]) == wanted
    ]  # fmt: skip


def table(facts: Rows, method: str) -> str:
    """A line for each selection and fraction of a method."""
    lines = [
        "| selection | weights that move | test accuracy (%) | less random | better than chance | restored "
        "| share of ‖v‖² |",
        "|---|---:|---:|---:|---|---:|---:|",
    ]
    rows = [row for row in facts[0]["rows"] if row["method"] == method]
    for row in rows:
        key = (method, row["select"], row["fraction"])
        test = values_of(facts, *key, "test")
        beside = values_of(facts, method, "random", row["fraction"], "test")
        compared = beside and row["select"] not in (ALL, "random", "last_layer")
        less = [a - b for a, b in zip(test, beside)] if compared else []
        cells = [
            str(row["select"]),
            f"{100 * row['marked']:.3g} %",
            shown(test),
            shown(less, sign=True) if less else "—",
            verdict(less) if less else "—",
            shown(values_of(facts, *key, "restored"), 2),
            f"{np.mean(values_of(facts, *key, 'gradient_share')):.2g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(differences: Sequence[float]) -> str:
    """Whether a selection is better than chance: yes, no (worse), or undecided."""
    interval = stats.mean_interval(differences)
    if interval.low is None or interval.high is None:
        return "undecided"
    return "yes" if interval.low > 0 else "worse" if interval.high < 0 else "undecided"


def acceptance(facts: Rows) -> str:
    """What was to hold, what was found, and whether it holds."""
    checks: list[tuple[str, Callable[[Rows], tuple[str, bool]]]] = [
        ("(a) error of the Hessian diagonal against the dense one, ∝ probes to the power of −0.5 ± 0.1", _slope),
        ("(b) weights outside a mask that changed, in all runs", _leaks),
        ("(c) share of ‖v‖² on 5 % of the weights, Hessian over random, at least 5 on every seed", _ratio),
        ("(d) restored by the Hessian's 5 %, over all weights, at least 0.8 in the mean (first order)", _restored),
        ("(e) first order on all weights against the closed form, relative, at most 1e-6", _closed),
    ]
    lines = ["| check | found | holds |", "|---|---|---|"]
    for text, check in checks:
        found, holds = check(facts)
        lines.append(f"| {text} | {found} | {'yes' if holds else 'no'} |")
    return "\n".join(lines)


def _slope(facts: Rows) -> tuple[str, bool]:
    slopes = []
    for fact in facts:
        errors = fact["diagonal_errors"]
        slopes.append(float(np.polyfit(np.log([int(n) for n in errors]), np.log(list(errors.values())), 1)[0]))
    return f"power {shown(slopes, 2)}", bool(abs(np.mean(slopes) + 0.5) <= 0.1)


def _leaks(facts: Rows) -> tuple[str, bool]:
    leaked = sum(row["leaked"] for fact in facts for row in fact["rows"])
    return str(leaked), leaked == 0


def _ratio(facts: Rows) -> tuple[str, bool]:
    ours, beside = (values_of(facts, "first_order", s, MAIN, "gradient_share") for s in ("hessian", "random"))
    ratios = [a / b for a, b in zip(ours, beside)]
    return ", ".join(f"{r:.1f}" for r in ratios), min(ratios) >= 5


def _restored(facts: Rows) -> tuple[str, bool]:
    ours = values_of(facts, "first_order", "hessian", MAIN, "restored")
    whole = values_of(facts, "first_order", ALL, 1.0, "restored")
    if np.mean(whole) <= 0:
        return f"{shown(ours, 2)}, and all weights {shown(whole, 2)}", False
    ratio = float(np.mean(ours) / np.mean(whole))
    return f"{ratio:.2f} ({shown(ours, 2)} over {shown(whole, 2)})", ratio >= 0.8


def _closed(facts: Rows) -> tuple[str, bool]:
    worst = max(fact["closed_form_error"] for fact in facts)
    return f"{worst:.1e}", worst <= 1e-6


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
