"""How likely a causal model finds the answers of a batch: token by token, and per sample."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from unsharp.data.streams import evaluation_batches
from unsharp.language.samples import NOT_ASKED, TextBatch, TextSamples
from unsharp.models.modes import evaluating

Reduction = Literal["sum", "mean"]


def forward(model: nn.Module, batch: TextBatch, **more: Any) -> Any:
    """What the model gives for a batch, with positions counted from the first token of each text."""
    arguments: dict[str, Any] = {"input_ids": batch.inputs, "attention_mask": batch.mask, "use_cache": False, **more}
    if _takes_positions(model):
        arguments["position_ids"] = (batch.mask.cumsum(1) - 1).clamp(min=0)
    return model(**arguments)


def _takes_positions(model: nn.Module) -> bool:
    inner: Any = model
    if hasattr(model, "get_base_model"):  # beneath adapters
        inner = inner.get_base_model()
    return "position_ids" in inspect.signature(inner.forward).parameters


def next_tokens(model: nn.Module, batch: TextBatch) -> tuple[Tensor, Tensor]:
    """The logits (B, T−1, V), in at least float32, and the tokens (B, T−1) that they are to predict, or `NOT_ASKED`."""
    logits = forward(model, batch).logits[:, :-1]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), batch.labels[:, 1:]


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p of each token (B, T−1); 0 where none is asked for."""
    flat = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NOT_ASKED, reduction="none")
    return flat.view(labels.shape)


def reduced(losses: Tensor, labels: Tensor, reduction: Reduction) -> Tensor:
    """The sum or the mean (B,) over the asked tokens of each sample."""
    total = losses.sum(1)
    return total if reduction == "sum" else total / (labels != NOT_ASKED).sum(1)


def answer_losses(model: nn.Module, batch: TextBatch, reduction: Reduction) -> Tensor:
    """−log p(answer | prompt) of each sample (B,), summed or averaged over its own tokens."""
    logits, labels = next_tokens(model, batch)
    return reduced(token_losses(logits, labels), labels, reduction)


@torch.no_grad()
def reference_losses(
    model: nn.Module, samples: TextSamples, indices: np.ndarray, reduction: Reduction, *, batch_size: int
) -> Tensor:
    """`answer_losses` in evaluation mode at `indices`, in a table (n,) of all positions; NaN elsewhere."""
    found = torch.full((len(samples),), torch.nan, device=samples.device)
    with evaluating(model):
        for batch in evaluation_batches(samples, indices, batch_size):
            assert isinstance(batch, TextBatch)
            losses = answer_losses(model, batch, reduction)
            found = found.to(losses.dtype)
            found[batch.indices.to(found.device)] = losses
    return found
