"""PPO: the SFT model learns from the reward model, kept near where it started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rlhf.config.schema import PPOConfig
from rlhf.data.render import Renderer, tokenizer_fingerprint
from rlhf.data.sources import load_records
from rlhf.errors import CheckpointError
from rlhf.models.adapters import policy_with_adapter
from rlhf.models.distributed import is_main, make_accelerator, set_microbatch
from rlhf.models.heads import load_scorer
from rlhf.models.load import context_length, disable_dropout, load_causal, load_tokenizer, resolve
from rlhf.rollout.types import Experience
from rlhf.runs import handover
from rlhf.runs.console import Bar, Console
from rlhf.runs.metrics import MetricsWriter, read_lines
from rlhf.runs.run_dir import RunDir
from rlhf.stages import rendering
from rlhf.stages.common import RunResult, begin, check_context, open_tokenizer, say_model, seal, start, stop_at
from rlhf.trainers.ppo import PolicyAndValue, PPOTrainer, Stats


def run(config: PPOConfig, console: Console) -> RunResult:
    """Train the policy; writes the run directory, the value model beside the policy."""
    directory, state = begin("ppo", config, console)
    if state == "finished":
        return RunResult(directory.path, directory.info.get("summary", {}), skipped=True)
    tokenizer, renderer = open_tokenizer(config.policy, console)
    scale = _reward_scale(config, renderer, console)
    records = load_records(
        "prompt", config.data.prompts, seed=config.seed, on_bad_row=config.data.on_bad_row,
        deduplicate=config.data.deduplicate,
    )  # fmt: skip
    for note in records.notes:
        console.note(note)
    prompts = rendering.prompts(
        records.records, renderer, config.data.max_prompt_tokens, config.data.too_long, config.data.on_bad_row, console
    )
    accelerator = make_accelerator()
    set_microbatch(accelerator, config.optim.microbatch_size)
    model, reference = _trained_models(config, len(tokenizer))
    reward_model = load_scorer(config.reward_model).requires_grad_(False)
    longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    check_context(longest, context_length(model.policy), "data.max_prompt_tokens + sampling.max_new_tokens")
    say_model(model, console)
    _say_plan(config, accelerator.num_processes, len(prompts), console)
    with console.progress("ppo", config.ppo.steps, "step") as bar:
        reporter = _Reporter(config, directory, tokenizer, bar)
        trainer = PPOTrainer(
            config, accelerator, model, reference=reference, reward_model=reward_model, prompts=prompts,
            end_id=renderer.end_id, pad_id=renderer.pad_id, score_scale=scale, report=reporter.report,
            checkpoint=lambda t: save_checkpoint(t, directory) if t.step % config.checkpoint_every == 0 else None,
        )  # fmt: skip
        start(directory, "ppo", config)
        directory.note(data={"prompts": records.fingerprint})
        if state == "interrupted" and load_checkpoint(trainer, directory):
            console.note(f"continuing after step {trainer.step}")
        reporter.open(trainer.step)
        with directory.guard():
            trainer.train()
            _save(trainer, directory, renderer, tokenizer)
    reporter.close()
    summary = {"steps": config.ppo.steps, **{k: round(v, 6) for k, v in reporter.last.items() if "time" not in k}}
    directory.note(summary=summary)
    directory.finish()
    return RunResult(directory.path, summary)


def _reward_scale(config: PPOConfig, renderer: Renderer, console: Console) -> tuple[float, float]:
    """Mean and deviation to take off the scores; also verifies that reward model and policy fit."""
    record = handover.read(resolve(config.reward_model))
    handover.verify(renderer.identity(), record, where=config.reward_model.path, role="the reward model")
    if record is None:  # a foreign reward model: the tokenizer in its folder is all there is to compare
        theirs = load_tokenizer(config.reward_model)
        if tokenizer_fingerprint(theirs) != tokenizer_fingerprint(renderer.tokenizer):
            raise CheckpointError(
                "the reward model has another tokenizer than the policy", where=config.reward_model.path,
                do="use a reward model trained from this SFT model",
            )  # fmt: skip
    if not config.ppo.normalize_scores:
        return 0.0, 1.0
    if record is None or record.score_mean is None or record.score_std is None:
        raise CheckpointError(
            "the reward model carries no mean and deviation of its scores", where=config.reward_model.path,
            do="train it with 'rlhf reward', or set ppo.normalize_scores=false",
        )  # fmt: skip
    console.note(f"scores are normalised: (score - {record.score_mean:.3f}) / {record.score_std:.3f}")
    return record.score_mean, record.score_std


def _trained_models(config: PPOConfig, vocab_size: int) -> tuple[PolicyAndValue, Any]:
    """Policy and value model (started from the reward model), and the reference unless the policy is an adapter."""
    value_model = load_scorer(config.reward_model, trainable=True, lora=config.lora)
    if config.lora.enabled:
        policy = policy_with_adapter(config.policy, config.lora)
        disable_dropout(policy)  # an SFT adapter may have some, and the first ratio must be 1
        return PolicyAndValue(policy, value_model), None
    policy = load_causal(config.policy, vocab_size=vocab_size)
    reference = load_causal(config.policy, vocab_size=vocab_size).requires_grad_(False)
    return PolicyAndValue(policy, value_model), reference


def _say_plan(config: PPOConfig, ranks: int, prompts: int, console: Console) -> None:
    p = config.ppo
    console.note(
        f"{prompts} prompts; {p.steps} steps x {p.rollout_size} episodes ({ranks} process{'es' if ranks > 1 else ''} x "
        f"{p.rollout_size // ranks}) = {p.steps * p.rollout_size} episodes; each step {p.epochs} epochs x "
        f"{p.minibatches} minibatches of {p.rollout_size // p.minibatches} = {p.epochs * p.minibatches} updates"
    )


class _Reporter:
    """metrics.jsonl, samples.jsonl and the bar."""

    def __init__(self, config: PPOConfig, directory: RunDir, tokenizer: Any, bar: Bar) -> None:
        self.config, self.directory, self.tokenizer, self.bar = config, directory, tokenizer, bar
        self.last: Stats = {}
        self.writer: MetricsWriter | None = None

    def open(self, step: int) -> None:
        """Start the files, keeping what was written up to `step`."""
        path = self.directory.path / "metrics.jsonl"
        self.writer = MetricsWriter(path, main=is_main(), keep_until=step if step else None)
        samples = self.directory.path / "samples.jsonl"
        if is_main() and samples.is_file():
            kept = [line for line in read_lines(samples) if line["step"] <= step]
            samples.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), encoding="utf-8")

    def report(self, step: int, experience: Experience, stats: Stats) -> None:
        """One step's numbers, and now and then a few samples."""
        assert self.writer is not None
        self.last = stats
        self.writer.write(step, stats)
        self.bar.update(step, {k: stats[k] for k in ("score", "kl", "response_length")})
        if is_main() and (step % self.config.sample_every == 0 or step == 1):
            with (self.directory.path / "samples.jsonl").open("a", encoding="utf-8") as file:
                for row in range(min(4, len(experience))):
                    file.write(json.dumps(self._sample(step, experience, row), ensure_ascii=False) + "\n")

    def _sample(self, step: int, e: Experience, row: int) -> dict[str, Any]:
        decode = self.tokenizer.decode
        return {
            "step": step, "prompt": decode(e.prompt_ids[row][e.prompt_mask[row]].tolist()),
            "response": decode(e.response_ids[row][e.response_mask[row]].tolist()),
            "score": round(float(e.raw_scores[row]), 4), "kl": round(float(e.kl_per_sequence[row]), 4),
        }  # fmt: skip

    def close(self) -> None:
        """Close the files."""
        if self.writer is not None:
            self.writer.close()


