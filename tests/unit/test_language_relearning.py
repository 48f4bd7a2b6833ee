"""Relearning of texts: the attack against a loop written out, who is judged, the points of a curve, the stage."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import language_models as lm
import numpy as np
import pytest
import torch
from torch import nn

from unsharp.engine import OptimizerConfig
from unsharp.errors import NonFiniteError, UserError
from unsharp.evaluation.relearning_stage import RETRAINED, UNLEARNED
from unsharp.language import LoRA, Pair, TextSamples, relearn
from unsharp.language import relearning_stage as stage
from unsharp.language.relearning import Attack, RelearnConfig, prepared
from unsharp.language.stages import Speaker
from unsharp.language.texts import Encoded
from unsharp.progress import Progress
from unsharp.report.relearning import write_relearning
from unsharp.stages import Setting

pytest.importorskip("transformers")
FORGET, N_TOKENS = 10, 14


def texts(n: int = 24, seed: int = 0) -> TextSamples:
    """Random short texts, the first of which are to be forgotten."""
    rng = np.random.default_rng(seed)
    made = [Encoded(tuple(int(t) for t in rng.integers(3, N_TOKENS, rng.integers(3, 7))), 1) for _ in range(n)]
    return TextSamples(made, np.arange(n) < FORGET)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return lm.gpt2(N_TOKENS, width=16, context=8)


def attack(samples: TextSamples, **how: Any) -> Attack:
    adam = OptimizerConfig(name="adamw", lr=how.pop("lr", 1e-2), weight_decay=0.0)
    more = {name: how.pop(name) for name in ("watched", "answers", "pools") if name in how}
    pools = {"forget": samples.forget, "retain": samples.retain} | more.pop("pools", {})
    return Attack(config=RelearnConfig(optimizer=adam, **how), samples=samples, pools=pools, **more)


def mean_losses(network: nn.Module, samples: TextSamples, at: np.ndarray) -> list[torch.Tensor]:
    """The mean loss of the tokens of each answer, text by text."""
    found = []
    for i in at:
        tokens, first = samples.texts[i].tokens, samples.texts[i].n_prompt
        log_p = network(torch.tensor([tokens])).logits[0].log_softmax(1)
        found.append(-torch.stack([log_p[k - 1, tokens[k]] for k in range(first, len(tokens))]).mean())
    return found


def test_the_attack_is_fine_tuning_written_out():
    samples, start, original = texts(), model(1), model(2)
    tried = attack(samples, on="forget", n=4, epochs=3, seed=5, watched=3)
    before = copy.deepcopy(start.state_dict())
    rows = tried.run(start, original=original)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), start.state_dict().values()))
    plain = copy.deepcopy(start)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in plain.parameters()]
    retained = samples.retain[:: -(-len(samples.retain) // 3)]
    for step, row in enumerate(rows):
        for name, at in (("forget", tried.judged), ("tuned", tried.tuned_on), ("retain", retained)):
            losses = [float(loss.detach()) for loss in mean_losses(plain, samples, at)]
            assert row[f"{name}_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
            assert row[f"{name}_probability"] == pytest.approx(np.mean(np.exp(-np.array(losses))), rel=1e-4)
        for name, other in (("distance", start), ("to_original", original)):
            squares = [(a - b).square().sum() for a, b in zip(plain.parameters(), other.parameters())]
            unit = 1.0 if name == "distance" else _apart(start, original)
            assert row[name] == pytest.approx(float(sum(squares).detach()) ** 0.5 / unit, rel=1e-3, abs=1e-6)  # pyright: ignore
        assert (row["step"], row["epoch"], row["passes"]) == (step, step, step)
        loss = torch.stack(mean_losses(plain, samples, tried.tuned_on)).mean()
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        norm = float(sum(g.square().sum() for g in gradients)) ** 0.5
        with torch.no_grad():
            for p, g, (m, v) in zip(plain.parameters(), gradients, moments):
                g = g * min(1.0, 1.0 / norm)
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                correction = 1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1)
                p -= 1e-2 * (m / correction[0]) / ((v / correction[1]).sqrt() + 1e-8)


def _apart(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters())
    return float(sum((a - b).detach().square().sum() for a, b in pairs)) ** 0.5


def test_who_is_taught_is_drawn_with_the_seed_and_is_not_judged():
    samples = texts()
    seen = set()
    for seed in range(8):
        tried = attack(samples, on="forget", n=4, seed=seed)
        assert len(set(tried.tuned_on)) == 4
        assert set(tried.tuned_on) | set(tried.judged) == set(samples.forget)
        assert not set(tried.tuned_on) & set(tried.judged)
        seen.add(tuple(tried.tuned_on))
    assert len(seen) > 4
    retained = attack(samples, on="retain", n=6)
    assert not set(retained.tuned_on) & set(samples.forget)
    assert np.array_equal(retained.judged, samples.forget)
    assert not set(retained.looks["retain"]) & set(retained.tuned_on)
    judged = attack(samples, on="forget", n=FORGET, pools={"judge": samples.retain[:2]})
    assert np.array_equal(judged.judged, samples.retain[:2])


def test_points_lie_on_one_curve_however_many_are_asked_for():
    samples, start = texts(), model(3)
    fine = attack(samples, n=5, batch_size=2, steps=12, look_every=1).run(start)
    for every in (2, 3, 4):
        rows = attack(samples, n=5, batch_size=2, steps=12, look_every=every).run(start)
        assert rows == fine[::every]
        assert [row["step"] for row in rows] == list(range(0, 13, every))
    by_epochs = attack(samples, n=5, batch_size=2, epochs=4).run(start)
    assert by_epochs == fine[::3]
    assert [row["epoch"] for row in by_epochs] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("how", "stride"), [({"steps": 125}, 5), ({"steps": 40}, 4), ({"steps": 7}, 1), ({"steps": 13}, 1), ({}, 5)]
)
def test_a_curve_has_ten_points_where_nothing_is_said(how: dict[str, int], stride: int):
    config = RelearnConfig(n=20, **how)  # pyright: ignore[reportArgumentType]
    assert config.stride == stride
    assert config.points * config.stride == config.total


def test_every_text_is_taught_once_in_an_epoch():
    from unsharp.language.relearning import _Rounds

    samples = texts()
    rounds = _Rounds(samples, samples.forget, 3, 0, steps=1)
    batches = [next(iter(rounds.epoch(step))).indices.tolist() for step in range(12)]
    for first in (0, 4, 8):
        assert sorted(i for batch in batches[first : first + 4] for i in batch) == samples.forget.tolist()
    assert batches[:4] != batches[4:8]


def test_micro_batches_change_nothing_and_adapters_leave_the_weights():
    samples, start = texts(), model(4)
    whole = attack(samples, n=6, batch_size=6, epochs=2).run(start)
    parts = attack(samples, n=6, batch_size=6, epochs=2, micro_batch=2).run(start)
    for a, b in zip(whole, parts):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    before = copy.deepcopy(start.state_dict())
    rows = attack(samples, n=6, epochs=8, lr=0.05, lora=LoRA(rank=4)).run(start)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), start.state_dict().values()))
    assert rows[0]["tuned_loss"] == pytest.approx(whole[0]["tuned_loss"])
    assert rows[-1]["tuned_loss"] < rows[0]["tuned_loss"] - 0.05
    assert "distance" not in rows[0]


def test_an_attacker_merges_adapters_and_trains_all():
    from unsharp.language.models import with_adapters

    base = model(5)
    adapted: Any = with_adapters(copy.deepcopy(base), LoRA(rank=2), 0)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    inputs = torch.tensor([[3, 4, 5]])
    wanted = adapted(inputs).logits.detach()
    merged = prepared(adapted)
    assert torch.allclose(merged(inputs).logits, wanted, atol=1e-5)
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in base.named_parameters()}
    assert all(p.requires_grad for p in merged.parameters())


def test_several_models_and_seeds():
    samples = texts()
    rows = relearn({"a": model(0), "b": model(1)}, attack(samples, n=3, epochs=1), seeds=[2, 3])
    assert [(r["model"], r["seed"], r["step"]) for r in rows] == [
        (name, seed, step) for seed in (2, 3) for name in ("a", "b") for step in (0, 1)
    ]
    alone = attack(samples, n=3, epochs=1, seed=3).run(model(1))
    assert [{k: v for k, v in r.items() if k not in ("model", "seed")} for r in rows[6:]] == alone


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"n": 11}, "there are 10 forget texts"),
        ({"n": 10}, "left to judge"),
        ({"on": "retain", "n": 15}, "there are 14 retain texts"),
        ({"on": "other", "n": 1}, "no other texts"),
        ({"on": "forgotten"}, "unknown on"),
        ({"n": 0}, "n must be"),
        ({"n": 4, "steps": 10, "look_every": 3}, "divides"),
        ({"n": 4, "steps": 0}, "steps must be"),
        ({"n": 4, "watched": 0}, "watched"),
        ({"n": 4, "micro_batch": 0}, "micro_batch"),
    ],
)
def test_attacks_that_cannot_be_are_refused(how: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        attack(texts(), **how)


def test_an_original_of_other_shape_is_refused():
    other = lm.gpt2(N_TOKENS, width=32, context=8)
    with pytest.raises(UserError, match="from before the unlearning"):
        attack(texts(), n=2, epochs=1).run(model(), original=other)


@pytest.mark.parametrize(("broken", "said"), [(torch.nan, "gives NaN"), (-torch.inf, "forget_loss is inf")])
def test_a_model_whose_figures_are_no_numbers_ends_its_first_curve(broken: float, said: str):
    start, shift = model(), torch.full((N_TOKENS,), broken)
    shift[0] = 0.0
    start.register_forward_hook(lambda _, __, out: setattr(out, "logits", out.logits + shift))
    with pytest.raises(NonFiniteError, match=said):
        relearn({"a": start, "b": model(1)}, attack(texts(), n=3, epochs=1))


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speakers() -> dict[str, Speaker]:
    words = lm.tokenizer()
    made = {}
    for i, name in enumerate((UNLEARNED, stage.ORIGINAL, RETRAINED)):
        torch.manual_seed(i)
        made[name] = Speaker(model=lm.gpt2(len(words), width=16), tokenizer=words, form=lm.FORM, name=name)
    return made


PLAN = stage.RelearnPlan(
    on=("forget", "retain", "other"),
    n=2,
    seeds=2,
    new_tokens=3,
    how=RelearnConfig(epochs=2, batch_size=2, optimizer=OptimizerConfig(name="adamw", lr=1e-3, weight_decay=0.0)),
)
TEXTS = {"forget": lm.facts(0, 4), "retain": lm.facts(4, 3), "other": lm.facts(8, 3)}


class Stops(Progress):
    """Ends the run after so many pieces of work."""

    def __init__(self, after: int) -> None:
        self.left = after

    def finish(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def setting(tmp_path: Path, **more: Any) -> Setting:
    return Setting(device=torch.device("cpu"), store=tmp_path / "store", **more)


def test_the_stage_attacks_all_alike_and_goes_on_after_a_kill(tmp_path: Path, speakers: dict[str, Speaker]):
    said: list[str] = []
    run = stage.relearn_texts(speakers, TEXTS, tmp_path / "whole", setting(tmp_path, say=said.append), PLAN)  # pyright: ignore
    found = run.json("relearning.json")
    assert set(found["attacks"]) == {"forget", "retain", "other"}
    assert "18 curves, 36 passes" in said[0]
    for one in found["attacks"].values():
        rows = one["rows"]
        assert len(rows) == 3 * 2 * 3
        assert {r["model"] for r in rows} == set(speakers)
        assert ["forget_rouge_l" in r for r in rows[:3]] == [True, False, True]
        for name in (UNLEARNED, stage.ORIGINAL):
            ends = [
                [r["forget_probability"] for r in rows if (r["model"], r["seed"]) == (who, seed)]
                for who in (name, RETRAINED)
                for seed in (0, 1)
            ]
            gains = [curve[-1] - curve[0] for curve in ends]
            wanted = np.mean([gains[0] - gains[2], gains[1] - gains[3]])
            assert one["recovery"][name]["excess"]["mean"] == pytest.approx(wanted)
    page = run.file("report.html").read_text()
    assert "<svg" in page
    assert "2 seeds" in page
    with pytest.raises(KeyboardInterrupt):
        stage.relearn_texts(speakers, TEXTS, str(tmp_path / "again"), setting(tmp_path, progress=Stops(5)), PLAN)
    counted = Stops(-1)
    again = stage.relearn_texts(speakers, TEXTS, str(tmp_path / "again"), setting(tmp_path, progress=counted), PLAN)
    assert -1 - counted.left == 18 - 4
    assert again.json("relearning.json") == found
    assert stage.relearn_texts(speakers, TEXTS, str(tmp_path / "again"), setting(tmp_path), PLAN).reused


def test_without_a_retrained_model_there_are_curves_and_no_recovery(tmp_path: Path, speakers: dict[str, Speaker]):
    plan = dataclasses.replace(PLAN, on=("forget",), seeds=1)
    texts = {"forget": TEXTS["forget"]}
    run = stage.relearn_texts({UNLEARNED: speakers[UNLEARNED]}, texts, str(tmp_path / "run"), setting(tmp_path), plan)
    found = run.json("relearning.json")["attacks"]
    assert found["forget"]["recovery"] == {}
    assert "more than" not in stage.sentences(found)[0]


def test_what_does_not_fit_is_refused_before_any_work(tmp_path: Path, speakers: dict[str, Speaker]):
    def refused(said: str, texts: dict[str, Any], plan: stage.RelearnPlan = PLAN, **others: Speaker) -> None:
        with pytest.raises(UserError, match=said):
            stage.relearn_texts(speakers | others, texts, str(tmp_path / "no"), setting(tmp_path), plan)
        assert not (tmp_path / "no").exists()

    few = lm.tokenizer_for(["Question: Where does Ada live?"], 262)
    foreign = Speaker(model=lm.gpt2(len(lm.tokenizer()), width=16, context=100), tokenizer=few, form=lm.FORM, name="x")
    refused("other tokens", TEXTS, retrained=foreign)
    small = Speaker(model=lm.gpt2(20, width=16), tokenizer=lm.tokenizer(), form=lm.FORM, name="x")
    refused("does not fit the model", TEXTS, unlearned=small)
    refused("are in forget and in retain", TEXTS | {"retain": TEXTS["forget"]})
    refused("are in forget and in other", TEXTS | {"other": TEXTS["forget"]})
    for on in ("forget", "retain", "other"):
        refused(f"are in {on} and in judge", TEXTS | {"judge": [*lm.facts(11, 1), TEXTS[on][0]]})
    refused("no attack uses them", TEXTS, dataclasses.replace(PLAN, on=("forget",)))
    refused("empty answer", TEXTS | {"retain": [Pair(prompt="Who?", answer=" ")]})
    refused("are taken at most", TEXTS | {"retain": [Pair(prompt="Who?", answer="Oslo " * 90)]})
    refused("there are 4 forget texts", TEXTS, dataclasses.replace(PLAN, n=5))
    for wrong in ({"on": ()}, {"on": ("forget", "forget")}, {"on": ("x",)}, {"seeds": 0}, {"new_tokens": 0}):
        with pytest.raises(UserError):
            stage.RelearnPlan(**wrong)  # pyright: ignore[reportArgumentType]


def test_the_page_escapes_names(tmp_path: Path):
    row = {"step": 0.0, "epoch": 0.0, "passes": 0.0, "seed": 0, "forget_probability": 0.25}
    rows = [row | {"model": "<b>x"}, row | {"model": "<b>x", "epoch": 1.0, "forget_probability": 0.5}]
    found = {"forget": {"config": {"n": 3}, "rows": rows}}
    write_relearning(tmp_path / "p.html", found, "<svg></svg>", ["<i>y"], reference="retrained")
    page = (tmp_path / "p.html").read_text()
    assert "<b>" not in page
    assert "<i>" not in page
    assert "0.25 → 0.5" in page
    json.dumps(rows)
