"""Arguments and options that commands share, and the help of the stage commands. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigArg = Annotated[Path, typer.Argument(help="YAML configuration file", show_default=False)]
OverridesArg = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="values that override the file, e.g. optim.learning_rate=1e-5; 'rlhf show CONFIG' lists all keys",
    ),
]
LauncherOpt = Annotated[
    str | None,
    typer.Option(help="run under 'accelerate launch' with configs/accelerate/NAME.yaml (or a path), e.g. ddp, zero3"),
]
ProcessesOpt = Annotated[
    int | None, typer.Option(help="with --launcher: number of processes over all machines; default: as its file says")
]
MachinesOpt = Annotated[
    int | None, typer.Option(help="with --launcher: number of machines; start the same command on each of them")
]
RankOpt = Annotated[int | None, typer.Option(help="with several machines: number of this machine, from 0")]
IpOpt = Annotated[str | None, typer.Option(help="with several machines: address of machine 0")]
PortOpt = Annotated[int | None, typer.Option(help="with several machines: port on machine 0")]
RestartsOpt = Annotated[
    int,
    typer.Option(
        min=0, help="with --launcher: restart up to this many times, from the last checkpoint, after a failure"
    ),
]
TimeoutOpt = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="with --launcher: seconds after which a job whose processes wait for each other is ended; default 1800",
    ),
]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="print results only, no notes and no progress")]
JsonOpt = Annotated[bool, typer.Option("--json", help="print one JSON object per line instead of text")]
TemperatureOpt = Annotated[
    float, typer.Option(min=0.0, help="sampling temperature; 0 = greedy decoding (the most likely token)")
]
NewTokensOpt = Annotated[int, typer.Option(min=1, help="largest length of a reply, in tokens")]

_RESUME = "The same command resumes an interrupted run; a finished run is skipped."

STAGE_HELP = {
    "pretrain": "Train a small tokenizer and language model from scratch on text (optional first stage).\n\n"
    f"{_RESUME}\n\n"
    "\b\n  rlhf pretrain configs/demo/pretrain.yaml",
    "sft": "Stage 1: supervised fine-tuning of a language model on demonstrations.\n\n"
    f"{_RESUME}\n\n"
    "\b\n  rlhf sft configs/demo/sft.yaml\n  rlhf sft configs/demo/sft.yaml optim.epochs=1 peft.method=lora",
    "reward": "Stage 2: train a reward model on preference pairs, starting from the SFT model.\n\n"
    f"{_RESUME}\n\n\b\n  rlhf reward configs/demo/reward.yaml\n  rlhf reward configs/demo/reward.yaml --launcher ddp "
    f"--num-processes 2",
    "classify": "Train a classifier on labelled texts or conversations, starting from a causal language model.\n\n"
    "The probability of a label can be part of PPO's reward. "
    f"{_RESUME}\n\n"
    "\b\n  rlhf classify configs/demo/experiments/classify-rules.yaml",
    "ppo": "Stage 3: train the policy with PPO against the reward model, with a KL penalty towards the SFT model.\n\n"
    f"{_RESUME}\n\n"
    "\b\n  rlhf ppo configs/demo/ppo.yaml\n  rlhf ppo configs/demo/ppo.yaml kl.target=2.5 --launcher zero3",
    "evaluate": "Compare models on held-out prompts and write report.html.\n\n"
    "Reports win rates with confidence intervals, KL divergence, response length, perplexity and the accuracy of the "
    "reward model.\n\n"
    "\b\n  rlhf evaluate configs/demo/evaluate.yaml",
}
"""Stage -> help text of its command, in the order in which `rlhf --help` lists the stages."""
