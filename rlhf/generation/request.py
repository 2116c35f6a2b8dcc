"""What a decoder is asked for: prompts, sampling settings, and what identifies the random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.config.sections import Sampling
from rlhf.data.collate import pad_left
from rlhf.generation.interface import NumberedPrompt
from rlhf.generation.sampling import uniform_numbers
from rlhf.generation.stop_strings import StopStrings


@dataclass(frozen=True)
class DecodingRequest:
    """One response to each of some prompts."""

    prompts: Sequence[NumberedPrompt]
    settings: Sampling
    seed: int
    step: int  # number of the rollout
    end_id: int
    pad_id: int
    device: torch.device
    stops: StopStrings | None = None

    def padded_prompts(self) -> tuple[Tensor, Tensor]:
        """Return the prompts left-padded on the device: ids [B, P] int64 and mask [B, P] bool, True = real token."""
        ids, mask = pad_left([prompt for _, prompt in self.prompts], self.pad_id)
        return ids.to(self.device), mask.to(self.device)

    def prompt_numbers(self) -> Tensor:
        """Return the prompts' numbers, [B] int64."""
        return torch.tensor([number for number, _ in self.prompts], dtype=torch.long, device=self.device)

    def uniform_numbers(self) -> Tensor:
        """Return the random numbers of each response, [B, max_new_tokens] in [0, 1)."""
        length = self.settings.max_new_tokens
        rows = [uniform_numbers(self.seed, self.step, number, length) for number, _ in self.prompts]
        return torch.stack(rows).to(self.device)
