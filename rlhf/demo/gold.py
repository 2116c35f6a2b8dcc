"""The judge of the demo: the true quality of a reply (gold utility), which no training stage can read.

The reply is split into sentences; each one is recognised as manner (polite, rude, evasive, filler, a kind word) or read
into claims by `grammar` and checked against the world, or it counts as garbled. The total rewards a right answer, one
polite touch, and stopping; everything else costs. Only evaluation and the data generator may import this module.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from . import phrases
from .asks import Task, compare_true
from .attributes import ATTRIBUTES
from .grammar import Claim, Reading, read_sentence
from .talk import TOPICS
from .world import NUMBERS, world

WEIGHTS = {
    "right": 2.0,
    "wrong": -2.0,
    "evasive": -1.0,
    "none": -1.5,
    "partial": 0.5,
    "polite": 0.5,
    "rude": -1.5,
    "off_topic": -0.4,
    "false_side": -1.0,
    "repeated": -0.6,
    "garbled": -1.0,
    "unfinished": -1.5,
    "empty": -3.5,
    "long_word": -0.02,
}
FREE_WORDS = 8
BEST = WEIGHTS["right"] + WEIGHTS["polite"]


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9 ,-]", "", text.lower()).strip(" ,")


def _table(sentences: tuple[str, ...]) -> frozenset[str]:
    return frozenset(_plain(text) for text in sentences)


_POLITE = _table(phrases.OPENINGS + phrases.CLOSINGS + phrases.TALK_TOUCHES)
_POLITE_WORDS = frozenset(_plain(text) for text in phrases.OPENINGS)
_RUDE = _table(phrases.RUDE_FRONT + phrases.RUDE_BACK + phrases.RUDE_TALK)
_EVASIVE = _table(phrases.EVASIVE)
_FILLER = _table(phrases.FILLER)
_KIND: dict[str, frozenset[str]] = {}
for _topic in TOPICS.values():
    for _text in _topic.replies:
        _KIND[_plain(_text)] = _KIND.get(_plain(_text), frozenset()) | {_topic.name}


@dataclass
class _Tally:
    """Counts of what a reply consists of, by kind of sentence."""

    right: int = 0
    wrong: int = 0
    evasive: int = 0
    polite: int = 0
    rude: int = 0
    off_topic: int = 0
    false_side: int = 0
    repeated: int = 0
    garbled: int = 0
    current: str = ""
    members: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    said: set[Claim] = field(default_factory=set)


@lru_cache(maxsize=100_000)
def split_sentences(response: str) -> tuple[tuple[str, bool, bool], ...]:
    """Return (plain text, is a question, has a final mark) for each sentence; a polite "Sure, ..." is split off."""
    found: list[tuple[str, bool, bool]] = []
    for match in re.finditer(r"([^.!?]*)([.!?]*)", response):
        text = _plain(match[1])
        if not text:
            continue
        head, comma, rest = text.partition(", ")
        while comma and head in _POLITE_WORDS:
            found.append((head, False, True))
            text = rest
            head, comma, rest = text.partition(", ")
        found.append((text, "?" in match[2], bool(match[2])))
    return tuple(found)


def utility(response: str, task: Task, finished: bool = True) -> float:
    """Return the gold utility of a reply; `finished` says whether the end token was produced."""
    return float(explain(response, task, finished)["utility"])


def near_perfect(response: str, task: Task, finished: bool = True) -> bool:
    """Return whether the utility is within 0.3 of the best: right, polite once, nothing superfluous."""
    return utility(response, task, finished) >= BEST - 0.3


def explain(response: str, task: Task, finished: bool = True) -> dict[str, Any]:
    """Return the components behind `utility`: the verdict, a count per kind of sentence, and the total."""
    sentences = split_sentences(response)
    tally = _Tally(current=task.get("about", ""))
    for index, (text, question, complete) in enumerate(sentences):
        fragment = not complete and index == len(sentences) - 1
        _take(text, question, fragment, finished, task, tally)
    verdict = _verdict(task, tally)
    words = len(response.split())
    total = WEIGHTS[verdict] if sentences else WEIGHTS["empty"]
    answered = verdict != "none"
    total += WEIGHTS["polite"] * min(tally.polite, 1) * answered
    total += WEIGHTS["rude"] * tally.rude
    total += WEIGHTS["off_topic"] * (tally.off_topic + max(0, tally.polite - 2))
    for name in ("false_side", "repeated", "garbled"):
        total += WEIGHTS[name] * getattr(tally, name)
    total += WEIGHTS["unfinished"] * (not finished) + WEIGHTS["long_word"] * max(0, words - FREE_WORDS)
    names = ("polite", "rude", "off_topic", "false_side", "repeated", "garbled")
    counts = {name: getattr(tally, name) for name in names}
    return {"utility": round(total, 4), "verdict": verdict, "unfinished": not finished, "words": words, **counts}


def _verdict(task: Task, tally: _Tally) -> str:
    if tally.wrong:
        return "wrong"
    if task["type"] == "list" and tally.members:
        tally.off_topic += max(0, len(tally.members) - task["count"] - 1)
        return "right" if len(tally.members) >= task["count"] else "partial"
    if tally.right:
        return "right"
    return "evasive" if tally.evasive else "none"


def _take(text: str, question: bool, fragment: bool, finished: bool, task: Task, tally: _Tally) -> None:
    """Classify one sentence and add it to the tally."""
    if text in tally.seen:
        tally.repeated += 1
        return
    tally.seen.add(text)
    if text in _KIND:
        _kind_word(_KIND[text], task, tally)
    elif text in _POLITE:
        tally.polite += 1
    elif text in _RUDE:
        tally.rude += 1
    elif text in _EVASIVE:
        tally.evasive += 1
    elif text in _FILLER:
        tally.off_topic += 1
    else:
        reading = None if question else _choose(read_sentence(text), task, tally.current)
        if reading is not None and not (fragment and not finished):
            _claims(reading, task, tally)
        elif not (fragment and not finished):
            # A last fragment without end token is already paid for as unfinished.
            tally.garbled += 1


def _kind_word(topics: frozenset[str], task: Task, tally: _Tally) -> None:
    """Judge a small-talk reply: right on its topic, wrong where it does not suit, else beside the point."""
    if task["type"] != "talk":
        tally.off_topic += 1
    elif task["topic"] in topics:
        tally.right += 1
        tally.off_topic += int(tally.right > 2)
    elif topics & set(TOPICS[task["topic"]].unsuitable):
        tally.wrong += 1
    else:
        tally.off_topic += 1


def _choose(readings: tuple[Reading, ...], task: Task, current: str) -> Reading | None:
    """Return the reading that fits best: on the asked attribute first, then one that the subject can have at all."""

    kind, asked = task["type"], task.get("attribute", "")
    bare = {"recall": "personal", "unknown": "personal", "count": "number", "sum": "number"}.get(kind, "entity")
    bare = asked if kind == "attribute" else f"personal:{task['relation']}" if bare == "personal" else bare

    def fit(reading: Reading) -> tuple[int, int]:
        able = on_task = 0
        for claim in reading:
            name = current if claim.subject == "it" else claim.subject
            entity = world().entities.get(name)
            able += int(claim.kind != "fact" or (entity is not None and claim.key in entity.main))
            on_task += int(claim.kind == kind or (claim.kind == "bare" and claim.key == bare))
            on_task += int(claim.kind == "fact" and claim.key == asked)
        return able, on_task

    return max(readings, key=fit) if readings else None


def _claims(reading: Reading, task: Task, tally: _Tally) -> None:
    """Judge the claims of one sentence; a sentence that only repeats earlier claims counts as repetition."""
    resolved = []
    for claim in reading:
        subject = tally.current if claim.subject == "it" and claim.kind == "fact" else claim.subject
        if claim.kind == "fact" and claim.subject != "it" and task["type"] != "list":
            tally.current = claim.subject
        resolved.append(Claim(claim.kind, claim.key, subject, claim.value, claim.positive))
    if all(claim in tally.said for claim in resolved):
        tally.repeated += 1
        return
    tally.said.update(resolved)
    results = [_judge(claim, task, tally) for claim in resolved]
    for name in ("wrong", "false_side"):
        if name in results:
            setattr(tally, name, getattr(tally, name) + 1)
            return
    if "right" in results:
        tally.right += 1
    elif "evasive" in results:
        tally.evasive += 1
    else:
        tally.off_topic += 1


def _judge(claim: Claim, task: Task, tally: _Tally) -> str:
    """Return right, wrong, evasive, off_topic (true but not asked for) or false_side (false and not asked for)."""
    if claim.kind == "honest":
        return _honest(claim, task)
    if claim.kind == "bare":
        return _bare(claim, task, tally)
    if claim.kind == "stance":
        if task["type"] != "yesno":
            return "neutral"
        return "right" if claim.value == task["answer"] else "wrong"
    if claim.kind == "personal":
        return _personal(claim, task)
    if claim.kind == "count":
        return _count(claim, task)
    if claim.kind == "sum":
        first, second = claim.subject.split(" plus ")
        true = NUMBERS.index(first) + NUMBERS.index(second) == NUMBERS.index(claim.value)
        if task["type"] == "sum" and sorted((first, second)) == sorted(task["terms"]):
            return "right" if true else "wrong"
        return "off_topic" if true else "false_side"
    return _compare(claim, task) if claim.kind == "compare" else _fact(claim, task, tally)


def _honest(claim: Claim, task: Task) -> str:
    """Return the verdict on an admission of ignorance: right for what cannot be known, evasive otherwise."""
    if task["type"] != "unknown":
        return "evasive"
    same = not claim.key or (claim.key == task["relation"] and claim.subject in ("", task["param"]))
    return "right" if same else "off_topic"


def _personal(claim: Claim, task: Task) -> str:
    known = {key: value.lower() for key, value in task.get("told", {}).items()}
    key = f"{claim.key}:{claim.subject}"
    if task["type"] in ("recall", "unknown") and claim.key == task["relation"] and claim.subject == task["param"]:
        return "right" if task["type"] == "recall" and claim.value == task["value"].lower() else "wrong"
    return "off_topic" if known.get(key) == claim.value else "false_side"


def _count(claim: Claim, task: Task) -> str:
    if claim.subject == "they":
        if task["type"] == "count" and claim.key == task["part"]:
            return "right" if claim.value == task["answer"] else "wrong"
        if task["type"] in ("attribute", "yesno") and task.get("about"):
            return _fact(Claim("fact", claim.key, task["about"], f"{claim.value} {claim.key}"), task, _Tally())
        return "off_topic"
    number, _, name = claim.subject.partition(" ")
    each = world().entities[name].main.get(claim.key, ("zero",))[0].split()[0].replace("no", "zero")
    true = NUMBERS.index(number) * NUMBERS.index(each) == NUMBERS.index(claim.value)
    if task["type"] == "count" and (number, name, claim.key) == (task["n"], task["about"], task["part"]):
        return "right" if true else "wrong"
    return "off_topic" if true else "false_side"


def _compare(claim: Claim, task: Task) -> str:
    pair = task.get("pair", [])
    a, b = claim.subject, claim.value
    if a in pair and not b:
        b = pair[1] if a == pair[0] else pair[0]
    true = bool(b) and a != "it" and b != "it" and compare_true(claim.key, a, b)
    if {a, b} != set(pair) or ("legs" in claim.key) != ("legs" in task["relation"]):
        return "off_topic" if true else "false_side"
    if task["type"] == "compare":
        return "right" if true else "wrong"
    asked = compare_true(task["relation"], *pair)
    return "right" if true and asked == (task["answer"] == "yes") else "wrong"


def _fact(claim: Claim, task: Task, tally: _Tally) -> str:
    """Return the verdict on a statement about an entity, given the world and what was asked."""
    entity = world().entities.get(claim.subject)
    if entity is None or claim.key not in entity.main:
        return "false_side"
    true = world().is_true(entity.name, claim.key, claim.value) == claim.positive
    kind, same = task["type"], task.get("attribute") == claim.key
    if kind in ("reverse", "list") and same and claim.value == task["value"] and claim.positive:
        if not true or entity.kind != task["kind"]:
            return "wrong"
        tally.members.add(entity.name)
        return "right"
    if same and entity.name == task["about"] and kind in ("attribute", "yesno"):
        if not true:
            return "wrong"
        if kind == "attribute":
            return "right" if claim.positive else "off_topic"
        if claim.value == task["value"] or ATTRIBUTES[claim.key].yes_no:
            return "right"
        # "No, it eats grass" denies what was asked only if the answer is no.
        return "right" if task["answer"] == "no" and claim.positive else "off_topic"
    return "off_topic" if true else "false_side"


def _bare(claim: Claim, task: Task, tally: _Tally) -> str:
    """Return the verdict on a value or noun on its own, which stands for what the question asked for."""
    kind = task["type"]
    if claim.key == "entity" and kind in ("reverse", "list"):
        if claim.subject not in task["answers"]:
            return "wrong"
        tally.members.add(claim.subject)
        return "right"
    if claim.key == "entity" and kind == "compare" and claim.subject in task["pair"]:
        return "right" if claim.subject == task["answer"] else "wrong"
    if kind == "attribute" and claim.key == task["attribute"]:
        return "right" if claim.value in task["values"] else "wrong"
    if claim.key == "number" and kind in ("count", "sum"):
        return "right" if claim.value == task["answer"] else "wrong"
    if claim.key == "number" and kind == "attribute" and task["attribute"] in ("legs", "wheels"):
        return "right" if f"{claim.value} {task['attribute']}" in task["values"] else "wrong"
    if claim.key.startswith("personal:") and kind in ("recall", "unknown"):
        if claim.key.split(":")[1] != task["relation"]:
            return "false_side"
        return "right" if kind == "recall" and claim.value == task["value"].lower() else "wrong"
    return "off_topic"
