"""Processor time of `import rlhf`, of help and of a configuration error: the bar is half a second each.

    python -m tests.bench.startup

Processor time (user and system) is less noisy than the clock. The interpreter alone is the first row.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

ROUNDS = 7
COMMANDS: list[tuple[list[str], int]] = [
    (["-c", "import rlhf"], 0),
    (["-m", "rlhf", "--help"], 0),
    (["-m", "rlhf", "ppo", "--help"], 0),
    (["-m", "rlhf", "sft", "sft.yaml", "optim.epoch=1"], 2),
]
"""Arguments of the interpreter, and the exit code they end with where `sft.yaml` is a valid configuration."""


def processor_seconds(arguments: list[str]) -> float:
    """Return the processor time of one Python process."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Print the median of each command."""
    print(f"{'command':<48} {'seconds':>8}   (median of {ROUNDS})")
    for arguments in (["-c", "pass"], *(arguments for arguments, _ in COMMANDS)):
        given = ["configs/demo/sft.yaml" if a == "sft.yaml" else a for a in arguments]
        seconds = statistics.median(processor_seconds(given) for _ in range(ROUNDS))
        print(f"{'python ' + ' '.join(given):<48} {seconds:>8.3f}")


if __name__ == "__main__":
    main()
