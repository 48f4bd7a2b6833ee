"""Networks against published counts, other implementations and closed forms; features by their definition."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from unsharp.errors import UserError
from unsharp.models import MODELS, Features, ModelConfig, build, features, with_features
from unsharp.models.resnet import _Shortcut

# Narrow forms of every registered network, for tests that look at behaviour rather than at size.
NARROW = {
    "resnet18": {"width": 4},
    "resnet50": {"width": 4},
    "small_cnn": {"width": 4},
    "vgg16_bn": {"width": 4},
    "vit_small": {"width": 16, "options": {"depth": 2, "heads": 2}},
    "wide_resnet": {"width": 4, "options": {"depth": 10, "widen": 2}},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small gain nothing from more, and lose much where other tests run beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def narrow(arch: str, n_classes: int = 7, channels: int = 3, size: int = 32, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(arch=arch, **{**NARROW[arch], **changes})
    return build(config, n_classes=n_classes, input_shape=(channels, size, size))


def randomise_(model: nn.Module) -> nn.Module:
    """Weights, biases and running statistics away from their neutral initial values."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("running_var", "norm.weight")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point() and tensor.ndim < 2:
                tensor.normal_(0.2, 0.3)
    return model


def n_parameters(arch: str, n_classes: int, size: int, **changes: object) -> int:
    with torch.device("meta"):
        model = build(ModelConfig(arch=arch, **changes), n_classes=n_classes, input_shape=(3, size, size))
    return sum(p.numel() for p in model.parameters())


def test_every_registered_network_has_a_narrow_form_here() -> None:
    assert list(MODELS) == sorted(NARROW)


@pytest.mark.parametrize(
    ("arch", "n_classes", "size", "published"),
    [
        ("resnet18", 1000, 224, 11_689_512),  # torchvision
        ("resnet50", 1000, 224, 25_557_032),  # torchvision
        ("vgg16_bn", 1000, 224, 138_365_992),  # torchvision
        ("vit_small", 1000, 224, 22_050_664),  # timm, vit_small_patch16_224
        ("resnet18", 10, 32, 11_173_962),  # the CIFAR networks in common use
        ("resnet50", 10, 32, 23_520_842),
        ("vgg16_bn", 10, 32, 14_728_266),
        ("wide_resnet", 10, 32, 36_479_194),  # WRN-28-10
    ],
)
def test_parameter_counts_are_the_published_ones(arch: str, n_classes: int, size: int, published: int) -> None:
    assert n_parameters(arch, n_classes, size) == published


@pytest.mark.parametrize("arch", NARROW)
def test_width_is_the_number_of_channels_of_the_first_convolution(arch: str) -> None:
    for width in (4, 8):
        config = ModelConfig(arch=arch, **{**NARROW[arch], "width": width})
        model = build(config, n_classes=3, input_shape=(3, 32, 32))
        assert next(m for m in model.modules() if isinstance(m, nn.Conv2d)).out_channels == width


def test_the_stem_follows_the_input_and_can_be_chosen() -> None:
    def first(size: int, stem: str) -> tuple[int, ...]:
        return build(
            ModelConfig(arch="resnet18", width=4, stem=stem), n_classes=3, input_shape=(3, size, size)
        ).conv1.stride

    assert [first(64, "auto"), first(65, "auto"), first(96, "small"), first(64, "large")] == [
        (1, 1),
        (2, 2),
        (1, 1),
        (2, 2),
    ]


@pytest.mark.parametrize("arch", NARROW)
@pytest.mark.parametrize("channels", [1, 3])
def test_forward_in_every_layout_and_precision(arch: str, channels: int) -> None:
    model = randomise_(narrow(arch, channels=channels)).eval()
    x = torch.randn(3, channels, 32, 32)
    plain = model(x)
    assert plain.shape == (3, 7)
    assert plain.std() > 0
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last)), plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(copy.deepcopy(model).double()(x.double()).float(), plain, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x).float() - plain).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.parametrize("arch", NARROW)
def test_every_parameter_learns_and_the_random_state_decides_the_weights(arch: str) -> None:
    model, again = narrow(arch), narrow(arch)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    randomise_(model)
    F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "vgg16_bn", "vit_small", "wide_resnet"])
