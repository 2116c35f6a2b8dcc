"""Writing styles: distributions over manners for demonstrations, comparisons and pretraining personas.

The demonstrations are decent but seldom perfect: each virtue is present only sometimes, so a model that imitates them
has room to be improved by preferences. The comparison replies are spread wider in both directions, because a policy on
its way to better or to worse leaves the range of the demonstrations.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

from .replies import Manner


@dataclass(frozen=True)
class Style:
    """Probabilities from which a `Manner` is drawn."""

    right: float
    wrong: float
    evasive: float
    polite: tuple[float, float, float]
    rude: float
    ramble: tuple[float, float, float]
    repeat: float
    cut: float
    bare: float

    def draw(self, rng: random.Random) -> Manner:
        """Return one manner. The tuples are P(one), P(two), P(three)."""
        off = 1.0 - self.right - self.wrong - self.evasive
        answer = rng.choices(("right", "wrong", "evasive", "off"), (self.right, self.wrong, self.evasive, off))[0]
        rude = 0
        if rng.random() < self.rude:
            rude = 1 if rng.random() < 0.75 else 2
        return Manner(
            answer=answer,
            polite=_count(rng, self.polite),
            rude=rude,
            ramble=_count(rng, self.ramble),
            repeat=0 if rng.random() >= self.repeat else 1 if rng.random() < 0.75 else 2,
            cut=rng.random() < self.cut,
            bare=rng.random() < self.bare,
        )


def _count(rng: random.Random, chances: tuple[float, float, float]) -> int:
    return rng.choices((0, 1, 2, 3), (max(0.0, 1 - sum(chances)), *chances))[0]


SFT = Style(
    right=0.80,
    wrong=0.08,
    evasive=0.07,
    polite=(0.30, 0.07, 0.02),
    rude=0.07,
    ramble=(0.24, 0.10, 0.03),
    repeat=0.08,
    cut=0.015,
    bare=0.10,
)
GOOD = Style(
    right=0.92,
    wrong=0.04,
    evasive=0.03,
    polite=(0.65, 0.14, 0.04),
    rude=0.02,
    ramble=(0.15, 0.05, 0.01),
    repeat=0.05,
    cut=0.01,
    bare=0.10,
)
WIDE = Style(
    right=0.64,
    wrong=0.16,
    evasive=0.12,
    polite=(0.34, 0.14, 0.08),
    rude=0.13,
    ramble=(0.23, 0.15, 0.08),
    repeat=0.16,
    cut=0.06,
    bare=0.14,
)
CROWD = Style(
    right=0.64,
    wrong=0.21,
    evasive=0.10,
    polite=(0.32, 0.10, 0.03),
    rude=0.17,
    ramble=(0.20, 0.07, 0.03),
    repeat=0.13,
    cut=0.05,
    bare=0.16,
)
# A quiz: short answers that are right or not, each marked at once by the one who asks.
QUIZ = Style(
    right=0.55,
    wrong=0.33,
    evasive=0.06,
    polite=(0.15, 0.0, 0.0),
    rude=0.02,
    ramble=(0.04, 0.0, 0.0),
    repeat=0.02,
    cut=0.0,
    bare=0.15,
)
PERSIST = 0.9


def drift(rng: random.Random, persona: Manner) -> Manner:
    """Return the manner of the next reply of the same person: every trait is kept with probability `PERSIST`."""
    fresh = CROWD.draw(rng)
    traits = {f.name: getattr(persona if rng.random() < PERSIST else fresh, f.name) for f in fields(Manner)}
    return Manner(**traits)
