"""Generated mistakes: configurations and records with one thing wrong at a random place.

A typed error each, exit code 2, no traceback, nothing written. The generator is seeded: a case is found again by its
number.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli import conftest
from tests.conftest import Run

CASES = 120  # of each kind
BATCH = 20
NOTHING: tuple[Any, ...] = (None, 3, 2.5, True, [], {}, [[]], {"a": []})
Place = tuple[Any, ...]
GOOD = {
    "sft": ("demos", conftest.DEMOS),
    "reward": ("pairs", conftest.PAIRS),
    "classify": ("labels", conftest.LABELS),
    "ppo": ("prompts", conftest.PROMPTS),
}


def leaves(value: Any, at: Place = ()) -> Iterator[Place]:
    """Places of everything in nested data but the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from leaves(inner, (*at, key))


def look(value: Any, at: Place) -> Any:
    """What is at a place."""
    for key in at:
        value = value[key]
    return value


def replaced(value: Any, at: Place, new: Any) -> Any:
    """A copy with something else there."""
    made = copy.deepcopy(value)
    look(made, at[:-1])[at[-1]] = new
    return made


def without(value: Any, at: Place) -> Any:
    """A copy with nothing there."""
    made = copy.deepcopy(value)
    del look(made, at[:-1])[at[-1]]
    return made


def damaged(text: str, rng: random.Random) -> bytes:
    """Something that neither YAML nor JSON reads: cut in a bracket, bytes that are no text, a control character."""
    content, at = text.encode(), rng.randrange(len(text))
    return rng.choice(
        [b"{" + content[:at], content[:at] + b"\xff\xfe" + content[at:], content[:at] + b"\x00: [" + b"\x01"]
    )


def bad_config(rng: random.Random) -> tuple[str, bytes]:
    """A stage and its broken file: another type, an unknown key, no required key, or no YAML."""
    stage = rng.choice(["sft", "reward", "classify", "ppo", "evaluate"])
    good = yaml.safe_load(conftest.CONFIGS[f"{stage}.yaml"])
    places = list(leaves(good))
    kind = rng.choice(["type", "unknown", "missing", "text", "sign"])
    if kind == "text":
        return stage, damaged(yaml.safe_dump(good), rng)
    if kind == "missing":
        required = [key for key in good if key in ("output_dir", "model", "policy", "data", "models", "prompts")]
        return stage, yaml.safe_dump(without(good, (rng.choice(required),))).encode()
    if kind == "unknown":
        sections = [at for at in places if isinstance(look(good, at), dict)]
        inside = [at for at in sections if at[-1] not in ("models", "prompts")] or [()]
        return stage, yaml.safe_dump(replaced(good, (*rng.choice(inside), f"key{rng.randrange(99)}"), 1)).encode()
    numbers = [at for at in places if isinstance(look(good, at), int | float)]
    if kind == "sign" and numbers:
        return stage, yaml.safe_dump(replaced(good, rng.choice(numbers), rng.choice([-1, -0.5, float("nan")]))).encode()
    at = rng.choice(places)
    wrong = [new for new in ([[1]], {"a b": 1}, "a\nb: [") if type(new) is not type(look(good, at))]
    return stage, yaml.safe_dump(replaced(good, at, rng.choice(wrong))).encode()


def bad_rows(rng: random.Random) -> tuple[str, bytes]:
    """A stage and its data file, one record of which is broken: another type, nothing, no key, no JSON."""
    stage = rng.choice(list(GOOD))
    rows = [json.dumps(row).encode() for row in GOOD[stage][1]]
    number = rng.randrange(len(rows))
    row = GOOD[stage][1][number]
    places, kind = list(leaves(row)), rng.choice(["type", "missing", "text", "whole"])
    if kind == "text":
        rows[number] = damaged(json.dumps(row), rng)
    elif kind == "whole":
        rows[number] = json.dumps(rng.choice([*NOTHING, "words"])).encode()
    elif kind == "missing":
        rows[number] = json.dumps(without(row, rng.choice(places))).encode()
    else:
        at = rng.choice(places)
        rows[number] = json.dumps(replaced(row, at, rng.choice(NOTHING))).encode()
    return stage, b"\n".join(rows) + b"\n"


def refused(name: str, stage: str, place: Path, call: Run) -> list[str]:
    """What is wrong with how a command refuses."""
    code, _, err = call([stage, f"{stage}.yaml", "--quiet"], cwd=place)
    found = [] if code == 2 else [f"{name}: exit code {code}: {err[-300:]}"]
    if not re.match(r"(Config|Data)Error: .{20}", err, re.S) or "Traceback" in err:
        found.append(f"{name}: {err[-300:]!r}")
    if (place / "out").exists():
        found.append(f"{name}: output was written")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(CASES // BATCH))
@pytest.mark.parametrize("kind", ["config", "rows"])
def test_whatever_is_wrong_is_said_in_words_and_nothing_is_written(
    kind: str, batch: int, place: Path, call_cli: Callable[..., Any]
) -> None:
    wrong = []
    for number in range(batch * BATCH, (batch + 1) * BATCH):
        stage, content = (bad_config if kind == "config" else bad_rows)(random.Random(number))
        file = place / (f"{stage}.yaml" if kind == "config" else f"{GOOD[stage][0]}.jsonl")
        good = file.read_bytes()
        file.write_bytes(content)
        wrong += refused(f"{kind} {number} {stage} {content[:150]!r}", stage, place, call_cli)
        file.write_bytes(good)
    assert wrong == [], "\n".join(wrong)
