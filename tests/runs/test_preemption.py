"""SIGTERM: at once where there is nothing to save, else at the next safe point, and never after the grace time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from rlhf.cli.output import print_ending
from rlhf.runs import preemption


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """As in the command line."""
    before = signal.getsignal(signal.SIGTERM)
    preemption.handle_sigterm()
    yield
    signal.signal(signal.SIGTERM, before)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_it_ends_at_once_where_no_safe_point_is_to_come() -> None:
    with pytest.raises(preemption.RunStopped) as end:
        terminate()
    assert end.value.code == preemption.STOPPED_EXIT_CODE == 75


def patient() -> None:
    with preemption.delay_sigterm(60):
        assert not preemption.stop_requested()
        terminate()
        terminate()
        assert preemption.stop_requested()
        assert not preemption.stop_is_urgent()


def hasty() -> None:
    with preemption.delay_sigterm(0.2):
        terminate()
        time.sleep(0.12)
        assert preemption.stop_is_urgent()
        time.sleep(30)


def test_it_waits_for_a_safe_point_and_twice_is_as_once() -> None:
    with pytest.raises(preemption.RunStopped):
        patient()
    assert not preemption.stop_requested()


def test_it_ends_when_the_grace_is_over() -> None:
    begun = time.monotonic()
    with pytest.raises(preemption.RunStopped):
        hasty()
    assert time.monotonic() - begun < 10


def test_a_request_is_forgotten_with_the_run_that_it_was_for() -> None:
    with preemption.delay_sigterm(0.1):
        pass
    time.sleep(0.15)
    with preemption.delay_sigterm(60):
        assert not preemption.stop_requested()


def test_the_last_line_says_how_to_continue(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for argv, more in (
        (["rlhf", "ppo", "a b.yaml"], "; the same command continues: rlhf ppo 'a b.yaml'"),
        (["rlhf", "chat", "x"], ""),
    ):
        monkeypatch.setattr("sys.argv", argv)
        assert print_ending("stopped", 75) == 75
        assert capsys.readouterr().err == f"\nstopped{more}\n"
