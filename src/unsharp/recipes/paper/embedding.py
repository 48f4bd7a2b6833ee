"""Where retain and forget samples lie in the features before and after unlearning: the paper's UMAP pictures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from unsharp import artifacts, runtime
from unsharp.artifacts import Workspace
from unsharp.recipes.paper.base import Beyond, Figure, Reproduction, register
from unsharp.recipes.paper.problems import Size
from unsharp.recipes.paper.variants import RULES, TOW, method, sharp_minmax

HERE = "unsharp.recipes.paper.embedding"
PICTURE = "embedding.svg"


def draw(run: str, original: str, store: str, size: Size, seed: int, workspace: Workspace) -> None:
    """Cell: the picture of one network that forgot, the original and the retrained one."""
    from unsharp import stages
    from unsharp.config import from_dict
    from unsharp.report import embedding
    from unsharp.training import Record

    at = stages.Setting(device=runtime.pick_device(None), store=Path(store), wait=True)
    found = stages.open_unlearned(run, at, original=original)
    record = from_dict(Record, found.run.json(stages.RECORD_FILE))
    before = None if found.before is None else found.before.model
    judged, _ = stages.look_at(
        found.subject, found.forget, found.subject.model, record, at, original=before, features=True
    )
    shown = {title: judged[name].outputs for name, title in stages.SHOWN_AS.items() if name in judged}
    layout = "umap" if size != "smoke" and importlib.util.find_spec("umap") is not None else "pca"
    picture = embedding.embed(shown, embedding.EmbeddingConfig(layout=layout, seed=seed))
    artifacts.write_text(workspace.file(PICTURE), embedding.draw(picture))


def _gap(title: str, figure: str) -> Figure:
    return Figure(title=f"{title}: gap", column=f"gap.entanglement.{figure}", better="nearer zero", digits=3)


register(
    "embedding",
    Reproduction(
        title="Features of retain and forget, before and after",
        shows="Forget samples are said to move into clusters of wrong classes by NegGrad (C4).",
        figures=(
            TOW,
            _gap("silhouette between retain and forget", "feature_silhouette.silhouette"),
            _gap("AUC of a linear probe between retain and forget", "feature_probe.auc"),
        ),
        compared=(method("NegGrad"), method("NegGrad", "ASAM 1.0"), sharp_minmax()),
        pretraining={name: RULES[name] for name in ("SGD", "ASAM 1.0")},
        features=True,
        unknown=("Without the extra `umap` the picture is by principal components.",),
        beyond=Beyond(function=f"{HERE}:draw", picture=PICTURE),
    ),
)
