"""Operations on lists of records: shuffle, mix, split by group, deduplicate, fingerprint."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf.data.records import Comparison, Demonstration, Labelled, Prompt, Record, Text
from rlhf.errors import DataError


def record_content(record: Record) -> dict[str, Any]:
    """Return the content of a record without `where`, as JSON-compatible values."""
    if isinstance(record, Text):
        return {"text": record.text}
    if isinstance(record, Demonstration):
        return {"messages": record.messages}
    if isinstance(record, Prompt):
        return {"messages": record.messages, "record": record.record}
    if isinstance(record, Labelled):
        return {"content": record.content, "labels": record.labels}
    names = ("prompt", "chosen", "rejected", "preference", "margin", "extra")
    return {name: getattr(record, name) for name in names}


def identity_key(record: Record) -> str:
    """Return a hash that is equal for exact duplicates: of the whole content, and of a Prompt only of its messages."""
    value = {"messages": record.messages} if isinstance(record, Prompt) else record_content(record)
    return hashlib.sha256(_canonical(value)).hexdigest()


def group_keys(record: Record) -> list[str]:
    """Return the keys of the groups that a split must not separate.

    They are the first user turn (of a text the text itself), and the columns 'tree' and 'group' of a Comparison or
    Prompt. It is the first turn rather than the whole prompt because a longer prompt of the same dialogue contains the
    responses to a shorter one.
    """
    if isinstance(record, Text):
        return [f"text {record.text}"]
    if isinstance(record, Labelled):
        if isinstance(record.content, str):
            return [f"text {record.content}"]
        messages = record.content
    else:
        messages = record.prompt if isinstance(record, Comparison) else record.messages
    first = next((m["content"] for m in messages if m["role"] == "user"), "")
    keys = [f"user {first.strip()}"]
    columns = record.extra if isinstance(record, Comparison) else record.record if isinstance(record, Prompt) else {}
    keys += [f"{name} {columns[name]}" for name in ("tree", "group") if columns.get(name) is not None]
    return keys


def records_fingerprint(records: Iterable[Record]) -> str:
    """Return 16 hex digits of the SHA-256 of the records' content in order; `where` is ignored."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(type(record).__name__.encode() + b"\0" + _canonical(record_content(record)) + b"\n")
    return digest.hexdigest()[:16]


def shuffle_records(records: Sequence[Record], seed: str) -> list[Record]:
    """Return a shuffled copy whose order depends on the seed text alone."""
    copy = list(records)
    random.Random(seed).shuffle(copy)
    return copy


def drop_repeats(parts: Sequence[Sequence[Record]]) -> list[list[Record]]:
    """Return the parts without exact duplicates (`identity_key`) within or across parts; the first one is kept."""
    seen: set[str] = set()
    kept: list[list[Record]] = []
    for part in parts:
        fresh: dict[str, Record] = {}
        for record in part:
            fresh.setdefault(identity_key(record), record)
        kept.append([record for key, record in fresh.items() if key not in seen])
        seen.update(fresh)
    return kept


def mix_sources(parts: Sequence[list[Record]], weights: Sequence[float], seed: int) -> list[list[Record]]:
    """Return the records of each part that belong to the mixture; `sources.load_records` states the rule.

    Args:
        parts: records of each source.
        weights: relative share of each source.
        seed: of the samples.
    """
    if len(set(weights)) == 1:
        return list(parts)
    # A part that deduplication emptied is left out of the minimum; otherwise the total would be 0.
    total = min((len(part) / weight for part, weight in zip(parts, weights, strict=True) if part), default=0.0)
    counts = [min(len(part), max(1, int(weight * total + 1e-9))) for part, weight in zip(parts, weights, strict=True)]
    return [
        part if count == len(part) else shuffle_records(part, f"{seed} mix {i}")[:count]
        for i, (part, count) in enumerate(zip(parts, counts, strict=True))
    ]


def split_records(
    records: Sequence[Record], fraction: float, seed: int
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Split records into training and validation records so that no group (`group_keys`) is on both sides.

    Groups are sorted by a seeded hash of their smallest key and taken into validation while they fit into
    round(fraction * records), so the split depends neither on the order of the file nor on the number of processes.
    The order of the records is kept.

    Args:
        records: records of one kind.
        fraction: share of records for validation, in [0, 1); 0 gives an empty validation set.
        seed: seed of the hash.
    Returns: training records, validation records.
    Raises: DataError if there is only one group, or fraction is outside [0, 1).
    """
    if not 0.0 <= fraction < 1.0:
        raise DataError(
            "the validation fraction must be in [0, 1)",
            found=str(fraction),
            where="split",
            do="set data.validation_fraction",
        )
    if fraction == 0.0:
        return tuple(records), ()
    groups = _groups(records)
    if len(groups) < 2:
        raise DataError(
            "the records cannot be split: all of them share one prompt",
            found=f"{len(records)} records in {len(groups)} group(s)",
            where="split",
            do="name a file under data.validation, or set data.validation_fraction=0",
        )
    ordered = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}\0{key}".encode()).digest())
    target, taken = max(1, round(fraction * len(records))), set[int]()
    for key in ordered:
        if len(taken) + len(groups[key]) <= target:
            taken.update(groups[key])
    if not taken:
        taken.update(groups[min(ordered, key=lambda key: len(groups[key]))])
    train = tuple(r for i, r in enumerate(records) if i not in taken)
    return train, tuple(r for i, r in enumerate(records) if i in taken)


def _groups(records: Sequence[Record]) -> dict[str, list[int]]:
    """Return the connected components of records that share a group key: smallest key -> indices of records."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys = [group_keys(record) for record in records]
    for record_keys in keys:
        for other in record_keys:
            low, high = sorted((root(record_keys[0]), root(other)))
            parent[high] = low
    groups: dict[str, list[int]] = {}
    for i, record_keys in enumerate(keys):
        groups.setdefault(root(record_keys[0]), []).append(i)
    return groups


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode()
