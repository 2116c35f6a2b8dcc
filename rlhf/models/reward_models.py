"""Create and load scorers (reward models, classifiers, value models): a causal LM's trunk with a head of N outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config.sections import ModelSource, Peft
from rlhf.errors import CheckpointError
from rlhf.models.adapters import add_adapter, base_source, check_same_shape, continued_config, fit_vocabulary
from rlhf.models.heads import Float32Head, score_head
from rlhf.models.load import backbone, disable_dropout, grow_embeddings, is_adapter, load_pretrained, resolve_model
from rlhf.models.policy import load_causal


def new_reward_model(source: ModelSource, peft: Peft, *, pad_id: int, vocab_size: int, seed: int) -> Any:
    """Create a reward model from an SFT model: a `new_classifier` with one output, the score."""
    return new_classifier(source, peft, outputs=1, pad_id=pad_id, vocab_size=vocab_size, seed=seed)


def new_classifier(source: ModelSource, peft: Peft, *, outputs: int, pad_id: int, vocab_size: int, seed: int) -> Any:
    """Create a classifier from the unchanged trunk of a causal LM and a new head of N outputs.

    The source may itself be a classifier with any number of labels: its trunk is used; its head, labels and problem
    type are not. The head's weights are drawn from N(0, 1/(H+1)), and it has no bias (Stiennon et al. 2020,
    arXiv:2009.01325; std 1/sqrt(H+1) as in arXiv:2403.17031). If `peft` is enabled and the source is an adapter, that
    adapter is trained further, and the head is trained and saved with it.
    """
    from transformers import AutoModelForSequenceClassification

    folder = resolve_model(source)
    if is_adapter(folder) and peft.enabled:
        adapter = continued_config(peft, folder, "SEQ_CLS")
        base = base_source(source, folder)
        model = load_pretrained(AutoModelForSequenceClassification, base, resolve_model(base))
        fit_vocabulary(model, folder)
        model.config.pad_token_id = pad_id
        _new_head(model, outputs, seed)
        return _continue_adapter(model, adapter, folder)
    if is_adapter(folder):
        merged = load_causal(source)
        model = AutoModelForSequenceClassification.from_config(merged.config, dtype=merged.dtype)
        backbone(model).load_state_dict(backbone(merged).state_dict())
    else:
        model = load_pretrained(AutoModelForSequenceClassification, source, folder)
    grow_embeddings(model, vocab_size)
    model.config.pad_token_id = pad_id  # only after growing: it may be a new token
    disable_dropout(model)
    _new_head(model, outputs, seed)
    return add_adapter(model, peft, "SEQ_CLS") if peft.enabled else model


def new_value_model(source: ModelSource, peft: Peft, *, pad_id: int, vocab_size: int, seed: int) -> Any:
    """Create a value model from the policy's trunk, with a head of zeros: V = 0 everywhere (Ziegler et al. 2019)."""
    model = new_reward_model(source, peft, pad_id=pad_id, vocab_size=vocab_size, seed=seed)
    with torch.no_grad():
        for parameter in score_head(model).parameters():
            parameter.zero_()
    return model


def load_classifier(source: ModelSource, *, role: str = "classifier", do: str = "give one that was trained") -> Any:
    """Load a trained sequence classifier with any number of labels and dropout off; an adapter is merged into its base.

    On a quantized base an adapter stays beside the base, because merging would quantize the sum.

    Args:
        role: what the model is called in messages.
        do: what messages advise.
    Raises: CheckpointError if the folder holds no sequence classifier.
    """
    from transformers import AutoModelForSequenceClassification

    folder = resolve_model(source)
    if is_adapter(folder):
        model = adapted_classifier(source, folder, role, do, trainable=False)
        model = model if source.quantize is not None else model.merge_and_unload()
        disable_dropout(model)
        return model
    model = load_pretrained(AutoModelForSequenceClassification, source, folder)
    architectures = model.config.architectures or []
    if not any("SequenceClassification" in name for name in architectures):
        raise CheckpointError(
            f"not a {role}: its score head would be random", found=", ".join(architectures), where=folder, do=do
        )
    _float32_head(model)
    _restore_head(model, folder)
    disable_dropout(model)
    return model


