"""The only module that touches accelerate, DeepSpeed and TRL internals."""

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

# Minor releases that tests/distributed/test_engine.py has seen. Outside it, TRL may have moved what we rely on.
TESTED_VERSIONS = {"trl": ("1.16", "1.17"), "accelerate": ("1.14", "2.0"), "transformers": ("5.20", "6.0")}


def quiet_libraries(*, telemetry: bool) -> None:
    """Settings that should precede the first import of TRL and the hub client: no usage ping, no wall of warnings."""
    if not telemetry:
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        hub = sys.modules.get("huggingface_hub.constants")
        if hub is not None:  # imported already: it has read the environment once and for all
            hub.HF_HUB_DISABLE_TELEMETRY = True  # type: ignore[attr-defined]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if use_cpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed prints how it looked for one
    if use_cpu() and under_deepspeed():
        import deepspeed

        # Otherwise compiled at the first start, for minutes; it only serves inference.
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
    """Drop what an earlier stage of this process settled: its mixed precision would otherwise be ours too, in silence,
    and after one under ZeRO-3 models would be loaded in shards, which no new head fits.

    The process group stays.
    """
    reset_accelerate()
    if under_deepspeed():
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def make_accelerator(*, find_unused_parameters: bool = False) -> Any:
    """Create the Accelerator and check its world size against the launcher's.

    On CPU the backend is named explicitly: under a DeepSpeed launch every rank would otherwise believe to be alone.
    The scheduler is ours, so accelerate must not step it once per process.

    Args:
        find_unused_parameters: under an unfreezing schedule some trainable parameters receive no gradient, which DDP
            must be told.
    Raises: TrainingError if the number of processes is not the launched one.
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
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # ours; the files of configs/ say 'auto'
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
    """How many of this process's `rows` in the held-out batch at hand are records.

    The others, at its end, are repetitions: accelerate fills up the last batch so that all processes have as much.
    """
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return rows
    return min(max(state.remainder - accelerator.process_index * rows, 0), rows)


def set_process_group_timeout() -> None:
    """Set the default process-group timeout, also for groups that DeepSpeed makes itself (torch's default is half
    an hour). Call before `init_process_group`."""
    import torch.distributed.distributed_c10d as c10d

    c10d.default_pg_timeout = timedelta(seconds=timeout_seconds())


def check_accelerator(accelerator: Any) -> None:
    """Compare what an Accelerator became with what the launcher asked for.

    Raises: TrainingError for another number of processes, or another engine than DeepSpeed.
    """
    check_world_size(accelerator.num_processes)
    if under_deepspeed() and accelerator.distributed_type.value != "DEEPSPEED":
        raise TrainingError(
            "DeepSpeed was asked for, and something else would run",
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
    """Arguments that make a transformers Trainer see the right world on this machine.

    Args:
        precision: 'auto', 'native', 'float32' or 'bfloat16', of forward and backward.
    """
    arguments: dict[str, Any] = {"use_cpu": use_cpu(), "report_to": "none", "disable_tqdm": True}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        arguments |= {"ddp_timeout": timeout_seconds()} | ({"ddp_backend": "gloo"} if use_cpu() else {})
    arguments["bf16"] = wants_bfloat16(precision)
    return arguments


def wants_bfloat16(precision: str) -> bool:
    """Whether forward and backward run in bfloat16: 'bfloat16', 'auto' on a GPU that has it, 'native' also on a CPU."""
    if use_cpu():
        return precision == "bfloat16" or (precision == "native" and cpu_has_bfloat16())
    return precision == "bfloat16" or (precision in ("auto", "native") and torch.cuda.is_bf16_supported())


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself (AVX-512 BF16, AMX, or of Arm): others take many times longer
    than for float32."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


@contextmanager
def gradient_accumulation(model: Any, accelerator: Any, *, last: bool) -> Iterator[None]:
    """Around the forward and backward of a microbatch: gradients go to the other processes with the `last` one."""
    if under_deepspeed():
        model.set_gradient_accumulation_boundary(last)
        yield
    else:
        with nullcontext() if last else accelerator.no_sync(model):
            yield


def backward(loss: Tensor, model: Any, accelerator: Any) -> None:
    """Add the gradient of a loss. accelerate would also let a DeepSpeed engine step, at every microbatch."""
    if under_deepspeed():
        model.backward(loss)
    else:
        accelerator.backward(loss)


def clip_and_step(
    model: Any, optimizer: Any, accelerator: Any, max_norm: float, check: Callable[[float], None]
) -> float:
    """One optimizer step. Returns the global gradient norm before clipping.

    Args:
        check: is given the norm before the step (DeepSpeed: after it, since it is made inside) and may raise.
    """
    if under_deepspeed():
        model.step()  # clips to what `set_batch` has set
        norm = float(model.get_global_grad_norm() or 0.0)
        kept = getattr(model.optimizer, "grad_partitions_flat_buffer", None)
        if kept is not None:
            # ZeRO-3 overwrites the last update's gradients in the first backward of the next one, but only those of
            # weights that take part in it: a value model does not in that of a text, and would add to its old one.
            kept.zero_()
        check(norm)
        return norm
    norm = float(accelerator.clip_grad_norm_(model.parameters(), max_norm))
    check(norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm


@contextmanager
def override_deepspeed_loading(load: Callable[[str], None]) -> Iterator[None]:
    """Have a Trainer under DeepSpeed take weights and optimizer state out of a checkpoint's folder by our function."""
    from transformers import trainer as module

    original = module.deepspeed_load_checkpoint
    module.deepspeed_load_checkpoint = lambda _, folder, **__: load(folder)
    try:
        yield
    finally:
        module.deepspeed_load_checkpoint = original


def save_model(model: Any, folder: str, *, accelerator: Any) -> None:
    """Write full (gathered) weights or the adapter with plain `save_pretrained`; collective, rank 0 writes."""
    inner = accelerator.unwrap_model(model)
    # Gathered only where that is needed: the copies that it makes of tied weights would be written twice.
    parted = any(is_sharded(p) for p in inner.parameters()) or accelerator.distributed_type.value == "FSDP"
    state = accelerator.get_state_dict(model) if parted else None
    if accelerator.is_main_process:
        inner.save_pretrained(folder, state_dict=state)
    accelerator.wait_for_everyone()


@contextmanager
def gathered_module(
    model: nn.Module, accelerator: Any, part: Callable[[Any], nn.Module] = lambda whole: whole
) -> Iterator[Any]:
    """The bare module, or a part of it, with whole weights, for sampling and scoring.

    Under ZeRO-3 the weights of that part are gathered, once, and those of the rest stay shared out. Nothing but the
    part may run inside: the engine gathers for none of its modules meanwhile.
    """
    wanted = part(accelerator.unwrap_model(model))
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None or plugin.zero_stage != 3:
        yield wanted
        return
    import deepspeed
    from trl.models.utils import add_hooks, remove_hooks

    with deepspeed.zero.GatheredParameters(list(wanted.parameters())):
        remove_hooks(model)  # gathering alone does not help: the ZeRO-3 hooks would partition again
        try:
            yield wanted
        finally:
            add_hooks(model)


def all_gather_objects(value: Any, processes: int) -> list[Any]:
    """One object of every process, in rank order, on all of them."""
    found: list[Any] = [None] * processes
    torch.distributed.all_gather_object(found, value)
    return found


def any_process(flag: bool, accelerator: Any) -> bool:
    """Whether a flag is set on some process; the same answer on all of them."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def library_versions() -> dict[str, str]:
    """Installed versions of what a run depends on."""
    names = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")
    return {name: version(name) for name in names}
