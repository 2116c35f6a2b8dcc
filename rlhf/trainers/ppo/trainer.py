"""The PPO training loop for language models: sample, score, update, report, checkpoint.

Policy and value model are one module under one optimizer and one engine. Every rank holds the same, whole experience
after scoring (tokens and numbers are small), so minibatches, whitening and token counts do not depend on how many
processes there are, and each loss is a sum over tokens divided by the minibatch's global token count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from rlhf.models.packed_batch import can_pack, microbatches
from rlhf.rollout.types import Experience, Rollout
from rlhf.trainers.lr_schedule import schedule_factor
from rlhf.trainers.ppo import health, inputs
from rlhf.trainers.ppo.callbacks import PPOCallback
from rlhf.trainers.ppo.export import save_trained_models
from rlhf.trainers.ppo.losses import summed_losses
from rlhf.trainers.ppo.phases import PPOPhases
from rlhf.trainers.ppo.policy_value import PolicyAndValue
from rlhf.trainers.ppo.ptx import PtxMixture
from rlhf.trainers.ppo.scoring import ScoreChecks, score_experience
from rlhf.trainers.ppo.state import PPOModels, PPOState, StepProgress, load_state, save_state, update_stats
from rlhf.trainers.ppo.stats import StepStats, rollout_stats
from rlhf.trainers.sample_order import cyclic_indices, shuffled_indices


class PPOTrainer:
    """Train a causal language model by proximal policy optimization against a reward.

        trainer = PPOTrainer(policy="models/sft", reward=reward_function, prompts=["Hello?"], settings=PPOSettings())
        trainer.train()
        trainer.save_pretrained("out")

    `train` is the whole algorithm; the other methods are its steps. Attributes: `state`, `models`, `settings`, and
    `history`: the numbers of every step, as metrics.jsonl names them.
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
        """Load and check what is given, and prepare models and optimizer.

        Args:
            policy: folder or hub id of a causal language model, or the model itself, which is then trained in place.
            reward: folder of a reward model, a reward model, or a function (prompt, response, record) -> number; prompt
                is a list of {"role", "content"} messages, record is what `prompts` holds for it.
            prompts: file of prompts, or a list of texts, of conversations or of records.
            tokenizer: of the policy; None = the one beside the policy. A chat template and a pad token are added where
                it has none.
            reference: what the policy is kept near; None = a frozen copy of the policy, or, of an adapter,
                the model that it started from.
            value_model: folder or model with one output; None = from the reward model if that comes from a folder, else
                the policy's trunk with a head of zeros.
            text: documents of the ptx term, or None.
            max_prompt_tokens: a longer prompt is refused.
            callbacks: called after steps and at safe points.
            monitor: acts on broken invariants and unhealthy numbers as `settings.watch` says.
        Raises: ConfigError, DataError or CheckpointError for what does not fit together.
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
        # After the models: once an accelerator of ZeRO-3 exists, transformers loads shards of them, which no head fits.
        a = self.accelerator = engine.make_accelerator(
            find_unused_parameters=bool(settings.unfreeze.policy or settings.unfreeze.value_model)
        )
        report_progress()
        engine.set_deepspeed_batch_size(a, settings.optim.microbatch_size, settings.optim.max_grad_norm)
        settings.check_shared(a.num_processes)
        self.phases = PPOPhases(settings, pair)
        self.bfloat16 = engine.wants_bfloat16(settings.optim.precision)
        dtype = torch.bfloat16 if self.bfloat16 else next(pair.policy.parameters()).dtype
        self.tolerance = health.TOLERANCES.get(dtype, health.TOLERANCES[torch.bfloat16])
        if settings.old_logprobs == "sampled":  # the first ratio is as exact as sampling is
            self.tolerance = replace(self.tolerance, ratio=self.tolerance.sampling)
        self.state = PPOState(kl_coef=settings.kl.coef)
        self.models = self._prepare(pair, frozen, rewards)
        self.generator: Generator = NativeGenerator(
            self.sampling_policy,
            settings.sampling,
            seed=settings.seed,
            end_id=self.renderer.end_id,
            pad_id=self.renderer.pad_id,
            device=a.device,
            decode=self.renderer.tokenizer.decode,
        )

    def _prepare(self, pair: PolicyAndValue, reference: nn.Module | None, rewards: Any) -> PPOModels:
        """Make the optimizer, wrap the trained pair in its engine and put every model where it belongs."""
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

    def autocast(self) -> torch.autocast:
        """Return the context that sets one precision for sampling, scoring and updates."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.bfloat16)

    @property
    def value_warmup(self) -> bool:
        """Whether only the value model learns in this step."""
        return self.state.step < self.settings.value_warmup

    def train(self) -> None:
        """Run the remaining steps; a rollback repeats some of them more carefully."""
        if self.state.step == 0 and self.settings.watch.unhealthy == "rollback":
            self._call("on_checkpoint")
        with self.console.progress("ppo", self.settings.steps, "step") as bar:
            while self.state.step < self.settings.steps:
                try:
                    stats = self.run_step()
                except health.UnhealthyError as trouble:
                    self.roll_back(trouble)
                else:
                    bar.update(self.state.step, {k: stats[k] for k in ("score", "kl", "response_length")})

    def run_step(self) -> StepStats:
        """Run one rollout and its updates, or what is left of them. Returns: the step's numbers."""
        state = self.state
        self.phases.select(state.step)
        if state.progress is None:
            begun = time.monotonic()
            rollout = self.sample()
            sampled = time.monotonic()
            report_progress()
            state.progress = StepProgress(self.score(rollout))
            report_progress()
            state.progress.time_sample, state.progress.time_score = sampled - begun, time.monotonic() - sampled
            self._call("on_safe_point")
        progress, experience, begun = state.progress, state.progress.experience, time.monotonic()
        stats = self.update(experience)
        stats |= {
            "time_sample": progress.time_sample,
            "time_score": progress.time_score,
            "time_update": time.monotonic() - begun,
        }
        stats |= self.describe(experience)
        fresh = state.step < self.settings.value_warmup + health.SETTLING_STEPS
        self.monitor.unhealthy(health.find_unhealthy_metrics(stats, fresh=fresh), state.step, experience)
        self.steer_kl(experience)
        if self.models.average is not None:
            self.models.average.update(self.models.pair.trained_policy())
        state.step, state.progress = state.step + 1, None
        report_progress(state.step)
        del self.history[state.step - 1 :]  # of steps that a rollback repeats
        self.history.append({"step": float(state.step), **stats})
        for callback in self.callbacks:
            callback.on_step_end(self, experience, stats)
        self._call("on_checkpoint")
        self._call("on_safe_point")
        return stats

    def _call(self, event: str) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self)

    def roll_back(self, trouble: health.UnhealthyError) -> None:
        """Return to the last checkpoint with a smaller learning rate and a larger KL coefficient.

        Raises: `trouble` itself if that has been tried too often, or if there is no checkpoint.
        """
        watch, tried, at = self.settings.watch, self.state.rollbacks, self.state.step
        if tried >= watch.rollbacks or not sum(callback.on_rollback(self) for callback in self.callbacks):
            raise trouble
        state = self.state
        self.models.optimizer.zero_grad()  # of an update that was broken off
        state.kl_coef *= watch.kl_factor ** (
            tried + 1 - state.rollbacks
        )  # the checkpoint may hold earlier ones already
        state.rollbacks = tried + 1
        state.learning_rate_scale = watch.rate_factor**state.rollbacks
        self.monitor.say(
            f"{trouble}. Rolled back from step {at} to step {state.step} ({state.rollbacks} of {watch.rollbacks}): "
            f"learning rates x {state.learning_rate_scale:g}, kl.coef {state.kl_coef:.4g}"
        )

    @contextmanager
    def sampling_policy(self) -> Iterator[Any]:
        """Yield the policy with whole weights, in the precision of the run."""
        gathered = engine.gathered_module(self.models.trained, self.accelerator, lambda module: module.policy)
        with gathered as policy, self.autocast():
            yield policy

    def sample(self) -> Rollout:
        """Generate this process's share of the step's episodes: slots rank, rank + ranks, ..."""
        a = self.accelerator
        slots = self.slots()[a.process_index :: a.num_processes]
        return self.generator.generate([(slot, self.prompts.ids[i]) for slot, i in slots], self.state.step)

    def slots(self) -> list[tuple[int, int]]:
        """Return (slot, prompt) of every episode of this step, over all processes: passes over shuffled prompts."""
        size = self.settings.rollout_size
        first = self.state.step * size
        return list(enumerate(cyclic_indices(len(self.prompts), first, size, self.settings.seed, 1)))

    def score(self, rollout: Rollout) -> Experience:
        """Score this process's episodes, gather everybody's, compute rewards and advantages over all, check them."""
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
            autocast=self.autocast,
        )

    def update(self, experience: Experience) -> StepStats:
        """Run epochs x minibatches optimizer updates; each row is used once an epoch. Ends early beyond target_kl.
        Continues after the minibatches that `state.progress` has done if it is about this experience.
        """
        settings, a, state = self.settings, self.accelerator, self.state
        if state.progress is None or state.progress.experience is not experience:
            state.progress = StepProgress(experience)
        progress, sums = state.progress, state.progress.sums
        self.models.trained.train()
        if not progress.done:
            self.phases.enter(state.step, self.models.optimizer)
        for number, minibatch in self.minibatches(len(experience))[progress.done :]:
            total = experience.response_mask[minibatch].sum()
            per_step = settings.epochs * settings.minibatches
            update = state.step * per_step + min(number, per_step - 1)  # further passes of a warm-up keep the rate
            self.set_learning_rates(update)
            before = sums.get("approx_kl", torch.zeros((), device=a.device)).clone()
            text = None if self.value_warmup else self.text
            if text is not None:
                text.accumulate(self.models.trained, a, update, self.autocast, sums, weigh=number == 0)
            error = self.accumulate(experience, minibatch, total, sums)
            if text is not None:
                text.rebalance(self.models.pair.trained_policy().values(), a)
            if number == 0:
                progress.first_error = float(a.gather(torch.tensor([error], device=a.device)).max())
                problems = health.find_wrong_first_ratio(progress.first_error, self.tolerance)
                self.monitor.broken(problems, state.step, experience)
            moved = float(a.reduce(sums["approx_kl"] - before, "sum")) / float(total)
            progress.tokens, progress.done = progress.tokens + float(total), number + 1
            if settings.target_kl is not None and moved > settings.target_kl:
                self.models.optimizer.zero_grad()
                break
            progress.norms.append(self.optimizer_step(experience))
            self._call("on_safe_point")
        ptx_coef = self.text.coef if self.text is not None else None
        return update_stats(progress, a, ptx_coef)

    def minibatches(self, rows: int) -> list[tuple[int, Tensor]]:
        """Return (number within the step, row numbers) of every minibatch: every epoch in another order."""
        settings = self.settings
        epochs = settings.value_warmup_epochs if self.value_warmup else settings.epochs
        orders = [shuffled_indices(rows, settings.seed, 2, self.state.step, epoch) for epoch in range(epochs)]
        return list(enumerate(part for order in orders for part in order.chunk(settings.minibatches)))

    def accumulate(self, experience: Experience, minibatch: Tensor, total: Tensor, sums: dict[str, Tensor]) -> float:
        """Backward over this process's share of a minibatch; returns the largest |ratio - 1| seen."""
        a, settings = self.accelerator, self.settings
        model, packed = self.models.trained, can_pack(self.models.pair.policy)
        mine = minibatch[a.process_index :: a.num_processes]
        lengths = experience.mask[mine].sum(dim=1)
        parts = [mine[part] for part in microbatches(lengths, settings.optim.microbatch_size, packed=packed)]
        worst = 0.0
        for i, rows in enumerate(parts):
            part = experience.select(rows)
            with engine.gradient_accumulation(model, a, last=i == len(parts) - 1):
                with self.autocast():
                    logprobs, entropy, values = model(part, settings.sampling.temperature)
                loss, numbers = summed_losses(
                    part, logprobs, entropy, values, settings, settings.kl, warming=self.value_warmup
                )
                if not math.isfinite(size := float(loss.detach())):
                    raise self.monitor.not_finite("the loss", size, self.state.step, part)
                # The engine averages gradients over processes; the global count already divides by all tokens.
                engine.backward(loss / total * a.num_processes, model, a)
            worst = max(worst, float(numbers.pop("ratio_error")))
            for key, value in numbers.items():
                sums[key] = sums.get(key, torch.zeros_like(value)) + value
        return worst

    def optimizer_step(self, experience: Experience) -> float:
        """Clip the gradient, refuse one that is not finite, step. Returns the norm before clipping.

        Raises: TrainingError before the step if the gradient is not finite.
        """

        def check(norm: float) -> None:
            if not math.isfinite(norm):
                raise self.monitor.not_finite("the gradient norm", norm, self.state.step, experience)

        report_progress()
        most = self.settings.optim.max_grad_norm
        return engine.clip_and_step(self.models.trained, self.models.optimizer, self.accelerator, most, check)

    def set_learning_rates(self, update: int) -> None:
        """Set the learning rates of an update. During value warm-up the policy's is 0."""
        o, updates = self.settings.optim, PPOPlan(self.settings, self.accelerator.num_processes).updates
        factor = schedule_factor(o.schedule, o.warmup_fraction * updates, update, updates)
        factor *= self.state.learning_rate_scale
        self.phases.set_rates(self.models.optimizer, self.state.step, 0.0 if self.value_warmup else factor, factor)

    def steer_kl(self, experience: Experience) -> None:
        """Move the KL coefficient towards its target."""
        kl = self.settings.kl
        if kl.target is not None:
            observed = float(experience.kl_per_sequence.mean())
            self.state.kl_coef = adaptive_kl(self.state.kl_coef, observed, kl.target, kl.horizon, len(experience))

    def describe(self, e: Experience) -> StepStats:
        """Return numbers of a rollout, and of what the controllers did with it."""
        stats = rollout_stats(e)
        self.state.first_response_length = self.state.first_response_length or stats["response_length"]
        return stats | {
            "length_drift": stats["response_length"] / self.state.first_response_length,
            "kl_coef": self.state.kl_coef,
            "learning_rate": self.models.optimizer.param_groups[0]["lr"],
            "episodes": float((self.state.step + 1) * len(e)),
        }

    def save(self, folder: Path | None) -> None:
        """Write everything a run continues from; collective, `folder` is None on all processes but the main one."""
        save_state(folder, self.state, self.models, ptx_coef=self.text.coef if self.text is not None else None)

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote, also with another engine or number of processes; collective."""
        self.state, ptx_coef = load_state(folder, self.models)
        if self.text is not None and ptx_coef is not None:
            self.text.coef = ptx_coef
        del self.history[self.state.step :]

    def save_pretrained(
        self, folder: str | Path, *, value_model: str | Path | None = None, reply_tokens: float | None = None
    ) -> None:
        """Write the policy with tokenizer and hand-over record as a plain folder that transformers loads. Collective.

        Args:
            value_model: folder for the value model; None = it is not written.
            reply_tokens: mean tokens of the policy's responses, for the record; None = of the last step.
        """
        reply_tokens = self.history[-1]["response_length"] if reply_tokens is None and self.history else reply_tokens
        values = None if value_model is None else Path(value_model)
        save_trained_models(self.models, self.renderer, Path(folder), values, reply_tokens)
