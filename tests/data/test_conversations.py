"""Lists of turns and transcripts become messages, or are refused with the place where they are wrong."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.data.conversations import is_transcript, read_transcript, read_turns
from rlhf.data.records import BadRow

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


@pytest.mark.parametrize(
    "turns",
    [TALK, tuple(TALK), SHARED, ' [{"from": "user", "value": "hi"}, {"role": "assistant", "content": "hello"}]'],
)
def test_the_forms_of_a_list_of_turns(turns: Any) -> None:
    assert read_turns(turns, "prompt", "x row 1") == TALK


def test_an_unknown_speaker_is_left_to_the_check_of_roles() -> None:
    assert read_turns([{"from": "tool", "value": "1"}, {"from": 3, "value": "2"}], "prompt", "x row 1") == [
        {"role": "tool", "content": "1"},
        {"role": 3, "content": "2"},
    ]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("[{", "'prompt' is not valid JSON"),
        ("hi", "'prompt' must be a list of messages"),
        ({"role": "user"}, "'prompt' must be a list of messages"),
        ([*TALK, {"role": "user"}], "turn 3 of 'prompt' has neither role/content nor from/value"),
    ],
)
def test_what_is_no_list_of_turns(value: Any, says: str) -> None:
    with pytest.raises(BadRow, match=rf"^x row 1: {says}"):
        read_turns(value, "prompt", "x row 1")


def test_a_transcript_is_recognised_and_read() -> None:
    text = "\n\nHuman: hi \n\nAssistant: hello"
    assert is_transcript(text)
    assert is_transcript(text.lstrip())
    assert not is_transcript("Say hi.\n\nAssistant: hello")
    assert not is_transcript("Human: hi")
    assert read_transcript(text, "x row 1") == read_transcript(text.lstrip(), "x row 1") == TALK


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Say hi.\n\nHuman: hi\n\nAssistant: hello", "text before the first speaker tag"),
        ("hello", "text before the first speaker tag"),
        ("\n\nHuman: hi Assistant: hello", "a speaker tag stands inside a turn"),
    ],
)
def test_what_is_no_transcript(text: str, says: str) -> None:
    with pytest.raises(BadRow, match=rf"^x row 1: {says}"):
        read_transcript(text, "x row 1")
