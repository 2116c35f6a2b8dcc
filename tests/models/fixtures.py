"""Saved models that several folders of tests start from."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.config.sections import Peft
from rlhf.models.adapters import add_adapter
from rlhf.models.policy import load_causal
from rlhf.models.reward_models import new_reward_model
from tests.models import tiny


def shake(model: Any, seed: int = 5, size: float = 0.1) -> Any:
    """Move every trainable parameter a little, as training would."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * size)
    return model


@pytest.fixture(scope="session")
def sft_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of an SFT model with full weights."""
    return tiny.save(tiny.new(1), tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="session")
def adapter_folder(sft_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of an SFT model that is a trained adapter on `sft_folder`."""
    model = shake(add_adapter(load_causal(tiny.source(sft_folder)), tiny.LORA, "CAUSAL_LM"))
    return tiny.save(model, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def reward_folder(sft_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a reward model with full weights."""
    model = new_reward_model(
        tiny.source(sft_folder), Peft(), pad_id=tiny.renderer().pad_id, vocab_size=len(tiny.tokenizer()), seed=3
    )
    return tiny.save(shake(model), tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="session")
def rewarder(adapter_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a reward model that continues the SFT adapter."""
    return rewarder_of(adapter_folder, tiny.LORA, tmp_path_factory.mktemp("reward"))


def rewarder_of(sft: str, peft: Peft, folder: Any) -> str:
    """Write a reward model that continues an SFT adapter into `folder`."""
    model = new_reward_model(
        tiny.source(sft), peft, pad_id=tiny.renderer().pad_id, vocab_size=len(tiny.tokenizer()), seed=3
    )
    return tiny.save(shake(model, 8), folder, with_tokenizer=False)
