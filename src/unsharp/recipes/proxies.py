"""What do the cheaper relatives of memorization tell, and for what cost? All of them on one slice of real images.

    python -m unsharp.recipes.proxies --data cifar100 --data-dir DIR --scores FILE:KEY --out DIR
    python -m unsharp.recipes.proxies --data fashion_mnist --data-dir DIR --out DIR

Samples, wrong labels, network and training are those of `memorization_check` with the same options. Given its directory
as `--out`, each proxy is held to the memorization that its pool gives, as far as that has grown; no pool is trained
here. Shown are rank correlations with memorization and with C-scores, the wrong labels among the 2 % that a proxy calls
hardest, and what it cost. A killed run goes on where it was.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from unsharp import artifacts, runtime
from unsharp.difficulty.memorization import memorization, spearman
from unsharp.difficulty.proxies import PROXIES, configure
from unsharp.difficulty.result import SCORES_FILE, Scores
from unsharp.difficulty.scores import read_scores
from unsharp.difficulty.stage import score
from unsharp.pool.grow import pool_of
from unsharp.progress import BarProgress
from unsharp.recipes import memorization_check
from unsharp.recipes.memorization_check import SUSPECTS, Planted, Problem, percent, plain, pose, recall, table, two
from unsharp.stages import Setting, train_network
from unsharp.subject import load_subject

SPARED: dict[str, dict[str, Any]] = {"loss_curvature": {"every_epochs": 6}}
"""Parameters other than the default ones: curvature after every epoch would cost nine trainings."""
WITH = {"learning_epoch": "forgetting_events", "mean_confidence": "forgetting_events"}
"""Proxies that come with another one at no cost."""


@dataclass(frozen=True, kw_only=True)
class Options(memorization_check.Options):
    """Options of the recipe."""

    only: tuple[str, ...] = tuple(PROXIES)
    """The proxies; all, if left out."""


def main(options: Options) -> None:
    """Estimate the proxies, and write `proxies.md` and `proxies.json`."""
    out = Path(options.out).absolute()
    runtime.set_threads(1)
    device = runtime.pick_device(options.device)
    problem = pose(options, device)
    with BarProgress() as bar:
        at = Setting(device=device, store=out / "store", progress=bar, say=print)
        found = {name: _estimated(name, problem, out, at) for name in options.only}
    rows = [_row(name, scores, problem, None) for name, scores in found.items()]
    pool = pool_of(problem.plan, at.store)
    mem, networks = None, len(pool.members())
    if networks:
        outputs = pool.outputs()
        mem = memorization(outputs.inside, outputs.train.correct).memorization
        rows = [_row(name, scores, problem, mem) for name, scores in found.items()]
        rows.append(_pool_row(networks, mem, problem))
    artifacts.write_json(out / "proxies.json", [plain(row) for row in rows])
    artifacts.write_text(out / "proxies.md", page(options, rows, problem.planted, networks))
    print(f"wrote {out / 'proxies.md'}")


def _estimated(name: str, problem: Problem, out: Path, at: Setting) -> Scores:
    """The scores of one proxy, found again if they are there."""
    whole = WITH.get(name, name)
    proxy, model, origin = configure(whole, **SPARED.get(whole, {})), None, problem.origin
    if proxy.needs == "model":
        assert origin.train is not None
        trained = train_network(origin.model, origin.data, origin.train, out / "network", at)
        model = load_subject(str(trained.path), at.device)
    run = score(proxy, origin, problem.splits, model, out / f"proxy-{whole}", at)
    spec = str(run.file(SCORES_FILE))
    return read_scores(spec if name == whole else f"{spec}:{name}", problem.splits.train)


def _row(name: str, scores: Scores, problem: Problem, mem: np.ndarray | None) -> dict[str, Any]:
    planted, train = problem.planted, problem.origin.train
    proxy = configure(WITH.get(name, name), **SPARED.get(name, {}))
    cost = proxy.cost(None if proxy.needs == "model" else train)
    clean = ~planted.wrong
    row = {
        "name": name,
        "settings": SPARED.get(name, {}),
        "networks": cost.networks,
        "passes": cost.passes,
        "seconds": scores.provenance.get("seconds"),
        "recall": recall(scores.difficulty, planted.wrong, SUSPECTS),
    }
    if planted.cscore is not None:
        row["cscore"] = spearman(scores.difficulty[clean], planted.cscore[clean])
    if mem is not None:
        known = np.isfinite(mem)
        row["memorization"] = spearman(scores.difficulty[known], mem[known])
    return row


def _pool_row(networks: int, mem: np.ndarray, problem: Problem) -> dict[str, Any]:
    planted, train = problem.planted, problem.origin.train
    assert train is not None
    share = problem.plan.subsets.size / len(mem)
    row = {"name": "memorization", "networks": networks, "passes": networks * share * train.epochs}
    row["recall"] = recall(mem, planted.wrong, SUSPECTS)
    clean = ~planted.wrong & np.isfinite(mem)
    if planted.cscore is not None:
        row["cscore"] = spearman(mem[clean], planted.cscore[clean])
    return row


def page(options: Options, rows: list[dict[str, Any]], planted: Planted, networks: int) -> str:
    """The table in Markdown."""
    given = " --scores FILE:KEY" if options.scores else ""
    held = f"memorization by {networks} networks; " if networks else ""
    intro = (
        f"`python -m unsharp.recipes.proxies --data {options.data} --data-dir DIR{given} --out DIR --classes "
        f"{options.classes} --per-class {options.per_class} --arch {options.arch} --width {options.width} --epochs "
        f"{options.epochs} --seed {options.seed}`: {len(planted.wrong):,} samples, {planted.wrong.sum()} of them with "
        f"a wrong label; {held}torch {runtime.versions()['torch']}, "
        f"{datetime.date.today().isoformat()}. Passes are over the whole data, one forward and backward; a given "
        f"network's own {options.epochs} are not counted."
    )
    names = ["score", "networks trained", "passes", "seconds", "with memorization", "with C-scores"]
    lines = table(
        [*names, f"wrong labels in the top {100 * SUSPECTS:g} %"],
        [
            [
                f"`{row['name']}`" + "".join(f", {k} {v}" for k, v in row.get("settings", {}).items()),
                f"{row['networks']}",
                f"{row['passes']:.3g}",
                "–" if row.get("seconds") is None else f"{row['seconds']:.0f}",
                two(row.get("memorization")),
                two(row.get("cscore")),
                percent(row["recall"]),
            ]
            for row in rows
        ],
    )
    with_them = ", ".join(f"`{name}`" for name in WITH)
    return f"{intro}\n\n{lines}\n\n{with_them} come with `forgetting_events` in the same training.\n"


if __name__ == "__main__":
    from unsharp.recipes import proxies

    proxies.main(tyro.cli(proxies.Options, description=__doc__))
