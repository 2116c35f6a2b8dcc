"""The private names that the package uses exist in the installed releases and behave as it needs."""

from __future__ import annotations

import inspect

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import Trainer
from trl import RewardTrainer, SFTTrainer

from rlhf.distributed.library_internals import (
    adapter_layers,
    attention_implementation,
    link_adam_state,
    name_of_active_adapter,
    reset_accelerate,
    set_attention,
    switched_adapter,
)
from rlhf.models.adapters import add_adapter
from rlhf.trainers.supervised.base import OverridingTrainer
from tests.models import tiny
from tests.models.fixtures import shake

OVERRIDDEN = {  # method -> parameters that are relied on
    "_get_train_sampler": (),
    "_set_signature_columns_if_needed": (),
    "create_optimizer": (),
    "create_scheduler": ("num_training_steps", "optimizer"),
    "_save_checkpoint": (),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_load_optimizer_and_scheduler": ("checkpoint",),
}
USED = ("_prepare_inputs", "get_decay_parameter_names", "get_optimizer_cls_and_kwargs", "compute_loss_context_manager")


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer, RewardTrainer])
def test_what_is_overridden_is_there_to_be_overridden(kind: type) -> None:
    own = {n for n, f in vars(OverridingTrainer).items() if inspect.isfunction(f)}
    assert set(OVERRIDDEN) <= own
    for name, parameters in OVERRIDDEN.items():
        assert set(parameters) <= set(inspect.signature(getattr(kind, name)).parameters), name
    for name in USED:
        assert hasattr(kind, name), name


def test_a_library_calls_what_is_overridden() -> None:
    """The libraries call these methods: overriding a method that is no longer called would have no effect."""
    source = inspect.getsource(inspect.getmodule(Trainer))  # type: ignore[arg-type]
    for name in (*OVERRIDDEN, "_created_lr_scheduler", "_signature_columns"):
        assert source.count(name) >= 2, name


def test_an_adapter_is_switched_off_and_on_and_gradients_stay() -> None:
    model = shake(add_adapter(tiny.new(1), tiny.LORA, "CAUSAL_LM"))
    ids = torch.tensor([tiny.rows(1, [5])[0]])
    trained = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        on = model(input_ids=ids).logits
        with switched_adapter(model, None):
            assert name_of_active_adapter(model) is None
            off = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, on)
    assert not torch.equal(on, off)
    assert name_of_active_adapter(model) == "default"
    assert adapter_layers(model)
    assert [p.requires_grad for p in model.parameters()] == trained


def test_accelerate_forgets() -> None:
    for state in (AcceleratorState, GradientState):
        assert callable(state._reset_state)
    reset_accelerate()
    assert not AcceleratorState._shared_state


def test_the_attention_of_a_configuration_is_chosen() -> None:
    config = tiny.new(1).config
    set_attention(config, "eager")
    assert config._attn_implementation == "eager"


def test_deepspeed_links_adam_state_by_these_names() -> None:
    from deepspeed.runtime.zero import stage_1_and_2

    source = inspect.getsource(stage_1_and_2)
    assert "_hp_optimizer_states_linked" in source
    assert "def _lazy_init_hp_params_optimizer_state" in source
    link_adam_state(object())  # an optimizer of another stage has neither


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_attention_kernel_of_a_model(kernel: str) -> None:
    model = tiny.new(1)
    model.set_attn_implementation(kernel)
    assert attention_implementation(model) == kernel
