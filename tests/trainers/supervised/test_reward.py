"""Tests of the reward model's loss and of its metrics with ties and uneven batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.data.collate import PairCollator
from rlhf.functional import bradley_terry_loss
from rlhf.models.heads import sequence_scores
from rlhf.models.reward_models import load_scorer
from tests import oracles
from tests.models import tiny
from tests.tolerances import GRADIENT, assert_close, distance
from tests.trainers.on_trl import reward_trainer, written
from tests.trainers.setup import gradient

PREFERENCES = [1.0, 1.0, 0.5, 0.0, 1.0, 0.75, 0.5, 1.0, 0.25, 0.5, 1.0]


@pytest.fixture
def model(reward_folder: str) -> Any:
    return load_scorer(tiny.source(reward_folder), trainable=True)


def pairs(*, margin: bool = False) -> list[dict[str, Any]]:
    """Return 11 pairs of different lengths, some with ties or swapped labels; the last batch of 4 has 3."""
    chosen, rejected = (tiny.rows(s, [5, 9, 3, 14, 6, 7, 2, 8, 11, 4, 6]) for s in (1, 2))
    made = [
        {"chosen_ids": c, "rejected_ids": r, "preference": p}
        for c, r, p in zip(chosen, rejected, PREFERENCES, strict=True)
    ]
    return [pair | {"margin": 0.1 * i} for i, pair in enumerate(made)] if margin else made


def gaps(model: Any, data: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores of both sides, each sequence in a forward pass of its own."""
    sides = []
    for side in ("chosen_ids", "rejected_ids"):
        with torch.no_grad():
            one = [torch.tensor([pair[side]]) for pair in data]
            sides.append(torch.cat([sequence_scores(model, ids, torch.ones_like(ids).bool()) for ids in one]))
    return sides[0], sides[1]


@pytest.mark.parametrize("margin", [False, True])
def test_the_loss_is_the_mean_of_the_equation_ties_included(margin: bool, model: Any, tmp_path: Path) -> None:
    data = pairs(margin=margin)
    trainer = reward_trainer(tmp_path, model, data)
    loss = trainer.compute_loss(model, PairCollator(tiny.renderer().pad_id)(data))
    chosen, rejected = gaps(model, data)
    margins = torch.tensor([pair.get("margin", 0.0) for pair in data])
    wanted = oracles.bradley_terry_loss(chosen, rejected, margins, torch.tensor(PREFERENCES)).mean()
    assert_close(loss, wanted)
    assert abs(float(bradley_terry_loss(chosen, rejected).mean() - wanted)) > 0.01  # the data has labels that matter


def test_a_tie_of_equal_scores_costs_ln_2_and_pulls_apart_nothing(model: Any, tmp_path: Path) -> None:
    row = tiny.rows(1, [6])[0]
    data = [{"chosen_ids": row, "rejected_ids": row, "preference": 0.5}]
    trainer = reward_trainer(tmp_path, model, data)
    loss = trainer.compute_loss(model, PairCollator(tiny.renderer().pad_id)(data))
    loss.backward()
    assert_close(loss, math.log(2.0))
    assert gradient(model).abs().max() < GRADIENT


def test_centring_adds_the_square_of_the_sum(model: Any, tmp_path: Path) -> None:
    data = pairs()
    batch = PairCollator(tiny.renderer().pad_id)(data)
    plain = reward_trainer(tmp_path / "a", model, data).compute_loss(model, batch)
    centred = reward_trainer(tmp_path / "b", model, data, center=0.3).compute_loss(model, batch)
    chosen, rejected = gaps(model, data)
    assert_close(centred - plain, 0.3 * float((chosen + rejected).square().mean()))


def accuracy_by_hand(model: Any, data: list[dict[str, Any]]) -> tuple[float, float]:
    right = decided = 0
    chosen, rejected = gaps(model, data)
    for gap, pair in zip((chosen - rejected).tolist(), data, strict=True):
        if pair["preference"] != 0.5:
            decided += 1
            right += (gap > 0) == (pair["preference"] > 0.5)
    return right / decided, float((chosen - rejected).mean())


