"""metrics.jsonl accepts declared names only, and is continued exactly after a crash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.errors import TrainingError
from rlhf.runs.metrics import METRICS, MetricsWriter, read_jsonl


def write_steps(path: Path, steps: range) -> None:
    """Write a file with one line per step."""
    writer = MetricsWriter(path)
    for step in steps:
        writer.write(step, {"loss": step / 10})
    writer.close()


def test_step_comes_first_and_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m")
    writer.write(1, {"loss": 0.5, "kl": 1})
    line = (tmp_path / "m").read_text(encoding="utf-8")
    assert list(json.loads(line)) == ["step", "loss", "kl"]
    writer.close()


def test_an_undeclared_name_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m")
    with pytest.raises(TrainingError, match=r"undeclared metric \(found: lossy\); declare it in rlhf/runs/metrics\.py"):
        writer.write(1, {"loss": 0.5, "lossy": 1.0})
    writer.close()
    assert (tmp_path / "m").read_text(encoding="utf-8") == ""


def test_other_processes_refuse_the_same_names_and_write_nothing(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m", main=False)
    writer.write(1, {"loss": 0.5})
    with pytest.raises(TrainingError):
        writer.write(1, {"lossy": 1.0})
    writer.close()
    assert not (tmp_path / "m").exists()


def test_on_resume_later_steps_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_steps(path, range(1, 8))
    writer = MetricsWriter(path, keep_until=4)
    writer.write(5, {"loss": 9.0})
    writer.close()
    assert [(line["step"], line["loss"]) for line in read_jsonl(path)] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 0.4),
        (5, 9.0),
    ]


def test_a_new_run_empties_the_old_file(tmp_path: Path) -> None:
    write_steps(tmp_path / "m", range(1, 4))
    MetricsWriter(tmp_path / "m").close()
    assert list(read_jsonl(tmp_path / "m")) == []


def test_a_last_line_cut_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_steps(path, range(1, 4))
    path.write_text(path.read_text(encoding="utf-8")[:-5], encoding="utf-8")
    assert [line["step"] for line in read_jsonl(path)] == [1, 2]
    MetricsWriter(path, keep_until=3).close()
    assert [line["step"] for line in read_jsonl(path)] == [1, 2]


def test_every_metric_declares_a_unit_a_meaning_and_a_range_that_is_not_empty() -> None:
    for name, metric in METRICS.items():
        assert metric.unit, name
        assert len(metric.meaning) > 10, name
        assert metric.low < metric.high, name


def test_the_healthy_range_includes_its_ends() -> None:
    share = METRICS["finished"]
    assert [share.healthy(x) for x in (0.49, 0.5, 1.0, 1.01)] == [False, True, True, False]
