"""Formatting of a configuration with the origin and meaning of every value, for `rlhf show`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from rlhf.config.load import LoadedConfig


def config_lines(loaded: LoadedConfig[Any]) -> Iterator[str]:
    """Yield one line for each value: `key = value   # origin; meaning`."""
    yield from _walk(loaded.config, "", loaded.origins)


def _walk(section: BaseModel, prefix: str, origins: dict[str, str]) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), prefix + name
        if isinstance(value, BaseModel):
            yield from _walk(value, key + ".", origins)
        elif isinstance(value, tuple) and value and all(isinstance(v, BaseModel) for v in value):
            for i, item in enumerate(value):
                yield from _walk(item, f"{key}.{i}.", origins)
        elif isinstance(value, dict) and value and all(isinstance(v, BaseModel) for v in value.values()):
            for inner, item in value.items():
                yield from _walk(item, f"{key}.{inner}.", origins)
        else:
            meaning = f"; {field.description}" if field.description else ""
            yield f"{key} = {value!r}   # {origins.get(key, 'default')}{meaning}"
