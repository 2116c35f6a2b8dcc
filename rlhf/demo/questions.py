"""Questions of the demo world, each with the `task` that says what a right answer must state.

A question is drawn from a family (attribute, yes/no, comparison, list, reverse look-up, recall, unknowable, small talk,
counting), worded by a template and optionally dressed with an opener and a closer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from .asks import Ask, Context, Task, compare_true, percent, predicate, reserved_combo, split_wordings
from .attributes import ATTRIBUTES
from .dressing import Dressing
from .personal import RELATIONS, Relation
from .talk import TIMES, TOPICS
from .world import KIND_NAMES, NUMBERS, Entity, fill, plural_noun, state, with_article

FAMILIES = {
    "attribute": 0.30,
    "yesno": 0.15,
    "compare": 0.08,
    "list": 0.06,
    "reverse": 0.09,
    "recall": 0.08,
    "unknown": 0.08,
    "talk": 0.09,
    "count": 0.07,
}


class Questions(Dressing):
    """Draws questions. With `ood` the wordings and the (entity, attribute) pairs are the reserved ones."""

    def __init__(self, rng: random.Random, *, ood: bool = False) -> None:
        """Keep the random generator, which the caller owns; the same state gives the same questions."""
        super().__init__(rng, ood=ood)
        usable = [combo for combo in self.world.combos if reserved_combo(*combo) == ood]
        self.facts = [c for c in usable if not ATTRIBUTES[c[1]].yes_no and self.world.false_values(*c)]
        self.checks = [c for c in usable if self.world.false_values(*c)]
        self._makers: dict[str, Callable[[Context], Ask | None]] = {
            name: getattr(self, "_" + name) for name in FAMILIES
        }

    def ask(self, context: Context, family: str = "") -> Ask:
        """Return one question that fits the conversation; `family` fixes its kind."""
        while True:
            # Retry within the family: a draw that is not possible must not shift the mix of families.
            name = family or self.rng.choices(list(FAMILIES), list(FAMILIES.values()))[0]
            for _ in range(200):
                made = self._makers[name](context)
                if made is not None:
                    made.task["told"] = {**context.told, **dict(made.told)}
                    return made

    def tell(self, context: Context) -> Ask:
        """Return a turn that only tells a personal fact; the right reply is a kind acknowledgement."""
        relation, param, key = self._relation(context, told=False, tellable=True)
        value = self.rng.choice(relation.values)
        text = self.rng.choice(relation.tells).format(P=param, V=value)
        task: Task = {"type": "talk", "about": "", "topic": "told", "told": {**context.told, key: value}}
        return Ask(self._dress(text, context, after=False), "talk", task, context.entity, ((key, value),))

    def _attribute(self, context: Context) -> Ask | None:
        name, attribute = self._combo(self.facts, context)
        entity = self.world.entities[name]
        subject, plural = self._subject(entity, context)
        row = ATTRIBUTES[attribute]
        core = self._core(row.questions, row.clauses, subject, plural)
        task: Task = {
            "type": "attribute",
            "about": name,
            "attribute": attribute,
            "values": sorted(entity.true[attribute]),
            "plural": plural,
        }
        return self._about(self._follow(core, subject, context), "attribute", task, entity, plural)

    def _yesno(self, context: Context) -> Ask | None:
        name, attribute = self._combo(self.checks, context)
        entity, row = self.world.entities[name], ATTRIBUTES[attribute]
        subject, plural = self._subject(entity, context)
        if row.yes_no:
            value = "yes"
            core = self._core(row.questions, row.clauses, subject, plural)
        else:
            yes = self.rng.random() < 0.5
            value = self.rng.choice(entity.main[attribute] if yes else self.world.false_values(name, attribute))
            if value.startswith("no "):
                return None
            claim = state(self.rng, attribute, value, subject, plural)
            forms = [
                fill(row.check, subject, plural, value),
                fill(row.check, subject, plural, value),
                f"Is it true that {claim}?",
                f"I think that {claim}. Is that right?",
                f"My friend says that {claim}. Is that so?",
                f"Somebody told me that {claim}. Can I believe it?",
                f"Tell me if it is right that {claim}.",
            ]
            core = self.rng.choice(forms[5:] if self.ood else forms[:5])
        task: Task = {
            "type": "yesno",
            "about": name,
            "attribute": attribute,
            "value": value,
            "answer": "yes" if self.world.is_true(name, attribute, value) else "no",
            "plural": plural,
        }
        return self._about(self._follow(core, subject, context), "yesno", task, entity, plural)

    def _about(self, text: str, family: str, task: Task, entity: Entity, plural: bool) -> Ask:
        """Return a question about one entity, which a pronoun can then take up ("it" does not suit a person)."""
        return Ask(text, family, task, "" if entity.kind == "job" and not plural else entity.name, (), plural)

    def _pair(self, kinds: tuple[str, ...]) -> tuple[str, Entity, Entity] | None:
        """Return two entities and what differs between them; a share of all pairs is reserved."""
        relation = self.rng.choice(("bigger", "smaller", "bigger", "smaller", "more legs"))
        pool = [e for e in self.world.entities.values() if e.kind in kinds]
        if relation == "more legs":
            pool = [e for e in pool if "legs" in e.main]
        a, b = self.rng.sample(pool, 2)
        if (percent("pair:" + ":".join(sorted((a.name, b.name)))) < 15) != self.ood:
            return None
        if relation == "more legs":
            return (relation, a, b) if a.main["legs"] != b.main["legs"] else None
        return (relation, a, b) if self.world.bigger(a.name, b.name) is not None else None

    def _compare(self, context: Context) -> Ask | None:
        drawn = self._pair(("animal", "animal", "thing", "food") if self.rng.random() < 0.3 else ("animal",))
        if drawn is None:
            return None
        relation, a, b = drawn
        task: Task = {"type": "compare", "about": "", "relation": relation, "pair": [a.name, b.name]}
        task["answer"] = a.name if compare_true(relation, a.name, b.name) else b.name
        has = f"has {relation}" if relation == "more legs" else f"is {relation}"
        forms = [
            f"Which {has}, {a.one} or {b.one}?",
            f"What {has}, {a.one} or {b.one}?",
            f"Tell me which {has}, {a.one} or {b.one}.",
            f"Who {has}: {a.one} or {b.one}?",
            f"Of {a.one} and {b.one}, which one {has}?",
            f"Take {a.one} and {b.one}. Which of them {has}?",
        ]
        if relation != "more legs" and self.rng.random() < 0.3:
            forms = [f"Is {a.one} {relation} than {b.one}?", f"Is it true that {a.one} is {relation} than {b.one}?"]
            forms += [f"I think that {a.one} is {relation} than {b.one}. Is that right?"]
            forms += [f"Would you say that {a.one} is {relation} than {b.one}?"]
            answer = "yes" if task["answer"] == a.name else "no"
            task = {"type": "yesno", "about": "", "relation": relation, "pair": [a.name, b.name], "answer": answer}
        core = self.rng.choice(forms[-1:] if self.ood else forms[:-1])
        return Ask(self._dress(core, context), "compare", task)

    def _value_pick(self, least: int, most: int) -> tuple[str, str, str, list[str]] | None:
        """Return a (kind, attribute, value) with a suitable number of members, and those members."""
        name, attribute = self.rng.choice(self.checks)
        entity = self.world.entities[name]
        value = self.rng.choice(entity.main[attribute])
        if attribute == "cover" or value == "no" or value.startswith("no "):
            return None
        members = self.world.members(entity.kind, attribute, value)
        if not self.ood:
            members = [member for member in members if not reserved_combo(member, attribute)]
        if not least <= len(members) <= most:
            return None
        return entity.kind, attribute, value, members

    def _list(self, context: Context) -> Ask | None:
        picked = self._value_pick(4, 40)
        if picked is None or picked[0] == "job":
            return None
        kind, attribute, value, _ = picked
        answers = self.world.members(kind, attribute, value, main_only=False)
        others = [e for e in self.world.entities.values() if e.kind == kind and attribute in e.main]
        if len(others) - len(answers) < 3:
            return None
        count = self.rng.choice(("two", "two", "three"))
        that = fill(predicate(attribute, value), "", True, value)
        noun = plural_noun(value) if attribute == "class" else f"{KIND_NAMES[kind][1]} that {that}"
        forms = [
            f"Name {count} {noun}.",
            f"Tell me {count} {noun}.",
            f"Can you name {count} {noun}?",
            f"Which {count} {KIND_NAMES[kind][1]} {that}?",
            f"Give me {count} {noun}.",
            f"I need the names of {count} {noun}.",
        ]
        task: Task = {
            "type": "list",
            "about": "",
            "kind": kind,
            "attribute": attribute,
            "value": value,
            "count": NUMBERS.index(count),
            "answers": answers,
        }
        core = self.rng.choice(forms[-1:] if self.ood else forms[:-1])
        return Ask(self._dress(core, context), "list", task)

    def _reverse(self, context: Context) -> Ask | None:
        picked = self._value_pick(1, 3)
        if picked is None or picked[1] == "class":
            return None
        kind, attribute, value, members = picked
        answers = self.world.members(kind, attribute, value, main_only=False)
        able = [e.name for e in self.world.entities.values() if e.kind == kind and attribute in e.main]
        if set(able) <= set(answers):
            return None
        noun = KIND_NAMES[kind][0]
        that = fill(predicate(attribute, value), "", False, value)
        forms = [
            f"What {noun} {that}?" if kind != "job" else f"Who {that}?",
            f"Which {noun} {that}?",
            f"Name {with_article(noun)} that {that}.",
            f"Tell me {with_article(noun)} that {that}.",
            f"Do you know {with_article(noun)} that {that}?",
            f"I am thinking of {with_article(noun)} that {that}. What could it be?",
        ]
        task: Task = {
            "type": "reverse",
            "about": "",
            "kind": kind,
            "attribute": attribute,
            "value": value,
            "answers": answers,
        }
        core = self.rng.choice(forms[-1:] if self.ood else forms[:-1])
        entity = members[0] if len(answers) == 1 and kind != "job" else ""
        return Ask(self._dress(core, context), "reverse", task, entity)

    def _relation(self, context: Context, *, told: bool, tellable: bool) -> tuple[Relation, str, str]:
        """Return a relation with its parameter, told already or not."""
        while True:
            relation = self.rng.choice(list(RELATIONS.values()))
            param = self.rng.choice(relation.params)
            key = f"{relation.name}:{param}"
            if (key in context.told) == told and (relation.tells or not tellable):
                return relation, param, key

    def _recall(self, context: Context) -> Ask | None:
        text = ""
        told: tuple[tuple[str, str], ...] = ()
        if context.told and self.rng.random() < 0.9:
            key = self.rng.choice(sorted(context.told))
            name, _, param = key.partition(":")
            relation, value = RELATIONS[name], context.told[key]
        else:
            relation, param, key = self._relation(context, told=False, tellable=True)
            value = self.rng.choice(relation.values)
            tells, told = [self.rng.choice(relation.tells).format(P=param, V=value)], ((key, value),)
            extra = self._extra_tell(context, relation)
            if extra is not None:
                tells.insert(self.rng.randrange(2), extra[0])
                told += (extra[1],)
            text = " ".join(tells) + " "
        core = text + self._personal_core(relation, param)
        task: Task = {"type": "recall", "about": "", "relation": relation.name, "param": param, "value": value}
        return Ask(self._dress(core, context), "recall", task, "", told)

    def _extra_tell(self, context: Context, relation: Relation) -> tuple[str, tuple[str, str]] | None:
        """Return, in some cases, a second fact that is not asked for, so that recall is more than copying."""
        other, param, key = self._relation(context, told=False, tellable=True)
        if other.name == relation.name or self.rng.random() < 0.6:
            return None
        value = self.rng.choice(other.values)
        return self.rng.choice(other.tells).format(P=param, V=value), (key, value)

    def _personal_core(self, relation: Relation, param: str) -> str:
        if self.rng.random() < 0.65:
            return self.rng.choice(split_wordings(relation.questions, self.ood)).format(P=param)
        return self._wrap(relation.clause.format(P=param))

    def _unknown(self, context: Context) -> Ask | None:
        relation, param, _ = self._relation(context, told=False, tellable=False)
        core = self._personal_core(relation, param)
        task: Task = {"type": "unknown", "about": "", "relation": relation.name, "param": param}
        return Ask(self._dress(core, context), "unknown", task)

    def _talk(self, context: Context) -> Ask | None:
        topic = self.rng.choice([topic for topic in TOPICS.values() if topic.says])
        if topic.name in ("greet", "self") and context.turn:
            return None
        text = self.rng.choice(topic.reserved if self.ood else topic.says)
        time = self.rng.choice(("", "", *TIMES))
        text = re.sub(r" \{T\}", f" {time}" if time else "", text)
        task: Task = {"type": "talk", "about": "", "topic": topic.name}
        dressed = text if topic.name in ("greet", "bye", "thanks") else self._dress(text, context, after=False)
        return Ask(dressed, "talk", task)

    def _count(self, context: Context) -> Ask | None:
        if self.rng.random() < 0.35:
            a, b = self.rng.randint(1, 9), self.rng.randint(1, 9)
            if (percent(f"sum:{a}:{b}") < 15) != self.ood:
                return None
            first, second = NUMBERS[a], NUMBERS[b]
            forms = [f"What is {first} plus {second}?", f"How much is {first} plus {second}?"]
            forms += [f"Can you add {first} and {second}?", f"What do {first} and {second} make?"]
            task: Task = {"type": "sum", "about": "", "terms": [first, second], "answer": NUMBERS[a + b]}
            core = self.rng.choice(forms[-1:] if self.ood else forms[:-1])
            return Ask(self._dress(core, context), "count", task)
        name, part = self.rng.choice([c for c in self.world.combos if c[1] in ("legs", "wheels")])
        entity, n = self.world.entities[name], self.rng.choice((2, 2, 3, 4))
        each = NUMBERS.index(entity.main[part][0].split()[0].replace("no", "zero"))
        if not each or n * each > 24 or (percent(f"many:{name}:{n}") < 15) != self.ood:
            return None
        many = f"{NUMBERS[n]} {entity.plural}"
        forms = [f"How many {part} do {many} have?", f"How many {part} are there on {many}?"]
        forms += [f"Count the {part} of {many}.", f"What number of {part} do {many} have together?"]
        task = {"type": "count", "about": name, "part": part, "n": NUMBERS[n], "answer": NUMBERS[n * each]}
        core = self.rng.choice(forms[-1:] if self.ood else forms[:-1])
        return Ask(self._dress(core, context), "count", task, name, (), True)
