"""Whether all processes see the same, asked before anything is loaded. Machines may have disks of their own: a process
that begins anew beside one that goes on would wait for it for ever, or train apart."""

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
MAX_DIFFERENCES_SHOWN = 3  # differences in a message
FINAL_WAIT = timedelta(seconds=10)  # for the others to have read what is wrong, before the machine of the store ends
_question = itertools.count()


def check_same_run(
    run: RunDir, state: str, config: BaseModel, inputs: Mapping[str, str], trouble: RLHFError | None
) -> None:
    """Before a stage: every process has the same configuration, the same input files and the same run directory.

    Args:
        trouble: what is wrong here; the others then need not wait for this process.
    Raises: `trouble`; ConfigError, CheckpointError or TrainingError if the processes do not agree.
    """
    seen = {f"{key} of the configuration": value for key, value in _flat("", config_to_dict(config))}
    seen |= {f"input {path}": mark for path, mark in inputs.items()}
    seen[RUN_KEY] = f"{state} {run.info.get('id', '')[:8]}".strip()
    if state == "interrupted":
        seen |= {f"{CHECKPOINT_KEY} {p.parent.name}": file_sha256(p)[:8] for p in run.checkpoints.glob(f"*/{MANIFEST}")}
    check_same_on_all_ranks(seen, where=f"output_dir {run.path}", trouble=trouble)


def check_same_checkpoint(name: str | None, run: RunDir) -> None:
    """Every process goes on from the same checkpoint: a copy of it may be damaged on one machine.

    Raises: CheckpointError or TrainingError.
    """
    check_same_on_all_ranks({CHECKPOINT_KEY: name or "none"}, where=f"output_dir {run.path}")


def check_same_on_all_ranks(seen: Mapping[str, str], *, where: str, trouble: RLHFError | None = None) -> None:
    """Compare what this process sees with what the others see. Does nothing in a single process.

    Raises: `trouble`; ConfigError, CheckpointError or TrainingError, the same on every process.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    store = _meeting_point() if world > 1 else None
    if store is not None:
        compare_through_store(store, get_rank(), world, seen, where=where, trouble=trouble)
    if trouble is not None:
        raise trouble


def _meeting_point() -> Any:
    """The launcher's store, which is there before any group of processes; None under a launcher that has none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import PrefixStore, rendezvous

    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=max(timeout_seconds(), RENDEZVOUS_SECONDS))))
    return PrefixStore(f"rlhf/{next(_question)}", store)


def compare_through_store(
    store: Any, rank: int, world: int, seen: Mapping[str, str], *, where: str, trouble: RLHFError | None = None
) -> None:
    """`same_everywhere`, with the store at which the processes meet.

    Raises: as `same_everywhere`.
    """
    trouble_here = f"{type(trouble).__name__}: {trouble}" if trouble is not None else ""
    store.set(f"{rank}", json.dumps({"host": socket.gethostname(), "trouble": trouble_here, "seen": dict(seen)}))
    views = []
    for other in range(world):
        try:
            views.append(json.loads(store.get(f"{other}")))
        except RuntimeError as error:  # of several kinds, by what is missing
            raise TrainingError(
                f"rank {other} did not join in time",
                found=str(error).split("\n")[0][:200],
                where=where,
                do="see its log; the same command has to be started on every machine",
            ) from None
    wrong = _difference(views, where)
    if wrong is None:
        return
    store.set(f"{rank}/read", "")
    if rank == 0:  # as a rule its launcher has the store
        with suppress(RuntimeError):
            store.wait([f"{other}/read" for other in range(world)], FINAL_WAIT)
    raise trouble or wrong


def _difference(views: list[Any], where: str) -> RLHFError | None:
    """What is wrong, in words."""
    stopped = [i for i, view in enumerate(views) if view["trouble"]]
    if stopped:
        i = stopped[0]
        return TrainingError(
            f"rank {i} on {views[i]['host']} cannot start",
            found=views[i]["trouble"],
            where=where,
            do="correct it there, and start the same command again on every machine",
        )
    first, differing = views[0]["seen"], {}
    for i, view in enumerate(views):
        for key in sorted(first.keys() | view["seen"].keys(), key=lambda key: (key != RUN_KEY, key)):
            ours, theirs = (seen.get(key, MISSING) for seen in (first, view["seen"]))
            if ours != theirs and key not in differing:
                differing[key] = f"{key}: {ours} on rank 0 ({views[0]['host']}), {theirs} on rank {i} ({view['host']})"
    if not differing:
        return None
    folder = {key: words for key, words in differing.items() if key.split(" ")[0] in (RUN_KEY, CHECKPOINT_KEY)}
    shown = list(differing.values())
    found = "; ".join(shown[:MAX_DIFFERENCES_SHOWN]) + (
        f"; and {len(shown) - MAX_DIFFERENCES_SHOWN} more" if len(shown) > MAX_DIFFERENCES_SHOWN else ""
    )
    if folder.keys() == differing.keys():
        return CheckpointError("the processes do not see the same run", found=found, where=where, do=SHARED_DISK_ADVICE)
    return ConfigError(
        "the processes were not started alike",
        found=found,
        where=where,
        do="start the same command, with the same files, on every machine",
    )


def _flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    """Every value of a configuration by its key, as text."""
    if isinstance(value, dict) and value:
        return [pair for key, inner in value.items() for pair in _flat(f"{prefix}.{key}".lstrip("."), inner)]
    return [(prefix, hashlib.sha256(repr(value).encode()).hexdigest()[:8] if len(repr(value)) > 60 else repr(value))]
