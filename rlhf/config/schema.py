"""The configuration class of each stage and of a pipeline. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlhf.config.labeling import WeakLabelConfig
from rlhf.config.ppo import KL, PPO, FrozenDtype, FrozenRole, PPOOptim, PPOSettings, Ptx, RewardSource, Watch
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
    require_adapter_on_quantized,
)
from rlhf.config.tuning import EMPTY_SELECTION, Freeze, Probe, Selection, TrainingPhase, Unfreeze


class StageConfig(Section):
    """Settings that every stage has."""

    output_dir: str = Field(
        description="run directory to write; must be new or empty, or hold the same run, which is then resumed"
    )
    seed: int = Field(1, description="seed of data order, initialisation and sampling")
    telemetry: bool = Field(False, description="allow TRL and the hub client to send usage statistics")
    deterministic: bool = Field(
        True, description="use deterministic kernels, so that the same seed gives the same numbers; may be slower"
    )


class TrainingStage(StageConfig):
    """Settings of every stage that trains: it saves checkpoints and can be interrupted and resumed."""

    saving: Saving = Saving()


class Architecture(Section):
    """Size of a model that is trained from scratch (Llama architecture)."""

    vocab_size: Annotated[int, Field(ge=300)] = Field(
        1024, description="vocabulary size of the byte-level BPE tokenizer, special tokens included"
    )
    hidden_size: Count = Field(128, description="width of the hidden states")
    layers: Count = Field(4, description="number of transformer blocks")
    heads: Count = Field(4, description="number of attention heads")
    intermediate_size: Count = Field(384, description="width of the gated feed-forward layer")
    context: Count = Field(256, description="largest number of positions, in tokens")


class FineTuningStage(TrainingStage):
    """Settings of every supervised fine-tuning stage: which weights are trained, when, and what is evaluated."""

    freeze: Selection = Field(EMPTY_SELECTION, description="weights that are never trained")
    unfreeze: tuple[TrainingPhase, ...] = Field(
        (),
        description="training phases in order, each with its trained weights and length; empty = one phase that trains "
        "all weights for optim.epochs. The best weights are those of the best evaluation in the last phase",
    )
    evaluations: Count = Field(
        5, description="number of evaluations on the held-out records, spread over the run; each saves a checkpoint"
    )
    probe: Probe = Probe()

    _quantized = model_validator(mode="after")(require_adapter_on_quantized)

    @model_validator(mode="after")
    def _one_length(self) -> FineTuningStage:
        optim, default = getattr(self, "optim"), type(self).model_fields["optim"].default  # noqa: B009
        given = [
            name for name in ("epochs", "max_updates", "patience") if getattr(optim, name) != getattr(default, name)
        ]
        if self.unfreeze and given:
            raise ValueError(f"unfreeze: its phases set the length of the run; remove optim.{given[0]}")
        return self


class PretrainConfig(TrainingStage):
    """`rlhf pretrain`: train a small tokenizer and language model from scratch on text."""

    architecture: Architecture = Architecture()
    data: Data
    optim: Optim = Optim(learning_rate=1e-3, batch_size=64, microbatch_size=64)

    @model_validator(mode="before")
    @classmethod
    def _refuse_quantized(cls, values: Any) -> Any:
        model = values.get("model") if isinstance(values, dict) else None
        if isinstance(model, dict) and model.get("quantize") is not None:
            raise ValueError(
                f"model.quantize={model['quantize']}: pretraining creates a new model and trains all of its weights, "
                "which quantized weights do not allow; remove model, and quantize the base of an adapter in sft, "
                "reward, classify or ppo"
            )
        return values


def refuse_soft_prompt(config: RewardConfig | ClassifyConfig | PPOConfig) -> Any:
    """Refuse a soft prompt in stages whose models have a score, value or classification head.

    Raises: ValueError if peft.method is prompt.
    """
    if config.peft.method == "prompt":
        raise ValueError(
            "peft.method=prompt: a soft prompt works in SFT only. Set peft.method=ia3 (about as few parameters) or "
            "lora; models with a head and packed sequences do not support soft prompts"
        )
    return config


class SFTConfig(FineTuningStage):
    """`rlhf sft`: supervised fine-tuning on demonstrations."""

    model: ModelSource
    chat_template: str | None = Field(
        None,
        description="Jinja file with a chat template, or 'chatml' for ChatML, that replaces the tokenizer's own; later "
        "stages inherit it; null = keep the tokenizer's (ChatML if it has none)",
    )
    data: Data
    optim: Optim = Optim(learning_rate=2e-5, epochs=2)
    peft: Peft = Peft()
    packing: bool = Field(
        False,
        description="pack several demonstrations into one sequence of max_length tokens, each attending to itself only",
    )

    @model_validator(mode="after")
    def _no_packed_soft_prompt(self) -> SFTConfig:
        if self.packing and self.peft.method == "prompt":
            raise ValueError(
                "packing=true: peft.method=prompt puts its embeddings in front of a sequence, not of each "
                "demonstration packed into it; set packing=false"
            )
        return self


class RewardConfig(FineTuningStage):
    """`rlhf reward`: train a Bradley-Terry reward model on preference pairs."""

    model: ModelSource = Field(description="the SFT model, which the reward model is initialised from")
    data: Data
    optim: Optim = Optim(learning_rate=1e-5, epochs=1, schedule="linear")
    peft: Peft = Peft()
    center: NonNegative = Field(
        0.0,
        description="weight of the centring term (chosen score + rejected score)^2 in the loss, which keeps scores "
        "near 0; 0 = off",
    )

    _refuse_soft_prompt = model_validator(mode="after")(refuse_soft_prompt)


class ClassifyConfig(FineTuningStage):
    """`rlhf classify`: train a sequence classifier, a causal language model's trunk with a new output layer."""

    model: ModelSource = Field(
        description="causal language model to start from, e.g. the SFT model; its output layer is replaced"
    )
    labels: tuple[str, ...] = Field(
        (),
        description="names of the labels, in the order of the outputs; empty = those of the training records, sorted",
    )
    multi_label: bool = Field(
        False,
        description="true = any number of labels may hold at once (a sigmoid each); false = exactly one holds "
        "(softmax)",
    )
    class_weights: Literal["equal", "balanced"] | dict[str, Positive] = Field(
        "equal",
        description="weights of the labels in the loss: equal; balanced = rare labels weigh as much as frequent ones "
        "in total; or {name: weight}",
    )
    data: Data
    optim: Optim = Optim(learning_rate=1e-5, epochs=1, schedule="linear")
    peft: Peft = Peft()

    _refuse_soft_prompt = model_validator(mode="after")(refuse_soft_prompt)

    @model_validator(mode="after")
    def _refuse_repeated_labels(self) -> ClassifyConfig:
        twice = sorted({name for name in self.labels if self.labels.count(name) > 1})
        if twice:
            raise ValueError(f"labels: '{twice[0]}' is given twice; remove one of them")
        return self


