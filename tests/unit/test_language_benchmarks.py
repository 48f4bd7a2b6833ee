"""Published tests: choices against a loop over tokens, MUSE against its formulas by hand, files, and the harness."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import language_models as lm
import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from unsharp.errors import UserError
from unsharp.language import Pair, TextSamples, benchmarks, evaluation
from unsharp.language import benchmark_stage as stage
from unsharp.language.benchmarks import Muse, Question, read_muse, read_questions
from unsharp.language.stages import Speaker
from unsharp.language.texts import read_pairs
from unsharp.stages import Setting

pytest.importorskip("transformers")
WORDS = lm.tokenizer()


def questions(n: int = 12, seed: int = 0) -> list[Question]:
    rng = np.random.default_rng(seed)
    towns = [list(rng.permutation(lm.TOWNS)[: 2 + i % 4]) for i in range(n)]
    return [
        Question(question=f" Where does {lm.NAMES[i]} live? ", choices=tuple(t), answer=int(rng.integers(len(t))))
        for i, t in enumerate(towns)
    ]


def speaker(seed: int = 0, context: int = 400) -> Speaker:
    torch.manual_seed(seed)
    model = lm.gpt2(len(WORDS), width=16, context=context)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # so that choices are far apart
    return Speaker(model=model, tokenizer=WORDS, form=lm.FORM, name="x")


def log_p(model: torch.nn.Module, prompt: str, end: str) -> float:
    """log p of the end's tokens after the prompt, one forward pass for each."""
    tokens, n = WORDS(prompt + end).input_ids, len(WORDS(prompt).input_ids)
    found = 0.0
    for k in range(n, len(tokens)):
        with torch.no_grad():
            found += float(model(torch.tensor([tokens[:k]])).logits[0, -1].double().log_softmax(0)[tokens[k]])
    return found


@pytest.mark.parametrize("choices", ["letters", "answers"])
def test_the_likeliest_choice_is_that_of_a_loop_over_the_tokens(choices: Any):
    asked, who = questions(), speaker(1)
    encoded = benchmarks.encode_choices(asked, WORDS, choices, context=400)
    ends = [end for q in asked for _, end in benchmarks.asked_as(q, choices)]
    assert [WORDS.decode(e.tokens[e.n_prompt :]) for e in encoded] == ends
    found = benchmarks.choice_figures(who.model, asked, TextSamples(encoded, [False] * len(encoded)), batch_size=5)
    right, by_length = 0, 0
    for q in asked:
        stem = q.question.strip()
        if choices == "letters":
            prompt = "\n".join([stem, *(f"{'ABCDEFG'[i]}. {c}" for i, c in enumerate(q.choices)), "Answer:"])
            values = [log_p(who.model, prompt, f" {'ABCDEFG'[i]}") for i in range(len(q.choices))]
        else:
            values = [log_p(who.model, f"Question: {stem}\nAnswer:", f" {c}") for c in q.choices]
        right += int(np.argmax(values)) == q.answer
        by_length += int(np.argmax([v / len(c) for v, c in zip(values, q.choices)])) == q.answer
    assert found["accuracy"] == right / len(asked)
    assert found["accuracy_by_length"] == by_length / len(asked)
    assert 0 < right < len(asked)
    assert found["chance"] == pytest.approx(np.mean([1 / len(q.choices) for q in asked]))
    assert found["n"] == len(asked)


def test_a_question_too_long_is_refused_or_loses_its_beginning():
    asked = questions(1)
    whole = benchmarks.encode_choices(asked, WORDS, "letters", context=None)
    room = max(len(t.tokens) for t in whole) - 3
    with pytest.raises(UserError, match=r"question 1 has \d+ tokens"):
        benchmarks.encode_choices(asked, WORDS, "letters", context=room)
    cut = benchmarks.encode_choices(asked, WORDS, "letters", context=room, cut=True)
    for a, b in zip(whole, cut):
        assert b.tokens == a.tokens[-room:]
        assert a.tokens[a.n_prompt :] == b.tokens[b.n_prompt :]
    with pytest.raises(UserError, match="question 1"):
        benchmarks.encode_choices(asked, WORDS, "letters", context=1, cut=True)


