"""Typed, frozen configuration: to and from JSON, one hash, and errors that name the field."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from unsharp.errors import UserError, unknown

C = TypeVar("C")


def to_dict(config: Any) -> Any:
    """A configuration as plain JSON values; an object known by name (a rule, a method) carries it under "name"."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        registry = getattr(config, "registry", None)
        named = {} if registry is None else {"name": registry.name_of(type(config))}
        return named | {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(k): to_dict(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(v) for v in config]
    if isinstance(config, Path):
        return str(config)
    return config


def from_dict(cls: type[C], values: Any, where: str = "") -> C:
    """Build a configuration from plain values.

    Args:
        cls: The dataclass; for a family known by name, its base class, the name standing under "name".
        values: What `to_dict` gives; left-out fields take their defaults.
        where: Path to this part, for error messages.

    Raises:
        UserError: naming the field, for an unknown or missing one or a value of another type.
    """
    here = where or cls.__name__
    if not isinstance(values, Mapping):
        raise UserError(f"{here} must be an object with fields, got {values!r}")
    values = dict(values)
    registry = getattr(cls, "registry", None)
    if registry is not None:
        if "name" not in values:
            raise UserError(f"{here} lacks its name; known: {', '.join(registry)}")
        cls = registry[_convert(str, values.pop("name"), f"{here}.name")]
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # pyright: ignore[reportArgumentType]
    for key in values:
        if key not in fields:
            raise unknown(f"field of {here}", key, fields)
    hints = get_type_hints(cls)
    built = {key: _convert(hints[key], value, f"{here}.{key}") for key, value in values.items()}
    missing = [n for n, f in fields.items() if n not in built and _required(f)]
    if missing:
        raise UserError(f"{here} lacks {', '.join(missing)}")
    return cls(**built)


def digest(*parts: Any) -> str:
    """sha256 (hex) of configurations or plain values, by content."""
    text = json.dumps([to_dict(p) for p in parts], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def load(cls: type[C], path: str | Path) -> C:
    """Read a configuration from a JSON file. Raises: UserError if it is missing, not JSON, or does not fit `cls`."""
    return from_dict(cls, read_json(path))


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises: UserError if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """The fields in which two plain values differ, as "path: a → b"."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = sorted(set(a) | set(b))
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{where}.{k}" if where else str(k))]
    return [] if a == b else [f"{where}: {a!r} → {b!r}"]


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where} must be one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} must be a list, got {value!r}")
        return origin(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping) or hint is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be an object, got {value!r}")
        return {k: _convert(args[1], v, f"{where}.{k}") if args else v for k, v in value.items()}
    if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or hasattr(hint, "registry")):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is type(None) and value is None:
        return None
    if isinstance(hint, type) and isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise UserError(f"{where} must be of type {getattr(hint, '__name__', hint)}, got {value!r}")


def _convert_union(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    errors: list[UserError] = []
    for hint in hints:
        if value is None and hint is type(None):
            return None
        if hint is float and isinstance(value, int) and int in hints:
            continue
        try:
            if hint is not type(None):
                return _convert(hint, value, where)
        except UserError as error:
            errors.append(error)
    raise errors[0] if len(errors) == 1 else UserError(f"{where} does not take {value!r}")
