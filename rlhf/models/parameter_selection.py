"""Where a weight lies in a transformer, and which weights a selection names.

A model is read from its input to its output: embeddings, blocks 0 to n-1, then final norm and output layer. Names of
adapters and heads contain the name of what they belong to, so one reading does for all.
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
    """Of one parameter: its block (None outside of them), its part, and its depth, 0 (embeddings) to n + 1 (head)."""

    block: int | None
    part: str | None
    depth: int


@dataclass(frozen=True)
class ParameterMap:
    """Places of a model's parameters by name, its number of blocks, and whether its output layer is its embeddings."""

    places: Mapping[str, ParameterPlace]
    blocks: int
    tied: bool

    def only(self, names: Iterable[str]) -> ParameterMap:
        """The same for some of the parameters."""
        return ParameterMap({name: self.places[name] for name in names}, self.blocks, self.tied)


def map_parameters(model: Any) -> ParameterMap:
    """Read a model: a causal LM or a scorer, with adapters or without. No blocks if they are not to be found."""
    stack, count = _stack(model)
    embeddings = model.get_input_embeddings()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = head is not None and getattr(head, "weight", None) is getattr(embeddings, "weight", 0)
    places = {}
    for owner, module in model.named_modules():
        for name, _ in module.named_parameters(prefix=owner, recurse=False):
            places[name] = _place(name, module, stack, count, is_head=head is not None and module is head)
    kept = {name: places[name] for name, _ in model.named_parameters()}  # a tied tensor under its first name
    return ParameterMap(kept, count, tied)


def _stack(model: Any) -> tuple[str, int]:
    """Name and length of the list of blocks."""
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    lists = [(n, len(m)) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        return "", 0  # only a selection by blocks needs them
    return min(lists, key=lambda item: item[0].count("."))


def _place(name: str, module: nn.Module, stack: str, count: int, *, is_head: bool) -> ParameterPlace:
    pieces = name.split(".")
    norm = "norm" in type(module).__name__.lower()
    if count and name.startswith(f"{stack}."):
        block = int(name[len(stack) + 1 :].split(".", 1)[0])
        inner = name[len(stack) + 1 :]
        part = "norms" if norm else "attention" if re.search(r"attn|attention", inner) else "mlp"
        return ParameterPlace(block, part, block + 1)
    if "prompt_encoder" in pieces:  # a soft prompt stands below everything and is no part of the model
        return ParameterPlace(None, None, 0)
    if "score" in pieces:
        return ParameterPlace(None, "score", count + 1)
    if is_head or "lm_head" in pieces:
        return ParameterPlace(None, "lm_head", count + 1)
    if isinstance(module, nn.Embedding) or re.search(r"embed|\bwte\b|\bwpe\b", name):
        return ParameterPlace(None, "embeddings", 0)
    return ParameterPlace(None, "norms" if norm else None, count + 1)


def select_parameters(selection: Selection, of: ParameterMap, where: str) -> set[str]:
    """Names of the parameters that a selection names.

    Args:
        where: the configuration key, for messages.
    Raises: ConfigError, with the nearest names, if a part of the selection matches nothing.
    """
    blocks = _numbered(selection, of, where)
    found = {name for name, place in of.places.items() if place.block in blocks}
    for part in selection.parts:
        part_names = {name for name, place in of.places.items() if place.part == part}
        if not part_names and part == "lm_head" and of.tied:
            part_names = {name for name, place in of.places.items() if place.part == "embeddings"}
        if not part_names:
            there = sorted({place.part for place in of.places.values() if place.part})
            raise ConfigError(f"the model has no {part}", where=f"{where}.parts", do=f"it has {', '.join(there)}")
        found |= part_names
    for pattern in selection.names:
        found |= _matching(pattern, of, where)
    return found


def _matching(pattern: str, of: ParameterMap, where: str) -> set[str]:
    if pattern.startswith("re:"):
        matching = {name for name in of.places if re.fullmatch(pattern[3:], name)}
    else:
        matching = {name for name in of.places if fnmatch.fnmatchcase(name, pattern)}
    if not matching:
        near = difflib.get_close_matches(pattern.removeprefix("re:").strip("*"), of.places, n=3, cutoff=0.0)
        raise ConfigError(
            "no weight has a name like this",
            found=pattern,
            where=f"{where}.names",
            do=f"nearest: {', '.join(near)}",
        )
    return matching


def require_blocks(of: ParameterMap, where: str) -> None:
    """Raises: ConfigError for a model whose blocks are not to be found."""
    if not of.blocks:
        raise ConfigError(
            "the model's blocks are not to be found",
            found="no list of as many modules as it has layers",
            where=where,
            do="select by parts or names",
        )


def _numbered(selection: Selection, of: ParameterMap, where: str) -> set[int]:
    """Numbers of the selected blocks."""
    found: set[int] = set()
    if selection.first or selection.last or selection.layers:
        require_blocks(of, where)
    count = of.blocks
    if selection.first is not None:
        found |= set(range(_amount(selection.first, count, f"{where}.first")))
    if selection.last is not None:
        found |= set(range(count - _amount(selection.last, count, f"{where}.last"), count))
    for item in selection.layers.split(",") if selection.layers else ():
        found |= _range(item, count, f"{where}.layers")
    return found


def _amount(text: str, count: int, where: str) -> int:
    """Blocks that a number or a share stands for; a share rounds to the nearest, and is one block at least."""
    amount = max(1, round(int(text[:-1]) * count / 100)) if text.endswith("%") else int(text)
    if amount > count:
        raise ConfigError(f"the model has {count} blocks", found=text, where=where, do=f"give 1 to {count}")
    return amount


def _range(item: str, count: int, where: str) -> set[int]:
    match = RANGE.fullmatch(item)
    assert match is not None  # the configuration has checked it
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
        raise ConfigError("an empty range of blocks", found=item, where=where, do="the first end comes first")
    return found


def top_parameters(of: ParameterMap, blocks: int) -> set[str]:
    """Parameters above and in the last `blocks` blocks: the head, the final norm, these blocks."""
    return {name for name, place in of.places.items() if place.depth > of.blocks - blocks}
