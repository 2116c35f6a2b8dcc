"""Where the commands print."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf.console import Console


def console(quiet: bool, as_json: bool) -> Console:
    """Where a command prints."""
    from rlhf.console import Console

    return Console(quiet=quiet, as_json=as_json, main=os.environ.get("RANK", "0") == "0")
