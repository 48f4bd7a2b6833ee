"""What a language model still says of texts: TOFU's metrics, memorization, ROUGE-L, and membership scores.

Everything but ROUGE-L and the generated answers follows from one pass per text.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from unsharp.data.streams import evaluation_batches
from unsharp.errors import NonFiniteError, UserError
from unsharp.language.likelihood import next_tokens
from unsharp.language.samples import NOT_ASKED, TextBatch, TextSamples
from unsharp.models.modes import evaluating

LOWEST = 0.2
"""Share of an answer's tokens that min-k and min-k++ look at."""


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What a model finds of the n tokens of an answer, each after all before it.

    Args:
        log_p: (n,) log-probability of each token.
        mean: (n,) mean of the log-probabilities of all tokens there, under the model itself.
        deviation: (n,) their standard deviation.
        first: (n,) whether the token is the likeliest of all.
    """

    log_p: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    first: np.ndarray


@torch.no_grad()
def score(model: nn.Module, samples: TextSamples, *, batch_size: int = 8) -> list[TokenScores]:
    """The scores of each answer, in evaluation mode.

    Source: log-probabilities as for any causal model; mean and deviation as min-k++ (Zhang et al., ICLR 2025) has them.

    Raises:
        NonFiniteError: if a log-probability is NaN; that of an impossible token is −inf.
    """
    found: list[TokenScores] = []
    with evaluating(model):
        for batch in evaluation_batches(samples, np.arange(len(samples)), batch_size):
            assert isinstance(batch, TextBatch)
            logits, labels = next_tokens(model, batch)
            for row, asked in zip(logits, labels):
                found.append(_scores(row[asked != NOT_ASKED], asked[asked != NOT_ASKED]))
    return found


def _scores(logits: torch.Tensor, tokens: torch.Tensor) -> TokenScores:
    log_p = logits.double().log_softmax(1)
    _check_numbers(log_p)
    p = log_p.exp()
    mean = (p * log_p.nan_to_num(neginf=0.0)).sum(1)
    squares = (p * (log_p.nan_to_num(neginf=0.0) - mean[:, None]).square()).sum(1)
    parts = (log_p.gather(1, tokens[:, None])[:, 0], mean, squares.sqrt(), log_p.argmax(1) == tokens)
    return TokenScores(*(part.cpu().numpy() for part in parts))


def _check_numbers(values: torch.Tensor) -> None:
    """Refuse NaN, of which argmax makes a token, so that a broken model would look like one that forgot."""
    if bool(values.isnan().any()):
        raise NonFiniteError("the model gives NaN as log-probability of a token; its weights are broken")


# --- of one answer ----------------------------------------------------------------------------------------------------


def probability(scores: TokenScores) -> float:
    """p(answer | prompt)^(1/n), in [0, 1]. Source: TOFU."""
    return float(np.exp(scores.log_p.mean()))


def choice_probability(right: TokenScores, wrong: Sequence[TokenScores]) -> float:
    """The right answer's share of `probability` over all answers offered, in [0, 1]. Source: TOFU."""
    mine = probability(right)
    return mine / (mine + sum(map(probability, wrong)))


def truth_ratio(paraphrase: TokenScores, perturbed: Sequence[TokenScores]) -> float:
    """Mean `probability` of wrong answers over that of the right one in other words, at least 0. Source: TOFU."""
    return float(np.mean([probability(wrong) for wrong in perturbed]) / probability(paraphrase))


def extraction_strength(scores: TokenScores) -> float:
    """1 − k/n with the fewest first k tokens from which greedy decoding gives the rest, in [0, 1].

    Source: Carlini et al., USENIX Security 2021; for unlearning Wang et al., ICLR 2025 (arXiv 2406.09179).
    """
    misses = np.flatnonzero(~scores.first)
    return 1.0 - (0 if len(misses) == 0 else misses[-1] + 1) / len(scores.first)


def exact_memorization(scores: TokenScores) -> float:
    """Share of the tokens that greedy decoding would give after the true ones before them, in [0, 1].

    Source: Tirumala et al., NeurIPS 2022 (arXiv 2205.10770).
    """
    return float(scores.first.mean())


def min_k(scores: TokenScores, fraction: float = LOWEST) -> float:
    """Mean log-probability of the least likely share of the tokens; high speaks for a member.

    Source: Shi et al., ICLR 2024 (arXiv 2310.16789).
    """
    return _lowest(scores.log_p, fraction)


def min_k_plus(scores: TokenScores, fraction: float = LOWEST) -> float:
    """The same of log-probabilities standardised by those of all tokens at each place; high speaks for a member.

    Source: Zhang et al., ICLR 2025 (arXiv 2404.02936).
    """
    return _lowest((scores.log_p - scores.mean) / np.maximum(scores.deviation, 1e-12), fraction)


