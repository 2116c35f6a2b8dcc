"""Trainer of classifiers on transformers.Trainer, with confusion counts summed over batches and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from rlhf.data.collate import pad_right
from rlhf.distributed.engine import count_real_rows
from rlhf.functional import classification_loss
from rlhf.trainers.supervised.base import MetricsCallback, OverridingTrainer, StopOnBadLoss, order_rows

LabelledRow = dict[str, Any]  # input_ids, and target: for each label the probability that it holds


@dataclass(frozen=True)
class ConfusionCounts:
    """Confusion counts per label, [N] each, and the numbers of correct and of all decisions."""

    true_positives: Tensor
    false_positives: Tensor
    false_negatives: Tensor
    correct: float
    decisions: float

    @property
    def accuracy(self) -> float:
        """Share of correct decisions: one decision per record or, with multi_label, one per record and label."""
        return self.correct / max(self.decisions, 1.0)

    @property
    def precision(self) -> Tensor:
        """Precision of each label, [N]; 0 for a label that was never predicted."""
        return self.true_positives / (self.true_positives + self.false_positives).clamp_min(1)

    @property
    def recall(self) -> Tensor:
        """Recall of each label, [N]; 0 for a label that never applies."""
        return self.true_positives / (self.true_positives + self.false_negatives).clamp_min(1)

    @property
    def macro_f1(self) -> float:
        """Mean of F1 = 2 TP / (2 TP + FP + FN) over the labels that apply or are predicted at least once."""
        size = 2 * self.true_positives + self.false_positives + self.false_negatives
        occurring = size > 0
        return float((2 * self.true_positives[occurring] / size[occurring]).mean()) if bool(occurring.any()) else 0.0


def confusion_sums(logits: Tensor, target: Tensor, *, multi_label: bool) -> Tensor:
    """Return the confusion counts of a batch as one vector, which can be summed over batches and processes.

    Args:
        logits: [B, N].
        target: [B, N] probabilities. The true label is the most probable one; with multi_label, all above 0.5.
        multi_label: whether several labels may apply to a record.
    Returns: [3N + 2] float64: true positives, false positives, false negatives, correct decisions, decisions.
    """
    if multi_label:
        predicted, true = logits > 0, target > 0.5
        correct, decisions = (predicted == true).sum(), torch.tensor(true.numel())
    else:
        classes = torch.arange(logits.shape[1], device=logits.device)
        predicted, true = (x.argmax(dim=1, keepdim=True) == classes for x in (logits, target))
        correct, decisions = (predicted & true).sum(), torch.tensor(len(true))
    parts = [(predicted & true).sum(dim=0), (predicted & ~true).sum(dim=0), (~predicted & true).sum(dim=0)]
    totals = torch.stack([correct, decisions.to(correct.device)])
    return torch.cat([*parts, totals]).double()


def read_confusion_counts(sums: Tensor) -> ConfusionCounts:
    """Return the `ConfusionCounts` of a sum of `confusion_sums` vectors."""
    true_positives, false_positives, false_negatives = sums[:-2].chunk(3)
    return ConfusionCounts(true_positives, false_positives, false_negatives, float(sums[-2]), float(sums[-1]))


@dataclass(frozen=True)
class LabelledCollator:
    """Collator that makes a batch of rows with input_ids and target."""

    pad_id: int

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return "input_ids" and "attention_mask", [B, T] int64, right-padded, and "target", [B, N] float32."""
        ids, mask = pad_right([f["input_ids"] for f in features], self.pad_id)
        target = torch.tensor([f["target"] for f in features], dtype=torch.float32)
        return {"input_ids": ids, "attention_mask": mask.long(), "target": target}


class ClassifierTrainer(OverridingTrainer, Trainer):
    """transformers.Trainer with `classification_loss`; the loss of a batch is its mean over records."""

    columns = ("input_ids", "target")
    multi_label = False
    weight: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sums: dict[str, Tensor] = {}
        self.counts: dict[str, ConfusionCounts] = {}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss of a batch; rows that repeat held-out records to fill the batch are left out."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        rows = len(inputs["target"])
        real = rows if model.training else count_real_rows(self.accelerator, rows)
        logits, target = outputs.logits[:real].float(), inputs["target"][:real]
        weight = None if self.weight is None else self.weight.to(logits.device)
        loss = classification_loss(logits, target, multi_label=self.multi_label, weight=weight).sum() / max(real, 1)
        mode = "train" if model.training else "eval"
        sums = confusion_sums(logits.detach(), target, multi_label=self.multi_label)
        self._sums[mode] = self._sums.get(mode, torch.zeros_like(sums)) + sums
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Return the loss only; `compute_loss` has already added the confusion counts."""
        with torch.no_grad():
            loss = self.compute_loss(model, self.inputs_on_device(inputs))
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add accuracy and macro F1 over all records since the last log line."""
        prefix = next((p for p in ("eval_", "ood_") if any(k.startswith(p) for k in logs)), "")
        mode = "eval" if prefix else "train"
        sums = self._sums.pop(mode, None)
        if sums is not None:
            counts = self.counts[prefix.rstrip("_") or mode] = read_confusion_counts(
                self.accelerator.reduce(sums, "sum").cpu()
            )
            logs |= {f"{prefix}label_accuracy": counts.accuracy, f"{prefix}macro_f1": counts.macro_f1}
        super().log(logs, start_time)


def build_classifier_trainer(
    model: Any,
    tokenizer: Any,
    train: Sequence[LabelledRow],
    validation: Sequence[LabelledRow],
    arguments: dict[str, Any],
    report: MetricsCallback,
    *,
    multi_label: bool,
    weight: Tensor | None,
) -> ClassifierTrainer:
    """Build the trainer. It restores the checkpoint of the lowest held-out loss, whose probabilities are best."""
    from datasets import Dataset

    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    args = TrainingArguments(**arguments | (best if validation else {}), remove_unused_columns=False)
    trainer = ClassifierTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(list(train)),
        eval_dataset=Dataset.from_list(sorted(validation, key=_length)) if validation else None,
        data_collator=LabelledCollator(tokenizer.pad_token_id),
        callbacks=[report, StopOnBadLoss()],
    )
    trainer.multi_label, trainer.weight = multi_label, weight
    # Batches are not grouped by length: if length correlates with the label, a batch would hold one label only.
    order_rows(trainer, [_length(row) for row in train], pool=1)
    return trainer


def _length(row: LabelledRow) -> int:
    return len(row["input_ids"])
