"""Sweeps with real processes that fail, die, are killed and interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unsharp import config, runtime
from unsharp.errors import UserError
from unsharp.progress import Progress
from unsharp.sweep import Cell, SweepError, local, report, run_cell, run_cells, run_local
from unsharp.sweep.local import carried

HERE = Path(__file__)
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{HERE.parents[2] / 'src'}{os.pathsep}{HERE.parent}"}


# The functions of the cells. Each call leaves a line in `log`, so that a test knows what was really called.


def square(x, log, seconds=0.0, workspace=None):
    with open(log, "a") as file:
        file.write(f"{x} {os.getpid()}\n")
    time.sleep(seconds)
    workspace.file("about.txt").write_text(f"{x}")
    return {"square": x * x}


def threads():
    found = {"torch": torch.get_num_threads(), "env": os.environ["OMP_NUM_THREADS"]}
    torch.set_num_threads(3)  # must not reach the next cell of the same process
    return found


also_threads = threads


def nothing():
    pass


def in_two_calls(x, log, workspace):
    """Stays half done, deaf to interrupts, until it is called again."""
    with open(log, "a") as file:
        file.write(f"{x} {os.getpid()}\n")
    if not workspace.file("half").exists():
        os.kill(os.getpid(), signal.SIGINT)
        workspace.write_json("half", x)
        time.sleep(600)
    return workspace.file("half").read_text().strip()


def divide(x):
    return 1 / x


def refuse(x):
    raise UserError(f"x must be good, got {x}")


def only_when(ready):
    assert Path(ready).exists()


def kill_itself(how, orphan=None):
    """With an orphan that lives on for a minute and keeps all files open."""
    if orphan is not None:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        Path(orphan).write_text(str(child))
    os.kill(os.getpid(), how)


def cell(function: Callable, **arguments) -> Cell:
    return Cell(f"{HERE.stem}:{function.__name__}", arguments)


def in_this_process(cells, store, workers, threads) -> Iterator:
    """Another backend, which also turns the order around."""
    for each in reversed(cells):
        yield run_cell(each, store)


def no_backend(cells, store, workers, threads) -> Iterator:
    assert not cells
    yield from ()


class Counted(Progress):
    def __init__(self):
        self.calls = []

    def start(self, label, total, done=0):
        self.calls.append((total, done))

    def advance(self, n=1, note=""):
        self.calls.append((n, note))


def calls(log: Path) -> list[int]:
    return sorted(int(line.split()[0]) for line in log.read_text().splitlines()) if log.exists() else []


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def processes(log: Path) -> set[int]:
    return {int(line.split()[1]) for line in log.read_text().splitlines()}


@pytest.fixture
def half_done(tmp_path) -> Iterator[tuple[subprocess.Popen[bytes], list[Cell], Path, Path]]:
    """A sweep in a process group of its own, its first three cells done and its two processes busy with the others."""
    store, log = tmp_path / "store", tmp_path / "log"
    cells = [cell(square, x=x, log=str(log)) for x in range(3)]
    cells += [cell(in_two_calls, x=x, log=str(log)) for x in (3, 4)]
    code = (
        "from unsharp.sweep import Cell, run_cells\n"
        f"cells = [Cell(f, a) for f, a in {[(c.function, c.arguments) for c in cells]}]\n"
        f"run_cells(cells, {str(store)!r}, workers=2)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, stderr=subprocess.PIPE) as sweep:
        try:
            wait_for(lambda: sweep.poll() is not None or len(list(store.glob(".*/half"))) == 2)
            assert len(done(store)) == 3
            yield sweep, cells, store, log
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(sweep.pid, signal.SIGKILL)


def done(store: Path) -> list[Path]:
    return [p for p in store.glob("*") if not p.name.startswith(".")] if store.exists() else []


# Cells


def test_a_cell_is_named_by_function_and_arguments_alone():
    key = Cell("a.b:c", {"x": 1, "y": [1, 2]}).key
    assert key == Cell("a.b:c", {"y": (1, 2), "x": 1}).key
    assert key == config.digest({"function": "a.b:c", "arguments": {"x": 1, "y": [1, 2]}})
    others = [Cell("a.b:d", {"x": 1, "y": [1, 2]}), Cell("a.b:c", {"x": 2, "y": [1, 2]}), Cell("a.b:c", {"x": 1})]
    assert len({key, *(other.key for other in others)}) == 4
    assert Cell("a.b:c", {"x": 1, "y": (1, 2)}).arguments["y"] == [1, 2]


@pytest.mark.parametrize("value", [object(), float("nan"), {1, 2}, torch.zeros(1)])
def test_arguments_that_are_not_json_are_refused(value):
    with pytest.raises(UserError, match=r"arguments of cell a\.b:c must be JSON"):
        Cell("a.b:c", {"x": value})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Cell("no_such_module:f"), "cannot be imported"),
        (Cell("math:no_such_function"), "cannot be imported"),
        (Cell("math.sqrt"), "must read"),
        (Cell("__main__:f"), "must read"),
        (Cell("math:pi"), "is a float, not a function"),
        (cell(divide, y=1), "does not fit its function"),
        (cell(divide), "does not fit its function"),
    ],
)
def test_a_cell_that_cannot_be_called_stops_the_sweep_before_it_starts(tmp_path, bad, message):
    log = tmp_path / "log"
    with pytest.raises(UserError, match=message):
        run_cells([cell(square, x=1, log=str(log)), bad], tmp_path / "store", backend=in_this_process)
    assert not log.exists()
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("numbers", [{"workers": 0}, {"threads": 0}])
def test_numbers_of_processes_and_threads_are_checked(tmp_path, numbers):
    with pytest.raises(UserError, match=f"{next(iter(numbers))} must be at least 1, got 0"):
        run_cells([cell(nothing)], tmp_path, **numbers)


def test_a_store_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run_cells([cell(nothing)], tmp_path / "file", backend=no_backend)


# The sweep, apart from processes


def test_results_stand_in_the_order_of_the_cells_and_equal_cells_run_once(tmp_path):
    log, progress = tmp_path / "log", Counted()
    cells = [cell(square, x=x, log=str(log)) for x in (3, 1, 2, 1, 3)]
    results = run_cells(cells, tmp_path / "store", backend=in_this_process, progress=progress)
    assert [r.value for r in results] == [{"square": x * x} for x in (3, 1, 2, 1, 3)]
    assert [r.cell for r in results] == cells
    assert calls(log) == [1, 2, 3]
    assert progress.calls == [(3, 0), (1, ""), (1, ""), (1, "")]


def test_finished_cells_are_skipped_and_keep_their_seconds(tmp_path):
    log = tmp_path / "log"
    cells = [cell(square, x=x, log=str(log), seconds=0.05) for x in range(3)]
    before = run_cells(cells[:2], tmp_path, backend=in_this_process)
    again = run_cells(cells[:2], tmp_path, backend=no_backend)
    assert [(r.value, r.path, r.seconds) for r in again] == [(r.value, r.path, r.seconds) for r in before]
    assert [r.reused for r in before + again] == [False, False, True, True]
    assert all(0.05 <= r.seconds < 5 for r in again)
    more = run_cells(cells, tmp_path, backend=in_this_process)
    assert [r.reused for r in more] == [True, True, False]
    assert calls(log) == [0, 1, 2]


def test_a_cell_leaves_a_run_with_its_files(tmp_path):
    (result,) = run_cells([cell(square, x=3, log=str(tmp_path / "log"))], tmp_path / "s", backend=in_this_process)
    assert result.path == tmp_path / "s" / result.cell.key
    assert json.loads((result.path / "result.json").read_text()) == {"square": 9}
    assert (result.path / "about.txt").read_text() == "3"
    run = json.loads((result.path / "run.json").read_text())
    assert run["config"] == {"function": "test_sweep:square", "arguments": dict(result.cell.arguments)}
    assert run["hash"] == result.cell.key
    (empty,) = run_cells([cell(nothing)], tmp_path / "s", backend=in_this_process)
    assert (empty.value, empty.error) == (None, None)


def test_a_cell_that_leaves_its_process_has_failed(tmp_path):
    (result,) = run_cells([Cell("sys:exit")], tmp_path, backend=in_this_process)
    assert (result.error.kind, result.error.message) == ("failed", "SystemExit: ")


def test_without_keep_going_the_first_failure_is_raised(tmp_path):
    log = tmp_path / "log"
    good = cell(square, x=1, log=str(log))
    with pytest.raises(SweepError, match="ZeroDivisionError"):
        run_cells([good, cell(divide, x=0)], tmp_path, backend=in_this_process, keep_going=False)
    with pytest.raises(UserError, match=r"^cell test_sweep:refuse\(x=5\): x must be good, got 5$"):
        run_cells([good, cell(refuse, x=5)], tmp_path, backend=in_this_process, keep_going=False)
    assert not log.exists()  # this backend begins at the end


def test_a_failed_cell_is_told_in_short_and_written_down_in_full(tmp_path):
    what = {"data": {"name": "digits", "dir": "/a/b/c"}, "seeds": list(range(100))}
    bad = cell(refuse, x={"seed": 3, "what": what})
    bound = Cell(f"{HERE.stem}:refuse", {"x": 1.5, "task": "high", "what": what, "flag": None, "long": "a" * 39})
    assert str(bound) == "test_sweep:refuse(x=1.5, task='high', what=…, flag=None, long=…)"
    assert str(Cell("a.b:c", {"x": "a" * 38})) == f"a.b:c(x='{'a' * 38}')"
    with pytest.raises(UserError, match=r"^cell test_sweep:refuse\(x=1\.5, .* does not fit its function: "):
        run_cells([bound], tmp_path, backend=in_this_process)
    (result,) = run_cells([bad], tmp_path, backend=in_this_process)
    lines = report([result]).splitlines()
    assert lines[0] == "1 of 1 cells failed"
    assert lines[1].startswith("mistake: test_sweep:refuse(x=…): x must be good, got {'seed': 3")  # the error itself
    assert lines[2] == f"    the whole: {tmp_path / f'.{bad.key}.failed.json'}"
    assert json.loads(result.record.read_text())["arguments"] == bad.arguments
    (broken,) = run_cells([cell(divide, x=0)], tmp_path, backend=in_this_process)
    assert "Traceback" not in report([broken])
    assert "Traceback" in json.loads(broken.record.read_text())["error"]["trace"]
    assert "Traceback" in report([run_cell(broken.cell, tmp_path)])  # nobody has written this one down
    assert done(tmp_path) == []


def test_the_record_of_a_failure_goes_when_the_cell_is_done(tmp_path):
    first = cell(only_when, ready=str(tmp_path / "ready"))
    (failed,) = run_cells([first], tmp_path / "store", backend=in_this_process)
    assert failed.record.is_file()
    (tmp_path / "ready").touch()
    (result,) = run_cells([first], tmp_path / "store", backend=in_this_process)
    assert (result.error, result.record) == (None, None)
    assert not failed.record.exists()


def test_what_failed_of_itself_is_tried_again_on_request_and_what_was_killed_in_any_case(tmp_path):
    cells = [cell(divide, x=0), cell(kill_itself, how=int(signal.SIGKILL)), cell(nothing)]
    first = run_cells(cells, tmp_path, workers=1)
    tried, told = [], []

    def noted(todo, store, workers, threads):
        tried.extend(todo)
        return run_local(todo, store, 1)

    kept, killed, done = run_cells(cells, tmp_path, backend=noted, retry_failed=False, told=told.append)
    assert tried == [cells[1]]
    assert (kept.error, kept.record) == (first[0].error, first[0].record)
    assert (killed.error.kind, done.reused) == ("died", True)
    assert [result.cell for result in told] == [cells[0], cells[2], cells[1]]  # what is found comes first
    tried.clear()
    run_cells(cells, tmp_path, backend=noted)
    assert tried == cells[:2]


def test_a_record_that_cannot_be_read_is_as_good_as_none(tmp_path):
    (result,) = run_cells([cell(divide, x=0)], tmp_path, backend=in_this_process)
    result.record.write_text("{}")
    (again,) = run_cells([cell(divide, x=0)], tmp_path, backend=in_this_process, retry_failed=False)
    assert again.error.kind == "failed"


def test_a_cell_may_be_called_otherwise(tmp_path):
    (result,) = run_cells([cell(divide, x=0)], tmp_path, backend=in_this_process)
    assert replace(result, shown="the first").told == "the first: ZeroDivisionError: division by zero"


def test_how_many_processes_this_machine_carries(monkeypatch):
    monkeypatch.setattr(runtime, "processors", lambda: 7)
    monkeypatch.setattr(runtime, "accelerators", lambda: 0)
    assert [carried(threads) for threads in (1, 2, 7, 8)] == [7, 3, 1, 1]
    monkeypatch.setattr(runtime, "accelerators", lambda: 4)
    assert [carried(1, share) for share in (None, 1, 0.5, 0.3, 2, 3, 0)] == [4, 4, 8, 12, 2, 1, 7]
    with pytest.raises(UserError, match="each cell is to get 5, but this machine has 4"):
        carried(1, 5)
    with pytest.raises(UserError, match="threads must be at least 1, got 0"):
        carried(0)


def test_a_failure_that_cannot_be_written_down_is_still_told(tmp_path, monkeypatch):
    def full(path, values):
        raise UserError("the disk is full")

    monkeypatch.setattr("unsharp.sweep.cells.write_json", full)
    (result,) = run_cells([cell(divide, x=0)], tmp_path, backend=in_this_process)
    assert result.record is None
    assert "failed: test_sweep:divide(x=0): ZeroDivisionError" in report([result])


# Processes


def test_failures_and_deaths_stay_with_their_cells(tmp_path):
    log, progress = tmp_path / "log", Counted()
    cells = [
        cell(square, x=0, log=str(log)),
        cell(kill_itself, how=int(signal.SIGKILL)),
        cell(divide, x=0),
        cell(refuse, x=7),
        *(cell(square, x=x, log=str(log)) for x in range(1, 5)),
    ]
    results = run_cells(cells, tmp_path, workers=2, progress=progress)
    assert [r.value for r in results if r.error is None] == [{"square": x * x} for x in range(5)]
    assert [r.cell for r in results] == cells
    died, failed, refused = (r.error for r in results[1:4])
    assert (died.kind, died.message) == ("died", "its process was killed by SIGKILL (out of memory?)")
    assert (failed.kind, failed.message) == ("failed", "ZeroDivisionError: division by zero")
    assert "return 1 / x" in failed.trace
    assert (refused.kind, refused.message, refused.trace) == ("mistake", "x must be good, got 7", "")
    assert calls(log) == list(range(5))
    assert progress.calls[0] == (8, 0)
    assert progress.calls[-1][1] == "3 failed"
    lines = report(results + results).splitlines()
    assert lines[0] == "3 of 8 cells failed"
    assert lines[1] == "mistake: test_sweep:refuse(x=7): x must be good, got 7"
    assert lines[3].startswith("died: test_sweep:kill_itself(how=9): its process was killed by SIGKILL")
    assert lines[5] == "failed: test_sweep:divide(x=0): ZeroDivisionError: division by zero"
    for line, result in zip(lines[2::2], (results[3], results[1], results[2]), strict=True):
        assert line == f"    the whole: {result.record}"
        whole = json.loads(result.record.read_text())
        assert (whole["function"], whole["arguments"]) == (result.cell.function, dict(result.cell.arguments))
        assert whole["error"]["message"] == result.error.message
    assert "return 1 / x" in json.loads(results[2].record.read_text())["error"]["trace"]
    assert report(results[:1]) == ""
    assert os.getpid() not in processes(log)
    assert not any(alive(pid) for pid in processes(log))


def test_a_death_is_noticed_though_an_orphan_holds_the_pipe(tmp_path):
    start = time.monotonic()
    orphan = tmp_path / "orphan"
    deadly = cell(kill_itself, how=int(signal.SIGTERM), orphan=str(orphan))
    result, after = run_cells([deadly, cell(nothing)], tmp_path / "store", workers=1)
    os.kill(int(orphan.read_text()), signal.SIGKILL)
    assert result.error.message == "its process was killed by SIGTERM"
    assert after.error is None  # done by another process
    assert time.monotonic() - start < 30


def test_processes_have_their_threads_and_leave_this_one_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    mine = runtime.set_threads(None)
    results = run_cells([cell(threads), Cell(f"{HERE.stem}:also_threads")], tmp_path, workers=1, threads=2)
    assert [r.value for r in results] == [{"torch": 2, "env": "2"}] * 2
    assert (runtime.set_threads(None), os.environ["OMP_NUM_THREADS"]) == (mine, "7")


def test_a_killed_sweep_leaves_no_process_and_goes_on(half_done):
    sweep, cells, store, log = half_done
    assert all(alive(pid) for pid in processes(log))
    sweep.kill()
    wait_for(lambda: not any(alive(pid) for pid in processes(log)), 10)
    results = run_cells(cells, store, backend=in_this_process)
    assert [r.reused for r in results] == [True, True, True, False, False]
    assert [r.value for r in results] == [{"square": 0}, {"square": 1}, {"square": 4}, "3", "4"]
    assert calls(log) == [0, 1, 2, 3, 3, 4, 4]


def test_an_interrupt_stops_promptly_and_keeps_what_is_finished(half_done):
    sweep, _, store, log = half_done
    assert all(alive(pid) for pid in processes(log))
    os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does
    start = time.monotonic()
    error = sweep.communicate(timeout=30)[1].decode()
    assert time.monotonic() - start < 4
    assert not any(alive(pid) for pid in processes(log))
    assert error.count("Traceback") == 1  # the sweep's own: its processes say nothing
    assert "KeyboardInterrupt" in error
    assert len(done(store)) == 3


@pytest.mark.parametrize(("deaths", "succeeds"), [(2, True), (3, False)])
def test_a_process_that_is_killed_at_its_start_is_replaced_but_not_for_ever(tmp_path, deaths, succeeds):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        f"with open({str(tmp_path / 'starts')!r}, 'a+') as file:\n"
        "    file.write('x')\n    file.seek(0)\n    n = len(file.read())\n"
        f"if n <= {deaths}:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    running = local._run(deque([cell(nothing)]), tmp_path / "store", 1, 1, [{"PYTHONPATH": paths}])
    if succeeds:
        assert [result.error for result in running] == [None]
    else:
        with pytest.raises(SweepError, match=r"3 processes in a row .* a cell; the last was killed by"):
            list(running)


def test_a_script_without_a_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from unsharp.sweep import Cell, run_cells\n"
        f"run_cells([Cell('test_sweep:nothing')], {str(tmp_path / 'store')!r}, workers=1)\n"
    )
    found = subprocess.run([sys.executable, script], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert "if __name__ == '__main__':" in found.stderr.splitlines()[-1]
    assert found.returncode == 1
