"""Load PPO's reward from the configuration: each part with its score scale and tokenizer, which are printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rlhf.config.schema import PPOConfig
from rlhf.config.sections import ModelSource
from rlhf.console import Console
from rlhf.data.render import Renderer, prepare_tokenizer, tokenizer_fingerprint
from rlhf.errors import CheckpointError, ConfigError
from rlhf.models import model_metadata
from rlhf.models.adapters import active_adapter_method
from rlhf.models.heads import score_head
from rlhf.models.load import load_tokenizer, resolve_model
from rlhf.models.reward_models import check_one_output, load_classifier, load_scorer
from rlhf.models.shared_base import REWARD, attach_scorer, reason_not_shared
from rlhf.rollout.rewards import EnsembleReward, FunctionReward, ModelReward, Reward, Rewards, import_reward_function


def build_rewards(config: PPOConfig, renderer: Renderer, console: Console, *, base: Any = None) -> Rewards:
    """Load all parts of the reward, `reward_model` first with weight 1.

    Args:
        renderer: the policy's.
        base: the policy, if models that are adapters of its base shall share it; else None.
    Raises: CheckpointError or ConfigError if a part cannot be loaded or lacks its scale.
    """
    stored = config.ppo.normalize_scores == "stored"
    load = _Loader(config.policy, base)
    parts: list[tuple[float, Reward]] = []
    if config.reward_model is not None:
        parts.append((1.0, _model_reward(config.reward_model, load, renderer, stored, console)))
    for source in config.rewards:
        part: Reward
        if source.model is not None:
            part = _model_reward(source.model, load, renderer, stored, console)
        elif source.ensemble:
            members = tuple(
                _model_reward(m, load, renderer, True, console) for m in source.ensemble
            )  # members need one scale
            penalty = 0.5 if source.uncertainty_penalty is None else source.uncertainty_penalty
            part = EnsembleReward(members, source.combine, penalty)
        elif source.classifier is not None:
            assert source.label is not None
            part = _label_reward(source.classifier, source.label, load, renderer, console)
        else:
            assert source.function is not None
            part = FunctionReward(
                source.function,
                import_reward_function(source.function, what="reward function", where="rewards"),
                renderer,
            )
        parts.append((source.weight, part))
    if len(parts) > 1:
        console.note("reward: " + " + ".join(f"{weight:g} x {part.name}" for weight, part in parts))
    return Rewards(tuple(parts))


def check_offload(config: PPOConfig, own: int) -> None:
    """Check that there is a reward model to offload, if reward models are to be offloaded.

    Args:
        own: number of reward models with weights of their own.
    Raises: ConfigError if all reward models are adapters on the policy's base.
    """
    if "reward" in config.offload and not own:
        raise ConfigError(
            "there is no reward model to offload",
            found="roles are shared: they are adapters on the policy's base",
            where="offload",
            do="remove 'reward' (an adapter takes little memory), or set roles=separate",
        )


def reward_deviation(config: PPOConfig) -> float:
    """Return the deviation that the scores of `reward_model` are divided by; 1 if they are not rescaled by it."""
    if config.reward_model is None or config.ppo.normalize_scores != "stored":
        return 1.0
    return stored_deviation(config.reward_model)


def stored_deviation(source: ModelSource) -> float:
    """Return the standard deviation of scores that is stored with a reward model, or 1 if there is none."""
    record = model_metadata.read_handover(resolve_model(source))
    return record.score_std if record is not None and record.score_std is not None else 1.0


def load_reward_model(source: ModelSource, renderer: Renderer, console: Console, *, stored: bool) -> ModelReward:
    """Load one reward model by itself, frozen.

    Args:
        renderer: the policy's.
        stored: rescale its scores by the mean and deviation that are stored with it.
    Raises: CheckpointError if the folder holds no reward model, or lacks the scale.
    """
    return _model_reward(source, _Loader(source, None), renderer, stored, console)


def same_tokenizer(source: ModelSource, renderer: Renderer) -> bool:
    """Return whether a model has the same tokenizer as `renderer`.

    Raises: CheckpointError if its hand-over record has the same tokenizer but other text-to-token settings.
    """
    record = model_metadata.read_handover(resolve_model(source))
    expected = renderer.identity()
    if record is None:  # not written by `rlhf`: only the tokenizer in its folder can be compared
        return tokenizer_fingerprint(load_tokenizer(source)) == expected["tokenizer_sha256"]
    if record.tokenizer_sha256 != expected["tokenizer_sha256"]:
        return False
    model_metadata.verify_handover(expected, record, where=source.path, role="the reward model")
    return True


def _other_renderer(source: ModelSource, renderer: Renderer, console: Console) -> Renderer | None:
    """Return the model's own renderer if its tokenizer differs from the policy's, else None."""
    if same_tokenizer(source, renderer):
        return None
    tokenizer = load_tokenizer(source)
    prepare_tokenizer(tokenizer)
    console.note(
        f"{source.path} has another tokenizer than the policy: responses are decoded, rendered with its chat template "
        "and tokenised again"
    )
    return Renderer(tokenizer)


class _Loader:
    """Loader of frozen scorers: onto the policy's base if they are adapters of it, else as separate models."""

    def __init__(self, policy: ModelSource, base: Any) -> None:
        self.policy, self.base, self.number = policy, base, 0

    def __call__(self, source: ModelSource, load_separately: Callable[[ModelSource], Any]) -> Any:
        if self.base is None or reason_not_shared(self.policy, source, active_adapter_method(self.base)) is not None:
            return load_separately(source).requires_grad_(False)
        self.number += 1
        return attach_scorer(self.base, source, f"{REWARD}_{self.number}")


