"""One process group for the whole test session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from contract.workers import TwoProcesses


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoProcesses]:
    group = TwoProcesses(tmp_path_factory.mktemp("group") / "store")
    yield group
    group.close()
