"""The judge's grammar is the inverse of the writers' templates."""

from __future__ import annotations

import pytest

from rlhf.demo import phrases
from rlhf.demo.attributes import ATTRIBUTES
from rlhf.demo.gold import explain
from rlhf.demo.grammar import Claim, read_sentence
from rlhf.demo.personal import HONEST, HONEST_UNTOLD, RELATIONS
from rlhf.demo.talk import TOPICS
from rlhf.demo.world import World, fill, statement_templates, world


def forms(name: str, known: World) -> list[tuple[str, bool]]:
    """Subject forms of an entity with their number."""
    entity = known.entities[name]
    if not entity.plural:
        return [(entity.name, False)]
    return [(entity.one, False), (f"the {entity.name}", False), (entity.plural, True)]


def test_every_statement_reads_back_as_what_it_says(subtests: pytest.Subtests) -> None:
    for attribute in list(ATTRIBUTES):
        with subtests.test(attribute=attribute):
            known, checked = world(), 0
            for name, key in known.combos:
                if key != attribute:
                    continue
                values = [*known.entities[name].main[key], *known.false_values(name, key)[:2]]
                for value in values:
                    for template in statement_templates(ATTRIBUTES[key], value):
                        for subject, plural in forms(name, known):
                            text = fill(template, subject, plural, value).lower()
                            assert (Claim("fact", key, name, value),) in read_sentence(text), text
                            checked += 1
            assert checked > 0


def test_every_denial_reads_back_as_a_denial(subtests: pytest.Subtests) -> None:
    for attribute in [name for name, row in ATTRIBUTES.items() if not row.yes_no]:
        with subtests.test(attribute=attribute):
            known = world()
            for name, key in known.combos:
                if key != attribute:
                    continue
                for value in known.false_values(name, key)[:2]:
                    for template in ATTRIBUTES[key].negations:
                        text = fill(f"{{S}} {template}", known.entities[name].one, False, value)
                        assert (Claim("fact", key, name, value, False),) in read_sentence(text), text


def test_pronouns_stay_pronouns() -> None:
    assert read_sentence("it eats grass") == ((Claim("fact", "food", "it", "grass"),),)
    assert read_sentence("they eat grass") == ((Claim("fact", "food", "it", "grass"),),)


def test_series_are_split() -> None:
    both = (Claim("fact", "home", "shark", "in the sea"), Claim("fact", "home", "whale", "in the sea"))
    assert both in read_sentence("a shark and a whale live in the sea")
    assert both in read_sentence("two animals that live in the sea are a shark and a whale")
    assert (Claim("fact", "colour", "zebra", "black and white"),) in read_sentence("a zebra is black and white")
    joined = (Claim("fact", "food", "cow", "grass"), Claim("fact", "home", "cow", "on a farm"))
    assert joined in read_sentence("a cow eats grass and lives on a farm")


def test_personal_statements_and_admissions_read_back() -> None:
    for relation in RELATIONS.values():
        for param in relation.params:
            for answer in relation.answers:
                for value in relation.values:
                    text = answer.format(P=param, V=value).lower()
                    assert (Claim("personal", relation.name, param, value.lower()),) in read_sentence(text), text
            for template in HONEST + HONEST_UNTOLD:
                text = template.format(O=relation.object.format(P=param)).lower()
                assert (Claim("honest", relation.name, param, ""),) in read_sentence(text), text


def test_what_is_not_a_statement_is_not_read(subtests: pytest.Subtests) -> None:
    for text in [
        "a cow grass eats",
        "cow the sea in",
        "what does a cow eat",
        "a cow eats grass grass",
        "a cow eats in the sea",
        "a unicorn eats grass",
        "of of of",
        "is it true that a cow eats grass",
    ]:
        with subtests.test(text=text):
            assert read_sentence(text) == ()


def test_manner_sentences_belong_to_one_list_only() -> None:
    lists = {
        "polite": phrases.OPENINGS + phrases.CLOSINGS + phrases.TALK_TOUCHES,
        "rude": tuple(sorted({*phrases.RUDE_FRONT, *phrases.RUDE_BACK, *phrases.RUDE_TALK})),
        "evasive": phrases.EVASIVE,
        "filler": phrases.FILLER,
        "kind": tuple(text for topic in TOPICS.values() for text in topic.replies),
    }
    every = [text for texts in lists.values() for text in texts]
    assert len(set(every)) == len(every)
    task = {"type": "attribute", "about": "cow", "attribute": "food", "values": ["grass"]}
    for name, column in (("polite", "polite"), ("rude", "rude"), ("filler", "off_topic"), ("kind", "off_topic")):
        for text in lists[name]:
            assert explain(text, task)[column] == 1, text
    assert all(explain(text, task)["verdict"] == "evasive" for text in phrases.EVASIVE)
