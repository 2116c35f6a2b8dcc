"""Tests of the parts that stages on a transformers Trainer share: batches, schedules, row order and metrics."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.config.run_plan import SupervisedPlan
from rlhf.config.sections import Optim
from rlhf.config.tuning import EMPTY_SELECTION, TrainingPhase
from rlhf.errors import ConfigError, TrainingError
from rlhf.models.parameter_selection import ParameterMap, ParameterPlace
from rlhf.runs.metrics import MetricsWriter
from rlhf.runs.run_dir import RunDir
from rlhf.trainers.phase_schedule import make_schedule
from rlhf.trainers.supervised.base import (
    LengthGroupedSampler,
    MetricsCallback,
    StopOnBadLoss,
    losses_since,
    tokens_until,
    training_arguments,
)

LAYOUT = ParameterMap({"w": ParameterPlace(0, "mlp", 1)}, 1, tied=False)


@pytest.mark.parametrize(
    ("records", "batch", "epochs", "most", "updates"),
    [
        (64, 8, 1, None, 8),
        (65, 8, 1, None, 9),
        (7, 8, 1, None, 1),
        (64, 8, 2.5, None, 20),
        (10, 8, 3, None, 6),
        (64, 8, 0.01, None, 1),
        (64, 8, 4, 5, 5),
        (64, 8, 1, 100, 8),
    ],
)
def test_updates(records: int, batch: int, epochs: float, most: int | None, updates: int) -> None:
    optim = Optim(batch_size=batch, microbatch_size=batch, epochs=epochs, max_updates=most)
    assert (
        make_schedule(
            LAYOUT, SupervisedPlan(optim, 1, records), freeze=EMPTY_SELECTION, unfreeze=(), factors={}
        ).updates
        == updates
    )


def made(tmp_path: Path, processes: int = 1, updates: int = 40, phases: int = 1, **changes: Any) -> dict[str, Any]:
    optim = Optim(**{"batch_size": 32, "microbatch_size": 4} | changes)
    unfreeze = [TrainingPhase(updates=updates // phases, patience=changes.get("patience"))] * phases
    plan = make_schedule(
        LAYOUT, SupervisedPlan(optim, 1, 10 * optim.batch_size), freeze=EMPTY_SELECTION, unfreeze=unfreeze, factors={}
    )
    return training_arguments(optim, RunDir(tmp_path), seed=5, processes=processes, schedule=plan, evaluate=True)


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 8), (2, 4), (8, 1)])
def test_the_batch_is_counted_over_all_processes(processes: int, accumulation: int, tmp_path: Path) -> None:
    args = made(tmp_path, processes)
    size = args["per_device_train_batch_size"] * args["gradient_accumulation_steps"] * processes
    assert size == 32
    assert args["gradient_accumulation_steps"] == accumulation
    with pytest.raises(ConfigError, match="batch_size 32 cannot be shared"):
        made(tmp_path, 3)


def test_the_microbatch_shrinks_to_the_share_of_a_process(tmp_path: Path) -> None:
    args = made(tmp_path, 2, microbatch_size=64)
    assert (args["per_device_train_batch_size"], args["gradient_accumulation_steps"]) == (16, 1)


def test_settings_arrive_under_the_librarys_names(tmp_path: Path) -> None:
    args = made(tmp_path, learning_rate=0.25, adam_beta2=0.9, max_grad_norm=0.5)
    wanted = {
        "learning_rate": 0.25,
        "adam_beta2": 0.9,
        "max_grad_norm": 0.5,
        "max_steps": 40,
        "eval_steps": 8,
        "save_steps": 8,
        "seed": 5,
        "report_to": "none",
    }
    assert {k: args[k] for k in wanted} == wanted


def test_patience_keeps_the_best_weights_and_phases_tell_every_process_what_waits(tmp_path: Path) -> None:
    plain, patient, phased = made(tmp_path), made(tmp_path, patience=2), made(tmp_path, phases=2)
    assert patient["load_best_model_at_end"]
    assert patient["metric_for_best_model"] == "eval_loss"
    assert not patient["greater_is_better"]
    assert phased["ddp_find_unused_parameters"] is True
    assert not {"load_best_model_at_end", "ddp_find_unused_parameters"} & set(plain)


def test_the_gap_compares_held_out_records_with_what_was_trained_on_since(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    report = MetricsCallback(writer, SimpleNamespace(update=lambda *_: None), ("gap",))
    for logs in ({"loss": 3.0}, {"loss": 1.0}, {"eval_loss": 2.5}, {"loss": 0.5}, {"eval_loss": 4.0}):
        report.on_log(None, SimpleNamespace(global_step=3), None, logs)
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["gap"] for line in lines if "gap" in line] == [0.5, 3.5]


def test_a_long_run_writes_about_a_hundred_lines_and_a_short_one_each_update(tmp_path: Path) -> None:
    assert made(tmp_path, updates=40)["logging_steps"] == 1
    assert made(tmp_path, updates=1000)["logging_steps"] == 10


def test_losses_since_the_last_evaluation_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"loss": 3.0}, {"eval_loss": 2.5}, {"loss": 1.0}, {"epoch": 1.0}, {"loss": 0.5}, {"eval_loss": 4.0}]
    path.write_text("".join(json.dumps({"step": i} | line) + "\n" for i, line in enumerate(lines)))
    assert [losses_since(path, n) for n in (0, 1, 2, 5, 6)] == [[], [3.0], [], [1.0, 0.5], []]
    assert losses_since(tmp_path / "none", 3) == []


def test_declared_numbers_are_written_under_our_names(tmp_path: Path) -> None:
    shown: list[Any] = []
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    report = MetricsCallback(writer, SimpleNamespace(update=lambda *line: shown.append(line)), ("loss",))
    state = SimpleNamespace(global_step=3)
    logs = {"loss": 1.5, "num_tokens": 12.0, "mean_token_accuracy": 0.5, "train_runtime": 9.0, "epoch": "x"}
    report.on_log(None, state, None, logs)
    report.on_step_end(None, state, SimpleNamespace(should_log=False, should_save=False))
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 3,
        "loss": 1.5,
        "tokens": 12.0,
        "token_accuracy": 0.5,
    }
    assert shown == [(3, {"loss": 1.5})]


def test_tokens_go_on_counting_after_a_checkpoint_whose_update_is_always_logged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "tokens": 10.0}, {"step": 2, "loss": 1.0}, {"step": 3, "tokens": 30.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [tokens_until(path, step) for step in (0, 2, 3)] == [0.0, 10.0, 30.0]
    writer = MetricsWriter(path, keep_until=2)
    report = MetricsCallback(writer, SimpleNamespace(update=lambda *_: None), (), tokens=10.0)
    report.on_log(None, SimpleNamespace(global_step=3), None, {"num_tokens": 20.0})
    writer.close()
    assert path.read_text().splitlines() == [json.dumps(line) for line in lines]
    for saving in (True, False):
        control = SimpleNamespace(should_log=False, should_save=saving)
        report.on_step_end(None, SimpleNamespace(global_step=3), control)
        assert control.should_log is saving


@pytest.mark.parametrize("logs", [{"loss": float("nan")}, {"loss": 1.0, "grad_norm": float("inf")}])
def test_a_loss_that_is_not_finite_ends_the_run(logs: dict[str, float]) -> None:
    StopOnBadLoss().on_log(None, SimpleNamespace(global_step=7), None, {"loss": 1.0, "grad_norm": 2.0})
    with pytest.raises(TrainingError, match="update 7"):
        StopOnBadLoss().on_log(None, SimpleNamespace(global_step=7), None, logs)


# Batches of like lengths


def drawn(lengths: list[int], batch: int, *, seed: int = 1, epoch: int = 0) -> list[int]:
    sampler = LengthGroupedSampler(lengths, batch, seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert len(sampler) == len(order) == -(-len(lengths) // batch) * batch
    return order


LENGTHS = [(i * 37) % 101 + 1 for i in range(1003)]


def test_every_row_is_drawn_once_an_epoch_in_an_order_of_its_own() -> None:
    orders = [drawn(LENGTHS, 8, seed=s, epoch=e) for s, e in ((1, 0), (1, 1), (2, 0))]
    assert all(sorted(order[:1003]) == list(range(1003)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert drawn(LENGTHS, 8, epoch=1) == orders[1]


def test_a_batch_holds_rows_of_like_length_and_batches_come_in_any_order() -> None:
    order = drawn(LENGTHS, 8)
    batches = [[LENGTHS[i] for i in order[k : k + 8]] for k in range(0, 1000, 8)]
    assert max(max(b) - min(b) for b in batches) < 10
    longest = [max(b) for b in batches]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_the_last_batch_of_an_epoch_is_filled_up_with_other_rows_of_it() -> None:
    ends = [drawn(LENGTHS, 8, epoch=e)[1000:] for e in range(5)]
    assert all(len(end) == len(set(end)) == 8 for end in ends)
    assert len({tuple(sorted(end[3:])) for end in ends}) == 5  # in each epoch others
    assert drawn(LENGTHS[:1000], 8)[-8:] != drawn(LENGTHS[:1000], 8)[:8]
    assert sorted(drawn(LENGTHS[:1000], 8)) == list(range(1000))  # nothing to fill up


@pytest.mark.parametrize("rows", [9, 11, 15])
def test_no_row_stands_twice_in_a_batch_that_others_can_fill(rows: int) -> None:
    """This also holds if all batches are sorted together."""
    for epoch in range(20):
        assert len(set(drawn(LENGTHS[:rows], 8, epoch=epoch)[8:])) == 8


def test_few_rows_are_repeated_evenly() -> None:
    order = drawn([5, 9, 7], 8)
    assert order[:3] == [1, 2, 0]
    assert sorted(order.count(row) for row in range(3)) == [2, 3, 3]
