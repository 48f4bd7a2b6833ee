"""The language command: a small model forgets, is measured beside a retrained one, and mistakes are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from .helpers import call, done

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import language_models as lm

from unsharp.language import models
from unsharp.language.likelihood import answer_losses

pytest.importorskip("transformers")
PLAIN = ("--threads", "1", "--quiet")
QUICK = (*PLAIN, "--template", "plain")


def rows(first: int, n: int) -> list[dict[str, Any]]:
    return [
        {
            "question": pair.prompt,
            "answer": pair.answer,
            "paraphrased_answer": f"The home is {pair.answer.split()[3]}",
            "perturbed_answer": ["The home is Turin", "Nobody lives in Lima"],
        }
        for pair in lm.facts(first, n)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained and a retrained model, and texts."""
    place = tmp_path_factory.mktemp("language")
    parts = {"forget": rows(0, 4), "retain": rows(4, 4), "holdout": rows(8, 4)}
    (place / "texts.json").write_text(json.dumps(parts))
    words = lm.tokenizer()
    for name, known in (("model", lm.facts(0, 8)), ("retrained", lm.facts(4, 4))):
        torch.manual_seed(0)
        model = lm.gpt2(len(words), context=80)
        samples = lm.samples(model, words, [], known)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(80):
            optimizer.zero_grad()
            answer_losses(model, samples.batch(np.arange(len(samples))), "mean").mean().backward()
            optimizer.step()
        models.save(place / name, model, words)
    return place


def unlearn(place: Path, *more: object) -> tuple[object, ...]:
    texts = place / "texts.json"
    return (
        *("language", "unlearn", "--model", place / "model", "--forget", f"{texts}:forget"),
        *("--retain", f"{texts}:retain", "--batch-size", 4, *QUICK, *more),
    )


def test_a_model_forgets_and_is_measured_beside_a_retrained_one(place: Path):
    out, texts = place / "forgotten", place / "texts.json"
    how = ("--objective", "npo", "--rule", "sam", "--rho", 0.01, "--epochs", 12, "--lr", 0.001, "--gamma", 5)
    before = {path.name: path.read_bytes() for path in (place / "model").iterdir()}
    answer = done(*unlearn(place, *how, "--micro-batch", 3, "--out", out, "--json")).json
    assert answer["after"]["forget_loss"] > answer["before"]["forget_loss"] + 0.5
    assert answer["after"]["retain_loss"] < answer["before"]["retain_loss"] + 0.6
    assert not answer["reused"]
    assert done(*unlearn(place, *how, "--micro-batch", 3, "--out", out, "--json")).json["reused"]
    assert {path.name: path.read_bytes() for path in (place / "model").iterdir()} == before
    asked = ("language", "evaluate", "--forget", f"{texts}:forget", "--retain", f"{texts}:retain", "--new-tokens", 12)
    whole = (*asked, "--model", out, "--holdout", f"{texts}:holdout", "--real-authors", f"{texts}:retain")
    beside = ("--world-facts", f"{texts}:retain", "--reference", place / "retrained", *QUICK)
    found = done(*whole, *beside, "--out", place / "measured", "--json").json
    original = done(*asked, "--model", place / "model", *QUICK, "--out", place / "original", "--json").json
    assert original["model"]["forget"]["exact_memorization"] > 0.9
    assert found["model"]["forget"]["exact_memorization"] < original["model"]["forget"]["exact_memorization"]
    assert found["model"]["forget"]["probability"] < original["model"]["forget"]["probability"]
    assert 0 <= found["forget_quality"] <= 1
    assert 0 < found["model"]["model_utility"] <= 1
    assert set(found["reference"]["membership"]) == {"loss", "zlib", "min_k", "min_k_plus"}
    assert original["forget_quality"] is None
    assert "no retrained model" in original["why_no_forget_quality"]
    said = done(*asked, "--model", place / "model", *QUICK, "--out", place / "original").out
    assert "Retrained" in said
    assert "forget quality none: no retrained model" in said


def relearn(place: Path, *more: object) -> tuple[object, ...]:
    texts = place / "texts.json"
    return (
        *("language", "relearn", "--model", place / "model", "--forget", f"{texts}:forget"),
        *("--retain", f"{texts}:retain", "--new-tokens", 3, *QUICK, *more),
    )


