"""`rlhf bench`: measure a few steps of PPO, and compare each phase with lower bounds on its time on this machine.

limit   time for the real tokens only, at the measured matrix and memory rates (rlhf.preflight.cost)
floor   the limit, with the overhead of a decode step in this runtime, measured on a batch of one
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
    """Lower bounds on the cost of one phase of one step."""

    operations: float
    seconds: float  # the limit
    floor: float  # seconds
    tokens: int  # real tokens: of the responses for sampling, of prompts and responses otherwise
    bound: str  # what bounds the speed: matrix products, weights (reading them) or optimizer


def run_benchmark(config: PPOConfig, console: Console, *, steps: int) -> None:
    """Run one warm-up step and `steps` measured steps of PPO, and print the table. Nothing is written.

    Raises: as `rlhf ppo`.
    """
    config = config.model_copy(update={"ppo": config.ppo.model_copy(update={"steps": steps + 1, "value_warmup": 0})})
    components = load_components(config, console)
    recorder = _Recorder()
    trainer = components.trainer(config, callbacks=[recorder], console=console)
    memory = track_peak_memory(trainer)
    trainer.train()
    steps_recorded = recorder.steps
    device = trainer.accelerator.device
    machine, decode_seconds = MachineRates.measure(device), measure_decode_step(trainer, components)
    console.note(
        f"this machine: {machine.flops / 1e9:.0f} GFLOP/s in float32, {machine.flops_bfloat16 / 1e9:.0f} in bfloat16, "
        f"{machine.bandwidth / 1e9:.1f} GB/s; one decode step of one row: {1e3 * decode_seconds:.2f} ms"
    )
    limits = [
        phase_limits(config, components, trainer, experience, machine, decode_seconds)
        for experience, _ in steps_recorded[1:]
    ]
    times = [[stats[f"time_{phase}"] for phase in MEASURED_PHASES] for _, stats in steps_recorded[1:]]
    _print_table(limits, times, memory, console)
    tokens, rows = batch_fill(config, steps_recorded[-1][0], trainer)
    console.note(f"real tokens of those scored and updated: {100 * tokens / rows:.1f} %")


class _Recorder(PPOCallback):
    """Callback that keeps the experience and the statistics of every step."""

    def __init__(self) -> None:
        self.steps: list[tuple[Experience, StepStats]] = []

    def on_step_end(self, trainer: Any, experience: Experience, stats: StepStats) -> None:
        """Keep the experience and statistics of one step."""
        self.steps.append((experience, stats))


def track_peak_memory(trainer: PPOTrainer) -> dict[str, float]:
    """Wrap the phases of a trainer so that their peak memory is recorded.

    Returns: phase -> peak in GiB of the GPU, or of this process without one; it is updated whenever a phase runs.
    """
    peaks = dict.fromkeys(MEASURED_PHASES, 0.0)
    gpu = trainer.accelerator.device.type == "cuda"

    def with_peak_memory(name: str) -> Any:
        phase = getattr(trainer, name)

        def run(*arguments: Any) -> Any:
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            elif CLEAR_REFS_FILE.exists():
                CLEAR_REFS_FILE.write_text("5", encoding="ascii")  # Linux: reset the peak to the current value
            result = phase(*arguments)
            peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else peak_memory_gib()
            peaks[name] = max(peaks[name], peak)
            return result

        return run

    for name in MEASURED_PHASES:
        setattr(trainer, name, with_peak_memory(name))
    return peaks


@torch.no_grad()
def measure_decode_step(trainer: PPOTrainer, components: PPOComponents) -> float:
    """Return the median seconds of a decode step of one row: the overhead of Python and kernel launches.

    With one row of a small model, reading the weights takes hardly any time.
    """
    policy = trainer.accelerator.unwrap_model(trainer.models.trained).policy
    settings, times = trainer.settings.sampling, []
    for length in (8, 24) * 4:
        chosen = settings.model_copy(update={"max_new_tokens": length, "min_new_tokens": length, "stop": ()})
        started_at = time.perf_counter()
        generate_rollout(
            policy,
            [(0, components.prompts.ids[0])],
            chosen,
            seed=1,
            step=0,
            end_id=trainer.renderer.end_id,
            pad_id=trainer.renderer.pad_id,
            device=trainer.accelerator.device,
        )
        times.append(time.perf_counter() - started_at)
    return max(0.0, (statistics.median(times[1::2]) - statistics.median(times[::2])) / 16)


def phase_limits(
    config: PPOConfig,
    components: PPOComponents,
    trainer: PPOTrainer,
    experience: Experience,
    machine: MachineRates,
    decode_seconds: float,
) -> tuple[PhaseLimit, ...]:
    """Return the limits of sampling, scoring and updating for one step's experience.

    Args:
        config: configuration of PPO.
        components: models and prompts of the run.
        trainer: the trainer.
        experience: experience of the step.
        machine: measured rates.
        decode_seconds: measured overhead of one decode step.
    """
    module = trainer.accelerator.unwrap_model(trainer.models.trained)
    policy = ModelCost.from_model(module.policy)
    value = None if isinstance(module.value_model, SharedValueHead) else ModelCost.from_model(module.value_model)
    tokens, responses = int(experience.mask.sum()), int(experience.response_mask.sum())
    context = float(experience.mask.sum(dim=1).double().square().sum() / 2 / tokens)
    rate = machine.rate(trainer.models.pair.computes_in_bfloat16 or policy.weight_bytes == 2)
    forward = policy.forward(tokens, context, responses)
    reward_models = [ModelCost.from_model(model) for model in components.rewards.models()]
    score = 2 * forward + sum(s.forward(tokens, context) for s in (*reward_models, *([value] if value else [])))
    all_trained = not config.peft.enabled
    passes = forward * policy.backward_factor(all_trained)
    trainable = policy.trainable
    if value is not None:
        passes += value.forward(tokens, context) * value.backward_factor(all_trained)
        trainable += value.trainable
    update = config.ppo.epochs * passes
    optimizer = config.ppo.epochs * config.ppo.minibatches * ADAMW_BYTES * trainable / machine.bandwidth
    seconds = update / rate + optimizer
    bound = "matrix products" if update / rate > optimizer else "optimizer"
    return (
        sampling_limit(config, policy, experience, machine, rate, decode_seconds),
        PhaseLimit(score, score / rate, score / rate, tokens, "matrix products"),
        PhaseLimit(update, seconds, seconds, tokens * config.ppo.epochs, bound),
    )


def sampling_limit(
    config: PPOConfig,
    policy: ModelCost,
    experience: Experience,
    machine: MachineRates,
    rate: float,
    decode_seconds: float,
) -> PhaseLimit:
    """Return the limit of sampling: the prefill, then one decode step after the other.

    A decode step takes the time of its operations or of reading the weights, whichever is longer.
    """
    prompts, lengths = experience.prompt_mask.sum(dim=1), experience.response_length
    operations = policy.forward(int(prompts.sum()), float(prompts.double().mean()) / 2, len(experience))
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
            floor += max(step / rate, weights, decode_seconds)
            by_weights += weights if weights > step / rate else 0.0
    return PhaseLimit(
        operations, limit, floor, int(lengths.sum()), "weights" if by_weights > limit / 2 else "matrix products"
    )


def batch_fill(config: PPOConfig, experience: Experience, trainer: PPOTrainer) -> tuple[int, int]:
    """Return (real tokens, computed tokens) of one pass over the rollout, batched as for scoring."""
    policy = trainer.accelerator.unwrap_model(trainer.models.trained).policy
    packed, computed = can_pack(policy), 0
    for rows in microbatches(experience.mask.sum(dim=1), config.optim.microbatch_size, packed=packed):
        part = experience.select(rows)
        computed += pack(part.ids, part.mask).ids.numel() if packed else part.ids.numel()
    return int(experience.mask.sum()), computed


def _print_table(
    limits: list[tuple[PhaseLimit, ...]], times: list[list[float]], memory: dict[str, float], console: Console
) -> None:
    """Print the medians over the steps; memory is the peak over all steps."""
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
