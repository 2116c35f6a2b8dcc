"""Files, folders and hub ids; mixtures; the messages when something is wrong."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rlhf.config.sections import Source
from rlhf.data.records import Comparison, Demonstration, Prompt, RecordSet, Text
from rlhf.data.sources import load_records
from rlhf.errors import DataError

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i} – “é” \u2028 done", "id": i} for i in range(12)]


def load(path: Path | str, kind: Any = "demonstration", *, on_bad_row: Any = "error", **source: Any) -> RecordSet:
    sources = [Source(path=str(path), **source)]
    return load_records(kind, sources, seed=0, on_bad_row=on_bad_row, deduplicate=True)


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(separator: str) -> str:
    cells = [list(ROWS[0]), *([str(v) for v in row.values()] for row in ROWS)]
    return "\r\n".join(separator.join(row) for row in cells) + "\r\n"


FILES = {
    "x.jsonl": lines(ROWS),
    "x.json": json.dumps(ROWS, indent=1),
    "lines.json": lines(ROWS),
    "one.json": lines(ROWS[:1]),
    "bom.jsonl": "\ufeff" + lines(ROWS),
    "blank.jsonl": "\n" + lines(ROWS).replace("\n", "\r\n\r\n"),
    "x.csv": table(","),
    "x.tsv": table("\t"),
    "bom.csv": "\ufeff" + table(","),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_every_text_file_gives_the_same_records(tmp_path: Path, name: str, zipped: bool) -> None:
    path = tmp_path / (name + ".gz" * zipped)
    raw = FILES[name].encode()
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    loaded = load(path)
    expected = ROWS[:1] if name == "one.json" else ROWS
    said = {r.messages[1]["content"] for r in loaded.records if isinstance(r, Demonstration)}
    assert said == {row["completion"] for row in expected}
    assert len(loaded) == len(expected)
    assert f"{path}: format prompt-completion (recognised from columns 'prompt', 'completion')" in loaded.notes[0]
    assert f"{len(expected)} records" in loaded.notes[0]
    assert ("JSON lines in a .json file" in loaded.notes[0]) == name.startswith(("lines", "one"))


def test_parquet_and_saved_folders(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(5)
    ]
    (tmp_path / "x.jsonl").write_text(lines(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": data.select([0]), "test": data}).save_to_disk(tmp_path / "split")
    prints = {load(tmp_path / name).fingerprint for name in ("x.jsonl", "x.parquet", "plain")}
    assert prints == {load(tmp_path / "split", split="test").fingerprint}
    with pytest.raises(DataError, match=r"split: no split 'dev'; set split: to one of train, test"):
        load(tmp_path / "split", split="dev")


def test_rows_are_numbered_by_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n" + lines(ROWS[:2]))
    assert {r.where for r in load(path).records} == {f"{path} row 2", f"{path} row 3"}


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"One\r\nline.\r\n\r\n  \r\nTwo.\n\n\nTwo.\n")
    loaded = load(path, "text")
    assert {r.text for r in loaded.records if isinstance(r, Text)} == {"One\nline.", "Two."}
    assert loaded.dropped == {"duplicate": 1}


def test_table_without_header_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "ratings.txt"
    path.write_text('1\t0.5\t"Fine film\n2\t-1\tNA\n3\t1\ttoo\tmany\n')
    loaded = load(path, "prompt", columns={"prompt": "column 3"}, on_bad_row="drop")
    assert {r.messages[0]["content"]: r.record["column 2"] for r in loaded.records if isinstance(r, Prompt)} == {
        '"Fine film': "0.5",
        "NA": "-1",
    }
    assert "no header row" in loaded.notes[0]
    assert loaded.dropped == {"not an object": 1}


def test_columns_are_renamed(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(lines([{"question": "q", "a": "yes", "b": "no", "prompt": "shadowed", "who": 3}]))
    record = load(
        tmp_path / "x.jsonl", "comparison", columns={"prompt": "question", "chosen": "a", "rejected": "b"}
    ).records[0]
    assert isinstance(record, Comparison)
    assert (record.prompt[0]["content"], record.chosen, record.rejected, record.extra) == ("q", "yes", "no", {"who": 3})


# --- order, limits, mixtures -----------------------------------------------------------------------------------------


def test_order_is_seeded_and_independent_of_the_place(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text(lines(ROWS))
    one, two = (load(tmp_path / folder / "x.jsonl") for folder in ("a", "b"))
    other = load_records(
        "demonstration", [Source(path=str(tmp_path / "a/x.jsonl"))], seed=1, on_bad_row="error", deduplicate=True
    )
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert [r.where for r in one.records] != [f"{tmp_path / 'a/x.jsonl'} row {i}" for i in range(1, 13)]


def test_limit(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(lines(ROWS))
    loaded = load(tmp_path / "x.jsonl", limit=3)
    assert len(loaded) == 3
    assert "3 records (limit)" in loaded.notes[0]
    assert {r.where.split()[-1] for r in loaded.records} != {"1", "2", "3"}


def test_mixture_is_weighted_and_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"text": f"a{i}"} for i in range(10)]))
    (tmp_path / "b.jsonl").write_text(lines([{"text": f"b{i}"} for i in range(50)] + [{"text": "a1"}]))
    sources = [Source(path=str(tmp_path / "a.jsonl")), Source(path=str(tmp_path / "b.jsonl"), weight=2)]
    loaded = load_records("text", sources, seed=0, on_bad_row="error", deduplicate=True)
    assert Counter(r.text[0] for r in loaded.records if isinstance(r, Text)) == {"a": 10, "b": 20}
    assert "10 used (all)" in loaded.notes[0]
    assert "50 records, 1 duplicate, 20 used (by weight)" in loaded.notes[1]


# --- errors ----------------------------------------------------------------------------------------------------------

GOOD = lines(ROWS[:2]).encode()
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty.jsonl": (b"", "the file is empty; "),
    "blank.csv": (b"\xef\xbb\xbf \n", "the file is empty; "),
    "empty.jsonl.gz": (gzip.compress(b""), "the file is empty; "),
    "header.csv": (b"prompt,completion\n", "the source has no rows; "),
    "list.json": (b"[]", "the source has no rows; "),
    "corrupt.jsonl": (GOOD + b'{"prompt": "a", }\n', r"row 3: corrupt JSON at column \d+: .*prompt.*; repair"),
    "cut.json": (b'[\n{"prompt": "a"},\n{"prom', r"line 3: corrupt JSON at column \d+"),
    "list.jsonl": (b'[\n{"prompt": "a"}\n]', "a JSON list, not JSON lines; rename it to .json"),
    "object.json": (b'{"data":\n []}', r"must hold a list of rows \(found: a JSON dict\); "),
    "latin.jsonl": (GOOD + '{"prompt": "é"}'.encode("latin-1"), rf"row 3: invalid UTF-8 at byte {len(GOOD) + 12}.*;"),
    "bom.jsonl": (b"\xef\xbb\xbf" + GOOD + b"\xff", f"row 3: invalid UTF-8 at byte {len(GOOD) + 3}"),
    "utf16.csv": ("a,b".encode("utf-16"), "row 1: invalid UTF-8 at byte 0"),
    "short.jsonl.gz": (gzip.compress(GOOD)[:-12], "cannot be read as .jsonl.gz: .*; .*download it again"),
    "plain.jsonl.gz": (GOOD, "cannot be read as .jsonl.gz: .*; "),
    "broken.parquet": (b"PAR1xx", "cannot be read as .parquet: .*; "),
    "quote.csv": (b'prompt,completion\n"a" b,c\n', "line 2: broken table: .*; quote cells"),
    "twice.csv": (b"prompt,prompt\na,b\n", r"two columns have the same name \(found: prompt, prompt\); "),
    "what.xlsx": (b"x", "unknown file type '.xlsx'; use one of .jsonl"),
    "other.jsonl": (b'{"a": 1}\n', r"no format.*found: columns a\).*; known: "),
    "words.jsonl": (b'"a"\n3\n', "no format"),
}


@pytest.mark.parametrize("on_bad_row", ["error", "drop"])
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_stop(tmp_path: Path, name: str, on_bad_row: str) -> None:
    raw, words = DAMAGED[name]
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(DataError, match=words) as caught:
        load(path, on_bad_row=on_bad_row)
    assert str(caught.value).startswith(str(path))


def test_missing_files_name_their_neighbours(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"pair.jsonl: no such file or folder; did you mean 'pairs.jsonl'\?"):
        load(tmp_path / "pair.jsonl")
    with pytest.raises(DataError, match=r"no such file or folder; in .*: pairs.jsonl"):
        load(tmp_path / "nothing-like-it.csv")
    with pytest.raises(DataError, match=r"not written by datasets.save_to_disk; name a file in it: pairs.jsonl"):
        load(tmp_path)


def test_a_mistyped_relative_path_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs").mkdir()
    for path in ("data/pair", "data/pair.jsonl"):
        with pytest.raises(DataError, match="no such file or folder; did you mean 'pairs'"):
            load(path)


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"owner/name: .*needs a revision.*; set revision: "):
        load("owner/name")
    asked: list[Any] = []

    def fake(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        if kwargs["split"] == "dev":
            raise ConnectionError("no route to host")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert len(load("owner/name", revision="abc", name="sub", split="test")) == len(ROWS)
    assert asked == [(("owner/name", "sub"), {"split": "test", "revision": "abc"})]
    with pytest.raises(DataError, match=r"owner/name \(split dev.*cannot be loaded .*no route to host\); check id"):
        load("owner/name", revision="abc", split="dev")


def test_unknown_column(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(lines([{"question": "q"}]))
    with pytest.raises(
        DataError, match=r"x.jsonl: columns: prompt: questoin .*found: columns question\); did you mean 'question'"
    ):
        load(tmp_path / "x.jsonl", "prompt", columns={"prompt": "questoin"})


def bad_rows(n: int) -> list[dict[str, Any]]:
    return ROWS[:3] + [{"prompt": "q", "completion": value} for value in ("", None, True)] * n


def test_bad_rows_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(lines(bad_rows(9)))
    with pytest.raises(DataError) as caught:
        load(path)
    message = str(caught.value)
    assert message.count(f"{path} row ") == 20
    assert "row 4: turn 2 (assistant) is empty" in message
    assert "and 7 more bad rows; 27 bad rows in all (" in message
    assert message.endswith("data.on_bad_row=drop")


def test_one_bad_row_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(lines([*ROWS, {"prompt": "", "completion": "a"}]))
    with pytest.raises(
        DataError, match=r"^.*x.jsonl row 13: prompt is empty; fix or remove the row, or set data.on_bad_row=drop$"
    ):
        load(path)


def test_bad_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(lines([*bad_rows(2), ROWS[0]]))
    loaded = load(path, on_bad_row="drop")
    assert len(loaded) == 3
    assert loaded.dropped == {"empty response": 2, "turn 2 (assistant) is not text": 4, "duplicate": 1}
    assert "6 dropped (4 turn 2 (assistant) is not text, 2 empty response), 1 duplicate" in loaded.notes[0]


def test_nothing_left(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(lines(bad_rows(1)[3:]))
    with pytest.raises(DataError, match=r"no record is left .*first: .*row 1: "):
        load(path, on_bad_row="drop")


def test_problems_of_all_sources_at_once(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(lines([{"prompt": "", "completion": "a"}]))
    sources = [Source(path=str(tmp_path / name)) for name in ("x.jsonl", "y.jsonl", "z.jsonl")]
    with pytest.raises(DataError, match=r"^3 problems") as caught:
        load_records("demonstration", sources, seed=0, on_bad_row="error", deduplicate=True)
    assert all(f"{name}.jsonl" in str(caught.value) for name in "xyz")


def test_duplicates_may_stay(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(lines(ROWS[:1] * 3))
    sources = [Source(path=str(tmp_path / "x.jsonl"))]
    assert len(load_records("demonstration", sources, seed=0, on_bad_row="error", deduplicate=False)) == 3


def test_importing_is_cheap() -> None:
    code = (
        "import sys, rlhf.data.sources, rlhf.data.render; "
        "sys.exit(', '.join({'torch', 'datasets', 'transformers', 'pyarrow', 'pandas'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
