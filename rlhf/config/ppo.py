"""Configuration sections that only PPO has: rewards, KL penalty, update, optimizer, health checks. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.sections import (
    PRECISION,
    Count,
    ModelSource,
    NonNegative,
    Peft,
    Positive,
    Precision,
    Sampling,
    Section,
    Source,
    Unit,
)
from rlhf.config.tuning import Freeze, Unfreeze
from rlhf.errors import ConfigError

StepCount = Annotated[int, Field(ge=0)]
FrozenRole = Literal["reference", "reward"]


FrozenDtype = Annotated[
    Literal["auto", "float32"],
    Field(
        description="dtype in which the linear layers of frozen models and of the bases of adapters are stored: auto = "
        "the computing precision, which halves their memory and changes no number; float32 = as they are loaded"
    ),
]


class RewardSource(Section):
    """One part of the reward: exactly one of `model`, `ensemble`, `classifier` and `function`, times `weight`."""

    model: ModelSource | None = Field(
        None, description="reward model with one output; how its score is normalised follows ppo.normalize_scores"
    )
    ensemble: tuple[ModelSource, ...] = Field(
        (), description="two or more reward models whose scores, each on its stored scale, are combined into one"
    )
    combine: Literal["mean", "worst", "uncertainty"] = Field(
        "mean",
        description="how the scores of an ensemble are combined: mean; worst = minimum; uncertainty = mean - "
        "uncertainty_penalty x variance (arXiv:2310.02743)",
    )
    uncertainty_penalty: NonNegative | None = Field(
        None, description="weight of the ensemble's variance with combine=uncertainty; null = 0.5"
    )
    classifier: ModelSource | None = Field(
        None, description="sequence classifier; the reward is the probability of a label, P(label)"
    )
    label: str | dict[str, float] | None = Field(
        None,
        description="label of the classifier, by name; or {name: weight} for a weighted sum of label probabilities",
    )
    function: str | None = Field(
        None,
        description="Python function as module:function, called as function(prompt, response, record), that returns a "
        "number; its code runs in the training process",
    )
    weight: float = Field(
        1.0, description="factor of this part before the parts are added; negative turns a reward into a penalty"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> RewardSource:
        kinds = ("model", "ensemble", "classifier", "function")
        given = [name for name in kinds if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(kinds)}; got {', '.join(given) or 'none'}")
        if len(self.ensemble) == 1 or (self.combine != "mean" and not self.ensemble):
            raise ValueError("an ensemble needs at least two members, and combine applies to an ensemble only")
        if self.uncertainty_penalty is not None and self.combine != "uncertainty":
            raise ValueError(f"uncertainty_penalty has no effect with combine={self.combine}: set combine=uncertainty")
        if (self.label is not None) != (self.classifier is not None) or self.label == {}:
            raise ValueError("a classifier needs a label, and label applies to a classifier only")
        return self


class PPO(Section):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347) as used for language models."""

    steps: Count = Field(
        200, description="number of PPO steps; a step samples one rollout and makes epochs x minibatches updates on it"
    )
    rollout_size: Count = Field(512, description="episodes (prompt-response pairs) per step, over all processes")
    epochs: Count = Field(4, description="passes over each rollout")
    minibatches: Count = Field(1, description="optimizer updates per pass over the rollout")
    clip_range: Positive = Field(
        0.2, description="the probability ratio new / old policy is clipped to [1 - this, 1 + this] in the policy loss"
    )
    clip_range_high: Positive | None = Field(
        None, description="separate upper limit: clip to 1 + this (arXiv:2503.14476 uses 0.28); null = clip_range"
    )
    dual_clip: Annotated[float, Field(gt=1.0)] | None = Field(
        None,
        description="dual clip: bounds the policy loss at this times |advantage| where the advantage is negative "
        "(arXiv:1912.09729 uses 3); null = off",
    )
    old_logprobs: Literal["scored", "sampled"] = Field(
        "scored",
        description="log-probabilities of the policy that sampled the rollout: scored = computed by a teacher-forced "
        "pass of the code that the update uses, so that the first ratio is exactly 1; sampled = kept from generation, "
        "which saves a forward pass and must agree with a scored one within the tolerance of the dtype",
    )
    value_model: Literal["auto", "reward", "policy", "trunk"] = Field(
        "auto",
        description="how the value model is initialised: reward = a copy of reward_model; policy = a copy of the "
        "policy's trunk with a head of zeros; trunk = no model of its own but a value head on the policy's trunk; "
        "auto = reward if reward_model has the policy's tokenizer, else policy",
    )
    value_clip_range: Positive | None = Field(
        0.2, description="new values are clipped to old values +- this in the value loss, score units; null = off"
    )
    value_coef: NonNegative = Field(0.1, description="weight of the value loss in the total loss")
    entropy_coef: NonNegative = Field(
        0.0, description="weight of the entropy bonus in the total loss; work on language models uses 0"
    )
    target_kl: Positive | None = Field(
        None,
        description="early end of a step: no further updates once the approximate KL divergence from the policy that "
        "sampled the rollout exceeds this, in nats per token; null = off",
    )
    value_warmup: StepCount = Field(
        0, description="number of first steps that train only the value model, without value clipping; 0 = none"
    )
    value_warmup_epochs: Count = Field(4, description="passes over the rollout in a step of the value warm-up")
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None,
        description="decay per step of an exponential moving average of the policy's weights, which is saved as the "
        "final model (InstructGPT: 0.992); null = save the last weights",
    )
    gamma: Unit = Field(1.0, description="discount factor per token")
    lam: Unit = Field(
        0.95, description="lambda of generalized advantage estimation: 0 = one-step error, 1 = whole return"
    )
    whiten_advantages: bool = Field(
        True,
        description="shift and scale the advantages to mean 0 and standard deviation 1, over the whole rollout and "
        "all processes",
    )
    normalize_scores: Literal["stored", "running", "raw"] = Field(
        "stored",
        description="how scores are normalised: stored = subtract the mean and divide by the standard deviation of the "
        "reward model's scores on held-out responses; running = divide by the standard deviation of all scores so far, "
        "without subtracting a mean; raw = not at all",
    )
    score_clip: Positive | None = Field(None, description="normalised scores are clipped to [-this, this]; null = off")
    missing_end_penalty: NonNegative = Field(
        1.0, description="subtracted from the score of a response that does not finish with an end token"
    )
    missing_end_score: float | None = Field(
        None,
        description="replaces the score of a response that does not finish with an end token (Ziegler et al. 2019: "
        "-1); null = subtract missing_end_penalty instead",
    )

    @model_validator(mode="after")
    def _sampled_saves_a_pass(self) -> PPO:
        if self.old_logprobs == "sampled" and self.value_model == "trunk":
            raise ValueError(
                "old_logprobs=sampled saves nothing with value_model=trunk, where one pass gives values and "
                "log-probabilities; set old_logprobs=scored"
            )
        return self

    def check_shared(self, processes: int) -> None:
        """Refuse a rollout that minibatches and processes cannot share equally.

        Raises: ConfigError that names a size that works.
        """
        parts = self.minibatches * processes
        if self.rollout_size % parts:
            raise ConfigError(
                f"a rollout of {self.rollout_size} is not {self.minibatches} minibatches x {processes} processes x a "
                "whole number",
                where="ppo.rollout_size",
                do=f"choose a multiple of {parts}",
            )


