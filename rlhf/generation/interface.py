"""What every engine that generates responses offers to PPO and to evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rlhf.rollout.types import Rollout

NumberedPrompt = tuple[int, list[int]]
"""A prompt's number, which its random draws follow from, and its token ids."""


class Generator(Protocol):
    """Draws responses to prompts."""

    def generate(self, prompts: Sequence[NumberedPrompt], step: int) -> Rollout:
        """Draw one response for each prompt.

        Args:
            step: number of the rollout; another step draws other responses.
        Returns: a rollout of len(prompts) rows, in the order given. A response depends on the engine's seed, `step` and
            the prompt's number, not on the other prompts of the call or on the number of processes.
        """
        ...
