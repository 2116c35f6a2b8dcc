"""Write, verify, list and remove checkpoint folders; an incomplete or damaged checkpoint is never loaded.

A checkpoint is written to a temporary folder, synced to disk and renamed; its manifest is written last. A folder is a
valid checkpoint if `manifest.json` exists and every file that it lists has the recorded size and SHA-256. After a
killed process, a full disk or a power cut, earlier checkpoints are therefore unchanged, and an unfinished one is
recognised. A damaged checkpoint is reported, and the one before it is used.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import CheckpointError
from rlhf.runs.run_dir import fsync_path, read_json, write_json

CHECKPOINT_FORMAT = 2
"""Version of the layout of a checkpoint. Increase it when older checkpoints can no longer be read."""
MANIFEST = "manifest.json"
DAMAGED_MANIFEST = "manifest.damaged.json"
UNFINISHED_SUFFIX = ".tmp"
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DamagedCheckpoint(CheckpointError):
    """Error for a checkpoint that is unfinished, truncated or changed, or that lacks a file."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder, and the facts that its manifest records under "about"."""

    path: Path
    about: dict[str, Any]


def write_manifest(folder: Path, **about: Any) -> None:
    """Make a folder a valid checkpoint: sync its files to disk, then write the manifest.

    Args:
        about: facts to record in the manifest, such as the step; `needs` names another checkpoint that this one needs.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fsync_path(path)
            files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        fsync_path(path)
    write_json(folder / MANIFEST, {"schema": CHECKPOINT_FORMAT, "about": about, "files": files})
    fsync_path(folder)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_checkpoint(folder: Path) -> Checkpoint:
    """Compare every file of a checkpoint with the manifest, and return the checkpoint.

    Raises: DamagedCheckpoint if they differ; CheckpointError if its layout is another version's.
    """
    if not (folder / MANIFEST).is_file():
        raise DamagedCheckpoint("the checkpoint was never finished", found=f"no {MANIFEST}", where=str(folder))
    try:
        manifest = read_json(folder / MANIFEST)
        schema, about, files = manifest["schema"], manifest["about"], manifest["files"]
    except (CheckpointError, TypeError, KeyError) as error:
        raise DamagedCheckpoint("the checkpoint is damaged", found=f"{MANIFEST}: {error}", where=str(folder)) from None
    if schema != CHECKPOINT_FORMAT:
        raise _other_schema(folder, schema)
    problems = [problem for name, facts in files.items() if (problem := _problem(folder / name, facts))]
    if problems:
        raise DamagedCheckpoint("the checkpoint is damaged", found="; ".join(problems[:3]), where=str(folder))
    return Checkpoint(folder, about)


def _problem(path: Path, facts: dict[str, Any]) -> str:
    if not path.is_file():
        return f"{path.name} is missing"
    if (size := path.stat().st_size) != facts["bytes"]:
        return f"{path.name} has {size} bytes instead of {facts['bytes']}"
    return "" if file_sha256(path) == facts["sha256"] else f"{path.name} has changed since it was written"


def _other_schema(folder: Path, schema: Any) -> CheckpointError:
    return CheckpointError(
        "the checkpoint has another layout than this version reads",
        found=f"schema {schema}, not {CHECKPOINT_FORMAT}",
        where=str(folder),
        do="continue with the version of rlhf that wrote it, or delete the checkpoints to start over",
    )


def refuse_format_without_manifest(path: Path) -> None:
    """Reject a checkpoint file of a release that wrote no manifests.

    Raises: CheckpointError if the file exists.
    """
    if path.is_file():
        raise _other_schema(path, 0)


def _number(path: Path) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", path.name)))


def list_checkpoints(folder: Path, prefix: str) -> list[Path]:
    """Return the folders that may be checkpoints, oldest first.

    A temporary folder with a manifest is included: the process was killed after writing it and before renaming it.
    """
    found = []
    for path in folder.glob(f"{prefix}-*"):
        name = path.name.removesuffix(UNFINISHED_SUFFIX)
        complete = name == path.name or (path / MANIFEST).is_file()
        if path.is_dir() and complete and re.fullmatch(rf"{re.escape(prefix)}(-\d+)+", name):
            found.append(path)
    return sorted(found, key=lambda path: (_number(path), path.name))


def find_newest_checkpoint(folder: Path, prefix: str, log: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest valid checkpoint whose needed checkpoint, if any, is valid too; None if there is none.

    Args:
        log: called with a message about each damaged checkpoint.
    Raises: CheckpointError if the layout of a checkpoint is another version's.
    """
    candidates = list_checkpoints(folder, prefix)
    for path in reversed(candidates):
        try:
            found = verify_checkpoint(path)
            if found.about.get("needs") not in (None, path.name):
                verify_checkpoint(folder / found.about["needs"])
        except DamagedCheckpoint as error:
            has_older = candidates.index(path) > 0
            log(
                f"{error}; {'trying the checkpoint before it' if has_older else 'there is no older one: starting over'}"
            )
            with suppress(OSError):  # its files are kept for inspection until the next checkpoint is complete
                os.replace(path / MANIFEST, path / DAMAGED_MANIFEST)
            continue
        return found
    return None


