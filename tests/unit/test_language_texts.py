"""Texts: what files are read, how they become tokens, and what is refused before any work."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import language_models as lm
import numpy as np
import pytest

from unsharp.errors import UserError
from unsharp.language import Pair, TextFormat, encode, read_pairs
from unsharp.language.samples import NOT_ASKED
from unsharp.language.texts import check_apart, prompt_tokens

pytest.importorskip("transformers")
TOFU = Path(__file__).resolve().parents[3] / "shared" / "data" / "tofu.json.xz"
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def words() -> Any:
    return lm.tokenizer()


def test_files_of_all_layouts_are_read(tmp_path: Path):
    rows = [{"question": "q?", "answer": "a"}, {"prompt": "p", "response": "r", "preferred": "no"}, {"text": "plain"}]
    wanted = [
        Pair(prompt="q?", answer="a"),
        Pair(prompt="p", answer="r", preferred="no"),
        Pair(prompt="", answer="plain"),
    ]
    whole, lines, parts, packed = (tmp_path / n for n in ("a.json", "a.jsonl", "parts.json", "parts.json.xz"))
    whole.write_text(json.dumps(rows))
    lines.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    parts.write_text(json.dumps({"forget": rows, "retain": rows[:1]}))
    packed.write_bytes(lzma.compress(parts.read_bytes()))
    assert (
        read_pairs(whole)
        == read_pairs(lines)
        == read_pairs(f"{parts}:forget")
        == read_pairs(f"{packed}:forget")
        == wanted
    )
    assert read_pairs(f"{parts}:retain") == wanted[:1]


def test_perturbed_answers_are_read(tmp_path: Path):
    file = tmp_path / "forget_perturbed.json"
    row = {"question": "q?", "answer": "a", "paraphrased_answer": "b", "perturbed_answer": ["c", "d"]}
    file.write_text(json.dumps([row]))
    assert read_pairs(file) == [Pair(prompt="q?", answer="a", paraphrase="b", perturbed=("c", "d"))]


@pytest.mark.skipif(not TOFU.exists(), reason="needs the TOFU texts")
def test_tofu_is_read():
    forget, retain = read_pairs(f"{TOFU}:forget05"), read_pairs(f"{TOFU}:retain95")
    assert (len(forget), len(retain)) == (200, 3800)
    check_apart(forget, retain)
    assert all(pair.paraphrase and pair.perturbed for pair in read_pairs(f"{TOFU}:forget05_perturbed"))


@pytest.mark.parametrize(
    ("content", "part", "said"),
    [
        ('[{"question": "q", "answer": " "}]', "", "entry 1 has an empty answer"),
        ('[{"question": "q"}]', "", "it needs one of question"),
        ('[{"question": "q", "answer": 3}]', "", "answer must be text, got 3"),
        ("[]", "", "a list of at least one object"),
        ('{"a": [], "b": []}', "", "say which one is meant"),
        ('{"a": [], "b": []}', ":c", "unknown part"),
        ('[{"text": "x"}]', ":a", "has no part 'a'"),
        ('{"text": 1}\n{oops', "", "line 2"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, content: str, part: str, said: str):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=said):
        read_pairs(f"{tmp_path / 'x.json'}{part}")
    with pytest.raises(UserError, match="does not exist"):
        read_pairs(tmp_path / "y.json")


def test_the_answer_alone_is_asked_for(words: Any):
    (text,) = encode([Pair(prompt="Where?", answer="Oslo")], words, lm.FORM, context=64, n_tokens=330, what="forget")
    assert words.decode(text.tokens[: text.n_prompt]) == "Question: Where?\nAnswer:"
    assert words.decode(text.tokens[text.n_prompt :]) == " Oslo<end>"
    model = lm.gpt2(330)
    batch = lm.samples(
        model, words, [Pair(prompt="Where?", answer="Oslo")], [Pair(prompt="", answer="Lima is far")]
    ).batch(np.array([0, 1]))
    asked = batch.labels != NOT_ASKED
    assert words.decode(batch.labels[0][asked[0]]) == " Oslo<end>"
    assert words.decode(batch.labels[1][asked[1]]) == "Lima is far<end>"
    assert bool((batch.labels[asked] == batch.inputs[asked]).all())
    assert not bool((asked & (batch.mask == 0)).any())


def test_chat_templates_are_followed(words: Any):
    chat = lm.tokenizer()
    chat.chat_template = CHAT
    pair = Pair(prompt="Where?", answer="Oslo")
    (text,) = encode([pair], chat, TextFormat(), context=None, n_tokens=330, what="forget")
    assert chat.decode(text.tokens[: text.n_prompt]) == "<user>Where?<end><assistant>"
    assert chat.decode(text.tokens[text.n_prompt :]) == "Oslo<end>"
    assert prompt_tokens(pair, chat, TextFormat()) == list(text.tokens[: text.n_prompt])
    chat.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    with pytest.raises(UserError, match="cannot be told where the answer begins"):
        encode([pair], chat, TextFormat(), context=None, n_tokens=330, what="forget")
    with pytest.raises(UserError, match="no chat template"):
        encode([pair], words, TextFormat(template="chat"), context=None, n_tokens=330, what="forget")


def test_a_text_longer_than_the_context_is_refused_or_cut(words: Any):
    pairs = [Pair(prompt="Where does Ada live?", answer="Ada lives in Oslo by the sea " * 4)]
    how: dict[str, Any] = {"context": 40, "n_tokens": 330, "what": "retain"}
    with pytest.raises(UserError, match=r"retain text 1 has \d+ tokens .* 40 are taken at most"):
        encode(pairs, words, lm.FORM, **how)
    (text,) = encode(pairs, words, TextFormat(template="plain", too_long="cut"), **how)
    assert len(text.tokens) == 40
    with pytest.raises(UserError, match="max_length is 50 tokens, but the model takes 40"):
        encode(pairs, words, TextFormat(template="plain", max_length=50), **how)
    with pytest.raises(UserError, match="of them the prompt"):
        encode(pairs, words, TextFormat(template="plain", max_length=5, too_long="cut"), **how)


def test_a_tokenizer_that_does_not_fit_is_refused(words: Any):
    with pytest.raises(UserError, match=r"the tokenizer does not fit the model: forget text 1 has token \d+"):
        encode(lm.facts(0, 1), words, lm.FORM, context=64, n_tokens=100, what="forget")


def test_an_answer_without_a_token_to_predict_is_refused(words: Any):
    bare = lm.tokenizer()
    bare.eos_token = None
    with pytest.raises(UserError, match="no token to predict"):
        encode([Pair(prompt="", answer="a")], bare, lm.FORM, context=64, n_tokens=330, what="forget")
    with pytest.raises(UserError, match="empty answer"):
        encode([Pair(prompt="x", answer="\n")], words, lm.FORM, context=64, n_tokens=330, what="forget")


def test_a_text_in_forget_and_retain_is_refused():
    with pytest.raises(UserError, match=r"1 texts are in forget and in retain \('Where"):
        check_apart([Pair(prompt="Where?", answer="In  Oslo")], [Pair(prompt="where?", answer="in oslo")])
    check_apart([Pair(prompt="Where?", answer="In Oslo")], [Pair(prompt="Where?", answer="In Lima")])


@pytest.mark.parametrize("how", [{"template": "poem"}, {"too_long": "wrap"}, {"prompt_form": "?"}, {"max_length": 1}])
def test_forms_that_cannot_be_are_refused(how: dict[str, Any]):
    with pytest.raises(UserError):
        TextFormat(**how)


def test_subsets_keep_what_is_to_be_forgotten(words: Any):
    whole = lm.samples(lm.gpt2(330), words, lm.facts(0, 3), lm.facts(3, 3))
    part = whole.subset([1, 4, 5])
    assert part.forget.tolist() == [0]
    assert part.retain.tolist() == [1, 2]
    assert part.texts == [whole.texts[i] for i in (1, 4, 5)]
    assert part.fingerprint != whole.fingerprint
