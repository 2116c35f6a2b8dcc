"""Data for an experiment with weak labels: pairs with the votes of six simulated annotators of different accuracy. They
know the gold order and make random mistakes, independent of the pair. The same seed gives the same bytes."""

from __future__ import annotations

import random
from pathlib import Path

from .generate import DemoGenerator, DemoRow, prompt_key, write_rows

SKILLS = {"ann": 0.92, "bob": 0.75, "cat": 0.62, "dan": 0.58, "eve": 0.55, "fay": 0.55}
COVERAGE = 0.6
PAIRS = {"pairs": 1500, "pairs_valid": 1000}


def generate_annotators(out_dir: Path, seed: int = 0, scale: float = 1.0) -> dict[str, int]:
    """Write the pairs with their votes and the truth beside them, the same pairs with the truth as label, and held-out
    pairs with the truth as label; returns the number of rows by file name."""
    maker = DemoGenerator(seed, scale)
    files: dict[str, list[DemoRow]] = {}
    seen = {prompt_key(prompt) for pairs in maker._drawn().values() for prompt, *_ in pairs}
    for name, size in PAIRS.items():
        name_ = f"annotators:{name}"
        # Pairs of equally good replies have no true order; a few more pairs are drawn to replace them.
        maker.sizes[name_] = max(20, round(1.5 * size * scale))
        drawn = [
            (prompt, a, b, maker.judge(a, ask.task) - maker.judge(b, ask.task))
            for prompt, ask, a, b in maker._pairs(name_, seen)
        ]
        decided = [pair for pair in drawn if pair[3]][: max(10, round(size * scale))]
        files[name] = [
            {"prompt": prompt, "chosen": a, "rejected": b, "preference": float(gap > 0)}
            for prompt, a, b, gap in decided
        ]
    rng = random.Random(f"{seed}:annotators:votes")
    voted = [_voted(rng, row) for row in files["pairs"]]
    return {
        "pairs.jsonl": write_rows(out_dir / "pairs.jsonl", voted),
        "truth.jsonl": write_rows(out_dir / "truth.jsonl", files["pairs"]),
        "truth_valid.jsonl": write_rows(out_dir / "truth_valid.jsonl", files["pairs_valid"]),
    }


def _voted(rng: random.Random, row: DemoRow) -> DemoRow:
    """Return the pair with votes and the truth instead of its label. The two replies are exchangeable: which of them is
    called `chosen` carries no information."""
    truth, other = ("chosen", "rejected") if row["preference"] else ("rejected", "chosen")
    votes = {
        name: truth if rng.random() < skill else other for name, skill in SKILLS.items() if rng.random() < COVERAGE
    }
    shown = {name: row[name] for name in ("prompt", "chosen", "rejected")}
    return shown | {"votes": votes, "truth": truth}
