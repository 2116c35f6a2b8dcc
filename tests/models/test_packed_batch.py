"""Packed rows compute what padded rows compute, in fewer positions; models for which they do not are never packed."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.models.heads import sequence_outputs, token_scores
from rlhf.models.output_layer import logit_transform
from rlhf.models.packed_batch import PackedBatch, can_pack, microbatch_count, microbatches, packed_rows
from rlhf.rollout.teacher_forcing import policy_forward
from tests.models import tiny
from tests.tolerances import GRADIENT, assert_close, distance

SIZE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "head_dim": 8,
}


def model(name: str) -> Any:
    """Return a small causal LM of some architecture, with weights large enough to tell tokens apart."""
    import transformers

    torch.manual_seed(1)
    settings: dict[str, dict[str, Any]] = {
        "Llama": SIZE,
        "Qwen2": SIZE,
        "Mistral": SIZE | {"sliding_window": 4},
        "Gemma2": SIZE | {"final_logit_softcapping": 2.0, "sliding_window": 4},
        "GPT2": {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "GPTNeoX": {k: v for k, v in SIZE.items() if k not in ("num_key_value_heads", "head_dim")},
        "Bloom": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "Mamba": {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    }
    config = getattr(transformers, f"{name}Config")(**settings[name], initializer_range=0.3)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def batch(lengths: list[int], *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Return random rows of given lengths, padded."""
    width = max(lengths)
    ids = torch.randint(5, 290, (len(lengths), width), generator=torch.Generator().manual_seed(3))
    places = torch.arange(width)
    mask = torch.stack([places >= width - n if left else places < n for n in lengths])
    return ids.masked_fill(~mask, 0), mask


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("lengths", [[3], [5, 5, 5], [9, 1, 4, 4, 2, 7, 3, 1], list(range(1, 40))])
def test_every_token_is_packed_once_beside_its_neighbours(lengths: list[int], left: bool) -> None:
    ids, mask = batch(lengths, left=left)
    made = PackedBatch.of(ids, mask)
    slots = made.slot[mask]
    assert len(set(slots.tolist())) == sum(lengths)
    assert torch.equal(made.ids.flatten()[slots], ids[mask])
    for row, length in enumerate(lengths):
        own = made.slot[row][mask[row]]
        assert own.tolist() == list(range(int(own[0]), int(own[0]) + length))
        assert made.positions.flatten()[own].tolist() == list(range(length))
        assert int(own[0]) // made.ids.shape[1] == int(own[-1]) // made.ids.shape[1]  # not over the end of a row
    assert made.fill == sum(lengths) / made.ids.numel()


def test_a_microbatch_of_uneven_rows_is_nearly_full() -> None:
    """The lengths are similar to the demo's, where more than a third of a padded batch is padding."""
    lengths = (torch.rand(64, generator=torch.Generator().manual_seed(1)).pow(2) * 60 + 10).long().tolist()
    ids, mask = batch(lengths)
    assert float(mask.float().mean()) < 0.65
    assert PackedBatch.of(ids, mask).fill > 0.95


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *((name, kind) for name in ("Llama", "Qwen2", "Mistral", "GPT2", "GPTNeoX") for kind in ("eager", "sdpa")),
        ("Gemma2", "eager"),  # its soft cap of attention has no other kernel
    ],
)
def test_packed_and_padded_give_the_same_numbers(name: str, attention: str) -> None:
    policy = model(name)
    policy.set_attn_implementation(attention)
    rollout = tiny.rollout(1, [3, 9, 5, 2, 6], [4, 2, 7, 7, 1])
    made = {}
    for packed in (True, False):
        policy.zero_grad()
        read = policy_forward(
            policy,
            rollout,
            0.8,
            entropy=True,
            states=True,
            batch=PackedBatch.of(rollout.ids, rollout.mask, packed=packed),
        )
        (read.logprobs * torch.linspace(-1, 1, read.logprobs.numel()).view_as(read.logprobs)).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        states = read.states * rollout.response_mask[..., None]
        made[packed] = (read.logprobs.detach(), read.entropy, states.detach(), gradients)
    for ours, theirs in zip(made[True], made[False], strict=True):
        assert distance(ours, theirs) < GRADIENT
    assert float(made[True][0].min()) < -1.0  # not all alike


def test_the_output_layer_sees_real_response_tokens_only() -> None:
    policy, seen = model("Llama"), []
    logit_transform(policy)
    policy.lm_head.register_forward_hook(lambda _, args, output: seen.append(output.shape))
    rollout = tiny.rollout(1, [3, 9, 5], [4, 2, 7])
    policy_forward(policy, rollout, 1.0)
    assert seen == [(13, 300)]
    assert not policy.lm_head._forward_pre_hooks


