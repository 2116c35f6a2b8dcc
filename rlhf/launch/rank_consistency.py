"""Check before anything is loaded that all processes have the same configuration, input files and run directory.

Machines may have separate disks. If one process started a new run while another resumed, they would wait for each other
for ever, or train different models.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from pydantic import BaseModel

from rlhf.checkpointing.files import MANIFEST, file_sha256
from rlhf.config.env_vars import RENDEZVOUS_SECONDS, timeout_seconds
from rlhf.distributed.launch_env import get_rank
from rlhf.errors import CheckpointError, ConfigError, RLHFError, TrainingError
from rlhf.runs.run_dir import RunDir, config_to_dict

RUN_KEY = "run"
CHECKPOINT_KEY = "checkpoint"
MISSING = "nothing"
SHARED_DISK_ADVICE = (
    "put output_dir on a disk that all machines share, or copy that folder from the machine of rank 0 to the same "
    "place on the others (and delete what they have there)"
)
MAX_DIFFERENCES_SHOWN = 3  # in one error message
FINAL_WAIT = timedelta(seconds=10)  # rank 0 lets the others read the values for this long before its store ends
_exchange_number = itertools.count()


def check_same_run(
    run: RunDir, state: str, config: BaseModel, inputs: Mapping[str, str], local_error: RLHFError | None
) -> None:
    """Check before a stage that every process has the same configuration, input files and run directory.

    Args:
        run: the run directory.
        state: 'new', 'interrupted' or 'finished', as `RunDir.check` returns it.
        config: the resolved configuration.
        inputs: path -> fingerprint of everything the stage reads.
        local_error: an error of this process; it is sent to the others so that they do not wait for this process.
    Raises: `local_error`; ConfigError, CheckpointError or TrainingError if the processes differ.
    """
    values = {f"{key} of the configuration": value for key, value in _flatten("", config_to_dict(config))}
    values |= {f"input {path}": mark for path, mark in inputs.items()}
    values[RUN_KEY] = f"{state} {run.info.get('id', '')[:8]}".strip()
    if state == "interrupted":
        values |= {
            f"{CHECKPOINT_KEY} {p.parent.name}": file_sha256(p)[:8] for p in run.checkpoints.glob(f"*/{MANIFEST}")
        }
    check_same_on_all_ranks(values, where=f"output_dir {run.path}", local_error=local_error)


def check_same_checkpoint(name: str | None, run: RunDir) -> None:
    """Check that every process resumes from the same checkpoint: on one machine its copy may be damaged.

    Args:
        name: name of the checkpoint that this process has chosen; None = it starts from the beginning.
        run: the run directory.
    Raises: CheckpointError or TrainingError.
    """
    check_same_on_all_ranks({CHECKPOINT_KEY: name or "none"}, where=f"output_dir {run.path}")


def check_same_on_all_ranks(values: Mapping[str, str], *, where: str, local_error: RLHFError | None = None) -> None:
    """Compare the values of this process with those of all others; a single process only raises `local_error`.

    Args:
        values: name -> value of everything that must be equal on all ranks.
        where: place that error messages name.
        local_error: an error of this process.
    Raises: `local_error`; ConfigError, CheckpointError or TrainingError, the same on every process.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    store = _launcher_store() if world_size > 1 else None
    if store is not None:
        compare_through_store(store, get_rank(), world_size, values, where=where, local_error=local_error)
    if local_error is not None:
        raise local_error


def _launcher_store() -> Any:
    """Return the launcher's key-value store, which exists before any process group; None if the launcher has none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import PrefixStore, rendezvous

    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=max(timeout_seconds(), RENDEZVOUS_SECONDS))))
    return PrefixStore(f"rlhf/{next(_exchange_number)}", store)


def compare_through_store(
    store: Any,
    rank: int,
    world_size: int,
    values: Mapping[str, str],
    *,
    where: str,
    local_error: RLHFError | None = None,
) -> None:
    """Compare the values of all processes through a key-value store that they share.

    Args:
        store: a store of `torch.distributed`.
        rank: rank of this process.
        world_size: number of processes.
        values, where, local_error: as in `check_same_on_all_ranks`.
    Raises: as `check_same_on_all_ranks`.
    """
    error_text = f"{type(local_error).__name__}: {local_error}" if local_error is not None else ""
    store.set(f"{rank}", json.dumps({"host": socket.gethostname(), "error": error_text, "values": dict(values)}))
    reports = []
    for other in range(world_size):
        try:
            reports.append(json.loads(store.get(f"{other}")))
        except RuntimeError as error:  # a subclass that depends on whether the value or the store is missing
            raise TrainingError(
                f"rank {other} did not join in time",
                found=str(error).split("\n")[0][:200],
                where=where,
                do="see its log; the same command has to be started on every machine",
            ) from None
    common_error = _find_difference(reports, where)
    if common_error is None:
        return
    store.set(f"{rank}/read", "")
    if rank == 0:  # its launcher usually hosts the store
        with suppress(RuntimeError):
            store.wait([f"{other}/read" for other in range(world_size)], FINAL_WAIT)
    raise local_error or common_error


def _find_difference(reports: list[Any], where: str) -> RLHFError | None:
    """Return an error about a process that cannot start or about different values; None if all values are equal."""
    stopped = [i for i, report in enumerate(reports) if report["error"]]
    if stopped:
        i = stopped[0]
        return TrainingError(
            f"rank {i} on {reports[i]['host']} cannot start",
            found=reports[i]["error"],
            where=where,
            do="correct this on that machine, then start the same command again on every machine",
        )
    first, first_host, differences = reports[0]["values"], reports[0]["host"], {}
    for i, report in enumerate(reports):
        for key in sorted(first.keys() | report["values"].keys(), key=lambda key: (key != RUN_KEY, key)):
            expected, actual = (values.get(key, MISSING) for values in (first, report["values"]))
            if expected != actual and key not in differences:
                differences[key] = (
                    f"{key}: {expected} on rank 0 ({first_host}), {actual} on rank {i} ({report['host']})"
                )
    if not differences:
        return None
    in_run_dir = {key for key in differences if key.split(" ")[0] in (RUN_KEY, CHECKPOINT_KEY)}
    shown = list(differences.values())
    found = "; ".join(shown[:MAX_DIFFERENCES_SHOWN]) + (
        f"; and {len(shown) - MAX_DIFFERENCES_SHOWN} more" if len(shown) > MAX_DIFFERENCES_SHOWN else ""
    )
    if in_run_dir == differences.keys():
        return CheckpointError("the processes do not see the same run", found=found, where=where, do=SHARED_DISK_ADVICE)
    return ConfigError(
        "the processes were started with different configurations or input files",
        found=found,
        where=where,
        do="start the same command, with the same files, on every machine",
    )


def _flatten(prefix: str, value: Any) -> list[tuple[str, str]]:
    """Return (dotted key, text) of every value of a configuration; long values are replaced by a hash."""
    if isinstance(value, dict) and value:
        return [pair for key, inner in value.items() for pair in _flatten(f"{prefix}.{key}".lstrip("."), inner)]
    return [(prefix, hashlib.sha256(repr(value).encode()).hexdigest()[:8] if len(repr(value)) > 60 else repr(value))]
