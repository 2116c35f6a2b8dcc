"""One frozen base for PPO's four roles, which differ in their adapters and heads. Adapters are switched, never copied.

    role            adapter                       output layer
    policy          default, trained              the base's own
    reference       reference (the SFT adapter), or none where the SFT model is the base itself
    value model     value_model, trained          a float32 head, trained
    reward models   reward_model_1, ...           a float32 head, frozen

Memory is one base and small adapters instead of a base for every role (PERL, arXiv:2403.10704).
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config.sections import ModelSource
from rlhf.errors import CheckpointError
from rlhf.models.adapters import (
    active_adapter,
    adapter_parameters,
    base_source,
    is_adapter_weight,
    saved_adapter_method,
    use_adapter,
)
from rlhf.models.heads import AdapterScorer, Float32Head
from rlhf.models.load import is_adapter, resolve_model
from rlhf.models.reward_models import saved_head

VALUE, REWARD = "value_model", "reward_model"


def reason_not_shared(policy: ModelSource, scorer: ModelSource, method: str) -> str | None:
    """Return the reason why a scorer cannot be an adapter on the policy's base, as text; None if it can.

    Args:
        method: `peft.method` of the policy; all adapters of a layer must be of one method.
    """
    folder = resolve_model(scorer)
    if not is_adapter(folder):
        return f"{scorer.path} is not an adapter"
    if saved_adapter_method(folder) != method:
        return f"{scorer.path} is an adapter of method {saved_adapter_method(folder)}, the policy's is {method}"
    base, base_of_policy = base_source(scorer, folder).path, policy_base(policy)
    if _resolved(base) != _resolved(base_of_policy):
        return f"{scorer.path} is an adapter of {base}, the policy's base is {base_of_policy}"
    for name in ("dtype", "attention", "quantize"):
        if getattr(policy, name) != getattr(scorer, name):
            return f"{scorer.path} has another {name} than the policy"
    return None


def policy_base(policy: ModelSource) -> str:
    """Return the path of the full weights that the policy is based on."""
    folder = resolve_model(policy)
    return base_source(policy, folder).path if is_adapter(folder) else folder


def enable_activation_checkpointing(model: Any) -> None:
    """Keep only each layer's input for the backward pass, which recomputes the rest (arXiv:1604.06174).

    A layer is recomputed with the adapter of its first computation, whichever adapter is active by then.
    """

    def contexts() -> tuple[Any, Any]:
        recompute = use_adapter(model, active_adapter(model)) if hasattr(model, "peft_config") else nullcontext()
        return nullcontext(), recompute

    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": contexts, "preserve_rng_state": False}
    )


def _resolved(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).exists() else path


def attach_scorer(policy: Any, source: ModelSource, name: str, *, trainable: bool = False) -> AdapterScorer:
    """Load the adapter and the head of a saved scorer onto the policy's base.

    Args:
        policy: PeftModel. name: name of the new adapter.
        trainable: the adapter and the head require gradients.
    Raises: CheckpointError if the folder has no score head, or embeddings that differ from the policy's.
    """
    from peft import PeftConfig, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    folder = resolve_model(source)
    config = PeftConfig.from_pretrained(folder)
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, not trainable
    head = {tensor_name.rsplit(".", 1)[-1]: tensor for tensor_name, tensor in saved_head(folder)}
    if "weight" not in head:
        raise CheckpointError(
            "not a reward model: the adapter has no score head", where=folder, do="train it with 'rlhf reward'"
        )
    weights = {key: w for key, w in load_peft_weights(folder, device="cpu").items() if ".score." not in key}
    own = dict(policy.named_parameters())
    for key in [key for key in weights if not is_adapter_weight(key)]:  # embeddings that grew; the policy has them too
        tensor, existing = weights.pop(key), own.get(key)
        if (
            existing is None
            or existing.shape != tensor.shape
            or not torch.equal(existing.cpu().to(tensor.dtype), tensor)
        ):
            raise CheckpointError(
                "the adapter was saved with weights that differ from those of the policy's base",
                found=key,
                where=folder,
                do="set roles=separate",
            )
    policy.add_adapter(name, config)
    set_peft_model_state_dict(policy, weights, adapter_name=name)
    return _scorer(policy, name, head, trainable)


def attach_new_value_model(policy: Any, folder: str, name: str = VALUE) -> AdapterScorer:
    """Create a value model on the policy's base: an adapter that starts as the policy's, and a head of zeros.

    Args:
        policy: PeftModel. name: name of the new adapter.
        folder: folder of the policy; if it holds an adapter, the value model's adapter starts with its weights.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    config = copy.deepcopy(policy.peft_config["default"])
    config.inference_mode = False
    policy.add_adapter(name, config)
    if is_adapter(folder):
        weights = {key: w for key, w in load_peft_weights(folder, device="cpu").items() if is_adapter_weight(key)}
        set_peft_model_state_dict(policy, weights, adapter_name=name)
    hidden = policy.config.get_text_config().hidden_size
    return _scorer(policy, name, {"weight": torch.zeros(1, hidden)}, trainable=True)


def _scorer(policy: Any, name: str, head: dict[str, Tensor], trainable: bool) -> AdapterScorer:
    outputs, hidden = head["weight"].shape
    score = Float32Head(hidden, outputs, bias="bias" in head)
    score.load_state_dict({part: tensor.float() for part, tensor in head.items()})
    score.requires_grad_(trainable)
    for parameter in adapter_parameters(policy, name).values():
        parameter.requires_grad_(trainable)
    for parameter in adapter_parameters(policy, "default").values():  # adding an adapter may freeze it
        parameter.requires_grad_(True)
    return AdapterScorer(policy, name, score.to(next(policy.parameters()).device))
