"""Prompts and answers: read from files, checked, and turned into tokens of which the answer alone is asked for."""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unsharp.errors import UserError, listed, unknown

PROMPT_KEYS = ("question", "prompt", "instruction")
ANSWER_KEYS = ("answer", "response", "completion", "output")
PREFERRED_KEYS = ("preferred", "alternate", "chosen")
TEXT_KEY = "text"
PARAPHRASE_KEY, PERTURBED_KEY = "paraphrased_answer", "perturbed_answer"
TEMPLATES = ("auto", "chat", "plain")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A prompt and its answer.

    Args:
        prompt: What is asked; empty for plain text.
        answer: What the model is to say, or to say no more.
        preferred: What it is to say in place of the answer, where the data give it.
        paraphrase: The answer in other words, as TOFU's perturbed files give it.
        perturbed: Wrong answers, likewise.
    """

    prompt: str
    answer: str
    preferred: str | None = None
    paraphrase: str | None = None
    perturbed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TextFormat:
    """How a pair becomes a text.

    Args:
        template: "chat" takes the tokenizer's own chat template, "plain" the two forms below, "auto" the first where
            the tokenizer has one.
        prompt_form: Plain form of the prompt, with {prompt} in it. Where the prompt is empty, nothing stands there.
        answer_form: Plain form of the answer, with {answer} in it. The two follow each other without a space.
        max_length: Tokens of a text at most; None takes what the model's context holds.
        too_long: Longer texts are refused ("refuse"), or lose the end of their answer ("cut").
    """

    template: Literal["auto", "chat", "plain"] = "auto"
    prompt_form: str = "Question: {prompt}\nAnswer:"
    answer_form: str = " {answer}"
    max_length: int | None = None
    too_long: Literal["refuse", "cut"] = "refuse"

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise unknown("template", self.template, TEMPLATES)
        if self.too_long not in ("refuse", "cut"):
            raise unknown("too_long", self.too_long, ("refuse", "cut"))
        for name in ("prompt", "answer"):
            form = getattr(self, f"{name}_form")
            if form.count(f"{{{name}}}") != 1:
                raise UserError(f"{name}_form must contain {{{name}}} once, got {form!r}")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"max_length must be at least 2 tokens, got {self.max_length}")


@dataclass(frozen=True)
class Encoded:
    """A text in tokens.

    Args:
        tokens: All of them, without padding.
        n_prompt: How many of them are the prompt, of which nothing is asked.
    """

    tokens: tuple[int, ...]
    n_prompt: int


def read_pairs(path: str | Path) -> list[Pair]:
    """Pairs from a file of `read_rows`.

    Each object has a prompt ("question", "prompt" or "instruction") and an answer ("answer", "response", "completion"
    or "output"), or a "text". A file of several lists, such as splits by name, is read as FILE:NAME.

    Args:
        path: FILE or FILE:NAME.

    Raises:
        UserError: if the file or the part is missing, or an object is none of these.
    """
    return [_pair(value, f"{path}, entry {i + 1}") for i, value in enumerate(read_rows(path))]


def read_rows(path: str | Path) -> list[Any]:
    """The objects of a JSON or JSON Lines file, plain or `.xz`, or the rows of a Parquet file.

    Args:
        path: FILE, or FILE:NAME for one of several lists that a JSON file holds by name.

    Raises:
        UserError: if the file or the part is missing or cannot be read, or holds no list with at least one entry.
    """
    file, part = _file_and_part(str(path))
    content = _content(file)
    if isinstance(content, Mapping):
        if part is None:
            raise UserError(f"{file} holds {listed(sorted(content), 20)}; say which one is meant: {file}:NAME")
        if part not in content:
            raise unknown(f"part of {file}", part, content)
        content = content[part]
    elif part is not None:
        raise UserError(f"{file} is one list and has no part {part!r}; leave :{part} out")
    if not isinstance(content, list) or not content:
        raise UserError(f"{path} must hold a list of at least one object with a prompt and an answer")
    return content


def _file_and_part(path: str) -> tuple[Path, str | None]:
    if Path(path).exists() or ":" not in path:
        return Path(path), None
    file, _, part = path.rpartition(":")
    return Path(file), part


def _content(file: Path) -> Any:
    if file.suffix == ".parquet":
        return _rows_of_parquet(file)
    try:
        with (
            lzma.open(file, "rt", encoding="utf-8") if file.suffix == ".xz" else open(file, encoding="utf-8") as opened
        ):
            text = opened.read()
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{file} is neither JSON nor JSON Lines: line {number}: {error}") from None
    return found


def _rows_of_parquet(file: Path) -> list[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(file).to_pylist()
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def _pair(value: Any, where: str) -> Pair:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} must be an object with a prompt and an answer, got {value!r}")
    answer = _first(value, ANSWER_KEYS)
    if answer is None and TEXT_KEY in value:
        prompt, answer = "", value[TEXT_KEY]
    else:
        prompt = _first(value, PROMPT_KEYS)
    if prompt is None or answer is None:
        raise UserError(
            f"{where} has {listed(sorted(value))}; it needs one of {', '.join(PROMPT_KEYS)} and one of "
            f"{', '.join(ANSWER_KEYS)}, or {TEXT_KEY}"
        )
    perturbed = value.get(PERTURBED_KEY, ())
    texts = {
        "prompt": prompt,
        "answer": answer,
        "preferred": _first(value, PREFERRED_KEYS),
        "paraphrase": value.get(PARAPHRASE_KEY),
    }
    perturbed = (perturbed,) if isinstance(perturbed, str) else tuple(perturbed)
    for name, text in [*texts.items(), *(("a perturbed answer", p) for p in perturbed)]:
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: {name} must be text, got {text!r}")
    if not answer.strip():
        raise UserError(f"{where} has an empty answer; give the text that the model said, or leave the entry out")
    return Pair(**texts, perturbed=perturbed)


def _first(value: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((value[key] for key in keys if key in value), None)


def check_apart(
    forget: Sequence[Pair], retain: Sequence[Pair], others: str = "retain", *, what: str = "forget"
) -> None:
    """Raise UserError if a text is to be forgotten and is among the others too; case and spaces do not count.

    Args:
        forget: What is to be forgotten.
        retain: What is not.
        others: What the latter are, for the message.
        what: What the former are, likewise.
    """
    kept = {_plain(pair) for pair in retain}
    both = [pair for pair in forget if _plain(pair) in kept]
    if both:
        shown = (both[0].prompt or both[0].answer)[:60]
        raise UserError(
            f"{len(both)} texts are in {what} and in {others} ({shown!r} among them); a text can be in one of them "
            f"only: take them out of {others}"
        )


def _plain(pair: Pair) -> tuple[str, str]:
    return " ".join(pair.prompt.lower().split()), " ".join(pair.answer.lower().split())


def encode(
    pairs: Sequence[Pair], tokenizer: Any, form: TextFormat, *, context: int | None, n_tokens: int, what: str
) -> list[Encoded]:
    """The tokens of each pair: a beginning token where the tokenizer sets one, prompt, answer, an end token.

    Prompt and answer are cut into tokens apart from each other, so that where the answer begins is never in doubt.

    Args:
        pairs: At least one.
        tokenizer: Of transformers.
        form: How a pair becomes a text.
        context: Tokens that the model takes at most; None where it does not say.
        n_tokens: Tokens that the model knows.
        what: What the pairs are ("forget"), for messages.

    Raises:
        UserError: if the tokenizer does not fit the model, a text is too long, or an answer is empty.
    """
    chat = form.template == "chat" or (
        form.template == "auto" and getattr(tokenizer, "chat_template", None) is not None
    )
    if chat and getattr(tokenizer, "chat_template", None) is None:
        raise UserError("the tokenizer has no chat template; take template plain")
    longest = min((n for n in (form.max_length, context) if n is not None), default=None)
    if form.max_length is not None and context is not None and form.max_length > context:
        raise UserError(f"max_length is {form.max_length} tokens, but the model takes {context} at most")
    found = []
    for i, pair in enumerate(pairs):
        where = f"{what} text {i + 1}"
        if not pair.answer.strip():
            raise UserError(f"{where} has an empty answer; give the text that the model said, or leave the entry out")
        prompt, answer = _by_template(pair, tokenizer) if chat else _by_forms(pair, tokenizer, form)
        if not answer or len(prompt) + len(answer) < 2:
            raise UserError(f"{where} has no token to predict after its first; give a longer answer or a prompt")
        tokens = [*prompt, *answer]
        if longest is not None and len(tokens) > longest:
            if form.too_long == "refuse" or len(prompt) >= longest:
                raise UserError(
                    f"{where} has {len(tokens)} tokens ({len(prompt)} of them the prompt), and {longest} are taken at "
                    "most; shorten it, or say too_long cut to lose the end of answers"
                )
            tokens = tokens[:longest]
        if (top := max(tokens)) >= n_tokens:
            raise UserError(
                f"the tokenizer does not fit the model: {where} has token {top}, and the model knows {n_tokens}; "
                "take the tokenizer that the model was trained with"
            )
        found.append(Encoded(tuple(tokens), len(prompt)))
    return found


def prompt_tokens(pair: Pair, tokenizer: Any, form: TextFormat) -> list[int]:
    """The tokens of a pair's prompt alone, after which a model would begin to answer."""
    chat = form.template == "chat" or (
        form.template == "auto" and getattr(tokenizer, "chat_template", None) is not None
    )
    return (_by_template(pair, tokenizer) if chat else _by_forms(pair, tokenizer, form))[0]


def _by_forms(pair: Pair, tokenizer: Any, form: TextFormat) -> tuple[list[int], list[int]]:
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    begin = begin if begin and tokenizer("a").input_ids[:1] == begin else []
    prompt = form.prompt_form.replace("{prompt}", pair.prompt) if pair.prompt else ""
    answer = form.answer_form.replace("{answer}", pair.answer) if pair.prompt else pair.answer
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return begin + _cut(tokenizer, prompt), [*_cut(tokenizer, answer), *end]


def _by_template(pair: Pair, tokenizer: Any) -> tuple[list[int], list[int]]:
    asked = [{"role": "user", "content": pair.prompt}]
    said = [*asked, {"role": "assistant", "content": pair.answer}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(said, tokenize=False)
    if not whole.startswith(prompt):
        raise UserError(
            "the tokenizer's chat template does not begin a conversation with its prompt, so that it cannot be told "
            "where the answer begins; take template plain"
        )
    return _cut(tokenizer, prompt), _cut(tokenizer, whole[len(prompt) :])


def _cut(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids) if text else []
