"""Our PPO beside that of TRL 1.12.0, the last release that has one: time and memory of the same work.

    python -m tests.bench.against_trl [CASE ...] [--rounds 3] [--steps 2] [--threads 2] [--precision float32]

    fixed   policy, reference, value and reward model, all weights trained; every response has the same length
    free    the demo's model: responses end by themselves
    words   as fixed, with 32 768 tokens in the vocabulary: the output layer is half of the model
    lora    a LoRA policy; value and reward models are whole models in TRL, adapters on the policy's base in ours
    trunk   as lora; our value model is a head on the policy's trunk

Both sides read the same model folders and token ids and take turns in fresh processes. Nothing is asserted about times;
a comparison in which one side makes fewer optimizer steps than the other is refused. TRL goes to a folder of its own,
build/trl-1.12.0 (git ignores build/), and runs on the installed torch and transformers. It is measured at its best:
without gradient accumulation, which undoes its minibatches; stopping at the token that ends our responses; with its
default optimizer, the fused AdamW. Ours runs with its defaults: self-checks and deterministic kernels on. Run it on an
idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.bench.work import ROOT, Result, Work, machine, of_steps, run

SIDES = ("trl", "ours")
CASES = {
    "fixed": Work("fixed", hidden=384),
    "words": Work("words", hidden=384, vocabulary=32768),
    "free": Work("free", response=48, episodes=128, decoded=64),
    "lora": Work("lora", hidden=512, heads=8, intermediate=1376, lora=16),
    "trunk": Work("trunk", hidden=512, heads=8, intermediate=1376, lora=16, trunk=True),
}
TINY = {"hidden": 64, "layers": 2, "heads": 2, "intermediate": 128, "vocabulary": 512, "response": 8}
Rounds = list[dict[str, Result]]


def main() -> None:
    """Print a table for every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)} (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--steps", type=int, default=2, help="timed PPO steps of each process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "trl-1.12.0", help="where TRL is, or goes")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that both sides run")
    options = parser.parse_args()
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"no case '{unknown[0]}'; there are {', '.join(CASES)}")
    folder = options.folder.resolve()
    install(folder)
    print(machine(options.threads), flush=True)
    for name in options.cases or CASES:
        work = replace(CASES[name], steps=options.steps, threads=options.threads, precision=options.precision)
        if options.tiny:
            work = replace(work, **({"episodes": 16} if work.demo else TINY | {"episodes": 8}), minibatches=2)
        with tempfile.TemporaryDirectory() as where:
            work = replace(work, folder=where)
            built = run("build", work)
            rounds = [
                {side: run(side, work, first_on_path=_path(side, folder)) for side in SIDES}
                for _ in range(options.rounds)
            ]
        show(work, built, rounds)


def install(folder: Path) -> None:
    """TRL 1.12.0 alone, without what it depends on."""
    if not (folder / "trl-1.12.0.dist-info").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "--no-deps", "trl==1.12.0"]
        subprocess.run(pip, check=True)


def _path(side: str, folder: Path) -> str:
    return str(folder) if side == "trl" else ""


def show(work: Work, built: Result, rounds: Rounds) -> None:
    """The table of a case.

    Raises: RuntimeError if the sides did not make equally many optimizer steps.
    """
    updates = {step["updates"] for both in rounds for result in both.values() for step in result["steps"]}
    if updates != {work.epochs * work.minibatches}:
        raise RuntimeError(f"{work.name}: optimizer steps per PPO step are {sorted(updates)}, not equal and as asked")
    ours = rounds[0]["ours"]
    trained = f"LoRA of rank {work.lora}, roles {ours['roles']}" if work.lora else "all weights"
    print(
        f"\n{work.name}: {built['parameters'] / 1e6:.1f} M parameters, {trained}, {work.precision}; "
        f"{work.episodes} episodes, prompts of {built['prompt_tokens']:.0f} tokens in the mean, responses of up to "
        f"{work.response}; {work.epochs} epochs x {work.minibatches} minibatches; {len(rounds)} x "
        f"{work.steps} steps timed"
    )
    versions = {side: rounds[0][side]["versions"] for side in SIDES}
    names = f"torch {versions['trl']['torch']}, transformers {versions['trl']['transformers']}"
    print(f"{names:42s}{'trl ' + versions['trl']['trl']:>12s}{'ours':>12s}   ratio")
    _row("wall seconds per step", rounds, lambda r: of_steps(r, "wall"), "trl / ours")
    _row("  per 1000 response tokens", rounds, _per_thousand, "trl / ours")
    _row("processor seconds per step", rounds, lambda r: of_steps(r, "cpu"), "trl / ours")
    _row("peak memory, MiB", rounds, lambda r: r["peak"], "ours / trl")
    _row("  above that after the imports", rounds, lambda r: r["peak"] - r["imports"], "ours / trl")
    _row("optimizer steps per step", rounds, lambda r: of_steps(r, "updates"))
    _row("response tokens per step", rounds, lambda r: of_steps(r, "tokens"))
    _row("  per response", rounds, lambda r: of_steps(r, "tokens") / work.episodes)
    _row("  decoded for the longest", rounds, lambda r: of_steps(r, "longest"))


def _per_thousand(result: Result) -> float:
    return 1000 * of_steps(result, "wall") / of_steps(result, "tokens")


def _row(name: str, rounds: Rounds, value: Callable[[Result], float], ratio: str = "") -> None:
    """Medians of both sides over the rounds; of their ratio within a round, the median and the range."""
    theirs, ours = ([value(both[side]) for both in rounds] for side in SIDES)
    cells = "".join(f"{_number(statistics.median(values)):>12s}" for values in (theirs, ours))
    if ratio:
        found = sorted(t / o if ratio == "trl / ours" else o / t for t, o in zip(theirs, ours, strict=True))
        cells += f"   {ratio} {statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"
    print(f"{name:42s}{cells}", flush=True)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.2f}"


if __name__ == "__main__":
    main()
