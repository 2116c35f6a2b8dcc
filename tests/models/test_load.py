"""From model paths to models: what a path refers to, what is rejected, dropout and vocabulary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf.config.sections import ModelSource, Peft
from rlhf.errors import CheckpointError
from rlhf.models import reward_models
from rlhf.models.load import count_parameters, disable_dropout, grow_embeddings, load_tokenizer, resolve_model
from rlhf.models.policy import load_causal, policy_with_adapter
from tests.models import tiny
from tests.tolerances import assert_close


def make_run(folder: Path, model: str, status: str = "finished") -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": status}))
    shutil.copytree(model, folder / "model")
    return folder


def test_a_run_directory_stands_for_the_model_it_made(tmp_path: Path, sft_folder: str) -> None:
    run = make_run(tmp_path / "run", sft_folder)
    assert resolve_model(tiny.source(run)) == str(run / "model")
    assert resolve_model(tiny.source(run / "model")) == str(run / "model")
    assert resolve_model(tiny.source(sft_folder)) == sft_folder


def test_a_missing_folder_lists_the_finished_runs_and_only_those(tmp_path: Path, sft_folder: str) -> None:
    good = make_run(tmp_path / "good", sft_folder)
    bad = make_run(tmp_path / "bad", sft_folder, status="failed")
    with pytest.raises(CheckpointError) as caught:
        resolve_model(tiny.source(tmp_path / "godo"))
    assert str(good) in str(caught.value)
    assert str(bad) not in str(caught.value)


@pytest.mark.parametrize(
    ("gone", "words"), [("model.safetensors", "weights"), ("config.json", "config.json"), ("", "config.json")]
)
def test_a_folder_that_lacks_a_part_is_refused_with_what_is_there(
    gone: str, words: str, tmp_path: Path, sft_folder: str
) -> None:
    folder = tmp_path / "model"
    if gone:
        shutil.copytree(sft_folder, folder)
        (folder / gone).unlink()
    else:
        folder.mkdir()
    with pytest.raises(CheckpointError, match=words) as caught:
        resolve_model(tiny.source(folder))
    assert str(folder) in str(caught.value)
    assert ("tokenizer.json" if gone else "empty folder") in str(caught.value)


def test_a_hub_model_needs_a_pinned_revision() -> None:
    with pytest.raises(CheckpointError, match="revision"):
        resolve_model(ModelSource(path="someone/somemodel"))
    assert resolve_model(ModelSource(path="someone/somemodel", revision="abc")) == "someone/somemodel"


def test_weights_that_do_not_load_are_our_error(tmp_path: Path, sft_folder: str) -> None:
    shutil.copytree(sft_folder, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match="does not load"):
        load_causal(tiny.source(tmp_path / "broken"))


def test_a_model_without_a_tokenizer_is_our_error(tmp_path: Path) -> None:
    tiny.save(tiny.new(), tmp_path / "bare", with_tokenizer=False)
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(tiny.source(tmp_path / "bare"))


def test_a_loaded_model_is_the_saved_one(sft_folder: str) -> None:
    ids = torch.tensor(tiny.rows(1, [12]))
    loaded = load_causal(tiny.source(sft_folder))
    assert torch.equal(loaded(ids).logits, tiny.new(1)(ids).logits)
    assert load_causal(tiny.source(sft_folder, "bfloat16")).dtype == torch.bfloat16


def test_embeddings_grow_and_never_shrink(sft_folder: str) -> None:
    ids = torch.tensor(tiny.rows(1, [12]))
    size = len(tiny.tokenizer())
    plain = load_causal(tiny.source(sft_folder))
    grown = load_causal(tiny.source(sft_folder), vocab_size=size + 7)
    assert grown.get_input_embeddings().weight.shape[0] == size + 7 == grown.config.vocab_size
    assert_close(grown(ids).logits[..., :size], plain(ids).logits)
    grow_embeddings(grown, size)
    assert grown.get_input_embeddings().weight.shape[0] == size + 7


def test_parameters_are_counted() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    assert count_parameters(model) == (3, 11)


# Dropout


def with_dropout(folder: str, target: Path) -> str:
    """Return a copy of a model folder whose configuration has dropout in the attention."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    return str(target)


def noise(model: Any) -> float:
    """Return the largest difference between two forward passes in training mode."""
    ids = torch.tensor(tiny.rows(1, [12]))
    model.train()
    torch.manual_seed(0)
    first, second = (model(ids, use_cache=False).logits.detach() for _ in range(2))
    return float((first - second).abs().max())


def make_causal(folder: str) -> Any:
    return load_causal(tiny.source(folder))


def make_policy(folder: str) -> Any:
    return policy_with_adapter(tiny.source(folder), tiny.LORA)


def make_new_reward_model(folder: str) -> Any:
    return reward_models.new_reward_model(tiny.source(folder), Peft(), pad_id=1, vocab_size=300, seed=1)


@pytest.mark.parametrize("make", [make_causal, make_policy, make_new_reward_model])
def test_no_loader_leaves_dropout_on(make: Any, tmp_path: Path, sft_folder: str) -> None:
    assert noise(make(with_dropout(sft_folder, tmp_path / "noisy"))) == 0.0


def test_a_scorer_is_loaded_with_dropout_off(tmp_path: Path, reward_folder: str) -> None:
    folder = with_dropout(reward_folder, tmp_path / "noisy")
    assert noise(reward_models.load_scorer(tiny.source(folder), trainable=True)) == 0.0
    assert noise(reward_models.load_scorer(tiny.source(folder), trainable=True, peft=tiny.LORA)) == 0.0


def test_the_dropout_check_sees_dropout(tmp_path: Path, sft_folder: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(with_dropout(sft_folder, tmp_path / "noisy"))
    assert noise(model) > 0.01
    disable_dropout(model)
    assert noise(model) == 0.0


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neox"])
def test_dropout_goes_off_however_a_model_stores_it(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
        "opt": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "ffn_dim": 16,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 32,
            "dropout": 0.3,
        },
        "gpt_neox": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "max_position_embeddings": 32,
            "hidden_dropout": 0.3,
        },
    }
    config = AutoConfig.for_model(kind, vocab_size=320, attention_dropout=0.3, **sizes[kind])
    model = AutoModelForCausalLM.from_config(config)
    assert noise(model) > 0.0
    disable_dropout(model)
    assert noise(model) == 0.0


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_the_attention_kernel_is_the_one_asked_for(kernel: str, sft_folder: str, adapter_folder: str) -> None:
    for folder in (sft_folder, adapter_folder):
        source = ModelSource(path=str(folder), attention=kernel)  # type: ignore[arg-type]
        assert load_causal(source).config._attn_implementation == kernel
        reward = reward_models.new_reward_model(
            source, Peft(), pad_id=tiny.renderer().pad_id, vocab_size=len(tiny.tokenizer()), seed=1
        )
        assert reward.config._attn_implementation == kernel


def test_a_kernel_that_is_not_installed_is_our_error(sft_folder: str) -> None:
    with pytest.raises(CheckpointError, match="does not load"):
        load_causal(ModelSource(path=str(sft_folder), attention="flash_attention_2"))
