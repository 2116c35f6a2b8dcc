"""Assign the parameters of a transformer to its blocks and parts, and select parameters by them.

The order is that of the forward pass: embeddings, blocks 0 to n-1, then the final norm and the output layer. Parameters
of adapters contain the name of the layer that they belong to, so they are assigned by the same rules.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from rlhf.config.tuning import RANGE, Selection
from rlhf.errors import ConfigError

HEAD_PARTS = ("lm_head", "score")


@dataclass(frozen=True)
class ParameterPlace:
    """Place of a parameter: block (None outside the blocks), part, and depth, from 0 (embeddings) to n + 1 (head)."""

    block: int | None
    part: str | None
    depth: int


@dataclass(frozen=True)
class ParameterMap:
    """Places of a model's parameters by name, number of blocks, and whether output layer and embeddings are tied."""

    places: Mapping[str, ParameterPlace]
    blocks: int
    tied: bool

    def only(self, names: Iterable[str]) -> ParameterMap:
        """Return the map of some of the parameters."""
        return ParameterMap({name: self.places[name] for name in names}, self.blocks, self.tied)


def map_parameters(model: Any) -> ParameterMap:
    """Return the places of the parameters of a causal LM or a scorer, with or without adapters.

    The number of blocks is 0 if the model's list of blocks is not found.
    """
    stack, count = _block_list(model)
    embeddings = model.get_input_embeddings()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = head is not None and getattr(head, "weight", None) is getattr(embeddings, "weight", 0)
    places = {}
    for owner, module in model.named_modules():
        for name, _ in module.named_parameters(prefix=owner, recurse=False):
            places[name] = _parameter_place(name, module, stack, count, is_head=head is not None and module is head)
    kept = {name: places[name] for name, _ in model.named_parameters()}  # keeps only the first name of a tied tensor
    return ParameterMap(kept, count, tied)


def block_modules(model: Any) -> list[nn.Module]:
    """Return the model's blocks from the input up; [] if they are not found."""
    name, _ = _block_list(model)
    return list(model.get_submodule(name)) if name else []


def _block_list(model: Any) -> tuple[str, int]:
    """Return the name and length of the model's list of blocks; ("", 0) if there is none."""
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    lists = [(n, len(m)) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        return "", 0  # not an error here, because only a selection by blocks needs the list
    return min(lists, key=lambda item: item[0].count("."))


def _parameter_place(name: str, module: nn.Module, stack: str, count: int, *, is_head: bool) -> ParameterPlace:
    pieces = name.split(".")
    norm = "norm" in type(module).__name__.lower()
    if count and name.startswith(f"{stack}."):
        block = int(name[len(stack) + 1 :].split(".", 1)[0])
        inner = name[len(stack) + 1 :]
        part = "norms" if norm else "attention" if re.search(r"attn|attention", inner) else "mlp"
        return ParameterPlace(block, part, block + 1)
    if "prompt_encoder" in pieces:  # a soft prompt comes before all layers and is no part of the model
        return ParameterPlace(None, None, 0)
    if "score" in pieces:
        return ParameterPlace(None, "score", count + 1)
    if is_head or "lm_head" in pieces:
        return ParameterPlace(None, "lm_head", count + 1)
    if isinstance(module, nn.Embedding) or re.search(r"embed|\bwte\b|\bwpe\b", name):
        return ParameterPlace(None, "embeddings", 0)
    return ParameterPlace(None, "norms" if norm else None, count + 1)


def select_parameters(selection: Selection, parameter_map: ParameterMap, where: str) -> set[str]:
    """Return the names of the selected parameters.

    Args:
        where: the configuration key, for messages.
    Raises: ConfigError, with the most similar names, if a part of the selection matches nothing.
    """
    blocks = _selected_blocks(selection, parameter_map, where)
    found = {name for name, place in parameter_map.places.items() if place.block in blocks}
    for part in selection.parts:
        part_names = {name for name, place in parameter_map.places.items() if place.part == part}
        if not part_names and part == "lm_head" and parameter_map.tied:
            part_names = {name for name, place in parameter_map.places.items() if place.part == "embeddings"}
        if not part_names:
            available = sorted({place.part for place in parameter_map.places.values() if place.part})
            raise ConfigError(f"the model has no {part}", where=f"{where}.parts", do=f"it has {', '.join(available)}")
        found |= part_names
    for pattern in selection.names:
        found |= _matching(pattern, parameter_map, where)
    return found


def _matching(pattern: str, parameter_map: ParameterMap, where: str) -> set[str]:
    if pattern.startswith("re:"):
        matching = {name for name in parameter_map.places if re.fullmatch(pattern[3:], name)}
    else:
        matching = {name for name in parameter_map.places if fnmatch.fnmatchcase(name, pattern)}
    if not matching:
        nearest = difflib.get_close_matches(
            pattern.removeprefix("re:").strip("*"), parameter_map.places, n=3, cutoff=0.0
        )
        raise ConfigError(
            "no parameter has a name that matches",
            found=pattern,
            where=f"{where}.names",
            do=f"the most similar names are {', '.join(nearest)}",
        )
    return matching


def require_blocks(parameter_map: ParameterMap, where: str) -> None:
    """Check that the model's blocks were found.

    Raises: ConfigError if they were not.
    """
    if not parameter_map.blocks:
        raise ConfigError(
            "the model's blocks were not found",
            found="no list with as many modules as the configuration has layers",
            where=where,
            do="select by parts or names",
        )


def _selected_blocks(selection: Selection, parameter_map: ParameterMap, where: str) -> set[int]:
    """Return the numbers of the selected blocks."""
    found: set[int] = set()
    if selection.first or selection.last or selection.layers:
        require_blocks(parameter_map, where)
    count = parameter_map.blocks
    if selection.first is not None:
        found |= set(range(_amount(selection.first, count, f"{where}.first")))
    if selection.last is not None:
        found |= set(range(count - _amount(selection.last, count, f"{where}.last"), count))
    for item in selection.layers.split(",") if selection.layers else ():
        found |= _range(item, count, f"{where}.layers")
    return found


def _amount(text: str, count: int, where: str) -> int:
    """Return the number of blocks that a number or a percentage means; a percentage is rounded, to 1 at least."""
    amount = max(1, round(int(text[:-1]) * count / 100)) if text.endswith("%") else int(text)
    if amount > count:
        raise ConfigError(f"the model has {count} blocks", found=text, where=where, do=f"give 1 to {count}")
    return amount


def _range(item: str, count: int, where: str) -> set[int]:
    match = RANGE.fullmatch(item)
    assert match is not None  # checked when the configuration was read
    if match[4] is not None:
        low, high = (min(count, round(int(share) * count / 100)) for share in (match[3], match[4]))
        found = set(range(low, high))
    else:
        ends = [int(match[1]), int(match[2] if match[2] is not None else match[1])]
        if not all(-count <= end < count for end in ends):
            raise ConfigError(
                f"the model has blocks 0 to {count - 1}",
                found=item,
                where=where,
                do=f"give numbers from 0 to {count - 1}, or -{count} to -1 from the end",
            )
        low, high = (end % count for end in ends)
        found = set(range(low, high + 1))
    if not found:
        raise ConfigError("the range contains no block", found=item, where=where, do="put the smaller bound first")
    return found


def top_parameters(parameter_map: ParameterMap, blocks: int) -> set[str]:
    """Return the names of the parameters in and above the last `blocks` blocks: also the final norm and the head."""
    return {name for name, place in parameter_map.places.items() if place.depth > parameter_map.blocks - blocks}