ROWS = [
    {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 2},
    {"question": "Who?", "choices": ["e", "f"], "answer": 0, "subject": "biology"},
]


def test_questions_are_read_from_every_layout(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "c.json").write_text(json.dumps({"test": [ROWS[0] | {"answer": "C"}, ROWS[1]]}))
    parquet.write_table(pa.Table.from_pylist([r | {"subject": "x"} for r in ROWS]), tmp_path / "d.parquet")
    wanted = [Question(question=r["question"], choices=tuple(r["choices"]), answer=r["answer"]) for r in ROWS]
    for name in ("a.json", "b.jsonl", "c.json:test", "d.parquet"):
        assert read_questions(tmp_path / name) == wanted
    parquet.write_table(pa.Table.from_pylist([{"question": "Q?", "answer": "A"}]), tmp_path / "pairs.parquet")
    assert read_pairs(tmp_path / "pairs.parquet") == [Pair(prompt="Q?", answer="A")]
    (tmp_path / "broken.parquet").write_text("no table")
    for name, said in (("broken.parquet", "cannot be read"), ("nowhere.parquet", "does not exist")):
        with pytest.raises(UserError, match=said):
            read_questions(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": 4}, "answer must be one of 0..3"),
        ({"answer": -1}, "answer must be"),
        ({"answer": "E"}, "answer must be"),
        ({"answer": True}, "answer must be"),
        ({"answer": 1.0}, "answer must be"),
        ({"choices": ["a"]}, "has 1 choices"),
        ({"choices": ["a", " "]}, "none of them empty"),
        ({"choices": "abcd"}, "must be a list"),
        ({"question": " "}, "question must be text"),
        ({"choices": None}, "choices must be"),
    ],
)
def test_questions_that_are_none_are_refused(tmp_path: Path, change: dict[str, Any], said: str):
    (tmp_path / "q.json").write_text(json.dumps([ROWS[1], ROWS[0] | change]))
    with pytest.raises(UserError, match=f"entry 2.*{said}"):
        read_questions(tmp_path / "q.json")
    (tmp_path / "q.json").write_text(json.dumps([{"question": "Q?", "answer": "A"}]))
    with pytest.raises(UserError, match="needs question, choices and answer"):
        read_questions(tmp_path / "q.json")


# --- MUSE -------------------------------------------------------------------------------------------------------------


def muse_at(place: Path) -> Path:
    """A directory in the layout of MUSE, in several kinds of files."""
    for folder in ("knowmem", "verbmem", "privleak"):
        (place / folder).mkdir(parents=True)
    qa = [{"question": p.prompt, "answer": p.answer} for p in lm.facts(0, 6)]
    (place / "knowmem" / "forget_qa.json").write_text(json.dumps(qa[:2]))
    (place / "knowmem" / "forget_qa_icl.jsonl").write_text("\n".join(map(json.dumps, qa[4:])))
    parquet.write_table(pa.Table.from_pylist(qa[2:4]), place / "knowmem" / "retain_qa-00000-of-00001.parquet")
    beginnings = [{"prompt": "Ada lives", "gt": "in Oslo"}, {"prompt": "Bela lives in", "gt": "Lima by the sea"}]
    for i, row in enumerate(beginnings):
        parquet.write_table(pa.Table.from_pylist([row]), place / "verbmem" / f"forget-0000{i}-of-00002.parquet")
    for name, first in (("forget", 0), ("holdout", 6)):
        rows = [{"text": f"{p.prompt} {p.answer}"} for p in lm.facts(first, 5)]
        (place / "privleak" / f"{name}.json").write_text(json.dumps(rows))
    return place


