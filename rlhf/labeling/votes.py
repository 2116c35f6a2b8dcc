"""Reading of votes from columns, rules and functions into one table with a row per record and a column per source.

A vote on a pair is 'chosen', 'rejected' or 'tie' (or 1, 0, 0.5); a vote on classes is a label. None, an empty cell and
a tie are abstentions. Which of the two responses is called `chosen` carries no information here.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.config.labeling import VoteSource, WeakLabelConfig
from rlhf.data.formats import check_format, convert_row, describe_format, recognise_format
from rlhf.data.records import BadRow, Comparison, Labelled, count_reasons, describe_bad_rows
from rlhf.data.sources import check_object, read_rows
from rlhf.errors import ConfigError, DataError, combine_errors

VoteRow = dict[str, Any]
VoteFunction = Callable[[VoteRow], Any]
SIDES = ("chosen", "rejected")
_MIRROR = {"chosen": "rejected", "rejected": "chosen", None: None}
_PAIR_VOTES: dict[Any, str | None] = {
    "chosen": "chosen",
    "1": "chosen",
    "1.0": "chosen",
    "rejected": "rejected",
    "0": "rejected",
    "0.0": "rejected",
    "tie": None,
    "0.5": None,
}
_LABEL = {"comparison": "preference", "labelled": "label"}


@dataclass(frozen=True)
class VotedRecord:
    """One record to label: its row with renamed columns and without label, the record made from it, and the votes."""

    row: VoteRow
    record: Comparison | Labelled
    gold: str | None
    votes: dict[str, str | None]

    @property
    def where(self) -> str:
        """Return the place of the record in its source."""
        return self.record.where


@dataclass(frozen=True)
class VoteTable:
    """The votes of S sources on R records with N classes.

    Attributes:
        rows: R rows to write, without label, votes and gold.
        sources: S names of sources.
        labels: N names of classes; for pairs, chosen and rejected.
        votes: R lists of S votes, each the index of a class, or -1 for an abstention.
        gold: R indices of the true class, -1 where it is not known.
        notes: lines for the user.
    """

    rows: list[VoteRow]
    sources: tuple[str, ...]
    labels: tuple[str, ...]
    votes: list[list[int]]
    gold: list[int]
    notes: list[str] = field(default_factory=list)


def read_votes(config: WeakLabelConfig, functions: Mapping[str, VoteFunction]) -> VoteTable:
    """Read the records and collect the votes of all sources.

    Args:
        config: the records and the sources.
        functions: name in the configuration -> labelling function.
    Raises: DataError if the data cannot be read, with all bad rows and votes at once unless they are dropped;
        ConfigError if two sources have the same name, or if there are fewer than two classes.
    """
    data = config.data
    rows, columns, remark = read_rows(data)
    reader, items, bad = _VoteReader(config, functions), list[VotedRecord](), list[BadRow]()
    format, description = _format(config, columns)
    hidden = _hidden_columns(config)
    for number, value in rows:
        where = f"{data.path} row {number}"
        try:
            row = check_object(value, where)
            kept = {name: cell for name, cell in row.items() if name not in hidden}
            with_empty_label = kept | {"label": []} if config.kind == "labelled" else kept
            record: Any = convert_row(with_empty_label, format, config.kind, where)
            gold = reader.read(row.get(config.gold), config.gold, where) if config.gold else None
            items.append(VotedRecord(kept, record, gold, reader.collect(row, kept, record)))
        except BadRow as error:
            bad.append(error)
    problem = combine_errors(DataError, describe_bad_rows(bad)) if data.on_bad_row == "error" else None
    if problem:
        raise problem
    if not items:
        raise DataError(
            f"no record is left ({count_reasons(bad)}; first: {bad[0]})", where=data.path, do="correct the file"
        )
    note = f"{data.path}: {description}{remark and ', '}{remark}, {len(items)} records"
    note += f", {len(bad)} dropped ({count_reasons(bad)})" if bad else ""
    return _table(config, items, reader, [note, *reader.notes()])


def _hidden_columns(config: WeakLabelConfig) -> set[str]:
    """Return the columns that are neither passed to functions nor written: votes, gold, and the label to replace."""
    read = {name for source in config.sources for name in (source.votes, source.column) if name}
    return {*read, _LABEL[config.kind]} | ({config.gold} if config.gold else set())


def _format(config: WeakLabelConfig, columns: set[str]) -> tuple[str, str]:
    """Return the format and its description. Raises: DataError if it does not fit or a column is missing."""
    data, auto, label = config.data, config.data.format == "auto", _LABEL[config.kind]
    named = {name for source in config.sources for name in (source.votes, source.column, config.gold) if name}
    missing = [
        str(
            DataError(
                f"there is no column '{name}'",
                found=f"columns {', '.join(sorted(columns))}",
                where=data.path,
                do="name one of these columns",
            )
        )
        for name in sorted(named - columns)
    ]
    problem = combine_errors(DataError, missing)
    if problem:
        raise problem
    known = columns | {"label"} if config.kind == "labelled" else columns
    format = recognise_format(known, config.kind, data.path) if auto else data.format
    check_format(format, known, config.kind, data.path)
    description = describe_format(
        format, known - _hidden_columns(config) | ({"label"} & known), config.kind, recognised=auto
    )
    return format, description + (f", '{label}' is replaced" if label in columns else "")


class _VoteReader:
    """Reader of the votes of all sources on one record at a time; it counts the abstentions that the notes report."""

    def __init__(self, config: WeakLabelConfig, functions: Mapping[str, VoteFunction]) -> None:
        self.config, self.functions = config, functions
        self.pairs = config.kind == "comparison"
        self.ties, self.by_position = Counter[str](), Counter[str]()
        names = [n for s in config.sources if (n := s.name or s.column or s.function)]
        self.fixed = tuple(names)
        for name, count in Counter(names).items():
            if count > 1:
                raise ConfigError(
                    f"two sources are called '{name}'", where="sources", do="give one of them another name"
                )

    def collect(self, row: Mapping[str, Any], shown: VoteRow, record: Comparison | Labelled) -> dict[str, str | None]:
        """Return source -> vote for one record.

        Args:
            row: all columns.
            shown: the columns that functions may see: no votes, no label, no gold.
            record: the record made from the row.
        Raises: BadRow for an invalid vote; DataError if a function fails; ConfigError if two sources have the same
            name.
        """
        found: dict[str, str | None] = {}
        for source in self.config.sources:
            if source.votes:
                for name, value in self._mapping(row.get(source.votes), source.votes, record.where).items():
                    if name in self.fixed or name in found:
                        do = "rename the source or the annotator"
                        raise ConfigError(f"two sources are called '{name}'", where=record.where, do=do)
                    found[name] = self._count_vote(value, name, record.where)
                continue
            name = str(source.name or source.column or source.function)
            if source.column:
                found[name] = self._count_vote(row.get(source.column), name, record.where)
            elif source.function:
                found[name] = self._call(name, source.function, shown, record.where)
            else:
                found[name] = _rule_vote(source, record)
        return found

    def read(self, value: Any, source_name: str, where: str) -> str | None:
        """Return the class that a value votes for, None for an abstention. Raises: BadRow if it is neither."""
        if _is_empty(value):
            return None
        if self.pairs:
            key = str(value)
            if isinstance(value, bool) or not isinstance(value, str | int | float) or key not in _PAIR_VOTES:
                message = (
                    f"the vote of '{source_name}' on a pair is 'chosen', 'rejected' or 'tie' (1, 0, 0.5), or nothing"
                )
                raise BadRow("broken vote", message, found=f"{value!r:.40}", where=where)
            return _PAIR_VOTES[key]
        if isinstance(value, bool) or not isinstance(value, str | int):
            message = f"the vote of '{source_name}' is one label, text or a whole number, or nothing"
            raise BadRow("broken vote", message, found=f"{value!r:.40}", where=where)
        if self.config.labels and str(value) not in self.config.labels:
            message = f"the vote of '{source_name}' is none of labels: {', '.join(self.config.labels)}"
            raise BadRow("unknown label", message, found=f"{value!r:.40}", where=where)
        return str(value)

    def _count_vote(self, value: Any, source_name: str, where: str) -> str | None:
        vote = self.read(value, source_name, where)
        self.ties[source_name] += vote is None and not _is_empty(value)
        return vote

    def _mapping(self, value: Any, column: str, where: str) -> Mapping[str, Any]:
        if isinstance(value, str) and value.strip():
            with contextlib.suppress(ValueError):  # reported below
                value = json.loads(value)
        if _is_empty(value):
            return {}
        if not isinstance(value, Mapping) or not all(isinstance(name, str) and name.strip() for name in value):
            message = f"'{column}' must be a mapping annotator -> vote"
            raise BadRow("broken votes", message, found=f"{value!r:.40}", where=where)
        return value

    def _call(self, name: str, function: str, shown: VoteRow, where: str) -> str | None:
        first = self._call_once(name, function, shown, where)
        if not self.pairs:
            return first
        swapped = self._call_once(
            name, function, shown | {"chosen": shown["rejected"], "rejected": shown["chosen"]}, where
        )
        if swapped == _MIRROR[first]:
            return first
        self.by_position[name] += 1
        return None

    def _call_once(self, name: str, function: str, shown: VoteRow, where: str) -> str | None:
        try:
            value = self.functions[function](dict(shown))
        except Exception as error:
            raise DataError(
                f"the labelling function '{name}' failed",
                found=f"{type(error).__name__}: {error}",
                where=where,
                do="return a vote, or None to abstain, for every record",
            ) from error
        return self.read(value, name, where)

    def notes(self) -> list[str]:
        """Return lines about votes that count as abstentions."""
        lines = [
            f"{n} ties of '{source_name}' count as abstentions" for source_name, n in sorted(self.ties.items()) if n
        ]
        for name, n in sorted(self.by_position.items()):
            lines.append(
                f"'{name}' changes its vote when the two responses are swapped, on {n} records: counted as abstention"
            )
        return lines


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _rule_vote(source: VoteSource, record: Comparison | Labelled) -> str | None:
    if isinstance(record, Labelled):
        last = record.content if isinstance(record.content, str) else record.content[-1]["content"]
        return source.vote if _rule_holds(source, last, "") else None
    a, b = _rule_holds(source, record.chosen, record.rejected), _rule_holds(source, record.rejected, record.chosen)
    if a == b:
        return None
    return SIDES[a == (source.vote == "without")]


def _rule_holds(source: VoteSource, text: str, other: str) -> bool:
    words = len(text.split())
    if source.regex:
        return re.search(source.regex, text) is not None
    if source.keywords:
        return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in source.keywords)
    if source.words_over:
        return words > source.words_over
    if source.words_under:
        return words < source.words_under
    assert source.longer_by
    return words - len(other.split()) >= source.longer_by


def _table(config: WeakLabelConfig, items: Sequence[VotedRecord], reader: _VoteReader, notes: list[str]) -> VoteTable:
    names = tuple(dict.fromkeys((*reader.fixed, *sorted({name for item in items for name in item.votes}))))
    labels = SIDES if config.kind == "comparison" else config.labels
    if not labels:
        cast = {vote for item in items for vote in item.votes.values() if vote is not None}
        labels = tuple(sorted(cast | {source.vote for source in config.sources if source.vote}))
    if len(labels) < 2:
        raise ConfigError(
            "at least two classes are needed",
            found=", ".join(labels) or "no vote",
            where="labels",
            do="check the votes, or name the classes under labels",
        )
    index: dict[str | None, int] = {None: -1} | {label: i for i, label in enumerate(labels)}
    votes = [[index[item.votes.get(name)] for name in names] for item in items]
    gold = [index.get(item.gold, -1) for item in items]
    unknown = sum(item.gold is not None and item.gold not in index for item in items)
    if unknown:
        notes.append(f"the gold label of {unknown} records is not one of the classes: ignored")
    return VoteTable([item.row for item in items], names, labels, votes, gold, notes)
