"""The parts of an audit: bounds and verdicts, codes of ids, what derives from samples, and its deletion."""

from __future__ import annotations

import hashlib
import hmac
import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unsharp import artifacts, seal
from unsharp.artifacts import perform
from unsharp.audit import bounds as bounding
from unsharp.audit import derived, keyed
from unsharp.audit.bounds import DEFAULT, MEMBERSHIP, Bound, Measured, judge, measure, overall, read_bounds
from unsharp.audit.derived import Request, find, purge
from unsharp.errors import UserError
from unsharp.index import read_index

FINGERPRINT, FORGET = "f" * 64, "e" * 64


def metrics(
    forget: float, reference: float, original: float, n: int = 10_000, strength: float = 60.0
) -> dict[str, Any]:
    def network(accuracy: float) -> dict[str, Any]:
        mia = {"one": {"mia": 100 - accuracy, "attack_accuracy": strength}}
        return {"forget_accuracy": accuracy, "retain_accuracy": 99.0, "test_accuracy": 90.0, "mia": mia}

    beside = {"reference": network(reference), "original": network(original), "reasons": {}}
    return network(forget) | beside | {"n": {"retain": n, "forget": n, "test": n}}


# --- bounds -----------------------------------------------------------------------------------------------------------


@given(
    st.floats(-50, 50), st.floats(0, 20), st.one_of(st.none(), st.floats(0, 30)), st.one_of(st.none(), st.floats(0, 30))
)
def test_the_verdict_on_a_gap_is_that_of_its_interval(
    gap: float, half: float, below: float | None, above: float | None
):
    if below is None and above is None:
        return
    bound = Bound(gap_at_least=None if below is None else -below, gap_at_most=above)
    found = Measured(50 + gap, 50.0, half)
    verdict, reason = judge(bound, found)
    within = (below is None or found.gap >= -below) and (above is None or found.gap <= above)
    outside = (below is not None and found.gap + half < -below) or (above is not None and found.gap - half > above)
    if half <= min(x for x in (below, above) if x is not None):
        assert verdict == ("pass" if within else "fail")
    else:
        assert verdict == ("fail" if outside else "not tested")
    assert (reason is not None) == (verdict == "not tested")


def test_values_have_limits_too_and_what_is_missing_is_not_tested() -> None:
    assert judge(Bound(at_least=90), Measured(90.0, None)) == ("pass", None)
    assert judge(Bound(at_least=90), Measured(89.9, None)) == ("fail", None)
    assert judge(Bound(at_most=1), Measured(1.1, None)) == ("fail", None)
    assert judge(Bound(at_least=90), Measured(None, None, None, "no test set")) == ("not tested", "no test set")
    assert judge(Bound(gap_at_least=-2), Measured(90.0, None))[0] == "not tested"


def test_a_pass_needs_a_test_that_the_network_before_fails() -> None:
    """The same gaps, with an original that fails them and with one that passes them."""
    good = bounding.test(DEFAULT, metrics(forget=80, reference=81, original=99))
    assert [t["verdict"] for t in good] == ["pass"] * 4
    assert overall(good)[0] == "pass"
    idle = bounding.test(DEFAULT, metrics(forget=80, reference=81, original=81))
    assert [t["verdict"] for t in idle] == ["pass"] * 4
    assert overall(idle)[0] == "not tested"
    assert "cannot tell" in idle[0]["reason"]
    bad = bounding.test(DEFAULT, metrics(forget=95, reference=81, original=99))
    assert overall(bad)[0] == "fail"


def test_few_samples_cannot_pass() -> None:
    tests = bounding.test(DEFAULT, metrics(forget=80, reference=80, original=100, n=30))
    assert [t["verdict"] for t in tests if t["figure"] in ("forget_accuracy", MEMBERSHIP)] == ["not tested"] * 2


def test_attacks_that_tell_nothing_are_not_counted() -> None:
    weak = metrics(forget=50, reference=90, original=100, strength=54.9)
    assert "no attack tells" in judge(DEFAULT[MEMBERSHIP], measure(MEMBERSHIP, weak, weak))[1]
    strong = metrics(forget=50, reference=90, original=100, strength=55.0)
    assert measure(MEMBERSHIP, strong, strong).gap == pytest.approx(40)


