"""The run directory of a stage: its files, and the functions that write them.

- config.yaml: resolved configuration; run.json: status, versions, seeds, fingerprints, timings
- metrics.jsonl: one object per logged step; samples.jsonl: prompts and responses sampled during training
- model/: plain save_pretrained folder, with handover.json
- checkpoints/: checkpoints from which an interrupted run resumes
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from rlhf.config.memory_settings import memory_changes, only_memory_differs
from rlhf.config.renamed_keys import rename_old_keys
from rlhf.errors import CheckpointError, ConfigError
from rlhf.runs.lock import LOCK_FILE, Lock, refuse_if_held
from rlhf.runs.memory_phase import phase
from rlhf.runs.preemption import RunStopped
from rlhf.version import __version__

RUN_FILE, CONFIG_FILE = "run.json", "config.yaml"
FILES_AT_START = {LOCK_FILE, f"{RUN_FILE}.tmp", f"{CONFIG_FILE}.new", f"{CONFIG_FILE}.new.tmp"}
"""Files that a run may leave if it dies before run.json exists; a folder with no others counts as new."""


def fsync_path(path: Path) -> None:
    """Flush a file, or the directory entries of a folder, to disk with fsync."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader finds the old or the new content, never a part, even after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    fsync_path(temporary)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically (`write_text`)."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises: CheckpointError if it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError("no such file", where=str(path)) from None
    except ValueError as error:
        raise CheckpointError("damaged JSON", found=str(error), where=str(path)) from None


