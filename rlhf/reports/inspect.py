"""Look into a PPO run: the tokens of a rollout, painted by one of their numbers, and all numbers in a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.text import Text

from rlhf.console import Console
from rlhf.errors import ConfigError
from rlhf.runs.metrics import read_jsonl

PAINTABLE_NUMBERS = ("logprob", "kl", "value", "advantage", "reward")
PAINTABLE_UNITS = {"logprob": "nats", "kl": "nats", "value": "score", "advantage": "whitened", "reward": "score"}


def inspect_rollout(run: Path, console: Console, *, step: int | None, row: int | None, paint: str) -> None:
    """Print the samples of a step (the last one written, if None).

    Raises: ConfigError if the run has no samples, or none of that step or row, or `paint` is no column.
    """
    path = run / "samples.jsonl"
    if not path.is_file():
        raise ConfigError("no samples here", where=str(run), do="give the run directory of a ppo stage")
    if paint not in PAINTABLE_NUMBERS:
        raise ConfigError("no such number", found=paint, where="--paint", do=f"one of {', '.join(PAINTABLE_NUMBERS)}")
    samples = list(read_jsonl(path))
    steps = sorted({sample["step"] for sample in samples})
    wanted = steps[-1] if step is None and steps else step
    found = [sample for sample in samples if sample["step"] == wanted]
    if not found:
        listed = ", ".join(map(str, steps)) or "none"
        raise ConfigError(f"no samples of step {wanted}", where=str(path), do=f"steps written: {listed}")
    if row is not None and not 0 <= row < len(found):
        raise ConfigError(f"no row {row}", where=f"step {wanted}", do=f"rows 0 to {len(found) - 1}")
    console.title(f"step {wanted}: tokens painted by {paint} ({PAINTABLE_UNITS[paint]}), green above 0, red below")
    for number, sample in enumerate(found):
        if row is None or row == number:
            _show(number, sample, paint, console)


def _show(number: int, sample: dict[str, Any], paint: str, console: Console) -> None:
    end = "" if sample["finished"] else ", not ended"
    console.text(f"\nrow {number}: score {sample['score']:.3f}, KL {sample['kl']:.3f} nats{end}")
    console.text(f"  {sample['prompt']}")
    console.paint(paint_tokens(sample["tokens"], paint))
    rows = [
        [str(t), repr(token["token"]), *(f"{token[c]:.3f}" for c in PAINTABLE_NUMBERS)]
        for t, token in enumerate(sample["tokens"])
    ]
    totals = ["", "sum", *(f"{sum(token[c] for token in sample['tokens']):.3f}" for c in PAINTABLE_NUMBERS)]
    console.table(f"row {number}", ["t", "token", *PAINTABLE_NUMBERS], [*rows, totals])


def paint_tokens(tokens: list[dict[str, Any]], paint: str) -> Text:
    """The response with a background that says how large each token's number is, relative to the largest of the row."""
    largest = max((abs(token[paint]) for token in tokens), default=0.0) or 1.0
    text = Text("  ")
    for token in tokens:
        strength = abs(token[paint]) / largest
        level = round(40 + 160 * strength)
        colour = f"rgb(0,{level},0)" if token[paint] >= 0 else f"rgb({level},0,0)"
        text.append(token["token"], style=f"white on {colour}")
    return text
