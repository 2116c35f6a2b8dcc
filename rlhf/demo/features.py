"""Data for an experiment with fine-tuning (after Kumar et al. 2022, arXiv:2202.10054): replies with traits that can be
told from their text, on which a trunk learns good features, and a new task of which only a narrow part is ever trained
on. Same seed, same bytes.

The task: is a reply clean, or flawed (rude, rambling, repeating itself or breaking off)? Replies for training, choice
and the in-distribution test answer one plain question about half of the animals, in at most 20 words and with half of
the stock sentences; those of `ood` answer everything else at any length, with the other half of the sentences.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from . import phrases
from .asks import Context, Task, held_out, percent
from .chats import Chats, Message
from .generate import DemoRow, prompt_key, write_rows
from .gold import explain
from .styles import Style
from .world import world

TRAITS = ("evasive", "kind", "long", "personal", "rambles", "repeats", "rude", "unfinished")
FLAWS = ("rambles", "repeats", "rude", "unfinished")
LONG, SHORT = 12, 20  # words
REPLIES = {"traits": 6000, "traits_valid": 300}
DRAWS = 5  # training sets of the task
TASK = {f"train_{n}": 96 for n in range(1, DRAWS + 1)} | {"valid": 300, "test": 500, "ood": 500}
STYLE = Style(
    right=0.62,
    wrong=0.20,
    evasive=0.12,
    polite=(0.30, 0.12, 0.05),
    rude=0.30,
    ramble=(0.22, 0.10, 0.05),
    repeat=0.20,
    cut=0.15,
    bare=0.10,
)
STOCK = (
    *phrases.OPENINGS,
    *phrases.CLOSINGS,
    *phrases.RUDE_FRONT,
    *phrases.RUDE_BACK,
    *phrases.EVASIVE,
    *phrases.FILLER,
)


def traits(reply: str, task: Task) -> list[str]:
    """Return which of `TRAITS` a reply has."""
    found = explain(reply, task)
    has = {
        "evasive": found["verdict"] == "evasive",
        "kind": found["polite"] > 0,
        "long": found["words"] > LONG,
        "personal": task["type"] in ("talk", "recall", "unknown"),
        "rambles": found["off_topic"] > 0,
        "repeats": found["repeated"] > 0,
        "rude": found["rude"] > 0,
        "unfinished": not reply.endswith((".", "!", "?")),
    }
    return [name for name in TRAITS if has[name]]


def verdict(reply: str, task: Task) -> str:
    """Return the label of the new task."""
    return "flawed" if set(traits(reply, task)) & set(FLAWS) else "clean"


def familiar(name: str) -> bool:
    """Return whether an entity or a stock sentence belongs to the half that the task is trained on."""
    return percent(f"features:{name}") < 50


FAMILIAR, NOVEL = (tuple(text for text in STOCK if familiar(text) is half) for half in (True, False))
Drawn = tuple[list[Message], Task, str]


def generate_features(out_dir: Path, seed: int = 0, scale: float = 1.0) -> dict[str, int]:
    """Write replies with their traits, and the task's sets; returns the number of rows by file name."""
    files: dict[str, list[DemoRow]] = {}
    seen: set[str] = set()
    for name, size in (REPLIES | TASK).items():
        rng = random.Random(f"{seed}:features:{name}")
        draw = _any if name in REPLIES else _wide if name == "ood" else _narrow
        files[name] = _rows(draw(Chats(rng)), name in REPLIES, max(10, round(size * scale)), seen)
    return {f"{name}.jsonl": write_rows(out_dir / f"{name}.jsonl", rows) for name, rows in files.items()}


def _rows(drawn: Iterator[Drawn], traits_wanted: bool, size: int, seen: set[str]) -> list[DemoRow]:
    """Return distinct exchanges that no earlier file has (`seen`); of the task as many clean as flawed ones."""
    rows: list[DemoRow] = []
    for prompt, task, reply in drawn:
        key = prompt_key([*prompt, {"role": "assistant", "content": reply}])
        label = traits(reply, task) if traits_wanted else verdict(reply, task)
        if key in seen or (not traits_wanted and label != ("clean", "flawed")[len(rows) % 2]):
            continue
        seen.add(key)
        rows.append({"prompt": prompt, "completion": reply, "label": label})
        if len(rows) == size:
            break
    return rows


def _any(chats: Chats) -> Iterator[Drawn]:
    """Yield exchanges of the full distribution."""
    while True:
        prompt, ask = chats.prompt()
        yield prompt, ask.task, chats.writer.reply(ask.task, STYLE.draw(chats.rng))


def _narrow(chats: Chats) -> Iterator[Drawn]:
    """Yield exchanges of the narrow training distribution that the module docstring describes."""
    while True:
        ask = chats.usual.ask(Context(), "attribute")
        entity = world().entities[ask.task["about"]]
        if entity.kind != "animal" or not familiar(entity.name) or held_out(ask.text):
            continue
        reply = chats.writer.reply(ask.task, STYLE.draw(chats.rng))
        if len(reply.split()) <= SHORT and not any(text in reply for text in NOVEL):
            yield [{"role": "user", "content": ask.text}], ask.task, reply


def _wide(chats: Chats) -> Iterator[Drawn]:
    """Yield exchanges of the out-of-distribution test that the module docstring describes."""
    for prompt, task, reply in _any(chats):
        entity = world().entities.get(task["about"])
        narrow = task["type"] == "attribute" and entity is not None and entity.kind == "animal"
        if not narrow and not any(text in reply for text in FAMILIAR):
            yield prompt, task, reply
