"""Plain English paragraphs about the world: descriptions, comparisons, lists, counting, and small stories.

Every fact is stated many times, in different words and surroundings, because a small model learns a fact from its
paraphrases and not from one sentence. Facts that questions never ask about in training are stated here like all others.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from . import phrases
from .asks import Context, compare_true, held_out, predicate
from .attributes import ATTRIBUTES
from .personal import NAMES, PET_NAMES
from .questions import Questions
from .replies import Manner, Writer
from .talk import TOPICS
from .world import KIND_NAMES, NUMBERS, Entity, fill, join_words, pick_subject, sentence, state, world

_GIRLS = ("Anna", "Mary", "Lisa", "Emma", "Nora", "Ida")


class Corpus:
    """Draws paragraphs from one random generator."""

    def __init__(self, rng: random.Random) -> None:
        """Keep the random generator, which the caller owns."""
        self.rng, self.world, self._many = rng, world(), False
        self.writer, self.questions = Writer(rng), Questions(rng)
        self.names = list(self.world.entities)
        self.animals = [entity for entity in self.world.entities.values() if entity.kind == "animal"]
        self._makers: list[tuple[Callable[[], str], float]] = [
            (self._true_or_false, 0.40),
            (self._describe, 0.19),
            (self._contrast, 0.10),
            (self._group, 0.08),
            (self._counting, 0.04),
            (self._belief, 0.03),
            (self._lesson, 0.04),
            (self._visit, 0.06),
            (self._person, 0.03),
            (self._mood, 0.03),
        ]

    def paragraph(self) -> str:
        """Return one paragraph of two to seven sentences."""
        makers, weights = zip(*self._makers, strict=True)
        while True:
            text = self.rng.choices(makers, weights)[0]()
            if text:
                return text

    def _fact(self, entity: Entity, attribute: str, *, pronoun: float = 0.0) -> str:
        """Return one statement; a pronoun agrees with the last subject that was not one."""
        subject, plural = pick_subject(self.rng, entity, pronoun=pronoun, many=self._many)
        self._many = plural
        return state(self.rng, attribute, self._value(entity, attribute), subject, plural)

    def _value(self, entity: Entity, attribute: str) -> str:
        values = entity.main[attribute]
        if attribute == "food" and len(values) > 1 and self.rng.random() < 0.3:
            return join_words(self.rng.sample(list(values), 2))
        return self.rng.choice(values)

    def _describe(self) -> str:
        """Return several facts about one entity."""
        rng = self.rng
        entity = self.world.entities[rng.choice(self.names)]
        known = rng.sample(sorted(entity.main), min(len(entity.main), rng.randint(3, 6)))
        sentences: list[str] = []
        while known:
            attribute = known.pop()
            pronoun = 0.55 if sentences else 0.0
            text = self._fact(entity, attribute, pronoun=pronoun)
            if known and rng.random() < 0.25:
                text += self._and_also(entity, known.pop(), text)
            sentences.append(sentence(text))
        return " ".join(sentences)

    def _and_also(self, entity: Entity, attribute: str, text: str) -> str:
        """Return a continuation such as " and lives on a farm" that agrees with the subject of `text`."""
        value = self._value(entity, attribute)
        subjects = (f"the {entity.name} ", f"{entity.one} ", f"{entity.plural or entity.one} ", "it ", "they ")
        if text.startswith(subjects):
            return " and " + fill(predicate(attribute, value), "", self._many, value)
        return ", and " + self._fact(entity, attribute)

    def _contrast(self) -> str:
        """Return a paragraph on two entities of a kind: which is bigger, what they share, where they differ."""
        rng = self.rng
        first = self.world.entities[rng.choice(self.names)] if rng.random() < 0.4 else rng.choice(self.animals)
        others = [e for e in self.world.entities.values() if e.kind == first.kind and e is not first]
        second = rng.choice(others)
        found: list[str] = []
        if self.world.bigger(first.name, second.name) is not None:
            a, b = (first, second) if self.world.bigger(first.name, second.name) else (second, first)
            found.append(self.writer.compared(*rng.choice([("bigger", a.name, b.name), ("smaller", b.name, a.name)])))
        if compare_true("more legs", first.name, second.name):
            found.append(f"{first.one} has more legs than {second.one}")
        for attribute in [name for name in ATTRIBUTES if name in first.main and name in second.main]:
            found.append(self._pair(first, second, attribute))
        found = [text for text in found if text]
        chosen = rng.sample(found, min(len(found), rng.randint(2, 4)))
        return " ".join(sentence(text) for text in chosen) if len(chosen) > 1 else ""

    def _pair(self, first: Entity, second: Entity, attribute: str) -> str:
        """Return one sentence that relates both entities through an attribute."""
        rng = self.rng
        a, b = rng.choice(first.main[attribute]), rng.choice(second.main[attribute])
        if a == b:
            both = (
                f"both {first.one} and {second.one}"
                if rng.random() < 0.5 and not a.startswith("no")
                else f"{first.one} and {second.one}"
            )
            return f"{both} {fill(predicate(attribute, a), '', True, a)}"
        left = state(rng, attribute, a, first.one, False)
        right = state(rng, attribute, b, second.one, False)
        return f"{left}, {rng.choice(('but', 'and', 'while'))} {right}"

    def _group(self) -> str:
        """Return a paragraph on entities that share a value, and perhaps one that does not."""
        rng = self.rng
        name, attribute = rng.choice(self.world.combos)
        kind = self.world.entities[name].kind
        value = rng.choice(self.world.entities[name].main[attribute])
        members = self.world.members(kind, attribute, value)
        if len(members) < 2:
            fact = sentence(self._fact(self.world.entities[name], attribute))
            return f"{fact} {self._only(name, kind, attribute, value)}"
        that = fill(predicate(attribute, value), "", True, value)
        some = [self.world.entities[member].one for member in rng.sample(members, min(len(members), rng.randint(2, 4)))]
        sentences = [sentence(f"{join_words(some)} {that}")]
        if rng.random() < 0.5:
            word = rng.choice(("some", "many")) if len(members) > 3 else "some"
            sentences.insert(0, sentence(f"{word} {KIND_NAMES[kind][1]} {that}"))
        if rng.random() < 0.3:
            count = NUMBERS[min(2, len(some))]
            two = join_words(some[: min(2, len(some))])
            sentences.append(sentence(f"{count} {KIND_NAMES[kind][1]} that {that} are {two}"))
        outside = [e for e in self._others(kind, attribute) if not self.world.is_true(e.name, attribute, value)]
        if outside and not ATTRIBUTES[attribute].yes_no and not value.startswith("no "):
            odd = rng.choice(outside)
            sentences.append(sentence(fill("{S} " + ATTRIBUTES[attribute].negations[0], odd.one, False, value)))
        return " ".join(sentences)

    def _others(self, kind: str, attribute: str) -> list[Entity]:
        return [e for e in self.world.entities.values() if e.kind == kind and attribute in e.main]

    def _only(self, name: str, kind: str, attribute: str, value: str) -> str:
        that = fill(predicate(attribute, value), "", False, value)
        return sentence(f"the {KIND_NAMES[kind][0]} that {that} is {self.world.entities[name].one}")

    def _counting(self) -> str:
        """Return a paragraph that counts legs or wheels, or adds small numbers."""
        rng = self.rng
        if rng.random() < 0.4:
            pairs = [(rng.randint(1, 9), rng.randint(1, 9)) for _ in range(3)]
            forms = ("{} plus {} is {}", "{} and {} make {}")
            return " ".join(
                sentence(rng.choice(forms).format(NUMBERS[a], NUMBERS[b], NUMBERS[a + b])) for a, b in pairs
            )
        name, part = rng.choice([c for c in self.world.combos if c[1] in ("legs", "wheels")])
        entity = self.world.entities[name]
        each = NUMBERS.index(entity.main[part][0].split()[0].replace("no", "zero"))
        if not each:
            return ""
        sentences = [sentence(f"one {name} has {entity.main[part][0]}")]
        for n in (2, 3, 4):
            if n * each <= 24:
                tail = rng.choice(("", " in all", " together"))
                sentences.append(sentence(f"{NUMBERS[n]} {entity.plural} have {NUMBERS[n * each]} {part}{tail}"))
        return " ".join(sentences)

    def _true_or_false(self) -> str:
        """Return a game: statements followed by whether they are true, or yes-no questions followed by their answers.

        Nothing else tests so many facts in so few words: a model learns to state facts elsewhere and to check them
        here.
        """
        rng = self.rng
        ask = rng.random() < 0.4
        found = []
        for _ in range(rng.randint(6, 10)):
            true = rng.random() < 0.5
            text = self._checked(true) if ask else self._compared(true) if rng.random() < 0.15 else self._claim(true)
            if text:
                verdict = ("Yes" if true else "No") if ask else ("Right" if true else "Wrong")
                found.append(f"{sentence(text)} {verdict}.")
        return " ".join(
            [rng.choice(("A little game.", "Do you know it?") if ask else ("Right or wrong?", "A game.")), *found]
        )

    def _claim(self, true: bool) -> str:
        """Return a true or false statement about one entity, sometimes worded as a denial."""
        rng = self.rng
        name, attribute = rng.choice(self.world.combos)
        entity, wrong = self.world.entities[name], self.world.false_values(name, attribute)
        if not wrong:
            return ""
        row, (subject, plural) = ATTRIBUTES[attribute], pick_subject(rng, entity)
        deny = not row.yes_no and rng.random() < 0.2
        value = self._value(entity, attribute) if true != deny else rng.choice(wrong)
        if deny and not value.startswith("no "):
            return fill("{S} " + rng.choice(row.negations), subject, plural, value)
        return "" if deny else state(rng, attribute, value, subject, plural)

    def _checked(self, true: bool) -> str:
        """Return a yes-no question about one entity that no evaluation prompt asks."""
        rng = self.rng
        name, attribute = rng.choice(self.world.combos)
        entity, wrong = self.world.entities[name], self.world.false_values(name, attribute)
        if not wrong or ATTRIBUTES[attribute].yes_no:
            return ""
        value = rng.choice(entity.main[attribute] if true else wrong)
        subject, plural = pick_subject(rng, entity)
        text = fill(ATTRIBUTES[attribute].check, subject, plural, value)
        return "" if held_out(text) or value.startswith("no ") else text

    def _compared(self, true: bool) -> str:
        """Return a true or false comparison of two animals."""
        first, second = self.rng.sample(self.animals, 2)
        bigger = self.world.bigger(first.name, second.name)
        if bigger is None:
            return ""
        relation = "bigger" if bigger == true else "smaller"
        return self.writer.compared(relation, first.name, second.name)

    def _belief(self) -> str:
        """Return a false belief and its correction."""
        rng = self.rng
        name, attribute = rng.choice(self.world.combos)
        entity, wrong = self.world.entities[name], self.world.false_values(name, attribute)
        if not wrong:
            return ""
        value = rng.choice(wrong)
        who = rng.choice((*NAMES, "my friend", "somebody"))
        believes = rng.choice(("thinks", "says", "believes"))
        belief = f"{who} {believes} that {state(rng, attribute, value, entity.one, False)}"
        verdict = rng.choice(("that is wrong", "that is not true", "that is not right"))
        sentences = [sentence(belief), sentence(verdict), sentence(self._fact(entity, attribute))]
        if rng.random() < 0.3 and not ATTRIBUTES[attribute].yes_no and not value.startswith("no "):
            negation = fill("{S} " + ATTRIBUTES[attribute].negations[0], entity.one, False, value)
            sentences.insert(2, sentence(negation))
        return " ".join(sentences)

    def _lesson(self) -> str:
        """Return a paragraph in which somebody asks and somebody answers."""
        rng = self.rng
        found: list[str] = []
        context = Context(turn=1)
        for _ in range(rng.randint(1, 3)):
            ask = self.questions.ask(context, rng.choice(("attribute", "yesno", "reverse", "compare", "count")))
            if held_out(ask.text) or "?" not in ask.text:
                continue
            asker, teller = rng.sample(NAMES, 2)
            verb = rng.choice(("says", "answers", "tells " + ("her" if asker in _GIRLS else "him")))
            found.append(f"{asker} asks: {ask.text} {teller} {verb}: {self.writer.reply(ask.task, Manner())}")
            context.advance(ask)
        return " ".join(found)

    def _visit(self) -> str:
        """Return a walk or a visit during which things are seen and facts remembered."""
        rng = self.rng
        person = rng.choice(NAMES)
        he = "she" if person in _GIRLS else "he"
        seen = rng.sample([e for e in self.world.entities.values() if e.plural], rng.randint(2, 3))
        start = rng.choice(
            (
                f"{person} goes for a walk",
                f"{person} looks at a book about the world",
                f"{person} draws some pictures",
                f"{person} tells a story to a friend",
                f"{person} is at school",
            )
        )
        sentences = [sentence(start)]
        for entity in seen:
            verb = rng.choice(("thinks of", "talks about", "likes", "knows a lot about", "dreams of"))
            sentences.append(sentence(f"{he} {verb} {entity.one}"))
            self._many = False
            for attribute in rng.sample(sorted(entity.main), min(2, len(entity.main))):
                sentences.append(sentence(self._fact(entity, attribute, pronoun=0.4)))
        if rng.random() < 0.4:
            sentences.append(sentence(rng.choice((f"then {he} goes home", f"{he} is happy", f"{he} learned a lot"))))
        return " ".join(sentences)

    def _person(self) -> str:
        """Return a paragraph that introduces a person: name, age, home, pet, favourite things."""
        rng = self.rng
        person = rng.choice(NAMES)
        he, his = ("she", "her") if person in _GIRLS else ("he", "his")
        pet = rng.choice(("cat", "dog", "rabbit", "horse", "duck"))
        facts = [
            f"{he} is {rng.choice(NUMBERS[6:17])} years old",
            f"{he} lives {rng.choice(('in a small village', 'in a big city', 'near the sea', 'near the forest'))}",
            f"{his} {pet} is called {rng.choice(PET_NAMES)}",
            f"{his} favourite colour is {rng.choice(('red', 'blue', 'green', 'yellow', 'black', 'white'))}",
            f"{his} favourite food is {rng.choice(('bread', 'cheese', 'rice', 'honey', 'soup', 'fish'))}",
            f"{his} best friend is {rng.choice([name for name in NAMES if name != person])}",
            f"{he} has {rng.choice(NUMBERS[2:10])} {rng.choice(('apples', 'books', 'pens', 'balls'))}",
        ]
        entity = self.world.entities[pet]
        facts.append(state(rng, "food", self._value(entity, "food"), f"the {pet}", False))
        chosen = rng.sample(facts, rng.randint(3, 5))
        return " ".join([f"My friend is called {person}.", *(sentence(text) for text in chosen)])

    def _mood(self) -> str:
        """Return a paragraph in which somebody says how things are, and a friend answers kindly."""
        rng = self.rng
        topic = rng.choice([topic for topic in TOPICS.values() if topic.says and topic.name != "self"])
        said = rng.choice(topic.says).replace(" {T}", rng.choice(("", " today", " now")))
        if held_out(said):
            return ""
        one, other = rng.sample(NAMES, 2)
        touch = " " + rng.choice(phrases.CLOSINGS[1:3]) if rng.random() < 0.2 else ""
        return f"{one} says: {said} {other} answers: {sentence(rng.choice(topic.replies))}{touch}"
