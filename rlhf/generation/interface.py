"""The interface of generators, which PPO and evaluation use to sample responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rlhf.rollout.types import Rollout

NumberedPrompt = tuple[int, list[int]]
"""A prompt's number, from which its random numbers are derived, and its token ids."""


class Generator(Protocol):
    """Interface of an object that samples responses to prompts."""

    def generate(self, prompts: Sequence[NumberedPrompt], step: int) -> Rollout:
        """Sample one response for each prompt.

        Args:
            prompts: the prompts with their numbers.
            step: number of the rollout; another step gives other responses.
        Returns: a rollout of len(prompts) rows, in the order given. A response depends on the engine's seed, `step` and
            the prompt's number, not on the other prompts of the call or on the number of processes.
        """
        ...
