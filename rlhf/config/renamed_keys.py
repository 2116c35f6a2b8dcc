"""Settings that were renamed: the old key is still accepted for one release, with a note. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from rlhf.config.schema import ClassifyConfig
from rlhf.config.sections import Saving

RENAMED_KEYS: dict[type[BaseModel], dict[str, str]] = {
    ClassifyConfig: {"several": "multi_label"},
    Saving: {"grace": "grace_seconds"},
}
"""Old key -> new key of each schema class. An entry is deleted with the release after the one that renamed it."""


@dataclass(frozen=True)
class RenamedValues:
    """Configuration values under the keys of today."""

    values: dict[str, Any]
    old_keys: dict[str, str] = field(default_factory=dict)
    """Dotted old key -> dotted new key, for each old key that was replaced."""
    clashes: dict[str, str] = field(default_factory=dict)
    """Dotted old key -> dotted new key where both were given; the value under the new key is kept."""


def rename_old_keys(schema: type[BaseModel], values: Mapping[str, Any]) -> RenamedValues:
    """Replace renamed keys, in the section itself and in all sections inside it. Values are not validated.

    Args:
        schema: the class that describes `values`.
        values: nested mappings and lists as read from YAML; they are not changed.
    """
    result = RenamedValues({})
    result.values.update(_renamed(schema, values, "", result))
    return result


def _renamed(schema: type[BaseModel], values: Mapping[str, Any], prefix: str, result: RenamedValues) -> dict[str, Any]:
    """Rename the keys of one section and of the sections inside it."""
    table = RENAMED_KEYS.get(schema, {})
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        new = table.get(key, key)
        if new != key:
            found = result.clashes if new in values else result.old_keys
            found[f"{prefix}{key}"] = f"{prefix}{new}"
            if new in values:
                continue
        setting = schema.model_fields.get(new)
        renamed[new] = value if setting is None else _inside(setting.annotation, value, f"{prefix}{new}.", result)
    return renamed


def _inside(annotation: Any, value: Any, prefix: str, result: RenamedValues) -> Any:
    """Rename the keys of every section inside a value of this type: X, X | None, tuple[X, ...] or dict[str, X]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _renamed(annotation, value, prefix, result) if isinstance(value, dict) else value
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is dict:
        if not isinstance(value, dict):
            return value
        return {name: _inside(parts[1], item, f"{prefix}{name}.", result) for name, item in value.items()}
    if origin is tuple:
        if not isinstance(value, list):
            return value
        return [_inside(parts[0], item, f"{prefix}{i}.", result) for i, item in enumerate(value)]
    if origin is not Literal:  # a union: the value belongs to one of its members, the others leave it as it is
        for part in parts:
            value = _inside(part, value, prefix, result)
    return value