def test_forgotten_texts_are_taught_again_beside_a_retrained_model(place: Path):
    texts = place / "texts.json"
    beside = ("--original", place / "model", "--reference", place / "retrained", "--n", 2, "--lr", 0.003)
    line = relearn(place, *beside, "--on", "forget", "other", "--other", f"{texts}:holdout", "--steps", 4, "--seeds", 2)
    answer = done(*line, "--out", place / "relearnt", "--json").json
    assert {"relearning.json", "relearning.svg", "report.html", "run.json"} == {
        p.name for p in (place / "relearnt").iterdir()
    }
    one = answer["attacks"]["forget"]
    assert one["config"]["n"] == 2
    assert one["config"]["optimizer"]["lr"] == 0.003
    assert [r["step"] for r in one["rows"][:5]] == [0, 1, 2, 3, 4]
    starts = {r["model"]: r["forget_exact_memorization"] for r in one["rows"] if r["step"] == 0}
    assert starts["original"] == starts["unlearned"] > 0.9 > starts["retrained"]
    told = one["recovery"]["unlearned"]["excess"]
    assert told["mean"] == one["recovery"]["original"]["excess"]["mean"]
    assert done(*line, "--out", place / "relearnt", "--json").json["reused"]
    said = done(*line, "--out", place / "relearnt").out
    assert said.count("probability of a forgotten answer") == 6
    assert "more than retrained" in said
    adapters = relearn(place, "--on", "forget", "--n", 3, "--lora-rank", 2, "--epochs", 1, "--batch-size", 3)
    found = done(*adapters, "--judge", f"{texts}:holdout", "--out", place / "by-adapters", "--json").json
    assert found["attacks"]["forget"]["config"]["lora"]["rank"] == 2
    assert found["n"]["judge"] == 4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--n", 9), "there are 4 forget texts"),
        (("--n", 4), "left to judge"),
        (("--on", "other"), "belong together"),
        (("--on", "retian"), "did you mean 'retain'"),
        (("--objective", "npo"), "relearn does not take --objective"),
        (("--holdout", "x"), "relearn does not take --holdout"),
        (("--mask-n-probes", 5), "relearn does not take --mask-n-probes"),
        (("--mask-score-on", "forget"), "relearn does not take --mask-score-on"),
        (("--mask-score-samples", 5), "relearn does not take --mask-score-samples"),
        (("--n", 2, "--steps", 5, "--look-every", 2), "divides"),
        (("--max-length", 5), "tokens"),
        (("--lora-rank", 2, "--lora-targets", "nowhere"), "LoRA does not fit the model"),
        (("--lora-scale", 2), "need --lora-rank"),
        (("--tokenizer", "nowhere", "--local-files-only"), "cannot be loaded"),
        (("--seeds", 0), "seeds must be"),
    ],
)
def test_attacks_that_cannot_be_are_refused_and_leave_nothing(place: Path, more: tuple[object, ...], said: str):
    answer = call(*relearn(place, *more, "--out", place / "refused"))
    assert answer.code == 2, answer.err
    assert said in answer.err
    assert not (place / "refused").exists()


def widened(place: Path, name: str, context: int = 200) -> Path:
    """A trained model with places for whole answers of MUSE, of which it was taught nothing."""
    found = models.load(place / name, torch.device("cpu"))
    known = found.model.transformer.wpe.weight.detach()  # pyright: ignore
    torch.manual_seed(0)
    wide = lm.gpt2(len(found.tokenizer), context=context)
    own = wide.state_dict()
    state = {k: v for k, v in found.model.state_dict().items() if k in own and v.shape == own[k].shape}
    wide.load_state_dict(state, strict=False)
    with torch.no_grad():
        wide.transformer.wpe.weight[: len(known)] = known  # pyright: ignore
    models.save(place / f"wide-{name}", wide, found.tokenizer)
    return place / f"wide-{name}"


