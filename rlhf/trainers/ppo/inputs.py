"""Conversion of the arguments of `PPOTrainer` into models, rewards and token ids."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf.config.ppo import PPOSettings
from rlhf.config.sections import ModelSource, Peft, Source
from rlhf.console import Console
from rlhf.data.records import Messages, Prompt
from rlhf.data.render import Renderer, prepare_tokenizer
from rlhf.data.sources import load_records
from rlhf.data.tokenize import tokenize_prompts_with_records
from rlhf.distributed.engine import wants_bfloat16
from rlhf.distributed.launch_env import under_deepspeed
from rlhf.errors import ConfigError, DataError
from rlhf.models.adapters import add_adapter
from rlhf.models.frozen_weights import store_linear_weights
from rlhf.models.heads import AdapterScorer, SharedValueHead, rescale_head
from rlhf.models.load import disable_dropout, grow_embeddings, load_tokenizer
from rlhf.models.policy import load_causal, policy_with_adapter
from rlhf.models.reward_models import load_scorer, new_value_model
from rlhf.rollout.reward_loading import load_reward_model, same_tokenizer, stored_deviation
from rlhf.rollout.rewards import FunctionReward, ModelReward, RewardFunction, Rewards
from rlhf.trainers.ppo.policy_value import PolicyAndValue

PolicyInput = str | Path | nn.Module
RewardInput = str | Path | nn.Module | RewardFunction | Rewards
PromptInput = str | Path | Sequence[str] | Sequence[Messages] | Sequence[Prompt]


@dataclass(frozen=True)
class TokenizedPrompts:
    """Prompts as token ids, in data order, with their records."""

    ids: list[list[int]]
    records: list[Prompt]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class GivenModels:
    """Models of a run as the user gives them; None = derived from the others."""

    policy: PolicyInput
    reward: RewardInput
    reference: PolicyInput | None = None
    value_model: PolicyInput | None = None


def load_models(
    given: GivenModels, settings: PPOSettings, renderer: Renderer, console: Console, *, vocab_size: int | None
) -> tuple[PolicyAndValue, nn.Module | None, Rewards]:
    """Load the models: the trained pair, the frozen reference and the reward.

    Args:
        given: the models as the user gives them.
        settings: settings of the run.
        renderer: renderer of the policy's tokenizer.
        console: where notes are printed.
        vocab_size: length of the tokenizer, to which the policy's embeddings are enlarged; None = leave them.
    Returns: policy and value model, reference (None if the policy is an adapter on it), reward.
    """
    policy = as_policy(given.policy, settings, vocab_size)
    reference = as_reference(given.reference, policy)
    rewards = as_rewards(given.reward, settings, renderer, console)
    value_model = as_value_model(given.value_model, policy, given.reward, settings, renderer)
    bfloat16 = wants_bfloat16(settings.optim.precision)
    pair = PolicyAndValue(policy, value_model, entropy_gradient=settings.entropy_coef > 0, bfloat16=bfloat16)
    # A model that the user has passed as an object stays as it is.
    store_frozen_weights(
        settings,
        trained=[
            model
            for model, source in ((policy, given.policy), (value_model, given.value_model))
            if not isinstance(source, nn.Module)
        ],
        reference=None if isinstance(given.reference, nn.Module) else reference,
        rewards=None if isinstance(given.reward, nn.Module | Rewards) else rewards,
    )
    return pair, reference, rewards


def store_frozen_weights(
    settings: PPOSettings, *, trained: Sequence[Any], reference: nn.Module | None, rewards: Rewards | None
) -> None:
    """Store weights that are never trained in the computing precision, if `settings.frozen_dtype` allows it.

    Args:
        trained: policy and value model, of which the bases of adapters are meant.
        reference, rewards: frozen models; None = leave them.
    """
    if settings.frozen_dtype == "float32" or not wants_bfloat16(settings.optim.precision):
        return
    frozen = [] if reference is None else [reference]
    if rewards is not None:
        frozen += [model for model in rewards.models() if not isinstance(model, AdapterScorer)]
    if not under_deepspeed():  # its engine takes the trained models in one dtype
        frozen += [model for model in trained if hasattr(model, "peft_config")]
    for model in frozen:
        store_linear_weights(model, torch.bfloat16)


def is_path(value: Any) -> bool:
    """Return whether an argument is a path or hub id rather than a loaded object."""
    return isinstance(value, str | os.PathLike)


def as_renderer(tokenizer: Any, policy: PolicyInput, console: Console) -> Renderer:
    """Return the renderer of a tokenizer; None = the tokenizer in the policy's folder.

    Raises: ConfigError if there is none; CheckpointError if it cannot be read.
    """
    if isinstance(tokenizer, Renderer):
        return tokenizer
    if tokenizer is None:
        path = str(policy) if is_path(policy) else getattr(policy, "name_or_path", "")
        if not path:
            raise ConfigError(
                "the policy comes without a tokenizer", where="PPOTrainer(tokenizer=)", do="give the tokenizer"
            )
        tokenizer = load_tokenizer(ModelSource(path=path))
    for note in prepare_tokenizer(tokenizer):
        console.note(f"tokenizer: {note}")
    return Renderer(tokenizer)


def as_policy(policy: PolicyInput, settings: PPOSettings, vocab_size: int | None) -> Any:
    """Return the causal language model to train, without dropout, with an adapter if `settings.peft` enables one."""
    if is_path(policy):
        source = ModelSource(path=str(policy))
        model = policy_with_adapter(source, settings.peft) if settings.peft.enabled else load_causal(source)
    elif settings.peft.enabled and not hasattr(policy, "peft_config"):
        model = add_adapter(policy, settings.peft, "CAUSAL_LM")
    else:
        model = policy
    if vocab_size is not None and not hasattr(model, "peft_config"):
        grow_embeddings(model, vocab_size)
    disable_dropout(model)
    return model


def as_reference(reference: PolicyInput | None, policy: Any) -> nn.Module | None:
    """Return the frozen reference, by default a copy of the policy, or None if the policy is an adapter on it."""
    if reference is None:
        if hasattr(policy, "peft_config"):
            return None
        return copy.deepcopy(policy).requires_grad_(False).eval()
    model: Any = load_causal(ModelSource(path=str(reference))) if is_path(reference) else reference
    disable_dropout(model)
    frozen: nn.Module = model.requires_grad_(False).eval()
    return frozen


def as_rewards(reward: RewardInput, settings: PPOSettings, renderer: Renderer, console: Console) -> Rewards:
    """Return the reward: a reward model from a folder, one in memory, or a function (prompt, response, record).

    Raises: CheckpointError if a folder holds no reward model; ConfigError for anything else.
    """
    if isinstance(reward, Rewards):
        return reward
    if isinstance(reward, str | os.PathLike):
        stored = settings.normalize_scores == "stored"
        return Rewards(((1.0, load_reward_model(ModelSource(path=str(reward)), renderer, console, stored=stored)),))
    if isinstance(reward, nn.Module):
        return Rewards(((1.0, ModelReward("reward model", reward.requires_grad_(False).eval(), renderer)),))
    if callable(reward):
        function: Callable[..., float] = reward
        return Rewards(((1.0, FunctionReward(getattr(function, "__name__", "reward"), function, renderer)),))
    raise ConfigError(
        "the reward is neither a folder, a model nor a function",
        found=type(reward).__name__,
        where="PPOTrainer(reward=)",
        do="give a function of (prompt, response, record) that returns a number, or a reward model",
    )


def as_prompts(
    prompts: PromptInput | TokenizedPrompts, renderer: Renderer, max_tokens: int, seed: int, console: Console
) -> TokenizedPrompts:
    """Return prompts as token ids: from a file, or a list of texts, of conversations or of records.

    Raises: DataError for a malformed or overlong prompt, or if there is none.
    """
    if isinstance(prompts, TokenizedPrompts):
        return prompts
    if isinstance(prompts, str | os.PathLike):
        loaded = load_records("prompt", [Source(path=str(prompts))], seed=seed, on_bad_row="error", deduplicate=True)
        for note in loaded.notes:
            console.note(note)
        records = [record for record in loaded.records if isinstance(record, Prompt)]
    else:
        records = [_as_record(prompt, number) for number, prompt in enumerate(list[Any](prompts))]
    if not records:
        raise DataError("there is no prompt", where="PPOTrainer(prompts=)", do="give at least one")
    return TokenizedPrompts(
        *tokenize_prompts_with_records(records, renderer, max_tokens, "error", "error", console),
    )


def _as_record(prompt: str | Messages | Prompt, number: int) -> Prompt:
    if isinstance(prompt, Prompt):
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return Prompt(messages, f"prompt {number}", {"prompt": prompt})


def as_value_model(
    value_model: PolicyInput | None, policy: Any, reward: Any, settings: PPOSettings, renderer: Renderer
) -> Any:
    """Return the value model.

    By default it starts as the reward model if that comes from a folder and has the policy's tokenizer (Stiennon et
    al. 2020, arXiv:2009.01325), else as the policy's trunk with a head of zeros (Ziegler et al. 2019).
    """
    if isinstance(value_model, nn.Module):
        return value_model
    peft = settings.peft
    if is_path(value_model):
        return load_scorer(ModelSource(path=str(value_model)), trainable=True, peft=peft)
    if settings.value_model == "trunk":
        return SharedValueHead(policy.config.get_text_config().hidden_size)
    if is_path(reward) and settings.value_model in ("auto", "reward") and not peft.enabled:
        source = ModelSource(path=str(reward))
        if same_tokenizer(source, renderer):
            model = load_scorer(source, trainable=True, peft=peft)
            rescale_head(model, stored_deviation(source) if settings.normalize_scores == "stored" else 1.0)
            return model
    if settings.value_model == "reward":
        raise ConfigError(
            "no value model can start from this reward",
            found="the reward is not a folder of a reward model with the policy's tokenizer, or peft is enabled",
            where="PPOSettings(value_model=)",
            do="set value_model='policy', or give value_model= to the trainer",
        )
    if hasattr(policy, "peft_config"):
        return SharedValueHead(policy.config.get_text_config().hidden_size)
    with tempfile.TemporaryDirectory() as folder, _errors_only():
        policy.save_pretrained(folder)  # transformers builds a classifier from a folder, not from a model
        size = len(renderer.tokenizer)
        return new_value_model(
            ModelSource(path=folder), Peft(), pad_id=renderer.pad_id, vocab_size=size, seed=settings.seed
        )


@contextmanager
def _errors_only() -> Iterator[None]:
    """Keep transformers from warning that the new head of the value model is not in the folder."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
