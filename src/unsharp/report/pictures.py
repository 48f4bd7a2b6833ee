"""Pictures of forgotten samples in a report, which are there only where they were asked for."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from unsharp.errors import UserError
from unsharp.report.groups import Group

PNG = b"\x89PNG\r\n\x1a\n"
TITLES = {"original": "Original", "model": "Unlearned", "reference": "Retrained"}
SMALL = 64
"""Pictures of fewer pixels along a side are shown enlarged, pixel by pixel."""


def galleries(groups: Sequence[Group], n: int, *, show_samples: bool = False) -> list[dict[str, Any]]:
    """The pictures of each run, with what its networks say.

    Args:
        groups: Groups of runs, each run with its "pictures" as `evaluation.pictures` keeps them.
        n: At most so many of a run.
        show_samples: Whether captions name the samples.

    Raises:
        UserError: if a run kept none, or not so many, or what it kept is no picture.
    """
    found = []
    for group in groups:
        for run in group.runs:
            kept = run.get("pictures")
            name = f"{group.title}, seed {run['unlearn']['seed']}"
            if kept is None:
                raise UserError(
                    f"the run of {name} kept no pictures; evaluate its `unlearn` run again with --pictures {n}"
                )
            if len(kept["samples"]) < min(n, kept["n"]):
                raise UserError(
                    f"the run of {name} kept {len(kept['samples'])} pictures; ask for no more, or evaluate its "
                    f"`unlearn` run again with --pictures {n}"
                )
            cards = [_card(kept, sample, show_samples) for sample in kept["samples"][:n]]
            found.append({"title": name, "n": len(cards), "of": kept["n"], "cards": cards})
    return found


def _card(kept: Mapping[str, Any], sample: Mapping[str, Any], show_samples: bool) -> dict[str, Any]:
    data, small = _checked(sample["png"])
    classes, label = kept["classes"], sample["label"]
    return {
        "data": data,
        "small": small,
        "label": classes[label],
        "id": str(sample["id"]) if show_samples else None,
        "answers": [_answer(TITLES[name], classes, label, sample["answers"][name]) for name in kept["networks"]],
    }


def _answer(network: str, classes: Sequence[str], label: int, answer: Mapping[str, Any]) -> dict[str, Any]:
    first, *others = zip(answer["classes"], answer["probabilities"])
    return {
        "network": network,
        "says": classes[first[0]],
        "right": first[0] == label,
        "probability": percent(first[1]),
        "true": percent(answer["true"]),
        "others": "; ".join(f"{classes[c]} {percent(p)}" for c, p in others),
    }


def percent(share: float) -> str:
    """A probability in percent; one that is nearly 0 or 1 is not rounded to it."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    return "> 99.9 %" if 0.999 < share < 1 else f"{100 * share:.1f} %"


def _checked(png: Any) -> tuple[str, bool]:
    """A PNG in base64, after a look at it, and whether it is small."""
    try:
        content = base64.b64decode(png, validate=True)
    except (TypeError, ValueError, binascii.Error):
        content = b""
    if not content.startswith(PNG) or len(content) < 24:
        raise UserError("a picture of these runs is no PNG; evaluate the `unlearn` run again")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    return base64.b64encode(content).decode(), max(width, height) < SMALL