@pytest.mark.parametrize("size", [3, 4, 11])
def test_held_out_numbers_count_every_pair_once_and_decided_ones_for_accuracy(
    size: int, model: Any, tmp_path: Path
) -> None:
    data = pairs()
    trainer = reward_trainer(tmp_path, model, data, data, batch_size=size, microbatch_size=size)
    result = trainer.evaluate()
    accuracy, margin = accuracy_by_hand(model, data)
    assert 0 < accuracy < 1
    assert result["eval_accuracy"] == accuracy
    assert_close(torch.tensor(result["eval_margin"]), margin)
    chosen, rejected = gaps(model, data)
    loss = bradley_terry_loss(chosen, rejected, preference=torch.tensor(PREFERENCES)).mean()
    assert_close(torch.tensor(result["eval_loss"]), float(loss))
    assert written(tmp_path)[0]["eval_accuracy"] == pytest.approx(accuracy)


def test_equal_scores_are_not_right(model: Any, tmp_path: Path) -> None:
    row = tiny.rows(1, [6])[0]
    data = [{"chosen_ids": row, "rejected_ids": row, "preference": p} for p in (1.0, 0.0)]
    assert reward_trainer(tmp_path, model, data, data).evaluate()["eval_accuracy"] == 0.0


def test_ties_alone_count_as_nothing(model: Any, tmp_path: Path) -> None:
    data = [pair | {"preference": 0.5} for pair in pairs()]
    assert reward_trainer(tmp_path, model, data, data).evaluate()["eval_accuracy"] == 0.0


def test_training_numbers_are_those_of_the_update(model: Any, tmp_path: Path) -> None:
    data = pairs()[:8]
    accuracy, margin = accuracy_by_hand(model, data)
    trainer = reward_trainer(tmp_path, model, data, max_updates=1)
    trainer.train()
    line = written(tmp_path)[0]
    assert line["accuracy"] == pytest.approx(accuracy)
    assert_close(torch.tensor(line["margin"]), margin)


def test_accumulation_changes_neither_loss_nor_step(reward_folder: str, tmp_path: Path) -> None:
    weights, lines = [], []
    for microbatch in (8, 2, 1):
        model = load_scorer(tiny.source(reward_folder), trainable=True)
        folder = tmp_path / str(microbatch)
        trainer = reward_trainer(folder, model, pairs()[:8], microbatch_size=microbatch, max_updates=1)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        lines.append(written(folder)[0])
    for other, line in zip(weights[1:], lines[1:], strict=True):
        assert distance(other, weights[0]) < GRADIENT
        for name in ("loss", "grad_norm", "accuracy"):
            assert_close(torch.tensor(line[name]), lines[0][name], name)


def as_it_prefers(model: Any, pair: dict[str, Any]) -> dict[str, Any]:
    """Swap the pair if needed so that the untrained model prefers its chosen side."""
    with torch.no_grad():
        scores = [
            float(sequence_scores(model, torch.tensor([ids]), torch.ones(1, len(ids)).bool()))
            for ids in (pair["chosen_ids"], pair["rejected_ids"])
        ]
    if scores[0] >= scores[1]:
        return pair
    return pair | {"chosen_ids": pair["rejected_ids"], "rejected_ids": pair["chosen_ids"]}


@pytest.mark.parametrize(("peft", "rate"), [(None, 3e-4), (tiny.LORA, 3e-3)], ids=["full", "LoRA"])
def test_the_best_held_out_model_is_kept(peft: Any, rate: float, reward_folder: str, tmp_path: Path) -> None:
    """Trained on swapped labels the model gets worse, so the checkpoint kept is not the last."""
    model = load_scorer(tiny.source(reward_folder), trainable=True, peft=peft)
    validation = [as_it_prefers(model, pair) for pair in pairs() if pair["preference"] == 1.0]
    turned = [pair | {"preference": 0.0} for pair in validation]
    whole = {"batch_size": len(turned), "microbatch_size": len(turned)}
    trainer = reward_trainer(tmp_path, model, turned, validation, epochs=8, learning_rate=rate, **whole)
    trainer.train()
    seen = [line["eval_accuracy"] for line in written(tmp_path) if "eval_accuracy" in line]
    assert seen[-1] < max(seen)
    assert trainer.evaluate()["eval_accuracy"] == max(seen)
