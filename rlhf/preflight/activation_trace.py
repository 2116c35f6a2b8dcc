"""What one forward and backward pass holds, found out without memory or data: the real model, of tensors that have
shapes but no contents. Any architecture, precision, attention kernel and adapter is counted as it computes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.models.load import backbone
from rlhf.preflight.memory_model import ActivationBytes


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are still alive, and the most there have been."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}
        self._outside: set[int] = set()  # storages that were there before, such as weights

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in self._outside:
                    self._outside.add(storage._cdata)
                    weakref.finalize(storage, self._outside.discard, storage._cdata)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._known and key not in self._outside:
                    self._known[key] = storage.nbytes()
                    self.live += self._known[key]
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, key)
        return out

    def _free(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)


def trace_activations(build: Callable[[int], Any], *, rows: int, length: int, bfloat16: bool) -> ActivationBytes:
    """Trace the trunk of a model with one and with two blocks; the difference is a block.

    Args:
        build: number of blocks -> the model, adapters and frozen weights as in training; called on the meta device.
        rows, length: of one microbatch.
        bfloat16: whether the pass runs under autocast.
    """
    one, two = (_peak(build, blocks, rows, length, bfloat16) for blocks in (1, 2))
    block = max(0.0, two[0] - one[0])
    return ActivationBytes(block, max(0.0, one[0] - block), float(rows * length * one[1]))


def _pretend(model: Any, mode: FakeTensorMode) -> None:
    """Make a model on the meta device one on the CPU without contents, so that autocast and kernels are a CPU's."""
    made: dict[int, Any] = {}  # tied weights stay tied

    def fake(tensor: torch.Tensor) -> Any:
        return made.setdefault(id(tensor), FakeTensor(mode, tensor.detach(), torch.device("cpu")))

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                known = id(parameter) in made
                new = fake(parameter) if known else torch.nn.Parameter(fake(parameter), parameter.requires_grad)
                made[id(parameter)] = module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


def _peak(build: Callable[[int], Any], blocks: int, rows: int, length: int, bfloat16: bool) -> tuple[float, int]:
    """Most bytes held by activations, and bytes of one token's hidden state."""
    with torch.device("meta"):
        model = build(blocks).train()
    _pretend(model, mode := FakeTensorMode())
    with mode:
        ids = torch.zeros(rows, length, dtype=torch.long)
        mask = torch.ones_like(ids)
        tally = LiveBytes()
        with tally:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                hidden = backbone(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            forward = tally.peak
            if hidden.requires_grad:
                hidden.sum().backward()
        gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.grad is not None)
    width = hidden.shape[-1] * hidden.element_size()
    return max(float(forward), float(tally.peak - gradients)), width
