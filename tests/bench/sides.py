"""A process of its own for each side of a comparison: read the models, do the PPO work, say what it took.

    python -m tests.bench.sides build|ours|trl WORK      (WORK: a tests.bench.work.Work as JSON)

Prints one line of JSON. Imports and loading are not timed, and a first step warms up; then every step is measured from
the end of the one before. Optimizer steps are counted where torch makes them, whatever the settings promise.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.bench.work import ROOT, Result, Work

ALPHA = 32.0  # of LoRA
ADAM_EPS = 1e-5
TRL = "1.12.0"
THEIR_TRAINER = "trl.experimental.ppo.ppo_trainer"


def peak_mib() -> float:
    """Most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Meter:
    """What every PPO step takes. Made before any model is there."""

    def __init__(self, trainer: str) -> None:
        """Import a side's trainer, by its module's name, and what it imports later on."""
        # Accelerate imports DeepSpeed, if it is installed, while it trains: on both sides, and as memory of neither.
        for name in (trainer, "transformers.models.llama.modeling_llama", "datasets", "peft", "deepspeed"):
            with suppress(ImportError):
                import_module(name)
        self.imports, self.updates, self.marks = peak_mib(), 0, list[dict[str, float]]()
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.updates += 1

    def mark(self, **numbers: float) -> None:
        """The end of a step."""
        clocks = {"wall": time.perf_counter(), "cpu": time.process_time(), "updates": float(self.updates)}
        self.marks.append(clocks | numbers)

    def result(self) -> Result:
        """Of all steps but the first."""
        differ = ("wall", "cpu", "updates")
        steps = [after | {k: after[k] - before[k] for k in differ} for before, after in pairwise(self.marks)]
        versions = {name: version(name) for name in ("torch", "transformers", "trl")}
        return {"steps": steps, "imports": self.imports, "peak": peak_mib(), "versions": versions}


def adapter(work: Work) -> dict[str, Any]:
    """Our configuration of the adapter that both sides train."""
    return {"method": "lora", "r": work.lora, "alpha": ALPHA} if work.lora else {}


def build(work: Work) -> Result:
    """Policy, reward model and prompts; with LoRA the reward model also as an adapter on the policy's folder."""
    from rlhf.config.sections import ModelSource, Peft
    from rlhf.console import Console
    from rlhf.models.load import count_parameters
    from rlhf.models.model_metadata import save_tokenizer_and_handover
    from rlhf.models.policy import load_causal
    from rlhf.models.reward_models import load_scorer, new_reward_model
    from rlhf.stages.lifecycle import open_tokenizer

    random.seed(work.seed)
    policy = Path(work.path("policy"))
    if work.demo:
        shutil.copytree(ROOT / "data" / "demo" / "model", policy)
    else:
        random_policy(work, policy)
    source, peft = ModelSource(path=str(policy)), Peft.model_validate(adapter(work))
    tokenizer, renderer = open_tokenizer(source, Console(quiet=True))
    model = new_reward_model(source, peft, pad_id=renderer.pad_id, vocab_size=len(tokenizer), seed=work.seed)
    folders = ["reward_adapter", "reward"] if work.lora else ["reward"]
    for name in folders:
        if name == "reward" and work.lora:
            model = load_scorer(ModelSource(path=work.path("reward_adapter")))  # merged
        model.save_pretrained(work.path(name))
        save_tokenizer_and_handover(Path(work.path(name)), "reward", renderer, tokenizer)
    rows = prompts(work, renderer)
    Path(work.path("prompts.json")).write_text(json.dumps(rows), encoding="utf-8")
    return {"parameters": count_parameters(load_causal(source))[1], "prompt_tokens": sum(map(len, rows)) / len(rows)}


