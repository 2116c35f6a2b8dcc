"""Run a part of the project on the pretended accelerator: `python -m tests.on_pretend_device PART`.

Parts: `ppo` trains two steps on tiny models; `crossing` does what a GPU refuses and must fail.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from tests import pretend_device


def ppo() -> None:
    """Two steps of PPO: sampling, scoring, updates, all of it on the device."""
    from rlhf.config.sections import Peft
    from tests.models import tiny
    from tests.models.fixtures import rewarder_of
    from tests.trainers import setup

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sft = tiny.save(tiny.new(1), folder / "sft")
        trainer = setup.make(rewarder_of(sft, Peft(), folder / "reward"))
        device = trainer.accelerator.device
        trainer.models.reference.to(device)
        for model in trainer.models.rewards.models():
            model.to(device)
        before = tiny.snapshot(trainer.models.trained)
        trainer.train()
        assert trainer.state.step == 2
        assert {p.device.type for p in trainer.models.trained.parameters()} == {pretend_device.NAME}
        moved = [n for n, p in trainer.models.trained.named_parameters() if not torch.equal(p.cpu(), before[n].cpu())]
        assert moved, "nothing was trained"


def crossing() -> None:
    """Index a CPU tensor by positions on the device."""
    torch.arange(6)[torch.arange(3).to(pretend_device.NAME)]


if __name__ == "__main__":
    pretend_device.register()
    pretend_device.become_default()
    torch.set_num_threads(1)
    {"ppo": ppo, "crossing": crossing}[sys.argv[1]]()
