"""Frozen weights in the dtype that they are computed in: half the memory, and not one number changes.

Under autocast a linear layer casts its float32 weights to bfloat16 in every forward pass. Weights that are never
trained can be stored so at once. Embeddings, norms and output heads are computed in float32 and stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf.models.load import backbone
from rlhf.models.output_layer import logit_transform, output_layer
from rlhf.models.packed_batch import can_pack


def store_linear_weights(model: Any, dtype: torch.dtype) -> int:
    """Store the frozen float32 weights of a model's linear layers in the dtype that autocast computes them in.

    A layer is left out if one of its parameters is trained or is shared with another layer (a tied output layer), and
    so is a layer with a DoRA adapter, which reads the weights themselves.

    Args:
        model: causal language model or scorer, adapter wrapping included.
        dtype: of autocast.
    Returns: the number of parameters that were converted.
    """
    can_pack(model)  # what is found out about a model is found with weights of one dtype, before they differ
    if _has_vocabulary(model):
        logit_transform(model)
    trunk = backbone(model)
    layers = [module for module in trunk.modules() if type(module) in (nn.Linear, Conv1D)]
    head = output_layer(model) if _has_vocabulary(model) else None
    if type(head) is nn.Linear:
        layers.append(head)
    embeddings = {id(p) for m in trunk.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    read_elsewhere = {id(layer) for layer in _dora_bases(trunk)}
    converted = 0
    for layer in layers:
        parameters = list(layer.parameters())
        trained = any(p.requires_grad for p in parameters)
        if trained or id(layer) in read_elsewhere or any(id(p) in embeddings for p in parameters):
            continue
        for parameter in parameters:
            if parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(dtype)
                converted += parameter.numel()
    return converted


def _has_vocabulary(model: Any) -> bool:
    """Return whether a model has the output layer of a language model rather than a score head."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return hasattr(inner, "lm_head")


def _dora_bases(trunk: nn.Module) -> list[Any]:
    """Return the linear layers whose weights a DoRA adapter reads to compute their norms."""
    wrapped = [m for m in trunk.modules() if hasattr(m, "base_layer") and any(getattr(m, "use_dora", {}).values())]
    return [module.base_layer for module in wrapped]
