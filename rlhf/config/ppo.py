"""Configuration of PPO's own parts: rewards, KL, the update, what is watched. Imports no torch."""

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


class RewardSource(Section):
    """One part of the reward: exactly one of `model`, `ensemble`, `classifier` and `function`, times `weight`."""

    model: ModelSource | None = Field(None, description="a reward model with one output; its stored scale is used")
    ensemble: tuple[ModelSource, ...] = Field(
        (), description="several reward models read as one, on their stored scales"
    )
    combine: Literal["mean", "worst", "uncertainty"] = Field(
        "mean", description="of an ensemble: mean, minimum, or mean - uncertainty_penalty x variance (arXiv:2310.02743)"
    )
    uncertainty_penalty: NonNegative | None = Field(
        None, description="weight of the ensemble's variance where combine=uncertainty; null = 0.5"
    )
    classifier: ModelSource | None = Field(None, description="a sequence classifier; the reward is P(label)")
    label: str | dict[str, float] | None = Field(
        None, description="which label of the classifier, by name; or {name: weight} for a sum of several"
    )
    function: str | None = Field(
        None, description="module:function(prompt, response, record) -> number; your own code is run"
    )
    weight: float = Field(1.0, description="multiplies this part before the parts are added; may be negative")

    @model_validator(mode="after")
    def _one_kind(self) -> RewardSource:
        kinds = ("model", "ensemble", "classifier", "function")
        given = [name for name in kinds if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(kinds)}; got {', '.join(given) or 'none'}")
        if len(self.ensemble) == 1 or (self.combine != "mean" and not self.ensemble):
            raise ValueError("an ensemble has two members at least, and only an ensemble has a way to combine")
        if self.uncertainty_penalty is not None and self.combine != "uncertainty":
            raise ValueError(f"uncertainty_penalty has no effect with combine={self.combine}: set combine=uncertainty")
        if (self.label is not None) != (self.classifier is not None) or self.label == {}:
            raise ValueError("a classifier needs a label, and only a classifier has one")
        return self


class PPO(Section):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347) as used for language models."""

    steps: Count = Field(200, description="rollouts; each is followed by epochs x minibatches updates")
    rollout_size: Count = Field(512, description="episodes (prompt-response pairs) per step, over all processes")
    epochs: Count = Field(4, description="passes over a rollout")
    minibatches: Count = Field(1, description="optimizer updates per pass")
    clip_range: Positive = Field(0.2, description="policy ratio is clipped to 1 +- this")
    clip_range_high: Positive | None = Field(
        None, description="another limit above 1 (arXiv:2503.14476 uses 0.28); null = clip_range"
    )
    dual_clip: Annotated[float, Field(gt=1.0)] | None = Field(
        None, description="bounds the loss where the advantage is negative (arXiv:1912.09729 uses 3); null = off"
    )
    old_logprobs: Literal["scored", "sampled"] = Field(
        "scored",
        description="of the rollout's policy: computed again by the code of the update, so that the first ratio is "
        "exactly 1; or kept from sampling, which saves a forward pass and must agree within the tolerance of the dtype",
    )
    value_model: Literal["auto", "reward", "policy", "trunk"] = Field(
        "auto",
        description="starts from reward_model; or from the policy's trunk with a head of zeros; or is a head on the "
        "policy's own trunk; auto = reward if there is a reward_model with the policy's tokenizer, else policy",
    )
    value_clip_range: Positive | None = Field(0.2, description="new values are clipped to old +- this; null = off")
    value_coef: NonNegative = Field(0.1, description="weight of the value loss")
    entropy_coef: NonNegative = Field(0.0, description="weight of the entropy bonus; 0 in the literature on text")
    target_kl: Positive | None = Field(
        None, description="nats per token from the rollout's policy; an update that exceeds it ends early; null = off"
    )
    value_warmup: StepCount = Field(0, description="first steps in which only the value model learns, unclipped")
    value_warmup_epochs: Count = Field(4, description="passes over the rollout of such a step")
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None, description="decay per step of averaged policy weights (InstructGPT: 0.992); they become model/"
    )
    gamma: Unit = Field(1.0, description="discount")
    lam: Unit = Field(0.95, description="lambda of generalized advantage estimation")
    whiten_advantages: bool = Field(True, description="mean 0, deviation 1 over the whole rollout and all processes")
    normalize_scores: Literal["stored", "running", "raw"] = Field(
        "stored",
        description="divide the reward by a deviation: that of the reward model on held-out responses, with its mean "
        "taken off (stored); that of all rewards so far, mean kept (running); or nothing (raw)",
    )
    score_clip: Positive | None = Field(None, description="limit of the normalised score, either side; null = off")
    missing_end_penalty: NonNegative = Field(
        1.0, description="subtracted from the score of a response without an end token"
    )
    missing_end_score: float | None = Field(
        None, description="replaces the score of a response without an end token (Ziegler 2019: -1); null = penalty"
    )

    @model_validator(mode="after")
    def _a_pass_that_is_saved(self) -> PPO:
        if self.old_logprobs == "sampled" and self.value_model == "trunk":
            raise ValueError(
                "old_logprobs=sampled saves nothing with value_model=trunk: values and log-probs come from one pass"
            )
        return self

    def check_shared(self, processes: int) -> None:
        """Refuse a rollout that minibatches and processes cannot share equally.

        Raises: ConfigError.
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
    """Penalty towards the reference: k1 in the reward, and optionally k2 or k3 as a loss. Nats."""

    coef: NonNegative = Field(0.05, description="weight of the penalty (the starting value if target is set)")
    target: Positive | None = Field(3.0, description="nats per response the coefficient steers to; null = fixed")
    horizon: Positive = Field(10000.0, description="episodes; smaller reacts faster (Ziegler 2019, arXiv:1909.08593)")
    reward: Literal["k1", "k2", "k3"] = Field("k1", description="estimator inside the reward; only k1 is right there")
    loss: Literal["k2", "k3"] | None = Field(None, description="estimator of a further KL term in the loss; null = off")
    loss_coef: NonNegative = Field(0.0, description="weight of that term")

    @model_validator(mode="after")
    def _k1_in_the_reward(self) -> KL:
        if self.reward != "k1":
            raise ValueError(
                f"kl.reward={self.reward}: a detached {self.reward} in the reward has a gradient that vanishes near "
                "the reference, so it restores nothing there; keep k1, or use kl.loss for k2 and k3"
            )
        if (self.loss is not None) != (self.loss_coef > 0):
            raise ValueError("kl.loss and kl.loss_coef go together: set both or neither")
        return self


