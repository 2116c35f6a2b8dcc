"""What packing saves: forward and backward of a PPO minibatch, and scoring, padded and packed in turn.

    python -m tests.bench.packing

The demo's source model stands for policy and value model; prompts are the demo's, responses are sampled. Medians of
processor time and their ratios; run it on an idle machine. Nothing here is asserted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlhf.config.sections import ModelSource, Peft, Sampling
from rlhf.console import Console
from rlhf.generation.native import generate_rollout
from rlhf.models.packed_batch import microbatches, pack
from rlhf.models.policy import load_causal
from rlhf.models.reward_models import new_value_model
from rlhf.rollout.teacher_forcing import policy_forward, response_values
from rlhf.rollout.types import Rollout
from rlhf.stages.lifecycle import open_tokenizer

SIZES = (12, 32, 96)


def prepare(attention: str, rows: int) -> tuple[Any, Any, Rollout]:
    """Policy, value model and a rollout of the demo."""
    source = ModelSource(path="data/demo/model", attention=attention)
    tokenizer, renderer = open_tokenizer(source, Console(quiet=True))
    policy = load_causal(source).train()
    size = len(tokenizer)
    value = new_value_model(source, Peft(), pad_id=renderer.pad_id, vocab_size=size, seed=1).train()
    lines = Path("data/demo/prompts.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
    prompts = [renderer.prompt(json.loads(line)["prompt"]) for line in lines]
    rollout = generate_rollout(
        policy,
        list(enumerate(prompts)),
        Sampling(max_new_tokens=48),
        seed=1,
        step=0,
        end_id=renderer.end_id,
        pad_id=renderer.pad_id,
        device=torch.device("cpu"),
    )
    return policy, value, rollout


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", default="eager", help="kernel (default: that of the demo)")
    parser.add_argument("--rows", type=int, default=96, help="episodes of the minibatch")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    policy, value, rollout = prepare(options.attention, options.rows)
    lengths = rollout.mask.sum(dim=1)

    def once(packed: bool, size: int, backward: bool) -> None:
        policy._can_pack = value._can_pack = packed
        for rows in microbatches(lengths, size, packed=packed):
            part = rollout.select(rows)
            with torch.set_grad_enabled(backward), torch.autocast("cpu", torch.bfloat16):
                read = policy_forward(policy, part, 1.0, entropy=backward)
                values = response_values(value, part)
            if backward:
                (read.logprobs.sum() + values.sum()).backward()

    for name, backward in (("update", True), ("score", False)):
        kinds = [(packed, size) for size in SIZES for packed in (False, True)]
        times = in_turn([lambda k=kind, b=backward: once(*k, b) for kind in kinds], options.rounds)
        for size in SIZES:
            padded, packed = times[kinds.index((False, size))], times[kinds.index((True, size))]
            parts = microbatches(lengths, size, packed=True)
            fill = min(pack(rollout.select(r).ids, rollout.select(r).mask).fill for r in parts)
            print(
                f"{name}, microbatches of {size:3d}: padded {padded:.3f} s, packed {packed:.3f} s, ratio "
                f"{packed / padded:.2f}; least full packed part {100 * fill:.0f} %"
            )


def in_turn(functions: list[Callable[[], None]], rounds: int) -> list[float]:
    """Median processor seconds of each, called one after the other in every round after one to warm up."""
    taken: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds + 1):
        for times, function in zip(taken, functions, strict=True):
            begun = time.process_time()
            function()
            if round_:
                times.append(time.process_time() - begun)
    return [statistics.median(times) for times in taken]


if __name__ == "__main__":
    main()
