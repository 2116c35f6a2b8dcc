"""`rlhf bench`: a few steps of PPO, each phase beside what this machine could do.

limit   real tokens only, at the measured matrix and memory rates (rlhf.preflight.cost); nothing can be faster
floor   the limit with this runtime's own cost of a decode step, measured on a batch of one
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf.config.schema import PPOConfig
from rlhf.console import Console
from rlhf.generation.native import generate_rollout
from rlhf.models.heads import SharedValueHead
from rlhf.models.packed_batch import can_pack, microbatches, pack
from rlhf.preflight.cost import ADAMW_BYTES, MachineRates, ModelCost
from rlhf.rollout.types import Experience
from rlhf.runs.run_dir import peak_memory_gib
from rlhf.stages.ppo import PPOComponents, load_components
from rlhf.trainers.ppo.callbacks import PPOCallback
from rlhf.trainers.ppo.stats import StepStats
from rlhf.trainers.ppo.trainer import PPOTrainer

MEASURED_PHASES = ("sample", "score", "update")
CLEAR_REFS_FILE = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class PhaseLimit:
    """What one phase of one step must take."""

    operations: float
    seconds: float
    floor: float
    tokens: int  # real tokens: responses for sampling, prompts and responses else
    bound: str


def run_benchmark(config: PPOConfig, console: Console, *, steps: int) -> None:
    """Run one step to warm up and `steps` more, and print the table. Writes nothing.

    Raises: as `rlhf ppo`.
    """
    config = config.model_copy(update={"ppo": config.ppo.model_copy(update={"steps": steps + 1, "value_warmup": 0})})
    ready = load_components(config, console)
    recorder = _Recorder()
    trainer = ready.trainer(config, callbacks=[recorder], console=console)
    memory = watch_memory(trainer)
    trainer.train()
    seen = recorder.steps
    device = trainer.accelerator.device
    machine, tau = MachineRates.measure(device), decode_step(trainer, ready)
    console.note(
        f"this machine: {machine.flops / 1e9:.0f} GFLOP/s in float32, {machine.flops_bfloat16 / 1e9:.0f} in bfloat16, "
        f"{machine.bandwidth / 1e9:.1f} GB/s; one decode step of one row: {1e3 * tau:.2f} ms"
    )
    limits = [phase_limits(config, ready, trainer, experience, machine, tau) for experience, _ in seen[1:]]
    times = [[stats[f"time_{phase}"] for phase in MEASURED_PHASES] for _, stats in seen[1:]]
    _show(limits, times, memory, console)
    tokens, rows = batch_fill(config, seen[-1][0], trainer)
    console.note(f"real tokens of those scored and updated: {100 * tokens / rows:.1f} %")


class _Recorder(PPOCallback):
    """Keeps the rollout and the numbers of every step."""

    def __init__(self) -> None:
        self.steps: list[tuple[Experience, StepStats]] = []

    def on_step_end(self, trainer: Any, experience: Experience, stats: StepStats) -> None:
        """Keep one step."""
        self.steps.append((experience, stats))


def watch_memory(trainer: PPOTrainer) -> dict[str, float]:
    """Most memory that each phase holds from now on, in GiB: of the GPU, or else of this process."""
    peaks = dict.fromkeys(MEASURED_PHASES, 0.0)
    gpu = trainer.accelerator.device.type == "cuda"

    def watched(name: str) -> Any:
        phase = getattr(trainer, name)

        def run(*arguments: Any) -> Any:
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            elif CLEAR_REFS_FILE.exists():
                CLEAR_REFS_FILE.write_text("5", encoding="ascii")  # Linux: the peak starts again at what is held now
            result = phase(*arguments)
            peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else peak_memory_gib()
            peaks[name] = max(peaks[name], peak)
            return result

        return run

    for name in MEASURED_PHASES:
        setattr(trainer, name, watched(name))
    return peaks


@torch.no_grad()
def decode_step(trainer: PPOTrainer, ready: PPOComponents) -> float:
    """Median seconds of a decode step of one row: what Python and kernel launches cost, weights next to nothing."""
    policy = trainer.accelerator.unwrap_model(trainer.models.trained).policy
    settings, times = trainer.settings.sampling, []
    for length in (8, 24) * 4:
        chosen = settings.model_copy(update={"max_new_tokens": length, "min_new_tokens": length, "stop": ()})
        begun = time.perf_counter()
        generate_rollout(
            policy,
            [(0, ready.prompts.ids[0])],
            chosen,
            seed=1,
            step=0,
            end_id=trainer.renderer.end_id,
            pad_id=trainer.renderer.pad_id,
            device=trainer.accelerator.device,
        )
        times.append(time.perf_counter() - begun)
    return max(0.0, (statistics.median(times[1::2]) - statistics.median(times[::2])) / 16)


def phase_limits(
    config: PPOConfig, ready: PPOComponents, trainer: PPOTrainer, e: Experience, machine: MachineRates, tau: float
) -> tuple[PhaseLimit, ...]:
    """Limits of the three phases for one step's experience."""
    module = trainer.accelerator.unwrap_model(trainer.models.trained)
    policy = ModelCost.of(module.policy)
    value = None if isinstance(module.value_model, SharedValueHead) else ModelCost.of(module.value_model)
    everything, responses = int(e.mask.sum()), int(e.response_mask.sum())
    context = float(e.mask.sum(dim=1).double().square().sum() / 2 / everything)
    rate = machine.rate(trainer.bfloat16 or policy.weight_bytes == 2)
    forward = policy.forward(everything, context, responses)
    scorers = [ModelCost.of(model) for model in ready.rewards.models()]
    score = 2 * forward + sum(s.forward(everything, context) for s in (*scorers, *([value] if value else [])))
    whole = not config.peft.enabled
    passes = forward * policy.backward_factor(whole)
    trainable = policy.trainable
    if value is not None:
        passes += value.forward(everything, context) * value.backward_factor(whole)
        trainable += value.trainable
    update = config.ppo.epochs * passes
    optimizer = config.ppo.epochs * config.ppo.minibatches * ADAMW_BYTES * trainable / machine.bandwidth
    seconds = update / rate + optimizer
    bound = "matrix products" if update / rate > optimizer else "optimizer"
    return (
        sampling_limit(config, policy, e, machine, rate, tau),
        PhaseLimit(score, score / rate, score / rate, everything, "matrix products"),
        PhaseLimit(update, seconds, seconds, everything * config.ppo.epochs, bound),
    )


