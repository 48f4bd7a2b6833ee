"""One decorator that makes a method, rule, metric, data source or model known by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from unsharp.errors import UserError, unknown

T = TypeVar("T")
U = TypeVar("U")


class Registry(Mapping[str, T], Generic[T]):
    """The named objects of one kind; every module of `package` is imported on first use, so a new file is enough.

    Args:
        kind: What the objects are, for error messages ("method").
        package: Dotted name of the package whose modules register themselves.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._objects: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[U], U]:
        """Make the decorated object known as `name`. Raises: ValueError if the name is taken."""

        def add(obj: U) -> U:
            if name in self._objects:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._objects[name] = obj  # pyright: ignore[reportArgumentType]
            return obj

        return add

    def __getitem__(self, name: str) -> T:
        self._load()
        try:
            return self._objects[name]
        except KeyError:
            raise unknown(self.kind, name, self._objects) from None

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._objects

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._objects))

    def __len__(self) -> int:
        self._load()
        return len(self._objects)

    def name_of(self, obj: T) -> str:
        """The name under which `obj` (or its class) is registered."""
        self._load()
        for name, known in self._objects.items():
            if known is obj or known is type(obj):
                return name
        raise UserError(f"{obj!r} is not a registered {self.kind}")

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")


def summary(obj: object) -> str:
    """The first line of an object's docstring."""
    return (obj.__doc__ or "").strip().splitlines()[0] if obj.__doc__ else ""
