"""Stop strings: the first token that completes one, whatever was checked before, without decoding everything."""

from __future__ import annotations

import random

import pytest

from rlhf.generation.stop_strings import StopStrings
from tests.models import tiny


def plain(ids: list[int], stops: tuple[str, ...]) -> int | None:
    """Search the whole text after every token."""
    texts = (tiny.tokenizer().decode(ids[:end]) for end in range(1, len(ids) + 1))
    return next((end for end, text in enumerate(texts, 1) if any(stop in text for stop in stops)), None)


@pytest.mark.parametrize("seed", range(20))
def test_the_first_stop_string_is_found_where_the_whole_text_has_it(seed: int) -> None:
    rng = random.Random(seed)
    ids = [rng.randrange(4, tiny.VOCABULARY - 30) for _ in range(60)]
    text = tiny.tokenizer().decode(ids)
    at = rng.randrange(0, len(text) - 4)
    stops = (text[at : at + rng.choice([1, 2, 4])], "never there")
    wanted = plain(ids, stops)
    found = StopStrings(stops, tiny.tokenizer().decode)
    assert wanted is not None
    assert found.find(ids) == wanted
    for checked in (wanted - 1, max(0, wanted - 7)):
        assert found.find(ids, checked) == wanted
        assert found.find(ids[:checked]) is None


def test_only_the_tail_is_decoded() -> None:
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return tiny.tokenizer().decode(ids)

    ids = tiny.rows(1, [500])[0]
    assert StopStrings(("###",), decode).find(ids, 499) is None
    assert longest <= 4 * 4 + 1
