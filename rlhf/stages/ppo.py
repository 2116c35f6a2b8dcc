"""PPO: the SFT model learns from the reward model, kept near where it started."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.schema import PPOConfig
from rlhf.console import Bar, Console
from rlhf.data import tokenize
from rlhf.data.records import Prompt
from rlhf.data.render import Rendered, Renderer
from rlhf.data.sources import load_records
from rlhf.distributed.engine import make_accelerator, set_deepspeed_batch_size
from rlhf.distributed.engine_limits import check_deepspeed
from rlhf.distributed.heartbeat import report_progress
from rlhf.distributed.launch_env import is_main_process
from rlhf.distributed.zero_gather import gathered_parameters
from rlhf.errors import ConfigError
from rlhf.models.adapters import check_same_shape
from rlhf.models.handover import save_tokenizer_and_handover
from rlhf.models.heads import AdapterScorer, SharedValueHead, rescale_head
from rlhf.models.load import context_length, disable_dropout, resolve_model, set_stop_tokens
from rlhf.models.policy import load_causal, policy_with_adapter
from rlhf.models.reward_models import load_scorer, new_value_model
from rlhf.models.shared_base import VALUE, attach_new_value_model, attach_scorer, reason_not_shared
from rlhf.rollout.reward_loading import build_rewards, check_offload, reward_deviation, same_tokenizer
from rlhf.rollout.rewards import Rewards
from rlhf.rollout.types import Experience
from rlhf.runs import preemption
from rlhf.runs.metrics import MetricsWriter, truncate_jsonl
from rlhf.runs.run_dir import RunDir
from rlhf.stages.lifecycle import RunResult, begin_run, check_context, open_tokenizer, start_run
from rlhf.trainers.phase_plan import print_ppo_phases
from rlhf.trainers.ppo.checkpointer import PPOCheckpointer
from rlhf.trainers.ppo.health import HealthMonitor
from rlhf.trainers.ppo.policy_value import PolicyAndValue
from rlhf.trainers.ppo.ptx import PtxMixture
from rlhf.trainers.ppo.stats import StepStats
from rlhf.trainers.ppo.trainer import PPOTrainer

SAMPLES = "samples.jsonl"
VALUE_MODELS = {
    "reward": "starts as the reward model",
    "policy": "the policy's trunk with a head of zeros",
    "trunk": "a head on the policy's own trunk",
}


def run(config: PPOConfig, console: Console) -> RunResult:
    """Train the policy; writes the run directory, the value model beside the policy."""
    directory, state = begin_run("ppo", config, console)
    if state == "finished":
        return RunResult(directory.path, directory.info.get("summary", {}), skipped=True)
    ready = load_components(config, console)
    _say_plan(config, ready.accelerator.num_processes, len(ready.prompts), console)
    tokenizer, renderer = ready.tokenizer, ready.renderer
    with console.progress("ppo", config.ppo.steps, "step") as bar:
        reporter, keeper = _Reporter(config, directory, tokenizer, bar), PPOCheckpointer(config, directory, console)
        trainer = ready.trainer(
            config,
            watcher=HealthMonitor(config.watch, directory.path if is_main_process() else None, console.note),
            report=reporter.report,
            checkpoint=keeper.after_step,
            pause=keeper.pause,
            restore=lambda t: keeper.load(t) and reporter.reopen(t.step),
        )
        start_run(directory, "ppo", config)
        directory.note(data={"prompts": ready.fingerprint})
        with directory.guard():
            if state == "interrupted" and keeper.load(trainer):
                console.note(f"continuing after step {trainer.step}{_in_hand(trainer)}")
                report_progress(trainer.step)
            reporter.open(trainer.step)
            with preemption.delay_sigterm(config.saving.grace_seconds):
                trainer.train()
            _save(trainer, directory, renderer, tokenizer, reporter.last.get("response_length"))
    reporter.close()
    summary = {"steps": config.ppo.steps, **{k: round(v, 6) for k, v in reporter.last.items() if "time" not in k}}
    directory.note(summary=summary)
    directory.finish()
    return RunResult(directory.path, summary)


@dataclass(frozen=True)
class PPOComponents:
    """Everything that a trainer is made of: models, rewards and prompts, loaded and checked."""

    tokenizer: Any
    renderer: Renderer
    accelerator: Any
    model: PolicyAndValue
    reference: Any
    rewards: Rewards
    prompts: list[list[int]]
    records: list[Prompt]
    text: PtxMixture | None
    fingerprint: str

    def trainer(self, config: PPOConfig, **hooks: Any) -> PPOTrainer:
        """The trainer; `hooks` are its watcher and what it calls after a step."""
        return PPOTrainer(
            config,
            self.accelerator,
            self.model,
            reference=self.reference,
            rewards=self.rewards,
            prompts=self.prompts,
            records=self.records,
            end_id=self.renderer.end_id,
            pad_id=self.renderer.pad_id,
            text=self.text,
            decode=self.tokenizer.decode,
            **hooks,
        )


def load_components(config: PPOConfig, console: Console) -> PPOComponents:
    """Load what the configuration names, and refuse what does not fit together.

    Raises: ConfigError, DataError or CheckpointError.
    """
    check_deepspeed(config)
    tokenizer, renderer = open_tokenizer(config.policy, console)
    shared = decide_shared_base(config, console)
    policy, reference = _policy(config, len(tokenizer))
    rewards = build_rewards(config, renderer, console, base=policy if shared else None)
    check_offload(config, sum(not isinstance(model, AdapterScorer) for model in rewards.models()))
    loaded = load_records(
        "prompt",
        config.data.prompts,
        seed=config.seed,
        on_bad_row=config.data.on_bad_row,
        deduplicate=config.data.deduplicate,
    )
    for note in loaded.notes:
        console.note(note)
    prompts, records = tokenize.tokenize_prompts_with_records(
        loaded.records, renderer, config.data.max_prompt_tokens, config.data.too_long, config.data.on_bad_row, console
    )
    text = _text(config, renderer, console)
    model = PolicyAndValue(policy, _value_model(config, policy, shared, len(tokenizer), renderer, console))
    if config.optim.activation_checkpointing:
        model.recompute_activations()
    report_progress()
    # After the models: once an accelerator of ZeRO-3 exists, transformers loads shards of them, which no head fits.
    accelerator = make_accelerator(unused=bool(config.unfreeze.policy or config.unfreeze.value_model))
    report_progress()
    set_deepspeed_batch_size(accelerator, config.optim.microbatch_size, config.optim.max_grad_norm)
    longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    check_context(longest, context_length(model.policy), "data.max_prompt_tokens + sampling.max_new_tokens")
    print_ppo_phases(config, model, console)
    return PPOComponents(
        tokenizer, renderer, accelerator, model, reference, rewards, prompts, records, text, loaded.fingerprint
    )


def decide_shared_base(config: PPOConfig, console: Console) -> bool:
    """Whether policy, value and reward model are adapters of one base; says why not if they might have been.

    Raises: ConfigError if they should be and cannot.
    """
    if config.roles == "separate" or not config.peft.enabled:
        return False
    scorer, method = config.reward_model, config.peft.method
    reason = reason_not_shared(config.policy, scorer, method) if scorer is not None else None
    if reason is None:
        console.note("roles: one frozen base; policy, value and reward model are adapters on it")
    elif config.roles == "shared":
        raise ConfigError(
            "the roles cannot share a base",
            found=reason,
            where="roles",
            do=f"train the reward model with peft.method={method} from the model that the policy starts from, or set "
            "roles=separate",
        )
    else:
        console.note(f"roles: separate models, since {reason}")
    return reason is None


def _policy(config: PPOConfig, vocab_size: int) -> tuple[Any, Any]:
    """The policy, and the reference unless the policy is an adapter."""
    if config.peft.enabled:
        policy = policy_with_adapter(config.policy, config.peft)
        disable_dropout(policy)  # an SFT adapter may have some, and the first ratio must be 1
        return policy, None
    reference = load_causal(config.policy, vocab_size=vocab_size).requires_grad_(False)
    return load_causal(config.policy, vocab_size=vocab_size), reference


def _value_model(
    config: PPOConfig, policy: Any, shared: bool, vocab_size: int, renderer: Renderer, console: Console
) -> Any:
    """The value model: from the reward model (Stiennon et al. 2020, arXiv:2009.01325), the policy, or a head on it.

    Args:
        shared: it is an adapter on the policy's base.
    Raises: ConfigError if it should start from a reward model that there is not or that reads other tokens.
    """
    source, kind = config.reward_model, config.ppo.value_model
    fits = source is not None and same_tokenizer(source, renderer)
    if kind == "auto":
        kind = "reward" if fits else "policy"
    console.note(f"value model: {VALUE_MODELS[kind]}")
    if kind == "trunk":
        return SharedValueHead(policy.config.get_text_config().hidden_size)
    if kind == "policy" and shared:
        return attach_new_value_model(policy, resolve_model(config.policy))
    if kind == "policy":
        return new_value_model(
            config.policy, config.peft, pad_id=renderer.pad_id, vocab_size=vocab_size, seed=config.seed
        )
    if source is None or not fits:
        raise ConfigError(
            "no value model can start from the reward model",
            found="there is none" if source is None else "it has another tokenizer than the policy",
            where="ppo.value_model",
            do="set ppo.value_model=policy",
        )
    if shared:
        check_same_shape(config.peft, resolve_model(source))
        model = attach_scorer(policy, source, VALUE, trainable=True)
    else:
        model = load_scorer(source, trainable=True, peft=config.peft)
    rescale_head(model, reward_deviation(config))  # values predict rescaled rewards
    return model


def _text(config: PPOConfig, renderer: Renderer, console: Console) -> PtxMixture | None:
    """The documents of the ptx term, rendered."""
    if not config.ptx.data:
        return None
    loaded = load_records(
        "document",
        config.ptx.data,
        seed=config.seed,
        on_bad_row=config.data.on_bad_row,
        deduplicate=config.data.deduplicate,
    )
    for note in loaded.notes:
        console.note(f"ptx: {note}")
    limit = config.ptx.max_length
    rows = [tokenize.tokenize_document(record, renderer) for record in loaded.records]
    cut = [Rendered(row.ids[:limit], row.mask[:limit]) for row in rows]
    if long := sum(len(row.ids) > limit for row in rows):
        console.note(f"ptx: {long} of {len(rows)} documents cut to {limit} tokens")
    return PtxMixture(
        cut, config.ptx, seed=config.seed, pad_id=renderer.pad_id, microbatch=config.optim.microbatch_size
    )


def _say_plan(config: PPOConfig, ranks: int, prompts: int, console: Console) -> None:
    p = config.ppo
    console.note(
        f"{prompts} prompts; {p.steps} steps x {p.rollout_size} episodes ({ranks} process{'es' if ranks > 1 else ''} x "
        f"{p.rollout_size // ranks}) = {p.steps * p.rollout_size} episodes; each step {p.epochs} epochs x "
        f"{p.minibatches} minibatches of {p.rollout_size // p.minibatches} = {p.epochs * p.minibatches} updates"
    )
    if p.value_warmup:
        console.note(f"the first {p.value_warmup} steps train the value model alone")


class _Reporter:
    """metrics.jsonl, samples.jsonl and the bar."""

    def __init__(self, config: PPOConfig, directory: RunDir, tokenizer: Any, bar: Bar) -> None:
        self.config, self.directory, self.tokenizer, self.bar = config, directory, tokenizer, bar
        self.last: StepStats = {}
        self.writer: MetricsWriter | None = None

    def open(self, step: int) -> None:
        """Start the files, keeping what was written up to `step`."""
        path = self.directory.path / "metrics.jsonl"
        self.writer = MetricsWriter(path, main=is_main_process(), keep_until=step if step else None)
        samples = self.directory.path / SAMPLES
        if is_main_process() and samples.is_file():
            truncate_jsonl(samples, step)

    def reopen(self, step: int) -> bool:
        """After a rollback: forget what was written beyond `step`."""
        self.close()
        self.open(step)
        return True

    def report(self, step: int, experience: Experience, stats: StepStats) -> None:
        """One step's numbers, and now and then a few samples."""
        assert self.writer is not None
        self.last = stats
        self.writer.write(step, stats)
        self.bar.update(step, {k: stats[k] for k in ("score", "kl", "response_length")})
        if is_main_process() and (step % self.config.sample_every == 0 or step == 1):
            with (self.directory.path / SAMPLES).open("a", encoding="utf-8") as file:
                for row in range(min(4, len(experience))):
                    file.write(json.dumps(self._sample(step, experience, row), ensure_ascii=False) + "\n")

    def _sample(self, step: int, e: Experience, row: int) -> dict[str, Any]:
        decode = self.tokenizer.decode
        return {
            "step": step,
            "prompt": decode(e.prompt_ids[row][e.prompt_mask[row]].tolist()),
            "response": decode(e.response_ids[row][e.response_mask[row]].tolist()),
            "score": round(float(e.raw_scores[row]), 4),
            "kl": round(float(e.kl_per_sequence[row]), 4),
            "finished": bool(e.finished[row]),
            "tokens": self._tokens(e, row),
        }

    def _tokens(self, e: Experience, row: int) -> list[dict[str, Any]]:
        """What `rlhf inspect` paints: every response token with its numbers."""
        columns = {
            "logprob": e.old_logprobs,
            "kl": e.old_logprobs - e.ref_logprobs,
            "value": e.values,
            "advantage": e.advantages,
            "reward": e.rewards,
        }
        ids = e.response_ids[row][e.response_mask[row]].tolist()
        return [
            {"token": self.tokenizer.decode([i]), **{name: round(float(x[row, t]), 4) for name, x in columns.items()}}
            for t, i in enumerate(ids)
        ]

    def close(self) -> None:
        """Close the files."""
        if self.writer is not None:
            self.writer.close()


