"""A classifier finds rules that single words decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.sections import Peft
from rlhf.models.reward_models import new_classifier
from tests.models import tiny
from tests.trainers.on_trl import label_trainer

WORDS = (40, 41, 42)


def rows(seed: int, count: int, *, multi_label: bool) -> list[dict[str, Any]]:
    """Random rows of uneven lengths. One of three words stands somewhere in it, or any number of them do; it is the
    label."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in tiny.rows(seed, torch.randint(3, 7, (count,), generator=generator).tolist()):
        ids = [t if t not in WORDS else 50 for t in row]
        held = torch.rand(3, generator=generator)
        held = held < 0.5 if multi_label else held == held.max()
        places = torch.randperm(len(ids), generator=generator).tolist()
        for word, place, holds in zip(WORDS, places[:3], held.tolist(), strict=True):
            ids[place] = word if holds else ids[place]
        made.append({"input_ids": [*ids, tiny.renderer().end_id], "target": held.float().tolist()})
    return made


@pytest.mark.parametrize("peft", [Peft(), tiny.LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize("multi_label", [False, True], ids=["exclusive", "multi_label"])
def test_a_classifier_learns_a_rule(multi_label: bool, peft: Peft, sft_folder: str, tmp_path: Path) -> None:
    pad, size = tiny.renderer().pad_id, len(tiny.tokenizer())
    model = new_classifier(tiny.source(sft_folder), peft, outputs=3, pad_id=pad, vocab_size=size, seed=1)
    train, validation = (rows(seed, count, multi_label=multi_label) for seed, count in ((1, 640), (2, 150)))
    settings = {"batch_size": 32, "microbatch_size": 32, "epochs": 4, "learning_rate": 1e-2, "schedule": "linear"}
    trainer = label_trainer(tmp_path, model, train, validation, multi_label=multi_label, **settings)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_label_accuracy"] < 0.7
    assert after["eval_label_accuracy"] >= 0.95
    assert after["eval_macro_f1"] >= 0.95
    assert after["eval_loss"] < before["eval_loss"] / 4