class KL(Section):
    """KL penalty that keeps the policy near the reference model. The estimators are k1 = log pi - log pi_ref,
    k2 = k1^2 / 2 and k3 = exp(-k1) - 1 + k1 (see `rlhf.functional.kl_estimate`)."""

    coef: NonNegative = Field(
        0.05,
        description="weight of the KL penalty in the reward, score units per nat; the initial weight if target is set",
    )
    target: Positive | None = Field(
        3.0,
        description="adaptive control: coef is adjusted after each step so that the KL divergence approaches this, in "
        "nats per response; null = coef stays fixed",
    )
    horizon: Positive = Field(
        10000.0,
        description="time scale of the adaptive control, in episodes; smaller adjusts faster (arXiv:1909.08593)",
    )
    reward: Literal["k1", "k2", "k3"] = Field(
        "k1", description="KL estimator of the penalty in the reward; only k1 has a useful gradient there"
    )
    loss: Literal["k2", "k3"] | None = Field(
        None, description="KL estimator of an additional KL term in the loss; null = no such term"
    )
    loss_coef: NonNegative = Field(0.0, description="weight of the additional KL term in the loss")

    @model_validator(mode="after")
    def _k1_in_the_reward(self) -> KL:
        if self.reward != "k1":
            raise ValueError(
                f"kl.reward={self.reward}: a detached {self.reward} in the reward has a gradient that vanishes near "
                "the reference, so it does not pull the policy back there; keep k1, or use kl.loss for k2 and k3"
            )
        if (self.loss is not None) != (self.loss_coef > 0):
            raise ValueError("kl.loss and kl.loss_coef go together: set both or neither")
        return self


