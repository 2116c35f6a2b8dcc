"""Kill -9, again and again: a pipeline is started, killed at a random moment, started again.

    python -m tests.faults.kills FOLDER --kills 100 --seed 1                                       # a tiny one
    python -m tests.faults.kills FOLDER --kills 100 --seed 1 --pipeline configs/demo/pipeline.yaml

Every other kill comes after a random time within a stage; the others come at the n-th call that changes the disk (sync,
rename, removal) of an attempt, where the windows are that time alone would rarely hit. At the end the pipeline runs
through, and everything it has made is compared with what an uninterrupted one has made. Processes are forked from this
one, which has imported everything, so that an attempt costs no more than its work.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import save_tiny_model
from tests.faults.setup import differences
from tests.stages import setup
from tests.stages.setup import info

STAGES = ("sft", "reward", "ppo", "evaluate")
HEAVY = (
    "rlhf.cli.main",
    "rlhf.stages.pipeline",
    "rlhf.stages.sft",
    "rlhf.stages.reward",
    "rlhf.stages.ppo",
    "trl",
    "rlhf.stages.evaluate",
    "rlhf.trainers.supervised.sft",
    "rlhf.trainers.supervised.reward",
    "datasets",
    "transformers.models.llama",
)
LIMIT = 3600.0  # seconds; of an attempt that is not killed by time
LONGEST = 20.0  # seconds from the start, or from the beginning of a stage, to a kill by time
CALLS = ((os, "fsync"), (os, "replace"), (os, "mkdir"), (shutil, "rmtree"))


def folder_of(top: Path, stage: str) -> Path:
    """A stage's run directory in a pipeline."""
    return next((p for p in top.glob(f"*-{stage}") if p.is_dir()), top / "nothing")


def prepare(place: Path) -> Path:
    """Data, a source model and configurations of a pipeline that saves often. Returns: its file."""
    files = setup.write_data(place / "data")
    made = setup.configs(place / "unused", str(save_tiny_model(place / "tiny")), files)
    made["ppo"] |= {"checkpoint_every": 1, "sample_every": 1}
    made["sft"] |= {"saving": {"share": 0.9}}
    for stage in STAGES:
        setup.write(place, stage, made[stage])
    links = {stage: {"config": f"{stage}.yaml"} for stage in STAGES}
    return Path(setup.write(place, "pipeline", {"output_dir": "unused", "seed": 3, **links}))


def command(pipeline: Path, top: Path) -> list[str]:
    """The pipeline with another output folder."""
    return ["run", str(pipeline), f"output_dir={top}", "--quiet"]


def fork(argv: list[str], log: Path, before: Callable[[], None] = lambda: None) -> int:
    """Run a command in a process of its own. Returns: its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        before()
        from rlhf.cli.main import main

        sys.argv = ["rlhf", *argv]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, until: float) -> int | None:
    """Exit status of a process (negative: the signal that ended it), or None if it lives at a time."""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def die_at_call(number: int) -> None:
    """Have this process kill itself at the n-th call that changes the disk."""
    left = [number]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for module, name in CALLS:
        setattr(module, name, counted(getattr(module, name)))


def attempt(argv: list[str], top: Path, log: Path, rng: random.Random, target: str, spans: dict[str, float]) -> str:
    """One attempt that is killed, if it has not ended before. Returns: where it was, or 'ended'.

    Args:
        target: a stage; a kill by time comes at a random moment from its beginning on.
        spans: seconds that each stage takes.
    """
    if rng.random() < 0.5:
        pid = fork(argv, log, lambda: die_at_call(rng.randint(1, 60)))
        code = wait(pid, time.monotonic() + LIMIT)
    else:
        pid = fork(argv, log)
        code, deadline = None, time.monotonic() + LIMIT
        while code is None and not _begun(top, target) and time.monotonic() < deadline:
            code = wait(pid, time.monotonic() + 0.005)
        if code is None:
            code = wait(pid, time.monotonic() + rng.uniform(0.0, min(spans[target], LONGEST)))
        if code is None:
            os.kill(pid, signal.SIGKILL)
            code = wait(pid, time.monotonic() + 60)
    if code == 0:
        return "ended"
    if code != -signal.SIGKILL:
        raise SystemExit(f"an attempt ended with {code}:\n{log.read_text(encoding='utf-8')[-3000:]}")
    return next((stage for stage in reversed(STAGES) if _begun(top, stage)), "before the first stage")


def _begun(top: Path, stage: str) -> bool:
    return (folder_of(top, stage) / "run.json").is_file()


def campaign(place: Path, kills: int, seed: int, pipeline: Path | None = None) -> dict[str, Any]:
    """All of it: of a tiny pipeline, in rounds of a dozen kills, or of a given one, in one. Returns: what happened."""
    for name in HEAVY:
        importlib.import_module(name)
    a_round = 12 if pipeline is None else kills
    pipeline, log = pipeline or prepare(place), place / "log.txt"
    plain = place / "plain"
    assert wait(fork(command(pipeline, plain), log), time.monotonic() + LIMIT) == 0, log.read_text(encoding="utf-8")
    spans = {stage: float(info(folder_of(plain, stage))["timings_s"]["total"]) for stage in STAGES}
    rng, where, wrong, rounds = random.Random(seed), {}, [], 0
    done, begun = 0, time.monotonic()
    while done < kills:
        rounds += 1
        top = place / f"killed-{rounds}"
        argv, left = command(pipeline, top), min(kills - done, a_round)
        for number in range(left):
            target = STAGES[min(number * len(STAGES) // left, len(STAGES) - 1)]
            if (place_of := attempt(argv, top, log, rng, target, spans)) == "ended":
                break
            done += 1
            where[place_of] = where.get(place_of, 0) + 1
        if (code := wait(fork(argv, log), time.monotonic() + LIMIT)) != 0:
            wrong.append(f"round {rounds}: exit code {code}: {log.read_text(encoding='utf-8')[-2000:]}")
        else:
            wrong += [
                f"round {rounds}, {stage}: {problem}"
                for stage in STAGES
                for problem in differences(folder_of(top, stage), folder_of(plain, stage))
            ]
        if not wrong:
            shutil.rmtree(top)
    seconds = round(time.monotonic() - begun, 1)
    return {"kills": done, "rounds": rounds, "where": where, "seconds": seconds, "wrong": wrong}


def main() -> None:
    """Print the result as JSON; exit code 1 if anything differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pipeline", type=Path)
    chosen = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    result = campaign(chosen.folder, chosen.kills, chosen.seed, chosen.pipeline)
    print(json.dumps(result))
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
