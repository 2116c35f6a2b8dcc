"""Tests of PPO from Python: every kind of argument is accepted, or rejected with a message that names a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from rlhf import PPOSettings, PPOTrainer
from rlhf.console import Console
from rlhf.errors import ConfigError, DataError
from rlhf.models.heads import SharedValueHead
from rlhf.models.policy import load_causal
from tests.models import tiny

SMALL: dict[str, Any] = {
    "steps": 1,
    "rollout_size": 8,
    "epochs": 1,
    "sampling": {"max_new_tokens": 6},
    "optim": {"learning_rate": 3e-3, "value_learning_rate": 1e-2, "microbatch_size": 8},
    "watch": {"broken": "stop"},
}

LEARNING: dict[str, Any] = {
    "steps": 10,
    "rollout_size": 64,
    "epochs": 2,
    "minibatches": 2,
    "kl": {"coef": 0.0, "target": None},
    "optim": {"learning_rate": 1e-2, "value_learning_rate": 1e-2, "microbatch_size": 64},
}


def made(policy: Any, reward: Any, prompts: Any = ("hello", "good day"), **options: Any) -> PPOTrainer:
    """Return a trainer with small settings."""
    settings = PPOSettings.model_validate(SMALL | options.pop("settings", {}))
    return PPOTrainer(policy, reward, prompts, settings, console=Console(quiet=True), **options)


def shorter(prompt: Any, response: str, record: Any) -> float:
    return -float(len(response))


def test_a_plain_model_a_lambda_and_a_list_of_strings(sft_folder: str, tmp_path: Path) -> None:
    """A script of six lines trains and saves a model that can be loaded."""
    model = AutoModelForCausalLM.from_pretrained(sft_folder)
    settings = PPOSettings.model_validate(SMALL | LEARNING)
    trainer = PPOTrainer(model, lambda prompt, response, record: response.count(" "), ["hello", "good day"], settings)
    trainer.train()
    trainer.save_pretrained(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    scores = [step["score"] for step in trainer.history]
    assert scores[-1] > scores[0] + 1.0  # from fewer than one blank in a response to more than three
    assert [step["step"] for step in trainer.history] == list(range(1, 11))
    assert not tiny.moved(reloaded, tiny.snapshot(trainer.models.trained.policy))


def test_a_folder_of_a_policy_and_of_a_reward_model(sft_folder: str, reward_folder: str) -> None:
    """The reference is the policy as it was; the value model starts as the reward model."""
    trainer = made(sft_folder, reward_folder, settings={"normalize_scores": "raw"})
    value = dict(load_value(reward_folder).named_parameters())
    for name, p in trainer.models.trained.value_model.named_parameters():
        assert p.shape == value[name].shape
    trainer.train()
    before = load_causal(tiny.source(sft_folder))
    assert trainer.models.reference is not None
    assert not tiny.moved(trainer.models.reference, tiny.snapshot(before))
    assert tiny.moved(trainer.models.trained.policy, tiny.snapshot(before))
    assert trainer.history[0]["kl"] == pytest.approx(0.0, abs=1e-5)


def load_value(folder: str) -> Any:
    from rlhf.models.reward_models import load_scorer

    return load_scorer(tiny.source(folder))


def test_an_adapter_is_asked_for_in_the_settings(sft_folder: str, tmp_path: Path) -> None:
    """The adapter's base model is the reference, and the adapter is what is saved."""
    trainer = made(sft_folder, shorter, settings={"peft": {"method": "lora", "r": 2, "alpha": 4.0}})
    assert trainer.models.reference is None
    assert isinstance(trainer.models.trained.value_model, SharedValueHead)
    trainer.train()
    trainer.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_prompts_from_a_file_and_from_conversations(sft_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("hello", "good day")))
    turns = [[{"role": "user", "content": text}] for text in ("hello", "good day")]
    prompts = [made(sft_folder, shorter, given).prompts for given in (path, turns, ["hello", "good day"])]
    assert sorted(prompts[0].ids) == sorted(prompts[1].ids) == sorted(prompts[2].ids)


def test_the_reward_function_gets_messages_text_and_record(sft_folder: str) -> None:
    seen: list[Any] = []

    def reward(prompt: Any, response: str, record: Any) -> float:
        seen.append((prompt, response, record))
        return 0.0

    made(sft_folder, reward, ["hello"]).train()
    prompt, response, record = seen[0]
    assert prompt == [{"role": "user", "content": "hello"}]
    assert isinstance(response, str)
    assert record == {"prompt": "hello"}


@pytest.mark.parametrize(
    ("reward", "prompts", "options", "kind", "says"),
    [
        (7, ["hello"], {}, ConfigError, "neither a folder, a model nor a function"),
        (shorter, [], {}, DataError, "there is no prompt"),
        (shorter, ["hello"], {"max_prompt_tokens": 2}, DataError, "longer than 2 tokens"),
        (shorter, ["hello"], {"settings": {"value_model": "reward"}}, ConfigError, "no value model can start"),
        (shorter, ["hello"], {"settings": {"sampling": {"max_new_tokens": 1000}}}, ConfigError, "do not fit the model"),
        (shorter, ["hello"], {"settings": {"rollout_size": 7, "minibatches": 2}}, ConfigError, "multiple of 2"),
    ],
)
def test_what_cannot_be_is_refused_with_advice(
    reward: Any, prompts: Any, options: dict[str, Any], kind: type[Exception], says: str, sft_folder: str
) -> None:
    with pytest.raises(kind, match=says):
        made(sft_folder, reward, prompts, **options)


def test_a_model_without_a_name_needs_its_tokenizer() -> None:
    model = tiny.new(1)
    with pytest.raises(ConfigError, match="without a tokenizer"):
        made(model, shorter)
    assert made(model, shorter, tokenizer=tiny.tokenizer()).renderer.end_id == tiny.renderer().end_id
