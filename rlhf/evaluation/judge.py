"""Judges: any Python function over a response."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlhf.data.records import Messages
from rlhf.errors import DataError
from rlhf.rollout.rewards import import_reward_function

Judge = Callable[[Messages, str, Mapping[str, Any], bool], float]


def load_judge(name: str, *, where: str = "judge") -> Judge:
    """Import 'module:function'. It is the user's own code and runs with the user's rights.

    Raises: ConfigError if there is no such function.
    """
    return import_reward_function(name, what="judge", where=where)


def demo_gold(prompt: Messages, response: str, record: Mapping[str, Any], finished: bool) -> float:
    """Gold utility of the demo world. Known to evaluation only; no training stage may import it."""
    from rlhf.demo.gold import utility

    return utility(response, _task(record), finished)


def demo_answer(prompt: Messages, response: str, record: Mapping[str, Any], finished: bool) -> float:
    """The part of it that is about the answer alone."""
    from rlhf.demo.rules import answer_utility

    return answer_utility(response, _task(record), finished)


def demo_rule_broken(prompt: Messages, response: str, record: Mapping[str, Any], finished: bool) -> float:
    """1 if a response of the demo world breaks a rule of `rlhf.demo.rules`, else 0."""
    from rlhf.demo.rules import broken_rules

    return float(bool(broken_rules(response, _task(record), finished)))


def _task(record: Mapping[str, Any]) -> Any:
    if "task" not in record:
        raise DataError(
            "the demo's judge needs the column 'task'",
            found=f"columns {', '.join(record)}",
            where="judge",
            do="judge prompts of data/demo/eval with it, and others with a function of your own",
        )
    return record["task"]
