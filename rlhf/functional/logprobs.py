"""Log-probabilities and entropies of tokens, in float32 whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.errors import ShapeError
from rlhf.functional.checks import as_float


def _scaled(where: str, logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"{where}: temperature must be > 0 (found: {temperature})")
    logits = as_float(logits)
    return logits if temperature == 1.0 else logits / temperature


def token_logprobs(logits: Tensor, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the log-probability of each given token.

        logp_t = z_t[id_t] / T - log sum_v exp(z_t[v] / T)

    The softmax of the language model; T is the sampling temperature. The same T must be used for sampling, for old,
    new and reference log-probabilities, else the first importance ratio is not 1 (Huang et al. 2024,
    arXiv:2403.17031). T -> infinity gives -ln V for every token. Logits of -inf are tokens that cannot occur: their
    log-probability is -inf.

    Args:
        logits: [.., V]. Logits at position t score ids at t: the shift by one is already done. Any float dtype;
            computed in float32 (float64 stays float64), because a log-softmax in bfloat16 errs by up to 0.04 nats.
        ids: [..] int64, each in [0, V), padding included (padding is masked later, so any valid id will do).
        temperature: dimensionless, > 0.
    Returns: [..] nats, <= 0 up to rounding. Differentiable in logits.
    Does not: shift, mask, filter (top-k, top-p) or sum over the sequence.
    Raises: ShapeError if logits without the last dimension and ids differ in shape; ValueError if temperature <= 0.
    """
    if logits.shape[:-1] != ids.shape:
        raise ShapeError(
            "logits must be [.., V] for ids [..]",
            found=f"logits {list(logits.shape)}, ids {list(ids.shape)}",
            where="token_logprobs",
        )
    logits = _scaled("token_logprobs", logits, temperature)
    # Picking one logit before normalising keeps one float32 copy of [.., V] for the backward pass, not two.
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def token_entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the entropy of the next-token distribution.

        H_t = - sum_v p_t[v] log p_t[v]          p_t = softmax(z_t / T)

    Equal logits give ln V, one certain token gives 0. A token of probability 0 (logit -inf) adds 0.

    Args:
        logits: [.., V], any float dtype; computed in float32 (float64 stays float64).
        temperature: dimensionless, > 0; the sampling temperature if the entropy is to be that of the samples.
    Returns: [..] nats, in [0, ln V] up to rounding. Differentiable in logits.
    Does not: mask or average; it is the exact entropy of one step, not an estimate of the entropy of whole sequences.
    Raises: ValueError if temperature <= 0.
    """
    logp = torch.log_softmax(_scaled("token_entropy", logits, temperature), dim=-1)
    p = logp.exp()
    return -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)
