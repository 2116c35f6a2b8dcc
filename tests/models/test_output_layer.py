"""Log-probabilities and entropies without all logits: the numbers and gradients of the plain way, in little memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.functional.bits import pack_bits
from rlhf.models import output_layer as module
from rlhf.models.adapters import add_adapter
from rlhf.models.output_layer import (
    LogitTransform,
    logit_transform,
    logprobs_with_weight,
    next_token_positions,
    output_layer,
    token_numbers,
)
from rlhf.rollout.teacher_forcing import policy_forward
from rlhf.rollout.types import Rollout
from tests.models import tiny
from tests.tolerances import GRADIENT, assert_close, distance

SIZE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MODELS: dict[str, tuple[dict[str, Any], LogitTransform]] = {
    "Llama": (SIZE, LogitTransform()),
    "GPT2": (GPT2, LogitTransform()),
    "Phi": (SIZE, LogitTransform()),  # its output layer has a bias
    "Gemma2": (SIZE | {"final_logit_softcapping": 2.0, "head_dim": 8}, LogitTransform(1.0, 2.0)),
    "Cohere": (SIZE | {"logit_scale": 0.25}, LogitTransform(0.25)),
    "Granite": (SIZE | {"logits_scaling": 8.0}, LogitTransform(1 / 8.0)),
}
TEMPERATURE = 0.8


def model(name: str, **changes: Any) -> Any:
    """A small causal language model with weights large enough to tell tokens apart."""
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**MODELS[name][0] | changes, initializer_range=0.3)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def rollout(*, filtered: bool = False) -> Rollout:
    """Three responses; if filtered, about half of the vocabulary was allowed at each position."""
    made = tiny.rollout(1, [3, 9, 5], [4, 2, 7])
    if not filtered:
        return made
    allowed = torch.rand(3, 7, 300, generator=torch.Generator().manual_seed(2)) < 0.5
    allowed |= torch.nn.functional.one_hot(made.response_ids, 300).bool()
    return replace(made, support=pack_bits(allowed))


def numbers(policy: Any, part: Rollout, *, bonus: float = 0.0) -> list[Tensor]:
    """Log-probabilities, entropies, states and the gradient of a loss that is made of them."""
    policy.zero_grad()
    read = policy_forward(policy, part, TEMPERATURE, entropy=True, entropy_gradient=bonus > 0, states=True)
    (read.logprobs.square().sum() - bonus * read.entropy.sum()).backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    return [
        read.logprobs.detach(),
        read.entropy.detach(),
        read.states.detach() * part.response_mask[..., None],
        gradient,
    ]


@pytest.mark.parametrize("name", MODELS)
def test_what_a_model_does_to_its_logits_is_found_out(name: str) -> None:
    assert logit_transform(model(name)) == MODELS[name][1]


def test_a_transform_that_the_configuration_does_not_explain_is_not_guessed() -> None:
    policy = model("Llama")
    original = policy.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.logits = output.logits.tanh()
        return output

    policy.forward = forward
    assert logit_transform(policy) is None
    read = policy_forward(policy, rollout(), TEMPERATURE)
    del policy.forward
    assert distance(read.logprobs, policy_forward(model("Llama"), rollout(), TEMPERATURE).logprobs) > 0.1


@pytest.mark.parametrize("bonus", [0.0, 0.3], ids=["", "entropy bonus"])
@pytest.mark.parametrize("filtered", [False, True], ids=["", "filtered"])
@pytest.mark.parametrize("name", MODELS)
def test_tiles_give_the_numbers_and_gradients_of_plain_logits(
    name: str, filtered: bool, bonus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, part = model(name), rollout(filtered=filtered)
    whole = numbers(policy, part, bonus=bonus)
    monkeypatch.setattr(module, "MAX_LOGITS_AT_ONCE", 3 * 300)
    monkeypatch.setattr(module, "TILE_WIDTH", 128)
    for ours, theirs in zip(numbers(policy, part, bonus=bonus), whole, strict=True):
        assert distance(ours, theirs) < GRADIENT


@pytest.mark.parametrize("tiled", [False, True])
def test_an_entropy_bonus_has_the_gradient_of_the_entropy(tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against autograd through plain logits. Without `entropy_gradient`, the entropy is a number to look at only."""
    if tiled:
        monkeypatch.setattr(module, "MAX_LOGITS_AT_ONCE", 1)
    policy, ids = model("Llama"), torch.randint(5, 290, (1, 9), generator=torch.Generator().manual_seed(3))
    logp = (policy(input_ids=ids).logits[0, :-1].double() / TEMPERATURE).log_softmax(-1)
    (-(logp.exp() * logp).sum()).backward()
    wanted = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    positions = next_token_positions(torch.ones_like(ids, dtype=torch.bool))
    read = token_numbers(
        policy, {"input_ids": ids}, positions, ids[0, 1:], temperature=TEMPERATURE, entropy=True, entropy_gradient=True
    )
    read.entropy.sum().backward()
    assert max(distance(p.grad, w) for p, w in zip(policy.parameters(), wanted, strict=True)) < GRADIENT
    plain = token_numbers(policy, {"input_ids": ids}, positions, ids[0, 1:], temperature=TEMPERATURE, entropy=True)
    assert torch.equal(plain.entropy, read.entropy.detach())
    assert not plain.entropy.requires_grad