def load_scorer(source: ModelSource, *, trainable: bool = False, peft: Peft | None = None) -> Any:
    """Load a trained reward model, also as the start of a value model.

    Args:
        trainable: with `peft` enabled, keep the adapter (or add one) for training; otherwise an adapter is merged.
    Raises: CheckpointError if the folder is not a one-output classifier.
    """
    folder = resolve_model(source)
    keep = trainable and peft is not None and peft.enabled
    role, do = "reward model", "train it with 'rlhf reward'"
    if is_adapter(folder) and keep:
        assert peft is not None
        check_same_shape(peft, folder)
        model = adapted_classifier(source, folder, role, do, trainable=True)
    else:
        model = load_classifier(source, role=role, do=do)
    check_one_output(model.config.num_labels, folder)
    if keep and not is_adapter(folder):
        assert peft is not None
        model = add_adapter(model, peft, "SEQ_CLS")
    disable_dropout(model)
    return model


def check_one_output(outputs: int, folder: str) -> None:
    """Check that a reward model has one output.

    Raises: CheckpointError if it has several.
    """
    if outputs != 1:
        raise CheckpointError(
            "a reward model has one output", found=f"{outputs} labels", where=folder, do="train one with 'rlhf reward'"
        )


def saved_head(folder: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the score head in a folder's safetensors files."""
    from safetensors import safe_open

    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                if "score." in name:
                    yield name, tensors.get_tensor(name)


def _float32_head(model: Any) -> None:
    old = model.score
    head = Float32Head(old.in_features, old.out_features, bias=old.bias is not None)
    with torch.no_grad():
        head.weight.copy_(old.weight)
        if old.bias is not None:
            head.bias.copy_(old.bias)
    model.score = head.to(old.weight.device)


def adapted_classifier(source: ModelSource, folder: str, role: str, do: str, *, trainable: bool) -> Any:
    """Load a classifier that was saved as an adapter of a causal LM and a score head, as a PeftModel.

    Args:
        role, do: see `load_classifier`.
    Raises: CheckpointError if the folder has no score head.
    """
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    weights = [tensor for name, tensor in saved_head(folder) if name.endswith("score.weight")]
    if not weights:
        raise CheckpointError(
            f"not a {role}: the adapter has no score head",
            found="an adapter without 'score.weight'",
            where=folder,
            do=do,
        )
    base = base_source(source, folder)
    model = load_pretrained(
        AutoModelForSequenceClassification, base, resolve_model(base), num_labels=int(weights[0].shape[0])
    )
    fit_vocabulary(model, folder)
    _float32_head(model)
    model = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    _restore_head(model, folder)
    return model


def _new_head(model: Any, outputs: int, seed: int) -> None:
    """Replace the loaded head by a new one of N outputs, and reset the configuration's labels and problem type."""
    old = model.score
    model.score = Float32Head(old.in_features, outputs, bias=old.bias is not None).to(old.weight.device)
    _init_head(model.score, seed)
    config = model.config
    config.id2label = {i: f"LABEL_{i}" for i in range(outputs)}
    config.label2id = {name: i for i, name in config.id2label.items()}
    config.problem_type, model.num_labels = None, outputs


def _init_head(score: nn.Linear, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    std = 1.0 / math.sqrt(score.in_features + 1)
    with torch.no_grad():
        score.weight.copy_(torch.randn(score.weight.shape, generator=generator) * std)
        if score.bias is not None:
            score.bias.zero_()


def _continue_adapter(model: Any, config: Any, folder: str) -> Any:
    from peft import get_peft_model, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    disable_dropout(model)
    # PEFT expects a head among the saved weights. An SFT adapter has none, and a classifier's must not be used.
    head = {f"base_model.model.score.{name}": p.detach().clone() for name, p in model.score.named_parameters()}
    wrapped = get_peft_model(model, config)
    saved = load_peft_weights(folder, device="cpu")  # has embeddings and LM head if tokens were added
    weights = head | {n: tensor for n, tensor in saved.items() if "lm_head" not in n and ".score." not in n}
    result = set_peft_model_state_dict(wrapped, weights)
    if result.unexpected_keys:
        raise CheckpointError(
            "the adapter has weights that do not exist in a scorer",
            found=result.unexpected_keys[0],
            where=folder,
            do="train the adapter on the trunk only (peft.target_modules)",
        )
    return wrapped


def _restore_head(model: Any, folder: str) -> None:
    """Read the head again in float32, because `from_pretrained` casts it to the trunk's dtype."""
    head = dict(score_head(model).named_parameters())
    for name, tensor in saved_head(folder):
        for part, parameter in head.items():
            if name.endswith(f"score.{part.rsplit('.', 1)[-1]}") and "original" not in part:
                parameter.data = tensor.to(parameter.device, torch.float32)
