"""Answers of a model to prompts, with what can be measured on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.config.sections import Sampling
from rlhf.data.collate import pad_right
from rlhf.data.render import Renderer
from rlhf.generation.native import generate_rollout
from rlhf.models.heads import position_ids, sequence_scores
from rlhf.rollout.teacher_forcing import response_logprobs
from rlhf.rollout.types import Rollout


@dataclass(frozen=True)
class GeneratedResponse:
    """One response."""

    text: str
    length: int  # tokens, end token included
    finished: bool  # ended by itself
    kl: float | None = None  # nats: log-ratio to the reference, summed over the response
    score: float | None = None  # of a reward model


@torch.no_grad()
def generate_responses(
    model: Any,
    prompts: Sequence[list[int]],
    renderer: Renderer,
    settings: Sampling,
    *,
    seed: int,
    draw: int = 0,
    reference: Any = None,
    reward_model: Any = None,
    numbers: Sequence[int] | None = None,
) -> list[GeneratedResponse]:
    """Draw one response for each prompt and measure it.

    Args:
        draw: another number gives another independent response.
        reference: model that KL is measured against (k1 estimate on these samples), or None.
        numbers: of the prompts in their data (default: 0, 1, ...). A response depends on its prompt's number, not on
            the other prompts of a call.
    """
    if not prompts:
        return []
    device = next(model.parameters()).device
    numbered = list(zip(range(len(prompts)) if numbers is None else numbers, prompts, strict=True))
    rollout = generate_rollout(
        model,
        numbered,
        settings,
        seed=seed,
        step=draw,
        end_id=renderer.end_id,
        pad_id=renderer.pad_id,
        device=device,
        decode=renderer.tokenizer.decode,
    )
    kl = None
    if reference is not None:
        kl = torch.zeros(len(rollout)) if reference is model else _log_ratio(reference, rollout, settings)
    scores = _scores(reward_model, rollout) if reward_model is not None else None
    answers = []
    for row in range(len(rollout)):
        ids = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        ratio = None if kl is None else float(kl[row])
        score = None if scores is None else float(scores[row])
        answers.append(GeneratedResponse(renderer.decode(ids), len(ids), bool(rollout.finished[row]), ratio, score))
    return answers


def _log_ratio(reference: Any, rollout: Rollout, settings: Sampling) -> torch.Tensor:
    """Summed log-ratio of what the model said while sampling to what the reference says, [B] nats."""
    out = torch.zeros(len(rollout))
    for rows in rollout.mask.sum(dim=1).argsort().split(64):
        part = rollout.select(rows)
        theirs = response_logprobs(reference, part, settings.temperature or 1.0)[0]
        out[rows.cpu()] = (part.sampled_logprobs - theirs).sum(dim=1).cpu()
    return out


def _scores(reward_model: Any, rollout: Rollout) -> torch.Tensor:
    out = torch.zeros(len(rollout))
    for rows in rollout.mask.sum(dim=1).argsort().split(64):
        part = rollout.select(rows)
        out[rows.cpu()] = sequence_scores(reward_model, part.ids, part.mask).cpu()
    return out


@torch.no_grad()
def score_sequences(reward_model: Any, rows: Sequence[list[int]], pad_id: int) -> list[float]:
    """Reward-model scores of whole sequences (prompt and response), in order."""
    device = next(reward_model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out = [0.0] * len(rows)
    for start in range(0, len(order), 64):
        chunk = order[start : start + 64]
        ids, mask = pad_right([rows[i] for i in chunk], pad_id)
        scores = sequence_scores(reward_model, ids.to(device), mask.to(device)).tolist()
        for i, value in zip(chunk, scores, strict=True):
            out[i] = value
    return out


@torch.no_grad()
def perplexity(model: Any, rows: Sequence[list[int]], pad_id: int) -> float:
    """exp of the mean negative log-likelihood per token of held-out text."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for start in range(0, len(rows), 32):
        ids, mask = pad_right(rows[start : start + 32], pad_id)
        ids, mask = ids.to(device), mask.to(device)
        logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask)).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        total += float((nll * mask[:, 1:]).sum())
        count += int(mask[:, 1:].sum())
    return float(torch.tensor(total / max(count, 1)).exp())
