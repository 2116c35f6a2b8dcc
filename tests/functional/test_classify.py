"""The classifier's loss and the weights of its labels."""

import pytest
import torch

from rlhf import functional as F
from rlhf.errors import ShapeError
from tests import oracles
from tests.tolerances import assert_close, assert_quoted


def drawn(seed, multi_label, dtype=torch.float64, rows=9, labels=5):
    """Logits, soft targets, weights."""
    generator = torch.Generator().manual_seed(seed)
    z, t = (3 * torch.randn(rows, labels, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = 2 * torch.rand(labels, generator=generator, dtype=torch.float64)
    return z.to(dtype), (t.sigmoid() if multi_label else t.softmax(1)).to(dtype), weight.to(dtype)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_follows_the_equation(seed, dtype, multi_label):
    logits, target, weight = drawn(seed, multi_label, dtype)
    plain = F.classification_loss(logits, target, multi_label=multi_label)
    assert (plain.dtype, plain.shape) == (dtype, (9,))
    assert_close(plain, oracles.classification_loss(logits, target, multi_label, torch.ones(5)))
    weighted = F.classification_loss(logits, target, multi_label=multi_label, weight=weight)
    assert_close(weighted, oracles.classification_loss(logits, target, multi_label, weight.double()))
    assert (weighted - plain).abs().max() > 0.1
    square = F.classification_loss(logits.view(3, 3, 5), target.view(3, 3, 5), multi_label=multi_label, weight=weight)
    assert_close(square.flatten(), weighted.tolist())


@pytest.mark.parametrize("multi_label", [False, True])
def test_balanced_weights_follow_the_equation(multi_label):
    _, target, _ = drawn(3, multi_label)
    assert_close(F.balanced_weights(target, multi_label=multi_label), oracles.balanced_weights(target, multi_label))


def test_it_gives_the_tabulated_numbers():
    """softmax(1, 2, 3) = 0.0900, 0.2447, 0.6652; sigma(1, 2, 3) = 0.7311, 0.8808, 0.9526."""
    z = torch.tensor([[1.0, 2.0, 3.0]])
    assert_quoted(F.classification_loss(z, torch.tensor([[1.0, 0.0, 0.0]]), multi_label=False), [2.407606])
    assert_quoted(F.classification_loss(z, torch.tensor([[0.0, 0.5, 0.5]]), multi_label=False), [0.907606])
    mixed = torch.tensor([[1.0, 0.0, 1.0]])
    assert_quoted(F.classification_loss(z, mixed, multi_label=True), [(0.313262 + 2.126928 + 0.048587) / 3])
    weight = torch.tensor([2.0, 9.0, 0.0])
    assert_quoted(F.classification_loss(z, mixed, multi_label=True, weight=weight), [(2 * 0.313262 + 2.126928) / 3])


def test_balanced_weights_of_one_record_in_four():
    exclusive = torch.tensor([[1.0, 0.0]] + [[0.0, 1.0]] * 3)
    assert_close(F.balanced_weights(exclusive, multi_label=False), [2.0, 2 / 3])
    assert_close(F.balanced_weights(exclusive, multi_label=True), [3.0, 1 / 3])


@pytest.mark.parametrize("multi_label", [False, True])
def test_it_neither_overflows_nor_loses_its_gradient(multi_label):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0, 0.0]] * 2)
    loss = F.classification_loss(logits, target, multi_label=multi_label)
    loss.sum().backward()
    if multi_label:
        assert_close(loss, [0.693147 / 3, (2e4 + 0.693147) / 3])
        assert_close(logits.grad, [[0.0, 0.0, 1 / 6], [-1 / 3, 1 / 3, 1 / 6]])
    else:
        assert_close(loss, [0.0, 2e4])
        assert_close(logits.grad, [[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0]])


def test_a_label_that_cannot_hold_costs_nothing_however_unlikely():
    """0 log 0 = 0 also where the probability rounds to 0."""
    logits, target = torch.tensor([[1e30, -1e30]]), torch.tensor([[1.0, 0.0]])
    for multi_label in (False, True):
        assert F.classification_loss(logits, target, multi_label=multi_label).tolist() == [0.0]


def test_half_precision_logits_are_compared_in_float32():
    for multi_label in (False, True):
        logits, target, _ = drawn(4, multi_label, torch.bfloat16)
        target = target.double() if multi_label else torch.eye(5).repeat(2, 1)[:9]
        loss = F.classification_loss(logits, target.float(), multi_label=multi_label)
        assert loss.dtype == torch.float32
        assert_close(loss, F.classification_loss(logits.double(), target.float().double(), multi_label=multi_label))


def test_whole_numbers_are_targets_too():
    logits, _, _ = drawn(5, False, rows=5)
    labels = torch.eye(5)[[3, 0, 0, 4, 2]]
    for given in (labels.long(), labels.bool()):
        assert_close(
            F.classification_loss(logits, given, multi_label=False),
            F.classification_loss(logits, labels.double(), multi_label=False),
        )


def test_wrong_arguments_are_refused():
    for multi_label in (False, True):
        logits, target, weight = drawn(6, multi_label)
        with pytest.raises(ShapeError, match=r"classification_loss.*logits \[9, 5\], target \[1, 5\]"):
            F.classification_loss(logits, target[:1], multi_label=multi_label)
        for wrong in (weight[:4], weight[None], torch.tensor(1.0)):
            with pytest.raises(ValueError, match="one weight a label"):
                F.classification_loss(logits, target, multi_label=multi_label, weight=wrong)
        for value in (1.1, -0.1, float("nan")):
            bad = target.clone()
            bad[2, 1] = value
            with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
                F.classification_loss(logits, bad, multi_label=multi_label)


@pytest.mark.parametrize("row", [[0.0, 0.0], [1.0, 1.0], [0.6, 0.3]])
def test_labels_that_exclude_each_other_make_a_distribution(row):
    target = torch.tensor([[1.0, 0.0], row])
    with pytest.raises(ValueError, match="must sum to 1"):
        F.classification_loss(torch.zeros(2, 2), target, multi_label=False)
    assert_quoted(F.classification_loss(torch.zeros(2, 2), target, multi_label=True), [0.693147] * 2)


def test_a_label_with_nothing_to_balance_it_is_named():
    never, always = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    for multi_label in (False, True):
        with pytest.raises(
            ValueError, match="label 1 has a share of 0" if not multi_label else "label 0 has a share of 1"
        ):
            F.balanced_weights(never, multi_label=multi_label)
    with pytest.raises(ValueError, match="label 1 has a share of 1"):
        F.balanced_weights(always, multi_label=True)
