"""Processes with different configurations, inputs or run directories all stop with the same error; none hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed import HashStore, TCPStore

from rlhf.checkpointing.files import write_manifest
from rlhf.config.load import load_stage_config
from rlhf.config.schema import SFTConfig
from rlhf.errors import CheckpointError, ConfigError, RLHFError, TrainingError
from rlhf.launch import rank_consistency
from rlhf.runs.run_dir import RunDir
from rlhf.stages.lifecycle import inputs_of

SAME = {"seed of the configuration": "1", "input data.jsonl": "abc", "run": "interrupted 7f", "checkpoint step-2": "0d"}


def compare_on_all_ranks(
    *views: dict[str, str], local_error: dict[int, RLHFError] | None = None
) -> list[RLHFError | None]:
    """Return the error of each process, None if it had none; one thread stands for each process."""
    store, found = HashStore(), [None] * len(views)

    def compare(rank: int) -> None:
        try:
            rank_consistency.compare_through_store(
                store, rank, len(views), views[rank], where="out", local_error=(local_error or {}).get(rank)
            )
        except RLHFError as error:
            found[rank] = error

    threads = [threading.Thread(target=compare, args=(rank,)) for rank in range(len(views))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return found


def test_processes_with_equal_values_continue() -> None:
    assert compare_on_all_ranks(SAME, SAME, SAME) == [None, None, None]


@pytest.mark.parametrize(
    ("other", "kind", "expected_text"),
    [
        ({"run": "new"}, CheckpointError, "run: interrupted 7f on rank 0"),
        ({"checkpoint step-2": ""}, CheckpointError, "checkpoint step-2: 0d on rank 0"),
        ({"checkpoint step-3": "1f"}, CheckpointError, "checkpoint step-3: nothing on rank 0"),
        ({"seed of the configuration": "2"}, ConfigError, "seed of the configuration: 1 on rank 0"),
        ({"input data.jsonl": "abd"}, ConfigError, "input data.jsonl: abc on rank 0"),
    ],
)
def test_every_process_raises_the_same_error_about_a_value_that_differs(
    other: dict[str, str], kind: type[RLHFError], expected_text: str
) -> None:
    errors = compare_on_all_ranks(SAME, SAME, SAME | other)
    assert len({str(error) for error in errors}) == 1
    assert isinstance(errors[0], kind)
    assert expected_text in str(errors[0])
    assert "on rank 2 (" in str(errors[0])
    assert (errors[0].where, "all machines share" in errors[0].do) == ("out", kind is CheckpointError)


def test_the_others_do_not_wait_for_a_process_with_an_error_of_its_own() -> None:
    own = ConfigError("the output folder is a file")
    errors = compare_on_all_ranks(SAME, {}, local_error={1: own})
    assert errors[1] is own
    assert isinstance(errors[0], TrainingError)
    assert "rank 1 on" in str(errors[0])
    assert "the output folder is a file" in str(errors[0])


def test_a_process_that_does_not_join_in_time_is_named() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(TrainingError, match="rank 1 did not join in time"):
        rank_consistency.compare_through_store(store, 0, 2, SAME, where="out")


def test_a_single_process_does_not_use_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_consistency, "compare_through_store", lambda *_, **__: pytest.fail("it used the store"))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("WORLD_SIZE", "1")
    rank_consistency.check_same_on_all_ranks(SAME, where="out")
    with pytest.raises(ConfigError, match="wrong"):
        rank_consistency.check_same_on_all_ranks({}, where="out", local_error=ConfigError("wrong"))


def interrupted(path: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create an interrupted run with a checkpoint below `folder`."""
    monkeypatch.chdir(folder)
    config = load_stage_config(SFTConfig, Path(path), []).config
    run = RunDir(config.output_dir)
    run.start("sft", config, seed=1, processes=2, versions={}, inputs=inputs_of(config))
    (run.checkpoints / "checkpoint-2").mkdir(parents=True)
    write_manifest(run.checkpoints / "checkpoint-2", step=2)
    run.lock.release()


def test_resuming_is_refused_on_disks_that_are_not_shared(
    tiny_model_dir: Path, write_jsonl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start two processes as a launcher does, each in its own folder; only the first has the run directory."""
    data = write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "a", "completion": "b"}])
    path = tmp_path / "sft.yaml"
    source = {"output_dir": "out", "model": {"path": str(tiny_model_dir)}, "data": {"train": [{"path": str(data)}]}}
    path.write_text(yaml.safe_dump(source), encoding="utf-8")
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    interrupted(str(path), folders[0], monkeypatch)
    before = sorted(tmp_path.rglob("*"))

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launcher = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "RLHF_TIMEOUT": "60",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "rlhf", "sft", str(path)],
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | launcher | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, folder in enumerate(folders)
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2, err
        (message,) = [line for line in err.splitlines() if line.startswith("CheckpointError: ")]
        assert message.startswith("CheckpointError: output_dir out: the processes do not see the same run (found: ")
        assert "checkpoint checkpoint-2: " in message
        assert "nothing on rank 1" in message
        assert "run: interrupted " in message
        assert "new on rank 1" in message
        assert message.endswith(rank_consistency.SHARED_DISK_ADVICE)
    assert sorted(tmp_path.rglob("*")) == before
