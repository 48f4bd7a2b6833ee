"""Encoded texts as samples of the engine: batches padded to their longest text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unsharp.data.samples import Batch, Samples, checked_indices, spans
from unsharp.language.texts import Encoded

PARTS = ("retain", "forget")
"""The classes of texts: what is asked of the model about them."""
NOT_ASKED = -100
"""Label of a token that is not asked for: of the prompt, and of padding."""


@dataclass(frozen=True, eq=False)
class TextBatch(Batch):
    """A batch of texts.

    Args:
        inputs: (B, T) int64 tokens, padded.
        labels: (B, T) int64, the same tokens where they are of the answer, `NOT_ASKED` elsewhere.
        indices: (B,) int64 on the host, positions in the samples.
        mask: (B, T) int64, 1 for tokens of the text, 0 for padding.
    """

    mask: Tensor


class TextSamples(Samples):
    """Texts in tokens, each to be forgotten or retained.

    Args:
        texts: The texts.
        forgotten: (n,) bool, whether each is to be forgotten.
        pad: Token that fills batches up; any that the model knows, since nothing looks at it.
        side: On which side batches are filled up.
        device: Where the batches appear.
        **source: ids, source_positions, source_size of `Samples`.
    """

    def __init__(
        self,
        texts: Sequence[Encoded],
        forgotten: Any,
        *,
        pad: int = 0,
        side: Literal["right", "left"] = "right",
        device: torch.device | str = "cpu",
        **source: Any,
    ) -> None:
        super().__init__(np.asarray(forgotten, bool).astype(np.int64), PARTS, **source)
        self.texts = list(texts)
        self.pad = pad
        self.side: Literal["right", "left"] = side
        self.device = torch.device(device)
        self.input_shape = (max(len(text.tokens) for text in self.texts),)

    @property
    def forget(self) -> np.ndarray:
        """(k,) int64 positions of the texts to forget."""
        return np.flatnonzero(self.labels == PARTS.index("forget"))

    @property
    def retain(self) -> np.ndarray:
        """The other positions."""
        return np.flatnonzero(self.labels == PARTS.index("retain"))

    @cached_property
    def fingerprint(self) -> str | None:  # type: ignore[override]
        """Sha256 over tokens, what of them is the prompt, and what is to be forgotten."""
        content = (np.array([text.n_prompt, *text.tokens], np.int64).tobytes() for text in self.texts)
        return self._digest("texts", [len(text.tokens) for text in self.texts], content)

    def batches(self, order: np.ndarray, sizes: Sequence[int], *, draws: np.ndarray | None) -> Iterator[TextBatch]:
        """`Samples.batches`; nothing is drawn but the order."""
        for span in spans(sizes):
            yield self.batch(order[span])

    def batch(self, indices: np.ndarray | Tensor) -> TextBatch:
        """The texts at these positions as one batch, as wide as its longest text."""
        at = torch.as_tensor(np.asarray(indices), dtype=torch.int64)
        chosen = [self.texts[i] for i in at.tolist()]
        shape = (len(chosen), max(len(text.tokens) for text in chosen))
        inputs = torch.full(shape, self.pad, dtype=torch.int64)
        labels, mask = torch.full(shape, NOT_ASKED, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        for row, text in enumerate(chosen):
            n = len(text.tokens)
            first = 0 if self.side == "right" else shape[1] - n
            inputs[row, first : first + n] = torch.tensor(text.tokens)
            mask[row, first : first + n] = 1
            labels[row, first + text.n_prompt : first + n] = torch.tensor(text.tokens[text.n_prompt :])
        moved = [t.to(self.device, non_blocking=True) for t in (inputs, labels, mask)]
        return TextBatch(moved[0], moved[1], at, moved[2])

    def subset(self, indices: Any) -> TextSamples:
        chosen = checked_indices(indices, len(self))
        part = self._part(chosen)
        forgotten = part.pop("labels") == PARTS.index("forget")
        part.pop("class_names")
        texts = [self.texts[i] for i in chosen]
        return TextSamples(texts, forgotten, pad=self.pad, side=self.side, device=self.device, **part)
