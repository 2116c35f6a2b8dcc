"""PPO for language models, one screen: sample, score, update, report, checkpoint.

Policy and value model are one module under one optimizer and one engine. Every rank holds the same, whole experience
after scoring (tokens and numbers are small), so minibatches, whitening and token counts do not depend on how many
processes there are, and each loss is a sum over tokens divided by the minibatch's global token count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config.schema import PPOConfig
from rlhf.data.records import Prompt
from rlhf.distributed.engine import backward, clip_and_step, gathered_module, gradient_accumulation, wants_bfloat16
from rlhf.distributed.heartbeat import report_progress
from rlhf.functional import adaptive_kl
from rlhf.generation.native import generate_rollout
from rlhf.models.ema import WeightAverage
from rlhf.models.offload import OffloadedModels
from rlhf.models.packed_batch import can_pack, microbatches
from rlhf.rollout.rewards import Rewards
from rlhf.rollout.score import RunningStats, make_experience, score_rollout
from rlhf.rollout.types import Experience, Rollout
from rlhf.trainers.lr_schedule import schedule_factor
from rlhf.trainers.ppo.health import (
    SETTLING_STEPS,
    TOLERANCES,
    HealthMonitor,
    UnhealthyError,
    find_broken_invariants,
    find_unhealthy_metrics,
)
from rlhf.trainers.ppo.losses import summed_losses
from rlhf.trainers.ppo.phases import PPOPhases
from rlhf.trainers.ppo.policy_value import PolicyAndValue, gather_rollouts
from rlhf.trainers.ppo.ptx import PtxMixture
from rlhf.trainers.ppo.scoring import read_trained_models, reference_logprobs, reward_scores
from rlhf.trainers.ppo.state import StepProgress, load_state, save_state
from rlhf.trainers.ppo.stats import StepStats, rollout_stats
from rlhf.trainers.sample_order import cyclic_indices, shuffled_indices


class PPOTrainer:
    """Runs PPO. `train` is the whole algorithm; the other methods are its verbs."""

    def __init__(
        self,
        config: PPOConfig,
        accelerator: Any,
        model: PolicyAndValue,
        *,
        reference: nn.Module | None,
        rewards: Rewards,
        prompts: Sequence[list[int]],
        records: Sequence[Prompt],
        end_id: int,
        pad_id: int,
        text: PtxMixture | None,
        decode: Callable[[list[int]], str],
        watcher: HealthMonitor,
        report: Callable[[int, Experience, StepStats], None],
        checkpoint: Callable[[PPOTrainer], None],
        restore: Callable[[PPOTrainer], bool],
        pause: Callable[[PPOTrainer], None] = lambda _: None,
    ) -> None:
        """Prepare models and optimizer.

        Args:
            reference: frozen model, or None if the policy is an adapter over it.
            prompts: token ids, in data order; records: the same prompts as records.
            text: documents for the ptx term, or None.
            decode: ids to text, special tokens included.
            report, checkpoint: called after every step.
            restore: takes the trainer back to its last checkpoint; False if there is none.
            pause: called where a run can end and continue exactly: after a rollout, minibatch or step.
        Raises: ConfigError if a rollout cannot be shared by minibatches and processes.
        """
        self.config, self.accelerator, self.prompts, self.records = config, accelerator, prompts, records
        self.text = text
        self.end_id, self.pad_id, self.decode, self.rewards, self.watcher = end_id, pad_id, decode, rewards, watcher
        self.on_report, self.on_checkpoint, self.on_restore, self.on_pause = report, checkpoint, restore, pause
        self.work: StepProgress | None = None  # the rollout in hand
        self.step, self.kl_coef, self.rate, self.rollbacks = 0, config.kl.coef, 1.0, 0
        self.spread, self.first_length = RunningStats(), 0.0
        config.ppo.check_shared(accelerator.num_processes)
        self.phases = PPOPhases(config, model)
        self.bfloat16 = wants_bfloat16(config.optim.precision)
        dtype = torch.bfloat16 if self.bfloat16 else next(model.policy.parameters()).dtype
        self.tolerance = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])
        if config.ppo.old_logprobs == "sampled":  # the first ratio is as exact as sampling is
            self.tolerance = replace(self.tolerance, ratio=self.tolerance.sampling)
        optimizer = torch.optim.AdamW(
            self.phases.optimizer_groups(),
            eps=config.optim.adam_eps,
            weight_decay=config.optim.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.reference = reference
        self.frozen = OffloadedModels(
            accelerator.device,
            config.offload,
            reference=[] if reference is None else [reference],
            reward=rewards.models(),
        )
        self.average: WeightAverage | None = None
        if config.ppo.ema is not None:
            self.average = WeightAverage(model.trained_policy(), config.ppo.ema, main=accelerator.is_main_process)

    def computing(self) -> torch.autocast:
        """The precision of everything: sampling, old log-probs and new ones alike."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.bfloat16)

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run."""
        p = self.config.ppo
        return p.steps * p.epochs * p.minibatches

    @property
    def warming(self) -> bool:
        """Whether only the value model learns in this step."""
        return self.step < self.config.ppo.value_warmup

    def train(self) -> None:
        """Run the remaining steps; a rollback repeats some of them more carefully."""
        if self.step == 0 and self.config.watch.unhealthy == "rollback":
            self.on_checkpoint(self)
        while self.step < self.config.ppo.steps:
            try:
                self.one_step()
            except UnhealthyError as trouble:
                self.roll_back(trouble)

    def one_step(self) -> None:
        """One rollout and its updates, or what is left of them."""
        self.phases.select(self.step)
        if self.work is None:
            begun = time.monotonic()
            rollout = self.sample()
            sampled = time.monotonic()
            report_progress()
            self.work = StepProgress(self.score(rollout))
            report_progress()
            self.work.time_sample, self.work.time_score = sampled - begun, time.monotonic() - sampled
            self.on_pause(self)
        work, experience, begun = self.work, self.work.experience, time.monotonic()
        stats = self.update(experience)
        stats |= {
            "time_sample": work.time_sample,
            "time_score": work.time_score,
            "time_update": time.monotonic() - begun,
        }
        stats |= self.describe(experience)
        fresh = self.step < self.config.ppo.value_warmup + SETTLING_STEPS
        self.watcher.unhealthy(find_unhealthy_metrics(stats, fresh=fresh), self.step, experience)
        self.steer_kl(experience)
        if self.average is not None:
            self.average.update(self.accelerator.unwrap_model(self.model).trained_policy())
        self.step, self.work = self.step + 1, None
        report_progress(self.step)
        self.on_report(self.step, experience, stats)
        self.on_checkpoint(self)
        self.on_pause(self)

    def roll_back(self, trouble: UnhealthyError) -> None:
        """Return to the last checkpoint with a smaller learning rate and a larger KL coefficient.

        Raises: `trouble` itself if that has been tried too often.
        """
        watch, tried, at = self.config.watch, self.rollbacks, self.step
        if tried >= watch.rollbacks or not self.on_restore(self):
            raise trouble
        self.optimizer.zero_grad()  # of an update that was broken off
        self.kl_coef *= watch.kl_factor ** (tried + 1 - self.rollbacks)  # the checkpoint may hold earlier ones already
        self.rollbacks = tried + 1
        self.rate = watch.rate_factor**self.rollbacks
        self.watcher.say(
            f"{trouble}. Rolled back from step {at} to step {self.step} ({self.rollbacks} of {watch.rollbacks}): "
            f"learning rates x {self.rate:g}, kl.coef {self.kl_coef:.4g}"
        )

    def sample(self) -> Rollout:
        """This process's share of the step's episodes: slots rank, rank + ranks, ..."""
        a = self.accelerator
        slots = self.slots()[a.process_index :: a.num_processes]
        with gathered_module(self.model, a, lambda whole: whole.policy) as policy, self.computing():
            return generate_rollout(
                policy,
                [(slot, self.prompts[i]) for slot, i in slots],
                self.config.sampling,
                seed=self.config.seed,
                step=self.step,
                end_id=self.end_id,
                pad_id=self.pad_id,
                device=a.device,
                decode=self.decode,
            )

    def slots(self) -> list[tuple[int, int]]:
        """(slot, prompt) of every episode of this step, over all processes: passes over shuffled prompts."""
        size = self.config.ppo.rollout_size
        return list(enumerate(cyclic_indices(len(self.prompts), self.step * size, size, self.config.seed, 1)))

    def score(self, rollout: Rollout) -> Experience:
        """Measure this process's episodes, gather everybody's, shape rewards and advantages over all, check."""
        config = self.config
        with gathered_module(self.model, self.accelerator) as module, self.computing():
            trained: Any = module.eval()
            measured = score_rollout(
                rollout,
                read=lambda part: read_trained_models(self, trained, part),
                reference=reference_logprobs(self),
                rewards=reward_scores(self, rollout),
                microbatch=config.optim.microbatch_size,
                packed=can_pack(trained.policy),
            )
        measured = gather_rollouts(measured, self.accelerator, self.pad_id)
        self.spread = self.spread.seen(measured.raw_scores)
        deviation = self.spread.deviation if config.ppo.normalize_scores == "running" else 1.0
        experience = make_experience(measured, kl_coef=self.kl_coef, deviation=deviation, settings=config.ppo)
        problems = find_broken_invariants(
            experience,
            kl_coef=self.kl_coef,
            whitened=config.ppo.whiten_advantages,
            fresh=self.step == 0,
            tolerance=self.tolerance,
        )
        self.watcher.broken(problems, self.step, experience)
        return experience

    def update(self, experience: Experience) -> StepStats:
        """Epochs x minibatches optimizer updates; each index is used once per epoch. Ends early beyond target_kl.

        Goes on after those that `work` has done if it is about this experience.
        """
        settings, a = self.config.ppo, self.accelerator
        if self.work is None or self.work.experience is not experience:
            self.work = StepProgress(experience)
        work, sums = self.work, self.work.sums
        self.model.train()
        if not work.done:
            self.phases.enter(self.step, self.optimizer)
        for number, minibatch in self.minibatches(len(experience))[work.done :]:
            total = experience.response_mask[minibatch].sum()
            per_step = settings.epochs * settings.minibatches
            update = self.step * per_step + min(number, per_step - 1)  # further passes of a warm-up keep the rate
            self.set_learning_rates(update)
            before = sums.get("approx_kl", torch.zeros((), device=a.device)).clone()
            if self.text is not None and not self.warming:
                self.text.accumulate(self.model, a, update, self.computing, sums, weigh=number == 0)
            error = self.accumulate(experience, minibatch, total, sums)
            if self.text is not None and not self.warming:
                self.text.rebalance(a.unwrap_model(self.model).trained_policy().values(), a)
            if number == 0:
                work.first_error = float(a.gather(torch.tensor([error], device=a.device)).max())
                self.check_first_ratio(work.first_error, experience)
            moved = float(a.reduce(sums["approx_kl"] - before, "sum")) / float(total)
            work.tokens, work.done = work.tokens + float(total), number + 1
            if settings.target_kl is not None and moved > settings.target_kl:
                self.optimizer.zero_grad()
                break
            work.norms.append(self.optimizer_step(experience))
            self.on_pause(self)
        sums = {k: a.reduce(v, "sum") for k, v in sums.items()}
        ptx = {}
        if self.text is not None and "ptx_loss" in sums:
            ptx = {"ptx_loss": float(sums.pop("ptx_loss")) / work.done, "ptx_coef": self.text.coef}
        stats = ptx | {k: float(v) / work.tokens for k, v in sums.items()}
        return stats | {
            "first_ratio_error": work.first_error,
            "grad_norm": sum(work.norms) / max(len(work.norms), 1),
            "updates": float(len(work.norms)),
        }

    def minibatches(self, rows: int) -> list[tuple[int, Tensor]]:
        """(number within the step, row indices): every epoch in another order."""
        settings = self.config.ppo
        epochs = settings.value_warmup_epochs if self.warming else settings.epochs
        orders = [shuffled_indices(rows, self.config.seed, 2, self.step, epoch) for epoch in range(epochs)]
        return list(enumerate(part for order in orders for part in order.chunk(settings.minibatches)))

    def check_first_ratio(self, error: float, experience: Experience) -> None:
        """Before anything has moved, old and new log-probs come from one code path: the ratio is 1."""
        problems = []
        if not error <= self.tolerance.ratio:
            problems.append(
                f"the first importance ratio is not 1 but off by up to {error:.3g}: dropout, another temperature, or "
                "log-probs of another policy"
            )
        self.watcher.broken(problems, self.step, experience)

    def accumulate(self, experience: Experience, minibatch: Tensor, total: Tensor, sums: dict[str, Tensor]) -> float:
        """Backward over this process's share of a minibatch; returns the largest |ratio - 1| seen."""
        a, config = self.accelerator, self.config
        mine = minibatch[a.process_index :: a.num_processes]
        lengths, packed = experience.mask[mine].sum(dim=1), can_pack(a.unwrap_model(self.model).policy)
        parts = [mine[part] for part in microbatches(lengths, config.optim.microbatch_size, packed=packed)]
        worst = 0.0
        for i, rows in enumerate(parts):
            part = experience.select(rows)
            with gradient_accumulation(self.model, a, last=i == len(parts) - 1):
                with self.computing():
                    logprobs, entropy, values = self.model(part, config.sampling.temperature)
                loss, numbers = summed_losses(
                    part, logprobs, entropy, values, config.ppo, config.kl, warming=self.warming
                )
                if not math.isfinite(size := float(loss.detach())):
                    raise self.watcher.not_finite("the loss", size, self.step, part)
                # The engine averages gradients over processes; the global count already divides by all tokens.
                backward(loss / total * a.num_processes, self.model, a)
            worst = max(worst, float(numbers.pop("ratio_error")))
            for key, value in numbers.items():
                sums[key] = sums.get(key, torch.zeros_like(value)) + value
        return worst

    def optimizer_step(self, experience: Experience) -> float:
        """Clip, refuse a non-finite gradient, step. Returns the norm before clipping.

        Raises: TrainingError before the step if the gradient is not finite.
        """

        def check(norm: float) -> None:
            if not math.isfinite(norm):
                raise self.watcher.not_finite("the gradient norm", norm, self.step, experience)

        report_progress()
        most = self.config.optim.max_grad_norm
        return clip_and_step(self.model, self.optimizer, self.accelerator, most, check)

    def set_learning_rates(self, update: int) -> None:
        """Of an update; 0 for a policy that waits."""
        o = self.config.optim
        factor = schedule_factor(o.schedule, o.warmup_fraction * self.updates, update, self.updates) * self.rate
        self.phases.set_rates(self.optimizer, self.step, 0.0 if self.warming else factor, factor)

    def steer_kl(self, experience: Experience) -> None:
        """Move the KL coefficient towards its target."""
        kl = self.config.kl
        if kl.target is not None:
            observed = float(experience.kl_per_sequence.mean())
            self.kl_coef = adaptive_kl(self.kl_coef, observed, kl.target, kl.horizon, len(experience))

    def describe(self, e: Experience) -> StepStats:
        """What a rollout looked like, and what was done with it."""
        stats = rollout_stats(e)
        self.first_length = self.first_length or stats["response_length"]
        return stats | {
            "length_drift": stats["response_length"] / self.first_length,
            "kl_coef": self.kl_coef,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "episodes": float((self.step + 1) * len(e)),
        }

    def save(self, folder: Path | None) -> None:
        """Write everything a run continues from; collective, `folder` is None on all processes but the main one."""
        save_state(self, folder)

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote, also with another engine or number of processes; collective."""
        load_state(self, folder)
