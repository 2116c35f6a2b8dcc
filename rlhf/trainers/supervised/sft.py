"""Trainers of language models: pretraining on transformers.Trainer, SFT on trl.SFTTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import Trainer
from trl import SFTTrainer

from rlhf.data.collate import DemonstrationCollator
from rlhf.data.render import Rendered
from rlhf.trainers.supervised.base import MetricsCallback, OverridingTrainer, StopOnBadLoss, order_rows
from rlhf.trainers.supervised.eval_loss import TokenMeanLoss


class DocumentTrainer(TokenMeanLoss, OverridingTrainer, Trainer):
    """transformers.Trainer for documents, whose tokens all carry loss."""


class DemonstrationTrainer(TokenMeanLoss, OverridingTrainer, SFTTrainer):
    """trl.SFTTrainer whose held-out loss is the mean over tokens."""


def to_dataset(rows: Sequence[Rendered]) -> Any:
    """Return a data set with columns `input_ids` and `labels` (-100 where the mask is False), as TRL accepts them."""
    from datasets import Dataset

    labels = [[i if m else -100 for i, m in zip(r.ids, r.mask, strict=True)] for r in rows]
    return Dataset.from_dict({"input_ids": [r.ids for r in rows], "labels": labels})


def _by_length(rows: Sequence[Rendered]) -> Any:
    return to_dataset(sorted(rows, key=lambda row: len(row.ids))) if rows else None


def build_pretrain_trainer(
    model: Any,
    tokenizer: Any,
    train: Sequence[Rendered],
    validation: Sequence[Rendered],
    arguments: dict[str, Any],
    report: MetricsCallback,
) -> Any:
    """Build the trainer of a pretraining run, on every token of documents."""
    from transformers import TrainingArguments

    args = TrainingArguments(**arguments)
    trainer = DocumentTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=to_dataset(train),
        eval_dataset=_by_length(validation),
        callbacks=[report, StopOnBadLoss()],
        data_collator=DemonstrationCollator(tokenizer.pad_token_id),
    )
    order_rows(trainer, [len(row.ids) for row in train])
    return trainer


def build_sft_trainer(
    model: Any,
    tokenizer: Any,
    train: Sequence[Rendered],
    validation: Sequence[Rendered],
    arguments: dict[str, Any],
    report: MetricsCallback,
    *,
    packing: int | None = None,
) -> Any:
    """Build the trainer of an SFT run on rendered rows.

    Args:
        packing: length in tokens of sequences that are filled with several rows (attention stays within a row);
            None = no packing.
    """
    from trl import SFTConfig

    args = SFTConfig(**arguments, packing=packing is not None, max_length=packing, eval_packing=False)
    trainer = DemonstrationTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=to_dataset(train),
        eval_dataset=_by_length(validation),
        callbacks=[report, StopOnBadLoss()],
    )
    # Packed sequences have the same length, so they are only shuffled, by our sampler and not by the Trainer's.
    lengths = [len(row.ids) for row in train] if packing is None else [packing] * len(trainer.train_dataset)
    order_rows(trainer, lengths, pool=50 if packing is None else 1)
    return trainer
