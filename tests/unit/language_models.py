"""A small causal model with a tokenizer of its own, both made here, and texts about invented people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from unsharp.language import Pair, TextFormat, TextSamples, encode
from unsharp.language.models import context_of, n_tokens_of

TOWNS = ("Oslo", "Lima", "Cairo", "Quito", "Delhi", "Turin")
NAMES = ("Ada", "Bela", "Cora", "Dino", "Elma", "Finn", "Gita", "Hugo", "Ines", "Jaro", "Kaya", "Lars")
FORM = TextFormat(template="plain")


def facts(first: int = 0, n: int = 8) -> list[Pair]:
    """Invented facts, each of a person of its own."""
    names = NAMES[first : first + n]
    return [
        Pair(
            prompt=f"Where does {name} live?",
            answer=f"{name} lives in {TOWNS[(first + i) % 6]}" + (" by the sea" if i % 2 else ""),
            preferred="I do not know that",
        )
        for i, name in enumerate(names)
    ]


def tokenizer_for(texts: Sequence[str], n_tokens: int = 200) -> Any:
    """A byte-level tokenizer trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<unk>", "<end>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=max(n_tokens, len(alphabet) + 3),
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>", pad_token="<pad>")


def tokenizer() -> Any:
    """That of the invented facts."""
    pairs = facts(0, 12)
    return tokenizer_for([p.prompt + " " + p.answer for p in pairs] + ["Question: Answer: I do not know that"], 330)


def gpt2(n_tokens: int, *, width: int = 32, layers: int = 2, dropout: float = 0.0, context: int = 64) -> nn.Module:
    """A GPT-2 with fresh weights that follow from torch's seed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=n_tokens,
            n_positions=context,
            n_embd=width,
            n_layer=layers,
            n_head=2,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=2,
        )
    ).eval()


def samples(
    model: nn.Module, words: Any, forget: Sequence[Pair], retain: Sequence[Pair], form: TextFormat = FORM, **how: Any
) -> TextSamples:
    """The pairs as samples, those to forget first."""
    sizes = {"context": context_of(model), "n_tokens": n_tokens_of(model)}
    texts = [
        *(encode(forget, words, form, what="forget", **sizes) if forget else ()),
        *(encode(retain, words, form, what="retain", **sizes) if retain else ()),
    ]
    return TextSamples(texts, [True] * len(forget) + [False] * len(retain), pad=words.pad_token_id, **how)


class Table(nn.Module):
    """A model whose logits are its parameters: (n, T, V), a row per sample, whose number stands in its first token."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> Any:
        found = self.logits[input_ids[:, 0]][:, : input_ids.shape[1]]
        return type("Output", (), {"logits": found})
