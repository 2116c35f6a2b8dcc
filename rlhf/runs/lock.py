"""A lock that keeps two runs from writing to one folder. The kernel releases it when the process that holds it ends."""

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
UNSUPPORTED_ERRNOS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class Lock:
    """Exclusive lock of this process on a run directory."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self._file: IO[str] | None = None

    def take(self) -> bool:
        """Acquire the lock and hold it until `release`.

        Returns: False if the file system does not support locks.
        Raises: ConfigError naming the process that holds the lock.
        """
        while self._file is None:
            file = self.path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                holder = file.read()
                file.close()
                if error.errno in UNSUPPORTED_ERRNOS:
                    return False
                raise _locked_error(self.path.parent, holder) from None
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                self._file = file
            else:  # the previous holder removed the file after it was opened here and before it was locked
                file.close()
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": _timestamp()}) + "\n")
        self._file.flush()
        return True

    def release(self) -> None:
        """Release the lock and remove its file."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def refuse_if_held(folder: Path) -> None:
    """Check that no running process holds the lock of a folder. Nothing is changed.

    Raises: ConfigError naming the process that holds it.
    """
    path = folder / LOCK_FILE
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in UNSUPPORTED_ERRNOS:
                raise _locked_error(folder, file.read()) from None


def _locked_error(folder: Path, holder: str) -> ConfigError:
    try:
        process = json.loads(holder)
        found = f"process {process['pid']} on {process['host']}, since {process['since']}"
    except (ValueError, KeyError, TypeError):
        found = "a process that has not yet written its id"
    return ConfigError(
        "another process is writing into the output folder",
        found=found,
        where=f"output_dir {folder}",
        do="wait for it to end, or choose another output_dir",
    )


def _timestamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
