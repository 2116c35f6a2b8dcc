"""Tests of win rates, their intervals, and the KL of best-of-n."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf.evaluation.stats import best_of_n_kl, bootstrap_mean, win_indicators
from tests.tolerances import assert_quoted

SEED = 20240
TRIALS, PROMPTS, P = 200, 100, 0.7


def test_win_loss_and_tie() -> None:
    assert win_indicators([2, 1, 3], [1, 2, 3]).tolist() == [1.0, 0.0, 0.5]


def test_swapping_the_models_gives_one_minus_the_wins() -> None:
    rng = np.random.default_rng(SEED)
    ours, theirs = rng.integers(0, 4, 500), rng.integers(0, 4, 500)
    forth, back = win_indicators(ours, theirs), win_indicators(theirs, ours)
    assert (forth + back == 1.0).all()
    assert (forth == 0.5).any()
    assert bootstrap_mean(forth, resamples=50, seed=1).mean + bootstrap_mean(back, resamples=50, seed=1).mean == 1.0


def test_a_model_against_itself_wins_half() -> None:
    values = np.random.default_rng(SEED).normal(size=300)
    estimate = bootstrap_mean(win_indicators(values, values), resamples=50, seed=1)
    assert (estimate.low, estimate.mean, estimate.high) == (0.5, 0.5, 0.5)


def test_other_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="the same prompts"):
        win_indicators([1.0, 2.0], [1.0])


def coverage(shrink: float) -> float:
    """Return the share of Bernoulli samples whose interval, scaled by a factor, contains the true rate."""
    rng = np.random.default_rng(SEED)
    inside = 0
    for trial in range(TRIALS):
        e = bootstrap_mean(rng.random(PROMPTS) < P, resamples=300, seed=trial)
        inside += e.mean + shrink * (e.low - e.mean) <= P <= e.mean + shrink * (e.high - e.mean)
    return inside / TRIALS


def test_the_interval_covers_the_truth_about_95_times_in_a_hundred() -> None:
    # 200 trials: the standard error of a coverage of 0.95 is 0.015; the percentile interval covers a little less.
    assert 0.90 <= coverage(1.0) <= 0.985
    assert coverage(0.7) < 0.90  # an interval that is too narrow is seen
    assert coverage(2.0) > 0.985  # and one that is too wide


def test_the_interval_is_repeatable_and_depends_on_the_seed() -> None:
    values = np.random.default_rng(SEED).random(PROMPTS) < P
    assert bootstrap_mean(values, resamples=200, seed=3) == bootstrap_mean(values, resamples=200, seed=3)
    assert bootstrap_mean(values, resamples=200, seed=3) != bootstrap_mean(values, resamples=200, seed=4)


def test_more_prompts_give_a_narrower_interval() -> None:
    values = (np.random.default_rng(SEED).random(1600) < P).astype(float)
    few, many = bootstrap_mean(values[:100], resamples=500, seed=1), bootstrap_mean(values, resamples=500, seed=1)
    assert 3 < (few.high - few.low) / (many.high - many.low) < 5.5  # the square root of 16


def test_an_estimate_in_words() -> None:
    assert bootstrap_mean([1.0] * 5, resamples=10, seed=1).percent() == "100.0 % [100.0, 100.0]"


@pytest.mark.parametrize(
    ("n", "nats"),
    [(1, 0.0), (2, 0.193147), (4, 0.636294), (16, 1.835089), (64, 3.174508), (256, 4.549084), (1024, 5.932448)],
)
def test_the_kl_of_best_of_n_in_numbers(n: int, nats: float) -> None:
    assert_quoted(best_of_n_kl(n), nats)


@pytest.mark.parametrize("outcomes", [2, 16])
def test_it_is_an_upper_bound_for_a_uniform_model(outcomes: int) -> None:
    ranks = np.arange(1, outcomes + 1)
    for n in (2, 4, 16, 64):
        best = (ranks / outcomes) ** n - ((ranks - 1) / outcomes) ** n  # P(the best of n draws has this rank)
        best = best[best > 0]
        exact = float((best * np.log(best * outcomes)).sum())
        assert 0 < exact < best_of_n_kl(n)
