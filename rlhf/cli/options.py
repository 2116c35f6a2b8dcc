"""Arguments and options that several commands share, with their help. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigArg = Annotated[Path, typer.Argument(help="YAML file of the stage", show_default=False)]
OverridesArg = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides, e.g. optim.learning_rate=1e-5")
]
LauncherOpt = Annotated[
    str | None, typer.Option(help="run under 'accelerate launch' with configs/accelerate/NAME.yaml (or a path)")
]
ProcessesOpt = Annotated[int | None, typer.Option(help="with --launcher: processes, over all machines")]
MachinesOpt = Annotated[int | None, typer.Option(help="with --launcher: machines; start the command on each")]
RankOpt = Annotated[int | None, typer.Option(help="number of this machine, from 0")]
IpOpt = Annotated[str | None, typer.Option(help="address of machine 0")]
PortOpt = Annotated[int | None, typer.Option(help="port on machine 0")]
RestartsOpt = Annotated[
    int, typer.Option(min=0, help="with --launcher: start again so often, from the last checkpoint")
]
TimeoutOpt = Annotated[
    int | None, typer.Option(min=1, help="seconds until processes that wait for each other are ended; default 1800")
]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="print results only")]
JsonOpt = Annotated[bool, typer.Option("--json", help="print one JSON object a line")]
TemperatureOpt = Annotated[float, typer.Option(min=0.0, help="0 = always the likeliest token")]
NewTokensOpt = Annotated[int, typer.Option(min=1, help="longest reply, in tokens")]

STAGE_HELP = {
    "pretrain": "Make a small source model: tokenizer and next-token training on text.",
    "sft": "Stage 1: supervised fine-tuning on demonstrations.",
    "reward": "Stage 2: a reward model on preference pairs, started from the SFT model.",
    "classify": "A classifier with any labels, on any causal LM; a label's probability can be a reward of PPO.",
    "ppo": "Stage 3: PPO against the reward model, kept near the SFT model.",
    "evaluate": "Compare models on held-out prompts: win rate with its interval, KL, length, perplexity; writes "
    "report.html.",
}
"""What the command of each stage does, in the order of its help."""
