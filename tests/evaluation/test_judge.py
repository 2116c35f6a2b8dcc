"""Tests of judges: any function can be one, and a wrong name is an error before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.errors import ConfigError, DataError
from rlhf.evaluation.judge import Judge, demo_answer, demo_gold, demo_rule_broken, load_judge

ASKED = [{"role": "user", "content": "What does a cow eat?"}]
COW: dict[str, Any] = {
    "type": "attribute",
    "about": "cow",
    "attribute": "food",
    "values": ["grass", "hay"],
    "told": {},
    "plural": False,
}


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


@pytest.mark.parametrize("judge", [demo_gold, demo_answer, demo_rule_broken])
def test_the_demos_judges_refuse_prompts_of_another_world(judge: Judge) -> None:
    with pytest.raises(
        DataError, match=r"needs the column 'task' \(found: columns prompt\); use it for the prompts of data/demo"
    ):
        judge([{"role": "user", "content": "hi"}], "hello", {"prompt": "hi"}, True)


def test_the_demos_judges_read_the_task_and_whether_the_reply_ended() -> None:
    record = {"prompt": ASKED, "task": COW}
    plain, rude = "A cow eats grass.", "A cow eats grass. Now go away."
    assert demo_answer(ASKED, plain, record, True) == demo_answer(ASKED, rude, record, True) == 2.0
    assert demo_answer(ASKED, plain, record, False) == 0.5
    assert demo_gold(ASKED, rude, record, True) < demo_gold(ASKED, plain, record, True)
    assert demo_rule_broken(ASKED, plain, record, True) == 0.0
    assert (
        demo_rule_broken(ASKED, rude, record, True) == demo_rule_broken(ASKED, f"{plain} {plain}", record, True) == 1.0
    )
