"""Rewards from models, labels and functions; a model with another tokenizer scores the tokenized text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from rlhf.data.records import Prompt
from rlhf.data.render import Renderer
from rlhf.errors import ConfigError, TrainingError
from rlhf.models.heads import sequence_scores
from rlhf.models.reward_models import load_scorer
from rlhf.rollout.rewards import EnsembleReward, FunctionReward, ModelReward, Rewards, import_reward_function
from rlhf.rollout.types import Rollout
from rlhf.stages.pretrain import new_tokenizer
from tests.models import tiny
from tests.tolerances import assert_close

SAID = ["a dog is an animal", "good day to you"]
RECORDS = [
    Prompt([{"role": "user", "content": "what is a dog?"}], "row 1", {"n": 3}),
    Prompt([{"role": "user", "content": "good day"}], "row 2", {"n": 4}),
]


def length(prompt: Any, response: str, record: dict[str, Any]) -> float:
    """Return a reward that depends on prompt, response and record."""
    return len(response) + 100 * record["n"] + (0 if prompt[0]["role"] == "user" else 1000)


def broken(prompt: Any, response: str, record: Any) -> float:
    """Fail for the second response with a division by zero."""
    return 1 / (len(response) - len(SAID[1]))


def endless(prompt: Any, response: str, record: Any) -> float:
    """Return a reward that is not finite."""
    return float("inf")


@pytest.fixture
def rollout() -> Rollout:
    """Return the prompts and responses above; the second response is unfinished."""
    renderer = tiny.renderer()
    from rlhf.data.collate import pad_left, pad_right

    said = [renderer.response(SAID[0]), renderer.response(SAID[1])[:-1]]
    prompt_ids, prompt_mask = pad_left([renderer.prompt(r.messages) for r in RECORDS], renderer.pad_id)
    ids, mask = pad_right(said, renderer.pad_id)
    return Rollout(
        prompt_ids,
        prompt_mask,
        ids,
        mask,
        torch.tensor([True, False]),
        torch.arange(2),
        torch.zeros(ids.shape),
        torch.zeros((*ids.shape, 0), dtype=torch.uint8),
    )


@pytest.fixture
def scorer(reward_folder: str) -> Any:
    return load_scorer(tiny.source(reward_folder)).eval()


def test_a_model_with_the_same_tokenizer_reads_the_sampled_tokens(rollout: Rollout, scorer: Any) -> None:
    reward = ModelReward("rm", scorer, tiny.renderer(), scale=(0.5, 2.0))
    with torch.no_grad():
        wanted = (sequence_scores(scorer, rollout.ids, rollout.mask) - 0.5) / 2.0
    assert_close(reward(rollout, RECORDS), wanted.tolist())


def test_a_model_with_another_tokenizer_reads_the_same_words(rollout: Rollout) -> None:
    other = new_tokenizer(iter(["abc dog animal good day to you what is", *SAID] * 3), 400)
    end = other.convert_ids_to_tokens(Renderer(other).end_id)
    other.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    theirs = Renderer(other)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(other),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            num_labels=1,
            pad_token_id=theirs.pad_id,
        )
    ).eval()
    reward = ModelReward("foreign", model, tiny.renderer(), theirs)
    rows = [
        theirs.prompt(RECORDS[0].messages) + theirs.response(SAID[0]),
        theirs.prompt(RECORDS[1].messages) + theirs.response(SAID[1])[:-1],
    ]
    assert rows[0] != rollout.ids[0][rollout.mask[0]].tolist()
    with torch.no_grad():
        wanted = [float(model(torch.tensor([row])).logits) for row in rows]
    assert_close(reward(rollout, RECORDS), wanted)


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_label_probability_is_the_softmax_or_the_sigmoid(rollout: Rollout, multi_label: bool) -> None:
    torch.manual_seed(1)
    renderer = tiny.renderer()
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=320,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            num_labels=3,
            pad_token_id=renderer.pad_id,
        )
    ).eval()
    reward = ModelReward("P(b)", model, renderer, labels=((1, 1.0),), multi_label=multi_label)
    found = []
    for row in range(2):
        with torch.no_grad():
            logits = model(rollout.ids[row][rollout.mask[row]][None]).logits[0]
        found.append((logits.sigmoid() if multi_label else logits.softmax(0)).tolist())
    assert_close(reward(rollout, RECORDS), [p[1] for p in found])
    both = ModelReward("2 P(b) - P(c)", model, renderer, labels=((1, 2.0), (2, -1.0)), multi_label=multi_label)
    assert_close(both(rollout, RECORDS), [2 * p[1] - p[2] for p in found])


def test_an_ensemble_combines_its_members_on_their_scales(rollout: Rollout, scorer: Any) -> None:
    members = tuple(ModelReward("rm", scorer, tiny.renderer(), scale=scale) for scale in ((0.5, 2.0), (0.1, 0.7)))
    first, second = (member(rollout, RECORDS) for member in members)
    worst = EnsembleReward(members, "worst", 0.5)
    assert_close(worst(rollout, RECORDS), torch.minimum(first, second).tolist())
    doubtful = EnsembleReward(members, "uncertainty", 2.0)
    assert_close(doubtful(rollout, RECORDS), ((first + second) / 2 - 2.0 * (first - second).square() / 4).tolist())
    assert Rewards(((1.0, worst),)).models_only().parts


def test_a_function_gets_prompt_text_and_record(rollout: Rollout) -> None:
    reward = FunctionReward(
        "length",
        import_reward_function("tests.rollout.test_rewards:length", what="reward function", where="x"),
        tiny.renderer(),
    )
    assert reward(rollout, RECORDS).tolist() == [len(SAID[0]) + 300, len(SAID[1]) + 400]


@pytest.mark.parametrize(("function", "words"), [(broken, "ZeroDivisionError"), (endless, "no finite number")])
def test_a_function_that_fails_is_named_with_what_it_was_given(rollout: Rollout, function: Any, words: str) -> None:
    with pytest.raises(TrainingError, match=words) as caught:
        FunctionReward("mine", function, tiny.renderer())(rollout, RECORDS)
    assert "mine" in str(caught.value)
    assert "row " in str(caught.value)


@pytest.mark.parametrize("name", ["nothing", "no.such.module:f", "tests.rollout.test_rewards:absent", "math:pi"])
def test_a_function_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="function"):
        import_reward_function(name, what="reward function", where="rewards")


def test_parts_are_added_by_weight(rollout: Rollout, scorer: Any) -> None:
    model = ModelReward("rm", scorer, tiny.renderer())
    function = FunctionReward("length", length, tiny.renderer())
    both = Rewards(((1.0, model), (-0.25, function)))
    wanted = model(rollout, RECORDS) - 0.25 * function(rollout, RECORDS)
    assert_close(both(rollout, RECORDS), wanted.tolist())
    assert both.models_only().parts == ((1.0, model),)
