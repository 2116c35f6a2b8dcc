"""One case of tests/bench/gpu.py in a process of its own: make the models on the device, run PPO, print what it took.

    python -m tests.bench.gpu_sides machine [tiny]
    python -m tests.bench.gpu_sides case CASE RATES     (a tests.bench.gpu_cases.Case and MachineRates, as JSON)

After every PPO step the whole result so far is printed as one line, so that a process that is ended at its time limit
loses the unfinished step only. Each phase waits for the device at its beginning and end. Models have random weights
and are made from a configuration; nothing is downloaded.
"""

from __future__ import annotations

import json
import platform
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from rlhf import PPOTrainer
from rlhf.config.schema import PPOConfig
from rlhf.console import Console
from rlhf.data.records import Prompt
from rlhf.data.render import Renderer
from rlhf.distributed.engine import inference_device, quiet_libraries
from rlhf.models.adapters import adapter_parameters, add_adapter
from rlhf.models.heads import Float32Head
from rlhf.models.load import set_stop_tokens
from rlhf.models.shared_base import attach_new_value_model
from rlhf.preflight.benchmark import phase_limits, track_peak_memory
from rlhf.preflight.cost import GEMM_SIZES, MachineRates
from rlhf.preflight.memory_formulas import Sharding
from rlhf.preflight.model_shapes import ppo_model_shapes
from rlhf.preflight.stage_memory import DataProfile, EstimateInput, estimate_memory
from rlhf.stages.pretrain import new_tokenizer
from rlhf.trainers.ppo.health import HealthMonitor
from rlhf.trainers.ppo.inputs import TokenizedPrompts
from tests.bench.gpu_cases import PHASES, SHAPES, Case, Result

MARK = "RESULT "  # begins the lines that the parent process reads
TOKENIZER_SIZE = 320
LEARNING_RATE = 1e-6
REWARD_ADAPTER = "reward_model_1"
NO_MEMORY = ("out of memory", "can't allocate memory")


def emit(result: Result) -> None:
    """Print a result for the parent process."""
    print(MARK + json.dumps(result), flush=True)


def wait_for_device(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_machine(device: torch.device, sizes: Sequence[int]) -> Result:
    """Return the device, its rates measured with matrices of these sizes, and the versions of the libraries."""
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else platform.processor() or platform.machine()
    memory = torch.cuda.get_device_properties(device).total_memory if gpu else 0
    versions = {library: version(library) for library in ("torch", "transformers", "trl", "peft")}
    return {"device": name, "gpu": gpu, "memory": memory, "versions": versions} | asdict(
        MachineRates.measure(device, sizes)
    )


def model_config(case: Case, renderer: Renderer) -> Any:
    """Return the configuration of the case's shape."""
    from transformers import Qwen3Config

    shape = SHAPES[case.shape]
    return Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=4096,
        pad_token_id=renderer.pad_id,
        eos_token_id=renderer.end_id,
        bos_token_id=None,
        num_labels=1,
    )


def new_policy(config: Any, device: torch.device, dtype: torch.dtype, renderer: Renderer) -> Any:
    """Make a causal language model with random weights on the device."""
    from transformers import AutoModelForCausalLM

    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    set_stop_tokens(model, renderer)
    return model.eval()


