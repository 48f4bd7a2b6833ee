"""One network judged whole: its own figures, the retrained model's, the original's, and the gaps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from unsharp.data.samples import Samples
from unsharp.difficulty import ForgetSet
from unsharp.errors import UserError
from unsharp.evaluation.features import outputs_with_features
from unsharp.evaluation.metrics import gap, measure, reasons
from unsharp.evaluation.predictions import Evidence, Outputs, predict

if TYPE_CHECKING:
    from unsharp.training import Record

COST = ("seconds", "passes", "peak_memory_bytes")


@dataclass(frozen=True)
class Judged:
    """A network as the suite looks at it.

    Args:
        outputs: What it says about retain, forget and test.
        record: What making it took, where that is known: its record, or figures that were written down.
    """

    outputs: Outputs
    record: Record | Mapping[str, Any] | None = None

    @property
    def cost(self) -> dict[str, Any]:
        """seconds, passes and peak_memory_bytes, each None where it is not known."""
        if isinstance(self.record, Mapping):
            return {name: self.record.get(name) for name in COST}
        return {name: getattr(self.record, name, None) for name in COST}


def outputs(
    model: nn.Module,
    train_set: Samples,
    test_set: Samples | None,
    forget: ForgetSet,
    *,
    features: bool = False,
    say: Callable[[str], None] | None = None,
) -> Outputs:
    """What the network says about the retained, the forgotten and the test samples.

    Args:
        model: The network.
        train_set: The training samples.
        test_set: The test samples, or None.
        forget: The forget set among the training samples.
        features: Whether to collect the penultimate features in the same passes. Where they cannot be found, there are
            none.
        say: Told, in a line, why there are none.
    """
    if features:
        try:
            return outputs_with_features(model, train_set, test_set, forget)
        except UserError as error:
            # What is wrong with more than the features is found again here.
            found = outputs(model, train_set, test_set, forget)
            if say is not None:
                say(f"warning: the metrics on features are left out: {error}")
            return found
    retained = forget.retain_indices(len(train_set))
    test = None if test_set is None else predict(model, test_set, np.arange(len(test_set)))
    return Outputs(predict(model, train_set, retained), predict(model, train_set, forget.indices), test)


def judge(
    model: Judged,
    *,
    reference: Judged | None = None,
    original: Judged | None = None,
    attacks: Sequence[str] | None = None,
    seed: int = 0,
    why_no_reference: str | None = None,
) -> dict[str, Any]:
    """All metrics of a network that forgot, beside those of the retrained reference and of the original.

    Args:
        model: The network that forgot.
        reference: The network retrained without the forget set, on the same samples.
        original: The network before.
        attacks: Membership attacks, all by default.
        seed: Seed of what the metrics draw.
        why_no_reference: The reason, where there is none.

    Returns:
        The values of `measure` with seconds, passes and peak_memory_bytes; "gap": the same keys minus the retrained
        model's, or None; "reference" and "original": their own values, or None; "reasons": why a value is None;
        "seed"; "n": the numbers of samples.
    """
    beside = None if reference is None else reference.outputs

    def measured(judged: Judged) -> dict[str, Any]:
        return measure(Evidence(judged.outputs, beside, seed), attacks) | judged.cost

    values = measured(model)
    compared = None if reference is None else measured(reference)
    why = reasons(Evidence(model.outputs, beside, seed), attacks)
    if compared is None:
        why["gap"] = why_no_reference or "there is no retrained model to compare with"
    test = model.outputs.test
    return values | {
        "gap": gap(values, compared),
        "reference": compared,
        "original": None if original is None else measured(original),
        "reasons": why,
        "seed": seed,
        "n": {
            "retain": len(model.outputs.retain),
            "forget": len(model.outputs.forget),
            "test": None if test is None else len(test),
        },
    }
