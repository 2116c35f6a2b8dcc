"""Load causal language models, from full weights or adapters, to train or to start training from."""

from __future__ import annotations

from typing import Any

from rlhf.config.sections import ModelSource, Peft
from rlhf.errors import CheckpointError
from rlhf.models.adapters import REFERENCE_ADAPTER, add_adapter, check_same_shape, load_adapter, saved_adapter_method
from rlhf.models.load import disable_dropout, grow_embeddings, is_adapter, load_pretrained, resolve_model


def load_causal(source: ModelSource, *, vocab_size: int | None = None) -> Any:
    """Load a causal LM with dropout off; an adapter is merged into its base in memory.

    On a quantized base an adapter stays beside the base, because merging would quantize the sum.

    Args:
        vocab_size: length of the tokenizer; smaller embeddings grow to it.
    Raises: CheckpointError if the folder does not hold a loadable model.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve_model(source)
    if is_adapter(folder):
        if saved_adapter_method(folder) == "prompt":
            raise CheckpointError(
                "a soft prompt cannot be merged into the model's weights",
                found="peft.method=prompt",
                where=folder,
                do="use it with 'rlhf generate', 'rlhf chat' or 'rlhf evaluate'; for a model that other stages start "
                "from, train with peft.method=lora or ia3",
            )
        model = load_adapter(source, folder, AutoModelForCausalLM, trainable=False)
        model = model if source.quantize is not None else model.merge_and_unload()
    else:
        model = load_pretrained(AutoModelForCausalLM, source, folder)
    if vocab_size is not None:
        grow_embeddings(model, vocab_size)
    disable_dropout(model)
    return model


def policy_with_adapter(source: ModelSource, peft: Peft) -> Any:
    """Load a policy with a trainable adapter; `reference_policy` gives the reference without a second copy of the base.

    If the source has full weights, a new adapter is added, and the reference is the model with the adapter off. If the
    source is an adapter, it is trained further, and a frozen copy of it gives the reference, because the base alone is
    not the SFT model.
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
