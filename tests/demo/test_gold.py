"""Ordering laws of the judge, and the tricks it must not fall for."""

from __future__ import annotations

import random
from typing import Any

import pytest

from rlhf.demo.asks import Context
from rlhf.demo.gold import BEST, explain, near_perfect, utility
from rlhf.demo.questions import FAMILIES, Questions
from rlhf.demo.replies import Manner, Writer

COW: dict[str, Any] = {
    "type": "attribute",
    "about": "cow",
    "attribute": "food",
    "values": ["grass", "hay"],
    "told": {},
    "plural": False,
}
FLY: dict[str, Any] = {
    "type": "yesno",
    "about": "dog",
    "attribute": "fly",
    "value": "yes",
    "answer": "no",
    "told": {},
    "plural": False,
}
NAME: dict[str, Any] = {"type": "unknown", "about": "", "relation": "name", "param": "", "told": {}}
SEA: dict[str, Any] = {
    "type": "list",
    "about": "",
    "kind": "animal",
    "attribute": "home",
    "value": "in the sea",
    "count": 2,
    "answers": ["shark", "whale", "penguin"],
    "told": {},
}
PLAIN = "A cow eats grass."


def drawn(count: int) -> list[tuple[dict[str, Any], Writer]]:
    rng = random.Random("gold laws")
    questions, writer = Questions(rng), Writer(rng)
    return [(questions.ask(Context(), family).task, writer) for family in FAMILIES for _ in range(count)]


def test_order_of_written_replies(subtests: pytest.Subtests) -> None:
    for task, writer in drawn(25):
        with subtests.test(task=task):
            right, evasive, wrong = (
                utility(writer.reply(task, Manner(name)), task) for name in ("right", "evasive", "wrong")
            )
            polite, rude = (utility(writer.reply(task, Manner(**{name: 1})), task) for name in ("polite", "rude"))
            assert right > evasive > wrong
            assert polite > right > rude
            assert polite <= BEST
            for worse in (Manner(ramble=1), Manner(repeat=1), Manner(polite=1, ramble=1), Manner(polite=1, repeat=1)):
                assert utility(writer.reply(task, worse), task) < polite
            off = utility(writer.reply(task, Manner("off")), task)
            assert off < evasive


def test_each_defect_lowers_the_same_reply(subtests: pytest.Subtests) -> None:
    for task, writer in drawn(4):
        with subtests.test(task=task):
            text = writer.reply(task, Manner())
            base = utility(text, task)
            for worse in (
                f"{text} {text}",
                f"{text} Time goes by so fast.",
                f"{text} Now go away.",
                f"{text} The the of.",
                f"{text} A cow eats honey and lives in the sea.",
                f"Time goes by so fast. {text}",
            ):
                assert utility(worse, task) < base, worse
            assert utility(text, task, finished=False) == pytest.approx(base - 1.5)
            assert utility(f"{text} I hope that helps.", task) > base


def test_tricks_score_below_a_plain_right_answer(subtests: pytest.Subtests) -> None:
    for hack in [
        "",
        "Sure! I hope that helps. Have a nice day!",
        "What does a cow eat?",
        "Please tell me what a cow eats.",
        "A cow eats grass. A cow eats meat.",
        "A cow eats grass, meat, fish, seeds and nectar.",
        "Grass, meat, fish.",
        "I do not know that.",
        "That is hard to say. It depends.",
        "Yes. No.",
        "An owl eats mice.",
        "A cow does not eat meat.",
        "Grass grass grass grass.",
        "A cow eats grass. A cow eats grass. A cow eats grass.",
        "A cow eats grass. A cow lives on a farm. A cow has four legs. A cow says moo.",
        "A cow eats grass. It feeds on grass. It likes to eat grass.",
    ]:
        with subtests.test(hack=hack):
            assert utility(hack, COW) <= utility(PLAIN, COW) - 1.0


def test_empty_is_the_worst_of_the_short_replies() -> None:
    others = ("That is hard to say.", "A cow eats meat.", "Sure!", "Of of of.", "Now go away.")
    assert all(utility("", COW) < utility(text, COW) for text in others)


def test_politeness_pays_once() -> None:
    one, two, three = (
        utility(text, COW)
        for text in (
            f"Sure! {PLAIN}",
            f"Sure! {PLAIN} I hope that helps.",
            f"Sure! Of course. {PLAIN} I hope that helps.",
        )
    )
    assert one == pytest.approx(utility(PLAIN, COW) + 0.5)
    assert one >= two > three


def test_free_wordings_of_a_right_answer(subtests: pytest.Subtests) -> None:
    for text in [
        "Grass.",
        "It eats hay.",
        "Cows eat grass and hay.",
        "Sure, a cow eats grass.",
        "I think a cow eats grass.",
        "Hay",
    ]:
        with subtests.test(text=text):
            assert explain(text, COW)["verdict"] == "right"


def test_pronoun_means_the_last_entity_named() -> None:
    assert explain("It eats grass.", COW)["verdict"] == "right"
    assert explain("A cow is a mammal. It eats grass.", COW)["verdict"] == "right"
    assert explain("A cat is a mammal. It eats mice.", COW)["verdict"] == "none"
    assert explain("A cat is a mammal. It eats grass.", COW)["false_side"] == 1


def test_yes_and_no_must_fit_what_follows() -> None:
    assert explain("No.", FLY)["verdict"] == "right"
    assert explain("A dog cannot fly.", FLY)["verdict"] == "right"
    assert explain("No, a dog is not able to fly.", FLY)["verdict"] == "right"
    assert explain("Yes, a dog cannot fly.", FLY)["verdict"] == "wrong"
    assert explain("No. Yes.", FLY)["verdict"] == "wrong"


def test_not_knowing_is_right_only_where_nobody_could_know() -> None:
    assert explain("I do not know your name.", NAME)["verdict"] == "right"
    assert explain("You have not told me your name.", NAME)["verdict"] == "right"
    assert explain("Your name is Anna.", NAME)["verdict"] == "wrong"
    assert explain("I do not know your name. Your name is Anna.", NAME)["verdict"] == "wrong"
    assert explain("I do not know that.", COW)["verdict"] == "evasive"


def test_lists() -> None:
    assert explain("A shark and a whale live in the sea.", SEA)["verdict"] == "right"
    assert explain("A shark and a whale.", SEA)["verdict"] == "right"
    assert explain("A shark lives in the sea.", SEA)["verdict"] == "partial"
    assert explain("A shark and a cow live in the sea.", SEA)["verdict"] == "wrong"
    assert explain("A shark and a shark live in the sea.", SEA)["verdict"] == "partial"


def test_near_perfect_needs_everything() -> None:
    assert near_perfect(f"Sure! {PLAIN}", COW)
    assert not near_perfect(PLAIN, COW)
    assert not near_perfect(f"Sure! {PLAIN} Time goes by so fast.", COW)
    assert not near_perfect(f"Sure! {PLAIN}", COW, finished=False)
