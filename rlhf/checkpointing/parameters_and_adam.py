"""Trained weights and Adam's state on disk, by name and whole: the same files from every engine.

What two processes under ZeRO-3 have written, one process without DeepSpeed reads, and the other way round.
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
"""Bytes a file; the main process holds about one file's worth in memory."""


def save_parameters_and_adam(folder: Path | None, named: Mapping[str, nn.Parameter], optimizer: Any) -> None:
    """Write every named parameter with its state, a file after the other. Collective.

    Args:
        folder: on the main process; None on the others.
    """
    flat = flat_partitions(optimizer)
    waiting: dict[str, Tensor] = {}
    files = 0

    def flush() -> None:
        nonlocal files
        if folder is not None and waiting:
            save_file(waiting, str(folder / FILE_PATTERN.replace("*", f"{files:05}")))
        files += 1
        waiting.clear()

    for name, parameter in named.items():
        values = adam_state(parameter, optimizer, flat)
        if folder is not None:
            waiting |= {f"{name}:{key}": value.detach().cpu().clone() for key, value in values.items()}
        if sum(value.nbytes for value in waiting.values()) > BYTES_PER_FILE:
            flush()
    flush()


def load_parameters_and_adam(folder: Path, named: Mapping[str, nn.Parameter], optimizer: Any) -> None:
    """Put back what `write_trained` has written. Collective; every process reads.

    Raises: CheckpointError if the files are of other weights, or of weights of other shapes.
    """
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for path in sorted(folder.glob(FILE_PATTERN)):
            file = stack.enter_context(safe_open(str(path), framework="pt"))
            where |= dict.fromkeys(file.keys(), file)
        _check(folder, where, named)
        flat = flat_partitions(optimizer, filled=True)
        for name, parameter in named.items():
            values = {key: where[f"{name}:{key}"].get_tensor(f"{name}:{key}") for key in _keys(name, where)}
            set_adam_state(parameter, values, optimizer, flat)


def _keys(name: str, where: Mapping[str, Any]) -> Iterator[str]:
    return (key for key in (WEIGHT, "step", "exp_avg", "exp_avg_sq") if f"{name}:{key}" in where)


def _check(folder: Path, where: Mapping[str, Any], named: Mapping[str, nn.Parameter]) -> None:
    saved = {key.removesuffix(f":{WEIGHT}") for key in where if key.endswith(f":{WEIGHT}")}
    wrong = sorted(saved ^ named.keys())
    for name in sorted(saved & named.keys()):
        shape = where[f"{name}:{WEIGHT}"].get_slice(f"{name}:{WEIGHT}").get_shape()
        wrong += [name] if math.prod(shape) != full_numel(named[name]) else []
    if wrong:
        raise CheckpointError(
            "the checkpoint is of other weights",
            found=", ".join(wrong[:3]),
            where=str(folder),
            do="start over in another output_dir, or restore the configuration that the checkpoint was written with",
        )


def parameters_and_adam_size(named: Mapping[str, nn.Parameter]) -> int:
    """Bytes that `write_trained` will write, float32."""
    return sum(12 * full_numel(parameter) + 512 for parameter in named.values())
