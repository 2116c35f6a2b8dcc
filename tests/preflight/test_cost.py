"""The formulas of what a pass must cost, against operations that are counted while a model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlhf.config.sections import Peft
from rlhf.models.adapters import add_adapter
from rlhf.models.reward_models import load_scorer
from rlhf.preflight.cost import MachineRates, ModelCost
from tests.models import tiny

ROWS, LENGTH = 3, 20


def counted(model: Any, *, backward: bool = False, **options: Any) -> int:
    """Operations of one call on unpadded rows."""
    ids = torch.randint(10, 290, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counter:
        output = model(input_ids=ids, use_cache=False, **options).logits
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


@pytest.fixture
def policy() -> Any:
    model = tiny.new(1)
    model.set_attn_implementation("eager")  # whose products can be counted: all T x T of them, not the half that counts
    return model


def test_a_forward_costs_what_the_formula_says(policy: Any) -> None:
    shape, tokens = ModelCost.of(policy), ROWS * LENGTH
    assert counted(policy) == pytest.approx(shape.forward(tokens, LENGTH, tokens), rel=0.03)
    assert counted(policy, logits_to_keep=1) == pytest.approx(shape.forward(tokens, LENGTH, ROWS), rel=0.03)


def test_a_scorer_has_no_output_layer_to_speak_of(reward_folder: str) -> None:
    scorer = load_scorer(tiny.source(reward_folder))
    scorer.set_attn_implementation("eager")
    scorer.config.pad_token_id = None
    tokens = ROWS * LENGTH
    ids = torch.randint(10, 290, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        scorer.model(input_ids=ids, use_cache=False)
    assert counter.get_total_flops() == pytest.approx(ModelCost.of(scorer).forward(tokens, LENGTH), rel=0.03)


def test_with_backward_it_is_three_times_that(policy: Any) -> None:
    shape, tokens = ModelCost.of(policy), ROWS * LENGTH
    wanted = shape.forward(tokens, LENGTH, tokens) * shape.backward_factor(whole=True)
    assert counted(policy, backward=True) == pytest.approx(wanted, rel=0.03)


def test_frozen_weights_save_a_third(policy: Any) -> None:
    """Rank 1, so that the adapters themselves are small."""
    shape, tokens = ModelCost.of(policy), ROWS * LENGTH
    adapted = add_adapter(policy, Peft(method="lora", r=1), "CAUSAL_LM").train()
    wanted = shape.forward(tokens, LENGTH, tokens) * shape.backward_factor(whole=False)
    assert counted(adapted, backward=True) == pytest.approx(wanted, rel=0.2)
    assert ModelCost.of(adapted).trainable < 0.15 * shape.trainable


def test_a_decode_step_reads_every_weight_once(policy: Any) -> None:
    shape = ModelCost.of(policy)
    tied = sum(p.numel() for p in policy.parameters())  # embeddings and output layer are one
    assert shape.decode_bytes == 4 * tied


def test_the_machine_does_something() -> None:
    machine = MachineRates.measure(torch.device("cpu"))
    assert 1e8 < machine.flops < 1e15
    assert machine.rate(False) == machine.flops
    assert machine.rate(True) == machine.flops_bfloat16
    assert 1e8 < machine.bandwidth < 1e14
