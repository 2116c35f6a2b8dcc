"""Recognition by columns, conversion of rows, and rows that break the contract."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.data.formats import check_format, convert_row, recognise_format
from rlhf.data.records import BadRow, Comparison, Demonstration, Prompt, Text
from rlhf.errors import DataError

W = "data/x.jsonl row 118"
U = {"role": "user", "content": "hi"}
A = {"role": "assistant", "content": "hello"}
B = {"role": "assistant", "content": "go away"}
HH_CHOSEN, HH_REJECTED = "\n\nHuman: hi\n\nAssistant: hello", "\n\nHuman: hi\n\nAssistant: go away"
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant:"

RECOGNISED = [
    ("text", "text", "text"),
    ("document", "text", "text"),
    ("document", "messages id", "messages"),
    ("demonstration", "messages tree", "messages"),
    ("demonstration", "prompt completion", "prompt-completion"),
    ("demonstration", "prompt prompt_id messages", "messages"),
    ("demonstration", "instruction input output", "alpaca"),
    ("demonstration", "instruction output", "alpaca"),
    ("demonstration", "conversations id", "sharegpt"),
    ("demonstration", "transcript", "transcript"),
    ("comparison", "prompt chosen rejected", "preference"),
    ("comparison", "chosen rejected", "implicit-preference"),
    ("comparison", "instruction input output chosen rejected", "alpaca"),
    ("comparison", "prompt messages chosen rejected score", "preference"),
    ("prompt", "prompt", "prompt"),
    ("prompt", "prompt chosen rejected", "prompt"),
    ("prompt", "prompt completion", "prompt"),
    ("prompt", "instruction", "alpaca"),
    ("prompt", "instruction chosen rejected", "alpaca"),
    ("prompt", "chosen rejected", "implicit-preference"),
]


@pytest.mark.parametrize(("kind", "columns", "name"), RECOGNISED)
def test_recognised(kind: str, columns: str, name: str) -> None:
    assert recognise_format(columns.split(), kind) == name
    assert check_format(name, columns.split(), kind) == name


@pytest.mark.parametrize(
    ("kind", "columns", "both"),
    [
        ("demonstration", "messages conversations", "messages, sharegpt"),
        ("demonstration", "messages prompt completion", "messages, prompt-completion"),
        ("document", "text messages", "text, messages"),
        ("comparison", "prompt instruction chosen rejected", "preference, alpaca"),
        ("prompt", "prompt messages", "prompt, messages"),
    ],
)
def test_several_fit(kind: str, columns: str, both: str) -> None:
    with pytest.raises(DataError, match=rf"x.csv: several formats fit: {both} \(found: columns .*\); set format"):
        recognise_format(columns.split(), kind, "x.csv")


@pytest.mark.parametrize("kind", ["text", "document", "demonstration", "comparison", "prompt"])
def test_none_fits(kind: str) -> None:
    with pytest.raises(
        DataError, match=r"x.csv: no format.*found: columns answer, question\); known: .*columns: \{"
    ) as caught:
        recognise_format(["question", "answer"], kind, "x.csv")
    assert caught.value.where == "x.csv"


def test_named_format() -> None:
    assert check_format("transcript", ["chosen", "rejected"], "comparison") == "transcript"
    assert check_format("preference", ["prompt", "chosen", "rejected"], "prompt") == "preference"
    with pytest.raises(DataError, match=r"needs the column.* completion .*columns: {completion: "):
        check_format("prompt-completion", ["prompt"], "demonstration")
    with pytest.raises(DataError, match=r"'text' cannot give a comparison; .*preference"):
        check_format("text", ["text"], "comparison")


DEMONSTRATIONS: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": [U, A]}),
    ("messages", {"messages": '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]'}),
    ("messages", {"messages": [U | {"name": "x"}, A]}),
    ("prompt-completion", {"prompt": "hi", "completion": "hello"}),
    ("prompt-completion", {"prompt": [U], "completion": "hello"}),
    ("prompt-completion", {"prompt": "hi", "completion": [A]}),
    ("alpaca", {"instruction": "hi", "input": "", "output": "hello"}),
    ("alpaca", {"instruction": "hi", "input": None, "output": "hello"}),
    ("alpaca", {"instruction": "hi", "output": "hello"}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}),
    ("sharegpt", {"conversations": [U, A]}),
    ("transcript", {"transcript": "\n\nHuman: hi\n\nAssistant: hello\n"}),
    ("transcript", {"transcript": "Human: hi\n\nAssistant: hello"}),
]


@pytest.mark.parametrize(("name", "row"), DEMONSTRATIONS)
def test_demonstrations(name: str, row: dict[str, Any]) -> None:
    assert convert_row(row, name, "demonstration", W) == Demonstration([U, A], W)
    assert convert_row(row, name, "document", W) == Demonstration([U, A], W)
    prompt = convert_row(row, name, "prompt", W)
    assert prompt == Prompt([U], W, row)


PAIRS: list[tuple[str, dict[str, Any]]] = [
    ("preference", {"prompt": "hi", "chosen": "hello", "rejected": "go away"}),
    ("preference", {"prompt": [U], "chosen": "hello", "rejected": [B]}),
    ("preference", {"prompt": "hi", "chosen": [U, A], "rejected": [U, B]}),
    ("alpaca", {"instruction": "hi", "input": "", "chosen": "hello", "rejected": "go away"}),
    ("implicit-preference", {"chosen": [U, A], "rejected": [U, B]}),
    ("implicit-preference", {"chosen": HH_CHOSEN, "rejected": HH_REJECTED}),
    ("transcript", {"chosen": HH_CHOSEN, "rejected": HH_REJECTED}),
    ("transcript", {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": "hello", "rejected": "go away"}),
]


@pytest.mark.parametrize(("name", "row"), PAIRS)
def test_comparisons(name: str, row: dict[str, Any]) -> None:
    assert convert_row(row, name, "comparison", W) == Comparison([U], "hello", "go away", W)
    if name != "transcript":
        assert convert_row(row, name, "prompt", W) == Prompt([U], W, row)


def test_other_columns() -> None:
    row = {
        "prompt": "hi",
        "chosen": "a",
        "rejected": "b",
        "preference": "0.25",
        "margin": "",
        "annotator": 7,
        "group": "g",
    }
    record = convert_row(row, "preference", "comparison", W)
    assert isinstance(record, Comparison)
    assert (record.preference, record.margin, record.extra) == (0.25, None, {"annotator": 7, "group": "g"})
    tie = convert_row(
        {"prompt": "hi", "chosen": "a", "rejected": "a", "preference": 0.5, "margin": 3}, "preference", "comparison", W
    )
    assert isinstance(tie, Comparison)
    assert (tie.preference, tie.margin) == (0.5, 3)


def test_details() -> None:
    assert convert_row({"text": "a"}, "text", "document", W) == Text("a", W)
    joined = convert_row({"instruction": "Add.", "input": "1 2"}, "alpaca", "prompt", W)
    assert isinstance(joined, Prompt)
    assert joined.messages == [{"role": "user", "content": "Add.\n\n1 2"}]
    open_prompt = convert_row({"messages": [U]}, "messages", "prompt", W)
    assert isinstance(open_prompt, Prompt)
    assert open_prompt.messages == [U]
    system = convert_row({"conversations": [{"from": "system", "value": "s"}, U, A]}, "sharegpt", "demonstration", W)
    assert isinstance(system, Demonstration)
    assert system.messages[0] == {"role": "system", "content": "s"}


IMPLICIT = ("comparison", "implicit-preference")
BAD: list[tuple[str, str, dict[str, Any], str]] = [
    (*IMPLICIT, {"chosen": [U, A], "rejected": [{"role": "user", "content": "ho"}, B]}, "prompts differ"),
    (*IMPLICIT, {"chosen": HH + " a", "rejected": HH.replace("hi", "ho") + " b"}, "prompts differ"),
    (*IMPLICIT, {"chosen": HH, "rejected": HH + " b"}, "empty chosen"),
    (*IMPLICIT, {"chosen": "", "rejected": HH + " b"}, "empty chosen"),
    (*IMPLICIT, {"chosen": HH + " Human: a", "rejected": HH + " b"}, "speaker tag inside a turn"),
    (*IMPLICIT, {"chosen": HH + " a.\nAssistant: c", "rejected": HH + " b"}, "speaker tag inside"),
    (*IMPLICIT, {"chosen": HH + " a\n\nAssistant: a", "rejected": HH + " a\n\nAssistant: b"}, "role order"),
    (*IMPLICIT, {"chosen": HH + " a\n\nHuman: x", "rejected": HH + " b"}, "role order"),
    (*IMPLICIT, {"chosen": "hello", "rejected": "go away"}, "no prompt"),
    (*IMPLICIT, {"chosen": True, "rejected": [U, B]}, "chosen is not a message list"),
    ("comparison", "preference", {"prompt": "hi", "chosen": True, "rejected": "b"}, "chosen is not text"),
    ("comparison", "preference", {"prompt": None, "chosen": "a", "rejected": "b"}, "prompt is not text"),
    ("comparison", "preference", {"prompt": "", "chosen": "a", "rejected": "b"}, "empty prompt"),
    ("comparison", "preference", {"prompt": "hi", "chosen": "a"}, "missing 'rejected'"),
    ("comparison", "preference", {"prompt": "ho", "chosen": [U, A], "rejected": "b"}, "prompts differ"),
    ("comparison", "preference", {"prompt": "hi", "chosen": [U, A, U, A], "rejected": "b"}, "role order"),
    ("comparison", "preference", {"prompt": "hi", "chosen": [], "rejected": "b"}, "role order"),
    ("comparison", "preference", {"prompt": HH, "chosen": "a", "rejected": "b"}, "transcript in prompt"),
    ("comparison", "preference", {"prompt": "hi", "chosen": "a", "rejected": "b", "preference": "a"}, "preference"),
    ("comparison", "alpaca", {"instruction": 3, "chosen": "a", "rejected": "b"}, "instruction is not text"),
    ("demonstration", "alpaca", {"instruction": "a", "input": 3, "output": "b"}, "input is not text"),
    ("demonstration", "alpaca", {"instruction": "a", "output": ""}, "empty response"),
    ("demonstration", "messages", {"messages": "hello"}, "messages is not a message list"),
    ("demonstration", "messages", {"messages": "[{'role': 'user'}]"}, "messages is not a message list"),
    ("demonstration", "messages", {"messages": [{"role": "user"}]}, "malformed turn"),
    ("demonstration", "messages", {"messages": ["hi", "hello"]}, "malformed turn"),
    ("demonstration", "sharegpt", {"conversations": [{"from": "tool", "value": "x"}]}, "unknown role"),
    ("demonstration", "sharegpt", {"conversations": [{"from": None, "value": "x"}]}, "unknown role"),
    ("demonstration", "transcript", {"transcript": "Once upon\n\nHuman: a\n\nAssistant: b"}, "not a transcript"),
    ("demonstration", "transcript", {"transcript": "no tags"}, "not a transcript"),
    ("prompt", "prompt", {"prompt": [U, A]}, "role order"),
    ("prompt", "prompt", {"prompt": {"text": "hi"}}, "prompt is not text"),
    ("text", "text", {"text": None}, "text is not text"),
]


@pytest.mark.parametrize(("kind", "name", "row", "reason"), BAD)
def test_bad_rows(kind: str, name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        convert_row(row, name, kind, W)
    assert caught.value.reason.startswith(reason)
    assert str(caught.value).startswith(f"{W}: ")
    assert "data.on_bad_row=drop" in caught.value.do
