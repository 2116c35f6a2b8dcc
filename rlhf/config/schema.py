"""The configuration of each stage: typed, frozen, unknown keys refused. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlhf.config.labeling import WeakLabelConfig
from rlhf.config.ppo import KL, PPO, PPOOptim, Ptx, RewardSource, Watch
from rlhf.config.sections import (
    Count,
    Data,
    ModelSource,
    NonNegative,
    Optim,
    Peft,
    Positive,
    Sampling,
    Saving,
    Section,
    Source,
)
from rlhf.config.tuning import EMPTY_SELECTION, Freeze, Probe, Selection, TrainingPhase, Unfreeze


class StageConfig(Section):
    """What every stage has."""

    output_dir: str = Field(description="run directory; must be new, or the same interrupted run")
    seed: int = Field(1, description="one seed for data order, initialisation and sampling")
    telemetry: bool = Field(False, description="allow TRL and the hub client to send usage pings")
    deterministic: bool = Field(True, description="use deterministic kernels, so that a seed repeats its numbers")


class TrainingStage(StageConfig):
    """A stage that trains, and can be interrupted."""

    saving: Saving = Saving()


class Architecture(Section):
    """Size of a model made from scratch (Llama type)."""

    vocab_size: Annotated[int, Field(ge=300)] = Field(1024, description="byte-level BPE tokens, specials included")
    hidden_size: Count = Field(128, description="width")
    layers: Count = Field(4, description="transformer blocks")
    heads: Count = Field(4, description="attention heads")
    intermediate_size: Count = Field(384, description="width of the gated MLP")
    context: Count = Field(256, description="positions")


class FineTuningStage(TrainingStage):
    """A stage that fine-tunes a model: which weights, when, and what is watched."""

    freeze: Selection = Field(EMPTY_SELECTION, description="weights that are never trained")
    unfreeze: tuple[TrainingPhase, ...] = Field(
        (),
        description="phases in order, each with its trained weights and length; empty = all at once, for optim.epochs. "
        "The best weights are those of the best evaluation in the last one",
    )
    evaluations: Count = Field(5, description="how often held-out records are read, and checkpoints written")
    probe: Probe = Probe()

    @model_validator(mode="after")
    def _one_length(self) -> FineTuningStage:
        optim, default = getattr(self, "optim"), type(self).model_fields["optim"].default  # noqa: B009
        given = [
            name for name in ("epochs", "max_updates", "patience") if getattr(optim, name) != getattr(default, name)
        ]
        if self.unfreeze and given:
            raise ValueError(f"unfreeze: its phases say how long the run is; take optim.{given[0]} away")
        return self


class PretrainConfig(TrainingStage):
    """Next-token training of a small source model, tokenizer included."""

    architecture: Architecture = Architecture()
    data: Data
    optim: Optim = Optim(learning_rate=1e-3, batch_size=64, microbatch_size=64)


def refuse_soft_prompt(config: RewardConfig | ClassifyConfig | PPOConfig) -> Any:
    """Refuse a soft prompt where an output layer beside the language model's is read.

    Raises: ValueError.
    """
    if config.peft.method == "prompt":
        raise ValueError(
            "peft.method=prompt: a soft prompt stands before the text, where neither a head nor packed rows see it; it "
            "is for SFT only. Set peft.method=ia3 (as small) or lora"
        )
    return config


class SFTConfig(FineTuningStage):
    """Supervised fine-tuning on demonstrations."""

    model: ModelSource
    chat_template: str | None = Field(
        None, description="Jinja file that replaces the tokenizer's chat template, or 'chatml'; later stages inherit it"
    )
    data: Data
    optim: Optim = Optim(learning_rate=2e-5, epochs=2)
    peft: Peft = Peft()
    packing: bool = Field(False, description="fill sequences with several demonstrations (block-diagonal attention)")

    @model_validator(mode="after")
    def _a_prompt_before_each(self) -> SFTConfig:
        if self.packing and self.peft.method == "prompt":
            raise ValueError("packing=true: a soft prompt stands before a row, not before each text in it; set false")
        return self


class RewardConfig(FineTuningStage):
    """Bradley-Terry reward model on preference pairs."""

    model: ModelSource = Field(description="the SFT model: the reward model starts from it")
    data: Data
    optim: Optim = Optim(learning_rate=1e-5, epochs=1, schedule="linear")
    peft: Peft = Peft()
    center: NonNegative = Field(0.0, description="weight of the centring term (chosen + rejected)^2")

    _seen_by_the_head = model_validator(mode="after")(refuse_soft_prompt)


class ClassifyConfig(FineTuningStage):
    """A classifier with N labels: a causal LM's trunk with a new output layer."""

    model: ModelSource = Field(description="causal LM to start from, e.g. the SFT model; all but its output layer")
    labels: tuple[str, ...] = Field((), description="names, in order; empty = those of the training records, sorted")
    multi_label: bool = Field(False, description="any number of labels may hold at once, instead of exactly one")
    class_weights: Literal["equal", "balanced"] | dict[str, Positive] = Field(
        "equal", description="of each label in the loss: equal, balanced (rare labels have as much say), or by name"
    )
    data: Data
    optim: Optim = Optim(learning_rate=1e-5, epochs=1, schedule="linear")
    peft: Peft = Peft()

    _seen_by_the_head = model_validator(mode="after")(refuse_soft_prompt)

    @model_validator(mode="after")
    def _labels_differ(self) -> ClassifyConfig:
        twice = sorted({name for name in self.labels if self.labels.count(name) > 1})
        if twice:
            raise ValueError(f"labels: '{twice[0]}' is named twice")
        return self