def random_policy(work: Work, folder: Path) -> None:
    """A Llama with random weights and a tokenizer of the wanted size, learnt from words that mean nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf.data.render import Renderer
    from rlhf.models.load import set_stop_tokens
    from rlhf.models.model_metadata import save_tokenizer_and_handover
    from rlhf.stages.pretrain import new_tokenizer

    words = ("".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(work.vocabulary))
    tokenizer = new_tokenizer(iter([" ".join(words)]), work.vocabulary)
    if len(tokenizer) != work.vocabulary:
        raise RuntimeError(f"the tokenizer has {len(tokenizer)} tokens instead of {work.vocabulary}")
    renderer = Renderer(tokenizer)
    torch.manual_seed(work.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=work.vocabulary,
            hidden_size=work.hidden,
            num_hidden_layers=work.layers,
            num_attention_heads=work.heads,
            num_key_value_heads=work.heads,
            intermediate_size=work.intermediate,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            pad_token_id=renderer.pad_id,
            eos_token_id=renderer.end_id,
            bos_token_id=None,
        )
    )
    set_stop_tokens(model, renderer)
    model.save_pretrained(folder)
    save_tokenizer_and_handover(folder, "sft", renderer, tokenizer)


def prompts(work: Work, renderer: Any) -> list[list[int]]:
    """Token ids; and as many records, which our stage wants to read."""
    number = work.prompts or work.episodes
    if work.demo:
        lines = (ROOT / "data" / "demo" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:number]
        rows = [renderer.prompt(json.loads(line)["prompt"]) for line in lines]
    else:
        lines = [json.dumps({"prompt": [{"role": "user", "content": f"prompt {i}"}]}) for i in range(number)]
        ordinary = range(300, work.vocabulary)  # neither special tokens nor single bytes
        lengths = [random.randint(work.shortest, work.longest) for _ in range(number)]
        rows = [random.choices(ordinary, k=length) for length in lengths]
    Path(work.path("prompts.jsonl")).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


def read_prompts(work: Work) -> list[list[int]]:
    """What `prompts` wrote, as many as are wanted."""
    rows: list[list[int]] = json.loads(Path(work.path("prompts.json")).read_text(encoding="utf-8"))
    return rows[: work.prompts or work.episodes]


def our_config(work: Work, longest: int) -> dict[str, Any]:
    """The work as a configuration of `rlhf ppo`."""
    from rlhf.config.schema import PPOConfig

    reward = work.path("reward_adapter" if work.lora else "reward")
    shared = {"roles": "shared"} if work.lora and "roles" in PPOConfig.model_fields else {}
    return shared | {
        "output_dir": work.path("run"),
        "seed": work.seed,
        "policy": {"path": work.path("policy"), "attention": work.attention},
        "reward_model": {"path": reward, "attention": work.attention},
        "data": {
            "prompts": [{"path": work.path("prompts.jsonl"), "format": "prompt"}],
            "deduplicate": False,
            "max_prompt_tokens": max(longest, 64),
        },
        "sampling": {"max_new_tokens": work.response, "batch_size": work.decoded},
        "ppo": {
            "steps": work.steps + 1,
            "rollout_size": work.episodes,
            "epochs": work.epochs,
            "minibatches": work.minibatches,
            "normalize_scores": "raw",
            "missing_end_penalty": work.penalty,
            "value_model": "trunk" if work.trunk else "auto",
        },
        "kl": {"coef": work.kl_coef, "target": None},
        "optim": {
            "learning_rate": work.learning_rate,
            "value_learning_rate": work.learning_rate,
            "schedule": "constant",
            "adam_eps": ADAM_EPS,
            "precision": work.precision,
            "microbatch_size": work.microbatch or work.episodes // work.minibatches,
        },
        "peft": adapter(work),
    }


def ours(work: Work) -> Result:
    """Our trainer does the work."""
    from rlhf.config.schema import PPOConfig

    meter, rows = our_meter(), read_prompts(work)
    config = PPOConfig.model_validate(our_config(work, max(map(len, rows))))

    def report(step: int, experience: Any, stats: dict[str, float]) -> None:
        lengths = experience.response_mask.sum(dim=1)
        phases = {name: stats[f"time_{name}"] for name in ("sample", "score", "update")}
        meter.mark(
            tokens=int(lengths.sum()), longest=int(lengths.max()), everything=int(experience.mask.sum()), **phases
        )

    our_trainer(config, report, rows).train()
    return meter.result() | {"roles": getattr(config, "roles", "separate")}


def our_meter() -> Meter:
    """With our libraries quiet, before they are imported."""
    from rlhf.distributed.engine import quiet_libraries

    quiet_libraries(telemetry=False)
    return Meter("rlhf.stages.ppo")


def our_trainer(config: Any, report: Callable[..., None], rows: list[list[int]] | None = None) -> Any:
    """Our trainer, set up as its stage does it; `rows` are token ids in the place of the configuration's prompts."""
    from rlhf.console import Console
    from rlhf.stages.lifecycle import seed_everything
    from rlhf.stages.ppo import load_components
    from rlhf.trainers.ppo.health import HealthMonitor
    from rlhf.trainers.ppo.inputs import TokenizedPrompts
    from tests.trainers.setup import Hooks

    seed_everything(config.seed, deterministic=config.deterministic)
    ready = load_components(config, Console(quiet=True))
    if rows is not None:
        ready = replace(ready, prompts=TokenizedPrompts(rows, ready.prompts.records[: len(rows)]))
    monitor = HealthMonitor(config.watch, None, lambda text: print(text, file=sys.stderr))
    return ready.trainer(config, callbacks=[Hooks(report)], monitor=monitor, console=Console(quiet=True))


