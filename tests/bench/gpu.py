"""One PPO step of a 0.6B and an 8B shape on a GPU: time, share of the limit and peak memory of every phase.

    python -m tests.bench.gpu [--shape 0.6b|8b|tiny] [--minutes 9] [--out build/bench-gpu] [--trl build/trl-1.12.0]

The cases are in tests/bench/gpu_cases.py: our trainer with all weights and with LoRA adapters, and TRL's on the same
work, if a release that still has PPO (1.12) is installed in the folder --trl or in this environment. Models are made on
the device with random weights, so nothing is downloaded. `--shape tiny` runs anywhere in less than a minute, also on a
CPU; its figures mean nothing.

Each case has a process of its own. Cases run in the order of their importance; one that would not end in time is
listed as skipped, and one that runs out of memory is a row that says so. Of each case one step warms up and one is
timed. The results are written as table.md and results.json. The columns:

    tokens/s       of responses for sampling and the whole step, of prompts and responses otherwise
    limit / time   least time for the real tokens at the measured rates (rlhf.preflight.cost), divided by the time
    peak           torch.cuda.max_memory_allocated, reset before each phase; on a CPU that of the whole process
    check          what `rlhf check` predicts; it includes what a process needs beside its tensors
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tests.bench.gpu_cases import (
    PHASES,
    SHAPES,
    Case,
    Result,
    cases,
    expected_seconds,
    median,
    problem_of,
)
from tests.bench.work import ROOT

MARK = "RESULT "  # as in tests/bench/gpu_sides.py
LAST_WITH_PPO = (1, 12)  # release of TRL
RATES = ("flops", "flops_bfloat16", "bandwidth")
HEADER = ["case", "phase", "seconds", "tokens/s", "limit / time", "peak, GiB", "check, GiB"]
Run = Callable[[list[str], float, str], Result]


def main() -> None:
    """Measure, and write the results; exit code 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="one shape alone (default: 0.6b and 8b)")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default: 9)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench-gpu", help="folder of the results")
    parser.add_argument("--trl", type=Path, default=ROOT / "build" / "trl-1.12.0", help="folder with TRL 1.12")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    machine = run_side(["machine", *filter(None, [options.shape])], 60 * options.minutes, "")
    if machine["status"] == "failed":
        raise SystemExit(f"the machine cannot be measured: {machine['reason']}")
    if not machine["gpu"] and options.shape != "tiny":
        raise SystemExit("there is no GPU; --shape tiny runs on a CPU and shows that the cases work")
    rates = json.dumps({name: machine[name] for name in RATES})
    results = measure(cases(options.shape), deadline, options.trl.resolve(), rates, run_side)
    table = report(machine, results)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    content = {"machine": machine, "cases": [{"case": asdict(case), **result} for case, result in results]}
    (options.out / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table)
    sys.exit(any(result["status"] == "failed" for _, result in results))


def measure(
    every: Sequence[Case], deadline: float, trl: Path, rates: str, run: Run, clock: Callable[[], float] = time.monotonic
) -> list[tuple[Case, Result]]:
    """Run the cases one after the other, and skip those that would not end in time.

    Args:
        every: the cases, in the order in which they run.
        deadline: time of `clock` at which everything must have ended.
        trl: folder of a TRL with PPO.
        rates: measured rates of the machine, as JSON.
        run: runs a side, see `run_side`.
        clock: current time in seconds.
    """
    results: list[tuple[Case, Result]] = []
    for case in every:
        reason = trl_problem(trl) if case.side == "trl" else ""
        left = deadline - clock()
        if not reason and (needed := expected_seconds(case, results)) > left:
            reason = f"it would take about {needed:.0f} s or more, and {max(left, 0):.0f} s are left"
        if reason:
            result: Result = {"status": "skipped", "reason": reason}
        else:
            path = str(trl) if case.side == "trl" and trl.is_dir() else ""
            result = run(["case", json.dumps(asdict(case)), rates], left, path)
        print(f"{case.name}: {problem_of(result) or 'measured'}", flush=True)
        results.append((case, result))
    return results


def trl_problem(folder: Path) -> str:
    """Return why TRL's PPO cannot run, or an empty text."""
    found = [path.name.split("-")[1] for path in folder.glob("trl-*.dist-info")]
    try:
        found = [name.removesuffix(".dist") for name in found] or [version("trl")]
    except PackageNotFoundError:
        found = ["0"]
    release = tuple(int(part) for part in re.findall(r"\d+", found[0])[:2])
    if release <= LAST_WITH_PPO and release > (0,):
        return ""
    where = os.path.relpath(folder, ROOT)
    return f"no TRL with PPO is installed; pip install --target {where} --no-deps trl==1.12.0"


