"""Masked sums, means, moments, whitening, explained variance and the token mean."""

import pytest
import torch

from rlhf import functional as F
from rlhf.errors import ShapeError
from tests import oracles
from tests.tolerances import assert_close, assert_quoted

DTYPES = [torch.float32, torch.float64]
SEEDS = [0, 1, 2]
NAN = float("nan")


def batch(seed, dtype, shape=(5, 7), scale=1.0):
    mask = oracles.ragged_mask(seed, *shape)
    return oracles.ragged(seed, mask, dtype, scale), mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_sums_means_and_moments_follow_the_equations(seed, dtype):
    x, mask = batch(seed, dtype)
    assert_close(F.masked_sum(x, mask), oracles.masked_sum(x, mask))
    assert_close(F.masked_mean(x, mask), oracles.masked_mean(x, mask))
    assert_close(F.masked_moments(x, mask), oracles.masked_moments(x, mask))
    rows = [oracles.masked_mean(x[b], mask[b]) for b in range(len(x))]
    assert_close(F.masked_mean(x, mask, dim=1), rows)
    assert_close(F.masked_sum(x, mask, dim=-1), [oracles.masked_sum(x[b], mask[b]) for b in range(len(x))])


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_whitening_follows_the_equation(seed, dtype, center):
    x, mask = batch(seed, dtype, scale=3.0)
    x = x + 10
    result = F.masked_whiten(x, mask, center=center)
    assert result.dtype == dtype
    assert_close(result, oracles.masked_whiten(x, mask, center))


@pytest.mark.parametrize("dtype", DTYPES)
def test_whitening_gives_the_published_numbers(dtype):
    x = torch.linspace(1.2, 2.0, 9, dtype=dtype).reshape(3, 3)
    everything = torch.ones(3, 3, dtype=torch.bool)
    kept = F.masked_whiten(x, everything, center=False)
    assert_quoted(kept[0], [0.050807, 0.438105, 0.825403])
    assert_quoted(kept[1, 1], 1.6)
    assert_quoted(kept[2, 2], 3.149193)
    removed = F.masked_whiten(x, everything)
    assert_quoted(removed[0], [0.050807 - 1.6, 0.438105 - 1.6, 0.825403 - 1.6])


@pytest.mark.parametrize("noise", [1e-5, 1e-7])
@pytest.mark.parametrize("level", [0.0, 1.0, -7.3])
def test_whitening_does_not_turn_noise_into_signal(level, noise):
    generator = torch.Generator().manual_seed(0)
    x = level + noise * torch.randn(64, 8, generator=generator, dtype=torch.float64)
    everything = torch.ones(64, 8, dtype=torch.bool)
    assert F.masked_whiten(x, everything).abs().max() < 0.05
    assert_close(F.masked_whiten(torch.full_like(x, level), everything), torch.zeros_like(x))


def test_rounding_of_large_numbers_is_noise_too():
    rounding = torch.randint(-1, 2, (64, 8), generator=torch.Generator().manual_seed(0)) * 2.0**-6  # one float32 step
    x = 2.0**17 + rounding
    white = F.masked_whiten(x, torch.ones(64, 8, dtype=torch.bool))
    assert x.std() > 1e-3  # the absolute limit alone would let this through
    assert white.abs().max() < 0.2


def test_whitening_has_no_jump_at_the_limit_and_is_exact_above_it():
    pattern = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    everything = torch.ones(4, dtype=torch.bool)
    for std, expected in ((2e-3, 1.0), (1.001e-3, 1.0), (0.999e-3, 0.999), (0.5e-3, 0.5)):
        assert_close(F.masked_whiten(std * pattern, everything), expected * pattern)


