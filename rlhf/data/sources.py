"""Reading of data files, saved data set folders and hub data sets into one checked, mixed and shuffled set of records.

`load_records` is the entry point. Rows are numbered from 1: the line of a JSONL file, the item of a JSON list, the data
row of a table (the header is not counted), the paragraph of a text file.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf.config.sections import Source
from rlhf.data.formats import RecordKind, check_format, convert_row, describe_format, recognise_format, rename_columns
from rlhf.data.records import MAX_ROWS_SHOWN, BadRow, Record, RecordSet, count_reasons, describe_bad_rows
from rlhf.data.splits import drop_repeats, mix_sources, records_fingerprint, shuffle_records
from rlhf.errors import DataError, combine_errors

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_NUMBERED = re.compile(r"column (\d+)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SAVED = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class _Table:
    """The rows of a source, each with its number, and a remark for the notes."""

    rows: list[tuple[int, Any]]
    remark: str = ""


@dataclass
class _Loaded:
    """One source after conversion to records."""

    path: str
    description: str
    records: list[Record] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    duplicates: int = 0
    limited: bool = False


def load_records(
    kind: RecordKind, sources: Sequence[Source], *, seed: int, on_bad_row: Literal["error", "drop"], deduplicate: bool
) -> RecordSet:
    """Read all sources and return their records: converted, checked, deduplicated, limited, mixed and shuffled.

    With equal weights every record is used. Otherwise each source contributes its share of the largest total that needs
    no record twice: the source that is smallest for its weight is used completely, and the others are sampled. A source
    contributes at least one record. Duplicates are exact, over all sources; the first one is kept.

    Args:
        kind: "text", "demonstration", "comparison", "prompt", "labelled", or "document" (text or demonstration).
        sources: at least one.
        seed: seed of the samples and of the final order.
        on_bad_row: "error" reports the bad rows of all sources at once; "drop" counts them by reason.
        deduplicate: drop exact duplicates.
    Raises: DataError that lists everything that cannot be read, recognised or used.
    """
    loaded: list[_Loaded] = []
    problems: list[str] = []
    for source in sources:
        try:
            loaded.append(_load(kind, source))
        except DataError as exc:
            problems.append(str(exc))
    bad = [row for part in loaded for row in part.bad]
    if on_bad_row == "error":
        problems += describe_bad_rows(bad)
    else:
        empty = [part for part in loaded if not part.records]
        problems += [f"{p.path}: no record is left ({count_reasons(p.bad)}; first: {p.bad[0]})" for p in empty]
    error = combine_errors(DataError, problems)
    if error:
        raise error

    if deduplicate:
        for part, kept in zip(loaded, drop_repeats([part.records for part in loaded]), strict=True):
            part.duplicates, part.records = len(part.records) - len(kept), kept
    for i, (source, part) in enumerate(zip(sources, loaded, strict=True)):
        if source.limit is not None and source.limit < len(part.records):
            part.records = shuffle_records(part.records, f"{seed} limit {i}")[: source.limit]
            part.limited = True
    used = mix_sources([part.records for part in loaded], [source.weight for source in sources], seed)
    notes = tuple(_note(part, len(take), len(loaded)) for part, take in zip(loaded, used, strict=True))
    records = tuple(shuffle_records([record for take in used for record in take], f"{seed} order"))
    dropped = Counter(row.reason for row in bad)
    dropped["duplicate"] = sum(part.duplicates for part in loaded)
    return RecordSet(records, records_fingerprint(records), notes, {reason: n for reason, n in dropped.items() if n})


def _load(kind: RecordKind, source: Source) -> _Loaded:
    """Read one source and convert its rows; bad rows are collected."""
    rows, columns, remark = read_rows(source)
    if source.format == "auto":
        format = recognise_format(columns, kind, source.path)
    else:
        format = check_format(source.format, columns, kind, source.path)
    description = describe_format(format, columns, kind, recognised=source.format == "auto")
    result = _Loaded(source.path, description + (f", {remark}" if remark else ""))
    for number, row in rows:
        where = f"{source.path} row {number}"
        try:
            result.records.append(convert_row(check_object(row, where), format, kind, where))
        except BadRow as exc:
            result.bad.append(exc)
    return result


def read_rows(source: Source) -> tuple[list[tuple[int, Any]], set[str], str]:
    """Read one source without checking its rows.

    Returns: the rows with their numbers, columns renamed as `source.columns` says; the names of the columns that are
        not empty; a remark on how the file was read, or "".
    Raises: DataError if the source cannot be read, has no rows, or lacks a column that `columns` names.
    """
    table = _read(source)
    if not table.rows:
        raise DataError("the source has no rows", where=source.path, do="name another file")
    rows = [(number, rename_columns(row, source.columns)) for number, row in table.rows]
    raw = {name for _, row in table.rows if isinstance(row, Mapping) for name in row}
    for ours, theirs in source.columns.items():
        if theirs not in raw:
            raise DataError(
                f"columns: {ours}: {theirs} names a column that does not exist",
                where=source.path,
                found=f"columns {', '.join(sorted(raw))}",
                do=_near(theirs, raw) or "use one of these",
            )
    columns = {name for _, row in rows if isinstance(row, Mapping) for name, value in row.items() if value is not None}
    return rows, columns, table.remark


def check_object(row: Any, where: str) -> Mapping[str, Any]:
    """Return the row if it is a mapping column -> value. Raises: BadRow if it is not."""
    if not isinstance(row, Mapping):
        what = "the row is not an object with named columns"
        raise BadRow("not an object", what, found=f"{row!r:.40}", where=where)
    return row


def _note(part: _Loaded, used: int, sources: int) -> str:
    text = f"{part.path}: {part.description}, {len(part.records)} records"
    if part.limited:
        text += " (limit)"
    if part.bad:
        text += f", {len(part.bad)} dropped ({count_reasons(part.bad)})"
    if part.duplicates:
        text += f", {part.duplicates} duplicate{'s' if part.duplicates > 1 else ''}"
    if sources > 1:
        text += f", {used} used" + (" (all)" if used == len(part.records) else " (by weight)")
    return text


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(source: Source) -> _Table:
    path = Path(source.path)
    if path.is_dir():
        return _read_saved(path, source)
    if path.is_file():
        return _read_file(path, source)
    local = path.name.removesuffix(".gz").endswith(SUFFIXES) or (path.parent.is_dir() and not source.revision)
    if _HUB_ID.fullmatch(source.path) and not local:
        return _read_hub(source)
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    wanted = path.name if folder == path.parent else path.relative_to(folder).parts[0]
    near = _near(wanted, names) or f"in {folder}: {', '.join(sorted(names)[:8]) or 'nothing'}"
    hub = "; a hub id needs revision: COMMIT" if _HUB_ID.fullmatch(source.path) else ""
    raise DataError("no such file or folder", where=source.path, do=near + hub)


def _near(name: str, names: Sequence[str] | set[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def _read_file(path: Path, source: Source) -> _Table:
    where, zipped = source.path, path.suffix == ".gz"
    suffix = Path(path.stem).suffix if zipped else path.suffix
    if suffix not in SUFFIXES or (zipped and suffix == ".parquet"):
        raise DataError(
            f"unknown file type '{path.suffix}'",
            where=where,
            do=f"use one of {', '.join(SUFFIXES)}; text files may be gzipped (.gz)",
        )
    try:
        if suffix == ".parquet":
            import pyarrow.parquet  # type: ignore[import-untyped]

            return _Table(list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)))
        raw = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    except Exception as exc:  # permissions, a gzip stream cut short, pyarrow's own errors
        do = "check its permissions; if it is truncated, download it again"
        raise DataError(f"cannot be read as {suffix}{'.gz' * zipped}: {exc}", where=where, do=do) from None
    text = _decode(raw, where).removeprefix("\ufeff")
    if not text.strip():
        raise DataError("the file is empty", where=where, do="name another file")
    if suffix == ".jsonl":
        return _Table(_json_lines(text, where))
    if suffix == ".json":
        return _json(text, where)
    if suffix == ".txt" and not source.columns:
        paragraphs = [p.strip("\n") for p in re.split(r"\n(?:[ \t]*\n)+", text.replace("\r\n", "\n")) if p.strip()]
        return _Table([(i, {"text": p}) for i, p in enumerate(paragraphs, 1)], "paragraphs between blank lines")
    return _delimited(text, "," if suffix == ".csv" else "\t", source)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        row = raw.count(b"\n", 0, exc.start) + 1
        raise DataError(
            f"invalid UTF-8 at byte {exc.start}",
            found=f"0x{raw[exc.start]:02x}",
            where=f"{where} row {row}",
            do="save the file as UTF-8, e.g. with iconv -f latin1 -t utf-8",
        ) from None


def _json_lines(text: str, where: str) -> list[tuple[int, Any]]:
    rows: list[tuple[int, Any]] = []
    problems: list[str] = []
    # Not splitlines: U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except (ValueError, RecursionError) as exc:
                problems.append(str(_json_error(exc, f"{where} row {number}", line)))
    if problems and text.lstrip().startswith("["):
        raise DataError("the file holds a JSON list, not JSON lines", where=where, do="rename it to .json")
    if len(problems) > MAX_ROWS_SHOWN:
        problems[MAX_ROWS_SHOWN:] = [f"and {len(problems) - MAX_ROWS_SHOWN} more corrupt rows"]
    error = combine_errors(DataError, problems)
    if error:
        raise error
    return rows


def _json_error(exc: Exception, where: str, line: str) -> DataError:
    column = exc.colno if isinstance(exc, json.JSONDecodeError) else 0
    what = f"corrupt JSON at column {column}: {exc.msg}" if isinstance(exc, json.JSONDecodeError) else str(exc)
    found = line[max(0, column - 15) : column + 15].strip()
    return DataError(what, found=found, where=where, do="repair or remove the line")


def _json(text: str, where: str) -> _Table:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as exc:
        if exc.msg == "Extra data":
            return _Table(_json_lines(text, where), "JSON lines in a .json file")
        line = text.split("\n")[exc.lineno - 1]
        raise _json_error(exc, f"{where} line {exc.lineno}", line) from None
    except (ValueError, RecursionError) as exc:
        raise _json_error(exc, where, "") from None
    if isinstance(value, list):
        return _Table(list(enumerate(value, 1)))
    if isinstance(value, dict) and "\n" not in text.strip():
        return _Table([(1, value)], "JSON lines in a .json file")
    found = f"a JSON {type(value).__name__}"
    raise DataError(
        "the file must hold a list of rows", found=found, where=where, do="write one JSON list, or JSON lines"
    )


def _delimited(text: str, delimiter: str, source: Source) -> _Table:
    """Read CSV with RFC 4180 quotes, or TSV without quotes; 'column N' in `source.columns` means: no header row."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        lines = [cells for cells in reader if cells]
    except csv.Error as exc:
        do = "quote cells that hold commas, quotes or line breaks, and double the quotes inside"
        raise DataError(f"broken table: {exc}", where=f"{source.path} line {reader.line_num}", do=do) from None
    headless = any(_NUMBERED.fullmatch(name) for name in source.columns.values()) and not (
        set(source.columns.values()) & set(lines[0])
    )
    names = [f"column {i + 1}" for i in range(len(lines[0]))] if headless else [name.strip() for name in lines.pop(0)]
    if len(set(names)) < len(names):
        raise DataError("two columns have the same name", found=", ".join(names), where=source.path, do="rename one")
    rows: list[tuple[int, Any]] = []
    for number, cells in enumerate(lines, 1):
        fits = len(cells) == len(names)
        rows.append(
            (number, dict(zip(names, cells, strict=True)) if fits else f"{len(cells)} cells for {len(names)} columns")
        )
    return _Table(rows, "no header row" if headless else "")