def test_the_large_stem_runs_on_other_shapes(arch: str) -> None:
    config = ModelConfig(arch=arch, **NARROW[arch])
    model = build(config, n_classes=5, input_shape=(3, 96, 64))
    assert model(torch.randn(2, 3, 96, 64)).shape == (2, 5)


# --- the same computation by other hands ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "block", "depths"), [("resnet18", "basic", [2] * 4), ("resnet50", "bottleneck", [3, 4, 6, 3])]
)
def test_resnet_equals_the_one_of_transformers(arch: str, block: str, depths: list[int]) -> None:
    transformers = pytest.importorskip("transformers")
    ours = randomise_(narrow(arch, stem="large")).eval()
    expansion = 4 if block == "bottleneck" else 1
    config = transformers.ResNetConfig(
        layer_type=block, depths=depths, embedding_size=4, hidden_sizes=[4 * 2**i * expansion for i in range(4)]
    )
    theirs = transformers.ResNetModel(config).eval()
    parts = {"convolution": "conv", "normalization": "bn"}

    def our_name(name: str) -> str:
        words = name.split(".")
        if words[0] == "embedder":
            return f"{parts[words[2]]}1.{words[3]}"
        layer = f"layer{int(words[2]) + 1}.{words[4]}"
        if words[5] == "shortcut":
            return f"{layer}.downsample.{0 if words[6] == 'convolution' else 1}.{words[7]}"
        return f"{layer}.{parts[words[7]]}{int(words[6]) + 1}.{words[8]}"

    state = ours.state_dict()
    copied = {name: state[our_name(name)] for name in theirs.state_dict()}
    assert len(copied) == len(state) - 2
    theirs.load_state_dict(copied)
    x = torch.randn(2, 3, 64, 64)
    expected = ours.fc(theirs(x).pooler_output.flatten(1))
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)


def test_vit_equals_the_one_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    ours = randomise_(narrow("vit_small", size=16)).eval()
    for block in ours.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.5)  # attention far from uniform
    shape = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**shape, image_size=16, patch_size=4, layer_norm_eps=1e-6)
    theirs = transformers.ViTModel(config, add_pooling_layer=False).eval()
    mine = ours.state_dict()
    plain = {
        "cls_token": mine["cls_token"],
        "position_embeddings": mine["pos_embed"],
        **{f"projection.{k}": mine[f"patch_embed.proj.{k}"] for k in ("weight", "bias")},
        **{f"layernorm.{k}": mine[f"norm.{k}"] for k in ("weight", "bias")},
    }
    names = {"layernorm_before": "norm1", "layernorm_after": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    thirds = {"q_proj": 0, "k_proj": 1, "v_proj": 2}

    def source(name: str) -> torch.Tensor:
        if ".layers." not in f".{name}":
            return next(value for ending, value in plain.items() if name.endswith(ending))
        words = name.split(".")
        block, part, kind = f"blocks.{words[words.index('layers') + 1]}", words[-2], words[-1]
        if part in thirds:
            return mine[f"{block}.attn.qkv.{kind}"].chunk(3)[thirds[part]]
        return mine[f"{block}.{names.get(part, 'attn.proj')}.{kind}"]

    if "layers.0.attention.q_proj.weight" not in theirs.state_dict():
        pytest.skip("this transformers names the layers of its ViT in another way")
    theirs.load_state_dict({name: source(name) for name in theirs.state_dict()})
    x = torch.randn(2, 3, 16, 16)
    logits, found = with_features(ours, x)
    expected = theirs(x).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, ours.head(expected), rtol=1e-4, atol=1e-5)


