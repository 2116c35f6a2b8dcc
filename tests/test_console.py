"""Output for people, nothing but results, or one JSON object a line."""

from __future__ import annotations

import json

import pytest

from rlhf.console import Console


def speak(console: Console) -> None:
    """One of everything."""
    console.title("sft -> runs/x")
    console.note("a note with [brackets]")
    with console.progress("sft", 2, "update") as bar:
        bar.update(1, {"loss": 0.5})
        bar.update(2, {"loss": 0.25})
    console.table("Models", ["model", "win"], [["ppo", "80 %"]])
    console.text("an answer [bold]in brackets[/bold]")


def test_for_people_everything_is_said_literally(capsys: pytest.CaptureFixture[str]) -> None:
    speak(Console())
    out = capsys.readouterr().out
    for words in ("sft -> runs/x", "a note with [brackets]", "sft 2/2 updates", "loss 0.25", "Models", "80 %"):
        assert words in out
    assert "an answer [bold]in brackets[/bold]" in out


def test_quiet_leaves_the_results_only(capsys: pytest.CaptureFixture[str]) -> None:
    speak(Console(quiet=True))
    out = capsys.readouterr().out
    assert "80 %" in out
    assert "an answer" in out
    for words in ("runs/x", "note", "loss", "update"):
        assert words not in out


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    speak(Console(as_json=True))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {"stage": "sft -> runs/x"},
        {"note": "a note with [brackets]"},
        {"progress": "sft", "done": 1, "total": 2, "loss": 0.5},
        {"progress": "sft", "done": 2, "total": 2, "loss": 0.25},
        {"table": "Models", "rows": [{"model": "ppo", "win": "80 %"}]},
        {"text": "an answer [bold]in brackets[/bold]"},
    ]


def test_quiet_json_leaves_the_results_only(capsys: pytest.CaptureFixture[str]) -> None:
    speak(Console(quiet=True, as_json=True))
    assert [next(iter(json.loads(line))) for line in capsys.readouterr().out.splitlines()] == ["table", "text"]


@pytest.mark.parametrize("as_json", [False, True])
def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    speak(Console(as_json=as_json, main=False))
    assert capsys.readouterr().out == ""
