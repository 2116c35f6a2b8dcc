"""KL estimators and the controller of the KL coefficient."""

import math

import numpy as np
import pytest
import torch

from rlhf import functional as F
from rlhf.errors import ShapeError
from tests import oracles
from tests.tolerances import assert_close, assert_quoted

KINDS = ["k1", "k2", "k3"]
PI, REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 1])
def test_estimates_follow_the_equations(seed, dtype, kind):
    everything = torch.ones(4, 6, dtype=torch.bool)
    logp, ref = (oracles.ragged(seed + k, everything, dtype) - 3 for k in (0, 10))
    result = F.kl_estimate(logp, ref, kind)
    assert result.dtype == dtype
    assert_close(result, oracles.kl_estimate(logp, ref, kind))


@pytest.mark.parametrize(
    ("mu", "kind", "bias", "std"),
    [
        (0.1, "k1", 0.0, 20.0),
        (0.1, "k2", 0.0025, 1.418),
        (0.1, "k3", 0.0, 1.417),
        (1.0, "k1", 0.0, 2.0),
        (1.0, "k2", 0.25, 1.732),
        (1.0, "k3", 0.0, 1.695),
    ],
)
def test_bias_and_spread_between_two_normal_distributions(mu, kind, bias, std):
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)  # exact expectation under N(0, 1)
    x, weight = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    estimate = F.kl_estimate(-(x**2) / 2, -((x - mu) ** 2) / 2, kind)
    true = mu**2 / 2
    mean = (weight * estimate).sum()
    spread = (weight * (estimate - mean) ** 2).sum().sqrt()
    assert_quoted(mean / true - 1, bias)
    assert_quoted(spread / true, std, coarsely=True)


def test_expected_values_on_three_tokens():
    expected = {"k1": 0.0252671539, "k2": 0.0248624073, "k3": 0.0252671539}
    for kind, value in expected.items():
        assert_quoted((PI * F.kl_estimate(PI.log(), REF.log(), kind)).sum(), value)


@pytest.mark.parametrize(
    ("kind", "gradient"),
    [("k1", [0.0, 0.0, 0.0]), ("k2", [0.098938, -0.093885, -0.005053]), ("k3", [0.1, -0.1, 0.0])],
)
def test_gradient_as_a_loss(kind, gradient):
    logits = PI.log().requires_grad_()
    (PI * F.kl_estimate(torch.log_softmax(logits, 0), REF.log(), kind)).sum().backward()
    assert_quoted(logits.grad, gradient)


@pytest.mark.parametrize(
    ("kind", "gradient"), [("k1", [0.098938, -0.093885, -0.005053]), ("k3", [-0.001062, 0.006115, -0.005053])]
)
def test_gradient_as_a_penalty_in_the_reward(kind, gradient):
    """Why k3 is not a reward: the true gradient is the one of k1; k3 is tiny and has the wrong sign."""
    logits = PI.log().requires_grad_()
    penalty = F.kl_estimate(PI.log(), REF.log(), kind)
    (torch.softmax(logits, 0) * penalty).sum().backward()
    assert_quoted(logits.grad, gradient)


def test_k3_is_precise_where_it_is_small():
    d = torch.logspace(-4, -1, 30, dtype=torch.float64)
    exact = d**2 / 2 - d**3 / 6 + d**4 / 24 - d**5 / 120 + d**6 / 720
    result = F.kl_estimate(d.float(), torch.zeros(30), "k3").double()
    assert ((result - exact) / exact).abs().max() < 0.01  # exp(-d) - 1 + d would be off by 100 %


def test_k3_is_never_negative_even_if_expm1_is_one_rounding_too_small(monkeypatch):
    exact = torch.expm1
    monkeypatch.setattr(torch, "expm1", lambda x: torch.nextafter(exact(x), torch.tensor(-torch.inf)))
    d = torch.logspace(-8, -1, 50)
    assert (torch.expm1(-d) + d).min() < 0
    assert (F.kl_estimate(d, torch.zeros(50), "k3") >= 0).all()


def test_wrong_arguments_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="k1, k2, k3"):
        F.kl_estimate(x, x, "k4")
    with pytest.raises(ShapeError, match="kl_estimate"):
        F.kl_estimate(x, x[:, :1], "k1")


@pytest.mark.parametrize(("observed", "coef"), [(12.0, 0.151536), (6.0, 0.15), (5.7, 0.149616), (0.0, 0.148464)])
def test_controller_gives_the_published_numbers(observed, coef):
    assert_quoted(F.adaptive_kl(0.15, observed, 6.0, 10_000, 512), coef)


def test_controller_doubles_after_68_saturated_updates():
    coef, calls = 0.15, 0
    while coef < 0.3:
        coef, calls = F.adaptive_kl(coef, 1e6, 6.0, 10_000, 512), calls + 1
    assert calls == math.ceil(68.04)


def test_controller_is_proportional_inside_and_saturated_outside():
    def change(observed):
        return F.adaptive_kl(1.0, observed, 10.0, 100, 10) - 1

    assert_quoted(change(11.0), 0.01)
    assert_quoted(change(9.0), -0.01)
    assert change(12.5) == change(1e9) == pytest.approx(0.02)
    assert change(-5.0) == change(0.0) == pytest.approx(-0.02)


@pytest.mark.parametrize(
    "change",
    [{"coef": -0.1}, {"target": 0.0}, {"horizon": 0.0}, {"n": -1}, {"n": 500}, {"observed": float("nan")}],
    ids=str,
)
def test_controller_refuses_what_has_no_meaning(change):
    good = {"coef": 0.1, "observed": 3.0, "target": 6.0, "horizon": 100.0, "n": 10}
    F.adaptive_kl(**good)
    with pytest.raises(ValueError, match="adaptive_kl"):
        F.adaptive_kl(**{**good, **change})
