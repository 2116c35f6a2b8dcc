"""Parser of free text into claims: the inverse of the writers' templates.

Every wording in the tables becomes a pattern, with all entities as possible subjects and all values as possible values,
so that a model may combine them freely, truly or falsely. A sentence can have several readings ("in a field" is where
animals live and where plants grow); the judge chooses among them with the task in mind. What no pattern fits is
reported as unread, never guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from .attributes import ATTRIBUTES, Attribute
from .personal import HONEST, HONEST_UNTOLD, RELATIONS
from .world import NUMBERS, World, plural_noun, third_person, with_article, world

PRONOUNS = ("it", "they", "this", "these")


@dataclass(frozen=True)
class Claim:
    """One thing that a sentence says.

    kind: fact (subject, attribute, value, positive), compare (subject is `key` than value), personal and honest (key is
    the relation, subject its parameter), count (value parts on "two dog"), sum (subject "two plus three"), stance
    (value yes or no), bare (a value or noun on its own). A pronoun subject is left as it is.
    """

    kind: str
    key: str
    subject: str
    value: str
    positive: bool = True


Reading = tuple[Claim, ...]


def _options(words: list[str]) -> str:
    return "|".join(re.escape(word.lower()) for word in sorted(set(words), key=lambda word: (-len(word), word)))


def _series(pattern: str) -> str:
    return f"(?:{pattern})(?:(?:, | and )(?:{pattern}))*"


class Grammar:
    """All patterns of the world, compiled once."""

    def __init__(self, known: World) -> None:
        """Build the subject table and the patterns."""
        self.subjects: dict[str, str] = dict.fromkeys(PRONOUNS, "it")
        self.nouns: dict[str, str] = {}
        for entity in known.entities.values():
            for form in (entity.one, f"the {entity.name}", entity.plural, entity.plural and f"the {entity.plural}"):
                if form:
                    self.subjects[form] = entity.name
            self.nouns[entity.name] = entity.name
            if entity.plural:
                self.nouns[entity.plural] = entity.name
        self._subject = _options(list(self.subjects))
        self._split_subjects = re.compile(rf"(?:^|, | and )({self._subject})(?=$|, | and )")
        self._facts: list[tuple[str, bool, re.Pattern[str]]] = []
        self._values: dict[str, dict[str, str]] = {}
        for name, attribute in ATTRIBUTES.items():
            self._add_attribute(attribute, known.values.get(name, []))
        self._numbers = _options(list(NUMBERS))
        self._personal = self._personal_patterns()
        self._other = self._other_patterns()

    def _add_attribute(self, attribute: Attribute, values: list[str]) -> None:
        """Return patterns of one attribute; each value is known under every form the templates can give it."""
        forms = {value: value for value in values}
        for value in values:
            if attribute.name == "class":
                forms |= {with_article(value): value, plural_noun(value): value}
            if attribute.name == "does":
                forms[third_person(value)] = value
        self._values[attribute.name] = forms
        pool = _options(list(forms)) or "(?!)"
        many = _series(pool)

        def compiled(template: str) -> re.Pattern[str]:
            text = re.sub(r"\[([^|\]]*)\|([^\]]*)\]", r"(?:\1|\2)", template)
            text = text.replace("{S}", f"(?P<s>{_series(self._subject)})", 1)
            return re.compile(re.sub(r"\{[VAD]\}", lambda _: f"(?P<v>{many})", text, count=1))

        for template in [f"{{S}} {text}" for text in attribute.predicates] + list(attribute.frames):
            self._facts.append((attribute.name, True, compiled(template)))
        for template in attribute.negations:
            self._facts.append((attribute.name, False, compiled(f"{{S}} {template}")))

    def _personal_patterns(self) -> list[tuple[str, str, re.Pattern[str]]]:
        """Return (kind, relation, pattern) for personal statements and for honest admissions."""
        found = []
        for relation in RELATIONS.values():
            params = f"(?P<p>{_options([p for p in relation.params if p])})" if relation.params != ("",) else ""
            values = f"(?P<v>{_options(list(relation.values))})"
            for answer in relation.answers:
                text = re.escape(answer.lower()).replace(r"\{p\}", params).replace(r"\{v\}", values)
                found.append(("personal", relation.name, re.compile(text)))
            what = re.escape(relation.object.lower()).replace(r"\{p\}", params)
            for template in HONEST + HONEST_UNTOLD:
                text = re.escape(template.lower()).replace(r"\{o\}", what)
                found.append(("honest", relation.name, re.compile(text)))
        for template in HONEST + HONEST_UNTOLD:
            text = re.escape(template.lower()).replace(r"\{o\}", r"(?:that|it|this)(?: yet)?")
            found.append(("honest", "", re.compile(text)))
        found.append(("honest", "", re.compile("i do not know")))
        return found

    def _other_patterns(self) -> dict[str, re.Pattern[str]]:
        """Return the patterns of comparisons, counts and sums."""
        one, number = f"(?:{self._subject})", f"(?:{self._numbers})"
        plurals = _options(list(self.nouns))
        return {
            "than": re.compile(rf"(?P<a>{one}) (?:is|are) (?P<r>bigger|smaller)(?: than (?P<b>{one}))?"),
            "the one": re.compile(rf"the (?P<r>bigger|smaller) one is (?P<a>{one})"),
            "the with": re.compile(rf"the one with (?P<r>(?:more|fewer) (?:legs|wheels)) is (?P<a>{one})"),
            "more": re.compile(
                rf"(?P<a>{one}) (?:has|have) (?P<r>(?:more|fewer) (?:legs|wheels))(?: than (?P<b>{one}))?"
            ),
            "count": re.compile(
                rf"(?P<n>{number}) (?P<e>{plurals}) (?:has|have) (?P<v>{number}) (?P<p>legs|wheels)"
                r"(?: together| in all)?"
            ),
            "they": re.compile(rf"they have (?P<v>{number}) (?P<p>legs|wheels)(?: together| in all)?"),
            "sum": re.compile(rf"(?P<x>{number}) (?:plus|and) (?P<y>{number}) (?:is|are|make|makes) (?P<v>{number})"),
            "that": re.compile(
                rf"(?:{number}|the|some|an|a) (?:animals?|foods?|drinks?|plants?|things?|person|people) that "
                rf"(?P<rest>.+) (?:is|are) (?P<s>{_series(self._subject)})"
            ),
        }

    def names(self, text: str) -> list[str]:
        """Return the entities in a series of subjects: "a cow and a dog"."""
        return [self.subjects[form] for form in self._split_subjects.findall(text)]

    def split_values(self, attribute: str, text: str) -> list[str]:
        """Return the values in a series; a value may itself contain "and" (black and white)."""
        forms = self._values[attribute]
        if text in forms:
            return [forms[text]]
        parts = re.findall(rf"(?:^|, | and )({_options(list(forms))})(?=$|, | and )", text)
        return [forms[part] for part in parts]

    def facts(self, text: str) -> list[Reading]:
        """Return all readings as a plain statement about entities."""
        found: list[Reading] = []
        for attribute, positive, pattern in self._facts:
            match = pattern.fullmatch(text)
            if match is None:
                continue
            values = ["yes"]
            if "v" in pattern.groupindex:
                values = self.split_values(attribute, match["v"])
            elif not positive:
                values = ["no"]
            truth = positive or "v" not in pattern.groupindex
            names = self.names(match["s"])
            found.append(tuple(Claim("fact", attribute, name, value, truth) for name in names for value in values))
        return found

    def others(self, text: str) -> list[Reading]:
        """Return readings as a comparison, count, sum, personal statement or admission of not knowing."""
        found: list[Reading] = []
        for name, pattern in self._other.items():
            match = pattern.fullmatch(text)
            if match is None:
                continue
            if name in ("than", "the one", "the with", "more"):
                other = match.groupdict().get("b")
                second = self.subjects[other] if other else ""
                found.append((Claim("compare", match["r"], self.subjects[match["a"]], second),))
            elif name == "count":
                found.append((Claim("count", match["p"], f"{match['n']} {self.nouns[match['e']]}", match["v"]),))
            elif name == "they":
                found.append((Claim("count", match["p"], "they", match["v"]),))
            elif name == "sum":
                found.append((Claim("sum", "", f"{match['x']} plus {match['y']}", match["v"]),))
            else:
                found.extend(self._relative(match["rest"], self.names(match["s"])))
        for kind, relation, pattern in self._personal:
            match = pattern.fullmatch(text)
            if match:
                groups = match.groupdict()
                found.append((Claim(kind, relation, groups.get("p") or "", groups.get("v") or ""),))
        return found

    def _relative(self, rest: str, names: list[str]) -> list[Reading]:
        """Read a list such as "two animals that live in the sea are a shark and a whale"."""
        return [
            tuple(Claim("fact", c.key, name, c.value, c.positive) for name in names for c in reading)
            for reading in self.facts(f"they {rest}")
        ]

    def bare(self, text: str) -> list[Reading]:
        """Return the readings of a noun phrase or value on its own."""
        names = self.names(text) if re.fullmatch(_series(self._subject), text) else []
        if not names and text in self.nouns:
            names = [self.nouns[text]]
        found: list[Reading] = [tuple(Claim("bare", "entity", name, "") for name in names)] if names else []
        for attribute, forms in self._values.items():
            if forms and re.fullmatch(_series(_options(list(forms))), text):
                values = self.split_values(attribute, text)
                found.append(tuple(Claim("bare", attribute, "", value) for value in values))
        match = re.fullmatch(rf"({self._numbers})(?: (legs|wheels))?", text)
        if match:
            found.append((Claim("bare", "number", match[2] or "", match[1]),))
        for relation in RELATIONS.values():
            if text in {value.lower() for value in relation.values} and relation.tells:
                found.append((Claim("bare", f"personal:{relation.name}", "", text),))
        return found

    def read(self, text: str) -> list[Reading]:
        """Return readings of a clause: whole, then as a bare answer, then as two clauses joined by "and"."""
        found = self.facts(text) + self.others(text)
        if found:
            return found
        match = re.fullmatch(r"(?:it is|that is|they are|the answer is|this is) (.+)", text)
        found = self.bare(match[1] if match else text)
        if found:
            return found
        return self._joined(text)

    def _joined(self, text: str) -> list[Reading]:
        """Read two clauses, such as "a cow eats grass and lives on a farm" or "..., and an owl eats mice"."""
        for match in re.finditer(r",? (?:and|but) ", text):
            left = self.facts(text[: match.start()]) + self.others(text[: match.start()])
            if not left:
                continue
            rest = text[match.end() :]
            right = self.facts(rest) + self.others(rest)
            subject = re.match(rf"(?:{_series(self._subject)})(?= )", text)
            if not right and subject:
                right = self.facts(f"{subject[0]} {rest}")
            if right:
                return [a + b for a in left for b in right]
        return []


_HEDGE = re.compile(r"(?:i think|i believe|you told me|i know|well|so|now|then|also)(?: that|,)? ")
_STANCE = re.compile(r"(yes|no)(?:, (.+))?")
_VERDICT = {
    "that is true": "yes",
    "that is right": "yes",
    "that is so": "yes",
    "that is not true": "no",
    "that is not right": "no",
    "that is wrong": "no",
}


@lru_cache(maxsize=1)
def grammar() -> Grammar:
    """Return the only grammar; it is compiled once."""
    return Grammar(world())


@lru_cache(maxsize=200_000)
def read_sentence(text: str) -> tuple[Reading, ...]:
    """Return all readings of a lower-case sentence without its final mark; () if there is none."""
    stance = _STANCE.fullmatch(text)
    if stance:
        said = Claim("stance", "", "", stance[1])
        if not stance[2]:
            return ((said,),)
        return tuple((said, *reading) for reading in read_sentence(stance[2]))
    if text in _VERDICT:
        return ((Claim("stance", "", "", _VERDICT[text]),),)
    found = grammar().read(text)
    if not found:
        hedge = _HEDGE.match(text)
        if hedge and hedge.end() < len(text):
            return read_sentence(text[hedge.end() :])
    return tuple(found)
