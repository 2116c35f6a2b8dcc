"""Turn "out of memory" of a GPU or of the machine into an error that says in which phase of which run it happened.

Imports torch only after an allocation has failed, since the command line imports this module at its start.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.errors import OutOfMemoryError

HOST_MESSAGES = ("DefaultCPUAllocator",)
"""Texts in a RuntimeError of torch that mean that the machine's memory did not suffice."""
GPU_MESSAGES = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Texts in a RuntimeError of torch that mean that a GPU's memory did not suffice."""
ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ [A-Za-z]+)")

_stage: list[tuple[str, Path]] = []  # name and output folder of the stage that began last in this process


def begin_stage(stage: str, folder: Path) -> None:
    """Remember the stage that begins in this process, and its output folder, for the messages of its errors."""
    _stage[:] = [(stage, folder)]


def forget_stage() -> None:
    """Forget the stage that began last, as a command does before it begins."""
    _stage.clear()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name what the code inside the context does, for the message if memory runs out.

    In nested contexts the innermost name counts.

    Args:
        name: present participle: sampling, scoring, updating, evaluating, loading or saving.
    Raises: OutOfMemoryError in place of torch's error or a MemoryError; any other exception is passed on.
    """
    try:
        yield
    except Exception as error:
        if (found := out_of_memory(error, name)) is None:
            raise
        raise found from error


def out_of_memory(error: BaseException, phase: str | None = None) -> OutOfMemoryError | None:
    """Return the error for an exception that means that memory ran out, or None for any other exception.

    Args:
        error: the exception. While its traceback exists, tensors in it still occupy memory, which is reported as used.
        phase: what was being done, as for the context manager `phase`; None = unknown.
    """
    torch = sys.modules.get("torch")  # without torch in this process, the error is not one of torch
    on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    if isinstance(error, RuntimeError):
        on_gpu |= any(text in str(error) for text in GPU_MESSAGES)
    on_host = isinstance(error, MemoryError)
    on_host |= isinstance(error, RuntimeError) and any(text in str(error) for text in HOST_MESSAGES)
    if isinstance(error, OutOfMemoryError) or not (on_gpu or on_host):
        return None
    doing = f" while {phase}" if phase else ""
    what = f"{'the GPU' if on_gpu else 'this machine'} is out of memory{doing}"
    found = [_asked_for(error), _gpu_memory() if on_gpu else _host_memory()]
    stage, folder = _stage[0] if _stage else (None, None)
    return OutOfMemoryError(
        what,
        found="; ".join(text for text in found if text),
        where=f"stage {stage}, run {folder}" if stage else "",
        do="let the command need less memory: smaller batches, shorter texts, or a smaller model",
        phase=phase,
        gpu=on_gpu,
        stage=stage,
        folder=folder,
    )


def _asked_for(error: BaseException) -> str:
    """Return the size that the failed allocation asked for, or the first line of the message if it names none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    size = ASKED.search(str(error))
    return f"{size[1]} asked for" if size else lines[0][:200]


def _gpu_memory() -> str:
    """Return what is free and used of the current GPU's memory; '' if the GPU does not answer."""
    import torch

    if not torch.cuda.is_available():
        return ""
    try:
        free, total = torch.cuda.mem_get_info()
        tensors, cached = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    except RuntimeError:  # after some errors the driver answers no more calls
        return ""
    return (
        f"{_gib(free)} free of {_gib(total)}, {_gib(total - free)} in use: {_gib(tensors)} by tensors of this process, "
        f"{_gib(cached - tensors)} kept by its allocator, {_gib(max(0, total - free - cached))} by all others"
    )


def _host_memory() -> str:
    """Return what is free and used of this machine's memory; '' where /proc does not say it."""
    try:
        machine, process = Path("/proc/meminfo").read_text("utf-8"), Path("/proc/self/status").read_text("utf-8")
    except OSError:
        return ""
    number = {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB", f"{machine}\n{process}", re.M)}
    if not {"MemAvailable", "MemTotal", "VmRSS"} <= number.keys():
        return ""
    return (
        f"{_gib(number['MemAvailable'])} free of {_gib(number['MemTotal'])}, {_gib(number['VmRSS'])} in use by this "
        "process"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
