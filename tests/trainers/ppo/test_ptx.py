"""Tests of PPO-ptx: the gradient of its text term, the documents of each update, and the adaptive coefficient."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.ppo import Ptx
from rlhf.data.render import Rendered
from rlhf.rollout.types import Experience
from rlhf.trainers.ppo.ptx import PtxMixture
from rlhf.trainers.ppo.trainer import PPOTrainer
from tests.models import tiny
from tests.tolerances import GRADIENT, distance
from tests.trainers.setup import experienced, gradient, make, saved


def documents(count: int = 9) -> list[Rendered]:
    rows = tiny.rows(7, [5 + 3 * (i % 4) for i in range(count)])
    return [Rendered(row, [False] + [True] * (len(row) - 1)) for row in rows]


def with_text(reward_folder: str, coef: float, microbatch: int = 3, **options: Any) -> PPOTrainer:
    ptx = {"coef": coef, "data": [{"path": "unused"}], "batch_size": 4} | options.pop("ptx", {})
    text = PtxMixture(
        documents(), Ptx.model_validate(ptx), seed=1, pad_id=tiny.renderer().pad_id, microbatch=microbatch
    )
    return make(reward_folder, text=text, ptx=ptx, optim={"microbatch_size": microbatch}, **options)


def accumulate(trainer: PPOTrainer, update: int, measure: bool = False) -> None:
    assert trainer.text is not None
    trainer.text.accumulate(trainer.models.trained, trainer.accelerator, update, {}, measure=measure)


@pytest.mark.parametrize("microbatch", [1, 3, 8])
def test_the_text_gradient_is_that_of_the_mean_over_its_tokens(reward_folder: str, microbatch: int) -> None:
    trainer = with_text(reward_folder, 0.7, microbatch)
    accumulate(trainer, 2)
    found = gradient(trainer.models.trained.policy)
    assert not gradient(trainer.models.trained.value_model).any()
    trainer.models.trained.zero_grad()
    assert trainer.text is not None
    rows = trainer.text.batch(2)
    count = sum(len(row.ids) - 1 for row in rows)
    loss = torch.zeros(())
    for row in rows:
        ids = torch.tensor([row.ids])
        loss = loss + trainer.models.trained.policy(ids, labels=ids).loss * (len(row.ids) - 1)
    (0.7 * loss / count).backward()
    assert distance(found, gradient(trainer.models.trained.policy)) < GRADIENT


def test_documents_are_used_once_a_lap_and_shared_by_processes(reward_folder: str) -> None:
    mix = with_text(reward_folder, 1.0).text
    assert mix is not None
    used = [tuple(row.ids) for update in range(9) for row in mix.batch(update)]
    assert sorted(used[:9]) == sorted(tuple(row.ids) for row in documents())
    assert sorted(used[9:18]) == sorted(used[:9])
    device = torch.device("cpu")
    parts = [mix.share(1, process=k, processes=2, microbatch=8, device=device) for k in (0, 1)]
    assert parts[0][1] == parts[1][1] == sum(len(row.ids) - 1 for row in mix.batch(1))
    assert sum(len(batch.ids) for found, _ in parts for batch in found) == 4


def test_text_keeps_the_policy_able_to_predict_it(reward_folder: str) -> None:
    """The loss on the documents falls with the term and not without it."""

    def text_loss(coef: float) -> float:
        options: dict[str, Any] = {"ppo": {"steps": 6}}
        trainer = with_text(reward_folder, coef, **options) if coef else make(reward_folder, **options)
        trainer.train()
        losses = []
        with torch.no_grad():
            for row in documents():
                ids = torch.tensor([row.ids])
                losses.append(float(trainer.models.trained.policy(ids, labels=ids).loss))
        return sum(losses) / len(losses)

    assert text_loss(3.0) < text_loss(0.0) - 0.3


def text_and_ppo_norms(trainer: PPOTrainer, experience: Experience) -> tuple[float, float]:
    """Return the gradient norms of the weighted text term and of the PPO term in the first update."""
    total = experience.response_mask.sum()
    trainer.models.trained.zero_grad()
    accumulate(trainer, 0)
    text = float(gradient(trainer.models.trained.policy).norm())
    trainer.models.trained.zero_grad()
    trainer.accumulate(experience, trainer.minibatches(len(experience))[0][1], total, {})
    ours = float(gradient(trainer.models.trained.policy).norm())
    trainer.models.trained.zero_grad()
    return text, ours


@pytest.mark.parametrize("start", [0.01, 30.0])
def test_the_coefficient_finds_the_wanted_ratio_of_gradient_norms(start: float, reward_folder: str) -> None:
    trainer = with_text(reward_folder, start, ptx={"balance": 0.5})
    experience, text = experienced(trainer), trainer.text
    assert text is not None
    coefs = []
    for _ in range(24):  # the same update again and again, without a step
        trainer.models.trained.zero_grad()
        accumulate(trainer, 0, measure=True)
        part = trainer.minibatches(len(experience))[0][1]
        trainer.accumulate(experience, part, experience.response_mask.sum(), {})
        text.rebalance(trainer.models.trained.trained_policy().values(), trainer.accelerator)
        coefs.append(text.coef)
    steps = [b / a for a, b in itertools.pairwise([start, *coefs])]
    assert max(steps) <= 2.0
    assert min(steps) >= 0.5
    theirs, ours = text_and_ppo_norms(trainer, experience)
    assert theirs / ours == pytest.approx(0.5, rel=0.01)


def test_the_coefficient_is_reported_moves_once_a_step_and_is_continued(reward_folder: str, tmp_path: Path) -> None:
    lines: list[dict[str, float]] = []
    trainer = with_text(reward_folder, 0.7, ptx={"balance": 0.5}, report=lambda _, __, stats: lines.append(stats))
    trainer.train()
    assert trainer.text is not None
    assert len({line["ptx_coef"] for line in lines}) == len(lines) == 2
    again = with_text(reward_folder, 0.7, ptx={"balance": 0.5})
    again.load(saved(trainer, tmp_path / "state"))
    assert again.text is not None
    assert again.text.coef == trainer.text.coef == lines[-1]["ptx_coef"] != 0.7
