"""PPO stage: train the SFT model on the scores of the reward model, with a KL penalty to its starting point."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf.config.run_plan import PPOPlan
from rlhf.config.schema import PPOConfig
from rlhf.console import Console
from rlhf.data import tokenize
from rlhf.data.render import Rendered, Renderer
from rlhf.data.sources import load_records
from rlhf.distributed.engine_limits import check_deepspeed
from rlhf.distributed.heartbeat import report_progress
from rlhf.distributed.launch_env import is_main_process, world_size
from rlhf.errors import ConfigError
from rlhf.models.adapters import check_same_shape
from rlhf.models.heads import AdapterScorer, SharedValueHead, rescale_head
from rlhf.models.load import check_context, context_length, disable_dropout, resolve_model
from rlhf.models.policy import load_causal, policy_with_adapter
from rlhf.models.reward_models import load_scorer, new_value_model
from rlhf.models.shared_base import VALUE, attach_new_value_model, attach_scorer, reason_not_shared
from rlhf.rollout.reward_loading import build_rewards, check_offload, reward_deviation, same_tokenizer
from rlhf.rollout.rewards import Rewards
from rlhf.rollout.types import Experience
from rlhf.runs import preemption
from rlhf.runs.memory_phase import phase
from rlhf.runs.metrics import MetricsWriter, truncate_jsonl
from rlhf.runs.run_dir import RunDir
from rlhf.stages.lifecycle import RunResult, begin_run, open_tokenizer, start_run
from rlhf.trainers.phase_setup import print_ppo_phases
from rlhf.trainers.ppo.callbacks import PPOCallback
from rlhf.trainers.ppo.checkpointer import PPOCheckpointer
from rlhf.trainers.ppo.health import HealthMonitor
from rlhf.trainers.ppo.inputs import TokenizedPrompts, store_frozen_weights
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
    """Train the policy with PPO and write the run directory, with the value model in a folder beside the policy's."""
    directory, state = begin_run("ppo", config, console)
    if state == "finished":
        return RunResult(directory.path, directory.info.get("summary", {}), skipped=True)
    parts = load_components(config, console)
    _print_plan(config, world_size(), len(parts.prompts), console)
    reporter, checkpointer = RunReporter(config, directory), PPOCheckpointer(config, directory, console)
    monitor = HealthMonitor(config.watch, directory.path if is_main_process() else None, console.note)
    trainer = parts.trainer(config, callbacks=[checkpointer, reporter], monitor=monitor, console=console)
    start_run(directory, "ppo", config)
    directory.note(data={"prompts": parts.fingerprint})
    with directory.guard():
        if state == "interrupted" and checkpointer.load(trainer):
            console.note(f"continuing after step {trainer.state.step}{_rest_of_step(trainer)}")
            report_progress(trainer.state.step)
        reporter.open(trainer.state.step)
        with preemption.delay_sigterm(config.saving.grace_seconds):
            trainer.train()
        with directory.new_model() as folder:
            trainer.save_pretrained(
                folder, value_model=folder.parent / "value_model", reply_tokens=reporter.reply_tokens
            )
    reporter.close()
    summary = {"steps": config.ppo.steps, **{k: round(v, 6) for k, v in reporter.last.items() if "time" not in k}}
    directory.note(summary=summary)
    directory.finish()
    return RunResult(directory.path, summary)


@dataclass(frozen=True)
class PPOComponents:
    """Loaded and checked parts of a PPO configuration, from which the trainer is made."""

    renderer: Renderer
    policy: Any
    reference: Any
    value_model: Any
    rewards: Rewards
    prompts: TokenizedPrompts
    text: PtxMixture | None
    fingerprint: str  # of the prompts

    @phase("loading")
    def trainer(self, config: PPOConfig, **options: Any) -> PPOTrainer:
        """Return the trainer; `options` are its callbacks, monitor and console."""
        return PPOTrainer(
            self.policy,
            self.rewards,
            self.prompts,
            config.settings,
            tokenizer=self.renderer,
            reference=self.reference,
            value_model=self.value_model,
            text=self.text,
            **options,
        )


@phase("loading")
def load_components(config: PPOConfig, console: Console) -> PPOComponents:
    """Load and check models, rewards and prompts of a configuration.

    Raises: ConfigError, DataError or CheckpointError for parts that cannot be loaded or do not fit together.
    """
    check_deepspeed(config.settings)
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
    value_model = _value_model(config, policy, shared, len(tokenizer), renderer, console)
    store_frozen_weights(config.settings, trained=[policy, value_model], reference=reference, rewards=rewards)
    longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    check_context(longest, context_length(policy), "data.max_prompt_tokens + sampling.max_new_tokens")
    print_ppo_phases(config.settings, PolicyAndValue(policy, value_model), console)
    return PPOComponents(
        renderer, policy, reference, value_model, rewards, TokenizedPrompts(prompts, records), text, loaded.fingerprint
    )