@pytest.mark.parametrize("filtered", [False, True], ids=["", "filtered"])
def test_the_output_layer_is_called_once_and_left_as_it_was(filtered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LOGITS_AT_ONCE", 1)
    policy, calls = model("Llama"), list[int]()
    logit_transform(policy)
    head = output_layer(policy)
    head.register_forward_hook(lambda *_: calls.append(1))
    before = set(vars(head))
    policy_forward(policy, rollout(filtered=filtered), TEMPERATURE)
    assert calls == [1]
    assert set(vars(head)) == before
    head.forward = wrapped = lambda states: torch.nn.functional.linear(states, head.weight)  # as some libraries do
    policy_forward(policy, rollout(filtered=filtered), TEMPERATURE)
    assert head.forward is wrapped


def test_an_adapter_on_the_output_layer_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = add_adapter(tiny.new(1), tiny.LORA.model_copy(update={"targets": ("lm_head", "q_proj")}), "CAUSAL_LM")
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(0.0, 0.3)
    part = tiny.rollout(1, [3, 9, 5], [4, 2, 7])
    whole = numbers(policy, part)
    monkeypatch.setattr(module, "MAX_LOGITS_AT_ONCE", 3 * 300)
    for ours, theirs in zip(numbers(policy, part), whole, strict=True):
        assert distance(ours, theirs) < GRADIENT


def test_positions_are_those_before_the_tokens_that_count() -> None:
    mask = torch.tensor([[True, True, True, False], [True, False, False, True]])
    assert next_token_positions(mask).tolist() == [0, 1, 6]


def test_log_probs_under_another_output_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(7, 32, generator=generator), torch.randn(300, 32, generator=generator)
    targets = torch.randint(0, 300, (7,), generator=generator)
    wanted = (states @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert_close(logprobs_with_weight(states, weight, targets), wanted.tolist())


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation returned, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


@pytest.mark.parametrize("filtered", [False, True], ids=["", "filtered"])
def test_a_large_vocabulary_never_has_all_its_logits(filtered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 tokens x 152 000 entries: no tensor of the forward or backward pass is larger than the limit or a weight."""
    vocabulary, tokens, limit = 152_000, 500, 2**23
    monkeypatch.setattr(module, "MAX_LOGITS_AT_ONCE", limit)
    policy = model("Llama", vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=512)
    ids = torch.randint(5, 290, (1, tokens), generator=torch.Generator().manual_seed(3))
    positions = next_token_positions(torch.ones_like(ids, dtype=torch.bool))
    allowed = torch.full((tokens - 1, vocabulary // 8), 255, dtype=torch.uint8) if filtered else None
    logit_transform(policy)
    with LargestTensor() as seen:
        read = token_numbers(
            policy, {"input_ids": ids, "use_cache": False}, positions, ids[0, 1:], entropy=True, allowed=allowed
        )
        read.logprobs.sum().backward()
    weight = policy.lm_head.weight
    assert weight.grad is not None
    most = max(limit, weight.numel(), 0 if allowed is None else allowed.numel())
    assert seen.size <= most < tokens * vocabulary / 8


def test_the_measure_sees_plain_logits() -> None:
    with LargestTensor() as seen:
        model("Llama")(input_ids=torch.zeros(1, 50, dtype=torch.long)).logits.sum().backward()
    assert seen.size >= 50 * 300
