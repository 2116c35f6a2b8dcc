"""LoRA: what is trained and saved, what the reference is, and which adapters can be continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.config.sections import Peft
from rlhf.data.collate import pad_right
from rlhf.errors import ConfigError, TrainingError
from rlhf.models.adapters import add_adapter, load_adapter, reference_policy
from rlhf.models.heads import score_head, sequence_scores
from rlhf.models.load import backbone, count_parameters, disable_dropout
from rlhf.models.policy import load_causal, policy_with_adapter
from rlhf.models.reward_models import load_scorer, new_reward_model
from rlhf.rollout.teacher_forcing import response_logprobs
from tests.models import tiny
from tests.models.fixtures import shake
from tests.tolerances import assert_close

PAD = tiny.renderer().pad_id
LAYERS, HIDDEN, MLP, R = 2, tiny.HIDDEN, 48, tiny.LORA.r
ADAPTERS = LAYERS * R * (4 * (HIDDEN + HIDDEN) + 3 * (HIDDEN + MLP))
"""Sum of r (d_in + d_out) over the four attention and three MLP matrices of each layer."""


def reward_model(folder: str, peft: Peft = tiny.LORA) -> Any:
    return new_reward_model(tiny.source(folder), peft, pad_id=PAD, vocab_size=len(tiny.tokenizer()), seed=1).eval()


def scores(model: Any) -> Tensor:
    ids, mask = pad_right(tiny.rows(4, [5, 12, 9]), PAD)
    return sequence_scores(model.eval(), ids, mask).detach()


def logits(model: Any) -> Tensor:
    return model.eval()(torch.tensor(tiny.rows(4, [14, 14])), use_cache=False).logits.detach()


def train(model: Any, steps: int = 3) -> None:
    """Take a few optimizer steps on the next-token loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    ids = torch.tensor(tiny.rows(6, [12, 12]))
    for _ in range(steps):
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trainable(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# A fresh adapter


def test_a_fresh_adapter_changes_no_output_bit(sft_folder: str) -> None:
    plain = load_causal(tiny.source(sft_folder))
    before = logits(plain)
    assert torch.equal(logits(add_adapter(plain, tiny.LORA, "CAUSAL_LM")), before)
    assert torch.equal(scores(reward_model(sft_folder)), scores(reward_model(sft_folder, Peft())))


def test_only_adapters_are_trained_and_in_a_reward_model_the_head(sft_folder: str) -> None:
    policy = policy_with_adapter(tiny.source(sft_folder), tiny.LORA)
    assert count_parameters(policy)[0] == ADAPTERS
    assert all("lora_" in name for name in trainable(policy))
    scorer = reward_model(sft_folder)
    assert count_parameters(scorer)[0] == ADAPTERS + HIDDEN
    assert [name for name in trainable(scorer) if "lora_" not in name] == [
        "base_model.model.score.modules_to_save.default.weight"
    ]


def test_an_adapter_can_be_limited_to_some_matrices(sft_folder: str) -> None:
    peft = Peft(method="lora", r=R, alpha=8.0, target_modules=("q_proj", "v_proj"))
    policy = policy_with_adapter(tiny.source(sft_folder), peft)
    assert count_parameters(policy)[0] == LAYERS * R * 2 * (HIDDEN + HIDDEN)


def test_doubling_alpha_doubles_the_update(sft_folder: str) -> None:
    def delta(alpha: float) -> Tensor:
        torch.manual_seed(0)
        peft = Peft(method="lora", r=R, alpha=alpha)
        model = shake(add_adapter(load_causal(tiny.source(sft_folder)), peft, "CAUSAL_LM"))
        return backbone(model).layers[0].self_attn.q_proj.get_delta_weight("default")

    assert_close(delta(16.0), (2 * delta(8.0)).tolist())


def test_merged_equals_unmerged(sft_folder: str) -> None:
    model = shake(add_adapter(load_causal(tiny.source(sft_folder)), tiny.LORA, "CAUSAL_LM"))
    before = logits(model)
    assert not torch.equal(before, logits(load_causal(tiny.source(sft_folder))))
    assert_close(logits(model.merge_and_unload()), before.tolist())


# A reward model with an adapter


def test_the_score_head_is_saved_with_the_adapter_and_comes_back(sft_folder: str, tmp_path: Path) -> None:
    model = shake(reward_model(sft_folder))
    model.save_pretrained(str(tmp_path / "reward"))
    assert_close(scores(load_scorer(tiny.source(tmp_path / "reward"))), scores(model).tolist())
    kept = load_scorer(tiny.source(tmp_path / "reward"), trainable=True, peft=tiny.LORA)
    assert torch.equal(scores(kept), scores(model))
    assert count_parameters(kept)[0] == ADAPTERS + HIDDEN


def test_plain_peft_loads_it_and_scores_the_same(sft_folder: str, tmp_path: Path) -> None:
    from peft import AutoPeftModelForSequenceClassification

    model = shake(reward_model(sft_folder))
    model.save_pretrained(str(tmp_path / "reward"))
    plain = AutoPeftModelForSequenceClassification.from_pretrained(
        str(tmp_path / "reward"), num_labels=1, pad_token_id=PAD
    ).eval()
    ids, mask = pad_right(tiny.rows(4, [5, 12, 9]), PAD)
    assert_close(plain(input_ids=ids, attention_mask=mask.long()).logits[:, 0], scores(model).tolist())


def test_a_frozen_score_head_is_refused(sft_folder: str) -> None:
    from peft import LoraConfig, get_peft_model

    from rlhf.trainers.supervised.reward import build_reward_trainer

    naked = get_peft_model(reward_model(sft_folder, Peft()), LoraConfig(r=4, target_modules=["q_proj"]))
    assert not any(p.requires_grad for p in score_head(naked).parameters())
    with pytest.raises(TrainingError, match="score head is frozen"):
        build_reward_trainer(naked, tiny.tokenizer(), [], [], {}, None, center=0.0)


def test_a_reward_model_that_continues_an_sft_adapter_starts_with_the_sft_trunk(
    adapter_folder: str, sft_folder: str
) -> None:
    model = reward_model(adapter_folder)
    ids = torch.tensor(tiny.rows(4, [14, 14]))
    ours = backbone(model)(ids, use_cache=False).last_hidden_state
    sft = load_adapter(tiny.source(adapter_folder), adapter_folder, _causal_class(), trainable=False).eval()
    assert torch.equal(ours, backbone(sft)(ids, use_cache=False).last_hidden_state)
    without = backbone(load_causal(tiny.source(sft_folder)))(ids, use_cache=False).last_hidden_state
    assert (ours - without).abs().max() > 0.01
    assert count_parameters(model)[0] == ADAPTERS + HIDDEN


def _causal_class() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def test_an_adapter_is_not_continued_under_other_settings(adapter_folder: str) -> None:
    for peft in (Peft(method="lora", r=8, alpha=8.0), Peft(method="lora", r=R, alpha=16.0)):
        for make in (policy_with_adapter, lambda s, one: reward_model(s.path, one)):
            with pytest.raises(ConfigError, match="was trained with"):
                make(tiny.source(adapter_folder), peft)


# Policy and reference


@pytest.fixture(params=["full weights", "adapter"])
def folder(request: pytest.FixtureRequest, sft_folder: str, adapter_folder: str) -> str:
    return sft_folder if request.param == "full weights" else adapter_folder


def test_the_reference_is_the_sft_model_before_and_after_training(folder: str) -> None:
    sft = logits(load_causal(tiny.source(folder)))
    policy = policy_with_adapter(tiny.source(folder), tiny.LORA)
    assert_close(logits(policy), sft.tolist())
    for _ in range(2):
        with reference_policy(policy) as model:
            reference = logits(model)
        assert_close(reference, sft.tolist())
        train(policy)
        assert (logits(policy) - sft).abs().max() > 0.05
    with reference_policy(policy) as model:
        assert torch.equal(logits(model), reference)


def test_the_reference_check_sees_the_bare_base_model(adapter_folder: str) -> None:
    policy = policy_with_adapter(tiny.source(adapter_folder), tiny.LORA)
    with policy.disable_adapter():
        bare = logits(policy)
    assert (bare - logits(load_causal(tiny.source(adapter_folder)))).abs().max() > 0.05


def test_using_the_reference_leaves_the_policy_as_it_was(folder: str) -> None:
    policy = shake(policy_with_adapter(tiny.source(folder), tiny.LORA), size=0.02)
    output, names, weights = logits(policy), trainable(policy), tiny.snapshot(policy)
    assert len(names) == LAYERS * 7 * 2
    with reference_policy(policy):
        pass
    with pytest.raises(RuntimeError, match="inside"), reference_policy(policy):
        raise RuntimeError("inside")
    assert trainable(policy) == names
    assert torch.equal(logits(policy), output)
    assert not tiny.moved(policy, weights)


def test_training_the_policy_does_not_move_base_or_reference(folder: str) -> None:
    policy = policy_with_adapter(tiny.source(folder), tiny.LORA)
    before = tiny.snapshot(policy)
    train(policy)
    moved = tiny.moved(policy, before)
    assert moved
    assert moved <= trainable(policy)
    assert all(".default." in name for name in moved)


def test_no_gradient_reaches_the_policy_through_the_reference(folder: str) -> None:
    policy = policy_with_adapter(tiny.source(folder), tiny.LORA)
    with reference_policy(policy) as model, torch.no_grad():
        logprobs, _ = response_logprobs(model, tiny.rollout(1, [3, 5], [4, 2]), 1.0)
    assert not logprobs.requires_grad


def test_a_continued_adapter_is_saved_with_its_original_base(
    adapter_folder: str, sft_folder: str, tmp_path: Path
) -> None:
    policy = shake(policy_with_adapter(tiny.source(adapter_folder), tiny.LORA))
    policy.save_pretrained(str(tmp_path / "policy"), selected_adapters=["default"])
    config = (tmp_path / "policy" / "adapter_config.json").read_text()
    assert sft_folder in config
    assert not (tmp_path / "policy" / "reference").exists()
    assert_close(logits(load_causal(tiny.source(tmp_path / "policy"))), logits(policy).tolist())


def test_dropout_of_an_adapter_can_be_turned_off(sft_folder: str) -> None:
    peft = Peft(method="lora", r=R, alpha=8.0, dropout=0.5)
    model = shake(policy_with_adapter(tiny.source(sft_folder), peft)).train()
    ids = torch.tensor(tiny.rows(4, [14, 14]))
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
