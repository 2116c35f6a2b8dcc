"""A reward model finds a rule that one word decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlhf.config.sections import Peft
from rlhf.models.reward_models import new_reward_model
from tests.models import tiny
from tests.trainers.on_trl import reward_trainer

GOOD, BAD = 40, 41


def pairs(seed: int, count: int) -> list[dict[str, Any]]:
    """Two copies of a random row, one with the good word and one with the bad word in the same place."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 15, (count,), generator=generator).tolist()
    made = []
    for row in tiny.rows(seed, lengths):
        sides = []
        place = int(torch.randint(len(row), (1,), generator=generator))
        plain = [t if t not in (GOOD, BAD) else 42 for t in row]
        for word in (GOOD, BAD):
            sides.append([*plain[:place], word, *plain[place + 1 :], tiny.renderer().end_id])
        made.append({"chosen_ids": sides[0], "rejected_ids": sides[1], "preference": 1.0})
    return made


def learnt(model: Any, folder: Path, **optim: Any) -> tuple[float, float]:
    """Held-out accuracy before and after."""
    settings = {"batch_size": 32, "microbatch_size": 32, "epochs": 3, "schedule": "linear"} | optim
    trainer = reward_trainer(folder, model, pairs(1, 320), pairs(2, 150), **settings)
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    return before, trainer.evaluate()["eval_accuracy"]


def new(folder: str, peft: Peft) -> Any:
    return new_reward_model(
        tiny.source(folder), peft, pad_id=tiny.renderer().pad_id, vocab_size=len(tiny.tokenizer()), seed=1
    )


def test_a_reward_model_learns_a_rule(sft_folder: str, tmp_path: Path) -> None:
    before, after = learnt(new(sft_folder, Peft()), tmp_path, learning_rate=3e-3)
    assert before < 0.8
    assert after >= 0.9


def test_so_does_one_with_an_adapter(sft_folder: str, tmp_path: Path) -> None:
    _, after = learnt(new(sft_folder, tiny.LORA), tmp_path, learning_rate=1e-2)
    assert after >= 0.9
