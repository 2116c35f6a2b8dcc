"""Tokenization of records for each stage, with a note about how many were truncated or dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from rlhf.config.sections import Data
from rlhf.console import Console
from rlhf.data.collate import LengthReport, TooLong, fit_pair_to_length, fit_to_length
from rlhf.data.records import (
    BadRow,
    Comparison,
    Demonstration,
    Labelled,
    Prompt,
    Text,
    count_reasons,
    describe_bad_rows,
)
from rlhf.data.render import Rendered, Renderer
from rlhf.errors import DataError, combine_errors

OnBadRow = Literal["error", "drop"]
RecordT = TypeVar("RecordT")


def tokenize_document(record: Text | Demonstration, renderer: Renderer) -> Rendered:
    """Tokenize a text, or a conversation with loss on all tokens."""
    if isinstance(record, Text):
        return renderer.text(record.text, where=record.where)
    return renderer.conversation(record.messages, loss_on="all", where=record.where)


def tokenize_demonstrations(
    records: Sequence[Demonstration], renderer: Renderer, data: Data, what: str, console: Console
) -> list[Rendered]:
    """Tokenize demonstrations; the mask of a row is True on tokens with loss.

    Args:
        records: the demonstrations.
        renderer: renderer of the model's tokenizer.
        data: length limit, and what happens to long and bad rows.
        what: what the records are called in notes and messages, e.g. "training".
        console: where notes are printed.
    Raises: DataError if a row cannot be rendered (unless bad rows are dropped), or if no record is left.
    """
    report = LengthReport()

    def one(record: Demonstration) -> Rendered | None:
        row = renderer.conversation(record.messages, loss_on=data.loss_on, where=record.where)
        return fit_to_length(row, data.max_length, data.too_long, report, where=record.where)

    rows = list(_tokenize_each(records, one, data.on_bad_row, what, console))
    _note_lengths(report, data.max_length, what, console)
    return _require_rows(rows, records, what)


def tokenize_comparisons(
    records: Sequence[Comparison], renderer: Renderer, data: Data, what: str, console: Console
) -> list[dict[str, Any]]:
    """Tokenize comparisons into chosen_ids, rejected_ids and preference (and margin if every record has one).

    Args and Raises: as `tokenize_demonstrations`.
    """
    report = LengthReport()
    margins = bool(records) and all(r.margin is not None for r in records)

    def one(record: Comparison) -> dict[str, Any] | None:
        start = renderer.prompt(record.prompt, where=record.where)
        sides = []
        for text in (record.chosen, record.rejected):
            response = renderer.response(text, where=record.where)
            sides.append(Rendered(start + response, [False] * len(start) + [True] * len(response)))
        fitted = fit_pair_to_length(sides[0], sides[1], data.max_length, data.too_long, report, where=record.where)
        if fitted is None:
            return None
        pair = {"chosen_ids": fitted[0].ids, "rejected_ids": fitted[1].ids, "preference": record.preference}
        return pair | ({"margin": record.margin} if margins else {})

    rows = list(_tokenize_each(records, one, data.on_bad_row, what, console))
    _note_lengths(report, data.max_length, what, console)
    return _require_rows(rows, records, what)


def tokenize_labelled(
    records: Sequence[Labelled],
    renderer: Renderer,
    data: Data,
    labels: Sequence[str],
    multi_label: bool,
    what: str,
    console: Console,
) -> list[dict[str, Any]]:
    """Tokenize labelled records into input_ids and target, the probabilities of the labels in the order of `labels`.

    A conversation ends with the end token of its last turn, or with the generation prompt if the user speaks last; the
    classifier reads the last token.

    Args: as `tokenize_demonstrations`, and
        labels: names of the labels.
        multi_label: any number of labels may hold at once.
    Raises: DataError as `tokenize_demonstrations`, and if labels exclude each other but a record's probabilities do not
        sum to 1.
    """
    report = LengthReport()

    def one(record: Labelled) -> dict[str, Any] | None:
        target = [float(record.labels.get(name, 0.0)) for name in labels]
        if not multi_label and abs(sum(target) - 1.0) > 1e-4:
            raise BadRow(
                "not one label",
                "a record must have exactly one label, or probabilities that sum to 1",
                found=", ".join(f"{k} {v:g}" for k, v in record.labels.items()) or "none",
                where=record.where,
                do="set multi_label=true if any number of labels may hold",
            )
        ids = content_ids(record, renderer)
        fitted = fit_to_length(
            Rendered(ids, [True] * len(ids)), data.max_length, data.too_long, report, where=record.where
        )
        return None if fitted is None else {"input_ids": fitted.ids, "target": target}

    rows = list(_tokenize_each(records, one, data.on_bad_row, what, console))
    _note_lengths(report, data.max_length, what, console)
    return _require_rows(rows, records, what)


def content_ids(record: Labelled, renderer: Renderer) -> list[int]:
    """Return the token ids of a labelled record's text or conversation."""
    if isinstance(record.content, str):
        return renderer.text(record.content, where=record.where).ids
    *before, last = record.content
    if last["role"] != "assistant":
        return renderer.prompt(record.content, where=record.where)
    return renderer.prompt(before, where=record.where) + renderer.response(last["content"], where=record.where)


