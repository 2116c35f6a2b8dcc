"""What the memory estimate of a stage depends on: its models, records, sharding and device, read without printing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.config.schema import PPOConfig, StageConfig
from rlhf.console import Console
from rlhf.launch.launcher import LaunchOptions, LaunchPlan, check_batch_shared, resolve_launch
from rlhf.preflight.data_audit import DataAudit, audit_data
from rlhf.preflight.memory_formulas import Sharding
from rlhf.preflight.model_shapes import (
    ModelShape,
    PlannedModel,
    PPOModelShapes,
    base_weights,
    ppo_model_shapes,
    reward_sources,
    trained_model_shape,
)
from rlhf.preflight.stage_memory import DataProfile, EstimateInput
from rlhf.rollout.reward_loading import check_offload, same_tokenizer
from rlhf.stages import lifecycle


def read_estimate_input(name: str, config: Any, sharding: Sharding, *, gpu: bool) -> EstimateInput:
    """Return what the estimate of a stage depends on, for a stage whose models and data exist.

    Args:
        name: name of a stage that trains.
        config: its configuration.
        sharding: of its launch.
        gpu: whether it runs on a GPU.
    Raises: RLHFError for a configuration, model or data file that cannot be read.
    """
    source = config.policy if name == "ppo" else getattr(config, "model", None)
    audit, shared_tokenizer = None, True
    if source is not None and base_weights(source, {})[0] is not None:
        template = lifecycle.read_template(getattr(config, "chat_template", None))
        _, renderer = lifecycle.open_tokenizer(source, Console(quiet=True, main=False), template=template)
        audit, _ = audit_data(name, config, renderer)
        if isinstance(config, PPOConfig):
            shared_tokenizer = all(same_tokenizer(scorer, renderer) for scorer in reward_sources(config)[:1])
    models = model_shapes(name, config, {}, shared_tokenizer)
    return EstimateInput(name, config, models, data_profile(config, audit), sharding, gpu)


def launch_sharding(config: StageConfig, launcher: str | None, processes: int | None, machines: int | None) -> Sharding:
    """Return the sharding of a launch. Raises: ConfigError if the launch is impossible or cannot share the batch."""
    if launcher is None:
        number = processes or 1
        plan = LaunchPlan(Path(), {"distributed_type": "MULTI_GPU"}, number, 1, 0, None, None)
    else:
        address = "machine-0" if machines is None or machines > 1 else None  # a placeholder: nothing is started
        plan = resolve_launch(LaunchOptions(launcher, processes, machines, 0, address), {})
    check_batch_shared(config, plan.processes)
    return Sharding.from_accelerate(plan.settings, plan.processes)


def model_shapes(
    name: str, config: Any, planned: Mapping[str, PlannedModel], shared_tokenizer: bool
) -> ModelShape | PPOModelShapes:
    """Return the shapes of the models of a stage.

    Args:
        name: name of the stage.
        config: its configuration.
        planned: models that earlier stages of a pipeline will create, by path.
        shared_tokenizer: whether PPO's first reward model has the policy's tokenizer.
    Raises: ConfigError for models that are to be offloaded but do not exist.
    """
    if not isinstance(config, PPOConfig):
        return trained_model_shape(name, config, planned)
    shapes = ppo_model_shapes(
        config,
        planned,
        shared_base=_has_shared_base(config, planned),
        shared_tokenizer=shared_tokenizer,
    )
    check_offload(config, 0 if shapes.shared_base else len(shapes.reward_models))
    return shapes


def _has_shared_base(config: PPOConfig, planned: Mapping[str, PlannedModel]) -> bool:
    """Return whether the roles will share a base model.

    For a reward model that does not exist yet it depends on whether its adapter will be of the same kind.
    """
    if not config.peft.enabled or config.roles == "separate":
        return False
    scorer = config.reward_model
    if scorer is not None and not Path(scorer.path).exists() and scorer.path in planned:
        same_base = scorer.quantize == config.policy.quantize
        return same_base and planned[scorer.path].peft.method == config.peft.method
    from rlhf.stages.ppo import decide_shared_base

    return decide_shared_base(config, Console(quiet=True))


def data_profile(config: Any, audit: DataAudit | None) -> DataProfile:
    """Return numbers and lengths of the training records; without an audit, the limits of the configuration."""
    limit = config.data.max_prompt_tokens if isinstance(config, PPOConfig) else config.data.max_length
    if audit is None or not audit.kept:
        return DataProfile(0, 0, limit, 1.0)
    microbatch = config.optim.microbatch_size
    longest, loss = audit.longest(microbatch)
    tokens = sum(n for n, _ in sorted(audit.kept, reverse=True)[:microbatch])
    lengths = tuple(sorted(n for n, _ in audit.kept))
    return DataProfile(len(audit.kept), audit.tokens, longest, loss / max(tokens, 1), lengths)