def remove_old_checkpoints(folder: Path, prefix: str, keep: int) -> None:
    """Remove all checkpoints but the newest `keep` complete ones and those that they need, and remove unfinished ones.

    Call it after a checkpoint has been written.
    """
    for path in folder.glob(f"{prefix}-*{UNFINISHED_SUFFIX}"):
        shutil.rmtree(path, ignore_errors=True)
    kept = [path for path in list_checkpoints(folder, prefix) if (path / MANIFEST).is_file()][-keep:]
    needed = {read_json(path / MANIFEST)["about"].get("needs") for path in kept}
    for path in list_checkpoints(folder, prefix):
        if path not in kept and path.name not in needed:
            shutil.rmtree(path, ignore_errors=True)


def remove_checkpoints_after(folder: Path, prefix: str, name: str) -> None:
    """Remove checkpoints that are later than `name`, which has just been written.

    They exist only if they were damaged, so that the run has resumed at, or rolled back to, an earlier checkpoint.
    """
    for path in list_checkpoints(folder, prefix):
        if _number(path) > _number(Path(name)):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def new_checkpoint_folder(folder: Path, name: str, *, needed: int, keep: int, about: dict[str, Any]) -> Iterator[Path]:
    """Context manager that yields a temporary folder for a checkpoint, which is renamed to `name` when it is complete.

    Then later checkpoints and the oldest ones are removed. If an error occurs inside, the temporary folder is removed.

    Args:
        name: prefix-number or prefix-number-number.
        needed: bytes that the checkpoint will take.
        keep: number of newest checkpoints that are not removed.
        about: facts to record in the manifest, see `write_manifest`.
    Raises: CheckpointError if the disk is full.
    """
    prefix = name.split("-")[0]
    temporary = folder / (name + UNFINISHED_SUFFIX)
    with reserve_disk_space(folder, needed, prefix):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            write_manifest(temporary, **about)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    shutil.rmtree(folder / name, ignore_errors=True)  # if it exists, it is damaged or was abandoned
    os.replace(temporary, folder / name)
    fsync_path(folder)
    remove_checkpoints_after(folder, prefix, name)
    remove_old_checkpoints(folder, prefix, keep)


@contextmanager
def reserve_disk_space(folder: Path, needed: int, prefix: str) -> Iterator[None]:
    """Context manager for writing a checkpoint: check the free disk space first, and translate disk-full errors.

    Raises: CheckpointError that states the free and the needed space.
    """
    if free_bytes(folder) < needed:
        raise _disk_full(folder, needed, prefix)
    try:
        yield
    except Exception as error:
        if is_disk_full_error(error) or free_bytes(folder) < needed:  # some libraries hide the reason
            raise _disk_full(folder, needed, prefix) from error
        raise


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def is_disk_full_error(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, means that a disk, quota or file-size limit is reached."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _disk_full(folder: Path, needed: int, prefix: str) -> CheckpointError:
    complete = [path for path in list_checkpoints(folder, prefix) if (path / MANIFEST).is_file()]
    earlier = f"{complete[-1].name} is intact" if complete else "there is no earlier checkpoint"
    return CheckpointError(
        "not enough disk space for a checkpoint",
        found=f"{free_bytes(folder) / 2**20:.1f} MiB free, {needed / 2**20:.1f} MiB needed; {earlier}",
        where=str(folder),
        do=f"free {needed / 2**20:.1f} MiB and run the same command again: it resumes",
    )


def folder_size(folder: Path) -> int:
    """Return the total size in bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