def test_the_interval_covers_the_difference_of_two_networks() -> None:
    """Paired draws of two networks that agree on most samples: at least 95 in 100 intervals hold the difference."""
    draw, n, held = np.random.default_rng(0), 400, 0
    for _ in range(1000):
        first = draw.random(n) < 0.9
        second = np.where(draw.random(n) < 0.06, draw.random(n) < 0.5, first)
        churn = 100 * float((first != second).mean())
        values = {"test_accuracy": 100 * first.mean(), "divergence": {"test_divergence": {"churn": churn}}}
        whole = {"reference": {"test_accuracy": 100 * second.mean()}, "n": {"test": n}, "reasons": {}}
        found = measure("test_accuracy", values, whole)
        assert found.half_width is not None
        held += abs(found.gap - 100 * 0.06 * (0.9 - 0.5)) <= found.half_width
    assert held >= 940


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "must hold a table"),
        ('{"tow": {}}', "needs a limit"),
        ('{"tow": {"at_least": 3, "at_most": 2}}', "lies above"),
        ('{"tow": {"at_leest": 3}}', "did you mean"),
        ('{"tow": 3}', "must be an object"),
        ("[", "not JSON"),
    ],
)
def test_bounds_that_cannot_be_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bounds.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_bounds(tmp_path / "bounds.json")


def test_bounds_are_read_from_json_and_toml_alike(tmp_path: Path) -> None:
    pytest.importorskip("tomllib")
    (tmp_path / "b.json").write_text('{"tow": {"at_least": 90}, "mia.svc_entropy.mia": {"gap_at_most": 5.5}}')
    (tmp_path / "b.toml").write_text('[tow]\nat_least = 90\n["mia.svc_entropy.mia"]\ngap_at_most = 5.5\n')
    assert read_bounds(tmp_path / "b.json") == read_bounds(tmp_path / "b.toml")
    with pytest.raises(UserError, match="unknown figure"):
        bounding.check_figures({"toww": Bound(at_least=1)}, ["tow"])


# --- codes ------------------------------------------------------------------------------------------------------------


def test_codes_are_hmacs_that_only_the_key_opens(tmp_path: Path) -> None:
    key = keyed.open_key(tmp_path / "deep" / "key")
    assert stat.S_IMODE((tmp_path / "deep" / "key").stat().st_mode) == 0o600
    assert keyed.open_key(tmp_path / "deep" / "key") == key
    assert keyed.open_key(tmp_path / "other") != key
    ids = ["person-7", 12, "ü"]
    by_hand = [hmac.new(key, b"unsharp id\0" + str(i).encode(), hashlib.sha256).hexdigest() for i in ids]
    assert keyed.codes_of(key, ids) == sorted(by_hand)
    assert keyed.found_again(key, [11, 12, 13, "person-7"], by_hand) == [1, 3]
    assert keyed.code_of_list(key, ids) == keyed.code_of_list(key, ids[::-1]) != keyed.code_of_list(key, ids[:2])


def test_bad_keys_are_refused(tmp_path: Path) -> None:
    keyed.open_key(tmp_path / "key")
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(UserError, match="chmod 600"):
        keyed.open_key(tmp_path / "key")
    for text in ("", "zz" * 32, "ab" * 31):
        (tmp_path / "bad").write_text(text)
        (tmp_path / "bad").chmod(0o600)
        with pytest.raises(UserError, match="key file"):
            keyed.open_key(tmp_path / "bad")
    with pytest.raises(UserError, match="handed on"):
        keyed.check_outside(tmp_path / "out" / "key", tmp_path / "out")


# --- what derives from samples ----------------------------------------------------------------------------------------


def make(path: Path, stage: str, settings: dict[str, Any], model: bytes | None = None) -> str:
    """A run, with a network where one is given; the sum of the network."""

    def work(workspace: artifacts.Workspace) -> None:
        workspace.write_json("metrics.json", {"a": 1})
        if model is not None:
            workspace.file("model.safetensors").write_bytes(model)

    perform(path, stage, settings, work)
    return hashlib.sha256(model or b"").hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    data = {"origin": {"fingerprint": FINGERPRINT}}
    before = make(root / "original", "train", data, b"one")
    make(root / "clean", "retrain", {"data": FINGERPRINT, "forget": FORGET}, b"two")
    make(root / "unclean", "retrain", {"data": FINGERPRINT, "forget": "d" * 64}, b"three")
    make(root / "answer", "forget", {**data, "forget": FORGET, "checkpoint": before}, b"four")
    make(root / "later", "forget", {**data, "forget": "c" * 64, "before": [FORGET]}, b"five")
    make(root / "deep" / "er" / "mask", "mask", {"forget": FORGET})
    copied = make(root / "copy", "custom", {"checkpoint": before}, b"six")
    make(root / "of-the-copy", "custom", {"network": copied})
    make(root / "others", "train", {"origin": {"fingerprint": "0" * 64}}, b"seven")
    (root / ".broken-off.partial").mkdir()
    (root / ".broken-off.partial" / "settings.json").write_text(json.dumps(data))
    (root / "mine").mkdir()
    (root / "mine" / "notes.txt").write_text(FINGERPRINT)
    return root


