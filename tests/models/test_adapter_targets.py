"""The layers that get an adapter, in architectures with different layer names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf.config.sections import Peft
from rlhf.errors import ConfigError
from rlhf.models.adapter_targets import ia3_targets, linear_layers, lora_targets
from rlhf.models.adapters import add_adapter
from tests.models import tiny
from tests.models.architectures import LAYERS, OPTIONS, VOCABULARY, build
from tests.models.fixtures import shake
from tests.tolerances import assert_close

USUAL = (["self_attn.k_proj", "self_attn.v_proj"], ["mlp.down_proj"])
SCALED = {
    "llama": USUAL,
    "mistral": USUAL,
    "qwen2": USUAL,
    "qwen3": USUAL,
    "gemma": USUAL,
    "phi": (USUAL[0], ["mlp.fc2"]),
    "phi3": (["self_attn.qkv_proj"], ["mlp.down_proj"]),
    "gpt_neox": (["attention.query_key_value"], ["mlp.dense_4h_to_h"]),
    "opt": (USUAL[0], ["fc2"]),
    "gpt2": (["attn.c_attn"], ["mlp.c_proj"]),
}
"""Of each architecture: layers whose output IA3 scales, and layers whose input it scales. Read in the models' code."""
PER_BLOCK = {"opt": 6, "gpt_neox": 4, "gpt2": 4, "phi": 6, "phi3": 4}  # linear layers; 7 in the others


@pytest.mark.parametrize("name", SCALED)
def test_ia3_scales_keys_values_and_what_the_feed_forward_reads(name: str) -> None:
    outputs, inputs = SCALED[name]
    assert ia3_targets(build(name), Peft(method="ia3")) == (outputs + inputs, inputs)


@pytest.mark.parametrize("name", SCALED)
def test_peft_knows_the_same_layers_where_it_knows_any(name: str) -> None:
    """PEFT's table has queries instead of keys in some places, which is equivalent: both enter the same product."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as THEIRS
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as ALL_OF_THEIRS

    if name in THEIRS:
        ours, inner = ia3_targets(build(name), Peft(method="ia3"))
        assert all(any(end.endswith(known) for known in THEIRS[name]) for end in inner)
        attention = {known.replace("q_proj", "k_proj") for known in ALL_OF_THEIRS[name]} - set(THEIRS[name])
        assert all(any(end.endswith(known) for end in ours) for known in attention)


@pytest.mark.parametrize("classifier", [False, True], ids=["causal", "classifier"])
@pytest.mark.parametrize("name", SCALED)
def test_lora_is_on_every_linear_layer_but_the_head(name: str, classifier: bool) -> None:
    model = build(name, classifier=classifier)
    layers = linear_layers(model)
    assert len(layers) == LAYERS * PER_BLOCK.get(name, 7)
    adapted = add_adapter(model, tiny.LORA, "SEQ_CLS" if classifier else "CAUSAL_LM")
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad and "score" not in n}
    assert trained == {f"base_model.model.{n}.lora_{x}.default.weight" for n in layers for x in "AB"}


@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("name", SCALED)
def test_an_adapter_starts_without_effect_and_every_part_learns(name: str, method: str) -> None:
    model = build(name)
    ids = torch.arange(10, 34).view(2, 12) % VOCABULARY
    before = model(input_ids=ids).logits.detach()
    adapted = add_adapter(model, tiny.METHODS[method], "CAUSAL_LM")
    assert_close(adapted(input_ids=ids).logits, before.tolist())
    with torch.no_grad():
        for parameter_name, p in adapted.named_parameters():
            if "lora_B" in parameter_name:
                p.fill_(0.01)  # so that A has a gradient too
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "phi", "qwen2", "gemma"])
def test_a_trained_adapter_folds_into_any_layer(name: str, method: str) -> None:
    """The layers include transposed ones, ones with biases, and tied output embeddings."""
    ids = torch.arange(10, 34).view(2, 12) % VOCABULARY
    adapted = shake(add_adapter(build(name), tiny.METHODS[method], "CAUSAL_LM")).eval()
    with torch.no_grad():
        wanted, plain = adapted(input_ids=ids).logits, build(name)(input_ids=ids).logits
        assert (wanted - plain).abs().max() > 1e-3
        assert_close(adapted.merge_and_unload()(input_ids=ids).logits, wanted.tolist())


def ends(**changes: Any) -> Peft:
    return Peft(method="ia3", **changes)


def test_layers_can_be_named_or_described(sft_folder: str) -> None:
    model = build("llama")
    assert lora_targets(model, tiny.LORA.model_copy(update={"target_modules": ("q_proj",)})) == ["q_proj"]
    assert ia3_targets(model, ends(target_modules=("q_proj", "down_proj"))) == (["q_proj", "down_proj"], ["down_proj"])
    found = ia3_targets(model, ends(target_modules=r".*\.(v_proj|down_proj)"))
    assert found == (["mlp.down_proj", "self_attn.v_proj"], ["mlp.down_proj"])


@pytest.mark.parametrize(
    ("name", "peft", "said"),
    [
        ("mamba", Peft(method="ia3"), "'keys and values'"),
        ("llama", Peft(method="ia3", target_modules=("c_attn",)), "'c_attn'"),
        ("llama", Peft(method="lora", target_modules=("q_proj", "proj")), "'proj'"),  # an end is whole words
        ("llama", Peft(method="lora", target_modules="q_proj"), "'q_proj'"),  # an expression is of the whole name
        ("llama", Peft(method="lora", target_modules=()), "'nothing'"),
    ],
)
def test_a_layer_that_is_not_there_is_answered_with_those_that_are(name: str, peft: Peft, said: str) -> None:
    model = build(name)
    with pytest.raises(ConfigError, match="no linear layer that matches") as error:
        add_adapter(model, peft, "CAUSAL_LM")
    text = str(error.value)
    assert text.startswith("peft.target_modules: ")
    assert said in text
    layer = {"mamba": "mixer.in_proj", "llama": "self_attn.q_proj"}[name]
    assert layer in text
    assert "lm_head" not in text


def test_the_table_of_layers_is_no_echo_of_the_code() -> None:
    """Every suffix in the table matches exactly one layer of each block."""
    assert set(SCALED) == set(OPTIONS) - {"mamba"}
    for name, (outputs, inputs) in SCALED.items():
        layers = linear_layers(build(name))
        for end in outputs + inputs:
            assert sum(layer.endswith(f".{end}") for layer in layers) == LAYERS
