"""Output heads on a causal LM's trunk, and their outputs in float32.

Positions are found from the mask, never from token ids, so that the pad token may equal any other token.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models.adapters import use_adapter
from rlhf.models.packed_batch import PackedBatch, can_pack, trunk_states


class Float32Head(nn.Linear):
    """Linear output layer that computes in float32, whatever the trunk's dtype, and also under autocast.

    In bfloat16, scores between 4 and 8 would be multiples of 0.03. In a saved model it is an ordinary linear layer.
    """

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.float(), self.weight, self.bias)


class SharedValueHead(nn.Module):
    """Value head on the policy's last hidden states, without a trunk of its own. At the start V = 0 everywhere.

    It saves memory, but the gradient of the value loss (weighted by ppo.value_coef) also changes the policy's trunk.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.score = Float32Head(hidden_size, 1)
        with torch.no_grad():
            for parameter in self.score.parameters():
                parameter.zero_()

    def save_pretrained(self, folder: str) -> None:
        """Write the head alone; it can only be used together with the policy that it was trained with."""
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.contiguous() for k, v in self.state_dict().items()}, str(Path(folder) / "value_head.safetensors")
        )


class AdapterScorer(nn.Module):
    """Scorer that consists of a head and an adapter on another model's base; see `rlhf.models.shared_base`.

    Attributes:
        score: the head, float32.
        adapter: name of the adapter in `base`.
        base: PeftModel that has the adapter. It is the policy's, so it is not registered as a submodule.
    """

    def __init__(self, base: Any, adapter: str, score: Float32Head) -> None:
        super().__init__()
        self.score, self.adapter = score, adapter
        self._base = [base]  # in a list, so that `parameters()` does not include the base's

    @property
    def base(self) -> Any:
        """Return the PeftModel that has the adapter."""
        return self._base[0]

    @property
    def config(self) -> Any:
        """Return the configuration of the base."""
        return self.base.config

    def save_pretrained(self, folder: str) -> None:
        """Write the adapter and the head as PEFT writes those of a sequence classifier; `load_scorer` can read them."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        weights = get_peft_model_state_dict(self.base, adapter_name=self.adapter)
        weights = {name: w for name, w in weights.items() if "lm_head" not in name}  # present if tokens were added
        weights |= {f"base_model.model.score.{name}": p.detach() for name, p in self.score.named_parameters()}
        config = copy.copy(self.base.peft_config[self.adapter])
        config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", ["score"], True
        Path(folder).mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        save_file(
            {name: w.contiguous().cpu() for name, w in weights.items()}, str(Path(folder) / "adapter_model.safetensors")
        )


def rescale_head(model: Any, deviation: float) -> None:
    """Divide the outputs of a scorer by a deviation (score units), by dividing the parameters of its head."""
    with torch.no_grad():
        for parameter in score_head(model).parameters():
            parameter.div_(deviation)


def score_head(model: Any) -> Any:
    """Return the output layer of a scorer, which may be a PeftModel."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.score


def head_dtype(model: Any) -> str:
    """Return the name of the dtype of a scorer's head, such as "float32"."""
    return str(next(score_head(model).parameters()).dtype).removeprefix("torch.")


def trunk_owner(model: Any) -> Any:
    """Return the model whose trunk a scorer uses: the scorer itself, or the base of its adapter."""
    return model.base if isinstance(model, AdapterScorer) else model


def token_outputs(model: Any, batch: PackedBatch, where: Tensor | None = None) -> Tensor:
    """Return the head's N outputs at positions of each sequence.

    Args:
        where: [B, M] int64, columns of the padded batch to read; None = all T.
    Returns: [B, M, N] float32; meaningless where the sequences' mask is False.
    """
    if isinstance(model, AdapterScorer):
        with use_adapter(model.base, model.adapter):
            states = trunk_states(model.base, batch, where)
    else:
        states = trunk_states(model, batch, where)
    outputs: Tensor = score_head(model)(states)
    return outputs


def token_scores(model: Any, batch: PackedBatch, where: Tensor | None = None) -> Tensor:
    """Return `token_outputs` of a head with one output: [B, M] float32, score units."""
    return token_outputs(model, batch, where).squeeze(-1)


def sequence_outputs(model: Any, ids: Tensor, mask: Tensor, *, packed: bool | None = None) -> Tensor:
    """Return the N outputs of each sequence, read at its last real token: [B, N] float32.

    Args:
        ids: [B, T] int64. mask: [B, T] bool, True = real token (padding on either side).
        packed: whether to pack the sequences; None = if the model computes the same on packed rows.
    """
    if packed is None:
        packed = can_pack(trunk_owner(model))
    batch = PackedBatch.of(ids, mask, packed=packed)
    return token_outputs(model, batch, last_index(mask)[:, None]).squeeze(1)


def sequence_scores(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the score of each sequence, read at its last real token.

    Args:
        ids: [B, T] int64. mask: [B, T] bool.
    Returns: [B] float32, score units. Independent of the amount and side of padding, also when pad = end token.
    """
    return sequence_outputs(model, ids, mask).squeeze(1)


def last_index(mask: Tensor) -> Tensor:
    """Return the index of the last True of each row: [B, T] bool -> [B] int64."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (positions * mask.long()).amax(dim=1)


def position_ids(mask: Tensor) -> Tensor:
    """Return position ids that do not count left padding: [B, T] bool -> [B, T] int64."""
    return (mask.long().cumsum(dim=1) - 1).clamp_min(0)
