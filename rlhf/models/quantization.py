"""Frozen base models in 4 bits (QLoRA; Dettmers et al. 2023, arXiv:2305.14314), through bitsandbytes.

A weight of a linear layer is one of 16 values, the quantiles of a normal distribution (nf4), times the largest
magnitude of its block of 64 weights. Double quantization stores these magnitudes in 8 bits, 256 of them with one
float32 scale: 4 + 8/64 + 32/(64 x 256) = 4.127 bits a weight. Each product first restores the weights in the dtype that
it is computed in. The adapter, the output layer, score heads, norms and embeddings are not quantized.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config.sections import ModelSource, quantized_sources
from rlhf.distributed.launch_env import local_rank, use_cpu, weight_sharding
from rlhf.errors import CheckpointError, ConfigError

INSTALL = "pip install 'rlhf[quantize]'"


def bitsandbytes_is_installed() -> bool:
    """Return whether the package that quantizes can be imported."""
    return importlib.util.find_spec("bitsandbytes") is not None


def check_quantization(config: Any, sharding: str | None) -> None:
    """Check that the models which a configuration quantizes can be loaded in this environment.

    Args:
        config: configuration of a stage.
        sharding: engine that shards weights over processes, as text; None = every process holds them whole.
    Raises: ConfigError that names the first such model.
    """
    for key, source in quantized_sources(config):
        _check_environment(source, f"{key}.quantize", sharding)


def _check_environment(source: ModelSource, where: str, sharding: str | None) -> None:
    if sharding is not None:
        raise ConfigError(
            f"{sharding} cannot shard 4-bit weights, whose packed values lie apart from their scales",
            found=f"quantize={source.quantize} under {sharding}",
            where=where,
            do="launch with --launcher ddp, where every process holds the quantized base, or remove quantize",
        )
    if not bitsandbytes_is_installed():
        raise ConfigError(
            "4-bit weights need the package bitsandbytes, which is not installed",
            found=f"quantize={source.quantize}",
            where=where,
            do=f"{INSTALL}, or remove quantize",
        )


def quantized_loading(source: ModelSource) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantize a model while it is loaded; {} for other models.

    The layers compute in bfloat16, on a CPU in float32. transformers leaves out the output layer, layers tied to it and
    the last layer, which is the head of a sequence classifier. The model is loaded onto the GPU of this process at
    once, because bitsandbytes quantizes there.

    PEFT's `prepare_model_for_kbit_training` is not called. Of what it does,

    - freezing the base is done by PEFT itself when it adds an adapter;
    - parameters that are not quantized are float32 here because `dtype_of` says so by default; with `dtype: bfloat16`
      they stay bfloat16, which the function would undo;
    - gradient checkpointing is not turned on: `optim.activation_checkpointing` decides. It is the form without
      reentrant autograd, which needs no gradient at the embeddings, so `enable_input_require_grads` is not needed.

    Raises: ConfigError as `check_quantization`.
    """
    if source.quantize is None:
        return {}
    _check_environment(source, "quantize", weight_sharding())
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=source.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if use_cpu() else torch.bfloat16,
    )
    return {"quantization_config": settings, "device_map": {"": "cpu" if use_cpu() else local_rank()}}


def prepare_quantized(model: Any, folder: str) -> None:
    """Check a model that was loaded quantized, and prepare it for training on a CPU.

    On a CPU with AVX-512 BF16, bitsandbytes would repack the weights in evaluation mode for a product that has no
    backward pass, and later training would get no gradient through them; that is turned off for every layer.

    Raises: CheckpointError if no layer was quantized.
    """
    layers = list(quantized_layers(model))
    if not layers:
        raise CheckpointError(
            "the model has no linear layer that can be quantized",
            found=type(model).__name__,
            where=folder,
            do="remove quantize",
        )
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


def quantized_layers(model: nn.Module) -> Iterator[Any]:
    """Yield the linear layers of a model whose weights are quantized, not PEFT's layers around them."""
    for module in model.modules():
        if is_quantized(module._parameters.get("weight")):
            yield module


def is_quantized(parameter: Any) -> bool:
    """Return whether a parameter holds packed 4-bit values."""
    return getattr(parameter, "quant_state", None) is not None


def weight_count(parameter: Tensor) -> int:
    """Return how many weights a parameter holds; a packed one has fewer elements."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def least_precise_dtype(model: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype whose rounding a model's outputs have: bfloat16 if its quantized layers compute in it.

    Args:
        dtype: the dtype that they have otherwise.
    """
    found = {layer.compute_dtype for layer in quantized_layers(model)}
    return torch.bfloat16 if torch.bfloat16 in found else dtype
