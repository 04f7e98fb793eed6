"""Plain values as TOML text: what the standard library reads and does not write. Owns the writing only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Toml: TypeAlias = "str | bool | int | float | Sequence[Toml] | Mapping[str, Toml]"


def to_toml(document: Mapping[str, Toml]) -> str:
    """A document of tables, whose values are strings, booleans, finite numbers, lists and inline tables."""
    scalars = [f"{key} = {_value(value)}" for key, value in document.items() if not isinstance(value, Mapping)]
    tables = [
        f"[{key}]\n" + "".join(f"{name} = {_value(item)}\n" for name, item in value.items())
        for key, value in document.items()
        if isinstance(value, Mapping)
    ]
    return "\n".join(["".join(f"{line}\n" for line in scalars), *tables])


def _value(value: Toml) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value)  # a JSON string of the basic plane is a TOML basic string
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + "}"
    return "[" + ", ".join(_value(item) for item in value) + "]"
