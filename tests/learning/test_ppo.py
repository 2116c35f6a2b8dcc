"""PPO makes rewarded tokens likelier, and with the sign of the advantage turned it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models.policy import policy_with_adapter
from rlhf.models.reward_models import load_scorer
from rlhf.trainers.ppo.trainer import PPOTrainer
from tests.models import tiny
from tests.trainers.setup import make

FIRST_GOOD = 200
"""Tokens from here on are rewarded: about a third of the vocabulary."""


class Counter(nn.Module):
    """Stands in for a reward model: the score at a position is the number of rewarded tokens so far."""

    base_model_prefix = "trunk"

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Identity()

    def trunk(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        good = (input_ids >= FIRST_GOOD) & attention_mask.bool()
        return SimpleNamespace(last_hidden_state=good.float().cumsum(dim=1)[..., None])


def trained(
    reward_folder: str,
    change: Callable[[PPOTrainer], None] | None = None,
    *,
    learning_rate: float = 2e-2,
    **options: Any,
) -> list[float]:
    """Share of rewarded tokens in the responses of each step."""
    shares: list[float] = []

    def report(step: int, e: Any, stats: dict[str, float]) -> None:
        shares.append(float((e.response_ids[e.response_mask] >= FIRST_GOOD).float().mean()))

    prompts = [[t % 150 + 20 for t in row] for row in tiny.rows(3, [4, 6, 5, 3])]
    trainer = make(
        reward_folder,
        reward_model=Counter(),
        prompts=prompts,
        report=report,
        ppo={"steps": 12, "rollout_size": 64, "epochs": 2, "minibatches": 2, "missing_end_penalty": 0.0},
        kl={"coef": 0.0, "target": None},
        sampling={"max_new_tokens": 6, "temperature": 1.0},
        optim={
            "learning_rate": learning_rate,
            "value_learning_rate": 3e-2,
            "microbatch_size": 64,
            "schedule": "constant",
        },
        **options,
    )
    if change:
        change(trainer)
    trainer.train()
    return shares


def ends(shares: list[float]) -> tuple[float, float]:
    return sum(shares[:2]) / 2, sum(shares[-4:]) / 4


def turn_sign(trainer: PPOTrainer) -> None:
    original = trainer.score
    trainer.score = lambda rollout: replace(e := original(rollout), advantages=-e.advantages)  # type: ignore[method-assign]


def hold_still(trainer: PPOTrainer) -> None:
    trainer.state.kl_coef = 50.0


def test_rewarded_tokens_become_likelier(reward_folder: str) -> None:
    before, after = ends(trained(reward_folder, policy=tiny.new(1)))
    assert before < 0.6
    assert after > 0.85


def test_with_the_sign_turned_they_become_rarer(reward_folder: str) -> None:
    before, after = ends(trained(reward_folder, turn_sign, policy=tiny.new(1)))
    assert after < before - 0.1


def test_a_heavy_kl_penalty_keeps_the_policy_where_it_was(reward_folder: str) -> None:
    before, after = ends(trained(reward_folder, hold_still, policy=tiny.new(1), reference=tiny.new(1)))
    assert abs(after - before) < 0.15


def test_an_adapter_learns_too(reward_folder: str, sft_folder: str) -> None:
    policy = policy_with_adapter(tiny.source(sft_folder), tiny.LORA)
    before, after = ends(trained(reward_folder, policy=policy, learning_rate=0.15))
    assert after > before + 0.12


def test_the_scorer_of_these_tests_counts(reward_folder: str) -> None:
    from rlhf.models.heads import sequence_scores

    ids = torch.tensor([[250, 20, 300, 299]])
    mask = torch.tensor([[False, True, True, True]])
    assert sequence_scores(Counter(), ids, mask).tolist() == [2.0]
    assert sequence_scores(load_scorer(tiny.source(reward_folder)), ids, mask).tolist() != [2.0]
