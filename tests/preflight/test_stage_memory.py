"""Memory estimates of a stage: offloaded models, and the weights that each phase of an unfreezing run trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from rlhf.config.schema import Architecture, PPOConfig, SFTConfig
from rlhf.config.sections import Peft
from rlhf.preflight.memory_formulas import QUANTIZED_BITS, Sharding
from rlhf.preflight.model_shapes import PlannedModel, ppo_model_shapes, trained_model_shape
from rlhf.preflight.stage_memory import DataProfile, EstimateInput, estimate_memory
from rlhf.preflight.suggestions import memory_suggestions

SIZE = Architecture(vocab_size=600, hidden_size=64, layers=4, heads=2, intermediate_size=96, context=128)
PLANNED = {name: PlannedModel("sft", None, SIZE, Peft()) for name in ("made/sft", "made/reward")}
EMBEDDINGS, HEAD = 600 * 64, 64
BLOCK = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64
"""Weights of a block: attention, gated MLP, two norms."""
DATA = DataProfile(10, 400, 40, 0.5)


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
        "ppo",
        config,
        ppo_model_shapes(config, PLANNED, shared_base=shared, shared_tokenizer=True),
        DATA,
        Sharding(),
        gpu,
    )


def sft(sharding: Sharding = Sharding(), **sections: Any) -> EstimateInput:
    config = SFTConfig.model_validate(
        {"output_dir": "x", "model": {"path": "made/sft"}, "data": {"train": [{"path": "p"}]}} | sections
    )
    return EstimateInput("sft", config, trained_model_shape("sft", config, PLANNED), DATA, sharding, False)


def parts(inputs: EstimateInput, phase: str) -> Mapping[str, float]:
    """Return name -> bytes of the parts of a phase."""
    return {part.name: part.bytes for part in estimate_memory(inputs).phases[phase]}


def test_offloaded_models_are_on_the_device_only_for_scoring_and_one_role_at_a_time() -> None:
    resident, offloaded = estimate_memory(ppo()), estimate_memory(ppo(offload=["reference", "reward"]))
    reference, reward = 4 * (EMBEDDINGS + 4 * BLOCK + 64), 4 * (EMBEDDINGS + 4 * BLOCK + 64 + HEAD)
    for phase in ("sample", "update"):
        assert resident.phase_bytes(phase) - offloaded.phase_bytes(phase) == reference + reward
    assert resident.phase_bytes("score") - offloaded.phase_bytes("score") == min(reference, reward)
    assert offloaded.host_bytes - resident.host_bytes == reference + reward
    one = estimate_memory(ppo(offload=["reward"]))
    assert resident.phase_bytes("update") - one.phase_bytes("update") == reward
    assert one.phase_bytes("score") == resident.phase_bytes("score")


def test_on_a_cpu_offload_changes_nothing() -> None:
    both = [estimate_memory(ppo(gpu=False, offload=offload)) for offload in ([], ["reference", "reward"])]
    assert both[0].peak == both[1].peak


def test_offload_is_suggested_before_changes_that_cost_computation() -> None:
    changes = [change for change, _ in memory_suggestions(ppo())]
    first = changes.index("offload=[reference,reward]")
    assert all(change.startswith("optim.microbatch_size=") for change in changes[:first])
    assert first > 0
    assert all("offload=[reference,reward]" in change for change in changes[first:])
    assert any("activation_checkpointing" in change for change in changes[first:])
    for change, inputs in memory_suggestions(ppo()):
        assert ("offload" in change) is (inputs.config.offload == ("reference", "reward"))


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
def test_only_models_that_can_be_offloaded_are_suggested(options: dict[str, Any], roles: str | None) -> None:
    proposed = {
        word for change, _ in memory_suggestions(ppo(**options)) for word in change.split() if "offload=" in word
    }
    assert proposed == (set() if roles is None else {f"offload=[{roles}]"})


PHASES = [{"train": {"parts": ["norms"], "last": 1}, "updates": 3}, {"train": {"last": 2}, "updates": 3}]


def test_gradients_follow_the_phase_and_the_optimizer_state_covers_all_phases() -> None:
    inputs = sft(unfreeze=PHASES)
    assert [phase.weights for phase in inputs.models.phases] == [BLOCK + 3 * 2 * 64 + 64, 2 * BLOCK]  # type: ignore[union-attr]
    assert [phase.blocks_with_activations for phase in inputs.models.phases] == [4, 2]  # type: ignore[union-attr]
    ever = 2 * BLOCK + 2 * 2 * 64 + 64
    found = estimate_memory(inputs)
    assert found.largest_phase == "update, phase 1 of 2"  # fewer weights, but norms below all blocks
    assert parts(inputs, found.largest_phase)["gradients"] == 4 * (BLOCK + 3 * 2 * 64 + 64)
    assert parts(inputs, found.largest_phase)["optimizer (Adam)"] == 8 * ever
    assert parts(inputs, found.largest_phase)["weights"] == 4 * (EMBEDDINGS + 4 * BLOCK + 64)


def test_the_largest_phase_is_returned_and_frozen_blocks_keep_no_activations() -> None:
    whole = sft()
    assert list(estimate_memory(whole).phases) == ["update"]
    frozen = sft(freeze={"first": 2, "parts": ["embeddings"]})
    last = sft(unfreeze=[{"train": {"last": 1}, "updates": 1}, {"train": {"last": 2}, "updates": 1}])
    everything = sft(unfreeze=[{"train": {"last": 1}, "updates": 1}, {"train": "all", "updates": 1}])
    assert estimate_memory(last).largest_phase == "update, phase 2 of 2"
    assert (
        estimate_memory(last).peak
        < estimate_memory(frozen).peak
        < estimate_memory(whole).peak
        == estimate_memory(everything).peak
    )
    half, full = parts(frozen, "update")["activations"], parts(whole, "update")["activations"]
    assert half < 0.6 * full


def test_deepspeed_allocates_all_gradients_in_every_phase() -> None:
    inputs = sft(Sharding(2, 2, True), unfreeze=PHASES)
    assert parts(inputs, estimate_memory(inputs).largest_phase)["gradients"] == 4 * (2 * BLOCK + 2 * 2 * 64 + 64) / 2


def test_phases_of_policy_and_value_model_are_combined_by_step() -> None:
    policy = [{"train": {"last": 1}, "steps": 4}, {"train": "all"}]
    value = [{"train": {"parts": ["score"]}, "steps": 2}, {"train": {"last": 3}}]
    inputs = ppo(unfreeze={"policy": policy, "value_model": value})
    found = estimate_memory(inputs)
    assert found.largest_phase == "update, phase 3 of 3"
    everything = EMBEDDINGS + 4 * BLOCK + 64
    assert parts(inputs, found.largest_phase)["gradients"] == 4 * (everything + 3 * BLOCK)
    assert parts(inputs, found.largest_phase)["optimizer (Adam)"] == 8 * (everything + 3 * BLOCK + HEAD)
    short = replace(
        inputs, config=inputs.config.model_copy(update={"ppo": inputs.config.ppo.model_copy(update={"steps": 4})})
    )
    assert (
        estimate_memory(short).largest_phase == "update, phase 2 of 2"
    )  # the run ends before the whole policy is trained
    assert parts(short, "update, phase 2 of 2")["gradients"] == 4 * (BLOCK + 3 * BLOCK)
    assert estimate_memory(short).peak < found.peak < estimate_memory(ppo()).peak


def test_responses_count_at_least_min_new_tokens() -> None:
    inputs = ppo(sampling={"max_new_tokens": 16, "min_new_tokens": 12})
    peaks = [estimate_memory(replace(inputs, response_tokens=mean)).peak for mean in (4, 12, 14, None)]
    assert peaks[0] == peaks[1] < peaks[2] < peaks[3]


def test_a_quantized_base_takes_4_127_bits_a_weight_of_its_linear_layers() -> None:
    lora = {"method": "lora", "r": 4}
    plain, small = (sft(model={"path": "made/sft", "quantize": q}, peft=lora) for q in (None, "nf4"))
    linear = 4 * (4 * 64 * 64 + 3 * 64 * 96)
    saved = parts(plain, "update")["weights"] - parts(small, "update")["weights"]
    assert saved == pytest.approx(linear * (4 - QUANTIZED_BITS / 8))
    for name in ("gradients", "optimizer (Adam)", "activations"):
        assert parts(small, "update")[name] == parts(plain, "update")[name]
    assert parts(small, "update")["restored 4-bit layer"] == 4 * 64 * 96
    assert "restored 4-bit layer" not in parts(plain, "update")


def test_autocast_copies_no_quantized_weights() -> None:
    lora, optim = {"method": "lora", "r": 4}, {"precision": "bfloat16"}
    plain, small = (sft(model={"path": "made/sft", "quantize": q}, peft=lora, optim=optim) for q in (None, "nf4"))
    casts = 2 * 4 * (4 * 64 * 64 + 3 * 64 * 96)
    difference = parts(plain, "update")["activations"] - parts(small, "update")["activations"]
    assert 0.5 * casts < difference <= casts


def test_ppo_counts_a_shared_quantized_base_once_and_separate_ones_each() -> None:
    lora = {"method": "lora", "r": 4}
    sources = {"policy": {"path": "made/sft"}, "reward_model": {"path": "made/reward"}}
    quantized = {name: source | {"quantize": "nf4"} for name, source in sources.items()}
    linear = 4 * (4 * 64 * 64 + 3 * 64 * 96)
    for shared, bases in ((True, 1), (False, 3)):  # policy, value and reward model
        plain = parts(ppo(shared=shared, peft=lora, **sources), "update")
        small = parts(ppo(shared=shared, peft=lora, **quantized), "update")
        saved = sum(plain[name] - small[name] for name in ("weights", "reward models") if name in plain)
        assert saved == pytest.approx(bases * linear * (4 - QUANTIZED_BITS / 8))
