"""The library's own way in: any module, any map-style Dataset, a list of ids."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from unsharp import runtime, unlearning
from unsharp.corrections import Corrections
from unsharp.data import Samples, from_torch_dataset
from unsharp.difficulty import ForgetConfig, ForgetSet, choose, from_ids
from unsharp.engine import MakeOptimizer, OptimizerConfig
from unsharp.errors import UserError
from unsharp.evaluation import Judged, check_attacks, check_seed, judge, outputs
from unsharp.methods import Method
from unsharp.progress import SILENT, BarProgress, Progress
from unsharp.reference import Recipe, retrain
from unsharp.sharpness.base import Rule
from unsharp.stopping import NOT_RETRAINABLE
from unsharp.subject import watch
from unsharp.training import Record, TrainConfig

if TYPE_CHECKING:
    from unsharp.difficulty.stage import Memorization


class Unlearned(NamedTuple):
    """What `unlearn` returns.

    Attributes:
        model: The network that has forgotten: a new one, in evaluation mode.
        record: Cost, curves, and what the result is named by.
    """

    model: nn.Module
    record: Record


def unlearn(
    model: nn.Module,
    train_set: Any,
    forget_ids: Any,
    method: str | Method = "sharp_minmax",
    *,
    rule: str | Rule | None = None,
    optimizer: str | OptimizerConfig | None = None,
    make_optimizer: MakeOptimizer | None = None,
    make_model: Callable[[], nn.Module] | None = None,
    train_config: TrainConfig | None = None,
    validation_set: Any = None,
    published: bool = False,
    corrections: Corrections | None = None,
    fingerprint: str | None = None,
    store: str | Path | None = None,
    progress: bool | Progress = False,
    **settings: Any,
) -> Unlearned:
    """Make a trained network forget samples; the network given is left as it is.

    Args:
        model: Maps a batch of inputs to logits (B, K), on the device where the work shall happen.
        train_set: Its training data: a map-style Dataset of (input, label), or `Samples`.
        forget_ids: Ids to forget (positions, unless samples have their own), or a `ForgetConfig` or `ForgetSet`.
        method: Name of a method, or the method itself.
        rule: Name of a sharpness rule, or the rule itself; None takes the method's default.
        optimizer: Name of a `torch.optim` class, or its configuration.
        make_optimizer: Builds an optimiser from the named trainable parameters, for groups or foreign classes.
        make_model: Builds the untrained network; only method "retrain" and `stop_at="retrained"` need it.
        train_config: How the network was trained; likewise.
        validation_set: Samples that the network was not trained on; only SCRUB's `rewind` needs them.
        published: Where a setting is not given, take the one under which a step is that of the published code of
            Sharp MinMax; see docs/published-code.md.
        corrections: What the forget samples should have been, for `first_order` and `second_order`; without them the
            samples are removed.
        fingerprint: A name for the content of `train_set`, where its items differ between two reads.
        store: Directory of retrained networks; None keeps none.
        progress: Show a bar on standard error; or a `Progress` of your own, whose `log` gets the figures of each epoch.
        **settings: Parameters of the method (`alpha`, `fraction`), of the rule (`rho`, `lam`), of the optimiser (`lr`,
            `momentum`, `weight_decay`) and of the loop (`epochs`, `batch_size`, `precision`, `seed`, `stop_at`, ...).

    Returns:
        The network that has forgotten, and the record of the run. Where the network breaks down on the way, a Python
        warning says so; the record keeps it under `about["warnings"]`.

    Raises:
        UserError: for a mistake in the arguments, before any work.
        NonFiniteError: if a step is not finite.

    Examples:
        >>> forgotten, record = unsharp.unlearn(model, train_set, [3, 14, 15], method="neggrad", rule="sam", rho=0.1)
    """
    how = unlearning.configure(method, rule=rule, optimizer=optimizer, published=published, **settings)
    recipe = _recipe(make_model, train_config)
    if how.stop_at == "retrained" and recipe is None:
        raise UserError(NOT_RETRAINABLE)
    device = runtime.device_of(model)
    samples = as_samples(train_set, device, fingerprint)
    forget = as_forget_set(forget_ids, samples)

    def retrained() -> tuple[nn.Module, Record]:
        if recipe is None:
            raise UserError("retrain needs make_model and train_config: how the network was made")
        found = retrain(recipe, samples, forget, device=device, store=store)
        return found.model, found.record

    with _shown(progress) as bar:
        return Unlearned(
            *unlearning.run(
                model,
                samples,
                forget.indices,
                forget.retain_indices(len(samples)),
                how,
                retrain=None if recipe is None else retrained,
                make_optimizer=make_optimizer,
                progress=bar,
                validation=None if validation_set is None else as_samples(validation_set, device),
                on_epoch=watch(samples, forget),
                say=_warn,
                corrections=corrections,
            )
        )


def evaluate(
    model: nn.Module,
    train_set: Any,
    forget_ids: Any,
    *,
    test_set: Any = None,
    record: Record | None = None,
    reference: nn.Module | None = None,
    original: nn.Module | None = None,
    make_model: Callable[[], nn.Module] | None = None,
    train_config: TrainConfig | None = None,
    attacks: Sequence[str] | None = None,
    features: bool = True,
    seed: int = 0,
    fingerprint: str | None = None,
    store: str | Path | None = None,
    progress: bool | Progress = False,
) -> dict[str, Any]:
    """Measure how well a network forgot, beside a network retrained without the forget set.

    Args:
        model: The network that forgot.
        train_set: As for `unlearn`.
        forget_ids: As for `unlearn`.
        test_set: Samples that it never saw; without them test accuracy, ToW and membership inference are None.
        record: What `unlearn` returned beside the network, for its cost.
        reference: A network retrained without the forget set; else `make_model` and `train_config` make one.
        original: The network before unlearning, to be measured beside.
        make_model: Builds the untrained network.
        train_config: How the original was trained.
        attacks: Names of membership attacks; all by default.
        features: Whether to collect the penultimate features, for the metrics on them; a model in which they cannot be
            found is measured without, and a Python warning says so.
        seed: Seed of what the metrics draw.
        fingerprint: As for `unlearn`.
        store: Directory where a retrained reference is kept and found; None keeps none.
        progress: Show a bar on standard error; or a `Progress` of your own, whose `log` gets the figures of each epoch.

    Returns:
        The metrics, as `unsharp.evaluation.judge` describes them.
    """
    check_attacks(attacks or ())
    check_seed(seed)
    device = runtime.device_of(model)
    samples = as_samples(train_set, device, fingerprint)
    tests = None if test_set is None else as_samples(test_set, device, None)
    forget = as_forget_set(forget_ids, samples)
    recipe = _recipe(make_model, train_config)
    cost: Record | None = None
    if reference is None and recipe is not None:
        with _shown(progress) as bar:
            found = retrain(recipe, samples, forget, device=device, store=store, progress=bar)
        reference, cost = found.model, found.record

    def judged(network: nn.Module, cost: Record | None = None) -> Judged:
        return Judged(outputs(network, samples, tests, forget, features=features, say=_warn), cost)

    return judge(
        judged(model, record),
        reference=None if reference is None else judged(reference, cost),
        original=None if original is None else judged(original),
        attacks=attacks,
        seed=seed,
        why_no_reference="no reference, and no make_model with train_config to make one, was given",
    )


def memorize(
    make_model: Callable[[], nn.Module],
    train_set: Any,
    train_config: TrainConfig | None = None,
    *,
    test_set: Any = None,
    fraction: float = 0.7,
    stack: int | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    fingerprint: str | None = None,
    store: str | Path | None = None,
    progress: bool | Progress = False,
    **how: Any,
) -> Memorization:
    """Estimate how much each training sample is memorized, from many networks on random subsets.

    Args:
        make_model: Builds the untrained network.
        train_set: As for `unlearn`.
        train_config: How each network is trained.
        test_set: Samples that the networks are asked about besides, for `influence`.
        fraction: Share of the samples that each network is trained on, in (0, 1).
        stack: Networks trained together; None takes what suits the device.
        device: Where to train; None takes the accelerator, if there is one.
        seed: Seed of all subsets, weights and orders.
        fingerprint: As for `unlearn`.
        store: Directory in which the networks are kept: a later call adds to them. None keeps none.
        progress: Show a bar on standard error; or a `Progress` of your own, whose `log` gets the figures of each epoch.
        **how: Fields of `MemorizeConfig`: `models`, `settle`, `watch`, `n`, `minutes`.

    Returns:
        The estimate (`.estimate.memorization`, `.estimate.standard_error`), what the networks said, and how far the
        forget sets are settled.

    Raises:
        UserError: for a mistake in the arguments, before any work.

    Examples:
        >>> found = unsharp.memorize(make_model, train_set, unsharp.TrainConfig(epochs=20), models=100, store="pools")
        >>> hardest = np.argsort(-found.estimate.memorization)[:50]
    """
    from unsharp.difficulty.stage import MemorizeConfig, estimate
    from unsharp.pool.grow import Work
    from unsharp.pool.plan import Plan, PoolConfig
    from unsharp.stages import Setting

    config = MemorizeConfig(**how)
    place = runtime.pick_device(None if device is None else str(device))
    samples = as_samples(train_set, place, fingerprint)
    tests = None if test_set is None else as_samples(test_set, place)
    recipe = Recipe(make_model, train_config or TrainConfig())
    plan = Plan(recipe=recipe, samples=samples, config=PoolConfig(fraction=fraction, seed=seed))
    work = Work(stack=stack, device=str(place), keep_weights=store is not None, threads=torch.get_num_threads())
    with _shown(progress) as bar, tempfile.TemporaryDirectory() as unkept:
        kept = Path(unkept if store is None else store)
        at = Setting(device=place, store=kept, progress=bar)
        return estimate(plan, config, kept, work, test=tests, at=at)


def relearn(
    model: nn.Module,
    train_set: Any,
    forget_ids: Any,
    *,
    reference: nn.Module | None = None,
    make_model: Callable[[], nn.Module] | None = None,
    train_config: TrainConfig | None = None,
    test_set: Any = None,
    other_set: Any = None,
    original: nn.Module | None = None,
    fingerprint: str | None = None,
    store: str | Path | None = None,
    progress: bool | Progress = False,
    **how: Any,
) -> dict[str, Any]:
    """Try to bring the forget set back by a little fine-tuning, beside a retrained network under the same attack.

    Args:
        model: The network that forgot; it is left as it is.
        train_set: As for `unlearn`.
        forget_ids: As for `unlearn`.
        reference: A network retrained without the forget set; else `make_model` and `train_config` make one.
        make_model: Builds the untrained network.
        train_config: How the original was trained.
        test_set: Samples that no network saw, whose accuracy is watched.
        other_set: Unrelated samples of the same shape, for the attack "other".
        original: The network before unlearning, to say how far an attacked network comes back to it.
        fingerprint: As for `unlearn`.
        store: Directory where a retrained reference is kept and found; None keeps none.
        progress: Show a bar on standard error; or a `Progress` of your own, whose `log` gets the figures of each epoch.
        **how: Fields of `RelearnPlan`: `on` (the attacks: "forget", "retain", "other"), `n`, `epochs`, `batch_size`,
            `lr`, `seed`, `seeds`, `watched`.

    Returns:
        By attack: "config"; "rows", the curves of both networks ("unlearned" and "retrained"); "recovery", how much
        more the network gets back than the retrained one, with 95 % intervals over the seeds.

    Raises:
        UserError: for a mistake in the arguments, before any work.

    Examples:
        >>> found = unsharp.relearn(forgotten, train_set, [3, 14, 15], reference=retrained, n=1, seeds=3)
        >>> found["forget"]["recovery"]["unlearned"]["excess"]["mean"]
    """
    from unsharp.evaluation.relearning_stage import RETRAINED, UNLEARNED, RelearnPlan, attack_all

    plan = RelearnPlan(**how)
    recipe = _recipe(make_model, train_config)
    if reference is None and recipe is None:
        raise UserError("relearn needs a retrained network: give reference, or make_model with train_config")
    device = runtime.device_of(model)
    samples = as_samples(train_set, device, fingerprint)
    tests, others = (None if s is None else as_samples(s, device) for s in (test_set, other_set))
    forget = as_forget_set(forget_ids, samples)
    attacks = plan.attacks(samples, forget.indices, tests, others)
    with _shown(progress) as bar:
        if reference is None and recipe is not None:
            reference = retrain(recipe, samples, forget, device=device, store=store, progress=bar).model
        assert reference is not None
        networks = {UNLEARNED: model, RETRAINED: reference}
        return attack_all(networks, attacks, original=original, progress=bar)


def as_samples(data: Any, device: torch.device, fingerprint: str | None = None) -> Samples:
    """`Samples` as they are, a Dataset read into `Samples`. Raises: UserError if it is neither."""
    return data if isinstance(data, Samples) else from_torch_dataset(data, device=device, fingerprint=fingerprint)


def as_forget_set(forget: Any, samples: Samples) -> ForgetSet:
    """A forget set from ids, a configuration, or a set chosen before. Raises: UserError for ids that cannot be."""
    if isinstance(forget, ForgetSet):
        return forget
    if isinstance(forget, ForgetConfig):
        return choose(forget, samples)
    if isinstance(forget, (str, bytes)) or not isinstance(forget, Iterable):
        raise UserError(f"forget_ids must be a list of ids, a ForgetConfig or a ForgetSet, got {forget!r}")
    return from_ids(forget, samples)


def _recipe(make_model: Callable[[], nn.Module] | None, train_config: TrainConfig | None) -> Recipe | None:
    if (make_model is None) != (train_config is None):
        raise UserError("make_model and train_config belong together: give both, or neither")
    return None if make_model is None or train_config is None else Recipe(make_model, train_config)


def _warn(line: str) -> None:
    """Hand a line that warns to Python's warnings; what else a run has to say stands in its record."""
    kind, _, text = line.partition(": ")
    if kind == "warning":
        warnings.warn(text, stacklevel=2)


@contextlib.contextmanager
def _shown(progress: bool | Progress) -> Iterator[Progress]:
    if not isinstance(progress, bool) or not progress:
        yield progress or SILENT
        return
    with BarProgress() as bar:
        yield bar