def test_wide_resnet_equals_its_formula_written_out() -> None:
    model = randomise_(narrow("wide_resnet")).eval()
    state, x = model.state_dict(), torch.randn(2, 3, 32, 32)

    def bn_relu(name: str, t: torch.Tensor) -> torch.Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scaled = (t - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return (scaled * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]).clamp(min=0)

    out = F.conv2d(x, state["conv1.weight"], padding=1)
    for i, stride in enumerate((1, 2, 2)):
        name = f"blocks.{i}"
        active = bn_relu(f"{name}.bn1", out)
        inner = bn_relu(f"{name}.bn2", F.conv2d(active, state[f"{name}.conv1.weight"], stride=stride, padding=1))
        shortcut = F.conv2d(active, state[f"{name}.shortcut.weight"], stride=stride)
        out = shortcut + F.conv2d(inner, state[f"{name}.conv2.weight"], padding=1)
    expected = bn_relu("bn", out).mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


STEP = """
import torch
from unsharp.models import ModelConfig, build
torch.set_num_threads(1)
torch.manual_seed(0)
for arch, width in (("resnet18", 2), ("resnet18", 4), ("wide_resnet", 4), ("resnet50", 2)):
    options = {"depth": 10, "widen": 1} if arch == "wide_resnet" else {}
    config = ModelConfig(arch=arch, width=width, options=options)
    model = build(config, n_classes=3, input_shape=(3, 32, 32)).to(memory_format=torch.channels_last)
    for _ in range(6):
        x = torch.randn(50, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        model(x).square().mean().backward()
"""


