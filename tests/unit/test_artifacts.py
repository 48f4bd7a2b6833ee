"""Run directories and checkpoints: whole or not at all, one process at a time, weights as they were."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from unsharp import artifacts
from unsharp.artifacts import Workspace, atomic, open_run, perform
from unsharp.checkpoints import load_into, load_weights, save_model
from unsharp.errors import UserError


def hidden(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if p.name.startswith("."))


def test_atomic_writes_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with contextlib.suppress(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "new"
    assert hidden(tmp_path) == []
    assert path.stat().st_mode & 0o777 == 0o644


def test_json_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        artifacts.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_perform_reuses_refuses_and_replaces(tmp_path: Path) -> None:
    made: list[int] = []

    def work(workspace: Workspace) -> None:
        assert not (tmp_path / "run").exists() or made
        made.append(1)
        workspace.write_json("result.json", {"n": len(made)})

    first = perform(tmp_path / "run", "train", {"a": 1}, work)
    assert not first.reused
    assert perform(tmp_path / "run", "train", {"a": 1}, work).reused
    for stage, settings in (("train", {"a": 2}), ("mask", {"a": 1})):
        with pytest.raises(UserError, match="another run"):
            perform(tmp_path / "run", stage, settings, work)
    assert len(made) == 1
    perform(tmp_path / "run", "train", {"a": 2}, work, force=True)
    assert open_run(tmp_path / "run").json("result.json") == {"n": 2}
    assert hidden(tmp_path) == []
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"run.json", "result.json"}


def test_a_failure_keeps_the_old_run_and_the_state(tmp_path: Path) -> None:
    perform(tmp_path / "run", "train", {"a": 1}, lambda w: w.write_json("result.json", 1))

    def fails(workspace: Workspace) -> None:
        (workspace.path / ".result.json.cut").write_text("half")  # as a kill in the middle of a write leaves it
        workspace.save_state({"at": torch.tensor(3)})
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        perform(tmp_path / "run", "train", {"a": 2}, fails, force=True)
    assert open_run(tmp_path / "run").json("result.json") == 1
    assert hidden(tmp_path) == [".run.partial"]
    seen = []

    def goes_on(workspace: Workspace) -> None:
        state = workspace.load_state(torch.device("cpu"))
        seen.append(None if state is None else int(state["at"]))
        workspace.write_json("result.json", 2)

    artifacts.remove_run(open_run(tmp_path / "run"))
    run = perform(tmp_path / "run", "train", {"a": 2}, goes_on)
    assert seen == [3]
    assert {p.name for p in run.path.iterdir()} == {"run.json", "result.json"}
    assert hidden(tmp_path) == []


def test_a_mistake_leaves_nothing_unless_work_was_done(tmp_path: Path) -> None:
    def refuses(workspace: Workspace) -> None:
        workspace.write_json("early.json", 1)
        raise UserError("no")

    def refuses_late(workspace: Workspace) -> None:
        workspace.save_state({"a": 1})
        raise UserError("no")

    with pytest.raises(UserError):
        perform(tmp_path / "run", "train", {}, refuses)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError):
        perform(tmp_path / "run", "train", {}, refuses_late)
    assert hidden(tmp_path) == [".run.partial"]


def test_a_swap_that_was_cut_in_two_is_undone(tmp_path: Path) -> None:
    perform(tmp_path / "run", "train", {}, lambda w: w.write_json("result.json", 1))
    (tmp_path / "run").rename(tmp_path / ".run.old")
    assert perform(tmp_path / "run", "train", {}, lambda w: None).reused
    assert hidden(tmp_path) == []


def test_a_lock_refuses_or_waits(tmp_path: Path) -> None:
    partial = tmp_path / ".run.partial"
    partial.mkdir()
    with open(partial / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is at work on run"):
            perform(tmp_path / "run", "train", {}, lambda w: None)
        done: list[str] = []
        waiting = threading.Thread(
            target=lambda: done.append(str(perform(tmp_path / "run", "train", {}, lambda w: None, wait=True).path))
        )
        waiting.start()
        waiting.join(0.2)
        assert done == []
    waiting.join(20)
    assert done == [str(tmp_path / "run")]


def test_what_waited_takes_the_others_result(tmp_path: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow(workspace: Workspace) -> None:
        entered.set()
        leave.wait(20)
        workspace.write_json("result.json", 1)

    runs = []
    first = threading.Thread(target=lambda: runs.append(perform(tmp_path / "run", "train", {}, slow)))
    first.start()
    entered.wait(20)
    second = threading.Thread(
        target=lambda: runs.append(perform(tmp_path / "run", "train", {}, lambda w: runs.append("twice"), wait=True))
    )
    second.start()
    second.join(0.2)
    leave.set()
    first.join(20)
    second.join(20)
    assert sorted(run.reused for run in runs) == [False, True]
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_errors_of_the_system_are_named(number: int, tmp_path: Path) -> None:
    def wrapped() -> None:
        try:
            raise OSError(number, "of the system")
        finally:
            raise RuntimeError("of a library")

    def plain() -> None:
        raise OSError(number, "of the system")

    message = "full" if number == errno.ENOSPC else "cannot be written"
    for failing in (plain, wrapped):
        with pytest.raises(UserError, match=message), artifacts.writing(tmp_path / "x"):
            failing()
    with pytest.raises(ZeroDivisionError), artifacts.writing(tmp_path / "x"):
        raise ZeroDivisionError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, 5, bias=False), nn.Linear(3, 5)
        self.out.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("whole", torch.arange(6.0).reshape(2, 3))
        self.register_buffer("turned", self.whole.T)


def test_weights_come_back_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = Tied(), Tied()
    model.norm(torch.randn(4, 5))
    save_model(tmp_path / "m.safetensors", model, {"origin": {"a": 1}})
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert len({"embed.weight", "out.weight"} & set(file.keys())) == 1
    weights, metadata = load_weights(tmp_path / "m.safetensors")
    load_into(other, weights, "it")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
        assert tensor.dtype == other.state_dict()[name].dtype
    assert other.out.weight is other.embed.weight
    assert metadata == {"origin": {"a": 1}}


def test_prefixes_and_nesting_are_taken_off_foreign_files(tmp_path: Path) -> None:
    weights = nn.Linear(2, 3).state_dict()
    layouts = {
        "a.pt": weights,
        "b.pt": {"state_dict": {f"module.{k}": v for k, v in weights.items()}, "epoch": 3},
        "c.pt": {"model": {"state_dict": {f"_orig_mod.module.{k}": v for k, v in weights.items()}}},
    }
    for name, content in layouts.items():
        torch.save(content, tmp_path / name)
    save_file({f"module.{k}": v for k, v in weights.items()}, tmp_path / "d.safetensors")
    for name in (*layouts, "d.safetensors"):
        found, metadata = load_weights(tmp_path / name)
        assert metadata == {}
        assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in weights.items()}
    mixed = {"module.weight": torch.ones(1), "weight": torch.zeros(1)}
    torch.save(mixed, tmp_path / "e.pt")
    assert set(load_weights(tmp_path / "e.pt")[0]) == set(mixed)


def test_keys_and_shapes_that_differ_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = json.dumps({k: v.tolist() for k, v in model.state_dict().items()})
    weights = dict(nn.Linear(2, 4).state_dict())
    given = {"0.weight": weights["weight"], "0.bias": torch.zeros(3), "head.bias": torch.zeros(1)}
    with pytest.raises(UserError) as error:
        load_into(model, given, "file x")
    missing, extra = "2 keys are missing (1.bias, 1.weight)", "1 keys are unknown (head.bias)"
    for text in ("file x", missing, extra, "0.weight: file (4, 2), network (3, 2)"):
        assert text in str(error.value)
    assert json.dumps({k: v.tolist() for k, v in model.state_dict().items()}) == before
