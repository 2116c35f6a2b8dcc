"""Training of a reward model on preference pairs, starting from the SFT model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.config.schema import RewardConfig
from rlhf.console import Console
from rlhf.data import tokenize
from rlhf.data.collate import pad_right
from rlhf.distributed.engine import gathered_module
from rlhf.models.heads import head_dtype, sequence_scores
from rlhf.models.load import check_context, context_length
from rlhf.models.reward_models import new_reward_model
from rlhf.stages.lifecycle import RunResult, begin_run, load_data, open_tokenizer, start_run
from rlhf.trainers.phase_setup import set_up_phases
from rlhf.trainers.supervised.probe_data import load_probe
from rlhf.trainers.supervised.run import run_training, save_trained


def run(config: RewardConfig, console: Console) -> RunResult:
    """Train a reward model and write the run directory.

    The checkpoint of the best held-out accuracy is kept, and the mean and standard deviation of its scores are stored.
    """
    directory, state = begin_run("reward", config, console)
    if state == "finished":
        return RunResult(directory.path, directory.info.get("summary", {}), skipped=True)
    tokenizer, renderer = open_tokenizer(config.model, console)
    train, validation, fingerprints = load_data("comparison", config.data, config.seed, console)
    train_pairs = tokenize.tokenize_comparisons(train, renderer, config.data, "training", console)
    valid_pairs = tokenize.tokenize_comparisons(validation, renderer, config.data, "validation", console)
    model = new_reward_model(
        config.model, config.peft, pad_id=renderer.pad_id, vocab_size=len(tokenizer), seed=config.seed
    )
    check_context(config.data.max_length, context_length(model), "data.max_length")
    schedule = set_up_phases(model, config, rows=len(train_pairs), evaluate=bool(valid_pairs), console=console)
    probe_data = load_probe(
        config,
        config.data,
        config.model,
        renderer,
        console,
        kind="comparison",
        evaluate=bool(valid_pairs),
        scorer=True,
        render=lambda records: tokenize.tokenize_comparisons(records, renderer, config.data, "probe", console),
    )
    start_run(directory, "reward", config)
    directory.note(data=fingerprints)
    from rlhf.trainers.supervised.reward import build_reward_trainer

    def save(trainer: Any, folder: Path) -> dict[str, Any]:
        with gathered_module(trainer.model_wrapped, trainer.accelerator) as module:
            mean, deviation = score_statistics(module, valid_pairs or train_pairs[:512], renderer.pad_id)
        scale = {"score_mean": mean, "score_std": deviation}
        save_trained(trainer, folder, "reward", renderer, tokenizer, head_dtype=head_dtype(model), **scale)
        return {"pairs": len(train_pairs), **scale}

    summary, final = run_training(
        "reward",
        directory,
        config.optim,
        config.seed,
        console,
        schedule=schedule,
        saving=config.saving,
        evaluate=bool(valid_pairs),
        build=lambda args, report: build_reward_trainer(
            model, tokenizer, train_pairs, valid_pairs, args, report, center=config.center
        ),
        save=save,
        resume=state == "interrupted",
        unit="pairs",
        shown=("loss", "gap", "accuracy", "eval_accuracy"),
        evaluations=config.evaluations,
        probe_data=probe_data,
    )
    if final:
        summary |= {"eval_accuracy": final["eval_accuracy"], "eval_loss": final["eval_loss"]}
        console.note(f"reward: held-out accuracy {final['eval_accuracy']:.3f}, loss {final['eval_loss']:.4f} nats")
    directory.note(summary=summary)
    directory.finish()
    return RunResult(directory.path, summary)


@torch.no_grad()
def score_statistics(model: Any, pairs: Sequence[dict[str, Any]], pad_id: int) -> tuple[float, float]:
    """Return the mean and standard deviation of the scores of the chosen and rejected sides of pairs (score units)."""
    device = next(model.parameters()).device
    model.eval()
    rows = [ids for pair in pairs for ids in (pair["chosen_ids"], pair["rejected_ids"])]
    rows.sort(key=len)
    scores = []
    for i in range(0, len(rows), 64):
        ids, mask = pad_right(rows[i : i + 64], pad_id)
        scores.append(sequence_scores(model, ids.to(device), mask.to(device)).cpu())
    all_scores = torch.cat(scores).double()
    return float(all_scores.mean()), float(all_scores.std(unbiased=False).clamp_min(1e-6))
