"""The record contract: the types of training examples after reading, whatever file format they came from, and checks.

Every record names its origin in `where`, e.g. "data/x.jsonl row 118". Fingerprints and duplicate detection ignore
`where`, so that moving a file changes nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import DataError

Messages = list[dict[str, str]]
ROLES = ("system", "user", "assistant")
MAX_ROWS_SHOWN = 20
"""Largest number of bad rows that one error describes individually."""

FIX_OR_DROP = "fix or remove the row, or set data.on_bad_row=drop"


class BadRow(DataError):
    """One row breaks the record contract. `reason` is the short name under which dropped rows are counted."""

    def __init__(self, reason: str, what: str, *, found: str = "", where: str = "", do: str = FIX_OR_DROP) -> None:
        """Build the message as `DataError` does; `reason` comes in addition, e.g. "empty response"."""
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
        preference: P(chosen is better), in [0, 1]; 0.5 is a tie; below 0.5 `rejected` is the better one.
        margin: how much better, in score units; None if the data does not say.
        extra: all columns that the contract does not know (annotator, group, ranking, ...).
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
    """A prompt: messages that end with a user turn. `record` is the whole row, for judges and reward functions."""

    messages: Messages
    where: str
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Labelled:
    """A document or a conversation with labels.

    Attributes:
        content: text, or messages that end with the turn that the labels describe.
        labels: label -> probability that it holds, in [0, 1]; labels that are not named have probability 0.
    """

    content: str | Messages
    labels: dict[str, float]
    where: str


Record = Text | Demonstration | Comparison | Prompt | Labelled


@dataclass(frozen=True)
class RecordSet:
    """Records that are ready for a stage, as `load_records` returns them.

    Attributes:
        records: all of the record type that was asked for, in their final, seeded order.
        fingerprint: 16 hex digits of a hash of the records' content in that order.
        notes: lines for the user: the format recognised, and how many records were used and dropped, and why.
        dropped: reason -> number of rows dropped, "duplicate" included.
    """

    records: tuple[Any, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()
    dropped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)


def check_string(value: Any, name: str, where: str, *, empty: str) -> str:
    """Return `value` if it is a string that is not blank and can be encoded as UTF-8.

    Args:
        value: the value to check.
        name: what it is called in the message.
        where: its place.
        empty: reason for a blank string.
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
            "broken unicode",
            f"{name} contains half of a surrogate pair at character {exc.start}",
            found=ascii(value[max(0, exc.start - 10) : exc.end + 10]),
            where=where,
        ) from None
    return value


def check_turns(messages: Messages, where: str, *, last: str) -> None:
    """Check the roles, their order and the content of every turn.

    Args:
        messages: the conversation.
        where: its place.
        last: role that the last turn must have.
    Raises: BadRow with reason "role order", "unknown role", "empty prompt", "empty response" or "... is not text".
    """
    if not messages:
        raise BadRow("empty prompt", "the conversation has no turns", where=where)
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in ROLES:
            what = f"turn {i + 1} has an unknown role"
            raise BadRow(
                "unknown role", what, found=_short(role), where=where, do=f"known: {', '.join(ROLES)}; {FIX_OR_DROP}"
            )
        empty = {"system": "empty system", "user": "empty prompt", "assistant": "empty response"}[role]
        check_string(message["content"], f"turn {i + 1} ({role})", where, empty=empty)
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * len(spoken)
    if not spoken or spoken != expected[: len(spoken)] or spoken[-1] != last:
        raise BadRow(
            "role order",
            f"turns must be [system,] user, assistant, user, ... and end with {last}",
            found=" ".join(roles[:8]) + (" ..." if len(roles) > 8 else ""),
            where=where,
        )


def check_text(record: Text) -> Text:
    """Return the document. Raises: BadRow if it is not text, or blank."""
    check_string(record.text, "text", record.where, empty="empty text")
    return record


def check_demonstration(record: Demonstration) -> Demonstration:
    """Return the demonstration. Raises: BadRow if the turns are malformed or the assistant is not last."""
    check_turns(record.messages, record.where, last="assistant")
    return record


def check_prompt(record: Prompt) -> Prompt:
    """Return the prompt. Raises: BadRow if the turns are malformed or the user is not last."""
    check_turns(record.messages, record.where, last="user")
    return record


def check_comparison(record: Comparison) -> Comparison:
    """Return the comparison.

    Raises: BadRow for a malformed prompt, an empty or non-text response, a preference or margin that is not a number in
        its range, or identical responses.
    """
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
            "identical responses",
            "'chosen' and 'rejected' are identical",
            where=where,
            do=f"if it is a tie, give it preference 0.5; otherwise {FIX_OR_DROP}",
        )
    return record


def check_labelled(record: Labelled) -> Labelled:
    """Return the labelled record.

    Raises: BadRow for malformed content, a blank label or a probability outside [0, 1].
    """
    where = record.where
    if isinstance(record.content, str):
        check_string(record.content, "text", where, empty="empty text")
    else:
        check_turns(record.content, where, last=record.content[-1]["role"] if record.content else "user")
    for name, p in record.labels.items():
        check_string(name, "label", where, empty="empty label")
        if not (_is_number(p) and 0.0 <= p <= 1.0):
            what = f"the probability of label '{name}' must be a number in [0, 1]"
            raise BadRow("probability outside [0, 1]", what, found=_short(p), where=where)
    return record


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 60 else text[:57] + "..."


def describe_bad_rows(bad: Sequence[BadRow]) -> list[str]:
    """Return one line for each of the first bad rows, and a last line with their number, reasons and remedy."""
    if len(bad) < 2:
        return [str(row) for row in bad]
    lines = [
        str(DataError(r.what, found=r.found, where=r.where, do=r.do.removesuffix(FIX_OR_DROP)))
        for r in bad[:MAX_ROWS_SHOWN]
    ]
    more = f"and {len(bad) - MAX_ROWS_SHOWN} more bad rows; " if len(bad) > MAX_ROWS_SHOWN else ""
    return [
        *lines,
        f"{more}{len(bad)} bad rows in all ({count_reasons(bad)}): fix or remove them, or set data.on_bad_row=drop",
    ]


def count_reasons(bad: Sequence[BadRow]) -> str:
    """Return the number of rows for each reason as text, the most frequent reason first."""
    return ", ".join(f"{n} {reason}" for reason, n in Counter(row.reason for row in bad).most_common())
