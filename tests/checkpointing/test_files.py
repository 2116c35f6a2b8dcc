"""Only complete checkpoints are loaded, damaged ones are reported, and a new one never damages the one before."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf.checkpointing import files
from rlhf.checkpointing.files import (
    MANIFEST,
    DamagedCheckpoint,
    find_newest_checkpoint,
    list_checkpoints,
    new_checkpoint_folder,
    refuse_format_without_manifest,
    reserve_disk_space,
    verify_checkpoint,
    write_manifest,
)
from rlhf.errors import CheckpointError


def write(folder: Path, name: str, content: str = "weights", keep: int = 2) -> Path:
    with new_checkpoint_folder(folder, name, needed=100, keep=keep, about={"content": content}) as into:
        (into / "state.pt").write_text(content)
        (into / "inner").mkdir()
        (into / "inner" / "more").write_text(content * 2)
    return folder / name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path) -> None:
    """Flip one bit of the last byte of a file."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (lambda f: flip(f / "state.pt"), "state.pt has changed since it was written"),
    "cut file": (lambda f: cut(f / "inner" / "more"), "more has 13 bytes instead of 14"),
    "missing file": (lambda f: (f / "state.pt").unlink(), "state.pt is missing"),
    "cut manifest": (lambda f: cut(f / MANIFEST) or cut(f / MANIFEST), "manifest.json: .*damaged JSON"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "never finished"),
    "foreign manifest": (lambda f: (f / MANIFEST).write_text("[]"), "manifest.json"),
}


def test_what_was_written_is_verified_with_what_is_known_about_it(tmp_path: Path) -> None:
    path = write(tmp_path / "deep" / "er", "step-000012")
    assert verify_checkpoint(path).about == {"content": "weights"}
    assert names(path) == ["inner", MANIFEST, "state.pt"]
    found = find_newest_checkpoint(path.parent, "step", pytest.fail)
    assert found is not None
    assert found.path == path


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_newest_one_is_named_and_the_one_before_is_used(fault: str, tmp_path: Path) -> None:
    harm, words = FAULTS[fault]
    before, last = write(tmp_path, "step-000009"), write(tmp_path, "step-000010")
    harm(last)
    with pytest.raises(DamagedCheckpoint, match=words):
        verify_checkpoint(last)
    said: list[str] = []
    found = find_newest_checkpoint(tmp_path, "step", said.append)
    assert found is not None
    assert found.path == before
    assert len(said) == 1
    assert "step-000010" in said[0]
    assert said[0].endswith("trying the checkpoint before it")
    later = write(tmp_path, "step-000011")
    assert names(tmp_path) == [before.name, later.name]  # both that stay are whole
    harm(before)
    harm(later)
    assert find_newest_checkpoint(tmp_path, "step", said.append) is None
    assert said[-1].endswith("there is no older one: starting over")


@pytest.mark.parametrize("schema", [0, 1, 3, "2"])
def test_another_layout_is_refused_and_not_skipped(schema: object, tmp_path: Path) -> None:
    write(tmp_path, "step-000001")
    path = write(tmp_path, "step-000002") / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": schema}))
    with pytest.raises(
        CheckpointError, match=r"another layout .*schema .*, not 2\); continue with the version"
    ) as error:
        find_newest_checkpoint(tmp_path, "step", pytest.fail)
    assert not isinstance(error.value, DamagedCheckpoint)


def test_a_file_of_the_time_before_manifests_is_refused(tmp_path: Path) -> None:
    refuse_format_without_manifest(tmp_path / "ppo.pt")
    (tmp_path / "ppo.pt").write_text("")
    with pytest.raises(CheckpointError, match=r"ppo\.pt: the checkpoint has another layout .*schema 0"):
        refuse_format_without_manifest(tmp_path / "ppo.pt")


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in range(1, 5):
        write(tmp_path, f"step-{step:06}", keep=3)
    assert names(tmp_path) == ["step-000002", "step-000003", "step-000004"]
    write(tmp_path, "step-000004-002", keep=1)
    assert names(tmp_path) == ["step-000004-002"]