def _model_reward(
    source: ModelSource, load: _Loader, renderer: Renderer, stored: bool, console: Console
) -> ModelReward:
    other_renderer = _other_renderer(source, renderer, console)
    model = load(source, load_scorer)
    check_one_output(score_head(model).out_features, source.path)
    part = ModelReward(source.path, model, renderer, other_renderer)
    if not stored:
        return part
    record = model_metadata.read_handover(resolve_model(source))
    if record is None or record.score_mean is None or record.score_std is None:
        raise CheckpointError(
            "the reward model has no stored mean and deviation of its scores",
            where=source.path,
            do="train it with 'rlhf reward', or set ppo.normalize_scores=running or raw",
        )
    console.note(f"scores of {source.path}: (score - {record.score_mean:.3f}) / {record.score_std:.3f}")
    return replace(part, scale=(record.score_mean, record.score_std))


def _label_reward(
    source: ModelSource, label: str | dict[str, float], load: _Loader, renderer: Renderer, console: Console
) -> ModelReward:
    model = load(source, load_classifier)
    record = model_metadata.read_handover(resolve_model(source))
    names = {str(name): int(index) for index, name in model.config.id2label.items()}
    multi_label = model.config.problem_type == "multi_label_classification"
    if record is not None and record.labels is not None:  # an adapter's folder has no config.json
        names, multi_label = {name: index for index, name in enumerate(record.labels)}, bool(record.multi_label)
    weights = label if isinstance(label, dict) else {label: 1.0}
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise CheckpointError(
            f"the classifier has no label '{unknown[0]}'",
            found=", ".join(names),
            where=source.path,
            do="set label to one of the labels found",
        )
    other_renderer = _other_renderer(source, renderer, console)
    formula = " + ".join(f"P({name})" if weight == 1.0 else f"{weight:g} P({name})" for name, weight in weights.items())
    return ModelReward(
        f"{formula} of {source.path}",
        model,
        renderer,
        other_renderer,
        multi_label=multi_label,
        labels=tuple((names[name], weight) for name, weight in weights.items()),
    )
