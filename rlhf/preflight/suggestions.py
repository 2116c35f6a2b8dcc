"""What would need less memory than a stage as it is configured: changes that `rlhf check` tries one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rlhf.config.schema import PPOConfig
from rlhf.config.sections import Peft
from rlhf.preflight.memory_estimate import EstimateInput, offloadable
from rlhf.preflight.memory_model import Sharding
from rlhf.preflight.model_shapes import PPOModelShapes

Suggestion = tuple[str, EstimateInput]


def memory_suggestions(case: EstimateInput) -> Iterator[Suggestion]:
    """What would need less, in words, the cheapest first: smaller microbatches, frozen models off the device,
    recomputed activations, fewer rows decoded at once, sharding on the processes that there are, more processes,
    adapters (which train something else)."""
    yield from _smaller(case, "")
    case, words = _offloaded(case)
    if words:
        yield words, case
        yield from _smaller(case, words)
    optim, before, frugal = case.config.optim, words, case
    if not optim.activation_checkpointing:
        micro = optim.microbatch_size
        while micro >= 1:
            if _divides(case, micro):
                frugal = _with(case, "optim", activation_checkpointing=True, microbatch_size=micro)
                cut = "" if micro == optim.microbatch_size else f" optim.microbatch_size={micro}"
                words = f"{before} optim.activation_checkpointing=true{cut}".strip()
                yield words, frugal
            micro //= 2
    if isinstance(case.config, PPOConfig):
        rows = case.config.sampling.batch_size
        while rows > 8:
            rows //= 2
            frugal = _with(frugal, "sampling", batch_size=rows)
            yield f"{words} sampling.batch_size={rows}".strip(), frugal
    yield from _spread(frugal, words)


def _smaller(case: EstimateInput, words: str) -> Iterator[Suggestion]:
    """Microbatches, halved again and again."""
    small = case.config.optim.microbatch_size
    while small > 1:
        small //= 2
        if _divides(case, small):
            yield f"{words} optim.microbatch_size={small}".strip(), _with(case, "optim", microbatch_size=small)


def _offloaded(case: EstimateInput) -> tuple[EstimateInput, str]:
    """The case with all frozen models at rest that can be, and the words for it; none if nothing changes."""
    if not isinstance(case.models, PPOModelShapes) or not case.gpu:
        return case, ""
    roles = offloadable(case.models)
    if set(roles) <= set(case.config.offload):
        return case, ""
    away = replace(case, config=case.config.model_copy(update={"offload": roles}))
    return away, f"offload=[{','.join(roles)}]"


def _spread(case: EstimateInput, words: str) -> Iterator[Suggestion]:
    s = case.sharding
    most = _most(case)
    for stage, name in ((1, "zero1"), (2, "zero2"), (3, "zero3")):
        if s.processes > 1 and s.zero < stage:
            yield f"--launcher {name} {words}".strip(), replace(case, sharding=replace(s, zero=stage, deepspeed=True))
    processes = s.processes * 2
    while processes <= most:
        wide = Sharding(processes, 3, True)
        yield f"--launcher zero3 --num-processes {processes} {words}".strip(), replace(case, sharding=wide)
        processes *= 2
    if case.gpu and not s.offload_weights:
        near = replace(s, zero=3, deepspeed=True, offload_optimizer=True, offload_weights=True)
        yield f"--launcher zero3_offload {words}".strip(), replace(case, sharding=near)


def _most(case: EstimateInput) -> int:
    """Processes that can share the batch, at most 64."""
    if isinstance(case.config, PPOConfig):
        return min(64, case.config.ppo.rollout_size // case.config.ppo.minibatches)
    return min(64, int(case.config.optim.batch_size))


def _divides(case: EstimateInput, micro: int) -> bool:
    """Whether a microbatch is possible."""
    if isinstance(case.config, PPOConfig):
        return True
    share = case.config.optim.batch_size // case.sharding.processes
    return bool(share % min(micro, share) == 0)


def _with(case: EstimateInput, section: str, **values: Any) -> EstimateInput:
    part = getattr(case.config, section).model_copy(update=values)
    return replace(case, config=case.config.model_copy(update={section: part}))


def with_lora(config: Any) -> Any | None:
    """The same configuration with LoRA, if all weights are trained and an adapter is possible."""
    peft = getattr(config, "peft", None)
    if peft is None or peft.enabled:
        return None
    return config.model_copy(update={"peft": Peft(method="lora")})
