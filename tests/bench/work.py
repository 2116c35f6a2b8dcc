"""One piece of PPO work, in numbers: what is measured, what its models and prompts are, and the process that does it.

Imports neither torch nor our package: the process that starts the measured ones must stay smaller than they are,
because a child's peak memory counts that of its parent at the moment of the start.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Work:
    """Steps of PPO, the same for whoever does them."""

    name: str
    folder: str = ""  # policy/, reward/, prompts.jsonl, prompts.json: made once, read by both sides
    # A random Llama with untied embeddings; hidden 0 is the demo's model, whose responses end by themselves.
    hidden: int = 0
    layers: int = 8
    heads: int = 6
    intermediate: int = 1024
    vocabulary: int = 8192
    prompts: int = 0  # how many; 0 = as many as episodes, so that every step has the same ones
    shortest: int = 16  # of the random prompts, in tokens
    longest: int = 48
    response: int = 64  # limit, in tokens
    episodes: int = 32
    epochs: int = 4
    minibatches: int = 4
    microbatch: int = 0  # rows per backward; 0 = a whole minibatch
    decoded: int = 32  # rows decoded side by side
    lora: int = 0  # rank; 0 = all weights
    trunk: bool = False  # ours: the value model is a head on the policy's trunk
    learning_rate: float = 1e-6
    kl_coef: float = 0.05
    penalty: float = 1.0  # without an end token
    precision: str = "float32"
    threads: int = 1
    steps: int = 2  # timed, after one to warm up
    seed: int = 1

    @property
    def attention(self) -> str:
        """Plain matrix products in bfloat16: the fused kernel's backward is slow there on a CPU."""
        return "eager" if self.precision == "bfloat16" else "sdpa"

    @property
    def demo(self) -> bool:
        """Whether the model is the demo's."""
        return not self.hidden

    def path(self, name: str) -> str:
        """Of something in the folder."""
        return str(Path(self.folder) / name)


Result = dict[str, Any]


def run(side: str, work: Work, *, first_on_path: str = "", module: str = "tests.bench.sides") -> Result:
    """Do the work in a fresh process, and return what it says.

    Args:
        side: build, ours or trl.
        first_on_path: a folder of packages that come before the installed ones.
        module: whose process it is; its arguments are the side and the work.
    Raises: RuntimeError, with the end of what the process said, if it failed.
    """
    threads = str(work.threads)
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONPATH": first_on_path,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, "-m", module, side, json.dumps(asdict(work))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{work.name}, {side} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def of_steps(result: Result, name: str) -> float:
    """The median over the timed steps of one of their numbers."""
    return statistics.median(step[name] for step in result["steps"])


def machine(threads: int) -> str:
    """The processor and how much of it is used."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}"
