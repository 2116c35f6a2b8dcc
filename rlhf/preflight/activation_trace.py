"""Trace the memory of one forward and backward pass without allocating it.

The real model runs on fake tensors, which have a shape but no storage. This covers every architecture, precision,
attention kernel and adapter.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.models.load import backbone
from rlhf.preflight.memory_formulas import ActivationBytes


class LiveBytes(TorchDispatchMode):
    """Count the bytes of tensors that are created inside the context and still alive (`live`), and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}
        self._outside: set[int] = set()  # storages that existed before, such as weights

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
    """Trace the trunk of a model with one and with two blocks; the difference is the memory of a block.

    Args:
        build: number of blocks -> the model with its adapters and frozen weights; called on the meta device.
        rows, length: shape of one microbatch.
        bfloat16: whether the pass runs under autocast.
    """
    (one_block, token_bytes), (two_blocks, _) = (_peak(build, blocks, rows, length, bfloat16) for blocks in (1, 2))
    block = max(0.0, two_blocks - one_block)
    return ActivationBytes(block, max(0.0, one_block - block), float(rows * length * token_bytes))


def _replace_by_fake_tensors(model: Any, mode: FakeTensorMode) -> None:
    """Replace the meta tensors of a model by fake CPU tensors, so that autocast and kernels behave as on a CPU."""
    fakes: dict[int, Any] = {}  # by id of the original, so that tied weights stay tied

    def fake(tensor: torch.Tensor) -> Any:
        return fakes.setdefault(id(tensor), FakeTensor(mode, tensor.detach(), torch.device("cpu")))

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                known = id(parameter) in fakes
                new = fake(parameter) if known else torch.nn.Parameter(fake(parameter), parameter.requires_grad)
                fakes[id(parameter)] = module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


def _peak(build: Callable[[int], Any], blocks: int, rows: int, length: int, bfloat16: bool) -> tuple[float, int]:
    """Return the peak bytes of activations, and the bytes of one token's hidden state."""
    with torch.device("meta"):
        model = build(blocks).train()
    _replace_by_fake_tensors(model, mode := FakeTensorMode())
    with mode:
        ids = torch.zeros(rows, length, dtype=torch.long)
        mask = torch.ones_like(ids)
        counter = LiveBytes()
        with counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                hidden = backbone(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            forward = counter.peak
            if hidden.requires_grad:
                hidden.sum().backward()
        gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.grad is not None)
    width = hidden.shape[-1] * hidden.element_size()
    return max(float(forward), float(counter.peak - gradients)), width
