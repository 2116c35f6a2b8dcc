"""Labelled records: three ways to write a label, any content, and what the tokens of a record end with."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.sections import Data, Source
from rlhf.console import Console
from rlhf.data.formats import convert_row, describe_format, recognise_format
from rlhf.data.records import BadRow, Labelled, RecordSet, check_labelled
from rlhf.data.render import Renderer
from rlhf.data.sources import load_records
from rlhf.data.splits import drop_repeats, group_keys, record_content, records_fingerprint, split_records
from rlhf.data.tokenize import tokenize_labelled
from rlhf.errors import DataError

W = "data/x.jsonl row 118"
U = {"role": "user", "content": "hi"}
A = {"role": "assistant", "content": "hello"}
TALK = [U, A]

LABELS: list[tuple[Any, dict[str, float]]] = [
    ("spam", {"spam": 1.0}),
    (" spam", {" spam": 1.0}),  # a label is what it says
    ("3", {"3": 1.0}),
    (3, {"3": 1.0}),
    (0, {"0": 1.0}),
    ([], {}),
    (["spam"], {"spam": 1.0}),
    (["spam", 2], {"spam": 1.0, "2": 1.0}),
    (("spam", "rude"), {"spam": 1.0, "rude": 1.0}),
    ({"spam": 0.25, "rude": 1}, {"spam": 0.25, "rude": 1}),
    ({"spam": 0.25, "rude": None}, {"spam": 0.25}),  # columns of a table that one row does not fill
    ({}, {}),
    ("[]", {}),
    ('["spam", "rude"]', {"spam": 1.0, "rude": 1.0}),
    ("[1, 2]", {"1": 1.0, "2": 1.0}),
    (' {"spam": 0.25, "rude": 0.75}', {"spam": 0.25, "rude": 0.75}),
    ({"spam": "0.25"}, {"spam": 0.25}),
]


@pytest.mark.parametrize(("value", "labels"), LABELS)
def test_the_forms_of_a_label(value: Any, labels: dict[str, float]) -> None:
    assert convert_row({"text": "a", "label": value}, "text", "labelled", W) == Labelled("a", labels, W)


BAD: list[tuple[str, Any, str]] = [
    ("boolean", True, "broken label"),
    ("boolean in a list", ["spam", False], "broken label"),
    ("nothing", None, "broken label"),
    ("fraction", 0.5, "broken label"),
    ("list in a list", [["spam"]], "broken label"),
    ("mapping in a list", [{"spam": 1}], "broken label"),
    ("cut list", '["spam"', "broken label"),
    ("cut mapping", '{"spam": 0.5', "broken label"),
    ("boolean in a cell", "[true]", "broken label"),
    ("blank", "", "empty label"),
    ("blanks", "  ", "empty label"),
    ("blank in a list", ["spam", ""], "empty label"),
    ("blank in a mapping", {"": 1.0}, "empty label"),
    ("half a surrogate pair", "a\ud83d", "broken unicode"),
    ("above 1", {"spam": 1.2}, "probability outside [0, 1]"),
    ("below 0", {"spam": -0.1}, "probability outside [0, 1]"),
    ("no number", {"spam": "much"}, "probability outside [0, 1]"),
    ("nan", {"spam": float("nan")}, "probability outside [0, 1]"),
    ("truth as a probability", {"spam": True}, "probability outside [0, 1]"),
]


@pytest.mark.parametrize(("value", "reason"), [pytest.param(v, r, id=name) for name, v, r in BAD])
def test_a_label_that_is_none_says_where_why_and_what_to_do(value: Any, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        convert_row({"text": "a", "label": value}, "text", "labelled", W)
    assert caught.value.reason == reason
    assert str(caught.value).startswith(f"{W}: ")
    assert caught.value.found or reason == "empty label"
    assert "data.on_bad_row=drop" in caught.value.do


def test_a_row_without_its_label_is_refused() -> None:
    with pytest.raises(BadRow, match=r"the row has no 'label' \(found: text\)"):
        convert_row({"text": "a"}, "text", "labelled", W)


# What the labels are about

CONTENTS: list[tuple[str, dict[str, Any], Any]] = [
    ("text", {"text": "a"}, "a"),
    ("messages", {"messages": TALK}, TALK),
    ("messages", {"messages": [U]}, [U]),
    (
        "messages",
        {"messages": [{"role": "system", "content": "s"}, *TALK, U]},
        [{"role": "system", "content": "s"}, *TALK, U],
    ),
    ("messages", {"messages": json.dumps(TALK)}, TALK),
    ("prompt-completion", {"prompt": "hi", "completion": "hello"}, TALK),
    ("prompt-completion", {"prompt": [U], "completion": [A]}, TALK),
    ("alpaca", {"instruction": "hi", "input": "", "output": "hello"}, TALK),
    ("sharegpt", {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, TALK),
    ("transcript", {"transcript": "\n\nHuman: hi\n\nAssistant: hello"}, TALK),
]


@pytest.mark.parametrize(("name", "row", "said"), CONTENTS)
def test_any_content_can_have_a_label(name: str, row: dict[str, Any], said: Any) -> None:
    labelled_row = row | {"label": "spam", "id": 7}
    assert recognise_format(labelled_row, "labelled") == name
    assert convert_row(labelled_row, name, "labelled", W) == Labelled(said, {"spam": 1.0}, W)
    told = describe_format(name, labelled_row, "labelled", recognised=True)
    assert told.startswith(f"format {name} (recognised from columns ")
    assert "'label'" in told
    assert told.endswith(", not used: id") or name == "alpaca"


@pytest.mark.parametrize("row", [row for _, row, _ in CONTENTS])
def test_without_a_label_column_no_format_fits(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"x.csv: no format.*known: text \(text, label\); .*columns: \{text: NAME"):
        recognise_format(row, "labelled", "x.csv")


BROKEN: list[tuple[Any, str]] = [
    (" ", "empty text"),
    ("a\ud83d", "broken unicode"),
    ([], "empty prompt"),
    ([A], "role order"),
    ([U, U], "role order"),
    ([{"role": "system", "content": "s"}], "role order"),
    ([U, {"role": "tool", "content": "x"}], "unknown role"),
    ([U, A | {"content": ""}], "empty response"),
]


@pytest.mark.parametrize(("said", "reason"), BROKEN)
def test_a_malformed_content_is_refused(said: Any, reason: str) -> None:
    row = {"messages": said} if isinstance(said, list) else {"text": said}
    with pytest.raises(BadRow) as caught:
        convert_row(row | {"label": "spam"}, next(iter(row)), "labelled", W)
    assert caught.value.reason == reason


def load(path: Path, **options: Any) -> RecordSet:
    settings: dict[str, Any] = {"seed": 0, "on_bad_row": "error", "deduplicate": True} | options
    return load_records("labelled", [Source(path=str(path))], **settings)


def test_a_table_holds_the_same_labels_as_json_lines(tmp_path: Path) -> None:
    values = ["spam", 3, ["spam", "rude"], [], {"spam": 0.25, "rude": 0.5}]
    rows = [{"text": f"text {i}", "label": value} for i, value in enumerate(values)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = io.StringIO()
    writer = csv.writer(cells)
    writer.writerow(["text", "label"])
    writer.writerows([row["text"], v if isinstance(v := row["label"], str) else json.dumps(v)] for row in rows)
    (tmp_path / "x.csv").write_text(cells.getvalue())
    tab = "\n".join(["text\tlabel", *(f"{r['text']}\t{json.dumps(r['label']).strip(chr(34))}" for r in rows)])
    (tmp_path / "x.tsv").write_text(tab + "\n")
    prints = {load(tmp_path / name).fingerprint for name in ("x.jsonl", "x.csv", "x.tsv")}
    assert len(prints) == 1


def test_parquet_fills_missing_probabilities_with_nothing(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": "a", "label": {"spam": 0.5}}, {"text": "b", "label": {"rude": 1.0}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    found = {r.content: r.labels for r in load(tmp_path / "x.parquet").records}
    assert found == {"a": {"spam": 0.5}, "b": {"rude": 1.0}}


def test_bad_rows_are_dropped_by_reason(tmp_path: Path) -> None:
    values = ["spam", "", True, {"spam": 2}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"t{v}", "label": v}) + "\n" for v in values))
    loaded = load(tmp_path / "x.jsonl", on_bad_row="drop")
    assert loaded.dropped == {"empty label": 1, "broken label": 1, "probability outside [0, 1]": 1}
    assert len(loaded) == 1


# Lists of records


def test_the_fingerprint_follows_content_and_labels_and_not_the_place() -> None:
    record = Labelled(TALK, {"spam": 1.0}, W)
    assert records_fingerprint([record]) == records_fingerprint(
        [Labelled([dict(U), dict(A)], {"spam": 1.0}, "elsewhere row 1")]
    )
    others = [
        Labelled(TALK, {"spam": 0.9}, W),
        Labelled(TALK, {"rude": 1.0}, W),
        Labelled(TALK, {}, W),
        Labelled([U], {"spam": 1.0}, W),
        Labelled("hi", {"spam": 1.0}, W),
    ]
    assert len({records_fingerprint([r]) for r in (record, *others)}) == 1 + len(others)
    assert records_fingerprint([Labelled("a", {"x": 1.0, "y": 0.5}, W)]) == records_fingerprint(
        [Labelled("a", {"y": 0.5, "x": 1.0}, W)]
    )
    assert record_content(record) == {"content": TALK, "labels": {"spam": 1.0}}


def test_a_record_with_other_labels_is_no_repeat() -> None:
    one, again, other = (Labelled("a", {"spam": p}, w) for p, w in ((1.0, "r1"), (1.0, "r2"), (0.5, "r3")))
    assert drop_repeats([[one, again, other]]) == [[one, other]]


def test_a_prompt_stays_on_one_side_of_a_split() -> None:
    """Three replies to each of 20 questions; a text is a group of its own."""
    records: list[Any] = [
        Labelled([{"role": "user", "content": f"q{i // 3}"}, {"role": "assistant", "content": f"a{i}"}], {"x": 1.0}, W)
        for i in range(60)
    ]
    for some, size in ((records, 12), ([Labelled(f"t{i // 2}", {str(i): 1.0}, W) for i in range(60)], 12)):
        train, validation = split_records(some, 0.2, seed=0)
        assert (len(train), len(validation)) == (60 - size, size)
        sides = [{key for record in side for key in group_keys(record)} for side in (train, validation)]
        assert not sides[0] & sides[1]


# To tokens


@pytest.fixture(scope="module")
def renderer(tiny_tokenizer: Any) -> Renderer:
    return Renderer(tiny_tokenizer)


def render(
    records: list[Labelled],
    renderer: Renderer,
    *,
    multi_label: bool = False,
    labels: tuple[str, ...] = ("spam", "rude"),
    **data: Any,
) -> list[dict[str, Any]]:
    section = Data(train=(Source(path="x"),), **{"max_length": 64} | data)
    return tokenize_labelled(records, renderer, section, labels, multi_label, "training", Console(quiet=True))


def test_a_conversation_is_read_at_the_end_of_its_last_turn(renderer: Renderer) -> None:
    """After a reply: its end token, as in a rollout. After a user: where a reply would begin. A text: its end."""
    replied, asked, text = (Labelled(c, {"spam": 1.0}, W) for c in (TALK, [*TALK, U], "hello there"))
    ids = [row["input_ids"] for row in render([replied, asked, text], renderer)]
    assert ids[0] == renderer.prompt([U]) + renderer.response("hello") == renderer.conversation(TALK).ids
    assert ids[0][-1] == renderer.end_id
    assert ids[1] == renderer.prompt([*TALK, U])
    assert ids[2] == renderer.text("hello there").ids
    assert ids[2][-1] == renderer.eos_id


def test_the_target_follows_the_order_of_the_labels(renderer: Renderer) -> None:
    records = [Labelled("a", {"rude": 1.0}, W), Labelled("b", {"rude": 0.25, "spam": 0.75}, W)]
    assert [row["target"] for row in render(records, renderer)] == [[0.0, 1.0], [0.75, 0.25]]
    turned = render(records, renderer, labels=("rude", "spam"))
    assert [row["target"] for row in turned] == [[1.0, 0.0], [0.25, 0.75]]
    free = [Labelled("c", {}, W), Labelled("d", {"spam": 1.0, "rude": 1.0}, W)]
    assert [row["target"] for row in render(free, renderer, multi_label=True)] == [[0.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("labels", [{}, {"spam": 1.0, "rude": 1.0}, {"spam": 0.5, "rude": 0.4}])
def test_labels_that_exclude_each_other_sum_to_1(labels: dict[str, float], renderer: Renderer) -> None:
    wrong, right = Labelled("a", labels, W), Labelled("b", {"spam": 0.3, "rude": 0.7}, W)
    with pytest.raises(DataError, match=rf"^{W}: a record must have exactly one label.*found.*; set multi_label=true"):
        render([right, wrong], renderer)
    with pytest.raises(DataError, match=r"2 bad rows in all \(2 not one label\)"):
        render([wrong, right, wrong], renderer)
    assert len(render([right, wrong], renderer, on_bad_row="drop")) == 1


def test_a_record_that_is_too_long_is_dropped_or_cut(renderer: Renderer) -> None:
    records = [Labelled("hello " * 40, {"spam": 1.0}, W), Labelled("hi", {"spam": 1.0}, W)]
    assert len(render(records, renderer, max_length=8)) == 1
    cut = render(records, renderer, max_length=8, too_long="truncate")
    assert [len(row["input_ids"]) for row in cut] == [8, len(renderer.text("hi").ids)]
    with pytest.raises(DataError, match=f"^{W}: longer than max_length 8"):
        render(records, renderer, max_length=8, too_long="error")


def test_a_checked_record_is_the_record() -> None:
    record = Labelled(TALK, {"spam": 0.0}, W)
    assert check_labelled(record) is record
