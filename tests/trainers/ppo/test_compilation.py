"""Compiled blocks: the numbers of plain ones, in few shapes; refused with a reason where they cannot work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf.console import Console
from rlhf.models.adapters import add_adapter
from rlhf.models.packed_batch import PackedBatch, few_row_counts
from rlhf.models.parameter_selection import block_modules
from rlhf.trainers.ppo import compilation
from rlhf.trainers.ppo.compilation import compile_trained_blocks
from tests.models import architectures, tiny
from tests.tolerances import distance
from tests.trainers.setup import config, experienced, gradient, make, sometimes_ending


def test_few_row_counts() -> None:
    assert [few_row_counts(n) for n in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]


@pytest.mark.parametrize("lengths", [[3], [9, 1, 4, 4, 2, 7], [16] * 5, [5] * 40])
def test_rows_of_a_given_length_hold_every_token(lengths: list[int]) -> None:
    mask = torch.stack([torch.arange(16) < n for n in lengths])
    ids = torch.arange(1, mask.numel() + 1).view(mask.shape)
    batch = PackedBatch.for_model(tiny.new(1), ids, mask, row_length=16)
    assert batch.ids.shape == (few_row_counts(batch.ids.shape[0]), 16)
    assert torch.equal(batch.ids.flatten()[batch.slot[mask]], ids[mask])
    assert set(batch.ids.flatten().tolist()) == {0, *ids[mask].tolist()} or int(mask.sum()) == batch.ids.numel()


def notes(monkeypatch: pytest.MonkeyPatch, pair: Any, *, deepspeed: bool = False, **optim: Any) -> list[str]:
    """What the user is told."""
    found: list[str] = []
    console = Console(quiet=True)
    monkeypatch.setattr(console, "note", found.append)
    monkeypatch.setattr(compilation, "under_deepspeed", lambda: deepspeed)
    device = optim.pop("device", "cuda")
    compile_trained_blocks(pair, config(optim=optim).optim, device, 70, console)
    return found


def test_when_blocks_are_compiled(reward_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make(reward_folder).models.pair
    assert notes(monkeypatch, pair, device="cpu") == notes(monkeypatch, pair, compile="off") == []
    assert "DeepSpeed" in notes(monkeypatch, pair, deepspeed=True)[0]
    assert "activation checkpointing" in notes(monkeypatch, pair, activation_checkpointing=True)[0]
    assert pair.row_length is None
    assert "are compiled in the first step" in notes(monkeypatch, pair)[0]
    assert pair.row_length == 128
    mamba = make(reward_folder).models.pair
    mamba.policy = architectures.build("mamba")
    assert "packed rows" in notes(monkeypatch, mamba)[0]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "LoRA"])
def test_a_compiled_step_has_the_gradients_and_the_ratio_of_a_plain_one(adapter: bool, reward_folder: str) -> None:
    gradients = {}
    for kind in ("off", "always"):
        torch.manual_seed(0)
        policy = add_adapter(sometimes_ending(tiny.new(1)), tiny.LORA, "CAUSAL_LM") if adapter else None
        trainer = make(
            reward_folder,
            policy=policy,
            optim={"compile": kind},
            watch={"broken": "stop"},
            reference=sometimes_ending(tiny.new(1)).requires_grad_(False),
        )
        compiled = [b for b in block_modules(trainer.models.pair.policy) if b._compiled_call_impl is not None]
        assert bool(compiled) is (kind == "always")
        experience = experienced(trainer)
        trainer.models.trained.train()
        total = float(experience.response_mask.sum())
        found = trainer.accumulate(experience, torch.arange(len(experience)), total, {})
        assert found.ratio_error < trainer.tolerance.ratio
        gradients[kind] = gradient(trainer.models.trained)
    assert distance(gradients["always"], gradients["off"]) < 1e-4
