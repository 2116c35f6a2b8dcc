"""Bases in 4 bits: what is refused anywhere, and with bitsandbytes what is quantized and what is computed with it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.schema import PPOConfig, SFTConfig
from rlhf.config.sections import ModelSource, quantized_sources
from rlhf.distributed.launch_env import weight_sharding
from rlhf.errors import ConfigError
from rlhf.models import quantization
from rlhf.models.adapters import load_adapter, reference_policy
from rlhf.models.frozen_weights import store_linear_weights
from rlhf.models.heads import score_head, sequence_scores
from rlhf.models.load import count_parameters, is_adapter
from rlhf.models.output_layer import logit_transform, output_layer
from rlhf.models.packed_batch import can_pack
from rlhf.models.policy import load_causal, policy_with_adapter
from rlhf.models.quantization import bitsandbytes_is_installed, check_quantization, is_quantized, quantized_layers
from rlhf.models.reward_models import adapted_classifier, load_scorer, new_reward_model
from rlhf.models.shared_base import reason_not_shared
from rlhf.trainers.ppo.policy_for_sampling import BFloat16Copy
from tests.models import tiny
from tests.models.fixtures import shake
from tests.tolerances import assert_close, distance

needs_bitsandbytes = pytest.mark.skipif(
    not bitsandbytes_is_installed(), reason="bitsandbytes is not installed: pip install 'rlhf[quantize]'"
)
IDS = torch.tensor(tiny.rows(4, [14, 14]))
LINEAR = 2 * (4 * tiny.HIDDEN * tiny.HIDDEN + 3 * tiny.HIDDEN * 48)
"""Weights of the linear layers of the tiny model's two blocks."""


def source(folder: str) -> ModelSource:
    """Return the source of a model that is loaded in 4 bits."""
    return ModelSource(path=folder, quantize="nf4")


def sft(**sections: Any) -> SFTConfig:
    """Return a configuration of SFT with an adapter on a quantized base."""
    given = {"output_dir": "x", "model": {"path": "m", "quantize": "nf4"}, "data": {"train": [{"path": "p"}]}}
    return SFTConfig.model_validate(given | {"peft": {"method": "lora"}} | sections)


