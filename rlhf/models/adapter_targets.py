"""Which layers an adapter sits on, for any architecture: by what they are called and by their shapes."""

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
    """The layers that get a low-rank adapter: `peft.target_modules`, each of them found in the model.

    Raises: ConfigError that lists the model's linear layers if a name is none of them.
    """
    wanted = peft.target_modules
    layers = linear_layers(model)
    if wanted == ALL_LINEAR:
        if not layers:
            raise _nothing(model, layers, wanted)
        return ALL_LINEAR
    if isinstance(wanted, str):
        if not any(re.fullmatch(wanted, name) for name in layers):
            raise _nothing(model, layers, wanted)
        return wanted
    for end in wanted or ("nothing",):
        if not _ending(layers, [end]):
            raise _nothing(model, layers, end)
    return list(wanted)


def ia3_targets(model: Any, peft: Peft) -> tuple[list[str], list[str]]:
    """The layers that IA3 scales (arXiv:2205.05638, section 3.3), as ends of names.

    Keys and values are the outputs of the layers of the attention that are called so, or of one that makes queries,
    keys and values at once (its queries are then scaled too); the feed-forward features are what its last layer reads.

    Returns: all layers, and those of them whose input is scaled instead of their output.
    Raises: ConfigError that lists the model's linear layers if there are no such layers, or not those asked for.
    """
    hidden = model.config.get_text_config().hidden_size
    layers = linear_layers(model)
    attention = {name: size for name, size in layers.items() if ATTENTION.search(name)}
    scaled = [name for name in attention if KEY_OR_VALUE.search(_last(name))]
    scaled = scaled or [name for name, (reads, makes) in attention.items() if reads == hidden < makes]
    inner = [name for name, size in layers.items() if name not in attention and size[1] == hidden != size[0]]
    wanted = peft.target_modules
    if wanted != ALL_LINEAR:
        found = lora_targets(model, peft)
        ends = _ends([n for n in layers if re.fullmatch(found, n)], layers) if isinstance(found, str) else found
        return ends, [end for end in ends if set(_ending(layers, [end])) <= set(inner)]
    if not scaled or not inner:
        raise _nothing(model, layers, "keys and values" if not scaled else "a feed-forward layer")
    feedforward = _ends(inner, layers)
    return _ends(scaled, layers) + feedforward, feedforward


def linear_layers(model: Any) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every linear layer of a trunk, by name; GPT-2's transposed ones are linear too."""
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


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _end(name: str) -> str:
    """Enough of a name to tell layers of a block apart: gpt2's `attn.c_proj` and `mlp.c_proj`, opt's `fc2`."""
    parts = name.split(".")[-2:]
    return parts[-1] if parts[0].isdigit() else ".".join(parts)


def _ends(names: Iterable[str], layers: dict[str, tuple[int, int]]) -> list[str]:
    """Short names that match these layers and no other."""
    chosen = set(names)
    ends = sorted({_end(name) for name in names})
    return ends if set(_ending(layers, ends)) == chosen else sorted(chosen)


def _ending(layers: Iterable[str], ends: Iterable[str]) -> list[str]:
    return [name for name in layers for end in ends if name == end or name.endswith(f".{end}")]


def _nothing(model: Any, layers: dict[str, tuple[int, int]], wanted: str) -> ConfigError:
    names = sorted({_end(name) for name in layers})
    return ConfigError(
        f"{type(model).__name__} has no linear layer that is {wanted!r}",
        found=", ".join(names) or "no linear layer",
        where="peft.target_modules",
        do="name some of those that were found, as peft.target_modules=[…]",
    )