def their_config(work: Work, make: Callable[..., Any]) -> Any:
    """The work as TRL's settings. Without accumulation every minibatch is a real optimizer step, in one microbatch."""
    return make(
        output_dir=work.path("trl"),
        seed=work.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        num_sample_generations=0,
        per_device_train_batch_size=work.episodes,
        gradient_accumulation_steps=1,
        num_mini_batches=work.minibatches,
        num_ppo_epochs=work.epochs,
        total_episodes=(work.steps + 1) * work.episodes,
        local_rollout_forward_batch_size=work.decoded,
        response_length=work.response,
        stop_token="eos",
        temperature=1.0,
        missing_eos_penalty=work.penalty,
        kl_coef=work.kl_coef,
        kl_estimator="k1",
        gamma=1.0,
        lam=0.95,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.1,
        whiten_rewards=False,
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_epsilon=ADAM_EPS,
        max_grad_norm=1.0,
    )


def theirs(work: Work) -> Result:
    """TRL's trainer does the work."""
    meter = Meter(THEIR_TRAINER)
    trainer = their_trainer(work)
    sampled = watch_sampling(import_module(THEIR_TRAINER), trainer.processing_class.eos_token_id)
    trainer.log = lambda *_, **__: meter.mark(**sampled)  # called once, at the end of a step
    trainer.train()
    return meter.result()


def their_trainer(work: Work, **others: Any) -> Any:
    """TRL's trainer, with the same models, prompts and settings; `others` replace some of these."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    if version("trl") != TRL:
        raise RuntimeError(f"this is TRL {version('trl')}, not {TRL}")
    options = {"dtype": torch.float32, "attn_implementation": work.attention}
    policy = AutoModelForCausalLM.from_pretrained(work.path("policy"), **options)
    reference = None if work.lora else AutoModelForCausalLM.from_pretrained(work.path("policy"), **options)
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(work.path("reward"), num_labels=1, **options)
        for _ in range(2)
    )
    reward.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(work.path("policy"), padding_side="left")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(policy.generation_config.eos_token_id)  # what ends a response
    if work.precision == "bfloat16":
        use_bfloat16(ppo_trainer)
    adapter = LoraConfig(
        r=work.lora or 1, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    config = their_config(work, lambda **settings: PPOConfig(**(settings | others)))
    return PPOTrainer(
        config,
        tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": read_prompts(work)}),
        peft_config=adapter if work.lora else None,
    )


def watch_sampling(module: Any, end_id: int) -> dict[str, float]:
    """Numbers about the responses that TRL sampled last, kept up to date."""
    generate, seen = module.batch_generation, dict[str, float]()

    def counted(model: Any, queries: Any, *rest: Any) -> Any:
        rows, scores = generate(model, queries, *rest)
        ended = rows[:, queries.shape[1] :] == end_id
        lengths = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, ended.shape[1])
        seen.update(tokens=int(lengths.sum()), longest=ended.shape[1])
        return rows, scores

    module.batch_generation = counted
    return seen


def use_bfloat16(module: Any, device: str = "cpu") -> None:
    """Compute everything of TRL's in bfloat16, as all of ours is, on one type of device.

    Its own setting does nothing with transformers 5, and what `accelerate launch --mixed_precision bf16` sets reaches
    the update alone; sampling and scoring get it here.
    """
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    for name in ("batch_generation", "forward", "get_reward"):
        setattr(module, name, torch.autocast(device, torch.bfloat16)(getattr(module, name)))


def main() -> None:
    """Do one side's work."""
    side, work = sys.argv[1], Work(**json.loads(sys.argv[2]))
    torch.set_num_threads(work.threads)
    print(json.dumps({"build": build, "ours": ours, "trl": theirs}[side](work)))


if __name__ == "__main__":
    main()
