"""The mean loss of a language model over the answers of fixed texts, as a function of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from unsharp.data.streams import evaluation_batches
from unsharp.evaluation.mean_loss import Batches, MeanLoss
from unsharp.language.likelihood import next_tokens, reduced, token_losses
from unsharp.language.samples import TextBatch, TextSamples


class TextLoss(MeanLoss):
    """The mean over texts of the mean loss of an answer's tokens; see `MeanLoss`.

    Args:
        model: A causal model of transformers.
        samples: The texts.
        indices: Positions in `samples`, at least one.
        batch_size: Texts that go through together, at least 1.
    """

    def __init__(self, model: nn.Module, samples: TextSamples, indices: np.ndarray, *, batch_size: int = 256) -> None:
        super().__init__(model, samples, indices, loss=_answer_loss, batch_size=batch_size)
        self.batches = _TextBatches(samples, indices, batch_size, self.params[0].dtype)

    def _logits(self, inputs: Any) -> Tensor:
        return next_tokens(self.model, inputs)[0]


class _TextBatches(Batches):
    """Batches whole in the place of inputs, since a model wants to know what is padding."""

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for batch in evaluation_batches(self._samples, self._order, self._sizes[0]):
            assert isinstance(batch, TextBatch)
            yield batch, batch.labels[:, 1:]


def _answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return reduced(token_losses(logits, labels), labels, "mean")
