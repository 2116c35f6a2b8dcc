"""Rules between the settings of `rlhf data weak`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from rlhf.config.schema import WeakLabelConfig

RULE = {"name": "r", "regex": "x"}
GOOD: dict[str, Any] = {"output": "o.jsonl", "data": {"path": "d.jsonl"}, "sources": [{"votes": "v"}]}
CLASSES: dict[str, Any] = GOOD | {"kind": "labelled", "labels": ["a", "b"]}


def test_the_defaults_are_the_safe_ones() -> None:
    config = WeakLabelConfig.model_validate(GOOD)
    assert (config.kind, config.no_votes, config.gold, config.data.on_bad_row) == ("comparison", "drop", None, "error")
    assert config.label_model.model_dump() == {
        "kind": "dawid-skene",
        "accuracy": "auto",
        "smoothing": 1.0,
        "tolerance": 1e-9,
        "max_iterations": 2000,
    }


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({}, "exactly one of votes, column, function, regex, .*; got none"),
        ({"name": "x"}, "got none"),
        ({"votes": "v", "column": "c"}, "got votes, column"),
        ({"name": "r", "regex": "x", "words_over": 3}, "got regex, words_over"),
        ({"regex": "x"}, "a rule needs a name: add name to the regex rule"),
        ({"name": "r", "regex": "("}, "not a valid regular expression"),
        ({"name": "r", "keywords": ["a", " "]}, "one of them is blank"),
        ({"column": "c", "vote": "with"}, "vote applies to rules only, and column provides its own"),
        ({"votes": "v", "name": "n"}, "remove name"),
        ({"name": "r", "words_over": 0}, "greater than or equal to 1"),
        ({"name": "r", "regx": "x"}, "Extra inputs"),
    ],
)
def test_a_source_is_one_thing(source: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        WeakLabelConfig.model_validate(GOOD | {"sources": [source]})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (GOOD | {"sources": []}, "at least 1 item"),
        (GOOD | {"labels": ["a", "b"]}, "labels apply to kind=labelled only"),
        (CLASSES | {"labels": ["a"]}, "at least two"),
        (CLASSES | {"labels": ["a", "b", "a"]}, "each of them once"),
        (GOOD | {"sources": [RULE | {"vote": "chosen"}]}, r"sources\.0: a rule for pairs votes 'with' or 'without'"),
        (CLASSES | {"sources": [RULE]}, r"sources\.0: a rule for classes needs a label as vote"),
        (CLASSES | {"sources": [{"name": "r", "longer_by": 1, "vote": "a"}]}, "cannot be longer_by"),
        (CLASSES | {"sources": [RULE | {"vote": "c"}]}, "vote 'c' is not one of labels: a, b"),
        (GOOD | {"label_model": {"accuracy": "per-class"}}, "the order of the responses in a pair means nothing"),
        (GOOD | {"label_model": {"kind": "snorkel"}}, "dawid-skene"),
        (GOOD | {"label_model": {"smoothing": -1}}, "greater than or equal to 0"),
        (GOOD | {"label_model": {"tolerance": 0}}, "greater than 0"),
        (GOOD | {"label_model": {"max_iterations": 0}}, "greater than or equal to 1"),
        (GOOD | {"data": {"path": "d", "weight": 2.0}}, "set them in the stage that trains"),
        (GOOD | {"data": {"path": "d", "limit": 2}}, "set them in the stage that trains"),
        (GOOD | {"data": {"path": "d", "on_bad_row": "skip"}}, "'error' or 'drop'"),
        (GOOD | {"no_votes": "half"}, "'drop' or 'keep'"),
        (GOOD | {"kind": "pairs"}, "'comparison' or 'labelled'"),
    ],
)
def test_what_does_not_fit_together(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        WeakLabelConfig.model_validate(config)


@pytest.mark.parametrize(
    "config",
    [
        GOOD | {"sources": [RULE, RULE | {"name": "s", "vote": "without"}, {"function": "m:f", "name": "f"}]},
        CLASSES | {"sources": [RULE | {"vote": "a"}], "label_model": {"accuracy": "per-class"}},
        CLASSES | {"labels": [], "sources": [RULE | {"vote": "anything"}]},
    ],
)
def test_what_fits(config: dict[str, Any]) -> None:
    WeakLabelConfig.model_validate(config)


def test_show_explains_every_value(call_cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "weak.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"label_model": {"kind": "majority"}}))
    code, out, _ = call_cli(["show", path])
    assert code == 0
    lines = out.splitlines()
    assert any(line.startswith(f"label_model.kind = 'majority'   # {path}:") for line in lines)
    assert any(
        line.startswith("no_votes = 'drop'   # default; what happens to records without a vote") for line in lines
    )
