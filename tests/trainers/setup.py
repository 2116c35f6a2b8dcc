"""Helpers that build a PPO trainer on tiny models in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config.schema import PPOConfig
from rlhf.console import Console
from rlhf.data.records import Prompt
from rlhf.models.reward_models import load_scorer
from rlhf.rollout.rewards import ModelReward, Rewards
from rlhf.rollout.types import Experience
from rlhf.trainers.ppo.callbacks import PPOCallback
from rlhf.trainers.ppo.health import HealthMonitor
from rlhf.trainers.ppo.inputs import TokenizedPrompts
from rlhf.trainers.ppo.state import STATE_FILE
from rlhf.trainers.ppo.trainer import PPOTrainer
from tests.models import tiny

LENGTHS = [4, 9, 2, 6, 13]
OPTIM = {"learning_rate": 1e-2, "value_learning_rate": 2e-2, "microbatch_size": 3}
PPO = {"steps": 2, "rollout_size": 12, "epochs": 2, "minibatches": 2}


def config(**sections: Any) -> PPOConfig:
    """Return a configuration; the values of each section replace the tests' defaults."""
    base: dict[str, Any] = {
        "output_dir": "unused",
        "policy": {"path": "unused"},
        "reward_model": {"path": "unused"},
        "data": {"prompts": [{"path": "unused"}]},
        "sampling": {"max_new_tokens": 8, "temperature": 0.9},
        "ppo": PPO,
        "kl": {"coef": 0.1},
        "optim": OPTIM,
        "watch": {"broken": "continue"},  # the reference of these tests is another model: its KL is never 0
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
    return PPOConfig.model_validate(base)


def reward_of(model: Any) -> Rewards:
    """Return the rewards of one reward model, without rescaling."""
    return Rewards(((1.0, ModelReward("reward", model.eval(), tiny.renderer())),))


class Hooks(PPOCallback):
    """Callback that calls functions: report(step, experience, stats), checkpoint(trainer), restore(trainer)."""

    def __init__(self, report: Any = None, checkpoint: Any = None, restore: Any = None) -> None:
        self.report, self.checkpoint, self.restore = report, checkpoint, restore

    def on_step_end(self, trainer: Any, experience: Any, stats: Any) -> None:
        if self.report is not None:
            self.report(trainer.state.step, experience, stats)

    def on_checkpoint(self, trainer: Any) -> None:
        if self.checkpoint is not None:
            self.checkpoint(trainer)

    def on_rollback(self, trainer: Any) -> bool:
        return self.restore is not None and self.restore(trainer)


def make(
    reward_folder: str,
    *,
    policy: Any = None,
    reference: Any = None,
    reward_model: Any = None,
    rewards: Any = None,
    prompts: Any = None,
    text: Any = None,
    report: Any = None,
    folder: Any = None,
    log: Any = None,
    restore: Any = None,
    checkpoint: Any = None,
    value_model: Any = None,
    **sections: Any,
) -> PPOTrainer:
    """Return a trainer whose policy ends some responses early."""
    if policy is None:
        policy = sometimes_ending(tiny.new(1))
    settings, ids = config(**sections).settings, prompts or tiny.rows(3, LENGTHS)
    scorer = reward_model or load_scorer(tiny.source(reward_folder)).requires_grad_(False)
    records = [Prompt([{"role": "user", "content": f"prompt {i}"}], f"row {i}", {"n": i}) for i in range(len(ids))]
    return PPOTrainer(
        policy,
        rewards or reward_of(scorer),
        TokenizedPrompts(ids, records),
        settings,
        tokenizer=tiny.renderer(),
        reference=reference if reference is not None else tiny.new(2).requires_grad_(False),
        value_model=value_model or load_scorer(tiny.source(reward_folder)),
        text=text,
        monitor=HealthMonitor(settings.watch, folder, log or (lambda _: None)),
        callbacks=[Hooks(report, checkpoint, restore)],
        console=Console(quiet=True),
    )


def sometimes_ending(model: Any) -> Any:
    """Make the end token likely in some states, so that responses differ in length."""
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny.renderer().end_id] *= 5.0
    return model


def experienced(trainer: PPOTrainer) -> Experience:
    """Return the experience of one step, with responses of different lengths."""
    experience = trainer.score(trainer.sample())
    assert len(set(experience.response_length.tolist())) >= 3
    return experience


def gradient(module: torch.nn.Module) -> Tensor:
    """Return all gradients as one vector, with zeros where there is none."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in module.parameters()])


def spiked(trainer: PPOTrainer, at: int, size: float) -> None:
    """Multiply the learning rate at one step, only the first time that the step is reached."""
    original, done = trainer.set_learning_rates, []

    def rates(update: int) -> None:
        original(update)
        if trainer.state.step == at and trainer.state.rollbacks == 0:
            done.append(update)
            for group in trainer.models.optimizer.param_groups:
                group["lr"] *= size

    trainer.set_learning_rates = rates  # type: ignore[method-assign]


def saved(trainer: PPOTrainer, folder: Path) -> Path:
    """Write a checkpoint of the trainer into a new folder."""
    folder.mkdir()
    trainer.save(folder)
    return folder


def memory() -> tuple[dict[str, Any], Callable[[PPOTrainer], None], Callable[[PPOTrainer], bool]]:
    """Return a dictionary of the checkpoints' folders and the last state, and functions that write and read them."""
    place = tempfile.TemporaryDirectory()
    kept: dict[str, Any] = {}

    def save(trainer: PPOTrainer) -> None:
        folder = saved(trainer, Path(place.name) / str(len(kept["all"]) if kept else 0))
        kept.update(
            {"all": [*kept.get("all", []), folder], "state": torch.load(folder / STATE_FILE, weights_only=True)}
        )

    def load(trainer: PPOTrainer) -> bool:
        if kept:
            trainer.load(kept["all"][-1])
        return bool(kept)

    return kept, save, load
