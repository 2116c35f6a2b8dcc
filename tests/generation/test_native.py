"""Sampled responses: what they may depend on, and what they must not depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf.config.sections import Sampling
from rlhf.generation import native as module
from rlhf.generation.native import generate_rollout
from rlhf.rollout.teacher_forcing import response_logprobs
from rlhf.rollout.types import Rollout
from tests.generation.test_distribution import UNLIKELY, p_value
from tests.models import tiny
from tests.tolerances import assert_close

PAD, END = tiny.renderer().pad_id, tiny.renderer().end_id
PROMPTS = list(enumerate(tiny.rows(3, [4, 9, 2, 6, 6, 1, 13, 5, 3, 8, 2, 7])))


@pytest.fixture(scope="module")
def model() -> Any:
    """Return a model that ends some responses early and others never."""
    made = tiny.new(4)
    with torch.no_grad():
        made.get_input_embeddings().weight[END] *= 6.0
    return made


def draw(
    model: Any, prompts: Any = PROMPTS, *, seed: int = 1, step: int = 0, end: int = END, **changes: Any
) -> Rollout:
    settings = Sampling(**{"max_new_tokens": 12, "temperature": 0.9, "batch_size": 64} | changes)
    return generate_rollout(
        model, prompts, settings, seed=seed, step=step, end_id=end, pad_id=PAD, device=torch.device("cpu")
    )


def responses(rollout: Rollout) -> dict[int, list[int]]:
    """Return prompt index -> response."""
    return {
        int(i): ids[mask].tolist()
        for i, ids, mask in zip(rollout.index, rollout.response_ids, rollout.response_mask, strict=True)
    }


def test_the_model_of_these_tests_ends_at_many_lengths(model: Any) -> None:
    lengths = draw(model).response_length.tolist()
    assert len(set(lengths)) >= 4
    assert max(lengths) == 12


def test_a_rollout_holds_the_prompts_given_in_the_order_given(model: Any) -> None:
    shuffled = [PROMPTS[i] for i in (3, 0, 7, 5)]
    rollout = draw(model, shuffled)
    assert rollout.index.tolist() == [3, 0, 7, 5]
    for row, (_, ids) in enumerate(shuffled):
        assert rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist() == ids
        assert rollout.prompt_mask[row].tolist() == sorted(rollout.prompt_mask[row].tolist())  # left-padded


@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
def test_a_response_does_not_depend_on_neighbours_order_or_batch_size(model: Any, batch_size: int) -> None:
    together = responses(draw(model))
    assert responses(draw(model, PROMPTS[::-1], batch_size=batch_size)) == together


def test_finished_rows_leave_the_batch_without_a_trace(model: Any) -> None:
    sizes = []
    hook = model.register_forward_pre_hook(lambda _, __, kw: sizes.append(len(kw["input_ids"])), with_kwargs=True)
    together = responses(draw(model))
    hook.remove()
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) >= 3
    alone = {i: responses(draw(model, [(i, ids)]))[i] for i, ids in PROMPTS}
    assert together == alone


def test_the_end_token_is_inside_the_mask_and_nothing_follows_it(model: Any) -> None:
    rollout = draw(model)
    assert 0 < int(rollout.finished.sum()) < len(rollout)
    for row, ids in responses(rollout).items():
        assert (ids[-1] == END) == bool(rollout.finished[row])
        assert END not in ids[:-1]
        assert len(ids) == 12 or bool(rollout.finished[row])
    assert (rollout.response_ids[~rollout.response_mask] == PAD).all()


def test_an_end_token_that_is_also_the_pad_token_is_kept(model: Any) -> None:
    settings = Sampling(max_new_tokens=12, temperature=0.9)
    both = generate_rollout(
        model, PROMPTS, settings, seed=1, step=0, end_id=END, pad_id=END, device=torch.device("cpu")
    )
    assert responses(both) == responses(draw(model))


def test_a_seed_repeats_and_another_seed_step_or_index_does_not(model: Any) -> None:
    first = draw(model)
    again = draw(model)
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(again).values(), strict=True))
    assert responses(draw(model, step=1)) != responses(first)
    assert responses(draw(model, seed=2)) != responses(first)
    same_prompt = draw(tiny.new(4), [(i, PROMPTS[1][1]) for i in range(20)])
    assert len({tuple(r) for r in responses(same_prompt).values()}) > 10


def test_draws_are_independent_of_the_global_generator(model: Any) -> None:
    torch.manual_seed(1)
    first = responses(draw(model))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert responses(draw(model)) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_keeps_its_mode_and_gets_no_gradient(model: Any) -> None:
    for mode in (True, False):
        model.train(mode)
        draw(model, PROMPTS[:2])
        assert model.training is mode
    assert all(p.grad is None for p in model.parameters())


# Left padding, with learned positions: rotary ones do not notice an offset


@pytest.fixture(scope="module")
def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=320,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.3,
    )
    return GPT2LMHeadModel(config).eval()


def test_left_padding_does_not_matter_for_learned_positions(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = responses(draw(gpt2, PROMPTS[2:3]))[2]
    assert responses(draw(gpt2))[2] == alone
    monkeypatch.setattr(module, "position_ids", lambda mask: torch.arange(mask.shape[1]).expand(mask.shape))
    assert responses(draw(gpt2))[2] != alone  # the check sees positions that count padding


# The distribution


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_cached_decoding_agrees_with_one_full_forward(
    kind: str, temperature: float, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue("gpt2" if kind == "gpt2" else "model")
    rollout = draw(model, temperature=temperature)
    forced, _ = response_logprobs(model, rollout, temperature)
    assert_close(forced, rollout.sampled_logprobs.tolist())
    other, _ = response_logprobs(model, rollout, temperature + 0.05)
    assert (other - rollout.sampled_logprobs).abs().max() > 0.01  # the check sees another temperature


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_are_drawn_from_the_models_distribution(temperature: float) -> None:
    model, prompt, count = tiny.new(4), PROMPTS[1][1], 6000
    drawn = draw(
        model, [(i, prompt) for i in range(count)], max_new_tokens=1, temperature=temperature, batch_size=2000
    ).response_ids[:, 0]
    with torch.no_grad():
        wanted = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(0)
    # Tokens in the order of their probability, in 20 groups of about equal weight.
    order = wanted.argsort(descending=True)
    group = torch.zeros(len(wanted), dtype=torch.long)
    group[order] = (wanted[order].cumsum(0) * 20).long().clamp_max(19)
    weights = torch.zeros(20).scatter_add(0, group, wanted)
    assert p_value(group[drawn].bincount(minlength=20), weights) > UNLIKELY


def test_a_models_own_generation_settings_do_not_leak_in(model: Any) -> None:
    before = responses(draw(model))
    model.generation_config.update(top_k=1, repetition_penalty=5.0, min_p=0.5, temperature=0.01)
    assert responses(draw(model)) == before
