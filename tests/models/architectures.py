"""Tiny random models of several architectures, built from their configurations."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY, LAYERS = 64, 2
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 16},  # the attention is wider than the model
    "gemma": GROUPED | {"head_dim": 16},
    "phi": GROUPED,
    "phi3": GROUPED,
    "gpt_neox": COMMON,
    "opt": COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "state_size": 4},
}


def build(name: str, *, classifier: bool = False) -> Any:
    """Return a causal LM, or a classifier with one output, with random weights and dropout off."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from rlhf.models.load import disable_dropout

    torch.manual_seed(1)
    options = OPTIONS[name] | ({"num_labels": 1} if classifier else {})
    auto_class = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model = auto_class.from_config(AutoConfig.for_model(name, **options))
    disable_dropout(model)
    return model.eval()
