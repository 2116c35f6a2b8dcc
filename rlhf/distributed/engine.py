"""The calls into accelerate and DeepSpeed: create the Accelerator; backward, clipping, optimizer step, saving.

Only `rlhf.distributed` and `rlhf.trainers.supervised.base` depend on how these libraries and TRL work inside.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config.env_vars import timeout_seconds
from rlhf.distributed.launch_env import check_world_size, under_deepspeed, use_cpu, world_size
from rlhf.distributed.library_internals import reset_accelerate
from rlhf.distributed.zero_gather import is_sharded
from rlhf.errors import TrainingError

# Releases (from, below) that tests/distributed/test_engine.py covers. In others, names that we rely on may be gone.
TESTED_VERSIONS = {"trl": ("1.16", "1.17"), "accelerate": ("1.14", "2.0"), "transformers": ("5.20", "6.0")}


def quiet_libraries(*, telemetry: bool) -> None:
    """Turn off warnings, progress bars and, unless `telemetry`, usage pings of the libraries.

    Call before the first import of TRL and of the hub client.
    """
    if not telemetry:
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        hub = sys.modules.get("huggingface_hub.constants")
        if hub is not None:  # an imported module has read the environment already and does not read it again
            hub.HF_HUB_DISABLE_TELEMETRY = True  # type: ignore[attr-defined]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if use_cpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed logs its search for an accelerator
    if use_cpu() and under_deepspeed():
        import deepspeed

        # DeepSpeed would compile this operator at the first start, which takes minutes; only inference uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import logging
    import warnings

    warnings.filterwarnings("ignore", module=r"(torch|transformers|trl|accelerate|peft|datasets)(\..*)?")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    import datasets

    datasets.disable_progress_bars()
    for name in ("accelerate", "torch.distributed", "DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def reset_accelerator_state() -> None:
    """Reset the global state that an earlier stage left in this process; the process group is kept.

    Without the reset, this stage would silently use the earlier stage's mixed precision, and after a ZeRO-3 stage
    transformers would load models in shards, to which a new head cannot be added.
    """
    reset_accelerate()
    if under_deepspeed():
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def make_accelerator(*, find_unused_parameters: bool = False) -> Any:
    """Create the Accelerator and check its world size against the launcher's.

    On CPU the backend is set explicitly: under a DeepSpeed launch every rank would otherwise get a world size of 1.
    The trainers step the learning-rate scheduler themselves, so accelerate must not step it once per process.

    Args:
        find_unused_parameters: under an unfreezing schedule some trainable parameters receive no gradient, which DDP
            must be told.
    Raises: TrainingError as `check_accelerator`.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from accelerate.utils import GradientAccumulationPlugin

    handlers: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=True)] if find_unused_parameters else []
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1:
        backend = {"backend": "gloo"} if use_cpu() else {}
        handlers.append(InitProcessGroupKwargs(**backend, timeout=timedelta(seconds=timeout_seconds())))
    accelerator = Accelerator(
        cpu=use_cpu() and not under_deepspeed(),
        kwargs_handlers=handlers,
        step_scheduler_with_optimizer=False,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # overrides 'auto' in configs/
    )
    check_accelerator(accelerator)
    return accelerator


def inference_device() -> torch.device:
    """Return the device that a command computes on without training: this process's GPU, or the CPU.

    With several processes this creates the Accelerator, which starts the process group and assigns the GPUs.
    """
    if world_size() > 1:
        device: torch.device = make_accelerator().device
        return device
    return torch.device("cpu" if use_cpu() else "cuda")


def count_real_rows(accelerator: Any, rows: int) -> int:
    """Return how many of this process's `rows` in the current held-out batch are records of their own.

    The remaining rows, at the end of the batch, are repetitions: accelerate fills the last batch so that all processes
    have equally many rows.
    """
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return rows
    return min(max(state.remainder - accelerator.process_index * rows, 0), rows)


def set_process_group_timeout() -> None:
    """Set the default process-group timeout, which also applies to the groups that DeepSpeed creates.

    torch's default is 30 minutes. Call before `init_process_group`.
    """
    import torch.distributed.distributed_c10d as c10d

    c10d.default_pg_timeout = timedelta(seconds=timeout_seconds())


def check_accelerator(accelerator: Any) -> None:
    """Check an Accelerator's world size and engine against the launcher's.

    Raises: TrainingError if the number of processes differs, or if DeepSpeed was requested and another engine is used.
    """
    check_world_size(accelerator.num_processes)
    if under_deepspeed() and accelerator.distributed_type.value != "DEEPSPEED":
        raise TrainingError(
            "DeepSpeed was requested, but another engine would run",
            found=str(accelerator.distributed_type.value),
            where="ACCELERATE_USE_DEEPSPEED",
            do="unset ACCELERATE_USE_CPU: it turns DeepSpeed off",
        )