def tokenize_prompts(
    records: Sequence[Prompt],
    renderer: Renderer,
    max_tokens: int,
    too_long: TooLong,
    on_bad_row: OnBadRow,
    console: Console,
) -> list[list[int]]:
    """Tokenize prompts as `tokenize_prompts_with_records` does; return the token ids alone."""
    return tokenize_prompts_with_records(records, renderer, max_tokens, too_long, on_bad_row, console)[0]


def tokenize_prompts_with_records(
    records: Sequence[Prompt],
    renderer: Renderer,
    max_tokens: int,
    too_long: TooLong,
    on_bad_row: OnBadRow,
    console: Console,
) -> tuple[list[list[int]], list[Prompt]]:
    """Tokenize prompts; return token ids that end with the generation prompt, and the record of each.

    Raises: DataError if a prompt is longer than `max_tokens` tokens and too_long is "error", if a row cannot be
        rendered (unless bad rows are dropped), or if no prompt is left.
    """
    report = LengthReport()

    def one(record: Prompt) -> tuple[list[int], Prompt] | None:
        ids = renderer.prompt(record.messages, where=record.where)
        if len(ids) > max_tokens and too_long == "error":
            raise DataError(
                f"the prompt is longer than {max_tokens} tokens",
                found=f"{len(ids)} tokens",
                where=record.where,
                do="shorten it, raise max_prompt_tokens within the model's context, or set too_long=drop",
            )
        fitted = fit_to_length(Rendered(ids, [True] * len(ids)), max_tokens, too_long, report, where=record.where)
        return None if fitted is None else (fitted.ids, record)

    rows = list(_tokenize_each(records, one, on_bad_row, "prompts", console))
    _note_lengths(report, max_tokens, "prompts", console)
    kept = _require_rows(rows, records, "prompts")
    return [ids for ids, _ in kept], [record for _, record in kept]


def _tokenize_each(
    records: Sequence[Any], one: Callable[[Any], RecordT | None], on_bad_row: OnBadRow, what: str, console: Console
) -> Iterator[RecordT]:
    bad: list[BadRow] = []
    for record in records:
        try:
            row = one(record)
        except BadRow as error:
            bad.append(error)
            continue
        if row is not None:
            yield row
    problem = combine_errors(DataError, describe_bad_rows(bad)) if on_bad_row == "error" else None
    if problem:
        raise problem
    if bad:
        console.note(f"{what}: {len(bad)} of {len(records)} records dropped ({count_reasons(bad)})")


def _note_lengths(report: LengthReport, limit: int, what: str, console: Console) -> None:
    if report.too_long:
        console.note(f"{what}: {report.text(limit)}")


def _require_rows(rows: list[RecordT], records: Sequence[Any], what: str) -> list[RecordT]:
    if records and not rows:
        raise DataError(
            f"no {what} record is left",
            found=f"{len(records)} before tokenization",
            do="raise data.max_length (for prompts, max_prompt_tokens)",
        )
    return rows
