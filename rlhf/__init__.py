"""rlhf: from a pretrained causal language model and human preferences to an aligned chat model.

    from rlhf import PPOTrainer, PPOSettings

    settings = PPOSettings(steps=50)
    trainer = PPOTrainer(policy="models/sft", reward="models/reward", prompts=["Hello?"], settings=settings)
    trainer.train()
    trainer.save_pretrained("out")

The public names are imported when they are first used, so that `import rlhf` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rlhf.version import __version__

if TYPE_CHECKING:
    from rlhf.config.load import load_config
    from rlhf.config.ppo import PPOSettings
    from rlhf.stages.run_stage import run_stage
    from rlhf.trainers.ppo.callbacks import PPOCallback
    from rlhf.trainers.ppo.trainer import PPOTrainer

__all__ = ["PPOCallback", "PPOSettings", "PPOTrainer", "__version__", "load_config", "run_stage"]

_WHERE = {
    "PPOCallback": "rlhf.trainers.ppo.callbacks",
    "PPOSettings": "rlhf.config.ppo",
    "PPOTrainer": "rlhf.trainers.ppo.trainer",
    "load_config": "rlhf.config.load",
    "run_stage": "rlhf.stages.run_stage",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _WHERE:
        raise AttributeError(f"module 'rlhf' has no attribute '{name}'")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
