"""The run directory: what a stage leaves behind, and the only way it is written.

- config.yaml: resolved configuration; run.json: status, versions, seeds, fingerprints, timings
- metrics.jsonl: one object a log line; samples.jsonl: prompts and responses while training
- model/: plain save_pretrained folder, with handover.json
- checkpoints/: what an interrupted run continues from
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

from rlhf.config.renamed_keys import rename_old_keys
from rlhf.errors import CheckpointError, ConfigError
from rlhf.runs.lock import LOCK_FILE, Lock, refuse_if_held
from rlhf.runs.preemption import RunStopped
from rlhf.version import __version__

RUN_FILE, CONFIG_FILE = "run.json", "config.yaml"
FILES_AT_START = {LOCK_FILE, f"{RUN_FILE}.tmp", f"{CONFIG_FILE}.new", f"{CONFIG_FILE}.new.tmp"}
"""What a run that dies in its first moment leaves behind: it may begin again."""


def fsync_path(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a half, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    fsync_path(temporary)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
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
    """Most memory that this process has held so far, in GiB; on Linux since its mark was last set back."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024**2
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


class RunDir:
    """One stage's output folder. Only the main process writes; `start` runs before anything expensive."""

    _unfinished: RunDir | None = None

    def __init__(self, path: str | Path, *, main: bool = True) -> None:
        self.path = Path(path)
        self.main = main
        self.info: dict[str, Any] = {}
        self.lock = Lock(self.path)

    @classmethod
    def unfinished(cls) -> RunDir | None:
        """The run that this process has started last, if it has not finished."""
        return cls._unfinished

    @property
    def model(self) -> Path:
        """Where the finished model lies."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """Where an interrupted run continues from."""
        return self.path / "checkpoints"

    def check(self, stage: str, config: BaseModel, inputs: Mapping[str, str]) -> str:
        """'new', 'interrupted' (same configuration and inputs, may continue) or 'finished' (the same).

        Args:
            inputs: path -> fingerprint of everything the stage reads.
        Raises: ConfigError if the folder holds another run, a run on other inputs, or foreign files, if it cannot be
            written to, or if another process does so.
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
                "the output folder holds files that are no run",
                where=f"output_dir {self.path}",
                found=", ".join(sorted(p.name for p in self.path.iterdir())[:5]),
                do="choose another output_dir",
            )
        info = read_json(self.path / RUN_FILE)
        saved = self._saved_config()
        known = yaml.safe_load(saved.read_text(encoding="utf-8")) if saved.is_file() else None
        same = isinstance(known, dict) and rename_old_keys(type(config), known).values == config_to_dict(config)
        if info.get("stage") != stage or not same:
            raise ConfigError(
                "the output folder already holds another run",
                found=f"{info.get('stage')}, {info.get('status')}",
                where=f"output_dir {self.path}",
                do="choose another output_dir, or delete that folder",
            )
        changed = sorted(path for path, mark in inputs.items() if info.get("inputs", {}).get(path, mark) != mark)
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

    def _saved_config(self) -> Path:
        """config.yaml; it gets its name after run.json, so that no kill leaves it alone in the folder."""
        saved = self.path / CONFIG_FILE
        return saved if saved.is_file() else saved.with_name(f"{CONFIG_FILE}.new")

    def _check_writable(self) -> None:
        """Raises: ConfigError before anything expensive."""
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
        """Create the folder (or take over an interrupted one), lock it, and write run.json and config.yaml.

        Raises: ConfigError if another process writes into the folder, or has done so since it was checked.
        """
        if not self.main:
            RunDir._unfinished = self
            return
        self.path.mkdir(parents=True, exist_ok=True)
        locked = self.lock.take()
        known = read_json(self.path / RUN_FILE).get("id") if (self.path / RUN_FILE).is_file() else None
        if known != self.info.get("id"):
            raise ConfigError(
                "another process has begun to write into the output folder",
                where=f"output_dir {self.path}",
                do="start again: the folder is then looked at anew",
            )
        new = self.path / f"{CONFIG_FILE}.new"
        if not (self.path / CONFIG_FILE).is_file():
            write_text(new, yaml.safe_dump(config_to_dict(config), sort_keys=False))
        attempts = int(self.info.get("attempts", 0)) + 1
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
            "started": _now(),
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
        """Add facts to run.json."""
        for key, value in values.items():
            if isinstance(value, dict) and isinstance(self.info.get(key), dict):
                self.info[key].update(value)
            else:
                self.info[key] = value
        self.save()

    def save(self) -> None:
        """Write run.json (main process, once the run has started)."""
        if self.main and self.path.is_dir() and self.info:
            write_json(self.path / RUN_FILE, self.info)

    def finish(self) -> None:
        """Mark the run finished, and give the folder back."""
        self.note(status="finished", ended=_now(), peak_memory_gib=round(peak_memory_gib(), 2))
        self.lock.release()
        RunDir._unfinished = None

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Record how a stage ended; an exception passes through, and the folder is given back."""
        begun = time.monotonic()
        how: dict[str, Any] = {}
        try:
            yield
        except (KeyboardInterrupt, RunStopped):
            how = {"status": "interrupted", "ended": _now()}
            raise
        except BaseException as error:
            how = {"status": "failed", "ended": _now(), "error": f"{type(error).__name__}: {error}"[:2000]}
            raise
        finally:
            with suppress(OSError):  # on a full disk the error itself is what matters
                self.note(**how, timings_s={"total": round(time.monotonic() - begun, 2)})
            if how:
                self.lock.release()

    @contextmanager
    def new_model(self) -> Iterator[Path]:
        """A folder to save the model into; it becomes `model/` only when complete."""
        temporary = self.path / "model.tmp"
        if self.main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        yield temporary
        if self.main:
            for path in temporary.rglob("*"):
                fsync_path(path)
            shutil.rmtree(self.model, ignore_errors=True)
            os.replace(temporary, self.model)


def fingerprint_path(path: Path) -> str:
    """A mark that changes when a file or model folder does: content of a file, identity of the run behind a model."""
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
    """The configuration as YAML-able values."""
    return config.model_dump(mode="json")


def _now() -> str:
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
