"""Token log-probabilities and entropies."""

import math

import pytest
import torch

from rlhf import functional as F
from rlhf.errors import ShapeError
from tests import oracles
from tests.tolerances import assert_close, assert_quoted


def logits_and_ids(seed, dtype, shape=(3, 4), vocabulary=11, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, vocabulary, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, vocabulary, shape, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 4), (5,), ()])
def test_they_follow_the_equations(shape, dtype, temperature):
    logits, ids = logits_and_ids(0, dtype, shape)
    logp = F.token_logprobs(logits, ids, temperature=temperature)
    assert logp.dtype == dtype
    assert_close(logp, oracles.token_logprobs(logits, ids, temperature))
    assert_close(F.token_entropy(logits, temperature=temperature), oracles.token_entropy(logits, temperature))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_normalised_in_float32(dtype):
    logits, ids = logits_and_ids(1, dtype, (64,), vocabulary=512)
    logp = F.token_logprobs(logits, ids, temperature=0.7)
    assert logp.dtype == F.token_entropy(logits).dtype == torch.float32
    assert_close(logp, oracles.token_logprobs(logits, ids, 0.7))
    in_half = torch.log_softmax(logits, -1).gather(-1, ids[:, None])[:, 0].double()
    assert (in_half - oracles.token_logprobs(logits, ids)).abs().max() > 1e-3  # what would be lost


def test_entropy_of_equal_and_of_certain_tokens():
    assert_close(F.token_entropy(torch.full((2, 7), 3.0)), [math.log(7)] * 2)
    assert_close(F.token_entropy(torch.tensor([0.0, -200.0, -200.0])), 0.0)


def test_tokens_that_cannot_occur():
    logits = torch.tensor([1.0, -math.inf, 2.0], dtype=torch.float64, requires_grad=True)
    entropy = F.token_entropy(logits)
    assert_close(entropy, F.token_entropy(torch.tensor([1.0, 2.0], dtype=torch.float64)))
    (entropy + F.token_logprobs(logits, torch.tensor(0))).backward()
    assert logits.grad.isfinite().all()
    assert F.token_logprobs(logits, torch.tensor(1)).item() == -math.inf


def test_the_gradient_is_one_minus_probability():
    logits, ids = logits_and_ids(2, torch.float64)
    leaf = logits.clone().requires_grad_()
    F.token_logprobs(leaf, ids, temperature=0.5).sum().backward()
    expected = (torch.nn.functional.one_hot(ids, 11) - torch.softmax(logits / 0.5, -1)) / 0.5
    assert_close(leaf.grad, expected)


def test_quoted_entropy_of_a_coin():
    assert_quoted(F.token_entropy(torch.tensor([0.0, 0.0])), 0.693147)


def test_wrong_arguments_are_refused():
    logits, ids = logits_and_ids(4, torch.float32)
    for bad_ids in (ids[:, :1], ids[0], ids[..., None]):
        with pytest.raises(ShapeError, match="ids"):
            F.token_logprobs(logits, bad_ids)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            F.token_logprobs(logits, ids, temperature=temperature)
        with pytest.raises(ValueError, match="temperature"):
            F.token_entropy(logits, temperature=temperature)
