"""What `rlhf check` predicts for a stage that ran out of memory, and the cheapest change with which it may continue.

Only changes are considered with which the same run can resume: settings that concern memory only, and the launch.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rlhf.config.schema import EvaluateConfig
from rlhf.errors import RLHFError
from rlhf.launch.launcher import LaunchOptions
from rlhf.preflight.memory_formulas import MemoryEstimate, format_bytes
from rlhf.preflight.stage_inputs import launch_sharding, read_estimate_input
from rlhf.preflight.stage_memory import EstimateInput, device_bytes, estimate_memory
from rlhf.preflight.suggestions import memory_suggestions

ESTIMATED_PHASES = {"sampling": "sample", "scoring": "score", "updating": "update"}
"""Phase of a run -> how the name of that phase begins in an estimate; any other phase counts as the largest one."""
LEAST_SAVING = 0.25
"""Where the estimate of the present settings would fit, it is too low, or other processes have taken memory. A change
must then save at least this share of what all changes of settings together would save."""
TEMPORARY = (
    "gradients",
    "optimizer (Adam)",
    "communication",
    "rollout",
    "activations",
    "output layer and loss",
    "KV cache",
    "gathered weights",
    "largest offloaded model",
    "libraries and allocator",  # they depend on the parts above
)
"""Parts of an estimate that do not exist yet while models are loaded."""


@dataclass(frozen=True)
class MemoryAdvice:
    """Advice for a stage that ran out of memory."""

    predicted: str  # what `rlhf check` predicts, in words
    change: tuple[str, ...] = ()  # words of the command line; () = nothing that needs less was found
    outcome: str = ""  # what is predicted with the change, in words


def advise(
    stage: str, config: Any, options: LaunchOptions, *, phase: str | None, gpu: bool, launch_may_change: bool = True
) -> MemoryAdvice:
    """Return the prediction for a stage, and the cheapest change that fits or else the one that needs least.

    Args:
        stage: name of the stage.
        config: its configuration.
        options: options of its launch.
        phase: phase of the run in which memory ran out, such as "sampling"; None = unknown.
        gpu: whether it was a GPU's memory; else it was the machine's.
        launch_may_change: whether changes of the launcher or the number of processes are considered.
    Raises: RLHFError if a model or data file of the stage cannot be read.
    """
    if isinstance(config, EvaluateConfig):
        fewer = max(1, config.sampling.batch_size // 4)
        helps = phase != "loading" and fewer < config.sampling.batch_size
        words = (f"sampling.batch_size={fewer}",) if helps else ()
        return MemoryAdvice("`rlhf check` makes no prediction for evaluate", words)
    sharding = launch_sharding(config, options.launcher, options.processes, options.machines)
    limit = device_bytes() if gpu else None
    on_gpu = gpu or device_bytes() is not None
    inputs = read_estimate_input(stage, config, sharding, gpu=on_gpu)
    estimate = estimate_memory(inputs)
    needed, name = _measure(estimate, phase)
    before = needed(estimate)
    of_limit = f" of {format_bytes(limit)}" if limit is not None else ""
    peak = f", and {format_bytes(estimate.peak)} at its peak ({estimate.largest_phase})"
    predicted = f"`rlhf check` predicts {format_bytes(before)}{of_limit} {name}{peak}"
    if on_gpu and not gpu:  # the estimate of a run on a GPU is about the GPU
        return MemoryAdvice(predicted)
    change, after, fits = _cheapest(inputs, phase, needed, before, limit, launch_may_change)
    if not change:
        return MemoryAdvice(predicted)
    less = f"`rlhf check` then predicts {format_bytes(after)}"
    return MemoryAdvice(
        predicted, tuple(shlex.split(change)), less if fits else f"no change is sure to suffice; {less}, the least"
    )


def _cheapest(
    inputs: EstimateInput,
    phase: str | None,
    needed: Callable[[MemoryEstimate], float],
    before: float,
    limit: float | None,
    launch_may_change: bool,
) -> tuple[str, float, bool]:
    """Return the change, the bytes that `needed` returns with it, and whether it fits; ('', ...) if none needs less."""
    estimate, tried = estimate_memory(inputs), []
    for change, changed in memory_suggestions(inputs, ESTIMATED_PHASES.get(phase or "", estimate.largest_phase)):
        if "--" in change and not launch_may_change:
            continue
        with suppress(RLHFError):  # this number of processes cannot share the batch
            smaller = estimate_memory(changed)
            tried.append((needed(smaller), smaller.peak, change))
    enough = before
    if limit is None or estimate.peak <= limit:
        enough -= LEAST_SAVING * max((before - size for size, _, change in tried if "--" not in change), default=0.0)
    for size, peak, change in tried:
        if size < before and size <= enough and (limit is None or peak <= limit):
            return change, size, True
    size, _, change = min(tried, default=(before, before, ""), key=lambda found: found[0])
    return (change, size, False) if size < before else ("", before, False)


def _measure(estimate: MemoryEstimate, phase: str | None) -> tuple[Callable[[MemoryEstimate], float], str]:
    """Return a function from an estimate to the device bytes of a phase of the run, and the phase in words."""
    if phase in ("loading", "saving"):
        return _permanent_bytes, f"for the models while {phase}"
    start = ESTIMATED_PHASES.get(phase or "")
    if start is None or not any(name.startswith(start) for name in estimate.phases):
        return lambda other: other.peak, "for the largest phase"
    return (
        lambda other: max(other.phase_bytes(name) for name in other.phases if name.startswith(start)),
        f"for {phase}",
    )


def _permanent_bytes(estimate: MemoryEstimate) -> float:
    """Return the bytes of the parts of an estimate that exist as soon as the models are loaded."""
    parts = estimate.phases[estimate.largest_phase]
    counted = [part for part in parts if part.name not in TEMPORARY]
    return MemoryEstimate({"": counted}, device_is_host=estimate.device_is_host).peak
