"""How long `list runs` and `report DIR` take of 10,000 stored runs: python benchmarks/index.py [N] [DIR]

Bounds, with a warm file cache and the index up to date: 3 s and 1 GiB each, and torch is not imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SECONDS, BYTES = 3.0, 2**30
SEEDS = 3
ATTACKS, DETAILS = 9, 400
"""Attacks and further figures of an evaluation, as many as the digits' have."""


def facts(i: int, draw: np.random.Generator) -> tuple[dict, dict]:
    """What an evaluation says: of network i, a third of a group of three seeds."""
    group, seed = divmod(i, SEEDS)
    method = {"name": "neggrad", "alpha": round(0.5 + group / 10_000, 6), "sharpness_on": "joint"}
    unlearn = {"method": method, "rule": {"name": "sam", "rho": 0.1}, "seed": seed, "epochs": 5, "batch_size": 64}
    unlearn |= {"optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "options": {}}}
    origin = {
        "model": {"arch": "small_cnn", "width": None, "stem": "auto", "options": {}},
        "data": {"name": "digits", "dir": None, "size": None, "augment": "auto", "workers": 0},
        "train": {"epochs": 30, "batch_size": 64, "seed": seed},
        "fingerprint": "f" * 64,
        "n_classes": 10,
        "input_shape": [1, 8, 8],
    }

    def network() -> dict:
        names = ("retain_accuracy", "forget_accuracy", "test_accuracy", "tow", "seconds")
        values = {name: float(draw.uniform(50, 100)) for name in names}
        values["mia"] = {f"attack_{k}": {"mia": 50.0, "attack_accuracy": 55.0} for k in range(ATTACKS)}
        return values | {"details": {f"figure_{k}": float(x) for k, x in enumerate(draw.random(DETAILS // 4))}}

    about = {"method": method, "rule": unlearn["rule"], "unlearn": unlearn, "origin": origin}
    about |= {"forget": {"rule": "72 of 1,433 samples, drawn at random with seed 0", "n": 72, "hash": "e" * 64}}
    about |= {"history": [{"epoch": e, "retain_accuracy": 90.0} for e in range(5)]}
    return about, network() | {"gap": network(), "reference": network(), "original": network(), "seed": seed}


def fill(root: Path, n: int) -> None:
    """Write n evaluated runs, as they would be, sealed."""
    from unsharp import seal

    draw = np.random.default_rng(0)
    for i in range(n):
        about, metrics = facts(i, draw)
        run = root / f"evaluate-{i:012x}"
        run.mkdir(parents=True)
        for name, values in (("about.json", about), ("metrics.json", metrics)):
            (run / name).write_text(json.dumps(values, indent=2))
        values = {"stage": "evaluate", "config": {"unlearn": about["unlearn"]}, "hash": f"{i:064x}", "provenance": {}}
        (run / seal.RUN_FILE).write_text(seal.sealed(values, seal.contents(run)))


def measured(*arguments: str) -> tuple[float, float, int]:
    """Seconds, those at work, and peak bytes of a command, which must not import torch."""
    check = "import sys; sys.argv[0] = 'unsharp'\nfrom unsharp.start import main\ntry:\n    main()\nfinally:\n"
    check += "    assert 'torch' not in sys.modules, 'torch was imported'"
    started = time.perf_counter()
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen([sys.executable, "-c", check, *arguments], stdout=nowhere)
        _, status, used = os.wait4(process.pid, 0)
    assert status == 0, f"unsharp {' '.join(arguments)} failed"
    return time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def main() -> int:
    """Fill, measure with a cold and a warm index, print, and return 1 where a bound is broken."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    root = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp()) / "runs"
    if not root.exists():
        fill(root, n)
    page = str(root.parent / "report.html")
    print(f"{n:,} runs; first look: {measured('list', 'runs', str(root))[0]:.1f} s")
    broken = 0
    whole = str(root)
    for arguments in (("list", "runs", whole), ("list", "runs", whole, "--json"), ("report", whole, "--out", page)):
        seconds, busy, size = min(measured(*arguments) for _ in range(3))
        broken |= seconds > SECONDS or size > BYTES
        name = " ".join(word for word in arguments if word not in (whole, page))
        print(f"{name:18} {seconds:5.2f} s, of which {busy:4.2f} s at work  {size / 2**20:5.0f} MiB")
    size, load = (root / ".unsharp-index.json").stat().st_size / 2**20, os.getloadavg()[0]
    print(f"index {size:.1f} MiB; {os.cpu_count()} cores, load {load:.1f}")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
