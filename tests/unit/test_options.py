"""The options of the commands: each has one meaning."""

from __future__ import annotations

import inspect

import pytest

from unsharp.cli import COMMANDS


def owners(command: type) -> dict[str, list[str]]:
    """The groups that say what an option of a command means."""
    found: dict[str, list[str]] = {}
    for group in command.__mro__:
        for name in inspect.get_annotations(group):
            found.setdefault(name, []).append(group.__name__)
    return found


@pytest.mark.parametrize("command", list(COMMANDS))
def test_an_option_belongs_to_one_group(command: str) -> None:
    """Else what is said of the forget set, say, would reach the method as its parameter of that name."""
    found = owners(COMMANDS[command])
    assert {name: groups for name, groups in found.items() if len(groups) > 1} == {}


def test_the_groups_are_looked_into() -> None:
    found = owners(COMMANDS["unlearn"])
    assert found["level"] == ["Forget"]
    assert found["forget_level"] == ["MethodFields"]
