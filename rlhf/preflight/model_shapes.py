"""Shapes of a stage's models: how many weights are trained and frozen in each role, and which blocks keep activations.

Only the configuration files of models are read, so a 70B model takes as long as a small one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from rlhf.config.run_plan import SupervisedPlan
from rlhf.config.schema import PPOConfig
from rlhf.config.sections import ModelSource, Peft
from rlhf.distributed.library_internals import set_attention
from rlhf.errors import CheckpointError
from rlhf.models import model_metadata
from rlhf.models.adapters import add_adapter, base_source
from rlhf.models.load import backbone, disable_dropout, dtype_of, is_adapter, resolve_model
from rlhf.models.parameter_selection import ParameterMap, map_parameters
from rlhf.preflight.memory_formulas import WeightCounts
from rlhf.trainers.phase_schedule import PhaseSchedule, ResolvedPhase, make_ppo_schedule, make_schedule

PhasePlanner = Callable[[ParameterMap], PhaseSchedule]  # map of the trainable parameters -> their phases
NO_ADAPTER = Peft()


@dataclass(frozen=True)
class PlannedModel:
    """Model that an earlier stage of the pipeline will create."""

    stage: str
    source: ModelSource | None  # the model from which that stage starts; None if it creates a new one
    architecture: Any  # architecture of a new model
    peft: Peft
    reply_tokens: float | None = None  # mean length of the replies on which it is trained


@dataclass(frozen=True)
class TrainablePhase:
    """Trained weights of one phase, and the number of blocks that keep activations for their gradients.

    A block that keeps any activations counts as if all of it were trained.
    """

    first_step: int  # PPO step, or update of another stage
    weights: int
    blocks_with_activations: int


@dataclass(frozen=True)
class ModelShape:
    """Size of one model, and a function that builds it with any number of blocks."""

    name: str
    build: Callable[[int | None], Any]  # number of blocks, None = all -> the model
    config: Any
    weights: WeightCounts  # a weight counts as trained if any phase trains it
    blocks: int
    phases: tuple[TrainablePhase, ...]
    largest_quantized: int = 0  # weights of the largest quantized layer; 0 if no layer is quantized

    def build_for_trace(self, bfloat16: bool) -> Callable[[int | None], Any]:
        """Return `build`, whose quantized weights get the dtype of the passes, so that autocast does not copy them."""

        def build(blocks: int | None) -> Any:
            model = self.build(blocks)
            for parameter in _quantized_weights(model):
                parameter.data = parameter.data.to(torch.bfloat16)
            return model

        return build if bfloat16 and self.largest_quantized else self.build

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary: rows of the embeddings."""
        return int(self.config.vocab_size)


def base_weights(source: ModelSource, planned: Mapping[str, PlannedModel]) -> tuple[ModelSource | None, Any]:
    """Return (source, None) of the full model below any adapters, or (None, architecture) if a stage will create it.

    Args:
        source: the model.
        planned: path -> model that an earlier stage will create.
    Raises: CheckpointError if there is no such model.
    """
    path = source.path.rstrip("/")
    if not Path(path).exists() and path in planned:
        model = planned[path]
        return (None, model.architecture) if model.source is None else base_weights(model.source, planned)
    folder = resolve_model(source)
    return base_weights(base_source(source, folder), planned) if is_adapter(folder) else (source, None)


def model_shape(
    name: str,
    source: ModelSource,
    planned: Mapping[str, PlannedModel],
    *,
    scorer: bool = False,
    peft: Peft = NO_ADAPTER,
    trained: bool = True,
    plan: PhasePlanner | None = None,
) -> ModelShape:
    """Return the shape of a model in one role.

    Args:
        name: name of the role.
        source: the model.
        planned: path -> model that an earlier stage will create.
        scorer: whether it has one output per sequence instead of a language-model head.
        peft: adapter that is added to a trained model.
        trained: whether the model is trained; otherwise it is frozen.
        plan: function that returns the phases of training; None = all weights are trained throughout.
    Raises: CheckpointError if there is no such model; ConfigError for a selection that matches no parameter.
    """
    base, architecture = base_weights(source, planned)
    config = _config(base, architecture)
    attention = None if source.attention == "auto" else source.attention
    dtype = dtype_of(source)

    def build(blocks: int | None) -> Any:
        return _build(config, blocks, scorer, attention, dtype, peft, trained)

    with torch.device("meta"):
        model = build(None)
    parameters, sizes = map_parameters(model), {name: p.numel() for name, p in model.named_parameters()}
    trainable = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    resolved_phases = (
        plan(parameters.only(trainable)).phases if plan is not None else (ResolvedPhase(trainable, 1, 1.0),)
    )
    blocks, first_step, phases = int(config.num_hidden_layers), 0, []
    for resolved in resolved_phases:
        number = sum(sizes[n] for n in resolved.names)
        phases.append(TrainablePhase(first_step, number, _count_differentiated(parameters, resolved.names, blocks)))
        first_step += resolved.length
    ever_trained = sum(sizes[name] for name in frozenset().union(*(resolved.names for resolved in resolved_phases)))
    frozen_bytes = torch.empty((), dtype=dtype).element_size()
    trained_bytes = next((p.element_size() for p in model.parameters() if p.requires_grad), frozen_bytes)
    frozen = sum(sizes.values()) - ever_trained
    quantized = [p.numel() for p in _quantized_weights(model)] if source.quantize is not None else []
    weights = WeightCounts(ever_trained, frozen, trained_bytes, frozen_bytes, sum(quantized))
    return ModelShape(name, build, config, weights, blocks, tuple(phases), max(quantized, default=0))


