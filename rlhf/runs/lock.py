"""Two runs cannot write into one folder. The kernel gives the lock back when its holder dies, however it dies."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from rlhf.errors import ConfigError

LOCK_FILE = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class Lock:
    """An exclusive hold on a run directory, by this process."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self._file: IO[str] | None = None

    def take(self) -> bool:
        """Hold it until `release`. Returns: False if this file system knows no locks.

        Raises: ConfigError naming the holder.
        """
        while self._file is None:
            file = self.path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                holder = file.read()
                file.close()
                if error.errno in NO_LOCKS:
                    return False
                raise _held(self.path.parent, holder) from None
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                self._file = file
            else:  # its holder removed it between our opening and our locking
                file.close()
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}) + "\n")
        self._file.flush()
        return True

    def release(self) -> None:
        """Give it back."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def refuse_if_held(folder: Path) -> None:
    """Look whether a live process writes into a folder; changes nothing.

    Raises: ConfigError naming it.
    """
    path = folder / LOCK_FILE
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise _held(folder, file.read()) from None


def _held(folder: Path, holder: str) -> ConfigError:
    try:
        who = json.loads(holder)
        found = f"process {who['pid']} on {who['host']}, since {who['since']}"
    except (ValueError, KeyError, TypeError):
        found = "a process that has not yet said its name"
    return ConfigError(
        "another process is writing into the output folder",
        found=found,
        where=f"output_dir {folder}",
        do="wait for it to end, or choose another output_dir",
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