def run_side(arguments: list[str], seconds: float, first_on_path: str) -> Result:
    """Run tests.bench.gpu_sides in a process of its own. Returns: the last result that it printed.

    Args:
        arguments: its arguments.
        seconds: the process is ended after this time.
        first_on_path: folder of packages that come before the installed ones.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [first_on_path, os.environ.get("PYTHONPATH", "")])),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "tests.bench.gpu_sides", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, err = process.communicate(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        return last_result(out) or {"status": "stopped", "reason": f"no step ended within {seconds:.0f} s"}
    found = last_result(out)
    if process.returncode == 0 and found is not None:
        return found
    said = (err.strip().splitlines() or ["it said nothing"])[-1]
    return (found or {}) | {"status": "failed", "reason": f"exit code {process.returncode}: {said}"}


def last_result(out: str) -> Result | None:
    """Return the last result in what a side printed, or None."""
    lines = [line for line in out.splitlines() if line.startswith(MARK)]
    return {"status": "measured", **json.loads(lines[-1].removeprefix(MARK))} if lines else None


def report(machine: Result, results: Sequence[tuple[Case, Result]]) -> str:
    """Return the results as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    memory = f", {machine['memory'] / 2**30:.0f} GiB" if machine["gpu"] else ""
    lines = [
        "# One PPO step",
        "",
        f"{machine['device']}{memory}; {versions}; measured rates: {machine['flops_bfloat16'] / 1e12:.3g} TFLOP/s in "
        f"bfloat16, {machine['flops'] / 1e12:.3g} in float32, {machine['bandwidth'] / 1e12:.3g} TB/s.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
    ]
    for case, result in results:
        lines += [f"| {' | '.join(row)} |" for row in rows(case, result)]
    lines.append("")
    for case, result in results:
        lines += [f"- {case.name}: {note}" for note in result.get("notes", [])]
        lines += comparison(case, result, results)
    return "\n".join([*lines, ""])


def rows(case: Case, result: Result) -> list[list[str]]:
    """Return the rows of one case: its phases and the whole step, or why there are none."""
    problem = problem_of(result)
    found = [[case.name, problem, *[""] * (len(HEADER) - 2)]] if problem else []
    if not result.get("steps"):
        return found
    for phase in PHASES:
        if phase not in result["steps"][0]:
            continue
        seconds, tokens, limit = (_median(result, name) for name in (phase, f"{phase}_tokens", f"{phase}_limit"))
        assert seconds is not None
        name = "score and update" if case.side == "trl" and phase == "update" else phase
        found.append(
            [
                case.name,
                name,
                f"{seconds:.3g}",
                "" if tokens is None else f"{tokens / seconds:,.0f}",
                "" if limit is None else f"{100 * limit / seconds:.1f} %",
                _gib(result.get("peaks", {}).get(phase)),
                _gib(result.get("predicted", {}).get(phase)),
            ]
        )
    seconds = median(result, "step")
    limits = [_median(result, f"{phase}_limit") for phase in PHASES]
    share = "" if None in limits else f"{100 * sum(limit or 0.0 for limit in limits) / seconds:.1f} %"
    peaks = [_gib(max(result.get(name, {}).values(), default=None)) for name in ("peaks", "predicted")]
    tokens = median(result, "sample_tokens") / seconds
    return [*found, [case.name, "step", f"{seconds:.3g}", f"{tokens:,.0f}", share, *peaks]]


def comparison(case: Case, result: Result, results: Sequence[tuple[Case, Result]]) -> list[str]:
    """Return a line that compares TRL's result with ours of the same work, if both have made equally many updates."""
    ours = [found for other, found in results if asdict(other) == asdict(case) | {"side": "ours"}]
    if case.side != "trl" or not result.get("steps") or not ours or not ours[0].get("steps"):
        return []
    updates = [median(found, "updates") for found in (result, ours[0])]
    if updates[0] != updates[1]:
        return [f"- {case.name}: not compared, because its optimizer steps are {updates[0]:.0f}, ours {updates[1]:.0f}"]
    ratio = median(result, "step") / median(ours[0], "step")
    return [f"- {case.name}: its step takes {ratio:.2f} times as long as ours"]


def _median(result: Result, name: str) -> float | None:
    return median(result, name) if name in result["steps"][0] else None


def _gib(size: float | None) -> str:
    return f"{size / 2**30:.2f}" if size else ""


if __name__ == "__main__":
    main()
