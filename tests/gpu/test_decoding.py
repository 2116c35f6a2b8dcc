"""Decoding from CUDA graphs, and compiled blocks, against the plain forms on the same device."""

from __future__ import annotations

import pytest
import torch

from rlhf.config.sections import Sampling
from rlhf.generation.native import generate_rollout
from rlhf.generation.static_decoder import can_decode_statically
from rlhf.rollout.types import Rollout
from tests.models import tiny
from tests.tolerances import distance
from tests.trainers.setup import experienced, gradient, make, sometimes_ending

PROMPTS = list(enumerate(tiny.rows(3, [4, 9, 2, 6, 6, 1, 13, 5, 3, 8, 2, 7])))


def decode(device: torch.device, dtype: torch.dtype, compile_setting: str, **changes: object) -> Rollout:
    """Sample a response to every prompt."""
    model = sometimes_ending(tiny.new(4)).to(device, dtype)
    assert can_decode_statically(model)
    values = {"max_new_tokens": 40, "temperature": 0.9, "batch_size": 5, "compile": compile_setting} | changes
    settings = Sampling.model_validate(values)
    ends = {"end_id": tiny.renderer().end_id, "pad_id": tiny.renderer().pad_id}
    return generate_rollout(
        model, PROMPTS, settings, seed=1, step=0, device=device, decode=tiny.tokenizer().decode, **ends
    )


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.8, "top_k": 20}, {"stop": (" the",)}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs_decode_as_the_plain_decoder_does(
    device: torch.device, dtype: torch.dtype, changes: dict[str, object]
) -> None:
    ours, theirs = (decode(device, dtype, kind, **changes) for kind in ("always", "off"))
    width = min(ours.response_ids.shape[1], theirs.response_ids.shape[1])
    same = (ours.response_ids[:, :width] == theirs.response_ids[:, :width]).float().mean()
    assert same > (0.95 if dtype == torch.float32 else 0.5)  # one token that differs changes all after it
    first = ours.response_ids[:, 0] == theirs.response_ids[:, 0]
    assert first.any()
    difference = (ours.sampled_logprobs[first, 0] - theirs.sampled_logprobs[first, 0]).abs().max()
    assert difference < (1e-4 if dtype == torch.float32 else 0.05)


def test_compiled_blocks_have_the_gradients_of_plain_ones(device: torch.device, reward_folder: str) -> None:
    gradients = {}
    for kind in ("off", "always"):
        trainer = make(reward_folder, optim={"compile": kind, "precision": "float32"})
        assert trainer.accelerator.device.type == device.type
        experience = experienced(trainer)
        trainer.models.trained.train()
        total = float(experience.response_mask.sum())
        trainer.accumulate(experience, torch.arange(len(experience)), total, {})
        gradients[kind] = gradient(trainer.models.trained).cpu()
    assert distance(gradients["always"], gradients["off"]) < 1e-3
