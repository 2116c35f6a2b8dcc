"""Tests of the classifier's loss on rows of different lengths, and of metrics under any split into batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.config.sections import Peft
from rlhf.errors import TrainingError
from rlhf.functional import balanced_weights
from rlhf.models.heads import sequence_outputs
from rlhf.models.reward_models import new_classifier
from rlhf.trainers.supervised.classify import ConfusionCounts, LabelledCollator, confusion_sums, read_confusion_counts
from tests import oracles
from tests.models import tiny
from tests.models.fixtures import shake
from tests.tolerances import GRADIENT, assert_close, distance
from tests.trainers.on_trl import label_trainer, written
from tests.trainers.setup import gradient

PAD = tiny.renderer().pad_id
LENGTHS = [5, 9, 3, 14, 6, 7, 2, 8, 11, 4, 6]
TARGETS: dict[bool, list[list[float]]] = {
    False: [
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
        [0.2, 0.5, 0.3],
        [1, 0, 0],
        [0, 1, 0],
        [0, 0.9, 0.1],
        [1, 0, 0],
        [0, 0, 1],
        [0.4, 0.3, 0.3],
        [0, 1, 0],
    ],
    True: [
        [1, 1, 0],
        [0, 0, 0],
        [0, 1, 1],
        [0.2, 0.9, 0.5],
        [1, 1, 1],
        [0, 0, 1],
        [0, 0.7, 0.1],
        [1, 0, 0],
        [0, 1, 1],
        [0.6, 0.3, 0.3],
        [0, 1, 0],
    ],
}
"""Parametrization by whether several labels may apply to a record."""
BOTH = pytest.mark.parametrize("multi_label", [False, True], ids=["exclusive", "multi_label"])


def classifier(folder: str, peft: Peft | None = None) -> Any:
    """Return a classifier with three labels on the SFT model, with changed weights so that the labels differ."""
    new = new_classifier(
        tiny.source(folder), peft or Peft(), outputs=3, pad_id=PAD, vocab_size=len(tiny.tokenizer()), seed=3
    )
    return shake(new)


@pytest.fixture
def model(sft_folder: str) -> Any:
    return classifier(sft_folder)


def rows(multi_label: bool) -> list[dict[str, Any]]:
    """Return 11 rows of different lengths with soft and certain labels; the last batch of 4 has 3."""
    return [
        {"input_ids": ids, "target": [float(t) for t in target]}
        for ids, target in zip(tiny.rows(1, LENGTHS), TARGETS[multi_label], strict=True)
    ]


def alone(model: Any, data: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Return the logits of each row in a batch of its own, and the targets."""
    found = []
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            found.append(sequence_outputs(model, ids, torch.ones_like(ids).bool()))
    return torch.cat(found), torch.tensor([row["target"] for row in data])


def wanted_loss(model: Any, data: list[dict[str, Any]], multi_label: bool, weight: Tensor | None = None) -> float:
    logits, target = alone(model, data)
    losses = oracles.classification_loss(logits, target, multi_label, torch.ones(3) if weight is None else weight)
    return float(losses.mean())


