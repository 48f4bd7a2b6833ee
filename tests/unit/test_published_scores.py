"""Small files in exactly the layouts of the published ones are read as they are; those that do not fit are refused."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from unsharp.data.samples import TensorSamples
from unsharp.difficulty import ForgetConfig, choose, load_scores
from unsharp.difficulty.published import check_labels, read_names, recognise, stem
from unsharp.difficulty.scores import read_scores
from unsharp.errors import UserError

CLASSES, EACH, TEST = 4, 15, 8
N = CLASSES * EACH
RNG = np.random.default_rng(0)
LABELS = RNG.permutation(np.repeat(np.arange(CLASSES), EACH))
MEM = RNG.uniform(-0.05, 1, N).astype(np.float32)
SYNSETS = np.array(["n01440764", "n01443537", "n01484850", "n01491361"])
FILES = np.array([f"{SYNSETS[c]}_{i}.JPEG" for i, c in enumerate(LABELS)])


def samples(labels=LABELS, ids=None) -> TensorSamples:
    return TensorSamples(torch.zeros(len(labels), 1), labels, tuple("abcd"), ids=ids, fingerprint="zeros")


def influence_file(path: Path, **changes) -> str:
    """`cifar100_infl_matrix.npz`: per class a matrix (training samples × test samples) and the rows' positions."""
    test = RNG.integers(0, CLASSES, TEST)
    arrays = {"tr_mem": MEM, "tr_labels": LABELS.astype(np.int32), "tt_labels": test.astype(np.int32)}
    for c in range(CLASSES):
        arrays[f"tr_classidx_{c}"] = np.flatnonzero(np.equal(LABELS, c))
        arrays[f"tt_classidx_{c}"] = np.flatnonzero(test == c)
        arrays[f"infl_matrix_class{c}"] = RNG.random((EACH, int((test == c).sum()))).astype(np.float32)
    np.savez(path / "cifar100_infl_matrix.npz", **(arrays | changes))
    return str(path / "cifar100_infl_matrix.npz")


def imagenet_file(path: Path, dtype: str, order: np.ndarray, **changes) -> str:
    """`imagenet_index.npz`: file names as bytes, in an order of its own."""
    arrays = {
        "tr_filenames": np.array([f.encode() for f in FILES[order]], dtype=dtype),
        "tr_labels": LABELS[order],
        "tr_mem": MEM[order],
        "tt_filenames": np.array([b"ILSVRC2012_val_00000001.JPEG"], dtype=dtype),
        "tt_labels": np.array([0]),
    }
    np.savez(path / "imagenet_index.npz", **(arrays | changes))
    return str(path / "imagenet_index.npz")


# --- Feldman & Zhang -------------------------------------------------------------------------------------------------


def test_memorization_estimates_of_cifar_100(tmp_path):
    spec = influence_file(tmp_path)
    read = read_scores(spec, samples())
    assert read.kind == "memorization"
    assert np.array_equal(read.raw, MEM.astype(np.float64))
    part = samples().subset(np.arange(0, N, 4))
    assert np.array_equal(load_scores(spec, part), MEM[::4].astype(np.float64))
    assert np.array_equal(load_scores(f"{spec}:tr_mem", part), MEM[::4].astype(np.float64))
    chosen = choose(ForgetConfig(scores=spec, level="high", n=5), samples())
    assert chosen.indices.tolist() == sorted(np.argsort(-MEM)[:5].tolist())
    with pytest.raises(UserError, match="'memorization', not 'cscore'"):
        load_scores(spec, samples(), kind="cscore")


def test_an_order_that_is_not_the_datas_is_refused(tmp_path):
    spec = influence_file(tmp_path)
    by_class = samples(np.sort(LABELS))
    with pytest.raises(UserError, match="another order"):
        load_scores(spec, by_class)
    two = LABELS.copy()
    two[[3, 4]] = two[[4, 3]]
    if two[3] == two[4]:
        two[3] = (two[3] + 1) % CLASSES
    with pytest.raises(UserError, match=r"labels of \d of 60 samples are not those of the data \(sample 3: "):
        load_scores(spec, samples(two))
    with pytest.raises(UserError, match="60 scores, the full data set has 59"):
        load_scores(spec, samples(LABELS[:-1]))


def test_classes_that_are_numbered_otherwise_are_the_same(tmp_path):
    spec = influence_file(tmp_path)
    renamed = np.array([2, 0, 3, 1])[LABELS]
    assert np.array_equal(load_scores(spec, samples(renamed)), MEM.astype(np.float64))
    few = samples(renamed).subset(np.arange(12))  # too few for the agreement to be no accident
    with pytest.raises(UserError, match="not those of the data"):
        load_scores(spec, few)
    merged = np.array([0, 0, 2, 3])[LABELS]
    with pytest.raises(UserError, match="not those of the data"):
        load_scores(spec, samples(merged))


