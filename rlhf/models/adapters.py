"""Adapters (LoRA, IA3, soft prompts): create them, load and continue saved ones, and switch between them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rlhf.config.sections import READ_BY, ModelSource, Peft
from rlhf.distributed.library_internals import name_of_active_adapter, switched_adapter
from rlhf.errors import CheckpointError, ConfigError
from rlhf.models.adapter_targets import ALL_LINEAR, ia3_targets, lora_targets
from rlhf.models.load import disable_dropout, grow_embeddings, load_pretrained, resolve_model

REFERENCE_ADAPTER = "reference"
PeftTask = Literal["CAUSAL_LM", "SEQ_CLS"]
METHOD_NAMES = {"LORA": "lora", "IA3": "ia3", "PROMPT_TUNING": "prompt"}  # PEFT's name -> value of peft.method
PEFT_SETTING_NAMES = {
    "r": "r",
    "alpha": "lora_alpha",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "prompt_tokens": "num_virtual_tokens",
}
"""Our settings that determine an adapter's shape -> their names in PEFT's adapter_config.json."""


def base_source(source: ModelSource, folder: str) -> ModelSource:
    """Return the model source of the base model that a saved adapter names.

    Raises: CheckpointError if the adapter names no base model.
    """
    config = _saved_config(folder)
    base = config.get("base_model_name_or_path")
    if not base:
        raise CheckpointError("the adapter does not name its base model", where=folder)
    return source.model_copy(update={"path": base, "revision": config.get("revision")})


def load_adapter(source: ModelSource, folder: str, auto_class: Any, *, trainable: bool, config: Any = None) -> Any:
    """Load the base model and the adapter saved in `folder`, as a PeftModel.

    Args:
        trainable: the adapter's parameters require gradients.
        config: PEFT configuration that replaces the saved one, see `continued_config`.
    """
    from peft import PeftModel, get_peft_model, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    base = base_source(source, folder)
    model = load_pretrained(auto_class, base, resolve_model(base))
    fit_vocabulary(model, folder)
    disable_dropout(model)  # of the base only; the adapter keeps its dropout
    if trainable and saved_adapter_method(folder) == "prompt":  # `from_pretrained` can load a soft prompt only frozen
        model = get_peft_model(model, config)
        set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))
        return model
    return PeftModel.from_pretrained(model, folder, is_trainable=trainable, config=config)


def fit_vocabulary(model: Any, folder: str) -> None:
    """Grow a base model's embeddings to the size saved with an adapter, if its stage had added tokens."""
    from safetensors import safe_open

    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as tensors:
        key = f"base_model.model.{name}.weight"
        if key in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
            grow_embeddings(model, tensors.get_slice(key).get_shape()[0])


def adapter_config(model: Any, peft: Peft, task: PeftTask) -> Any:
    """Return the PEFT configuration of a new adapter.

    With SEQ_CLS the score head is trained and saved as well; otherwise PEFT would freeze a random head.

    Raises: ConfigError if `peft.target_modules` names layers that the model does not have.
    """
    from peft import IA3Config, LoraConfig, PromptTuningConfig, PromptTuningInit

    head = ["score"] if task == "SEQ_CLS" else None
    if peft.method == "prompt":
        return PromptTuningConfig(
            task_type=task, num_virtual_tokens=peft.prompt_tokens, prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB
        )
    if peft.method == "ia3":
        layers, feedforward = ia3_targets(model, peft)
        return IA3Config(task_type=task, target_modules=layers, feedforward_modules=feedforward, modules_to_save=head)
    return LoraConfig(
        r=peft.r,
        lora_alpha=peft.alpha,
        lora_dropout=peft.dropout,
        target_modules=lora_targets(model, peft),
        use_rslora=peft.rslora,
        use_dora=peft.dora,
        task_type=task,
        modules_to_save=head,
    )


def continued_config(peft: Peft, folder: str, task: PeftTask) -> Any:
    """Return the PEFT configuration for training a saved adapter further, with SEQ_CLS together with the score head.

    Raises: ConfigError if the adapter was created with other settings.
    """
    from peft import PeftConfig

    check_same_shape(peft, folder)
    config = PeftConfig.from_pretrained(folder)
    config.task_type, config.modules_to_save = task, ["score"] if task == "SEQ_CLS" else None
    config.inference_mode = False
    if peft.method == "lora":
        config.lora_dropout = peft.dropout
    return config