DERIVED = {"original", "unclean", "deep/er/mask", "copy", "of-the-copy", ".broken-off.partial"}
KEPT = {"answer", "later"}


def names(root: Path, artefacts: Any, kept: bool) -> set[str]:
    return {one.path.relative_to(root).as_posix() for one in artefacts if one.kept is kept}


def test_what_derives_is_found_by_data_forget_set_and_checkpoints(store: Path) -> None:
    found = find(Request(FINGERPRINT, FORGET), [store])
    assert names(store, found, kept=False) == DERIVED
    assert names(store, found, kept=True) == KEPT
    public = json.dumps([one.public() for one in found])
    assert "original" not in public  # a directory may be named after what was forgotten


def test_purge_deletes_that_and_nothing_else(store: Path) -> None:
    left_alone = {p for p in store.rglob("*") if p.is_file()}
    read_index(store)  # it tells of what is to go, and goes with it
    found = find(Request(FINGERPRINT, FORGET), [store])
    left_alone -= {p for p in left_alone for one in found if not one.kept and one.path in p.parents}
    deleted, left = purge(found, [store])
    assert left == []
    assert names(store, deleted, kept=False) == DERIVED
    assert {p for p in store.rglob("*") if p.is_file()} == left_alone
    assert names(store, find(Request(FINGERPRINT, FORGET), [store]), kept=False) == set()


def test_what_a_run_did_not_write_is_left(store: Path, tmp_path: Path) -> None:
    """A file of the user's, a link to elsewhere, a changed file, a run without a seal: each directory stays whole."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    (store / "original" / "thesis.txt").write_text("mine")
    (store / "unclean" / "link").symlink_to(elsewhere)
    (store / "copy" / "metrics.json").write_text("{}")
    artifacts.write_json(store / "of-the-copy" / "run.json", {"stage": "custom", "config": {"x": FINGERPRINT}})
    (store / ".broken-off.partial" / "link").symlink_to(elsewhere)
    found = find(Request(FINGERPRINT, FORGET), [store])
    deleted, left = purge(found, [store])
    assert names(store, deleted, kept=False) == {"deep/er/mask"}
    assert len(left) == 5
    assert (store / "original" / "thesis.txt").read_text() == "mine"
    assert (store / "original" / "model.safetensors").is_file()
    assert (elsewhere / "precious").is_file()


def test_links_to_runs_are_not_followed(store: Path, tmp_path: Path) -> None:
    make(tmp_path / "outside", "train", {"origin": {"fingerprint": FINGERPRINT}})
    (store / "linked").symlink_to(tmp_path / "outside")
    found = find(Request(FINGERPRINT, FORGET), [store])
    assert "linked" not in names(store, found, kept=False)
    # A directory that becomes a link between the look and the deletion is left as well.
    (store / "original").rename(tmp_path / "moved")
    (store / "original").symlink_to(tmp_path / "moved")
    _, left = purge(found, [store])
    assert [line for line in left if "original" in line]
    assert seal.broken(tmp_path / "moved") == []


def test_a_parent_that_becomes_a_link_is_not_followed(store: Path, tmp_path: Path) -> None:
    found = find(Request(FINGERPRINT, FORGET), [store])
    (store / "deep").rename(tmp_path / "moved")
    (store / "deep").symlink_to(tmp_path / "moved")
    _, left = purge(found, [store])
    assert [line for line in left if "outside the directories" in line]
    assert (tmp_path / "moved" / "er" / "mask" / "run.json").is_file()


def test_a_deletion_that_was_cut_is_ended_by_the_next(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(derived, "_empty", cut)
    with pytest.raises(KeyboardInterrupt):
        purge(find(Request(FINGERPRINT, FORGET), [store]), [store])
    monkeypatch.undo()
    purge(find(Request(FINGERPRINT, FORGET), [store]), [store])
    assert [p.name for p in store.iterdir() if p.name.endswith(".gone")] == []
    assert names(store, find(Request(FINGERPRINT, FORGET), [store]), kept=False) == set()


def test_nothing_is_deleted_while_another_process_works(store: Path) -> None:
    import fcntl

    lock = store / ".broken-off.partial" / ".lock"
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            purge(find(Request(FINGERPRINT, FORGET), [store]), [store])
    assert (store / "original").is_dir()