class PromptData(Section):
    """Prompts that PPO samples responses to."""

    prompts: tuple[Source, ...] = Field(min_length=1, description="sources of the prompts")
    max_prompt_tokens: Count = Field(512, description="largest length of a prompt, in tokens")
    too_long: Literal["error", "drop"] = Field(
        "error", description="what happens to a longer prompt: stop with an error, or drop it"
    )
    on_bad_row: Literal["error", "drop"] = Field(
        "error",
        description="what happens to rows that break the record contract: stop with an error that lists them, or drop "
        "and count them by reason",
    )
    deduplicate: bool = Field(True, description="drop exact duplicates of a prompt")


class PPOConfig(TrainingStage):
    """`rlhf ppo`: train the policy with PPO against a reward, with a KL penalty towards the SFT model."""

    policy: ModelSource = Field(
        description="the SFT model: the policy is initialised from it, and a frozen copy of it is the reference"
    )
    reward_model: ModelSource | None = Field(
        None,
        description="reward model that scores responses with weight 1; the value model is initialised from it by "
        "default; null = the reward consists of rewards alone",
    )
    rewards: tuple[RewardSource, ...] = Field(
        (), description="further parts of the reward, each multiplied by its weight and added"
    )
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
        description="how policy, reference, value and reward models are held: separate = one model each; shared = one "
        "frozen base, on which policy, value and reward models are adapters with heads and the reference is the base "
        "with the SFT adapter; auto = shared if all of them are adapters of one base, else separate",
    )
    frozen_dtype: FrozenDtype = "auto"
    offload: tuple[FrozenRole, ...] = Field(
        (),
        description="frozen models to keep in CPU memory except while scoring; saves device memory and costs one copy "
        "to the device per step; has no effect without an accelerator",
    )
    watch: Watch = Watch()
    checkpoint_every: Count = Field(
        50, description="steps between regular checkpoints; a rollback returns to the last of them"
    )
    sample_every: Count = Field(10, description="steps between entries in samples.jsonl (prompts with responses)")

    _refuse_soft_prompt = model_validator(mode="after")(refuse_soft_prompt)
    _quantized = model_validator(mode="after")(require_adapter_on_quantized)

    @property
    def settings(self) -> PPOSettings:
        """The algorithm's settings apart from paths, as `PPOTrainer` takes them."""
        own = {name: getattr(self.ppo, name) for name in PPO.model_fields}
        others = {name: getattr(self, name) for name in PPOSettings.model_fields if name not in own}
        return PPOSettings(**own, **others)

    @model_validator(mode="after")
    def _require_reward(self) -> PPOConfig:
        if self.reward_model is None and not self.rewards:
            raise ValueError("there is no reward: set reward_model, or add at least one entry to rewards")
        return self

    @model_validator(mode="after")
    def _check_offload(self) -> PPOConfig:
        if "reference" in self.offload and self.peft.enabled:
            raise ValueError(
                f"offload: with peft.method={self.peft.method} the reference is the policy's base without the adapter, "
                "not a model of its own; remove 'reference'"
            )
        if "reward" in self.offload and self.reward_model is None and all(part.function for part in self.rewards):
            raise ValueError("offload: there is no reward model, only functions; remove 'reward'")
        return self

    @model_validator(mode="after")
    def _check_roles(self) -> PPOConfig:
        if self.roles == "shared" and not self.peft.enabled:
            raise ValueError("roles=shared: all models are adapters on one frozen base; set peft.method=lora")
        return self

    @model_validator(mode="after")
    def _refuse_greedy_rollouts(self) -> PPOConfig:
        if self.sampling.temperature == 0:
            raise ValueError(
                "sampling.temperature: PPO needs more than 0, because it learns from differences between sampled "
                "responses; set it to 1"
            )
        return self


