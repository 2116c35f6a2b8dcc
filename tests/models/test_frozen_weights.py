"""Frozen linear layers in bfloat16: half the memory, the same numbers bit for bit under autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.models.adapters import add_adapter
from rlhf.models.frozen_weights import store_linear_weights
from rlhf.models.heads import sequence_scores
from rlhf.models.output_layer import output_layer
from rlhf.models.packed_batch import can_pack
from tests.models import architectures, tiny

IDS = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS, dtype=torch.bool)


def logits(model: Any) -> Tensor:
    """Logits under autocast."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", sorted(set(architectures.OPTIONS) - {"mamba"}))
def test_a_language_model_computes_the_same_bits(name: str) -> None:
    model = architectures.build(name).requires_grad_(False)
    before = logits(model)
    linear = sum(p.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters())
    converted = store_linear_weights(model, torch.bfloat16)
    assert converted >= 0.5 * linear > 0
    assert torch.equal(logits(model), before)
    assert can_pack(model) is can_pack(architectures.build(name))
    tied = output_layer(model).weight is model.get_input_embeddings().weight
    assert (output_layer(model).weight.dtype == torch.float32) is tied
    assert model.get_input_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_scorer_computes_the_same_bits_and_keeps_its_head(name: str) -> None:
    model = architectures.build(name, classifier=True).requires_grad_(False)

    def scores() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return sequence_scores(model, IDS, MASK)

    before = scores()
    assert store_linear_weights(model, torch.bfloat16) > 0
    assert torch.equal(scores(), before)
    assert model.score.weight.dtype == torch.float32


@pytest.mark.parametrize("method", sorted(tiny.METHODS))
def test_the_base_of_an_adapter_is_stored_and_the_adapter_is_not(method: str) -> None:
    model = add_adapter(tiny.new(1), tiny.METHODS[method], "CAUSAL_LM")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(0.3)
    ids, before = IDS, logits(model)
    converted = store_linear_weights(model, torch.bfloat16)
    assert (converted == 0) is (method == "DoRA") or converted < sum(p.numel() for p in model.parameters()) / 2
    assert torch.equal(logits(model), before)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids).logits.float().square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_trained_weights_are_left_alone() -> None:
    model = tiny.new(1)
    assert store_linear_weights(model, torch.bfloat16) == 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}
