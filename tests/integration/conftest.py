"""A trained network, and files to give to commands; each test works in a directory of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.helpers import QUICK, done


@pytest.fixture(autouse=True)
def here(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of the test: empty, with stores and caches elsewhere."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("UNSHARP_STORE", str(tmp_path_factory.getbasetemp() / "store"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("UNSHARP_DEBUG", raising=False)
    return place


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `train` on digits."""
    out = tmp_path_factory.mktemp("trained") / "run"
    done("train", "--out", out, "--epochs", 3, *QUICK)
    return out
