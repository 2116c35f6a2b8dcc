"""The Bradley-Terry loss."""

import pytest
import torch

from rlhf import functional as F
from rlhf.errors import ShapeError
from tests import oracles
from tests.tolerances import assert_close, assert_quoted


def scores(seed, dtype, shape=(6,)):
    generator = torch.Generator().manual_seed(seed)
    return [(4 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("shape", [(6,), (6, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_follows_the_equation(seed, dtype, shape):
    chosen, rejected = scores(seed, dtype, shape)
    margin, preference = (torch.rand(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    none, certain = torch.zeros_like(chosen), torch.ones_like(chosen)
    loss, oracle = F.bradley_terry_loss, oracles.bradley_terry_loss
    assert loss(chosen, rejected).dtype == dtype
    assert_close(loss(chosen, rejected), oracle(chosen, rejected, none, certain))
    assert_close(loss(chosen, rejected, margin=margin), oracle(chosen, rejected, margin, certain))
    assert_close(loss(chosen, rejected, preference=preference), oracle(chosen, rejected, none, preference))
    both = loss(chosen, rejected, margin=margin, preference=preference)
    assert_close(both, oracle(chosen, rejected, margin, preference))


def test_it_gives_the_tabulated_numbers():
    d = torch.tensor([0.0, 1.0, -1.0, 5.0, -5.0])
    loss = F.bradley_terry_loss(d, torch.zeros(5))
    assert_quoted(loss, [0.693147, 0.313262, 1.313262, 0.006715, 5.006715])


def test_it_neither_overflows_nor_loses_its_gradient():
    d = torch.tensor([-1000.0, -89.0, -15.0, 1000.0], requires_grad=True)
    loss = F.bradley_terry_loss(d, torch.zeros(4))
    loss.sum().backward()
    assert_close(loss, [1000.0, 89.0, 15.0, 0.0])
    assert_close(d.grad, [-1.0, -1.0, -1.0, 0.0])


def test_label_smoothing_has_its_optimum_at_the_logit():
    d = torch.tensor([2.197225], dtype=torch.float64, requires_grad=True)
    F.bradley_terry_loss(d, torch.zeros_like(d), preference=0.9).sum().backward()
    assert_quoted(d.grad, [0.0])
    around = d.detach() + torch.tensor([-0.1, 0.0, 0.1])
    loss = F.bradley_terry_loss(around, torch.zeros_like(around), preference=0.9)
    assert loss.argmin() == 1


def test_numbers_stand_for_tensors_filled_with_them():
    chosen, rejected = scores(2, torch.float64)
    filled = {"margin": torch.full_like(chosen, 0.3), "preference": torch.full_like(chosen, 0.8)}
    numbers = F.bradley_terry_loss(chosen, rejected, margin=0.3, preference=0.8)
    assert_close(numbers, F.bradley_terry_loss(chosen, rejected, **filled))


def test_certain_preference_is_the_default():
    chosen, rejected = scores(3, torch.float64)
    assert_close(F.bradley_terry_loss(chosen, rejected, preference=1), F.bradley_terry_loss(chosen, rejected))
    assert_close(F.bradley_terry_loss(chosen, rejected, preference=0.0), F.bradley_terry_loss(rejected, chosen))


def test_half_precision_scores_are_compared_in_float32():
    chosen, rejected = (s.bfloat16() for s in scores(4, torch.float64))
    loss = F.bradley_terry_loss(chosen, rejected)
    assert_close(loss, F.bradley_terry_loss(chosen.double(), rejected.double()))
    assert loss.dtype == torch.float32


def test_wrong_arguments_are_refused():
    chosen, rejected = scores(5, torch.float32)
    for given in ({"margin": torch.zeros(1)}, {"preference": torch.ones(6, 1)}):
        with pytest.raises(ShapeError):
            F.bradley_terry_loss(chosen, rejected, **given)
    with pytest.raises(ShapeError):
        F.bradley_terry_loss(chosen, rejected[:1])
    for preference in (1.1, -0.1, float("nan"), torch.tensor([0.5] * 5 + [2.0])):
        with pytest.raises(ValueError, match="preference"):
            F.bradley_terry_loss(chosen, rejected, preference=preference)