def sampling_limit(
    config: PPOConfig, policy: ModelCost, e: Experience, machine: MachineRates, rate: float, tau: float
) -> PhaseLimit:
    """Prefill, then one step after the other: operations or weights, whichever takes longer."""
    prompts, lengths = e.prompt_mask.sum(dim=1), e.response_length
    operations = policy.forward(int(prompts.sum()), float(prompts.double().mean()) / 2, len(e))
    limit = floor = operations / rate
    by_weights = 0.0
    for rows in prompts.argsort().split(config.sampling.batch_size):
        for t in range(1, int(lengths[rows].max())):
            active = lengths[rows] > t
            number = int(active.sum())
            step = policy.forward(number, float((prompts[rows][active] + t).double().mean()), number)
            weights = policy.decode_bytes / machine.bandwidth
            operations += step
            limit += max(step / rate, weights)
            floor += max(step / rate, weights, tau)
            by_weights += weights if weights > step / rate else 0.0
    return PhaseLimit(
        operations, limit, floor, int(lengths.sum()), "weights" if by_weights > limit / 2 else "matrix products"
    )


def batch_fill(config: PPOConfig, e: Experience, trainer: PPOTrainer) -> tuple[int, int]:
    """(real tokens, tokens computed) of a pass over the rollout as it is scored."""
    policy = trainer.accelerator.unwrap_model(trainer.models.trained).policy
    packed, computed = can_pack(policy), 0
    for rows in microbatches(e.mask.sum(dim=1), config.optim.microbatch_size, packed=packed):
        part = e.select(rows)
        computed += pack(part.ids, part.mask).ids.numel() if packed else part.ids.numel()
    return int(e.mask.sum()), computed


def _show(
    limits: list[tuple[PhaseLimit, ...]], times: list[list[float]], memory: dict[str, float], console: Console
) -> None:
    """Medians over the steps; memory is the peak of all."""
    rows = []
    totals = [0.0, 0.0, 0.0]
    for i, phase in enumerate(MEASURED_PHASES):
        taken, limit, floor, operations, tokens = (
            statistics.median(values)
            for values in (
                [t[i] for t in times],
                [s[i].seconds for s in limits],
                [s[i].floor for s in limits],
                [s[i].operations for s in limits],
                [s[i].tokens for s in limits],
            )
        )
        totals = [totals[0] + taken, totals[1] + limit, totals[2] + floor]
        rows.append(
            [
                phase,
                f"{taken:.3f} s",
                f"{tokens / taken:,.0f}",
                f"{operations / taken / 1e9:.1f}",
                f"{limit:.3f} s",
                f"{100 * limit / taken:.0f} %",
                f"{100 * floor / taken:.0f} %",
                limits[0][i].bound,
                f"{memory[phase]:.2f} GiB",
            ]
        )
    taken, limit, floor = totals
    rows.append(
        [
            "step",
            f"{taken:.3f} s",
            "",
            "",
            f"{limit:.3f} s",
            f"{100 * limit / taken:.0f} %",
            f"{100 * floor / taken:.0f} %",
            "",
            f"{max(memory.values()):.2f} GiB",
        ]
    )
    header = [
        "phase",
        "time",
        "real tokens/s",
        "GFLOP/s",
        "limit",
        "limit / time",
        "floor / time",
        "bound by",
        "memory",
    ]
    console.table(f"One PPO step (median of {len(times)})", header, rows)