def test_what_there_is_of_muse_is_read(tmp_path: Path):
    muse = read_muse(muse_at(tmp_path))
    facts = [Pair(prompt=p.prompt, answer=p.answer) for p in lm.facts(0, 6)]
    assert muse.known == {"forget": (tuple(facts[:2]), tuple(facts[4:])), "retain": (tuple(facts[2:4]), ())}
    assert [pair.answer for pair in muse.verbatim] == ["in Oslo", "Lima by the sea"]
    assert {name: len(texts) for name, texts in muse.privacy.items()} == {"forget": 5, "holdout": 5}
    (tmp_path / "privleak" / "holdout.json").unlink()
    assert read_muse(tmp_path).privacy == {}
    (tmp_path / "verbmem" / "forget-00000-of-00002.parquet").unlink()
    (tmp_path / "verbmem" / "forget.json").write_text('[{"prompt": "a", "text": "b"}]')
    with pytest.raises(UserError, match="each needs a text, not empty, as 'gt'"):
        read_muse(tmp_path)
    with pytest.raises(UserError, match="nothing of MUSE"):
        read_muse(tmp_path / "knowmem")


def test_questions_of_muse_stand_behind_their_examples_and_end_where_the_next_begins():
    asked = benchmarks.knowledge_prompts([Pair(prompt="Q?", answer="A")], [Pair(prompt="P?", answer="B")])
    assert asked == ["Question: P?\nAnswer: B\n\nQuestion: Q?\nAnswer: "]
    for said, wanted in (
        ("Oslo\n\nmore", "Oslo"),
        ("Oslo\nQuestion", "Oslo"),
        ("a Question: b", "a "),
        ("a\nb", "a\nb"),
    ):
        assert benchmarks.until_an_end(said) == wanted


def test_figures_of_muse_are_those_of_its_formulas(tmp_path: Path):
    muse, who, other = read_muse(muse_at(tmp_path / "muse")), speaker(2), speaker(3)
    at = Setting(device=torch.device("cpu"), store=tmp_path / "store")
    asked = stage.Benchmarks(muse=muse)
    found = stage.benchmark_model(who, asked, tmp_path / "run", at, reference=other, batch_size=3).json("metrics.json")
    wanted = {name: auc_by_hand(one, muse) for name, one in (("model", who), ("reference", other))}
    for name, auc in wanted.items():
        assert found[name]["muse"]["privacy_auc"] == pytest.approx(auc)
    leak = 100 * (wanted["model"] - wanted["reference"]) / wanted["reference"]
    assert found["model"]["muse"]["privacy_leak"] == pytest.approx(leak)
    assert "privacy_leak" not in found["reference"]["muse"]
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    for name, (qs, examples) in muse.known.items():
        answers = [said(who, text, 32) for text in benchmarks.knowledge_prompts(qs, examples)]
        cut = [a.split("\n\n")[0].split("\nQuestion")[0].split("Question:")[0] for a in answers]
        wanted_f = np.mean([scorer.score(q.answer, a)["rougeL"].fmeasure for q, a in zip(qs, cut)])
        assert found["model"]["muse"][f"knowledge_{name}"] == pytest.approx(wanted_f)
    alone = stage.benchmark_model(who, asked, tmp_path / "alone", at).json("metrics.json")
    assert alone["model"]["muse"]["privacy_leak"] is None
    assert alone["reference"] is None
    assert "—" in stage.shown(alone)
    assert "muse privacy leak" in stage.shown(found)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_each_prompt_of_muse_has_room_for_a_whole_answer(tmp_path: Path, batch_size: int):
    rng = np.random.default_rng(0)
    pairs = tuple(Pair(prompt=" ".join(rng.choice(lm.TOWNS, n)), answer="Oslo by the sea") for n in (2, 160, 5))
    sizes = [len(WORDS(pair.prompt).input_ids) for pair in pairs]
    who, at = speaker(2, context=160), Setting(device=torch.device("cpu"), store=tmp_path / "store")
    assert sizes[1] > 160 - 128 > max(sizes[0], sizes[2])
    asked = stage.Benchmarks(muse=Muse(verbatim=pairs))
    with pytest.raises(UserError, match=r"verbatim text 2 has .* say too_long cut"):
        stage.benchmark_model(who, asked, tmp_path / "no", at, batch_size=batch_size)
    cut = dataclasses.replace(who, form=dataclasses.replace(lm.FORM, too_long="cut"))
    found = stage.benchmark_model(cut, asked, tmp_path / "run", at, batch_size=batch_size).json("metrics.json")
    ends = [WORDS.decode(WORDS(pair.prompt).input_ids[-32:]) for pair in pairs]
    assert [len(WORDS(end).input_ids) for end in ends] == [min(n, 32) for n in sizes]
    wanted = [evaluation.rouge_l(said(who, end, 128), pair.answer).f for end, pair in zip(ends, pairs)]
    assert found["model"]["muse"]["verbatim"] == pytest.approx(np.mean(wanted))
    small = dataclasses.replace(speaker(context=128), form=cut.form)
    with pytest.raises(UserError, match="room for an answer of 128 tokens"):
        stage.benchmark_model(small, asked, tmp_path / "no", at)