def _lowest(values: np.ndarray, fraction: float) -> float:
    if not 0 < fraction <= 1:
        raise UserError(f"fraction must be in (0, 1], got {fraction}")
    return float(np.sort(values)[: max(1, int(fraction * len(values)))].mean())


def zlib_score(scores: TokenScores, text: str) -> float:
    """Log-probability of an answer over the bytes to which zlib packs its text; high speaks for a member.

    Source: Carlini et al., USENIX Security 2021 (arXiv 2012.07805).
    """
    return float(scores.log_p.sum() / len(zlib.compress(text.encode())))


# --- of many answers --------------------------------------------------------------------------------------------------


def perplexity(scores: Sequence[TokenScores]) -> float:
    """exp of the mean loss over the tokens of all answers, at least 1."""
    return float(np.exp(-np.concatenate([s.log_p for s in scores]).mean()))


def forget_quality(unlearned: Sequence[float], retrained: Sequence[float]) -> float:
    """The p-value of a two-sample Kolmogorov–Smirnov test on truth ratios: high where they cannot be told apart.

    Args:
        unlearned: `truth_ratio` of each forgotten question, under the model that forgot.
        retrained: The same under a model that never saw them.

    Source: TOFU.
    """
    from scipy.stats import ks_2samp

    return float(ks_2samp(unlearned, retrained).pvalue)  # pyright: ignore[reportAttributeAccessIssue]


def model_utility(parts: Sequence[float]) -> float:
    """The harmonic mean of figures in [0, 1]: 0 where one of them is. Source: TOFU, there of nine."""
    return 0.0 if min(parts) <= 0 else len(parts) / sum(1 / part for part in parts)


def membership_auc(members: Sequence[float], others: Sequence[float]) -> float:
    """The chance that a member scores higher than another, ties half; 0.5 tells nothing."""
    from sklearn.metrics import roc_auc_score

    labels = [1] * len(members) + [0] * len(others)
    return float(roc_auc_score(labels, [*members, *others]))


# --- what it says by itself -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rouge:
    """ROUGE-L of a text against a reference, each in [0, 1]."""

    precision: float
    recall: float
    f: float


def rouge_l(said: str, reference: str) -> Rouge:
    """How much of the reference comes in what was said, in order: by the longest common subsequence of words.

    Words are runs of a–z and digits, in lower case and not stemmed, as rouge_score has them with use_stemmer=False.

    Source: Lin, 2004.
    """
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (said, reference))
    if not a or not b:
        return Rouge(0.0, 0.0, 0.0)
    common = _longest_common(a, b)
    precision, recall = common / len(a), common / len(b)
    return Rouge(precision, recall, 0.0 if common == 0 else 2 * precision * recall / (precision + recall))


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


@torch.no_grad()
def greedy_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    context: int | None = None,
    batch_size: int = 8,
) -> list[str]:
    """What the model says after each prompt, taking the likeliest token each time, up to an end token.

    An answer does not depend on the prompts beside it: those with room for as many tokens go forward together.

    Args:
        model: A causal model of transformers.
        tokenizer: Its tokenizer.
        prompts: Tokens of each prompt; behind one without any, nothing is said.
        new_tokens: Tokens of an answer at most.
        context: Tokens that the model takes at most, where an answer ends; None where it does not say.
        batch_size: Prompts that go forward together.

    Raises:
        NonFiniteError: if a log-probability is NaN.
    """
    rooms = [0 if not p else new_tokens if context is None else min(new_tokens, context - len(p)) for p in prompts]
    said = [""] * len(prompts)
    with evaluating(model):
        for room in sorted({n for n in rooms if n > 0}):
            places = [i for i, n in enumerate(rooms) if n == room]
            for first in range(0, len(places), batch_size):
                some = places[first : first + batch_size]
                for i, answer in zip(some, _continued(model, tokenizer, [prompts[i] for i in some], room)):
                    said[i] = answer
    return said


def _continued(model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], n: int) -> list[str]:
    """The n likeliest tokens behind each prompt of a batch, as text."""
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    device, width = next(model.parameters()).device, max(map(len, prompts))
    rows = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)

    def checked(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        _check_numbers(logits)
        return logits

    generate: Any = model.generate
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": pad}
    how = {"max_new_tokens": n, "do_sample": False, "logits_processor": [checked]}
    found = generate(input_ids=rows, attention_mask=mask, **how, **ends)
    return [tokenizer.decode(_until(row, tokenizer.eos_token_id)) for row in found[:, width:].tolist()]


def _until(tokens: list[int], end: int | None) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens
