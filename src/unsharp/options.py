"""The options of the command line, in groups; those of data, loop, methods and rules come from their dataclasses."""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

import tyro

from unsharp import config
from unsharp.data import DataConfig
from unsharp.difficulty import ForgetConfig
from unsharp.difficulty.proxies import PROXIES
from unsharp.engine import OptimizerConfig
from unsharp.errors import UserError
from unsharp.language.config import LanguageConfig, LoRA
from unsharp.language.config import configure as configure_language
from unsharp.language.objectives import OBJECTIVES
from unsharp.language.texts import TextFormat
from unsharp.methods import METHODS
from unsharp.models import ModelConfig
from unsharp.published import published_settings
from unsharp.sharpness import RULES
from unsharp.surroundings import Surroundings
from unsharp.training import TrainConfig
from unsharp.unlearning import UnlearnConfig, configure

METHOD = "sharp_minmax"
"""The method where none is named."""
LEVEL_N = 0.05
"""Share of the samples in a forget set of which only the level is said, as in the paper."""
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
Count = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
Words = Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="TEXT [TEXT ...]", help_behavior_hint="")]


def _group(name: str, doc: str, owners: Mapping[str, Any], names: Mapping[str, str] | None = None) -> type:
    """A group with an option for each field of some dataclasses; none of them is given by default.

    Args:
        name: Of the group.
        doc: Of the group.
        owners: The dataclasses by name; an option that not all of them have says whose it is.
        names: Field to option, where they differ; "" leaves the field out.
    """
    found: dict[str, list[str]] = {}
    kinds: dict[str, Any] = {}
    for owner, cls in owners.items():
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            option = (names or {}).get(field.name, field.name)
            if option:
                found.setdefault(option, []).append(owner)
                kinds.setdefault(option, (hints[field.name], _described(cls, field.name), _default(field)))
    made = []
    for option, whose in found.items():
        kind, text, default = kinds[option]
        metavar = _metavar(kind)
        if get_origin(kind) is dict:
            kind, metavar = tuple[str, ...], "NAME=VALUE [NAME=VALUE ...]"
        if kind is bool and default == "(default: False)":
            flag = tyro.conf.arg(help=f"{text} ({', '.join(whose)})" if len(owners) > 1 else text)
            made.append((option, Annotated[bool, flag], dataclasses.field(default=False)))
            continue
        hint = f"({', '.join(whose)})" if len(owners) > 1 else default
        shown = tyro.conf.arg(help=text, help_behavior_hint=hint, metavar=metavar)
        made.append((option, Annotated[Optional[kind], shown], dataclasses.field(default=None)))  # noqa: UP045
    group = dataclasses.make_dataclass(name, made, kw_only=True)
    group.__doc__ = doc
    return group


def _described(cls: type, field: str) -> str:
    """What the docstrings of a class and its bases say of a field."""
    for base in cls.__mro__:
        found = re.search(rf"^ +{field}: (.+?)(?=^ +\w+: |^ *$|\Z)", base.__doc__ or "", re.MULTILINE | re.DOTALL)
        if found:
            return " ".join(found[1].split())
    return field.replace("_", " ")


def _default(field: dataclasses.Field[Any]) -> str:
    return "" if field.default in (None, dataclasses.MISSING) else f"(default: {field.default})".replace("\n", "\\n")


def _metavar(kind: Any) -> str:
    """What stands behind an option in the help."""
    parts = [part for part in get_args(kind) or (kind,) if part not in (type(None), Ellipsis)]
    if get_origin(kind) is Literal:
        return "|".join(map(str, parts))
    if get_origin(kind) in (Union, types.UnionType) and len(parts) > 1:
        return "|".join(map(_metavar, parts))
    inner = parts[0]
    if get_origin(kind) is tuple or get_origin(inner) is tuple:
        word = _metavar(get_args(inner)[0] if get_origin(inner) is tuple else inner)
        return f"{word} [{word} ...]"
    return {int: "INT", float: "FLOAT", bool: "True|False"}.get(inner, "TEXT")


def _given(options: Any, group: type) -> dict[str, Any]:
    """The options of a group that were given, by name; a flag that is not set was not given."""
    given = {f.name: v for f in dataclasses.fields(group) if (v := getattr(options, f.name)) != f.default}
    return {name: _pairs(name, v) if name in PAIRS else v for name, v in given.items()}


DATA_NAMES = {"data": "name", "data_dir": "dir"}
OWN_OPTION = {"optimizer": "", "options": "", "seed": "", "method": "", "rule": "", "name": "optimizer"}
EXAMPLES = {"phase_lr": "forget=0.001", "phase_schedule": "forget=cosine"}
PAIRS = {"phase_lr": float, "phase_schedule": str}
"""Options that take NAME=VALUE pairs, by what a value is."""
DataFields = _group("DataFields", "The data.", {"data": DataConfig}, {v: k for k, v in DATA_NAMES.items()})
TrainFields = _group("TrainFields", "The training.", {"train": TrainConfig}, OWN_OPTION | dict.fromkeys(PAIRS, ""))
UnlearnFields = _group("UnlearnFields", "The loop.", {"unlearn": UnlearnConfig}, OWN_OPTION)
OptimizerFields = _group("OptimizerFields", "The optimiser.", {"optimizer": OptimizerConfig}, OWN_OPTION)
MethodFields = _group("MethodFields", "Parameters of the methods.", METHODS)
ProxyFields = _group("ProxyFields", "Parameters of the proxies.", PROXIES)
RuleFields = _group("RuleFields", "Parameters of the rules.", RULES)
ObjectiveFields = _group("ObjectiveFields", "Parameters of the objectives.", OBJECTIVES)
LanguageFields = _group(
    "LanguageFields",
    "The loop.",
    {"language": LanguageConfig},
    OWN_OPTION | dict.fromkeys((*PAIRS, "objective", "lora", "channels_last"), ""),
)
LORA_NAMES = {f.name: f"lora_{f.name}" for f in dataclasses.fields(LoRA)}
LoRAFields = _group("LoRAFields", "The adapters.", {"lora": LoRA}, LORA_NAMES)
FormFields = _group("FormFields", "The texts.", {"texts": TextFormat})
AroundFields = _group("AroundFields", "What is measured around a network.", {"landscape": Surroundings})


@dataclass(kw_only=True)
class Common:
    """Options of every command that works."""

    device: Text = None
    """Device, such as cpu or cuda:1; the accelerator where there is one, if left out."""
    threads: Count = None
    """Threads of this process; results are equal to the bit only at equal thread counts."""
    store: Text = None
    """Directory of retrained networks and pools, found by content (default: the user's cache, or $UNSHARP_STORE)."""
    force: bool = False
    """Do it again, even if it is found done, and replace what is there."""
    save_seconds: float = 60.0
    """Seconds between two savings of the state from which a killed run goes on."""
    track: Text = None
    """Hand the figures of each epoch and evaluation to tensorboard, trackio or wandb; nothing is, if left out."""
    json: bool = False
    """Print one JSON object on standard output, and everything else on standard error."""
    quiet: bool = False
    """No progress."""


@dataclass(kw_only=True)
class Cells:
    """Options of commands that run many cells."""

    dry_run: bool = False
    """Only say what would be done and what it would cost; no cell is run."""
    retry_failed: bool = False
    """Try cells again that ended by an error of their own; those whose process was killed are tried again anyway."""
    processes: Count = None
    """Cells at a time; as many as processors (with --threads each) or accelerators carry, if left out."""
    threads: int = 1
    """Threads of each cell; results are equal to the bit only at equal thread counts."""
    accelerators: Number = None
    """Accelerators of each cell: 0.25 lets four share one, 0 takes none; one where there are any, if left out."""
    backend: str = "local"
    """Where cells run: local (processes of this machine) or ray (a cluster)."""
    address: Text = None
    """With --backend ray: the cluster, such as HOST:PORT or auto; one is started on this machine, if left out."""
    json: bool = False
    """Print one JSON object on standard output, and everything else on standard error."""
    quiet: bool = False
    """No progress."""


@dataclass(kw_only=True)
class Data(DataFields):  # pyright: ignore[reportGeneralTypeIssues]
    """Options that say which data; those of the checkpoint, if none is given."""

    def data_config(self) -> DataConfig | None:
        """What the options say of the data; None if they say nothing."""
        given = _given(self, DataFields)
        return (
            config.from_dict(DataConfig, {DATA_NAMES.get(k, k): v for k, v in given.items()}, "data") if given else None
        )


@dataclass(kw_only=True)
class Network:
    """Options that say which network."""

    arch: Text = None
    """Architecture: a registered name (`unsharp list models`), timm:NAME, hf:NAME or package.module:function."""
    width: Count = None
    """Output channels of the first convolution; the other layers scale with it."""
    stem: Text = None
    """Stem: auto, small or large."""
    arch_option: tuple[str, ...] = ()
    """Further options of the architecture, each as KEY=VALUE."""

    def model_config(self, default: str | None = None) -> ModelConfig | None:
        """What the options say of the network; None if they say nothing."""
        if self.arch is None and default is None:
            if self.width is not None or self.arch_option:
                raise UserError("--width and --arch-option need --arch")
            return None
        values = {"arch": self.arch or default, "width": self.width, "stem": self.stem}
        given = {k: v for k, v in values.items() if v is not None}
        return config.from_dict(ModelConfig, given | {"options": _options(self.arch_option)}, "model")


@dataclass(kw_only=True)
class Training(OptimizerFields, TrainFields):  # pyright: ignore[reportGeneralTypeIssues]
    """Options of a training and of its optimiser."""

    seed: int = 0
    """Seed of initialisation, data order, augmentation and dropout."""

    def loop_values(self) -> dict[str, Any]:
        """The options that were given, by name."""
        return _given(self, TrainFields) | {"seed": self.seed}

    def optimizer_values(self) -> dict[str, Any]:
        """The options of the optimiser that were given, by field."""
        return {"name" if k == "optimizer" else k: v for k, v in _given(self, OptimizerFields).items()}


@dataclass(kw_only=True)
class Forget:
    """What is to be forgotten: one of --ids, --random, --forget-classes, --scores, --split, or --level alone."""

    split: Text = None
    """A `split` run or its split.json."""
    ids: Text = None
    """File of ids: CSV (FILE[:COLUMN]), JSON, or text with one per line."""
    random: Number = None
    """So many samples at random (1 or more), or such a fraction of them (below 1)."""
    forget_classes: Words = None
    """Whole classes, by name or number."""
    scores: Text = None
    """File of difficulty scores, FILE[:KEY] (.npz, .csv, .parquet), or run that estimated them; needs --level, --n."""
    score_kind: Text = None
    """What the scores are: memorization, cscore (low is hard) or a proxy; what the file says, or memorization."""
    level: Text = None
    """high, mid, low or mix: by --scores or, if left out, by what `unsharp memorize` has found for this network."""
    n: Number = None
    """With --level: so many samples (1 or more), or such a fraction of them (below 1); 0.05 without --scores."""
    mid: str = "half"
    """What mid is near to: half (a score of 0.5) or median."""
    split_seed: int = 0
    """Seed of the random choice."""
    forgotten: Text = None
    """File of ids that the network forgot in earlier requests; needed where neither its run nor --key tells them."""
    key: Text = None
    """File of the key under which an audit codes ids; it stays with you, and is made if it is missing."""

    @property
    def level_alone(self) -> bool:
        """Whether a level is asked for and nothing says by which scores."""
        return self.level is not None and not self._ways() and self.split is None

    def _ways(self) -> list[str]:
        ways = ("ids", "random", "forget_classes", "scores")
        return [f"--{way.replace('_', '-')}" for way in ways if getattr(self, way) is not None]

    def forget_config(self, pool: str = "the store") -> ForgetConfig:
        """What the options say of the forget set.

        Args:
            pool: The scores where a level is all that is said.

        Raises:
            UserError: unless they say exactly one thing.
        """
        given = self._ways()
        if self.level_alone:
            n = LEVEL_N if self.n is None else amount(self.n)
            return self._checked(ForgetConfig(scores=pool, level=self.level, n=n, mid=self.mid))  # pyright: ignore[reportArgumentType]
        if len(given) != 1:
            raise UserError(
                "give exactly one of --ids, --random, --forget-classes, --scores, or --level alone (or --split); "
                f"got {' and '.join(given) or 'none of them'}"
            )
        chosen = ForgetConfig(
            random=amount(self.random),
            classes=self.forget_classes,
            ids=self.ids,
            scores=self.scores,
            score_kind=self.score_kind,  # pyright: ignore[reportArgumentType]
            level=self.level,  # pyright: ignore[reportArgumentType]
            n=amount(self.n),
            mid=self.mid,  # pyright: ignore[reportArgumentType]
            seed=self.split_seed,
        )
        return self._checked(chosen)

    def _checked(self, chosen: ForgetConfig) -> ForgetConfig:
        chosen.check()
        return chosen


@dataclass(kw_only=True)
class Rule(RuleFields):  # pyright: ignore[reportGeneralTypeIssues]
    """Options of the sharpness rule."""

    rule: Text = None
    """Sharpness rule (`unsharp list rules`); the method's own default, if left out."""

    def rule_values(self) -> dict[str, Any]:
        """The parameters that were given, by name."""
        return _given(self, RuleFields)


@dataclass(kw_only=True)
class Proxy(ProxyFields):  # pyright: ignore[reportGeneralTypeIssues]
    """Options of the proxies of memorization."""

    def proxy_values(self) -> dict[str, Any]:
        """The parameters that were given, by name."""
        return _given(self, ProxyFields)


@dataclass(kw_only=True)
class Around(AroundFields):  # pyright: ignore[reportGeneralTypeIssues]
    """Options that say what is measured around a network, and how."""

    def surroundings(self) -> Surroundings:
        """What the options say. Raises: UserError for a value out of range."""
        return Surroundings(**_given(self, AroundFields))


@dataclass(kw_only=True)
class Method(MethodFields, Rule, OptimizerFields, UnlearnFields):  # pyright: ignore[reportGeneralTypeIssues]
    """Options of the method, of its loop and of its optimiser."""

    method: Text = None
    """Method (`unsharp list methods`); sharp_minmax, if left out."""
    seed: Count = None
    """Seed of data order, augmentation, dropout, and of what the method draws; 0, if left out."""
    published: bool = False
    """Step as the published code of Sharp MinMax does, but for the options that are given (docs/published-code.md)."""

    def unlearn_settings(self) -> dict[str, Any]:
        """The settings that were given, by name, without method, rule and seed; those of --published with them."""
        groups = (MethodFields, RuleFields, OptimizerFields, UnlearnFields)
        given = {name: value for group in groups for name, value in _given(self, group).items()}
        if not self.published:
            return given
        method = self.method or METHOD
        return published_settings(method, self.rule or METHODS[method].default_rule) | given

    def unlearn_config(self, file: str | None = None) -> UnlearnConfig:
        """What the options, or a file, say of the unlearning.

        Args:
            file: JSON file of an unlearning configuration; beside it only the seed may be given.

        Raises:
            UserError: for an option that nobody takes, or that the file says already.
        """
        if file is None:
            return configure(self.method or METHOD, rule=self.rule, seed=self.seed or 0, **self.unlearn_settings())
        given = [] if self.published else [*self.unlearn_settings()]
        if named := [*given, *(name for name in ("method", "rule", "published") if getattr(self, name))]:
            raise UserError(
                f"--config says method, rule and loop already; leave {' '.join(f'--{_option(n)}' for n in named)} out, "
                "or change the file (--seed alone may stand beside it)"
            )
        how = config.load(UnlearnConfig, file)
        return how if self.seed is None else dataclasses.replace(how, seed=self.seed)


@dataclass(kw_only=True)
class Objective(ObjectiveFields, LoRAFields, Rule, OptimizerFields, LanguageFields):  # pyright: ignore[reportGeneralTypeIssues]
    """Options of the unlearning of a language model."""

    objective: Text = None
    """What the model is to lose and keep (docs/language.md); npo, if left out."""
    seed: Count = None
    """Seed of data order, dropout, adapters, and of what else is drawn; 0, if left out."""

    def language_config(self) -> LanguageConfig:
        """What the options say. Raises: UserError for one that nobody takes, or a value out of range."""
        groups = (ObjectiveFields, RuleFields, OptimizerFields, LanguageFields)
        given = {name: value for group in groups for name, value in _given(self, group).items()}
        return configure_language(
            self.objective or "npo", rule=self.rule or "none", lora=self.adapters(), seed=self.seed or 0, **given
        )

    def adapters(self) -> LoRA | None:
        """The adapters that the options ask for. Raises: UserError for a value out of range, or without the rank."""
        given = {name.removeprefix("lora_"): value for name, value in _given(self, LoRAFields).items()}
        if given and "rank" not in given:
            raise UserError("options of LoRA need --lora-rank, which turns it on")
        return config.from_dict(LoRA, given, "lora") if given else None

    def loop_values(self, base: dict[str, Any]) -> dict[str, Any]:
        """A loop's plain values with those in their place that the options give: loop, optimiser, adapters, seed."""
        optimizer = {"name" if k == "optimizer" else k: v for k, v in _given(self, OptimizerFields).items()}
        if optimizer.get("name", base["optimizer"]["name"]) != base["optimizer"]["name"]:
            base["optimizer"] |= {"momentum": None, "options": {}}
        own = {"optimizer": base["optimizer"] | optimizer, "lora": self.adapters(), "seed": self.seed or 0}
        return base | _given(self, LanguageFields) | own


@dataclass(kw_only=True)
class Form(FormFields):  # pyright: ignore[reportGeneralTypeIssues]
    """Options that say how prompts and answers are laid out."""

    def text_format(self) -> TextFormat:
        """What the options say. Raises: UserError for a value out of range."""
        return config.from_dict(TextFormat, _given(self, FormFields), "texts")


def _option(field: str) -> str:
    return field.replace("_", "-")


def amount(value: float | None) -> int | float | None:
    """A number of samples where it is 1 or more and whole; else as it is, a fraction."""
    return int(value) if value is not None and value >= 1 and value.is_integer() else value


def _pairs(option: str, pairs: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    kind = PAIRS[option]
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            if not (name and equals and value):
                raise ValueError
            read = kind(value)
        except ValueError:
            shown = f"NAME={_metavar(kind)}"
            raise UserError(f"--{_option(option)} must be {shown}, such as {EXAMPLES[option]}; got {pair!r}") from None
        if name in found:
            raise UserError(f"--{_option(option)} names {name!r} twice; give it one value")
        found[name] = read
    return found


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--arch-option must be KEY=VALUE, got {pair!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def named(command: Any) -> list[str]:
    """The options of a command that say which network and which data, as they were given."""
    words = ["--model", command.model]
    for group in (Network, Data):
        for field in dataclasses.fields(group):
            value = getattr(command, field.name)
            if value != field.default:
                several = value if isinstance(value, tuple) else (value,)
                words += [f"--{field.name.replace('_', '-')}", *map(str, several)]
    return words