class PromptData(Section):
    """Prompts for PPO."""

    prompts: tuple[Source, ...] = Field(min_length=1, description="mixture of prompts")
    max_prompt_tokens: Count = Field(512, description="longest prompt")
    too_long: Literal["error", "drop"] = Field("error", description="what to do with a longer prompt")
    on_bad_row: Literal["error", "drop"] = Field("error", description="what to do with a row that is no prompt")
    deduplicate: bool = Field(True, description="drop exact repeats")


class PPOConfig(TrainingStage):
    """PPO against a reward model, kept near the SFT model."""

    policy: ModelSource = Field(description="the SFT model: where the policy starts, and its reference")
    reward_model: ModelSource | None = Field(
        None, description="scores responses with weight 1; the value model starts from it, or else from the policy"
    )
    rewards: tuple[RewardSource, ...] = Field((), description="further parts of the reward, added by weight")
    data: PromptData
    sampling: Sampling = Sampling()
    ppo: PPO = PPO()
    kl: KL = KL()
    ptx: Ptx = Ptx()
    optim: PPOOptim = PPOOptim()
    freeze: Freeze = Freeze()
    unfreeze: Unfreeze = Unfreeze()
    peft: Peft = Peft()
    roles: Literal["auto", "separate", "shared"] = Field(
        "auto",
        description="shared = one frozen base; policy, value and reward models are adapters with heads, the "
        "reference is the base with the SFT adapter; separate = a model for each; auto = shared if all are adapters of "
        "one base",
    )
    offload: tuple[Literal["reference", "reward"], ...] = Field(
        (),
        description="frozen models that lie in CPU memory but for scoring: less memory on the device, one copy to it a "
        "step; without an accelerator it changes nothing",
    )
    watch: Watch = Watch()
    checkpoint_every: Count = Field(50, description="steps between regular checkpoints, to which a rollback returns")
    sample_every: Count = Field(10, description="steps between written samples")

    _seen_by_the_head = model_validator(mode="after")(refuse_soft_prompt)

    @model_validator(mode="after")
    def _some_reward(self) -> PPOConfig:
        if self.reward_model is None and not self.rewards:
            raise ValueError("no reward: give reward_model, or at least one of rewards")
        return self

    @model_validator(mode="after")
    def _models_to_offload(self) -> PPOConfig:
        if "reference" in self.offload and self.peft.enabled:
            raise ValueError(
                f"offload: reference: there is none, since peft.method={self.peft.method} makes the policy an adapter "
                "over it; take it out"
            )
        if "reward" in self.offload and self.reward_model is None and all(part.function for part in self.rewards):
            raise ValueError("offload: reward: there is no reward model, only functions; take it out")
        return self

    @model_validator(mode="after")
    def _adapters_share(self) -> PPOConfig:
        if self.roles == "shared" and not self.peft.enabled:
            raise ValueError("roles=shared: the roles share a frozen base as adapters; set peft.method=lora")
        return self

    @model_validator(mode="after")
    def _random_rollouts(self) -> PPOConfig:
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature: PPO needs more than 0, it learns from the differences of responses")
        return self


