"""Run several stages one after the other in the processes of one launch, because a launch takes longer than a stage.

`-m tests.distributed.parity_job LIST`, where LIST is a JSON file of [stage, configuration file] pairs. Each stage runs
as from the command line. A process that has not left its process group at the end fails the job, because gloo would
abort such a process from time to time.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

RESPONSES = "responses.jsonl"
NOT_LEFT = 9  # exit code


def keep_responses() -> None:
    """Make PPO write the ids of every response that it learns from into its run directory, one line a step."""
    from rlhf.distributed.launch_env import is_main_process
    from rlhf.stages.ppo import RunReporter

    reported = RunReporter.on_step_end

    def on_step_end(self: Any, trainer: Any, experience: Any, stats: Any) -> None:
        if is_main_process():
            rows = zip(experience.response_ids, experience.response_mask, strict=True)
            with (self.directory.path / RESPONSES).open("a", encoding="utf-8") as file:
                file.write(json.dumps([ids[mask].tolist() for ids, mask in rows]) + "\n")
        reported(self, trainer, experience, stats)

    RunReporter.on_step_end = on_step_end  # type: ignore[method-assign]


def has_left() -> None:
    """Exit with another code if a process group still exists."""
    if torch.distributed.is_initialized():
        os._exit(NOT_LEFT)


def main() -> None:
    """Run the stages of the list."""
    from rlhf.cli.main import main as command_line

    torch.set_num_threads(1)
    atexit.register(has_left)  # the first to be registered is the last to be called
    keep_responses()
    for stage, path in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        sys.argv[1:] = [stage, path, "--quiet"]
        try:
            command_line()
        except SystemExit as end:  # the command line ends its process, well or not
            if end.code:
                raise
        gc.freeze()  # what the libraries hold is searched for garbage after every stage otherwise, for half a second


if __name__ == "__main__":
    main()
