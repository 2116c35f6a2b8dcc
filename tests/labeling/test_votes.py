"""Votes from columns, rules and functions: which values count as votes or abstentions, and which are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.labeling import WeakLabelConfig
from rlhf.errors import ConfigError, DataError
from rlhf.labeling.votes import VoteTable, read_votes

Row = dict[str, Any]
PAIR = {"prompt": "ask", "chosen": "a kind reply", "rejected": "no"}
TEXT = {"text": "some words"}


@pytest.fixture
def read_table(write_jsonl: Callable[..., Path], tmp_path: Path) -> Callable[..., VoteTable]:
    """read_table(rows, sources, functions=..., **settings) -> the table of votes."""

    def read(rows: list[Any], sources: list[Row], functions: Any = None, **settings: Any) -> VoteTable:
        data = {"path": str(write_jsonl(tmp_path / "x.jsonl", rows))} | settings.pop("data", {})
        config = {"output": "out.jsonl", "data": data, "sources": sources, **settings}
        return read_votes(WeakLabelConfig.model_validate(config), functions or {})

    return read


def column(found: VoteTable, name: str) -> list[str | None]:
    """Return the votes of one source as names of classes."""
    at = found.sources.index(name)
    return [found.labels[row[at]] if row[at] >= 0 else None for row in found.votes]


@pytest.mark.parametrize(
    ("vote", "means"),
    [
        ("chosen", "chosen"),
        ("rejected", "rejected"),
        (1, "chosen"),
        (0, "rejected"),
        (1.0, "chosen"),
        ("1", "chosen"),
        ("0", "rejected"),
        ("tie", None),
        (0.5, None),
        ("0.5", None),
        (None, None),
        ("", None),
        (" ", None),
    ],
)
def test_every_form_of_a_vote_on_a_pair(vote: Any, means: str | None, read_table: Any) -> None:
    found = read_table([PAIR | {"ann": vote}, PAIR | {"ann": "chosen"}], [{"column": "ann"}])
    assert column(found, "ann") == [means, "chosen"]
    assert found.labels == ("chosen", "rejected")


def test_an_annotator_is_a_source_and_a_missing_one_abstains(read_table: Any) -> None:
    rows = [PAIR | {"votes": {"bob": "chosen", "ann": 0}}, PAIR | {"votes": {"cat": "tie"}}, PAIR | {"votes": None}]
    found = read_table(rows, [{"votes": "votes"}])
    assert found.sources == ("ann", "bob", "cat")
    assert found.votes == [[1, 0, -1], [-1, -1, -1], [-1, -1, -1]]
    assert "1 ties of 'cat' count as abstentions" in found.notes


def test_neither_votes_nor_gold_nor_an_old_label_are_written(read_table: Any) -> None:
    row = PAIR | {"votes": {"a": 1}, "truth": 0, "preference": 1.0, "tree": "t7"}
    found = read_table([row], [{"votes": "votes"}], gold="truth")
    assert found.rows == [PAIR | {"tree": "t7"}]
    assert found.gold == [1]
    assert any("'preference' is replaced" in note for note in found.notes)


def test_gold_may_be_unknown_and_may_be_the_old_label(read_table: Any) -> None:
    rows = [PAIR | {"votes": {"a": 1}, "preference": p} for p in (1.0, 0.5, 0, None)]
    assert read_table(rows, [{"votes": "votes"}], gold="preference").gold == [0, -1, 1, -1]


LONG = {"prompt": "ask", "chosen": "one two three four five", "rejected": "Thank you, one"}


@pytest.mark.parametrize(
    ("rule", "means"),
    [
        ({"regex": "t.r"}, "chosen"),
        ({"regex": "one"}, None),
        ({"regex": "nowhere"}, None),
        ({"keywords": ["thank"]}, "rejected"),
        ({"keywords": ["please", "THANK YOU"]}, "rejected"),
        ({"keywords": ["than", "fou"]}, None),
        ({"keywords": ["thank"], "vote": "without"}, "chosen"),
        ({"keywords": ["thank"], "vote": "with"}, "rejected"),
        ({"words_over": 4}, "chosen"),
        ({"words_over": 5}, None),
        ({"words_over": 2}, None),
        ({"words_under": 4}, "rejected"),
        ({"words_under": 3}, None),
        ({"words_under": 4, "vote": "without"}, "chosen"),
        ({"longer_by": 2}, "chosen"),
        ({"longer_by": 3}, None),
        ({"longer_by": 2, "vote": "without"}, "rejected"),
    ],
)
def test_a_rule_votes_for_the_response_for_which_it_alone_holds(rule: Row, means: str | None, read_table: Any) -> None:
    turned = LONG | {"chosen": LONG["rejected"], "rejected": LONG["chosen"]}
    found = read_table([LONG, turned], [{"name": "r", **rule}])
    mirror = {"chosen": "rejected", "rejected": "chosen", None: None}
    assert column(found, "r") == [means, mirror[means]]


@pytest.mark.parametrize(
    ("rule", "held"),
    [
        ({"regex": "^some"}, [True, False, False]),
        ({"keywords": ["words", "reply"]}, [True, True, False]),
        ({"words_over": 2}, [False, True, False]),
        ({"words_under": 2}, [False, False, True]),
    ],
)
def test_a_rule_of_classes_votes_where_it_holds_on_the_last_turn(rule: Row, held: list[bool], read_table: Any) -> None:
    found = read_table(
        [TEXT, {"text": "a long reply"}, {"text": "no"}],
        [{"name": "r", "vote": "x", **rule}],
        kind="labelled",
        labels=["w", "x"],
    )
    assert column(found, "r") == ["x" if h else None for h in held]
    talk = [{"prompt": "some words of a long reply", "completion": t} for t in ("some words", "a long reply", "no")]
    said = read_table(talk, [{"name": "r", "vote": "x", **rule}], kind="labelled", labels=["w", "x"])
    assert column(said, "r") == column(found, "r")


def test_classes_are_those_voted_for_in_alphabetical_order(read_table: Any) -> None:
    rows = [TEXT | {"a": "spam", "b": 3}, TEXT | {"a": "ham", "b": ""}]
    found = read_table(
        rows, [{"column": "a"}, {"column": "b"}, {"name": "r", "regex": "none", "vote": "eggs"}], kind="labelled"
    )
    assert found.labels == ("3", "eggs", "ham", "spam")
    assert found.votes == [[3, 0, -1], [2, -1, -1]]
    named = read_table(rows, [{"column": "a"}], kind="labelled", labels=["spam", "ham", "x"])
    assert (named.labels, named.votes) == (("spam", "ham", "x"), [[0], [1]])


def test_gold_adds_no_class_and_a_gold_class_without_votes_is_noted(read_table: Any) -> None:
    rows = [TEXT | {"a": "spam", "truth": "eggs"}, TEXT | {"a": "ham", "truth": "ham"}]
    found = read_table(rows, [{"column": "a"}], kind="labelled", gold="truth")
    assert (found.labels, found.gold) == (("ham", "spam"), [-1, 0])
    assert "the gold label of 1 records is not one of the classes: ignored" in found.notes


def test_the_cells_of_a_table(read_table: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('question,good,bad,votes,z\nq,a,b,"{""ann"": ""chosen"", ""bob"": 0}",1\nq,c,d,,\n')
    data = {"path": str(path), "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"}}
    found = read_table([PAIR], [{"votes": "votes"}, {"column": "z"}], data=data)
    assert (found.sources, found.votes) == (("z", "ann", "bob"), [[0, 0, 1], [-1, -1, -1]])
    assert found.rows[1] == {"prompt": "q", "chosen": "c", "rejected": "d"}


# Functions


def test_a_function_receives_the_row_without_votes_and_labels(read_table: Any) -> None:
    seen: list[Row] = []

    def vote(record: Row) -> None:
        seen.append(dict(record))
        record.clear()  # the function receives a copy

    row = PAIR | {"votes": {"a": "chosen"}, "z": 1, "truth": "rejected", "preference": 0.0, "group": "g"}
    found = read_table([row], [{"votes": "votes"}, {"column": "z"}, {"function": "m:f"}], {"m:f": vote}, gold="truth")
    turned = PAIR | {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    assert seen == [PAIR | {"group": "g"}, turned | {"group": "g"}]
    assert found.rows == [PAIR | {"group": "g"}]
    assert column(found, "m:f") == [None]


def test_a_function_of_pairs_abstains_if_its_vote_depends_on_the_order(read_table: Any) -> None:
    def kind(record: Row) -> str | None:
        found = ["kind" in record[side] for side in ("chosen", "rejected")]
        return None if found[0] == found[1] else "chosen" if found[0] else "rejected"

    def first(record: Row) -> int:
        return 1

    rows = [PAIR, PAIR | {"chosen": "x", "rejected": "kind"}, PAIR | {"chosen": "y"}]
    sources = [{"function": "m:kind"}, {"name": "first", "function": "m:first"}]
    found = read_table(rows, sources, {"m:kind": kind, "m:first": first})
    assert column(found, "m:kind") == ["chosen", "rejected", None]
    assert column(found, "first") == [None] * 3
    assert (
        "'first' changes its vote when the two responses are swapped, on 3 records: counted as abstention"
        in found.notes
    )
    assert not any("m:kind" in note for note in found.notes)


def test_a_function_that_fails_is_named_with_the_row(read_table: Any) -> None:
    with pytest.raises(
        DataError, match=r"x.jsonl row 1: the labelling function 'm:f' failed \(found: ZeroDivision.*abst"
    ):
        read_table([PAIR], [{"function": "m:f"}], {"m:f": lambda record: 1 / 0})


# What is refused


@pytest.mark.parametrize(
    ("kind", "row", "expected_text"),
    [
        ("comparison", PAIR | {"v": "first"}, "row 2: the vote of 'v' on a pair is 'chosen', 'rejected' or 'tie'"),
        ("comparison", PAIR | {"v": True}, r"row 2: the vote of 'v' .*found: True"),
        ("comparison", PAIR | {"v": 0.7}, "found: 0.7"),
        ("comparison", PAIR | {"v": ["chosen"]}, "found: "),
        ("comparison", PAIR | {"rejected": "", "v": 1}, "row 2: rejected is empty"),
        ("comparison", PAIR | {"rejected": PAIR["chosen"], "v": 1}, "are identical"),
        ("comparison", "no row", "row 2: the row is not an object"),
        ("labelled", TEXT | {"v": True}, "row 2: the vote of 'v' is one label, text or a whole number.*found: True"),
        ("labelled", TEXT | {"v": 0.5}, "found: 0.5"),
        ("labelled", TEXT | {"v": ["a", "b"]}, "found: "),
        ("labelled", {"text": " ", "v": "a"}, "row 2: text is empty"),
    ],
)
def test_a_bad_row_or_vote_stops_or_is_dropped_and_counted(
    kind: str, row: Any, expected_text: str, read_table: Any
) -> None:
    good = [PAIR | {"v": 1}] if kind == "comparison" else [TEXT | {"v": "a"}, TEXT | {"v": "b"}]
    rows = [good[0], row, *good[1:]]
    with pytest.raises(DataError, match=expected_text):
        read_table(rows, [{"column": "v"}], kind=kind)
    found = read_table(rows, [{"column": "v"}], kind=kind, data={"on_bad_row": "drop"})
    assert len(found.rows) == len(good)
    assert any("1 dropped (1 " in note for note in found.notes)


def test_all_bad_votes_are_reported_at_once(read_table: Any) -> None:
    with pytest.raises(DataError, match=r"(?s)3 problems\n  .*row 1: .*row 3: .*2 bad rows in all \(2 broken vote\)"):
        read_table([PAIR | {"v": "a"}, PAIR | {"v": 1}, PAIR | {"v": "b"}], [{"column": "v"}])


def test_no_record_left_is_an_error(read_table: Any) -> None:
    with pytest.raises(DataError, match=r"no record is left .1 broken vote; first: "):
        read_table([PAIR | {"v": "a"}], [{"column": "v"}], data={"on_bad_row": "drop"})


@pytest.mark.parametrize("votes", ["chosen", ["chosen"], 1, {"": "chosen"}])
def test_a_column_of_votes_that_is_no_mapping(votes: Any, read_table: Any) -> None:
    with pytest.raises(DataError, match="row 1: 'votes' must be a mapping annotator -> vote"):
        read_table([PAIR | {"votes": votes}], [{"votes": "votes"}])


def test_all_missing_columns_are_named(read_table: Any) -> None:
    with pytest.raises(
        DataError, match=r"(?s)2 problems.*no column 'gld' \(found: columns chosen, prompt.*'z'.*name one"
    ):
        read_table([PAIR], [{"column": "z"}], gold="gld")


def test_two_sources_with_the_same_name_are_refused(read_table: Any) -> None:
    with pytest.raises(ConfigError, match="sources: two sources are called 'v'; give one of them another name"):
        read_table([PAIR | {"v": 1}], [{"column": "v"}, {"name": "v", "regex": "x"}])
    with pytest.raises(ConfigError, match="row 1: two sources are called 'ann'"):
        read_table([PAIR | {"votes": {"ann": 1}}], [{"votes": "votes"}, {"name": "ann", "regex": "x"}])


def test_a_single_class_is_refused(read_table: Any) -> None:
    with pytest.raises(ConfigError, match=r"labels: at least two classes are needed \(found: a\); check the votes, or"):
        read_table([TEXT | {"v": "a"}], [{"column": "v"}], kind="labelled")
    with pytest.raises(DataError, match=r"the vote of 'v' is none of labels: a, b .found: 'c'"):
        read_table([TEXT | {"v": "c"}], [{"column": "v"}], kind="labelled", labels=["a", "b"])


def test_columns_without_a_matching_format_are_refused(read_table: Any) -> None:
    with pytest.raises(DataError, match="no format of the kind 'comparison' fits"):
        read_table([TEXT | {"v": 1}], [{"column": "v"}])