def test_pairs_of_high_influence_score_the_samples_they_name(tmp_path):
    rows = np.array([5, 9, 5, 30, 9, 41])
    np.savez(
        tmp_path / "cifar100_high_infl_pairs_infl0.15_mem0.25.npz",
        tr_idx=rows,
        tt_idx=np.arange(6),
        infl=RNG.random(6),
        mem=MEM[rows],
    )
    spec = str(tmp_path / "cifar100_high_infl_pairs_infl0.15_mem0.25.npz")
    part = samples().subset([5, 9, 41])
    assert np.array_equal(load_scores(spec, part), MEM[[5, 9, 41]].astype(np.float64))
    with pytest.raises(UserError, match="56 of 60 samples have no score"):
        load_scores(spec, samples())


@pytest.mark.parametrize("dtype", ["S", "O", "U"])
@pytest.mark.parametrize("form", ["{0}/{0}_{1}.JPEG", "train/{0}/{0}_{1}.JPEG", "{0}_{1}_{0}.JPEG", "{0}_{1}"])
def test_imagenet_is_matched_by_file_name(dtype, form, tmp_path):
    order = np.random.default_rng(1).permutation(N)
    changes = {"tr_filenames": FILES[order]} if dtype == "U" else {}
    spec = imagenet_file(tmp_path, "O" if dtype == "U" else dtype, order, **changes)
    ids = np.array([form.format(SYNSETS[c], i) for i, c in enumerate(LABELS)])
    assert np.array_equal(load_scores(spec, samples(ids=ids)), MEM.astype(np.float64))
    part = samples(ids=ids).subset(np.flatnonzero(LABELS == 2))
    alone = TensorSamples(torch.zeros(EACH, 1), np.zeros(EACH, np.int64), ("c",), ids=part.ids)  # a folder of one class
    assert np.array_equal(load_scores(spec, alone), MEM[LABELS == 2].astype(np.float64))


def test_imagenet_that_does_not_fit_is_refused(tmp_path):
    order = np.arange(N)
    spec = imagenet_file(tmp_path, "O", order)
    with pytest.raises(UserError, match="--id-column path"):
        load_scores(spec, samples())
    with pytest.raises(UserError, match=r"2 of 60 samples have no score, ids other_1\.JPEG"):
        load_scores(spec, samples(ids=np.array(["other_1.JPEG", "other_2.JPEG", *FILES[2:]])))
    mixed = LABELS.copy()
    mixed[0] = (mixed[0] + 1) % CLASSES
    with pytest.raises(UserError, match="not those of the data"):
        load_scores(spec, samples(mixed, ids=FILES))
    with pytest.raises(UserError, match=f"several samples have the file name {stem(FILES[1])}"):
        load_scores(spec, samples(ids=np.array([f"other/{FILES[1]}", *FILES[1:]])))


# --- C-scores and estimates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10-cscores-orig-order.npz", "cifar100-cscores-orig-order.npz"])
def test_c_scores_in_the_original_order(name, tmp_path):
    spec = str(tmp_path / name)
    np.savez(spec, labels=LABELS.astype(np.uint8), scores=MEM)
    read = read_scores(spec, samples())
    assert read.kind == "cscore"
    assert np.array_equal(read.difficulty, -MEM.astype(np.float64))
    assert np.array_equal(load_scores(f"{spec}:scores", samples(), kind="cscore"), -MEM.astype(np.float64))
    with pytest.raises(UserError, match="another order"):
        load_scores(spec, samples(LABELS[::-1].copy()))
    with pytest.raises(UserError, match="'cscore', not 'memorization'"):
        load_scores(spec, samples(), kind="memorization")


def test_c_scores_of_imagenet_go_by_file_name(tmp_path):
    spec, order = str(tmp_path / "imagenet-cscores-with-filename.npz"), np.random.default_rng(2).permutation(N)
    names = np.array([f.encode() for f in FILES[order]], dtype=object)
    np.savez(spec, labels=LABELS[order], scores=MEM[order], filenames=names)
    assert np.array_equal(load_scores(spec, samples(ids=FILES)), -MEM.astype(np.float64))


def test_scores_and_labels_under_another_name_are_not_taken_for_c_scores(tmp_path):
    spec = str(tmp_path / "mine.npz")
    np.savez(spec, labels=LABELS, scores=MEM)
    with pytest.raises(UserError, match="say what they are"):
        load_scores(spec, samples())
    assert np.array_equal(load_scores(spec, samples(), kind="memorization"), MEM.astype(np.float64))
    assert np.array_equal(load_scores(spec, samples(), kind="cscore"), -MEM.astype(np.float64))
    with pytest.raises(UserError, match="another order"):
        load_scores(spec, samples(LABELS[::-1].copy()), kind="memorization")


def test_the_estimates_of_rum_are_memorization_scores_in_order(tmp_path):
    spec = str(tmp_path / "estimates_results_woShuffle.npz")
    np.savez(spec, memorization=MEM, influence=np.zeros((TEST, N), np.float32))
    read = read_scores(spec, samples())
    assert (read.kind, read.standard_error) == ("memorization", None)
    assert np.array_equal(read.raw, MEM.astype(np.float64))
    part = samples().subset([3, 1])
    assert np.array_equal(load_scores(spec, part), MEM[[3, 1]].astype(np.float64))
    with pytest.raises(UserError, match="60 scores, the full data set has 59"):
        load_scores(spec, samples(LABELS[1:]))


