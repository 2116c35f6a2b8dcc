"""PPO for language models, one screen: sample, score, update, report, checkpoint.

Policy and value model are one module under one optimizer and one engine. Every rank holds the same, whole experience
after scoring (tokens and numbers are small), so minibatches, whitening and token counts do not depend on how many
processes there are, and each loss is a sum over tokens divided by the minibatch's global token count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config.schema import PPOConfig
from rlhf.errors import ConfigError, TrainingError
from rlhf.functional import (
    adaptive_kl,
    explained_variance,
    kl_estimate,
    masked_whiten,
    policy_loss,
    value_loss,
)
from rlhf.models.adapters import reference_policy
from rlhf.models.distributed import unsharded
from rlhf.models.heads import sequence_scores
from rlhf.rollout.sample import sample
from rlhf.rollout.score import response_logprobs, response_values, score
from rlhf.rollout.types import Experience, Rollout, merge

Stats = dict[str, float]


class PolicyAndValue(nn.Module):
    """The two trained models as one module: a second model prepared beside the first would silently not be stepped."""

    def __init__(self, policy: nn.Module, value_model: nn.Module) -> None:
        super().__init__()
        self.policy, self.value_model = policy, value_model

    def forward(self, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs [B, R] nats, entropy [B, R] nats, values [B, R] score units."""
        logprobs, entropy = response_logprobs(self.policy, rollout, temperature, entropy=True)
        assert entropy is not None
        return logprobs, entropy, response_values(self.value_model, rollout)


