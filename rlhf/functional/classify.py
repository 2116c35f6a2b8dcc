"""The loss of a classifier with N labels, and label weights that balance rare and frequent labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax

from rlhf.functional.checks import as_float, same_shape


def classification_loss(logits: Tensor, target: Tensor, *, multi_label: bool, weight: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of each record's labels.

        exclusive    loss = - sum_n w_n t_n log softmax(z)_n
        multi-label  loss = - 1/N sum_n [w_n t_n log sigma(z_n) + (1 - t_n) log sigma(-z_n)]

    Limits: equal logits and w = 1 give ln N for exclusive labels and ln 2 for multi-label. A constant added to all
    logits changes nothing if the labels exclude each other. With w = 1 the minimum lies where the probabilities equal
    t, so soft labels are learnt as such. Weights multiply the record's loss and are not divided out again, so that any
    split of a batch gives the same gradient; the weights of `balanced_weights` have a mean of 1 over the records
    (exclusive labels).

    Args:
        logits: [..., N].
        target: [..., N], in [0, 1]. Exclusive: a distribution over the labels. Multi-label: for each label, the
            probability that it holds.
        multi_label: any number of labels may hold at once (a sigmoid each) instead of exactly one (softmax).
        weight: [N], >= 0; None means 1. Exclusive: the weight of each label. Multi-label: the weight of each label's
            positive term.
    Returns: [...], nats, >= 0.
    Does not: average over records.
    Raises: ShapeError if the shapes differ; ValueError if a target is outside [0, 1], if a target of exclusive labels
        does not sum to 1, or if the number of weights is not N.
    """
    same_shape("classification_loss", logits=logits, target=target)
    z, t = as_float(logits), as_float(target)
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"classification_loss: target must lie in [0, 1] (found: {t.min()} to {t.max()})")
    if weight is not None and weight.shape != z.shape[-1:]:
        raise ValueError(f"classification_loss: one weight a label (found: {list(weight.shape)} for {z.shape[-1]})")
    if multi_label:
        return binary_cross_entropy_with_logits(z, t, pos_weight=weight, reduction="none").mean(dim=-1)
    if not bool(((t.sum(dim=-1) - 1).abs() < 1e-4).all()):
        raise ValueError("classification_loss: the labels exclude each other, so a target must sum to 1")
    loss = -t * log_softmax(z, dim=-1)
    return (loss if weight is None else loss * weight).sum(dim=-1)


def balanced_weights(target: Tensor, *, multi_label: bool) -> Tensor:
    """Return label weights under which rare and frequent labels contribute equally to `classification_loss`.

        exclusive    w_n = 1 / (N share_n)            the mean weight of a record is 1
        multi-label  w_n = (1 - share_n) / share_n    the positive and negative terms of a label weigh the same

    Args:
        target: [B, N], the targets of the training records; share_n is the mean of column n.
        multi_label: any number of labels may hold at once.
    Returns: [N].
    Raises: ValueError if a label never holds, or, for multi-label, if it always holds: no weight can balance it.
    """
    share = as_float(target).mean(dim=0)
    bad = (share <= 0) | ((share >= 1) if multi_label else torch.zeros_like(share).bool())
    if bool(bad.any()):
        raise ValueError(f"balanced_weights: label {int(bad.nonzero()[0])} has a share of {float(share[bad][0]):g}")
    return (1 - share) / share if multi_label else 1 / (len(share) * share)
