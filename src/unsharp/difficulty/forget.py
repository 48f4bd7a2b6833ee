"""Which samples are to be forgotten: at random, by class, by id, or by difficulty."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from unsharp.config import from_dict, to_dict
from unsharp.difficulty.files import as_ids, find, read_ids, refuse_repeated
from unsharp.difficulty.kinds import ScoreKind
from unsharp.difficulty.result import Scores
from unsharp.difficulty.scores import as_scores, check_kind, read_scores
from unsharp.errors import UserError, listed, unknown

if TYPE_CHECKING:
    from unsharp.data.samples import Samples

Level = Literal["high", "mid", "low", "mix"]
Mid = Literal["half", "median"]
LEVELS = ("high", "mid", "low", "mix")
MIDS = ("half", "median")


@dataclass(frozen=True, kw_only=True)
class ForgetConfig:
    """How the forget set is chosen: exactly one of `random`, `classes`, `ids`, `scores`.

    Args:
        random: Number of samples (int, at least 1) or fraction of the samples (float in (0, 1)), drawn with `seed`.
        classes: Class names or indices; a string is a name first, an index if no class is called so.
        ids: File of ids: CSV (`FILE[:COLUMN]`), JSON, or text with one per line.
        scores: Score file, `FILE[:KEY]`, or the directory of a run that estimated scores; needs `level` and `n`.
        score_kind: "memorization" (higher is harder), "cscore" (lower is harder), or the name of a proxy; None takes
            what the file says, and memorization where it says nothing.
        level: "high" (hardest), "low" (easiest), "mid" (nearest to a score of 0.5), or "mix": a third of each,
            disjoint; where `n` leaves a rest on division by 3, high and then mid get one more.
        n: Number (int) or fraction (float in (0, 1)) of the samples, for `scores`.
        mid: What "mid" is near to: "half" (a score of 0.5, as in the paper), for scores on the scale of probabilities
            only, or "median" (of the samples' scores).
        seed: Seed of the random choice, at least 0.
    """

    random: int | float | None = None
    classes: tuple[str | int, ...] | None = None
    ids: str | None = None
    scores: str | None = None
    score_kind: ScoreKind | None = None
    level: Level | None = None
    n: int | float | None = None
    mid: Mid = "half"
    seed: int = 0

    def check(self) -> None:
        """Raise UserError for a choice that no data set can satisfy; needs no data, so it can come first."""
        given = [name for name in ("random", "classes", "ids", "scores") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(f"give exactly one of random, classes, ids, scores; got {listed(given) or 'none of them'}")
        if self.seed < 0:
            raise UserError(f"seed must be at least 0, got {self.seed}")
        if self.mid not in MIDS:
            raise unknown("mid", self.mid, MIDS)
        if self.score_kind is not None:
            check_kind(self.score_kind)
        if self.scores is None:
            if self.level is not None or self.n is not None:
                raise UserError(f"level and n belong to scores, but the forget set is given by {given[0]}")
        else:
            _check_level(self.level)
            if self.n is None:
                raise UserError("scores need n: the number of samples, or their fraction in (0, 1)")
        if self.classes is not None and (isinstance(self.classes, str | int) or len(self.classes) == 0):
            raise UserError(f"classes must be a list of at least one class name or index, got {self.classes!r}")
        _check_amount("random", self.random)
        _check_amount("n", self.n)


@dataclass(frozen=True, eq=False)
class ForgetSet:
    """The samples to be forgotten, bound to the data set they were chosen from.

    Attributes:
        indices: (k,) int64, positions in the samples, ascending.
        ids: (k,) int64 or str, the ids at these positions.
        rule: One sentence that says how they were chosen; it names no id and no file.
        config: The configuration they were chosen by; None where they were given as ids or positions.
        n_samples: How many samples there were to choose from.
        fingerprint: The data set's fingerprint, or None.
        before: What the network forgot in earlier requests, which is not retained either; None where there are none.
    """

    indices: np.ndarray
    ids: np.ndarray
    rule: str
    config: ForgetConfig | None
    n_samples: int
    fingerprint: str | None
    before: ForgetSet | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def hash(self) -> str:
        """sha256 over data fingerprint, number of samples and sorted ids: equal however the set was chosen.

        Where something was forgotten before, the hash of all that is a part of it.
        """
        content = [self.fingerprint, self.n_samples, np.sort(self.ids).tolist()]
        if self.before is not None:
            content.append(self.before.absent.hash)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def absent(self) -> ForgetSet:
        """All that is not retained, in one set: what is to be forgotten, and what was before."""
        if self.before is None:
            return self
        earlier = self.before.absent
        order = np.argsort(indices := np.concatenate([self.indices, earlier.indices]))
        rule = f"{self.rule}, and {len(earlier):,} forgotten before"
        ids = np.concatenate([self.ids, earlier.ids])[order]
        return ForgetSet(indices[order], ids, rule, None, self.n_samples, self.fingerprint)

    def after(self, before: ForgetSet | None) -> ForgetSet:
        """The same set, for a network that has forgotten `before` already.

        Raises:
            UserError: if some of it was forgotten before, nothing would be retained, or the data differ.
        """
        if before is None:
            return self
        if (before.n_samples, before.fingerprint) != (self.n_samples, self.fingerprint):
            raise UserError("what was forgotten before belongs to other data than the forget set; name one data set")
        both = np.intersect1d(self.indices, before.absent.indices)
        if len(both):
            raise UserError(
                f"{len(both)} of {len(self)} samples have been forgotten by this network already; leave them out"
            )
        whole = dataclasses.replace(self, before=before)
        if len(whole.absent) == self.n_samples:
            raise UserError("with what was forgotten before, the forget set is all samples; leave one to retain")
        return whole

    def _of(self, fingerprint: str | None) -> ForgetSet:
        """The same set, of data with another fingerprint."""
        before = None if self.before is None else self.before._of(fingerprint)
        return dataclasses.replace(self, fingerprint=fingerprint, before=before)

    def retain_indices(self, n: int) -> np.ndarray:
        """The positions among `n` samples that are kept, ascending. Raises: UserError if `n` is not the data set's."""
        if n != self.n_samples:
            raise UserError(f"the forget set was chosen from {self.n_samples} samples, not from {n}")
        kept = np.ones(n, bool)
        kept[self.absent.indices] = False
        return np.flatnonzero(kept)

    def to_dict(self) -> dict[str, Any]:
        """The set as JSON values; `{"ids": [...]}` is among them, so the file is an id file too."""
        return {
            "rule": self.rule,
            "n": len(self),
            "n_samples": self.n_samples,
            "fingerprint": self.fingerprint,
            "hash": self.hash,
            "config": to_dict(self.config),
            "ids": self.ids.tolist(),
            **({} if self.before is None else {"before": self.before.absent.ids.tolist()}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], samples: Samples) -> ForgetSet:
        """Read what `to_dict` wrote, for the same samples.

        Raises:
            UserError: if something is missing or was changed, or the set belongs to another data set.
        """
        expected = ("rule", "n_samples", "fingerprint", "hash", "config", "ids")
        missing = [key for key in expected if key not in data] if isinstance(data, Mapping) else list(expected)
        if missing:
            raise UserError(f"split: {listed(missing)} missing; make the split again")
        theirs, ours = data["fingerprint"], samples.fingerprint
        differs = theirs is not None and ours is not None and theirs != ours
        if differs or data["n_samples"] != len(samples):
            raise UserError(
                f"split: it was made for other data ({data['n_samples']} samples, fingerprint {str(theirs)[:12]}; here "
                f"{len(samples)}, {str(ours)[:12]}); make it again, or give its ids as an id file"
            )
        if not isinstance(data["ids"], list):
            raise UserError("split: ids must be a list; make the split again")
        ids = _checked_ids(data["ids"], samples, "split")
        config = None if data["config"] is None else from_dict(ForgetConfig, data["config"], "split.config")
        read = _forget_set(ids, samples, str(data["rule"]), config)
        if data.get("before") is not None:
            read = read.after(from_ids(data["before"], samples))
        if read._of(theirs).hash != data["hash"]:
            raise UserError("split: its content and its hash disagree, so it was changed by hand; make it again")
        return read


def choose(
    config: ForgetConfig, samples: Samples, *, id_column: str | None = None, before: ForgetSet | None = None
) -> ForgetSet:
    """Choose the forget set that `config` describes.

    Args:
        config: The choice.
        samples: The data set.
        id_column: What the data set calls its ids; a CSV file of ids may call them so too.
        before: What the network forgot in earlier requests; the choice is among the rest.

    Raises:
        UserError: if the choice is empty or everything, or names what is not there or was forgotten before.
    """
    config.check()
    left = np.arange(len(samples)) if before is None else before.retain_indices(len(samples))
    return _choose(config, samples, id_column, left).after(before)


def _choose(config: ForgetConfig, samples: Samples, id_column: str | None, left: np.ndarray) -> ForgetSet:
    """The choice among the positions `left`, ascending; one by id is among all."""
    if config.random is not None:
        k = amount("random", config.random, len(left))
        # The order of uniform draws, so that with one seed a smaller set lies within a larger one.
        order = np.argsort(np.random.default_rng(config.seed).random(len(samples)), kind="stable")
        rule = f"{k:,} of {len(left):,} samples, drawn at random with seed {config.seed}"
        return _forget_set(order[np.isin(order, left)][:k], samples, rule, config)
    if config.classes is not None:
        return _by_class(config.classes, samples, config, left)
    if config.ids is not None:
        indices = _checked_ids(read_ids(config.ids, id_column), samples, config.ids)
        return _forget_set(indices, samples, f"{len(indices):,} samples named by id", config)
    assert config.scores is not None  # by check()
    assert config.level is not None
    assert config.n is not None
    scores = read_scores(config.scores, samples, kind=config.score_kind)
    return _by_level(scores, samples, config.level, config.n, config.mid, config, left)


def from_ids(ids: Iterable[object], samples: Samples) -> ForgetSet:
    """The forget set of the samples with these ids.

    Args:
        ids: Integers or strings, each at most once; text such as "00012" is 12 where the data set's ids are integers.
        samples: The data set.

    Raises:
        UserError: if the ids are empty, repeated, unknown, or all there are.
    """
    indices = _checked_ids(ids, samples, "ids")
    return _forget_set(indices, samples, f"{len(indices):,} samples named by id", None)


def from_indices(indices: Sequence[int] | np.ndarray, samples: Samples) -> ForgetSet:
    """The forget set of the samples at these positions, integers from 0 to n − 1.

    Raises:
        UserError: if the positions are empty, repeated, out of range, no integers, or all there are.
    """
    positions = np.asarray(indices)
    if positions.size == 0:
        raise UserError("indices: the forget set is empty; name at least one sample")
    if positions.ndim != 1 or positions.dtype.kind not in "iu":
        raise UserError(f"indices must be one-dimensional integers, got {positions.dtype} of shape {positions.shape}")
    outside = positions[(positions < 0) | (positions >= len(samples))].tolist()
    if outside:
        raise UserError(f"indices: out of range 0..{len(samples) - 1}: {listed(outside)}")
    positions = positions.astype(np.int64)
    refuse_repeated(positions, "indices")
    return _forget_set(positions, samples, f"{len(positions):,} samples named by position", None)


def from_scores(
    scores: np.ndarray | Scores,
    samples: Samples,
    *,
    level: Level,
    n: int | float,
    kind: ScoreKind | None = None,
    mid: Mid = "half",
) -> ForgetSet:
    """The forget set of one level of difficulty, from scores in memory.

    Args:
        scores: (len(samples),) finite floats, one for each sample, in the order of `samples`; or what a proxy returned
            for these samples.
        samples: The data set.
        level, n, mid: As in `ForgetConfig`.
        kind: What an array of scores is; None is "memorization". `Scores` say it themselves.

    Raises:
        UserError: as `choose` does.
    """
    _check_level(level)
    _check_amount("n", n)
    if mid not in MIDS:
        raise unknown("mid", mid, MIDS)
    if not isinstance(scores, Scores):
        scores = as_scores(scores, samples, kind or "memorization")
    elif kind not in (None, scores.kind) or not np.array_equal(scores.ids, samples.ids):
        raise UserError(f"scores are of kind {scores.kind!r} and of {len(scores)} samples; give them with just these")
    return _by_level(scores, samples, level, n, mid, None, np.arange(len(samples)))


def rank(difficulty: np.ndarray, ids: np.ndarray, level: Level, n: int, middle: float) -> np.ndarray:
    """The positions of the `n` samples of one level; equal difficulties go by ascending id.

    "mix" takes its hardest third first, then its easiest, then the middle third from what is left, so that the three
    are disjoint also where they would meet.

    Args:
        difficulty: (m,) finite float64, higher is harder.
        ids: (m,) distinct integers or strings.
        level: "high", "mid", "low" or "mix".
        n: How many, at most m.
        middle: The difficulty that "mid" is near to.
    """
    if level == "mix":
        n_high, n_mid, n_low = (n + 2) // 3, (n + 1) // 3, n // 3
        left = np.arange(len(ids))
        parts = []
        thirds: list[tuple[Level, int]] = [("high", n_high), ("low", n_low), ("mid", n_mid)]
        for part, k in thirds:
            taken = left[rank(difficulty[left], ids[left], part, k, middle)]
            parts.append(taken)
            left = np.setdiff1d(left, taken, assume_unique=True)
        return np.concatenate(parts)
    key = {"high": -difficulty, "low": difficulty, "mid": np.abs(difficulty - middle)}[level]
    by_id = np.argsort(ids, kind="stable")
    return by_id[np.argsort(key[by_id], kind="stable")][:n]


def _by_level(
    scores: Scores,
    samples: Samples,
    level: Level,
    n: int | float,
    mid: Mid,
    config: ForgetConfig | None,
    left: np.ndarray,
) -> ForgetSet:
    k = amount("n", n, len(left))
    if level == "mix" and k < 3:
        raise UserError(f"n is {k}: a mix of high, mid and low needs at least 3 samples")
    difficulty, about = scores.difficulty[left], scores.about
    if mid == "half" and level in ("mid", "mix") and not about.unit_scale:
        raise UserError(
            f"level {level} is near to a score of 0.5, which means nothing for {about.title}s: they are no "
            "probabilities; take mid='median' (--mid median)"
        )
    half = 0.5 if about.higher_is_harder else -0.5
    middle = half if mid == "half" else float(np.median(difficulty))
    near = "0.5" if mid == "half" else "the median"
    how = {
        "high": "the hardest",
        "low": "the easiest",
        "mid": f"those nearest to {near}",
        "mix": f"in disjoint thirds the hardest, those nearest to {near}, and the easiest",
    }[level]
    rule = f"{k:,} of {len(left):,} samples: {how} by {about.title}"
    return _forget_set(left[rank(difficulty, samples.ids[left], level, k, middle)], samples, rule, config)


def _by_class(classes: tuple[str | int, ...], samples: Samples, config: ForgetConfig, left: np.ndarray) -> ForgetSet:
    chosen = np.array([_class_index(c, samples.class_names) for c in classes])
    names = [repr(samples.class_names[c]) for c in chosen]
    refuse_repeated(np.array(names), "classes")
    absent = [name for c, name in zip(chosen, names) if not np.any(samples.labels[left] == c)]
    if absent:
        raise UserError(f"classes: the data set has no sample of {listed(absent)}")
    indices = left[np.isin(samples.labels[left], chosen)]
    rule = f"all {len(indices):,} samples of the {'class' if len(names) == 1 else 'classes'} {', '.join(names)}"
    return _forget_set(indices, samples, rule, config)


def _class_index(value: str | int, names: tuple[str, ...]) -> int:
    if isinstance(value, str):
        if names.count(value) == 1:
            return names.index(value)
        if not (value.isascii() and value.isdigit()):
            raise unknown("class", value, names)
    if isinstance(value, bool) or not isinstance(value, str | int | np.integer):
        raise UserError(f"classes: {value!r} is neither a class name nor an index")
    if not 0 <= int(value) < len(names):
        raise UserError(f"classes: index {value} is out of range 0..{len(names) - 1}")
    return int(value)


def _checked_ids(ids: Iterable[object], samples: Samples, source: str) -> np.ndarray:
    """The positions of samples named by id, in the order given."""
    wanted = as_ids(ids, samples.ids, source)
    if len(wanted) == 0:
        raise UserError(f"{source}: the forget set is empty; name at least one sample")
    refuse_repeated(wanted, source)
    positions, known = find(wanted, samples.ids)
    if not known.all():
        bad = wanted[~known].tolist()
        those = f"{len(bad)} of {len(wanted)} ids are not in the data set: {listed(bad)}"
        raise UserError(f"{source}: {those}; its ids look like {samples.ids[0].item()!r}")
    return positions


def _forget_set(indices: np.ndarray, samples: Samples, rule: str, config: ForgetConfig | None) -> ForgetSet:
    indices = np.sort(indices).astype(np.int64)
    if len(indices) == len(samples):
        raise UserError(f"the forget set is all {len(samples)} samples; leave at least one to retain")
    return ForgetSet(indices, samples.ids[indices], rule, config, len(samples), samples.fingerprint)


def _check_level(level: str | None) -> None:
    if level is None:
        raise UserError(f"scores need level: one of {', '.join(LEVELS)}")
    if level not in LEVELS:
        raise unknown("level", level, LEVELS)


def _check_amount(name: str, value: object) -> None:
    """Refuse an amount that fits no data set; None passes."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name} must be a number of samples or a fraction in (0, 1), got {value!r}")
    if isinstance(value, int):
        if value < 1:
            raise UserError(f"{name} is {value}: the forget set is empty; take at least 1 sample")
    elif not 0 < value < 1:
        raise UserError(f"{name} as a fraction must lie in (0, 1), got {value}; write a whole number without a point")


def amount(name: str, value: int | float, n_samples: int) -> int:
    """An amount as a number of samples; a fraction is rounded as Python's `round` does, halves to even."""
    k = value if isinstance(value, int) else round(value * n_samples)
    if k < 1:
        raise UserError(f"{name} {value} of {n_samples} samples is none; the forget set is empty")
    if k >= n_samples:
        raise UserError(f"{name} is {value}, but there are {n_samples} samples; at least one must be left to retain")
    return k
