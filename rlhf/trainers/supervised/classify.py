"""Classifier: rendered rows with label targets into a transformers Trainer, counted over batches and processes."""

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
    """How often each label was right: said and held, said only, held only. [N] each, and what was decided right."""

    both: Tensor
    said_only: Tensor
    held_only: Tensor
    right: float
    decided: float

    @property
    def accuracy(self) -> float:
        """Share of decisions that are right: one a record, or one a record and label if several may hold."""
        return self.right / max(self.decided, 1.0)

    @property
    def precision(self) -> Tensor:
        """[N]: of what was said, how much held; 0 where nothing was said."""
        return self.both / (self.both + self.said_only).clamp_min(1)

    @property
    def recall(self) -> Tensor:
        """[N]: of what held, how much was said; 0 where nothing held."""
        return self.both / (self.both + self.held_only).clamp_min(1)

    @property
    def macro_f1(self) -> float:
        """Mean over labels of 2 both / (2 both + said_only + held_only); labels neither said nor held do not count."""
        size = 2 * self.both + self.said_only + self.held_only
        met = size > 0
        return float((2 * self.both[met] / size[met]).mean()) if bool(met.any()) else 0.0


def confusion_sums(logits: Tensor, target: Tensor, *, multi_label: bool) -> Tensor:
    """Confusion sums of a batch, one vector so that they add over batches and processes.

    Args:
        logits, target: [B, N]. A target counts as its likeliest label, or as the labels above 0.5 if multi_label.
    Returns: [3N + 2] float64: both, said only, held only, right, decided.
    """
    if multi_label:
        said, held = logits > 0, target > 0.5
        right, decided = (said == held).sum(), torch.tensor(held.numel())
    else:
        classes = torch.arange(logits.shape[1], device=logits.device)
        said, held = (x.argmax(dim=1, keepdim=True) == classes for x in (logits, target))
        right, decided = (said & held).sum(), torch.tensor(len(held))
    parts = [(said & held).sum(dim=0), (said & ~held).sum(dim=0), (~said & held).sum(dim=0)]
    ends = torch.stack([right, decided.to(right.device)])
    return torch.cat([*parts, ends]).double()


def read_confusion_counts(sums: Tensor) -> ConfusionCounts:
    """`Counts` of a sum of `count` vectors."""
    both, said_only, held_only = sums[:-2].chunk(3)
    return ConfusionCounts(both, said_only, held_only, float(sums[-2]), float(sums[-1]))


@dataclass(frozen=True)
class LabelledCollator:
    """Rows of [input_ids, target] for a Trainer."""

    pad_id: int

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Returns: "input_ids", "attention_mask" [B, T] int64, right-padded; "target" [B, N] float32."""
        ids, mask = pad_right([f["input_ids"] for f in features], self.pad_id)
        target = torch.tensor([f["target"] for f in features], dtype=torch.float32)
        return {"input_ids": ids, "attention_mask": mask.long(), "target": target}


class ClassifierTrainer(OverridingTrainer, Trainer):
    """A Trainer with `classification_loss`; a batch's loss is its mean over records."""

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
        """Mean loss of a batch. Held-out records count once."""
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
        """The loss alone: what is counted is counted in `compute_loss`."""
        with torch.no_grad():
            loss = self.compute_loss(model, self.inputs_on_device(inputs))
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add accuracy and macro F1 over everything seen since the last log line."""
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
    """The trainer; keeps the checkpoint of the lowest held-out loss, the one whose probabilities are best."""
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
    # Batches are not grouped by length: where length tells the label, each would hold one label only.
    order_rows(trainer, [_length(row) for row in train], pool=1)
    return trainer


def _length(row: LabelledRow) -> int:
    return len(row["input_ids"])
