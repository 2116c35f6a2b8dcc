"""View of a PPO rollout: its tokens, coloured by one of their values, and all values in a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.text import Text

from rlhf.console import Console
from rlhf.errors import ConfigError
from rlhf.runs.metrics import read_jsonl

TOKEN_COLUMNS = ("logprob", "kl", "value", "advantage", "reward")
COLUMN_UNITS = {"logprob": "nats", "kl": "nats", "value": "score", "advantage": "whitened", "reward": "score"}


def inspect_rollout(run: Path, console: Console, *, step: int | None, row: int | None, paint: str) -> None:
    """Print the samples of a PPO step.

    Args:
        run: run directory of a PPO run.
        console: where to print.
        step: PPO step; None = the last one written.
        row: number of the response in that step; None = all that were written.
        paint: column of TOKEN_COLUMNS by which tokens are coloured.
    Raises: ConfigError if the run has no samples, or none of that step or row, or if `paint` is not a column.
    """
    path = run / "samples.jsonl"
    if not path.is_file():
        raise ConfigError("the folder contains no samples", where=str(run), do="give the run directory of a ppo stage")
    if paint not in TOKEN_COLUMNS:
        raise ConfigError(
            "unknown column", found=paint, where="--paint", do=f"choose one of {', '.join(TOKEN_COLUMNS)}"
        )
    samples = list(read_jsonl(path))
    steps = sorted({sample["step"] for sample in samples})
    wanted = steps[-1] if step is None and steps else step
    found = [sample for sample in samples if sample["step"] == wanted]
    if not found:
        listed = ", ".join(map(str, steps)) or "none"
        raise ConfigError(
            f"there are no samples of step {wanted}", where=str(path), do=f"choose one of the steps written: {listed}"
        )
    if row is not None and not 0 <= row < len(found):
        raise ConfigError(
            f"there is no row {row}", where=f"step {wanted}", do=f"choose one of the rows 0 to {len(found) - 1}"
        )
    console.title(f"step {wanted}: tokens coloured by {paint} ({COLUMN_UNITS[paint]}), green above 0, red below")
    for number, sample in enumerate(found):
        if row is None or row == number:
            _print_row(number, sample, paint, console)


def _print_row(number: int, sample: dict[str, Any], paint: str, console: Console) -> None:
    end = "" if sample["finished"] else ", no end token"
    console.text(f"\nrow {number}: score {sample['score']:.3f}, KL {sample['kl']:.3f} nats{end}")
    console.text(f"  {sample['prompt']}")
    console.paint(paint_tokens(sample["tokens"], paint))
    rows = [
        [str(t), repr(token["token"]), *(f"{token[c]:.3f}" for c in TOKEN_COLUMNS)]
        for t, token in enumerate(sample["tokens"])
    ]
    totals = ["", "sum", *(f"{sum(token[c] for token in sample['tokens']):.3f}" for c in TOKEN_COLUMNS)]
    console.table(f"row {number}", ["t", "token", *TOKEN_COLUMNS], [*rows, totals])


def paint_tokens(tokens: list[dict[str, Any]], paint: str) -> Text:
    """Return the response with a background colour per token: its value relative to the largest absolute one."""
    largest = max((abs(token[paint]) for token in tokens), default=0.0) or 1.0
    text = Text("  ")
    for token in tokens:
        strength = abs(token[paint]) / largest
        level = round(40 + 160 * strength)
        colour = f"rgb(0,{level},0)" if token[paint] >= 0 else f"rgb({level},0,0)"
        text.append(token["token"], style=f"white on {colour}")
    return text
