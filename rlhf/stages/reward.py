"""Reward model on preference pairs, started from the SFT model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf.config.schema import RewardConfig
from rlhf.data.collate import pad_right
from rlhf.data.render import Renderer
from rlhf.models.distributed import check_world, is_main, save_model, unsharded
from rlhf.models.heads import new_reward_model, score_head, sequence_scores
from rlhf.models.load import context_length
from rlhf.runs.console import Console
from rlhf.runs.metrics import MetricsWriter
from rlhf.stages import rendering
from rlhf.stages.common import (
    RunResult,
    begin,
    check_context,
    open_tokenizer,
    processes,
    read_data,
    say_batch,
    say_model,
    seal,
    start,
)
from rlhf.trainers.hf import Report, arguments, last_checkpoint, silence, updates_of


def run(config: RewardConfig, console: Console) -> RunResult:
    """Train; keeps the checkpoint of the best held-out accuracy and stores the mean and deviation of its scores."""
    directory, state = begin("reward", config, console)
    if state == "finished":
        return RunResult(directory.path, directory.info.get("summary", {}), skipped=True)
    tokenizer, renderer = open_tokenizer(config.model, console)
    train, validation, prints = read_data("comparison", config.data, config.seed, console)
    train_pairs = rendering.pairs(train, renderer, config.data, "training", console)
    valid_pairs = rendering.pairs(validation, renderer, config.data, "validation", console)
    model = new_reward_model(
        config.model, config.lora, pad_id=renderer.pad_id, vocab_size=len(tokenizer), seed=config.seed
    )
    check_context(config.data.max_length, context_length(model), "data.max_length")
    say_model(model, console)
    start(directory, "reward", config)
    directory.note(data=prints)
    summary = _train(config, model, tokenizer, renderer, train_pairs, valid_pairs, directory, console, state)
    directory.note(summary=summary)
    directory.finish()
    return RunResult(directory.path, summary)


def _train(
    config: RewardConfig, model: Any, tokenizer: Any, renderer: Renderer, train: list[dict[str, Any]],
    validation: list[dict[str, Any]], directory: Any, console: Console, state: str,
) -> dict[str, Any]:  # fmt: skip
    from rlhf.trainers.reward import build

    optim, world = config.optim, processes()
    updates, accumulation = updates_of(optim, len(train)), optim.accumulation(world)
    say_batch(world, optim.batch_size // world // accumulation, accumulation, updates, "pairs", console)
    checkpoint = last_checkpoint(directory) if state == "interrupted" else None
    writer = MetricsWriter(
        directory.path / "metrics.jsonl", main=is_main(), keep_until=checkpoint.step if checkpoint else None
    )
    args = arguments(
        optim, directory, seed=config.seed, processes=world, updates=updates, evaluate=bool(validation),
        evaluations=config.evaluations,
    )  # fmt: skip
    with directory.guard(), console.progress("reward", updates, "update") as bar:
        report = Report(writer, bar, ("loss", "accuracy", "eval_accuracy"))
        trainer = build(model, tokenizer, train, validation, args, report, center=config.center)
        silence(trainer)
        check_world(trainer.accelerator.num_processes)
        trainer.train(resume_from_checkpoint=checkpoint.path if checkpoint else None)
        final = trainer.evaluate() if validation else {}
        with unsharded(trainer.model_wrapped, trainer.accelerator) as whole:
            mean, deviation = score_statistics(whole, validation or train[:512], renderer.pad_id)
        with directory.new_model() as folder:
            save_model(trainer.model_wrapped, str(folder), accelerator=trainer.accelerator)
            if is_main():
                dtype = str(next(score_head(model).parameters()).dtype).removeprefix("torch.")
                seal(folder, "reward", renderer, tokenizer, head_dtype=dtype, score_mean=mean, score_std=deviation)
    writer.close()
    summary: dict[str, Any] = {"updates": updates, "pairs": len(train), "score_mean": mean, "score_std": deviation}
    if final:
        summary |= {"eval_accuracy": final["eval_accuracy"], "eval_loss": final["eval_loss"]}
        console.note(f"reward: held-out accuracy {final['eval_accuracy']:.3f}, loss {final['eval_loss']:.4f} nats")
    return summary


@torch.no_grad()
def score_statistics(model: Any, pairs: Sequence[dict[str, Any]], pad_id: int) -> tuple[float, float]:
    """Mean and deviation of the scores of both sides of some pairs (score units)."""
    device = next(model.parameters()).device
    model.eval()
    rows = [ids for pair in pairs for ids in (pair["chosen_ids"], pair["rejected_ids"])]
    rows.sort(key=len)
    scores = []
    for i in range(0, len(rows), 64):
        ids, mask = pad_right(rows[i : i + 64], pad_id)
        scores.append(sequence_scores(model, ids.to(device), mask.to(device)).cpu())
    everything = torch.cat(scores).double()
    return float(everything.mean()), float(everything.std(unbiased=False).clamp_min(1e-6))
