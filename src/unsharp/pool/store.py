"""A pool of networks as files: shards of members, each with its subset, what it says of every sample, its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from unsharp import artifacts, checkpoints, config
from unsharp.artifacts import RUN_FILE, Workspace
from unsharp.errors import UserError, listed

SHARD_FILE, OUTPUTS_FILE = "shard.json", "outputs.safetensors"


@dataclass(frozen=True, eq=False)
class Answers:
    """What each of m networks says of each of n samples.

    Attributes:
        margin: (m, n) float32, log p_y − log(1 − p_y): the logit of the true class less the logsumexp of the others.
        predicted: (m, n) int16, the class with the highest logit.
        labels: (n,) int64, the true classes.
    """

    margin: np.ndarray
    predicted: np.ndarray
    labels: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """(m, n) bool: whether the network is right."""
        return self.predicted == self.labels

    @property
    def confidence(self) -> np.ndarray:
        """(m, n) float32 in [0, 1]: the probability of the true class."""
        return 0.5 * (1 + np.tanh(0.5 * self.margin))


@dataclass(frozen=True, eq=False)
class PoolOutputs:
    """What is known of the members of a pool, a row for each.

    Attributes:
        members: (m,) int64, their numbers, ascending.
        inside: (m, n) bool, whether a training sample was in the member's subset.
        train: Their answers on the n training samples.
        test: Their answers on the test samples, where there are any.
    """

    members: np.ndarray
    inside: np.ndarray
    train: Answers
    test: Answers | None

    def __len__(self) -> int:
        return len(self.members)

    def first(self, m: int) -> PoolOutputs:
        """The same of the first `m` members."""
        return PoolOutputs(self.members[:m], self.inside[:m], _rows(self.train, m), self.test and _rows(self.test, m))


@dataclass(frozen=True)
class Shard:
    """Members that were trained together, and kept in a directory.

    Args:
        path: The directory.
        members: Their numbers.
        failed: Those of them whose training came upon a step that is not finite; they will do so again.
    """

    path: Path
    members: tuple[int, ...]
    failed: tuple[int, ...]


class Pool:
    """The networks of one kind in a directory. Shards are only added, never changed, by whoever and in any order.

    Args:
        path: The directory; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def shards(self) -> list[Shard]:
        """The finished shards, in the order of their names."""
        if not self.path.is_dir():
            return []
        entries = sorted(p for p in self.path.iterdir() if not p.name.startswith("."))
        found = [(p, config.read_json(p / SHARD_FILE)) for p in entries if _is_shard(p)]
        return [Shard(p, tuple(told["members"]), tuple(told["failed"])) for p, told in found]

    def members(self) -> dict[int, Path]:
        """Where the outputs of each member are, by ascending number; one that two shards have counts once."""
        found: dict[int, Path] = {}
        for shard in self.shards():
            for member in shard.members:
                if member not in shard.failed:
                    found.setdefault(member, shard.path)
        return dict(sorted(found.items()))

    def failed(self) -> set[int]:
        """Members that have no outputs because their training failed."""
        return {j for shard in self.shards() for j in shard.failed} - set(self.members())

    def missing(self, wanted: Iterable[int]) -> list[int]:
        """Those of the wanted that are neither there nor known to have failed."""
        known = set(self.members()) | self.failed()
        return [member for member in wanted if member not in known]

    def outputs(self, members: Sequence[int] | None = None) -> PoolOutputs:
        """What members say of all samples.

        Args:
            members: Which; all that are there by default.

        Raises:
            UserError: if there is none, one is missing, or a file is damaged.
        """
        where = self.members()
        wanted = sorted(where if members is None else set(members))
        absent = [member for member in wanted if member not in where]
        if absent or not wanted:
            raise UserError(f"pool {self.path} lacks {listed(absent) or 'any network'}; train them first")
        parts: dict[Path, dict[str, np.ndarray]] = {path: read_outputs(path) for path in {where[j] for j in wanted}}
        rows = [(parts[where[j]], parts[where[j]]["members"].tolist().index(j)) for j in wanted]
        first = rows[0][0]
        n = len(first["train_labels"])
        return PoolOutputs(
            members=np.array(wanted),
            inside=np.unpackbits(np.stack([part["inside"][i] for part, i in rows]), axis=1, count=n).astype(bool),
            train=_answers(rows, "train"),
            test=_answers(rows, "test") if "test_labels" in first else None,
        )

    def weights(self, member: int) -> Path:
        """The checkpoint of a member. Raises: UserError if its weights were not kept."""
        file = weights_file(self.members().get(member, self.path), member)
        if not file.is_file():
            raise UserError(f"pool {self.path} has no weights of network {member}; train it with weights kept")
        return file


def weights_file(shard: Path, member: int) -> Path:
    """Where the checkpoint of a member stands in its shard."""
    return shard / f"member-{member:06d}.safetensors"


def answers(logits: Tensor, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Margin (..., n) float32 and predicted class (..., n) int16 of logits (..., n, K) with true classes (n,)."""
    at = torch.from_numpy(labels).to(logits.device).expand(logits.shape[:-1]).unsqueeze(-1)
    others = logits.scatter(-1, at, -torch.inf).logsumexp(-1, keepdim=True)
    margin = (logits.gather(-1, at) - others).squeeze(-1)
    return margin.float().cpu().numpy(), logits.argmax(-1).to(torch.int16).cpu().numpy()


def write_shard(
    workspace: Workspace,
    members: Sequence[int],
    failed: Sequence[int],
    inside: np.ndarray,
    spoken: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> None:
    """Write what a shard of members says.

    Args:
        workspace: Of the shard.
        members: Their numbers.
        failed: Those that failed.
        inside: (m, n) bool.
        spoken: "train", and "test" where there is one: margin, predicted, labels.
    """
    arrays: dict[str, np.ndarray] = {"members": np.array(members, np.int64), "inside": np.packbits(inside, axis=1)}
    for name, (margin, predicted, labels) in spoken.items():
        arrays |= {f"{name}_margin": margin, f"{name}_predicted": predicted, f"{name}_labels": labels}
    file = workspace.file(OUTPUTS_FILE)
    with artifacts.writing(file), artifacts.atomic(file) as temporary:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary)
    workspace.write_json(SHARD_FILE, {"members": list(members), "failed": list(failed)})


def read_outputs(shard: Path) -> dict[str, np.ndarray]:
    """The arrays that `write_shard` wrote. Raises: UserError if the file is damaged."""
    try:
        return load_file(shard / OUTPUTS_FILE)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{shard / OUTPUTS_FILE} is damaged ({error}); delete {shard} and call again") from None


def read_weights(pool: Pool, member: int) -> dict[str, Tensor]:
    """The state of a member."""
    return checkpoints.load_weights(pool.weights(member))[0]


def _is_shard(path: Path) -> bool:
    return (path / RUN_FILE).is_file() and (path / SHARD_FILE).is_file()


def _answers(rows: Sequence[tuple[Mapping[str, Any], int]], name: str) -> Answers:
    margin = np.stack([part[f"{name}_margin"][i] for part, i in rows])
    predicted = np.stack([part[f"{name}_predicted"][i] for part, i in rows])
    return Answers(margin, predicted, rows[0][0][f"{name}_labels"])


def _rows(found: Answers, m: int) -> Answers:
    return Answers(found.margin[:m], found.predicted[:m], found.labels)
