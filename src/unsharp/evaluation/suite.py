"""One network judged whole: its own figures, the retrained model's, the original's, and the gaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from unsharp.data.samples import Samples
from unsharp.difficulty import ForgetSet
from unsharp.evaluation.metrics import gap, measure, reasons
from unsharp.evaluation.predictions import Evidence, Outputs, predict

if TYPE_CHECKING:
    from unsharp.training import Record


@dataclass(frozen=True)
class Judged:
    """A network as the suite looks at it.

    Args:
        outputs: What it says about retain, forget and test.
        record: What making it took, where that is known.
    """

    outputs: Outputs
    record: Record | None = None

    @property
    def cost(self) -> dict[str, Any]:
        """seconds, passes and peak_memory_bytes, each None where it is not known."""
        return {name: getattr(self.record, name, None) for name in ("seconds", "passes", "peak_memory_bytes")}


def outputs(model: nn.Module, train_set: Samples, test_set: Samples | None, forget: ForgetSet) -> Outputs:
    """What the network says about the retained, the forgotten and the test samples."""
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
