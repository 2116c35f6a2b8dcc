"""Rows of a KV cache compute as they would alone, whichever rows were added, removed or moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.data.collate import pad_left
from rlhf.generation import kv_cache as module
from rlhf.generation.kv_cache import BatchCache, SlotCache, open_cache
from rlhf.models.heads import position_ids
from tests.generation.test_native import END, draw, responses
from tests.models import tiny
from tests.tolerances import assert_close


@pytest.fixture(scope="module")
def model() -> Any:
    made = tiny.new(4)
    with torch.no_grad():
        made.get_input_embeddings().weight[END] *= 6.0  # ends some responses early
    return made


@pytest.fixture(scope="module")
def windowed() -> Any:
    """Return a model that attends to its last 8 tokens only, and whose cache keeps no more."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=8,
        initializer_range=0.3,
    )
    return MistralForCausalLM(config).eval()


class Walk:
    """Rows of given tokens, decoded with a cache; the logits of every step are compared with a full forward pass."""

    def __init__(self, model: Any) -> None:
        self.model, self.slots = model, open_cache(model)
        self.rows: list[list[int]] = []  # tokens of each live row so far

    @torch.no_grad()
    def check(self, logits: Tensor, rows: list[list[int]]) -> None:
        for found, ids in zip(logits, rows, strict=True):
            wanted = self.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            assert_close(found, wanted.tolist())

    @torch.no_grad()
    def admit(self, *prompts: list[int]) -> None:
        ids, mask = pad_left(list(prompts), tiny.renderer().pad_id)
        self.check(self.slots.admit(ids, mask, position_ids(mask)), list(prompts))
        self.rows += [list(p) for p in prompts]

    @torch.no_grad()
    def step(self, times: int = 1) -> None:
        for _ in range(times):
            tokens = torch.tensor([(17 * len(ids) + ids[0]) % 250 + 10 for ids in self.rows])
            at = torch.tensor([len(ids) for ids in self.rows])
            self.rows = [[*ids, int(t)] for ids, t in zip(self.rows, tokens, strict=True)]
            self.check(self.slots.step(tokens, at), self.rows)

    def keep(self, *rows: int) -> None:
        self.slots.keep(torch.tensor(rows, dtype=torch.long))
        self.rows = [self.rows[i] for i in rows]


@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_every_row_computes_as_if_alone(chunk: int, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROWTH_COLUMNS", chunk)
    walk = Walk(model)
    a, b, c, d, e, f = tiny.rows(5, [3, 7, 2, 15, 4, 30])
    walk.admit(a, b, c)
    walk.step(3)
    walk.keep(2, 0)  # in another order
    walk.step()
    walk.admit(d)  # longer than all rows are by now: they move to the right
    walk.step(2)
    walk.admit(e)
    walk.keep(3, 2)  # the short row whose first column is far to the right, and the long one
    walk.step(5)
    walk.keep(0)
    walk.step(9)  # the columns before it are free again
    walk.keep()
    walk.admit(f, a)
    walk.step(3)


def test_the_walk_sees_keys_of_another_row(model: Any) -> None:
    walk = Walk(model)
    walk.admit(*tiny.rows(5, [3, 7, 2]))
    walk.step()
    walk.slots.keep(torch.tensor([1, 0]))
    walk.rows = walk.rows[:2]
    with pytest.raises(AssertionError):
        walk.step()


def test_buffers_are_written_in_place_and_do_not_grow_with_every_token(model: Any) -> None:
    walk = Walk(model)
    walk.admit(*tiny.rows(5, [3, 7]))
    walk.step()
    keys = walk.slots.cache.layers[0].keys.data_ptr()
    walk.step(20)
    assert walk.slots.cache.layers[0].keys.data_ptr() == keys
    assert walk.slots.cache.layers[0].keys.shape[2] <= 7 + module.GROWTH_COLUMNS


def test_a_row_that_goes_on_for_long_needs_no_more_room_than_it_has_tokens(model: Any) -> None:
    """Other rows are added and removed meanwhile: the columns in use are moved back to the left."""
    walk = Walk(model)
    prompts = tiny.rows(6, [4] * 20)
    walk.admit(prompts[0], prompts[1])
    for prompt in prompts[2:]:
        walk.step(5)
        walk.keep(1)  # the older one leaves
        walk.admit(prompt)
    assert walk.slots.columns <= 9 + 2 * module.GROWTH_COLUMNS


# Which models


def test_plain_caches_get_slots_and_others_batches(model: Any, windowed: Any) -> None:
    assert isinstance(open_cache(model), SlotCache)
    assert isinstance(open_cache(windowed), BatchCache)


def test_rows_of_a_batch_compute_as_if_alone(windowed: Any) -> None:
    walk = Walk(windowed)
    walk.admit(*tiny.rows(5, [3, 7, 12]))
    walk.step(3)
    walk.keep(2, 0)
    walk.step(4)
    walk.keep()
    walk.admit(*tiny.rows(7, [5, 2]))
    walk.step(2)


# Sampling


@pytest.mark.parametrize("kind", ["model", "windowed"])
def test_waiting_prompts_take_the_places_of_finished_rows(kind: str, request: pytest.FixtureRequest) -> None:
    chosen, calls = request.getfixturevalue(kind), []
    hook = chosen.register_forward_pre_hook(
        lambda _, __, kw: calls.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    found = responses(draw(chosen, batch_size=4))
    hook.remove()
    assert found == responses(draw(chosen, batch_size=64))
    joins = [i for i, (_, width) in enumerate(calls[1:], 1) if width > 1]
    assert max(rows for rows, width in calls if width == 1) <= 4
    if kind == "model":
        assert any(calls[i + 1][0] > calls[i][0] for i in joins if i + 1 < len(calls))  # beside rows that went on
    assert joins


def test_refilled_slots_take_fewer_steps(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [(i, ids) for i, ids in enumerate(tiny.rows(8, [5] * 40))]

    def steps() -> int:
        calls: list[int] = []
        hook = model.register_forward_pre_hook(lambda _, __, kw: calls.append(1), with_kwargs=True)
        draw(model, prompts, batch_size=8, max_new_tokens=40)
        hook.remove()
        return len(calls)

    refilled = steps()
    monkeypatch.setattr(SlotCache, "accepts_new_rows", False)
    assert refilled < 0.9 * steps()
