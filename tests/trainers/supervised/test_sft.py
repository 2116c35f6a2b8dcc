"""Tests of supervised fine-tuning: which tokens carry loss, and that accumulation and packing do not change it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.data.render import Rendered
from rlhf.trainers.supervised import sft
from tests.models import tiny
from tests.tolerances import GRADIENT, assert_close, distance
from tests.trainers.on_trl import prepared, sft_trainer, written

END = tiny.renderer().end_id
CHATS = [
    [("user", "what is a dog?"), ("assistant", "an animal")],
    [("user", "yes or no"), ("assistant", "no"), ("user", "tell me"), ("assistant", "the cat sat on the mat")],
    [("system", "be good"), ("user", "good day"), ("assistant", "good day to you, good day to you, please")],
]


def rendered() -> list[Rendered]:
    return [tiny.renderer().conversation([{"role": r, "content": c} for r, c in chat]) for chat in CHATS]


def mean_loss(model: Any, rows: list[Rendered]) -> float:
    """Return nats per supervised token, computed row by row from the definition."""
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logprobs = model(torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
        for t in range(1, len(row.ids)):
            if row.mask[t]:
                total -= float(logprobs[t - 1, row.ids[t]])
                count += 1
    return total / count


def batch_of(trainer: Any) -> dict[str, Any]:
    return next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_exactly_the_assistants_tokens_and_their_end_are_learnt(pad_is_end: bool, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    if pad_is_end:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(END)
    model = tiny.new()
    args, report, _ = prepared(tmp_path, model, 3, False, batch_size=3, microbatch_size=3)
    batch = batch_of(sft.build_sft_trainer(model, tokenizer, rendered(), [], args, report))
    said = ["".join(c + "<|end|>" for r, c in chat if r == "assistant") for chat in CHATS]
    learnt = [tokenizer.decode(row[row != -100].tolist()) for row in batch["labels"]]
    assert sorted(learnt) == sorted(said)
    agrees = batch["labels"] == batch["input_ids"]
    assert (agrees | (batch["labels"] == -100)).all()
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        whole = ids[mask.bool()].tolist()
        assert whole in [row.ids for row in rendered()]


def test_the_logged_loss_is_the_mean_over_learnt_tokens(tmp_path: Path) -> None:
    model = tiny.new(3)
    wanted = mean_loss(model, rendered())
    trainer = sft_trainer(tmp_path, model, rendered(), batch_size=3, microbatch_size=3, max_updates=1)
    trainer.train()
    assert_close(torch.tensor(written(tmp_path)[0]["loss"]), wanted)


def test_ragged_microbatches_weigh_every_token_alike(tmp_path: Path) -> None:
    rows = rendered() + [Rendered([*row.ids[:9], 50], [False] * 9 + [True]) for row in rendered()]
    weights, lines = [], []
    for microbatch in (6, 3, 2, 1):
        model = tiny.new(3)
        folder = tmp_path / str(microbatch)
        trainer = sft_trainer(folder, model, rows, batch_size=6, microbatch_size=microbatch, max_updates=1)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        lines.append(written(folder)[0])
    for other, line in zip(weights[1:], lines[1:], strict=True):
        assert distance(other, weights[0]) < GRADIENT
        for name in ("loss", "grad_norm"):
            assert_close(torch.tensor(line[name]), lines[0][name], name)


def test_a_packed_row_is_learnt_as_if_it_were_alone(tmp_path: Path) -> None:
    rows = rendered()
    length = sum(len(row.ids) for row in rows)
    model = tiny.new(3)
    wanted = mean_loss(model, rows)
    trainer = sft_trainer(tmp_path, model, rows, packing=length, batch_size=1, microbatch_size=1, max_updates=1)
    assert len(trainer.train_dataset) == 1
    trainer.train()
    assert_close(torch.tensor(written(tmp_path)[0]["loss"]), wanted)


def test_the_packing_check_sees_attention_across_rows(tmp_path: Path) -> None:
    rows = rendered()
    joined = Rendered([i for r in rows for i in r.ids], [m for r in rows for m in r.mask])
    model = tiny.new(3)
    assert abs(mean_loss(model, [joined]) - mean_loss(model, rows)) > 0.01


def test_training_learns_its_rows_by_heart(tmp_path: Path) -> None:
    model = tiny.new(3)
    rows = rendered()[:2]
    sft_trainer(tmp_path, model, rows, epochs=60, learning_rate=2e-2, batch_size=2, microbatch_size=2).train()
    model.eval()
    assert mean_loss(model, rows) < 0.05
    ids = rows[0].ids[: rows[0].mask.index(True)]
    for wanted in rows[0].ids[len(ids) :]:
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        assert ids[-1] == wanted
    assert ids[-1] == END
