"""Traced activations agree with values computed by hand for one layer, and with real tensors for a tiny Llama."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rlhf.models.adapters import add_adapter
from rlhf.models.load import backbone
from rlhf.preflight.activation_trace import LiveBytes, trace_activations
from tests.models import tiny


def build(blocks: int, *, adapter: bool = False, frozen: bool = False, attention: str = "sdpa") -> Any:
    model = tiny.new(layers=blocks)
    model.set_attn_implementation(attention)
    if adapter:
        return add_adapter(model, tiny.LORA, "CAUSAL_LM")
    return model.requires_grad_(not frozen)


def test_live_and_peak_bytes_computed_by_hand() -> None:
    layer, x = nn.Linear(8, 16, bias=False), torch.zeros(4, 8)
    with LiveBytes() as counter:
        y = layer(x)  # 4 x 16 floats
        assert counter.live == 4 * 16 * 4
        z = y.view(16, 4)  # the same memory
        assert counter.live == 4 * 16 * 4
        w = y + 1
        assert counter.live == 2 * 4 * 16 * 4
        del y, z, w
    assert (counter.live, counter.peak) == (0, 2 * 4 * 16 * 4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_trace_agrees_with_real_tensors(attention: str, bfloat16: bool) -> None:
    rows, length, blocks = 16, 64, 5  # so many rows that the gradients of the weights are small in comparison
    traced = trace_activations(lambda n: build(n, attention=attention), rows=rows, length=length, bfloat16=bfloat16)
    model = build(blocks, attention=attention).train()
    ids = torch.zeros(rows, length, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # as in training; without padding the real pass creates no mask
    with LiveBytes() as counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            hidden = backbone(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        forward = counter.peak
        hidden.sum().backward()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.grad is not None)
    found = traced.fixed + blocks * traced.block
    assert found == pytest.approx(max(forward, counter.peak - gradients), rel=0.05)


def test_longer_or_more_rows_never_need_less() -> None:
    sizes = [
        trace_activations(build, rows=r, length=t, bfloat16=False)
        for r, t in ((1, 8), (2, 8), (2, 16), (4, 16), (4, 32))
    ]
    assert [s.block for s in sizes] == sorted(s.block for s in sizes)
    assert [s.boundary for s in sizes] == [
        r * t * tiny.HIDDEN * 4 for r, t in ((1, 8), (2, 8), (2, 16), (4, 16), (4, 32))
    ]


def test_a_frozen_model_keeps_few_activations() -> None:
    trained = trace_activations(build, rows=4, length=32, bfloat16=False)
    frozen = trace_activations(lambda n: build(n, frozen=True), rows=4, length=32, bfloat16=False)
    assert frozen.block < 0.1 * trained.block


def test_an_adapter_is_traced_with_its_layers() -> None:
    adapted = trace_activations(lambda n: build(n, adapter=True), rows=4, length=32, bfloat16=False)
    assert adapted.block > trace_activations(build, rows=4, length=32, bfloat16=False).boundary
