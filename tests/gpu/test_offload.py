"""Offloaded frozen models are in CPU memory except while they score, and change no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tolerances import DEVICES
from tests.trainers import setup

ROLES = ["reference", "reward"]


def frozen_models(trainer: Any) -> list[torch.nn.Module]:
    """Return the reference and the reward model of a trainer."""
    return [trainer.models.reference, *trainer.models.rewards.models()]


def places(model: torch.nn.Module) -> set[str]:
    """Return the types of the devices on which a model's weights are."""
    return {p.device.type for p in model.parameters()}


def test_offloaded_models_score_on_the_device_and_change_no_number(device: torch.device, reward_folder: str) -> None:
    plain, offloaded = setup.make(reward_folder), setup.make(reward_folder, offload=ROLES)
    seen: set[str] = set()
    for model in frozen_models(offloaded):
        assert places(model) == {"cpu"}
        model.register_forward_pre_hook(lambda module, _: seen.update(places(module)))
        for part in model.children():
            part.register_forward_pre_hook(lambda module, _: seen.update(places(module)))
    for trainer in (plain, offloaded):
        trainer.train()
    assert seen == {device.type}
    assert [places(model) for model in frozen_models(offloaded)] == [{"cpu"}] * 2
    assert [places(model) for model in frozen_models(plain)] == [{device.type}] * 2
    # Two runs on a CPU are equal bit for bit; on a GPU kernels may add in another order.
    bar = 0.0 if device.type == "cpu" else DEVICES
    for ours, theirs in zip(offloaded.history, plain.history, strict=True):
        for name in ("score", "kl", "policy_loss", "value_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=bar, abs=bar), name


@pytest.mark.gpu
def test_offloaded_models_take_no_memory_of_the_gpu_between_steps(reward_folder: str) -> None:
    def allocated(**sections: Any) -> tuple[int, int]:
        begun = torch.cuda.memory_allocated()
        trainer = setup.make(reward_folder, **sections)
        trainer.run_step()
        sizes = sum(p.numel() * p.element_size() for model in frozen_models(trainer) for p in model.parameters())
        return torch.cuda.memory_allocated() - begun, sizes

    (plain, sizes), (offloaded, _) = allocated(), allocated(offload=ROLES)
    assert plain - offloaded >= sizes * 0.9  # the allocator rounds sizes
