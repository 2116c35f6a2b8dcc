"""Settings that change how much memory a run needs but not what it computes. Imports no torch.

A run that ended for lack of memory continues with other values of these settings in the same output folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MEMORY_SETTINGS = (
    "optim.microbatch_size",
    "optim.microbatch_tokens",
    "optim.activation_checkpointing",
    "optim.compile",
    "offload",
    "sampling.batch_size",
    "sampling.compile",
)
"""Dotted keys. They divide the same work into other parts or place it elsewhere: results agree up to rounding."""


def only_memory_differs(saved: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Return whether two configurations are equal, apart from `MEMORY_SETTINGS`.

    Args:
        saved: nested values of one configuration.
        given: nested values of the other.
    """
    return _without_memory_settings(saved) == _without_memory_settings(given)


def memory_changes(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return key -> [saved value, given value] for each of `MEMORY_SETTINGS` that differs."""
    pairs = {key: [_value(saved, key), _value(given, key)] for key in MEMORY_SETTINGS}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _value(values: Any, key: str) -> Any:
    """Return the value under a dotted key, or None if there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _without_memory_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values without `MEMORY_SETTINGS`, in this section and in those inside it."""
    return {
        key: _without_memory_settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in values.items()
        if f"{prefix}{key}" not in MEMORY_SETTINGS
    }
