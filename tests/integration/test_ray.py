"""Sweeps on a real Ray of this machine: processes that die, stores that are not shared, interrupts, other clusters."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from integration.helpers import SOURCE, alive, wait_for
from unsharp import config, runtime
from unsharp.errors import UserError
from unsharp.progress import Progress
from unsharp.sweep import Cell, SweepError, backend_from, cluster, ray_backend, remote, report, run_cell, run_cells
from unsharp.sweep import ray as sweeps

pytestmark = pytest.mark.xdist_group("ray")  # one Ray is enough for a session

HERE = Path(__file__)
MODULES = HERE.parents[1]


# The functions of the cells. Some leave lines in `log`, so that a test knows what was really called.


def train(seed, lr, workspace):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    inputs, labels = torch.randn(64, 8), torch.arange(64) % 3
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    workspace.file("weights").write_bytes(weights.numpy().tobytes())
    return {"losses": losses}


def square(x, log):
    noted(log, x)
    return {"square": x * x}


def noted(log, what):
    with open(log, "a") as file:
        file.write(f"{what} {os.getpid()}\n")


def killed_the_first_time(log, workspace):
    noted(log, "once")
    if not workspace.file("half").exists():
        workspace.write_json("half", 1)
        os.kill(os.getpid(), signal.SIGKILL)
    return "whole"


def always_killed(log):
    noted(log, "always")
    print("said before the end")
    os.kill(os.getpid(), signal.SIGKILL)


def divide(x):
    return 1 / x


def refuse(x):
    raise UserError(f"x must be good, got {x}")


def many_files(seed, workspace):
    draw = torch.Generator().manual_seed(seed)
    for name, size in {"a": 3_000_000, "b/c": 10, "b/empty": 0, "résumé 1": 1}.items():
        workspace.file(name).parent.mkdir(exist_ok=True)
        workspace.file(name).write_bytes(bytes(torch.randint(256, (size,), generator=draw, dtype=torch.uint8).numpy()))
    workspace.file("hollow").mkdir()
    return seed


def link(workspace):
    workspace.file("link").symlink_to("/etc/passwd")


def leave_in_another_way():
    raise GeneratorExit("enough")


def threads():
    import ray

    found = {"torch": torch.get_num_threads(), "env": os.environ["OMP_NUM_THREADS"]}
    found |= {"set aside": ray.get_runtime_context().get_assigned_resources()["CPU"]}
    torch.set_num_threads(3)  # must not reach the next cell of the same process
    return found


also_threads = threads


def busy(log):
    noted(log, "busy")
    time.sleep(600)


def place():
    import unsharp

    return {"code": unsharp.__file__, "digest": remote.code(), "pid": os.getpid()}


def cell(function: Callable, **arguments) -> Cell:
    return Cell(f"{__name__}:{function.__name__}", arguments)


def calls(log: Path) -> list[str]:
    return sorted(line.split()[0] for line in log.read_text().splitlines()) if log.exists() else []


def processes(log: Path) -> list[int]:
    return [int(line.split()[1]) for line in log.read_text().splitlines()] if log.exists() else []


def contents(directory: Path) -> dict[str, bytes | None]:
    """What the function of a cell has written; `run.json` tells of time and machine besides."""
    found = {p.relative_to(directory).as_posix(): None if p.is_dir() else p.read_bytes() for p in directory.rglob("*")}
    return {name: content for name, content in found.items() if name != "run.json"}


def here(cells, store, workers, threads) -> Iterator:
    for each in cells:
        yield run_cell(each, store)


class Counted(Progress):
    def __init__(self):
        self.counts = []

    def start(self, label, total, done=0):
        self.counts.append((total, done))

    def advance(self, n=1, note=""):
        self.counts.append(n)


@pytest.fixture(scope="module")
def ray():
    found = pytest.importorskip("ray", reason="needs Ray: pip install 'unsharp[scale]'")
    yield found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it forgets processes that still end
        found.shutdown()
        gc.collect()


# Results


def test_a_grid_comes_out_as_in_local_processes_to_the_bit(ray, tmp_path, capfd):
    environment, answer = dict(os.environ), signal.getsignal(signal.SIGTERM)
    cells = [cell(train, seed=seed, lr=lr) for seed in (0, 1) for lr in (0.05, 0.2)]
    local = run_cells(cells, tmp_path / "local", workers=1)
    found = run_cells(cells, tmp_path / "ray", workers=2, backend=ray_backend())
    assert report(found) == ""
    assert [r.value for r in found] == [r.value for r in local]
    assert len({json.dumps(r.value) for r in found}) == 4
    for mine, other in zip(found, local):
        assert mine.path == tmp_path / "ray" / mine.cell.key
        assert contents(mine.path) == contents(other.path)
        about, others = (json.loads((r.path / "run.json").read_text()) for r in (mine, other))
        assert (about["config"], about["hash"]) == (others["config"], others["hash"])
        assert about["provenance"]["threads"] == 1
    assert not list((tmp_path / "ray").glob(".sweep-*"))
    # Nothing else is to be noticed of Ray: no output, no other environment, the same answer to signals.
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == environment
    assert signal.getsignal(signal.SIGTERM) == answer


def test_deaths_are_tried_again_and_nothing_counts_twice(ray, tmp_path, capfd):
    log, progress = str(tmp_path / "log"), Counted()
    cells = [
        cell(always_killed, log=log),
        cell(killed_the_first_time, log=log),
        cell(divide, x=0),
        cell(refuse, x=7),
        *(cell(square, x=x, log=log) for x in range(4)),
        cell(leave_in_another_way),
    ]
    results = run_cells(cells, tmp_path / "store", workers=2, backend=ray_backend(retries=1), progress=progress)
    assert [r.cell for r in results] == cells
    died, _, failed, refused = (r.error for r in results[:4])
    assert died.kind == "died"
    assert re.fullmatch(r"its process on \S+ was killed or left \(out of memory\?\) \(tried 2 times\)", died.message)
    assert (failed.kind, failed.message) == ("failed", "ZeroDivisionError: division by zero")
    assert "return 1 / x" in failed.trace
    assert (refused.kind, refused.message, refused.trace) == ("mistake", "x must be good, got 7", "")
    assert results[1].value == "whole"
    assert [r.value for r in results[4:8]] == [{"square": x * x} for x in range(4)]
    assert results[8].error.message == "GeneratorExit: enough"
    assert "raise GeneratorExit" in results[8].error.trace
    assert "\x1b" not in results[8].error.trace
    assert [r.reused for r in results] == [False] * 9
    assert calls(Path(log)) == ["0", "1", "2", "3", *["always"] * 2, *["once"] * 2]
    assert progress.counts == [(9, 0), *[1] * 9]
    assert capfd.readouterr() == ("", "")
    wait_for(lambda: not any(alive(pid) for pid in processes(Path(log))), 10)


def test_what_is_done_is_found_and_needs_no_cluster(ray, tmp_path, monkeypatch):
    log = tmp_path / "log"
    cells = [cell(square, x=x, log=str(log)) for x in range(3)]
    run_cells(cells[:2], tmp_path / "store", backend=here)
    results = run_cells(cells, tmp_path / "store", workers=2, backend=ray_backend())
    assert [r.reused for r in results] == [True, True, False]
    monkeypatch.setattr(cluster, "connect", lambda *given: pytest.fail("nothing is to be done"))
    assert [r.reused for r in run_cells(cells, tmp_path / "store", backend=ray_backend())] == [True] * 3
    assert calls(log) == ["0", "1", "2"]


def test_each_cell_has_its_threads(ray, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    mine = runtime.set_threads(None)
    results = run_cells([cell(threads), cell(also_threads)], tmp_path, workers=1, threads=2, backend=ray_backend())
    assert [r.value for r in results] == [{"torch": 2, "env": "2", "set aside": 2}] * 2
    assert (runtime.set_threads(None), os.environ["OMP_NUM_THREADS"]) == (mine, "7")


# A store that the machines do not share


@pytest.fixture
def elsewhere(monkeypatch) -> Iterator[Callable[[Path], Path]]:
    """Processes that do not see the store, as on another machine; where they put their runs instead."""
    known = sweeps._token

    @contextmanager
    def of_a_copy(store):
        with known(store) as token:
            yield token.replace("sweep", "copy")

    monkeypatch.setattr(sweeps, "_token", of_a_copy)
    places = []

    def place_of(store: Path) -> Path:
        places.append(Path(tempfile.gettempdir()) / f"unsharp-{os.getuid()}" / (store / ".identity").read_text())
        return places[-1]

    yield place_of
    for found in places:
        for rest in found.rglob("*"):
            rest.unlink() if rest.is_file() else None
        for rest in sorted(found.rglob("*"), reverse=True):
            rest.rmdir()
        found.rmdir()


def test_runs_come_back_whole_from_machines_without_the_store(ray, tmp_path, elsewhere, monkeypatch):
    monkeypatch.setattr(cluster, "connect", joined(cluster.connect))
    store, log = tmp_path / "store", tmp_path / "log"
    cells = [*(cell(many_files, seed=seed) for seed in range(3)), cell(link), cell(divide, x=0)]
    cells.append(cell(killed_the_first_time, log=str(log)))
    results = run_cells(cells, store, workers=1, backend=ray_backend())
    there = run_cells(cells[:3], tmp_path / "direct", backend=here)
    assert [r.value for r in results[:3]] == [0, 1, 2]
    for mine, other in zip(results[:3], there):
        assert mine.path == store / mine.cell.key
        assert contents(mine.path) == contents(other.path)
        assert config.read_json(mine.path / "run.json")["hash"] == mine.cell.key
    assert results[3].error.kind == "mistake"
    assert "link is neither a file nor a directory" in results[3].error.message
    assert results[4].error.message == "ZeroDivisionError: division by zero"
    assert results[5].value == "whole"  # it went on where the dead process had stood
    assert calls(log) == ["once", "once"]
    done = {r.cell.key for r in results if r.error is None}
    assert {p.name for p in store.iterdir() if not p.name.startswith(".")} == done
    left = [p for p in elsewhere(store).iterdir() if not p.name.startswith(".")]
    assert left == []  # what was brought back is not kept twice
    again = run_cells(cells[:3], store, backend=ray_backend())
    assert [r.reused for r in again] == [True] * 3


def joined(connect: Callable) -> Callable:
    """As if the Ray of this machine were some cluster, which may have other machines."""

    def connected(*given):
        connect(*given)
        return False

    return connected


def test_a_copy_of_a_store_is_not_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with sweeps._token(tmp_path) as token:
        assert remote.Worker(remote.Order(str(tmp_path), token, "id", 1)).shared
        other = tmp_path / "copy"
        other.mkdir()
        for seen in (other, tmp_path / "none"):
            assert not remote.Worker(remote.Order(str(seen), token, "id", 1)).shared
        (other / token).write_text("of another sweep")
        assert not remote.Worker(remote.Order(str(other), token, "id", 1)).shared
    assert list(tmp_path.glob(".sweep-*")) == []
    assert sweeps._identity(tmp_path) == sweeps._identity(tmp_path) != sweeps._identity(other)


def test_a_place_of_somebody_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    order = remote.Order("/nowhere", "token", "id", 1)
    place = tmp_path / f"unsharp-{os.getuid()}"
    assert remote.Worker(order).about().refused == ""
    assert place.stat().st_mode & 0o777 == 0o700
    place.chmod(0o777)
    assert "belongs to somebody else; set TMPDIR" in remote.Worker(order).about().refused
    (place / "id").rmdir()
    place.rmdir()
    (tmp_path / "other").mkdir()
    place.symlink_to(tmp_path / "other")
    assert "belongs to somebody else" in remote.Worker(order).about().refused


def test_what_a_dead_process_left_at_work_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "ORPHAN_SECONDS", 0.2)
    first = cell(square, x=3, log=str(tmp_path / "log"))
    worker = remote.Worker(remote.Order(str(tmp_path), "", "id", 1, shared=True))
    (tmp_path / f".{first.key}.partial").mkdir()
    with open(tmp_path / f".{first.key}.partial" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = worker.do(first.function, first.arguments, True)
        assert (answer.error.kind, calls(tmp_path / "log")) == ("died", [])
        answer = worker.do(first.function, first.arguments, False)
        assert "another process is at work" in answer.error.message
    assert worker.do(first.function, first.arguments, True).value == {"square": 9}
    assert not worker.do(first.function, first.arguments, True).reused  # done by this sweep, before a process died
    assert worker.do(first.function, first.arguments, False).reused
    assert calls(tmp_path / "log") == ["3"]


# Ending early


def test_closing_leaves_nobody_at_work(ray, tmp_path):
    log, store = tmp_path / "log", tmp_path / "store"
    store.mkdir()
    cells = [cell(square, x=1, log=str(log)), cell(busy, log=str(log)), cell(square, x=2, log=str(log))]
    running = ray_backend()(cells, store, 1, 1)
    assert next(running).value == {"square": 1}
    wait_for(lambda: calls(log) == ["1", "busy"])
    start = time.monotonic()
    running.close()
    wait_for(lambda: not any(alive(pid) for pid in processes(log)), 10)
    assert time.monotonic() - start < 8
    wait_for(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], 10)
    assert calls(log) == ["1", "busy"]
    assert not list(store.glob(".sweep-*"))


def test_another_process_joins_by_address_and_is_interrupted(ray, tmp_path):
    """By the address of a cluster its own code comes along; an interrupt ends it at once and keeps what is finished."""
    cluster.connect(None, 2, {})
    address, store, log = ray.get_runtime_context().gcs_address, tmp_path / "store", tmp_path / "log"
    cells = [cell(place), cell(busy, log=str(log))]
    code = (
        "from unsharp.sweep import Cell, backend_from, remote, run_cells\n"
        f"open({str(tmp_path / 'code')!r}, 'w').write(remote.code())\n"
        f"cells = [Cell(f, a) for f, a in {[(c.function, dict(c.arguments)) for c in cells]}]\n"
        f"run_cells(cells, {str(store)!r}, backend=backend_from('ray', {address!r}))\n"
    )
    paths = os.pathsep.join([SOURCE, str(MODULES)])
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster._own_token()}
    environment = {**os.environ, "PYTHONPATH": paths, **token}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True, start_new_session=True) as sweep:
        done = store / cells[0].key / "result.json"
        with contextlib.suppress(AssertionError):
            wait_for(lambda: sweep.poll() is not None or (calls(log) == ["busy"] and done.exists()), 120)
        os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does
        try:
            out, error = sweep.communicate(timeout=30)
        finally:
            sweep.kill()
    assert done.exists(), error
    assert out == ""
    assert error.count("Traceback") == 1, error
    assert error.endswith("KeyboardInterrupt\n")
    wait_for(lambda: not any(alive(pid) for pid in processes(log)), 10)
    found = json.loads(done.read_text())
    assert not found["code"].startswith(SOURCE)
    assert found["digest"] == (tmp_path / "code").read_text()
    (again,) = run_cells(cells[:1], store, backend=ray_backend())
    assert again.reused


@pytest.mark.slow
def test_a_machine_that_goes_away_loses_no_cell(ray, tmp_path):
    """Two machines, which are two sets of Ray's processes, in a process of its own; one of them is killed at work."""
    log, store = tmp_path / "log", tmp_path / "store"
    code = f"""
import threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from unsharp.sweep import Cell, ray_backend, report, run_cells

size = dict(num_cpus=1, object_store_memory=80 * 2**20)
cluster = Cluster(initialize_head=True, head_node_args=dict(size, include_dashboard=False))
machine = cluster.add_node(**size)
cluster.wait_for_nodes()

def leave():
    while not Path({str(log)!r}).exists() or len(Path({str(log)!r}).read_text().splitlines()) < 2:
        time.sleep(0.1)
    cluster.remove_node(machine, allow_graceful=False)

threading.Thread(target=leave, daemon=True).start()
cells = [Cell({f"{__name__}:slow_square"!r}, dict(x=x, log={str(log)!r})) for x in range(4)]
results = run_cells(cells, {str(store)!r}, backend=ray_backend(cluster.address))
print(report(results), [r.value for r in results], [r.reused for r in results])
"""
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    variables |= {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"}
    variables |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join([SOURCE, str(MODULES)])}
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-", ignore_cleanup_errors=True) as place:
        variables |= {"RAY_TMPDIR": place}
        ended = subprocess.run([sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True)
    assert ended.stdout == f" {[0, 1, 4, 9]} {[False] * 4}\n", ended.stderr
    assert len(calls(log)) == 5


def slow_square(x, log):
    noted(log, x)
    time.sleep(3)
    return x * x


# Mistakes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("rey",), r"unknown backend 'rey'; did you mean 'ray'\? Known: local, ray\."),
        (("local", "auto"), "--address is of the backend 'ray'; give --backend ray, or leave --address out"),
        (("ray", "here"), "address must be 'auto', 'host:port' or 'ray://host:port', got 'here'"),
        (("ray", "here:port"), "address must be"),
        (("ray", "here:0"), "address must be"),
        (("ray", "here:70000"), "address must be"),
        (("ray", "http://here:80"), "address must be"),
        (("ray", "ray://here"), "address must be"),
    ],
)
def test_options_that_name_no_backend_are_refused(ray, given, message):
    with pytest.raises(UserError, match=message):
        backend_from(*given)
    assert backend_from("local") is not backend_from("ray")
    with pytest.raises(UserError, match="each cell is to get 99, but this machine has"):
        backend_from("local", accelerators=99)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"Ray cannot be imported .*; pip install 'unsharp\[scale\]'"):
        backend_from("ray")
    backend_from("local")


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://localhost:{}", "auto"])
def test_an_address_where_nobody_answers_is_refused_soon(ray, form, monkeypatch):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        address = form.format(nobody.getsockname()[1])
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{nobody.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(UserError, match=r"no Ray cluster answers at '.*:\d+' \(.*\); start one with `ray start"):
            ray_backend(address)
    assert time.monotonic() - start < 2 * cluster.ANSWER_SECONDS


@pytest.mark.parametrize(
    "options",
    [{"accelerators": -0.1}, {"accelerators": 1.5}, {"retries": -1}, {"patience": -1}, {"patience": float("nan")}],
)
def test_numbers_are_checked(ray, options):
    with pytest.raises(UserError, match=f"{next(iter(options))} must be"):
        ray_backend(**options)


@pytest.mark.parametrize("numbers", [{"workers": 0}, {"threads": 0}])
def test_numbers_of_processes_and_threads_are_checked(ray, tmp_path, numbers):
    with pytest.raises(UserError, match=f"{next(iter(numbers))} must be at least 1, got 0"):
        run_cells([cell(divide, x=0)], tmp_path, backend=ray_backend(), **numbers)


def test_a_cell_that_no_machine_can_carry_is_refused(ray, tmp_path):
    cluster.connect(None, 2, {})
    for options, numbers, wanted in (({}, {"threads": 999}, "999 processors"), ({"accelerators": 99}, {}, "99 accele")):
        with pytest.raises(UserError, match=f"no machine of the cluster has .*{wanted}.*lower threads or accelerators"):
            run_cells([cell(divide, x=0)], tmp_path / "store", backend=ray_backend(**options), **numbers)


def test_another_cluster_is_refused_while_connected_to_one(ray, tmp_path, monkeypatch):
    cluster.connect(None, 2, {})
    monkeypatch.setattr(cluster, "check", lambda address: None)
    with pytest.raises(UserError, match="is connected to a Ray already, and cannot change to 'there:1'"):
        run_cells([cell(divide, x=0)], tmp_path / "store", backend=ray_backend("there:1"))


def sweep(tmp_path: Path, **given) -> sweeps._Sweep:
    fields = {"workers": 1, "needs": cluster.Needs(1, 0), "retries": 0, "shared": True, "code": remote.code()}
    return sweeps._Sweep([], tmp_path, **{**fields, **given})


def test_machines_with_other_versions_or_code_are_refused(tmp_path):
    good = remote.Worker(remote.Order(str(tmp_path), "", "id", 1, shared=True)).about()
    member = sweeps._Member(None, None)
    sweep(tmp_path)._admit(member, good)
    assert member.machine == good.machine
    versions = dict(good.versions) | {"torch": "1.0.0"}
    for bad, message in (
        (
            remote.About("m", versions, good.code),
            rf"machine m has torch 1\.0\.0 \(here {versions_of('torch')}\); install",
        ),
        (remote.About("m", {}, good.code), r"machine m has python None"),
        (remote.About("m", good.versions, "0" * 64), "machine m has other code of unsharp than this one"),
        (remote.About("m", good.versions, good.code, "no room"), "machine m cannot take part: no room"),
    ):
        with pytest.raises(UserError, match=message):
            sweep(tmp_path)._admit(sweeps._Member(None, None), bad)
    sweep(tmp_path, code=None)._admit(member, remote.About("m", good.versions, "0" * 64))  # a Ray of this machine


def versions_of(name: str) -> str:
    return re.escape(remote.versions()[name])


def test_builds_for_accelerators_are_the_same_version(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    before = remote.versions()
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    assert remote.versions() == before
    assert before["torch"] == "2.13.0"
    monkeypatch.setattr(torch, "__version__", "2.13.1+cpu")
    assert remote.versions() != before


def test_an_operating_version_check_reaches_the_user(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "versions", lambda: {"torch": "0.1"})
    with pytest.raises(UserError, match=r"has torch \S+ \(here 0\.1\); install the same versions on all machines"):
        run_cells([cell(refuse, x=1)], tmp_path, workers=1, backend=ray_backend())


def test_processes_that_cannot_start_end_the_sweep(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "STARTS", 1)
    monkeypatch.setattr(remote.Order, "__reduce__", lambda self: (divide, (0,)), raising=False)
    with pytest.raises(
        SweepError, match="processes in a row ended before they took a cell; the last: ModuleNotFoundError"
    ):
        run_cells([cell(refuse, x=1)], tmp_path, workers=1, backend=ray_backend())


# How many


@pytest.mark.parametrize(
    ("machines", "processors", "share", "expected"),
    [
        ([(4, 0)], 1, 0, 4),
        ([(4, 0), (3, 0), (1, 0)], 2, 0, 3),
        ([(64, 2)], 1, 1, 2),
        ([(64, 2)], 1, 0.25, 8),
        ([(64, 1)], 1, 0.3, 3),
        ([(3, 1)], 1, 0.25, 3),
        ([(64, 3)], 1, 2, 1),
        ([(64, 8), (64, 0)], 1, 1, 8),
        ([], 1, 0, 0),
        ([(8, 8)], 16, 0, 0),
    ],
)
def test_how_many_processes_a_cluster_carries(monkeypatch, machines, processors, share, expected):
    nodes = [{"Alive": True, "Resources": {"CPU": c, "GPU": g} if g else {"CPU": c}} for c, g in machines]
    nodes.append({"Alive": False, "Resources": {"CPU": 100.0, "GPU": 100.0}})
    monkeypatch.setattr(cluster, "load", lambda: SimpleNamespace(nodes=lambda: nodes))
    assert cluster.carried(cluster.Needs(processors, share)) == expected


def test_a_machine_that_is_still_to_come_is_waited_for(monkeypatch):
    nodes, looks = [], []

    def look():
        looks.append(1)
        if len(looks) == 3:
            nodes.append({"Alive": True, "Resources": {"CPU": 2.0}})
        return nodes

    monkeypatch.setattr(cluster, "load", lambda: SimpleNamespace(nodes=look))
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.01)
    cluster.wait_for_machine(cluster.Needs(2, 0), 10)
    assert len(looks) == 3
    with pytest.raises(UserError, match=r"has 3 processors, which a cell is to get \(they have: 2 processors\)"):
        cluster.wait_for_machine(cluster.Needs(3, 0), 0.05)


def test_reasons_of_an_end_are_told_in_a_line(ray):
    exceptions = ray.exceptions
    assert (
        sweeps._why(exceptions.OutOfMemoryError("long\ntext"), "m")
        == "Ray ended its process, because the memory of m was full"
    )
    gone = exceptions.ActorDiedError()
    gone.error_msg = "The actor died.\nThe actor died because its node has died. Node Id: 1"
    assert sweeps._why(gone, "m") == "machine m is gone"
    start = exceptions.RayActorError()
    start.error_msg = (
        "The actor died because of an error raised in its creation task\nModuleNotFoundError: No module named 'x'"
    )
    assert sweeps._why(start, "m") == "ModuleNotFoundError: No module named 'x'"


def test_a_process_is_told_that_another_died_over_its_cell(ray, tmp_path):
    asked = []
    actor = SimpleNamespace(do=SimpleNamespace(remote=lambda *given: asked.append(given)))
    first, member = cell(divide, x=1), sweeps._Member(actor, None)
    running = sweep(tmp_path, retries=1)
    for expected in (False, True):
        running.team, running.todo = [member], sweeps.deque([first])
        running._give(member)
        assert asked.pop() == (first.function, {"x": 1}, expected)
        result = running._died(member, first, ray.exceptions.RayActorError())
    assert result.error.message.endswith("(tried 2 times)")
    assert list(running.todo) == []


def test_a_run_that_does_not_show_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "VISIBLE_SECONDS", 0.05)
    monkeypatch.setattr(sweeps, "POLL_SECONDS", 0.01)
    first = cell(divide, x=1)
    result = sweep(tmp_path)._result(first, remote.Answer(value=1.0), "m")
    assert result.error.message == f"done, says m, but it does not show here at {tmp_path / first.key}"
    run_cell(first, tmp_path)
    assert sweep(tmp_path)._result(first, remote.Answer(value=1.0), "m").error is None


