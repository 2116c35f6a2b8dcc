"""How the core of a question is worded: subject, direct question or indirect clause, opener and closer."""

from __future__ import annotations

import random

from . import phrases
from .asks import Context, split_wordings
from .world import Entity, fill, world


class Dressing:
    """Wording shared by all question families; `ood` selects the reserved wordings."""

    def __init__(self, rng: random.Random, *, ood: bool = False) -> None:
        """Keep the random generator, which the caller owns; the same state gives the same questions."""
        self.rng, self.ood, self.world = rng, ood, world()

    def _dress(self, core: str, context: Context, *, after: bool = True) -> str:
        """Put an optional opener before and an optional closer after the core (statements get greetings only)."""
        if not after:
            greet = phrases.GREETINGS_OOD if self.ood else phrases.GREETINGS
            return f"{self.rng.choice(greet)} {core}" if not context.turn and self.rng.random() < 0.3 else core
        before = phrases.BEFORE_OOD if self.ood else phrases.BEFORE_LATER if context.turn else phrases.BEFORE
        closers = phrases.AFTER_OOD if self.ood else phrases.AFTER
        parts = [self.rng.choice(before)] if self.rng.random() < 0.4 else []
        parts.append(core)
        if self.rng.random() < 0.25 and (last := self.rng.choice(closers)) not in parts:
            parts.append(last)
        return " ".join(parts)

    def _wrap(self, clause: str) -> str:
        """Return an indirect question; "I wonder" takes "about" before a noun."""
        text = self.rng.choice(phrases.WRAPPERS_OOD if self.ood else phrases.WRAPPERS)
        return (
            text.format(C=clause).replace("wonder the ", "wonder about the ").replace("wonder my ", "wonder about my ")
        )

    def _subject(self, entity: Entity, context: Context) -> tuple[str, bool]:
        """Return the subject of a question: a pronoun for the entity spoken of last, else singular or plural."""
        if context.entity == entity.name and self.rng.random() < 0.85:
            return ("they", True) if context.plural else ("it", False)
        if entity.plural and self.rng.random() < 0.35:
            return entity.plural, True
        return entity.one, False

    def _combo(self, combos: list[tuple[str, str]], context: Context) -> tuple[str, str]:
        """Prefer the entity under discussion, so that conversations hang together; never ask a thing twice."""
        combos = [combo for combo in combos if combo not in context.asked]
        if context.entity and self.rng.random() < 0.65:
            same = [combo for combo in combos if combo[0] == context.entity]
            if same:
                return self.rng.choice(same)
        return self.rng.choice(combos)

    def _core(self, wordings: tuple[str, ...], clauses: tuple[str, ...], subject: str, plural: bool) -> str:
        """Return a direct question or a wrapped clause."""
        direct = list(split_wordings(wordings, self.ood))
        if subject in ("it", "they"):
            direct = [text for text in direct if "of {S}" not in text]
            clauses = tuple(text for text in clauses if "of {S}" not in text)
        if direct and (self.rng.random() < 0.6 or not clauses):
            return fill(self.rng.choice(direct), subject, plural)
        return self._wrap(fill(self.rng.choice(clauses), subject, plural))

    def _follow(self, core: str, subject: str, context: Context) -> str:
        """Begin half of the pronoun questions with "And"."""
        if subject in ("it", "they") and context.turn and self.rng.random() < 0.5:
            core = "And " + core[0].lower() + core[1:] if not core.startswith("I ") else "And " + core
        return self._dress(core, context)
