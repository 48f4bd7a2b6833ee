"""A trained network together with what is known of its making: read from a checkpoint, checked before work starts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from unsharp import checkpoints, config, data, models, runtime
from unsharp.checkpoints import MODEL_FILE
from unsharp.data import DataConfig, Samples, Splits
from unsharp.difficulty import ForgetSet
from unsharp.errors import UserError
from unsharp.evaluation import Outputs, outputs, predict
from unsharp.evaluation.accuracy import accuracy
from unsharp.models import ModelConfig
from unsharp.reference import Recipe
from unsharp.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How a network came to be; a checkpoint carries it in its header.

    Args:
        model: The architecture.
        data: The data it was trained on.
        train: How it was trained; None where nobody knows.
        fingerprint: Of the training samples.
        n_classes: Number of its logits.
        input_shape: Shape of one input.
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig | None = None
    fingerprint: str | None = None
    n_classes: int
    input_shape: tuple[int, ...]

    def build(self) -> nn.Module:
        """The untrained network, from torch's random state."""
        return models.build(self.model, n_classes=self.n_classes, input_shape=self.input_shape)

    @property
    def recipe(self) -> Recipe | None:
        """How to train it again, where that is known."""
        if self.train is None:
            return None
        seen = {name: getattr(self.data, name) for name in ("name", "size", "mean", "std", "augment")}
        made = {"model": self.model, "n_classes": self.n_classes, "input_shape": self.input_shape, "inputs": seen}
        return Recipe(self.build, self.train, config.to_dict(made))


@dataclass(frozen=True)
class Subject:
    """A trained network, its data, and its origin.

    Args:
        model: In evaluation mode, on the device of the data.
        splits: Training samples, and test samples where there are any.
        origin: How it came to be.
        digest: sha256 of its weights.
        path: Where it was read from.
        absent: Hash of the set of all samples that it was made to forget; None where it says of none.
        requests: Hashes of the forget sets of the requests that did it, the first one first.
    """

    model: nn.Module
    splits: Splits
    origin: Origin
    digest: str
    path: Path
    absent: str | None = None
    requests: tuple[str, ...] = ()

    def check_before(self, forget: ForgetSet) -> None:
        """Raise UserError where samples that this network has forgotten would be retained, and so be learnt anew."""
        earlier = None if forget.before is None else forget.before.absent.hash
        if self.absent is not None and self.absent not in (earlier, forget.absent.hash):
            raise UserError(
                f"{self.path} has forgotten samples in {len(self.requests)} earlier request(s), and they must not be "
                "retained now: name them with --forgotten FILE, or with --key FILE if the request was made with a key"
            )

    def outputs_of(
        self,
        model: nn.Module,
        forget: ForgetSet,
        *,
        features: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> Outputs:
        """What `model` says about the retained, the forgotten and the test samples of these data, as `outputs` does."""
        return outputs(model, self.splits.train, self.splits.test, forget, features=features, say=say)

    def beside(self, checkpoint: str | Path) -> Subject:
        """Another network of the same making, such as the original of one that forgot, on the same data and device."""
        device = runtime.device_of(self.model)
        return load_subject(checkpoint, device, data_config=self.origin.data, like=self.origin)


def load_subject(
    checkpoint: str | Path,
    device: torch.device,
    *,
    model: ModelConfig | None = None,
    data_config: DataConfig | None = None,
    train: TrainConfig | None = None,
    like: Origin | None = None,
) -> Subject:
    """Read a checkpoint of this library, or a foreign one with what its header does not say.

    Args:
        checkpoint: A file, or the directory of a run.
        device: Where network and data shall be.
        model: The architecture; needed for a foreign checkpoint.
        data_config: The training data; needed for a foreign checkpoint, otherwise in place of what it names.
        train: How it was trained, where the checkpoint does not know.
        like: How a network of the same making came to be, for a foreign checkpoint.

    Raises:
        UserError: if the checkpoint is missing, damaged or unsafe, does not fit, or too little is known of it.
    """
    weights, metadata = checkpoints.load_weights(checkpoint)
    known = metadata.get("origin")
    origin = config.from_dict(Origin, known, "checkpoint") if known else like
    if origin is None and (model is None or data_config is None):
        lacking = "--arch" if model is None else "--data"
        raise UserError(f"checkpoint {checkpoint} does not say how it was made; name it with {lacking}")
    data_config = data_config or (origin.data if origin else DataConfig())
    splits = data.load(data_config, device)
    origin = Origin(
        model=model or (origin.model if origin else ModelConfig()),
        data=data_config,
        train=train or (origin.train if origin else None),
        fingerprint=origin.fingerprint if origin else splits.train.fingerprint,
        n_classes=splits.train.n_classes,
        input_shape=splits.train.input_shape,
    )
    if origin.fingerprint != splits.train.fingerprint:
        raise UserError(
            f"the data are not those on which {checkpoint} was trained (fingerprint {str(origin.fingerprint)[:12]}, "
            f"now {str(splits.train.fingerprint)[:12]}); give the same --data, --data-dir, --classes and --per-class"
        )
    network = origin.build()
    checkpoints.load_into(network, weights, f"checkpoint {checkpoint}")
    _check_inputs(network, origin)
    path = Path(checkpoint)
    file = path / MODEL_FILE if path.is_dir() else path
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    asked = [*metadata.get("before", ()), *([metadata["forget"]] if "forget" in metadata else ())]
    absent = metadata.get("absent", metadata.get("forget"))
    return Subject(network.to(device).eval(), splits, origin, digest, path, absent, tuple(asked))


def _check_inputs(network: nn.Module, origin: Origin) -> None:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            network.eval()(torch.zeros(1, *origin.input_shape))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the network {origin.model.arch} does not take inputs of shape {origin.input_shape} ({reason}); "
            "give the --size at which it was trained, or data with as many channels"
        ) from None


