"""Errors for people: four parts in one line, several problems in one error."""

from __future__ import annotations

from rlhf.errors import ConfigError, DataError, RLHFError, combine_errors


def test_a_message_has_the_parts_that_are_known() -> None:
    assert str(ConfigError("expected a number", found="'one'", where="a.yaml:3", do="write 1")) == (
        "a.yaml:3: expected a number (found: 'one'); write 1"
    )
    assert str(ConfigError("expected a number")) == "expected a number"
    assert str(ConfigError("expected a number", do="write 1")) == "expected a number; write 1"


def test_the_parts_of_an_error_can_be_read() -> None:
    error = DataError("no rows", found="0", where="a.jsonl", do="add some")
    assert (error.what, error.found, error.where, error.do) == ("no rows", "0", "a.jsonl", "add some")
    assert isinstance(error, RLHFError)


def test_independent_problems_become_one_error() -> None:
    assert combine_errors(ConfigError, []) is None
    assert str(combine_errors(ConfigError, ["a"])) == "a"
    both = combine_errors(DataError, iter(["a", "b"]))
    assert type(both) is DataError
    assert str(both) == "2 problems\n  a\n  b"