def _save(trainer: PPOTrainer, directory: RunDir, renderer: Renderer, tokenizer: Any) -> None:
    a = trainer.accelerator
    inner = a.unwrap_model(trainer.model)
    stop_at(inner.policy, renderer)
    with directory.new_model() as folder:
        for part, where in ((inner.policy, folder), (inner.value_model, folder.parent / "value_model")):
            save_part(part, where, trainer)
        if is_main():
            seal(folder, "ppo", renderer, tokenizer)


def save_part(part: Any, folder: Path, trainer: PPOTrainer) -> None:
    """One of the two trained models as a plain folder."""
    if is_main():
        # Only the live adapter: the frozen reference copy is the SFT model and lies in its own folder.
        options = {"selected_adapters": ["default"]} if hasattr(part, "peft_config") else {}
        part.save_pretrained(str(folder), **options)
    trainer.accelerator.wait_for_everyone()


def save_checkpoint(trainer: PPOTrainer, directory: RunDir) -> None:
    """Weights, optimizer, step and KL coefficient. Random numbers follow from seed and step."""
    a = trainer.accelerator
    if is_main():
        directory.checkpoints.mkdir(exist_ok=True)
        target = directory.checkpoints / "ppo.pt"
        state = {
            "step": trainer.step, "kl_coef": trainer.kl_coef, "model": a.unwrap_model(trainer.model).state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
        }  # fmt: skip
        temporary = target.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(target)
    a.wait_for_everyone()


def load_checkpoint(trainer: PPOTrainer, directory: RunDir) -> bool:
    """Continue from the last checkpoint, if there is one."""
    target = directory.checkpoints / "ppo.pt"
    if not target.is_file():
        return False
    state = torch.load(target, map_location="cpu", weights_only=True)
    trainer.accelerator.unwrap_model(trainer.model).load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.step, trainer.kl_coef = state["step"], state["kl_coef"]
    return True
