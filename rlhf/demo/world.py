"""The knowledge base and how its facts are put into words.

`World` answers three questions for everybody else: what is true, what could plausibly be said instead, and how a fact
is worded. Truth has two layers: the main values, which the writers use, and further values that are also true and that
the judge must not call wrong.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache

from .animals import ANIMALS
from .attributes import ATTRIBUTES, Attribute
from .goods import DRINKS, FOODS, JOBS, PLANTS, THINGS

_NUMBER_WORDS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty twenty-one twenty-two twenty-three twenty-four
"""
NUMBERS = tuple(_NUMBER_WORDS.split())
KIND_NAMES = {
    "animal": ("animal", "animals"),
    "food": ("food", "foods"),
    "drink": ("drink", "drinks"),
    "plant": ("plant", "plants"),
    "thing": ("thing", "things"),
    "job": ("person", "people"),
}
# Kinds that share their pool of plausible values.
_GROUP = {"drink": "food", "plant": "food"}
_CHOICE = re.compile(r"\[([^|\]]*)\|([^\]]*)\]")
# Words after which a subject slot is really an object ("where I can find them").
_OBJECT = re.compile(r"\b(find|meet|see|of|on|in|with|keep|for|make|need|covers) \{S\}")
_PLURAL_NOUNS = {"fish": "fish", "piece of furniture": "pieces of furniture"}


@dataclass(frozen=True)
class Entity:
    """One thing of the world; `plural` is empty for words that have none (bread)."""

    name: str
    plural: str
    kind: str
    level: int
    main: dict[str, tuple[str, ...]]
    true: dict[str, frozenset[str]]

    @property
    def one(self) -> str:
        """Return the entity as a singular subject: "a cow", "an owl", "bread"."""
        return with_article(self.name) if self.plural else self.name


def with_article(noun: str) -> str:
    """Return the noun with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeio' or noun.startswith('umb') else 'a'} {noun}"


def plural_noun(noun: str) -> str:
    """Return the plural of a class word ("mammal" -> "mammals")."""
    return _PLURAL_NOUNS.get(noun, noun + "s")


def third_person(phrase: str) -> str:
    """Conjugate the first verb of a phrase: "bake bread" -> "bakes bread"."""
    verb, _, rest = phrase.partition(" ")
    if verb.endswith(("ch", "sh", "s")):
        verb += "es"
    elif verb.endswith("y") and verb[-2] not in "aeiou":
        verb = verb[:-1] + "ies"
    else:
        verb += "s"
    return f"{verb} {rest}".strip()


def conjugate(template: str, plural: bool) -> str:
    """Resolve every `[singular|plural]` choice."""
    return _CHOICE.sub(lambda match: match.group(2 if plural else 1), template)


def fill(template: str, subject: str, plural: bool, value: str = "") -> str:
    """Word a template: number agreement, subject, value in the three forms the markup knows."""
    text = conjugate(template, plural)
    if subject == "they":
        text = _OBJECT.sub(r"\1 them", text)
    text = text.replace("{S}", subject)
    if "{A}" in text:
        text = text.replace("{A}", plural_noun(value) if plural else with_article(value))
    if "{D}" in text:
        text = text.replace("{D}", value if plural else third_person(value))
    return text.replace("{V}", value)


def sentence(text: str, end: str = ".") -> str:
    """Return the sentence with an upper-case first letter and a final mark, unless it has one."""
    return text[0].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else end)


def join_words(words: list[str]) -> str:
    """Return a list in words: "a", "a and b", "a, b and c"."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _parse(table: str, kind: str) -> list[Entity]:
    found = []
    for line in table.strip().splitlines():
        name, plural, level, *facts = (part.strip() for part in line.split("|"))
        main: dict[str, tuple[str, ...]] = {}
        true: dict[str, frozenset[str]] = {}
        for fact in facts:
            key, _, values = fact.partition("=")
            first, _, more = values.partition(";")
            main[key] = tuple(value.strip() for value in first.split(","))
            true[key] = frozenset(main[key]) | {value.strip() for value in more.split(",") if value.strip()}
        if kind == "animal" and (int(level) <= 3 or int(level) >= 8):
            main["size"] = ("small" if int(level) <= 3 else "big",)
            true["size"] = frozenset(main["size"])
        found.append(Entity(name, "" if plural == "-" else plural, kind, int(level), main, true))
    return found


