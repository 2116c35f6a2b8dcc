"""The models of a stage as shapes: how many weights are trained and frozen in which role, and what a microbatch keeps.

Nothing is read but configuration files of models, so a 70B model takes as long as a small one.
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
from rlhf.models.load import disable_dropout, dtype_of, is_adapter, resolve_model
from rlhf.models.parameter_selection import ParameterMap, map_parameters
from rlhf.preflight.memory_model import WeightCounts
from rlhf.trainers.phase_schedule import PhaseSchedule, ResolvedPhase, make_ppo_schedule, make_schedule

PhasePlanner = Callable[[ParameterMap], PhaseSchedule]  # of the weights that may be trained at all
NO_ADAPTER = Peft()


@dataclass(frozen=True)
class PlannedModel:
    """A model that an earlier stage of the pipeline will make."""

    stage: str
    source: ModelSource | None  # what it starts from; None if it is made from nothing
    architecture: Any  # then its size
    peft: Peft
    replies: float | None = None  # mean tokens of what it learns to say


@dataclass(frozen=True)
class TrainablePhase:
    """What takes gradients in a phase: so many weights, and the blocks that keep activations for them.

    A block that keeps any counts as if all of it were trained.
    """

    begins: int  # PPO: step
    weights: int
    kept: int


@dataclass(frozen=True)
class ModelShape:
    """One model: how to build it with any number of blocks, and what it has."""

    name: str
    build: Callable[[int | None], Any]
    config: Any
    weights: WeightCounts  # trained = in any phase
    blocks: int
    phases: tuple[TrainablePhase, ...]

    @property
    def vocabulary(self) -> int:
        """Rows of the embeddings."""
        return int(self.config.vocab_size)


def base_weights(source: ModelSource, planned: Mapping[str, PlannedModel]) -> tuple[ModelSource | None, Any]:
    """The full weights below a model: their source, or the architecture of one that is yet to be made.

    Args:
        planned: models that earlier stages will make, by path.
    Raises: CheckpointError if there is no such model.
    """
    path = source.path.rstrip("/")
    if not Path(path).exists() and path in planned:
        made = planned[path]
        return (None, made.architecture) if made.source is None else base_weights(made.source, planned)
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
    """A model in one role.

    Args:
        scorer: a trunk with one output instead of a language model.
        trained: else it is frozen.
        plan: what is trained of it, and when; None = everything throughout.
    Raises: CheckpointError, or ConfigError for a selection that matches nothing.
    """
    base, architecture = base_weights(source, planned)
    config = _config(base, architecture)
    attention = None if source.attention == "auto" else source.attention
    dtype = dtype_of(source)

    def build(blocks: int | None) -> Any:
        return _build(config, blocks, scorer, attention, dtype, peft, trained)

    with torch.device("meta"):
        whole = build(None)
    places, numbers = map_parameters(whole), {name: p.numel() for name, p in whole.named_parameters()}
    free = frozenset(name for name, p in whole.named_parameters() if p.requires_grad)
    stretches = plan(places.only(free)).stretches if plan is not None else (ResolvedPhase(free, 1, 1.0),)
    blocks, begins, phases = int(config.num_hidden_layers), 0, []
    for stretch in stretches:
        phases.append(
            TrainablePhase(begins, sum(numbers[n] for n in stretch.names), _kept(places, stretch.names, blocks))
        )
        begins += stretch.length
    ever = sum(numbers[name] for name in frozenset().union(*(stretch.names for stretch in stretches)))
    size = torch.empty((), dtype=dtype).element_size()
    wide = next((p.element_size() for p in whole.parameters() if p.requires_grad), size)
    weights = WeightCounts(ever, sum(numbers.values()) - ever, wide, size)
    return ModelShape(name, build, config, weights, blocks, tuple(phases))


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


def _kept(of: ParameterMap, names: Collection[str], blocks: int) -> int:
    """Blocks from the lowest one with a trained weight upwards; a trained soft prompt or embedding keeps all."""
    lowest = min((of.places[name].depth for name in names), default=blocks + 1)
    return blocks if lowest == 0 else max(0, blocks + 1 - lowest)


def trained_model_shape(stage: str, config: Any, planned: Mapping[str, PlannedModel]) -> ModelShape:
    """The one model that a stage other than PPO trains."""
    if stage == "pretrain":
        made = {config.output_dir: PlannedModel("pretrain", None, config.architecture, NO_ADAPTER)}
        return model_shape("model", ModelSource(path=config.output_dir), {**planned, **made})

    def plan(of: ParameterMap) -> PhaseSchedule:
        plan = SupervisedPlan(config.optim, 1, config.optim.batch_size)  # lengths do not matter here
        return make_schedule(of, plan, freeze=config.freeze, unfreeze=config.unfreeze, factors={})

    return model_shape(
        "model", config.model, planned, scorer=stage in ("reward", "classify"), peft=config.peft, plan=plan
    )


@dataclass(frozen=True)
class PPOModelShapes:
    """The roles of PPO. What is None costs nothing: the reference of an adapter, the trunk of a shared value head."""

    policy: ModelShape
    value: ModelShape | None
    reference: ModelShape | None
    scorers: tuple[ModelShape, ...]
    shared: bool  # value model and scorers are adapters on the policy's base


def ppo_model_shapes(
    config: PPOConfig, planned: Mapping[str, PlannedModel], *, shared: bool, fits: bool
) -> PPOModelShapes:
    """Of a configuration.

    Args:
        shared: the roles share a base. fits: the reward model reads the policy's tokens.
    """

    def plan(where: str, of: ParameterMap) -> PhaseSchedule:
        freeze, unfreeze = getattr(config.freeze, where), getattr(config.unfreeze, where)
        return make_ppo_schedule(
            of, freeze=freeze, unfreeze=unfreeze, steps=config.ppo.steps, learning_rate=1.0, where=where, factors={}
        )

    policy = model_shape("policy", config.policy, planned, peft=config.peft, plan=partial(plan, "policy"))
    kind = config.ppo.value_model
    if kind == "auto":
        kind = "reward" if fits and config.reward_model is not None else "policy"
    start = config.reward_model if kind == "reward" and config.reward_model is not None else config.policy
    value = None
    if kind != "trunk":
        value = model_shape(
            "value model", start, planned, scorer=True, peft=config.peft, plan=partial(plan, "value_model")
        )
    reference = None if config.peft.enabled else model_shape("reference", config.policy, planned, trained=False)
    scorers = tuple(
        model_shape("reward model", source, planned, scorer=True, trained=False) for source in reward_sources(config)
    )
    return PPOModelShapes(policy, value, reference, scorers, shared)


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


def expected_reply_tokens(config: Any, planned: Mapping[str, PlannedModel]) -> int | None:
    """Mean tokens of what PPO's policy says as it starts: of the demonstrations that it learnt from, or of its last
    step of PPO."""
    if not isinstance(config, PPOConfig):
        return None
    path = config.policy.path.rstrip("/")
    if not Path(path).exists() and path in planned:
        found = planned[path].replies
    else:
        record = model_metadata.read_handover(resolve_model(config.policy))
        found = record.reply_tokens if record is not None else None
    return None if found is None else max(math.ceil(found), config.sampling.min_new_tokens)
