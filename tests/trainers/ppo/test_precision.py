"""One precision in the three phases of a step, and a bfloat16 copy that samples what the policy would."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from rlhf.models.adapters import add_adapter
from rlhf.models.packed_batch import can_pack
from rlhf.trainers.ppo.policy_for_sampling import BFloat16Copy
from tests.models import tiny
from tests.trainers.setup import make, sometimes_ending


def watched(trainer: Any) -> dict[str, set[torch.dtype]]:
    """Dtypes of the matrix products of the policy's first block, by phase: filled while the trainer runs."""
    seen: dict[str, set[torch.dtype]] = defaultdict(set)
    phase = ["?"]
    policy = trainer.models.pair.policy
    layer = next(m for n, m in policy.named_modules() if n.endswith("mlp.down_proj"))
    layer.register_forward_hook(lambda _, __, output: seen[phase[0]].add(output.dtype))
    for name in ("sample", "score", "update"):
        original = getattr(trainer, name)

        def run(*args: Any, _name: str = name, _original: Any = original) -> Any:
            phase[0] = _name
            return _original(*args)

        setattr(trainer, name, run)
    return seen


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "LoRA"])
def test_sampling_scoring_and_updates_compute_in_one_dtype(
    precision: str, dtype: torch.dtype, adapter: bool, reward_folder: str
) -> None:
    policy = add_adapter(sometimes_ending(tiny.new(1)), tiny.LORA, "CAUSAL_LM") if adapter else None
    trainer = make(reward_folder, policy=policy, optim={"precision": precision}, ppo={"steps": 1})
    can_pack(trainer.models.pair.policy)  # which runs the policy as well, once
    seen = watched(trainer)
    trainer.train()
    assert seen == {"sample": {dtype}, "score": {dtype}, "update": {dtype}}
    assert {p.dtype for p in trainer.models.pair.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "LoRA"])
def test_the_copy_is_bfloat16_and_follows_the_policy(adapter: bool) -> None:
    policy = tiny.new(1)
    if adapter:
        policy = add_adapter(policy, tiny.LORA, "CAUSAL_LM")
        for name, parameter in policy.named_parameters():
            if "base_layer" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    made = BFloat16Copy(policy)
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for n, p in made.model.named_parameters() if "base_layer" not in n)
    assert made.model.lm_head.weight is made.model.get_input_embeddings().weight if not adapter else True
    shared = {id(p) for p in policy.parameters()} & {id(p) for p in made.model.parameters()}
    assert bool(shared) is adapter  # the base lies in memory once
    ids = torch.tensor(tiny.rows(1, [9]))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
        old = made.model(input_ids=ids).logits.float()
        made.refresh()
        new = made.model(input_ids=ids).logits.float()
        with torch.autocast("cpu", torch.bfloat16):
            wanted = policy(input_ids=ids).logits.float()
    assert (new - wanted).abs().max() < 0.1 * (old - wanted).abs().max()


def test_a_run_that_samples_from_a_copy_passes_its_checks(reward_folder: str) -> None:
    """As on a GPU: sampled log-probs of bfloat16 weights agree with teacher-forced ones within the tolerance."""
    trainer = make(
        reward_folder,
        optim={"precision": "bfloat16"},
        reference=sometimes_ending(tiny.new(1)),
        watch={"broken": "stop"},
        kl={"coef": 0.0},
    )
    trainer.policy_for_sampling.uses_copy = True
    trainer.train()
    assert trainer.state.step == 2
    made = trainer.policy_for_sampling.copy
    assert made is not None
    weights = dict(trainer.models.pair.policy.named_parameters())
    moved = [n for n, p in made.model.named_parameters() if not torch.equal(p, weights[n].to(torch.bfloat16))]
    assert moved  # the last update came after the last rollout