def test_what_a_kept_one_needs_is_kept_and_verified_with_it(tmp_path: Path) -> None:
    """This includes the case that a newer checkpoint needs another one.

    If that one is damaged, the checkpoint before must still be usable.
    """
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4)):
        with new_checkpoint_folder(tmp_path, f"step-{step}", needed=1, keep=2, about={"needs": f"step-{best}"}) as into:
            (into / "state.pt").write_text("x")
    assert names(tmp_path) == ["step-1", "step-3", "step-4"]
    flip(tmp_path / "step-4" / "state.pt")
    said: list[str] = []
    found = find_newest_checkpoint(tmp_path, "step", said.append)
    assert found is not None
    assert found.path.name == "step-3"
    flip(tmp_path / "step-1" / "state.pt")
    assert find_newest_checkpoint(tmp_path, "step", said.append) is None
    assert "step-1" in said[-1]


def test_numbers_count_and_not_letters(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "checkpoint-11.tmp"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path, "checkpoint")] == ["checkpoint-9", "checkpoint-10"]


def test_one_that_is_complete_and_not_yet_renamed_is_used(tmp_path: Path) -> None:
    """A process may be killed between both; the manifest, not the name, makes a checkpoint complete."""
    write(tmp_path, "step-000001")
    (tmp_path / "step-000002.tmp").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path, "step")] == ["step-000001"]
    write_manifest(tmp_path / "step-000002.tmp", step=2)
    found = find_newest_checkpoint(tmp_path, "step", pytest.fail)
    assert found is not None
    assert found.about == {"step": 2}


def test_later_ones_go_when_an_earlier_one_is_written(tmp_path: Path) -> None:
    """The newest is damaged and the run resumes from the one before: the checkpoints that are kept must be complete."""
    write(tmp_path, "step-000008")
    flip(write(tmp_path, "step-000010") / "state.pt")
    write(tmp_path, "step-000009")
    assert names(tmp_path) == ["step-000008", "step-000009"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("I/O: No space left on device")]
)
def test_a_full_disk_leaves_the_one_before_and_says_what_is_needed(error: Exception, tmp_path: Path) -> None:
    path = write(tmp_path, "step-000001")

    def fill() -> None:
        with new_checkpoint_folder(tmp_path, "step-000002", needed=3 * 2**20, keep=1, about={}) as into:
            (into / "state.pt").write_text("half")
            raise RuntimeError("wrapped") from error

    with pytest.raises(
        CheckpointError, match=r"not enough disk space .*3\.0 MiB needed; step-000001 is intact\); free 3\.0 MiB"
    ):
        fill()
    assert names(tmp_path) == ["step-000001"]
    verify_checkpoint(path)


def test_without_room_it_is_not_begun_and_a_hidden_reason_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = iter([50, 50, 200, 50, 50])
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=next(usage)))
    began = []

    def fail() -> None:
        with reserve_disk_space(tmp_path, 100, "step"):
            began.append(True)
            raise RuntimeError("file write failed")

    for most in (0, 1):
        with pytest.raises(CheckpointError, match=r"not enough disk space .*there is no earlier checkpoint"):
            fail()
        assert len(began) == most


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError), reserve_disk_space(tmp_path, 1, "step"):
        raise KeyError


CALLS = ("fsync", "replace")


class Killed(BaseException):
    """Error that ends the simulated process: nothing after it runs, not even cleaning up."""


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_at_any_call_leaves_a_whole_checkpoint(
    keep: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends at the n-th call that changes the disk, for every n; later calls have no effect."""
    at, ended = 0, False
    while not ended:
        at += 1
        folder = tmp_path / str(at)
        write(folder, "step-000001", keep=keep)
        with monkeypatch.context() as patch:
            left = [at]

            def counted(real: Callable[..., object], left: list[int] = left) -> Callable[..., object]:
                def call(*args: object, **kwargs: object) -> object:
                    left[0] -= 1
                    if left[0] <= 0:
                        raise Killed
                    return real(*args, **kwargs)

                return call

            for name in (*CALLS, "mkdir"):
                patch.setattr(os, name, counted(getattr(os, name)))
            patch.setattr(files.shutil, "rmtree", counted(files.shutil.rmtree))
            try:
                write(folder, "step-000002", keep=keep)
                ended = True
            except Killed:
                pass
        found = find_newest_checkpoint(folder, "step", lambda _: None)
        assert found is not None
        write(folder, "step-000002", keep=keep)
        assert names(folder)[-1] == "step-000002"
        assert len(names(folder)) == min(keep, 2)
    assert at > 10
