"""Choice of the forget set against brute force, and every refusal with what it must name."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unsharp.data.samples import TensorSamples
from unsharp.difficulty import ForgetConfig, ForgetSet, choose, from_ids, from_indices, from_scores
from unsharp.errors import UserError

quick = settings(deadline=None, max_examples=60)
NAMES = ("cat", "dog", "7", "empty")


def samples(n=20, ids=None, seed=0):
    rng = np.random.default_rng(seed)
    inputs = torch.from_numpy(rng.random((n, 2)))
    return TensorSamples(inputs, rng.integers(0, 3, n), NAMES, ids=ids)


TEXT_IDS = np.array([f"{i:05d}" for i in range(20)])


def brute_force(scores, ids, level, n, middle):
    """Positions by Python's sort of (how far from wanted, id); for mix the three levels one after the other."""
    if level == "mix":
        found, rest = [], list(range(len(ids)))
        q, r = divmod(n, 3)
        for part, k in (("high", q + (r > 0)), ("low", q), ("mid", q + (r > 1))):
            taken = brute_force([scores[i] for i in rest], [ids[i] for i in rest], part, k, middle)
            taken = [rest[i] for i in taken]
            found += taken
            rest = [i for i in rest if i not in taken]
        return found
    key = {"high": lambda s: -s, "low": lambda s: s, "mid": lambda s: abs(s - middle)}[level]
    return sorted(range(len(ids)), key=lambda i: (key(scores[i]), ids[i]))[:n]


@st.composite
def scored(draw):
    n = draw(st.integers(4, 15))
    scores = draw(st.lists(st.sampled_from([-0.25, 0.0, 0.25, 0.5, 0.75, 1.0]), min_size=n, max_size=n))
    numbers = draw(st.lists(st.integers(-5, 200), min_size=n, max_size=n, unique=True))
    ids = np.array(numbers) if draw(st.booleans()) else np.array([str(i) for i in numbers])
    return np.array(scores), ids


@quick
@given(scored(), st.sampled_from(["high", "mid", "low", "mix"]), st.data(), st.sampled_from(["half", "median"]))
def test_levels_are_a_sort_with_ties_by_id(case, level, data, mid):
    scores, ids = case
    n = data.draw(st.integers(3, len(ids) - 1))
    chosen = from_scores(scores, samples(len(ids), ids), level=level, n=n, mid=mid)
    middle = 0.5 if mid == "half" else sorted(scores)[len(ids) // 2]
    if mid == "median" and len(ids) % 2 == 0:
        middle = (sorted(scores)[len(ids) // 2 - 1] + middle) / 2
    expected = brute_force(scores.tolist(), ids.tolist(), level, n, middle)
    assert len(chosen) == len(set(expected)) == n
    assert chosen.indices.tolist() == sorted(expected)
    assert chosen.ids.tolist() == ids[chosen.indices].tolist()


@quick
@given(scored(), st.sampled_from(["high", "mid", "low", "mix"]), st.data())
def test_a_c_score_is_hard_where_it_is_low(case, level, data):
    scores, ids = case
    n = data.draw(st.integers(3, len(ids) - 1))
    chosen = from_scores(scores, samples(len(ids), ids), level=level, n=n, kind="cscore")
    expected = brute_force((-scores).tolist(), ids.tolist(), level, n, -0.5)
    assert chosen.indices.tolist() == sorted(expected)


def test_levels_by_hand():
    scores = np.array([0.9, 0.1, 0.45, 0.9, 0.0, 0.6])
    six = samples(6)
    assert from_scores(scores, six, level="high", n=1).indices.tolist() == [0]
    assert from_scores(scores, six, level="low", n=2).indices.tolist() == [1, 4]
    assert from_scores(scores, six, level="mid", n=1).indices.tolist() == [2]
    assert from_scores(scores, six, level="mix", n=5).indices.tolist() == [0, 2, 3, 4, 5]
    assert from_scores(scores, six, level="low", n=2, kind="cscore").indices.tolist() == [0, 3]
    assert "hardest by C-score" in from_scores(scores, six, level="high", n=2, kind="cscore").rule


@quick
@given(st.integers(2, 200), st.data(), st.integers(0, 2**40))
def test_random_sets(n, data, seed):
    k = data.draw(st.integers(1, n - 1))
    chosen = choose(ForgetConfig(random=k, seed=seed), samples(n))
    assert len(np.unique(chosen.indices)) == k
    assert (np.diff(chosen.indices) > 0).all()
    again = choose(ForgetConfig(random=k, seed=seed), samples(n))
    assert np.array_equal(chosen.indices, again.indices)
    if k > 1:
        assert np.isin(choose(ForgetConfig(random=k - 1, seed=seed), samples(n)).indices, chosen.indices).all()
    both = np.concatenate([chosen.indices, chosen.retain_indices(n)])
    assert sorted(both.tolist()) == list(range(n))


def test_random_sets_are_uniform():
    data, counts = samples(10), np.zeros(10)
    for seed in range(1000):
        counts[choose(ForgetConfig(random=0.3, seed=seed), data).indices] += 1
    assert counts.sum() == 3000
    # 1000 draws of p = 0.3: four standard deviations are 58.
    assert np.abs(counts - 300).max() < 58


def test_a_fraction_rounds_halves_to_even():
    assert len(choose(ForgetConfig(random=0.25), samples(10))) == 2
    assert len(choose(ForgetConfig(random=0.35), samples(10))) == 4


@pytest.mark.parametrize(
    ("classes", "expected"), [(("dog",), [1]), ((0,), [0]), (("cat", 1), [0, 1]), (("7",), [2]), (("1",), [1])]
)
def test_classes_by_name_and_index(classes, expected):
    data = samples()
    chosen = choose(ForgetConfig(classes=classes), data)
    assert chosen.indices.tolist() == [i for i, label in enumerate(data.labels) if label in expected]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("dgo",), "did you mean 'dog'"),
        ((4,), "out of range 0..3"),
        ((-1,), "-1 is out of range"),
        (("dog", 1), "more than once: 'dog'"),
        ((3,), "no sample of 'empty'"),
        ((0, 1, 2), "all 20 samples"),
        ((), "at least one class"),
        ("dog", "list"),
        ((1.5,), "neither"),
    ],
)
def test_wrong_classes(classes, message):
    with pytest.raises(UserError, match=message):
        choose(ForgetConfig(classes=classes), samples())


