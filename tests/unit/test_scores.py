"""Score files in each layout give what was written into them, and each broken one is refused by name."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from unsharp.data.samples import TensorSamples
from unsharp.difficulty import ForgetConfig, choose, load_scores
from unsharp.difficulty.files import split_spec
from unsharp.errors import UserError

N = 12
SCORES = np.random.default_rng(0).random(N)
ORDER = np.random.default_rng(1).permutation(N)
IDS = np.array([f"{i:03d}.png" for i in range(N)])
TYPES = [".npz", ".csv", ".parquet"]


def full(ids=None, n=N):
    return TensorSamples(torch.zeros(n, 1), np.zeros(n, np.int64), ("a",), ids=ids, fingerprint="zeros")


def write(path, columns):
    if path.suffix == ".npz":
        np.savez(path, **columns)
    else:
        frame = pd.DataFrame(columns)
        frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path, index=False)
    return str(path)


@pytest.mark.parametrize("suffix", TYPES)
def test_one_score_per_sample_of_the_full_source(suffix, tmp_path):
    spec = write(tmp_path / f"s{suffix}", {"mem": SCORES, "other": SCORES + 1})
    assert np.array_equal(load_scores(f"{spec}:mem", full(), kind="memorization"), SCORES)
    assert np.array_equal(load_scores(f"{spec}:mem", full(), kind="cscore"), -SCORES)
    part = full(ids=IDS).subset([7, 2, 11])
    assert np.array_equal(load_scores(f"{spec}:other", part, kind="memorization"), SCORES[[7, 2, 11]] + 1)


@pytest.mark.parametrize("suffix", TYPES)
@pytest.mark.parametrize("column", ["id", "mem_id", "sample_id", "index", "mem_index"])
def test_scores_in_another_order(suffix, column, tmp_path):
    owners = ORDER if column.endswith("index") else IDS[ORDER]
    spec = write(tmp_path / f"s{suffix}", {column: owners, "mem": SCORES[ORDER], "extra": ORDER})
    samples = full(ids=IDS)
    assert np.array_equal(load_scores(f"{spec}:mem", samples, kind="memorization"), SCORES)
    part = samples.subset([3, 9])
    assert np.array_equal(load_scores(f"{spec}:mem", part, kind="memorization"), SCORES[[3, 9]])


def test_what_stands_beside_the_scores_in_a_table_of_two_columns(tmp_path):
    spec = write(tmp_path / "s.csv", {"picture": IDS[ORDER], "value": SCORES[ORDER]})
    assert np.array_equal(load_scores(f"{spec}:value", full(ids=IDS), kind="memorization"), SCORES)


def test_scores_of_two_kinds_side_by_side_are_not_ids(tmp_path):
    other = np.append(np.inf, SCORES[1:])
    spec = write(tmp_path / "s.csv", {"mem": SCORES, "other": other})
    assert np.array_equal(load_scores(f"{spec}:mem", full(), kind="memorization"), SCORES)


def test_the_unnamed_index_of_a_frame_is_the_position(tmp_path):
    frame = pd.DataFrame({"score": SCORES[ORDER]}, index=ORDER)
    frame.to_csv(tmp_path / "s.csv")
    frame.to_parquet(tmp_path / "s.parquet")
    for name in ("s.csv", "s.parquet"):
        assert np.array_equal(load_scores(str(tmp_path / name), full(), kind="memorization"), SCORES)


@pytest.mark.parametrize("suffix", TYPES)
def test_the_key_may_be_left_out_where_it_is_clear(suffix, tmp_path):
    alone = write(tmp_path / f"a{suffix}", {"id": ORDER, "mem": SCORES[ORDER]})
    named = write(tmp_path / f"b{suffix}", {"mem": SCORES + 1, "score": SCORES})
    unclear = write(tmp_path / f"c{suffix}", {"mem": SCORES, "other": SCORES})
    assert np.array_equal(load_scores(alone, full(), kind="memorization"), SCORES)
    assert np.array_equal(load_scores(named, full(), kind="memorization"), SCORES)
    with pytest.raises(UserError, match="holds mem, other; say which"):
        load_scores(unclear, full(), kind="memorization")
    with pytest.raises(UserError, match="no 'men'; it has: mem, other"):
        load_scores(f"{unclear}:men", full(), kind="memorization")


@pytest.mark.parametrize(
    ("spec", "path", "key"),
    [
        ("s.npz", "s.npz", None),
        ("s.npz:mem", "s.npz", "mem"),
        ("C:\\x\\s.npz", "C:\\x\\s.npz", None),
        ("C:\\x\\s.NPZ:a:b", "C:\\x\\s.NPZ", "a:b"),
        ("C:/a.csv.npz:k", "C:/a.csv.npz", "k"),
        ("dir:1/s.csv:k", "dir:1/s.csv", "k"),
    ],
)
def test_a_colon_divides_only_behind_the_ending(spec, path, key):
    assert split_spec(spec, [".npz", ".csv"]) == (Path(path), key)


@pytest.mark.parametrize("spec", ["s.txt", "s", "", "s.npz:", "mem:s"])
def test_a_file_of_another_kind_is_refused(spec):
    with pytest.raises(UserError, match=r"FILE\[:KEY\]"):
        load_scores(spec, full(), kind="memorization")


@pytest.mark.parametrize("suffix", TYPES)
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"mem": SCORES[:5]}, r"5 scores, .* 12 samples.*slice"),
        ({"mem": np.append(SCORES[:-1], np.nan)}, r"1 samples have a NaN .* 011\.png"),
        ({"mem": np.append(np.inf, SCORES[1:])}, r"infinite .* 000\.png"),
        ({"id": IDS[:-2], "mem": SCORES[:-2]}, r"2 of 12 samples have no score, ids 010\.png, 011\.png"),
        ({"index": np.arange(1, N), "mem": SCORES[1:]}, r"1 of 12 samples have no score, ids 000\.png"),
        ({"id": IDS[[0, *range(11)]], "mem": SCORES}, r"more than once: 000\.png"),
        ({"index": np.arange(N) // 2, "mem": SCORES}, "6 occur more than once"),
        ({"index": np.arange(N) + 1, "mem": SCORES}, r"out of range 0\.\.11: 12"),
        ({"mem": IDS}, r"12 entries are not numbers: '000\.png'"),
        ({"index": np.arange(N) + 0.5, "mem": SCORES}, "integers"),
    ],
)
def test_broken_scores_are_refused(suffix, columns, message, tmp_path):
    spec = write(tmp_path / f"s{suffix}", columns)
    with pytest.raises(UserError, match=message) as caught:
        load_scores(f"{spec}:mem", full(ids=IDS), kind="memorization")
    assert "\n" not in str(caught.value)


def test_a_nan_outside_the_slice_does_no_harm(tmp_path):
    spec = write(tmp_path / "s.npz", {"mem": np.append(SCORES[:-1], np.nan)})
    part = full().subset(range(6))
    assert np.array_equal(load_scores(spec, part, kind="memorization"), SCORES[:6])


def test_wrong_arrays_in_an_archive(tmp_path):
    wrong = {"flat": SCORES.reshape(3, 4), "flags": SCORES > 0.5, "short": SCORES[:3], "short_index": np.arange(4)}
    spec = write(tmp_path / "s.npz", wrong)
    for key, message in (("flat", "one-dimensional"), ("flags", "numeric"), ("short", r"\(3,\).*\(4,\)")):
        with pytest.raises(UserError, match=message):
            load_scores(f"{spec}:{key}", full(), kind="memorization")


def test_pickles_and_broken_files(tmp_path):
    path = tmp_path / "s.npz"
    np.savez(path, mem=np.array([print] * N, dtype=object))
    with pytest.raises(UserError, match=r"cannot be read.*allow_pickle"):
        load_scores(str(path), full(), kind="memorization")
    np.savez_compressed(path, mem=SCORES)
    path.write_bytes(path.read_bytes()[:-30])
    for name in ("s.npz", "s.parquet", "empty.npz"):
        if not (tmp_path / name).exists():
            (tmp_path / name).write_bytes(b"PAR1" if name.endswith("parquet") else b"")
        with pytest.raises(UserError, match="cannot be read"):
            load_scores(str(tmp_path / name), full(), kind="memorization")
    with open(path, "wb") as file:
        np.save(file, SCORES)
    with pytest.raises(UserError, match="single array"):
        load_scores(str(path), full(), kind="memorization")
    for suffix in TYPES:
        with pytest.raises(UserError, match="does not exist"):
            load_scores(str(tmp_path / f"none{suffix}"), full(), kind="memorization")


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="did you mean 'cscore'"):
        load_scores("s.npz", full(), kind="cscores")


DATA = Path(os.environ.get("UNSHARP_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.skipif(not (DATA / "scores.npz").exists(), reason="the published C-scores are not on this machine")
def test_published_scores_of_cifar_100():
    spec = str(DATA / "scores.npz")
    cscore = np.load(spec)["cifar100_cscore"]
    train = full(n=50_000).subset(np.arange(0, 50_000, 7))
    mine = cscore[::7].astype(np.float64)
    chosen = {
        level: choose(
            ForgetConfig(scores=f"{spec}:cifar100_cscore", score_kind="cscore", level=level, n=300), train
        ).indices
        for level in ("high", "mid", "low", "mix")
    }
    kept = {level: np.setdiff1d(np.arange(len(mine)), indices) for level, indices in chosen.items()}
    assert mine[chosen["high"]].max() <= mine[kept["high"]].min()
    assert mine[chosen["low"]].min() >= mine[kept["low"]].max()
    assert np.abs(mine[chosen["mid"]] - 0.5).max() <= np.abs(mine[kept["mid"]] - 0.5).min()
    assert len(chosen["mix"]) == 300
    with pytest.raises(UserError, match="have no score"):
        load_scores(f"{spec}:cifar100_mem", train, kind="memorization")
    index = np.load(spec)["cifar100_mem_index"].astype(np.int64)
    scored = full(n=50_000).subset(np.sort(index))
    expected = np.load(spec)["cifar100_mem"].astype(np.float64)[np.argsort(index)]
    assert np.array_equal(load_scores(f"{spec}:cifar100_mem", scored, kind="memorization"), expected)