def said(who: Speaker, prompt: str, n: int) -> str:
    """A greedy answer, token by token."""
    tokens = WORDS(prompt).input_ids
    first = len(tokens)
    for _ in range(n):
        with torch.no_grad():
            tokens = [*tokens, int(who.model(torch.tensor([tokens])).logits[0, -1].argmax())]
        if tokens[-1] == WORDS.eos_token_id:
            tokens = tokens[:-1]
            break
    return WORDS.decode(tokens[first:])


def auc_by_hand(who: Speaker, muse: Muse) -> float:
    """How often a held-out text has the higher mean of its 40 % least likely tokens."""
    values: dict[str, list[float]] = {}
    for name, texts in muse.privacy.items():
        for text in texts:
            tokens = WORDS(text).input_ids
            with torch.no_grad():
                logits = who.model(torch.tensor([tokens])).logits[0].double().log_softmax(1)
            each = sorted(float(logits[k - 1, tokens[k]]) for k in range(1, len(tokens)))
            values.setdefault(name, []).append(float(np.mean(each[: int(0.4 * len(each))])))
    return float(np.mean([(h > f) + 0.5 * (h == f) for h in values["holdout"] for f in values["forget"]]))


def test_leakage_is_below_zero_where_forgotten_texts_are_still_known():
    def scores(*means: float) -> list[evaluation.TokenScores]:
        return [evaluation.TokenScores(np.full(5, m), np.zeros(5), np.ones(5), np.ones(5, bool)) for m in means]

    known = benchmarks.privacy_auc(scores(-0.1, -0.2), scores(-3.0, -4.0))
    foreign = benchmarks.privacy_auc(scores(-8.0, -9.0), scores(-3.0, -4.0))
    assert (known, foreign) == (0.0, 1.0)
    assert benchmarks.privacy_leak(known, 0.5) == -100
    assert benchmarks.privacy_leak(foreign, 0.5) == 100
    assert benchmarks.privacy_leak(0.5, 0.0) is None


def test_the_beginning_of_a_continuation_is_what_is_compared():
    text = "Ada lives in Oslo by the sea"
    tokens = WORDS(text).input_ids
    assert benchmarks.shortened(text, WORDS, 4) == WORDS.decode(tokens[:4])
    assert benchmarks.shortened(text, WORDS, 400) == text


