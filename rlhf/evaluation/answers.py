"""Responses of a model to prompts, with their KL and scores, and the perplexity of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.config.sections import Sampling
from rlhf.data.collate import pad_right
from rlhf.data.render import Renderer
from rlhf.generation.native import generate_rollout
from rlhf.models.heads import position_ids, sequence_scores
from rlhf.models.output_layer import next_token_positions, token_numbers
from rlhf.rollout.teacher_forcing import response_logprobs
from rlhf.rollout.types import Rollout


@dataclass(frozen=True)
class GeneratedResponse:
    """One response of a model, with its measurements."""

    text: str
    length: int  # tokens, with the end token
    finished: bool  # whether it ended with a stop token or string, not at the length limit
    kl: float | None = None  # log-ratio to the reference, summed over the response, nats
    score: float | None = None  # of a reward model


@contextmanager
def on_device(model: Any, device: torch.device) -> Iterator[None]:
    """Context manager inside which a model is on a device; afterwards it is where it was before."""
    before = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


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
    device: torch.device | None = None,
) -> list[GeneratedResponse]:
    """Sample one response to each prompt and measure it; one model is on the device at a time.

    Args:
        model: causal LM.
        prompts: token ids of the prompts.
        renderer: renderer of the model's tokenizer.
        settings: sampling settings.
        seed: seed of the sampling.
        draw: number of the sample; each number gives independent responses.
        reference: model that the KL is measured against (log-ratio of these samples), or None.
        reward_model: model that scores the responses, or None.
        numbers: number of each prompt in its data; None = 0, 1, ... The random numbers of a response depend on the
            number of its prompt, not on the other prompts of the call.
        device: where to compute; models elsewhere are moved there while they are used. None = where the model is.
    """
    if not prompts:
        return []
    device = device if device is not None else next(model.parameters()).device
    numbered = list(zip(range(len(prompts)) if numbers is None else numbers, prompts, strict=True))
    with on_device(model, device):
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
    kl = scores = None
    if reference is model:
        kl = torch.zeros(len(rollout))
    elif reference is not None:
        with on_device(reference, device):
            kl = _log_ratio(reference, rollout, settings)
    if reward_model is not None:
        with on_device(reward_model, device):
            scores = _scores(reward_model, rollout)
    answers = []
    for row in range(len(rollout)):
        ids = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        ratio = None if kl is None else float(kl[row])
        score = None if scores is None else float(scores[row])
        answers.append(GeneratedResponse(renderer.decode(ids), len(ids), bool(rollout.finished[row]), ratio, score))
    return answers


def _log_ratio(reference: Any, rollout: Rollout, settings: Sampling) -> torch.Tensor:
    """Return the log-ratio of the model while sampling to the reference, summed over each response, [B] nats."""
    out = torch.zeros(len(rollout))
    for rows in rollout.mask.sum(dim=1).argsort().split(64):
        part = rollout.select(rows)
        logprobs = response_logprobs(reference, part, settings.temperature or 1.0)[0]
        out[rows.cpu()] = (part.sampled_logprobs - logprobs).sum(dim=1).cpu()
    return out


def _scores(reward_model: Any, rollout: Rollout) -> torch.Tensor:
    out = torch.zeros(len(rollout))
    for rows in rollout.mask.sum(dim=1).argsort().split(64):
        part = rollout.select(rows)
        out[rows.cpu()] = sequence_scores(reward_model, part.ids, part.mask).cpu()
    return out


@torch.no_grad()
def score_sequences(reward_model: Any, rows: Sequence[list[int]], pad_id: int) -> list[float]:
    """Return the reward model's scores of sequences (prompt and response), in the order given."""
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
    """Return the perplexity of text: exp of the mean negative log-likelihood per token."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for start in range(0, len(rows), 32):
        ids, mask = pad_right(rows[start : start + 32], pad_id)
        ids, mask = ids.to(device), mask.to(device)
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": position_ids(mask)}
        targets = ids[:, 1:][mask[:, 1:]]
        total -= float(token_numbers(model, inputs, next_token_positions(mask), targets).logprobs.double().sum())
        count += len(targets)
    return float(torch.tensor(total / max(count, 1)).exp())
