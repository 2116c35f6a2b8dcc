"""Accuracy of a reward model on held-out pairs, beside its ceiling and cheap baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.config.schema import EvaluateConfig
from rlhf.data.records import Comparison
from rlhf.data.sources import load_records
from rlhf.errors import DataError
from rlhf.evaluation.answers import on_device, score_sequences
from rlhf.evaluation.baselines import longer_wins, tfidf_accuracy
from rlhf.evaluation.model_comparison import EvaluationInputs, TableRow
from rlhf.evaluation.stats import bootstrap_mean, win_indicators


def reward_accuracy(config: EvaluateConfig, inputs: EvaluationInputs) -> TableRow:
    """Return the share of held-out decided pairs that the reward model orders as the annotators did.

    The ceiling is the accuracy of the judge itself on the same pairs. The baselines are "the longer response wins" and,
    with training pairs, a Bradley-Terry model that is linear in tf-idf features.

    Raises: DataError if every pair is a tie.
    """
    options: dict[str, Any] = {"seed": config.seed, "on_bad_row": "error", "deduplicate": False}
    pairs: Sequence[Comparison] = load_records("comparison", config.preferences, **options).records
    decided = [pair for pair in pairs if pair.preference != 0.5]
    if not decided:
        raise DataError(
            "every pair is a tie: there is no accuracy to measure", found=f"{len(pairs)} pairs", where="preferences"
        )
    renderer = inputs.renderer
    prompts = [renderer.prompt(pair.prompt) for pair in decided]
    with on_device(inputs.reward_model, inputs.device):
        chosen, rejected = [
            score_sequences(
                inputs.reward_model,
                [ids + renderer.response(getattr(pair, side)) for ids, pair in zip(prompts, decided, strict=True)],
                renderer.pad_id,
            )
            for side in ("chosen", "rejected")
        ]
    estimate = bootstrap_mean(win_indicators(chosen, rejected), resamples=config.bootstrap, seed=config.seed)
    row: TableRow = {
        "pairs": len(decided),
        "accuracy": estimate.mean,
        "low": estimate.low,
        "high": estimate.high,
        "longer_wins": longer_wins(decided),
    }
    if config.preferences_train:
        train = load_records("comparison", config.preferences_train, **options).records
        row["tfidf"] = tfidf_accuracy(train, decided)
    judge = inputs.judge
    if judge is not None and all("task" in pair.extra for pair in decided):
        better, worse = (
            [judge(pair.prompt, getattr(pair, side), pair.extra, True) for pair in decided]
            for side in ("chosen", "rejected")
        )
        row["ceiling"] = float(win_indicators(better, worse).mean())
    return row
