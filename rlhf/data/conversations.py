"""Parsing of conversations in data files (lists of turns, transcripts) into messages; `records` checks their roles."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rlhf.data.records import BadRow, Messages, check_string

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_TAG = re.compile(r"(?<!\w)(?:Human|Assistant):")


def read_turns(value: Any, name: str, where: str) -> Messages:
    """Return the messages of a list of {role, content} or {from, value}, or of JSON text of such a list (as in CSV).

    Raises: BadRow if it is not a list, or a turn has other keys.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as exc:
            what = f"'{name}' is not valid JSON: {exc}"
            raise BadRow(f"{name} is not a message list", what, found=value[:40], where=where) from None
    if not isinstance(value, list | tuple):
        what = f"'{name}' must be a list of messages"
        raise BadRow(f"{name} is not a message list", what, found=f"{type(value).__name__} {value!r:.40}", where=where)
    messages: Messages = []
    for i, turn in enumerate(value):
        if isinstance(turn, Mapping) and "role" in turn and "content" in turn:
            messages.append({"role": turn["role"], "content": turn["content"]})
        elif isinstance(turn, Mapping) and "from" in turn and "value" in turn:
            speaker = turn["from"]
            role = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
            messages.append({"role": role, "content": turn["value"]})
        else:
            what = f"turn {i + 1} of '{name}' has neither role/content nor from/value"
            raise BadRow("malformed turn", what, found=f"{turn!r:.60}", where=where)
    return messages


def is_transcript(text: str) -> bool:
    """Return whether a text is a transcript with the speaker tags Human: and Assistant:."""
    return text.lstrip("\n").startswith(("Human:", "Assistant:")) and "\n\nAssistant:" in text


def read_transcript(text: Any, where: str) -> Messages:
    """Return the messages of a transcript such as '\\n\\nHuman: a\\n\\nAssistant: b'; blanks around turns are removed.

    Raises: BadRow if it is not text, does not begin with a speaker tag, or has a tag inside a turn.
    """
    check_string(text, "transcript", where, empty="empty prompt")
    before, *parts = _TURN.split("\n\n" + text.lstrip("\n"))
    if before.strip() or not parts:
        raise BadRow("not a transcript", "text before the first speaker tag", found=f"{text!r:.60}", where=where)
    messages: Messages = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        tag = _TAG.search(said)
        if tag:
            found = said[max(0, tag.start() - 20) : tag.end() + 20]
            raise BadRow("speaker tag inside a turn", "a speaker tag stands inside a turn", found=found, where=where)
        messages.append({"role": "user" if speaker == "Human" else "assistant", "content": said.strip()})
    return messages