def test_a_large_mean_does_not_cost_precision():
    x, mask = batch(0, torch.float64)
    assert_quoted(F.masked_whiten(x + 1e5, mask), F.masked_whiten(x, mask).tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_explained_variance_follows_the_equation(seed, dtype):
    returns, mask = batch(seed, dtype)
    values = 0.7 * returns + oracles.ragged(seed + 10, mask, dtype, 0.3)
    assert_close(F.explained_variance(values, returns, mask), oracles.explained_variance(values, returns, mask))


def test_explained_variance_of_perfect_shifted_and_constant_values():
    returns, mask = batch(3, torch.float64)
    assert_close(F.explained_variance(returns, returns, mask), 1.0)
    assert_close(F.explained_variance(returns + 5, returns, mask), 1.0)  # blind to an offset, as documented
    assert_close(F.explained_variance(torch.ones_like(returns), returns, mask), 0.0)
    assert F.explained_variance(-returns, returns, mask) < 0


def test_explained_variance_of_constant_returns_is_zero():
    values, mask = batch(4, torch.float32)
    constant = torch.full_like(values, 2.5)
    noisy = constant + 1e-5 * values.clamp(-3, 3)
    for returns in (constant, noisy):
        assert_close(F.explained_variance(values, returns, mask), 0.0)
        assert_close(F.explained_variance(returns, returns, mask), 0.0)


def test_a_nan_that_counts_is_reported_not_hidden():
    x, mask = batch(5, torch.float32)
    x[0, 0] = NAN
    clean = torch.zeros_like(x)
    assert F.masked_mean(x, mask).isnan()
    assert F.masked_whiten(x, mask)[0, 1].isnan()
    assert F.explained_variance(clean, x, mask).isnan()
    assert F.explained_variance(x, batch(6, torch.float32)[0], mask).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_off_mask_reaches_nothing(dtype):
    x, mask = batch(7, dtype)
    dirty = x.masked_fill(~mask, NAN)
    for function in (F.masked_sum, F.masked_mean, F.masked_moments, F.masked_whiten):
        assert torch.equal(function(dirty, mask), function(x, mask)), function.__name__
    assert torch.equal(F.explained_variance(dirty, dirty * 2, mask), F.explained_variance(x, x * 2, mask))
    leaf = dirty.clone().requires_grad_()
    F.token_mean(leaf, mask, total=int(mask.sum())).backward()
    assert_close(leaf.grad, mask.double() / mask.sum())


@pytest.mark.parametrize("total", [12, 12.0, torch.tensor(12)])
def test_token_mean_divides_by_the_given_total(total):
    x, mask = batch(8, torch.float64)
    assert_close(F.token_mean(x, mask, total=total), oracles.masked_sum(x, mask) / 12)


def test_token_mean_of_everything_is_the_masked_mean_and_of_nothing_zero():
    x, mask = batch(9, torch.float64)
    assert_close(F.token_mean(x, mask, total=mask.sum()), oracles.masked_mean(x, mask))
    assert_close(F.token_mean(x, torch.zeros_like(mask), total=5), 0.0)


def test_half_precision_and_bool_are_averaged_in_float32():
    mask = torch.ones(1, 4096, dtype=torch.bool)
    x = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    assert F.masked_sum(x, mask).item() == 4096.0
    assert F.masked_sum(x, mask).dtype == F.masked_whiten(x, mask).dtype == torch.float32
    assert_close(F.masked_mean(torch.tensor([True, False, True, True]), torch.ones(4, dtype=torch.bool)), 0.75)


def test_whitened_numbers_and_metrics_keep_no_gradient():
    x, mask = batch(10, torch.float32)
    x.requires_grad_()
    assert not F.masked_whiten(x, mask).requires_grad
    assert not F.masked_moments(x, mask).requires_grad
    assert not F.explained_variance(x, x, mask).requires_grad
    assert F.masked_mean(x, mask).requires_grad


ON_MASK = [F.masked_sum, F.masked_mean, F.masked_moments, F.masked_whiten]


@pytest.mark.parametrize("function", [*ON_MASK, lambda x, m: F.token_mean(x, m, total=1)])
def test_wrong_masks_are_refused(function):
    x = torch.zeros(2, 3)
    with pytest.raises(ShapeError, match=r"\[2, 3\].*\[3\]"):
        function(x, torch.ones(3, dtype=torch.bool))  # would broadcast
    with pytest.raises(TypeError, match="bool"):
        function(x, torch.ones(2, 3))
    with pytest.raises(TypeError, match="bool"):
        function(x, torch.ones(2, 3, dtype=torch.long))


def test_empty_masks_are_refused_where_there_is_no_answer():
    x, nothing = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    half = torch.tensor([[True, True, True], [False, False, False]])
    for call in (
        lambda: F.masked_mean(x, nothing),
        lambda: F.masked_mean(x, half, dim=1),
        lambda: F.masked_whiten(x, nothing),
        lambda: F.explained_variance(x, x, nothing),
    ):
        with pytest.raises(ShapeError):
            call()
    assert F.masked_sum(x, nothing) == 0


def test_explained_variance_and_token_mean_check_their_arguments():
    x, mask = batch(11, torch.float32)
    with pytest.raises(ShapeError):
        F.explained_variance(x, x[:, :1], mask)
    with pytest.raises(TypeError):
        F.explained_variance(x, x, mask.float())
    with pytest.raises(ShapeError):
        F.token_mean(x, mask, total=torch.ones(1))
    for total in (0, -3, NAN):
        with pytest.raises(ValueError, match="total"):
            F.token_mean(x, mask, total=total)