def add_adapter(model: Any, peft: Peft, task: PeftTask) -> Any:
    """Add a new adapter to a model with full weights, and return the PeftModel.

    LoRA starts with B = 0 and IA3 with factors of 1, so the output does not change at first. A soft prompt starts as
    embeddings of random tokens.
    """
    from peft import get_peft_model

    return get_peft_model(model, adapter_config(model, peft, task))


def adapter_rate_factor(name: str, peft: Peft) -> float:
    """Return the factor of a parameter's learning rate: with LoRA+ (Hayou et al. 2024, arXiv:2402.12354) B's is larger.

    Args:
        name: the parameter's name in a PeftModel.
    """
    return peft.lora_plus if peft.lora_plus is not None and ".lora_B." in name else 1.0


def is_adapter_weight(name: str) -> bool:
    """Return whether a name (of a parameter, or in a saved file) is an adapter weight's.

    Embeddings and heads that are saved together with an adapter are not adapter weights.
    """
    return "lora_" in name or "ia3_" in name


def saved_adapter_method(folder: str) -> str:
    """Return the method of a saved adapter: a value of `peft.method`, or PEFT's name if the method is not supported."""
    kind = str(_saved_config(folder)["peft_type"])
    return METHOD_NAMES.get(kind, kind)


def active_adapter_method(model: Any) -> str:
    """Return the method of a PeftModel's trained adapter, as a value of `peft.method`."""
    return METHOD_NAMES[model.peft_config["default"].peft_type.value]


def check_same_shape(peft: Peft, folder: str) -> None:
    """Check that a saved adapter has the method, shape and layers of `peft`; `all-linear` accepts any layers.

    Raises: ConfigError that names every difference.
    """
    saved = _saved_config(folder)
    pairs: dict[str, tuple[Any, Any]] = {"method": (peft.method, saved_adapter_method(folder))}
    if pairs["method"][0] == pairs["method"][1]:
        keys = {name: key for name, key in PEFT_SETTING_NAMES.items() if name in READ_BY[peft.method]}
        pairs |= {name: (getattr(peft, name), saved.get(key, False)) for name, key in keys.items()}
        if "target_modules" in READ_BY[peft.method] and peft.target_modules != ALL_LINEAR:
            pairs["target_modules"] = (_sorted(peft.target_modules), _sorted(saved["target_modules"]))
    different = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if different:
        saved_settings = [f"{name}={saved_value}" for name, (_, saved_value) in different.items()]
        supported = saved_adapter_method(folder) in METHOD_NAMES.values()
        keep = f"set {' '.join(f'peft.{setting}' for setting in saved_settings)}, or " if supported else ""
        raise ConfigError(
            f"the adapter in {folder} was trained with {', '.join(saved_settings)}",
            found=", ".join(f"peft.{name}={value}" for name, (value, _) in different.items()),
            where=", ".join(f"peft.{name}" for name in different),
            do=f"{keep}peft.method=none to merge it into its base and train all weights",
        )


def _saved_config(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    return found


def _sorted(names: Any) -> Any:
    return names if isinstance(names, str) else sorted(names)


@contextmanager
def reference_policy(model: Any) -> Iterator[Any]:
    """Context manager inside which a policy with an adapter computes as the model that it started from."""
    with use_adapter(model, REFERENCE_ADAPTER if REFERENCE_ADAPTER in model.peft_config else None):
        yield model


@contextmanager
def use_adapter(model: Any, adapter: str | None) -> Iterator[None]:
    """Context manager inside which a PeftModel computes with one of its adapters, or with its base alone (None).

    Nothing is copied and `requires_grad` does not change; PEFT's `set_adapter` would change it.
    """
    with switched_adapter(model, adapter):
        yield


def active_adapter(model: Any) -> str | None:
    """Return the name of the adapter that a PeftModel currently computes with, or None."""
    return name_of_active_adapter(model)


def adapter_parameters(model: Any, adapter: str) -> dict[str, Any]:
    """Return the parameters of one adapter of a PeftModel, by name."""
    return {
        name: p
        for name, p in model.named_parameters()
        if f".{adapter}." in f"{name}." and (is_adapter_weight(name) or "modules_to_save" in name)
    }
