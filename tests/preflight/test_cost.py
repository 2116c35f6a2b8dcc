"""The formulas for the cost of a pass agree with the operations counted while a model runs."""

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


def count_operations(model: Any, *, backward: bool = False, **options: Any) -> int:
    """Return the operations of one call on unpadded rows."""
    ids = torch.randint(10, 290, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counter:
        output = model(input_ids=ids, use_cache=False, **options).logits
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


@pytest.fixture
def policy() -> Any:
    model = tiny.new(1)
    model.set_attn_implementation("eager")  # its products are counted, all T x T of them including the masked half
    return model


def test_the_formula_of_a_forward_pass_agrees_with_counted_operations(policy: Any) -> None:
    shape, tokens = ModelCost.from_model(policy), ROWS * LENGTH
    assert count_operations(policy) == pytest.approx(shape.forward(tokens, LENGTH, tokens), rel=0.03)
    assert count_operations(policy, logits_to_keep=1) == pytest.approx(shape.forward(tokens, LENGTH, ROWS), rel=0.03)


def test_the_output_layer_of_a_scorer_is_negligible(reward_folder: str) -> None:
    scorer = load_scorer(tiny.source(reward_folder))
    scorer.set_attn_implementation("eager")
    scorer.config.pad_token_id = None
    tokens = ROWS * LENGTH
    ids = torch.randint(10, 290, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        scorer.model(input_ids=ids, use_cache=False)
    assert counter.get_total_flops() == pytest.approx(ModelCost.from_model(scorer).forward(tokens, LENGTH), rel=0.03)


def test_forward_and_backward_cost_three_forward_passes(policy: Any) -> None:
    shape, tokens = ModelCost.from_model(policy), ROWS * LENGTH
    wanted = shape.forward(tokens, LENGTH, tokens) * shape.backward_factor(all_trained=True)
    assert count_operations(policy, backward=True) == pytest.approx(wanted, rel=0.03)


def test_with_frozen_weights_forward_and_backward_cost_two_forward_passes(policy: Any) -> None:
    """The rank is 1, so that the cost of the adapters themselves is small."""
    shape, tokens = ModelCost.from_model(policy), ROWS * LENGTH
    adapted = add_adapter(policy, Peft(method="lora", r=1), "CAUSAL_LM").train()
    wanted = shape.forward(tokens, LENGTH, tokens) * shape.backward_factor(all_trained=False)
    assert count_operations(adapted, backward=True) == pytest.approx(wanted, rel=0.2)
    assert ModelCost.from_model(adapted).trainable < 0.15 * shape.trainable


def test_a_decode_step_reads_every_weight_once(policy: Any) -> None:
    shape = ModelCost.from_model(policy)
    tied = sum(p.numel() for p in policy.parameters())  # embeddings and output layer are one
    assert shape.decode_bytes == 4 * tied


def test_measured_rates_are_plausible() -> None:
    machine = MachineRates.measure(torch.device("cpu"))
    assert 1e8 < machine.flops < 1e15
    assert machine.rate(False) == machine.flops
    assert machine.rate(True) == machine.flops_bfloat16
    assert 1e8 < machine.bandwidth < 1e14