class Ptx(Section):
    """PPO-ptx (InstructGPT, arXiv:2203.02155, eq. 2): every update also trains on text of the pretraining domain."""

    coef: NonNegative = Field(
        0.0,
        description="weight of the next-token loss on the text (a mean over tokens, as the policy loss is); 0 = off",
    )
    balance: Positive | None = Field(
        None,
        description="adjust coef, starting from the value above, so that the norm of the text gradient is this "
        "fraction of the norm of the PPO gradient; null = coef stays fixed",
    )
    data: tuple[Source, ...] = Field(
        (), description="sources of text or conversations, e.g. what the model was pretrained on"
    )
    max_length: Annotated[int, Field(ge=8)] = Field(
        512, description="largest length of a document, in tokens; longer documents are truncated"
    )
    batch_size: Count = Field(32, description="documents per update, over all processes")

    @model_validator(mode="after")
    def _both_or_neither(self) -> Ptx:
        if (self.coef > 0) != bool(self.data):
            raise ValueError("ptx.coef and ptx.data go together: set both or neither")
        return self


class Watch(Section):
    """What PPO does when an invariant is broken (a defect of the code or a model) or when a health metric leaves its
    range (which may be bad luck or a bad setting)."""

    broken: Literal["stop", "continue"] = Field(
        "stop",
        description="what happens when an invariant is broken (the first ratio is not 1, a score sits on padding, "
        "...): stop, or log a warning and continue",
    )
    unhealthy: Literal["continue", "rollback", "stop"] = Field(
        "continue",
        description="what happens when a health metric leaves its range: continue = log a warning and continue; "
        "rollback = return to the last regular checkpoint; stop = stop the run",
    )
    rollbacks: Count = Field(3, description="largest number of rollbacks in a run; after that the run stops")
    rate_factor: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.5, description="each rollback multiplies the learning rates by this"
    )
    kl_factor: Annotated[float, Field(ge=1.0)] = Field(1.0, description="each rollback multiplies kl.coef by this")


class PPOOptim(Section):
    """AdamW for policy and value model: one optimizer with a learning rate for each."""

    learning_rate: Positive = Field(1e-6, description="peak learning rate of the policy")
    value_learning_rate: Positive = Field(5e-6, description="peak learning rate of the value model")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="shape of the learning rates after the warm-up; linear and cosine decay to 0"
    )
    warmup_fraction: Unit = Field(
        0.0, description="share of all updates in which the learning rates rise linearly from 0 to their peak"
    )
    weight_decay: NonNegative = Field(0.0, description="decoupled weight decay of AdamW")
    adam_eps: Positive = Field(
        1e-5, description="Adam's epsilon; 1e-5 is the value that PPO implementations use (arXiv:2403.17031)"
    )
    max_grad_norm: Positive = Field(1.0, description="gradients are clipped to this global norm")
    precision: Precision = Field(
        "auto", description=f"dtype of scoring and updates (trained weights keep their dtype); {PRECISION}"
    )
    microbatch_size: Count = Field(
        16,
        description="largest number of episodes per backward pass on one process; smaller saves memory and changes "
        "nothing else",
    )
    microbatch_tokens: Count | None = Field(
        None,
        description="largest number of tokens, prompts included, per backward pass on one process, beside "
        "microbatch_size: long responses then make smaller microbatches, and need no more memory; null = no limit",
    )
    compile: Literal["auto", "always", "off"] = Field(
        "auto",
        description="compile the blocks of policy and value model, which takes a minute and makes updates faster and "
        "smaller: auto = on a GPU, without DeepSpeed and activation checkpointing; always = also on a CPU; off = never",
    )
    activation_checkpointing: bool = Field(
        False,
        description="keep only the input of each layer for the backward pass and recompute the rest: less memory, "
        "about a third more computation",
    )


class PPOSettings(PPO):
    """Everything that decides how PPO trains, and no path: what `rlhf.PPOTrainer` takes.

    The keys of `ppo:` in a YAML file stand at the top, the other sections have their names:
    `PPOSettings(steps=50, rollout_size=128, kl={"target": 4.0}, sampling={"max_new_tokens": 64})`.
    """

    seed: int = Field(1, description="seed of sampling, of the order of prompts and minibatches, and of new weights")
    sampling: Sampling = Sampling()
    kl: KL = KL()
    ptx: Ptx = Ptx()
    optim: PPOOptim = PPOOptim()
    freeze: Freeze = Freeze()
    unfreeze: Unfreeze = Unfreeze()
    peft: Peft = Peft()
    frozen_dtype: FrozenDtype = "auto"
    offload: tuple[FrozenRole, ...] = Field(
        (), description="frozen models that lie in CPU memory except while scoring: less memory on the device"
    )
    watch: Watch = Watch()
