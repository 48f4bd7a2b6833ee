"""Accuracy on corrupted inputs: of the network that forgot, beside the retrained one and the original.

All networks see the very same corrupted images, so their difference on a sample is one of the networks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unsharp import stats
from unsharp.artifacts import Workspace
from unsharp.config import to_dict
from unsharp.data.corruption import CORRUPTIONS, SEVERITIES, Corruption
from unsharp.data.samples import Batch, Samples, channels_last
from unsharp.data.streams import evaluation_batches
from unsharp.errors import UserError, unknown
from unsharp.evaluation.landscape import work_identity
from unsharp.evaluation.mean_loss import check_whole, subsample
from unsharp.evaluation.points import Sets
from unsharp.models.modes import evaluating
from unsharp.progress import SILENT, Progress
from unsharp.surroundings.findings import NETWORKS, RETRAINED, UNLEARNED
from unsharp.surroundings.keep import Kept

CLEAN = "clean"


class Corrupted(Samples):
    """Samples whose images are corrupted as they are read, a batch at a time; labels and all else are as before.

    Args:
        samples: Images of 1 or 3 channels, whose inputs are (pixels on the scale [0, 1] − mean) / std.
        how: What is done to them.
        mean: Per channel, one value or one each; None takes that of the samples, or 0 where they do not say.
        std: Likewise, above 0; or 1.

    Raises:
        UserError: if the inputs are no images, or, when they are read, lie outside the scale.
    """

    def __init__(
        self,
        samples: Samples,
        how: Corruption,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if len(samples.input_shape) != 3 or samples.input_shape[0] not in (1, 3):
            raise UserError(
                f"corruptions are those of images of 1 or 3 channels, (C, H, W); these inputs have shape "
                f"{tuple(samples.input_shape)}"
            )
        super().__init__(
            samples.labels, samples.class_names, samples.ids, samples.source_positions, samples.source_size
        )
        self.samples, self.how = samples, how
        self.input_shape = samples.input_shape
        self.mean = tuple(mean if mean is not None else samples.treatment.get("mean", (0.0,)))
        self.std = tuple(std if std is not None else samples.treatment.get("std", (1.0,)))
        self.treatment = dict(samples.treatment)
        self.fingerprint = None

    def batches(self, order: np.ndarray, sizes: Sequence[int], *, draws: np.ndarray | None) -> Iterator[Batch]:
        for batch in self.samples.batches(order, sizes, draws=draws):
            numbers = torch.from_numpy(self.source_positions[batch.indices.numpy()]).to(batch.inputs.device)
            yield Batch(self._corrupted(batch.inputs, numbers), batch.labels, batch.indices)

    def _corrupted(self, inputs: Tensor, numbers: Tensor) -> Tensor:
        mean, std = (inputs.new_tensor(v).reshape(1, -1, 1, 1) for v in (self.mean, self.std))
        pixels = inputs * std + mean
        low, high = float(pixels.min()), float(pixels.max())
        if not -1e-3 <= low <= high <= 1 + 1e-3:
            raise UserError(
                f"inputs lie in [{low:.3g}, {high:.3g}] where images lie in [0, 1]; give mean and std with which they "
                "were normalised"
            )
        images = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        found = self.how(images, numbers).permute(0, 3, 1, 2).to(inputs.dtype) / 255
        return channels_last((found - mean) / std)

    def subset(self, indices: Any) -> Corrupted:
        return Corrupted(self.samples.subset(indices), self.how, mean=self.mean, std=self.std)


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """Which corruptions, and on which samples.

    Args:
        corruptions: Names of `CORRUPTIONS`; all if left out.
        severities: Of 1 to 5.
        on: Sets of samples (retain, forget, test); all that there are if left out.
        n_samples: At most so many samples of each set, drawn by the seed; 0 takes all.
        batch_size: Samples that go through together, at least 1.
        seed: Seed of samples and noise.

    Raises:
        UserError: if a value is not as above.
    """

    corruptions: tuple[str, ...] | None = None
    severities: tuple[int, ...] = (1, 3, 5)
    on: tuple[str, ...] | None = None
    n_samples: int = 1000
    batch_size: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("corruptions", "severities", "on"):
            given = getattr(self, name)
            if given is not None and (not given or len(set(given)) < len(given)):
                raise UserError(f"{name} must name at least one, and none twice, got {' '.join(map(str, given))!r}")
        for name in self.corruptions or ():
            if name not in CORRUPTIONS:
                raise unknown("corruption", name, CORRUPTIONS)
        for severity in self.severities:
            if severity not in SEVERITIES:
                raise UserError(f"severities must be of 1 to 5, got {severity}")
        for name in self.on or ():
            if name not in ("retain", "forget", "test"):
                raise unknown("set", name, ("retain", "forget", "test"))
        check_whole("n_samples", self.n_samples, 0)
        check_whole("batch_size", self.batch_size)
        check_whole("seed", self.seed, 0)

    @property
    def wanted(self) -> list[Corruption]:
        """Every corruption at every severity."""
        names = CORRUPTIONS if self.corruptions is None else self.corruptions
        return [Corruption(name, severity, self.seed) for name in names for severity in sorted(self.severities)]

    def taken(self, sets: Sets) -> dict[str, tuple[Samples, np.ndarray]]:
        """The sets and positions that are looked at. Raises: UserError if a set is missing, empty, or no images."""
        for name in self.on or ():
            if name not in sets:
                raise UserError(f"on names {name!r}, and there are no such samples; there are {', '.join(sets)}")
        chosen = {name: sets[name] for name in sets if self.on is None or name in self.on}
        for name, (samples, indices) in chosen.items():
            if not len(indices):
                raise UserError(f"the {name} set is empty; name others with on")
            Corrupted(samples, self.wanted[0])
        return {
            name: (samples, subsample(indices, self.n_samples or None, self.seed))
            for name, (samples, indices) in chosen.items()
        }

    def images(self, sets: Sets) -> int:
        """Corrupted and clean images that each network sees."""
        return (len(self.wanted) + 1) * sum(len(indices) for _, indices in self.taken(sets).values())

    def measure(
        self,
        models: Mapping[str, nn.Module],
        sets: Sets,
        *,
        workspace: Workspace | None = None,
        progress: Progress = SILENT,
    ) -> dict[str, Any]:
        """Accuracies under every corruption; the networks are left as they are.

        Args:
            models: "unlearned" and, where there are any, "original" and "retrained"; on the device of the samples.
            sets: By name ("retain", "forget", "test") samples and positions.
            workspace: Where what is finished is kept, from which a killed run goes on; None keeps none.
            progress: Told of each corruption.

        Returns:
            By set: "clean", accuracy (0–100) by network; "corrupted", by corruption, severity and network; "mean", of
            all corruptions and severities, by network; "drop", clean − mean; "gap", where there is a retrained network:
            mean of the unlearned minus that of the retrained, with its 95 % interval over samples, and "drop_gap", the
            same of the drop. And "n" and "settings".

        Raises:
            UserError: if a set is missing or holds no images, a network is of another name, or says what is not finite.
        """
        if odd := [name for name in models if name not in NETWORKS]:
            raise unknown("network", odd[0], NETWORKS)
        if UNLEARNED not in models:
            raise UserError("models lacks 'unlearned', the network that is judged")
        taken = self.taken(sets)
        kept = Kept(workspace, work_identity("robustness", self, models, sets))
        progress.start("corruptions", (len(self.wanted) + 1) * len(taken))
        found: dict[str, Any] = {"networks": list(models), "settings": to_dict(self), "sets": {}}
        for on, (samples, indices) in taken.items():
            right: dict[str, dict[str, np.ndarray]] = {}
            for how in (None, *self.wanted):
                name = CLEAN if how is None else f"{how.name}:{how.severity}"
                seen = samples if how is None else Corrupted(samples, how)
                said = kept.get(f"{on}.{name}", lambda s=seen, i=indices: correct(models, s, i, self.batch_size))
                right[name] = {network: np.array(said[network], bool) for network in models}
                progress.advance(note=f"{on}: {name}")
            found["sets"][on] = _figures(right, self.wanted) | {"n": len(indices), "whole": len(sets[on][1])}
        progress.finish()
        return found


def correct(
    models: Mapping[str, nn.Module], samples: Samples, indices: np.ndarray, batch_size: int = 250
) -> dict[str, list[int]]:
    """For each network and sample 1 where it is right, else 0; each batch is read once for all networks.

    Raises:
        UserError: if a network says what is not finite.
    """
    right: dict[str, list[Tensor]] = {name: [] for name in models}
    with contextlib.ExitStack() as stack, torch.no_grad():
        for model in models.values():
            stack.enter_context(evaluating(model))
        for batch in evaluation_batches(samples, indices, batch_size):
            for name, model in models.items():
                logits = model(batch.inputs)
                fine = torch.isfinite(logits).all(1)
                right[name].append(torch.where(fine, (logits.argmax(1) == batch.labels).long(), -1))
    found = {name: torch.cat(parts).tolist() for name, parts in right.items()}
    for name, values in found.items():
        if -1 in values:
            raise UserError(
                f"logits of {values.count(-1)} of {len(values)} samples of the {name} network are not finite"
            )
    return found


def _figures(right: Mapping[str, Mapping[str, np.ndarray]], wanted: Sequence[Corruption]) -> dict[str, Any]:
    """Accuracies, and differences with their intervals, of which networks are right on which samples."""
    clean = right[CLEAN]
    share = {
        network: 100.0 * np.mean([right[f"{h.name}:{h.severity}"][network] for h in wanted], axis=0)
        for network in clean
    }
    lost = {network: 100.0 * clean[network] - share[network] for network in clean}
    corrupted: dict[str, Any] = {}
    for how in wanted:
        row = {network: 100.0 * float(v.mean()) for network, v in right[f"{how.name}:{how.severity}"].items()}
        corrupted.setdefault(how.name, {})[str(how.severity)] = row
    found: dict[str, Any] = {
        "clean": {network: 100.0 * float(v.mean()) for network, v in clean.items()},
        "corrupted": corrupted,
        "mean": {network: float(v.mean()) for network, v in share.items()},
        "drop": {network: float(v.mean()) for network, v in lost.items()},
        "gap": None,
        "drop_gap": None,
    }
    if RETRAINED in clean:
        for name, values in (("gap", share), ("drop_gap", lost)):
            apart = stats.paired_difference(values[UNLEARNED].tolist(), values[RETRAINED].tolist())
            found[name] = to_dict(apart) | {"covers": "95 % t interval over samples: covers other samples, not seeds"}
    return found