def set_deepspeed_batch_size(accelerator: Any, microbatch_size: int, max_grad_norm: float) -> None:
    """Set DeepSpeed's micro-batch size. DeepSpeed usually reads it from a prepared dataloader, and PPO has none.

    Gradients are accumulated by `gradient_accumulation`, not by DeepSpeed.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": microbatch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_grad_norm,
        }


def trainer_arguments(precision: str) -> dict[str, Any]:
    """Return the arguments of a transformers Trainer that depend on the device, the launch and the precision.

    Args:
        precision: 'auto', 'native', 'float32' or 'bfloat16', for the forward and backward passes.
    """
    arguments: dict[str, Any] = {"use_cpu": use_cpu(), "report_to": "none", "disable_tqdm": True}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        arguments |= {"ddp_timeout": timeout_seconds()} | ({"ddp_backend": "gloo"} if use_cpu() else {})
    arguments["bf16"] = wants_bfloat16(precision)
    return arguments


def wants_bfloat16(precision: str) -> bool:
    """Return whether forward and backward run in bfloat16.

    They do for 'bfloat16', for 'auto' on a GPU that supports it, and for 'native' on a GPU or CPU that supports it.
    """
    if use_cpu():
        return precision == "bfloat16" or (precision == "native" and cpu_has_bfloat16())
    return precision == "bfloat16" or (precision in ("auto", "native") and torch.cuda.is_bf16_supported())


def cpu_has_bfloat16() -> bool:
    """Return whether the processor has bfloat16 products (AVX-512 BF16, AMX, or Arm's BF16 extensions).

    On other processors bfloat16 takes many times longer than float32.
    """
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


@contextmanager
def gradient_accumulation(model: Any, accelerator: Any, *, last: bool) -> Iterator[None]:
    """Context manager for the forward and backward of one microbatch; only the `last` one synchronizes gradients."""
    if under_deepspeed():
        model.set_gradient_accumulation_boundary(last)
        yield
    else:
        with nullcontext() if last else accelerator.no_sync(model):
            yield


def backward(loss: Tensor, model: Any, accelerator: Any) -> None:
    """Run the backward pass of a loss, which adds to the gradients.

    Under DeepSpeed the engine is called directly: `accelerator.backward` would also step it, at every microbatch.
    """
    if under_deepspeed():
        model.backward(loss)
    else:
        accelerator.backward(loss)


def clip_and_step(
    model: Any, optimizer: Any, accelerator: Any, max_norm: float, check: Callable[[float], None]
) -> float:
    """Clip the gradients, take one optimizer step and return the global gradient norm before clipping.

    Args:
        check: called with the norm; it may raise. It is called before the step, but after it under DeepSpeed, which
            computes the norm during the step.
    """
    if under_deepspeed():
        model.step()  # clips to the norm that `set_deepspeed_batch_size` has set
        norm = float(model.get_global_grad_norm() or 0.0)
        gradients = getattr(model.optimizer, "grad_partitions_flat_buffer", None)
        if gradients is not None:
            # The first backward of the next update overwrites these gradients only for weights that take part in it.
            # With PPO-ptx it may be the loss on text, in which the value model takes no part: its next gradient would
            # be added to that of the last update.
            gradients.zero_()
        check(norm)
        return norm
    norm = float(accelerator.clip_grad_norm_(model.parameters(), max_norm))
    check(norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm


@contextmanager
def override_deepspeed_loading(load: Callable[[str], None]) -> Iterator[None]:
    """Replace, inside the context, the function by which a Trainer under DeepSpeed loads a checkpoint.

    Args:
        load: called with the checkpoint's folder; it restores weights and optimizer state.
    """
    from transformers import trainer as module

    original = module.deepspeed_load_checkpoint
    module.deepspeed_load_checkpoint = lambda _, folder, **__: load(folder)
    try:
        yield
    finally:
        module.deepspeed_load_checkpoint = original


def save_model(model: Any, folder: str, *, accelerator: Any) -> None:
    """Write the full (gathered) weights, or the adapter, with `save_pretrained`. Collective; rank 0 writes."""
    inner = accelerator.unwrap_model(model)
    # Gathering copies tied weights, which would then be written twice, so it is done only for sharded weights.
    sharded = any(is_sharded(p) for p in inner.parameters()) or accelerator.distributed_type.value == "FSDP"
    state = accelerator.get_state_dict(model) if sharded else None
    if accelerator.is_main_process:
        inner.save_pretrained(folder, state_dict=state)
    accelerator.wait_for_everyone()


@contextmanager
def gathered_module(
    model: nn.Module, accelerator: Any, select: Callable[[Any], nn.Module] = lambda module: module
) -> Iterator[Any]:
    """Context manager that yields the unwrapped module, or a submodule, with full parameters for sampling and scoring.

    Under ZeRO-3 the parameters of the yielded module are gathered once, while all other parameters remain sharded.
    Only the yielded module may run inside, because DeepSpeed's hooks, which gather parameters, are removed meanwhile.

    Args:
        select: returns the submodule of the unwrapped model; the whole model by default.
    """
    selected = select(accelerator.unwrap_model(model))
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None or plugin.zero_stage != 3:
        yield selected
        return
    import deepspeed
    from trl.models.utils import add_hooks, remove_hooks

    with deepspeed.zero.GatheredParameters(list(selected.parameters())):
        remove_hooks(model)  # with its hooks, ZeRO-3 would partition the parameters again in every forward
        try:
            yield selected
        finally:
            add_hooks(model)


def shards_parameters(accelerator: Any) -> bool:
    """Return whether the engine shards the parameters over processes (ZeRO-3)."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def all_gather_objects(value: Any, processes: int) -> list[Any]:
    """Return the `value` of every process, in rank order, on all processes. Collective."""
    gathered: list[Any] = [None] * processes
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def any_process(flag: bool, accelerator: Any) -> bool:
    """Return, on all processes, whether the flag is set on at least one of them. Collective."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def library_versions() -> dict[str, str]:
    """Return the installed version of each library that a run's results depend on."""
    names = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")
    return {name: version(name) for name in names}
