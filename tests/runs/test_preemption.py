"""SIGTERM ends a run immediately if there is nothing to save, else at the next safe point or after the grace time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from rlhf.cli.output import print_ending
from rlhf.runs import preemption


@pytest.fixture(autouse=True)
def sigterm_handler() -> Iterator[None]:
    """Install the SIGTERM handler of the command line."""
    before = signal.getsignal(signal.SIGTERM)
    preemption.handle_sigterm()
    yield
    signal.signal(signal.SIGTERM, before)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_ends_a_run_immediately_outside_of_delay_sigterm() -> None:
    with pytest.raises(preemption.RunStopped) as end:
        terminate()
    assert end.value.code == preemption.STOPPED_EXIT_CODE == 75


def run_with_long_grace() -> None:
    with preemption.delay_sigterm(60):
        assert not preemption.stop_requested()
        terminate()
        terminate()
        assert preemption.stop_requested()
        assert not preemption.stop_is_urgent()


def run_with_short_grace() -> None:
    with preemption.delay_sigterm(0.2):
        terminate()
        time.sleep(0.12)
        assert preemption.stop_is_urgent()
        time.sleep(30)


def test_sigterm_waits_for_a_safe_point_and_a_second_one_changes_nothing() -> None:
    with pytest.raises(preemption.RunStopped):
        run_with_long_grace()
    assert not preemption.stop_requested()


def test_a_run_ends_when_the_grace_time_is_over() -> None:
    started_at = time.monotonic()
    with pytest.raises(preemption.RunStopped):
        run_with_short_grace()
    assert time.monotonic() - started_at < 10


def test_a_request_does_not_outlive_the_run_that_received_it() -> None:
    with preemption.delay_sigterm(0.1):
        pass
    time.sleep(0.15)
    with preemption.delay_sigterm(60):
        assert not preemption.stop_requested()


def test_the_last_message_names_the_command_that_continues(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for argv, continuation in (
        (["rlhf", "ppo", "a b.yaml"], "; the same command continues: rlhf ppo 'a b.yaml'"),
        (["rlhf", "chat", "x"], ""),
    ):
        monkeypatch.setattr("sys.argv", argv)
        assert print_ending("stopped", 75) == 75
        assert capsys.readouterr().err == f"\nstopped{continuation}\n"
