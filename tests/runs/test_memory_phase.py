"""Which exceptions mean that memory ran out, and what the error in their place says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf.errors import OutOfMemoryError, TrainingError
from rlhf.runs.memory_phase import begin_stage, forget_stage, out_of_memory, phase

GIB = 2**30


@pytest.fixture(autouse=True)
def no_stage() -> Iterator[None]:
    """No stage has begun, before and after each test."""
    forget_stage()
    yield
    forget_stage()


@pytest.mark.parametrize(
    ("error", "gpu", "asked"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has"),
            True,
            "1.50 GiB asked for",
        ),
        (RuntimeError("CUDA error: out of memory\nCompile with"), True, "CUDA error: out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes."),
            False,
            "64 bytes",
        ),
        (MemoryError(), False, "MemoryError"),
    ],
)
def test_memory_that_runs_out_is_recognised(error: Exception, gpu: bool, asked: str) -> None:
    found = out_of_memory(error, "sampling")
    assert isinstance(found, OutOfMemoryError)
    assert isinstance(found, TrainingError)
    assert (found.gpu, found.phase, found.stage, found.where) == (gpu, "sampling", None, "")
    assert found.what == f"{'the GPU' if gpu else 'this machine'} is out of memory while sampling"
    assert found.found.startswith(asked)
    assert found.do


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("CUDA out of memory"), KeyboardInterrupt()]
)
def test_other_exceptions_are_passed_on(error: BaseException) -> None:
    assert out_of_memory(error) is None
    with pytest.raises(type(error)) as caught, phase("sampling"):
        raise error
    assert caught.value is error


def test_a_real_failed_allocation_on_the_cpu_is_recognised() -> None:
    message = r"this machine is out of memory while updating \(found: \d+ bytes asked for; "
    with pytest.raises(OutOfMemoryError, match=message), phase("updating"):
        torch.empty(2**56, dtype=torch.uint8)


def test_the_innermost_phase_and_the_stage_are_named() -> None:
    begin_stage("sft", Path("out"))
    with pytest.raises(OutOfMemoryError) as caught, phase("updating"), phase("saving"):
        raise MemoryError
    assert caught.value.phase == "saving"
    assert (caught.value.stage, caught.value.folder) == ("sft", Path("out"))
    assert str(caught.value).startswith("stage sft, run out: this machine is out of memory while saving (found: ")
    assert isinstance(caught.value.__cause__, MemoryError)


def test_free_and_used_memory_of_the_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 60 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 64 * GIB)
    error = out_of_memory(torch.OutOfMemoryError("Tried to allocate 2.00 GiB."))
    assert error is not None
    assert error.found == (
        "2.00 GiB asked for; 1.00 GiB free of 80.00 GiB, 79.00 GiB in use: 60.00 GiB by tensors of this process, "
        "4.00 GiB kept by its allocator, 15.00 GiB by all others"
    )


def test_a_gpu_that_no_longer_answers_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    error = out_of_memory(torch.OutOfMemoryError("Tried to allocate 2.00 GiB."))
    assert error is not None
    assert error.found == "2.00 GiB asked for"
