"""Teacher-forced scoring passes over a rollout: the trained models before the update, the reference and the rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf.config.ppo import PPOSettings
from rlhf.data.records import Prompt
from rlhf.distributed.engine import gathered_module
from rlhf.models.adapters import reference_policy
from rlhf.models.packed_batch import can_pack
from rlhf.rollout.experience import make_experience, score_rollout
from rlhf.rollout.teacher_forcing import response_logprobs
from rlhf.rollout.types import Experience, Rollout
from rlhf.trainers.ppo.health import HealthMonitor, Tolerance, find_broken_invariants, find_unstable_scores
from rlhf.trainers.ppo.policy_value import PolicyAndValue, gather_rollouts
from rlhf.trainers.ppo.state import PPOModels, PPOState

ScoringFunction = Callable[[Rollout], Tensor]


@dataclass(frozen=True)
class ScoreChecks:
    """Settings of the checks of scored rollouts."""

    monitor: HealthMonitor
    tolerance: Tolerance
    pad_id: int


def score_experience(
    rollout: Rollout,
    models: PPOModels,
    state: PPOState,
    settings: PPOSettings,
    *,
    prompts_of: Callable[[Rollout], Sequence[Prompt]],
    checks: ScoreChecks,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Experience:
    """Score this process's episodes, gather those of all processes, and compute rewards and advantages. Collective.

    The result is checked, and `state.running_stats` is updated with the raw scores.

    Args:
        rollout: this process's share of the step's episodes.
        models: the models of the run.
        state: the state of the run.
        settings: settings of the run.
        prompts_of: function from a rollout to its prompts as records.
        checks: monitor and tolerance of the checks.
        autocast: returns the context that sets the precision of the trained models.
    Returns: the experience of all processes.
    Raises: TrainingError if an invariant is broken and the monitor is configured to stop.
    """

    def check(rewards: Callable[[Rollout, bool | None], Tensor]) -> None:
        problems = find_unstable_scores(rewards, rollout, checks.pad_id, checks.tolerance)
        checks.monitor.broken(problems, state.step, rollout)

    with gathered_module(models.trained, models.accelerator) as module, autocast():
        pair: Any = module.eval()
        scored = score_rollout(
            rollout,
            score_trained=lambda part: read_trained_models(pair, part, settings),
            reference=reference_logprobs(models, settings.sampling.temperature),
            rewards=reward_scores(models, prompts_of, check),
            microbatch=settings.optim.microbatch_size,
            packed=can_pack(pair.policy),
            tokens=settings.optim.microbatch_tokens,
        )
    scored = gather_rollouts(scored, models.accelerator, checks.pad_id)
    state.running_stats = state.running_stats.including(scored.raw_scores)
    deviation = state.running_stats.deviation if settings.normalize_scores == "running" else 1.0
    experience = make_experience(scored, kl_coef=state.kl_coef, deviation=deviation, settings=settings)
    problems = find_broken_invariants(
        experience,
        kl_coef=state.kl_coef,
        whitened=settings.whiten_advantages,
        fresh=state.step == 0,
        tolerance=checks.tolerance,
    )
    checks.monitor.broken(problems, state.step, experience)
    return experience


def read_trained_models(
    pair: PolicyAndValue, part: Rollout, settings: PPOSettings
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return log-probs, entropy (or None) and values of the trained models before the update, [B, R] each."""
    if settings.old_logprobs == "sampled":
        return part.sampled_logprobs, None, pair.values_only(part)
    return pair.read(part, settings.sampling.temperature)


@contextmanager
def reference_logprobs(models: PPOModels, temperature: float) -> Iterator[ScoringFunction]:
    """Yield a function from a rollout to its log-probs under the reference model, [B, R] nats.

    An offloaded reference model is on the device inside the context.
    """
    if models.reference is None:
        with reference_policy(models.pair.policy) as model:
            yield lambda part: response_logprobs(model, part, temperature)[0]
    else:
        reference = models.reference
        with models.offloaded.on_device("reference"):
            yield lambda part: response_logprobs(reference, part, temperature)[0]


@contextmanager
def reward_scores(
    models: PPOModels,
    prompts_of: Callable[[Rollout], Sequence[Prompt]],
    check: Callable[[Callable[[Rollout, bool | None], Tensor]], None],
) -> Iterator[ScoringFunction]:
    """Yield a function from a rollout to its raw scores, [B]. The reward models are checked first.

    Offloaded reward models are on the device inside the context.

    Args:
        models: the models of the run.
        prompts_of: function from a rollout to its prompts as records.
        check: called with a function from (rollout, packed) to the scores of the reward models alone; may raise.
    """
    with models.offloaded.on_device("reward"):
        models_only = models.rewards.models_only()
        if models_only.parts:
            check(lambda part, packed: models_only(part, prompts_of(part), packed=packed))
        yield lambda part: models.rewards(part, prompts_of(part))
