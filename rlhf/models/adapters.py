"""Adapters: made fresh, continued from an earlier stage, or kept frozen as the reference."""

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
METHOD_NAMES = {"LORA": "lora", "IA3": "ia3", "PROMPT_TUNING": "prompt"}  # PEFT's names and ours
PEFT_SETTING_NAMES = {
    "r": "r",
    "alpha": "lora_alpha",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "prompt_tokens": "num_virtual_tokens",
}
"""What PEFT calls the settings that give an adapter its shape, in adapter_config.json."""


def base_source(source: ModelSource, folder: str) -> ModelSource:
    """Where the base model of an adapter folder lies.

    Raises: CheckpointError if it is not there.
    """
    config = _saved(folder)
    base = config.get("base_model_name_or_path")
    if not base:
        raise CheckpointError("the adapter does not name its base model", where=folder)
    return source.model_copy(update={"path": base, "revision": config.get("revision")})


def load_adapter(source: ModelSource, folder: str, auto_class: Any, *, trainable: bool, config: Any = None) -> Any:
    """Base model plus the adapter saved in `folder`, as a PeftModel.

    Args:
        config: PEFT configuration that replaces the saved one, see `continued_config`.
    """
    from peft import PeftModel, get_peft_model, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    base = base_source(source, folder)
    model = load_pretrained(auto_class, base, resolve_model(base))
    fit_vocabulary(model, folder)
    disable_dropout(model)  # the base's; the adapter keeps its own
    if trainable and saved_adapter_method(folder) == "prompt":  # which PEFT loads frozen only
        model = get_peft_model(model, config)
        set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))
        return model
    return PeftModel.from_pretrained(model, folder, is_trainable=trainable, config=config)


def fit_vocabulary(model: Any, folder: str) -> None:
    """Grow a base model's embeddings to those saved with an adapter whose stage had added tokens."""
    from safetensors import safe_open

    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as tensors:
        key = f"base_model.model.{name}.weight"
        if key in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
            grow_embeddings(model, tensors.get_slice(key).get_shape()[0])


def adapter_config(model: Any, peft: Peft, task: PeftTask) -> Any:
    """PEFT configuration. SEQ_CLS also trains and saves the score head: without it a random head would be frozen.

    Raises: ConfigError if the model has no layers of the names that are asked for.
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
    """PEFT configuration of a saved adapter that is trained on, the head of SEQ_CLS with it.

    Raises: ConfigError if it was made with other settings.
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
    """Wrap a full model with a fresh adapter. LoRA starts with B = 0 and IA3 with factors of 1, so that the output
    does not change; a soft prompt starts as embeddings of random tokens."""
    from peft import get_peft_model

    return get_peft_model(model, adapter_config(model, peft, task))


def adapter_rate_factor(name: str, peft: Peft) -> float:
    """By what the learning rate of a parameter is multiplied: LoRA+ (Hayou et al. 2024, arXiv:2402.12354) for B.

    Args:
        name: of the parameter in a PeftModel.
    """
    return peft.lora_plus if peft.lora_plus is not None and ".lora_B." in name else 1.0


def is_adapter_weight(name: str) -> bool:
    """Whether a name (of a parameter, or in a saved file) is an adapter's; not embeddings or heads saved beside it."""
    return "lora_" in name or "ia3_" in name


def saved_adapter_method(folder: str) -> str:
    """The method of a saved adapter as `peft.method` names it, or PEFT's own name of one that is not ours."""
    kind = str(_saved(folder)["peft_type"])
    return METHOD_NAMES.get(kind, kind)


def active_adapter_method(model: Any) -> str:
    """The method of a PeftModel's trained adapter, as `peft.method` names it."""
    return METHOD_NAMES[model.peft_config["default"].peft_type.value]


def check_same_shape(peft: Peft, folder: str) -> None:
    """Refuse to continue an adapter under other settings than it was made with. `all-linear` stands for whatever
    layers it has.

    Raises: ConfigError that names every difference.
    """
    saved = _saved(folder)
    pairs: dict[str, tuple[Any, Any]] = {"method": (peft.method, saved_adapter_method(folder))}
    if pairs["method"][0] == pairs["method"][1]:
        keys = {name: key for name, key in PEFT_SETTING_NAMES.items() if name in READ_BY[peft.method]}
        pairs |= {name: (getattr(peft, name), saved.get(key, False)) for name, key in keys.items()}
        if "target_modules" in READ_BY[peft.method] and peft.target_modules != ALL_LINEAR:
            pairs["target_modules"] = (_sorted(peft.target_modules), _sorted(saved["target_modules"]))
    wrong = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if wrong:
        made = [f"{name}={theirs}" for name, (_, theirs) in wrong.items()]
        ours = saved_adapter_method(folder) in METHOD_NAMES.values()
        fit = f"set {' '.join(f'peft.{pair}' for pair in made)}, or " if ours else ""
        raise ConfigError(
            f"the adapter in {folder} was trained with {', '.join(made)}",
            found=", ".join(f"peft.{name}={value}" for name, (value, _) in wrong.items()),
            where=", ".join(f"peft.{name}" for name in wrong),
            do=f"{fit}peft.method=none to fold it into its base and train all weights",
        )


def _saved(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    return found


def _sorted(names: Any) -> Any:
    return names if isinstance(names, str) else sorted(names)


@contextmanager
def reference_policy(model: Any) -> Iterator[Any]:
    """Inside, an adapter policy computes as the model it started from."""
    with use_adapter(model, REFERENCE_ADAPTER if REFERENCE_ADAPTER in model.peft_config else None):
        yield model


@contextmanager
def use_adapter(model: Any, adapter: str | None) -> Iterator[None]:
    """Inside, a PeftModel computes with one of its adapters, or with the bare base (None).

    Nothing is copied and nothing else changes: `set_adapter` of PEFT would also switch what is trainable.
    """
    with switched_adapter(model, adapter):
        yield


def active_adapter(model: Any) -> str | None:
    """Name of the adapter that a PeftModel computes with now, or None."""
    return name_of_active_adapter(model)


def adapter_parameters(model: Any, adapter: str) -> dict[str, Any]:
    """Named parameters of one adapter of a PeftModel."""
    return {
        name: p
        for name, p in model.named_parameters()
        if f".{adapter}." in f"{name}." and (is_adapter_weight(name) or "modules_to_save" in name)
    }
