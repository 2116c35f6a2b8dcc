"""Broken twins of the classifier's loss and of its weights; otherwise as `twins`."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from rlhf import functional as F

# classification_loss


def labels_always_independent(logits, target, *, multi_label, weight=None):
    return F.classification_loss(logits, target, multi_label=True, weight=weight)


def labels_without_normaliser(logits, target, *, multi_label, weight=None):
    """Minus the label's own logit: the cross-entropy before its logarithm of a sum."""
    if multi_label:
        return F.classification_loss(logits, target, multi_label=True, weight=weight)
    return -(target * logits * (1.0 if weight is None else weight)).sum(-1)


def labels_summed(logits, target, *, multi_label, weight=None):
    return F.classification_loss(logits, target, multi_label=multi_label, weight=weight) * (
        logits.shape[-1] if multi_label else 1
    )


def labels_averaged(logits, target, *, multi_label, weight=None):
    return F.classification_loss(logits, target, multi_label=multi_label, weight=weight) / (
        1 if multi_label else logits.shape[-1]
    )


def labels_in_bits(logits, target, *, multi_label, weight=None):
    return F.classification_loss(logits, target, multi_label=multi_label, weight=weight) / math.log(2)


def labels_rounded(logits, target, *, multi_label, weight=None):
    hard = (target > 0.5).to(target.dtype)
    if not multi_label:
        hard = torch.nn.functional.one_hot(target.argmax(-1), target.shape[-1]).to(target.dtype)
    return F.classification_loss(logits, hard, multi_label=multi_label, weight=weight)


def labels_smoothed(logits, target, *, multi_label, weight=None):
    floor = 0.5 if multi_label else 1 / target.shape[-1]
    return F.classification_loss(logits, 0.9 * target + 0.1 * floor, multi_label=multi_label, weight=weight)


def labels_squared(logits, target, *, multi_label, weight=None):
    """Brier's score has its minimum in the same place but another gradient: hardly any for badly wrong records."""
    p = logits.sigmoid() if multi_label else logits.softmax(-1)
    error = (p - target).square() * (1.0 if weight is None else weight)
    return error.mean(-1) if multi_label else error.sum(-1)


def labels_floored(logits, target, *, multi_label, weight=None):
    """log(p + 1e-5), which stops learning from badly wrong records."""
    w = 1.0 if weight is None else weight
    if multi_label:
        p = logits.sigmoid()
        return -(w * target * (p + 1e-5).log() + (1 - target) * (1 - p + 1e-5).log()).mean(-1)
    return -(w * target * (logits.softmax(-1) + 1e-5).log()).sum(-1)


def labels_weights_divided_out(logits, target, *, multi_label, weight=None):
    """As `cross_entropy(weight=...)`: the batch's mean is over weights, so it depends on who stands beside whom."""
    loss = F.classification_loss(logits, target, multi_label=multi_label, weight=weight)
    if weight is None:
        return loss
    size = (target * weight).sum(-1) if not multi_label else (target * weight + 1 - target).mean(-1)
    return loss / size.mean()


def labels_weights_normalised(logits, target, *, multi_label, weight=None):
    weight = None if weight is None else weight / weight.sum() * len(weight)
    return F.classification_loss(logits, target, multi_label=multi_label, weight=weight)


def labels_weights_ignored(logits, target, *, multi_label, weight=None):
    return F.classification_loss(logits, target, multi_label=multi_label)


def labels_weigh_both_parts(logits, target, *, multi_label, weight=None):
    if not multi_label:
        return cross_entropy(logits, target, weight=weight, reduction="none")
    return binary_cross_entropy_with_logits(logits, target, weight=weight, reduction="none").mean(-1)


def labels_weigh_the_negative_part(logits, target, *, multi_label, weight=None):
    if weight is None or not multi_label:
        return F.classification_loss(logits, target, multi_label=multi_label, weight=weight)
    return F.classification_loss(-logits, 1 - target, multi_label=True, weight=weight)


def labels_weights_in_another_order(logits, target, *, multi_label, weight=None):
    weight = None if weight is None else weight.sort().values
    return F.classification_loss(logits, target, multi_label=multi_label, weight=weight)


# balanced_weights


def balance_without_n(target, *, multi_label):
    return F.balanced_weights(target, multi_label=multi_label) * (1 if multi_label else target.shape[-1])


def balance_by_the_root(target, *, multi_label):
    return F.balanced_weights(target, multi_label=multi_label).sqrt()


def balance_upside_down(target, *, multi_label):
    return 1 / F.balanced_weights(target, multi_label=multi_label)


def balance_as_if_exclusive(target, *, multi_label):
    return F.balanced_weights(target, multi_label=False)


def balance_by_the_share_alone(target, *, multi_label):
    return 1 / target.mean(0) if multi_label else F.balanced_weights(target, multi_label=False)


def balance_counts_hard_labels(target, *, multi_label):
    hard = target > 0.5 if multi_label else target == target.amax(-1, keepdim=True)
    return F.balanced_weights(hard.to(target.dtype), multi_label=multi_label)
