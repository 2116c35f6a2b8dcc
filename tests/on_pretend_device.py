"""Run a part of the project on the pretended accelerator: `python -m tests.on_pretend_device PART`.

Parts: `ppo` trains two steps on tiny models; `full` and `adapters` run every stage and tool by the command line, on all
weights and on LoRA adapters; `bench` runs the cases of the GPU benchmark on its tiny shape; `crossing` does what a GPU
refuses and must fail.
"""

from __future__ import annotations

import io
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


def full() -> None:
    """Every stage, `generate` and `chat`, on all weights."""
    with tempfile.TemporaryDirectory() as name:
        run_commands(Path(name), adapters=False)


def adapters() -> None:
    """Every stage, `generate`, `chat` and `merge`, on LoRA adapters."""
    with tempfile.TemporaryDirectory() as name:
        run_commands(Path(name), adapters=True)


def run_commands(top: Path, *, adapters: bool) -> None:
    """Run the stages of `tests.stages.setup` and the tools on their models."""
    from rlhf.cli.main import app
    from tests.conftest import save_tiny_model
    from tests.stages import setup

    files = setup.write_data(top / "data")
    configs = setup.configs(top, str(save_tiny_model(top / "base")), files, adapters=adapters)
    commands = [[stage, setup.write(top / "configs", stage, config)] for stage, config in configs.items()]
    commands += [
        ["generate", str(top / "ppo"), files["prompts"], str(top / "responses.jsonl"), "--max-new-tokens", "4"],
        ["chat", str(top / "ppo"), "--max-new-tokens", "4"],
    ]
    if adapters:
        commands.append(["merge", str(top / "sft"), str(top / "merged")])
    for command in commands:
        sys.stdin = io.StringIO("what is a cat?\n\n")
        places.clear()
        app(command, standalone_mode=False)  # an error keeps its traceback
        assert command[0] == "merge" or pretend_device.NAME in places, f"rlhf {command[0]} did not use the device"


places: set[str] = set()
"""Devices of the embeddings that ran a forward pass since the last command began."""


def note_places() -> None:
    """Write down the device of every embedding layer's forward pass in `places`."""
    original = torch.nn.Embedding.forward

    def forward(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        places.add(self.weight.device.type)
        return original(self, ids)

    torch.nn.Embedding.forward = forward  # type: ignore[method-assign]


def bench() -> None:
    """The cases of tests/bench/gpu.py that are ours: models made on the device, two steps of PPO."""
    from rlhf.preflight.cost import MachineRates
    from tests.bench.gpu_cases import cases
    from tests.bench.gpu_sides import run_ours

    device = torch.device(f"{pretend_device.NAME}:0")
    for case in cases("tiny")[:2]:
        result = {"steps": [], "notes": []}
        run_ours(case, MachineRates(1e10, 1e10, 1e10), device, result)
        assert len(result["steps"]) == 2
        assert not result["notes"], result["notes"]


def crossing() -> None:
    """Index a CPU tensor by positions on the device."""
    torch.arange(6)[torch.arange(3).to(pretend_device.NAME)]


if __name__ == "__main__":
    pretend_device.register()
    pretend_device.become_default()
    note_places()
    torch.set_num_threads(1)
    parts = {"ppo": ppo, "full": full, "adapters": adapters, "bench": bench, "crossing": crossing}
    parts[sys.argv[1]]()