def test_narrow_networks_leave_memory_whole_in_the_channels_last_format() -> None:
    """The allocator ends the process where torch's strided 1 × 1 convolution of few channels writes past its memory."""
    done = subprocess.run([sys.executable, "-c", STEP], env=os.environ | {"MALLOC_CHECK_": "3", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0


@pytest.mark.parametrize(("n_in", "n_out", "stride", "side"), [(2, 4, 2, 8), (5, 3, 2, 7), (7, 9, 3, 10), (8, 8, 2, 9)])
def test_a_shortcut_is_a_strided_convolution(n_in: int, n_out: int, stride: int, side: int) -> None:
    torch.manual_seed(n_in)
    shortcut = _Shortcut(n_in, n_out, stride).double().eval()
    x = torch.randn(3, n_in, side, side, dtype=torch.float64)
    expected = shortcut[1](F.conv2d(x, shortcut[0].weight, stride=stride))
    torch.testing.assert_close(shortcut(x), expected, rtol=1e-12, atol=1e-12)


def test_small_cnn_learns_the_digits() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
    order = np.random.default_rng(0).permutation(len(y))
    train, test = order[:1437], order[1437:]
    torch.manual_seed(0)
    model = build(ModelConfig(), n_classes=10, input_shape=(1, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(5):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - epoch / 5)
        for batch in np.array_split(np.random.default_rng(epoch).permutation(train), 22):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    assert (model.eval()(x[test]).argmax(1) == y[test]).float().mean() >= 0.97


# --- what a user may get wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "shape", "words"),
    [
        ({"arch": "resnet-18"}, (3, 32, 32), "did you mean 'resnet18'"),
        ({"arch": "resnet18", "options": {"widht": 3}}, (3, 32, 32), "did you mean 'width'"),
        ({"arch": "resnet18", "options": {"n_classes": 3}}, (3, 32, 32), "unknown option of resnet18 'n_classes'"),
        ({"arch": "small_cnn", "stem": "small"}, (3, 32, 32), "unknown option of small_cnn 'stem'"),
        ({"arch": "resnet18", "stem": "tiny"}, (3, 32, 32), "stem: resnet18 takes 'auto' or 'small' or 'large'"),
        ({"arch": "resnet18", "width": 0}, (3, 32, 32), "width: resnet18 takes a whole number of at least 1, got 0"),
        ({"arch": "resnet18", "width": 1.5}, (3, 32, 32), "width: resnet18 takes int, got 1.5"),
        ({"arch": "wide_resnet", "options": {"depth": 27}}, (3, 32, 32), "depth: wide_resnet takes 10, 16"),
        ({"arch": "wide_resnet", "options": {"dropout": 1.0}}, (3, 32, 32), "probability in [0, 1)"),
        ({"arch": "vit_small", "options": {"patch": 5}}, (3, 32, 32), "patch: 5 pixels do not divide images of 32x32"),
        ({"arch": "vit_small", "width": 100, "options": {"heads": 3}}, (3, 32, 32), "heads that divide width"),
        ({"arch": "vgg16_bn"}, (1, 8, 8), "needs images of at least 32x32 pixels, got 8x8"),
        ({"arch": "resnet50", "stem": "large"}, (3, 28, 28), "take stem='small', larger images"),
        ({"arch": "small_cnn"}, (1, 7, 8), "at least 8x8 pixels, got 7x8"),
        ({"arch": "resnet18"}, (64,), "takes images (channels, height, width), got (64,)"),
        ({"arch": "no_such_package:net"}, (3, 32, 32), "cannot be imported (ModuleNotFoundError"),
        ({"arch": "json:loadz"}, (3, 32, 32), "did you mean 'load"),
        ({"arch": "json:__doc__"}, (3, 32, 32), "must be a function that returns a torch.nn.Module, it is a str"),
        ({"arch": "hf:./nowhere/at/all"}, (3, 32, 32), "hf:./nowhere/at/all cannot be built"),
    ],
)
def test_a_mistake_is_refused_in_one_line(changes: dict, shape: tuple[int, ...], words: str) -> None:
    if changes["arch"].startswith("hf:"):
        pytest.importorskip("transformers")
    with pytest.raises(UserError) as error:
        build(ModelConfig(**changes), n_classes=3, input_shape=shape)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_n_classes_must_be_positive() -> None:
    with pytest.raises(UserError, match="n_classes must be at least 1, got 0"):
        build(ModelConfig(), n_classes=0, input_shape=(1, 8, 8))


# --- networks from elsewhere -----------------------------------------------------------------------------------------


def test_a_users_function_is_given_what_it_takes(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    source = (
        "from torch import nn\n"
        "def mlp(n_classes, hidden=4):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(12, hidden), nn.Linear(hidden, n_classes))\n"
        "def anything(**given):\n"
        "    model = nn.Identity(); model.given = given; return model\n"
        "def number(): return 3\n"
    )
    (tmp_path / "users_networks.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "users_networks", raising=False)

    def make(function: str, **changes: object) -> nn.Module:
        config = ModelConfig(arch=f"users_networks:{function}", **changes)
        return build(config, n_classes=5, input_shape=(3, 2, 2))

    model = make("mlp", options={"hidden": 6})
    assert model(torch.zeros(1, 3, 2, 2)).shape == (1, 5)
    assert model[1].out_features == 6
    assert make("anything", width=3).given == {"n_classes": 5, "input_shape": (3, 2, 2), "width": 3}
    with pytest.raises(UserError, match=r"unknown option of users_networks:mlp 'width'"):
        make("mlp", width=3)
    with pytest.raises(UserError, match=r"must return a torch.nn.Module, it returned int"):
        make("number")


def test_timm_is_called_as_its_documentation_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def create_model(name: str, pretrained: bool = False, **kwargs: object) -> nn.Module:
        calls.append((name, pretrained, kwargs))
        if name == "resnet26" and "img_size" in kwargs:
            raise TypeError("ResNet.__init__() got an unexpected keyword argument 'img_size'")
        if name == "nonsense":
            raise RuntimeError("Unknown model (nonsense)")
        return nn.Linear(2, 2)

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))

    def make(name: str, **options: object) -> nn.Module:
        return build(ModelConfig(arch=f"timm:{name}", options=options), n_classes=5, input_shape=(1, 32, 48))

    make("vit_tiny_patch16_224", pretrained=True)
    assert calls == [("vit_tiny_patch16_224", True, {"num_classes": 5, "in_chans": 1, "img_size": (32, 48)})]
    make("resnet26", drop_rate=0.1)
    assert calls[-1] == ("resnet26", False, {"num_classes": 5, "in_chans": 1, "drop_rate": 0.1})
    with pytest.raises(UserError, match=r"timm:nonsense cannot be built \(Unknown model"):
        make("nonsense")


@pytest.mark.parametrize(("arch", "extra"), [("timm:resnet18", "vision"), ("hf:some/model", "language")])
def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, arch: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError) as error:
        build(ModelConfig(arch=arch), n_classes=3, input_shape=(3, 32, 32))
    assert f"pip install 'unsharp[{extra}]'" in str(error.value)


@pytest.fixture
def hf_directory(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(**shape, image_size=8, patch_size=4, num_channels=3, num_labels=5)
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path, safe_serialization=True)
    return tmp_path, model


def test_a_model_of_transformers_from_a_directory(hf_directory) -> None:
    directory, saved = hf_directory
    x = torch.randn(4, 3, 8, 8)

    def make(place, n_classes: int = 5, shape: tuple[int, ...] = (3, 8, 8), **options: object) -> nn.Module:
        return build(ModelConfig(arch=f"hf:{place}", options=options), n_classes=n_classes, input_shape=shape)

    loaded = make(directory, pretrained=True)
    assert loaded.training
    torch.testing.assert_close(loaded.eval()(x), saved(pixel_values=x).logits)
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    logits, found = with_features(loaded, x)
    torch.testing.assert_close(found, saved.vit(pixel_values=x).last_hidden_state[:, 0])
    torch.testing.assert_close(saved.classifier(found), logits)
    torch.testing.assert_close(copy.deepcopy(loaded)(x), logits)

    fresh = make(directory / "config.json", n_classes=3, shape=(1, 16, 16), num_hidden_layers=2)
    assert fresh(torch.randn(2, 1, 16, 16)).shape == (2, 3)
    assert not torch.equal(make(directory).vit.embeddings.cls_token, saved.vit.embeddings.cls_token)
    other_head = make(directory, n_classes=3, pretrained=True)
    torch.testing.assert_close(features(other_head, x), found)
    with pytest.raises(UserError, match=r"drop pretrained"):
        make(directory, shape=(3, 16, 16), pretrained=True)
    with pytest.raises(UserError, match=r"did you mean 'num_hidden_layers'"):
        make(directory, num_hidden_layer=2)


def test_weights_of_transformers_in_a_pickle_are_not_read(hf_directory) -> None:
    directory, saved = hf_directory
    (directory / "model.safetensors").unlink()
    torch.save(saved.state_dict(), directory / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be built"):
        build(ModelConfig(arch=f"hf:{directory}", options={"pretrained": True}), n_classes=5, input_shape=(3, 8, 8))


def test_a_directory_without_a_classifier_is_refused(tmp_path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_family"}))
    with pytest.raises(UserError, match="cannot be built"):
        build(ModelConfig(arch=f"hf:{tmp_path}"), n_classes=5, input_shape=(3, 8, 8))


# --- penultimate features --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", NARROW)
@pytest.mark.parametrize("size", [32, 96])
def test_features_times_the_classifier_are_the_logits(arch: str, size: int) -> None:
    model = randomise_(narrow(arch, size=size)).train()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    extract, x = Features(model), torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(1))
    for batch in (x, x[:1], x[3:]):
        logits, found = extract(batch)
        torch.testing.assert_close(found @ linear.weight.T + linear.bias, logits)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks for m in model.modules())
    logits, found = with_features(model, x)
    torch.testing.assert_close(logits, model.eval()(x))
    torch.testing.assert_close(features(model, x), found)


def test_features_under_autocast_and_with_gradients() -> None:
    model = randomise_(narrow("resnet18"))
    x = torch.randn(3, 3, 32, 32, requires_grad=True)
    found = features(model, x)
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.any()
    with torch.autocast("cpu", torch.bfloat16):
        half = features(model, x)
    assert (half.float() - found).abs().max() < 0.1 * found.abs().max()


class Net(nn.Module):
    """A body to 6 features and a linear head, put together by the function a test gives."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.body, self.head, self.norm = nn.Linear(4, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.conv = nn.Conv2d(4, 3, 1)
        self.deep = nn.Conv2d(4, 3, (2, 5))
        self.rule = forward

    def forward(self, x):
        return self.rule(self, x)


def _tokens(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, 2 * x.sin(), x.cos()], dim=1)


def _maps(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([(i + 1) * x.sin() ** i for i in range(10)], dim=2).unflatten(2, (2, 5))


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: m.head(m.body(x).relu()), lambda m, x: m.body(x).relu()),
        (lambda m, x: m.head(input=m.body(x)), lambda m, x: m.body(x)),
        (lambda m, x: m.head(m.body(x)).log_softmax(1), lambda m, x: m.body(x)),
        (lambda m, x: m.head(m.head(m.body(x))), lambda m, x: m.head(m.body(x))),
        (lambda m, x: (m.head(m.body(x)), m.head(m.norm(m.body(x))))[0], lambda m, x: m.body(x)),
        (lambda m, x: {"logits": m.head(m.body(x)), "loss": None}, lambda m, x: m.body(x)),
        (lambda m, x: (m.head(m.body(x)), x), lambda m, x: m.body(x)),
        (lambda m, x: m.head(m.body(_tokens(x)))[:, 0], lambda m, x: m.body(x)),
        (lambda m, x: m.head(m.body(_tokens(x))).mean(1), lambda m, x: m.body(_tokens(x)).mean(1)),
        (lambda m, x: m.conv(_maps(x)).mean((2, 3)), lambda m, x: _maps(x).mean((2, 3))),
        (lambda m, x: m.conv(_maps(x).mean((2, 3), keepdim=True)).flatten(1), lambda m, x: _maps(x).mean((2, 3))),
        (lambda m, x: m.deep(_maps(x)).flatten(1), lambda m, x: _maps(x).flatten(1)),
    ],
)
def test_features_of_users_networks(forward, expected) -> None:
    torch.manual_seed(0)
    model, extract = Net(forward), None
    for seed in (1, 2):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        extract = extract or Features(model)
        torch.testing.assert_close(extract(x)[1], expected(model, x))


def test_a_tied_head_is_found_by_its_values_not_by_its_weights() -> None:
    model = Net(lambda m, x: m.tied(m.head(m.body(x)).relu()))
    model.tied = nn.Linear(6, 6)
    model.tied.weight = model.head.weight
    x = torch.randn(5, 4)
    torch.testing.assert_close(features(model, x), model.head(model.body(x)).relu())


def test_a_parametrized_head_and_a_compiled_model() -> None:
    model = Net(lambda m, x: m.head(m.body(x)))
    nn.utils.parametrizations.weight_norm(model.head)
    x = torch.randn(5, 4)
    torch.testing.assert_close(features(model, x), model.body(x))
    torch.testing.assert_close(features(torch.compile(model, backend="eager"), x), model.body(x))


def test_a_network_without_a_linear_head_states_its_features_itself() -> None:
    def rule(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(m.body(x), m.head.weight)

    x = torch.randn(5, 4)
    with pytest.raises(UserError, match=r"give the model a method with_features\(x\)"):
        features(Net(rule), x)

    class Stated(Net):
        def with_features(self, x):
            return self(x), self.body(x)

    model = Stated(rule)
    logits, found = with_features(model, x)
    torch.testing.assert_close(logits, model(x))
    torch.testing.assert_close(found, model.body(x))


def test_an_output_without_logits_is_refused() -> None:
    with pytest.raises(UserError, match="the model returned str"):
        features(Net(lambda m, x: "cat"), torch.randn(5, 4))


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), n=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_features_of_any_multilayer_perceptron(sizes: list[int], n: int, seed: int) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n_in, n_out in zip([3, *sizes], sizes):
        layers += [nn.Linear(n_in, n_out), nn.Tanh(), nn.Dropout(0.5)]
    body, head = nn.Sequential(*layers), nn.Linear(sizes[-1], 4)
    x = torch.randn(n, 3)
    found = features(nn.Sequential(body, head), x)
    torch.testing.assert_close(found, body.eval()(x))
