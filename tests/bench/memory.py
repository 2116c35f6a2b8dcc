"""What `rlhf check` predicts beside what the demo's stages take.

    python -m tests.bench.memory --sft runs/demo/1-sft/model --reward runs/demo/2-reward/model [--only NAME ...]

SFT and the reward model run to their end, so that they meet their longest records; PPO makes two steps. Each stage runs
in a fresh process, on one thread: the peak of the process minus what it held once everything was imported. `ppo` is the
recipe as it is, whose responses end by themselves: the prediction takes their length from the policy's hand-over
record. `ppo, full length` lets no response end before its limit. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.work import ROOT, machine

IMPORTS = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "trl.trainer.sft_trainer",
    "trl.trainer.reward_trainer",
    "transformers.models.llama.modeling_llama",
    "rlhf.trainers.supervised.sft",
    "rlhf.trainers.supervised.reward",
    "rlhf.trainers.ppo.trainer",
    "rlhf.stages.sft",
    "rlhf.stages.reward",
    "rlhf.stages.ppo",
)
PREDICTED = "Memory of each process"
LAST = "{last: 2}"
FROZEN = "{first: 3, parts: [embeddings]}"


def status(name: str) -> float:
    """A line of /proc/self/status, MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def command(arguments: list[str]) -> None:
    """Run `rlhf ARGUMENTS` here.

    Raises: RuntimeError if it fails.
    """
    from rlhf.cli.main import main

    sys.argv = ["rlhf", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"rlhf {' '.join(arguments)}: exit code {end.code}") from None


def measure(arguments: list[str]) -> None:
    """Import everything, run a stage, and print what its peak added, MiB."""
    for name in IMPORTS:
        importlib.import_module(name)
    gc.collect()
    imports = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts here
    command([*arguments, "--quiet"])
    print(json.dumps({"imports": imports, "above": status("VmHWM") - imports}))


def child(arguments: list[str]) -> str:
    """What this module prints in a fresh process.

    Raises: RuntimeError with the end of what it said, if it failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-3000:])
    return done.stdout


def predicted(arguments: list[str]) -> float:
    """The peak that `rlhf check` prints, MiB."""
    said = child([sys.executable, "-m", "rlhf", "check", *arguments, "--json"])
    tables: list[dict[str, Any]] = [json.loads(line) for line in said.splitlines()]
    rows = next(t["rows"] for t in tables if str(t.get("table", "")).startswith(PREDICTED))
    number, unit = next(row["bytes"] for row in rows if row["part"].startswith("peak")).split()
    return float(number) * (1024 if unit == "GiB" else 1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", required=True, help="model of the demo's SFT")
    parser.add_argument("--reward", required=True, help="model of the demo's reward stage")
    parser.add_argument("--precision", default="bfloat16", help="of all cases but those that say theirs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these stages alone, as the table calls them")
    options = parser.parse_args()
    models = [f"policy.path={options.sft}", f"reward_model.path={options.reward}"]
    full = ["ppo", "configs/demo/ppo.yaml", "ppo.steps=2", "sampling.min_new_tokens=48", *models]
    head = f"model.path={options.sft}"
    cases = {
        "sft": ["sft", "configs/demo/sft.yaml"],
        "reward": ["reward", "configs/demo/reward.yaml", head],
        "ppo": ["ppo", "configs/demo/ppo.yaml", "ppo.steps=2", *models],
        "ppo, full length": full,
        "ppo, float32": [*full, "optim.precision=float32"],
        "ppo, recomputed": [*full, "optim.activation_checkpointing=true"],
        "ppo, frozen": [*full, f"freeze.policy={FROZEN}", f"freeze.value_model={FROZEN}"],
        "ppo, unfrozen": [
            *full,
            f"unfreeze.policy=[{{train: {{last: 1}}, steps: 1}}, {{train: {LAST}}}]",
            "unfreeze.value_model=[{train: {parts: [score]}}]",
        ],
        "sft, frozen": ["sft", "configs/demo/sft.yaml", f"freeze={FROZEN}"],
        "sft, unfrozen": [
            "sft",
            "configs/demo/sft.yaml",
            f"unfreeze=[{{train: {LAST}, epochs: 1}}, {{train: {{last: 1}}, epochs: 1}}]",
        ],
        "reward, unfrozen": [
            "reward",
            "configs/demo/reward.yaml",
            head,
            "unfreeze=[{train: {last: 2, parts: [score]}, epochs: 1}, {train: {parts: [score]}, updates: 10}]",
        ],
        "sft, LoRA": ["sft", "configs/demo/sft.yaml", "peft.method=lora"],
    }
    print(machine(1))
    print(f"{'stage':20s} | measured, MiB | predicted | predicted / measured")
    for name, arguments in cases.items():
        if options.only and name not in options.only:
            continue
        with tempfile.TemporaryDirectory() as where:
            run = [
                arguments[0],
                arguments[1],
                f"optim.precision={options.precision}",
                *arguments[2:],
                f"output_dir={where}/run",
            ]
            said = child([sys.executable, "-m", "tests.bench.memory", "measure", *run])
            found = json.loads(said.splitlines()[-1])["above"]
            words = predicted(run[1:])
        print(f"{name:20s} | {found:13.0f} | {words:9.0f} | {words / found:.2f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2:])
    else:
        main()