def logits(model: Any) -> torch.Tensor:
    """Return the logits in evaluation mode."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def restore(plain: Any, model: Any) -> None:
    """Replace the weights of a plain model by those that a quantized one computes with, after checking their error."""
    from bitsandbytes.functional import dequantize_4bit

    packed = {name: p for name, p in model.named_parameters() if is_quantized(p)}
    for name, p in plain.named_parameters():
        if name in packed:
            weight = dequantize_4bit(packed[name].data, packed[name].quant_state)
            assert 0.05 < distance(weight, p.data) < 0.12  # of 4 bits and normal weights; 0.095 on average
            p.data = weight


def test_every_quantized_model_of_a_configuration_is_found() -> None:
    config = PPOConfig.model_validate(
        {
            "output_dir": "x",
            "policy": {"path": "a", "quantize": "nf4"},
            "reward_model": {"path": "b"},
            "rewards": [{"ensemble": [{"path": "c"}, {"path": "d", "quantize": "nf4"}]}],
            "data": {"prompts": [{"path": "p"}]},
            "peft": {"method": "lora"},
        }
    )
    found = {key: model.path for key, model in quantized_sources(config)}
    assert found == {"policy": "a", "rewards.0.ensemble.1": "d"}


def test_a_missing_package_and_sharding_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "bitsandbytes_is_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"model\.quantize.*pip install 'rlhf\[quantize\]'") as missing:
        check_quantization(sft(), None)
    assert "not installed" in str(missing.value)
    check_quantization(sft(model={"path": "m"}), None)
    monkeypatch.setattr(quantization, "bitsandbytes_is_installed", lambda: True)
    check_quantization(sft(), None)
    for engine in ("DeepSpeed ZeRO-3", "FSDP"):
        with pytest.raises(ConfigError, match=f"{engine} cannot shard 4-bit weights.*--launcher ddp"):
            check_quantization(sft(), engine)


def test_loading_is_refused_without_the_package(monkeypatch: pytest.MonkeyPatch, sft_folder: str) -> None:
    monkeypatch.setattr(quantization, "bitsandbytes_is_installed", lambda: False)
    with pytest.raises(ConfigError, match="not installed"):
        load_causal(source(sft_folder))


def test_which_launches_shard_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert weight_sharding() is None
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for stage, engine in (("2", None), ("3", "DeepSpeed ZeRO-3")):
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
        assert weight_sharding() == engine
    file = tmp_path / "ds.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    for number, engine in ((2, None), (3, "DeepSpeed ZeRO-3")):
        file.write_text(json.dumps({"zero_optimization": {"stage": number}}))
        assert weight_sharding() == engine
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert weight_sharding() == "FSDP"


def test_models_of_other_quantization_share_no_base(rewarder: str, adapter_folder: str) -> None:
    policy, reward = tiny.source(adapter_folder), tiny.source(rewarder)
    assert reason_not_shared(policy, reward, "lora") is None
    reason = reason_not_shared(policy.model_copy(update={"quantize": "nf4"}), reward, "lora")
    assert reason is not None
    assert "another quantize" in reason


@needs_bitsandbytes
def test_the_linear_layers_of_the_trunk_are_quantized_and_nothing_else(sft_folder: str) -> None:
    plain, model = load_causal(tiny.source(sft_folder)), load_causal(source(sft_folder))
    packed = {name: p for name, p in model.named_parameters() if is_quantized(p)}
    assert sum(quantization.weight_count(p) for p in packed.values()) == LINEAR
    assert all(".self_attn." in name or ".mlp." in name for name in packed)
    assert sum(p.numel() for p in packed.values()) == LINEAR / 2
    assert {p.dtype for name, p in model.named_parameters() if name not in packed} == {torch.float32}
    assert count_parameters(model)[1] == count_parameters(plain)[1]
    assert {layer.compute_dtype for layer in quantized_layers(model)} == {torch.float32}
    assert not any(layer.support_avx512bf16_for_cpu for layer in quantized_layers(model))
    assert not torch.equal(logits(model), logits(plain))
    restore(plain, model)
    assert_close(logits(model), logits(plain))


@needs_bitsandbytes
def test_a_scorer_keeps_its_head(sft_folder: str) -> None:
    model = new_reward_model(source(sft_folder), tiny.LORA, pad_id=0, vocab_size=tiny.VOCABULARY, seed=1)
    assert {p.dtype for p in score_head(model).parameters()} == {torch.float32}
    assert sum(quantization.weight_count(layer.weight) for layer in quantized_layers(model)) == LINEAR
    assert torch.isfinite(sequence_scores(model.eval(), IDS, torch.ones_like(IDS, dtype=torch.bool))).all()


@needs_bitsandbytes
def test_what_is_found_out_about_a_model_is_found_out_about_a_quantized_one(sft_folder: str) -> None:
    plain, model = (policy_with_adapter(s, tiny.LORA) for s in (tiny.source(sft_folder), source(sft_folder)))
    assert can_pack(model) is can_pack(plain) is True
    assert logit_transform(model) == logit_transform(plain)
    assert logit_transform(model) is not None
    before = {name: (p.dtype, p.clone()) for name, p in model.named_parameters() if is_quantized(p)}
    tied = output_layer(model).weight is model.get_input_embeddings().weight
    assert (store_linear_weights(model, torch.bfloat16) == 0) is tied
    for name, p in model.named_parameters():
        if name in before:
            assert p.dtype == before[name][0] == torch.uint8
            assert torch.equal(p, before[name][1])


@needs_bitsandbytes
@pytest.mark.parametrize("method", sorted(tiny.METHODS))
def test_gradients_stay_the_same_after_an_evaluation(method: str, sft_folder: str) -> None:
    model = shake(policy_with_adapter(source(sft_folder), tiny.METHODS[method]))

    def gradients() -> dict[str, torch.Tensor]:
        model.train().zero_grad()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    first = gradients()
    logits(model)
    second = gradients()
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert all(bool(gradient.abs().sum() > 0) for gradient in first.values())
    assert not any(is_quantized(p) for p in model.parameters() if p.requires_grad)


@needs_bitsandbytes
def test_the_reference_is_the_quantized_base(sft_folder: str) -> None:
    model, base = policy_with_adapter(source(sft_folder), tiny.LORA), load_causal(source(sft_folder))
    shake(model)
    with reference_policy(model):
        assert torch.equal(logits(model), logits(base))
    assert not torch.equal(logits(model), logits(base))


@needs_bitsandbytes
def test_a_copy_for_sampling_shares_the_packed_weights_and_their_scales(sft_folder: str) -> None:
    policy = shake(policy_with_adapter(source(sft_folder), tiny.LORA))
    made = BFloat16Copy(policy)
    pairs = list(zip(quantized_layers(policy), quantized_layers(made.model), strict=True))
    assert len(pairs) == 14
    for own, copied in pairs:
        assert own is not copied
        assert own.weight is copied.weight
        assert own.quant_state is copied.quant_state
    wanted, found = logits(policy), logits(made.model)
    assert 0 < distance(found, wanted) < 0.03
    assert torch.equal(logits(copy.deepcopy(policy)), wanted)


@needs_bitsandbytes
def test_an_adapter_loads_on_either_base_and_is_merged_into_the_plain_one_only(
    adapter_folder: str, rewarder: str
) -> None:
    from transformers import AutoModelForCausalLM

    plain = load_adapter(tiny.source(adapter_folder), adapter_folder, AutoModelForCausalLM, trainable=False)
    quantized = load_causal(source(adapter_folder))
    assert hasattr(quantized, "peft_config")
    assert not hasattr(load_causal(tiny.source(adapter_folder)), "peft_config")
    assert not torch.equal(logits(quantized), logits(plain))
    restore(plain, quantized)
    assert_close(logits(quantized), logits(plain))
    assert is_adapter(rewarder)
    scorer = load_scorer(source(rewarder))
    assert sum(quantization.weight_count(layer.weight) for layer in quantized_layers(scorer)) == LINEAR
    assert score_head(scorer).out_features == 1
    adapted = adapted_classifier(tiny.source(rewarder), rewarder, "reward model", "", trainable=False)
    restore(adapted, scorer)
    mask = torch.ones_like(IDS, dtype=torch.bool)
    assert_close(sequence_scores(scorer.eval(), IDS, mask), sequence_scores(adapted.eval(), IDS, mask))


@needs_bitsandbytes
def test_a_layer_that_computes_in_bfloat16_sets_the_tolerance(sft_folder: str) -> None:
    model = load_causal(source(sft_folder))
    assert quantization.least_precise_dtype(model, torch.float32) == torch.float32
    for layer in quantized_layers(model):
        layer.compute_dtype = torch.bfloat16
    assert quantization.least_precise_dtype(model, torch.float32) == torch.bfloat16
    assert can_pack(model)
