"""File formats: recognition from the column names, and conversion of rows to records.

Nothing is guessed silently: if no format fits, or more than one does, the error asks for `columns:` or `format:`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from rlhf.data.conversations import is_transcript, read_transcript, read_turns
from rlhf.data.records import (
    FIX_OR_DROP,
    BadRow,
    Comparison,
    Demonstration,
    Labelled,
    Messages,
    Prompt,
    Record,
    Text,
    check_comparison,
    check_demonstration,
    check_labelled,
    check_prompt,
    check_string,
    check_text,
)
from rlhf.errors import DataError

RecordKind = Literal["text", "demonstration", "comparison", "prompt", "document", "labelled"]
SourceRow = Mapping[str, Any]

# Kind of record -> format -> the columns that it needs. "document" is text or demonstration.
_CONVERSATION: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "transcript": ("transcript",),
}
_PAIR: dict[str, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "alpaca": ("instruction", "chosen", "rejected"),
    "implicit-preference": ("chosen", "rejected"),
}
FORMATS: dict[str, dict[str, tuple[str, ...]]] = {
    "text": {"text": ("text",)},
    "demonstration": _CONVERSATION,
    "document": {"text": ("text",)} | _CONVERSATION,
    "comparison": _PAIR,
    "labelled": {name: (*need, "label") for name, need in ({"text": ("text",)} | _CONVERSATION).items()},
    "prompt": {
        "prompt": ("prompt",),
        "messages": ("messages",),
        "alpaca": ("instruction",),
        "sharegpt": ("conversations",),
        "transcript": ("transcript",),
        "implicit-preference": ("chosen", "rejected"),
    },
}
# Formats that are accepted if `format` names them but not recognised, because their columns do not identify them.
_BY_NAME: dict[str, dict[str, tuple[str, ...]]] = {
    "comparison": {"transcript": ("chosen", "rejected")},
    "prompt": {"preference": ("prompt",), "prompt-completion": ("prompt",)},
}
# If one of these columns exists, it holds the prompt, and chosen and rejected hold responses only.
_PROMPT_COLUMNS = {"prompt", "instruction"}
_NOT_EXTRA = {"prompt", "chosen", "rejected", "instruction", "input", "preference", "margin"}


def recognise_format(columns: Iterable[str], kind: str, where: str = "") -> str:
    """Return the name of the format whose columns all exist.

    A format whose columns are a strict subset of another fitting format's is not considered.

    Args:
        columns: names of the columns that are not empty.
        kind: kind of record wanted.
        where: the source, for the message.
    Raises: DataError that lists the columns found and the known formats, if no format or more than one fits.
    """
    names = set(columns)
    fits = {name: set(need) for name, need in FORMATS[kind].items() if set(need) <= names}
    if names & _PROMPT_COLUMNS:
        fits.pop("implicit-preference", None)
    best = [name for name, need in fits.items() if not any(need < other for other in fits.values())]
    if len(best) == 1:
        return best[0]
    if best:
        raise DataError(
            f"several formats fit: {', '.join(best)}",
            found=f"columns {_listed(names)}",
            where=where,
            do=f"set format: to one of them (kind: {kind})",
        )
    raise _no_fit(names, kind, where)


def check_format(name: str, columns: Iterable[str], kind: str, where: str = "") -> str:
    """Return `name` if that format gives records of this kind and its columns exist. Raises: DataError otherwise."""
    known = FORMATS[kind] | _BY_NAME.get(kind, {})
    names = set(columns)
    if name not in known:
        raise DataError(
            f"format '{name}' cannot give a {kind}", where=where, do=f"use one of {', '.join(sorted(known))}"
        )
    missing = [column for column in known[name] if column not in names]
    if missing:
        raise DataError(
            f"format '{name}' needs the column(s) {', '.join(missing)}",
            found=f"columns {_listed(names)}",
            where=where,
            do=f"name the file's columns, e.g. columns: {{{missing[0]}: NAME_IN_THE_FILE}}",
        )
    return name


def describe_format(name: str, columns: Iterable[str], kind: str, *, recognised: bool) -> str:
    """Return a note: the format, the columns it was recognised from, and what happens to the other columns."""
    need = (FORMATS[kind] | _BY_NAME.get(kind, {}))[name]
    text = f"format {name}"
    if recognised:
        text += f" (recognised from column{'s' if len(need) > 1 else ''} {', '.join(repr(column) for column in need)})"
    used = set(need) | (_NOT_EXTRA if kind == "comparison" else {"input"} if name == "alpaca" else set())
    others = sorted(set(columns) - used)
    if others and kind != "prompt":
        text += f", {'kept beside' if kind == 'comparison' else 'not used'}: {', '.join(others)}"
    return text


def _no_fit(names: set[str], kind: str, where: str) -> DataError:
    known = "; ".join(f"{name} ({', '.join(need)})" for name, need in FORMATS[kind].items())
    ours = next(iter(FORMATS[kind].values()))[0]
    return DataError(
        f"no format of the kind '{kind}' fits",
        found=f"columns {_listed(names)}",
        where=where,
        do=f"known: {known}. Name the file's columns, e.g. columns: {{{ours}: NAME_IN_THE_FILE}}",
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def rename_columns(row: Any, columns: Mapping[str, str]) -> Any:
    """Return the row with columns renamed (contract name -> name in the file); a column of that name is replaced."""
    if not columns or not isinstance(row, Mapping):
        return row
    taken = set(columns) | set(columns.values())
    kept = {name: value for name, value in row.items() if name not in taken}
    return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def convert_row(row: SourceRow, format: str, kind: str, where: str) -> Record:
    """Convert one row to a checked record.

    Args:
        row: column -> value, with columns already renamed by `rename_columns`.
        format: a name that `recognise_format` or `check_format` returned for this kind.
        kind: kind of record wanted.
        where: place of the row, e.g. "data/x.jsonl row 118".
    Raises: BadRow (a DataError) with the reason, if the row breaks the record contract.
    """
    if kind == "labelled":
        if format == "text":
            content: str | Messages = check_string(_get(row, "text", where), "text", where, empty="empty text")
        else:
            content = _READERS[format](row, where)
        return check_labelled(Labelled(content, _labels(_get(row, "label", where), where), where))
    if format == "text":
        return check_text(Text(_get(row, "text", where), where))
    if kind == "comparison":
        return _comparison(row, format, where)
    if kind == "prompt":
        return check_prompt(Prompt(_prompt_only(row, format, where), where, dict(row)))
    return check_demonstration(Demonstration(_READERS[format](row, where), where))


def _comparison(row: SourceRow, format: str, where: str) -> Comparison:
    if format == "implicit-preference" or (format == "transcript" and row.get("prompt") is None):
        prompt, chosen, rejected = _shared_prompt(row, format, where)
    else:
        prompt = (
            _instruction(row, where) if format == "alpaca" else _prompt(row, where, transcript=format == "transcript")
        )
        chosen, rejected = (_reply(row, side, prompt, where) for side in ("chosen", "rejected"))
    preference = _number(row.get("preference"))
    return check_comparison(
        Comparison(
            prompt,
            chosen,
            rejected,
            where,
            preference=1.0 if preference is None else preference,
            margin=_number(row.get("margin")),
            extra={name: value for name, value in row.items() if name not in _NOT_EXTRA},
        )
    )


def _shared_prompt(row: SourceRow, format: str, where: str) -> tuple[Messages, str, str]:
    """Return prompt and responses of two whole conversations: all turns but the last are the prompt."""
    sides: list[Messages] = []
    for name in ("chosen", "rejected"):
        value = _get(row, name, where)
        if isinstance(value, str) and not value.strip():
            raise BadRow(f"empty {name}", f"{name} is empty", where=where)
        if isinstance(value, str) and not is_transcript(value):
            raise BadRow(
                "no prompt",
                f"'{name}' is plain text and there is no prompt",
                where=where,
                do=f"name the prompt column, e.g. columns: {{prompt: NAME_IN_THE_FILE}}; otherwise {FIX_OR_DROP}",
            )
        turns = read_transcript(value, where) if isinstance(value, str) else read_turns(value, name, where)
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            raise BadRow("role order", f"'{name}' must be a prompt and then an assistant turn", where=where)
        sides.append(turns)
    if sides[0][:-1] != sides[1][:-1]:
        raise BadRow("prompts differ", "'chosen' and 'rejected' do not share one prompt", where=where)
    return sides[0][:-1], sides[0][-1]["content"], sides[1][-1]["content"]


def _prompt_only(row: SourceRow, format: str, where: str) -> Messages:
    """Return the messages up to the last user turn."""
    if format == "implicit-preference":
        return _shared_prompt(row, format, where)[0]
    if format == "alpaca":
        return _instruction(row, where)
    if format in ("prompt", "preference", "prompt-completion"):
        return _prompt(row, where)
    messages = _READERS[format](row, where)
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def _prompt_completion(row: SourceRow, where: str) -> Messages:
    prompt, completion = _prompt(row, where), _get(row, "completion", where)
    if isinstance(completion, list | tuple):
        return prompt + read_turns(completion, "completion", where)
    return [*prompt, {"role": "assistant", "content": completion}]


_READERS: dict[str, Callable[[SourceRow, str], Messages]] = {
    "messages": lambda row, where: read_turns(_get(row, "messages", where), "messages", where),
    "sharegpt": lambda row, where: read_turns(_get(row, "conversations", where), "conversations", where),
    "transcript": lambda row, where: read_transcript(_get(row, "transcript", where), where),
    "prompt-completion": _prompt_completion,
    "alpaca": lambda row, where: [
        *_instruction(row, where),
        {"role": "assistant", "content": _get(row, "output", where)},
    ],
}


def _prompt(row: SourceRow, where: str, *, transcript: bool = False) -> Messages:
    value = _get(row, "prompt", where)
    if isinstance(value, list | tuple):
        return read_turns(value, "prompt", where)
    text = check_string(value, "prompt", where, empty="empty prompt")
    if transcript:
        messages = read_transcript(text, where)
        open_turn = messages[-1]["role"] == "assistant" and not messages[-1]["content"]
        return messages[:-1] if open_turn else messages
    if is_transcript(text):
        raise BadRow(
            "transcript in prompt",
            "the prompt is a Human/Assistant transcript",
            where=where,
            do=f"set format: transcript (or map it: columns: {{transcript: prompt}}); otherwise {FIX_OR_DROP}",
        )
    return [{"role": "user", "content": text}]


def _instruction(row: SourceRow, where: str) -> Messages:
    """Return the prompt of an Alpaca row: the instruction and, after a blank line, the input if there is one."""
    text = check_string(_get(row, "instruction", where), "instruction", where, empty="empty prompt")
    given = row.get("input")
    if given is None or given == "":
        return [{"role": "user", "content": text}]
    if not isinstance(given, str):
        check_string(given, "input", where, empty="empty prompt")
    return [{"role": "user", "content": f"{text}\n\n{given}" if given.strip() else text}]


def _reply(row: SourceRow, name: str, prompt: Messages, where: str) -> Any:
    """Return the text of a response given as text, as an assistant turn, or as the prompt and an assistant turn."""
    value = _get(row, name, where)
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        value = read_transcript(value, where)
    if not isinstance(value, list | tuple):
        return value
    turns = read_turns(value, name, where)
    rest = turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
    if len(rest) != 1 or rest[0]["role"] != "assistant":
        if rest and rest is turns and rest[0]["role"] != "assistant":
            raise BadRow("prompts differ", f"'{name}' does not begin with the row's prompt", where=where)
        raise BadRow("role order", f"'{name}' must be one assistant turn after the prompt", where=where)
    return rest[0]["content"]


def _get(row: SourceRow, name: str, where: str) -> Any:
    if name not in row:
        raise BadRow(f"missing '{name}'", f"the row has no '{name}'", found=_listed(map(str, row)), where=where)
    return row[name]


def _labels(value: Any, where: str) -> dict[str, float]:
    """Return label -> probability from one label, a list of labels that hold, or {label: probability}.

    A cell of a table holds the last two as JSON text.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = json.loads(value)
        except ValueError as exc:
            raise BadRow("broken label", f"'label' is not valid JSON: {exc}", found=value[:40], where=where) from None
    if isinstance(value, Mapping):
        return {str(name): _number(p) for name, p in value.items() if p is not None}
    names = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(name, str | int) and not isinstance(name, bool) for name in names):
        what = "'label' must be a label (text or a whole number), a list of labels, or a mapping label -> probability"
        raise BadRow("broken label", what, found=f"{value!r:.40}", where=where)
    return {str(name): 1.0 for name in names}


def _number(value: Any) -> Any:
    """Return the number in a table cell, None for an empty cell, any other value unchanged (it is checked later)."""
    if isinstance(value, str):
        try:
            return float(value) if value.strip() else None
        except ValueError:
            return value
    return value
