"""The cases of tests/bench/gpu.py: model shapes, rollouts, their order, and the time that a case may take.

Imports neither torch nor our package: the process that starts the measured ones must not touch the GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]
PHASES = ("sample", "score", "update")
ROWS = 8  # of a minibatch; TRL computes it in one backward pass
SHORTEST_RUN = {"tiny": 5.0, "0.6b": 60.0, "8b": 90.0}  # seconds; with less time left, a case is not started


@dataclass(frozen=True)
class Shape:
    """Shape of a Qwen3 model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool


SHAPES = {
    "0.6b": Shape(1024, 28, 16, 8, 128, 3072, 151936, True),
    "8b": Shape(4096, 36, 32, 8, 128, 12288, 151936, False),
    "tiny": Shape(64, 2, 4, 2, 16, 128, 512, True),
}


@dataclass(frozen=True)
class Case:
    """PPO steps of one side on one shape."""

    side: str  # ours or trl
    shape: str
    episodes: int
    response: int  # tokens
    lora: int = 0  # rank; 0 = all weights are trained
    shortest: int = 150  # tokens of the prompts
    longest: int = 190
    microbatch: int = ROWS  # rows of our backward passes
    steps: int = 1  # timed steps, after one that warms up
    seed: int = 1

    @property
    def name(self) -> str:
        """What is trained on which rollout, as the table calls it."""
        trained = f"LoRA r{self.lora}, bfloat16 base" if self.lora else "all weights"
        return f"{self.side}, {self.shape}, {trained}, {self.episodes} x {self.response}"

    @property
    def minibatches(self) -> int:
        """Optimizer steps of a PPO step."""
        return max(1, self.episodes // ROWS)


def cases(shape: str | None) -> list[Case]:
    """Return the cases in the order of their importance.

    Args:
        shape: the shape to measure; None = 0.6b and 8b. Microbatches of 8b are as small as `rlhf check` asks for with
            80 GB.
    """
    if shape == "tiny":
        short = {"shortest": 8, "longest": 16}
        return [Case(side, "tiny", 16, 8, lora, **short) for side, lora in (("ours", 0), ("ours", 4), ("trl", 0))]
    every = [
        Case("ours", "0.6b", 64, 256),
        Case("ours", "8b", 64, 256, lora=16, microbatch=4),
        Case("trl", "0.6b", 64, 256),
        Case("ours", "0.6b", 128, 512),
        Case("ours", "8b", 128, 512, lora=16, microbatch=2),
        Case("ours", "0.6b", 64, 256, lora=16),
        Case("trl", "0.6b", 128, 512),
        Case("ours", "0.6b", 128, 512, lora=16),
    ]
    return [case for case in every if shape in (None, case.shape)]


def timed(result: Result) -> list[dict[str, float]]:
    """Return the steps of a result after the one that warms up, or that one if there is no other."""
    steps: list[dict[str, float]] = result.get("steps", [])
    return steps[1:] or steps


def median(result: Result, name: str) -> float:
    """Return the median over the timed steps of one of their numbers."""
    return statistics.median(step[name] for step in timed(result))


def expected_seconds(case: Case, done: Sequence[tuple[Case, Result]]) -> float:
    """Return the seconds that a case will probably take: those of the same side, shape and training, scaled.

    Sampling grows with the length of the responses (more rows are decoded side by side), everything else with the
    number of response tokens. Without such a case it is a lower bound, `SHORTEST_RUN`.
    """
    least = SHORTEST_RUN[case.shape]
    for other, result in done:
        alike = (other.side, other.shape, other.lora) == (case.side, case.shape, case.lora)
        if not alike or not result.get("steps"):
            continue
        longer = case.response / other.response
        step = median(result, "sample") * longer
        step += (median(result, "step") - median(result, "sample")) * longer * case.episodes / other.episodes
        least = max(least, result["load"] + step * (1 + case.steps))
    return least


def problem_of(result: Mapping[str, Any]) -> str:
    """Return why a case has no complete result, or an empty text."""
    status = result["status"]
    if status == "measured" and len(result["steps"]) == 1:
        return "only the first step ended in time, which includes the warm-up"
    if status == "out of memory":
        return f"out of memory in the phase '{result['phase']}'"
    return "" if status == "measured" else f"{status}: {result['reason']}"
