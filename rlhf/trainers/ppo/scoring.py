"""Whom PPO asks about a rollout: policy and value model as they are before the update, the reference, the rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlhf.data.records import Prompt
from rlhf.models.adapters import reference_policy
from rlhf.rollout.score import response_logprobs
from rlhf.rollout.types import Rollout
from rlhf.trainers.ppo.health import find_unstable_scores

if TYPE_CHECKING:
    from rlhf.trainers.ppo.trainer import PPOTrainer

ScoringFunction = Callable[[Rollout], Tensor]


def read_trained_models(trainer: PPOTrainer, trained: Any, part: Rollout) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-probs and values of the policy and the value model as they are before the update."""
    if trainer.config.ppo.old_logprobs == "sampled":
        return part.sampled_logprobs, None, trained.values_only(part)
    found: tuple[Tensor, Tensor | None, Tensor] = trained.read(part, trainer.config.sampling.temperature)
    return found


@contextmanager
def reference_logprobs(trainer: PPOTrainer) -> Iterator[ScoringFunction]:
    """Log-probs of the response under the model that the policy started from, [B, R] nats."""
    temperature = trainer.config.sampling.temperature
    if trainer.reference is None:
        with reference_policy(trainer.accelerator.unwrap_model(trainer.model).policy) as model:
            yield lambda part: response_logprobs(model, part, temperature)[0]
    else:
        reference = trainer.reference
        with trainer.frozen.asked("reference"):
            yield lambda part: response_logprobs(reference, part, temperature)[0]


@contextmanager
def reward_scores(trainer: PPOTrainer, rollout: Rollout) -> Iterator[ScoringFunction]:
    """Raw scores, [B]. The reward models are checked on the rollout first.

    Raises: TrainingError if they do not say the same twice.
    """
    prompt_of = dict(trainer.slots())

    def records(part: Rollout) -> list[Prompt]:
        return [trainer.records[prompt_of[slot]] for slot in part.index.tolist()]

    with trainer.frozen.asked("reward"):
        models = trainer.rewards.models_only()
        if models.parts:
            found = find_unstable_scores(lambda p: models(p, records(p)), rollout, trainer.pad_id, trainer.tolerance)
            trainer.watcher.broken(found, trainer.step, rollout)
        yield lambda part: trainer.rewards(part, records(part))
