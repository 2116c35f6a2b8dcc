"""A soft prompt computes as in PEFT, whatever the padding, and only the commands that support it accept it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.sections import Sampling
from rlhf.data.collate import pad_left
from rlhf.errors import CheckpointError
from rlhf.generation.native import generate_rollout
from rlhf.models.adapters import add_adapter, load_adapter
from rlhf.models.heads import position_ids
from rlhf.models.load import context_length, count_parameters
from rlhf.models.policy import load_causal
from rlhf.models.reward_models import new_classifier
from rlhf.models.soft_prompt import SoftPrompt, load_for_generation
from rlhf.rollout.teacher_forcing import response_logprobs
from tests.models import tiny
from tests.models.fixtures import shake
from tests.tolerances import assert_close

PAD, END = tiny.renderer().pad_id, tiny.renderer().end_id


@pytest.fixture(scope="module")
def folder(sft_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a trained soft prompt on an SFT model."""
    torch.manual_seed(3)
    model = add_adapter(load_causal(tiny.source(sft_folder)), tiny.PROMPT, "CAUSAL_LM")
    assert count_parameters(model)[0] == tiny.PROMPT.prompt_tokens * tiny.HIDDEN
    return tiny.save(shake(model), tmp_path_factory.mktemp("soft"))


def theirs(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return load_adapter(tiny.source(folder), folder, AutoModelForCausalLM, trainable=False).eval()


def test_it_computes_as_peft_does_and_shows_no_logits_of_the_prompt(folder: str, sft_folder: str) -> None:
    ids = torch.tensor(tiny.rows(4, [9, 9]))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        wanted = theirs(folder)(input_ids=ids, attention_mask=mask).logits[:, tiny.PROMPT.prompt_tokens :]
        model = load_for_generation(tiny.source(folder)).eval()
        found = model(ids, mask, position_ids(mask.bool())).logits
        last = model(ids, mask, position_ids(mask.bool()), logits_to_keep=1).logits
        plain = load_causal(tiny.source(sft_folder))(ids).logits
    assert_close(found, wanted.tolist())
    assert_close(last, wanted[:, -1:].tolist())
    assert (found - plain).abs().max() > 0.05
    assert context_length(model) == 128 - tiny.PROMPT.prompt_tokens


def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """Decode greedily, with a forward pass over all tokens for each new one."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + tokens and END not in ids[len(prompt) :]:
            ids.append(
                int(model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0, -1].argmax())
            )
    return ids[len(prompt) :]


def test_it_is_sampled_from_with_a_cache_and_padding_as_without(folder: str) -> None:
    prompts = tiny.rows(3, [4, 9, 2])
    rollout = generate_rollout(
        load_for_generation(tiny.source(folder)),
        list(enumerate(prompts)),
        Sampling(max_new_tokens=7, temperature=0.0),
        seed=1,
        step=0,
        end_id=END,
        pad_id=PAD,
        device=torch.device("cpu"),
    )
    said = [row[mask].tolist() for row, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    model = theirs(folder)
    assert said == [greedy(model, prompt, 7) for prompt in prompts]
    logprobs, _ = response_logprobs(load_for_generation(tiny.source(folder)), rollout, 1.0)
    assert_close(logprobs.detach(), rollout.sampled_logprobs.tolist())


def test_the_comparison_sees_positions_that_do_not_count_the_prompt(folder: str) -> None:
    class Wrong(SoftPrompt):
        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, **options: Any) -> Any:
            return super().forward(input_ids, attention_mask, position_ids + 5, **options)

    ids, mask = pad_left(tiny.rows(4, [9, 5]), PAD)
    model, wrong = load_for_generation(tiny.source(folder)).eval(), Wrong(theirs(folder)).eval()
    with torch.no_grad():
        right = model(ids, mask.long(), position_ids(mask)).logits[mask]
        assert (wrong(ids, mask.long(), position_ids(mask)).logits[mask] - right).abs().max() > 0.01


def test_who_needs_whole_weights_says_so(folder: str, sft_folder: str, tmp_path: Path) -> None:
    size = len(tiny.tokenizer())
    for attempt in (
        lambda: load_causal(tiny.source(folder)),
        lambda: new_classifier(tiny.source(folder), tiny.Peft(), outputs=1, pad_id=PAD, vocab_size=size, seed=1),
    ):
        with pytest.raises(CheckpointError, match="a soft prompt cannot be merged") as error:
            attempt()
        assert "peft.method=lora" in str(error.value)
    assert load_for_generation(tiny.source(sft_folder)).config.model_type == "llama"  # others load as ever