def test_published_tests_are_asked_of_both_models(place: Path):
    model, retrained = (widened(place, name) for name in ("model", "retrained"))
    homes = [row["answer"].split()[3] for row in rows(0, 4)]
    asked = [
        {"question": row["question"], "choices": [f"{row['answer'].split()[0]} lives in {t}" for t in ("Rome", home)]}
        | {"answer": 1}
        for row, home in zip(rows(0, 4), homes)
    ]
    (place / "wmdp.jsonl").write_text("\n".join(map(json.dumps, asked)))
    for folder in ("verbmem", "privleak"):
        (place / "muse" / folder).mkdir(parents=True)
    known = [{"prompt": f"Question: {r['question']}\nAnswer:", "gt": r["answer"]} for r in rows(0, 4)]
    (place / "muse" / "verbmem" / "forget.json").write_text(json.dumps(known))
    for name, first in (("forget", 0), ("holdout", 8)):
        texts = [{"text": f"Question: {r['question']}\nAnswer: {r['answer']}"} for r in rows(first, 4)]
        (place / "muse" / "privleak" / f"{name}.json").write_text(json.dumps(texts))
    line = ("language", "benchmark", "--model", model, "--wmdp", place / "wmdp.jsonl", "--choices", "answers")
    whole = (*line, "--muse", place / "muse", "--reference", retrained, *PLAIN)
    found = done(*whole, "--out", place / "asked", "--json").json
    assert found["model"]["wmdp"]["accuracy"] == 1.0
    assert found["model"]["wmdp"]["choices"] == "answers"
    assert found["model"]["muse"]["verbatim"] > found["reference"]["muse"]["verbatim"] + 0.2
    aucs = [found[name]["muse"]["privacy_auc"] for name in ("model", "reference")]
    assert found["model"]["muse"]["privacy_leak"] == pytest.approx(100 * (aucs[0] - aucs[1]) / aucs[1])
    said = done(*whole, "--out", place / "asked").out
    assert "wmdp accuracy" in said
    for more, why in (
        (("--lm-eval", "mmlu,wmdp"), "pip install 'unsharp[lm_eval]'"),
        (("--forget", "x"), "benchmark does not take --forget"),
        (("--template", "plain", "--max-length", 9), "benchmark does not take --template --max-length"),
        (("--prompt-form", "{prompt}?"), "benchmark does not take --prompt-form"),
        (("--answer-form", "{answer}!"), "benchmark does not take --answer-form"),
        (("--choices", "words"), "unknown choices"),
        (("--mmlu", place / "texts.json:forget"), "needs question, choices and answer"),
        (("--muse", place / "model"), "nothing of MUSE"),
    ):
        refused = call(*line, *PLAIN, *more, "--out", place / "refused")
        assert (refused.code, why in refused.err) == (2, True), refused.err
    refused = call("language", "benchmark", "--model", model, *PLAIN)
    assert (refused.code, "nothing is asked" in refused.err) == (2, True), refused.err
    refused = call("language", "relearn", "--model", model, *QUICK)
    assert (refused.code, "relearn needs --forget" in refused.err) == (2, True), refused.err


def test_adapters_are_trained_and_measured(place: Path):
    out, texts = place / "adapted", place / "texts.json"
    done(*unlearn(place, "--objective", "idk_dpo", "--lora-rank", 2, "--epochs", 1, "--out", out))
    assert (out / "model" / "adapter_model.safetensors").is_file()
    assert not (out / "model" / "model.safetensors").exists()
    found = done(
        *("language", "evaluate", "--model", out, "--forget", f"{texts}:forget", "--new-tokens", 2, *QUICK),
        *("--out", place / "adapted-measured", "--json"),
    ).json
    assert found["model"]["model_utility"] is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--objective", "dpo"), "has no preferred answer"),
        (("--objective", "nothing"), "unknown objective"),
        (("--margin", 1), "unknown setting for npo"),
        (("--max-length", 5), "tokens"),
        (("--lora-scale", 2), "need --lora-rank"),
        (("--reference", "x"), "unlearn does not take --reference"),
        (("--mask", "nowhere.safetensors"), "does not exist"),
        (("--weights", "int8"), "unknown weights"),
        (("--template", "chat"), "no chat template"),
        (("--mask-fraction", 2), "mask fraction"),
    ],
)
def test_mistakes_are_refused_and_leave_nothing(place: Path, more: tuple[object, ...], said: str):
    answer = call(*unlearn(place, *more, "--out", place / "refused"))
    assert answer.code == 2, answer.err
    assert said in answer.err
    assert not (place / "refused").exists()


def test_texts_that_do_not_fit_are_refused(place: Path, tmp_path: Path):
    texts = place / "texts.json"
    both = call("language", "unlearn", "--model", place / "model", "--forget", f"{texts}:forget", *QUICK)
    assert (both.code, "give some, or gamma 0" in both.err) == (2, True)
    both = call(*unlearn(place, "--retain", f"{texts}:forget"))
    assert (both.code, "are in forget and in retain" in both.err) == (2, True)
    empty = tmp_path / "empty.json"
    empty.write_text('[{"question": "Who?", "answer": ""}]')
    both = call(*unlearn(place, "--forget", empty))
    assert (both.code, "has an empty answer" in both.err) == (2, True)
    words = lm.tokenizer_for(["other words entirely"] * 3 + [f"word{i} thing{i}" for i in range(400)], 900)
    words.save_pretrained(tmp_path / "other")
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"question": "word77?", "answer": " ".join(f"word{i}" for i in range(99))}]))
    both = call(*unlearn(place, "--tokenizer", tmp_path / "other", "--forget", other, "--too-long", "cut"))
    assert (both.code, "the tokenizer does not fit the model" in both.err) == (2, True), both.err
    both = call(
        "language", "evaluate", "--model", "nobody/nothing", "--forget", f"{texts}:forget", "--local-files-only"
    )
    assert (both.code, "no such directory" in both.err) == (2, True)
    both = call("language", "ponder", "--model", "x", "--forget", "y")
    assert (both.code, "unknown kind of language" in both.err) == (2, True)
