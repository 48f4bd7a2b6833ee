"""Models of transformers: saved, loaded, with adapters, in half precision; and a small one that forgets."""

from __future__ import annotations

import json
import lzma
import math
import warnings
from pathlib import Path
from typing import Any

import language_models as lm
import numpy as np
import pytest
import torch
from torch import nn

from unsharp.errors import UserError
from unsharp.language import LoRA, Pair, TextSamples, configure, unlearn
from unsharp.language import models as loading
from unsharp.language.likelihood import answer_losses

pytest.importorskip("transformers")
CPU = torch.device("cpu")
TOFU = Path(__file__).resolve().parents[3] / "shared" / "data" / "tofu.json.xz"


@pytest.fixture(scope="module")
def words() -> Any:
    return lm.tokenizer()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, words: Any) -> Path:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("model")
    loading.save(place, lm.gpt2(len(words)), words)
    return place


def test_what_is_saved_is_loaded(directory: Path, words: Any):
    found = loading.load(directory, CPU)
    torch.manual_seed(0)
    made = lm.gpt2(len(words))
    assert all(torch.equal(w, found.model.state_dict()[n]) for n, w in made.state_dict().items())
    assert loading.digest(found.model) == loading.digest(made)
    assert found.tokenizer("Where?").input_ids == words("Where?").input_ids
    assert (loading.context_of(made), loading.n_tokens_of(made)) == (64, len(words))
    half = loading.load(directory, CPU, weights="bf16").model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert loading.digest(half) != loading.digest(made)
    assert list(directory.glob("*.safetensors"))


def test_adapters_are_saved_alone_and_loaded_onto_their_model(directory: Path, tmp_path: Path):
    model, words = loading.load(directory, CPU)
    samples = lm.samples(model, words, lm.facts(0, 2), lm.facts(2, 2))
    adapted, _ = unlearn(model, samples, configure("npo", lora=LoRA(rank=2), epochs=2, lr=0.01), in_place=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the base has no page on the hub, says peft
        loading.save(tmp_path, adapted, words)
    names = {path.name for path in tmp_path.iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    found = loading.load(tmp_path, CPU).model
    batch = samples.batch(np.arange(4))
    assert torch.equal(answer_losses(found, batch, "sum"), answer_losses(adapted, batch, "sum"))
    assert not torch.equal(
        answer_losses(found, batch, "sum"), answer_losses(loading.load(directory, CPU).model, batch, "sum")
    )


def test_pickled_objects_are_not_opened(directory: Path, tmp_path: Path, words: Any):
    touched = tmp_path / "touched"

    class Evil:
        def __reduce__(self):
            return Path.touch, (touched,)

    for path in directory.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save({"transformer.wte.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        loading.load(tmp_path, CPU)
    assert not touched.exists()


def test_models_that_are_not_there_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="no such directory, and the hub"):
        loading.load("nobody/nothing", CPU, local_files_only=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="that save_pretrained wrote"):
        loading.load(tmp_path, CPU)
    with pytest.raises(UserError, match="weights"):
        loading.load(tmp_path, CPU, weights="int4")


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
@pytest.mark.parametrize("rule", ["sam", "randomized_smoothing"])
def test_weights_in_half_precision_are_perturbed_in_float32(directory: Path, rule: str, lora: LoRA | None):
    model, words = loading.load(directory, CPU, weights="bf16")
    samples = lm.samples(model, words, lm.facts(0, 2), lm.facts(2, 2))
    seen: set[torch.dtype] = set()
    model.get_output_embeddings().register_forward_hook(lambda *parts: seen.add(parts[2].dtype))  # pyright: ignore
    how = {"rho": 1e-3} if rule == "sam" else {"sigma": 1e-4}
    after = [
        unlearn(model, samples, configure("npo", lora=lora, epochs=2, lr=1e-2, **settings), in_place=False)[0]
        for settings in ({}, {"rule": rule, **how})
    ]
    assert all(bool(p.isfinite().all()) for m in after for p in m.parameters())
    names = ["lora_B"] if lora else [""]
    for name in names:
        plain, ruled = (torch.cat([p.flatten() for n, p in m.named_parameters() if name in n]) for m in after)
        assert not torch.equal(plain, ruled)
    base = torch.float32 if lora else torch.bfloat16
    trained = [p for p in after[1].parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {base}
    if lora is None:
        assert seen == {torch.bfloat16, torch.float32}


# --- forgetting -------------------------------------------------------------------------------------------------------


def texts() -> tuple[list[Pair], list[Pair]]:
    """Real questions and answers where they are there, else invented facts."""
    if not TOFU.exists():
        return lm.facts(0, 6), lm.facts(6, 6)
    content = json.loads(lzma.decompress(TOFU.read_bytes()))
    cut = [
        [Pair(prompt=row["question"], answer=" ".join(row["answer"].split()[:8])) for row in content[name][:12]]
        for name in ("forget01", "retain99")
    ]
    return cut[0], cut[1]


def learnt(model: nn.Module, samples: TextSamples, steps: int) -> None:
    """Train on all texts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    batch = samples.batch(np.arange(len(samples)))
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        answer_losses(model, batch, "mean").mean().backward()
        optimizer.step()
    model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["none", "sam"])
def test_a_model_forgets_what_it_is_told_to_and_keeps_the_rest(rule: str):
    forget, retain = texts()
    words = lm.tokenizer_for([pair.prompt + " " + pair.answer for pair in forget + retain], 600)
    torch.manual_seed(0)
    model = lm.gpt2(len(words), width=64, context=160)
    samples = lm.samples(model, words, forget, retain)
    learnt(model, samples, 100)
    everything = samples.batch(np.arange(len(samples)))

    def means(network: nn.Module) -> tuple[float, float]:
        with torch.no_grad():
            losses = answer_losses(network, everything, "mean")
        return losses[: len(forget)].mean().item(), losses[len(forget) :].mean().item()

    before = means(model)
    assert max(before) < 0.5
    how = {"rho": 0.05} if rule == "sam" else {}
    settings = {"epochs": 25, "batch_size": 12, "lr": 5e-4, "gamma": 5.0, "schedule": "constant"}
    forgotten, record = unlearn(model, samples, configure("npo", rule=rule, **settings, **how))
    after = means(forgotten)
    assert after[0] > before[0] + 0.6
    assert after[1] < before[1] + 0.3
    assert math.isfinite(record.history[-1]["forget"])
