"""Choose the layers that get an adapter, for any architecture, from the layers' names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from rlhf.config.sections import Peft
from rlhf.errors import ConfigError

ALL_LINEAR = "all-linear"
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
KEY_OR_VALUE = re.compile(r"(^|_)(k|v|key|value)(_|$)", re.IGNORECASE)


def lora_targets(model: Any, peft: Peft) -> str | list[str]:
    """Return `peft.target_modules`, the layers that get a low-rank adapter, after checking that the model has them.

    Raises: ConfigError that lists the model's linear layers if a name matches none of them.
    """
    targets = peft.target_modules
    layers = linear_layers(model)
    if targets == ALL_LINEAR:
        if not layers:
            raise _no_layer_error(model, layers, targets)
        return ALL_LINEAR
    if isinstance(targets, str):
        if not any(re.fullmatch(targets, name) for name in layers):
            raise _no_layer_error(model, layers, targets)
        return targets
    for suffix in targets or ("nothing",):
        if not _matching_layers(layers, [suffix]):
            raise _no_layer_error(model, layers, suffix)
    return list(targets)


def ia3_targets(model: Any, peft: Peft) -> tuple[list[str], list[str]]:
    """Return the layers that IA3 scales (arXiv:2205.05638, section 3.3), as suffixes of their names.

    IA3 scales the keys and the values: the outputs of the attention's layers with such names, or of a fused layer that
    computes queries, keys and values (its queries are then scaled too). It also scales the inner features of the
    feed-forward network: the input of its last layer.

    Returns: all these layers, and those of them whose input, not output, is scaled.
    Raises: ConfigError that lists the model's linear layers if it has no such layers, or not those in `peft`.
    """
    hidden = model.config.get_text_config().hidden_size
    layers = linear_layers(model)
    attention = {name: size for name, size in layers.items() if ATTENTION.search(name)}
    scaled = [name for name in attention if KEY_OR_VALUE.search(_last_part(name))]
    scaled = scaled or [name for name, (reads, makes) in attention.items() if reads == hidden < makes]
    inner = [name for name, size in layers.items() if name not in attention and size[1] == hidden != size[0]]
    targets = peft.target_modules
    if targets != ALL_LINEAR:
        found = lora_targets(model, peft)
        suffixes = _suffixes([n for n in layers if re.fullmatch(found, n)], layers) if isinstance(found, str) else found
        return suffixes, [suffix for suffix in suffixes if set(_matching_layers(layers, [suffix])) <= set(inner)]
    if not scaled or not inner:
        raise _no_layer_error(model, layers, "keys and values" if not scaled else "a feed-forward layer")
    feedforward = _suffixes(inner, layers)
    return _suffixes(scaled, layers) + feedforward, feedforward


def linear_layers(model: Any) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of every linear layer of a model except its heads, by name.

    GPT-2's transposed `Conv1D` layers are included.
    """
    from transformers.pytorch_utils import Conv1D

    heads = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    found = {}
    for name, module in model.named_modules():
        if id(module) in heads:
            continue
        if isinstance(module, nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.weight.shape[0], module.weight.shape[1])
    return found


def _last_part(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _suffix(name: str) -> str:
    """Return the part of a name that is unique within a block, such as GPT-2's `attn.c_proj` or OPT's `fc2`."""
    parts = name.split(".")[-2:]
    return parts[-1] if parts[0].isdigit() else ".".join(parts)


def _suffixes(names: Iterable[str], layers: dict[str, tuple[int, int]]) -> list[str]:
    """Return suffixes that match these layers and no others; the full names if there are no such suffixes."""
    chosen = set(names)
    suffixes = sorted({_suffix(name) for name in names})
    return suffixes if set(_matching_layers(layers, suffixes)) == chosen else sorted(chosen)


def _matching_layers(layers: Iterable[str], suffixes: Iterable[str]) -> list[str]:
    return [name for name in layers for suffix in suffixes if name == suffix or name.endswith(f".{suffix}")]


def _no_layer_error(model: Any, layers: dict[str, tuple[int, int]], target: str) -> ConfigError:
    names = sorted({_suffix(name) for name in layers})
    return ConfigError(
        f"{type(model).__name__} has no linear layer that matches {target!r}",
        found=", ".join(names) or "no linear layer",
        where="peft.target_modules",
        do="name some of the layers found, as peft.target_modules=[…]",
    )
