"""Configurations go through JSON and back, hash by content, and name the field that is wrong."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unsharp import config
from unsharp.engine import LoopConfig, OptimizerConfig
from unsharp.errors import UserError, listed, unknown
from unsharp.methods import METHODS, Method
from unsharp.registry import Registry, summary
from unsharp.sharpness import RULES, AdaptiveSharpness, NoRule, Rule, Sharpness

quick = settings(deadline=None, max_examples=60)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    width: int
    ratio: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    title: str
    inner: Inner
    others: tuple[Inner, ...] = ()
    maybe: Inner | None = None
    number: float | int | None = None
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    rule: Rule = dataclasses.field(default_factory=NoRule)
    sizes: tuple[float, ...] = ()


finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(1e-6, 1e6)
plain = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | finite | st.text(max_size=5)
inners = st.builds(Inner, width=st.integers(), ratio=finite)
rules = st.one_of(
    st.builds(NoRule),
    st.builds(Sharpness, rho=positive, lam=positive, sign=st.sampled_from(["min", "max"])),
    st.builds(AdaptiveSharpness, rho=positive, eta=positive, adapt=st.sampled_from(["all", "weights"])),
)
outers = st.builds(
    Outer,
    title=st.text(max_size=5),
    inner=inners,
    others=st.lists(inners, max_size=3).map(tuple),
    maybe=st.none() | inners,
    number=st.none() | finite | st.integers(),
    kind=st.sampled_from(["a", "b"]),
    flag=st.booleans(),
    options=st.dictionaries(st.text(max_size=3), plain, max_size=3),
    rule=rules,
    sizes=st.lists(finite, max_size=3).map(tuple),
)
GOOD = {"title": "t", "inner": {"width": 3}}


@quick
@given(outers)
def test_there_and_back_through_json(outer):
    text = json.dumps(config.to_dict(outer), allow_nan=False)
    again = config.from_dict(Outer, json.loads(text))
    assert again == outer
    assert type(again.rule) is type(outer.rule)
    assert config.digest(again) == config.digest(outer)


@quick
@given(outers, outers)
def test_digest_and_differences_tell_the_same(a, b):
    """Two configurations have one digest exactly if no field differs."""
    rows = config.differences(config.to_dict(a), config.to_dict(b))
    same = json.dumps(config.to_dict(a), sort_keys=True) == json.dumps(config.to_dict(b), sort_keys=True)
    assert (config.digest(a) == config.digest(b)) == same
    assert same <= (rows == [])


def test_left_out_fields_take_their_defaults():
    assert config.from_dict(Outer, GOOD) == Outer(title="t", inner=Inner(width=3))


def test_digest_is_the_sha256_of_sorted_json_in_every_process():
    text = '[{"ratio":0.5,"width":3},"x"]'
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert config.digest(Inner(width=3), "x") == expected
    assert config.digest({"width": 3, "ratio": 0.5}, "x") == expected
    assert config.digest(Inner(width=3)) != config.digest(Inner(width=4))
    assert config.digest(Path("a")) == config.digest("a")
    code = "from unsharp import config; print(config.digest({'b': 1, 'a': [2.5, None]}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert out.stdout.strip() == config.digest({"a": [2.5, None], "b": 1})


def environment():
    return {"PYTHONPATH": str(Path(config.__file__).parents[1]), "PYTHONHASHSEED": "7"}


def test_a_number_that_json_lacks_has_no_digest():
    with pytest.raises(ValueError, match="JSON"):
        config.digest({"a": float("nan")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"titel": "t"}, r"unknown field of Outer 'titel'; did you mean 'title'"),
        ({"title": 3}, r"Outer\.title must be of type str, got 3"),
        ({"inner": {"width": 2.5}}, r"Outer\.inner\.width must be of type int, got 2\.5"),
        ({"inner": {"width": True}}, r"Outer\.inner\.width must be of type int, got True"),
        ({"inner": {"width": "3"}}, r"Outer\.inner\.width must be of type int, got '3'"),
        ({"inner": {"width": None}}, r"Outer\.inner\.width must be of type int, got None"),
        ({"inner": {"width": 3, "ratio": True}}, r"Outer\.inner\.ratio must be of type float, got True"),
        ({"inner": {}}, r"Outer\.inner lacks width"),
        ({"inner": 3}, r"Outer\.inner must be an object with fields, got 3"),
        ({"inner": {"width": 1, "raito": 1.0}}, r"unknown field of Outer\.inner 'raito'; did you mean 'ratio'"),
        ({"others": [{"width": 1}, {"width": "x"}]}, r"Outer\.others\[1\]\.width must be of type int"),
        ({"others": {"width": 1}}, r"Outer\.others must be a list"),
        ({"sizes": "12"}, r"Outer\.sizes must be a list"),
        ({"maybe": {"width": "x"}}, r"Outer\.maybe\.width must be of type int"),
        ({"number": "many"}, r"Outer\.number does not take 'many'"),
        ({"number": True}, r"Outer\.number must be of type int, got True"),
        ({"kind": "c"}, r"Outer\.kind must be one of a, b, got 'c'"),
        ({"kind": ["a"]}, r"Outer\.kind must be one of a, b"),
        ({"flag": 1}, r"Outer\.flag must be of type bool, got 1"),
        ({"options": [1]}, r"Outer\.options must be an object"),
        ({"rule": {"name": "asm"}}, r"unknown rule 'asm'; did you mean 'asam'"),
        ({"rule": {"rho": 0.1}}, r"Outer\.rule lacks its name; known: asam, curvature, "),
        ({"rule": {"name": "sam", "eta": 0.1}}, r"unknown field of Outer\.rule 'eta'"),
        ({"rule": {"name": "sam", "rho": -1}}, r"rho must be a finite number of at least 0, got -1"),
        ({"rule": {"name": 3}}, r"Outer\.rule\.name must be of type str, got 3"),
        ({"rule": "sam"}, r"Outer\.rule must be an object with fields, got 'sam'"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(change, message):
    with pytest.raises(UserError, match=message) as caught:
        config.from_dict(Outer, GOOD | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [None, [], "x", 3])
def test_the_whole_must_be_an_object(values):
    with pytest.raises(UserError, match="Outer must be an object with fields"):
        config.from_dict(Outer, values)


def test_all_missing_fields_are_named():
    with pytest.raises(UserError, match="Outer lacks title, inner"):
        config.from_dict(Outer, {})


def test_whole_numbers_are_floats_where_floats_are_wanted():
    made = config.from_dict(Outer, GOOD | {"inner": {"width": 3, "ratio": 1}, "sizes": [1, 2.5]})
    assert isinstance(made.inner.ratio, float)
    assert [type(s) for s in made.sizes] == [float, float]
    assert config.digest(made) == config.digest(dataclasses.replace(made, inner=Inner(width=3, ratio=1.0)))
    assert type(config.from_dict(Outer, GOOD | {"number": 3}).number) is int


@pytest.mark.parametrize("name", [*RULES, *METHODS])
def test_every_registered_object_goes_there_and_back(name):
    family, registry = (Rule, RULES) if name in RULES else (Method, METHODS)
    made = registry[name]()
    values = config.to_dict(made)
    assert values["name"] == name
    assert config.from_dict(family, json.loads(json.dumps(values))) == made


def test_the_loop_goes_there_and_back():
    loop = LoopConfig(
        epochs=3, optimizer=OptimizerConfig(name="AdamW", lr=1e-3, options={"betas": [0.9, 0.99]}), clip_norm=1.0
    )
    assert config.from_dict(LoopConfig, json.loads(json.dumps(config.to_dict(loop)))) == loop
    with pytest.raises(UserError, match=r"LoopConfig\.optimizer\.lr must be of type float"):
        config.from_dict(LoopConfig, {"optimizer": {"lr": "fast"}})
    with pytest.raises(UserError, match=r"unknown optimizer 'sdg'; did you mean 'sgd'"):
        config.from_dict(LoopConfig, {"optimizer": {"name": "sdg"}})


def test_differences_name_path_and_both_values():
    a, b = Outer(title="t", inner=Inner(width=3)), Outer(title="u", inner=Inner(width=4), sizes=(1.0,))
    assert config.differences(config.to_dict(a), config.to_dict(b)) == [
        "inner.width: 3 → 4",
        "sizes: [] → [1.0]",
        "title: 't' → 'u'",
    ]
    assert config.differences({"x": None}, {}) == []
    assert config.differences({"x": {"y": 1}}, {"x": 2}) == ["x: {'y': 1} → 2"]


def test_files(tmp_path):
    path = tmp_path / "c.json"
    outer = Outer(title="é", inner=Inner(width=3), rule=Sharpness(rho=0.2))
    path.write_text(json.dumps(config.to_dict(outer)), encoding="utf-8")
    assert config.load(Outer, path) == outer
    with pytest.raises(UserError, match=r"none\.json does not exist"):
        config.load(Outer, tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        config.load(Outer, tmp_path)
    path.write_text('{"title": ')
    with pytest.raises(UserError, match="is not JSON"):
        config.load(Outer, path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        config.load(Outer, path)


def test_the_registry_finds_every_file_and_suggests():
    assert {"none", "sam", "asam"} <= set(RULES)
    assert {"retrain", "finetune", "gradient_ascent", "neggrad", "sharp_minmax"} <= set(METHODS)
    assert list(METHODS) == sorted(METHODS)
    assert len(METHODS) == len(list(METHODS))
    assert METHODS.name_of(METHODS["neggrad"]) == "neggrad"
    assert RULES.name_of(Sharpness()) == "sam"
    assert 3 not in RULES
    assert "smash" not in RULES
    for known, tried, near in [(METHODS, "sharp-minmax", "sharp_minmax"), (RULES, "asma", "asam")]:
        with pytest.raises(UserError, match=f"unknown {known.kind} '{tried}'; did you mean '{near}'. Known: "):
            known[tried]
    with pytest.raises(UserError, match="is not a registered rule"):
        RULES.name_of(Inner(width=1))


def test_a_name_is_given_once():
    registry = Registry("thing", "unsharp.sharpness")
    registry.register("one")(Inner)
    with pytest.raises(ValueError, match="thing 'one' is registered twice"):
        registry.register("one")(Outer)
    assert registry["one"] is Inner


def test_messages():
    assert "did you mean" not in str(unknown("rule", "zzzzzz", ["sam", "none"]))
    assert "Known: none, sam." in str(unknown("rule", "zzzzzz", ["sam", "none"]))
    assert listed([1, 2, 3], limit=2) == "1, 2 and 1 more"
    assert listed([1, 2]) == "1, 2"
    assert summary(Sharpness).startswith("Sharpness-aware minimisation")
    assert summary(object.__new__(type("Bare", (), {}))) == ""
