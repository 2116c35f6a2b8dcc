"""What a question is, what a conversation remembers, and what is kept apart for evaluation.

Three things keep the evaluation sets apart from the training files: wordings marked as reserved, (entity, attribute)
pairs marked as reserved, and a content hash that sets aside a share of all question strings whatever their family.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from .attributes import ATTRIBUTES
from .world import NUMBERS, world

Task = dict[str, Any]
HELD_OUT_PERCENT = 5
RESERVED_COMBO_PERCENT = 12


@dataclass(frozen=True)
class Ask:
    """A user turn. `told` is set when the turn also tells a personal fact; `entity` is what "it" means afterwards."""

    text: str
    family: str
    task: Task
    entity: str = ""
    told: tuple[tuple[str, str], ...] = ()
    plural: bool = False


@dataclass
class Context:
    """What the conversation has established so far."""

    entity: str = ""
    plural: bool = False
    told: dict[str, str] = field(default_factory=dict)
    asked: set[tuple[str, str]] = field(default_factory=set)
    turn: int = 0

    def advance(self, ask: Ask) -> None:
        """Update the state with a turn."""
        self.entity, self.plural = ask.entity, ask.plural
        self.told |= dict(ask.told)
        self.asked.add((ask.task["about"], ask.task.get("attribute", "")))
        self.turn += 1


def normalise(text: str) -> str:
    """Return the text in lower case without punctuation, the form in which prompts are compared."""
    return " ".join(re.findall(r"[a-z0-9-]+", text.lower()))


def percent(text: str) -> int:
    """Return a number from 0 to 99 that depends on the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 100


def held_out(question: str) -> bool:
    """Return whether a question string is set aside for evaluation: training files never contain it as a user turn."""
    return percent("question:" + normalise(question)) < HELD_OUT_PERCENT


def reserved_combo(entity: str, attribute: str) -> bool:
    """Return whether an (entity, attribute) pair is never asked about in training."""
    return percent(f"combo:{entity}:{attribute}") < RESERVED_COMBO_PERCENT


def split_wordings(wordings: tuple[str, ...], ood: bool) -> tuple[str, ...]:
    """Return the reserved wordings (the last of the list) or the others."""
    return wordings[-1:] if ood else wordings[:-1]


def predicate(attribute: str, value: str) -> str:
    """Return the plain predicate of a fact, for "animals that ..."."""
    row = ATTRIBUTES[attribute]
    return row.negations[0] if value == "no" and row.yes_no else row.predicates[0]


def compare_true(relation: str, a: str, b: str) -> bool:
    """Return whether "a is `relation` than b" holds; False also when the two cannot be told apart."""
    if relation in ("bigger", "smaller"):
        bigger = world().bigger(a, b)
        return bigger is not None and bigger == (relation == "bigger")
    more, part = relation.split()
    first, second = (world().entities[name].main.get(part) for name in (a, b))
    if not first or not second:
        return False
    x, y = (NUMBERS.index(values[0].split()[0].replace("no", "zero")) for values in (first, second))
    return x > y if more == "more" else x < y
