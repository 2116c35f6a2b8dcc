"""Laws of the classifier's loss and of its weights; otherwise as `laws`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.tolerances import assert_close

F64 = torch.float64
B, N = 12, 4


def _normal(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _target(seed: int, multi_label: bool, *, hard: bool = False) -> Tensor:
    """[B, N]: soft labels, or certain ones that follow no regular order and of which every label has another share."""
    if not hard:
        return _normal(seed, B, N).sigmoid() if multi_label else _normal(seed, B, N).softmax(dim=1)
    draws = torch.rand(B, N, generator=torch.Generator().manual_seed(seed), dtype=F64)
    if multi_label:
        held = draws < torch.tensor([0.2, 0.4, 0.5, 0.8], dtype=F64)
        held[0], held[1] = True, False  # each label holds once at least, and once not
        return held.to(F64)
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3])[draws[:, 0].argsort()]
    return torch.nn.functional.one_hot(labels, N).to(F64)


def _weight(seed: int) -> Tensor:
    return 0.2 + torch.rand(N, generator=torch.Generator().manual_seed(seed + 7), dtype=F64)


def shifting_all_logits_changes_nothing_if_labels_exclude_each_other(f, seed):
    logits, target = _normal(seed, B, N), _target(seed + 1, False)
    for weight in (None, _weight(seed)):
        expected = f.classification_loss(logits, target, multi_label=False, weight=weight)
        assert_close(f.classification_loss(logits + 7, target, multi_label=False, weight=weight), expected)


def equal_logits_cost_ln_n_or_ln_2(f, seed):
    for hard in (True, False):
        for level in (0.0, -3.0):
            exclusive = f.classification_loss(
                torch.full((B, N), level, dtype=F64), _target(seed, False), multi_label=False
            )
            assert_close(exclusive, [math.log(N)] * B)
        independent = f.classification_loss(
            torch.zeros(B, N, dtype=F64), _target(seed, True, hard=hard), multi_label=True
        )
        assert_close(independent, [math.log(2)] * B)


def the_loss_is_least_where_probabilities_equal_the_target(f, seed):
    for multi_label in (False, True):
        target = _target(seed, multi_label)
        best = (torch.logit(target) if multi_label else target.log()).requires_grad_()
        loss = f.classification_loss(best, target, multi_label=multi_label)
        loss.sum().backward()
        assert_close(best.grad, torch.zeros(B, N))
        for size in (0.01, 0.3):
            away = f.classification_loss(best + size * _normal(seed + 2, B, N), target, multi_label=multi_label)
            assert (away > loss).all()


def the_label_gradient_is_probability_minus_target(f, seed):
    """Also far from the minimum, where badly wrong records must learn most."""
    for multi_label in (False, True):
        logits, target = (6 * _normal(seed, B, N)).requires_grad_(), _target(seed + 1, multi_label, hard=True)
        f.classification_loss(logits, target, multi_label=multi_label).sum().backward()
        p = logits.sigmoid() / N if multi_label else logits.softmax(dim=1)
        assert_close(logits.grad, p - (target / N if multi_label else target))


def any_split_of_a_batch_has_its_loss_and_gradient(f, seed):
    """Weights are not divided out: a record counts the same whatever stands beside it."""
    weight = 3 * _weight(seed)

    def mean(multi_label: bool, sizes: list[int]) -> tuple[Tensor, Tensor]:
        logits, target = _normal(seed, B, N).requires_grad_(), _target(seed + 1, multi_label, hard=True)
        total = torch.zeros((), dtype=F64)
        for z, t in zip(logits.split(sizes), target.split(sizes), strict=True):
            total = total + f.classification_loss(z, t, multi_label=multi_label, weight=weight).mean() * len(z) / B
        (gradient,) = torch.autograd.grad(total, logits)
        return total, gradient

    for multi_label in (False, True):
        whole = mean(multi_label, [B])
        for sizes in ([1] * B, [5, 1, 6]):
            for part, expected in zip(mean(multi_label, sizes), whole, strict=True):
                assert_close(part, expected)


def a_weight_multiplies_what_its_label_costs(f, seed):
    logits, weight = _normal(seed, B, N), _weight(seed)
    target = _target(seed, False, hard=True)
    plain = f.classification_loss(logits, target, multi_label=False)
    weighted = f.classification_loss(logits, target, multi_label=False, weight=weight)
    assert_close(weighted, plain * weight[target.argmax(dim=1)])
    for multi_label, holds in ((False, _target(seed, False)), (True, torch.ones(B, N, dtype=F64))):
        one = f.classification_loss(logits, holds, multi_label=multi_label, weight=weight)
        assert_close(f.classification_loss(logits, holds, multi_label=multi_label, weight=3 * weight), 3 * one)


def a_weight_leaves_the_negative_part_alone(f, seed):
    logits, nothing = _normal(seed, B, N), torch.zeros(B, N, dtype=F64)
    expected = f.classification_loss(logits, nothing, multi_label=True)
    assert_close(f.classification_loss(logits, nothing, multi_label=True, weight=_weight(seed)), expected)


def the_order_of_labels_does_not_matter(f, seed):
    order = torch.tensor([2, 0, 3, 1])
    logits, weight = _normal(seed, B, N), _weight(seed)
    for multi_label in (False, True):
        target = _target(seed + 1, multi_label)
        expected = f.classification_loss(logits, target, multi_label=multi_label, weight=weight)
        turned = f.classification_loss(
            logits[:, order], target[:, order], multi_label=multi_label, weight=weight[order]
        )
        assert_close(turned, expected)
        assert_close(
            f.balanced_weights(target[:, order], multi_label=multi_label),
            f.balanced_weights(target, multi_label=multi_label)[order],
        )


def balanced_weights_give_exclusive_labels_the_same_say_and_records_a_mean_of_1(f, seed):
    for hard in (True, False):
        target = _target(seed, False, hard=hard)
        weight = f.balanced_weights(target, multi_label=False)
        assert_close((target * weight).sum(dim=0), [B / N] * N)
        assert_close((target * weight).sum(dim=1).mean(), 1.0)


def balanced_weights_give_yes_and_no_the_same_say(f, seed):
    """Where nothing is known yet, the records that have a label cost in sum what the others do."""
    for hard in (True, False):
        target = _target(seed, True, hard=hard)
        weight = f.balanced_weights(target, multi_label=True)
        assert_close((target * weight).sum(dim=0), (1 - target).sum(dim=0))
        logits = torch.zeros(B, N, dtype=F64, requires_grad=True)
        f.classification_loss(logits, target, multi_label=True, weight=weight).sum().backward()
        assert_close(logits.grad.sum(dim=0), torch.zeros(N))