class World:
    """All entities, with look-ups by attribute and value. Immutable after construction."""

    def __init__(self) -> None:
        """Parse the tables and index them."""
        tables = {"animal": ANIMALS, "food": FOODS, "drink": DRINKS, "plant": PLANTS, "thing": THINGS, "job": JOBS}
        rows = [entity for kind, table in tables.items() for entity in _parse(table, kind)]
        self.entities: dict[str, Entity] = {entity.name: entity for entity in rows}
        self.combos: list[tuple[str, str]] = [(e.name, a) for e in rows for a in ATTRIBUTES if a in e.main]
        self.pools: dict[tuple[str, str], list[str]] = {}
        self.values: dict[str, list[str]] = {}
        for name, attribute in self.combos:
            entity = self.entities[name]
            pool = self.pools.setdefault((_GROUP.get(entity.kind, entity.kind), attribute), [])
            pool.extend(value for value in entity.main[attribute] if value not in pool)
            every = self.values.setdefault(attribute, [])
            every.extend(value for value in sorted(entity.true[attribute]) if value not in every)

    def is_true(self, entity: str, attribute: str, value: str) -> bool:
        """Return whether `value` holds, main or additional."""
        return value in self.entities[entity].true.get(attribute, frozenset())

    def false_values(self, entity: str, attribute: str) -> list[str]:
        """Return values of the same kind of thing that do not hold here: the plausible mistakes."""
        if ATTRIBUTES[attribute].yes_no:
            return ["no" if "yes" in self.entities[entity].true[attribute] else "yes"]
        kind = self.entities[entity].kind
        pool = self.pools[(_GROUP.get(kind, kind), attribute)]
        return [value for value in pool if not self.is_true(entity, attribute, value)]

    def members(self, kind: str, attribute: str, value: str, *, main_only: bool = True) -> list[str]:
        """Return entities of a kind that have the value (as a main value, or at all)."""
        return [
            e.name
            for e in self.entities.values()
            if e.kind == kind
            and attribute in e.main
            and value in (e.main[attribute] if main_only else e.true[attribute])
        ]

    def bigger(self, first: str, second: str) -> bool | None:
        """Return whether `first` is clearly bigger; None when they are too close to call or have no size."""
        a, b = self.entities[first], self.entities[second]
        if not a.level or not b.level or a.kind != b.kind or abs(a.level - b.level) < 2:
            return None
        return a.level > b.level


def statement_templates(attribute: Attribute, value: str) -> list[str]:
    """Return every full-sentence template that says `value`, subject included."""
    if attribute.yes_no:
        return [f"{{S}} {text}" for text in (attribute.predicates if value == "yes" else attribute.negations)]
    predicates = attribute.predicates
    if value.startswith("no ") or (attribute.name == "class" and " of " in value):
        predicates = predicates[:1]
    return [f"{{S}} {text}" for text in predicates] + list(attribute.frames)


def state(rng: random.Random, attribute: str, value: str, subject: str, plural: bool) -> str:
    """Return one random wording of (subject, attribute, value), without final mark or capital."""
    options = statement_templates(ATTRIBUTES[attribute], value)
    if subject in ("it", "they"):
        options = [option for option in options if option.startswith("{S}")]
    # The first wording is the plainest one; it should be the most common too.
    template = options[0] if rng.random() < 0.4 else rng.choice(options)
    return fill(template, subject, plural, value)


def pick_subject(rng: random.Random, entity: Entity, *, pronoun: float = 0.0, many: bool = False) -> tuple[str, bool]:
    """Return a subject form and whether it is plural; `many` says which pronoun fits what was said before."""
    if rng.random() < pronoun and (many or entity.kind != "job"):
        return ("they", True) if many else ("it", False)
    if not entity.plural:
        return entity.name, False
    draw = rng.random()
    if draw < 0.6:
        return entity.one, False
    return (entity.plural, True) if draw < 0.85 else (f"the {entity.name}", False)


@lru_cache(maxsize=1)
def world() -> World:
    """Return the only world; it is parsed once."""
    return World()