def accuracies(found: Outputs) -> dict[str, float | None]:
    """Accuracies (0–100) on retain, forget and test."""
    return {
        "retain_accuracy": accuracy(found.retain),
        "forget_accuracy": accuracy(found.forget),
        "test_accuracy": None if found.test is None else accuracy(found.test),
    }


def chance(labels: np.ndarray, n_classes: int) -> float:
    """The accuracy (0–100) up to which a network may be guessing: the best constant guess, and three deviations."""
    guess = max(1 / n_classes, float(np.bincount(labels).max()) / len(labels))
    return 100 * min(1.0, guess + 3 * (guess * (1 - guess) / len(labels)) ** 0.5)


def check_reference(original: Outputs, reference: Outputs, points: float = 20.0) -> list[str]:
    """Warnings where the retrained network cannot stand for the original's training.

    Args:
        original: Outputs of the network before unlearning.
        reference: Outputs of the retrained one.
        points: By how much their accuracies on retain may differ.
    """
    ours, theirs = accuracy(original.retain), accuracy(reference.retain)
    if abs(ours - theirs) <= points:
        return []
    return [
        f"the retrained network is right on {theirs:.1f} % of the retained samples, the original on {ours:.1f} %: it "
        "was probably trained otherwise, so gaps and ToW mean little; mend the training configuration"
    ]


def check_trained(found: Outputs) -> list[str]:
    """Look at a network before work on it starts.

    Args:
        found: Its outputs.

    Returns:
        Warnings, each a sentence.

    Raises:
        UserError: if it does no better on its training samples than a guess, so that the work would be in vain.
    """
    seen, retain = accuracies(found), accuracy(found.retain)
    at_chance = chance(found.retain.labels, found.retain.logits.shape[1])
    if retain <= at_chance < 100:
        raise UserError(
            f"the network is right on {retain:.1f} % of its training samples, no better than a guess; probably its "
            "preprocessing or the order of its classes differs: give --mean, --std, --size or --class-order"
        )
    warnings = []
    if found.test is None:
        warnings.append("there is no test set: test accuracy, ToW and membership inference are left out")
    elif seen["test_accuracy"] is not None and retain <= seen["test_accuracy"]:
        warnings.append(
            f"accuracy on the training samples ({retain:.1f} %) is no better than on the test samples "
            f"({seen['test_accuracy']:.1f} %): it was trained on other data, or learnt nothing that sets these apart"
        )
    return warnings


def pick(indices: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the indices, evenly spread, for figures that are only watched."""
    return indices[np.linspace(0, len(indices) - 1, min(most, len(indices))).astype(np.int64)]


def watch(samples: Samples, forget: ForgetSet, most: int = 512) -> Callable[[nn.Module], dict[str, float]]:
    """A function from a network to its accuracies on some retained and forgotten samples, for curves.

    Args:
        samples: The training data.
        forget: The forget set.
        most: How many samples of each it looks at.
    """
    parts = {
        "retain_accuracy": pick(forget.retain_indices(len(samples)), most),
        "forget_accuracy": pick(forget.indices, most),
    }

    def look(model: nn.Module) -> dict[str, float]:
        return {name: accuracy(predict(model, samples, indices)) for name, indices in parts.items()}

    return look
