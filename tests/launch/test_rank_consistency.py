"""Processes that do not see the same refuse together, and in words: none waits for the others, none trains apart."""

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


def answers(*views: dict[str, str], trouble: dict[int, RLHFError] | None = None) -> list[RLHFError | None]:
    """What each process is told."""
    store, found = HashStore(), [None] * len(views)

    def ask(rank: int) -> None:
        try:
            rank_consistency.compare_through_store(
                store, rank, len(views), views[rank], where="out", trouble=(trouble or {}).get(rank)
            )
        except RLHFError as error:
            found[rank] = error

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(len(views))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return found


def test_processes_that_see_the_same_go_on() -> None:
    assert answers(SAME, SAME, SAME) == [None, None, None]


@pytest.mark.parametrize(
    ("other", "kind", "says"),
    [
        ({"run": "new"}, CheckpointError, "run: interrupted 7f on rank 0"),
        ({"checkpoint step-2": ""}, CheckpointError, "checkpoint step-2: 0d on rank 0"),
        ({"checkpoint step-3": "1f"}, CheckpointError, "checkpoint step-3: nothing on rank 0"),
        ({"seed of the configuration": "2"}, ConfigError, "seed of the configuration: 1 on rank 0"),
        ({"input data.jsonl": "abd"}, ConfigError, "input data.jsonl: abc on rank 0"),
    ],
)
def test_all_are_told_what_one_sees_otherwise(other: dict[str, str], kind: type[RLHFError], says: str) -> None:
    told = answers(SAME, SAME, SAME | other)
    assert len({str(error) for error in told}) == 1
    assert isinstance(told[0], kind)
    assert says in str(told[0])
    assert "on rank 2 (" in str(told[0])
    assert (told[0].where, "all machines share" in told[0].do) == ("out", kind is CheckpointError)


def test_one_that_does_not_begin_is_not_waited_for() -> None:
    own = ConfigError("the output folder is a file")
    told = answers(SAME, {}, trouble={1: own})
    assert told[1] is own
    assert isinstance(told[0], TrainingError)
    assert "rank 1 on" in str(told[0])
    assert "the output folder is a file" in str(told[0])


def test_one_that_does_not_come_is_named() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(TrainingError, match="rank 1 did not join in time"):
        rank_consistency.compare_through_store(store, 0, 2, SAME, where="out")


def test_a_single_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_consistency, "compare_through_store", lambda *_, **__: pytest.fail("it asked"))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("WORLD_SIZE", "1")
    rank_consistency.check_same_on_all_ranks(SAME, where="out")
    with pytest.raises(ConfigError, match="wrong"):
        rank_consistency.check_same_on_all_ranks({}, where="out", trouble=ConfigError("wrong"))


def interrupted(path: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run directory below a folder, with a checkpoint."""
    monkeypatch.chdir(folder)
    config = load_stage_config(SFTConfig, Path(path), []).config
    run = RunDir(config.output_dir)
    run.start("sft", config, seed=1, processes=2, versions={}, inputs=inputs_of(config))
    (run.checkpoints / "checkpoint-2").mkdir(parents=True)
    write_manifest(run.checkpoints / "checkpoint-2", step=2)
    run.lock.release()


def test_disks_that_are_not_shared_refuse_to_resume(
    tiny_model_dir: Path, write_jsonl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes as a launcher starts them, each in a folder of its own; the first has the run's directory."""
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
