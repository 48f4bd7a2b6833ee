"""Figures of what a language model still says, against loops over its tokens, another library, and cases by hand."""

from __future__ import annotations

import warnings
import zlib
from typing import Any

import language_models as lm
import numpy as np
import pytest
import torch

from unsharp.errors import NonFiniteError, UserError
from unsharp.language import Pair, evaluation
from unsharp.language.evaluation import TokenScores

pytest.importorskip("transformers")


def scores(log_p: Any, first: Any = None, mean: float = -2.0, deviation: float = 1.5) -> TokenScores:
    log_p = np.asarray(log_p, float)
    first = np.ones(len(log_p), bool) if first is None else np.asarray(first, bool)
    return TokenScores(log_p, np.full(len(log_p), mean), np.full(len(log_p), deviation), first)


@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_are_those_of_a_loop_over_the_tokens(side: Any):
    words = lm.tokenizer()
    torch.manual_seed(1)
    model = lm.gpt2(len(words)).double()
    pairs = [*lm.facts(0, 3), Pair(prompt="", answer="Lima is far away")]
    samples = lm.samples(model, words, pairs, [], side=side)
    for text, found in zip(samples.texts, evaluation.score(model, samples, batch_size=3)):
        for k, place in enumerate(range(max(1, text.n_prompt), len(text.tokens))):
            with torch.no_grad():
                logits = model(torch.tensor([text.tokens[:place]])).logits[0, -1].numpy()
            p = np.exp(logits) / np.exp(logits).sum()
            assert found.log_p[k] == pytest.approx(np.log(p[text.tokens[place]]), rel=1e-6)
            mean = (p * np.log(p)).sum()
            assert found.mean[k] == pytest.approx(mean, rel=1e-6)
            assert found.deviation[k] == pytest.approx(np.sqrt((p * (np.log(p) - mean) ** 2).sum()), rel=1e-6)
            assert found.first[k] == (logits.argmax() == text.tokens[place])
        assert k + 1 == len(found.log_p)


def test_a_model_that_gives_nan_is_no_model_that_forgot():
    words = lm.tokenizer()
    model = lm.gpt2(len(words))
    samples = lm.samples(model, words, lm.facts(0, 3), [])
    end = samples.texts[0].tokens[-1]
    impossible = torch.zeros(len(words))
    impossible[end] = -torch.inf
    model.register_forward_hook(lambda _, __, out: setattr(out, "logits", out.logits + impossible))
    assert evaluation.score(model, samples)[0].log_p[-1] == -np.inf
    impossible[end] = torch.nan
    with pytest.raises(NonFiniteError, match="gives NaN"):
        evaluation.score(model, samples)
    with pytest.raises(NonFiniteError, match="gives NaN"):
        evaluation.greedy_answers(model, words, [[5, 6]], new_tokens=2)


def test_greedy_answers_are_those_of_a_loop():
    words = lm.tokenizer()
    torch.manual_seed(2)
    model = lm.gpt2(len(words), context=40)
    samples = lm.samples(model, words, lm.facts(0, 3), [])
    prompts = [text.tokens[: text.n_prompt] for text in samples.texts]
    prompts.append(prompts[0][:3])
    said = evaluation.greedy_answers(model, words, prompts, new_tokens=6, context=40, batch_size=2)
    for prompt, answer in zip(prompts, said):
        tokens = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == words.eos_token_id:
                tokens.pop()
                break
        assert answer == words.decode(tokens[len(prompt) :])


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_do_not_depend_on_the_prompts_beside_them(batch_size: int):
    words = lm.tokenizer()
    torch.manual_seed(2)
    model = lm.gpt2(len(words), context=20)
    rng = np.random.default_rng(3)
    prompts = [[int(t) for t in rng.integers(3, len(words), n)] for n in (4, 18, 0, 9, 20, 13, 4, 18, 12)]
    said = evaluation.greedy_answers(model, words, prompts, new_tokens=8, context=20, batch_size=batch_size)
    for prompt, answer in zip(prompts, said):
        tokens = list(prompt)
        for _ in range(min(8, 20 - len(prompt)) if prompt else 0):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == words.eos_token_id:
                tokens.pop()
                break
        assert answer == words.decode(tokens[len(prompt) :])


