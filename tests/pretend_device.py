"""An accelerator made of CPU memory, so that mistakes with devices are seen on machines without a GPU.

Tensors on the device `pretend:0` hold CPU tensors, and an operation raises where CUDA would raise: on tensors of two
devices, or on a CPU tensor that is indexed by positions on the device.

    from tests import pretend_device

    pretend_device.register()
    x = torch.arange(6.0).to("pretend")
    x + torch.ones(6)                # RuntimeError: tensors on two devices
    torch.arange(6)[x.long()]        # RuntimeError; x[cpu_positions] is allowed, as on a GPU

Forward, backward, optimizers, Accelerator and TRL's trainers run on it after `become_default`. It does not emulate
CUDA graphs, compiled code, kernels of its own, memory limits, streams, or the data pointers that safetensors reads
(models are moved to the CPU before they are saved).

A backend that is registered stays until the process ends and changes what torch says of the machine, so tests use it in
a process of its own (`tests/on_pretend_device.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
# Operations that may see two devices, because they copy from one to the other.
MAY_CROSS = {"aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::_local_scalar_dense"}
# Operations on the device that may take their indices from the CPU.
MAY_INDEX = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class PretendTensor(torch.Tensor):
    """A tensor on the pretended device; `on_cpu` holds its numbers."""

    on_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor) -> PretendTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            on_cpu.size(),
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            layout=on_cpu.layout,
            device=f"{NAME}:0",
        )

    def __init__(self, on_cpu: torch.Tensor) -> None:
        self.on_cpu = on_cpu

    def __repr__(self) -> str:
        return f"PretendTensor({self.on_cpu!r})"

    def tolist(self) -> Any:
        """The numbers as Python values."""
        return self.on_cpu.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operation on the CPU after its devices were checked.

    Raises: RuntimeError if its tensors are on two devices.
    """
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_device = any(isinstance(x, PretendTensor) for x in tensors)
    if on_device:
        check_devices(func._schema.name, tensors, args)
    device = kwargs.get("device")
    stays = on_device if device is None else torch.device(device).type == NAME
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if func._schema.name == "aten::_copy_from":
        to_cpu(args[1]).copy_(to_cpu(args[0]))
        return args[1]
    result = func(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs))
    written = written_in_place(func._schema, args, kwargs)
    if written:
        return written[0] if len(written) == 1 else tuple(written)
    return tree_map(to_device, result) if stays else result


def check_devices(name: str, tensors: list[torch.Tensor], args: Any) -> None:
    """Raise where CUDA would. Tensors without dimensions may come from the CPU.

    Raises: RuntimeError.
    """
    if name in MAY_CROSS:
        return
    indexed = name in MAY_INDEX and isinstance(args[0], PretendTensor)
    indices = set(map(id, tree_leaves(args[1]))) if indexed else set()
    for x in tensors:
        if not isinstance(x, PretendTensor) and x.dim() > 0 and id(x) not in indices:
            raise RuntimeError(f"{name}: tensors on two devices: {NAME} and {x.device}")


def written_in_place(schema: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an in-place operation writes to, which are also what it returns."""
    if not schema.returns or schema.returns[0].alias_info is None or not schema.returns[0].alias_info.is_write:
        return []
    pairs = zip(args, schema.arguments, strict=False)
    written = [value for value, argument in pairs if argument.alias_info is not None and argument.alias_info.is_write]
    return written + ([kwargs["out"]] if "out" in kwargs else [])


def to_cpu(x: Any) -> Any:
    """The CPU tensor inside a pretended one; anything else as it is."""
    return x.on_cpu if isinstance(x, PretendTensor) else x


def to_device(x: Any) -> Any:
    """A CPU tensor as one of the pretended device; anything else as it is."""
    return PretendTensor(x) if isinstance(x, torch.Tensor) and not isinstance(x, PretendTensor) else x


class BackendModule:
    """What torch asks of `torch.pretend`."""

    def is_initialized(self) -> bool:
        """The device is always ready."""
        return True

    is_available = is_initialized

    def current_device(self) -> int:
        """There is one device."""
        return 0

    def device_count(self) -> int:
        """There is one device."""
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Random numbers come from the CPU's generator, which torch seeds itself."""

    def synchronize(self, device: Any = None) -> None:
        """Every operation has finished when it returns."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Autocast works as on a CPU."""
        return [torch.bfloat16, torch.float32]


_libraries: list[Any] = []  # torch unregisters the kernels of a library that is freed


def register() -> None:
    """Make torch know the device. Call once in a process, before any model is made."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=BackendModule())
    every = torch.library.Library("_", "IMPL")
    every.fallback(lambda op, *args, **kwargs: run(op, args, kwargs), "PrivateUse1")
    reached_below_python = torch.library.Library("aten", "IMPL")  # by torch.tensor(..., device=...)
    for name in (
        "_to_copy.default",
        "empty.memory_format",
        "empty_strided.default",
        "_copy_from.default",
        "copy_.default",
        "_local_scalar_dense.default",
    ):
        packet, overload = name.split(".")
        op = getattr(getattr(torch.ops.aten, packet), overload)
        reached_below_python.impl(
            name.removesuffix(".default"), lambda *args, _op=op, **kwargs: run(_op, args, kwargs), "PrivateUse1"
        )
    _libraries.extend([every, reached_below_python])


def become_default() -> None:
    """Make Accelerator and the Trainers of transformers and TRL train on the device. Lasts until the process ends."""
    import accelerate
    import peft
    from transformers import PreTrainedModel, TrainingArguments

    from rlhf.distributed import engine

    device = torch.device(NAME, 0)
    # Moving a module must not make new parameters, or an optimizer that was made before would keep the old ones.
    torch.__future__.set_swap_module_params_on_conversion(True)
    accelerate.Accelerator.device = property(lambda self: device)
    original = accelerate.Accelerator.prepare

    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        for arg in args:
            if isinstance(arg, torch.nn.Module):
                arg.to(device)
        return original(self, *args, **kwargs)

    accelerate.Accelerator.prepare = prepare
    TrainingArguments._setup_devices = property(lambda self: device)
    TrainingArguments._n_gpu = 1
    TrainingArguments.distributed_state = property(lambda self: accelerate.PartialState(cpu=True))
    for kind in (PreTrainedModel, peft.PeftModel):
        kind.save_pretrained = by_way_of_the_cpu(kind.save_pretrained)
    engine.inference_device = lambda: device


def by_way_of_the_cpu(save_pretrained: Any) -> Any:
    """`save_pretrained` with the weights on the CPU, since safetensors reads data pointers, which the device lacks."""

    def save(self: Any, folder: str, *args: Any, state_dict: Any = None, **kwargs: Any) -> Any:
        weights = self.state_dict() if state_dict is None else state_dict
        return save_pretrained(self, folder, *args, state_dict=tree_map(to_cpu, dict(weights)), **kwargs)

    return save
