"""The policy loss and the value loss."""

import math

import pytest
import torch

from rlhf import functional as F
from rlhf.errors import ShapeError
from tests import oracles
from tests.tolerances import assert_close, assert_quoted

EVERYTHING = torch.ones(6, 8, dtype=torch.bool)


def three(seed, dtype, scale=1.0):
    return [oracles.ragged(seed + k, EVERYTHING, dtype, scale) for k in (0, 10, 20)]


@pytest.mark.parametrize(("high", "dual"), [(None, None), (0.28, None), (None, 3.0), (0.5, 1.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 1])
def test_policy_loss_follows_the_equation(seed, dtype, high, dual):
    logp, old, advantages = three(seed, dtype)
    result = F.policy_loss(logp, old, advantages, clip_range=0.2, clip_range_high=high, dual_clip=dual)
    assert result.dtype == dtype
    assert_close(result, oracles.policy_loss(logp, old, advantages, 0.2, high or 0.2, dual))


@pytest.mark.parametrize("clip_range", [0.2, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 1])
def test_value_loss_follows_the_equation(seed, dtype, clip_range):
    values, old, returns = three(seed, dtype)
    result = F.value_loss(values, old, returns, clip_range=clip_range)
    assert result.dtype == dtype
    assert_close(result, oracles.value_loss(values, old, returns, clip_range))


@pytest.mark.parametrize(
    ("advantage", "ratio", "dual", "loss", "saturated"),
    [
        (1.0, 0.5, None, -0.5, False),
        (1.0, 1.0, None, -1.0, False),
        (1.0, 1.5, None, -1.2, True),
        (1.0, 10.0, None, -1.2, True),
        (1.0, 10.0, 3.0, -1.2, True),
        (-1.0, 0.5, None, 0.8, True),
        (-1.0, 1.0, None, 1.0, False),
        (-1.0, 1.5, None, 1.5, False),
        (-1.0, 10.0, None, 10.0, False),
        (-1.0, 10.0, 3.0, 3.0, True),
    ],
)
def test_clip_table(advantage, ratio, dual, loss, saturated):
    logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    zero, a = torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    result = F.policy_loss(logp, zero, a, clip_range=0.2, dual_clip=dual)
    result.sum().backward()
    assert_quoted(result, [loss])
    assert_quoted(logp.grad, [0.0 if saturated else -advantage * ratio])


def test_the_upper_limit_can_differ_from_the_lower():
    logp = torch.tensor([math.log(1.25), math.log(1.4), math.log(0.75)], dtype=torch.float64)
    a = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    result = F.policy_loss(logp, torch.zeros_like(a), a, clip_range=0.2, clip_range_high=0.28)
    assert_quoted(result, [-1.25, -1.28, 0.8])


def test_an_extreme_ratio_stays_finite_and_stops_the_gradient():
    logp = torch.tensor([1000.0, -1000.0, 19.0], requires_grad=True)
    loss = F.policy_loss(logp, torch.zeros(3), -torch.ones(3), clip_range=0.2)
    loss.sum().backward()
    assert_close(loss / math.exp(20), [1.0, 0.8 / math.exp(20), math.exp(-1)])
    assert_close(logp.grad / math.exp(20), [0.0, 0.0, math.exp(-1)])


@pytest.mark.parametrize(
    ("value", "loss", "gradient"), [(1.0, 1.62, 0.0), (-1.0, 4.5, -3.0), (0.1, 1.805, -1.9), (0.0, 2.0, -2.0)]
)
def test_value_clip_table(value, loss, gradient):
    v = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    old, returns = torch.zeros(1, dtype=torch.float64), torch.full((1,), 2.0, dtype=torch.float64)
    result = F.value_loss(v, old, returns, clip_range=0.2)
    result.sum().backward()
    assert_quoted(result, [loss])
    assert_quoted(v.grad, [gradient])


def test_only_the_trained_argument_gets_a_gradient():
    for function in (F.policy_loss, F.value_loss):
        trained, second, third = (t.requires_grad_() for t in three(2, torch.float32, 0.1))
        function(trained, second, third, clip_range=0.2).sum().backward()
        assert trained.grad.abs().max() > 0, function.__name__
        assert second.grad is None, function.__name__
        assert third.grad is None, function.__name__


def test_half_precision_is_computed_in_float32():
    half = [t.bfloat16() for t in three(3, torch.float32)]
    exact = [t.double() for t in half]
    policy = F.policy_loss(*half, clip_range=0.2)
    assert policy.dtype == torch.float32
    assert_close(policy, F.policy_loss(*exact, clip_range=0.2))
    assert_close(F.value_loss(*half, clip_range=0.2), F.value_loss(*exact, clip_range=0.2))


@pytest.mark.parametrize("function", [F.policy_loss, F.value_loss])
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_shapes_that_would_broadcast_are_refused(function, wrong):
    tensors = [torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)]
    tensors[wrong] = torch.zeros(2, 1)
    with pytest.raises(ShapeError, match=function.__name__):
        function(*tensors, clip_range=0.2)


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_range": 0.0},
        {"clip_range": 1.0},
        {"clip_range": float("nan")},
        {"clip_range": 0.2, "clip_range_high": 0.0},
        {"clip_range": 0.2, "dual_clip": 1.0},
    ],
    ids=str,
)
def test_ranges_without_meaning_are_refused(settings):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="clip_range"):
        F.policy_loss(x, x, x, **settings)
    for clip_range in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="clip_range"):
            F.value_loss(x, x, x, clip_range=clip_range)
