"""The places of parameters, and the parameters that a selection contains, for every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf.config.tuning import Selection
from rlhf.errors import ConfigError
from rlhf.models.adapters import add_adapter
from rlhf.models.parameter_selection import (
    ParameterMap,
    ParameterPlace,
    map_parameters,
    select_parameters,
    top_parameters,
)
from rlhf.trainers.phase_schedule import parameter_rate_factors
from tests.models import tiny

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 24},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 24},
    "opt": {"ffn_dim": 24},
    "qwen3": {"intermediate_size": 24, "head_dim": 8},
    "gemma": {"intermediate_size": 24, "head_dim": 8},
    "mistral": {"intermediate_size": 24},
    "phi": {"intermediate_size": 24},
    "bloom": {},
}
BLOCKS = 3


def build(kind: str, *, tied: bool = True, scorer: bool = False) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.for_model(
        kind,
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        pad_token_id=0,
        num_labels=1,
        **SIZES[kind],
    )
    torch.manual_seed(0)
    kinds = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    return kinds.from_config(config)


@pytest.mark.parametrize("kind", SIZES)
def test_every_weight_has_a_place(kind: str) -> None:
    model = build(kind)
    of = map_parameters(model)
    assert set(of.places) == {name for name, _ in model.named_parameters()}
    assert of.blocks == BLOCKS
    assert {p.block for p in of.places.values()} == {None, *range(BLOCKS)}
    inside = [{p.part for p in of.places.values() if p.block == i} for i in range(BLOCKS)]
    assert inside == [{"attention", "mlp", "norms"}] * BLOCKS
    assert {p.part for p in of.places.values() if p.block is None} >= {"embeddings"}
    assert all(p.part is not None for p in of.places.values())


@pytest.mark.parametrize("kind", SIZES)
def test_parts_are_what_their_modules_are(kind: str) -> None:
    """Norms have vectors only, embeddings are looked up by tokens, and blocks have both attention and MLP matrices."""
    model = build(kind)
    of, named = map_parameters(model), dict(model.named_parameters())
    assert all(named[name].dim() == 1 for name in select_parameters(Selection(parts=("norms",)), of, "freeze"))
    embeddings = [named[name] for name in select_parameters(Selection(parts=("embeddings",)), of, "freeze")]
    assert any(weight is model.get_input_embeddings().weight for weight in embeddings)
    for part in ("attention", "mlp"):
        assert any(named[name].dim() == 2 for name in select_parameters(Selection(parts=(part,)), of, "freeze"))


def test_the_order_is_from_the_tokens_to_the_scores() -> None:
    of = map_parameters(build("llama", scorer=True))
    depth = {name: place.depth for name, place in of.places.items()}
    assert depth["model.embed_tokens.weight"] == 0
    assert [depth[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(BLOCKS)] == [1, 2, 3]
    assert depth["model.norm.weight"] == depth["score.weight"] == BLOCKS + 1


def test_adapters_lie_where_the_layers_lie_that_they_change() -> None:
    of = map_parameters(add_adapter(build("llama", scorer=True), tiny.LORA, "SEQ_CLS"))
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
    assert of.places[name] == ParameterPlace(1, "attention", 2)
    assert of.places["base_model.model.score.modules_to_save.default.weight"].part == "score"


def test_a_tied_output_layer_stands_for_the_embeddings_and_an_untied_one_for_itself() -> None:
    tied, untied = map_parameters(build("llama")), map_parameters(build("llama", tied=False))
    head = Selection(parts=("lm_head",))
    assert tied.tied
    assert not untied.tied
    assert select_parameters(head, tied, "freeze") == {"model.embed_tokens.weight"}
    assert select_parameters(head, untied, "freeze") == {"lm_head.weight"}


def blocks_of(selection: Selection, blocks: int) -> list[int]:
    of = ParameterMap({f"w{i}": ParameterPlace(i, "mlp", i + 1) for i in range(blocks)}, blocks, tied=False)
    return sorted(int(name[1:]) for name in select_parameters(selection, of, "freeze"))


@pytest.mark.parametrize(
    ("selection", "blocks", "wanted"),
    [
        ({"layers": "0-2"}, 8, [0, 1, 2]),
        ({"layers": 3}, 8, [3]),
        ({"layers": "-1"}, 8, [7]),
        ({"layers": "-3--2"}, 8, [5, 6]),
        ({"layers": "2--1"}, 4, [2, 3]),
        ({"layers": "0,2,5-6"}, 8, [0, 2, 5, 6]),
        ({"layers": "0-50%"}, 8, [0, 1, 2, 3]),
        ({"layers": "50%-100%"}, 8, [4, 5, 6, 7]),
        ({"layers": "25%-75%"}, 4, [1, 2]),
        ({"first": 2}, 4, [0, 1]),
        ({"last": "2"}, 4, [2, 3]),
        ({"first": "50%"}, 5, [0, 1]),
        ({"last": "1%"}, 4, [3]),
        ({"first": 1, "last": 1}, 4, [0, 3]),
    ],
)
def test_blocks(selection: dict[str, Any], blocks: int, wanted: list[int]) -> None:
    assert blocks_of(Selection(**selection), blocks) == wanted


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ({"layers": "0-8"}, "blocks 0 to 7"),
        ({"layers": "-9"}, "blocks 0 to 7"),
        ({"layers": "5-2"}, "contains no block"),
        ({"layers": "50%-50%"}, "contains no block"),
        ({"first": 9}, "has 8 blocks"),
        ({"last": 9}, "has 8 blocks"),
    ],
)
def test_blocks_that_there_are_not(selection: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        blocks_of(Selection(**selection), 8)


@pytest.mark.parametrize("pattern", ["*.q_proj.*", r"re:.*\.q_proj\..*"])
def test_names(pattern: str) -> None:
    of = map_parameters(build("llama"))
    wanted = {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(BLOCKS)}
    assert select_parameters(Selection(names=(pattern,)), of, "freeze") == wanted


@pytest.mark.parametrize("pattern", ["*.layers.1.self_attn.qproj.weight", r"re:model\.layers\.1\.self_attn\.qproj"])
def test_a_name_that_matches_nothing_is_an_error_with_the_nearest(pattern: str) -> None:
    with pytest.raises(
        ConfigError, match=r"no parameter has a name that matches .*model\.layers\.1\.self_attn\.q_proj"
    ):
        select_parameters(Selection(names=(pattern,)), map_parameters(build("llama")), "freeze")


def test_a_part_that_is_not_there_is_an_error_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"freeze.parts: the model has no score; it has attention, embeddings"):
        select_parameters(Selection(parts=("score",)), map_parameters(build("llama")), "freeze")


def test_a_model_whose_blocks_are_not_found_trains_but_not_by_blocks() -> None:
    model = build("llama")
    model.config.num_hidden_layers = 77
    of = map_parameters(model)
    assert set(of.places) == {name for name, _ in model.named_parameters()}
    assert select_parameters(Selection(parts=("embeddings",)), of, "freeze") == {"model.embed_tokens.weight"}
    for selection in (Selection(last="1"), Selection(layers="0"), Selection(first="50%")):
        with pytest.raises(ConfigError, match="freeze: the model's blocks were not found"):
            select_parameters(selection, of, "freeze")
    assert set(parameter_rate_factors(of, layer_decay=1.0, head_factor=1.0).values()) == {1.0}
    with pytest.raises(ConfigError, match=r"optim\.layer_decay: the model's blocks"):
        parameter_rate_factors(of, layer_decay=0.9, head_factor=1.0)


def test_the_top_is_the_head_and_the_last_blocks() -> None:
    of = map_parameters(build("llama", scorer=True))
    assert top_parameters(of, 0) == {"model.norm.weight", "score.weight"}
    assert {of.places[name].block for name in top_parameters(of, 2)} == {None, 1, 2}
    assert top_parameters(of, BLOCKS) == set(of.places) - {"model.embed_tokens.weight"}
