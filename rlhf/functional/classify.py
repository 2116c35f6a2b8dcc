"""The loss of a classifier with N labels, and the weights that make rare labels count."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax

from rlhf.functional.checks import as_float, same_shape


def classification_loss(logits: Tensor, target: Tensor, *, several: bool, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of N labels against what is known about them.

        exclusive        loss = - sum_n w_n t_n log softmax(z)_n
        several at once  loss = - 1/N sum_n [w_n t_n log sigma(z_n) + (1 - t_n) log sigma(-z_n)]

    Limits: equal logits and w = 1 give ln N, or ln 2 if several. A number added to all logits changes nothing if the
    labels exclude each other. The minimum lies where the probabilities equal t (w = 1), so soft labels are learnt as
    such. Weights multiply the record's loss and are not divided out again, so that any split of a batch gives the same
    gradient; with `balanced_weights` their mean over the records is 1 (exclusive labels).

    Args:
        logits: [..., N].
        target: [..., N], in [0, 1]: a distribution over the labels, or of each label the probability that it holds.
        several: labels are independent.
        weight: [N], >= 0, or None for 1: of a label, or, if several, of its positive part.
    Returns: [...], nats, >= 0.
    Does not: average over records.
    Raises: ShapeError if the shapes differ; ValueError for a target outside [0, 1], a target that is no distribution
        although labels exclude each other, or another number of weights.
    """
    same_shape("classification_loss", logits=logits, target=target)
    z, t = as_float(logits), as_float(target)
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"classification_loss: target must lie in [0, 1] (found: {t.min()} to {t.max()})")
    if weight is not None and weight.shape != z.shape[-1:]:
        raise ValueError(f"classification_loss: one weight a label (found: {list(weight.shape)} for {z.shape[-1]})")
    if several:
        return binary_cross_entropy_with_logits(z, t, pos_weight=weight, reduction="none").mean(dim=-1)
    if not bool(((t.sum(dim=-1) - 1).abs() < 1e-4).all()):
        raise ValueError("classification_loss: the labels exclude each other, so a target must sum to 1")
    loss = -t * log_softmax(z, dim=-1)
    return (loss if weight is None else loss * weight).sum(dim=-1)


def balanced_weights(target: Tensor, *, several: bool) -> Tensor:
    """Weights that give every label the same say.

        exclusive        w_n = 1 / (N share_n)            the mean weight of a record is 1
        several at once  w_n = (1 - share_n) / share_n    yes and no of a label weigh the same

    Args:
        target: [B, N] of the training records; share_n is its mean over records.
    Returns: [N].
    Raises: ValueError if a label never holds, or, if several, always does: there is nothing to balance it with.
    """
    share = as_float(target).mean(dim=0)
    bad = (share <= 0) | ((share >= 1) if several else torch.zeros_like(share).bool())
    if bool(bad.any()):
        raise ValueError(f"balanced_weights: label {int(bad.nonzero()[0])} has a share of {float(share[bad][0]):g}")
    return (1 - share) / share if several else 1 / (len(share) * share)
