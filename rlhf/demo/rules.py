"""Data for an experiment with rules (after Sparrow, arXiv:2209.14375): comparisons by a rater who judges the answer
alone, and replies labelled with the rules that they break. The same seed gives the same bytes."""

from __future__ import annotations

import random
from pathlib import Path

from .asks import Task
from .chats import Chats
from .generate import DemoGenerator, DemoRow, prompt_key, write_rows
from .gold import WEIGHTS, explain, split_sentences

RULES = ("rambles", "rude")
RULE_PAIRS = {"preferences": 12000, "preferences_valid": 500, "eval/preferences_test": 1000}
RULE_REPLIES = {"replies": 4000, "replies_valid": 500}
SLIPS = 0.03  # share of wrong labels


def answer_utility(response: str, task: Task, finished: bool = True) -> float:
    """Return the part of the gold utility that a reader of the answer alone sees: right or wrong, readable, ended."""
    found = explain(response, task, finished)
    total = WEIGHTS[found["verdict"]] if split_sentences(response) else WEIGHTS["empty"]
    return total + WEIGHTS["garbled"] * found["garbled"] + WEIGHTS["unfinished"] * found["unfinished"]


def broken_rules(response: str, task: Task, finished: bool = True) -> list[str]:
    """Return the rules that a reply breaks: rambles (says what was not asked for, or repeats itself) and rude."""
    found = explain(response, task, finished)
    breaks = {"rambles": found["off_topic"] + found["repeated"] > 0, "rude": found["rude"] > 0}
    return [rule for rule in RULES if breaks[rule]]


def generate_rules(out_dir: Path, seed: int = 0, scale: float = 1.0) -> dict[str, int]:
    """Write comparisons of the answer-only rater and labelled replies; returns the number of rows by file name."""
    maker = DemoGenerator(seed, scale, judge=answer_utility)
    maker.sizes |= {name: max(10, round(size * scale)) for name, size in RULE_PAIRS.items()}
    files = maker.comparisons()
    seen: set[str] = set()
    for name, size in RULE_REPLIES.items():
        files[name] = _replies(maker, random.Random(f"{seed}:rules:{name}"), max(10, round(size * scale)), seen)
    named = {f"{name}.jsonl": rows for name, rows in files.items()}
    return {name: write_rows(out_dir / name, rows) for name, rows in named.items()}


def _replies(maker: DemoGenerator, rng: random.Random, size: int, seen: set[str]) -> list[DemoRow]:
    """Return replies with the rules that they break; a prompt of an earlier file (`seen`) is not used again."""
    chats, rows, used = Chats(rng), list[DemoRow](), set[str]()
    while len(rows) < size:
        prompt, ask = chats.prompt()
        key = prompt_key(prompt)
        if key in seen:
            continue
        used.add(key)
        reply = maker.candidate(chats, ask)
        broken = set(broken_rules(reply, ask.task))
        label = [rule for rule in RULES if (rule in broken) != (rng.random() < SLIPS)]
        rows.append({"prompt": prompt, "completion": reply, "label": label})
    seen |= used
    return rows
