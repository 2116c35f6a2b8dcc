"""PPO's reward: the weighted sum of reward models, ensembles, label probabilities and Python functions.

A model with the policy's tokenizer scores the sampled tokens. For a model with another tokenizer, the response is
decoded, rendered with the model's own chat template and tokenised again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rlhf.data.collate import pad_right
from rlhf.data.records import Messages, Prompt
from rlhf.data.render import Renderer
from rlhf.errors import ConfigError, TrainingError
from rlhf.functional import ensemble_score
from rlhf.models.heads import sequence_outputs
from rlhf.rollout.types import Rollout

RewardFunction = Callable[[Messages, str, Mapping[str, Any]], float]


@dataclass(frozen=True)
class ModelReward:
    """Reward from a model's output on prompt + response: its score, rescaled, or probabilities of some labels.

    Attributes:
        name: what the reward is called in messages.
        model: sequence classifier in eval mode.
        policy_renderer: the policy's renderer.
        other_renderer: the model's renderer if its tokenizer differs from the policy's, else None.
        scale: (mean, deviation); the reward is (score - mean) / deviation.
        labels: (index, weight) of the labels whose weighted probabilities are summed; empty = one output, a score.
        multi_label: labels are independent (sigmoid) instead of exclusive (softmax).
    """

    name: str
    model: Any
    policy_renderer: Renderer
    other_renderer: Renderer | None = None
    scale: tuple[float, float] = (0.0, 1.0)
    labels: tuple[tuple[int, float], ...] = ()
    multi_label: bool = False

    @torch.no_grad()
    def __call__(self, part: Rollout, prompts: Sequence[Prompt], *, packed: bool | None = None) -> Tensor:
        """Return [B] float32: score units after rescaling, or a weighted sum of probabilities.

        Args:
            packed: whether sequences are packed; None = pack if the model computes the same on packed rows.
        """
        ids, mask = part.ids, part.mask
        if self.other_renderer is not None:
            ids, mask = (t.to(part.ids.device) for t in self._retokenize(part, prompts))
        outputs = sequence_outputs(self.model, ids, mask, packed=packed)
        if not self.labels:
            return (outputs[:, 0] - self.scale[0]) / self.scale[1]
        probabilities = outputs.sigmoid() if self.multi_label else outputs.softmax(dim=1)
        return torch.stack([weight * probabilities[:, index] for index, weight in self.labels]).sum(dim=0)

    def _retokenize(self, part: Rollout, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Return ids and mask of the conversations in the model's own tokens; unfinished responses get no end token."""
        assert self.other_renderer is not None
        rows = []
        for row, prompt in enumerate(prompts):
            response = self.other_renderer.response(
                self.policy_renderer.decode(part.response_ids[row][part.response_mask[row]].tolist())
            )
            rows.append(
                self.other_renderer.prompt(prompt.messages) + (response if part.finished[row] else response[:-1])
            )
        return pad_right(rows, self.other_renderer.pad_id)


@dataclass(frozen=True)
class FunctionReward:
    """Reward from a Python function of the user: (prompt messages, response text, record) -> number."""

    name: str
    function: RewardFunction
    policy_renderer: Renderer

    def __call__(self, part: Rollout, prompts: Sequence[Prompt], *, packed: bool | None = None) -> Tensor:
        """Return [B] float32. `packed` has no effect, because the function receives text.

        Raises: TrainingError if the function fails or returns no finite number.
        """
        found = []
        for row, prompt in enumerate(prompts):
            text = self.policy_renderer.decode(part.response_ids[row][part.response_mask[row]].tolist())
            try:
                value = float(self.function(prompt.messages, text, prompt.record))
            except Exception as error:  # the user's code may raise anything
                raise TrainingError(
                    "the reward function failed",
                    found=f"{type(error).__name__}: {error}",
                    where=self.name,
                    do=f"it got the prompt of {prompt.where} and the response {text[:80]!r}",
                ) from error
            if not math.isfinite(value):
                raise TrainingError(
                    "the reward function returned no finite number",
                    found=str(value),
                    where=self.name,
                    do=f"it got the prompt of {prompt.where} and the response {text[:80]!r}",
                )
            found.append(value)
        return torch.tensor(found, dtype=torch.float32, device=part.response_ids.device)


@dataclass(frozen=True)
class EnsembleReward:
    """Reward from several reward models, combined by `rlhf.functional.ensemble_score`."""

    members: tuple[ModelReward, ...]
    kind: str
    penalty: float

    @property
    def name(self) -> str:
        """Return what the reward is called in messages, such as "mean of A, B"."""
        return f"{self.kind} of {', '.join(member.name for member in self.members)}"

    def __call__(self, part: Rollout, prompts: Sequence[Prompt], *, packed: bool | None = None) -> Tensor:
        """Return [B] float32, score units after each member's rescaling."""
        scores = torch.stack([member(part, prompts, packed=packed) for member in self.members])
        return ensemble_score(scores, kind=self.kind, penalty=self.penalty)


Reward = ModelReward | EnsembleReward | FunctionReward


@dataclass(frozen=True)
class Rewards:
    """The reward of a run: the weighted sum of all parts, given as (weight, part)."""

    parts: tuple[tuple[float, Reward], ...]

    def __call__(self, part: Rollout, prompts: Sequence[Prompt], *, packed: bool | None = None) -> Tensor:
        """Return [B] float32, score units."""
        values = [weight * reward(part, prompts, packed=packed) for weight, reward in self.parts]
        return torch.stack(values).sum(dim=0)

    def models(self) -> list[Any]:
        """Return all models of the parts, members of ensembles included."""
        parts = [r for _, part in self.parts for r in (part.members if isinstance(part, EnsembleReward) else (part,))]
        return [part.model for part in parts if isinstance(part, ModelReward)]

    def models_only(self) -> Rewards:
        """Return the parts without Python functions, which may return another number for the same input."""
        return Rewards(tuple((w, r) for w, r in self.parts if not isinstance(r, FunctionReward)))


def import_reward_function(name: str, *, what: str, where: str) -> Callable[..., Any]:
    """Import a function from "module:function". It is the user's own code and runs with the user's rights.

    Args:
        what: what messages call the function, such as "reward function".
        where: the setting that names it.
    Raises: ConfigError if there is no such function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the {what} does not import", found=f"{name} ({error})", where=where, do="give module:function"
        ) from None
    if not callable(found):
        raise ConfigError(f"the {what} is not a function", found=name, where=where, do="give module:function")
    function_: Callable[..., Any] = found
    return function_
