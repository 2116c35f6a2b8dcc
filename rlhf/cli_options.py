"""Arguments and options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rlhf.runs.console import Console

ConfigArg = Annotated[Path, typer.Argument(help="YAML file of the stage", show_default=False)]
OverridesArg = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides, e.g. optim.learning_rate=1e-5")
]
LauncherOpt = Annotated[
    str | None, typer.Option(help="run under 'accelerate launch' with configs/accelerate/NAME.yaml (or a path)")
]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="print results only")]
JsonOpt = Annotated[bool, typer.Option("--json", help="print one JSON object a line")]


def console(quiet: bool, as_json: bool) -> Console:
    """Where a command prints."""
    from rlhf.runs.console import Console

    return Console(quiet=quiet, as_json=as_json, main=os.environ.get("RANK", "0") == "0")