def peak_memory_gib() -> float:
    """Return the peak resident memory of this process in GiB; on Linux, since the peak was last reset."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024**2
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


class RunDir:
    """Output folder of one stage. Only the main process writes to it; call `start` before anything expensive."""

    _unfinished: RunDir | None = None

    def __init__(self, path: str | Path, *, main: bool = True) -> None:
        self.path = Path(path)
        self.main = main
        self.info: dict[str, Any] = {}
        self.lock = Lock(self.path)

    @classmethod
    def unfinished(cls) -> RunDir | None:
        """Return the run that this process started last, or None if that run has finished."""
        return cls._unfinished

    @property
    def model(self) -> Path:
        """Folder of the finished model."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints from which an interrupted run resumes."""
        return self.path / "checkpoints"

    def check(self, stage: str, config: BaseModel, inputs: Mapping[str, str]) -> str:
        """Return the state of the folder: 'new', 'interrupted' or 'finished'.

        The last two mean a run of the same stage with the same configuration and inputs; an interrupted one can resume.
        Settings that only change how much memory a run needs may differ (`MEMORY_SETTINGS`).

        Args:
            stage: name of the stage.
            config: its resolved configuration.
            inputs: path -> fingerprint of everything the stage reads.
        Raises: ConfigError if the folder contains another run, a run on other inputs, or other files, if it cannot be
            written to, or if another process is writing to it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(
                "the output folder is a file", where=f"output_dir {self.path}", do="choose another output_dir"
            )
        if not self.path.exists() or {p.name for p in self.path.iterdir()} <= FILES_AT_START:
            self._check_writable()
            return "new"
        if not (self.path / RUN_FILE).is_file():
            raise ConfigError(
                "the output folder contains files that do not belong to a run",
                where=f"output_dir {self.path}",
                found=", ".join(sorted(p.name for p in self.path.iterdir())[:5]),
                do="choose another output_dir",
            )
        info = read_json(self.path / RUN_FILE)
        saved = self._saved_values(type(config))
        if info.get("stage") != stage or saved is None or not only_memory_differs(saved, config_to_dict(config)):
            raise ConfigError(
                "the output folder already holds another run",
                found=f"{info.get('stage')}, {info.get('status')}",
                where=f"output_dir {self.path}",
                do="choose another output_dir, or delete that folder",
            )
        saved_inputs = info.get("inputs", {})
        changed = sorted(
            path for path, fingerprint in inputs.items() if saved_inputs.get(path, fingerprint) != fingerprint
        )
        if changed:
            raise ConfigError(
                "the output folder holds a run on inputs that have changed since",
                found=", ".join(changed),
                where=f"output_dir {self.path}",
                do="choose another output_dir, or delete that folder",
            )
        self.info = info
        if info.get("status") == "finished":
            return "finished"
        self._check_writable()
        return "interrupted"

    def _saved_values(self, schema: type[BaseModel]) -> dict[str, Any] | None:
        """Return the saved configuration: of config.yaml, or of config.yaml.new if that is missing; None without both.

        `start` renames it only after run.json is written, so that a kill never leaves config.yaml without run.json.
        """
        saved = self.path / CONFIG_FILE
        saved = saved if saved.is_file() else saved.with_name(f"{CONFIG_FILE}.new")
        values = yaml.safe_load(saved.read_text(encoding="utf-8")) if saved.is_file() else None
        return rename_old_keys(schema, values).values if isinstance(values, dict) else None

    def _check_writable(self) -> None:
        """Check that the folder can be written to and is not locked. Raises: ConfigError if not."""
        if not self.main:
            return
        refuse_if_held(self.path)
        existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigError(
                "the output folder cannot be written to",
                found=f"{existing} is read-only for this process",
                where=f"output_dir {self.path}",
                do="change its permissions, or choose another output_dir",
            )

    def start(
        self,
        stage: str,
        config: BaseModel,
        *,
        seed: int,
        processes: int,
        versions: dict[str, str],
        inputs: Mapping[str, str],
    ) -> None:
        """Create the folder (or reuse that of an interrupted run), lock it, and write run.json and config.yaml.

        Settings that only concern memory and have changed since the attempt before are listed in run.json.
        Raises: ConfigError if another process writes to the folder, or has done so since `check`.
        """
        if not self.main:
            RunDir._unfinished = self
            return
        self.path.mkdir(parents=True, exist_ok=True)
        locked = self.lock.take()
        saved_id = read_json(self.path / RUN_FILE).get("id") if (self.path / RUN_FILE).is_file() else None
        if saved_id != self.info.get("id"):
            raise ConfigError(
                "another process has started to write into the output folder",
                where=f"output_dir {self.path}",
                do="run the command again; it then checks the folder again",
            )
        new = self.path / f"{CONFIG_FILE}.new"
        saved = self._saved_values(type(config)) if (self.path / CONFIG_FILE).is_file() else None
        changes = memory_changes(saved, config_to_dict(config)) if saved is not None else {}
        if saved is None or changes:
            write_text(new, yaml.safe_dump(config_to_dict(config), sort_keys=False))
        attempts = int(self.info.get("attempts", 0)) + 1
        changed = [*self.info.get("changed", []), *([{"attempt": attempts, **changes}] if changes else [])]
        self.info = {
            "id": uuid.uuid4().hex,
            "stage": stage,
            "status": "running",
            "rlhf": __version__,
            "versions": versions,
            "commit": _commit(),
            "python": platform.python_version(),
            "seed": seed,
            "processes": processes,
            "attempts": attempts,
            **({"changed": changed} if changed else {}),
            "started": _timestamp(),
            "inputs": dict(inputs),
            "data": {},
            "timings_s": {},
            "locked": locked,
        }
        self.save()
        if new.is_file():
            os.replace(new, self.path / CONFIG_FILE)
        RunDir._unfinished = self

    def note(self, **values: Any) -> None:
        """Add values to run.json; a dict is merged into a dict that exists under the same key."""
        for key, value in values.items():
            if isinstance(value, dict) and isinstance(self.info.get(key), dict):
                self.info[key].update(value)
            else:
                self.info[key] = value
        self.save()

    def save(self) -> None:
        """Write run.json, on the main process and only after the run has started."""
        if self.main and self.path.is_dir() and self.info:
            write_json(self.path / RUN_FILE, self.info)

    def finish(self) -> None:
        """Mark the run as finished and release the lock."""
        self.note(status="finished", ended=_timestamp(), peak_memory_gib=round(peak_memory_gib(), 2))
        self.lock.release()
        RunDir._unfinished = None

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Record in run.json how the stage inside the context ended; after an exception also release the lock.

        The exception is raised again. Without one the status does not change, and the lock is kept until `finish`.
        """
        started_at = time.monotonic()
        outcome: dict[str, Any] = {}
        try:
            yield
        except (KeyboardInterrupt, RunStopped):
            outcome = {"status": "interrupted", "ended": _timestamp()}
            raise
        except BaseException as error:
            outcome = {"status": "failed", "ended": _timestamp(), "error": f"{type(error).__name__}: {error}"[:2000]}
            raise
        finally:
            with suppress(OSError):  # a full disk must not hide the original exception
                self.note(**outcome, timings_s={"total": round(time.monotonic() - started_at, 2)})
            if outcome:
                self.lock.release()

    @contextmanager
    def new_model(self) -> Iterator[Path]:
        """Yield a temporary folder for the model; it is renamed to `model/` when the context ends without an error."""
        temporary = self.path / "model.tmp"
        if self.main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        with phase("saving"):
            yield temporary
        if self.main:
            for path in temporary.rglob("*"):
                fsync_path(path)
            shutil.rmtree(self.model, ignore_errors=True)
            os.replace(temporary, self.model)


def fingerprint_path(path: Path) -> str:
    """Return a text that changes when a file or model folder does.

    For a file it is a hash of the content; for a folder it is the id of the run that made the model, or, if there is no
    run.json, a hash of the files' names and sizes.
    """
    if path.is_file():
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()[:16]
    for folder in (path, path.parent):
        if (folder / RUN_FILE).is_file():
            return str(read_json(folder / RUN_FILE).get("id"))
    sizes = sorted((str(p.relative_to(path)), p.stat().st_size) for p in path.rglob("*") if p.is_file())
    return hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]


def config_to_dict(config: BaseModel) -> dict[str, Any]:
    """Return the configuration as values that YAML can represent."""
    return config.model_dump(mode="json")


def _timestamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _commit() -> str | None:
    try:
        out = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None
