"""TOML files whose every key is known and of the right kind."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a file; ValueError if there is none."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a TOML file, and it does not exist")
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    return table


def take(path: Path, table: dict[str, Any], key: str, kind: type | tuple[type, ...], default: Any) -> Any:
    """Take a value out of a table; ValueError unless it is of this kind."""
    value = table.pop(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{path}: {key}: expected {_kinds(kind)}, got {value!r}")
    return value


def _kinds(kind: type | tuple[type, ...]) -> str:
    return " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))


def none_left(path: Path, table: Mapping[str, Any], section: str = "") -> None:
    """ValueError if a key is left."""
    for key in table:
        raise ValueError(f"{path}: {section}{key}: no such key")


def section(path: Path, name: str, kind: type[Any], table: Any) -> Any:
    """A dataclass from a table, every value held against the kind of its field."""
    if not isinstance(table, dict):
        raise ValueError(f"{path}: {name}: expected a table, got {table!r}")
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for entry in fields(kind):
        if entry.name in table:
            values[entry.name] = _value(path, f"{name}.{entry.name}", hints[entry.name], table[entry.name])
    none_left(path, {key: value for key, value in table.items() if key not in values}, f"{name}.")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{path}: {name}: {error}") from None


def _value(path: Path, name: str, kind: Any, value: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type):
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{path}: {name}: expected {kind.__name__}, got {value!r}")
        return value
    if not isinstance(value, list):
        raise ValueError(f"{path}: {name}: expected a list, got {value!r}")
    inner = kind.__args__[0]
    return tuple(_value(path, name, inner, entry) for entry in value)