def test_rows_are_padded_on_the_right_and_targets_kept() -> None:
    batch = LabelledCollator(9)([{"input_ids": [1, 9], "target": [1, 0.0]}, {"input_ids": [3], "target": [0.25, 0.75]}])
    assert set(batch) == {"input_ids", "attention_mask", "target"}
    assert batch["input_ids"].tolist() == [[1, 9], [3, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["target"].tolist() == [[1.0, 0.0], [0.25, 0.75]]
    assert batch["target"].dtype == torch.float32


@pytest.mark.parametrize("weight", [None, [0.5, 2.0, 1.5]], ids=["equal", "weighted"])
@BOTH
def test_the_loss_is_the_mean_of_the_equation_on_uneven_lengths(
    multi_label: bool, weight: list[float] | None, model: Any, tmp_path: Path
) -> None:
    data = rows(multi_label)
    weights = None if weight is None else torch.tensor(weight)
    trainer = label_trainer(tmp_path, model, data, multi_label=multi_label, weight=weights)
    loss = trainer.compute_loss(model, LabelledCollator(PAD)(data))
    assert_close(loss, wanted_loss(model, data, multi_label, weights))
    assert abs(loss.item() - wanted_loss(model, data, multi_label, torch.tensor([1.0, 1.0, 3.0]))) > 0.01


def test_a_padded_row_beside_a_long_one_keeps_its_gradient(model: Any, tmp_path: Path) -> None:
    """The gradient of a batch is the mean of the gradients of its rows, each in a batch of its own."""
    data = rows(False)[:4]
    trainer = label_trainer(tmp_path, model, data)
    trainer.compute_loss(model, LabelledCollator(PAD)(data)).backward()
    together = gradient(model)
    model.zero_grad()
    for row in data:
        (trainer.compute_loss(model, LabelledCollator(PAD)([row])) / len(data)).backward()
    assert distance(gradient(model), together) < GRADIENT


# Counting


def by_hand(logits: Tensor, target: Tensor, multi_label: bool) -> tuple[float, list[tuple[int, int, int]]]:
    """Return the accuracy and, for each label, true positives, false positives and false negatives."""
    right = decided = 0
    table = [[0, 0, 0] for _ in range(target.shape[1])]
    for z, t in zip(logits.tolist(), target.tolist(), strict=True):
        said = [z_n > 0 if multi_label else z_n == max(z) for z_n in z]
        held = [t_n > 0.5 if multi_label else t.index(max(t)) == n for n, t_n in enumerate(t)]
        for n, (s, h) in enumerate(zip(said, held, strict=True)):
            table[n][0] += s and h
            table[n][1] += s and not h
            table[n][2] += h and not s
        right += sum(s == h for s, h in zip(said, held, strict=True)) if multi_label else said == held
        decided += len(z) if multi_label else 1
    return right / decided, [(a, b, c) for a, b, c in table]


def f1_by_hand(table: list[tuple[int, int, int]]) -> float:
    """Return the mean F1 over labels that were predicted or apply."""
    scores = []
    for both, false_positives, false_negatives in table:
        if both + false_positives + false_negatives:
            precision = both / (both + false_positives) if both + false_positives else 0.0
            recall = both / (both + false_negatives) if both + false_negatives else 0.0
            scores.append(2 * precision * recall / (precision + recall) if both else 0.0)
    return sum(scores) / len(scores)


def test_counts_of_exclusive_labels_by_hand() -> None:
    """Label 0 is predicted 3 times and 2 are right, label 1 once and right, label 2 never; one target is soft."""
    said = [0, 0, 0, 1, 1, 0]
    logits = torch.nn.functional.one_hot(torch.tensor(said), 4).float() * 5 - 2
    target = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0.6, 0.4, 0], [0, 1, 0, 0]])
    counts = read_confusion_counts(confusion_sums(logits, target, multi_label=False))
    assert counts.true_positives.tolist() == [2, 2, 0, 0]
    assert counts.false_positives.tolist() == [2, 0, 0, 0]
    assert counts.false_negatives.tolist() == [0, 1, 1, 0]
    assert counts.accuracy == pytest.approx(4 / 6)
    assert counts.precision.tolist() == pytest.approx([2 / 4, 2 / 2, 0, 0])
    assert counts.recall.tolist() == pytest.approx([2 / 2, 2 / 3, 0, 0])
    assert counts.macro_f1 == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)  # label 3 was neither said nor held


def test_counts_of_several_labels_by_hand() -> None:
    """A label is predicted above a logit of 0 and applies above a probability of one half."""
    logits = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0], [0.0, 1.0]])
    target = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.5], [0.9, 0.51]])
    counts = read_confusion_counts(confusion_sums(logits, target, multi_label=True))
    assert (counts.true_positives.tolist(), counts.false_positives.tolist(), counts.false_negatives.tolist()) == (
        [2, 1],
        [0, 1],
        [1, 1],
    )
    assert counts.accuracy == pytest.approx(5 / 8)
    assert counts.precision.tolist() == pytest.approx([1.0, 0.5])
    assert counts.recall.tolist() == pytest.approx([2 / 3, 1 / 2])
    assert counts.macro_f1 == pytest.approx((4 / 5 + 1 / 2) / 2)


def test_nothing_counted_is_0_and_not_a_division() -> None:
    nothing = torch.zeros(2)
    counts = ConfusionCounts(nothing, nothing, nothing, 0.0, 0.0)
    assert (counts.accuracy, counts.macro_f1) == (0.0, 0.0)
    assert counts.precision.tolist() == counts.recall.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("seed", [0, 1])
