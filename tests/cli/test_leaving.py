"""Processes of a successful job leave their process groups before Python shuts down; a failed one does not wait."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.cli import main
from rlhf.distributed import launch_env
from rlhf.errors import TrainingError
from rlhf.runs.preemption import INTERRUPTED_EXIT_CODE, STOPPED_EXIT_CODE, RunStopped

GROUP = """
import atexit, sys
import torch.distributed as dist
from rlhf.distributed.launch_env import leave_process_groups, leave_process_groups_at_exit
leave_process_groups()  # there is nothing to leave
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
atexit.register(lambda: print("left" if not dist.is_initialized() else "there"))
if sys.argv[2] == "well":
    leave_process_groups_at_exit()
"""


@pytest.mark.parametrize(
    ("end", "code", "leaves"),
    [
        (SystemExit(0), 0, True),
        (SystemExit(None), None, True),
        (RunStopped(), STOPPED_EXIT_CODE, True),
        (SystemExit(2), 2, False),
        (TrainingError("diverged"), 2, False),
        (KeyboardInterrupt(), INTERRUPTED_EXIT_CODE, False),
        (RuntimeError("unforeseen"), main.UNFORESEEN, False),
        (OSError(5, "unforeseen"), main.UNFORESEEN, False),
    ],
)
@pytest.mark.parametrize("processes", ["1", "2"])
def test_only_an_end_that_all_processes_share_is_waited_for(
    end: BaseException, code: int | None, leaves: bool, processes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(**_: object) -> None:
        raise end

    found: list[bool] = []
    monkeypatch.setattr(main, "app", ends)
    monkeypatch.setattr(main.preemption, "handle_sigterm", lambda: None)
    monkeypatch.setattr(launch_env, "leave_process_groups_at_exit", lambda: found.append(True))
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == code
    assert bool(found) is (leaves and processes == "2")


@pytest.mark.parametrize(("how", "says"), [("well", "left"), ("badly", "there")])
def test_the_group_is_left_before_the_interpreter_is_taken_down(how: str, says: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", GROUP, str(tmp_path / "meeting"), how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [says]
