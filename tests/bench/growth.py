"""How the cost of a PPO step grows with its rollout: 1, 2, 4, 8 and 16 times as many episodes.

    python -m tests.bench.growth

The demo's model and prompts, a reward model with a random head; 1 epoch of 4 minibatches. Rows decoded side by side and
rows per backward stay the same, so that a cost per real token that rises, or memory that does, is ours and not the
kernels'. Each size has a fresh process. Medians of a few steps after one to warm up; run it on an idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace

from tests.bench.work import Work, machine, of_steps, run

FACTORS = (1, 2, 4, 8, 16)
PHASES = ("sample", "score", "update")
SMALLEST = Work("growth", response=48, episodes=48, epochs=1, microbatch=12, decoded=48)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="timed PPO steps of each size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--episodes", type=int, default=SMALLEST.episodes, help="of the smallest, a multiple of 4")
    parser.add_argument("--largest", type=int, default=FACTORS[-1], choices=FACTORS, help="factor")
    options = parser.parse_args()
    work = replace(
        SMALLEST,
        episodes=options.episodes,
        prompts=options.episodes * options.largest,
        steps=options.steps,
        threads=options.threads,
        precision=options.precision,
    )
    print(f"{machine(options.threads)}; {work.precision}, backward of {work.microbatch} rows, {work.decoded} decoded")
    print(
        f"{'episodes':>8s}",
        *(f"| {phase:>8s} {'tokens':>7s} {'x':>5s}" for phase in PHASES),
        f"| {'peak':>6s} {'imports':>7s} MiB",
    )
    with tempfile.TemporaryDirectory() as where:
        work = replace(work, folder=where)
        run("build", work)
        first: dict[str, float] = {}
        for factor in (f for f in FACTORS if f <= options.largest):
            show(replace(work, episodes=work.episodes * factor), first)
    print(
        "tokens: real ones, of responses for sampling, of prompts too for the rest; x: seconds per token, smallest = 1"
    )


def show(work: Work, first: dict[str, float]) -> None:
    """Measure one size and print its line.

    Args:
        first: seconds per real token of the smallest by phase; filled by it.
    """
    result = run("ours", work)
    cells = []
    for phase in PHASES:
        tokens = "tokens" if phase == "sample" else "everything"
        # Within a step, because responses differ in length from one to the next.
        rate = statistics.median(step[phase] / step[tokens] for step in result["steps"])
        ratio = rate / first.setdefault(phase, rate)
        cells.append(f"| {of_steps(result, phase):6.3f} s {of_steps(result, tokens):7.0f} {ratio:5.2f}")
    print(f"{work.episodes:8d}", *cells, f"| {result['peak']:6.0f} {result['imports']:7.0f}", flush=True)


if __name__ == "__main__":
    main()
