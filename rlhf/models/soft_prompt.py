"""Models with a soft prompt (Lester et al. 2021, arXiv:2104.08691): learned embeddings that precede the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config.sections import ModelSource
from rlhf.distributed.engine import wants_bfloat16
from rlhf.models.adapters import load_adapter, saved_adapter_method
from rlhf.models.load import context_length, is_adapter, resolve_model
from rlhf.models.policy import load_causal


def load_for_generation(source: ModelSource, *, vocab_size: int | None = None) -> Any:
    """Load a causal LM to sample from: by `load_causal`, or as a `SoftPrompt` if the model has a soft prompt.

    On a GPU that has bfloat16, `dtype: auto` is bfloat16: nothing is trained, and each token reads every weight.
    """
    from transformers import AutoModelForCausalLM

    if source.dtype == "auto" and wants_bfloat16("auto"):
        source = source.model_copy(update={"dtype": "bfloat16"})
    folder = resolve_model(source)
    if not (is_adapter(folder) and saved_adapter_method(folder) == "prompt"):
        return load_causal(source, vocab_size=vocab_size)
    return SoftPrompt(load_adapter(source, folder, AutoModelForCausalLM, trainable=False))


class SoftPrompt(nn.Module):
    """Causal LM that prepends a soft prompt internally: called like a model without one, it returns no logits for it.

    PEFT's own forward would prepend the prompt to each new token again, and discards the position ids that left-padded
    rows need. Because this module has no `config`, it is decoded with a `BatchCache` and never packed.

    Attributes:
        context: positions that remain for the text, or None if the model does not state its maximum.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base = model.get_base_model()
        prompt: Tensor = model.get_prompt(batch_size=1).detach()
        self.prompt: Tensor
        self.register_buffer("prompt", prompt)  # [1, n, H]
        positions = context_length(self.base)
        self.context = None if positions is None else positions - prompt.shape[1]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Any = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> Any:
        size, number = len(input_ids), self.prompt.shape[1]
        embeddings = self.base.get_input_embeddings()(input_ids)
        positions = position_ids + number
        first = past_key_values is None
        if first:
            embeddings = torch.cat([self.prompt.expand(size, -1, -1).to(embeddings.dtype), embeddings], dim=1)
            before = torch.arange(number, device=positions.device).expand(size, -1)
            positions = torch.cat([before, positions], dim=1)
        output = self.base(
            inputs_embeds=embeddings,
            attention_mask=torch.cat([attention_mask.new_ones(size, number), attention_mask], dim=1),
            position_ids=positions,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            **options,
        )
        if first and not logits_to_keep:
            output.logits = output.logits[:, number:]
        return output
