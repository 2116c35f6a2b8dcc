"""The epsilon of the optimizer that PPO uses: PyTorch's form, which is another number than the original paper's."""

from __future__ import annotations

import pytest
import torch

from rlhf.config.ppo import PPOOptim
from tests.trainers.setup import make

B1, B2 = 0.9, 0.999


def test_the_effective_epsilon_grows_with_the_number_of_updates(reward_folder: str) -> None:
    """PyTorch's step is lr m / (1 - B1^t) / (sqrt(v / (1 - B2^t)) + eps).

    Written as lr_t m / (sqrt(v) + e_t) (Kingma & Ba 2014, arXiv:1412.6980, end of section 2), e_t = eps sqrt(1 - B2^t):
    here it is read off updates with a constant gradient.
    """
    trainer = make(reward_folder)
    assert trainer.models.optimizer.defaults["eps"] == PPOOptim().adam_eps == 1e-5
    options = {k: trainer.models.optimizer.defaults[k] for k in ("betas", "eps", "weight_decay")}
    assert options["betas"] == (B1, B2)
    gradient, rate = 1e-6, 1.0  # small beside epsilon, so that it can be told from rounding
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=rate, **options)
    found = {}
    for t in range(1, 1001):
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        moved = float((before - weight.detach())[0])
        m, v = gradient * (1 - B1**t), gradient**2 * (1 - B2**t)
        rate_t = rate * (1 - B2**t) ** 0.5 / (1 - B1**t)
        found[t] = rate_t * m / moved - v**0.5
    for t, expected in {1: 3.162e-7, 10: 9.978e-7, 100: 3.086e-6, 1000: 7.952e-6}.items():
        assert found[t] == pytest.approx(expected, rel=5e-4)