def _quantized_weights(model: Any) -> list[torch.Tensor]:
    """Return the weights that quantization packs: those of the frozen linear layers of the trunk."""
    from transformers.pytorch_utils import Conv1D

    layers: list[Any] = [m for m in backbone(model).modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    return [layer.weight for layer in layers if not layer.weight.requires_grad]


def _config(base: ModelSource | None, architecture: Any) -> Any:
    if base is None:
        from rlhf.stages.pretrain import new_model

        with torch.device("meta"):
            ends = cast(Any, SimpleNamespace(pad_id=1, end_id=0))
            return new_model(architecture, ends, architecture.vocab_size).config
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(
            resolve_model(base), revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            "the model's configuration cannot be read", found=str(error).split("\n")[0][:200], where=base.path
        ) from None
    return found.get_text_config()


def _build(
    config: Any, blocks: int | None, scorer: bool, attention: str | None, dtype: torch.dtype, peft: Peft, trained: bool
) -> Any:
    import copy

    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = copy.deepcopy(config)
    if blocks is not None:
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None):
            config.layer_types = list(config.layer_types)[:blocks]
    config.num_labels = 1
    if attention is not None:
        set_attention(config, attention)
    auto: Any = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    model = auto.from_config(config, dtype=dtype)
    disable_dropout(model)
    if peft.enabled and trained:
        model = add_adapter(model, peft, "SEQ_CLS" if scorer else "CAUSAL_LM")
    if not trained:
        model.requires_grad_(False)
    return model


def _count_differentiated(parameters: ParameterMap, names: Collection[str], blocks: int) -> int:
    """Return the number of blocks from the lowest one with a trained weight upwards.

    With a trained soft prompt or trained embeddings these are all blocks.
    """
    lowest = min((parameters.places[name].depth for name in names), default=blocks + 1)
    return blocks if lowest == 0 else max(0, blocks + 1 - lowest)


def trained_model_shape(stage: str, config: Any, planned: Mapping[str, PlannedModel]) -> ModelShape:
    """Return the shape of the model that a stage other than PPO trains."""
    if stage == "pretrain":
        new = {config.output_dir: PlannedModel("pretrain", None, config.architecture, NO_ADAPTER)}
        return model_shape("model", ModelSource(path=config.output_dir), {**planned, **new})

    def plan(parameters: ParameterMap) -> PhaseSchedule:
        plan = SupervisedPlan(config.optim, 1, config.optim.batch_size)  # the lengths of phases do not matter here
        return make_schedule(parameters, plan, freeze=config.freeze, unfreeze=config.unfreeze, factors={})

    return model_shape(
        "model", config.model, planned, scorer=stage in ("reward", "classify"), peft=config.peft, plan=plan
    )


@dataclass(frozen=True)
class PPOModelShapes:
    """Shapes of the models of PPO."""

    policy: ModelShape
    value: ModelShape | None  # None: a value head on the policy's trunk, which needs no memory of its own
    reference: ModelShape | None  # None: the policy without its adapter, which needs no memory of its own
    reward_models: tuple[ModelShape, ...]
    shared_base: bool  # value model and reward models are adapters on the policy's base


def ppo_model_shapes(
    config: PPOConfig, planned: Mapping[str, PlannedModel], *, shared_base: bool, shared_tokenizer: bool
) -> PPOModelShapes:
    """Return the shapes of the models of a PPO configuration.

    Args:
        config: configuration of PPO.
        planned: path -> model that an earlier stage will create.
        shared_base: whether the roles share the policy's base model.
        shared_tokenizer: whether the reward model has the policy's tokenizer.
    """

    def plan(role: str, parameters: ParameterMap) -> PhaseSchedule:
        return make_ppo_schedule(
            parameters,
            freeze=getattr(config.freeze, role),
            unfreeze=getattr(config.unfreeze, role),
            steps=config.ppo.steps,
            learning_rate=1.0,
            where=role,
            factors={},
        )

    policy = model_shape("policy", config.policy, planned, peft=config.peft, plan=partial(plan, "policy"))
    kind = config.ppo.value_model
    if kind == "auto":
        kind = "reward" if shared_tokenizer and config.reward_model is not None else "policy"
    start = config.reward_model if kind == "reward" and config.reward_model is not None else config.policy
    value = None
    if kind != "trunk":
        value = model_shape(
            "value model", start, planned, scorer=True, peft=config.peft, plan=partial(plan, "value_model")
        )
    reference = None if config.peft.enabled else model_shape("reference", config.policy, planned, trained=False)
    reward_models = tuple(
        model_shape("reward model", source, planned, scorer=True, trained=False) for source in reward_sources(config)
    )
    return PPOModelShapes(policy, value, reference, reward_models, shared_base)


def reward_sources(config: PPOConfig) -> list[ModelSource]:
    """Return the sources of every model that computes a reward: reward models, ensembles and classifiers."""
    found = [config.reward_model] if config.reward_model is not None else []
    for part in config.rewards:
        found += [
            *([part.model] if part.model else []),
            *part.ensemble,
            *([part.classifier] if part.classifier else []),
        ]
    return found


def expected_reply_tokens(config: Any, planned: Mapping[str, PlannedModel]) -> int | None:
    """Return the mean length in tokens of the responses that PPO's policy gives at the start; None if it is unknown.

    It is the mean length of the replies in the demonstrations on which the policy was trained, or of the responses in
    its last step of PPO, but at least `sampling.min_new_tokens`.
    """
    if not isinstance(config, PPOConfig):
        return None
    path = config.policy.path.rstrip("/")
    if not Path(path).exists() and path in planned:
        found = planned[path].reply_tokens
    else:
        record = model_metadata.read_handover(resolve_model(config.policy))
        found = record.reply_tokens if record is not None else None
    return None if found is None else max(math.ceil(found), config.sampling.min_new_tokens)
