"""From rendered records to tensors: length limits, padding and collators.

Masks are computed from lengths and never from token ids, so the pad token may equal any other token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.data.render import Rendered
from rlhf.errors import DataError, ShapeError

IGNORED_LABEL = -100
"""Label of a token without loss, the default of torch.nn.functional.cross_entropy."""

TooLong = Literal["error", "drop", "truncate"]


def loss_spans(rendered: Rendered) -> int:
    """Return the number of contiguous runs of tokens with loss; each assistant turn with its end token is one."""
    return sum(now and not before for before, now in zip([False, *rendered.mask], rendered.mask, strict=False))


def mean_reply_tokens(rows: Iterable[Rendered]) -> float | None:
    """Return the mean number of tokens of the assistant turns with loss, or None if there are none."""
    counts = [(sum(row.mask), loss_spans(row)) for row in rows]
    number = sum(n for _, n in counts)
    return sum(tokens for tokens, _ in counts) / number if number else None


@dataclass
class LengthReport:
    """Counts of the records (a pair counts as one) that `fit_to_length` and `fit_pair_to_length` were given."""

    total: int = 0
    too_long: int = 0
    truncated: int = 0
    dropped: int = 0
    longest: int = 0  # tokens

    def text(self, max_length: int) -> str:
        """Return the counts as one line: "12 of 400 records (3.0 %) are longer than 256 tokens (longest 812): ..."."""
        share = 100.0 * self.too_long / max(1, self.total)
        return (
            f"{self.too_long} of {self.total} records ({share:.1f} %) are longer than {max_length} tokens "
            f"(longest {self.longest}): {self.truncated} truncated, {self.dropped} dropped"
        )


def fit_to_length(
    rendered: Rendered, max_length: int, too_long: TooLong, report: LengthReport | None = None, *, where: str = ""
) -> Rendered | None:
    """Return the record if it has at most `max_length` tokens, else treat it as `too_long` says.

    Args:
        rendered: the record's token ids and loss mask.
        max_length: tokens.
        too_long: "error", "drop", or "truncate", which keeps the first `max_length` tokens.
        report: counts to update.
        where: place of the record, for the message.
    Returns: the record; None if it is dropped, also if truncation would leave no token with loss.
    Raises: DataError if it is too long and too_long is "error".
    """
    fitted = _fit((rendered,), max_length, too_long, report or LengthReport(), where)
    return fitted[0] if fitted else None


def fit_pair_to_length(
    chosen: Rendered,
    rejected: Rendered,
    max_length: int,
    too_long: TooLong,
    report: LengthReport | None = None,
    *,
    where: str = "",
) -> tuple[Rendered, Rendered] | None:
    """Apply `fit_to_length` to the two sides of a comparison together.

    Both sides are kept or neither; a pair that truncation would make equal is dropped.
    """
    fitted = _fit((chosen, rejected), max_length, too_long, report or LengthReport(), where)
    return (fitted[0], fitted[1]) if fitted else None


def _fit(
    sides: tuple[Rendered, ...], max_length: int, too_long: TooLong, report: LengthReport, where: str
) -> tuple[Rendered, ...] | None:
    longest = max(len(side.ids) for side in sides)
    report.total += 1
    report.longest = max(report.longest, longest)
    if longest <= max_length:
        return sides
    report.too_long += 1
    if too_long == "error":
        raise DataError(
            f"longer than max_length {max_length}",
            found=f"{longest} tokens",
            where=where,
            do="raise data.max_length, or set data.too_long=drop or truncate",
        )
    cut = tuple(Rendered(side.ids[:max_length], side.mask[:max_length]) for side in sides)
    alike = len(cut) > 1 and cut[0].ids == cut[1].ids
    if too_long == "drop" or alike or not all(any(side.mask) for side in cut):
        report.dropped += 1
        return None
    report.truncated += 1
    return cut


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left, so that they all end where generation starts.

    Example: pad_left([[5], [6, 7]], 0) -> [[0, 5], [6, 7]], [[F, T], [T, T]]
    Args:
        rows: B rows of token ids, none of them empty.
        pad_id: id that fills the shorter rows.
    Returns: ids [B, P] int64 and mask [B, P] bool (True on tokens), where P is the length of the longest row.
    Raises: ShapeError if there are no rows or one is empty.
    """
    return _pad(rows, pad_id, left=True)


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad responses or whole sequences on the right; otherwise as `pad_left`: ids [B, T] int64 and mask [B, T] bool."""
    return _pad(rows, pad_id, left=False)


def _pad(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    empty = [i for i, row in enumerate(rows) if len(row) == 0]
    if not rows or empty:
        raise ShapeError(
            "a batch needs at least one row, and every row at least one token",
            found=f"{len(rows)} rows, empty: {empty[:8]}",
            where="pad",
        )
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, span] = torch.as_tensor(row, dtype=torch.int64)
        mask[i, span] = True
    return ids, mask


@dataclass(frozen=True)
class PairCollator:
    """Collator of tokenized comparisons for a `transformers` Trainer."""

    pad_id: int

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate B pairs.

        Args:
            features: B mappings with "chosen_ids", "rejected_ids", "preference" (P(chosen is better)) and, in all or
                none of them, "margin".
        Returns: "input_ids" [2B, T] int64, the B chosen rows first, then the B rejected; "attention_mask" [2B, T]
            int64; "preference" [B] float32; "margin" [B] float32 if given.
        Raises: ShapeError for an empty row, or if only some pairs have a margin.
        """
        rows = [f["chosen_ids"] for f in features] + [f["rejected_ids"] for f in features]
        ids, mask = pad_right(rows, self.pad_id)
        batch = {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "preference": torch.tensor([float(f["preference"]) for f in features], dtype=torch.float32),
        }
        margins = [f["margin"] for f in features if f.get("margin") is not None]
        if margins and len(margins) < len(features):
            found = f"{len(margins)} of {len(features)} pairs"
            raise ShapeError("a margin must be stated for every pair or for none", found=found, where="PairCollator")
        if margins:
            batch["margin"] = torch.tensor([float(m) for m in margins], dtype=torch.float32)
        return batch


@dataclass(frozen=True)
class DemonstrationCollator:
    """Collator of tokenized demonstrations and documents for a `transformers` Trainer."""

    pad_id: int

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate B sequences.

        Args:
            features: B mappings with "input_ids", and "labels" of the same length: the id of a token with loss, -100
                elsewhere.
        Returns: "input_ids", "attention_mask", "labels", each [B, T] int64, right-padded; labels are -100 on padding.
        Raises: ShapeError for an empty row, or labels of another length.
        """
        for i, f in enumerate(features):
            if len(f["labels"]) != len(f["input_ids"]):
                found = f"{len(f['labels'])} labels for {len(f['input_ids'])} ids in row {i}"
                raise ShapeError("labels and input_ids differ in length", found=found, where="DemonstrationCollator")
        ids, mask = pad_right([f["input_ids"] for f in features], self.pad_id)
        labels, _ = pad_right([f["labels"] for f in features], IGNORED_LABEL)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
