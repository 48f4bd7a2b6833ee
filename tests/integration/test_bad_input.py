"""Mistakes of the user: exit code 2, one line that says what and how to mend it, and nothing left behind."""

from __future__ import annotations

import errno
import json
import pickle
import re
import shutil
import string
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from integration.helpers import QUICK, Answer, call, done, python, read, tree
from unsharp import checkpoints, masks

RNG = np.random.default_rng(0)


class Trap:
    """Unpickled by the unwary, it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture(scope="session")
def files(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of good and bad files."""
    root = tmp_path_factory.mktemp("files")
    good = (trained / "model.safetensors").read_bytes()
    weights = load_file(trained / "model.safetensors")
    (root / "truncated.safetensors").write_bytes(good[: len(good) // 2])
    (root / "header.safetensors").write_bytes(good[:100])
    (root / "empty.safetensors").write_bytes(b"")
    (root / "noise.safetensors").write_bytes(RNG.bytes(5000))
    (root / "huge.safetensors").write_bytes((2**62).to_bytes(8, "little") + good[8:])
    torch.save(weights, root / "whole.pt")
    (root / "truncated.pt").write_bytes((root / "whole.pt").read_bytes()[:3000])
    torch.save({"epoch": 3}, root / "nothing.pt")
    torch.save([1, 2, 3], root / "list.pt")
    save_file({k: v for k, v in weights.items() if "bias" not in k}, root / "some.safetensors")
    marker = root / "marker"
    torch.save({"state_dict": weights, "trap": Trap(marker)}, root / "trap.pt")
    for name in ("raw.pt", "raw.pth", "raw.bin", "trap.safetensors"):
        (root / name).write_bytes(pickle.dumps(Trap(marker)))
    for name, array in (("object_x", "train_x"), ("object_scores", "score")):
        with open(root / f"{name}.npz", "wb") as file:
            np.savez(file, **{array: np.array([Trap(marker)]), "train_y": np.zeros(1, int)})  # pyright: ignore
    images, labels = RNG.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8), np.arange(40) % 4
    np.savez(root / "images.npz", train_x=images, train_y=labels)
    np.savez(root / "nan.npz", train_x=np.where(np.arange(40)[:, None, None] == 7, np.nan, 0.0) * np.ones((40, 8, 8)),
             train_y=labels)  # fmt: skip
    names = np.array(list("abcd"))
    np.savez(root / "label_9.npz", train_x=images, train_y=np.where(labels == 3, 9, labels), class_names=names)
    np.savez(root / "label_-1.npz", train_x=images, train_y=np.where(labels == 3, -1, labels), class_names=names)
    np.savez(root / "label_half.npz", train_x=images, train_y=labels + 0.5)
    np.savez(root / "lengths.npz", train_x=images, train_y=labels[:39])
    np.savez(root / "other_names.npz", pictures=images, kinds=labels)
    np.savez(root / "same_ids.npz", train_x=images, train_y=labels, train_name=np.arange(40) // 2)
    np.savez(root / "score_nan.npz", score=np.where(np.arange(1433) == 5, np.nan, 0.5))
    np.savez(root / "score_short.npz", score=np.full(100, 0.5))
    (root / "cut.npz").write_bytes((root / "images.npz").read_bytes()[:900])
    with zipfile.ZipFile(root / "no_arrays.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    (root / "empty.txt").write_text("# nothing\n")
    (root / "all.txt").write_text("\n".join(map(str, range(1433))))
    (root / "twice.txt").write_text("3\n17\n3\n")
    (root / "unknown.txt").write_text("3\n99999\n")
    (root / "words.txt").write_text("3\nseven\n")
    (root / "negative.txt").write_text("3\n-1\n")
    (root / "columns.csv").write_text("name,place\n1,2\n")
    (root / "not.json").write_text("{")
    (root / "no_ids.json").write_text('{"rows": [1]}')
    (root / "order.txt").write_text("\n".join("012345678"))
    (root / "typo.json").write_text('{"epochs": 3, "bach_size": 64}')
    (root / "kind.json").write_text('{"epochs": "three"}')
    (root / "range.json").write_text('{"epochs": 3, "label_smoothing": 1.5}')
    (root / "file").write_text("a file, no directory")
    for layout in ("nothing", "flat"):
        (root / layout).mkdir()
    (root / "flat" / "a.png").write_bytes(b"")
    (root / "broken" / "cat").mkdir(parents=True)
    (root / "broken" / "cat" / "1.png").write_bytes(b"no image")
    (root / "wrong_columns").mkdir()
    (root / "wrong_columns" / "train.csv").write_text("a,b\n1,2\n")
    (root / "wrong_columns" / "test.csv").write_text("a,b\n1,2\n")
    done("split", "--random", 30, "--out", root / "split", "--threads", 1)
    done("split", "--data", "npz", "--data-dir", root / "images.npz", "--random", 3, "--out", root / "other_split")
    edited = read(root / "split" / "split.json")
    edited["ids"][0] += 1 if edited["ids"][0] + 1 not in edited["ids"] else 0.5
    (root / "edited.json").write_text(json.dumps(edited))
    return root


U = "unlearn --model $model --random 30 --out out --epochs 1"
F = "forget --model $model --random 30 --out out --epochs 1"
T = "train --epochs 1 --out out"
FOREIGN = "--arch small_cnn --data digits --random 30 --out out --epochs 1"

CASES: dict[str, tuple[str, list[str]]] = {
    # files of weights
    "model missing": ("unlearn --model nowhere.safetensors --random 30 --out out", ["nowhere.safetensors", "exist"]),
    "model is a directory": (
        "unlearn --model $files/nothing --random 30 --out out",
        ["no checkpoint", "nothing"],
    ),
    "safetensors truncated": (f"unlearn --model $files/truncated.safetensors {FOREIGN}", ["truncated", "damaged"]),
    "safetensors cut in header": (f"unlearn --model $files/header.safetensors {FOREIGN}", ["header", "damaged"]),
    "safetensors empty": (f"unlearn --model $files/empty.safetensors {FOREIGN}", ["empty", "damaged"]),
    "safetensors noise": (f"unlearn --model $files/noise.safetensors {FOREIGN}", ["noise", "damaged"]),
    "safetensors length": (f"unlearn --model $files/huge.safetensors {FOREIGN}", ["huge", "damaged"]),
    "pt truncated": (f"unlearn --model $files/truncated.pt {FOREIGN}", ["truncated.pt", "damaged"]),
    "pt without tensors": (f"unlearn --model $files/nothing.pt {FOREIGN}", ["nothing.pt", "state dict"]),
    "pt with a list": (f"unlearn --model $files/list.pt {FOREIGN}", ["list.pt", "state dict"]),
    "other architecture": (
        "forget --model $model --arch resnet18 --random 30 --out out",
        ["missing", "unknown", "--arch", ".weight"],
    ),
    "other width": ("forget --model $model --arch small_cnn --width 5 --random 30 --out out", ["shapes", "--arch"]),
    "keys missing": (f"unlearn --model $files/some.safetensors {FOREIGN}", ["missing", "bias"]),
    "foreign without arch": ("unlearn --model $files/whole.pt --random 30 --out out", ["--arch"]),
    "foreign without data": ("unlearn --model $files/whole.pt --arch small_cnn --random 30 --out out", ["--data"]),
    "data of a foreign checkpoint": ("split --model $files/whole.pt --random 30 --out out", ["--data"]),
    "other data": ("unlearn --model $model --data digits --per-class 9 --random 30 --out out", ["fingerprint"]),
    "width without arch": ("forget --model $model --width 5 --random 30 --out out", ["--width", "--arch"]),
    # ranges
    "alpha above": (f"{U} --alpha 1.5", ["alpha", "[0, 1]", "1.5"]),
    "alpha below": (f"{F} --alpha -0.1", ["alpha", "[0, 1]", "-0.1"]),
    "alpha nan": (f"{F} --alpha nan", ["alpha", "[0, 1]", "nan"]),
    "rho negative": (f"{U} --method neggrad --rule sam --rho -0.05", ["rho", "-0.05"]),
    "rho negative in training": (f"{T} --rule sam --rho -0.05", ["rho", "-0.05"]),
    "rho infinite": (f"{T} --rule sam --rho inf", ["rho", "inf"]),
    "fraction of mask 0": ("mask --model $model --random 30 --fraction 0 --out out", ["fraction", "(0, 1]"]),
    "fraction of mask above": ("mask --model $model --random 30 --fraction 1.01 --out out", ["fraction", "(0, 1]"]),
    "fraction of mask nan": ("mask --model $model --random 30 --fraction nan --out out", ["fraction", "(0, 1]"]),
    "fraction of method 0": (f"{U} --method sharp_minmax --fraction 0", ["fraction", "0"]),
    "fraction of method above": (f"{F} --method sharp_minmax --fraction 1.5", ["fraction", "1.5"]),
    "random 0": ("split --random 0 --out out", ["random", "0"]),
    "random negative": ("split --random -3 --out out", ["random", "-3"]),
    "random broken": ("split --random 1.5 --out out", ["random", "1.5"]),
    "random infinite": ("split --random inf --out out", ["random", "inf"]),
    "random nan": ("split --random nan --out out", ["random", "nan"]),
    "random all": ("split --random 1433 --out out", ["1433", "retain"]),
    "random more": ("split --random 5000 --out out", ["5000", "1433"]),
    "random next to nothing": ("split --random 0.00001 --out out", ["empty"]),
    "epochs negative": (f"{U} --epochs -2", ["epochs", "-2"]),
    "epochs 0": ("train --epochs 0 --out out", ["epochs", "0"]),
    "epochs no number": ("train --epochs many --out out", ["epochs", "many"]),
    "batch size 0": (f"{T} --batch-size 0", ["batch_size", "0"]),
    "lr 0": (f"{T} --lr 0", ["lr", "above 0"]),
    "lr nan": (f"{T} --lr nan", ["lr", "nan"]),
    "momentum": (f"{T} --optimizer adamw --momentum 0.9", ["momentum", "adamw"]),
    "momentum negative": (f"{T} --momentum -1", ["momentum", "-1"]),
    "weight decay negative": (f"{T} --weight-decay -1", ["weight_decay", "-1"]),
    "warmup": (f"{T} --warmup 1", ["warmup", "[0, 1)"]),
    "clip norm": (f"{T} --clip-norm 0", ["clip_norm", "above 0"]),
    "label smoothing": (f"{T} --label-smoothing 1", ["label_smoothing", "1"]),
    "seed negative": (f"{T} --seed -1", ["seed", "-1"]),
    "seed of evaluate negative": ("evaluate $unlearned --seed -1 --out out", ["seed", "-1"]),
    "threads 0": (f"{T} --threads 0", ["threads", "0"]),
    "save seconds 0": (f"{T} --save-seconds 0", ["--save-seconds", "0"]),
    "save seconds nan": (f"{T} --save-seconds nan", ["--save-seconds", "nan"]),
    "classes too many": (f"{T} --classes 11", ["classes", "11"]),
    "per class 0": (f"{T} --per-class 0", ["per_class", "0"]),
    "size 0": (f"{T} --size 0", ["size", "0"]),
    "std 0": (f"{T} --std 0", ["std", "0"]),
    "std of three channels": (f"{T} --std 1 1 1", ["std", "3", "1"]),
    "width 0": (f"{T} --arch small_cnn --width 0", ["width", "0"]),
    "quickstart without seeds": ("quickstart --seeds 0 --out out", ["seeds", "0"]),
    "quickstart without workers": ("quickstart --tiny --workers 0 --out out", ["workers", "0"]),
    # names
    "command": ("frget --model m", ["'frget'", "did you mean 'forget'"]),
    "no command": ("", ["command", "forget"]),
    "method": (f"{U} --method sharp_minmx", ["method", "did you mean 'sharp_minmax'"]),
    "rule": (f"{T} --rule assam", ["rule", "did you mean 'asam'"]),
    "rule of a method": (f"{U} --method retrain --rule sam", ["retrain", "set it there"]),
    "data": (f"{T} --data cifar1000", ["data", "did you mean 'cifar100'"]),
    "arch": (f"{T} --arch resnet19", ["did you mean 'resnet18'"]),
    "arch of a package": (f"{T} --arch nowhere.module:function", ["nowhere"]),
    "arch of a module": (f"{T} --arch json:network", ["json", "network"]),
    "arch option": (f"{T} --arch small_cnn --arch-option depth=9", ["depth"]),
    "arch option without value": (f"{T} --arch small_cnn --arch-option depth", ["KEY=VALUE", "depth"]),
    "optimizer": (f"{T} --optimizer addamw", ["optimizer", "did you mean 'adamw'"]),
    "optimizer with closure": (f"{T} --optimizer lbfgs", ["LBFGS"]),
    "schedule": (f"{T} --schedule cosin", ["cosin", "cosine"]),
    "precision": (f"{T} --precision fp32", ["fp32", "float32"]),
    "augmentation": (f"{T} --augment flop", ["did you mean 'flip'"]),
    "attack": (f"{F} --attacks svc_entropi", ["attack", "did you mean 'svc_entropy'"]),
    "attack of evaluate": (
        "evaluate $unlearned --attacks svc_entropi --out out",
        ["attack", "did you mean 'svc_entropy'"],
    ),
    "no attack": ("evaluate $unlearned --attacks accuracy --out out", ["attack", "accuracy"]),
    "select": ("mask --model $model --random 30 --select larges --out out", ["did you mean 'largest'"]),
    "select without samples": (
        "mask --model $model --random 30 --select random --score-on forget --out out",
        ["random", "score_on"],
    ),
    "corrected missing": (f"{U} --method first_order --corrected nowhere.npz", ["corrected", "nowhere.npz"]),
    "score kind": ("split --scores s.npz --level high --n 9 --score-kind cscor --out out", ["did you mean 'cscore'"]),
    "level": ("split --scores s.npz --level hard --n 9 --out out", ["level", "hard", "high"]),
    "mid": ("split --scores s.npz --level mid --n 9 --mid halv --out out", ["did you mean 'half'"]),
    "forget class": ("split --forget-classes 12 --out out", ["12", "0..9"]),
    "forget class by name": ("split --forget-classes seven --out out", ["class", "'seven'"]),
    "list": ("list method", ["did you mean 'methods'"]),
    "device": (f"{T} --device tpu9", ["device", "tpu9"]),
    "option": (f"{U} --alhpa 0.5", ["--alhpa", "--alpha"]),
    "option without value": ("train --epochs", ["epochs"]),
    # configuration
    "config missing": (f"{T} --config nowhere.json", ["nowhere.json", "exist"]),
    "config no JSON": (f"{T} --config $files/not.json", ["not.json", "JSON"]),
    "config field": (f"{T} --config $files/typo.json", ["bach_size", "did you mean 'batch_size'"]),
    "config type": (f"{T} --config $files/kind.json", ["epochs", "three"]),
    "config range": (f"{T} --config $files/range.json", ["label_smoothing", "1.5"]),
    "train config field": (f"{F} --train-config $files/typo.json", ["bach_size", "did you mean 'batch_size'"]),
    "parameter of another method": (f"{U} --method finetune --alpha 0.5", ["alpha", "finetune"]),
    "parameter of another rule": (f"{T} --rule none --rho 0.5", ["rho"]),
    "retrain without a recipe": (
        f"unlearn --model $files/whole.pt --method retrain {FOREIGN}",
        ["retrain", "--train-config"],
    ),
    "a path for a name": (f"{T} --data $files/images.npz", ["--data npz --data-dir"]),
    "near option": ("forget --model $model --epoch 3 --random 3 --out out", ["--epoch", "did you mean --epochs?"]),
    # forget sets
    "nothing to forget": ("forget --model $model --out out", ["exactly one of"]),
    "two things to forget": ("forget --model $model --random 3 --ids $files/twice.txt --out out", ["exactly one of"]),
    "split and ids": (
        "forget --model $model --split $files/split --ids $files/twice.txt --out out",
        ["--split", "--ids"],
    ),
    "ids missing": ("forget --model $model --ids nowhere.txt --out out", ["nowhere.txt", "exist"]),
    "ids empty": ("forget --model $model --ids $files/empty.txt --out out", ["empty"]),
    "ids all": ("forget --model $model --ids $files/all.txt --out out", ["all 1433", "retain"]),
    "ids twice": ("forget --model $model --ids $files/twice.txt --out out", ["twice.txt", "more than once", "3"]),
    "ids unknown": ("forget --model $model --ids $files/unknown.txt --out out", ["99999"]),
    "ids negative": ("forget --model $model --ids $files/negative.txt --out out", ["-1"]),
    "ids words": ("forget --model $model --ids $files/words.txt --out out", ["'seven'", "integers"]),
    "ids of no column": ("forget --model $model --ids $files/columns.csv --out out", ["columns", "name, place"]),
    "ids of another column": ("forget --model $model --ids $files/columns.csv:id --out out", ["'id'", "name, place"]),
    "ids no JSON": ("forget --model $model --ids $files/not.json --out out", ["not.json"]),
    "ids elsewhere in JSON": ("forget --model $model --ids $files/no_ids.json --out out", ["ids"]),
    "ids are a directory": ("forget --model $model --ids $files/nothing --out out", ["nothing"]),
    "split missing": ("forget --model $model --split nowhere --out out", ["nowhere", "exist"]),
    "split of other data": ("forget --model $model --split $files/other_split --out out", ["other data"]),
    "split edited": ("forget --model $model --split $files/edited.json --out out", ["split"]),
    "split of a split": ("split --split $files/split --out out", ["split"]),
    "scores missing": ("split --scores nowhere.npz --level high --n 9 --out out", ["nowhere.npz", "exist"]),
    "scores without level": ("split --scores $files/score_nan.npz --n 9 --out out", ["level"]),
    "scores without n": ("split --scores $files/score_nan.npz --level high --out out", ["scores need n"]),
    "level without scores": ("split --random 9 --level high --out out", ["level", "scores"]),
    "scores nan": ("split --scores $files/score_nan.npz --level high --n 9 --out out", ["NaN", "5"]),
    "scores short": ("split --scores $files/score_short.npz --level high --n 9 --out out", ["100", "1433"]),
    "scores key": ("split --scores $files/score_nan.npz:mem --level high --n 9 --out out", ["'mem'", "score"]),
    "scores cut": ("split --scores $files/cut.npz --level high --n 9 --out out", ["cut.npz"]),
    "scores suffix": ("split --scores $files/empty.txt --level high --n 9 --out out", [".npz", ".csv"]),
    # data
    "npz missing": (f"{T} --data npz --data-dir nowhere.npz", ["nowhere.npz"]),
    "npz without dir": (f"{T} --data npz", ["--data-dir"]),
    "npz cut": (f"{T} --data npz --data-dir $files/cut.npz", ["cut.npz"]),
    "npz of text": (f"{T} --data npz --data-dir $files/no_arrays.npz", ["no_arrays.npz"]),
    "npz names": (f"{T} --data npz --data-dir $files/other_names.npz", ["pictures", "kinds"]),
    "npz lengths": (f"{T} --data npz --data-dir $files/lengths.npz", ["40", "39"]),
    "images nan": (f"{T} --data npz --data-dir $files/nan.npz", ["not finite", "7"]),
    "labels above": (f"{T} --data npz --data-dir $files/label_9.npz", ["label", "9"]),
    "labels below": (f"{T} --data npz --data-dir $files/label_-1.npz", ["label", "-1"]),
    "labels no integers": (f"{T} --data npz --data-dir $files/label_half.npz", ["label"]),
    "ids of data twice": (f"{T} --data npz --data-dir $files/same_ids.npz --id-column name", ["id"]),
    "id column": (f"{T} --data npz --data-dir $files/images.npz --id-column key", ["key", "train_x"]),
    "dir of digits": (f"{T} --data-dir $files", ["dir", "digits"]),
    "hub directory missing": (f"{T} --data cifar100 --data-dir nowhere", ["nowhere"]),
    "hub directory empty": (f"{T} --data cifar100 --data-dir $files/nothing", ["layout", "parquet", "nothing"]),
    "hub directory of images": (f"{T} --data cifar100 --data-dir $files/flat", ["flat"]),
    "hub directory of tables": (f"{T} --data fashion_mnist --data-dir $files/wrong_columns", ["image", "a, b"]),
    "folder empty": (f"{T} --data folder --data-dir $files/nothing", ["no images", "DIR/train/CLASS"]),
    "folder flat": (f"{T} --data folder --data-dir $files/flat", ["no images", "a.png"]),
    "folder with a broken image": (f"{T} --data folder --data-dir $files/broken", ["1.png", "decoded"]),
    "class order missing": (f"{T} --class-order nowhere.txt", ["nowhere.txt"]),
    "class order short": (f"{T} --class-order $files/order.txt", ["class_order", "9"]),
    # runs
    "evaluate nothing": ("evaluate nowhere --out out", ["nowhere", "finished run"]),
    "evaluate a training": ("evaluate $trained --out out", ["'train'", "'unlearn'"]),
    "evaluate without a run": ("evaluate --out out", ["run"]),
    "report nothing": ("report --out out.html", ["at least one"]),
    "report of a training": ("report $trained --out out.html", ["'train'", "evaluate"]),
    "report of nothing": ("report nowhere --out out.html", ["nowhere"]),
    "show nothing": ("show nowhere", ["nowhere"]),
    # places to write
    "out below a file": (f"{T} --out $files/file/out", ["file/out", "cannot be written", "--out"]),
    "out is a file": (f"{T} --out $files/file", ["file", "--out"]),
    "out in /proc": (f"{T} --out /proc/unsharp/out", ["/proc/unsharp/out", "--out"]),
    "out right in /proc": (f"{T} --out /proc/unsharp", ["/proc/unsharp", "--out"]),
    "out holds something else": (f"{T} --out $files", ["not a run", "--out"]),
    "out holds another run": ("train --epochs 9 --out $trained", ["epochs", "--force"]),
    "forget below a file": ("forget --model $model --random 3 --out $files/file/out", ["cannot be written", "--out"]),
    "report below a file": ("report $evaluated --out $files/file/r.html", ["cannot be written", "--out"]),
    "store below a file": (f"{F} --store $files/file/store", ["file/store", "cannot be written", "--store"]),
}


@pytest.fixture(scope="session")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An `evaluate` run; the `unlearn` run stands beside it."""
    root = tmp_path_factory.mktemp("evaluated")
    how = ("--method", "finetune", "--epochs", 1, *QUICK)
    done("unlearn", "--model", trained, "--random", 30, "--out", root / "unlearned", *how)
    done("evaluate", root / "unlearned", "--out", root / "run", "--store", root / "store", "--threads", 1)
    return root / "run"


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    name: str, files: Path, trained: Path, evaluated: Path, here: Path
) -> None:
    template, expected = CASES[name]
    places = {
        "files": files,
        "model": trained / "model.safetensors",
        "trained": trained,
        "evaluated": evaluated,
        "unlearned": evaluated.parent / "unlearned",
    }
    arguments = string.Template(template).substitute(places).split()
    before = [tree(place) for place in (files, trained, evaluated.parent)]
    answer = call(*arguments, *_threads(arguments))
    assert_refused(answer, *expected)
    assert tree(here) == {}
    assert [tree(place) for place in (files, trained, evaluated.parent)] == before


def _threads(arguments: list[str]) -> list[str]:
    """Results are compared to the bit, so work runs on one thread."""
    working = arguments and arguments[0] in ("train", "split", "mask", "unlearn", "evaluate", "forget")
    return ["--threads", "1"] if working and "--threads" not in arguments and arguments[-1] != "--epochs" else []


def assert_refused(answer: Answer, *expected: str, begun: bool = False) -> None:
    """Exit code 2 and one line; behind the line of progress where the work could begin."""
    assert answer.code == 2, answer
    lines = answer.err.strip().splitlines()
    if begun:
        assert re.fullmatch(r"\w+: [\d,]+ steps", lines.pop(0))
    assert len(lines) == 1, answer.err
    assert lines[0].startswith("unsharp: ")
    assert answer.out == ""
    for text in expected:
        assert text in lines[0]


def test_a_network_that_does_not_take_the_inputs(here: Path) -> None:
    (here / "of_one_size.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    torch.save(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).state_dict(), here / "weights.pt")
    command = "forget --model weights.pt --arch of_one_size:build --data digits --size 16 --random 30 --out out"
    answer = call(*command.split())
    assert answer.code == 2
    assert all(word in answer.err for word in ("of_one_size:build", "(1, 16, 16)", "--size"))
    assert answer.err.count("\n") == 1


def test_ids_of_files_where_ids_are_positions(here: Path) -> None:
    (here / "delete.csv").write_text("path\n3/0007.png\n")
    answer = call("split", "--data", "digits", "--ids", "delete.csv", "--out", "out")
    assert answer.code == 2
    assert "'3/0007.png'" in answer.err
    assert "--id-column" in answer.err


@pytest.mark.parametrize("name", ["trap.pt", "raw.pt", "raw.pth", "raw.bin", "trap.safetensors"])
def test_code_in_a_checkpoint_does_not_run(name: str, files: Path, here: Path) -> None:
    answer = call("unlearn", "--model", files / name, *FOREIGN.split())
    assert_refused(answer, name, "damaged")
    assert not (files / "marker").exists()
    assert tree(here) == {}


def test_code_in_arrays_does_not_run(files: Path, here: Path) -> None:
    assert_refused(call(*T.split(), "--data", "npz", "--data-dir", files / "object_x.npz"), "object_x.npz")
    scores = files / "object_scores.npz"
    assert_refused(call("split", "--scores", f"{scores}:score", "--level", "high", "--n", 9, "--out", "out"), "scores")
    assert not (files / "marker").exists()
    assert tree(here) == {}
    # The trap is one: who opens it carelessly springs it.
    pickle.loads((files / "raw.pt").read_bytes())
    assert (files / "marker").exists()
    (files / "marker").unlink()


def test_a_mistake_in_a_process_of_its_own() -> None:
    """A call in a process of its own ends as a call in this one does."""
    assert_refused(python("-m", "unsharp", "frget"), "did you mean 'forget'")


@pytest.mark.parametrize("command", ["train", "unlearn", "forget", "mask"])
def test_a_full_disk(command: str, trained: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights no longer fit; nothing is left under the name of the result, and the next call succeeds."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    what = ["--model", trained, "--random", 30] if command != "train" else []
    loop = ["--epochs", 1, *QUICK] if command != "mask" else ["--threads", 1]
    with monkeypatch.context() as patch:
        patch.setattr(masks.files if command == "mask" else checkpoints, "save_file", full)
        answer = call(command, *what, *loop, "--out", "out")
        assert_refused(answer, "full", "out", "free", begun=command != "mask")
        assert not [p for p in tree(here) if not p.startswith(".")]
    done(command, *what, *loop, "--out", "out")
    assert (here / "out" / "run.json").is_file()
    assert [p.name for p in here.iterdir()] == ["out"]


def test_a_really_full_disk(trained: Path, tmp_path: Path) -> None:
    """A file system of 100 kB, where the system lets us have one."""
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)]
    if mount is None or subprocess.run([mount, *options], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        how = ["--epochs", 1, *QUICK, "--out", place / "out"]
        for command, what in (("train", []), ("forget", ["--model", trained, "--random", 30])):
            assert_refused(call(command, *what, *how), "full", "out", begun=True)
            assert not (place / "out").exists()
    finally:
        subprocess.run(["umount", str(place)], check=True)
