"""Settings that save time or memory do not change the result of training."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlhf.config.sections import Optim
from rlhf.errors import TrainingError
from rlhf.models import shared_base
from rlhf.models.packed_batch import can_pack
from rlhf.models.policy import policy_with_adapter
from rlhf.models.reward_models import load_scorer, new_reward_model
from rlhf.rollout.types import Rollout
from rlhf.runs.run_dir import RunDir
from rlhf.trainers.phase_schedule import PhaseSchedule, ResolvedPhase
from rlhf.trainers.ppo.policy_value import PolicyAndValue
from rlhf.trainers.supervised.base import training_arguments
from tests.models import tiny
from tests.models.fixtures import shake
from tests.tolerances import assert_close
from tests.trainers.setup import config, make, sometimes_ending

# Log-probs kept from sampling


def record_forward_passes(trainer: Any) -> list[int]:
    """Return a list that receives the batch size of every forward pass of the policy without a KV cache."""
    calls: list[int] = []
    can_pack(trainer.models.trained.policy)  # which runs the trunk as well, once
    trainer.models.trained.policy.model.register_forward_pre_hook(
        lambda _, __, kw: calls.append(len(kw["input_ids"])) if kw.get("use_cache") is False else None,
        with_kwargs=True,
    )
    return calls


def test_kept_log_probs_save_a_forward_pass_of_the_policy_and_change_results_slightly(reward_folder: str) -> None:
    policies, lines, calls = {}, {}, {}
    for kind in ("scored", "sampled"):
        lines[kind] = found = []
        trainer = make(reward_folder, ppo={"old_logprobs": kind}, report=lambda _, __, s, to=found: to.append(s))
        calls[kind] = record_forward_passes(trainer)
        trainer.score(trainer.sample())
        assert bool(calls[kind]) is (kind == "scored")
        trainer.train()
        policies[kind] = torch.cat([p.detach().flatten() for p in trainer.models.trained.policy.parameters()])
    for ours, theirs in zip(lines["sampled"], lines["scored"], strict=True):
        for name in ("kl", "score", "policy_loss", "value_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4)
    assert_close(policies["sampled"], policies["scored"].tolist())


def test_log_probs_kept_from_sampling_at_another_temperature_stop_the_run(reward_folder: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"ppo": {"old_logprobs": "sampled"}, "watch": {"broken": "stop"}, "folder": tmp_path}
    make(reward_folder, reference=sometimes_ending(tiny.new(1)).requires_grad_(False), **options).train()  # as it is
    trainer = make(reward_folder, reference=sometimes_ending(tiny.new(1)).requires_grad_(False), **options)
    sample = trainer.sample

    def warmer() -> Rollout:
        rollout = sample()
        return type(rollout)(**{**vars(rollout), "sampled_logprobs": rollout.sampled_logprobs * 0.9})

    trainer.sample = warmer  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="KL of a fresh policy is not 0"):
        trainer.train()


def test_kept_log_probs_are_refused_with_a_value_head_on_the_trunk() -> None:
    with pytest.raises(ValidationError, match="saves nothing with value_model=trunk"):
        config(ppo={"old_logprobs": "sampled", "value_model": "trunk"})


# Activation checkpointing


def separate(folder: str, sft: str) -> PolicyAndValue:
    return PolicyAndValue(sometimes_ending(tiny.new(1)), load_scorer(tiny.source(folder)))


def adapters(folder: str, sft: str) -> PolicyAndValue:
    torch.manual_seed(0)  # of a fresh adapter
    policy = policy_with_adapter(tiny.source(sft), tiny.LORA)
    return PolicyAndValue(
        shake(policy), shared_base.attach_scorer(policy, tiny.source(folder), shared_base.VALUE, trainable=True)
    )


@pytest.fixture(scope="module")
def adapted_reward(sft_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    model = new_reward_model(
        tiny.source(sft_folder), tiny.LORA, pad_id=tiny.renderer().pad_id, vocab_size=len(tiny.tokenizer()), seed=3
    )
    return tiny.save(shake(model, 8), tmp_path_factory.mktemp("reward"), with_tokenizer=False)


def run_forward_backward(model: PolicyAndValue) -> tuple[Tensor, int]:
    """Return the gradient of all trained parameters, and the bytes that the forward pass kept for the backward pass."""
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        logprobs, _, values = model(tiny.rollout(1, [3, 8, 1], [14, 12, 19]), 0.9)
    (logprobs.sum() + values.square().sum()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]), kept


@pytest.mark.parametrize("kind", ["separate", "adapters"])
def test_recomputed_activations_give_the_same_gradient_from_less_memory(
    kind: str, reward_folder: str, adapted_reward: str, sft_folder: str
) -> None:
    build = {"separate": separate, "adapters": adapters}[kind]
    folder = {"separate": reward_folder, "adapters": adapted_reward}[kind]
    plain, plain_bytes = run_forward_backward(build(folder, sft_folder))
    model = build(folder, sft_folder)
    model.recompute_activations()
    found, found_bytes = run_forward_backward(model)
    assert plain.abs().max() > 0
    assert_close(found, plain.tolist())
    assert found_bytes < 0.5 * plain_bytes


def test_recomputing_with_the_wrong_adapter_changes_the_gradient(
    adapted_reward: str, sft_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = run_forward_backward(adapters(adapted_reward, sft_folder))
    monkeypatch.setattr(shared_base, "use_adapter", lambda *_: nullcontext())
    model = adapters(adapted_reward, sft_folder)
    model.recompute_activations()
    found, _ = run_forward_backward(model)
    assert (found - plain).abs().max() > 0.01 * plain.abs().max()


def test_activation_checkpointing_of_the_other_stages(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    for on in (True, False):
        plan = PhaseSchedule((ResolvedPhase(frozenset("w"), 10, 1e-3),), {})
        found = training_arguments(
            Optim(activation_checkpointing=on), run, seed=1, processes=1, schedule=plan, evaluate=False
        )
        assert found["gradient_checkpointing"] is on
        assert found["gradient_checkpointing_kwargs"] == {"use_reentrant": False}
