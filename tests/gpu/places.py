"""Computing on the CPU within a process that otherwise uses a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

CPU, DEVICE = "cpu", "device"


@contextmanager
def computing_on(place: str) -> Iterator[None]:
    """Context manager inside which stages and trainers use the CPU ("cpu") or this session's device ("device").

    Accelerate keeps the device of its first Accelerator for the whole process, so it is reset at both ends.
    """
    from accelerate.state import AcceleratorState, GradientState

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    before = os.environ.pop("ACCELERATE_USE_CPU", None)
    if place == CPU:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    reset()
    try:
        yield
    finally:
        os.environ.pop("ACCELERATE_USE_CPU", None)
        if before is not None:
            os.environ["ACCELERATE_USE_CPU"] = before
        reset()