class PPOTrainer:
    """Runs PPO. `train` is the whole algorithm; the other methods are its verbs."""

    def __init__(
        self, config: PPOConfig, accelerator: Any, model: PolicyAndValue, *, reference: nn.Module | None,
        reward_model: nn.Module, prompts: Sequence[list[int]], end_id: int, pad_id: int,
        score_scale: tuple[float, float], report: Callable[[int, Experience, Stats], None],
        checkpoint: Callable[[PPOTrainer], None],
    ) -> None:  # fmt: skip
        """Prepare models and optimizer.

        Args:
            reference: frozen model, or None if the policy is an adapter over it.
            prompts: token ids, in data order.
            score_scale: (mean, deviation) taken off raw scores; (0, 1) leaves them.
            report, checkpoint: called after every step.
        Raises: ConfigError if a rollout cannot be shared by minibatches and processes.
        """
        self.config, self.accelerator, self.prompts = config, accelerator, prompts
        self.end_id, self.pad_id, self.score_scale = end_id, pad_id, score_scale
        self.on_report, self.on_checkpoint = report, checkpoint
        self.step, self.kl_coef = 0, config.kl.coef
        size, ranks = config.ppo.rollout_size, accelerator.num_processes
        if size % (config.ppo.minibatches * ranks):
            raise ConfigError(
                f"a rollout of {size} is not {config.ppo.minibatches} minibatches x {ranks} processes x a whole number",
                where="ppo.rollout_size", do=f"choose a multiple of {config.ppo.minibatches * ranks}",
            )  # fmt: skip
        groups = [
            {"params": [p for p in model.policy.parameters() if p.requires_grad], "lr": config.optim.learning_rate},
            {"params": [p for p in model.value_model.parameters() if p.requires_grad],
             "lr": config.optim.value_learning_rate},
        ]  # fmt: skip
        optimizer = torch.optim.AdamW(groups, eps=config.optim.adam_eps, weight_decay=config.optim.weight_decay)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.reference = reference.to(accelerator.device).eval() if reference is not None else None
        self.reward_model = reward_model.to(accelerator.device).eval()

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run."""
        p = self.config.ppo
        return p.steps * p.epochs * p.minibatches

    def train(self) -> None:
        """Run the remaining steps."""
        while self.step < self.config.ppo.steps:
            clock = [time.monotonic()]
            rollout = self.sample()
            clock.append(time.monotonic())
            experience = self.score(rollout)
            clock.append(time.monotonic())
            stats = self.update(experience)
            clock.append(time.monotonic())
            stats |= {f"time_{n}": clock[i + 1] - clock[i] for i, n in enumerate(("sample", "score", "update"))}
            stats |= self.describe(experience)
            self.steer_kl(experience)
            self.step += 1
            self.on_report(self.step, experience, stats)
            self.on_checkpoint(self)

    def sample(self) -> Rollout:
        """This process's share of the step's episodes: slots rank, rank + ranks, ..."""
        a = self.accelerator
        slots = self.slots()[a.process_index :: a.num_processes]
        with unsharded(self.model, a) as model:
            return sample(
                model.policy, [(slot, self.prompts[i]) for slot, i in slots], self.config.sampling,
                seed=self.config.seed, step=self.step, end_id=self.end_id, pad_id=self.pad_id, device=a.device,
            )  # fmt: skip

    def slots(self) -> list[tuple[int, int]]:
        """(slot, prompt) of every episode of this step, over all processes: passes over shuffled prompts."""
        size, count = self.config.ppo.rollout_size, len(self.prompts)
        first = self.step * size
        orders: dict[int, list[int]] = {}
        chosen = []
        for position in range(first, first + size):
            lap = position // count
            if lap not in orders:
                orders[lap] = torch.randperm(count, generator=_generator(self.config.seed, 1, lap)).tolist()
            chosen.append((position - first, orders[lap][position % count]))
        return chosen

    def score(self, rollout: Rollout) -> Experience:
        """Score this process's episodes, gather everybody's, whiten over all."""
        settings = self.config.ppo
        with unsharded(self.model, self.accelerator) as model:
            model.eval()
            experience = score(
                rollout, policy=model.policy, reference=self.reference_logprobs, value_model=model.value_model,
                rewards=lambda part: sequence_scores(self.reward_model, part.ids, part.mask),
                normalise=self.score_scale, kl_coef=self.kl_coef, settings=settings,
                temperature=self.config.sampling.temperature, microbatch=self.config.optim.microbatch_size,
            )  # fmt: skip
        experience = gather(experience, self.accelerator, self.pad_id)
        if settings.whiten_advantages:
            whitened = masked_whiten(experience.advantages, experience.response_mask)
            experience = replace(experience, advantages=whitened * experience.response_mask)
        return experience

    def reference_logprobs(self, part: Rollout) -> Tensor:
        """Log-probs of the response under the model that the policy started from, [B, R] nats."""
        temperature = self.config.sampling.temperature
        if self.reference is not None:
            return response_logprobs(self.reference, part, temperature)[0]
        with reference_policy(self.accelerator.unwrap_model(self.model).policy) as model:
            return response_logprobs(model, part, temperature)[0]

    def update(self, experience: Experience) -> Stats:
        """Epochs x minibatches optimizer updates; each index is used once per epoch."""
        settings, a = self.config.ppo, self.accelerator
        self.model.train()
        sums: dict[str, Tensor] = {}
        tokens, first_error, norms = 0.0, 0.0, []
        for epoch in range(settings.epochs):
            order = torch.randperm(len(experience), generator=_generator(self.config.seed, 2, self.step, epoch))
            for number, minibatch in enumerate(order.chunk(settings.minibatches)):
                total = experience.response_mask[minibatch].sum()
                error = self.accumulate(experience, minibatch, total, sums)
                if epoch == 0 and number == 0:
                    first_error = error
                self.set_learning_rates((self.step * settings.epochs + epoch) * settings.minibatches + number)
                norms.append(self.optimizer_step())
                tokens += float(total)
        if a.num_processes > 1:
            sums = {k: a.reduce(v, "sum") for k, v in sums.items()}
        stats = {k: float(v) / tokens for k, v in sums.items()}
        stats |= {"first_ratio_error": first_error, "grad_norm": sum(norms) / len(norms)}
        return stats

    def accumulate(self, experience: Experience, minibatch: Tensor, total: Tensor, sums: dict[str, Tensor]) -> float:
        """Backward over this process's share of a minibatch; returns the largest |ratio - 1| seen."""
        a, o = self.accelerator, self.config.optim
        mine = minibatch[a.process_index :: a.num_processes]
        mine = mine[experience.mask[mine].sum(dim=1).argsort()]  # rows of like length together: less padding
        parts = mine.split(o.microbatch_size)
        worst = 0.0
        for i, rows in enumerate(parts):
            part = experience.select(rows)
            last = i == len(parts) - 1
            with nullcontext() if last else a.no_sync(self.model):
                logprobs, entropy, values = self.model(part, self.config.sampling.temperature)
                loss, numbers = self.losses(part, logprobs, entropy, values)
                # The engine averages gradients over processes; the global count already divides by all tokens.
                a.backward(loss / total * a.num_processes)
            worst = max(worst, float(numbers.pop("ratio_error")))
            for key, value in numbers.items():
                sums[key] = sums.get(key, torch.zeros_like(value)) + value
        return worst

    def losses(self, part: Experience, logprobs: Tensor, entropy: Tensor, values: Tensor) -> tuple[Tensor, Any]:
        """Summed loss of a microbatch, and sums over its response tokens of what is logged."""
        settings, mask = self.config.ppo, part.response_mask
        policy = policy_loss(logprobs, part.old_logprobs, part.advantages, clip_range=settings.clip_range)
        value = value_loss(values, part.values, part.returns, clip_range=settings.value_clip_range)
        policy_sum, value_sum = (policy * mask).sum(), (value * mask).sum()
        with torch.no_grad():
            ratio = (logprobs - part.old_logprobs).exp()
            off = (ratio - 1.0).abs() * mask
            numbers = {
                "policy_loss": policy_sum.detach(),
                "value_loss": value_sum.detach(),
                "entropy": (entropy * mask).sum(),
                "clip_fraction": (off > settings.clip_range).sum().to(off.dtype),
                # k3 of KL(old || new): the samples come from the old policy.
                "approx_kl": (kl_estimate(part.old_logprobs, logprobs, "k3") * mask).sum(),
                "ratio_error": off.max(),
            }
        return policy_sum + settings.value_coef * value_sum, numbers

    def optimizer_step(self) -> float:
        """Clip, refuse a non-finite gradient, step. Returns the norm before clipping.

        Raises: TrainingError before the step if the gradient is not finite.
        """
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.max_grad_norm))
        if norm != norm or norm == float("inf"):
            raise TrainingError(
                f"gradient norm is {norm}", where=f"step {self.step}, before the optimizer step",
                do="lower optim.learning_rate",
            )  # fmt: skip
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def set_learning_rates(self, update: int) -> None:
        """Warm-up, then linear decay to 0 over all updates, for both parameter groups."""
        o = self.config.optim
        warmup = o.warmup_fraction * self.updates
        factor = min(1.0, (update + 1) / warmup) if warmup else 1.0
        if o.schedule == "linear":
            factor *= max(0.0, 1.0 - max(0.0, update - warmup) / max(1.0, self.updates - warmup))
        rates = (o.learning_rate, o.value_learning_rate)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor

    def steer_kl(self, experience: Experience) -> None:
        """Move the KL coefficient towards its target."""
        kl = self.config.kl
        if kl.target is not None:
            observed = float(experience.kl_per_sequence.mean())
            self.kl_coef = adaptive_kl(self.kl_coef, observed, kl.target, kl.horizon, len(experience))

    def describe(self, e: Experience) -> Stats:
        """What a rollout looked like."""
        k3 = kl_estimate(e.old_logprobs, e.ref_logprobs, "k3") * e.response_mask
        return {
            "score": float(e.raw_scores.mean()),
            "score_normalized": float(e.scores.mean()),
            "score_std": float(e.raw_scores.std(unbiased=False)),
            "kl": float(e.kl_per_sequence.mean()),
            "kl_k3": float(k3.sum(dim=1).mean()),
            "kl_coef": self.kl_coef,
            "response_length": float(e.response_length.float().mean()),
            "finished": float(e.finished.float().mean()),
            "explained_variance": float(explained_variance(e.values, e.returns, e.response_mask)),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "episodes": float((self.step + 1) * len(e)),
        }


def gather(experience: Experience, accelerator: Any, pad_id: int) -> Experience:
    """Everybody's episodes on every process, in slot order."""
    if accelerator.num_processes > 1:
        experience = merge(_exchange(experience, accelerator), pad_id)
    return experience.select(experience.index.argsort())


def _exchange(experience: Experience, accelerator: Any) -> list[Experience]:
    device = experience.response_ids.device
    columns = {f.name: getattr(experience, f.name).cpu() for f in fields(Experience)}
    everybody: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(everybody, columns)
    return [Experience(**{k: v.to(device) for k, v in part.items()}) for part in everybody]


def _generator(*parts: int) -> torch.Generator:
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)