class Ptx(Section):
    """PPO-ptx (InstructGPT, arXiv:2203.02155, eq. 2): a next-token loss on text of the source domain as well."""

    coef: NonNegative = Field(0.0, description="weight of the text loss, both losses being means over tokens; 0 = off")
    balance: Positive | None = Field(
        None,
        description="steer coef, from the value above, so that the text gradient has this share of the PPO gradient's "
        "norm; null = coef is fixed",
    )
    data: tuple[Source, ...] = Field((), description="text or conversations, e.g. what the model was pretrained on")
    max_length: Annotated[int, Field(ge=8)] = Field(512, description="tokens per document; longer ones are truncated")
    batch_size: Count = Field(32, description="documents per update, over all processes")

    @model_validator(mode="after")
    def _both_or_neither(self) -> Ptx:
        if (self.coef > 0) != bool(self.data):
            raise ValueError("ptx.coef and ptx.data go together: set both or neither")
        return self


class Watch(Section):
    """What happens when a run goes wrong. A broken invariant is a bug; an unhealthy number may be bad luck."""

    broken: Literal["stop", "continue"] = Field(
        "stop", description="an invariant fails (first ratio not 1, score on padding, ...): stop, or say so and go on"
    )
    unhealthy: Literal["continue", "rollback", "stop"] = Field(
        "continue", description="a number leaves its healthy range: say so; or return to the last good step; or stop"
    )
    rollbacks: Count = Field(3, description="how often a run may return before it stops")
    rate_factor: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.5, description="a rollback multiplies the learning rates by this"
    )
    kl_factor: Annotated[float, Field(ge=1.0)] = Field(1.0, description="a rollback multiplies kl.coef by this")


class PPOOptim(Section):
    """AdamW for policy and value model in one optimizer, two learning rates."""

    learning_rate: Positive = Field(1e-6, description="policy")
    value_learning_rate: Positive = Field(5e-6, description="value model")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="decay to 0 over all updates")
    warmup_fraction: Unit = Field(0.0, description="share of all updates spent warming up")
    weight_decay: NonNegative = Field(0.0, description="decoupled weight decay")
    adam_eps: Positive = Field(1e-5, description="the literature's value for PPO (arXiv:2403.17031)")
    max_grad_norm: Positive = Field(1.0, description="global gradient norm is clipped to this")
    precision: Precision = Field("auto", description=f"of scoring and updates (weights keep theirs); {PRECISION}")
    microbatch_size: Count = Field(16, description="episodes per backward on one process")
    activation_checkpointing: bool = Field(
        False, description="keep only each layer's input for the backward pass: less memory, a third more work"
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
    offload: tuple[FrozenRole, ...] = Field(
        (), description="frozen models that lie in CPU memory except while scoring: less memory on the device"
    )
    watch: Watch = Watch()

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.steps * self.epochs * self.minibatches
