"""Sampling of one token from the logits of a row."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from rlhf.config.sections import Sampling
from rlhf.functional.bits import pack_bits, unpack_bits
from rlhf.generation.sampling import allowed_tokens, draw_token
from tests.tolerances import assert_close

DRAWS = 100_000
UNLIKELY = 1e-3
"""p-value below which frequencies are not those of the distribution."""


def logits(size: int = 80) -> Tensor:
    """Return logits that are not sorted, so that a rank is not an index."""
    return 1.5 * torch.randn(size, generator=torch.Generator().manual_seed(1))


def settings(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Sampling:
    return Sampling(temperature=temperature, top_k=top_k, top_p=top_p)


def draw(row: Tensor, how: Sampling, draws: int = DRAWS) -> Tensor:
    """Return how often each token was sampled."""
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(2))
    allowed = allowed_tokens(row[None], how, torch.tensor([0]), end_id=0)
    filtered = row if allowed is None else row.masked_fill(~allowed[0], -torch.inf)
    chosen = [draw_token(filtered.expand(len(u), -1), u, how.temperature)[0] for u in uniform.split(10_000)]
    return torch.cat(chosen).bincount(minlength=len(row))


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities.double() / probabilities.double().sum() * counts.sum()
    possible = expected > 0
    return float(chisquare(counts[possible].numpy(), expected[possible].numpy()).pvalue)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_frequencies_are_those_of_the_softmax_at_the_temperature(temperature: float) -> None:
    row = logits()
    counts = draw(row, settings(temperature))
    wanted = (row / temperature).softmax(0)
    assert p_value(counts, wanted) > UNLIKELY
    rare = row.argsort(descending=True)[50]
    assert counts[rare] > 0.7 * wanted[rare] * DRAWS > 20


def test_the_frequency_check_sees_another_temperature_and_a_hidden_top_50() -> None:
    row = logits()
    assert p_value(draw(row, settings(1.02)), row.softmax(0)) < UNLIKELY
    assert p_value(draw(row, settings(top_k=50)), row.softmax(0)) < UNLIKELY


@pytest.mark.parametrize("k", [1, 3, 79, 80, 500])
def test_top_k_allows_the_k_likeliest_and_no_other(k: int) -> None:
    row = logits()
    allowed = row.argsort(descending=True)[:k]
    counts = draw(row, settings(top_k=k))
    assert set(counts.nonzero()[:, 0].tolist()) == set(allowed.tolist())
    wanted = torch.zeros(80).scatter(0, allowed, row.softmax(0)[allowed])
    assert k == 1 or p_value(counts, wanted) > UNLIKELY


@pytest.mark.parametrize(
    ("top_p", "allowed"), [(0.3, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.95, 4), (1.0, 5)]
)
def test_top_p_allows_the_smallest_set_that_reaches_p(top_p: float, allowed: int) -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    order = [1, 3, 4, 2, 0]
    counts = draw(probabilities.log(), settings(top_p=top_p), 20_000)
    assert set(counts.nonzero()[:, 0].tolist()) == set(order[:allowed])


def test_temperature_comes_before_the_nucleus() -> None:
    row = torch.tensor([0.5, 0.3, 0.2]).log()
    cold = draw(row, settings(temperature=0.2, top_p=0.9), 5_000)
    assert cold.nonzero()[:, 0].tolist() == [0]


def test_greedy_takes_the_likeliest_whatever_is_drawn() -> None:
    rows = torch.randn(50, 30, generator=torch.Generator().manual_seed(3))
    for u in (0.0, 0.5, 0.999999):
        assert torch.equal(draw_token(rows, torch.full((50,), u), 0.0)[0], rows.argmax(dim=-1))


@pytest.mark.parametrize("u", [0.0, 0.4, 1 - 2**-24])
def test_an_impossible_token_is_never_picked_at_the_ends_either(u: float) -> None:
    row = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]])
    assert int(draw_token(row, torch.tensor([u]), 1.0)[0]) in (1, 3)


def test_low_precision_logits_are_picked_from_in_float32() -> None:
    row = logits()
    counts = draw(row.bfloat16(), settings())
    assert p_value(counts, row.bfloat16().float().softmax(0)) > UNLIKELY


def test_the_log_prob_of_a_draw_is_that_of_the_distribution_drawn_from() -> None:
    row = logits().expand(500, -1)
    token, logprob = draw_token(row, torch.rand(500, generator=torch.Generator().manual_seed(4)), 0.7)
    assert len(set(token.tolist())) > 10
    assert_close(logprob, torch.log_softmax(row / 0.7, dim=1).gather(1, token[:, None])[:, 0].tolist())


def test_the_end_token_cannot_be_drawn_before_the_shortest_length() -> None:
    how = Sampling(min_new_tokens=3)
    for position, free in ((0, False), (1, False), (2, True), (7, True)):
        allowed = allowed_tokens(torch.zeros(1, 9), how, torch.tensor([position]), end_id=4)
        assert allowed is not None
        assert bool(allowed[0, 4]) == free
        assert int(allowed.sum()) == (9 if free else 8)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 33])
def test_packed_flags_unpack_to_themselves(size: int) -> None:
    flags = torch.rand(3, 4, size, generator=torch.Generator().manual_seed(size)) < 0.4
    packed = pack_bits(flags)
    assert packed.shape == (3, 4, -(-size // 8))
    assert torch.equal(unpack_bits(packed, size), flags)