class EvaluateConfig(StageConfig):
    """Compare models on the same prompts."""

    models: dict[str, ModelSource] = Field(min_length=1, description="name -> model, in the order of the pipeline")
    reference: str = Field("sft", description="which of the models KL is measured against")
    prompts: dict[str, Source] = Field(min_length=1, description="split name -> prompts")
    judge: str | None = Field(
        None, description="module:function(prompt, response, record, finished) -> utility; your own code is run"
    )
    measures: dict[str, str] = Field(
        default_factory=dict, description="name -> a function like judge; its mean over the responses is a column"
    )
    reward_model: ModelSource | None = Field(None, description="scored on `preferences`")
    preferences: tuple[Source, ...] = Field((), description="held-out pairs for reward-model accuracy")
    preferences_train: tuple[Source, ...] = Field((), description="pairs to fit the tf-idf baseline on")
    best_of: Annotated[int, Field(ge=0)] = Field(8, description="best of n reference samples by reward; 0 = off")
    text: tuple[Source, ...] = Field((), description="held-out text for perplexity (forgetting)")
    sampling: Sampling = Sampling()
    max_prompt_tokens: Count = Field(512, description="longer prompts are an error")
    bootstrap: Count = Field(2000, description="resamples for the 95 % interval")
    show: Annotated[int, Field(ge=0)] = Field(3, description="prompts shown side by side")

    @model_validator(mode="after")
    def _reference_is_a_model(self) -> EvaluateConfig:
        if self.reference not in self.models:
            raise ValueError(f"reference '{self.reference}' is not one of models: {', '.join(self.models)}")
        return self


class PipelineStage(Section):
    """One stage of a pipeline; every other key overrides the stage's own configuration."""

    enabled: bool = Field(True, description="run this stage")
    config: str = Field(description="the stage's YAML file, relative to the pipeline file")
    launcher: str | None = Field(None, description="accelerate configuration to launch it under; null = this process")


class PipelineConfig(Section):
    """Stages in order, each fed with what the previous one made."""

    output_dir: str = Field(description="holds 0-pretrain/ 1-sft/ 2-reward/ 3-ppo/ 4-evaluate/")
    seed: int | None = Field(None, description="seed of every stage; null = each stage's own")
    pretrain: PipelineStage | None = None
    sft: PipelineStage | None = None
    reward: PipelineStage | None = None
    ppo: PipelineStage | None = None
    evaluate: PipelineStage | None = None


STAGES: dict[str, type[StageConfig]] = {
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "reward": RewardConfig,
    "classify": ClassifyConfig,
    "ppo": PPOConfig,
    "evaluate": EvaluateConfig,
}
RECIPES: dict[str, type[Section]] = {**STAGES, "weak": WeakLabelConfig}  # every kind of file but the pipeline's
SupervisedConfig = PretrainConfig | SFTConfig | RewardConfig | ClassifyConfig
PIPELINE_ORDER = tuple(
    name for name in STAGES if name in PipelineConfig.model_fields
)  # the stages of a pipeline, in order
