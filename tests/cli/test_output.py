"""Notes about the configuration are printed before a command begins, as text or JSON, and not with --quiet."""

from __future__ import annotations

import json

import pytest

from rlhf.cli.output import make_console, print_notes

NOTE = "x.yaml:3: 'saving.grace' is now called 'saving.grace_seconds'"


def test_a_note_is_printed_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_notes([NOTE], make_console(False, False))
    assert capsys.readouterr().out == f"note: {NOTE}\n"


def test_a_note_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_notes([NOTE], make_console(False, True))
    assert json.loads(capsys.readouterr().out) == {"note": f"note: {NOTE}"}


def test_a_note_is_not_printed_with_quiet_or_by_another_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    print_notes([NOTE], make_console(True, False))
    monkeypatch.setenv("RANK", "1")
    print_notes([NOTE], make_console(False, False))
    assert capsys.readouterr().out == ""