def test_values_and_scores_do_not_depend_on_packing(reward_folder: str) -> None:
    from rlhf.models.reward_models import load_scorer

    scorer = load_scorer(tiny.source(reward_folder)).eval()
    ids, mask = batch([4, 11, 7, 2, 9], left=True)
    ids = ids % 100
    found = []
    for packed in (True, False):
        made = PackedBatch.of(ids, mask, packed=packed)
        scores = sequence_outputs(scorer, ids, mask, packed=packed)
        found.append((scores, token_scores(scorer, made) * mask))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("name", "able"),
    [("Llama", True), ("Mistral", True), ("Gemma2", True), ("GPT2", True), ("Mamba", False), ("Bloom", False)],
)
def test_the_probe_knows_which_architectures_can_be_packed(name: str, able: bool) -> None:
    assert can_pack(model(name)) is able


def test_the_probe_sees_attention_across_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model ignores that positions restart."""
    policy = model("Llama")
    forward = policy.model.forward

    def leaking(input_ids: Tensor, position_ids: Tensor, **options: Any) -> Any:
        if "attention_mask" not in options:
            options["attention_mask"] = torch.ones_like(input_ids)  # one long sequence
        return forward(input_ids=input_ids, position_ids=position_ids, **options)

    monkeypatch.setattr(policy.model, "forward", leaking)
    assert not can_pack(policy)


def test_a_model_that_cannot_be_packed_is_padded() -> None:
    rollout = tiny.rollout(1, [3, 6], [4, 2])
    policy = model("Bloom")
    padded = policy_forward(policy, rollout, 1.0).logprobs
    alone = torch.cat(
        [policy_forward(policy, rollout.select(torch.tensor([i])), 1.0).logprobs.flatten() for i in (0, 1)]
    )
    assert distance(padded[rollout.response_mask], alone) < GRADIENT


@pytest.mark.parametrize("packed", [True, False])
def test_microbatches_hold_every_row_once(packed: bool) -> None:
    lengths = torch.tensor([5, 90, 7, 7, 30, 61, 8, 80, 6, 40, 9])
    parts = microbatches(lengths, 3, packed=packed)
    assert sorted(torch.cat(parts).tolist()) == list(range(11))
    assert len(parts) == 4
    assert max(map(len, parts)) == 3
    tokens = [int(lengths[part].sum()) for part in parts]
    if packed:
        assert max(tokens) < 1.6 * min(tokens)
    else:
        assert all(int(lengths[a].min()) >= int(lengths[b].max()) for a, b in pairwise(parts))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens", [95, 130, 200, 10_000])
def test_microbatches_by_tokens_keep_both_limits(packed: bool, tokens: int) -> None:
    lengths = torch.tensor([5, 90, 7, 7, 30, 61, 8, 80, 6, 40, 9])
    count = microbatch_count(lengths, 4, tokens, packed=packed)
    parts = microbatches(lengths, 4, packed=packed, count=count)
    assert sorted(torch.cat(parts).tolist()) == list(range(11))
    assert max(map(len, parts)) <= 4
    sizes = [int(lengths[p].sum() if packed else lengths[p].max() * len(p)) for p in parts]
    assert max(sizes) <= tokens
    assert count == 3 if tokens == 10_000 else count > 3 or max(sizes) <= tokens
    assert microbatch_count(lengths, 4, 50, packed=packed) <= 11  # the longest row is longer: it stands alone


def test_the_step_counts_real_tokens_whatever_the_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that pass the trunk are those of the rollout and the remaining padding."""
    policy, seen = model("Llama"), []
    policy.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    rollout = tiny.rollout(1, [3, 9, 5, 2, 6, 8, 2, 3], [4, 2, 7, 7, 1, 3, 5, 8])
    can_pack(policy)
    seen.clear()
    policy_forward(policy, replace(rollout), 1.0)
    assert seen[0] <= 1.25 * int(rollout.mask.sum())


def test_a_padded_batch_is_read_as_it_is() -> None:
    policy, rollout, seen = model("Llama"), tiny.rollout(1, [3, 9, 5], [4, 2, 7]), list[tuple[int, ...]]()
    assert can_pack(policy)
    logit_transform(policy)
    policy.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    policy_forward(policy, rollout, 1.0, batch=PackedBatch.of(rollout.ids, rollout.mask, packed=False))
    policy_forward(policy, rollout, 1.0)
    assert seen[0] == (3, 16)
    assert seen[1][0] < 3


def test_what_is_found_out_about_a_model_is_not_hung_on_it() -> None:
    policy = model("Llama")
    before = set(vars(policy))
    assert can_pack(policy)
    logit_transform(policy)
    assert set(vars(policy)) == before


@pytest.mark.parametrize("seed", range(6))
def test_demonstrations_are_counted_as_trl_packs_them(seed: int) -> None:
    from datasets import Dataset
    from trl import pack_dataset

    torch.manual_seed(seed)
    lengths = torch.randint(1, 65, (50 * seed + 1,)).tolist()
    rows = pack_dataset(Dataset.from_dict({"input_ids": [[1] * n for n in lengths]}), seq_length=64, strategy="bfd")
    assert packed_rows(lengths, 64) == len(rows)
    assert packed_rows(sorted(lengths), 64) == len(rows)
