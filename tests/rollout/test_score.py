"""From rollouts to experience: the position of the score, the KL penalty, and the token that a value belongs to."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.config.schema import PPO
from rlhf.models.heads import sequence_scores
from rlhf.models.reward_models import load_scorer
from rlhf.rollout.experience import make_experience, score_rollout
from rlhf.rollout.running_stats import RunningStats
from rlhf.rollout.teacher_forcing import response_logprobs, response_values
from rlhf.rollout.types import Experience, Rollout
from rlhf.trainers.ppo.policy_value import PolicyAndValue
from tests import oracles
from tests.models import tiny
from tests.tolerances import assert_close

COEF, TEMPERATURE = 0.3, 0.8
SETTINGS = PPO(gamma=0.97, lam=0.9, missing_end_penalty=1.5)


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    """Return a rollout whose row 2 reached the limit of 9 tokens, and whose row 3 stopped without the end token."""
    return tiny.rollout(1, [3, 8, 1, 5, 2], [4, 2, 9, 3, 9], finished=[True, True, False, False, True])


@pytest.fixture(scope="module")
def models(reward_folder: str) -> dict[str, Any]:
    return {
        "policy": tiny.new(1),
        "reference": tiny.new(2),
        "value": load_scorer(tiny.source(reward_folder)).eval(),
        "reward": load_scorer(tiny.source(reward_folder)).eval(),
    }


def experience(rollout: Rollout, models: dict[str, Any], **changes: Any) -> Experience:
    reference = changes.pop("reference", models["reference"])
    shaping = {"deviation": changes.pop("deviation", 1.0), "settings": changes.pop("settings", SETTINGS)}
    options: dict[str, Any] = {
        "score_trained": lambda part: PolicyAndValue(models["policy"], models["value"]).read(part, TEMPERATURE),
        "reference": nullcontext(lambda part: response_logprobs(reference, part, TEMPERATURE)[0]),
        "rewards": nullcontext(lambda part: sequence_scores(models["reward"], part.ids, part.mask)),
        "microbatch": 2,
        "packed": True,
    }
    return make_experience(score_rollout(rollout, **options | changes), kl_coef=COEF, **shaping)


@pytest.fixture
def made(rollout: Rollout, models: dict[str, Any]) -> Experience:
    return experience(rollout, models)


def penalty(e: Experience) -> Tensor:
    return COEF * (e.old_logprobs - e.ref_logprobs)


def test_the_score_sits_on_the_last_real_token_also_at_the_limit(made: Experience) -> None:
    only_score = made.rewards + penalty(made)
    for row, length in enumerate(made.response_length.tolist()):
        wanted = [0.0] * made.rewards.shape[1]
        wanted[length - 1] = float(made.scores[row])
        assert abs(wanted[length - 1]) > 0.05
        assert_close(only_score[row], wanted)


def test_rewards_sum_to_the_score_less_the_cost_of_kl(made: Experience) -> None:
    assert made.kl_per_sequence.abs().min() > 0.05
    assert_close(made.rewards.sum(dim=1), (made.scores - COEF * made.kl_per_sequence).tolist())


def test_a_reference_that_is_the_policy_costs_nothing(rollout: Rollout, models: dict[str, Any]) -> None:
    e = experience(rollout, models, reference=models["policy"])
    assert e.kl_per_sequence.tolist() == [0.0] * 5
    assert (e.rewards != 0).sum(dim=1).tolist() == [1] * 5


def test_only_unfinished_responses_pay_for_the_missing_end(made: Experience, models: dict[str, Any]) -> None:
    assert_close(made.scores, (made.raw_scores - torch.tensor([0.0, 0.0, 1.5, 1.5, 0.0])).tolist())


def test_scores_are_divided_then_clipped_then_charged(rollout: Rollout, models: dict[str, Any]) -> None:
    raw = experience(rollout, models).raw_scores / 0.25
    limit = float(raw.abs().median())
    settings = SETTINGS.model_copy(update={"score_clip": limit})
    e = experience(rollout, models, deviation=0.25, settings=settings)
    clipped = raw.clamp(-limit, limit)
    assert 0 < int((raw.abs() > limit).sum()) < len(raw)
    assert_close(e.scores, (clipped - torch.tensor([0.0, 0.0, 1.5, 1.5, 0.0])).tolist())


def test_a_fixed_score_replaces_that_of_unfinished_responses(rollout: Rollout, models: dict[str, Any]) -> None:
    e = experience(rollout, models, settings=SETTINGS.model_copy(update={"missing_end_score": -1.0}))
    assert_close(e.scores, [*e.raw_scores[:2].tolist(), -1.0, -1.0, float(e.raw_scores[4])])


def test_the_spread_of_a_stream_is_that_of_all_its_scores() -> None:
    stream = [torch.randn(n, generator=torch.Generator().manual_seed(n)) * 3 + 5 for n in (1, 7, 2, 30)]
    spread = RunningStats()
    for part in stream:
        spread = spread.including(part)
    everything = torch.cat(stream).double()
    assert spread.number == 40
    assert_close(torch.tensor(spread.mean), float(everything.mean()))
    assert_close(torch.tensor(spread.deviation), float(everything.std(correction=0)))
    assert RunningStats().including(torch.full((5,), 2.0)).deviation == 1e-3  # equal scores are not blown up


def test_raw_scores_are_those_of_whole_sequences(made: Experience, rollout: Rollout, models: dict[str, Any]) -> None:
    rows = [rollout.ids[i][rollout.mask[i]] for i in range(5)]
    with torch.no_grad():
        alone = [float(sequence_scores(models["reward"], r[None], torch.ones_like(r[None]).bool())) for r in rows]
    assert_close(made.raw_scores, alone)


def test_advantages_and_returns_are_those_of_the_equation(rollout: Rollout, models: dict[str, Any]) -> None:
    made = experience(rollout, models, settings=SETTINGS.model_copy(update={"whiten_advantages": False}))
    advantages = oracles.gae(made.rewards, made.values, made.response_mask, SETTINGS.gamma, SETTINGS.lam)
    assert_close(made.advantages, advantages)
    assert_close(made.returns, (advantages + made.values.double() * made.response_mask).tolist())
    assert not made.advantages[~made.response_mask].any()


def test_nothing_carries_a_gradient(made: Experience) -> None:
    assert not any(value.requires_grad for value in vars(made).values())


@pytest.mark.parametrize("microbatch", [1, 3, 5])
def test_microbatches_do_not_matter(
    made: Experience, rollout: Rollout, models: dict[str, Any], microbatch: int
) -> None:
    for name, value in vars(experience(rollout, models, microbatch=microbatch)).items():
        assert_close(value.float(), vars(made)[name].tolist(), name)


@pytest.mark.parametrize("fill", [tiny.renderer().pad_id, tiny.renderer().end_id])
def test_padding_does_not_matter(made: Experience, rollout: Rollout, models: dict[str, Any], fill: int) -> None:
    wide = experience(tiny.widen(rollout, 5, 3, fill), models).select(torch.arange(5))
    names = set(vars(made)) - {"prompt_ids", "response_ids"}
    for name in names:
        assert_close(vars(wide)[name].float(), vars(made)[name].tolist(), name)


def test_the_padding_check_sees_a_mask_that_is_off_by_one(made: Experience, rollout: Rollout, models: Any) -> None:
    wide = tiny.widen(rollout, 1, 0, fill=40)
    shifted = replace(wide, prompt_mask=torch.cat([rollout.prompt_mask, torch.ones(5, 1).bool()], dim=1))
    assert (experience(shifted, models).raw_scores - made.raw_scores).abs().max() > 0.01


# Which token is which


def with_token(rollout: Rollout, row: int, t: int) -> Rollout:
    ids = rollout.response_ids.clone()
    ids[row, t] = (ids[row, t] + 17) % 200 + 20
    return replace(rollout, response_ids=ids)


def test_a_value_is_of_the_state_before_its_token(rollout: Rollout, models: dict[str, Any]) -> None:
    with torch.no_grad():
        before = response_values(models["value"], rollout)[2]
        after = response_values(models["value"], with_token(rollout, 2, 4))[2]
    assert_close(after[:5], before[:5].tolist())
    assert (after[5:] - before[5:]).abs().min() > 1e-3


def test_the_first_value_is_the_score_of_the_prompt(rollout: Rollout, models: dict[str, Any]) -> None:
    with torch.no_grad():
        values = response_values(models["value"], rollout)[:, 0]
        prompts = sequence_scores(models["value"], rollout.prompt_ids, rollout.prompt_mask)
    assert_close(values, prompts.tolist())


def test_a_log_prob_sees_its_token_and_the_past_only(rollout: Rollout, models: dict[str, Any]) -> None:
    with torch.no_grad():
        before = response_logprobs(models["policy"], rollout, 1.0)[0][2]
        after = response_logprobs(models["policy"], with_token(rollout, 2, 4), 1.0)[0][2]
    assert_close(after[:4], before[:4].tolist())
    assert (after[4:] - before[4:]).abs().min() > 1e-4


def test_log_probs_and_entropy_are_those_of_the_whole_softmax(rollout: Rollout, models: dict[str, Any]) -> None:
    with torch.no_grad():
        logprobs, entropy = response_logprobs(models["policy"], rollout, TEMPERATURE, entropy=True)
        for row in range(len(rollout)):
            ids = rollout.ids[row][rollout.mask[row]]
            n = int(rollout.response_length[row])
            logits = models["policy"](ids[None]).logits[0, -n - 1 : -1]
            assert_close(logprobs[row, :n], oracles.token_logprobs(logits, ids[-n:], TEMPERATURE))
            assert_close(entropy[row, :n], oracles.token_entropy(logits[:, :], TEMPERATURE))
    assert not logprobs[~rollout.response_mask].any()
    assert not entropy[~rollout.response_mask].any()