# --- the harness and the stage ----------------------------------------------------------------------------------------


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in with the documented calls of lm_eval, and what was asked of it."""
    asked: list[Any] = []

    class HFLM:
        def __init__(self, pretrained: Any, tokenizer: Any = None, batch_size: int = 1) -> None:
            self.parts = (pretrained, tokenizer, batch_size)

    def simple_evaluate(model: HFLM, tasks: list[str]) -> dict[str, Any]:
        if "broken" in tasks:
            raise KeyError("a column")
        asked.append((model.parts, tasks))
        row = {"alias": "x", "acc,none": np.float64(0.25), "acc_stderr,none": float("nan"), "samples": [1]}
        return {"results": dict.fromkeys(tasks, row), "config": {}}

    whole: Any = types.ModuleType("lm_eval")
    whole.simple_evaluate = simple_evaluate
    part: Any = types.ModuleType("lm_eval.models.huggingface")
    part.HFLM = HFLM
    listing: Any = types.ModuleType("lm_eval.tasks")
    listing.TaskManager = lambda: types.SimpleNamespace(all_tasks=["broken", "mmlu", "wmdp_bio"])
    for module in (whole, types.ModuleType("lm_eval.models"), part, listing):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def test_the_harness_is_given_the_model_and_its_results_are_kept(tmp_path: Path, lm_eval: list[Any]):
    who, at = speaker(), Setting(device=torch.device("cpu"), store=tmp_path)
    tasks = stage.Benchmarks(tasks=("wmdp_bio", "mmlu"))
    found = stage.benchmark_model(who, tasks, tmp_path / "run", at, batch_size=4).json("metrics.json")
    assert lm_eval == [((who.model, WORDS, 4), ["wmdp_bio", "mmlu"])]
    row = {"alias": "x", "acc,none": 0.25, "acc_stderr,none": None, "samples": None}
    assert found["model"]["lm_eval"] == {"wmdp_bio": row, "mmlu": row}


def test_a_task_that_the_harness_does_not_know_is_refused_before_any_work(tmp_path: Path, lm_eval: list[Any]):
    who, at = speaker(), Setting(device=torch.device("cpu"), store=tmp_path)
    with pytest.raises(UserError, match=r"does not know the tasks wmdp_boi \(did you mean 'wmdp_bio'"):
        stage.benchmark_model(who, stage.Benchmarks(tasks=("mmlu", "wmdp_boi")), tmp_path / "no", at)
    assert not (tmp_path / "no").exists()
    assert not lm_eval
    with pytest.raises(KeyError, match="a column"):  # what breaks in a task is no mistake of the caller
        stage.benchmark_model(who, stage.Benchmarks(tasks=("broken",)), tmp_path / "broken", at)


def test_without_the_harness_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    at = Setting(device=torch.device("cpu"), store=tmp_path)
    with pytest.raises(UserError, match=r"pip install 'unsharp\[lm_eval\]'"):
        stage.benchmark_model(speaker(), stage.Benchmarks(tasks=("mmlu",)), tmp_path / "no", at)
    assert not (tmp_path / "no").exists()


def test_of_a_form_only_what_happens_to_long_texts_names_a_run(tmp_path: Path):
    who, at = speaker(), Setting(device=torch.device("cpu"), store=tmp_path)
    asked = stage.Benchmarks(questions={"wmdp": questions(2)})

    def ran(**form: Any) -> Any:
        other = dataclasses.replace(who, form=dataclasses.replace(lm.FORM, **form))
        return stage.benchmark_model(other, asked, tmp_path / "run", at)

    assert not ran().reused
    assert ran(template="auto", prompt_form="{prompt}", answer_form="{answer}", max_length=9).reused
    with pytest.raises(UserError, match="too_long"):
        ran(too_long="cut")


def test_what_does_not_fit_is_refused_before_any_work(tmp_path: Path):
    at = Setting(device=torch.device("cpu"), store=tmp_path)
    muse = read_muse(muse_at(tmp_path / "muse"))
    by_choice = stage.Benchmarks(questions={"wmdp": questions(2)})

    def refused(match: str, who: Speaker, asked: stage.Benchmarks) -> None:
        with pytest.raises(UserError, match=match):
            stage.benchmark_model(who, asked, tmp_path / "no", at)
        assert not (tmp_path / "no").exists()

    small = Speaker(model=lm.gpt2(40, width=16, context=400), tokenizer=WORDS, form=lm.FORM, name="x")
    refused("tokenizer does not fit the model: wmdp", small, by_choice)
    refused("tokenizer does not fit the model: knowledge_forget", small, stage.Benchmarks(muse=muse))
    refused("question 1 has", speaker(context=20), by_choice)
    refused("forget question 1 has", speaker(context=40), stage.Benchmarks(muse=Muse(known=muse.known)))
    refused("verbatim text 1 has", speaker(context=129), stage.Benchmarks(muse=Muse(verbatim=muse.verbatim)))
    refused("forget text 1 has", speaker(context=10), stage.Benchmarks(muse=Muse(privacy=muse.privacy)))
    for how, match in (({}, "nothing is asked"), ({"tasks": ("a", "a")}, "twice"), ({"choices": "words"}, "choices")):
        with pytest.raises(UserError, match=match):
            stage.Benchmarks(**how)