def _read_saved(path: Path, source: Source) -> _Table:
    """Read a folder written by datasets.save_to_disk."""
    if not any((path / name).is_file() for name in _SAVED):
        files = sorted(
            str(f.relative_to(path)) for f in path.rglob("*") if f.name.removesuffix(".gz").endswith(SUFFIXES)
        )
        do = f"name a file in it: {', '.join(files[:8])}" if files else "name a data file; this folder holds none"
        raise DataError("the folder was not written by datasets.save_to_disk", where=source.path, do=do)
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as exc:
        raise DataError(f"the saved data set cannot be read: {exc}", where=source.path, do="save it again") from None
    if isinstance(data, Mapping):
        if source.split not in data:
            raise DataError(
                f"no split '{source.split}'", where=source.path, do=f"set split: to one of {', '.join(data)}"
            )
        data = data[source.split]
    return _Table(list(enumerate(map(dict, data), 1)))


def _read_hub(source: Source) -> _Table:
    if source.revision is None:
        raise DataError(
            "not a file or folder here, and a hub data set needs a revision, so that the run can be repeated",
            where=source.path,
            do="set revision: to a commit of the data set, or correct the path",
        )
    import datasets

    try:
        data = datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except Exception as exc:
        raise DataError(
            "the hub data set cannot be loaded",
            found=f"{type(exc).__name__}: {str(exc)[:300]}",
            where=f"{source.path} (split {source.split}, name {source.name}, revision {source.revision})",
            do="check id, split, name, revision and network, or save it with datasets.save_to_disk and name the folder",
        ) from None
    return _Table(list(enumerate(map(dict, data), 1)))
