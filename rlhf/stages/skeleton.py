"""The models of a stage as shapes: how many weights are trained and frozen in which role, and what a microbatch keeps.

Nothing is read but configuration files of models, so a 70B model takes as long as a small one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from rlhf.config.schema import ClassifyConfig, PPOConfig, PretrainConfig, RewardConfig, SFTConfig
from rlhf.config.sections import ModelSource, Peft
from rlhf.config.tuning import NOTHING, Selection
from rlhf.errors import CheckpointError
from rlhf.models.adapters import add_adapter, base_source
from rlhf.models.freezing import layout, select
from rlhf.models.load import disable_dropout, dtype_of, is_adapter, resolve
from rlhf.models.memory import Weights

Trains = PretrainConfig | SFTConfig | RewardConfig | ClassifyConfig | PPOConfig
NO_ADAPTER = Peft()


@dataclass(frozen=True)
class Made:
    """A model that an earlier stage of the pipeline will make."""

    stage: str
    source: ModelSource | None  # what it starts from; None if it is made from nothing
    architecture: Any  # then its size
    peft: Peft


@dataclass(frozen=True)
class Skeleton:
    """One model: how to build it with any number of blocks, and what it has."""

    name: str
    build: Callable[[int | None], Any]
    config: Any
    weights: Weights
    blocks: int
    kept: int  # blocks that keep activations

    @property
    def vocabulary(self) -> int:
        """Rows of the embeddings."""
        return int(self.config.vocab_size)


def foundation(source: ModelSource, planned: Mapping[str, Made]) -> tuple[ModelSource | None, Any]:
    """The full weights below a model: their source, or the architecture of one that is yet to be made.

    Args:
        planned: models that earlier stages will make, by path.
    Raises: CheckpointError if there is no such model.
    """
    path = source.path.rstrip("/")
    if not Path(path).exists() and path in planned:
        made = planned[path]
        return (None, made.architecture) if made.source is None else foundation(made.source, planned)
    folder = resolve(source)
    return foundation(base_source(source, folder), planned) if is_adapter(folder) else (source, None)


def skeleton(
    name: str, source: ModelSource, planned: Mapping[str, Made], *, scorer: bool = False, peft: Peft = NO_ADAPTER,
    trained: bool = True, freeze: Selection = NOTHING,
) -> Skeleton:  # fmt: skip
    """A model in one role.

    Args:
        scorer: a trunk with one output instead of a language model.
        trained: else it is frozen.
    Raises: CheckpointError, or ConfigError for a selection that matches nothing.
    """
    base, architecture = foundation(source, planned)
    config = _config(base, architecture)
    attention = None if source.attention == "auto" else source.attention
    dtype = dtype_of(source)

    def build(blocks: int | None) -> Any:
        return _build(config, blocks, scorer, attention, dtype, peft, trained, freeze if blocks is None else NOTHING)

    with torch.device("meta"):
        whole = build(None)
    counts = {True: 0, False: 0}
    for parameter in whole.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    size = torch.empty((), dtype=dtype).element_size()
    wide = next((p.element_size() for p in whole.parameters() if p.requires_grad), size)
    blocks = int(config.num_hidden_layers)
    weights = Weights(counts[True], counts[False], wide, size)
    return Skeleton(name, build, config, weights, blocks, _kept(whole, blocks))


def _config(base: ModelSource | None, architecture: Any) -> Any:
    if base is None:
        from rlhf.stages.pretrain import new_model

        with torch.device("meta"):
            ends = cast(Any, SimpleNamespace(pad_id=1, end_id=0))
            return new_model(architecture, ends, architecture.vocab_size).config
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(
            resolve(base), revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            "the model's configuration cannot be read", found=str(error).split("\n")[0][:200], where=base.path
        ) from None
    return found.get_text_config()


def _build(
    config: Any, blocks: int | None, scorer: bool, attention: str | None, dtype: torch.dtype, peft: Peft, trained: bool,
    freeze: Selection,
) -> Any:  # fmt: skip
    import copy

    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = copy.deepcopy(config)
    if blocks is not None:
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None):
            config.layer_types = list(config.layer_types)[:blocks]
    config.num_labels = 1
    if attention is not None:
        config._attn_implementation = attention
    auto: Any = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    model = auto.from_config(config, dtype=dtype)
    disable_dropout(model)
    if peft.enabled and trained:
        model = add_adapter(model, peft, "SEQ_CLS" if scorer else "CAUSAL_LM")
    if not trained:
        model.requires_grad_(False)
    elif freeze.given:
        frozen = select(freeze, layout(model), "freeze")
        for parameter_name, parameter in model.named_parameters():
            if parameter_name in frozen:
                parameter.requires_grad_(False)
    return model


def _kept(model: Any, blocks: int) -> int:
    """Blocks from the lowest one with a trained weight upwards; a trained soft prompt or embedding keeps all."""
    places = layout(model).places
    depths = [places[name].depth for name, p in model.named_parameters() if p.requires_grad]
    if not depths:
        return 0
    return blocks if min(depths) == 0 else max(0, blocks + 1 - min(depths))


def trains(stage: str, config: Any, planned: Mapping[str, Made]) -> Skeleton:
    """The one model that a stage other than PPO trains. Phases count as if all that they train were trained at once."""
    if stage == "pretrain":
        plan = {config.output_dir: Made("pretrain", None, config.architecture, NO_ADAPTER)}
        return skeleton("model", ModelSource(path=config.output_dir), {**planned, **plan})
    return skeleton(
        "model", config.model, planned, scorer=stage in ("reward", "classify"), peft=config.peft, freeze=config.freeze
    )


@dataclass(frozen=True)
class Cast:
    """The roles of PPO. What is None costs nothing: the reference of an adapter, the trunk of a shared value head."""

    policy: Skeleton
    value: Skeleton | None
    reference: Skeleton | None
    scorers: tuple[Skeleton, ...]
    shared: bool  # value model and scorers are adapters on the policy's base


def cast_of(config: PPOConfig, planned: Mapping[str, Made], *, shared: bool, fits: bool) -> Cast:
    """Of a configuration.

    Args:
        shared: the roles share a base. fits: the reward model reads the policy's tokens.
    """
    policy = skeleton("policy", config.policy, planned, peft=config.peft, freeze=config.freeze.policy)
    kind = config.ppo.value_model
    if kind == "auto":
        kind = "reward" if fits and config.reward_model is not None else "policy"
    start = config.reward_model if kind == "reward" and config.reward_model is not None else config.policy
    value = None
    if kind != "trunk":
        value = skeleton(
            "value model", start, planned, scorer=True, peft=config.peft, freeze=config.freeze.value_model
        )  # fmt: skip
    reference = None if config.peft.enabled else skeleton("reference", config.policy, planned, trained=False)
    scorers = tuple(
        skeleton("reward model", source, planned, scorer=True, trained=False) for source in reward_sources(config)
    )
    return Cast(policy, value, reference, scorers, shared)


def reward_sources(config: PPOConfig) -> list[ModelSource]:
    """Every model that scores."""
    found = [config.reward_model] if config.reward_model is not None else []
    for part in config.rewards:
        found += [
            *([part.model] if part.model else []),
            *part.ensemble,
            *([part.classifier] if part.classifier else []),
        ]
    return found
