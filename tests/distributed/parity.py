"""Compare two processes of every engine with one process and the same batch: `python -m tests.distributed.parity`.

It prints the largest relative deviation of every number over all updates. The exit code is 1 if a deviation exceeds the
tolerance, if a sampled response differs, or if a broken run is accepted.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.conftest import save_tiny_model
from tests.distributed.cases import ENGINES, ONE, Case, cases, twins
from tests.distributed.launching import DEADLINE, clean, launched
from tests.distributed.parity_job import RESPONSES
from tests.stages import setup
from tests.tolerances import PROCESSES

JOB = "tests.distributed.parity_job"
TRAINED = ("loss", "grad_norm", "eval_loss")
PPO = ("policy_loss", "value_loss", "kl", "score", "grad_norm")
LAUNCHERS = {"zero3": Path(__file__).parent / "zero3"}  # the shipped file would not cut up weights as small as these
NEAR_0 = ("policy_loss", "kl")
"""A mean of whitened advantages, and a difference of log-probs: terms of size 1 and more that add up to nearly nothing.
Below 1 their deviation is absolute."""
Lines = Sequence[dict[str, float]]


class Parity:
    """All runs of the comparison, below one folder."""

    def __init__(self, top: Path, model: Path) -> None:
        """Plan the runs; `model` is the model that they start from."""
        self.top = top
        self.cases = cases(top, str(model), setup.write_data(top / "data"))
        self.twins = twins(self.cases)

    def of(self, engine: str) -> list[Case]:
        """Return the cases of an engine."""
        return [case for case in self.cases if engine in case.engines]

    def folder(self, engine: str, case: Case) -> Path:
        """Return the run directory of a case."""
        return self.top / engine / case.folder

    def start(self, engine: str) -> subprocess.Popen[str]:
        """Start all runs of an engine as one job; those of one process, and broken ones, use no launcher."""
        found = [*self.cases, *(broken for broken, _ in self.twins)] if engine == ONE else self.of(engine)
        jobs = []
        for case in found:
            config = case.config | {"output_dir": str(self.folder(engine, case))}
            jobs.append([case.stage, setup.write(self.top / "configs" / engine, case.folder.replace("/", "-"), config)])
        path = self.top / "configs" / f"{engine}.json"
        path.write_text(json.dumps(jobs), encoding="utf-8")
        if engine != ONE:
            return launched(LAUNCHERS.get(engine, engine), [str(path)], module=JOB)
        command = [sys.executable, "-m", JOB, str(path)]
        return subprocess.Popen(command, env=clean(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def run(self, engine: str) -> None:
        """Run an engine's job to its end.

        Raises: RuntimeError with its output if it fails.
        """
        process = self.start(engine)
        out, _ = process.communicate(timeout=DEADLINE)
        if process.returncode:
            raise RuntimeError(f"{engine}: exit code {process.returncode}\n{out[-5000:]}")

    def compare(self, engine: str, case: Case) -> dict[str, float]:
        """Return metric -> deviation of an engine's run from that of one process."""
        return compare(self.folder(engine, case), self.folder(ONE, case), case.stage)


def compare(ours: Path, theirs: Path, stage: str) -> dict[str, float]:
    """Return metric -> deviation of one run from another; infinite if one of them has more lines."""
    names = PPO if stage == "ppo" else TRAINED
    return {name: deviation(name, setup.metrics(ours), setup.metrics(theirs)) for name in names}


def deviation(name: str, ours: Lines, theirs: Lines) -> float:
    """Return the largest deviation over all lines that have the metric; infinite if the runs have other lines."""
    mine, other = ([(line["step"], line[name]) for line in lines if name in line] for lines in (ours, theirs))
    if not other or [step for step, _ in mine] != [step for step, _ in other]:
        return math.inf

    def relative(a: float, b: float) -> float:
        apart = abs(a - b) / max(abs(b), 1.0 if name in NEAR_0 else 1e-9)
        return apart if math.isfinite(apart) else math.inf  # NaN is never close

    return max(relative(a, b) for (_, a), (_, b) in zip(mine, other, strict=True))


def responses(run: Path) -> list[Any]:
    """Return the token ids of every response of every step of a PPO run."""
    return [json.loads(line) for line in (run / RESPONSES).read_text(encoding="utf-8").splitlines()]


def updates(run: Path, stage: str) -> int:
    """Return the number of optimizer updates that a comparison covers."""
    lines = setup.metrics(run)
    return int(sum(line["updates"] for line in lines)) if stage == "ppo" else sum("grad_norm" in line for line in lines)


def table(parity: Parity, engines: Sequence[str]) -> tuple[list[str], float]:
    """Return the lines of a Markdown table of deviations in units of 1e-7, and the largest deviation in it."""
    lines = ["| run | updates | x 1e-7 | " + " | ".join(engines) + " |", "|---|---:|---|" + "---:|" * len(engines)]
    worst = 0.0
    for case in parity.cases:
        cells = []
        for engine in engines:
            found = list(parity.compare(engine, case).values()) if engine in case.engines else []
            worst = max([worst, *found])
            cells.append(" / ".join(f"{apart * 1e7:.1f}" for apart in found))
        numbers = " / ".join(PPO if case.stage == "ppo" else TRAINED)
        made = updates(parity.folder(ONE, case), case.stage)
        lines.append(f"| {case.name} | {made} | {numbers} | " + " | ".join(cells) + " |")
    return lines, worst


def unlike(parity: Parity, engines: Sequence[str]) -> list[str]:
    """Return the PPO runs whose sampled responses differ in some token from those of one process."""
    return [
        f"{engine}: {case.name}"
        for engine in engines
        for case in parity.of(engine)
        if case.stage == "ppo" and responses(parity.folder(engine, case)) != responses(parity.folder(ONE, case))
    ]


def accepted(parity: Parity) -> list[str]:
    """Return the broken runs that the tolerance accepts."""
    pairs = [(broken, parity.folder(ONE, broken), parity.folder(ONE, right)) for broken, right in parity.twins]
    return [broken.name for broken, a, b in pairs if max(compare(a, b, broken.stage).values()) <= PROCESSES]


def main() -> int:
    """Run everything, print the table, and report what is wrong."""
    engines = sys.argv[1:] or ENGINES
    with tempfile.TemporaryDirectory() as folder:
        parity = Parity(Path(folder), save_tiny_model(Path(folder) / "model"))
        for engine in (ONE, *engines):
            parity.run(engine)
        lines, worst = table(parity, engines)
        wrong = [f"sampled other responses: {name}" for name in unlike(parity, engines)]
        wrong += [f"a broken run was accepted: {name}" for name in accepted(parity)]
    wrong += [f"beyond {PROCESSES:g}: {worst:.1e}"] if worst > PROCESSES else []
    print("\n".join([*lines, "", *(wrong or [f"all within {PROCESSES:g}; every sampled token is the same"])]))
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