FILES = {
    "plain.txt": "\ufeff3\n\n# a comment\n  11  \n00007\n",
    "column.csv": "name,id\nx,3\ny,11\nz,7\n",
    "spaced.csv": "name, ID \nx, 3\ny, 11\nz, 7\n",
    "headless.csv": "3\n11\n7\n",
    "windows.csv": "id\r\n3\r\n11\r\n7\r\n",
    "list.json": "[3, 11, 7]",
    "object.json": '{"ids": [3, "11", 7], "note": 1}',
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_ids(name, tmp_path):
    (tmp_path / name).write_text(FILES[name], encoding="utf-8", newline="")
    assert choose(ForgetConfig(ids=str(tmp_path / name)), samples()).indices.tolist() == [3, 7, 11]


def test_a_named_column_of_ids(tmp_path):
    path = tmp_path / "two.csv"
    path.write_text("a,picture\n1,00003\n2,00011\n")
    chosen = choose(ForgetConfig(ids=f"{path}:picture"), samples(ids=TEXT_IDS))
    assert chosen.ids.tolist() == ["00003", "00011"]
    for spec, message in ((f"{path}:pictures", "it has a, picture"), (str(path), "a, picture; say which")):
        with pytest.raises(UserError, match=message):
            choose(ForgetConfig(ids=spec), samples(ids=TEXT_IDS))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "empty"),
        ("a.txt", "# nothing\n", "empty"),
        ("a.txt", "3\n99\n-1\n", r"2 of 3 ids .*99, -1"),
        ("a.txt", "3\n7\n3\n7\n5", r"2 occur more than once: 3, 7"),
        ("a.txt", "3\n003\n", r"more than once: 3"),
        ("a.txt", "3.0\nx\n", r"'3.0', 'x'"),
        ("a.txt", "1" * 30, "integers"),
        ("a.txt", "\n".join(map(str, range(20))), "all 20"),
        ("a.csv", "picture\n3\n", "'picture'"),
        ("a.csv", "id,name\n3\n", "rows do not: 2"),
        ("a.csv", "id,id\n3,4\n", "same name"),
        ("a.csv", "", "is empty"),
        ("a.csv", 'id\n"3', "cannot be read"),
        ("a.json", "[3, 4", "cannot be read"),
        ("a.json", '{"names": [3]}', "list of ids"),
        ("a.json", "[3, 4.5, true, null]", "4.5, true, null"),
        ("a.json", "[]", "empty"),
    ],
)
def test_wrong_files_of_ids(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        choose(ForgetConfig(ids=str(tmp_path / name)), samples())
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        choose(ForgetConfig(ids=str(tmp_path / "none.txt")), samples())
    with pytest.raises(UserError, match="cannot be read"):
        choose(ForgetConfig(ids=str(tmp_path)), samples())
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        choose(ForgetConfig(ids=str(tmp_path / "bytes.txt")), samples())


def test_ids_from_the_caller():
    data = samples(ids=np.arange(20) * 10)
    assert from_ids([190, np.int64(0), "50"], data).indices.tolist() == [0, 5, 19]
    assert from_ids(["00007"], samples(ids=TEXT_IDS)).indices.tolist() == [7]
    with pytest.raises(UserError, match="not in the data set: 7"):
        from_ids([7], samples(ids=TEXT_IDS))
    with pytest.raises(UserError, match="'True'"):
        from_ids([True], data)
    with pytest.raises(UserError, match="1, 2, 3, 4, 5, 6, 7, 8 and 1 more"):
        from_ids(range(10), data)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "empty"),
        ([0, 20, -1], "0..19: 20, -1"),
        ([4, 4, 2], "more than once: 4"),
        ([0.5], "integers"),
        ([True, False], "integers"),
        (range(20), "all 20"),
    ],
)
def test_wrong_indices(indices, message):
    with pytest.raises(UserError, match=message):
        from_indices(indices, samples())


