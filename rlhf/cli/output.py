"""Where the commands print."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf.console import Console


def make_console(quiet: bool, as_json: bool) -> Console:
    """Where a command prints."""
    from rlhf.console import Console

    return Console(quiet=quiet, as_json=as_json, main=os.environ.get("RANK", "0") == "0")


def print_notes(notes: Iterable[str], console: Console) -> None:
    """Print what the user should know about the configuration before the command begins."""
    for note in notes:
        console.note(f"note: {note}")


def print_ending(how: str, code: int) -> int:
    """Print how the command ended, and the command that continues it. Returns: `code`."""
    from rlhf.config.env_vars import HEARTBEAT_FOLDER
    from rlhf.config.schema import STAGES

    if HEARTBEAT_FOLDER in os.environ:  # the process that started us says it, once for all
        return code
    continues = len(sys.argv) > 1 and sys.argv[1] in (*STAGES, "run")
    more = f"; the same command continues: rlhf {shlex.join(sys.argv[1:])}" if continues else ""
    print(f"\n{how}{more}", file=sys.stderr)
    return code
