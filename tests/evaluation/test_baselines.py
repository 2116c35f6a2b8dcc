"""Tests of the baselines of reward models, on pairs with known results."""

from __future__ import annotations

import random

from rlhf.data.records import Comparison
from rlhf.evaluation.baselines import longer_wins, tfidf_accuracy

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def pair(chosen: str, rejected: str, preference: float = 1.0) -> Comparison:
    """Return a comparison of two texts."""
    return Comparison([{"role": "user", "content": "ask"}], chosen, rejected, "here", preference)


def planted(count: int, seed: int, word: str = "good") -> list[Comparison]:
    """Return pairs of random words in which the chosen side also contains one certain word."""
    rng = random.Random(seed)
    sides = [[" ".join(rng.choices(WORDS, k=6)) for _ in range(2)] for _ in range(count)]
    return [pair(f"{a} {word}", b) for a, b in sides]


def test_longer_wins_counts_words() -> None:
    assert longer_wins([pair("a b c", "a-very-long-word")]) == 1.0
    assert longer_wins([pair("a", "a b")]) == 0.0
    assert longer_wins([pair("a b", "c d")]) == 0.5
    assert longer_wins([pair("a b", "c"), pair("a", "b c"), pair("a b", "c"), pair("a", "b")]) == 0.625


def test_longer_wins_leaves_ties_out() -> None:
    assert longer_wins([pair("a b", "c"), pair("a", "b c", preference=0.5)]) == 1.0
    assert longer_wins([]) == 0.0


def test_tfidf_finds_a_planted_word() -> None:
    assert tfidf_accuracy(planted(60, 1), planted(60, 2)) > 0.95


def test_tfidf_finds_nothing_in_random_words() -> None:
    accuracy = tfidf_accuracy(planted(200, 1, word=""), planted(200, 2, word=""))
    assert 0.35 < accuracy < 0.65  # 200 pairs: a standard error of 0.035


def test_tfidf_is_blind_to_a_word_it_was_not_shown() -> None:
    assert 0.3 < tfidf_accuracy(planted(100, 1), planted(100, 2, word="fine")) < 0.7
