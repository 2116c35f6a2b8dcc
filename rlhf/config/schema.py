"""The configuration of each stage: typed, frozen, unknown keys refused. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.sections import (
    Count,
    Data,
    Lora,
    ModelSource,
    NonNegative,
    Optim,
    Positive,
    Sampling,
    Section,
    Source,
    Unit,
)


class Stage(Section):
    """What every stage has."""

    output_dir: str = Field(description="run directory; must be new, or the same interrupted run")
    seed: int = Field(1, description="one seed for data order, initialisation and sampling")
    telemetry: bool = Field(False, description="allow TRL and the hub client to send usage pings")
    deterministic: bool = Field(True, description="use deterministic kernels, so that a seed repeats its numbers")


class Architecture(Section):
    """Size of a model made from scratch (Llama type)."""

    vocab_size: Annotated[int, Field(ge=300)] = Field(1024, description="byte-level BPE tokens, specials included")
    hidden_size: Count = Field(128, description="width")
    layers: Count = Field(4, description="transformer blocks")
    heads: Count = Field(4, description="attention heads")
    intermediate_size: Count = Field(384, description="width of the gated MLP")
    context: Count = Field(256, description="positions")


class PretrainConfig(Stage):
    """Next-token training of a small source model, tokenizer included."""

    architecture: Architecture = Architecture()
    data: Data
    optim: Optim = Optim(learning_rate=1e-3, batch_size=64, microbatch_size=64)


class SFTConfig(Stage):
    """Supervised fine-tuning on demonstrations."""

    model: ModelSource
    chat_template: str | None = Field(
        None, description="Jinja file that replaces the tokenizer's chat template, or 'chatml'; later stages inherit it"
    )
    data: Data
    optim: Optim = Optim(learning_rate=2e-5, epochs=2)
    lora: Lora = Lora()
    packing: bool = Field(False, description="fill sequences with several demonstrations (block-diagonal attention)")


class RewardConfig(Stage):
    """Bradley-Terry reward model on preference pairs."""

    model: ModelSource = Field(description="the SFT model: the reward model starts from it")
    data: Data
    optim: Optim = Optim(learning_rate=1e-5, epochs=1, schedule="linear")
    lora: Lora = Lora()
    center: NonNegative = Field(0.0, description="weight of the centring term (chosen + rejected)^2")
    evaluations: Count = Field(5, description="how often held-out accuracy is measured; the best checkpoint is kept")


class PromptData(Section):
    """Prompts for PPO."""

    prompts: tuple[Source, ...] = Field(min_length=1, description="mixture of prompts")
    max_prompt_tokens: Count = Field(512, description="longest prompt")
    too_long: Literal["error", "drop"] = Field("error", description="what to do with a longer prompt")
    on_bad_row: Literal["error", "drop"] = Field("error", description="what to do with a row that is no prompt")
    deduplicate: bool = Field(True, description="drop exact repeats")


class PPO(Section):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347) as used for language models."""

    steps: Count = Field(200, description="rollouts; each is followed by epochs x minibatches updates")
    rollout_size: Count = Field(512, description="episodes (prompt-response pairs) per step, over all processes")
    epochs: Count = Field(4, description="passes over a rollout")
    minibatches: Count = Field(1, description="optimizer updates per pass")
    clip_range: Positive = Field(0.2, description="policy ratio is clipped to 1 +- this")
    value_clip_range: Positive = Field(0.2, description="new values are clipped to old +- this")
    value_coef: NonNegative = Field(0.1, description="weight of the value loss")
    gamma: Unit = Field(1.0, description="discount")
    lam: Unit = Field(0.95, description="lambda of generalized advantage estimation")
    whiten_advantages: bool = Field(True, description="mean 0, deviation 1 over the whole rollout and all processes")
    normalize_scores: bool = Field(True, description="use the reward model's stored mean and deviation on the scores")
    missing_end_penalty: NonNegative = Field(
        1.0, description="subtracted from the score of a response without an end token"
    )


class KL(Section):
    """k1 penalty towards the reference, in the reward. Nats."""

    coef: NonNegative = Field(0.05, description="weight of the penalty (the starting value if target is set)")
    target: Positive | None = Field(3.0, description="nats per response the coefficient steers to; null = fixed")
    horizon: Positive = Field(10000.0, description="episodes; smaller reacts faster (Ziegler 2019, arXiv:1909.08593)")


class PPOOptim(Section):
    """AdamW for policy and value model in one optimizer, two learning rates."""

    learning_rate: Positive = Field(1e-6, description="policy")
    value_learning_rate: Positive = Field(5e-6, description="value model")
    schedule: Literal["linear", "constant"] = Field("linear", description="decay to 0 over all updates")
    warmup_fraction: Unit = Field(0.0, description="share of all updates spent warming up")
    weight_decay: NonNegative = Field(0.0, description="decoupled weight decay")
    adam_eps: Positive = Field(1e-5, description="the literature's value for PPO (arXiv:2403.17031)")
    max_grad_norm: Positive = Field(1.0, description="global gradient norm is clipped to this")
    microbatch_size: Count = Field(16, description="episodes per backward on one process")


class PPOConfig(Stage):
    """PPO against a reward model, kept near the SFT model."""

    policy: ModelSource = Field(description="the SFT model: where the policy starts, and its reference")
    reward_model: ModelSource
    data: PromptData
    sampling: Sampling = Sampling()
    ppo: PPO = PPO()
    kl: KL = KL()
    optim: PPOOptim = PPOOptim()
    lora: Lora = Lora()
    checkpoint_every: Count = Field(50, description="steps between checkpoints")
    sample_every: Count = Field(10, description="steps between written samples")

    @model_validator(mode="after")
    def _one_distribution(self) -> PPOConfig:
        s = self.sampling
        if s.temperature == 0 or s.top_p < 1.0 or s.top_k:
            raise ValueError(
                "sampling: PPO needs temperature > 0, top_p 1 and top_k 0; the log-probabilities of the update would "
                "be those of another distribution than the one sampled from"
            )
        return self


class EvaluateConfig(Stage):
    """Compare models on the same prompts."""

    models: dict[str, ModelSource] = Field(min_length=1, description="name -> model, in the order of the pipeline")
    reference: str = Field("sft", description="which of the models KL is measured against")
    prompts: dict[str, Source] = Field(min_length=1, description="split name -> prompts")
    judge: str | None = Field(
        None, description="module:function(prompt, response, record, finished) -> utility; your own code is run"
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


STAGES: dict[str, type[Stage]] = {
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "reward": RewardConfig,
    "ppo": PPOConfig,
    "evaluate": EvaluateConfig,
}
