"""The PPO training loop for language models: sample, score, update, report, checkpoint.

Policy and value model are one module under one optimizer and one engine. After scoring, every rank holds the experience
of all ranks (it is small), so minibatches, whitening and token counts do not depend on the number of processes. Each
loss is a sum over tokens divided by the token count of the minibatch over all processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config.ppo import PPOSettings
from rlhf.config.run_plan import PPOPlan
from rlhf.console import Console
from rlhf.data.records import Prompt
from rlhf.distributed import engine
from rlhf.distributed.engine_limits import check_deepspeed
from rlhf.distributed.heartbeat import report_progress
from rlhf.distributed.launch_env import is_main_process
from rlhf.functional import adaptive_kl
from rlhf.generation.interface import Generator
from rlhf.generation.native import NativeGenerator
from rlhf.models.ema import WeightAverage
from rlhf.models.load import check_context, context_length
from rlhf.models.offload import OffloadedModels
from rlhf.models.quantization import least_precise_dtype
from rlhf.rollout.types import Experience, Rollout
from rlhf.runs.memory_phase import phase
from rlhf.trainers.lr_schedule import schedule_factor
from rlhf.trainers.ppo import health, inputs
from rlhf.trainers.ppo.callbacks import PPOCallback
from rlhf.trainers.ppo.compilation import compile_trained_blocks
from rlhf.trainers.ppo.export import save_trained_models
from rlhf.trainers.ppo.gradients import MinibatchGradients, accumulate_gradients
from rlhf.trainers.ppo.phases import PPOPhases
from rlhf.trainers.ppo.policy_for_sampling import PolicyForSampling
from rlhf.trainers.ppo.policy_value import PolicyAndValue
from rlhf.trainers.ppo.ptx import PtxMixture
from rlhf.trainers.ppo.scoring import ScoreChecks, score_experience
from rlhf.trainers.ppo.state import PPOModels, PPOState, StepProgress, load_state, save_state, update_stats
from rlhf.trainers.ppo.stats import StepStats, rollout_stats
from rlhf.trainers.sample_order import cyclic_indices, shuffled_indices


class PPOTrainer:
    """Trainer of a causal language model by proximal policy optimization (PPO) against a reward.

        trainer = PPOTrainer(policy="models/sft", reward=reward_function, prompts=["Hello?"], settings=PPOSettings())
        trainer.train()
        trainer.save_pretrained("out")

    `train` is the whole algorithm, and the other methods are its parts. Attributes: `state`, `models`, `settings`, and
    `history`, the metrics of every step by their names in metrics.jsonl.
    """

    def __init__(
        self,
        policy: inputs.PolicyInput,
        reward: inputs.RewardInput,
        prompts: inputs.PromptInput | inputs.TokenizedPrompts,
        settings: PPOSettings | None = None,
        *,
        tokenizer: Any = None,
        reference: inputs.PolicyInput | None = None,
        value_model: inputs.PolicyInput | None = None,
        text: PtxMixture | None = None,
        max_prompt_tokens: int = 512,
        callbacks: Sequence[PPOCallback] = (),
        monitor: health.HealthMonitor | None = None,
        console: Console | None = None,
    ) -> None:
        """Load and check the arguments, and prepare models and optimizer.

        Args:
            policy: folder or hub id of a causal language model, or the model itself, which is then trained in place.
            reward: folder of a reward model, a reward model, or a function (prompt, response, record) -> number; prompt
                is a list of {"role", "content"} messages, record is the prompt's record in `prompts`.
            prompts: file of prompts, or a list of texts, of conversations or of records.
            settings: settings of PPO; None = the defaults.
            tokenizer: the policy's; None = the one in its folder. A missing chat template or pad token is added.
            reference: model of the KL penalty; None = a frozen copy of the policy (for an adapter: its starting point).
            value_model: folder or model with one output; None = from the reward model if that comes from a folder, else
                the policy's trunk with a head of zeros.
            text: documents of the ptx loss, or None.
            max_prompt_tokens: largest length of a prompt; a longer one is an error.
            callbacks: called after steps and at safe points.
            monitor: reacts to broken invariants and metrics outside their range; None = one for `settings.watch`.
            console: where notes and progress are printed; None = this terminal.
        Raises: ConfigError, DataError or CheckpointError for arguments that are wrong or do not fit together.
        """
        self.settings = settings = settings if settings is not None else PPOSettings()
        self.console = console if console is not None else Console(main=is_main_process())
        self.callbacks, self.text, self.history = list(callbacks), text, list[dict[str, float]]()
        self.monitor = monitor if monitor is not None else health.HealthMonitor(settings.watch, None, self.console.note)
        check_deepspeed(settings)
        self.renderer = inputs.as_renderer(tokenizer, policy, self.console)
        self.prompts = inputs.as_prompts(prompts, self.renderer, max_prompt_tokens, settings.seed, self.console)
        given = inputs.GivenModels(policy, reward, reference, value_model)
        size = None if self.renderer is tokenizer else len(self.renderer.tokenizer)
        pair, frozen, rewards = inputs.load_models(given, settings, self.renderer, self.console, vocab_size=size)
        longest = max(len(ids) for ids in self.prompts.ids) + settings.sampling.max_new_tokens
        check_context(longest, context_length(pair.policy), "longest prompt + sampling.max_new_tokens")
        if settings.optim.activation_checkpointing:
            pair.recompute_activations()
        report_progress()
        # After the models: once an Accelerator with ZeRO-3 exists, transformers loads shards, which no head fits.
        a = self.accelerator = engine.make_accelerator(
            find_unused_parameters=bool(settings.unfreeze.policy or settings.unfreeze.value_model)
        )
        report_progress()
        engine.set_deepspeed_batch_size(a, settings.optim.microbatch_size, settings.optim.max_grad_norm)
        settings.check_shared(a.num_processes)
        compile_trained_blocks(pair, settings.optim, a.device.type, longest, self.console)
        self.phases = PPOPhases(settings, pair)
        own_dtype = least_precise_dtype(pair.policy, next(pair.policy.parameters()).dtype)
        dtype = torch.bfloat16 if pair.computes_in_bfloat16 else own_dtype
        self.tolerance = health.TOLERANCES.get(dtype, health.TOLERANCES[torch.bfloat16])
        if settings.old_logprobs == "sampled":  # the first ratio is only as exact as sampling
            self.tolerance = replace(self.tolerance, ratio=self.tolerance.sampling)
        self.state = PPOState(kl_coef=settings.kl.coef)
        self.models = self._prepare(pair, frozen, rewards)
        self.policy_for_sampling = PolicyForSampling(self.models)
        self.generator: Generator = NativeGenerator(
            self.sampling_policy,
            settings.sampling,
            seed=settings.seed,
            end_id=self.renderer.end_id,
            pad_id=self.renderer.pad_id,
            device=a.device,
            decode=self.renderer.tokenizer.decode,
            log=self.console.note,
        )

    def _prepare(self, pair: PolicyAndValue, reference: nn.Module | None, rewards: Any) -> PPOModels:
        """Create the optimizer, wrap the trained pair in its engine, and place the frozen models or offload them."""
        a, optim = self.accelerator, self.settings.optim
        optimizer = torch.optim.AdamW(
            self.phases.optimizer_groups(), eps=optim.adam_eps, weight_decay=optim.weight_decay, fused=True
        )
        policy_and_value, optimizer = a.prepare(pair, optimizer)
        frozen = [] if reference is None else [reference]
        offloaded = OffloadedModels(a.device, self.settings.offload, reference=frozen, reward=rewards.models())
        average = None
        if self.settings.ema is not None:
            average = WeightAverage(pair.trained_policy(), self.settings.ema, main=a.is_main_process)
        return PPOModels(a, policy_and_value, optimizer, reference, rewards, offloaded, average)

    @property
    def value_warmup(self) -> bool:
        """Whether only the value model is trained in this step."""
        return self.state.step < self.settings.value_warmup

    def train(self) -> None:
        """Run the remaining steps. A rollback repeats some of them with smaller learning rates."""
        if self.state.step == 0 and self.settings.watch.unhealthy == "rollback":
            self._call("on_checkpoint")
        with self.console.progress("ppo", self.settings.steps, "step") as bar:
            while self.state.step < self.settings.steps:
                try:
                    stats = self.run_step()
                except health.UnhealthyError as error:
                    self.roll_back(error)
                else:
                    bar.update(self.state.step, {k: stats[k] for k in ("score", "kl", "response_length")})

    def run_step(self) -> StepStats:
        """Run one rollout and its updates, or the rest of them after a resume. Returns: the metrics of the step."""
        state = self.state
        self.phases.select(state.step)
        if state.progress is None:
            start = time.monotonic()
            with phase("sampling"):
                rollout = self.sample()
            sampled = time.monotonic()
            report_progress()
            with phase("scoring"):
                state.progress = StepProgress(self.score(rollout))
            report_progress()
            state.progress.time_sample, state.progress.time_score = sampled - start, time.monotonic() - sampled
            self._call("on_safe_point")
        progress, experience, start = state.progress, state.progress.experience, time.monotonic()
        with phase("updating"):
            stats = self.update(experience)
        stats |= {
            "time_sample": progress.time_sample,
            "time_score": progress.time_score,
            "time_update": time.monotonic() - start,
        }
        stats |= self.describe(experience)
        fresh = state.step < self.settings.value_warmup + health.SETTLING_STEPS
        self.monitor.unhealthy(health.find_unhealthy_metrics(stats, fresh=fresh), state.step, experience)
        self.steer_kl(experience)
        if self.models.average is not None:
            self.models.average.update(self.models.pair.trained_policy())
        state.step, state.progress = state.step + 1, None
        report_progress(state.step)
        del self.history[state.step - 1 :]  # entries of steps that a rollback repeats
        self.history.append({"step": float(state.step), **stats})
        for callback in self.callbacks:
            callback.on_step_end(self, experience, stats)
        self._call("on_checkpoint")
        self._call("on_safe_point")
        return stats

    def _call(self, event: str) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self)

    def roll_back(self, error: health.UnhealthyError) -> None:
        """Return to the last checkpoint with a smaller learning rate and a larger KL coefficient.
        Raises: `error` itself if there have been too many rollbacks, or if there is no checkpoint.
        """
        watch, earlier, failed = self.settings.watch, self.state.rollbacks, self.state.step
        if earlier >= watch.rollbacks or not sum(callback.on_rollback(self) for callback in self.callbacks):
            raise error
        state = self.state
        self.models.optimizer.zero_grad()  # gradients of the interrupted update
        # The checkpoint's kl_coef may already contain factors of earlier rollbacks.
        state.kl_coef *= watch.kl_factor ** (earlier + 1 - state.rollbacks)
        state.rollbacks = earlier + 1
        state.learning_rate_scale = watch.rate_factor**state.rollbacks
        self.monitor.log(
            f"{error}. Rolled back from step {failed} to step {state.step} ({state.rollbacks} of {watch.rollbacks}): "
            f"learning rates x {state.learning_rate_scale:g}, kl.coef {state.kl_coef:.4g}"
        )

    def sampling_policy(self) -> AbstractContextManager[Any]:
        """Return a context manager that yields the policy with gathered parameters, in the precision of the run."""
        return self.policy_for_sampling.open()

    def sample(self) -> Rollout:
        """Generate this process's share of the step's episodes: slots rank, rank + world size, ..."""
        a = self.accelerator
        slots = self.slots()[a.process_index :: a.num_processes]
        return self.generator.generate([(slot, self.prompts.ids[i]) for slot, i in slots], self.state.step)

    def slots(self) -> list[tuple[int, int]]:
        """Return (slot, prompt index) of this step's episodes over all processes, in shuffled passes over prompts."""
        size = self.settings.rollout_size
        first = self.state.step * size
        return list(enumerate(cyclic_indices(len(self.prompts), first, size, self.settings.seed, 1)))

    def score(self, rollout: Rollout) -> Experience:
        """Score this process's episodes, gather all processes', and compute and check rewards and advantages."""
        prompt_of = dict(self.slots())

        def prompts_of(part: Rollout) -> list[Prompt]:
            return [self.prompts.records[prompt_of[slot]] for slot in part.index.tolist()]

        checks = ScoreChecks(self.monitor, self.tolerance, self.renderer.pad_id)
        return score_experience(
            rollout,
            self.models,
            self.state,
            self.settings,
            prompts_of=prompts_of,
            checks=checks,
            autocast=self.models.pair.autocast,
        )

    def update(self, experience: Experience) -> StepStats:
        """Run epochs x minibatches optimizer updates, or fewer if a minibatch exceeds target_kl; return metrics.
        Each row is used once per epoch. Minibatches already done for this experience (`state.progress`) are skipped.
        """
        settings, a, state = self.settings, self.accelerator, self.state
        if state.progress is None or state.progress.experience is not experience:
            state.progress = StepProgress(experience)
        progress, sums = state.progress, state.progress.sums
        self.models.trained.train()
        if not progress.done:
            self.phases.enter(state.step, self.models.optimizer)
        lengths = experience.response_length.cpu()  # once a step: later nothing but the checks waits for the device
        for number, minibatch in self.minibatches(len(experience))[progress.done :]:
            total = float(lengths[minibatch].sum())
            per_step = settings.epochs * settings.minibatches
            update = state.step * per_step + min(number, per_step - 1)  # additional warm-up epochs keep the last rate
            self.set_learning_rates(update)
            before = sums.get("approx_kl", torch.zeros((), device=a.device)).clone()
            text = None if self.value_warmup else self.text
            if text is not None:
                text.accumulate(self.models.trained, a, update, sums, measure=number == 0)
            gradients = self.accumulate(experience, minibatch, total, sums)
            if text is not None:
                text.rebalance(self.models.pair.trained_policy().values(), a)
            if number == 0:
                progress.first_error = float(a.gather(gradients.ratio_error[None]).max())
                problems = health.find_wrong_first_ratio(progress.first_error, self.tolerance)
                self.monitor.broken(problems, state.step, experience)
            progress.tokens, progress.done = progress.tokens + total, number + 1
            if settings.target_kl is not None:
                approx_kl = float(a.reduce(sums["approx_kl"] - before, "sum")) / total
                if approx_kl > settings.target_kl:
                    self.models.optimizer.zero_grad()
                    break
            progress.norms.append(self.optimizer_step(experience, gradients))
            self._call("on_safe_point")
        ptx_coef = self.text.coef if self.text is not None else None
        return update_stats(progress, a, ptx_coef)

    def minibatches(self, rows: int) -> list[tuple[int, Tensor]]:
        """Return (number within the step, row indices) of every minibatch. Each epoch is shuffled differently."""
        settings = self.settings
        epochs = settings.value_warmup_epochs if self.value_warmup else settings.epochs
        orders = [shuffled_indices(rows, settings.seed, 2, self.state.step, epoch) for epoch in range(epochs)]
        return list(enumerate(part for order in orders for part in order.chunk(settings.minibatches)))

    def accumulate(
        self, experience: Experience, minibatch: Tensor, total: float, sums: dict[str, Tensor]
    ) -> MinibatchGradients:
        """Run the backward passes over this process's share of a minibatch; metrics are added to `sums`.
        `total` is the minibatch's number of response tokens over all processes.
        """
        return accumulate_gradients(
            self.models.trained,
            self.models.pair,
            self.accelerator,
            experience,
            minibatch,
            self.settings,
            sums,
            total=total,
            warming=self.value_warmup,
        )

    def optimizer_step(self, experience: Experience, gradients: MinibatchGradients) -> float:
        """Clip the gradient and run the optimizer step; return the gradient norm before clipping.
        Raises: TrainingError before the step if a loss or the gradient is not finite.
        """

        def check(norm: float) -> None:
            if not math.isfinite(norm):  # as it is if any loss is not: losses need not be looked at one by one
                if (bad := gradients.first_not_finite()) is not None:
                    raise self.monitor.not_finite("the loss", bad[0], self.state.step, experience.select(bad[1]))
                raise self.monitor.not_finite("the gradient norm", norm, self.state.step, experience)

        if engine.under_deepspeed() and gradients.first_not_finite() is not None:  # it would step before the check
            check(math.nan)
        report_progress()
        limit = self.settings.optim.max_grad_norm
        return engine.clip_and_step(self.models.trained, self.models.optimizer, self.accelerator, limit, check)

    def set_learning_rates(self, update: int) -> None:
        """Set the learning rates of an update. During value warm-up the policy's is 0."""
        o, updates = self.settings.optim, PPOPlan(self.settings, self.accelerator.num_processes).updates
        factor = schedule_factor(o.schedule, o.warmup_fraction * updates, update, updates)
        factor *= self.state.learning_rate_scale
        self.phases.set_rates(self.models.optimizer, self.state.step, 0.0 if self.value_warmup else factor, factor)

    def steer_kl(self, experience: Experience) -> None:
        """Adapt the KL coefficient so that the KL moves towards kl.target, if that is set."""
        kl = self.settings.kl
        if kl.target is not None:
            observed = float(experience.kl_per_sequence.mean())
            self.state.kl_coef = adaptive_kl(self.state.kl_coef, observed, kl.target, kl.horizon, len(experience))

    def describe(self, e: Experience) -> StepStats:
        """Return the metrics of a rollout, and the values of the controllers."""
        stats = rollout_stats(e)
        self.state.first_response_length = self.state.first_response_length or stats["response_length"]
        return stats | {
            "length_drift": stats["response_length"] / self.state.first_response_length,
            "kl_coef": self.state.kl_coef,
            "learning_rate": self.models.optimizer.param_groups[0]["lr"],
            "episodes": float((self.state.step + 1) * len(e)),
        }

    def save(self, folder: Path | None) -> None:
        """Write a checkpoint into a folder. Collective; `folder` is None on all processes but the main one."""
        save_state(folder, self.state, self.models, ptx_coef=self.text.coef if self.text is not None else None)

    def load(self, folder: Path) -> None:
        """Restore a checkpoint that `save` wrote, possibly with another engine or number of processes. Collective."""
        self.state, ptx_coef = load_state(folder, self.models)
        if self.text is not None and ptx_coef is not None:
            self.text.coef = ptx_coef
        del self.history[self.state.step :]

    def save_pretrained(
        self, folder: str | Path, *, value_model: str | Path | None = None, reply_tokens: float | None = None
    ) -> None:
        """Write the policy with tokenizer and hand-over record as a plain folder that transformers loads. Collective.

        Args:
            folder: folder for the policy.
            value_model: folder for the value model; None = it is not written.
            reply_tokens: mean tokens of the policy's responses, for the hand-over record; None = of the last step.
        """
        reply_tokens = self.history[-1]["response_length"] if reply_tokens is None and self.history else reply_tokens
        values = None if value_model is None else Path(value_model)
        save_trained_models(self.models, self.renderer, Path(folder), values, reply_tokens)