def test_a_run_that_comes_back_damaged_is_a_failure(tmp_path):
    first = cell(divide, x=1)
    result = sweep(tmp_path)._result(first, remote.Answer(value=1.0, parcel=b"nonsense"), "m")
    assert "came back damaged" in result.error.message
    assert not (tmp_path / first.key).exists()


# The pool of networks


def test_a_pool_is_the_same_wherever_its_networks_are_trained(ray, tmp_path):
    from unsharp import data
    from unsharp.data import DataConfig
    from unsharp.models import ModelConfig
    from unsharp.pool.grow import Work, grow, plan_of
    from unsharp.pool.plan import PoolConfig
    from unsharp.stages import origin_of
    from unsharp.training import TrainConfig

    splits = data.load(digits := DataConfig(name="digits", classes=3, per_class=20), torch.device("cpu"))
    origin = origin_of(ModelConfig(arch="small_cnn", width=4), digits, TrainConfig(epochs=1, batch_size=16), splits)
    plan = plan_of(origin, splits.train, PoolConfig(fraction=0.5, seed=3))
    work = {"stack": 2, "workers": 2, "keep_weights": False}
    local = grow(plan, range(3), tmp_path / "local", Work(**work), origin=origin, test=splits.test)
    remote_pool = grow(
        plan, range(3), tmp_path / "ray", Work(**work, backend=ray_backend()), origin=origin, test=splits.test
    )
    here, there = local.outputs(), remote_pool.outputs()
    assert here.members.tolist() == there.members.tolist() == [0, 1, 2]
    assert (here.train.margin == there.train.margin).all()
    assert (here.inside == there.inside).all()
