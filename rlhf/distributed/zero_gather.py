"""Weights and Adam's state where ZeRO may have cut them up: by parameter and whole, whatever the engine.

Beside `distributed` the only module that knows how DeepSpeed keeps things.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.distributed.library_internals import link_adam_state

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


def reset_adam_steps(optimizer: Any, groups: list[int]) -> None:
    """Make Adam count the updates of some parameter groups from here.

    Weights that wait have no gradient and torch keeps no state for them. ZeRO gives the optimizer whole flat groups,
    with gradients of 0: their moments stay 0 but their updates are counted, so that the bias correction of the first
    real one would be missing (3.2 times too large a step).
    """
    zero, adam = optimizer_layers(optimizer)
    if hasattr(zero, "sub_group_to_group_id"):  # ZeRO-3
        owner = zero.sub_group_to_group_id
        counted = [p for i, p in enumerate(zero.fp32_partitioned_groups_flat) if owner[i] in groups]
    else:
        counted = [p for i in groups for p in adam.param_groups[i]["params"]]
    for parameter in counted:
        state = adam.state.get(parameter, {})
        if "step" in state:
            state["step"] = state["step"] * 0


def optimizer_layers(optimizer: Any) -> tuple[Any, Any]:
    """The ZeRO optimizer (None without) and torch's below what accelerate makes of one."""
    below = getattr(optimizer, "optimizer", optimizer)
    adam = getattr(below, "optimizer", None)
    return (None, below) if adam is None else (below, adam)


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds a part of a weight only (ZeRO-3)."""
    return hasattr(parameter, "ds_id")


def full_numel(parameter: Tensor) -> int:
    """Numbers in a weight, all processes together."""
    return int(parameter.ds_numel) if is_sharded(parameter) else parameter.numel()  # type: ignore[attr-defined]


@contextmanager
def gathered_parameters(parameters: Iterable[nn.Parameter], *, changed: bool = False) -> Iterator[None]:
    """Around reading weights that may be sharded: each process has all of them. Collective.

    Args:
        changed: those of the main process are what everybody has afterwards.
    """
    split = [p for p in parameters if is_sharded(p)]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split, modifier_rank=0 if changed else None):
        yield


def flat_partitions(optimizer: Any, *, filled: bool = False) -> dict[int, Tensor]:
    """id of a parameter -> the flat float32 part, of this process, that ZeRO updates instead of it; without, none.

    Args:
        filled: give Adam a state, as before the first update, where it has none yet.
    """
    zero, adam = optimizer_layers(optimizer)
    if zero is None:
        return {}
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3
        pairs = zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
    else:
        groups = zero.bit16_groups if hasattr(zero, "bit16_groups") else zero.bf16_groups
        pairs = zip(groups, (group["params"][0] for group in adam.param_groups), strict=True)
    found = {id(p): flat for group, flat in pairs for p in group}
    if filled:
        for flat in found.values():
            if not adam.state.get(flat):
                counted = torch.zeros(()) if isinstance(adam, torch.optim.AdamW) else 0
                adam.state[flat] = {"step": counted, **{key: torch.zeros_like(flat) for key in MOMENTS}}
    if all(adam.state.get(flat) for flat in found.values()):
        link_adam_state(zero)
    return found


def adam_state(parameter: nn.Parameter, optimizer: Any, flat: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Weight, moments and step of a parameter, whole; of ZeRO the float32 ones. Collective.

    Args:
        flat: `flat_groups`.
    """
    zero, adam = optimizer_layers(optimizer)
    if zero is None:
        state = {key: torch.as_tensor(value) for key, value in adam.state.get(parameter, {}).items()}
        return {WEIGHT: parameter.detach(), **state}
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state = adam.state.get(flat[id(parameter)], {})
    with gradients_enabled(parameter):
        found = {WEIGHT: safe_get_full_fp32_param(parameter)}
        if state:
            found |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            found["step"] = torch.tensor(float(state["step"]))
    return found


@contextmanager
def gradients_enabled(parameter: nn.Parameter) -> Iterator[None]:
    """ZeRO-3 tells and takes nothing of a weight that waits for its phase."""
    before = parameter.requires_grad
    parameter.requires_grad_(True)
    try:
        yield
    finally:
        parameter.requires_grad_(before)


def set_adam_state(
    parameter: nn.Parameter, values: Mapping[str, Tensor], optimizer: Any, flat: Mapping[int, Tensor]
) -> None:
    """Put back what `adam_state` has said, perhaps of another engine. Collective.

    Args:
        values: whole tensors, the same on every process; without moments: as before the first update.
        flat: `flat_groups`, filled.
    """
    zero, adam = optimizer_layers(optimizer)
    with torch.no_grad(), gathered_parameters([parameter], changed=True):
        parameter.copy_(values[WEIGHT])
    if zero is not None:
        _set_flat(parameter, values, optimizer, flat[id(parameter)])
        return
    if "step" not in values:
        adam.state.pop(parameter, None)
        return
    fused = any(group.get("fused") for group in adam.param_groups)
    place = parameter.device if fused else torch.device("cpu")
    adam.state[parameter] = {
        "step": values["step"].to(place, torch.float32),
        **{k: values[k].to(parameter) for k in MOMENTS},
    }


def _set_flat(parameter: nn.Parameter, values: Mapping[str, Tensor], optimizer: Any, flat: Tensor) -> None:
    """Of ZeRO: this process's part."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    _, adam = optimizer_layers(optimizer)
    zeros = torch.zeros(values[WEIGHT].shape)
    step = adam.state[flat]["step"]
    count = float(values.get("step", torch.zeros(())))
    adam.state[flat]["step"] = torch.full_like(step, count) if isinstance(step, Tensor) else int(count)
    if not is_sharded(parameter):
        safe_set_full_fp32_param(parameter, values[WEIGHT])
        for key in MOMENTS:
            safe_set_full_optimizer_state(parameter, values.get(key, zeros), key)
        return
    with gradients_enabled(parameter):
        safe_set_local_fp32_param(parameter, _part(values[WEIGHT], parameter))
        for key in MOMENTS:
            safe_set_local_optimizer_state(parameter, _part(values.get(key, zeros), parameter), key)


def _part(value: Tensor, parameter: Any) -> Tensor:
    """This process's part of a whole tensor. (DeepSpeed's setter for whole ones fails where sizes do not divide.)"""
    size, process = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    padded = value.new_zeros(size * torch.distributed.get_world_size())
    padded[: value.numel()] = value.flatten()
    return padded[process * size : (process + 1) * size]
