"""Audit of a stage's data: numbers of records, records dropped by reason, token lengths, and tokens that carry loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf.config.schema import ClassifyConfig, PPOConfig, PretrainConfig, RewardConfig, SFTConfig
from rlhf.console import Console
from rlhf.data import tokenize
from rlhf.data.collate import LengthReport, TooLong, fit_pair_to_length, fit_to_length, loss_spans
from rlhf.data.records import BadRow, Comparison, count_reasons
from rlhf.data.render import Rendered, Renderer
from rlhf.data.sources import load_records
from rlhf.data.splits import split_records

RECORD_KINDS: dict[str, Any] = {
    "pretrain": "document",
    "sft": "demonstration",
    "reward": "comparison",
    "classify": "labelled",
    "ppo": "prompt",
}
RenderedRows = list[Rendered]


@dataclass
class DataAudit:
    """Counts of one set of records. A pair is one record with the length of its longer side."""

    name: str
    limit: int  # maximum length in tokens
    notes: tuple[str, ...] = ()
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> number of records dropped on reading
    bad_rows: list[BadRow] = field(default_factory=list)  # errors of the records dropped on rendering
    lengths: list[int] = field(default_factory=list)  # tokens of every record before truncation
    kept: list[tuple[int, int]] = field(default_factory=list)  # (tokens, tokens with loss) of every record used
    tokens: int = 0  # tokens of all records used, with both sides of pairs
    replies: int = 0  # replies with loss in the records used
    with_end_token: int = 0  # records used whose last token is the end token
    length_report: LengthReport = field(default_factory=LengthReport)

    @property
    def reply_tokens(self) -> float | None:
        """Mean length of a reply with loss in tokens; None if there are no replies."""
        return sum(loss for _, loss in self.kept) / self.replies if self.replies else None

    def longest(self, rows: int) -> tuple[int, int]:
        """Return the tokens of the longest record used, and the tokens with loss of the `rows` longest together."""
        longest = sorted(self.kept, reverse=True)[:rows]
        return (longest[0][0] if longest else self.limit), sum(loss for _, loss in longest)

    def print(self, console: Console, *, loss_and_end: bool) -> None:
        """Print the notes and a table of the counts.

        Args:
            console: where to print.
            loss_and_end: whether the table has rows for tokens with loss and for end tokens.
        """
        for note in self.notes:
            console.note(note)
        if not self.lengths:
            return
        median, high = np.percentile(self.lengths, [50, 95])
        total, loss = sum(n for n, _ in self.kept), sum(n for _, n in self.kept)
        report = self.length_report
        rows = [
            ["records", f"{len(self.kept):,} used of {len(self.lengths):,}"],
            ["dropped on reading", ", ".join(f"{n} {reason}" for reason, n in self.dropped.items()) or "none"],
            ["dropped on rendering", count_reasons(self.bad_rows) or "none"],
            ["tokens: median, 95 %, longest", f"{median:.0f}, {high:.0f}, {max(self.lengths)} (limit {self.limit})"],
            [
                "longer than the limit",
                f"{100 * report.too_long / max(report.total, 1):.1f} %: {report.truncated:,} "
                f"truncated, {report.dropped:,} dropped",
            ],
        ]
        if loss_and_end:
            rows += [
                ["tokens that carry loss", f"{100 * loss / max(total, 1):.1f} % of {total:,}"],
                ["end token present", f"{100 * self.with_end_token / max(len(self.kept), 1):.1f} %"],
            ]
        console.table(f"Data: {self.name}", ["", ""], rows)

    @property
    def problems(self) -> list[str]:
        """Reasons why training would reject these records, or should not use them."""
        problems = []
        if self.lengths and not self.kept:
            problems.append(f"{self.name}: no record is left")
        if self.kept and not self.with_end_token and self.name != "prompts":
            problems.append(f"{self.name}: no record ends with the end token, so a model would never learn to stop")
        return problems


def audit_data(stage: str, config: Any, renderer: Renderer) -> tuple[DataAudit, DataAudit | None]:
    """Read and count the records of a stage.

    Args:
        stage: name of the stage.
        config: its configuration.
        renderer: renders records into tokens.
    Returns: the audits of the training records (prompts for PPO) and of the held-out records, None without any.
    Raises: DataError for the same reasons as the stage.
    """
    if isinstance(config, PPOConfig):
        data = config.data
        loaded = load_records(
            "prompt", data.prompts, seed=config.seed, on_bad_row=data.on_bad_row, deduplicate=data.deduplicate
        )
        prompts = DataAudit("prompts", data.max_prompt_tokens, loaded.notes, dict(loaded.dropped))
        return _count(
            prompts,
            loaded.records,
            _make_render(stage, config, renderer),
            renderer.end_id,
            data.too_long,
            data.on_bad_row,
        ), None
    data = config.data
    options: Any = {"seed": config.seed, "on_bad_row": data.on_bad_row, "deduplicate": data.deduplicate}
    loaded = load_records(RECORD_KINDS[stage], data.train, **options)
    train: Sequence[Any] = loaded.records
    held: Sequence[Any] = ()
    held_notes: tuple[str, ...] = ()
    if data.validation:
        other = load_records(RECORD_KINDS[stage], data.validation, **options)
        held, held_notes = other.records, other.notes
    elif data.validation_fraction:
        train, held = split_records(train, data.validation_fraction, config.seed)
    render, too_long = _make_render(stage, config, renderer), data.too_long
    first = DataAudit("training records", data.max_length, loaded.notes, dict(loaded.dropped))
    second = DataAudit("held-out records", data.max_length, held_notes)
    if isinstance(config, PretrainConfig):  # documents are cut into blocks, so none is too long
        first.limit = second.limit = 2**31
    return (
        _count(first, train, render, renderer.end_id, too_long, data.on_bad_row),
        _count(second, held, render, renderer.end_id, too_long, data.on_bad_row) if held else None,
    )


def _make_render(stage: str, config: Any, renderer: Renderer) -> Callable[[Any], RenderedRows]:
    """Return a function that renders a record into one row, or a pair into two."""

    def sft(record: Any) -> RenderedRows:
        return [renderer.conversation(record.messages, loss_on=config.data.loss_on, where=record.where)]

    def pair(record: Comparison) -> RenderedRows:
        start = renderer.prompt(record.prompt, where=record.where)
        responses = [renderer.response(text, where=record.where) for text in (record.chosen, record.rejected)]
        return [Rendered(start + r, [False] * len(start) + [True] * len(r)) for r in responses]

    def whole(ids: list[int]) -> RenderedRows:
        return [Rendered(ids, [True] * len(ids))]

    if isinstance(config, SFTConfig):
        return sft
    if isinstance(config, RewardConfig):
        return pair
    if isinstance(config, ClassifyConfig):
        return lambda record: whole(tokenize.content_ids(record, renderer))
    if isinstance(config, PPOConfig):
        return lambda record: whole(renderer.prompt(record.messages, where=record.where))
    return lambda record: [tokenize.tokenize_document(record, renderer)]


def _count(
    audit: DataAudit,
    records: Sequence[Any],
    render: Callable[[Any], RenderedRows],
    end_id: int,
    too_long: TooLong,
    on_bad_row: str,
) -> DataAudit:
    for record in records:
        try:
            rows = render(record)
        except BadRow as error:
            if on_bad_row == "error":
                raise
            audit.bad_rows.append(error)
            continue
        audit.lengths.append(max(len(row.ids) for row in rows))
        if len(rows) == 2:
            used: Sequence[Rendered] | None = fit_pair_to_length(
                rows[0], rows[1], audit.limit, too_long, audit.length_report, where=record.where
            )
        else:
            row = fit_to_length(rows[0], audit.limit, too_long, audit.length_report, where=record.where)
            used = None if row is None else [row]
        if used is None:
            continue
        audit.kept.append((max(len(row.ids) for row in used), max(sum(row.mask) for row in used)))
        audit.tokens += sum(len(row.ids) for row in used)
        audit.replies += sum(loss_spans(row) for row in used)
        audit.with_end_token += all(row.ids[-1] == end_id for row in used)
    return audit