@BOTH
def test_counts_add_up_over_any_split(multi_label: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(23, 4, generator=generator)
    target = torch.randn(23, 4, generator=generator).softmax(1) * (2 if multi_label else 1)
    whole = confusion_sums(logits, target, multi_label=multi_label)
    parts = [
        confusion_sums(z, t, multi_label=multi_label)
        for z, t in zip(logits.split([1, 10, 7, 5]), target.split([1, 10, 7, 5]), strict=True)
    ]
    assert torch.equal(torch.stack(parts).sum(0), whole)
    counts, (accuracy, table) = read_confusion_counts(whole), by_hand(logits, target, multi_label)
    assert counts.accuracy == pytest.approx(accuracy)
    assert torch.stack([counts.true_positives, counts.false_positives, counts.false_negatives], dim=1).tolist() == [
        list(t) for t in table
    ]
    assert counts.macro_f1 == pytest.approx(f1_by_hand(table))


# Through the trainer


@pytest.mark.parametrize("size", [3, 4, 11])
@BOTH
def test_held_out_numbers_are_over_all_records_and_written_once(
    multi_label: bool, size: int, model: Any, tmp_path: Path
) -> None:
    data, weight = rows(multi_label), torch.tensor([0.5, 2.0, 1.5])
    trainer = label_trainer(
        tmp_path, model, data, data, multi_label=multi_label, weight=weight, batch_size=size, microbatch_size=size
    )
    result = trainer.evaluate()
    accuracy, table = by_hand(*alone(model, data), multi_label)
    assert 0 < accuracy < 1
    assert result["eval_label_accuracy"] == pytest.approx(accuracy)
    assert result["eval_macro_f1"] == pytest.approx(f1_by_hand(table))
    assert_close(torch.tensor(result["eval_loss"]), wanted_loss(model, data, multi_label, weight))
    (line,) = written(tmp_path)
    assert line["eval_label_accuracy"] == pytest.approx(accuracy)
    assert {"eval_loss", "eval_label_accuracy", "eval_macro_f1"} <= set(line)
    assert [int(n) for n in trainer.counts["eval"].true_positives] == [both for both, _, _ in table]


def test_each_evaluation_counts_anew(model: Any, tmp_path: Path) -> None:
    data = rows(False)
    trainer = label_trainer(tmp_path, model, data, data)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_label_accuracy"] == second["eval_label_accuracy"]
    assert trainer.counts["eval"].decisions == len(data)


def test_training_numbers_are_those_of_the_update(model: Any, tmp_path: Path) -> None:
    data = rows(False)[:8]
    loss, (accuracy, table) = wanted_loss(model, data, False), by_hand(*alone(model, data), False)
    label_trainer(tmp_path, model, data, max_updates=1).train()
    line = written(tmp_path)[0]
    assert line["label_accuracy"] == pytest.approx(accuracy)
    assert line["macro_f1"] == pytest.approx(f1_by_hand(table))
    assert_close(torch.tensor(line["loss"]), loss)


@BOTH
def test_accumulation_changes_neither_loss_nor_step(multi_label: bool, sft_folder: str, tmp_path: Path) -> None:
    """The weights differ on purpose: a loss normalized by them would differ between microbatches."""
    weight = balanced_weights(torch.tensor([row["target"] for row in rows(multi_label)]), multi_label=multi_label)
    moved, lines = [], []
    for microbatch in (8, 2, 1):
        model, folder = classifier(sft_folder), tmp_path / str(microbatch)
        trainer = label_trainer(
            folder,
            model,
            rows(multi_label)[:8],
            multi_label=multi_label,
            weight=weight,
            microbatch_size=microbatch,
            max_updates=1,
        )
        trainer.train()
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        lines.append(written(folder)[0])
    for other, line in zip(moved[1:], lines[1:], strict=True):
        assert distance(other, moved[0]) < GRADIENT
        for name in ("loss", "grad_norm", "label_accuracy", "macro_f1"):
            assert_close(torch.tensor(line[name]), lines[0][name], name)


@pytest.mark.parametrize(("peft", "rate"), [(None, 3e-3), (tiny.LORA, 1e-2)], ids=["full", "LoRA"])
def test_the_model_of_the_lowest_held_out_loss_is_kept(peft: Any, rate: float, sft_folder: str, tmp_path: Path) -> None:
    """Trained on swapped labels the model gets worse, so the checkpoint kept is not the last."""
    model = classifier(sft_folder, peft)
    validation = rows(False)
    turned = [row | {"target": row["target"][1:] + row["target"][:1]} for row in validation]
    trainer = label_trainer(tmp_path, model, turned, validation, epochs=8, learning_rate=rate)
    trainer.train()
    seen = [line["eval_loss"] for line in written(tmp_path) if "eval_loss" in line]
    assert seen[-1] > min(seen) + 0.01
    assert_close(torch.tensor(trainer.evaluate()["eval_loss"]), min(seen))


def test_a_loss_that_is_no_number_ends_the_run(model: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        model.score.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="nan"):
        label_trainer(tmp_path, model, rows(False), max_updates=1).train()