def test_indices_are_positions_and_sorted():
    data = samples(ids=np.arange(20)[::-1].copy())
    chosen = from_indices([9, 2], data)
    assert chosen.indices.tolist() == [2, 9]
    assert chosen.ids.tolist() == [17, 10]
    assert chosen.retain_indices(20).tolist() == [i for i in range(20) if i not in (2, 9)]
    assert from_indices(np.array([2, 9], np.uint8), data).hash == chosen.hash


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "exactly one"),
        ({"random": 3, "ids": "x.txt"}, "got random, ids"),
        ({"random": 0}, "empty"),
        ({"random": -3}, "-3"),
        ({"random": 0.0}, r"\(0, 1\)"),
        ({"random": 1.0}, r"\(0, 1\)"),
        ({"random": float("nan")}, r"\(0, 1\)"),
        ({"random": True}, "random"),
        ({"random": 3, "seed": -1}, "seed"),
        ({"random": 3, "level": "high"}, "level"),
        ({"scores": "s.npz", "n": 3}, "high, mid, low, mix"),
        ({"scores": "s.npz", "level": "hihg", "n": 3}, "did you mean 'high'"),
        ({"scores": "s.npz", "level": "high"}, "need n"),
        ({"scores": "s.npz", "level": "high", "n": 3, "score_kind": "c-score"}, "did you mean 'cscore'"),
        ({"scores": "s.npz", "level": "high", "n": 3, "mid": "mean"}, "median"),
    ],
)
def test_wrong_configurations_need_no_data(config, message):
    with pytest.raises(UserError, match=message):
        ForgetConfig(**config).check()


@pytest.mark.parametrize(("amount", "message"), [(20, "left to retain"), (21, "21"), (0.01, "none"), (0.99, "left")])
def test_amounts_that_do_not_fit(amount, message):
    with pytest.raises(UserError, match=message):
        choose(ForgetConfig(random=amount), samples())
    with pytest.raises(UserError, match=message):
        from_scores(np.zeros(20), samples(), level="high", n=amount)


def test_a_mix_of_two_is_refused():
    with pytest.raises(UserError, match="at least 3"):
        from_scores(np.zeros(20), samples(), level="mix", n=2)


@pytest.mark.parametrize("ids", [None, TEXT_IDS])
def test_a_split_survives_json(ids, tmp_path):
    data = samples(ids=ids)
    for config in (ForgetConfig(random=0.2, seed=3), ForgetConfig(classes=("dog", 0))):
        chosen = choose(config, data)
        path = tmp_path / "split.json"
        path.write_text(json.dumps(chosen.to_dict()))
        read = ForgetSet.from_dict(json.loads(path.read_text()), data)
        assert np.array_equal(read.indices, chosen.indices)
        assert read.ids.tolist() == chosen.ids.tolist()
        assert (read.rule, read.config, read.hash) == (chosen.rule, config, chosen.hash)
        assert choose(ForgetConfig(ids=str(path)), data).hash == chosen.hash


def test_a_split_of_other_data_or_changed_by_hand_is_refused():
    data = samples()
    split = from_ids([1, 2, 3], data).to_dict()
    for other in (samples(seed=1), samples(21)):
        with pytest.raises(UserError, match="other data"):
            ForgetSet.from_dict(split, other)
    with pytest.raises(UserError, match="changed by hand"):
        ForgetSet.from_dict({**split, "ids": [1, 2, 4]}, data)
    with pytest.raises(UserError, match="not in the data set: 77"):
        ForgetSet.from_dict({**split, "ids": [1, 77]}, data)
    with pytest.raises(UserError, match="hash missing"):
        ForgetSet.from_dict({k: v for k, v in split.items() if k != "hash"}, data)
    with pytest.raises(UserError, match="sead"):
        ForgetSet.from_dict({**split, "config": {"random": 3, "sead": 1}}, data)


def test_the_hash_depends_on_samples_and_data_only():
    data = samples()
    chosen = from_ids([3, 1], data)
    assert chosen.hash == from_indices([1, 3], data).hash
    assert chosen.hash != from_ids([3, 2], data).hash
    assert chosen.hash != from_ids([3, 1], samples(seed=1)).hash
    with pytest.raises(UserError, match="20 samples, not from 19"):
        chosen.retain_indices(19)


def test_rules_name_no_file_and_no_id(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("00003\n00004\n")
    rule = choose(ForgetConfig(ids=str(path)), samples(ids=TEXT_IDS)).rule
    assert rule == "2 samples named by id"
