"""Judges: Python functions that return the utility of a response."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlhf.data.records import Messages
from rlhf.errors import DataError
from rlhf.rollout.rewards import import_reward_function

Judge = Callable[[Messages, str, Mapping[str, Any], bool], float]


def load_judge(name: str, *, where: str = "judge") -> Judge:
    """Import a judge by its name 'module:function'. It is the user's own code and runs with the user's permissions.

    Raises: ConfigError if there is no such function.
    """
    return import_reward_function(name, what="judge", where=where)


def demo_gold(prompt: Messages, response: str, record: Mapping[str, Any], finished: bool) -> float:
    """Return the gold utility of a response in the demo task: its true reward, which no training stage may import."""
    from rlhf.demo.gold import utility

    return utility(response, _task(record), finished)


def demo_answer(prompt: Messages, response: str, record: Mapping[str, Any], finished: bool) -> float:
    """Return the part of the demo's gold utility that judges the answer alone, not its style."""
    from rlhf.demo.rules import answer_utility

    return answer_utility(response, _task(record), finished)


def demo_rule_broken(prompt: Messages, response: str, record: Mapping[str, Any], finished: bool) -> float:
    """Return 1 if a response in the demo task breaks a rule of `rlhf.demo.rules`, else 0."""
    from rlhf.demo.rules import broken_rules

    return float(bool(broken_rules(response, _task(record), finished)))


def _task(record: Mapping[str, Any]) -> Any:
    if "task" not in record:
        raise DataError(
            "the demo's judge needs the column 'task'",
            found=f"columns {', '.join(record)}",
            where="judge",
            do="use it for the prompts of data/demo/eval, and your own function for other prompts",
        )
    return record["task"]
