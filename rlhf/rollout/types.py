"""PPO's data types: Rollout (sampled tokens), ScoredRollout (adds the models' outputs), Experience (adds advantages).

One padded row with prompt `a b` and response `c d .`, where `.` is the end token (P = 3, R = 4):

    prompt_ids       _ a b          prompt_mask      0 1 1          left-padded
    response_ids           c d . _  response_mask          1 1 1 0  right-padded, end token inside the mask
    logprobs[t]            log pi(c | a b), log pi(d | a b c), ...
    values[t]              V(a b), V(a b c), V(a b c d)             before token t is emitted
    rewards[t]             -kl -kl score-kl 0                       score on the last real token
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf.errors import ShapeError

RolloutT = TypeVar("RolloutT", bound="Rollout")


@dataclass(frozen=True)
class Rollout:
    """Prompt and response tokens of B episodes.

    Example (B = 2): prompt_ids [[0, 5, 6], [7, 8, 9]], prompt_mask [[F, T, T], [T, T, T]],
    response_ids [[4, 2, 0], [3, 3, 3]], response_mask [[T, T, F], [T, T, T]], finished [True, False], index [12, 3],
    sampled_logprobs [[-0.7, -0.1, 0], [-1.2, -0.9, -2.3]].
    """

    prompt_ids: Tensor  # [B, P] int64, left-padded
    prompt_mask: Tensor  # [B, P] bool
    response_ids: Tensor  # [B, R] int64, right-padded
    response_mask: Tensor  # [B, R] bool, a prefix of each row
    finished: Tensor  # [B] bool, the end token was sampled
    index: Tensor  # [B] int64, number of the episode within the step
    sampled_logprobs: Tensor  # [B, R] nats, as computed while sampling
    support: Tensor  # [B, R, ceil(V / 8)] uint8, bits of the tokens that could be sampled; [B, R, 0] = all tokens

    def __len__(self) -> int:
        return int(self.response_ids.shape[0])

    def validate(self) -> None:
        """Check shapes, dtypes and masks.

        Raises: ShapeError if one is wrong.
        """
        size = len(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if value.shape[0] != size:
                raise ShapeError(f"{field.name} has another number of rows", found=f"{tuple(value.shape)}, B = {size}")
        if self.prompt_ids.shape != self.prompt_mask.shape or self.response_ids.shape != self.response_mask.shape:
            raise ShapeError("ids and masks differ in shape", where="Rollout")
        for name in ("prompt_mask", "response_mask", "finished"):
            if getattr(self, name).dtype != torch.bool:
                raise ShapeError(f"{name} must be bool", found=str(getattr(self, name).dtype))
        if not bool(self.response_mask.any(dim=1).all()):
            raise ShapeError("a response without a token", where="Rollout.response_mask")
        if not bool((self.response_mask.long().diff(dim=1) <= 0).all()):
            raise ShapeError("response_mask is not a prefix", where="Rollout.response_mask")

    @property
    def ids(self) -> Tensor:
        """Return the token ids of prompt and response, [B, P + R] int64."""
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @property
    def mask(self) -> Tensor:
        """Return the mask of the real tokens of prompt and response, [B, P + R] bool."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)

    @property
    def response_length(self) -> Tensor:
        """Return the number of real tokens of each response, [B] int64."""
        return self.response_mask.sum(dim=1)

    def select(self: RolloutT, rows: Tensor) -> RolloutT:
        """Return some of the rows, without the padding that none of them needs."""
        selected = replace(self, **{f.name: getattr(self, f.name)[rows] for f in fields(self)})
        prompt = int(selected.prompt_mask.sum(dim=1).max())
        response = int(selected.response_length.max())
        cut: dict[str, Any] = {}
        for f in fields(selected):
            value = getattr(selected, f.name)
            if f.name in ("prompt_ids", "prompt_mask"):
                cut[f.name] = value[:, value.shape[1] - prompt :]
            elif value.dim() >= 2:
                cut[f.name] = value[:, :response]
        return replace(selected, **cut)

    def to(self: RolloutT, device: torch.device) -> RolloutT:
        """Return a copy with all tensors on the device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True)
class ScoredRollout(Rollout):
    """A rollout with the outputs of policy, reference, value model and rewards; each row is scored by itself."""

    old_logprobs: Tensor  # [B, R] nats, teacher-forced, at the sampling temperature
    ref_logprobs: Tensor  # [B, R] nats
    values: Tensor  # [B, R] score units, V before token t
    raw_scores: Tensor  # [B] weighted sum of all rewards


@dataclass(frozen=True)
class Experience(ScoredRollout):
    """A scored rollout with everything that the update needs. No tensor requires a gradient."""

    scores: Tensor  # [B] score units: rescaled, clipped, end-token rule applied
    rewards: Tensor  # [B, R] score units, KL penalty included
    advantages: Tensor  # [B, R] whitened if configured
    returns: Tensor  # [B, R] un-whitened advantage + value

    @property
    def kl_per_sequence(self) -> Tensor:
        """Return the sum over response tokens of log pi - log pi_ref, [B] nats: the k1 estimate of KL(pi || ref)."""
        return ((self.old_logprobs - self.ref_logprobs) * self.response_mask).sum(dim=1)


def merge_rollouts(parts: list[RolloutT], pad_id: int) -> RolloutT:
    """Concatenate rollouts (or experiences) along the batch dimension, in order, and pad them to one width."""
    max_prompt = max(p.prompt_ids.shape[1] for p in parts)
    max_response = max(p.response_ids.shape[1] for p in parts)
    columns: dict[str, Tensor] = {}
    for f in fields(parts[0]):
        rows = []
        for part in parts:
            value = getattr(part, f.name)
            if f.name == "support":
                value = torch.nn.functional.pad(value, (0, 0, 0, max_response - value.shape[1]), value=255)
            elif value.dim() == 2:
                left = f.name in ("prompt_ids", "prompt_mask")
                missing = (max_prompt if left else max_response) - value.shape[1]
                fill = pad_id if f.name.endswith("_ids") else 0
                value = torch.nn.functional.pad(value, (missing, 0) if left else (0, missing), value=fill)
            rows.append(value)
        columns[f.name] = torch.cat(rows)
    return type(parts[0])(**columns)
