"""The recipe on relearning in language models: its facts, what it concludes, and that it runs from end to end."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from unsharp.recipes import language_relearning as recipe

pytest.importorskip("transformers")


def test_people_of_a_group_share_most_answers_and_their_numbers_say_nothing():
    facts = recipe.make_facts(24, 20, 3)
    tokens = np.array([text.tokens for text in facts.samples.texts]).reshape(24, 20, 6, 3)
    assert len({tuple(t) for t in tokens[..., :2].reshape(-1, 2).tolist()}) == 24 * 20 * 6
    assert tokens.max() < facts.n_tokens == 480 + 6 + 48
    common = [np.bincount(tokens[g, :, q, 2]).max() / 20 for g in range(24) for q in range(6)]
    assert 0.87 < np.mean(common) < 0.94  # nine tenths share, and a few of the others agree by chance
    assert len(facts.samples.forget) == 4 * 20 * 6
    owners = tokens[:, :, 0, 0]
    assert abs(np.corrcoef(np.repeat(np.arange(24), 20), owners.ravel())[0, 1]) < 0.2
    again = recipe.make_facts(24, 20, 3).samples
    assert again.fingerprint == facts.samples.fingerprint != recipe.make_facts(24, 20, 4).samples.fingerprint


def a_fact(seed: int, npo: float, sam: float, kept: float, averaged: float = 0.5) -> dict[str, Any]:
    ends = dict.fromkeys((*recipe.VARIANTS, recipe.ORIGINAL, recipe.RETRAINED), 0.4)
    ends |= {recipe.NPO: npo, recipe.SAM: sam, recipe.AVERAGED: averaged}
    models = {
        name: {
            "forget": 0.1,
            "retain": 0.9 + (kept if name == recipe.SAM else 0.0),
            "seconds": 1.0,
            "curves": {"60": [{"step": 0.0, recipe.JUDGED: 0.1}, {"step": 40.0, recipe.JUDGED: end}]},
        }
        for name, end in ends.items()
    }
    return {"seed": seed, "models": models, "same_at_zero": {"SAM ρ=0": True}}


def test_what_holds_is_said_to_hold_and_nothing_else():
    good = [a_fact(i, 0.5, 0.3, -0.02, 0.4 + 0.01 * i) for i in range(5)]
    assert [holds for *_, holds in recipe.checks(good)] == [True, True, True, True]
    for change, wanted in (
        ({"sam": 0.36}, [True, True, False, True]),
        ({"kept": -0.04}, [True, True, False, True]),
        ({"kept": 0.04}, [True, True, False, True]),
        ({"averaged": 0.6}, [True, True, True, False]),
    ):
        values = {"npo": 0.5, "sam": 0.3, "kept": -0.02, "averaged": 0.41} | change
        facts = [copy.deepcopy(fact) for fact in good]
        facts[:2] = [a_fact(i, **values) for i in range(2)]
        assert [holds for *_, holds in recipe.checks(facts)] == wanted, change
    one_bad = [a_fact(0, 0.5, 0.36, 0.0), *good[1:]]
    assert recipe.checks(one_bad)[2][2]
    unequal = [fact | {"same_at_zero": {"SAM ρ=0": i > 0}} for i, fact in enumerate(good)]
    assert not recipe.checks(unequal)[0][2]
    apart = [copy.deepcopy(fact) for fact in good]
    for fact in apart:
        fact["models"][recipe.PENALTY]["curves"]["60"][-1][recipe.JUDGED] = 0.45
    assert not recipe.checks(apart)[1][2]


def test_it_runs_from_end_to_end():
    found = recipe.one_seed(groups=5, people=2, width=8, training=6, steps=2, attacked=5, relearned=[4], seed=1)
    assert set(found["models"]) == {*recipe.VARIANTS, recipe.ORIGINAL, recipe.RETRAINED}
    assert found["same_at_zero"] == {"SAM ρ=0": True, "gradient penalty 0": True}
    assert all(len(model["curves"]["4"]) == 6 for model in found["models"].values())
    options = recipe.Options(out="x", groups=5, people=2, relearned=(4,))
    text = recipe.page(options, [found])
    assert "| retrained |" in text
    assert "strength 0 gives the bits of plain NPO | in 1 of 1 seeds | yes" in text
    assert recipe.figure([found]).count("<svg") == 1
