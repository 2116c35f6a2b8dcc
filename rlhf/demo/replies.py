"""The reply writer: a reply to a task with explicit quality knobs.

A reply is an answer (right, wrong, evasive or missing) plus manner: politeness, rudeness, rambling, repetition, an
abrupt end. Each defect is drawn independently, so that all mixtures occur and none of them stands for another.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from . import phrases
from .asks import Task, compare_true, predicate, reserved_combo
from .attributes import ATTRIBUTES
from .personal import HONEST, HONEST_UNTOLD, RELATIONS
from .talk import TOPICS
from .world import KIND_NAMES, NUMBERS, fill, join_words, pick_subject, sentence, state, world


@dataclass(frozen=True)
class Manner:
    """Knobs of one reply. `answer` is right, wrong, evasive or off."""

    answer: str = "right"
    polite: int = 0
    rude: int = 0
    ramble: int = 0
    repeat: int = 0
    cut: bool = False
    bare: bool = False

    def defects(self) -> list[str]:
        """Return what a user could complain about, in the words of `phrases.REACTIONS`."""
        found = {
            "wrong": self.answer == "wrong",
            "evasive": self.answer in ("evasive", "off"),
            "rude": self.rude > 0,
            "rambling": self.ramble > 0 and self.answer != "off",
            "repeated": self.repeat > 0,
            "cut": self.cut,
        }
        return [name for name, present in found.items() if present]


class Writer:
    """Writes replies with a random generator owned by the caller."""

    def __init__(self, rng: random.Random) -> None:
        """Keep the random generator, which the caller owns."""
        self.rng, self.world, self._pronoun = rng, world(), 0.0

    def reply(self, task: Task, manner: Manner) -> str:
        """Return the reply to a task in the given manner."""
        rng = self.rng
        side = [self._ramble(task) for _ in range(max(manner.ramble, int(manner.answer == "off")))]
        ahead = 0 if rng.random() < 0.85 else 1
        # After a sentence about something else, "it" would mean the wrong thing.
        body = self._answer(task, manner, pronoun=0.0 if ahead and side else 0.25)
        middle = side[:ahead] + body + side[ahead:]
        for _ in range(manner.repeat):
            if middle:
                middle.insert(rng.randrange(1, len(middle) + 1), rng.choice(body or middle))
        front, back = self._manners(manner, talk=task["type"] == "talk")
        parts = front + middle + back
        text = " ".join(parts)
        return self._cut(text) if manner.cut else text

    def _manners(self, manner: Manner, *, talk: bool) -> tuple[list[str], list[str]]:
        """Return polite and rude sentences for the beginning and the end."""
        rng = self.rng
        front: list[str] = []
        back: list[str] = []
        openings, closings = list(phrases.OPENINGS), list(phrases.TALK_TOUCHES if talk else phrases.CLOSINGS)
        rng.shuffle(openings)
        rng.shuffle(closings)
        for index in range(manner.polite):
            if (rng.random() < 0.5) == (index != 1) and not talk:
                front.append(openings.pop())
            else:
                back.append(closings.pop())
        rude_front, rude_back = list(phrases.RUDE_TALK if talk else phrases.RUDE_FRONT), list(phrases.RUDE_BACK)
        for _ in range(manner.rude):
            if rng.random() < 0.6:
                front.append(rude_front.pop(rng.randrange(len(rude_front))))
            else:
                back.append(rude_back.pop(rng.randrange(len(rude_back))))
        return front, back

    def _cut(self, text: str) -> str:
        """Cut a reply off in the middle of its last sentences."""
        words = text.split()
        keep = self.rng.randint(max(1, len(words) // 2), max(1, len(words) - 1))
        return " ".join(words[:keep]).rstrip(".!?,")

    def _answer(self, task: Task, manner: Manner, pronoun: float) -> list[str]:
        if manner.answer == "off":
            return []
        if manner.answer == "evasive":
            return [self.rng.choice(phrases.EVASIVE)]
        right, self._pronoun = manner.answer == "right", pronoun
        text = getattr(self, "_answer_" + task["type"])(task, right, manner.bare)
        return [sentence(text)]

    def _answer_attribute(self, task: Task, right: bool, bare: bool) -> str:
        entity, attribute = self.world.entities[task["about"]], task["attribute"]
        values = entity.main[attribute] if right else self.world.false_values(entity.name, attribute)
        value = self.rng.choice(values)
        if right and attribute == "food" and len(values) > 1 and self.rng.random() < 0.35:
            value = join_words(self.rng.sample(list(values), 2))
        if bare and attribute not in ("class", "does"):
            return value
        subject, plural = pick_subject(self.rng, entity, pronoun=self._pronoun, many=task["plural"])
        return state(self.rng, attribute, value, subject, plural)

    def _answer_yesno(self, task: Task, right: bool, bare: bool) -> str:
        stance = task["answer"] if right else {"yes": "no", "no": "yes"}[task["answer"]]
        word = stance.capitalize()
        if bare:
            return word if self.rng.random() < 0.6 else f"{word}, that is {'not ' if stance == 'no' else ''}true"
        if "pair" in task:
            relation, (a, b) = task["relation"], task["pair"]
            if stance == "no" and self.rng.random() < 0.6:
                a, b = b, a
            elif stance == "no":
                relation = {"bigger": "smaller", "smaller": "bigger"}[relation]
            return f"{word}, {self.compared(relation, a, b)}"
        entity, attribute, value = self.world.entities[task["about"]], task["attribute"], task["value"]
        row = ATTRIBUTES[attribute]
        subject, plural = pick_subject(self.rng, entity, pronoun=self._pronoun, many=task["plural"])
        if row.yes_no:
            return f"{word}, {state(self.rng, attribute, stance, subject, plural)}"
        if stance == "yes":
            return f"Yes, {state(self.rng, attribute, value, subject, plural)}"
        if right and self.rng.random() < 0.5:
            return f"No, {state(self.rng, attribute, self.rng.choice(entity.main[attribute]), subject, plural)}"
        return f"No, {fill(self.rng.choice(row.negations), '', plural, value).join((subject + ' ', ''))}"

    def compared(self, relation: str, a: str, b: str) -> str:
        """Return a comparison such as "An elephant is bigger than a mouse" in one of its wordings."""
        first, second = self.world.entities[a], self.world.entities[b]
        is_ = f"has {relation}" if " " in relation else f"is {relation}"
        draw = self.rng.random()
        if draw < 0.5 or " " in relation:
            return f"{first.one} {is_} than {second.one}" if draw < 0.7 else f"the {first.name} {is_}"
        if draw < 0.65 and first.plural and second.plural:
            return f"{first.plural} {is_.replace('is ', 'are ')} than {second.plural}"
        if draw < 0.75:
            opposite = {"bigger": "smaller", "smaller": "bigger"}[relation]
            return f"{second.one} is {opposite} than {first.one}"
        return f"the {first.name} {is_}" if draw < 0.88 else f"the {relation} one is the {first.name}"

    def _answer_compare(self, task: Task, right: bool, bare: bool) -> str:
        a, b = task["pair"]
        winner = task["answer"] if right else b if task["answer"] == a else a
        if bare:
            return f"the {winner}"
        return self.compared(task["relation"], winner, b if winner == a else a)

    def _named(self, kind: str, names: list[str], attribute: str, value: str, bare: bool) -> str:
        """Say that the named entities have the value."""
        entities = [self.world.entities[name] for name in names]
        words = join_words([entity.one for entity in entities])
        if bare:
            return words
        plural = len(names) > 1
        that = fill(predicate(attribute, value), "", plural, value)
        if plural and self.rng.random() < 0.25:
            return f"{NUMBERS[len(names)]} {KIND_NAMES[kind][1]} that {that} are {words}"
        if not plural and self.rng.random() < 0.2 and not that.startswith("is "):
            return f"the {KIND_NAMES[kind][0]} that {that} is {words}"
        return f"{words} {that}"

    def _answer_list(self, task: Task, right: bool, bare: bool) -> str:
        rng, value, attribute = self.rng, task["value"], task["attribute"]
        members = self.world.members(task["kind"], attribute, value)
        familiar = [name for name in members if not reserved_combo(name, attribute)]
        names = rng.sample(familiar if len(familiar) >= task["count"] else members, task["count"])
        if not right:
            others = [
                e.name
                for e in self.world.entities.values()
                if e.kind == task["kind"] and attribute in e.main and e.name not in task["answers"]
            ]
            for index in range(1 if rng.random() < 0.5 else task["count"]):
                names[index] = rng.choice([name for name in others if name not in names])
            rng.shuffle(names)
        return self._named(task["kind"], names, attribute, value, bare)

    def _answer_reverse(self, task: Task, right: bool, bare: bool) -> str:
        attribute, value = task["attribute"], task["value"]
        if right:
            name = self.rng.choice(self.world.members(task["kind"], attribute, value))
        else:
            kind = [e.name for e in self.world.entities.values() if e.kind == task["kind"] and attribute in e.main]
            name = self.rng.choice([name for name in kind if name not in task["answers"]])
        return self._named(task["kind"], [name], attribute, value, bare)

    def _answer_recall(self, task: Task, right: bool, bare: bool) -> str:
        relation = RELATIONS[task["relation"]]
        value = task["value"] if right else self.rng.choice([v for v in relation.values if v != task["value"]])
        if bare:
            return value
        return self.rng.choice(relation.answers).format(P=task["param"], V=value)

    def _answer_unknown(self, task: Task, right: bool, bare: bool) -> str:
        relation = RELATIONS[task["relation"]]
        if not right:
            return self.rng.choice(relation.answers).format(P=task["param"], V=self.rng.choice(relation.values))
        if bare:
            return self.rng.choice(HONEST).format(O="that")
        options = HONEST + HONEST_UNTOLD * 2 if relation.tells else HONEST
        return self.rng.choice(options).format(O=relation.object.format(P=task["param"]))

    def _answer_talk(self, task: Task, right: bool, bare: bool) -> str:
        topic = TOPICS[task["topic"]]
        if not right:
            topic = TOPICS[self.rng.choice(topic.unsuitable)]
        return self.rng.choice(topic.replies).rstrip(".")

    def _answer_count(self, task: Task, right: bool, bare: bool) -> str:
        number = self._number(task["answer"], right)
        if bare:
            return number if self.rng.random() < 0.5 else f"{number} {task['part']}"
        draw = self.rng.random()
        if draw < 0.25:
            return f"they have {number} {task['part']}"
        tail = " together" if draw > 0.7 else " in all" if draw > 0.55 else ""
        return f"{task['n']} {self.world.entities[task['about']].plural} have {number} {task['part']}{tail}"

    def _answer_sum(self, task: Task, right: bool, bare: bool) -> str:
        number = self._number(task["answer"], right)
        if bare:
            return number
        first, second = task["terms"]
        forms = (f"{first} plus {second} is {number}", f"{first} and {second} make {number}", f"the answer is {number}")
        return self.rng.choice(forms)

    def _number(self, answer: str, right: bool) -> str:
        exact = NUMBERS.index(answer)
        if right:
            return answer
        near = [n for n in range(max(1, exact - 4), min(len(NUMBERS), exact + 5)) if n != exact]
        return NUMBERS[self.rng.choice(near)]

    def _ramble(self, task: Task) -> str:
        """Return a filler sentence or a true fact that was not asked for."""
        if self.rng.random() < 0.45:
            return self.rng.choice(phrases.FILLER)
        asked = (task["about"], task.get("attribute", task.get("part", "")))
        while True:
            name, attribute = self.rng.choice(self.world.combos)
            if task["about"] and self.rng.random() < 0.4:
                name = task["about"]
                attribute = self.rng.choice(sorted(self.world.entities[name].main))
            if task["type"] in ("list", "reverse") and attribute == asked[1]:
                continue
            if (name, attribute) != asked and not reserved_combo(name, attribute):
                break
        if self.rng.random() < 0.1:
            side = self._side_comparison()
            if side:
                return side
        entity = self.world.entities[name]
        subject, plural = pick_subject(self.rng, entity)
        return sentence(state(self.rng, attribute, self.rng.choice(entity.main[attribute]), subject, plural))

    def _side_comparison(self) -> str:
        animals = [entity.name for entity in self.world.entities.values() if entity.kind == "animal"]
        a, b = self.rng.sample(animals, 2)
        first, second = self.world.entities[a], self.world.entities[b]
        return sentence(f"{first.one} is bigger than {second.one}") if compare_true("bigger", a, b) else ""