def test_figures_of_an_answer_by_hand():
    one = scores(np.log([0.5, 0.25, 0.125]))
    assert evaluation.probability(one) == pytest.approx(0.25)
    half, tenth = scores(np.log([0.5, 0.5])), scores(np.log([0.1]))
    assert evaluation.choice_probability(one, [half, half]) == pytest.approx(0.25 / 1.25)
    assert evaluation.truth_ratio(one, [half, tenth]) == pytest.approx(0.3 / 0.25)
    assert evaluation.perplexity([half, tenth]) == pytest.approx((0.5 * 0.5 * 0.1) ** (-1 / 3))
    assert evaluation.zlib_score(half, "Oslo") == pytest.approx(2 * np.log(0.5) / len(zlib.compress(b"Oslo")))
    assert evaluation.model_utility([0.5, 0.25]) == pytest.approx(1 / 3)
    assert evaluation.model_utility([0.5, 0.0]) == 0.0


@pytest.mark.parametrize(
    ("first", "strength", "exact"),
    [
        ([1, 1, 1, 1], 1.0, 1.0),
        ([0, 1, 1, 1], 0.75, 0.75),
        ([0, 0, 1, 1], 0.5, 0.5),
        ([1, 0, 1, 1], 0.5, 0.75),
        ([1, 1, 1, 0], 0.0, 0.75),
        ([0, 0, 0, 0], 0.0, 0.0),
    ],
)
def test_extraction_strength_is_that_of_the_fewest_tokens_from_which_the_rest_follows(
    first: list[int], strength: float, exact: float
):
    found = scores(np.zeros(4), first)
    fewest = min(k for k in range(5) if all(first[k:]))
    assert evaluation.extraction_strength(found) == strength == 1 - fewest / 4
    assert evaluation.exact_memorization(found) == exact


def test_min_k_looks_at_the_least_likely_tokens():
    log_p = np.array([-1.0, -9.0, -2.0, -3.0, -4.0, -0.5, -0.1, -6.0, -0.2, -0.3])
    found = scores(log_p)
    assert evaluation.min_k(found) == pytest.approx((-9 - 6) / 2)
    assert evaluation.min_k_plus(found) == pytest.approx(((-9 + 2) + (-6 + 2)) / 2 / 1.5)
    assert evaluation.min_k(scores([-3.0, -1.0])) == -3.0
    with pytest.raises(UserError, match="fraction"):
        evaluation.min_k(found, 0.0)


def test_forget_quality_is_the_two_sample_test():
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=40), draw.normal(0.4, size=30)
    grid = np.concatenate([a, b])
    gap = max(abs((a <= x).mean() - (b <= x).mean()) for x in grid)
    mixed = 0
    for _ in range(4000):
        draw.shuffle(grid)
        left, right = np.sort(grid[:40]), np.sort(grid[40:])
        spread = np.abs(np.searchsorted(left, grid, "right") / 40 - np.searchsorted(right, grid, "right") / 30)
        mixed += spread.max() >= gap - 1e-12
    assert evaluation.forget_quality(a.tolist(), b.tolist()) == pytest.approx(mixed / 4000, abs=0.03)
    assert evaluation.forget_quality([0.1, 0.2], [0.1, 0.2]) == pytest.approx(1.0)


def test_membership_is_the_chance_to_rank_a_member_first():
    members, others = [3.0, 1.0, 2.0], [2.0, 0.0]
    wins = np.mean([(m > o) + 0.5 * (m == o) for m in members for o in others])
    assert evaluation.membership_auc(members, others) == pytest.approx(wins)


def test_rouge_is_that_of_rouge_score():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    draw = np.random.default_rng(3)
    pool = ["the", "author", "born", "in", "Kuwait-City,", "1956!", "it's", "a", "novel", "—", "ß", ""]
    texts = [" ".join(draw.choice(pool, draw.integers(0, 14))) for _ in range(120)]
    for said, reference in zip(texts[::2], texts[1::2]):
        wanted = scorer.score(reference, said)["rougeL"]
        found = evaluation.rouge_l(said, reference)
        assert (found.precision, found.recall, found.f) == pytest.approx(
            (wanted.precision, wanted.recall, wanted.fmeasure)
        )
