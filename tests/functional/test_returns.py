"""Shaped rewards and generalized advantages."""

import pytest
import torch

from rlhf import functional as F
from rlhf.errors import ShapeError
from tests import oracles
from tests.tolerances import assert_close, assert_quoted

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (3, 1), (1, 9)])
@pytest.mark.parametrize("seed", [0, 1])
def test_shaped_rewards_follow_the_equation(seed, shape, dtype):
    mask = oracles.ragged_mask(seed, *shape)
    kl, scores = oracles.ragged(seed, mask, dtype), torch.randn(shape[0]).to(dtype)
    result = F.shaped_rewards(scores, kl, mask, 0.3)
    assert result.dtype == dtype
    assert_close(result, oracles.shaped_rewards(scores, kl, mask, 0.3))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.7, 1.0), (1.0, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (3, 1), (1, 9)])
def test_advantages_follow_the_equation(shape, dtype, gamma, lam):
    mask = oracles.ragged_mask(3, *shape)
    rewards, values = oracles.ragged(4, mask, dtype), oracles.ragged(5, mask, dtype)
    result = F.gae(rewards, values, mask, gamma=gamma, lam=lam)
    assert result.dtype == dtype
    assert_close(result, oracles.gae(rewards, values, mask, gamma, lam))
    assert (result[~mask] == 0).all()


def test_returns_of_a_terminal_reward():
    row = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    everything = torch.ones(1, 4, dtype=torch.bool)
    assert_quoted(row + F.gae(row, row, everything, gamma=0.9, lam=0.95), [[0.657922, 0.7695, 0.9, 1.0]])


@pytest.mark.parametrize(
    ("lam", "expected"),
    [(0.0, [0.0, -0.15, 0.38, 0.4]), (0.95, [0.5434, 0.572, 0.76, 0.4]), (1.0, [0.63, 0.63, 0.78, 0.4])],
)
def test_advantages_worked_out_by_hand(lam, expected):
    rewards, values = torch.tensor([[-0.1, 0.05, -0.02, 1.0]]), torch.tensor([[0.3, 0.4, 0.2, 0.6]])
    result = F.gae(rewards, values, torch.ones(1, 4, dtype=torch.bool), gamma=1.0, lam=lam)
    assert_quoted(result, [expected])


def test_the_score_on_the_last_token_gives_the_end_token_its_full_advantage():
    """R_eos + s - V_eos = 0.6. One position later, with a value of 0.2 there, it would be 0.56."""
    mask = torch.tensor([[True, True, False]])
    rewards = F.shaped_rewards(torch.tensor([1.0]), torch.zeros(1, 3), mask, 0.1)
    values = torch.tensor([[0.1, 0.4, 0.2]])
    assert_quoted(F.gae(rewards, values, mask, gamma=1.0, lam=0.95)[0, 1], 0.6)


def test_nan_off_mask_reaches_nothing():
    mask = oracles.ragged_mask(6, 4, 6)
    x, y = (oracles.ragged(seed, mask, torch.float32) for seed in (7, 8))
    dirty_x, dirty_y = (t.masked_fill(~mask, float("nan")) for t in (x, y))
    clean = F.gae(x, y, mask, gamma=0.9, lam=0.9)
    assert torch.equal(F.gae(dirty_x, dirty_y, mask, gamma=0.9, lam=0.9), clean)
    scores = torch.ones(4)
    assert torch.equal(F.shaped_rewards(scores, dirty_x, mask, 0.1), F.shaped_rewards(scores, x, mask, 0.1))


def test_neither_keeps_a_gradient():
    mask = oracles.ragged_mask(0, 3, 4)
    x = torch.zeros(3, 4, requires_grad=True)
    assert not F.gae(x, x, mask, gamma=1.0, lam=1.0).requires_grad
    assert not F.shaped_rewards(torch.zeros(3, requires_grad=True), x, mask, 0.1).requires_grad


def test_half_precision_is_accumulated_in_float32():
    mask = torch.ones(1, 1000, dtype=torch.bool)
    rewards = torch.full((1, 1000), 1.0, dtype=torch.bfloat16)
    result = F.gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)
    assert result.dtype == torch.float32
    assert result[0, 0].item() == 1000.0
    mixed = F.shaped_rewards(torch.tensor([1.0 + 2.0**-30], dtype=torch.float64), rewards, mask, 0.0)
    assert mixed[0, -1].item() == 1.0 + 2.0**-30


BAD_MASKS = {
    "empty row": torch.tensor([[True, True, False], [False, False, False]]),
    "hole": torch.tensor([[True, False, True], [True, True, True]]),
    "left padding": torch.tensor([[False, True, True], [True, True, True]]),
    "no columns": torch.zeros(2, 0, dtype=torch.bool),
    "one dimension": torch.tensor([True, True]),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_a_mask_that_is_not_a_prefix_is_refused(name):
    mask = BAD_MASKS[name]
    x = torch.zeros(mask.shape)
    with pytest.raises(ShapeError, match="gae"):
        F.gae(x, x, mask, gamma=1.0, lam=1.0)
    with pytest.raises(ShapeError, match="shaped_rewards"):
        F.shaped_rewards(torch.zeros(2), x, mask, 0.1)


def test_the_error_names_the_rows():
    mask = BAD_MASKS["empty row"]
    with pytest.raises(ShapeError, match=r"rows \[1\]"):
        F.gae(torch.zeros(2, 3), torch.zeros(2, 3), mask, gamma=1.0, lam=1.0)


def test_wrong_arguments_are_refused():
    mask, x = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3)
    for rewards, values in ((x, x[:, :2]), (x[:1], x), (x, x[0])):
        with pytest.raises(ShapeError):
            F.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    with pytest.raises(TypeError):
        F.gae(x, x, mask.long(), gamma=1.0, lam=1.0)
    for gamma, lam in ((1.1, 1.0), (1.0, -0.1), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="gamma"):
            F.gae(x, x, mask, gamma=gamma, lam=lam)
    for scores in (torch.zeros(3), torch.zeros(2, 1), torch.zeros(1), torch.tensor(0.0)):
        with pytest.raises(ShapeError, match="scores"):
            F.shaped_rewards(scores, x, mask, 0.1)
    with pytest.raises(ShapeError):
        F.shaped_rewards(torch.zeros(2), x[:, :2], mask, 0.1)
    with pytest.raises(TypeError):
        F.shaped_rewards(torch.zeros(2), x, mask.float(), 0.1)
