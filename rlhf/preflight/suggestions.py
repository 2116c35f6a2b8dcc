"""Changes of a stage's configuration or launch that need less memory; `rlhf check` tries them one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rlhf.config.schema import PPOConfig
from rlhf.config.sections import Peft
from rlhf.preflight.memory_formulas import Sharding
from rlhf.preflight.model_shapes import PPOModelShapes
from rlhf.preflight.stage_memory import EstimateInput, offloadable

Suggestion = tuple[str, EstimateInput]  # the change as command-line words, and the input of its estimate


def memory_suggestions(inputs: EstimateInput, phase: str | None = None) -> Iterator[Suggestion]:
    """Yield changes that need less memory, the cheapest first.

    The order is: smaller microbatches, offloaded frozen models, activation checkpointing, fewer rows decoded at once,
    more sharding over the same processes, more processes.

    Args:
        inputs: the stage.
        phase: "sample" if PPO's sampling is known to need too much: fewer rows decoded at once then come first.
    """
    if phase == "sample":
        yield from _fewer_decoded_rows(inputs, "")
    yield from _smaller_microbatches(inputs, "")
    inputs, change = _with_offload(inputs)
    if change:
        yield change, inputs
        yield from _smaller_microbatches(inputs, change)
    optim, offload_change, smallest = inputs.config.optim, change, inputs
    if not optim.activation_checkpointing:
        microbatch = optim.microbatch_size
        while microbatch >= 1:
            if _is_possible(inputs, microbatch):
                smallest = _with_settings(inputs, "optim", activation_checkpointing=True, microbatch_size=microbatch)
                smaller = "" if microbatch == optim.microbatch_size else f" optim.microbatch_size={microbatch}"
                change = f"{offload_change} optim.activation_checkpointing=true{smaller}".strip()
                yield change, smallest
            microbatch //= 2
    for fewer, changed in _fewer_decoded_rows(smallest, change):
        smallest = changed
        yield fewer, changed
    yield from _more_sharding(smallest, change)


def _smaller_microbatches(inputs: EstimateInput, change: str) -> Iterator[Suggestion]:
    """Yield suggestions that repeatedly halve the microbatch, in addition to `change`."""
    size = inputs.config.optim.microbatch_size
    while size > 1:
        size //= 2
        if _is_possible(inputs, size):
            smaller = _with_settings(inputs, "optim", microbatch_size=size)
            yield f"{change} optim.microbatch_size={size}".strip(), smaller


def _fewer_decoded_rows(inputs: EstimateInput, change: str) -> Iterator[Suggestion]:
    """Yield suggestions that repeatedly halve the rows that PPO decodes at once, in addition to `change`."""
    if not isinstance(inputs.config, PPOConfig):
        return
    rows = inputs.config.sampling.batch_size
    while rows > 8:
        rows //= 2
        yield f"{change} sampling.batch_size={rows}".strip(), _with_settings(inputs, "sampling", batch_size=rows)


def _with_offload(inputs: EstimateInput) -> tuple[EstimateInput, str]:
    """Return the input with all frozen models offloaded, and the change; '' if no more models can be offloaded."""
    if not isinstance(inputs.models, PPOModelShapes) or not inputs.gpu:
        return inputs, ""
    roles = offloadable(inputs.models)
    if set(roles) <= set(inputs.config.offload):
        return inputs, ""
    offloaded = replace(inputs, config=inputs.config.model_copy(update={"offload": roles}))
    return offloaded, f"offload=[{','.join(roles)}]"


def _more_sharding(inputs: EstimateInput, change: str) -> Iterator[Suggestion]:
    """Yield suggestions of launchers that shard more, in addition to `change`."""
    s = inputs.sharding
    max_processes = _max_processes(inputs)
    for stage, name in ((1, "zero1"), (2, "zero2"), (3, "zero3")):
        if s.processes > 1 and s.zero < stage:
            sharding = replace(s, zero=stage, deepspeed=True)
            yield f"--launcher {name} {change}".strip(), replace(inputs, sharding=sharding)
    processes = s.processes * 2
    while processes <= max_processes:
        sharding = Sharding(processes, 3, True)
        yield f"--launcher zero3 --num-processes {processes} {change}".strip(), replace(inputs, sharding=sharding)
        processes *= 2
    if inputs.gpu and not s.offload_weights:
        sharding = replace(s, zero=3, deepspeed=True, offload_optimizer=True, offload_weights=True)
        yield f"--launcher zero3_offload {change}".strip(), replace(inputs, sharding=sharding)


def _max_processes(inputs: EstimateInput) -> int:
    """Return the largest number of processes that can share the batch, at most 64."""
    if isinstance(inputs.config, PPOConfig):
        return min(64, inputs.config.ppo.rollout_size // inputs.config.ppo.minibatches)
    return min(64, int(inputs.config.optim.batch_size))


def _is_possible(inputs: EstimateInput, microbatch: int) -> bool:
    """Return whether the batch can be divided into microbatches of this size."""
    if isinstance(inputs.config, PPOConfig):
        return True
    share = inputs.config.optim.batch_size // inputs.sharding.processes
    return bool(share % min(microbatch, share) == 0)


def _with_settings(inputs: EstimateInput, section: str, **values: Any) -> EstimateInput:
    """Return the input with changed settings in one section of the configuration."""
    changed = getattr(inputs.config, section).model_copy(update=values)
    return replace(inputs, config=inputs.config.model_copy(update={section: changed}))


def with_lora(config: Any) -> Any | None:
    """Return the configuration with LoRA added; None if it has an adapter already or the stage supports none."""
    peft = getattr(config, "peft", None)
    if peft is None or peft.enabled:
        return None
    return config.model_copy(update={"peft": Peft(method="lora")})
