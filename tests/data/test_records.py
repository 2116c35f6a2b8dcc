"""The record contract, and operations on lists of records."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from rlhf.data.records import (
    BadRow,
    Comparison,
    Demonstration,
    Prompt,
    Record,
    Text,
    check_comparison,
    check_demonstration,
    check_prompt,
    check_text,
)
from rlhf.data.splits import drop_repeats, group_keys, mix_sources, records_fingerprint, split_records
from rlhf.errors import DataError

W = "data/x.jsonl row 118"


def turns(*roles: str, **contents: Any) -> list[dict[str, Any]]:
    """turns("user", "assistant", assistant=None): one turn per role; contents by role."""
    return [{"role": role, "content": contents.get(role, f"{role} {i}")} for i, role in enumerate(roles)]


def pair(**changes: Any) -> Comparison:
    return Comparison(**({"prompt": turns("user"), "chosen": "a", "rejected": "b", "where": W} | changes))


def test_good_records_pass() -> None:
    for roles in (("user",), ("system", "user"), ("user", "assistant", "user")):
        prompt = check_prompt(Prompt(turns(*roles), W))
        check_demonstration(Demonstration([*prompt.messages, *turns("assistant")], W))
    check_comparison(pair(margin=2))
    check_comparison(pair(chosen="same", rejected="same", preference=0.5))
    check_text(Text("a", W))


BAD: dict[str, tuple[Callable[[Any], Any], Any, str]] = {
    "blank text": (check_text, Text(" \n", W), "empty text"),
    "text is a number": (check_text, Text(3, W), "text is not text"),  # type: ignore[arg-type]
    "half a surrogate pair": (check_text, Text("a\ud83d", W), "broken unicode"),
    "no turns": (check_prompt, Prompt([], W), "empty prompt"),
    "empty prompt": (check_prompt, Prompt(turns("user", user=""), W), "empty prompt"),
    "empty response": (check_demonstration, Demonstration(turns("user", "assistant", assistant=""), W), "empty resp"),
    "True": (check_demonstration, Demonstration(turns("user", "assistant", assistant=True), W), "is not text"),
    "None": (check_demonstration, Demonstration(turns("user", "assistant", assistant=None), W), "is not text"),
    "unknown role": (check_prompt, Prompt(turns("tool"), W), "unknown role"),
    "role is a list": (check_prompt, Prompt([{"role": [], "content": "x"}], W), "unknown role"),  # type: ignore[dict-item]
    "ends with user": (check_demonstration, Demonstration(turns("user"), W), "role order"),
    "ends with assistant": (check_prompt, Prompt(turns("user", "assistant"), W), "role order"),
    "assistant first": (check_demonstration, Demonstration(turns("assistant"), W), "role order"),
    "two users": (check_prompt, Prompt(turns("user", "user"), W), "role order"),
    "late system": (check_prompt, Prompt(turns("user", "system", "user"), W), "role order"),
    "only system": (check_prompt, Prompt(turns("system"), W), "role order"),
    "empty chosen": (check_comparison, pair(chosen=""), "empty chosen"),
    "rejected is False": (check_comparison, pair(rejected=False), "rejected is not text"),
    "identical": (check_comparison, pair(chosen="same", rejected="same "), "identical responses"),
    "preference 1.1": (check_comparison, pair(preference=1.1), "preference outside [0, 1]"),
    "preference nan": (check_comparison, pair(preference=float("nan")), "preference outside [0, 1]"),
    "preference True": (check_comparison, pair(preference=True), "preference outside [0, 1]"),
    "margin text": (check_comparison, pair(margin="big"), "margin is not a number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_say_where_why_and_what_to_do(name: str) -> None:
    check, record, reason = BAD[name]
    with pytest.raises(BadRow) as caught:
        check(record)
    assert reason in caught.value.reason
    assert str(caught.value).startswith(f"{W}: ")
    assert "data.on_bad_row=drop" in caught.value.do


def test_fingerprint_is_of_content_and_order() -> None:
    a, b = Text("a", W), Text("b", W)
    assert records_fingerprint([a, b]) == records_fingerprint([Text("a", "elsewhere row 1"), b])
    assert len({records_fingerprint(r) for r in ([a, b], [b, a], [a], [a, b, b], [])}) == 5
    assert records_fingerprint([pair()]) != records_fingerprint([pair(preference=0.9)])
    assert len(records_fingerprint([a])) == 16


def test_repeats() -> None:
    """First one stays, over parts too; another annotator is no repeat, another row around one prompt is."""
    a, b = Text("a", "r1"), Text("b", "r2")
    assert drop_repeats([[a, b, Text("a", "r3")], [Text("b", "r4")]]) == [[a, b], []]
    votes: list[Record] = [pair(extra={"annotator": i}) for i in (1, 2, 1)]
    assert drop_repeats([votes]) == [votes[:2]]
    prompts: list[Record] = [Prompt(turns("user"), W, {"id": i}) for i in (1, 2)]
    assert drop_repeats([prompts]) == [prompts[:1]]


def texts(n: int, prefix: str = "t") -> list[Record]:
    return [Text(f"{prefix}{i}", W) for i in range(n)]


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([10, 90], [1, 1], [10, 90]),  # equal weights: everything
        ([10, 90], [2, 2], [10, 90]),
        ([10, 90], [1, 3], [10, 30]),  # the first is the scarcer for its weight
        ([10, 90], [1, 18], [5, 90]),  # the second is
        ([10, 90, 7], [0.5, 1.0, 0.25], [10, 20, 5]),
        ([1, 5], [1, 1000], [1, 5]),  # at least one of each
        ([0, 5], [1, 2], [0, 5]),
    ],
)
def test_mixture(sizes: list[int], weights: list[float], expected: list[int]) -> None:
    parts = [texts(n, f"{i} ") for i, n in enumerate(sizes)]
    taken = mix_sources(parts, weights, seed=0)
    assert [len(t) for t in taken] == expected
    for part, take in zip(parts, taken, strict=True):
        assert len({t.where + str(t) for t in take}) == len(take)
        assert all(t in part for t in take)
    assert taken == mix_sources(parts, weights, seed=0)


def dialogues() -> list[Record]:
    """60 pairs over 20 questions over 10 trees."""
    records: list[Record] = []
    for i in range(60):
        prompt = [{"role": "user", "content": f"question {i // 3}"}]
        records.append(pair(prompt=prompt, chosen=f"c{i}", where=f"row {i}", extra={"tree": f"tree {i // 6}"}))
    return records


def straddling(train: tuple[Record, ...], validation: tuple[Record, ...]) -> set[str]:
    sides = [{key for record in side for key in group_keys(record)} for side in (train, validation)]
    return sides[0] & sides[1]


def test_split_keeps_groups_whole() -> None:
    records = dialogues()
    train, validation = split_records(records, 0.2, seed=0)
    assert len(validation) == 12
    assert sorted(r.where for r in train + validation) == sorted(r.where for r in records)
    assert not straddling(train, validation)
    by_row = tuple(records[:50]), tuple(records[50:])  # what a split by row does
    assert straddling(*by_row)


def test_split_joins_groups_that_share_anything() -> None:
    """Trees a and b share a prompt, b and c a tree: all three stay together."""
    chain = [
        pair(prompt=[{"role": "user", "content": p}], extra={"tree": t})
        for p, t in (("p1", "a"), ("p2", "a"), ("p2", "b"), ("p3", "b"), ("p3", "c"))
    ]
    for seed in range(10):
        train, validation = split_records([*chain, *texts(5)], 0.5, seed=seed)
        assert {len([r for r in side if isinstance(r, Comparison)]) for side in (train, validation)} == {0, 5}


def test_split_depends_on_seed_and_content_only() -> None:
    records = dialogues()
    shuffled = records[:]
    random.Random(1).shuffle(shuffled)
    members = [
        {r.where for r in split_records(order, 0.2, seed)[1]}
        for order, seed in ((records, 0), (shuffled, 0), (records, 1))
    ]
    assert members[0] == members[1] != members[2]


def test_split_of_dialogues_at_two_depths() -> None:
    """A prompt that continues another one is in its group."""
    first = turns("user", user="same start")
    deeper = [*first, *turns("assistant"), {"role": "user", "content": "more"}]
    assert set(group_keys(Prompt(first, W))) & set(group_keys(Prompt(deeper, W)))


def test_split_edges() -> None:
    assert split_records(texts(3), 0.0, 0) == (tuple(texts(3)), ())
    train, validation = split_records(texts(3), 0.01, 0)
    assert (len(train), len(validation)) == (2, 1)
    with pytest.raises(DataError, match=r"cannot be split.*data.validation"):
        split_records([pair(), pair(chosen="z")], 0.5, 0)
    with pytest.raises(DataError):
        split_records(texts(3), 1.0, 0)
