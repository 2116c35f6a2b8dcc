"""What a stage would train on, counted: records by format, dropped by reason, token lengths, tokens that carry loss."""

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

KINDS: dict[str, Any] = {
    "pretrain": "document",
    "sft": "demonstration",
    "reward": "comparison",
    "classify": "labelled",
    "ppo": "prompt",
}
RenderedSides = list[Rendered]


@dataclass
class DataAudit:
    """Counts of one set of records. A pair is one record, as long as its longer side."""

    what: str
    limit: int
    notes: tuple[str, ...] = ()
    dropped: dict[str, int] = field(default_factory=dict)  # on reading, by reason
    bad: list[BadRow] = field(default_factory=list)  # on rendering
    lengths: list[int] = field(default_factory=list)  # tokens of every record, before it is cut
    kept: list[tuple[int, int]] = field(
        default_factory=list
    )  # tokens and tokens with loss of the records that are used
    tokens: int = 0  # of all sides that are used
    replies: int = 0  # of all records that are used
    ended: int = 0  # records used whose last token is the end token
    fit: LengthReport = field(default_factory=LengthReport)

    @property
    def reply_tokens(self) -> float | None:
        """Mean tokens of a reply in demonstrations."""
        return sum(loss for _, loss in self.kept) / self.replies if self.replies else None

    def longest(self, rows: int) -> tuple[int, int]:
        """Tokens of the longest record used, and tokens with loss in the `rows` longest together."""
        top = sorted(self.kept, reverse=True)[:rows]
        return (top[0][0] if top else self.limit), sum(loss for _, loss in top)

    def show(self, console: Console, *, end_matters: bool) -> None:
        """The table."""
        for note in self.notes:
            console.note(note)
        if not self.lengths:
            return
        median, high = np.percentile(self.lengths, [50, 95])
        total, loss = sum(n for n, _ in self.kept), sum(n for _, n in self.kept)
        share = self.fit
        rows = [
            ["records", f"{len(self.kept):,} used of {len(self.lengths):,}"],
            ["dropped on reading", ", ".join(f"{n} {why}" for why, n in self.dropped.items()) or "none"],
            ["dropped on rendering", count_reasons(self.bad) or "none"],
            ["tokens: median, 95 %, longest", f"{median:.0f}, {high:.0f}, {max(self.lengths)} (limit {self.limit})"],
            [
                "longer than the limit",
                f"{100 * share.too_long / max(share.total, 1):.1f} %: {share.truncated:,} "
                f"truncated, {share.dropped:,} dropped",
            ],
        ]
        if end_matters:
            rows += [
                ["tokens that carry loss", f"{100 * loss / max(total, 1):.1f} % of {total:,}"],
                ["end token present", f"{100 * self.ended / max(len(self.kept), 1):.1f} %"],
            ]
        console.table(f"Data: {self.what}", ["", ""], rows)

    @property
    def problems(self) -> list[str]:
        """Why training would refuse these records, or should not use them."""
        found = []
        if self.lengths and not self.kept:
            found.append(f"{self.what}: no record is left")
        if self.kept and not self.ended and self.what != "prompts":
            found.append(f"{self.what}: no record ends with the end token, so a model would never learn to stop")
        return found


def audit_data(stage: str, config: Any, renderer: Renderer) -> tuple[DataAudit, DataAudit | None]:
    """Training records (of PPO: prompts) and held-out ones.

    Raises: DataError as the stage itself would.
    """
    if isinstance(config, PPOConfig):
        data = config.data
        loaded = load_records(
            "prompt", data.prompts, seed=config.seed, on_bad_row=data.on_bad_row, deduplicate=data.deduplicate
        )
        prompts = DataAudit("prompts", data.max_prompt_tokens, loaded.notes, dict(loaded.dropped))
        return _count(
            prompts, loaded.records, _sides(stage, config, renderer), renderer.end_id, data.too_long, data.on_bad_row
        ), None
    data = config.data
    options: Any = {"seed": config.seed, "on_bad_row": data.on_bad_row, "deduplicate": data.deduplicate}
    loaded = load_records(KINDS[stage], data.train, **options)
    train: Sequence[Any] = loaded.records
    held: Sequence[Any] = ()
    held_notes: tuple[str, ...] = ()
    if data.validation:
        other = load_records(KINDS[stage], data.validation, **options)
        held, held_notes = other.records, other.notes
    elif data.validation_fraction:
        train, held = split_records(train, data.validation_fraction, config.seed)
    sides, too_long = _sides(stage, config, renderer), data.too_long
    first = DataAudit("training records", data.max_length, loaded.notes, dict(loaded.dropped))
    second = DataAudit("held-out records", data.max_length, held_notes)
    if isinstance(config, PretrainConfig):  # cut into blocks: nothing is too long
        first.limit = second.limit = 2**31
    return (
        _count(first, train, sides, renderer.end_id, too_long, data.on_bad_row),
        _count(second, held, sides, renderer.end_id, too_long, data.on_bad_row) if held else None,
    )


def _sides(stage: str, config: Any, renderer: Renderer) -> Callable[[Any], RenderedSides]:
    """Record -> the rows that are made of it."""

    def sft(record: Any) -> RenderedSides:
        return [renderer.conversation(record.messages, loss_on=config.data.loss_on, where=record.where)]

    def pair(record: Comparison) -> RenderedSides:
        start = renderer.prompt(record.prompt, where=record.where)
        responses = [renderer.response(text, where=record.where) for text in (record.chosen, record.rejected)]
        return [Rendered(start + r, [False] * len(start) + [True] * len(r)) for r in responses]

    def whole(ids: list[int]) -> RenderedSides:
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
    found: DataAudit,
    records: Sequence[Any],
    sides: Callable[[Any], RenderedSides],
    end_id: int,
    too_long: TooLong,
    on_bad_row: str,
) -> DataAudit:
    for record in records:
        try:
            rows = sides(record)
        except BadRow as error:
            if on_bad_row == "error":
                raise
            found.bad.append(error)
            continue
        found.lengths.append(max(len(row.ids) for row in rows))
        if len(rows) == 2:
            used: Sequence[Rendered] | None = fit_pair_to_length(
                rows[0], rows[1], found.limit, too_long, found.fit, where=record.where
            )
        else:
            one = fit_to_length(rows[0], found.limit, too_long, found.fit, where=record.where)
            used = None if one is None else [one]
        if used is None:
            continue
        found.kept.append((max(len(row.ids) for row in used), max(sum(row.mask) for row in used)))
        found.tokens += sum(len(row.ids) for row in used)
        found.replies += sum(loss_spans(row) for row in used)
        found.ended += all(row.ids[-1] == end_id for row in used)
    return found
