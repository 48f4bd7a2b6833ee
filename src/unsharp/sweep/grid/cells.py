"""The cells of a grid. Each depends on its arguments alone, and finds or makes the networks that it starts from.

Networks stand beside the cells, named by content: `networks/train-*` and `networks/retrain-*`. Where a machine does not
see those that another one made, it makes them again, which gives the same bits.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from unsharp import artifacts, config, runtime
from unsharp.artifacts import RUN_FILE, Workspace
from unsharp.data import DataConfig, Splits, load
from unsharp.difficulty import ForgetConfig, ForgetSet, choose
from unsharp.errors import UserError
from unsharp.models import ModelConfig
from unsharp.reference import retrain as retrained
from unsharp.stages import ABOUT_FILE, METRICS_FILE, Setting, origin_of, train_network, unlearn_and_judge
from unsharp.subject import load_subject
from unsharp.training import TrainConfig
from unsharp.unlearning import UnlearnConfig

HERE = "unsharp.sweep.grid.cells"
NETWORKS = "networks"
UNLEARNED = "unlearned"
"""The run of the network that forgot, in the directory of its cell."""


def train(
    data: dict[str, Any],
    model: dict[str, Any],
    train: dict[str, Any],
    fingerprint: str | None,
    device: str | None,
    workspace: Workspace,
) -> dict[str, Any]:
    """Cell: a network on all training samples. Returns its metrics."""
    at = _setting(device, workspace)
    path = _trained(data, model, train, fingerprint, at)
    return artifacts.open_run(path).json(METRICS_FILE)


def retrain(
    data: dict[str, Any],
    model: dict[str, Any],
    train: dict[str, Any],
    fingerprint: str | None,
    forget: dict[str, Any],
    forget_hash: str,
    device: str | None,
    workspace: Workspace,
) -> dict[str, Any]:
    """Cell: the same network without a forget set. Returns what its training took."""
    at = _setting(device, workspace)
    source = config.from_dict(DataConfig, data)
    splits = _load(source, fingerprint, at)
    chosen = _chosen(forget, forget_hash, source, splits)
    origin = origin_of(config.from_dict(ModelConfig, model), source, config.from_dict(TrainConfig, train), splits)
    assert origin.recipe is not None  # it was trained as `train` says
    found = retrained(origin.recipe, splits.train, chosen, device=at.device, store=at.store)
    return {"seconds": found.record.seconds, "passes": found.record.passes}


def unlearn(
    data: dict[str, Any],
    model: dict[str, Any],
    train: dict[str, Any],
    fingerprint: str | None,
    forget: dict[str, Any],
    forget_hash: str,
    unlearn: dict[str, Any],
    attacks: list[str] | None,
    features: bool,
    keep_networks: bool,
    device: str | None,
    workspace: Workspace,
    judged_on: str = "test",
) -> None:
    """Cell: a network that forgot, beside the retrained one. Leaves `metrics.json` and `about.json`."""
    at = _setting(device, workspace)
    source = config.from_dict(DataConfig, data)
    subject = load_subject(_trained(data, model, train, fingerprint, at), at.device, data_config=source)
    if judged_on == "validation":
        subject = dataclasses.replace(subject, splits=subject.splits._replace(test=subject.splits.validation))
    chosen = _chosen(forget, forget_hash, source, subject.splits)
    how = config.from_dict(UnlearnConfig, unlearn)
    run, facts = unlearn_and_judge(
        subject, chosen, how, workspace.file(UNLEARNED), at, attacks=attacks, features=features
    )
    facts.pop("ids")  # the forgotten samples are named by the run that is kept, if any
    workspace.write_json(METRICS_FILE, facts.pop("metrics"))
    workspace.write_json(ABOUT_FILE, facts)
    if not keep_networks:
        artifacts.remove_run(run)


def trained_path(
    data: dict[str, Any], model: dict[str, Any], train: dict[str, Any], fingerprint: str | None, kind: str, store: Path
) -> Path:
    """Where the network stands that is trained so on a kind of device ("cpu")."""
    return store / f"train-{config.digest(data, model, train, fingerprint, kind)[:16]}"


def _setting(device: str | None, workspace: Workspace) -> Setting:
    return Setting(device=runtime.pick_device(device), store=workspace.path.parent / NETWORKS, wait=True)


def _trained(
    data: dict[str, Any], model: dict[str, Any], train: dict[str, Any], fingerprint: str | None, at: Setting
) -> Path:
    """Where the network stands that was trained so; it is trained if it does not."""
    path = trained_path(data, model, train, fingerprint, at.device.type, at.store)
    if not (path / RUN_FILE).is_file():
        source = config.from_dict(DataConfig, data)
        _load(source, fingerprint, at)
        train_network(config.from_dict(ModelConfig, model), source, config.from_dict(TrainConfig, train), path, at)
    return path


def _load(source: DataConfig, fingerprint: str | None, at: Setting) -> Splits:
    splits = load(source, at.device)
    if splits.train.fingerprint != fingerprint:
        raise UserError(
            f"the data are not those with which the sweep was started (fingerprint {str(fingerprint)[:12]}, now "
            f"{str(splits.train.fingerprint)[:12]}); are they the same on all machines?"
        )
    return splits


def _chosen(forget: dict[str, Any], forget_hash: str, source: DataConfig, splits: Splits) -> ForgetSet:
    chosen = choose(config.from_dict(ForgetConfig, forget), splits.train, id_column=source.id_column)
    if chosen.hash != forget_hash:
        raise UserError("the forget set is not the one with which the sweep was started; did its file change?")
    return chosen
