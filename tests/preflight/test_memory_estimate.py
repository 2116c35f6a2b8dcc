"""What an estimate counts: models at rest, and of an unfreezing run what each phase trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from rlhf.config.schema import Architecture, PPOConfig, SFTConfig
from rlhf.config.sections import Peft
from rlhf.preflight.memory_estimate import DataProfile, EstimateInput, estimate_memory
from rlhf.preflight.memory_model import Sharding
from rlhf.preflight.model_shapes import PlannedModel, ppo_model_shapes, trained_model_shape
from rlhf.preflight.suggestions import memory_suggestions

SIZE = Architecture(vocab_size=600, hidden_size=64, layers=4, heads=2, intermediate_size=96, context=128)
PLANNED = {name: PlannedModel("sft", None, SIZE, Peft()) for name in ("made/sft", "made/reward")}
EMBEDDINGS, HEAD = 600 * 64, 64
BLOCK = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64
"""Weights of a block: attention, gated MLP, two norms."""
LOAD = DataProfile(10, 400, 40, 0.5)


def ppo(*, gpu: bool = True, shared: bool = False, **sections: Any) -> EstimateInput:
    config = PPOConfig.model_validate(
        {
            "output_dir": "x",
            "policy": {"path": "made/sft"},
            "reward_model": {"path": "made/reward"},
            "data": {"prompts": [{"path": "p"}]},
            "sampling": {"max_new_tokens": 16},
            "ppo": {"steps": 6, "rollout_size": 64},
            "optim": {"precision": "float32"},
        }
        | sections
    )
    return EstimateInput(
        "ppo", config, ppo_model_shapes(config, PLANNED, shared=shared, fits=True), LOAD, Sharding(), gpu
    )


def sft(sharding: Sharding = Sharding(), **sections: Any) -> EstimateInput:
    config = SFTConfig.model_validate(
        {"output_dir": "x", "model": {"path": "made/sft"}, "data": {"train": [{"path": "p"}]}} | sections
    )
    return EstimateInput("sft", config, trained_model_shape("sft", config, PLANNED), LOAD, sharding, False)


def parts(case: EstimateInput, phase: str) -> Mapping[str, float]:
    """Name -> bytes."""
    return {part.name: part.bytes for part in estimate_memory(case).phases[phase]}


def test_models_at_rest_are_on_the_device_for_scoring_only_and_one_at_a_time() -> None:
    here, away = estimate_memory(ppo()), estimate_memory(ppo(offload=["reference", "reward"]))
    reference, reward = 4 * (EMBEDDINGS + 4 * BLOCK + 64), 4 * (EMBEDDINGS + 4 * BLOCK + 64 + HEAD)
    for phase in ("sample", "update"):
        assert here.needed(phase) - away.needed(phase) == reference + reward
    assert here.needed("score") - away.needed("score") == min(reference, reward)
    assert away.host - here.host == reference + reward
    one = estimate_memory(ppo(offload=["reward"]))
    assert here.needed("update") - one.needed("update") == reward
    assert one.needed("score") == here.needed("score")


def test_on_a_cpu_offload_changes_nothing() -> None:
    both = [estimate_memory(ppo(gpu=False, offload=offload)) for offload in ([], ["reference", "reward"])]
    assert both[0].peak == both[1].peak


def test_offload_is_proposed_before_anything_that_costs_work() -> None:
    words = [change for change, _ in memory_suggestions(ppo())]
    first = words.index("offload=[reference,reward]")
    assert all(change.startswith("optim.microbatch_size=") for change in words[:first])
    assert first > 0
    assert all("offload=[reference,reward]" in change for change in words[first:])
    assert any("activation_checkpointing" in change for change in words[first:])
    for change, case in memory_suggestions(ppo()):
        assert ("offload" in change) is (case.config.offload == ("reference", "reward"))


@pytest.mark.parametrize(
    ("options", "roles"),
    [
        ({"gpu": False}, None),
        ({"offload": ["reference", "reward"]}, None),
        ({"shared": True, "peft": {"method": "lora"}}, None),
        ({"peft": {"method": "lora"}}, "reward"),
        ({"reward_model": None, "rewards": [{"function": "a:b"}]}, "reference"),
    ],
)
def test_only_what_can_be_offloaded_is_proposed(options: dict[str, Any], roles: str | None) -> None:
    proposed = {
        word for change, _ in memory_suggestions(ppo(**options)) for word in change.split() if "offload=" in word
    }
    assert proposed == (set() if roles is None else {f"offload=[{roles}]"})


PHASES = [{"train": {"parts": ["norms"], "last": 1}, "updates": 3}, {"train": {"last": 2}, "updates": 3}]


def test_each_phase_counts_what_it_trains_and_the_optimizer_what_all_of_them_train() -> None:
    case = sft(unfreeze=PHASES)
    assert [active.weights for active in case.models.phases] == [BLOCK + 3 * 2 * 64 + 64, 2 * BLOCK]  # type: ignore[union-attr]
    assert [active.kept for active in case.models.phases] == [4, 2]  # type: ignore[union-attr]
    ever = 2 * BLOCK + 2 * 2 * 64 + 64
    found = estimate_memory(case)
    assert found.largest == "update, phase 1 of 2"  # fewer weights, but norms below all blocks
    assert parts(case, found.largest)["gradients"] == 4 * (BLOCK + 3 * 2 * 64 + 64)
    assert parts(case, found.largest)["optimizer (Adam)"] == 8 * ever
    assert parts(case, found.largest)["weights"] == 4 * (EMBEDDINGS + 4 * BLOCK + 64)


def test_the_worst_phase_is_shown_and_frozen_blocks_keep_nothing() -> None:
    whole = sft()
    assert list(estimate_memory(whole).phases) == ["update"]
    frozen = sft(freeze={"first": 2, "parts": ["embeddings"]})
    last = sft(unfreeze=[{"train": {"last": 1}, "updates": 1}, {"train": {"last": 2}, "updates": 1}])
    everything = sft(unfreeze=[{"train": {"last": 1}, "updates": 1}, {"train": "all", "updates": 1}])
    assert estimate_memory(last).largest == "update, phase 2 of 2"
    assert (
        estimate_memory(last).peak
        < estimate_memory(frozen).peak
        < estimate_memory(whole).peak
        == estimate_memory(everything).peak
    )
    half, full = parts(frozen, "update")["activations"], parts(whole, "update")["activations"]
    assert half < 0.6 * full


def test_under_deepspeed_there_is_room_for_every_gradient_in_every_phase() -> None:
    case = sft(Sharding(2, 2, True), unfreeze=PHASES)
    assert parts(case, estimate_memory(case).largest)["gradients"] == 4 * (2 * BLOCK + 2 * 2 * 64 + 64) / 2


def test_phases_of_the_two_models_of_ppo_meet_step_by_step() -> None:
    policy = [{"train": {"last": 1}, "steps": 4}, {"train": "all"}]
    value = [{"train": {"parts": ["score"]}, "steps": 2}, {"train": {"last": 3}}]
    case = ppo(unfreeze={"policy": policy, "value_model": value})
    found = estimate_memory(case)
    assert found.largest == "update, phase 3 of 3"
    everything = EMBEDDINGS + 4 * BLOCK + 64
    assert parts(case, found.largest)["gradients"] == 4 * (everything + 3 * BLOCK)
    assert parts(case, found.largest)["optimizer (Adam)"] == 8 * (everything + 3 * BLOCK + HEAD)
    short = replace(
        case, config=case.config.model_copy(update={"ppo": case.config.ppo.model_copy(update={"steps": 4})})
    )
    assert estimate_memory(short).largest == "update, phase 2 of 2"  # the run ends before the whole policy is trained
    assert parts(short, "update, phase 2 of 2")["gradients"] == 4 * (BLOCK + 3 * BLOCK)
    assert estimate_memory(short).peak < found.peak < estimate_memory(ppo()).peak


def test_responses_that_cannot_end_count_as_long_as_they_must_be() -> None:
    case = ppo(sampling={"max_new_tokens": 16, "min_new_tokens": 12})
    peaks = [estimate_memory(replace(case, response=mean)).peak for mean in (4, 12, 14, None)]
    assert peaks[0] == peaks[1] < peaks[2] < peaks[3]