class EvaluateConfig(StageConfig):
    """`rlhf evaluate`: compare models on the same prompts and write report.html."""

    models: dict[str, ModelSource] = Field(
        min_length=1, description="name -> model, in the order in which the report shows them"
    )
    reference: str = Field(
        "sft", description="name of the model that the others are compared with: win rate and KL divergence"
    )
    prompts: dict[str, Source] = Field(min_length=1, description="name of a split -> source of its prompts")
    judge: str | None = Field(
        None,
        description="Python function as module:function, called as function(prompt, response, record, finished), that "
        "returns the utility of a response; of two responses the one with the higher utility wins; null = no win rate",
    )
    measures: dict[str, str] = Field(
        default_factory=dict,
        description="name -> function with the signature of judge; its mean over the responses becomes a column",
    )
    reward_model: ModelSource | None = Field(None, description="reward model to evaluate on `preferences`; null = none")
    preferences: tuple[Source, ...] = Field(
        (), description="sources of held-out preference pairs, for the accuracy of the reward model"
    )
    preferences_train: tuple[Source, ...] = Field(
        (), description="sources of preference pairs that a tf-idf baseline of the reward model is fitted on"
    )
    best_of: Annotated[int, Field(ge=0)] = Field(
        8, description="n of best-of-n: also evaluate the best of n reference responses by reward; 0 = off"
    )
    text: tuple[Source, ...] = Field(
        (), description="sources of held-out text on which perplexity is measured, to see forgetting"
    )
    sampling: Sampling = Sampling()
    max_prompt_tokens: Count = Field(
        512, description="largest length of a prompt, in tokens; a longer prompt is an error"
    )
    bootstrap: Count = Field(2000, description="number of bootstrap resamples for the 95 % confidence intervals")
    show: Annotated[int, Field(ge=0)] = Field(
        3, description="number of prompts for which the report shows all models' responses side by side"
    )

    _quantized = model_validator(mode="after")(require_adapter_on_quantized)

    @model_validator(mode="after")
    def _reference_is_a_model(self) -> EvaluateConfig:
        if self.reference not in self.models:
            raise ValueError(
                f"reference '{self.reference}' is not one of models: {', '.join(self.models)}; name one of these"
            )
        return self


class PipelineStage(Section):
    """One stage of a pipeline. Every other key overrides a value of the stage's own configuration file."""

    enabled: bool = Field(True, description="whether to run this stage")
    config: str = Field(description="configuration file of the stage, relative to the pipeline file")
    launcher: str | None = Field(
        None,
        description="accelerate configuration to launch the stage with: NAME of configs/accelerate/NAME.yaml, or a "
        "path; null = run in this process",
    )


class PipelineConfig(Section):
    """`rlhf run`: run stages in order; each takes its models from the stages before it."""

    output_dir: str = Field(
        description="folder for the run directories of the stages: 0-pretrain, 1-sft, 2-reward, 3-ppo, 4-evaluate"
    )
    seed: int | None = Field(None, description="seed of every stage; null = each stage uses its own")
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
"""Stage -> its configuration class."""

RECIPES: dict[str, type[Section]] = {**STAGES, "weak": WeakLabelConfig}
"""Kind of configuration file -> its class; all kinds except the pipeline's."""

SupervisedConfig = PretrainConfig | SFTConfig | RewardConfig | ClassifyConfig
PIPELINE_ORDER = tuple(name for name in STAGES if name in PipelineConfig.model_fields)
"""The stages of a pipeline, in the order in which they run."""
