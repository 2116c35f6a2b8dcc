"""Console of the commands, and what they print when they end early or fail unexpectedly."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf.console import Console


def make_console(quiet: bool, as_json: bool) -> Console:
    """Create the console of a command; only the main process (RANK 0) prints."""
    from rlhf.console import Console

    return Console(quiet=quiet, as_json=as_json, main=os.environ.get("RANK", "0") == "0")


def print_notes(notes: Iterable[str], console: Console) -> None:
    """Print what the user should know about the configuration before the command begins."""
    for note in notes:
        console.note(f"note: {note}")


def print_ending(how: str, code: int) -> int:
    """Print how the command ended and, for stages and pipelines, the command that resumes it.

    Args:
        how: how it ended, e.g. "interrupted".
        code: exit code.
    Returns: `code`.
    """
    from rlhf.config.env_vars import HEARTBEAT_FOLDER
    from rlhf.config.schema import STAGES

    if HEARTBEAT_FOLDER in os.environ:  # the launcher prints this once for all processes
        return code
    resumable = len(sys.argv) > 1 and sys.argv[1] in (*STAGES, "run")
    more = f"; the same command continues: rlhf {shlex.join(sys.argv[1:])}" if resumable else ""
    print(f"\n{how}{more}", file=sys.stderr)
    return code


def explain_unforeseen(error: Exception) -> str:
    """Write the traceback of an unforeseen error to a file, and return a one-line message that names the file.

    The file is written to the run directory if a run has begun, else to the folder for temporary files.
    """
    import tempfile
    import traceback

    from rlhf.runs.run_dir import RunDir

    run, rank = RunDir.unfinished(), os.environ.get("RANK", "0")
    folder = run.path if run is not None and run.path.is_dir() else None
    trace = "".join(traceback.format_exception(error))
    try:
        path = (folder or Path(tempfile.gettempdir())) / f"error-rank{rank}-pid{os.getpid()}.txt"
        path.write_text(trace, encoding="utf-8")
    except OSError as full:
        path = Path(f"nowhere ({full})")
    what = str(error).strip().split("\n")[0][:300] or "no message"
    where = f" in run {folder}" if folder is not None else ""
    return (
        f"InternalError{where}: {type(error).__name__}: {what}; this is a defect of rlhf or of a library, please "
        f"report it with the full trace, which is in {path}"
    )
