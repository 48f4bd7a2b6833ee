"""The surroundings of an unlearned network as a run: `landscape.json`, the surfaces, and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from unsharp import artifacts
from unsharp.artifacts import Run, Workspace
from unsharp.data import DataConfig
from unsharp.errors import UserError
from unsharp.evaluation.landscape import Surfaces, same_architecture
from unsharp.evaluation.points import task_sets
from unsharp.progress import duration
from unsharp.surroundings.findings import ORIGINAL, RETRAINED, UNLEARNED, Findings, KeptWay
from unsharp.surroundings.measure import Share, Surroundings
from unsharp.training import TrainConfig

if TYPE_CHECKING:
    from unsharp.stages import Setting

STAGE = "landscape"
VALUES_FILE, SURFACES_FILE = "landscape.json", "surfaces.safetensors"
PASSES = {"values": "forward passes", "gradients": "gradients", "products": "products with the Hessian"}


def look_around(
    run: str | Path,
    how: Surroundings,
    out: str | Path | None,
    at: Setting,
    *,
    original: str | Path | None = None,
    data_config: DataConfig | None = None,
    train_config: TrainConfig | None = None,
) -> Run:
    """Measure what lies around the network of an `unlearn` run, beside the original and the retrained one.

    Args:
        run: The run directory.
        how: What is measured.
        out: Where to write.
        at: Device and the like.
        original: The checkpoint before unlearning; None leaves it and the ways from it out.
        data_config: Where the data are, if not where they were.
        train_config: How the original was trained, where its checkpoint does not know; without either there is no
            retrained network.

    Returns:
        The run: `landscape.json`, `surfaces.safetensors` where there are surfaces, and the figures.

    Raises:
        UserError: for bad input, before any work.
    """
    from unsharp import stages

    unlearned = stages.open_unlearned(run, at, original=original, data_config=data_config, train_config=train_config)
    subject, forget, before = unlearned.subject, unlearned.forget, unlearned.before
    models: dict[str, nn.Module] = {UNLEARNED: subject.model}
    if before is not None:
        models = {ORIGINAL: before.model, **models}
        same_architecture(models)
        if before.digest != unlearned.run.config["checkpoint"]:
            at.say(f"warning: {original} is not the checkpoint that {run} started from; the ways begin where it stands")
    sets = task_sets(subject.splits.train, subject.splits.test, forget)
    how._checked(models, sets)
    settings = unlearned.identity | {"surroundings": how}

    def work(workspace: Workspace) -> None:
        reference, why_not = stages.find_reference(subject, forget, at)
        if reference is None:
            at.say(f"warning: {why_not}")
        else:
            models[RETRAINED] = reference.model
        for line in told(how.estimate(models, sets)):
            at.say(line)
        found = how.measure(models, sets, workspace=workspace, save_seconds=at.save_seconds, progress=at.progress)
        for name, reason in found.values["reasons"].items():
            at.say(f"warning: {name} is left out: {reason}")
        if why_not is not None:
            found.values["reasons"]["retrained"] = why_not
        write(found, workspace.path)

    return at.perform(out, STAGE, settings, work)


def read(run: Run) -> Findings:
    """What a `landscape` run found. Raises: UserError for another run."""
    if run.stage != STAGE:
        raise UserError(f"{run.path} is a {run.stage!r} run, and holds no surroundings; give a `landscape` run")
    values, file = run.json(VALUES_FILE), run.file(SURFACES_FILE)
    surfaces = Surfaces.load(file) if "surface" in values else None
    return Findings(values, surfaces, {name: KeptWay.of(row) for name, row in values.get("connectivity", {}).items()})


def told(shares: list[Share]) -> Iterator[str]:
    """An estimate in lines, for a person."""
    for share in shares:
        passes = ", ".join(f"{n:,} {PASSES[kind]}" for kind, n in share.passes.items() if n)
        yield f"{share.part}: at most {passes}, about {duration(share.seconds)}"
    if len(shares) > 1:
        yield f"together about {duration(sum(share.seconds for share in shares))}"


def write(found: Findings, directory: str | Path) -> list[Path]:
    """Write figures and values into a directory, each file whole.

    Returns:
        The files.
    """
    directory = Path(directory)
    files = []
    for name, svg in drawn(found).items():
        files.append(directory / f"{name}.svg")
        artifacts.write_text(files[-1], svg)
    if found.surfaces is not None:
        files.append(directory / SURFACES_FILE)
        found.surfaces.save(files[-1])
    files.append(directory / VALUES_FILE)
    artifacts.write_json(files[-1], found.values)
    return files


def drawn(found: Findings) -> Mapping[str, str]:
    """The figures as SVG by name, as far as there is something to show."""
    return {name: draw() for name, draw in drawings(found).items()}


def drawings(found: Findings) -> Mapping[str, Callable[[], str]]:
    """What draws each figure, by name, as far as there is something to show."""
    from unsharp.report import landscape

    figures: dict[str, Callable[[], str]] = {}
    sharpness, surfaces = found.values.get("sharpness"), found.surfaces
    if sharpness is not None and _any_row(sharpness):
        figures["sharpness"] = partial(landscape.rises, sharpness)
    for on in found.values["sets"]:
        if spectra := found.spectra(on):
            figures[f"spectrum-{on}"] = partial(landscape.spectra, spectra, on)
        if surfaces is not None and landscape.has_finite(surfaces, on):
            figures[f"surface-{on}"] = partial(landscape.contours, surfaces, on)
    if found.ways:
        figures["ways"] = partial(landscape.ways, found.ways)
    return figures


def _any_row(sharpness: Mapping[str, Any]) -> bool:
    return any(row is not None for of in sharpness.values() for kinds in of.values() for row in kinds.values())