def decide_shared_base(config: PPOConfig, console: Console) -> bool:
    """Return whether policy, value and reward model become adapters on one base model, and print a note about it.

    Raises: ConfigError if roles=shared and they cannot share a base model.
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
    """Return the policy and the reference, which is None if the policy is an adapter."""
    if config.peft.enabled:
        policy = policy_with_adapter(config.policy, config.peft)
        disable_dropout(policy)  # an SFT adapter may have dropout, but the first ratio must be 1
        return policy, None
    reference = load_causal(config.policy, vocab_size=vocab_size).requires_grad_(False)
    return load_causal(config.policy, vocab_size=vocab_size), reference


def _value_model(
    config: PPOConfig, policy: Any, shared: bool, vocab_size: int, renderer: Renderer, console: Console
) -> Any:
    """Return the value model, made from the reward model (Stiennon et al. 2020, arXiv:2009.01325) or from the policy.

    Args:
        shared: whether the value model is an adapter on the policy's base model.
    Raises: ConfigError if it should start from a reward model that does not exist or has another tokenizer.
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
    """Load and render the documents of the ptx loss; None if there are none."""
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
    truncated = [Rendered(row.ids[:limit], row.mask[:limit]) for row in rows]
    if long := sum(len(row.ids) > limit for row in rows):
        console.note(f"ptx: {long} of {len(rows)} documents truncated to {limit} tokens")
    return PtxMixture(
        truncated, config.ptx, seed=config.seed, pad_id=renderer.pad_id, microbatch=config.optim.microbatch_size
    )


def _print_plan(config: PPOConfig, processes: int, prompts: int, console: Console) -> None:
    plan = PPOPlan(config.ppo, processes)
    console.note(f"{prompts} prompts; {config.ppo.steps} steps = {plan.episodes} episodes, {plan.updates} updates")
    console.note(plan.describe())
    if config.ppo.value_warmup:
        console.note(f"the first {config.ppo.value_warmup} steps train only the value model")


class RunReporter(PPOCallback):
    """Callback that writes metrics.jsonl and samples.jsonl of a run directory."""

    def __init__(self, config: PPOConfig, directory: RunDir) -> None:
        self.config, self.directory = config, directory
        self.last: StepStats = {}
        self.writer: MetricsWriter | None = None

    @property
    def reply_tokens(self) -> float | None:
        """Mean tokens of the last rollout's responses; None before the first step."""
        return self.last.get("response_length")

    def open(self, step: int) -> None:
        """Open the files and remove lines after `step`."""
        path = self.directory.path / "metrics.jsonl"
        self.writer = MetricsWriter(path, main=is_main_process(), keep_until=step if step else None)
        samples = self.directory.path / SAMPLES
        if is_main_process() and samples.is_file():
            truncate_jsonl(samples, step)

    def on_rollback(self, trainer: Any) -> bool:
        """Remove the lines after the step that the run has returned to."""
        self.close()
        self.open(trainer.state.step)
        return False

    def on_step_end(self, trainer: Any, experience: Experience, stats: StepStats) -> None:
        """Write the metrics of a step, and every `sample_every` steps a few samples."""
        assert self.writer is not None
        step, self.last = trainer.state.step, stats
        self.writer.write(step, stats)
        if is_main_process() and (step % self.config.sample_every == 0 or step == 1):
            decode = trainer.renderer.tokenizer.decode
            with (self.directory.path / SAMPLES).open("a", encoding="utf-8") as file:
                for row in range(min(4, len(experience))):
                    line = sample_line(step, experience, row, decode)
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Close the files."""
        if self.writer is not None:
            self.writer.close()


def sample_line(step: int, e: Experience, row: int, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """Return one line of samples.jsonl: a prompt, its response, and the quantities of every response token."""
    columns = {
        "logprob": e.old_logprobs,
        "kl": e.old_logprobs - e.ref_logprobs,
        "value": e.values,
        "advantage": e.advantages,
        "reward": e.rewards,
    }
    ids = e.response_ids[row][e.response_mask[row]].tolist()
    return {
        "step": step,
        "prompt": decode(e.prompt_ids[row][e.prompt_mask[row]].tolist()),
        "response": decode(ids),
        "score": round(float(e.raw_scores[row]), 4),
        "kl": round(float(e.kl_per_sequence[row]), 4),
        "finished": bool(e.finished[row]),
        "tokens": [
            {"token": decode([i]), **{name: round(float(x[row, t]), 4) for name, x in columns.items()}}
            for t, i in enumerate(ids)
        ],
    }


def _rest_of_step(trainer: PPOTrainer) -> str:
    """Return a phrase about the work that a checkpoint within a step contains, or an empty text."""
    progress = trainer.state.progress
    return f", with the next rollout and {progress.done} of its updates" if progress is not None else ""
