"""Decoding in fixed buffers gives the tokens and log-probabilities of the ordinary decoder, step for step."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from rlhf.generation import static_decoder as module
from rlhf.generation.native import NativeGenerator, generate_rollout
from rlhf.generation.request import DecodingRequest
from rlhf.generation.sampling import draw_token
from rlhf.generation.static_decoder import StaticDecoder, can_decode_statically
from rlhf.models.adapters import add_adapter
from rlhf.rollout.types import Rollout
from tests.generation.test_native import END, PAD, PROMPTS, draw, model  # noqa: F401 (a fixture)
from tests.models import architectures, tiny
from tests.tolerances import assert_close


def words(ids: list[int]) -> str:
    """Decode as the tokenizer of these tests does."""
    return tiny.tokenizer().decode(ids)


def both(policy: Any, prompts: Any = PROMPTS, **changes: Any) -> tuple[Rollout, Rollout]:
    """Decode with fixed buffers, and in the ordinary way."""
    return tuple(draw(policy, prompts, compile=kind, **changes) for kind in ("always", "off"))  # type: ignore[return-value]


def assert_same(ours: Rollout, theirs: Rollout) -> None:
    """Compare two rollouts: all flags and tokens exactly, log-probabilities within rounding."""
    for name in ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "finished", "index", "support"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert_close(ours.sampled_logprobs, theirs.sampled_logprobs.tolist())


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.0},
        {"top_k": 5, "top_p": 0.8},
        {"min_new_tokens": 6},
        {"max_new_tokens": 1},
        {"max_new_tokens": 21},
    ],
    ids=str,
)
def test_fixed_buffers_change_nothing(model: Any, settings: dict[str, Any], batch_size: int) -> None:  # noqa: F811
    assert can_decode_statically(model)
    assert_same(*both(model, batch_size=batch_size, **settings))


def test_columns_grow_in_steps_and_slots_are_used_again(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Steps of 8 columns: a decode step reads no more than the longest sequence needs, rounded up."""
    monkeypatch.setattr(module, "COLUMN_STEP", 8)
    monkeypatch.setattr(module, "STEPS_BETWEEN_CHECKS", 3)
    monkeypatch.setattr(module, "PREFILL_TOKENS", 16)
    read: list[int] = []
    original = StaticDecoder._step_function

    def step_function(self: StaticDecoder, in_use: int) -> Any:
        assert in_use >= int(self.cache.position.max()) + 3
        read.append(in_use)
        return original(self, in_use)

    monkeypatch.setattr(StaticDecoder, "_step_function", step_function)
    assert_same(*both(model, batch_size=3, max_new_tokens=20))
    assert len(set(read)) > 1
    assert min(read) < max(read)


def test_stop_strings_end_a_response_at_the_token_that_completes_them(model: Any) -> None:  # noqa: F811
    plain = draw(model)
    texts = [words(ids[mask].tolist()) for ids, mask in zip(plain.response_ids, plain.response_mask, strict=True)]
    stop = next(t[4:6] for t in texts if len(t) > 8 and sum(t[4:6] in other for other in texts) < len(texts) / 2)
    found = []
    for kind in ("always", "off"):
        settings = module.Sampling(max_new_tokens=12, temperature=0.9, batch_size=5, stop=(stop,), compile=kind)
        found.append(
            generate_rollout(
                model,
                PROMPTS,
                settings,
                seed=1,
                step=0,
                end_id=END,
                pad_id=PAD,
                device=torch.device("cpu"),
                decode=words,
            )
        )
    assert_same(*found)
    assert found[0].response_mask.sum() < plain.response_mask.sum()


OTHER_CACHES = {"mistral", "mamba"}  # a sliding window; a state along the row


@pytest.mark.parametrize("name", sorted(architectures.OPTIONS))
def test_every_architecture_with_plain_keys_and_values_decodes_the_same(name: str) -> None:
    policy = architectures.build(name)
    assert can_decode_statically(policy) is (name not in OTHER_CACHES)
    if name not in OTHER_CACHES:
        prompts = [(i, [t % architectures.VOCABULARY for t in ids]) for i, ids in PROMPTS]
        assert_same(*both(policy, prompts, end=2))


def test_an_adapter_decodes_the_same() -> None:
    policy = add_adapter(tiny.new(4), tiny.LORA, "CAUSAL_LM")
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    assert can_decode_statically(policy)
    assert_same(*both(policy))


def test_eager_attention_decodes_the_same() -> None:
    policy = tiny.new(4)
    policy.set_attn_implementation("eager")
    assert can_decode_statically(policy)
    assert_same(*both(policy))


def test_a_model_that_decodes_wrongly_is_found_out(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A cache that writes to a wrong column must not be trusted."""

    def update(self: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        self.owner.position.sub_(1 if self.owner.admitted is None else 0)
        try:
            return original(self, keys, values)
        finally:
            self.owner.position.add_(1 if self.owner.admitted is None else 0)

    original = module._Layer.update
    monkeypatch.setattr(module._Layer, "update", update)
    assert not can_decode_statically(tiny.new(5))


def test_a_step_touches_buffers_only(model: Any) -> None:  # noqa: F811
    """What a graph replays: the step's buffers keep their places, and nothing is read back to the host."""
    settings = module.Sampling(max_new_tokens=9, batch_size=4, top_p=0.9)
    decoder = StaticDecoder(model, DecodingRequest(PROMPTS, settings, 1, 0, END, PAD, torch.device("cpu")))
    decoder._admit([0, 1, 2, 3], [0, 1, 2, 3])
    buffers = [*decoder.live.state(), decoder.cache.position]
    layers = itertools.chain.from_iterable((layer.keys, layer.values) for layer in decoder.cache.layers)
    places = [t.data_ptr() for t in (*buffers, *layers)]
    with torch.no_grad(), _NoHost():
        decoder._step()
        decoder._step()
    layers = itertools.chain.from_iterable((layer.keys, layer.values) for layer in decoder.cache.layers)
    assert places == [t.data_ptr() for t in (*decoder.live.state(), decoder.cache.position, *layers)]
    assert decoder.live.length.tolist() == [3, 3, 3, 3] or bool(decoder.live.done.any())


class _NoHost(torch.utils._python_dispatch.TorchDispatchMode):
    """Raises if an operation brings a number to the host, as a capture of a CUDA graph would."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::masked_select"), name
        return func(*args, **(kwargs or {}))


def test_the_probe_of_host_reads_sees_one() -> None:
    with pytest.raises(AssertionError), _NoHost():
        float(draw_token(torch.zeros(1, 3), torch.zeros(1), 1.0)[1])


@pytest.mark.parametrize(
    ("name", "setting", "told"), [("mistral", "always", 1), ("mistral", "auto", 0), ("llama", "always", 0)]
)
def test_a_model_that_must_be_decoded_otherwise_is_logged_once(name: str, setting: str, told: int) -> None:
    lines: list[str] = []
    settings = module.Sampling(max_new_tokens=2, compile=setting)
    generator = NativeGenerator(
        lambda: nullcontext(architectures.build(name)),
        settings,
        seed=1,
        end_id=2,
        pad_id=0,
        device=torch.device("cpu"),
        log=lines.append,
    )
    for step in range(2):
        generator.generate([(0, [5, 6, 7])], step)
    assert len(lines) == told
    assert all("without CUDA graphs" in line for line in lines)
