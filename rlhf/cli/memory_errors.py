"""Add to an error of a run that ran out of memory what `rlhf check` predicts, and the command that continues the run.

Imports no torch before memory has run out.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from rlhf.config.env_vars import LAUNCH_OPTIONS
from rlhf.errors import OutOfMemoryError
from rlhf.runs.memory_phase import forget_stage, out_of_memory

SWITCHES = ("--quiet", "--json")
"""Options of a stage's command without a value."""


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Raise OutOfMemoryError with advice in place of any error inside the context that means that memory ran out."""
    forget_stage()
    try:
        yield
    except Exception as error:
        found = error if isinstance(error, OutOfMemoryError) else out_of_memory(error)
        if found is None:
            raise
        _free_frames(error)
        raise with_advice(found, sys.argv[1:]) from None


def _free_frames(error: BaseException | None) -> None:
    """Let the tensors go that the frames of an exception, and of those that caused it, still hold."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()


def with_advice(error: OutOfMemoryError, arguments: Sequence[str]) -> OutOfMemoryError:
    """Return the error with a prediction and the command to run again, as far as they can be found.

    Args:
        error: the error of the run.
        arguments: the command line after `rlhf`.
    """
    from rlhf.config.schema import STAGES

    if error.stage is None or not arguments or arguments[0] not in (*STAGES, "run"):
        return error
    from rlhf.launch.launcher import LaunchOptions
    from rlhf.preflight.memory_advice import advise

    pipeline = arguments[0] == "run"
    options = LaunchOptions(**json.loads(os.environ.get(LAUNCH_OPTIONS, "{}")))
    advice = None
    with suppress(Exception):  # advice must never hide the error: models or data may be gone, or memory still short
        config = _stage_config(error.stage, arguments)
        advice = advise(error.stage, config, options, phase=error.phase, gpu=error.gpu, launch_may_change=not pipeline)
    if advice is None:
        do = "run `rlhf check` with the same file: it names the cheapest change that fits, and the run resumes with it"
        return _copy(error, error.found, do)
    found = f"{error.found}; {advice.predicted}"
    if not advice.change:
        do = "no change was found that needs less memory and with which this run can resume: free memory that other "
        return _copy(error, found, do + "processes use, or start a new run of a smaller model or shorter texts")
    command = changed_command(arguments, options, advice.change, prefix=f"{error.stage}." if pipeline else "")
    outcome = f" ({advice.outcome})" if advice.outcome else ""
    return _copy(error, found, f"resume the run with less memory{outcome}: {command}")


def _copy(error: OutOfMemoryError, found: str, do: str) -> OutOfMemoryError:
    """Return the error with another finding and remedy."""
    return OutOfMemoryError(
        error.what,
        found=found,
        where=error.where,
        do=do,
        phase=error.phase,
        gpu=error.gpu,
        stage=error.stage,
        folder=error.folder,
    )


def _stage_config(stage: str, arguments: Sequence[str]) -> Any:
    """Return the configuration of a stage of the command line: its own, or that within a pipeline."""
    from rlhf.config.load import load_pipeline, load_stage_config
    from rlhf.config.schema import STAGES

    path, *overrides = [word for word in arguments[1:] if word not in SWITCHES]
    if arguments[0] != "run":
        return load_stage_config(STAGES[stage], path, overrides).config
    return next(step.loaded.config for step in load_pipeline(path, overrides).stages if step.name == stage)


def changed_command(arguments: Sequence[str], options: Any, change: Sequence[str], *, prefix: str = "") -> str:
    """Return a command line with changed settings and launch options.

    Args:
        arguments: the command line after `rlhf`, without launch options.
        options: the launch options (`LaunchOptions`).
        change: `key=value` words, and `--launcher NAME` or `--num-processes NUMBER`.
        prefix: put before each changed key, for a stage within a pipeline.
    """
    words, settings = list(change), {}
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            value = words.pop(0)
            options = replace(options, **({"launcher": value} if word == "--launcher" else {"processes": int(value)}))
        else:
            key, _, value = word.partition("=")
            settings[f"{prefix}{key}"] = value
    kept = [word for word in arguments if word.partition("=")[0] not in settings]
    changed = [f"{key}={value}" for key, value in settings.items()]
    return "rlhf " + shlex.join([*kept, *changed, *options.flags()])