def new_scorer(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Make a model with one output and random weights on the device."""
    from transformers import AutoModelForSequenceClassification

    with device:
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
        model.score = Float32Head(config.hidden_size, 1)
    torch.nn.init.normal_(model.score.weight, std=config.hidden_size**-0.5)
    return model.eval()


def new_prompts(case: Case) -> TokenizedPrompts:
    """Draw prompts of random tokens: neither special tokens nor single bytes of the small tokenizer."""
    draw = random.Random(case.seed)
    ordinary = range(TOKENIZER_SIZE, SHAPES[case.shape].vocabulary)
    rows = [draw.choices(ordinary, k=draw.randint(case.shortest, case.longest)) for _ in range(case.episodes)]
    records = [Prompt([{"role": "user", "content": f"prompt {i}"}], f"prompt {i}", {}) for i in range(case.episodes)]
    return TokenizedPrompts(rows, records)


def new_renderer() -> Renderer:
    """Make a tokenizer that is smaller than the models' vocabulary; it only provides the special tokens."""
    return Renderer(new_tokenizer(iter(["what does a cow say? a cow says moo"]), TOKENIZER_SIZE))


def ppo_config(case: Case, folder: Path) -> PPOConfig:
    """Return the case as a configuration of `rlhf ppo`; `folder` has the models' configuration and no weights."""
    source = {"path": str(folder), "dtype": "bfloat16" if case.lora else "float32"}
    return PPOConfig.model_validate(
        {
            "output_dir": str(folder / "unused"),
            "seed": case.seed,
            "policy": source,
            "reward_model": source,
            "roles": "shared" if case.lora else "auto",
            "data": {"prompts": [{"path": "unused"}], "max_prompt_tokens": case.longest},
            # A random model ends a response with a probability of 1 in the size of its vocabulary at each token.
            "sampling": {"max_new_tokens": case.response, "batch_size": case.episodes},
            "ppo": {
                "steps": 1 + case.steps,
                "rollout_size": case.episodes,
                "epochs": 1,
                "minibatches": case.minibatches,
                "normalize_scores": "raw",
            },
            "kl": {"target": None},
            "optim": {
                "learning_rate": LEARNING_RATE,
                "value_learning_rate": LEARNING_RATE,
                "schedule": "constant",
                "microbatch_size": case.microbatch,
            },
            "peft": {"method": "lora", "r": case.lora} if case.lora else {},
            "watch": {"broken": "continue"},  # it is reported with the result
        }
    )


def predicted_bytes(config: PPOConfig, prompts: TokenizedPrompts, *, gpu: bool) -> dict[str, float]:
    """Return phase -> peak memory that `rlhf check` predicts for responses of the maximum length."""
    lengths = tuple(sorted(len(ids) for ids in prompts.ids))
    data = DataProfile(len(lengths), sum(lengths), lengths[-1], 1.0, lengths)
    shapes = ppo_model_shapes(config, {}, shared_base=config.peft.enabled, shared_tokenizer=True)
    estimate = estimate_memory(EstimateInput("ppo", config, shapes, data, Sharding(), gpu))
    return {phase: estimate.phase_bytes(phase) for phase in PHASES}


class BrokenInvariants(HealthMonitor):
    """Monitor that logs broken invariants only: the metrics of a random model are outside their healthy ranges."""

    def unhealthy(self, *_: Any) -> None:
        """Ignore the metrics."""


def make_trainer(
    case: Case, config: PPOConfig, device: torch.device, renderer: Renderer, notes: list[str]
) -> tuple[PPOTrainer, Any]:
    """Make the models and the trainer. Returns: the trainer, and its reward model."""
    shape = model_config(case, renderer)
    torch.manual_seed(case.seed)
    policy = new_policy(shape, device, torch.bfloat16 if case.lora else torch.float32, renderer)
    if case.lora:
        policy = add_adapter(policy, config.peft, "CAUSAL_LM")
        reward = attach_new_value_model(policy, config.policy.path, REWARD_ADAPTER)
        torch.nn.init.normal_(reward.score.weight, std=shape.hidden_size**-0.5)
        for parameter in adapter_parameters(policy, REWARD_ADAPTER).values():
            parameter.requires_grad_(False)
        value = attach_new_value_model(policy, config.policy.path)
    else:
        reward, value = (new_scorer(shape, device, torch.float32) for _ in range(2))
    settings = config.settings
    trainer = PPOTrainer(
        policy,
        reward,
        new_prompts(case),
        settings,
        tokenizer=renderer,
        value_model=value,
        monitor=BrokenInvariants(settings.watch, None, notes.append),
        console=Console(quiet=True),
    )
    return trainer, reward


class PhaseWatch:
    """Wrapper of a trainer's phases: each waits for the device, and peak memory and optimizer steps are counted.

    Attributes:
        experience: what the last update was given.
        updates: optimizer steps so far, counted where torch makes them.
    """

    def __init__(self, trainer: PPOTrainer, result: Result) -> None:
        """Wrap the phases; the result names the phase that runs, and the peak of every phase in bytes."""
        self.result, self.experience, self.updates = result, None, 0
        self.peaks = track_peak_memory(trainer)
        for name in PHASES:
            setattr(trainer, name, self._watched(name, getattr(trainer, name), trainer.accelerator.device))
        register_optimizer_step_post_hook(self._count)

    def _watched(self, name: str, phase: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            self.result["phase"] = name
            self.experience = arguments[0] if name == "update" else None
            wait_for_device(device)
            found = phase(*arguments)
            wait_for_device(device)
            self.result["peaks"] = {phase: gib * 2**30 for phase, gib in self.peaks.items()}
            return found

        return run

    def _count(self, *_: Any) -> None:
        self.updates += 1


def run_ours(case: Case, rates: MachineRates, device: torch.device, result: Result) -> None:
    """Run the case with our trainer; the result is completed and printed after every step."""
    started_at, renderer = time.monotonic(), new_renderer()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_config(case, renderer).save_pretrained(folder)
        save_file({}, folder / "model.safetensors")  # a folder without weights would be refused as a model
        config = ppo_config(case, folder)
        result["predicted"] = predicted_bytes(config, new_prompts(case), gpu=device.type == "cuda")
        trainer, reward = make_trainer(case, config, device, renderer, result["notes"])
    result["load"] = time.monotonic() - started_at
    watch = PhaseWatch(trainer, result)
    components: Any = SimpleNamespace(rewards=SimpleNamespace(models=lambda: [reward]))
    for _ in range(trainer.settings.steps):
        before = watch.updates
        stats = trainer.run_step()
        limits = phase_limits(config, components, trainer, watch.experience, rates, 0.0)
        step: dict[str, float] = {"updates": float(watch.updates - before)}
        for phase, limit in zip(PHASES, limits, strict=True):
            seconds = stats[f"time_{phase}"]
            step |= {phase: seconds, f"{phase}_limit": limit.seconds, f"{phase}_tokens": float(limit.tokens)}
        step["step"] = sum(step[phase] for phase in PHASES)
        result["steps"].append(step)
        emit(result)


def run_case(case: Case, run: Callable[[Result], None]) -> None:
    """Run a case and print its result; running out of memory is a result, and so is any other error."""
    result: Result = {"status": "measured", "phase": "load", "steps": [], "notes": []}
    try:
        run(result)
    except Exception as error:
        kind = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(t in str(error) for t in NO_MEMORY)
        result |= {"status": "out of memory" if kind else "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
        traceback.print_exc()
    emit(result)


def main() -> None:
    """Describe the machine, or run a case."""
    quiet_libraries(telemetry=False)
    device = inference_device()
    if sys.argv[1] == "machine":
        emit(describe_machine(device, (256,) if sys.argv[2:] == ["tiny"] else GEMM_SIZES))
        return
    case, rates = Case(**json.loads(sys.argv[2])), MachineRates(**json.loads(sys.argv[3]))
    if case.side == "trl":
        from tests.bench.gpu_trl import run_trl

        run_case(case, lambda result: run_trl(case, device, result))
    else:
        run_case(case, lambda result: run_ours(case, rates, device, result))


if __name__ == "__main__":
    main()
