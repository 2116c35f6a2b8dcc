"""A checkpoint that is damaged, old, or has no room: named by the real commands, and recovered from or refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.runs.lock import Lock
from rlhf.runs.preemption import STOPPED_EXIT_CODE
from tests.conftest import Run
from tests.faults.setup import checkpoints, differences
from tests.faults.test_resume import moved, on_call, stopped
from tests.stages import setup

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def _cut(folder: Path) -> None:
    path = next(p for p in (folder / "state.pt", folder / "trained-00000.safetensors") if p.is_file())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(folder: Path) -> None:
    path = next(p for p in (folder / "state.pt", folder / "model.safetensors") if p.is_file())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _lose(folder: Path) -> None:
    next(p for p in (folder / "state.pt", folder / "trained-00000.safetensors") if p.is_file()).unlink()


def _unseal(folder: Path) -> None:
    (folder / "manifest.json").unlink()


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated file": (_cut, "bytes instead of"),
    "flipped bit": (_flip, "has changed since it was written"),
    "missing file": (_lose, "is missing"),
    "unfinished": (_unseal, "was never finished"),
}


@pytest.fixture(scope="module")
def interrupted(full: Any, call_cli: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """stage -> configuration of a run that has two checkpoints and was stopped."""
    from rlhf.trainers.ppo.trainer import PPOTrainer
    from rlhf.trainers.supervised.base import MetricsCallback

    top, made = tmp_path_factory.mktemp("interrupted"), {}
    for stage, owner, name, call in (
        ("sft", MetricsCallback, "on_step_end", 5),
        ("ppo", PPOTrainer, "optimizer_step", 11),
    ):
        every = {"checkpoint_every": 1} if stage == "ppo" else {}
        made[stage] = moved(full.configs[stage], top / stage, **every)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, on_call(call, getattr(owner, name)))
            stopped(stage, made[stage], top, call_cli)
    return made


@pytest.fixture
def broken(interrupted: Any, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """broken(stage) -> configuration of a copy of that run: the folder is moved away and put back by the next."""

    def copy(stage: str) -> dict[str, Any]:
        config = interrupted[stage]
        run, kept = Path(config["output_dir"]), Path(config["output_dir"] + "-kept")
        if not kept.exists():
            shutil.copytree(run, kept)
        shutil.rmtree(run)
        shutil.copytree(kept, run)
        return config

    return copy


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_newest_checkpoint_is_named_and_the_run_ends_as_it_would_have(
    fault: str, stage: str, broken: Any, full: Any, run_stage: Any
) -> None:
    config = broken(stage)
    run = Path(config["output_dir"])
    before, last = sorted((run / "checkpoints").glob("[cs]*-*"))
    harm, words = FAULTS[fault]
    harm(last)
    out = run_stage(stage, config)
    said = " ".join(out.split())
    assert words in said
    assert f"{last.name}" in said
    assert "trying the checkpoint before it" in said
    assert ("update 4" if stage == "sft" else "after step 2") in said
    assert before.name == {"sft": "checkpoint-4", "ppo": "step-000002"}[stage]
    assert differences(run, full.run(stage)) == []
    assert all((run / "checkpoints" / name / "manifest.json").is_file() for name in checkpoints(run))


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_an_old_layout_is_refused_and_left_alone(stage: str, broken: Any, call_cli: Run, tmp_path: Path) -> None:
    config = broken(stage)
    folder = Path(config["output_dir"]) / "checkpoints"
    manifest = sorted(folder.glob("*-*"))[-1] / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema": 0}))
    names = checkpoints(folder.parent)
    code, _, err = call_cli([stage, setup.write(tmp_path, stage, config)])
    assert code == 2
    assert "another layout than this version reads (found: schema 0, not 2); continue with the version" in err
    assert checkpoints(folder.parent) == names


def test_a_best_checkpoint_that_is_damaged_is_not_restored_at_the_end(
    full: Any, call_cli: Run, run_stage: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The reward model ends with the weights of its best checkpoint, which may be older than the newest."""
    from rlhf.trainers.supervised.base import MetricsCallback
    from rlhf.trainers.supervised.checkpoint_callback import last_checkpoint

    config = moved(full.configs["reward"], tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(MetricsCallback, "on_step_end", on_call(5, MetricsCallback.on_step_end))
        stopped("reward", config, tmp_path, call_cli)
    folder = tmp_path / "run" / "checkpoints"
    best = Path(json.loads((folder / "checkpoint-5" / "trainer_state.json").read_text())["best_model_checkpoint"])
    assert best.name in ("checkpoint-2", "checkpoint-4")
    _flip(folder / best.name)
    said: list[str] = []

    class Directory:
        checkpoints = folder

    last_checkpoint(Directory(), said.append)  # type: ignore[arg-type]
    assert best.name in said[0]
    run_stage("reward", config)
    assert differences(tmp_path / "run", full.run("reward")) == []


def test_a_second_writer_is_refused_before_it_reads_anything(full: Any, call_cli: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lock = Lock(run)
    lock.take()
    config = setup.write(tmp_path, "sft", moved(full.configs["sft"], run))
    code, _, err = call_cli(["sft", config])
    assert code == 2
    assert f"another process is writing into the output folder (found: process {os.getpid()} on" in err
    assert [path.name for path in run.iterdir()] == [".lock"]
    lock.release()
    assert call_cli(["sft", config]).code == 0


# Real small and read-only disks, in a mount namespace of their own


def _can_mount() -> bool:
    return shutil.which("unshare") is not None and _in_namespace("true", Path("/tmp")).returncode == 0


def _in_namespace(script: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script that may mount; `rlhf` in it is the command line."""
    program = f'rlhf() {{ "{sys.executable}" -m rlhf "$@"; }}\nset -u\ncd "{place}"\n{script}'
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", program],
        env=environment,
        text=True,
        capture_output=True,
        timeout=250,
        check=False,
    )


mounting = pytest.mark.skipif(not _can_mount(), reason="this machine lets nobody mount a small disk")


@mounting
def test_a_full_disk_costs_nothing_but_time(full: Any, tmp_path: Path) -> None:
    """A disk that holds one checkpoint and not two: refused, with the size; then it grows, and the same command ends
    as on a large one."""
    (tmp_path / "disk").mkdir()
    size = sum(p.stat().st_size for p in (full.run("ppo") / "checkpoints").rglob("*") if p.is_file())
    config = moved(full.configs["ppo"], tmp_path / "disk" / "run", checkpoint_every=1)
    setup.write(tmp_path, "ppo", config)
    done = _in_namespace(
        f"""mount -t tmpfs -o size={int(size * 1.7)} tmpfs disk || exit 9
        rlhf ppo ppo.yaml --quiet; echo "code $?"; ls disk/run/checkpoints; grep status disk/run/run.json
        mount -o remount,size=64m disk || exit 9
        rlhf ppo ppo.yaml; echo "code $?"; cp -r disk/run kept""",
        tmp_path,
    )
    assert "not enough disk space for a checkpoint" in done.stderr, done.stderr
    assert "MiB needed; step-000001 is intact); free" in done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["code 2", "step-000001"]
    assert "continuing after step 1" in done.stdout
    assert lines[-1] == "code 0"
    assert differences(tmp_path / "kept", full.run("ppo")) == []


@mounting
def test_a_trainers_full_disk_is_the_same(full: Any, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    largest = max((full.run("sft") / "checkpoints").glob("checkpoint-*"), key=lambda p: p.name)
    size = sum(p.stat().st_size for p in largest.rglob("*") if p.is_file())
    setup.write(tmp_path, "sft", moved(full.configs["sft"], tmp_path / "disk" / "run"))
    done = _in_namespace(
        f"""mount -t tmpfs -o size={int(size * 1.7)} tmpfs disk || exit 9
        rlhf sft sft.yaml --quiet; echo "code $?"; ls disk/run/checkpoints
        mount -o remount,size=64m disk || exit 9
        rlhf sft sft.yaml; echo "code $?"; cp -r disk/run kept""",
        tmp_path,
    )
    assert "not enough disk space for a checkpoint" in done.stderr, done.stderr
    assert "checkpoint-2 is intact" in done.stderr
    assert "Traceback" not in done.stderr
    assert "(update 2)" in done.stdout
    assert done.stdout.splitlines()[-1] == "code 0"
    assert differences(tmp_path / "kept", full.run("sft")) == []


@mounting
def test_a_read_only_disk_is_refused_before_training(full: Any, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    setup.write(tmp_path, "sft", moved(full.configs["sft"], tmp_path / "disk" / "run"))
    done = _in_namespace('mount -t tmpfs -o ro tmpfs disk && rlhf sft sft.yaml; echo "code $?"', tmp_path)
    assert "the output folder cannot be written to (found:" in done.stderr
    assert done.stdout.splitlines()[-1] == "code 2"
    assert "batch:" not in done.stdout


def test_the_exit_code_is_written_down() -> None:
    assert f"exit code {STOPPED_EXIT_CODE}" in (ROOT / "README.md").read_text(encoding="utf-8")