def _save(
    trainer: PPOTrainer, directory: RunDir, renderer: Renderer, tokenizer: Any, reply_tokens: float | None
) -> None:
    a = trainer.accelerator
    inner = a.unwrap_model(trainer.model)
    set_stop_tokens(inner.policy, renderer)
    average = trainer.average.applied(inner.trained_policy()) if trainer.average is not None else nullcontext()
    with average, gathered_parameters(inner.parameters()), directory.new_model() as folder:
        for part, where in ((inner.policy, folder), (inner.value_model, folder.parent / "value_model")):
            save_part(part, where, trainer)
        if is_main_process():
            save_tokenizer_and_handover(folder, "ppo", renderer, tokenizer, reply_tokens=reply_tokens)


def save_part(part: Any, folder: Path, trainer: PPOTrainer) -> None:
    """One of the two trained models as a plain folder."""
    if is_main_process():
        # Only the live adapter: the frozen reference copy is the SFT model and lies in its own folder.
        options = {"selected_adapters": ["default"]} if hasattr(part, "peft_config") else {}
        part.save_pretrained(str(folder), **options)
    trainer.accelerator.wait_for_everyone()


def _in_hand(trainer: PPOTrainer) -> str:
    """What a checkpoint inside a step holds, in words."""
    return f", with the next rollout and {trainer.work.done} of its updates" if trainer.work is not None else ""
