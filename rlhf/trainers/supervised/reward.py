"""Trainer of reward models on trl.RewardTrainer, with soft labels and metrics that count every pair once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from trl import RewardTrainer

from rlhf.data.collate import PairCollator
from rlhf.distributed.engine import count_real_rows
from rlhf.errors import TrainingError
from rlhf.functional import bradley_terry_loss
from rlhf.trainers.supervised.base import MetricsCallback, OverridingTrainer, StopOnBadLoss, order_rows

TokenizedPair = dict[str, Any]  # chosen_ids, rejected_ids, preference, and margin if the data has one


class RewardModelTrainer(OverridingTrainer, RewardTrainer):
    """trl.RewardTrainer with soft labels. Accuracy counts only pairs with a preference other than 0.5.

    Accuracy and margin are computed from sums over all batches and processes.
    """

    columns = ("chosen_ids", "rejected_ids", "preference", "margin")
    center = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sums: dict[str, torch.Tensor] = {}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean Bradley-Terry loss of a batch, in which the chosen rows come first.

        Pairs that only repeat held-out pairs to fill the batch are left out.
        """
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        scores = outputs.logits.squeeze(-1).float()
        pairs = len(scores) // 2
        real = pairs if model.training else count_real_rows(self.accelerator, pairs)
        chosen, rejected = (side[:real] for side in scores.chunk(2))
        preference, margin = inputs["preference"][:real], inputs.get("margin")
        margin = None if margin is None else margin[:real]
        loss = bradley_terry_loss(chosen, rejected, preference=preference, margin=margin)
        if self.center:
            loss = loss + self.center * (chosen + rejected).square()
        loss = loss.sum() / max(real, 1)
        self._count("train" if model.training else "eval", chosen.detach(), rejected.detach(), preference)
        return (loss, outputs) if return_outputs else loss

    def _count(self, mode: str, chosen: torch.Tensor, rejected: torch.Tensor, preference: torch.Tensor) -> None:
        decided = preference != 0.5
        correct = ((chosen > rejected) == (preference > 0.5)) & (chosen != rejected) & decided
        margin = (chosen - rejected).sum()
        sums = torch.stack([correct.sum(), decided.sum(), margin, torch.full_like(margin, len(chosen))]).double()
        self._sums[mode] = self._sums.get(mode, torch.zeros_like(sums)) + sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add accuracy and margin over all pairs since the last log line."""
        prefix = next((p for p in ("eval_", "ood_") if any(k.startswith(p) for k in logs)), "")
        mode = "eval" if prefix else "train"
        sums = self._sums.pop(mode, None)
        if sums is not None:
            correct, decided, margin, pairs = self.accelerator.reduce(sums, "sum").tolist()
            logs[f"{prefix}accuracy"] = correct / max(decided, 1.0)
            logs[f"{prefix}margin"] = margin / max(pairs, 1.0)
        super().log(logs, start_time)


def build_reward_trainer(
    model: Any,
    tokenizer: Any,
    train: Sequence[TokenizedPair],
    validation: Sequence[TokenizedPair],
    arguments: dict[str, Any],
    report: MetricsCallback,
    *,
    center: float,
) -> RewardModelTrainer:
    """Build the trainer. It restores the checkpoint of the best held-out accuracy at the end.

    Args:
        center: weight of (chosen + rejected)^2 in the loss, which keeps scores near 0.
    Raises: TrainingError if the score head is frozen (a frozen random head gives random rewards).
    """
    from datasets import Dataset
    from trl import RewardConfig

    if not any(p.requires_grad for name, p in model.named_parameters() if "score" in name.split(".")):
        raise TrainingError(
            "the score head is frozen at random values", where="reward", do="train it (LoRA: modules_to_save)"
        )
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy", "greater_is_better": True}
    args = RewardConfig(**arguments | (best if validation else {}), max_length=None)
    trainer = RewardModelTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(list(train)),
        eval_dataset=Dataset.from_list(sorted(validation, key=_length)) if validation else None,
        data_collator=PairCollator(tokenizer.pad_token_id),
        callbacks=[report, StopOnBadLoss()],
    )
    trainer.center = center
    order_rows(trainer, [_length(pair) for pair in train])
    return trainer


def _length(pair: TokenizedPair) -> int:
    return max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
