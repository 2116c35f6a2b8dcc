"""TRL's PPO on a case of tests/bench/gpu.py: the same models, prompts, minibatches and optimizer steps as ours.

TRL has PPO up to 1.12. It runs as in tests/bench/sides.py: in bfloat16 throughout on a GPU, without gradient
accumulation, and with each minibatch as one microbatch. Its loop does not separate scoring from updates, so that the
time of both is one number, which is called `update`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.bench.gpu_cases import Case, Result
from tests.bench.gpu_sides import (
    LEARNING_RATE,
    emit,
    model_config,
    new_policy,
    new_prompts,
    new_renderer,
    new_scorer,
    wait_for_device,
)
from tests.bench.sides import THEIR_TRAINER, their_config, use_bfloat16, watch_sampling
from tests.bench.work import Work


def work_of(case: Case, folder: str) -> Work:
    """Return the case as the work from which TRL's settings are made."""
    return Work(
        case.name,
        folder=folder,
        response=case.response,
        episodes=case.episodes,
        epochs=1,
        minibatches=case.minibatches,
        decoded=case.episodes,
        learning_rate=LEARNING_RATE,
        steps=case.steps,
        seed=case.seed,
    )


class StepClock:
    """Time and peak memory of sampling and of the rest of each of TRL's steps."""

    def __init__(self, device: torch.device, result: Result) -> None:
        self.device, self.result, self.updates = device, result, 0
        self.result["peaks"] = {"sample": 0.0, "update": 0.0}
        self.start()
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.updates += 1

    def start(self) -> None:
        """Begin a step."""
        self.begun, self.sampling, self.updates = time.monotonic(), 0.0, 0
        self._reset_peak()

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _note_peak(self, phase: str) -> None:
        if self.device.type == "cuda":
            peaks = self.result["peaks"]
            peaks[phase] = max(peaks[phase], float(torch.cuda.max_memory_allocated(self.device)))

    def watch(self, module: Any) -> None:
        """Measure the function that samples in TRL's module."""
        generate: Callable[..., Any] = module.batch_generation

        def measured(*arguments: Any) -> Any:
            self.result["phase"] = "sample"
            self._note_peak("update")
            self._reset_peak()
            wait_for_device(self.device)
            begun = time.monotonic()
            found = generate(*arguments)
            wait_for_device(self.device)
            self.sampling += time.monotonic() - begun
            self._note_peak("sample")
            self._reset_peak()
            self.result["phase"] = "score and update"
            return found

        module.batch_generation = measured

    def stop(self, tokens: float) -> None:
        """End a step, and add it to the result."""
        wait_for_device(self.device)
        seconds = time.monotonic() - self.begun
        self._note_peak("update")
        self.result["steps"].append(
            {
                "updates": float(self.updates),
                "step": seconds,
                "sample": self.sampling,
                "update": seconds - self.sampling,
                "sample_tokens": tokens,
            }
        )
        self.start()


def run_trl(case: Case, device: torch.device, result: Result) -> None:
    """Run the case with TRL's trainer; the result is completed and printed after every step."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    started_at, renderer = time.monotonic(), new_renderer()
    result["notes"].append(f"TRL {version('trl')}")
    module, gpu = import_module(THEIR_TRAINER), device.type == "cuda"
    shape = model_config(case, renderer)
    torch.manual_seed(case.seed)
    policy = new_policy(shape, device, torch.float32, renderer)
    reference = new_policy(shape, device, torch.float32, renderer)
    reference.load_state_dict(policy.state_dict())
    value, reward = (new_scorer(shape, device, torch.float32) for _ in range(2))
    reward.requires_grad_(False)
    tokenizer = renderer.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(renderer.end_id)
    if gpu:
        use_bfloat16(module, "cuda")
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            their_config(work_of(case, folder), lambda **settings: PPOConfig(**(settings | {"use_cpu": not gpu}))),
            tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": new_prompts(case).ids}),
        )
        clock = StepClock(device, result)
        sampled = watch_sampling(module, renderer.end_id)
        clock.watch(module)
        result["load"] = time.monotonic() - started_at

        def end_step(*_: Any, **__: Any) -> None:  # TRL logs once, at the end of a step
            clock.stop(sampled["tokens"])
            emit(result)

        trainer.log = end_step
        clock.start()
        trainer.train()
