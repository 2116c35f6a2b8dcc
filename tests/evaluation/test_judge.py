"""A judge is any function; a wrong name is refused before anything is computed."""

from __future__ import annotations

import pytest

from rlhf.errors import ConfigError, DataError
from rlhf.evaluation.judge import demo_gold, load_judge


def test_a_function_is_found() -> None:
    assert load_judge("rlhf.evaluation.judge:demo_gold") is demo_gold


@pytest.mark.parametrize(
    "name", ["no.such.module:f", "rlhf.evaluation.judge:nothing", "rlhf.evaluation.judge", ":f", "", "not python:f"]
)
def test_a_wrong_name_says_how_to_give_one(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^judge: the judge does not import \(found: .*; give module:function$") as e:
        load_judge(name)
    assert name in str(e.value)


def test_something_that_cannot_be_called() -> None:
    with pytest.raises(ConfigError, match="not a function"):
        load_judge("rlhf.evaluation.judge:__name__")


def test_the_demos_judge_refuses_prompts_of_another_world() -> None:
    with pytest.raises(DataError, match=r"needs the column 'task' \(found: columns prompt\)"):
        demo_gold([{"role": "user", "content": "hi"}], "hello", {"prompt": "hi"}, True)
