"""Checkpoints that are whole or are not used: written beside, synced, renamed; the manifest is written last.

A folder is a checkpoint if its `manifest.json` is there and every file that it lists has the size and the SHA-256 that
it says. A killed process, a full disk or a power cut therefore leaves the checkpoints before as they were, and a half
one that is not taken for a whole one. A damaged one is named, and the one before it is used.
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
"""Of the layout of a checkpoint. Raise it when an older one can no longer be read."""
MANIFEST = "manifest.json"
DAMAGED_MANIFEST = "manifest.damaged.json"
UNFINISHED_SUFFIX = ".tmp"
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is not what was written: unfinished, cut, changed or with a part missing."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, and what its manifest says about it."""

    path: Path
    about: dict[str, Any]


def write_manifest(folder: Path, **about: Any) -> None:
    """Make a folder a checkpoint: sync its files, then write the manifest.

    Args:
        about: facts kept in the manifest, such as the step; `needs` names another checkpoint that this one refers to.
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
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_checkpoint(folder: Path) -> Checkpoint:
    """Compare a checkpoint with its manifest, every byte.

    Raises: Damaged; CheckpointError if another version of this program wrote it.
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
    wrong = [problem for name, facts in files.items() if (problem := _wrong(folder / name, facts))]
    if wrong:
        raise DamagedCheckpoint("the checkpoint is damaged", found="; ".join(wrong[:3]), where=str(folder))
    return Checkpoint(folder, about)


def _wrong(path: Path, facts: dict[str, Any]) -> str:
    if not path.is_file():
        return f"{path.name} is missing"
    if (size := path.stat().st_size) != facts["bytes"]:
        return f"{path.name} has {size} bytes instead of {facts['bytes']}"
    return "" if file_sha256(path) == facts["sha256"] else f"{path.name} has another content than was written"


def _other_schema(folder: Path, schema: Any) -> CheckpointError:
    return CheckpointError(
        "the checkpoint has another layout than this version reads",
        found=f"schema {schema}, not {CHECKPOINT_FORMAT}",
        where=str(folder),
        do="go on with the version of rlhf that wrote it, or delete the checkpoints to start over",
    )


def refuse_format_without_manifest(path: Path) -> None:
    """Refuse a file of the time before there were manifests.

    Raises: CheckpointError.
    """
    if path.is_file():
        raise _other_schema(path, 0)


def _number(path: Path) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", path.name)))


def list_checkpoints(folder: Path, prefix: str) -> list[Path]:
    """Folders that may be checkpoints, oldest first. One that was sealed and not yet renamed is as good as renamed."""
    found = []
    for path in folder.glob(f"{prefix}-*"):
        name = path.name.removesuffix(UNFINISHED_SUFFIX)
        sealed = name == path.name or (path / MANIFEST).is_file()
        if path.is_dir() and sealed and re.fullmatch(rf"{re.escape(prefix)}(-\d+)+", name):
            found.append(path)
    return sorted(found, key=lambda path: (_number(path), path.name))


def find_newest_checkpoint(folder: Path, prefix: str, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, with the one that it needs; those that are not are named.

    Raises: CheckpointError for one that another version wrote.
    """
    candidates = list_checkpoints(folder, prefix)
    for path in reversed(candidates):
        try:
            found = verify_checkpoint(path)
            if found.about.get("needs") not in (None, path.name):
                verify_checkpoint(folder / found.about["needs"])
        except DamagedCheckpoint as trouble:
            before = candidates.index(path) > 0
            say(f"{trouble}; {'trying the one before it' if before else 'no older one is left: starting over'}")
            with suppress(OSError):  # its files stay for who wants to look, until the next checkpoint is whole
                os.replace(path / MANIFEST, path / DAMAGED_MANIFEST)
            continue
        return found
    return None


def remove_old_checkpoints(folder: Path, prefix: str, keep: int) -> None:
    """After one has been written: remove all but the newest `keep` whole ones and what they need, and what is left of
    others."""
    for path in folder.glob(f"{prefix}-*{UNFINISHED_SUFFIX}"):
        shutil.rmtree(path, ignore_errors=True)
    kept = [path for path in list_checkpoints(folder, prefix) if (path / MANIFEST).is_file()][-keep:]
    needed = {read_json(path / MANIFEST)["about"].get("needs") for path in kept}
    for path in list_checkpoints(folder, prefix):
        if path not in kept and path.name not in needed:
            shutil.rmtree(path, ignore_errors=True)


def remove_checkpoints_after(folder: Path, prefix: str, name: str) -> None:
    """Remove checkpoints that are later than one that has just been written: damaged ones, of a future that this run
    has taken back."""
    for path in list_checkpoints(folder, prefix):
        if _number(path) > _number(Path(name)):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def new_checkpoint_folder(folder: Path, name: str, *, needed: int, keep: int, about: dict[str, Any]) -> Iterator[Path]:
    """A folder to write a checkpoint into; it gets its name when it is whole. Then the oldest are removed.

    Args:
        name: prefix-number or prefix-number-number.
        needed: bytes that it will take.
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
    shutil.rmtree(folder / name, ignore_errors=True)  # only ever a damaged one, or of a future taken back
    os.replace(temporary, folder / name)
    fsync_path(folder)
    remove_checkpoints_after(folder, prefix, name)
    remove_old_checkpoints(folder, prefix, keep)


@contextmanager
def reserve_disk_space(folder: Path, needed: int, prefix: str) -> Iterator[None]:
    """Around writing a checkpoint: refuse to begin without room, and say what is missing if it runs out.

    Raises: CheckpointError.
    """
    if free_bytes(folder) < needed:
        raise _full(folder, needed, prefix)
    try:
        yield
    except Exception as error:
        if is_disk_full_error(error) or free_bytes(folder) < needed:  # some libraries hide the reason
            raise _full(folder, needed, prefix) from error
        raise


def free_bytes(folder: Path) -> int:
    """Left for us on the disk of a folder that may not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def is_disk_full_error(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, says that a disk, quota or file-size limit is reached."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _full(folder: Path, needed: int, prefix: str) -> CheckpointError:
    whole = [path for path in list_checkpoints(folder, prefix) if (path / MANIFEST).is_file()]
    before = f"{whole[-1].name} is untouched" if whole else "there was none before"
    return CheckpointError(
        "no room for a checkpoint",
        found=f"{free_bytes(folder) / 2**20:.1f} MiB free, {needed / 2**20:.1f} MiB needed; {before}",
        where=str(folder),
        do=f"free {needed / 2**20:.1f} MiB and start the same command again: it continues",
    )


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
