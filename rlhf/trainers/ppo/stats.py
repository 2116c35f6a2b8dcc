"""Metrics of a scored rollout, by the names in `runs.metrics`."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.functional import explained_variance, kl_estimate
from rlhf.rollout.types import Experience

StepStats = dict[str, float]


def rollout_stats(e: Experience) -> StepStats:
    """Return means over the episodes of all processes: scores, three KL estimates, lengths, explained variance."""
    mask, length = e.response_mask, e.response_length.float()

    def summed(kind: str) -> float:
        return float((kl_estimate(e.old_logprobs, e.ref_logprobs, kind) * mask).sum(dim=1).mean())

    return {
        "score": float(e.raw_scores.mean()),
        "score_normalized": float(e.scores.mean()),
        "score_std": float(e.raw_scores.std(unbiased=False)),
        "score_length_correlation": correlation(e.raw_scores, length),
        "kl": float(e.kl_per_sequence.mean()),
        "kl_k2": summed("k2"),
        "kl_k3": summed("k3"),
        "response_length": float(length.mean()),
        "finished": float(e.finished.float().mean()),
        "sampling_mismatch": float(((e.sampled_logprobs - e.old_logprobs).abs() * mask).max()),
        "explained_variance": float(explained_variance(e.values, e.returns, mask)),
    }


def correlation(x: Tensor, y: Tensor) -> float:
    """Return Pearson's correlation of two [B] tensors, or 0 if one of them is constant."""
    if len(x) < 2 or float(x.std()) < 1e-6 or float(y.std()) < 1e-6:
        return 0.0
    return float(torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1])
