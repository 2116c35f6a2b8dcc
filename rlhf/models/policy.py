"""Causal language models to train or to start from: full weights, or an adapter over them."""

from __future__ import annotations

from typing import Any

from rlhf.config.sections import ModelSource, Peft
from rlhf.errors import CheckpointError
from rlhf.models.adapters import REFERENCE_ADAPTER, add_adapter, check_same_shape, load_adapter, saved_adapter_method
from rlhf.models.load import disable_dropout, grow_embeddings, is_adapter, load_pretrained, resolve_model


def load_causal(source: ModelSource, *, vocab_size: int | None = None) -> Any:
    """A causal LM with dropout off; an adapter is merged into its base in memory.

    Args:
        vocab_size: length of the tokenizer; embeddings grow to it if it is larger.
    Raises: CheckpointError if the folder does not hold a loadable model.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve_model(source)
    if is_adapter(folder):
        if saved_adapter_method(folder) == "prompt":
            raise CheckpointError(
                "a soft prompt has no weights to fold into the model",
                found="peft.method=prompt",
                where=folder,
                do="'rlhf generate', 'rlhf chat' and 'rlhf evaluate' read it as it is; train with peft.method=lora or "
                "ia3 for a model that other stages start from",
            )
        model = load_adapter(source, folder, AutoModelForCausalLM, trainable=False).merge_and_unload()
    else:
        model = load_pretrained(AutoModelForCausalLM, source, folder)
    if vocab_size is not None:
        grow_embeddings(model, vocab_size)
    disable_dropout(model)
    return model


def policy_with_adapter(source: ModelSource, peft: Peft) -> Any:
    """A trainable adapter policy; `reference_policy` gives its starting point without a second copy of the base.

    From full weights: a fresh adapter (the reference is the adapter switched off). From an adapter: that adapter
    continues, and a frozen copy of it is the reference, since base weights alone are not the SFT model.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve_model(source)
    if not is_adapter(folder):
        return add_adapter(load_causal(source), peft, "CAUSAL_LM")
    check_same_shape(peft, folder)
    model = load_adapter(source, folder, AutoModelForCausalLM, trainable=True)
    model.load_adapter(folder, REFERENCE_ADAPTER, is_trainable=False)
    model.set_adapter("default")
    return model
