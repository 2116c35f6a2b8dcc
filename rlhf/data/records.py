"""The record contract: what one example is after reading, whatever file format it came from;
and what is done with lists of them: shuffle, mix, split, fingerprint.

Every record says where it came from (`where`, e.g. "data/x.jsonl row 118"). Fingerprints and duplicate detection ignore
`where`, so that moving a file changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import DataError

Messages = list[dict[str, str]]
ROLES = ("system", "user", "assistant")
DROP = "fix or remove the row, or set data.on_bad_row=drop"


class BadRow(DataError):
    """One row breaks the record contract. `reason` is the short name under which dropped rows are counted."""

    def __init__(self, reason: str, what: str, *, found: str = "", where: str = "", do: str = DROP) -> None:
        """Args as for DataError, after `reason`, e.g. "empty response"."""
        super().__init__(what, found=found, where=where, do=do)
        self.reason = reason


@dataclass(frozen=True)
class Text:
    """A plain document."""

    text: str
    where: str


@dataclass(frozen=True)
class Demonstration:
    """A conversation that ends with the assistant turn to imitate."""

    messages: Messages
    where: str


@dataclass(frozen=True)
class Comparison:
    """Two responses to one prompt.

    Attributes:
        prompt: messages that end with a user turn.
        chosen, rejected: text of the two assistant turns.
        preference: P(chosen is better), in [0, 1]; 0.5 = tie; below 0.5 the label is turned round.
        margin: how much better, in units of the score; None = not stated.
        extra: every column that the contract does not know (annotator, group, ranking, ...).
    """

    prompt: Messages
    chosen: str
    rejected: str
    where: str
    preference: float = 1.0
    margin: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """Messages that end with a user turn. `record` is the whole source row, for judges and reward functions."""

    messages: Messages
    where: str
    record: dict[str, Any] = field(default_factory=dict)


Record = Text | Demonstration | Comparison | Prompt


@dataclass(frozen=True)
class RecordSet:
    """What `load_records` returns.

    Attributes:
        records: in their final, seeded order.
        fingerprint: 16 hex digits over the content of the records in that order.
        notes: lines for people: what was recognised, used, dropped and why.
        dropped: reason -> number of rows, "duplicate" included.
    """

    records: tuple[Any, ...]  # all of the one record type that was asked for
    fingerprint: str
    notes: tuple[str, ...] = ()
    dropped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)


def check_string(value: Any, name: str, where: str, *, empty: str) -> str:
    """Return `value` if it is a non-blank, encodable string.

    Raises: BadRow with reason "<name> is not text", `empty` or "broken unicode".
    """
    if not isinstance(value, str):
        raise BadRow(f"{name} is not text", f"{name} is not text", found=_short(value), where=where)
    if not value.strip():
        raise BadRow(empty, f"{name} is empty", where=where)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise BadRow(
            "broken unicode", f"{name} holds half of a surrogate pair at character {exc.start}",
            found=ascii(value[max(0, exc.start - 10) : exc.end + 10]), where=where,
        ) from None  # fmt: skip
    return value


def check_turns(messages: Messages, where: str, *, last: str) -> None:
    """Check roles, their order and the content of every turn; `last` is the role that must come last.

    Raises: BadRow with reason "role order", "unknown role", "empty prompt", "empty response" or "... is not text".
    """
    if not messages:
        raise BadRow("empty prompt", "the conversation has no turns", where=where)
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in ROLES:
            what = f"turn {i + 1} has an unknown role"
            raise BadRow("unknown role", what, found=_short(role), where=where, do=f"known: {', '.join(ROLES)}; {DROP}")
        empty = {"system": "empty system", "user": "empty prompt", "assistant": "empty response"}[role]
        check_string(message["content"], f"turn {i + 1} ({role})", where, empty=empty)
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * len(spoken)
    if not spoken or spoken != expected[: len(spoken)] or spoken[-1] != last:
        raise BadRow(
            "role order", f"turns must be [system,] user, assistant, user, ... and end with {last}",
            found=" ".join(roles[:8]) + (" ..." if len(roles) > 8 else ""), where=where,
        )  # fmt: skip


def check_text(record: Text) -> Text:
    """Raises: BadRow if the document is no text or blank."""
    check_string(record.text, "text", record.where, empty="empty text")
    return record


def check_demonstration(record: Demonstration) -> Demonstration:
    """Raises: BadRow unless the turns are well formed and end with the assistant."""
    check_turns(record.messages, record.where, last="assistant")
    return record


def check_prompt(record: Prompt) -> Prompt:
    """Raises: BadRow unless the turns are well formed and end with the user."""
    check_turns(record.messages, record.where, last="user")
    return record


def check_comparison(record: Comparison) -> Comparison:
    """Raises: BadRow for a malformed prompt, an empty or non-text response, a bad number, or identical responses."""
    where = record.where
    check_turns(record.prompt, where, last="user")
    for name in ("chosen", "rejected"):
        check_string(getattr(record, name), name, where, empty=f"empty {name}")
    p, margin = record.preference, record.margin
    if not (_is_number(p) and 0.0 <= p <= 1.0):
        what = "preference, P(chosen is better), must be a number in [0, 1]"
        raise BadRow("preference outside [0, 1]", what, found=_short(p), where=where)
    if margin is not None and not _is_number(margin):
        raise BadRow("margin is not a number", "margin must be a finite number", found=_short(margin), where=where)
    if record.chosen.strip() == record.rejected.strip() and p != 0.5:
        raise BadRow(
            "identical responses", "'chosen' and 'rejected' are identical", where=where,
            do=f"a tie is written as preference 0.5; otherwise {DROP}",
        )  # fmt: skip
    return record


def content(record: Record) -> dict[str, Any]:
    """The record without `where`, in a form that JSON can hold."""
    if isinstance(record, Text):
        return {"text": record.text}
    if isinstance(record, Demonstration):
        return {"messages": record.messages}
    if isinstance(record, Prompt):
        return {"messages": record.messages, "record": record.record}
    names = ("prompt", "chosen", "rejected", "preference", "margin", "extra")
    return {name: getattr(record, name) for name in names}


def identity_key(record: Record) -> str:
    """Equal for exact repeats: the whole content, but for a Prompt only its messages."""
    value = {"messages": record.messages} if isinstance(record, Prompt) else content(record)
    return hashlib.sha256(_canonical(value)).hexdigest()


def group_keys(record: Record) -> list[str]:
    """Keys of the groups that a split must keep whole: the first user turn (for Text the text itself), and the extra
    column 'tree' or 'group' of a Comparison or Prompt. The first turn rather than the whole prompt, because two depths
    of one dialogue tell each other's answers."""
    if isinstance(record, Text):
        return [f"text {record.text}"]
    messages = record.prompt if isinstance(record, Comparison) else record.messages
    first = next((m["content"] for m in messages if m["role"] == "user"), "")
    keys = [f"user {first.strip()}"]
    columns = record.extra if isinstance(record, Comparison) else record.record if isinstance(record, Prompt) else {}
    keys += [f"{name} {columns[name]}" for name in ("tree", "group") if columns.get(name) is not None]
    return keys


