"""Engine-independent checkpoint: unsharded parameters and Adam state, keyed by parameter name.

One process without DeepSpeed can read what two processes under ZeRO-3 have written, and vice versa.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf.distributed.zero_gather import WEIGHT, adam_state, flat_partitions, full_numel, set_adam_state
from rlhf.errors import CheckpointError

FILE_PATTERN = "trained-*.safetensors"
BYTES_PER_FILE = 2**31
"""Bytes after which a new file is begun; the main process holds about this much in memory while it saves."""


def save_parameters_and_adam(folder: Path | None, named: Mapping[str, nn.Parameter], optimizer: Any) -> None:
    """Write every named parameter with its Adam state into safetensors files. Collective.

    Args:
        folder: the checkpoint's folder on the main process, None on the others.
        named: the trained parameters by name.
    """
    flat = flat_partitions(optimizer)
    pending: dict[str, Tensor] = {}
    files = 0

    def flush() -> None:
        nonlocal files
        if folder is not None and pending:
            save_file(pending, str(folder / FILE_PATTERN.replace("*", f"{files:05}")))
        files += 1
        pending.clear()

    for name, parameter in named.items():
        values = adam_state(parameter, optimizer, flat)
        if folder is not None:
            pending |= {f"{name}:{key}": value.detach().cpu().clone() for key, value in values.items()}
        if sum(value.nbytes for value in pending.values()) > BYTES_PER_FILE:
            flush()
    flush()


def load_parameters_and_adam(folder: Path, named: Mapping[str, nn.Parameter], optimizer: Any) -> None:
    """Restore what `save_parameters_and_adam` has written. Collective; every process reads the files.

    Raises: CheckpointError if the names or shapes of the saved parameters differ from those of `named`.
    """
    with ExitStack() as stack:
        key_files: dict[str, Any] = {}
        for path in sorted(folder.glob(FILE_PATTERN)):
            file = stack.enter_context(safe_open(str(path), framework="pt"))
            key_files |= dict.fromkeys(file.keys(), file)
        _check(folder, key_files, named)
        flat = flat_partitions(optimizer, create_missing_state=True)
        for name, parameter in named.items():
            values = {key: key_files[f"{name}:{key}"].get_tensor(f"{name}:{key}") for key in _keys(name, key_files)}
            set_adam_state(parameter, values, optimizer, flat)


def _keys(name: str, key_files: Mapping[str, Any]) -> Iterator[str]:
    return (key for key in (WEIGHT, "step", "exp_avg", "exp_avg_sq") if f"{name}:{key}" in key_files)


def _check(folder: Path, key_files: Mapping[str, Any], named: Mapping[str, nn.Parameter]) -> None:
    saved = {key.removesuffix(f":{WEIGHT}") for key in key_files if key.endswith(f":{WEIGHT}")}
    different = sorted(saved ^ named.keys())
    for name in sorted(saved & named.keys()):
        shape = key_files[f"{name}:{WEIGHT}"].get_slice(f"{name}:{WEIGHT}").get_shape()
        different += [name] if math.prod(shape) != full_numel(named[name]) else []
    if different:
        raise CheckpointError(
            "the parameters in the checkpoint differ from those of this run in name or shape",
            found=", ".join(different[:3]),
            where=str(folder),
            do="start over in another output_dir, or restore the configuration that the checkpoint was written with",
        )


def parameters_and_adam_size(named: Mapping[str, nn.Parameter]) -> int:
    """Return the number of bytes that `save_parameters_and_adam` will write: 12 a float32 parameter, and headers."""
    return sum(12 * full_numel(parameter) + 512 for parameter in named.values())
