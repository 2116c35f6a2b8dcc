"""Four roles on one base compute as separate models would; nothing is copied, and nothing else is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.data.collate import pad_right
from rlhf.errors import CheckpointError
from rlhf.models.adapters import active_adapter, adapter_parameters, add_adapter, reference_policy, use_adapter
from rlhf.models.heads import AdapterScorer, rescale_head, sequence_scores, token_scores, trunk_owner
from rlhf.models.load import count_parameters
from rlhf.models.packed_batch import PackedBatch
from rlhf.models.policy import load_causal, policy_with_adapter
from rlhf.models.reward_models import load_scorer, new_reward_model
from rlhf.models.shared_base import REWARD, VALUE, attach_new_value_model, attach_scorer, reason_not_shared
from tests.models import tiny
from tests.models.fixtures import shake
from tests.tolerances import assert_close

PAD = tiny.renderer().pad_id


@pytest.fixture(scope="module", params=["full SFT model", "SFT adapter"])
def chain(
    request: pytest.FixtureRequest, sft_folder: str, adapter_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str]:
    """Return the folders of an SFT model and of a reward model that is a trained adapter on the same base."""
    start = sft_folder if request.param == "full SFT model" else adapter_folder
    model = new_reward_model(tiny.source(start), tiny.LORA, pad_id=PAD, vocab_size=len(tiny.tokenizer()), seed=3)
    return start, tiny.save(shake(model, 8), tmp_path_factory.mktemp("reward"), with_tokenizer=False)


def built(chain: tuple[str, str]) -> tuple[Any, AdapterScorer, AdapterScorer]:
    """Return policy, value model and reward model on one base."""
    policy = policy_with_adapter(tiny.source(chain[0]), tiny.LORA)
    reward = attach_scorer(policy, tiny.source(chain[1]), REWARD)
    return policy, attach_scorer(policy, tiny.source(chain[1]), VALUE, trainable=True), reward


def scores(model: Any) -> Tensor:
    ids, mask = pad_right(tiny.rows(4, [5, 12, 9]), PAD)
    return sequence_scores(model.eval(), ids, mask).detach()


def logits(model: Any) -> Tensor:
    return model.eval()(torch.tensor(tiny.rows(4, [14, 14])), use_cache=False).logits.detach()


def test_each_role_computes_as_its_separate_model(chain: tuple[str, str]) -> None:
    policy, value, reward = built(chain)
    alone = load_scorer(tiny.source(chain[1]), trainable=True, peft=tiny.LORA)
    assert scores(alone).std() > 0.1
    assert_close(scores(reward), scores(alone).tolist())
    assert_close(scores(value), scores(alone).tolist())
    rescale_head(value, 2.0)
    assert_close(scores(value), (scores(alone) / 2).tolist())
    assert_close(scores(reward), scores(alone).tolist())
    assert_close(logits(policy), logits(load_causal(tiny.source(chain[0]))).tolist())
    shake(policy)  # every trained weight, those of the value model's adapter included
    with reference_policy(policy) as reference:
        assert_close(logits(reference), logits(load_causal(tiny.source(chain[0]))).tolist())
    assert_close(scores(reward), scores(alone).tolist())
    assert (scores(value) - scores(alone) / 2).abs().max() > 0.01


def test_a_new_value_model_has_the_policys_trunk_and_says_0(chain: tuple[str, str]) -> None:
    policy = policy_with_adapter(tiny.source(chain[0]), tiny.LORA)
    value = attach_new_value_model(policy, chain[0])
    assert not scores(value).any()
    with torch.no_grad():
        value.score.weight.fill_(1.0)
    ids, mask = pad_right(tiny.rows(4, [7, 3]), PAD)
    states = policy(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
    assert_close(
        token_scores(value, PackedBatch.for_model(trunk_owner(value), ids, mask))[mask].detach(),
        states.sum(dim=-1)[mask].tolist(),
    )


def test_there_is_one_base_and_small_adapters(chain: tuple[str, str]) -> None:
    policy = policy_with_adapter(tiny.source(chain[0]), tiny.LORA)
    before = count_parameters(policy)[1]
    adapter = sum(p.numel() for p in adapter_parameters(policy, "default").values())
    value = attach_scorer(policy, tiny.source(chain[1]), VALUE, trainable=True)
    reward = attach_scorer(policy, tiny.source(chain[1]), REWARD)
    assert count_parameters(policy)[1] == before + 2 * adapter
    assert [count_parameters(scorer) for scorer in (value, reward)] == [(tiny.HIDDEN, tiny.HIDDEN), (0, tiny.HIDDEN)]


def test_policy_and_value_model_are_trained_and_nothing_else(chain: tuple[str, str]) -> None:
    policy, _, reward = built(chain)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(policy, "default")) | set(adapter_parameters(policy, VALUE))
    assert not any(p.requires_grad for p in reward.parameters())


def test_a_value_model_is_saved_as_a_sequence_classifier(chain: tuple[str, str], tmp_path: Path) -> None:
    from peft import AutoPeftModelForSequenceClassification

    policy, value, _ = built(chain)
    shake(policy)
    value.save_pretrained(str(tmp_path / "value"))
    assert_close(scores(load_scorer(tiny.source(tmp_path / "value"))), scores(value).tolist())
    again = attach_scorer(policy, tiny.source(tmp_path / "value"), "again")
    assert torch.equal(scores(again), scores(value))
    plain = AutoPeftModelForSequenceClassification.from_pretrained(
        str(tmp_path / "value"), num_labels=1, pad_token_id=PAD
    ).eval()
    ids, mask = pad_right(tiny.rows(4, [5, 12, 9]), PAD)
    assert_close(plain(input_ids=ids, attention_mask=mask.long()).logits[:, 0].detach(), scores(value).tolist())


def test_an_adapter_is_active_inside_the_context_only_also_on_an_error(chain: tuple[str, str]) -> None:
    policy, _, _ = built(chain)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert active_adapter(policy) == "default"
    with use_adapter(policy, VALUE):
        assert active_adapter(policy) == VALUE
        with use_adapter(policy, None):
            assert active_adapter(policy) is None
        assert active_adapter(policy) == VALUE
    with pytest.raises(RuntimeError, match="inside"), use_adapter(policy, VALUE):
        raise RuntimeError("inside")
    assert active_adapter(policy) == "default"
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == trained


# What cannot share


def test_it_says_why_models_cannot_share(chain: tuple[str, str], reward_folder: str, tmp_path: Path) -> None:
    policy, reward = tiny.source(chain[0]), tiny.source(chain[1])
    assert reason_not_shared(policy, reward, "lora") is None
    assert "is not an adapter" in str(reason_not_shared(policy, tiny.source(reward_folder), "lora"))
    assert "adapter of method lora" in str(reason_not_shared(policy, reward, "ia3"))
    other = tiny.save(tiny.new(9), tmp_path / "other")
    assert "the policy's base is" in str(reason_not_shared(tiny.source(other), reward, "lora"))
    assert "another dtype" in str(reason_not_shared(policy.model_copy(update={"dtype": "bfloat16"}), reward, "lora"))


def test_an_adapter_without_a_head_is_no_reward_model(adapter_folder: str) -> None:
    policy = policy_with_adapter(tiny.source(adapter_folder), tiny.LORA)
    with pytest.raises(CheckpointError, match="no score head"):
        attach_scorer(policy, tiny.source(adapter_folder), REWARD)


@pytest.mark.parametrize("same", [True, False])
def test_embeddings_that_grew_must_be_the_policys_own(same: bool, sft_folder: str, tmp_path: Path) -> None:
    size = len(tiny.tokenizer()) + 3
    grown = load_causal(tiny.source(sft_folder))
    grown.resize_token_embeddings(size)
    sft = tiny.save(shake(add_adapter(grown, tiny.LORA, "CAUSAL_LM")), tmp_path / "sft", with_tokenizer=False)
    model = new_reward_model(tiny.source(sft), tiny.LORA, pad_id=PAD, vocab_size=size, seed=3)
    if not same:
        with torch.no_grad():
            model.get_input_embeddings().weight[-1] += 1.0
    reward = tiny.save(shake(model, 8), tmp_path / "reward", with_tokenizer=False)
    policy = policy_with_adapter(tiny.source(sft), tiny.LORA)
    if not same:
        with pytest.raises(CheckpointError, match="differ from those of the policy's base"):
            attach_scorer(policy, tiny.source(reward), REWARD)
        return
    alone = load_scorer(tiny.source(reward), trainable=True, peft=tiny.LORA)
    assert_close(scores(attach_scorer(policy, tiny.source(reward), REWARD)), scores(alone).tolist())


def test_the_comparisons_see_another_adapter(chain: tuple[str, str]) -> None:
    _, _, reward = built(chain)
    right = scores(reward)
    reward.adapter = "default"
    assert (scores(reward) - right).abs().max() > 0.01