# --- names that are pickled ------------------------------------------------------------------------------------------


class Harm:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_of_anything_else_is_refused_and_does_not_run(tmp_path):
    mark = tmp_path / "ran"
    names = np.array([f.encode() for f in FILES], dtype=object)
    names[3] = Harm(f"touch {mark}")
    spec = imagenet_file(tmp_path, "O", np.arange(N), tr_filenames=names)
    with pytest.raises(UserError, match=r"cannot be read as file names: it holds (posix|nt)\.system"):
        load_scores(spec, samples(ids=FILES))
    assert not mark.exists()
    np.load(spec, allow_pickle=True)["tr_filenames"]  # the file is as harmful as it was meant to be
    assert mark.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_names_pickled_by_any_protocol_are_read(protocol, tmp_path):
    names = np.array([f.encode() for f in FILES], dtype=object)
    names[1] = np.bytes_(names[1])
    names[2] = FILES[2].item()
    path = tmp_path / "n.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("names.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(names))
        pickle.dump(names, file, protocol=protocol)
    assert np.array_equal(read_names(path, "names"), FILES)


@pytest.mark.parametrize("names", [np.arange(N), np.array([FILES]), np.array([1.5] * N, dtype=object)])
def test_what_is_no_list_of_names_is_refused(names, tmp_path):
    spec = imagenet_file(tmp_path, "O", np.arange(N), tr_filenames=names)
    with pytest.raises(UserError, match="file names"):
        load_scores(spec, samples(ids=FILES))


def test_a_damaged_pickle_is_refused(tmp_path):
    names = np.array([f.encode() for f in FILES], dtype=object)
    path = tmp_path / "n.npz"
    for content in (pickle.dumps(names)[:-40], b"", pickle.dumps([1, 2])):
        with zipfile.ZipFile(path, "w") as archive, archive.open("names.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(names))
            file.write(content)
        with pytest.raises(UserError, match="cannot be read as file names"):
            read_names(path, "names")


# --- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("n01440764_10026.JPEG", "n01440764_10026"),
        ("train/n01440764/n01440764_10026.JPEG", "n01440764_10026"),
        ("train\\n01440764\\n01440764_10026.JPEG", "n01440764_10026"),
        ("n01981276_163_n01981276.JPEG", "n01981276_163"),
        ("a_b_c.png", "a_b_c"),
        ("plain", "plain"),
        ("dir.with.dots/image.0.png", "image.0"),
    ],
)
def test_stems(name, expected):
    assert stem(name) == expected


def test_other_archives_are_no_published_ones():
    assert recognise(Path("cscores.npz"), ["scores", "labels", "other"]) is None
    assert recognise(Path("s.npz"), ["tr_mem"]) is None
    assert recognise(Path("s.npz"), ["memorization", "influence"]) is None


def test_labels_are_compared_whatever_their_type():
    check_labels(LABELS.astype(np.uint8), LABELS, "file", named=False)
    check_labels(np.array(list("dbca"))[LABELS], LABELS, "file", named=True)
    with pytest.raises(UserError, match="not those"):
        check_labels(LABELS.astype(np.uint8)[::-1], LABELS, "file", named=True)


DATA = Path(os.environ.get("UNSHARP_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.skipif(not (DATA / "cifar100_train_1of2.ctx.npz").exists(), reason="CIFAR-100 is not on this machine")
def test_the_published_c_scores_of_cifar_100_fit_its_labels(tmp_path):
    parts = [np.load(DATA / f"cifar100_train_{k}of2.ctx.npz")["labels"] for k in (1, 2)]
    labels = np.concatenate(parts).astype(np.int64)
    scores = np.load(DATA / "scores.npz")["cifar100_cscore"]
    spec = str(tmp_path / "cifar100-cscores-orig-order.npz")
    np.savez(spec, labels=labels, scores=scores)
    names = tuple(map(str, range(100)))
    train = TensorSamples(torch.zeros(50_000, 1), labels, names, fingerprint="zeros")
    assert np.array_equal(load_scores(spec, train), -scores.astype(np.float64))
    with pytest.raises(UserError, match="another order"):
        load_scores(spec, TensorSamples(torch.zeros(50_000, 1), np.roll(labels, 1), names, fingerprint="zeros"))


def test_reading_scores_needs_no_library_beyond_numpy(tmp_path):
    """A machine that only trains reads score files too."""
    spec = influence_file(tmp_path)
    code = (
        "import sys, numpy as np, torch\n"
        "sys.modules.update(dict.fromkeys(['pandas', 'pyarrow', 'scipy', 'sklearn']))\n"
        "from unsharp.data.samples import TensorSamples\n"
        "from unsharp.difficulty import load_scores\n"
        f"labels = np.load({spec!r})['tr_labels']\n"
        "print(len(load_scores(sys.argv[1], TensorSamples(torch.zeros(len(labels), 1), labels))))"
    )
    ran = subprocess.run([sys.executable, "-c", code, spec], capture_output=True, text=True)
    assert ran.stdout.strip() == str(N), ran.stderr
