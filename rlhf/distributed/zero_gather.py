"""Read and write full parameters and their Adam state, whether or not ZeRO has sharded them.

This module and `rlhf.distributed.engine` are the only ones that depend on how DeepSpeed stores parameters.
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
    """Reset Adam's step count of some parameter groups to 0, when their parameters start to be trained.

    Before their phase begins, the parameters of a group have no gradient, and torch keeps no Adam state for them. ZeRO
    instead passes the optimizer flat groups with gradients of 0: the moments stay 0, but the steps are counted, so that
    the first real step would lack its bias correction (a step 3.2 times too large).
    """
    zero, adam = optimizer_layers(optimizer)
    if hasattr(zero, "sub_group_to_group_id"):  # ZeRO-3
        owner = zero.sub_group_to_group_id
        parameters = [p for i, p in enumerate(zero.fp32_partitioned_groups_flat) if owner[i] in groups]
    else:
        parameters = [p for i in groups for p in adam.param_groups[i]["params"]]
    for parameter in parameters:
        state = adam.state.get(parameter, {})
        if "step" in state:
            state["step"] = state["step"] * 0


def optimizer_layers(optimizer: Any) -> tuple[Any, Any]:
    """Unwrap accelerate's optimizer: return (the ZeRO optimizer, or None without ZeRO; torch's optimizer)."""
    inner = getattr(optimizer, "optimizer", optimizer)
    adam = getattr(inner, "optimizer", None)
    return (None, inner) if adam is None else (inner, adam)


def is_sharded(parameter: Tensor) -> bool:
    """Return whether this process holds only a shard of the parameter (ZeRO-3)."""
    return hasattr(parameter, "ds_id")


def full_numel(parameter: Tensor) -> int:
    """Return the number of elements of the full parameter, all shards together."""
    return int(parameter.ds_numel) if is_sharded(parameter) else parameter.numel()  # type: ignore[attr-defined]


@contextmanager
def gathered_parameters(parameters: Iterable[nn.Parameter], *, changed: bool = False) -> Iterator[None]:
    """Context manager inside which every process holds the full parameters, even if they are sharded. Collective.

    Args:
        changed: the parameters are changed inside; the values on rank 0 are distributed to all processes at the end.
    """
    sharded = [p for p in parameters if is_sharded(p)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if changed else None):
        yield


def flat_partitions(optimizer: Any, *, create_missing_state: bool = False) -> dict[int, Tensor]:
    """Return, by the id of each parameter, this process's flat float32 partition that ZeRO updates in its place.

    Args:
        create_missing_state: give partitions without Adam state the state that they have before the first update.
    Returns: an empty dict without ZeRO.
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
    if create_missing_state:
        for flat in found.values():
            if not adam.state.get(flat):
                step = torch.zeros(()) if isinstance(adam, torch.optim.AdamW) else 0
                adam.state[flat] = {"step": step, **{key: torch.zeros_like(flat) for key in MOMENTS}}
    if all(adam.state.get(flat) for flat in found.values()):
        link_adam_state(zero)
    return found


def adam_state(parameter: nn.Parameter, optimizer: Any, flat: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Return the full weight of a parameter with Adam's moments and step. Collective.

    Args:
        flat: the result of `flat_partitions`.
    Returns: "weight", and "exp_avg", "exp_avg_sq" and "step" if Adam has a state. Under ZeRO they are float32.
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
    """Context manager that sets `requires_grad`: ZeRO-3 neither reads nor writes the state of a frozen parameter."""
    before = parameter.requires_grad
    parameter.requires_grad_(True)
    try:
        yield
    finally:
        parameter.requires_grad_(before)


def set_adam_state(
    parameter: nn.Parameter, values: Mapping[str, Tensor], optimizer: Any, flat: Mapping[int, Tensor]
) -> None:
    """Restore the values that `adam_state` returned, possibly under another engine. Collective.

    Args:
        values: full tensors, the same on every process; if the moments are missing, Adam's state is reset.
        flat: the result of `flat_partitions` with `create_missing_state`.
    """
    zero, adam = optimizer_layers(optimizer)
    with torch.no_grad(), gathered_parameters([parameter], changed=True):
        parameter.copy_(values[WEIGHT])
    if zero is not None:
        _set_partition(parameter, values, optimizer, flat[id(parameter)])
        return
    if "step" not in values:
        adam.state.pop(parameter, None)
        return
    fused = any(group.get("fused") for group in adam.param_groups)
    step_device = parameter.device if fused else torch.device("cpu")
    adam.state[parameter] = {
        "step": values["step"].to(step_device, torch.float32),
        **{k: values[k].to(parameter) for k in MOMENTS},
    }


def _set_partition(parameter: nn.Parameter, values: Mapping[str, Tensor], optimizer: Any, flat: Tensor) -> None:
    """Write this process's share of the values into ZeRO's float32 weights and Adam state."""
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
        safe_set_local_fp32_param(parameter, _shard(values[WEIGHT], parameter))
        for key in MOMENTS:
            safe_set_local_optimizer_state(parameter, _shard(values.get(key, zeros), parameter), key)


def _shard(value: Tensor, parameter: Any) -> Tensor:
    """Return this process's shard of a full tensor, padded with zeros.

    DeepSpeed's setter for full tensors fails if the number of elements is not a multiple of the number of processes.
    """
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    padded = value.new_zeros(size * torch.distributed.get_world_size())
    padded[: value.numel()] = value.flatten()
    return padded[rank * size : (rank + 1) * size]