def fingerprint(records: Iterable[Record]) -> str:
    """16 hex digits of SHA-256 over the content of `records` in order; `where` does not count."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(type(record).__name__.encode() + b"\0" + _canonical(content(record)) + b"\n")
    return digest.hexdigest()[:16]


def shuffled(records: Sequence[Record], seed: str) -> list[Record]:
    """A copy in an order that depends on the seed text alone."""
    copy = list(records)
    random.Random(seed).shuffle(copy)
    return copy


def without_repeats(parts: Sequence[Sequence[Record]]) -> list[list[Record]]:
    """The same parts without exact repeats (`identity_key`) within or across parts; the first one stays."""
    seen: set[str] = set()
    kept: list[list[Record]] = []
    for part in parts:
        fresh: dict[str, Record] = {}
        for record in part:
            fresh.setdefault(identity_key(record), record)
        kept.append([record for key, record in fresh.items() if key not in seen])
        seen.update(fresh)
    return kept


def mix(parts: Sequence[list[Record]], weights: Sequence[float], seed: int) -> list[list[Record]]:
    """How much of each part goes into the mixture; rule in `sources.load_records`."""
    if len(set(weights)) == 1:
        return list(parts)
    # A part emptied by deduplication has nothing to give and must not scale the others down to nothing.
    total = min((len(part) / weight for part, weight in zip(parts, weights, strict=True) if part), default=0.0)
    counts = [min(len(part), max(1, int(weight * total + 1e-9))) for part, weight in zip(parts, weights, strict=True)]
    return [
        part if count == len(part) else shuffled(part, f"{seed} mix {i}")[:count]
        for i, (part, count) in enumerate(zip(parts, counts, strict=True))
    ]


def split(records: Sequence[Record], fraction: float, seed: int) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Train and validation records; no prompt, and no 'tree' or 'group', is on both sides.

    Groups are put in the order of a seeded hash of their smallest key and taken into validation while they fit into
    round(fraction * records), so membership depends neither on file order nor on the number of processes. The order
    of records is kept.

    Args:
        records: any one kind.
        fraction: share of records for validation, in [0, 1); 0 gives an empty validation set.
        seed: of the hash.
    Raises: DataError if there is only one group, or fraction is outside [0, 1).
    """
    if not 0.0 <= fraction < 1.0:
        raise DataError("the validation fraction must be in [0, 1)", found=str(fraction), where="split")
    if fraction == 0.0:
        return tuple(records), ()
    groups = _groups(records)
    if len(groups) < 2:
        raise DataError(
            f"{len(records)} records form {len(groups)} group(s) of one prompt and cannot be split", where="split",
            do="name a file under data.validation, or set data.validation_fraction=0",
        )  # fmt: skip
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
    """Connected components of records that share any group key: smallest key -> indices."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys = [group_keys(record) for record in records]
    for several in keys:
        for other in several:
            low, high = sorted((root(several[0]), root(other)))
            parent[high] = low
    groups: dict[str, list[int]] = {}
    for i, several in enumerate(keys):
        groups.setdefault(root(several[0]), []).append(i)
    return groups


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 60 else text[:57] + "..."


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode()
