"""Tests of held-out losses: every record and token counts once, for any batch size and number of processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf.data.render import Rendered
from rlhf.distributed.engine import count_real_rows
from rlhf.trainers.supervised import sft
from rlhf.trainers.supervised.eval_loss import TokenMeanLoss
from tests.models import tiny
from tests.tolerances import assert_close
from tests.trainers.on_trl import prepared, ready, sft_trainer

ROWS = [
    Rendered(list(range(3, 3 + n)), [False] * (n - said) + [True] * said)
    for n, said in ((4, 1), (9, 7), (5, 2), (12, 3), (7, 6))
]
LENGTHS = (1, 2, 7, 8)  # of evaluation sets


def token_mean(model: Any, rows: list[Rendered]) -> float:
    """Return nats per token with loss, computed from the definition."""
    found = []
    for row in rows:
        with torch.no_grad():
            logprobs = model(torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
        found += [-float(logprobs[t - 1, row.ids[t]]) for t in range(1, len(row.ids)) if row.mask[t]]
    return sum(found) / len(found)


def packed_trainer(folder: Path, model: Any, rows: list[Rendered], held: list[Rendered], **optim: Any) -> Any:
    return sft_trainer(folder, model, rows, held, packing=16, **optim)


def document_trainer(folder: Path, model: Any, rows: list[Rendered], held: list[Rendered], **optim: Any) -> Any:
    args, report, made = prepared(folder, model, len(rows), True, **optim)
    return ready(sft.build_pretrain_trainer(model, tiny.tokenizer(), rows, held, args, report), made)


@pytest.mark.parametrize("build", [sft_trainer, packed_trainer, document_trainer])
@pytest.mark.parametrize("microbatch", [1, 2, 3, 5])
def test_a_language_models_held_out_loss_is_the_mean_over_tokens(build: Any, microbatch: int, tmp_path: Path) -> None:
    model = tiny.new(3)
    trainer = build(tmp_path, model, ROWS, ROWS, batch_size=microbatch, microbatch_size=microbatch)
    for _ in range(2):  # the second does not count what the first has read
        assert_close(torch.tensor(trainer.evaluate()["eval_loss"]), token_mean(model, ROWS))


def test_the_check_sees_a_mean_over_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(TokenMeanLoss, "log")
    model = tiny.new(3)
    trainer = sft_trainer(tmp_path, model, ROWS, ROWS, batch_size=2, microbatch_size=2)
    assert abs(trainer.evaluate()["eval_loss"] - token_mean(model, ROWS)) > 0.001


def processes(records: int, world: int, rows: int) -> list[Any]:
    """Return stand-ins for the Accelerator of each process at the last held-out batch."""
    left = records % (world * rows)
    return [
        SimpleNamespace(gradient_state=SimpleNamespace(end_of_dataloader=True, remainder=left), process_index=rank)
        for rank in range(world)
    ]


@pytest.mark.parametrize("records", LENGTHS)
@pytest.mark.parametrize(("world", "rows"), [(1, 3), (2, 2), (3, 2), (4, 1)])
def test_the_records_of_the_last_batch_are_shared_out_without_its_repetitions(
    records: int, world: int, rows: int
) -> None:
    ranks = processes(records, world, rows)
    real = [count_real_rows(rank, rows) for rank in ranks]
    assert sum(real) == (records % (world * rows) or world * rows)
    assert sorted(real, reverse=True) == real  # the first processes have the first rows
    for rank in ranks:
        rank.gradient_state.end_of_dataloader = False
        assert count_real_rows(rank, rows) == rows


@pytest.mark.parametrize("records", LENGTHS)
def test_accelerate_still_says_what_the_last_batch_holds(records: int) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(torch.utils.data.DataLoader(list(range(records)), batch_size=3))
    assert [count_real_rows(accelerator, len(batch)) for batch in loader] == [
        min(3, records - i) for i in range(0, records, 3)
    ]


@pytest.mark.parametrize("build", [sft_trainer, packed_trainer, document_trainer])
@pytest.mark.parametrize("real", [0, 2, 5])
def test_repetitions_are_not_counted(build: Any, real: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five rows the first are records and the others repetitions."""
    model = tiny.new(3)
    trainer = build(tmp_path, model, ROWS, ROWS, batch_size=5, microbatch_size=5)
    monkeypatch.setattr("rlhf.trainers.supervised.eval_loss.count_real_rows", lambda _, rows: {5: real}[rows])
    records = sorted(ROWS, key=lambda row: len(row.ids))[:real]
    assert_close(torch.tensor(trainer.evaluate()["eval_loss"]), token_mean(model, records) if real else 0.0)
