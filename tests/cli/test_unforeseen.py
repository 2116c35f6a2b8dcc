"""An error that no check foresaw ends in one line: what broke, the run, where the trace is. Exit code 70."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main


def ended(err: str) -> tuple[str, str]:
    """The one line on standard error, and the traceback in the file that it names."""
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    path = re.search(r"which is in (\S+)$", lines[0])
    assert path is not None, lines[0]
    return lines[0], Path(path[1]).read_text(encoding="utf-8")


def run(args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Standard error of a command that ends with an unforeseen error."""
    monkeypatch.setattr("sys.argv", ["rlhf", *args])
    monkeypatch.setattr(main.preemption, "handle_sigterm", lambda: None)
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 70
    return capsys.readouterr().err


def test_inside_a_run_the_trace_lies_in_its_folder(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a planted fault\nwith a second line")

    monkeypatch.chdir(place)
    monkeypatch.setattr("rlhf.trainers.supervised.run.run_training", broken)
    monkeypatch.setattr("rlhf.trainers.supervised.run.check_same_checkpoint", broken)
    line, trace = ended(run(["sft", "sft.yaml", "--quiet"], capsys, monkeypatch))
    assert line.startswith("InternalError in run out: ZeroDivisionError: a planted fault;")
    assert "Traceback" in trace
    assert "a planted fault" in trace
    assert list((place / "out").glob("error-*.txt"))


def test_before_a_run_the_trace_lies_among_temporary_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(main, "app", broken)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    line, trace = ended(run(["show", "x"], capsys, monkeypatch))
    assert line.startswith("InternalError: RuntimeError: no message;")
    assert "RuntimeError" in trace
